// SPDX-License-Identifier: GPL-2.0

//! Tests of the page hash.

#![forbid(unsafe_code)]

use crate::hash::{
    hash_words,
    Key, //
};
use kernel::prelude::*;

/// Words of a page.
const WORDS: usize = 512;

/// Returns the hash of a page, word by word.
fn hash(key: &Key, page: impl Fn(usize) -> u64) -> u64 {
    hash_words::<WORDS>(key, page)
}

/// A page without structure.
fn noise(seed: u64, at: usize) -> u64 {
    let word = (seed ^ at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (word ^ (word >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// Returns whether no value is there twice.
fn all_differ(values: &[u64]) -> bool {
    values
        .iter()
        .enumerate()
        .all(|(at, one)| !values.iter().skip(at + 1).any(|other| other == one))
}

/// The secrets of the lanes for a seed, as somebody computes them who knows it.
fn secrets(seed: u64) -> [u64; 4] {
    let mut state = seed.wrapping_add(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(4));
    [(); 4].map(|()| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ (word >> 31)) | 1
    })
}

#[kunit_tests(ksm_rs_hash)]
mod tests {
    use super::*;

    #[test]
    fn whoever_knows_the_key_can_make_pages_collide_and_nobody_else() -> Result {
        // The word that makes a factor zero takes the one beside it, and all that the lane has seen, out of the hash.
        for lane in 0..4 {
            let seed = 77 + lane as u64;
            let secret = secrets(seed).get(lane).copied().unwrap_or_default();
            let page = |free: u64| {
                move |at| match at {
                    _ if at == WORDS - 8 + 2 * lane => secret,
                    _ if at == WORDS - 7 + 2 * lane => free,
                    _ => noise(1, at),
                }
            };
            let mut known = KVec::new();
            let mut unknown = KVec::new();
            for free in 0..100 {
                known.push(hash(&Key::new(seed), page(free)), GFP_KERNEL)?;
                unknown.push(hash(&Key::new(seed + 1000), page(free)), GFP_KERNEL)?;
            }
            assert!(known.iter().all(|one| known.first() == Some(one)));
            assert!(all_differ(&unknown));
        }
        Ok(())
    }

    #[test]
    fn known_answers() {
        // From another implementation, in Python. A change of the hash has to change these.
        let key = Key::new(1);
        assert_eq!(hash(&key, |_| 0), 0x09e8_46ec_88db_f7fc);
        assert_eq!(hash(&key, |at| at as u64), 0x355d_6160_54a3_4d75);
        assert_eq!(hash(&Key::new(2), |at| at as u64), 0x1869_9c32_25f4_e72a);
        assert_eq!(hash_words::<8>(&key, |at| at as u64), 0x04cb_0fc0_1f1c_f817);
        assert_eq!(hash(&Key::new(1), |_| 0), hash(&key, |_| 0));
    }

    #[test]
    fn each_word_is_read_once_in_order() {
        let next = core::cell::Cell::new(0);
        let in_order = core::cell::Cell::new(true);
        hash(&Key::new(3), |at| {
            in_order.set(in_order.get() && at == next.get());
            next.set(next.get() + 1);
            0
        });
        assert!(in_order.get());
        assert_eq!(next.get(), WORDS);
    }

    #[test]
    fn keys_differ() -> Result {
        for page in 0..3u64 {
            let mut seen = KVec::new();
            for seed in 0..500 {
                let key = Key::new(seed);
                let found = hash(&key, |at| match page {
                    0 => 0,
                    1 => u64::MAX,
                    _ => noise(9, at),
                });
                seen.push(found, GFP_KERNEL)?;
            }
            assert!(all_differ(&seen));
        }
        Ok(())
    }

    #[test]
    fn each_word_matters() -> Result {
        let key = Key::new(4);
        for base in [0, u64::MAX, 0x0123_4567_89ab_cdef] {
            let mut seen = KVec::new();
            seen.push(hash(&key, |_| base), GFP_KERNEL)?;
            for word in 0..WORDS {
                for change in [1, 1 << 63] {
                    let found = hash(&key, |at| if at == word { base ^ change } else { base });
                    seen.push(found, GFP_KERNEL)?;
                }
            }
            assert!(all_differ(&seen));
        }
        Ok(())
    }

    #[test]
    fn order_matters() -> Result {
        // The same words at other places: a word by itself, and one swapped with the first.
        let key = Key::new(5);
        let mut seen = KVec::new();
        for word in 0..WORDS {
            let found = hash(&key, |at| u64::from(at == word));
            seen.push(found, GFP_KERNEL)?;
            let found = hash(&key, |at| match at {
                0 => noise(1, word),
                _ if at == word => noise(1, 0),
                _ => noise(1, at),
            });
            seen.push(found, GFP_KERNEL)?;
        }
        assert!(all_differ(&seen));
        Ok(())
    }

    #[test]
    fn single_bits_spread() {
        // A bit of the page should turn each bit of the hash half of the time. The counts below have
        // a standard deviation of 16, so 128 is out of reach for anything that is not broken.
        let key = Key::new(6);
        let mut turned = [0u32; 64];
        let mut total: u32 = 0;
        let mut least = u32::MAX;
        for round in 0..1024u64 {
            let word = (round * 37 % WORDS as u64) as usize;
            let bit = 1u64 << (round * 11 % 64);
            let one = hash(&key, |at| noise(round, at));
            let other = hash(&key, |at| {
                noise(round, at) ^ if at == word { bit } else { 0 }
            });
            let difference = one ^ other;
            for (at, count) in turned.iter_mut().enumerate() {
                *count += u32::from(difference >> at & 1 == 1);
            }
            total += difference.count_ones();
            least = least.min(difference.count_ones());
        }
        assert!(turned.iter().all(|&count| (384..=640).contains(&count)));
        assert!((31 * 1024..=33 * 1024).contains(&total));
        assert!(least >= 8);
    }

    #[test]
    fn top_bits_are_even() {
        // Pages that hardly differ must be spread over the trees of a forest: 4096 of them over 256
        // trees, chosen by the top bits. Chi squared has 255 degrees of freedom.
        let key = Key::new(7);
        let mut trees = [0u64; 256];
        for page in 0..4096u64 {
            let found = hash(&key, |at| if at == WORDS - 1 { page } else { 0 });
            if let Some(tree) = trees.get_mut((found >> 56) as usize) {
                *tree += 1;
            }
        }
        let squares: u64 = trees.iter().map(|&count| count.abs_diff(16).pow(2)).sum();
        let chi_squared = squares / 16;
        assert!((150..=400).contains(&chi_squared));
    }

    #[test]
    fn zero_factors_lose_nothing() -> Result {
        // Pages of a word over and over, with a difference in front: had a word turned a factor to
        // zero, the difference would be lost.
        for seed in 0..50 {
            let key = Key::new(seed);
            for word in [0, 1, u64::MAX, 0x9e37_79b9_7f4a_7c15] {
                let mut seen = KVec::new();
                for first in 0..16u64 {
                    for lane in [0, 1, 2, 7] {
                        let found = hash(&key, |at| {
                            if at == lane {
                                first.wrapping_add(100)
                            } else {
                                word
                            }
                        });
                        seen.push(found, GFP_KERNEL)?;
                    }
                }
                assert!(all_differ(&seen));
            }
        }
        Ok(())
    }
}
