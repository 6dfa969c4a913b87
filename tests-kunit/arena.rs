// SPDX-License-Identifier: GPL-2.0

//! Tests of the arena against a plain list.

#![forbid(unsafe_code)]

use crate::arena::{
    self,
    Arena,
    Id,
    Page,
    Record, //
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

/// A record of 40 bytes: a size that does not divide a page.
#[derive(Default)]
struct Item {
    value: u64,
    _rest: [u64; 4],
}

impl Record for Item {
    type Page = [Self; arena::slots::<Self>()];
}

/// A record that does not fit twice into a chunk.
struct Big {
    value: u64,
    _rest: [u64; 299],
}

impl Default for Big {
    fn default() -> Self {
        Self {
            value: 0,
            _rest: [0; 299],
        }
    }
}

impl Record for Big {
    type Page = [Self; arena::slots::<Self>()];
}

/// Records of [`Item`] in a chunk.
const SLOTS: usize = <Item as Record>::Page::SLOTS;

/// Bytes of a chunk.
const CHUNK: usize = 4096;

fn item(value: u64) -> Item {
    Item {
        value,
        ..Item::default()
    }
}

fn value(arena: &Arena<Item>, id: Id) -> Option<u64> {
    arena.get(id).map(|item| item.value)
}

/// Inserts the values 0, 1, … and returns their ids.
fn fill(arena: &mut Arena<Item>, count: usize) -> Result<KVec<Id>> {
    let mut ids = KVec::new();
    for value in 0..count {
        ids.push(arena.insert(item(value as u64), GFP_KERNEL)?, GFP_KERNEL)?;
    }
    Ok(ids)
}

#[kunit_tests(ksm_rs_arena)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(arena::slots::<[u8; 64]>(), 64);
        assert_eq!(arena::slots::<[u8; 40]>(), 102);
        assert_eq!(arena::slots::<u8>(), 256);
        assert_eq!(arena::slots::<()>(), 256);
        assert_eq!(arena::slots::<[u8; 4096]>(), 1);
        assert_eq!(arena::slots::<[u8; 5000]>(), 1);
        assert_eq!(size_of::<Option<KBox<<Item as Record>::Page>>>(), 8);
        assert_eq!(size_of::<Id>(), 4);
    }

    #[test]
    fn ids_that_do_not_exist() -> Result {
        let mut arena = Arena::<Item>::new();
        for full in [false, true] {
            if full {
                fill(&mut arena, SLOTS / 2)?;
            }
            assert!(arena.get(Id::NIL).is_none());
            assert!(arena.get_mut(Id::NIL).is_none());
            assert!(arena.remove(Id::NIL).is_none());
            for shift in 8..32 {
                let id = Id::from_raw(1 << shift);
                assert!(arena.get(id).is_none());
                assert!(arena.remove(id).is_none());
            }
            // A slot in the chunk that has no record.
            assert!(arena.remove(Id::from_raw(SLOTS as u32 - 1)).is_none());
        }
        assert_eq!(arena.len(), SLOTS / 2);
        assert!(Id::default().is_nil());
        assert!(!Id::from_raw(0).is_nil());
        Ok(())
    }

    #[test]
    fn neighbours_in_order() -> Result {
        let mut arena = Arena::new();
        let ids = fill(&mut arena, 3 * SLOTS)?;
        for (at, pair) in ids.windows(2).enumerate() {
            let [one, other] = pair else {
                continue;
            };
            if (at + 1) % SLOTS != 0 {
                assert_eq!(other.raw(), one.raw() + 1);
            } else {
                assert!(other.raw() > one.raw());
            }
        }
        for (at, &id) in ids.iter().enumerate() {
            assert_eq!(value(&arena, id), Some(at as u64));
        }
        Ok(())
    }

    #[test]
    fn memory_comes_back() -> Result {
        let mut arena = Arena::new();
        assert_eq!(arena.bytes(), 0);
        let ids = fill(&mut arena, 10 * SLOTS)?;
        let all = arena.bytes();
        assert!(all >= 10 * CHUNK);
        assert!(all < 11 * CHUNK);

        // Chunk by chunk, in no order.
        let mut expected = all;
        for chunk in [7, 0, 9, 3] {
            for (at, &id) in ids.iter().skip(chunk * SLOTS).take(SLOTS).enumerate() {
                assert_eq!(arena.bytes(), expected);
                let removed = arena.remove(id).map(|item| item.value);
                assert_eq!(removed, Some((chunk * SLOTS + at) as u64));
                assert!(arena.remove(id).is_none());
            }
            expected -= CHUNK;
            assert_eq!(arena.bytes(), expected);
            for &id in ids.iter().skip(chunk * SLOTS).take(SLOTS) {
                assert!(arena.get(id).is_none());
            }
        }
        assert_eq!(arena.len(), 6 * SLOTS);

        // The entries of the table are used again.
        let again = fill(&mut arena, 4 * SLOTS)?;
        assert_eq!(arena.bytes(), all);
        assert!(again.iter().all(|id| id.raw() <= 10 * 128));

        for &id in &again {
            arena.remove(id);
        }
        for &id in &ids {
            arena.remove(id);
        }
        assert_eq!(arena.len(), 0);
        assert_eq!(arena.bytes(), 0);
        Ok(())
    }

    #[test]
    fn holes_are_filled_first() -> Result {
        let mut arena = Arena::new();
        let ids = fill(&mut arena, 4 * SLOTS)?;
        let bytes = arena.bytes();
        let mut random = Random(0x5eed_0001);
        for _ in 0..200 {
            let hole = ids
                .get(random.below(ids.len()))
                .copied()
                .unwrap_or_default();
            assert!(arena.remove(hole).is_some());
            assert!(arena.insert(item(1), GFP_KERNEL)? == hole);
        }
        assert_eq!(arena.bytes(), bytes);

        // A hole in each chunk; then one of the chunks goes, and the holes of the others are left.
        for chunk in 0..4 {
            let hole = ids.get(chunk * SLOTS + 5).copied().unwrap_or_default();
            assert!(arena.remove(hole).is_some());
        }
        for &id in ids.iter().skip(2 * SLOTS).take(SLOTS) {
            arena.remove(id);
        }
        let bytes = arena.bytes();
        for _ in 0..3 {
            arena.insert(item(1), GFP_KERNEL)?;
            assert_eq!(arena.bytes(), bytes);
        }
        arena.insert(item(1), GFP_KERNEL)?;
        assert_eq!(arena.bytes(), bytes + CHUNK);
        Ok(())
    }

    #[test]
    fn big_records() -> Result {
        let mut arena = Arena::new();
        let mut ids = KVec::new();
        for value in 0..20 {
            let big = Big {
                value,
                ..Big::default()
            };
            ids.push(arena.insert(big, GFP_KERNEL)?, GFP_KERNEL)?;
        }
        for (at, &id) in ids.iter().enumerate() {
            assert_eq!(arena.remove(id).map(|big| big.value), Some(at as u64));
        }
        assert_eq!(arena.bytes(), 0);
        Ok(())
    }

    #[test]
    fn random_operations() -> Result {
        for seed in [0x5eed_1001, 0x5eed_1002, 0x5eed_1003] {
            pr_info!("arena: seed {seed:#x}\n");
            let mut random = Random(seed);
            let mut arena = Arena::new();
            let mut model: KVec<(Id, u64)> = KVec::new();
            for step in 0..6000 {
                // Rather growing and rather shrinking by turns.
                let grow = if step / 1500 % 2 == 0 { 7 } else { 3 };
                if random.below(10) < grow {
                    let value = random.next();
                    let id = arena.insert(item(value), GFP_KERNEL)?;
                    assert!(!id.is_nil());
                    model.push((id, value), GFP_KERNEL)?;
                } else if !model.is_empty() {
                    let at = random.below(model.len());
                    let (id, value) = model.remove(at).map_err(|_| EINVAL)?;
                    assert_eq!(arena.remove(id).map(|item| item.value), Some(value));
                    assert!(arena.remove(id).is_none());
                }
                assert_eq!(arena.len(), model.len());
                if let Some(entry) = model.get(random.below(model.len())) {
                    assert_eq!(value(&arena, entry.0), Some(entry.1));
                }
                if step % 500 == 0 {
                    // No record was given the place of another one.
                    for &(id, expected) in &model {
                        assert_eq!(value(&arena, id), Some(expected));
                    }
                }
            }
            for &mut (id, ref mut expected) in &mut model {
                if let Some(item) = arena.get_mut(id) {
                    item.value = !item.value;
                    *expected = !*expected;
                }
            }
            for &(id, expected) in &model {
                assert_eq!(arena.remove(id).map(|item| item.value), Some(expected));
            }
            assert_eq!(arena.len(), 0);
            assert_eq!(arena.bytes(), 0);
        }
        Ok(())
    }
}
