//! Pages that collide: easy to make for whoever knows the key, and for nobody else.

use proptest::prelude::*;

use crate::hash::hash_words;
use crate::hash::hash_zeroes;
use crate::hash::Key;

const WORDS: usize = 512;
const LANES: usize = 4;

/// The secrets of the lanes, as whoever knows the seed computes them.
fn secrets(seed: u64) -> [u64; LANES] {
    let word = |number: u64| {
        let state = seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let word = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    };
    [5, 6, 7, 8].map(|number| word(number) | 1)
}

fn hash(seed: u64, page: &[u64; WORDS]) -> u64 {
    hash_words::<WORDS>(&Key::new(seed), |word| page[word])
}

/// A page of one word over and over.
fn flat(word: u64) -> [u64; WORDS] {
    [word; WORDS]
}

proptest! {
    #[test]
    fn empty_pages_are_known_by_their_hash(seed in any::<u64>()) {
        prop_assert_eq!(hash_zeroes::<WORDS>(&Key::new(seed)), hash(seed, &flat(0)));
    }

    #[test]
    fn a_known_key_makes_any_number_of_pages_collide(
        seed in any::<u64>(),
        rest in any::<u64>(),
        round in 0usize..WORDS / 8,
        lane in 0usize..LANES,
        free in prop::collection::vec(any::<u64>(), 2..20),
    ) {
        let secret = secrets(seed)[lane];
        let hashes: Vec<u64> = free.iter().map(|free| {
            let mut page = flat(rest);
            page[8 * round + 2 * lane] = secret;
            page[8 * round + 2 * lane + 1] = *free;
            hash(seed, &page)
        }).collect();
        prop_assert!(hashes.iter().all(|one| *one == hashes[0]));
    }

    #[test]
    fn pages_made_for_one_key_do_not_collide_under_another(
        made_for in any::<u64>(),
        seed in any::<u64>(),
        rest in any::<u64>(),
        round in 0usize..WORDS / 8,
        lane in 0usize..LANES,
        free in prop::collection::hash_set(any::<u64>(), 2..20),
    ) {
        prop_assume!(secrets(made_for)[lane] != secrets(seed)[lane]);
        let mut hashes: Vec<u64> = free.iter().map(|free| {
            let mut page = flat(rest);
            page[8 * round + 2 * lane] = secrets(made_for)[lane];
            page[8 * round + 2 * lane + 1] = *free;
            hash(seed, &page)
        }).collect();
        hashes.sort_unstable();
        hashes.dedup();
        prop_assert_eq!(hashes.len(), free.len());
    }

    #[test]
    fn pages_that_differ_hash_differently(
        seed in any::<u64>(),
        page in prop::collection::vec(prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 8),
        word in 0usize..WORDS,
        change in 1u64..,
    ) {
        // What somebody may hope for who does not know the key: 64 bits, against the few million pages tried here.
        let mut one = flat(0);
        for (at, value) in one.iter_mut().enumerate() {
            *value = page[at % 8];
        }
        let mut other = one;
        other[word] ^= change;
        prop_assert_ne!(hash(seed, &one), hash(seed, &other));
    }
}
