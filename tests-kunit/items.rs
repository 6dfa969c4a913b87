// SPDX-License-Identifier: GPL-2.0

//! Tests of how a page's record is packed.

#![forbid(unsafe_code)]

use crate::{
    arena::Id,
    domain::Domain,
    items::{
        Age,
        ContentHash,
        PageItem,
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
                    twin: true,
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
    fn contents_have_another_hash_in_every_domain() {
        let hash = ContentHash::new(0x0123_4567_89ab_cdef);
        // That of everybody costs nothing.
        assert_eq!(hash.in_domain(Domain::COMMON), hash);
        for number in 0..1000u64 {
            let domain = Domain::of_process(number);
            let mixed = hash.in_domain(domain);
            assert!(mixed != hash && mixed != ContentHash::default());
            assert!(mixed != hash.in_domain(Domain::of_process(number + 1)));
            assert!(mixed != ContentHash::new(!0).in_domain(domain));
        }
    }

    #[test]
    fn smart_scan_looks_when_stock_does() {
        // Stock's rule in its own terms: an age, and how many passes are still to be left out.
        let (mut stock_age, mut left) = (0u8, 0u8);
        let mut item = PageItem::new(3, 4096, Id::NIL);
        for _ in 0..600 {
            let now = stock_age;
            stock_age = stock_age.saturating_add(1);
            let due = if now < 3 {
                true
            } else if left == 0 {
                left = match now {
                    3 => 1,
                    4..=5 => 2,
                    6..=8 => 4,
                    _ => 8,
                };
                true
            } else {
                left -= 1;
                false
            };
            assert_eq!(item.age().is_due(), due);
            item.grow_older();
        }
    }

    #[test]
    fn an_age_is_kept_until_the_page_is_merged() {
        let hash = ContentHash::new(u64::MAX);
        let mut item = PageItem::new(MAX_SLOTS - 1, TOP, Id::NIL);
        for _ in 0..5 {
            item.grow_older();
        }
        let age = item.age();
        assert!(age != Age::default());
        item.set_idle(hash);
        assert_eq!(item.age(), age);
        let planted = Planted {
            nid: 1023,
            twin: false,
        };
        item.set_unstable(planted);
        assert_eq!(item.age(), age);
        item.grow_older();
        assert_eq!(item.age(), age.next());
        assert_eq!(item.state(), State::Unstable(planted));
        assert_eq!(item.hash(), hash);
        item.set_idle(hash);
        assert_eq!(item.age(), age.next());
        item.set_merged(Id::from_raw(9));
        item.grow_older();
        assert_eq!(item.state(), State::Merged(Id::from_raw(9)));
        item.set_idle(hash);
        assert_eq!(item.age(), Age::default());
    }
}
