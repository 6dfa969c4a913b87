// SPDX-License-Identifier: GPL-2.0

//! Tests of the unstable tree over several passes.

#![forbid(unsafe_code)]

use crate::{
    arena::{
        Arena,
        Id, //
    },
    items::{
        ContentHash,
        PageItem,
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

fn hash(number: u64) -> ContentHash {
    ContentHash::new(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

#[kunit_tests(ksm_rs_unstable_tree)]
mod tests {
    use super::*;

    #[test]
    fn what_is_inserted_is_found_on_every_pass() -> Result {
        let (mut items, ids) = some_items(3000)?;
        let stats = Stats::new();
        let mut tree = UnstableTree::new()?;
        for _pass in 0..5 {
            tree.clear();
            for (number, id) in ids.iter().enumerate() {
                // As the scan does with an item of the last pass.
                tree.remove(&mut items, *id, &stats);
                let hash = hash(number as u64);
                assert!(tree.first_equal(&items, 0, hash).is_none());
                tree.insert(&mut items, *id, 0, &stats);
                assert!(tree.first_equal(&items, 0, hash) == Some(*id));
            }
            assert_eq!(stats.pages_unshared.get(), ids.len());
        }
        Ok(())
    }

    #[test]
    fn an_item_of_the_last_pass_can_be_removed_while_others_stand() -> Result {
        let (mut items, ids) = some_items(1000)?;
        let stats = Stats::new();
        let mut tree = UnstableTree::new()?;
        for id in ids.iter() {
            tree.insert(&mut items, *id, 0, &stats);
        }
        tree.clear();
        let (old, new) = ids.split_at(500);
        for id in new {
            tree.remove(&mut items, *id, &stats);
            tree.insert(&mut items, *id, 0, &stats);
        }
        for id in old {
            tree.remove(&mut items, *id, &stats);
            assert_eq!(items.get(*id).map(PageItem::state), Some(State::Idle));
        }
        for (number, id) in ids.iter().enumerate() {
            let found = tree.first_equal(&items, 0, hash(number as u64));
            assert!(found == (number >= 500).then_some(*id));
        }
        assert_eq!(stats.pages_unshared.get(), 500);
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
        tree.insert(&mut items, here, last, &stats);
        assert!(tree.first_equal(&items, last, hash(0)) == Some(here));
        // A node that the machine has not: nothing happens.
        tree.insert(&mut items, there, last + 1, &stats);
        assert_eq!(items.get(there).map(PageItem::state), Some(State::Idle));
        assert_eq!(stats.pages_unshared.get(), 1);
        tree.remove(&mut items, here, &stats);
        assert!(tree.first_equal(&items, last, hash(0)).is_none());
        Ok(())
    }
}
