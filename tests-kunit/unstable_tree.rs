// SPDX-License-Identifier: GPL-2.0

//! Tests of the unstable tree.

#![forbid(unsafe_code)]

use crate::{
    arena::{
        Arena,
        Id, //
    },
    items::{
        ContentHash,
        PageItem,
        Planted,
        State, //
    },
    stats::Stats,
    unstable_tree::UnstableTree, //
};
use kernel::prelude::*;

/// Items, with hashes that differ in their top bits.
fn some_items(count: u64) -> Result<(Arena<PageItem>, KVec<Id>)> {
    let mut items = Arena::new();
    let mut ids = KVec::new();
    for number in 0..count {
        let mut item = PageItem::new(0, number as usize * 4096, Id::NIL);
        item.set_idle(hash(number));
        ids.push(items.insert(item, GFP_KERNEL)?, GFP_KERNEL)?;
    }
    Ok((items, ids))
}

/// In the forest of the first node, alone.
const HERE: Planted = Planted {
    nid: 0,
    twin: false,
};

fn hash(number: u64) -> ContentHash {
    ContentHash::new(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

#[kunit_tests(ksm_rs_unstable_tree)]
mod tests {
    use super::*;

    #[test]
    fn what_is_inserted_stays_until_it_is_removed() -> Result {
        let (mut items, ids) = some_items(3000)?;
        let stats = Stats::new();
        let mut tree = UnstableTree::new()?;
        for (number, id) in ids.iter().enumerate() {
            let hash = hash(number as u64);
            assert!(tree.first_equal(&items, 0, hash).is_none());
            tree.insert(&mut items, *id, HERE, &stats);
            assert!(tree.first_equal(&items, 0, hash) == Some(*id));
            assert_eq!(
                items.get(*id).map(PageItem::state),
                Some(State::Unstable(HERE))
            );
        }
        assert_eq!(stats.pages_unshared.get(), 3000);
        for (number, id) in ids.iter().enumerate() {
            if number % 3 != 0 {
                tree.remove(&mut items, *id, &stats);
                assert_eq!(items.get(*id).map(PageItem::state), Some(State::Idle));
                // Not in any tree: nothing happens.
                tree.remove(&mut items, *id, &stats);
            }
        }
        for (number, id) in ids.iter().enumerate() {
            let found = tree.first_equal(&items, 0, hash(number as u64));
            assert!(found == (number % 3 == 0).then_some(*id));
        }
        assert_eq!(stats.pages_unshared.get(), 1000);
        Ok(())
    }

    #[test]
    fn twins_stand_side_by_side() -> Result {
        let (mut items, ids) = some_items(3)?;
        let stats = Stats::new();
        let mut tree = UnstableTree::new()?;
        for id in ids.iter() {
            if let Some(item) = items.get_mut(*id) {
                item.set_idle(hash(7));
            }
            let twin = tree.first_equal(&items, 0, hash(7)).is_some();
            tree.insert(&mut items, *id, Planted { nid: 0, twin }, &stats);
        }
        let [first, second, third] = *ids.as_slice() else {
            return Err(EINVAL);
        };
        assert!(tree.first_equal(&items, 0, hash(7)) == Some(first));
        assert!(tree.next_equal(&items, 0, first) == Some(second));
        assert!(tree.next_equal(&items, 0, second) == Some(third));
        assert!(tree.next_equal(&items, 0, third).is_none());
        tree.remove(&mut items, second, &stats);
        assert!(tree.next_equal(&items, 0, first) == Some(third));
        Ok(())
    }

    #[test]
    fn nodes_have_forests_of_their_own() -> Result {
        let (mut items, ids) = some_items(2)?;
        let stats = Stats::new();
        let mut tree = UnstableTree::new()?;
        let [here, there] = *ids.as_slice() else {
            return Err(EINVAL);
        };
        let last = crate::mm::nr_nodes() - 1;
        let at = |nid| Planted { nid, twin: false };
        tree.insert(&mut items, here, at(last), &stats);
        assert!(tree.first_equal(&items, last, hash(0)) == Some(here));
        // A node that the machine has not: nothing happens.
        tree.insert(&mut items, there, at(last + 1), &stats);
        assert_eq!(items.get(there).map(PageItem::state), Some(State::Idle));
        assert_eq!(stats.pages_unshared.get(), 1);
        tree.remove(&mut items, here, &stats);
        assert!(tree.first_equal(&items, last, hash(0)).is_none());
        Ok(())
    }
}
