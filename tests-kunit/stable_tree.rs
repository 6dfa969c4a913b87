// SPDX-License-Identifier: GPL-2.0

//! Tests of the stable tree with nodes that stand for no page yet.

#![forbid(unsafe_code)]

use crate::{
    arena::Id,
    items::ContentHash,
    stable_tree::StableTree, //
};
use kernel::prelude::*;

fn planted(tree: &mut StableTree, hash: ContentHash) -> Result<Id> {
    let id = tree.prepare()?;
    tree.plant(id, hash, 0);
    Ok(id)
}

#[kunit_tests(ksm_rs_stable_tree)]
mod tests {
    use super::*;

    #[test]
    fn full_nodes_are_not_found_until_there_is_room_again() -> Result {
        let mut tree = StableTree::new()?;
        let hash = ContentHash::new(0x1234_5678_9abc_0000);
        let first = planted(&mut tree, hash)?;
        assert!(tree.first_equal(0, hash) == Some(first));
        // Said twice, as every further mapping of a fork does.
        tree.set_full(first, true);
        tree.set_full(first, true);
        assert!(tree.first_equal(0, hash).is_none());
        let second = planted(&mut tree, hash)?;
        assert!(tree.first_equal(0, hash) == Some(second));
        assert!(tree.next_equal(second).is_none());
        tree.set_full(first, false);
        tree.set_full(second, true);
        assert!(tree.first_equal(0, hash) == Some(first));
        assert!(tree.next_equal(first).is_none());
        Ok(())
    }

    #[test]
    fn a_search_does_not_see_full_nodes_however_many_there_are() -> Result {
        let mut tree = StableTree::new()?;
        let hash = ContentHash::new(u64::MAX);
        for _ in 0..1000 {
            let id = planted(&mut tree, hash)?;
            tree.set_full(id, true);
        }
        let id = planted(&mut tree, hash)?;
        assert!(tree.first_equal(0, hash) == Some(id));
        assert!(tree.next_equal(id).is_none());
        // All of them are there for those who go through the whole tree.
        let mut seen = 0;
        let mut at = tree.first();
        while let Some(id) = at {
            seen += 1;
            at = tree.next(id);
        }
        assert_eq!(seen, 1001);
        Ok(())
    }

    #[test]
    fn a_full_node_keeps_so_when_it_moves_and_goes_when_it_is_removed() -> Result {
        let mut tree = StableTree::new()?;
        let hash = ContentHash::new(0xfeed_0000_0000_0000);
        let id = planted(&mut tree, hash)?;
        tree.set_full(id, true);
        let last = crate::mm::nr_nodes() - 1;
        tree.rehome(id, last);
        assert_eq!(tree.nid(id), Some(last));
        assert!(tree.first_equal(last, hash).is_none());
        tree.set_full(id, false);
        assert!(tree.first_equal(last, hash) == Some(id));
        assert!(tree.remove(id).is_some());
        assert!(tree.first_equal(last, hash).is_none() && tree.first().is_none());
        Ok(())
    }
}
