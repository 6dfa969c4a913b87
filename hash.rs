// SPDX-License-Identifier: GPL-2.0

//! A keyed 64-bit hash of a page.
//!
//! Every page that a scan meets is hashed, so the hash should cost no more than reading the page. It
//! is of the multiply-and-fold family, as wyhash and rapidhash are: two words at a time are
//! multiplied to 128 bits, whose halves are folded into one by exclusive or. A multiplication is the
//! strongest mixing of 16 bytes that a processor does in one instruction, without any vector
//! registers, which the kernel does not use. One chain of them would be bound by their latency; with
//! [`LANES`] independent ones it is memory that sets the pace.
//!
//! # Why it is keyed
//!
//! Pages belong to users, who may want them to collide: it makes lookups slow, and it tells about
//! the memory of others. (It never merges pages that differ; equal hashes only lead to a comparison.)
//! The weakness of this family is a factor of zero: whatever the other factor is, it is lost, and
//! in a chain all that came before is lost with it. With factors made from public constants anyone
//! can write down a page that has this, under any seed. So nothing here is multiplied as it
//! comes: one factor is a word combined with a secret of the lane, and the other one is a word
//! combined with the state of the lane, which is secret from the beginning. For any given page,
//! either is zero for one key of 2^64, and nobody can tell which. The secrets are odd, so that words
//! of zero, the most usual ones, never give a zero factor in the first of the two places.

#![forbid(unsafe_code)]

/// Independent chains of multiplications.
///
/// Four keep the multiplier of current processors busy, and state and secrets nearly fit the
/// registers.
const LANES: usize = 4;

/// Words that all lanes together take in a round.
const ROUND: usize = 2 * LANES;

/// The secret that a hash depends on.
pub(crate) struct Key {
    /// The state that each lane begins with.
    start: [u64; LANES],
    /// What each lane combines words with. All are odd.
    secret: [u64; LANES],
}

impl Key {
    /// Makes a key of a random number, such as one from `get_random_u64()`.
    ///
    /// Equal seeds give equal keys.
    pub(crate) fn new(seed: u64) -> Self {
        // An arithmetic sequence, each element of which goes through a bijection without visible
        // structure: the finalizer of SplitMix64.
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let word = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            word ^ (word >> 31)
        };
        Self {
            start: [(); LANES].map(|()| next()),
            secret: [(); LANES].map(|()| next() | 1),
        }
    }
}

/// Returns the hash of words that are all zero; see [`hash_words`].
pub(crate) fn hash_zeroes<const WORDS: usize>(key: &Key) -> u64 {
    hash_words::<WORDS>(key, |_| 0)
}

/// Multiplies to 128 bits and folds the halves.
#[inline(always)]
const fn fold(one: u64, other: u64) -> u64 {
    let product = (one as u128).wrapping_mul(other as u128);
    product as u64 ^ (product >> 64) as u64
}

/// Returns the hash of `WORDS` words, which must be a multiple of 8; a page of 4 KiB has 512.
///
/// `load` is called once for each index below `WORDS`, in ascending order. What it reads may change
/// meanwhile; the result is the hash of the words that it returned.
///
/// All 64 bits of the result are equally good. The result means nothing to anybody without the key,
/// so it is the same on machines of different byte order only if `load` makes it so.
#[inline]
pub(crate) fn hash_words<const WORDS: usize>(key: &Key, load: impl Fn(usize) -> u64) -> u64 {
    const { assert!(WORDS % ROUND == 0) };

    // Lanes by name: an array would be one in memory.
    let [k0, k1, k2, k3] = key.secret;
    let [mut a0, mut a1, mut a2, mut a3] = key.start;
    let mut at: usize = 0;
    while at < WORDS {
        let word = |index| load(at.wrapping_add(index));
        a0 = fold(word(0) ^ k0, word(1) ^ a0);
        a1 = fold(word(2) ^ k1, word(3) ^ a1);
        a2 = fold(word(4) ^ k2, word(5) ^ a2);
        a3 = fold(word(6) ^ k3, word(7) ^ a3);
        at = at.wrapping_add(ROUND);
    }

    // The lanes are secret, so this is a multiplication of unknowns as well. The last one spreads
    // what the halves of the one before have left apart.
    let low = fold(a0 ^ k1, a1 ^ k0);
    let high = fold(a2 ^ k3, a3 ^ k2);
    fold(fold(low ^ k2, high ^ k1) ^ k0, k3)
}
