//! The key of the hash of pages, which nobody but the kernel knows, and root, who can read the kernel's memory.

use anyhow::Context;
use anyhow::Result;

use crate::kprobe;
use crate::memory;
use crate::memory::PAGE;
use crate::memory::Region;

/// Chains of multiplications in the hash.
const LANES: usize = 4;

/// What is added from word to word before each is mixed.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The key, as far as pages that collide are made with it.
#[derive(Clone, Copy, Debug)]
pub struct HashKey {
    secrets: [u64; LANES],
}

fn mix(state: u64) -> u64 {
    let word = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// The inverse of [`mix`].
fn unmix(word: u64) -> u64 {
    let word = (word ^ (word >> 31) ^ (word >> 62)).wrapping_mul(0x3196_42b2_d24d_8ec3);
    let word = (word ^ (word >> 27) ^ (word >> 54)).wrapping_mul(0x96de_1b17_3f11_9089);
    word ^ (word >> 30) ^ (word >> 60)
}

impl HashKey {
    /// The key of the module that is loaded, out of its memory.
    pub fn of_the_module() -> Result<Self> {
        // Where the module's files find what they show.
        let shown = kprobe::address_of("5sysfs5SHOWN")?;
        let words = kprobe::words_behind(shown, 0, 1024)?;
        // What the lanes begin with was made of an arithmetic sequence; nothing else in memory looks like it.
        let start = words.windows(LANES).find_map(|some| {
            let follows = |pair: &[u64]| unmix(pair[1]).wrapping_sub(unmix(pair[0])) == STEP;
            some.windows(2).all(follows).then(|| unmix(some[0]))
        });
        let start = start.context("the key is not where it should be")?;
        let mut secrets = [0; LANES];
        for (lane, secret) in secrets.iter_mut().enumerate() {
            let steps = STEP.wrapping_mul((LANES + lane) as u64);
            *secret = mix(start.wrapping_add(steps)) | 1;
        }
        let there = words.windows(LANES).any(|some| some == secrets);
        there.then_some(Self { secrets }).context("half a key")
    }

    /// The numbers, for telling keys apart.
    pub fn secrets(&self) -> [u64; LANES] {
        self.secrets
    }

    /// Makes pages of this process collide: with each other, if they were equal before but for their last eight
    /// bytes, whatever `numbers` these are to contain from now on. So it takes all of a page to tell two of them apart.
    ///
    /// # Safety
    ///
    /// The region must be mapped and writable, and have a page for each number.
    pub unsafe fn collide(&self, region: Region, numbers: impl IntoIterator<Item = u64>) {
        for (addr, number) in region.addresses().zip(numbers) {
            let last = [self.secrets[LANES - 1], number].map(u64::to_le_bytes);
            // SAFETY: By this function's own contract.
            unsafe { memory::write(addr + PAGE - 16, last.as_flattened()) };
        }
    }
}
