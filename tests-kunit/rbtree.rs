// SPDX-License-Identifier: GPL-2.0

//! Tests of the red-black tree against a sorted list.

#![forbid(unsafe_code)]

use crate::{
    arena::{
        self,
        Arena,
        Id,
        Record, //
    },
    rbtree::{
        self,
        Damage,
        Links,
        Node,
        Root, //
    },
};
use kernel::prelude::*;

/// Random numbers, the same ones in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 20) as usize % limit.max(1)
    }
}

#[derive(Default)]
struct Item {
    links: Links,
    key: u64,
}

impl Record for Item {
    type Page = [Self; arena::slots::<Self>()];
}

impl Node for Item {
    fn links(&self) -> &Links {
        &self.links
    }

    fn links_mut(&mut self) -> &mut Links {
        &mut self.links
    }
}

/// A tree, its nodes, and a list of the same in order.
struct Bench {
    arena: Arena<Item>,
    root: Root,
    model: KVec<(u64, Id)>,
}

impl Bench {
    fn new() -> Self {
        Self {
            arena: Arena::new(),
            root: Root::new(),
            model: KVec::new(),
        }
    }

    fn insert(&mut self, key: u64) -> Result<Id> {
        let item = Item {
            key,
            ..Item::default()
        };
        let id = self.arena.insert(item, GFP_KERNEL)?;
        if !self
            .root
            .insert_by(&mut self.arena, id, |node| key < node.key)
        {
            return Err(EINVAL);
        }
        let at = self.model.partition_point(|entry| entry.0 <= key);
        self.model.reserve(1, GFP_KERNEL)?;
        self.model
            .insert_within_capacity(at, (key, id))
            .map_err(|_| EINVAL)?;
        Ok(id)
    }

    /// Removes the node at position `at` of the order.
    fn remove(&mut self, at: usize) -> Result {
        let (_, id) = self.model.remove(at).map_err(|_| EINVAL)?;
        if !self.root.erase(&mut self.arena, id) {
            return Err(EINVAL);
        }
        match self.arena.remove(id) {
            Some(item) if !item.links.is_linked() => Ok(()),
            _ => Err(EINVAL),
        }
    }

    /// Returns whether the tree is sound and has the nodes of the list in its order.
    fn is_good(&self) -> bool {
        same(&self.arena, self.root, &self.model)
    }
}

fn check(arena: &Arena<Item>, root: Root) -> Result<usize, Damage> {
    root.check(arena, |one, other| one.key <= other.key)
}

fn same(arena: &Arena<Item>, root: Root, model: &[(u64, Id)]) -> bool {
    if check(arena, root) != Ok(model.len()) {
        return false;
    }
    let mut at = root.first(arena);
    for &(_, id) in model {
        if at != id {
            return false;
        }
        at = rbtree::next(arena, at);
    }
    at.is_nil()
}

#[kunit_tests(ksm_rs_rbtree)]
mod tests {
    use super::*;

    #[test]
    fn empty() {
        let mut arena = Arena::<Item>::new();
        let mut root = Root::default();
        assert!(root.is_empty());
        assert!(root == Root::new());
        assert!(root.top().is_nil());
        assert!(root.first(&arena).is_nil());
        assert!(root.partition_point(&arena, |_| true).is_nil());
        assert!(rbtree::next(&arena, Id::NIL).is_nil());
        assert!(!root.erase(&mut arena, Id::NIL));
        assert!(!root.insert_by(&mut arena, Id::NIL, |_| true));
        assert!(!root.insert_by(&mut arena, Id::from_raw(7), |_| true));
        assert!(root.is_empty());
        assert_eq!(check(&arena, root), Ok(0));
        assert_eq!(size_of::<Links>(), 12);
        assert_eq!(size_of::<Root>(), 4);
        assert!(!Links::default().is_linked());
    }

    #[test]
    fn sorted_insertions() -> Result {
        for order in 0..4u64 {
            let mut bench = Bench::new();
            for step in 0..200u64 {
                let key = match order {
                    0 => step,
                    1 => 200 - step,
                    // From both ends to the middle.
                    2 if step % 2 == 0 => step,
                    2 => 400 - step,
                    _ => 5,
                };
                bench.insert(key)?;
                assert!(bench.is_good());
            }
            for step in 0..200 {
                let at = match order {
                    0 => 0,
                    1 => 199 - step,
                    2 => (199 - step) / 2,
                    _ => step % (200 - step),
                };
                bench.remove(at)?;
                assert!(bench.is_good());
            }
            assert!(bench.root.is_empty());
            assert_eq!(bench.arena.len(), 0);
        }
        Ok(())
    }

    #[test]
    fn random_operations() -> Result {
        for (seed, keys) in [(0x5eed_2001, 1 << 40), (0x5eed_2002, 60), (0x5eed_2003, 3)] {
            pr_info!("rbtree: seed {seed:#x}, keys below {keys}\n");
            let mut random = Random(seed);
            let mut bench = Bench::new();
            for step in 0..1500 {
                let grow = if step / 300 % 2 == 0 { 7 } else { 3 };
                if random.below(10) < grow {
                    bench.insert(random.next() % keys)?;
                } else if !bench.model.is_empty() {
                    bench.remove(random.below(bench.model.len()))?;
                }
                assert!(bench.is_good());

                let key = random.next() % keys;
                let found = bench
                    .root
                    .partition_point(&bench.arena, |node| node.key < key);
                let at = bench.model.partition_point(|entry| entry.0 < key);
                let expected = bench.model.get(at).map_or(Id::NIL, |entry| entry.1);
                assert!(found == expected);
            }
        }
        Ok(())
    }

    #[test]
    fn wrong_calls_do_nothing() -> Result {
        let mut bench = Bench::new();
        for key in 0..20 {
            bench.insert(key)?;
        }
        let inside = bench.root.first(&bench.arena);
        assert!(bench
            .arena
            .get(inside)
            .is_some_and(|node| node.links.is_linked()));
        let outside = bench.arena.insert(Item::default(), GFP_KERNEL)?;

        // Linked twice, unlinked twice, and replaced the wrong way round.
        assert!(!bench.root.insert_by(&mut bench.arena, inside, |_| true));
        assert!(!bench.root.erase(&mut bench.arena, outside));
        assert!(!bench.root.replace(&mut bench.arena, outside, inside));
        assert!(!bench.root.replace(&mut bench.arena, inside, inside));
        assert!(!bench.root.replace(&mut bench.arena, inside, Id::NIL));
        assert!(bench.is_good());
        Ok(())
    }

    #[test]
    fn replace() -> Result {
        let mut bench = Bench::new();
        for key in 0..64 {
            bench.insert(key * 37 % 64)?;
        }
        for at in 0..64 {
            let (key, old) = *bench.model.get(at).ok_or(EINVAL)?;
            let item = Item {
                key,
                ..Item::default()
            };
            let new = bench.arena.insert(item, GFP_KERNEL)?;
            assert!(bench.root.replace(&mut bench.arena, old, new));
            if let Some(entry) = bench.model.get_mut(at) {
                entry.1 = new;
            }
            let removed = bench.arena.remove(old).ok_or(EINVAL)?;
            assert!(!removed.links.is_linked());
            assert!(bench.is_good());
        }
        Ok(())
    }

    #[test]
    fn split_and_join() -> Result {
        let mut random = Random(0x5eed_2004);
        for size in [0, 1, 2, 3, 4, 5, 7, 8, 12, 31, 64, 200] {
            let mut bench = Bench::new();
            for _ in 0..size {
                bench.insert(random.next() >> 1)?;
            }
            for _ in 0..30 {
                let cut = random.below(size + 1);
                let key = bench.model.get(cut).map_or(u64::MAX, |entry| entry.0);
                let (low, high) = bench.root.split(&mut bench.arena, |node| node.key < key);
                let (low_model, high_model) = bench.model.split_at(cut);
                assert!(same(&bench.arena, low, low_model));
                assert!(same(&bench.arena, high, high_model));
                bench.root = Root::join(&mut bench.arena, low, high);
                assert!(bench.is_good());
            }
        }
        Ok(())
    }

    #[test]
    fn join_any_sizes() -> Result {
        for low in [0u64, 1, 2, 3, 6, 20, 100] {
            for high in [0u64, 1, 2, 5, 17, 150] {
                let mut bench = Bench::new();
                for key in 0..low {
                    bench.insert(key)?;
                }
                let first = core::mem::take(&mut bench.root);
                for key in 0..high {
                    bench.insert(1000 + key)?;
                }
                bench.root = Root::join(&mut bench.arena, first, bench.root);
                assert!(bench.is_good());
            }
        }
        Ok(())
    }

    #[test]
    fn damage_is_found_and_survived() -> Result {
        let mut random = Random(0x5eed_2005);
        for _ in 0..40 {
            let mut bench = Bench::new();
            for _ in 0..50 {
                bench.insert(random.next() % 100)?;
            }
            // Two nodes with the links of one: a loop, or a node lost.
            let one = bench.model.get(random.below(50)).ok_or(EINVAL)?.1;
            let other = bench.model.get(random.below(50)).ok_or(EINVAL)?.1;
            if one == other {
                continue;
            }
            let links = *bench.arena.get(one).ok_or(EINVAL)?.links();
            if let Some(node) = bench.arena.get_mut(other) {
                *node.links_mut() = links;
            }
            assert!(!bench.is_good());

            // All of this has to end somehow.
            for at in 0..50 {
                let key = random.next() % 100;
                let id = bench.model.get(at).ok_or(EINVAL)?.1;
                bench
                    .root
                    .partition_point(&bench.arena, |node| node.key < key);
                rbtree::next(&bench.arena, id);
                if at % 2 == 0 {
                    bench.root.erase(&mut bench.arena, id);
                    bench
                        .root
                        .insert_by(&mut bench.arena, id, |node| key < node.key);
                }
                if at % 5 == 0 {
                    let (low, high) = bench.root.split(&mut bench.arena, |node| node.key < key);
                    bench.root = Root::join(&mut bench.arena, low, high);
                }
                let _ = check(&bench.arena, bench.root);
            }
        }
        Ok(())
    }

    #[test]
    fn missing_nodes_are_survived() -> Result {
        let mut random = Random(0x5eed_2006);
        for _ in 0..20 {
            let mut bench = Bench::new();
            for _ in 0..400 {
                bench.insert(random.next() % 100)?;
            }
            for &(_, id) in bench.model.iter().take(200 + random.below(100)) {
                bench.arena.remove(id);
            }
            assert!(check(&bench.arena, bench.root).is_err());
            for at in 0..400 {
                let id = bench.model.get(at).ok_or(EINVAL)?.1;
                rbtree::next(&bench.arena, id);
                bench.root.erase(&mut bench.arena, id);
            }
        }
        Ok(())
    }
}
