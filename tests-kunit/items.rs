// SPDX-License-Identifier: GPL-2.0

//! Tests of how a page's record is packed.

#![forbid(unsafe_code)]

use crate::{
    arena::Id,
    items::{
        ContentHash,
        PageItem,
        Pass,
        Planted,
        State,
        MAX_SLOTS, //
    },
};
use kernel::prelude::*;

/// The highest page address of a process, with five-level page tables.
const TOP: usize = (1 << 56) - 4096;

#[kunit_tests(ksm_rs_items)]
mod tests {
    use super::*;

    #[test]
    fn an_item_is_32_bytes() {
        assert_eq!(size_of::<PageItem>(), 32);
    }

    #[test]
    fn a_place_is_kept_whatever_the_state() {
        let hash = ContentHash::new(0x0123_4567_89ab_cdef);
        for address in [0, 4096, 0x7fff_ffff_f000, TOP] {
            for slot in [0, 1, MAX_SLOTS - 1] {
                let mut item = PageItem::new(slot, address, Id::from_raw(7));
                let whole = |item: &PageItem, state| {
                    item.address() == address
                        && item.slot() == slot
                        && item.next() == Id::from_raw(7)
                        && item.state() == state
                };
                assert!(whole(&item, State::Idle));
                item.set_idle(hash);
                assert!(whole(&item, State::Idle) && item.hash() == hash);
                let planted = Planted {
                    nid: 1023,
                    pass: Pass::FIRST.next(),
                };
                item.set_unstable(planted);
                assert!(whole(&item, State::Unstable(planted)) && item.hash() == hash);
                item.set_merged(Id::from_raw(0x7fff_fffd));
                assert!(whole(&item, State::Merged(Id::from_raw(0x7fff_fffd))));
                assert_eq!(item.hash(), ContentHash::default());
                item.set_idle(ContentHash::default());
                assert!(whole(&item, State::Idle));
            }
        }
    }

    #[test]
    fn no_contents_hash_to_the_value_for_none() {
        for hash in [0, 1, 0xffff, 0x1_0000, u64::MAX] {
            assert!(ContentHash::new(hash) != ContentHash::default());
        }
        // What is left of a hash decides, not what is cut off.
        assert_eq!(ContentHash::new(0x1_0000), ContentHash::new(0x1_ffff));
        assert!(ContentHash::new(0x1_0000) != ContentHash::new(0x2_0000));
    }

    #[test]
    fn passes_follow_each_other_and_come_round() {
        let mut pass = Pass::FIRST;
        let mut item = PageItem::new(0, 0, Id::NIL);
        for _ in 0..200 {
            let next = pass.next();
            assert!(next != pass && next.next() != pass);
            item.set_unstable(Planted { nid: 3, pass: next });
            assert_eq!(
                item.state(),
                State::Unstable(Planted { nid: 3, pass: next })
            );
            pass = next;
        }
    }
}
