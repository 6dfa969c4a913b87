//! Memory of the calling process: mapping it, filling it, reading it.

use std::hint::black_box;
use std::ptr;

use anyhow::Context;
use anyhow::Result;
use nix::errno::Errno;
use serde::Deserialize;
use serde::Serialize;

/// Size of a page.
pub const PAGE: usize = 4096;

/// Size of a huge page.
const HUGE: usize = 2 << 20;

/// Pages in a MiB.
pub const PAGES_PER_MIB: usize = (1 << 20) / PAGE;

/// Words in a page.
const WORDS: usize = PAGE / 8;

/// What a page contains.
pub type Page = [u64; WORDS];

/// A generator of words that look random: splitmix64.
#[derive(Clone, Copy, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next word.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }
}

/// Where nearly equal pages differ, in eight bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Place {
    /// At the start of the page.
    First,
    /// In its middle.
    Middle,
    /// At its end.
    Last,
}

/// What the pages of a scenario contain, each page known by its number over all processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// No two pages are equal, not even in their first eight bytes.
    Unique,
    /// So many groups of equal pages; neighbours are of different groups.
    Groups(u64),
    /// Every other page is empty, the rest are unique.
    HalfZero,
    /// All pages are equal but for eight bytes.
    Near(Place),
}

impl Content {
    /// Writes page `number`.
    pub fn write(self, page: &mut Page, seed: u64, number: u64) {
        let key = match self {
            Self::Unique => number,
            Self::Groups(groups) => number % groups,
            Self::HalfZero if number.is_multiple_of(2) => {
                page.fill(0);
                return;
            }
            Self::HalfZero => number,
            Self::Near(_) => 0,
        };
        // Seeds of neighbouring pages lie far apart in the generator's sequence, so no two pages are shifted copies.
        let mut random = Random(Random(seed ^ key).next());
        page.fill_with(|| random.next());
        if let Self::Near(place) = self {
            let word = match place {
                Place::First => 0,
                Place::Middle => WORDS / 2,
                Place::Last => WORDS - 1,
            };
            page[word] = Random(number).next();
        }
    }
}

/// How pages lie in their address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Shape {
    /// One after the other.
    Dense,
    /// One in so many; the rest is reserved and never touched.
    OneIn(usize),
    /// Each in a VMA of its own: every other one is read-only, so that neighbours do not become one.
    Vmas,
    /// In huge pages.
    Huge,
    /// In turns on each of the first two NUMA nodes.
    Interleaved,
}

/// A mapping of this process, whose pages are looked at one at a time.
///
/// # Invariants
///
/// The range was mapped by [`Area::map`] and stays so for as long as this exists.
#[derive(Debug)]
pub struct Area {
    base: *mut Page,
    stride: usize,
    pages: usize,
}

impl Area {
    /// Maps room for so many pages, which are not there yet.
    pub fn map(pages: usize, shape: Shape) -> Result<Self> {
        let stride = match shape {
            Shape::OneIn(stride) => stride,
            _ => 1,
        };
        let len = pages * stride * PAGE;
        let base = if shape == Shape::Huge {
            let base = map_anonymous(len + HUGE)?;
            // SAFETY: The mapping is longer than what is wanted of it by as much as it may be out of alignment.
            let base = unsafe { base.add(base.align_offset(HUGE)) };
            advise(base, len, libc::MADV_HUGEPAGE).context("MADV_HUGEPAGE")?;
            base
        } else {
            let base = map_anonymous(len)?;
            // Kernels without huge pages do not know the advice; there all pages are small anyway.
            let _ = advise(base, len, libc::MADV_NOHUGEPAGE);
            base
        };
        if shape == Shape::Interleaved {
            interleave()?;
        }
        Ok(Self {
            base: base.cast(),
            stride,
            pages,
        })
    }

    /// How many pages are used.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// A page.
    pub fn page(&mut self, index: usize) -> &mut Page {
        assert!(index < self.pages);
        // SAFETY: The page lies in the mapping, by the invariant; any content is a valid array of words. What the
        // kernel does to share it cannot be seen.
        unsafe { &mut *self.base.add(index * self.stride) }
    }

    /// Advises that the whole range be merged.
    pub fn mergeable(&self) -> Result<()> {
        advise(
            self.base.cast(),
            self.pages * self.stride * PAGE,
            libc::MADV_MERGEABLE,
        )
        .context("MADV_MERGEABLE")
    }

    /// Makes every other page read-only.
    pub fn split(&self) -> Result<()> {
        for index in (0..self.pages).step_by(2) {
            // SAFETY: The page lies in the mapping; its content stays.
            let result = unsafe {
                libc::mprotect(
                    self.base.add(index * self.stride).cast(),
                    PAGE,
                    libc::PROT_READ,
                )
            };
            Errno::result(result).context("mprotect, is vm.max_map_count high enough?")?;
        }
        Ok(())
    }

    /// Reads every word of every page, in the order of their addresses.
    pub fn read_all(&mut self) {
        let mut sum = 0u64;
        for index in 0..self.pages {
            let page: &Page = self.page(index);
            sum = page.iter().fold(sum, |sum, &word| sum.wrapping_add(word));
        }
        black_box(sum);
    }
}

/// Maps private anonymous memory that is not there yet, whatever its size.
pub fn map_anonymous(len: usize) -> Result<*mut u8> {
    // SAFETY: A new mapping at an address of the kernel's choice touches no existing memory.
    let base = unsafe {
        libc::mmap(
            ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(Errno::last()).with_context(|| format!("mapping {len} bytes"));
    }
    Ok(base.cast())
}

/// Unmaps what [`map_anonymous`] has mapped.
///
/// # Safety
///
/// Nothing may refer to the range.
pub unsafe fn unmap(base: *mut u8, len: usize) {
    // SAFETY: By this function's own contract.
    unsafe { libc::munmap(base.cast(), len) };
}

/// Writes to the first byte of a page.
///
/// # Safety
///
/// The address must be mapped and writable.
pub unsafe fn touch(page: *mut u8) {
    // SAFETY: By this function's own contract.
    unsafe { page.write_volatile(1) };
}

/// Lets this process take its memory from the first two nodes in turns.
fn interleave() -> Result<()> {
    const MPOL_INTERLEAVE: libc::c_long = 3;
    let nodes: libc::c_ulong = 0b11;
    // The kernel takes the number of bits for one more than it is.
    let bits = libc::c_ulong::BITS + 1;
    // SAFETY: The kernel reads the one word of the mask.
    let result = unsafe {
        libc::syscall(
            libc::SYS_set_mempolicy,
            MPOL_INTERLEAVE,
            &raw const nodes,
            bits,
        )
    };
    Errno::result(result).context("set_mempolicy")?;
    Ok(())
}

fn advise(base: *mut u8, len: usize, advice: i32) -> Result<(), Errno> {
    // SAFETY: None of the pieces of advice that are used here changes what memory contains.
    Errno::result(unsafe { libc::madvise(base.cast(), len, advice) }).map(drop)
}

/// A page of its own in ordinary memory, for tests.
#[cfg(test)]
fn page_of(content: Content, number: u64) -> Page {
    let mut page = [0; WORDS];
    content.write(&mut page, 7, number);
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unique_pages_differ_in_their_first_word() {
        let mut first: Vec<u64> = (0..10_000)
            .map(|n| page_of(Content::Unique, n)[0])
            .collect();
        first.sort_unstable();
        first.dedup();
        assert_eq!(first.len(), 10_000);
    }

    #[test]
    fn groups_are_equal_within_and_differ_between() {
        let content = Content::Groups(3);
        assert_eq!(page_of(content, 1), page_of(content, 4));
        assert_ne!(page_of(content, 1), page_of(content, 2));
    }

    #[test]
    fn near_duplicates_differ_in_one_word_only() {
        for (place, word) in [(Place::First, 0), (Place::Middle, 256), (Place::Last, 511)] {
            let (a, b) = (
                page_of(Content::Near(place), 1),
                page_of(Content::Near(place), 2),
            );
            let differing: Vec<usize> = (0..WORDS).filter(|&i| a[i] != b[i]).collect();
            assert_eq!(differing, [word]);
        }
    }

    #[test]
    fn half_of_the_pages_are_empty() {
        let empty = (0..100).filter(|&n| page_of(Content::HalfZero, n) == [0; WORDS]);
        assert_eq!(empty.count(), 50);
    }
}
