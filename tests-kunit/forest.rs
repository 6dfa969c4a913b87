// SPDX-License-Identifier: GPL-2.0

//! Tests of the forest against a sorted list.

#![forbid(unsafe_code)]

use crate::{
    arena::{
        self,
        Arena,
        Id,
        Record, //
    },
    forest::{
        Forest,
        Keyed, //
    },
    rbtree::{
        Links,
        Node, //
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
        self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15)
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

impl Keyed for Item {
    fn key(&self) -> u64 {
        self.key
    }
}

/// A forest, its records, and a list of the same in order.
struct Bench {
    arena: Arena<Item>,
    forest: Forest,
    model: KVVec<(u64, Id)>,
}

impl Bench {
    fn new() -> Self {
        Self {
            arena: Arena::new(),
            forest: Forest::new(),
            model: KVVec::new(),
        }
    }

    fn insert(&mut self, key: u64) -> Result {
        let item = Item {
            key,
            ..Item::default()
        };
        let id = self.arena.insert(item, GFP_KERNEL)?;
        self.forest.insert(&mut self.arena, id);
        let at = self.model.partition_point(|entry| entry.0 <= key);
        self.model.reserve(1, GFP_KERNEL)?;
        self.model
            .insert_within_capacity(at, (key, id))
            .map_err(|_| EINVAL)
    }

    /// Removes the record at position `at` of the order.
    fn remove(&mut self, at: usize) -> Result {
        let (_, id) = self.model.remove(at).map_err(|_| EINVAL)?;
        self.forest.remove(&mut self.arena, id);
        self.arena.remove(id).ok_or(EINVAL)?;
        Ok(())
    }

    /// Returns whether the forest is sound and has the records of the list in its order.
    fn is_good(&self) -> bool {
        if self.forest.check(&self.arena).is_err() || self.forest.len() != self.model.len() {
            return false;
        }
        let mut at = self.forest.first(&self.arena);
        for &(_, id) in &self.model {
            if at != Some(id) {
                return false;
            }
            at = self.forest.next(&self.arena, id);
        }
        at.is_none()
    }

    /// Returns whether looking up `key` gives the same records as in the list.
    fn finds(&self, key: u64) -> bool {
        let from = self.model.partition_point(|entry| entry.0 < key);
        let mut at = self.forest.first_equal(&self.arena, key);
        for &(_, id) in self
            .model
            .iter()
            .skip(from)
            .take_while(|entry| entry.0 == key)
        {
            if at != Some(id) {
                return false;
            }
            at = self.forest.next_equal(&self.arena, id);
        }
        at.is_none()
    }

    /// Returns the key of a random record, or of none.
    fn some_key(&self, random: &mut Random) -> u64 {
        let other = random.next();
        match self
            .model
            .get(random.below(self.model.len().wrapping_mul(2)))
        {
            Some(entry) => entry.0,
            None => other,
        }
    }
}

/// A key of one of several distributions.
fn key(random: &mut Random, kind: usize) -> u64 {
    match kind {
        // As a good hash gives them.
        0 => random.next(),
        // Few different ones, far apart.
        1 => random.next() >> 60 << 60,
        // All in one tree, however many there are.
        2 => random.next() >> 40,
        // At the ends.
        3 if random.below(2) == 0 => random.next() >> 50,
        3 => !(random.next() >> 50),
        // Half of them the same one.
        _ if random.below(2) == 0 => 0x8000_0000_0000_0000,
        _ => random.next(),
    }
}

#[kunit_tests(ksm_rs_forest)]
mod tests {
    use super::*;

    #[test]
    fn empty() {
        let mut arena = Arena::<Item>::new();
        let mut forest = Forest::new();
        assert_eq!(forest.bytes(), 0);
        assert_eq!(forest.len(), 0);
        assert!(forest.first(&arena).is_none());
        assert!(forest.first_equal(&arena, 0).is_none());
        assert!(forest.next(&arena, Id::NIL).is_none());
        assert!(forest.next_equal(&arena, Id::NIL).is_none());
        forest.insert(&mut arena, Id::NIL);
        forest.remove(&mut arena, Id::from_raw(3));
        assert_eq!(forest.len(), 0);
        assert!(forest.check(&arena).is_ok());
    }

    #[test]
    fn random_operations() -> Result {
        for (kind, seed) in (0x5eed_3001..0x5eed_3006).enumerate() {
            pr_info!("forest: seed {seed:#x}, keys of kind {kind}\n");
            let mut random = Random(seed);
            let mut bench = Bench::new();
            for step in 0..800 {
                let grow = if step / 200 % 2 == 0 { 8 } else { 3 };
                if random.below(10) < grow {
                    let key = key(&mut random, kind);
                    bench.insert(key)?;
                } else if !bench.model.is_empty() {
                    bench.remove(random.below(bench.model.len()))?;
                }
                assert!(bench.is_good());
                let key = bench.some_key(&mut random);
                assert!(bench.finds(key));
            }
        }
        Ok(())
    }

    #[test]
    fn growing_and_draining() -> Result {
        for (kind, seed) in (0x5eed_3011..0x5eed_3016).enumerate() {
            pr_info!("forest: seed {seed:#x}, keys of kind {kind}\n");
            let mut random = Random(seed);
            let mut bench = Bench::new();
            for step in 0..6000 {
                let key = key(&mut random, kind);
                bench.insert(key)?;
                if step % 499 == 0 {
                    assert!(bench.is_good());
                }
                let key = bench.some_key(&mut random);
                assert!(bench.finds(key));
            }
            assert!(bench.is_good());
            // A root for each record, rounded up, and half of that again during a resize.
            assert!(bench.forest.bytes() >= 4 * 4096);
            assert!(bench.forest.bytes() <= 3 * 4 * 8192);

            // From the front, as when pages of memory that goes away are given up.
            for step in 0..5800 {
                assert!(
                    bench.forest.first(&bench.arena) == bench.model.first().map(|entry| entry.1)
                );
                bench.remove(0)?;
                if step % 499 == 0 {
                    assert!(bench.is_good());
                }
            }
            assert!(bench.is_good());
            assert!(bench.forest.bytes() <= 3 * 4 * 1024);

            // And the rest from the back, so that the front stays where it is.
            while !bench.model.is_empty() {
                bench.remove(bench.model.len() - 1)?;
                assert!(bench.is_good());
            }
            assert_eq!(bench.forest.bytes(), 0);
        }
        Ok(())
    }

    #[test]
    fn first_record_leaves_early() -> Result {
        // The lowest key goes while its tree has others, and that tree becomes many trees later.
        let mut random = Random(0x5eed_3018);
        let mut bench = Bench::new();
        bench.insert(0)?;
        bench.insert(1 << 63)?;
        bench.remove(0)?;
        for _ in 0..3000 {
            bench.insert(1 << 63 | random.next())?;
        }
        assert!(bench.is_good());
        while !bench.model.is_empty() {
            bench.remove(0)?;
            if bench.model.len() % 299 == 0 {
                assert!(bench.is_good());
            }
        }
        Ok(())
    }

    #[test]
    fn shrinking_in_random_order() -> Result {
        let mut random = Random(0x5eed_3021);
        let mut bench = Bench::new();
        for _ in 0..9000 {
            let key = key(&mut random, 4);
            bench.insert(key)?;
        }
        let most = bench.forest.bytes();
        while bench.model.len() > 100 {
            bench.remove(random.below(bench.model.len()))?;
            if bench.model.len() % 499 == 0 {
                assert!(bench.is_good());
            }
            let key = bench.some_key(&mut random);
            assert!(bench.finds(key));
        }
        assert!(bench.is_good());
        assert!(bench.forest.bytes() <= most / 4);
        Ok(())
    }

    #[test]
    fn removal_during_a_walk() -> Result {
        let mut random = Random(0x5eed_3031);
        let mut bench = Bench::new();
        for _ in 0..3000 {
            bench.insert(random.next())?;
        }
        let mut left = KVVec::new();
        let mut visited: usize = 0;
        let mut at = bench.forest.first(&bench.arena);
        while let Some(id) = at {
            at = bench.forest.next(&bench.arena, id);
            if random.below(3) == 0 {
                left.push(*bench.model.get(visited).ok_or(EINVAL)?, GFP_KERNEL)?;
            } else {
                bench.forest.remove(&mut bench.arena, id);
                bench.arena.remove(id);
            }
            visited += 1;
        }
        assert_eq!(visited, 3000);
        bench.model = left;
        assert!(bench.is_good());
        Ok(())
    }
}
