// SPDX-License-Identifier: GPL-2.0

//! Tests of the cursor's arithmetic.

#![forbid(unsafe_code)]

use crate::{
    arena::Id,
    mm::walk::{
        BATCH_PAGES,
        PAGE_TABLE_SPAN, //
    },
    registry::SlotId,
    scan::{
        room_for_items,
        Cursor, //
    }, //
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

fn at(slot: SlotId) -> Cursor {
    let mut cursor = Cursor::default();
    cursor.enter(Some(slot));
    cursor
}

#[kunit_tests(ksm_rs_scan)]
mod tests {
    use super::*;

    #[test]
    fn page_tables_are_whole_batches() {
        assert_eq!(PAGE_TABLE_SPAN % (BATCH_PAGES * PAGE_SIZE), 0);
    }

    #[test]
    fn a_cursor_starts_below_everything() {
        let cursor = at(5);
        assert_eq!(cursor.slot, Some(5));
        assert_eq!(cursor.address(), 0);
        assert!(cursor.last().is_nil());
        assert_eq!(Cursor::default().slot, None);
    }

    #[test]
    fn a_step_goes_behind_the_page_and_remembers_its_item() {
        let mut cursor = at(0);
        cursor.step(0x20_0000, Id::from_raw(9));
        assert_eq!(cursor.address(), 0x20_1000);
        assert!(cursor.last() == Id::from_raw(9));
    }

    #[test]
    fn a_cursor_never_goes_back_but_to_the_start() {
        let mut cursor = at(0);
        cursor.step(0x40_0000, Id::from_raw(1));
        cursor.skip_to(0x20_0000);
        assert_eq!(cursor.address(), 0x40_1000);
        cursor.skip_to(0x60_0000);
        assert_eq!(cursor.address(), 0x60_0000);
        assert!(cursor.last() == Id::from_raw(1));
        cursor.rewind();
        assert_eq!(cursor.address(), 0);
        assert!(cursor.last().is_nil());
        assert_eq!(cursor.slot, Some(0));
    }

    #[test]
    fn there_is_room_for_the_items_of_all_pages_but_not_for_any_number() {
        // Few items: nobody asks for the pages.
        assert!(room_for_items(0, || 0) >= BATCH_PAGES);
        for pages in [0, 1, 10_000, 1 << 40] {
            // A whole batch of new pages, with an item for every page already and as many of pages that are gone.
            assert!(room_for_items(2 * pages, || pages) >= BATCH_PAGES);
            // And so many that there is no end of it.
            assert_eq!(room_for_items(3 * pages + 10_000, || pages), 0);
        }
        assert!(room_for_items(usize::MAX - 1, || usize::MAX) < usize::MAX);
    }

    #[test]
    fn the_last_page_of_all_does_not_wrap_the_cursor() {
        let mut cursor = at(0);
        cursor.step(usize::MAX - (PAGE_SIZE - 1), Id::from_raw(1));
        assert_eq!(cursor.address(), usize::MAX);
    }
}
