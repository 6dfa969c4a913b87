//! Memory of the calling process: mapping it, filling it with known patterns, checking it.
//!
//! What a page ought to contain follows from a seed. Its checksum is computed afresh from the seed in ordinary
//! memory, so nothing that is compared with a merged page is ever itself merged.

use std::io;
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::ptr;
use std::slice;
use std::time::Instant;

use anyhow::Result;
use anyhow::ensure;
use nix::errno::Errno;
use nix::fcntl::SpliceFFlags;
use nix::fcntl::vmsplice;
use nix::sys::resource::UsageWho;
use nix::sys::resource::getrusage;
use nix::unistd::pipe;
use serde::Deserialize;
use serde::Serialize;

/// Size of a page.
pub const PAGE: usize = 4096;

/// Size of a huge page.
pub const HUGE: usize = 2 << 20;

/// Small pages in a huge one.
pub const PAGES_PER_HUGE: usize = HUGE / PAGE;

/// Words in a page.
const WORDS: usize = PAGE / 8;

/// A range of addresses in some process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Address of the first byte.
    pub addr: usize,
    /// Number of pages.
    pub pages: usize,
}

impl Region {
    /// Length in bytes.
    pub fn len(self) -> usize {
        self.pages * PAGE
    }

    /// Whether there are no pages.
    pub fn is_empty(self) -> bool {
        self.pages == 0
    }

    /// Address of page `index`.
    pub fn page(self, index: usize) -> usize {
        assert!(
            index < self.pages,
            "page {index} of a region of {}",
            self.pages
        );
        self.addr + index * PAGE
    }

    /// The pages from `first` on, `pages` of them.
    pub fn part(self, first: usize, pages: usize) -> Self {
        assert!(
            first + pages <= self.pages,
            "part {first}+{pages} of a region of {}",
            self.pages
        );
        Self {
            addr: self.addr + first * PAGE,
            pages,
        }
    }

    /// The addresses of the pages.
    pub fn addresses(self) -> impl Iterator<Item = usize> {
        (0..self.pages).map(move |index| self.addr + index * PAGE)
    }
}

/// What the pages of a region contain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// Every page has a pattern of its own: page `n` that of seed `+ n`.
    Distinct(u64),
    /// Every page has the pattern of this seed.
    Same(u64),
    /// Every page is full of zeroes (and written to, so that it is really there).
    Zero,
}

impl Content {
    /// What the region's pages from `first` on contain.
    pub fn from_page(self, first: usize) -> Self {
        match self {
            Self::Distinct(seed) => Self::Distinct(seed + first as u64),
            other => other,
        }
    }

    /// Content of page `index`.
    pub fn page(self, index: usize) -> PageBytes {
        let seed = match self {
            Self::Distinct(seed) => seed + index as u64,
            Self::Same(seed) => seed,
            Self::Zero => return PageBytes([0; WORDS]),
        };
        let mut words = [0; WORDS];
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d;
        for word in &mut words {
            *word = splitmix(&mut state);
        }
        PageBytes(words)
    }

    /// Checksum of page `index`.
    pub fn checksum(self, index: usize) -> u64 {
        self.page(index).checksum()
    }

    /// Checksums of the first `pages` pages.
    pub fn checksums(self, pages: usize) -> Vec<u64> {
        match self {
            Self::Distinct(_) => (0..pages).map(|index| self.checksum(index)).collect(),
            Self::Same(_) | Self::Zero => vec![self.checksum(0); pages],
        }
    }

    /// Fails if `seen` are not the checksums of the first pages.
    pub fn check(self, seen: &[u64]) -> Result<()> {
        let wanted = self.checksums(seen.len());
        let wrong: Vec<usize> = (0..seen.len())
            .filter(|&index| seen[index] != wanted[index])
            .collect();
        ensure!(
            wrong.is_empty(),
            "{} of {} pages do not contain {self:?}, the first is page {}",
            wrong.len(),
            seen.len(),
            wrong[0]
        );
        Ok(())
    }
}

fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// What a single page contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Pattern {
    /// Zeroes only.
    Zero,
    /// The pattern of a seed.
    Seed(u64),
    /// That of a seed, or zeroes, but for one byte.
    Near {
        /// Whose pattern; `None` stands for zeroes.
        seed: Option<u64>,
        /// Which byte.
        offset: usize,
        /// What it is XORed with.
        flip: u8,
    },
}

impl Pattern {
    /// The page.
    pub fn page(self) -> PageBytes {
        match self {
            Self::Zero => Content::Zero.page(0),
            Self::Seed(seed) => Content::Same(seed).page(0),
            Self::Near { seed, offset, flip } => {
                let page = seed.map_or(Content::Zero, Content::Same).page(0);
                let byte = page.byte(offset) ^ flip;
                page.with_byte(offset, byte)
            }
        }
    }
}

/// The bytes of a page.
#[derive(Clone)]
pub struct PageBytes([u64; WORDS]);

impl PageBytes {
    /// A checksum that changes with any single word, and with the order of words.
    pub fn checksum(&self) -> u64 {
        self.0.iter().fold(0xcbf2_9ce4_8422_2325, |sum, word| {
            (sum ^ word)
                .wrapping_mul(0x9fb2_1c65_1e98_df25)
                .rotate_left(23)
        })
    }

    /// Byte `offset`.
    pub fn byte(&self, offset: usize) -> u8 {
        self.0[offset / 8].to_le_bytes()[offset % 8]
    }

    /// The same page with byte `offset` replaced.
    pub fn with_byte(mut self, offset: usize, byte: u8) -> Self {
        let mut bytes = self.0[offset / 8].to_le_bytes();
        bytes[offset % 8] = byte;
        self.0[offset / 8] = u64::from_le_bytes(bytes);
        self
    }

    /// The bytes.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|word| word.to_le_bytes()).collect()
    }
}

/// How to map memory.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Mapping {
    /// Number of pages.
    pub pages: usize,
    /// Alignment of the address, a power of two.
    pub align: usize,
    /// Whether to ask for huge pages, or to decline them; or to take what there is.
    pub huge: Option<bool>,
    /// `MAP_SHARED` instead of `MAP_PRIVATE`.
    pub shared: bool,
    /// The only NUMA node the memory may come from.
    pub node: Option<u32>,
}

impl Mapping {
    /// Private anonymous memory in small pages.
    pub fn pages(pages: usize) -> Self {
        Self {
            pages,
            align: PAGE,
            huge: Some(false),
            shared: false,
            node: None,
        }
    }

    /// Private anonymous memory in `count` huge pages.
    pub fn huge(count: usize) -> Self {
        Self {
            pages: count * PAGES_PER_HUGE,
            align: HUGE,
            huge: Some(true),
            shared: false,
            node: None,
        }
    }

    /// The same on one NUMA node.
    pub fn on_node(self, node: u32) -> Self {
        Self {
            node: Some(node),
            ..self
        }
    }

    /// Maps it in this process. There are unmapped pages on both sides, so that it never becomes one area with
    /// another mapping.
    pub fn map(self) -> Result<Region, Errno> {
        let len = self.pages * PAGE;
        let around = len + self.align + 2 * PAGE;
        let share = if self.shared {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE
        };
        // SAFETY: A new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                around,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let addr = (base as usize + PAGE).next_multiple_of(self.align);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = share | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: The fixed range lies inside the reservation made above, which nobody else uses.
        let mapped = unsafe { libc::mmap(addr as *mut libc::c_void, len, prot, flags, -1, 0) };
        if mapped == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let region = Region {
            addr,
            pages: self.pages,
        };
        let reservation_end = base as usize + around;
        unmap(base as usize, addr - base as usize)?;
        unmap(addr + len, reservation_end - addr - len)?;
        if let Some(huge) = self.huge {
            let advice = if huge {
                libc::MADV_HUGEPAGE
            } else {
                libc::MADV_NOHUGEPAGE
            };
            advise(region, advice)?;
        }
        if let Some(node) = self.node {
            crate::numa::bind(region, node, false)?;
        }
        Ok(region)
    }
}

fn unmap(addr: usize, len: usize) -> Result<(), Errno> {
    if len == 0 {
        return Ok(());
    }
    // SAFETY: The callers pass ranges that they own and that no reference points into.
    Errno::result(unsafe { libc::munmap(addr as *mut libc::c_void, len) }).map(drop)
}

/// Unmaps a region of this process.
pub fn munmap(region: Region) -> Result<(), Errno> {
    unmap(region.addr, region.len())
}

/// `madvise` on a region of this process.
pub fn advise(region: Region, advice: i32) -> Result<(), Errno> {
    // SAFETY: Regions are plain memory that is only read and written through raw pointers, whatever its content.
    Errno::result(unsafe { libc::madvise(region.addr as *mut libc::c_void, region.len(), advice) })
        .map(drop)
}

/// `mprotect` on a region of this process.
pub fn protect(region: Region, prot: i32) -> Result<(), Errno> {
    // SAFETY: As for `advise`.
    Errno::result(unsafe { libc::mprotect(region.addr as *mut libc::c_void, region.len(), prot) })
        .map(drop)
}

/// `mlock` or `munlock` on a region of this process.
pub fn lock(region: Region, lock: bool) -> Result<(), Errno> {
    let addr = region.addr as *const libc::c_void;
    // SAFETY: Neither call changes what memory contains.
    let result = unsafe {
        if lock {
            libc::mlock(addr, region.len())
        } else {
            libc::munlock(addr, region.len())
        }
    };
    Errno::result(result).map(drop)
}

/// `mremap` of a region of this process; `to` is used with `MREMAP_FIXED`.
pub fn remap(region: Region, pages: usize, flags: i32, to: usize) -> Result<Region, Errno> {
    let addr = region.addr as *mut libc::c_void;
    // SAFETY: As for `advise`.
    let new = unsafe {
        libc::mremap(
            addr,
            region.len(),
            pages * PAGE,
            flags,
            to as *mut libc::c_void,
        )
    };
    if new == libc::MAP_FAILED {
        return Err(Errno::last());
    }
    Ok(Region {
        addr: new as usize,
        pages,
    })
}

/// Writes bytes at an address of this process.
///
/// # Safety
///
/// The range must be mapped, writable and belong to a [`Region`].
pub unsafe fn write(addr: usize, bytes: &[u8]) {
    // SAFETY: By this function's own contract.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), addr as *mut u8, bytes.len()) };
}

/// Reads bytes at an address of this process.
///
/// # Safety
///
/// The range must be mapped, readable and belong to a [`Region`].
pub unsafe fn read(addr: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    // SAFETY: By this function's own contract.
    unsafe { ptr::copy_nonoverlapping(addr as *const u8, bytes.as_mut_ptr(), len) };
    bytes
}

/// Fills a region of this process.
///
/// # Safety
///
/// The region must be mapped and writable.
pub unsafe fn fill(region: Region, content: Content) {
    let first = content.page(0);
    for (index, addr) in region.addresses().enumerate() {
        let own;
        let page = match content {
            Content::Distinct(_) => {
                own = content.page(index);
                &own
            }
            Content::Same(_) | Content::Zero => &first,
        };
        // SAFETY: By this function's own contract.
        unsafe { ptr::copy_nonoverlapping(page.0.as_ptr(), addr as *mut u64, WORDS) };
    }
}

/// Fills pages of this process, each given by its address.
///
/// # Safety
///
/// The pages must be mapped and writable.
pub unsafe fn paint(pages: &[(usize, Pattern)]) {
    for &(addr, pattern) in pages {
        let page = pattern.page();
        // SAFETY: By this function's own contract.
        unsafe { ptr::copy_nonoverlapping(page.0.as_ptr(), addr as *mut u64, WORDS) };
    }
}

/// The addresses of those pages of this process that do not contain what they should, in every byte.
///
/// # Safety
///
/// The pages must be mapped and readable.
pub unsafe fn differing(pages: &[(usize, Pattern)]) -> Vec<usize> {
    let mut seen = PageBytes([0; WORDS]);
    let mut wrong = Vec::new();
    for &(addr, pattern) in pages {
        // SAFETY: By this function's own contract.
        unsafe { ptr::copy_nonoverlapping(addr as *const u64, seen.0.as_mut_ptr(), WORDS) };
        if seen.0 != pattern.page().0 {
            wrong.push(addr);
        }
    }
    wrong
}

/// Checksums of the pages of a region of this process.
///
/// # Safety
///
/// The region must be mapped and readable.
pub unsafe fn checksums(region: Region) -> Vec<u64> {
    let mut page = PageBytes([0; WORDS]);
    let mut sums = Vec::with_capacity(region.pages);
    for addr in region.addresses() {
        // SAFETY: By this function's own contract.
        unsafe { ptr::copy_nonoverlapping(addr as *const u64, page.0.as_mut_ptr(), WORDS) };
        sums.push(page.checksum());
    }
    sums
}

/// What a write to a page took.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Timing {
    /// Time, in nanoseconds.
    pub nanos: u64,
    /// Page faults.
    pub faults: u64,
}

/// Writes to pages of this process, each given by its address, what they contain, and measures each of the writes. As a
/// spy would, this reads each page first, so that it is only the write that makes a difference.
///
/// # Safety
///
/// The pages must be mapped and writable.
pub unsafe fn time_writes(pages: &[usize]) -> Vec<Timing> {
    let faults =
        || getrusage(UsageWho::RUSAGE_SELF).map_or(0, |usage| usage.minor_page_faults() as u64);
    let mut timings = Vec::with_capacity(pages.len());
    for &addr in pages {
        let word = addr as *mut u64;
        // SAFETY: By this function's own contract.
        let value = unsafe { ptr::read_volatile(word) };
        let before = faults();
        let start = Instant::now();
        // SAFETY: By this function's own contract.
        unsafe { ptr::write_volatile(word, value) };
        let nanos = start.elapsed().as_nanos() as u64;
        let faults = faults() - before;
        timings.push(Timing { nanos, faults });
    }
    timings
}

/// A pipe that refers to pages of this process, not to copies of them, until it is dropped.
#[derive(Debug)]
pub struct Held {
    _reader: OwnedFd,
    _writer: OwnedFd,
}

/// Holds the pages of a region of this process; a pipe has room for sixteen.
///
/// # Safety
///
/// The region must be mapped and readable, and must not be written to during the call.
pub unsafe fn hold(region: Region) -> Result<Held> {
    let (reader, writer) = pipe()?;
    // SAFETY: By this function's own contract.
    let bytes = unsafe { slice::from_raw_parts(region.addr as *const u8, region.len()) };
    let spliced = vmsplice(&writer, &[IoSlice::new(bytes)], SpliceFFlags::empty())?;
    ensure!(
        spliced == bytes.len(),
        "only {spliced} bytes went into the pipe"
    );
    Ok(Held {
        _reader: reader,
        _writer: writer,
    })
}

/// An error number as the standard library's error.
pub fn os_error(errno: Errno) -> io::Error {
    io::Error::from_raw_os_error(errno as i32)
}
