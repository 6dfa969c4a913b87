// SPDX-License-Identifier: GPL-2.0

//! Tests of the stable tree with nodes that stand for no page yet.

#![forbid(unsafe_code)]

use crate::{
    arena::Id,
    domain::Domain,
    items::ContentHash,
    stable_tree::StableTree,
    stats::Stats, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

fn empty_tree() -> Result<StableTree> {
    StableTree::new(Arc::new(Stats::new(), GFP_KERNEL)?)
}

fn planted(tree: &mut StableTree, hash: ContentHash) -> Result<Id> {
    planted_in(tree, hash, Domain::COMMON)
}

fn planted_in(tree: &mut StableTree, hash: ContentHash, domain: Domain) -> Result<Id> {
    let id = tree.prepare()?;
    tree.plant(id, hash, domain, 0);
    Ok(id)
}

/// Two domains.
const ONE: Domain = Domain::of_cgroup(1);
const OTHER: Domain = Domain::of_cgroup(2);

#[kunit_tests(ksm_rs_stable_tree)]
mod tests {
    use super::*;

    #[test]
    fn full_nodes_are_not_found_until_there_is_room_again() -> Result {
        let mut tree = empty_tree()?;
        let hash = ContentHash::new(0x1234_5678_9abc_0000);
        let first = planted(&mut tree, hash)?;
        assert!(tree.first_equal(0, hash, Domain::COMMON) == Some(first));
        // Said twice, as every further mapping of a fork does.
        tree.set_full(first, true);
        tree.set_full(first, true);
        assert!(tree.first_equal(0, hash, Domain::COMMON).is_none());
        let second = planted(&mut tree, hash)?;
        assert!(tree.first_equal(0, hash, Domain::COMMON) == Some(second));
        assert!(tree.next_equal(second).is_none());
        tree.set_full(first, false);
        tree.set_full(second, true);
        assert!(tree.first_equal(0, hash, Domain::COMMON) == Some(first));
        assert!(tree.next_equal(first).is_none());
        Ok(())
    }

    #[test]
    fn a_search_does_not_see_full_nodes_however_many_there_are() -> Result {
        let mut tree = empty_tree()?;
        let hash = ContentHash::new(u64::MAX);
        for _ in 0..1000 {
            let id = planted(&mut tree, hash)?;
            tree.set_full(id, true);
        }
        let id = planted(&mut tree, hash)?;
        assert!(tree.first_equal(0, hash, Domain::COMMON) == Some(id));
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
        let mut tree = empty_tree()?;
        let hash = ContentHash::new(0xfeed_0000_0000_0000);
        let id = planted(&mut tree, hash)?;
        tree.set_full(id, true);
        let last = crate::mm::nr_nodes() - 1;
        tree.rehome(id, last);
        assert_eq!(tree.nid(id), Some(last));
        assert!(tree.first_equal(last, hash, Domain::COMMON).is_none());
        tree.set_full(id, false);
        assert!(tree.first_equal(last, hash, Domain::COMMON) == Some(id));
        assert!(tree.remove(id).is_some());
        assert!(tree.first_equal(last, hash, Domain::COMMON).is_none() && tree.first().is_none());
        Ok(())
    }

    #[test]
    fn a_sweep_comes_to_each_orphan_once_whatever_goes_meanwhile() -> Result {
        let mut tree = empty_tree()?;
        assert!(tree.first_orphan().is_none() && tree.next_orphan().is_none());
        let mut nodes = KVec::new();
        for seed in 1..=5 {
            let id = planted(&mut tree, ContentHash::new(seed << 32))?;
            nodes.push(id, GFP_KERNEL)?;
            // Said twice, as it may be.
            tree.list_orphan(id);
            tree.list_orphan(id);
        }
        let [one, two, three, four, five] = nodes[..] else {
            return Err(EINVAL);
        };
        for _ in 0..2 {
            for id in [five, four, three, two, one] {
                assert!(tree.next_orphan() == Some(id));
            }
            assert!(tree.next_orphan().is_none());
        }
        // The one that is next, the one before, the first and the last go; a new one comes.
        assert!(tree.next_orphan() == Some(five) && tree.next_orphan() == Some(four));
        tree.unlist_orphan(three);
        drop(tree.remove(four));
        tree.list_orphan(three);
        assert!(tree.next_orphan() == Some(two));
        drop(tree.remove(one));
        assert!(tree.next_orphan().is_none());
        assert!(tree.first_orphan() == Some(three));
        drop(tree.remove(three));
        assert!(tree.next_orphan() == Some(five));
        tree.restart_sweep();
        for id in [five, two] {
            assert!(tree.next_orphan() == Some(id));
            tree.unlist_orphan(id);
        }
        assert!(tree.next_orphan().is_none() && tree.first_orphan().is_none());
        assert!(!tree.is_empty());
        drop((tree.remove(five), tree.remove(two)));
        assert!(tree.is_empty());
        Ok(())
    }

    #[test]
    fn nodes_of_the_same_contents_are_counted_as_chains_and_dups() -> Result {
        let stats = Arc::new(Stats::new(), GFP_KERNEL)?;
        let mut tree = StableTree::new(stats.clone())?;
        let seen = || (stats.stable_node_chains.get(), stats.stable_node_dups.get());
        let hash = ContentHash::new(0x1234_5678_9ab0_0000);
        let other = ContentHash::new(0x1234_5678_9ac0_0000);
        let first = planted(&mut tree, hash)?;
        planted(&mut tree, other)?;
        assert_eq!(seen(), (0, 0));
        tree.set_full(first, true);
        let second = planted(&mut tree, hash)?;
        assert_eq!(seen(), (1, 2));
        // Full or not makes no difference, nor does changing between the two.
        tree.set_full(second, true);
        tree.set_full(first, false);
        assert_eq!(seen(), (1, 2));
        let third = planted(&mut tree, hash)?;
        let fourth = planted(&mut tree, hash)?;
        assert_eq!(seen(), (1, 4));
        planted(&mut tree, other)?;
        assert_eq!(seen(), (2, 6));
        tree.remove(second);
        tree.remove(fourth);
        assert_eq!(seen(), (2, 4));
        tree.remove(first);
        assert_eq!(seen(), (1, 2));
        tree.remove(third);
        assert_eq!(seen(), (1, 2));
        Ok(())
    }

    #[test]
    fn a_search_finds_nodes_of_its_domain_only() -> Result {
        let mut tree = empty_tree()?;
        // Each is in the other's way: only the domains differ.
        let hash = ContentHash::new(0x1234_5678_9abc_0000);
        let first = planted_in(&mut tree, hash, ONE)?;
        assert!(tree.first_equal(0, hash, ONE) == Some(first));
        assert!(tree.first_equal(0, hash, OTHER).is_none());
        assert!(tree.first_equal(0, hash, Domain::COMMON).is_none());
        let second = planted_in(&mut tree, hash, OTHER)?;
        let third = planted_in(&mut tree, hash, ONE)?;
        let fourth = planted_in(&mut tree, hash, OTHER)?;
        assert!(tree.first_equal(0, hash, ONE) == Some(first));
        assert!(tree.next_equal(first) == Some(third));
        assert!(tree.next_equal(third).is_none());
        assert!(tree.first_equal(0, hash, OTHER) == Some(second));
        assert!(tree.next_equal(second) == Some(fourth));
        assert!(tree.next_equal(fourth).is_none());
        // A full one of one domain hides none of the other.
        tree.set_full(second, true);
        assert!(tree.first_equal(0, hash, OTHER) == Some(fourth));
        assert!(tree.first_equal(0, hash, ONE) == Some(first));
        for id in [first, second, third, fourth] {
            let domain = tree.domain(id);
            tree.rehome(id, crate::mm::nr_nodes() - 1);
            assert_eq!(tree.domain(id), domain);
            drop(tree.remove(id));
            assert!(tree.domain(id).is_none());
        }
        Ok(())
    }

    #[test]
    fn domains_have_chains_of_their_own() -> Result {
        let stats = Arc::new(Stats::new(), GFP_KERNEL)?;
        let mut tree = StableTree::new(stats.clone())?;
        let seen = || (stats.stable_node_chains.get(), stats.stable_node_dups.get());
        let hash = ContentHash::new(0x1234_5678_9ab0_0000);
        let first = planted_in(&mut tree, hash, ONE)?;
        planted_in(&mut tree, hash, OTHER)?;
        assert_eq!(seen(), (0, 0));
        let second = planted_in(&mut tree, hash, ONE)?;
        assert_eq!(seen(), (1, 2));
        let third = planted_in(&mut tree, hash, OTHER)?;
        assert_eq!(seen(), (2, 4));
        drop(tree.remove(second));
        assert_eq!(seen(), (1, 2));
        drop(tree.remove(first));
        drop(tree.remove(third));
        assert_eq!(seen(), (0, 0));
        Ok(())
    }

    #[test]
    fn forests_have_chains_of_their_own() -> Result {
        let last = crate::mm::nr_nodes() - 1;
        let stats = Arc::new(Stats::new(), GFP_KERNEL)?;
        let mut tree = StableTree::new(stats.clone())?;
        let seen = || (stats.stable_node_chains.get(), stats.stable_node_dups.get());
        let hash = ContentHash::new(0x1234_5678_9ab0_0000);
        let first = planted(&mut tree, hash)?;
        let second = planted(&mut tree, hash)?;
        tree.rehome(second, last);
        let apart = if last == 0 { (1, 2) } else { (0, 0) };
        assert_eq!(seen(), apart);
        tree.rehome(first, last);
        assert_eq!(seen(), (1, 2));
        Ok(())
    }

    #[test]
    fn an_id_that_is_out_of_date_is_planted_nowhere() -> Result {
        let mut tree = empty_tree()?;
        let last = crate::mm::nr_nodes() - 1;
        let hash = ContentHash::new(5 << 60);
        // A second one keeps the record of the first one from being freed with its chunk.
        let (gone, stays) = (planted(&mut tree, hash)?, planted(&mut tree, hash)?);
        drop(tree.remove(gone));
        for nid in [0, last] {
            tree.rehome(gone, nid);
            assert!(tree.first() == Some(stays));
            assert!(tree.next(stays).is_none());
        }
        // Nor is one that is only prepared.
        let prepared = tree.prepare()?;
        tree.rehome(prepared, last);
        assert!(tree.next(stays).is_none());
        drop(tree.remove(prepared));
        drop(tree.remove(stays));
        Ok(())
    }
}
