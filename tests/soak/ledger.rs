//! What an actor's memory must contain, byte for byte.
//!
//! The ledger notes for each page which pattern it has, and the pattern is computed afresh from its seed when the page
//! is looked at. It lives in shared memory, which KSM never touches, so that nothing it knows is ever itself merged, even in
//! a process all of whose private memory is.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::slice;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use ksm_e2e::Region;
use ksm_e2e::memory;
use ksm_e2e::memory::PAGE;
use ksm_e2e::memory::Pattern;
use ksm_e2e::procfs;
use nix::errno::Errno;

/// Most pages that a ledger has room for.
const CAPACITY: usize = 16 * 1024;

/// Memory shared with processes that are forked later; private memory of a process may be merged, this is not.
pub struct Shared<T> {
    base: *mut T,
    count: usize,
}

impl<T> Shared<T> {
    /// Room for so many.
    ///
    /// # Safety
    ///
    /// All bytes zero must be a valid `T`.
    pub unsafe fn zeroed(count: usize) -> Result<Self> {
        // SAFETY: A new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                count * size_of::<T>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        ensure!(
            base != libc::MAP_FAILED,
            "mapping shared memory: {}",
            Errno::last()
        );
        let base = base.cast();
        Ok(Self { base, count })
    }

    /// Keeps it until the process ends.
    pub fn leak(self) -> &'static [T] {
        let (base, count) = (self.base, self.count);
        std::mem::forget(self);
        // SAFETY: The mapping has room for so many, all of which are valid, and is never unmapped.
        unsafe { slice::from_raw_parts(base, count) }
    }

    fn all(&self) -> &[T] {
        // SAFETY: The mapping has room for so many, all of which are valid, and lives as long as this value.
        unsafe { slice::from_raw_parts(self.base, self.count) }
    }

    fn all_mut(&mut self) -> &mut [T] {
        // SAFETY: As above; each process that writes to entries has a mapping of its own.
        unsafe { slice::from_raw_parts_mut(self.base, self.count) }
    }
}

// SAFETY: The value is the only way to the mapping, as a Vec is to its memory.
unsafe impl<T: Send> Send for Shared<T> {}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: The mapping is this value's, and no reference outlives it.
        unsafe { libc::munmap(self.base.cast(), self.count * size_of::<T>()) };
    }
}

/// One page. Patterns are kept as numbers, so that all zeroes are an entry.
#[derive(Clone, Copy)]
struct Entry {
    addr: usize,
    /// 0: zeroes. 1: of a seed. 2: of a seed but for a byte. 3: zeroes but for a byte.
    kind: u8,
    flip: u8,
    offset: u16,
    /// The page may have become one of zeroes.
    or_zero: bool,
    seed: u64,
}

impl Entry {
    fn new(addr: usize, pattern: Pattern) -> Self {
        let (kind, seed, offset, flip) = match pattern {
            Pattern::Zero => (0, 0, 0, 0),
            Pattern::Seed(seed) => (1, seed, 0, 0),
            Pattern::Near { seed, offset, flip } => match seed {
                Some(seed) => (2, seed, offset, flip),
                None => (3, 0, offset, flip),
            },
        };
        Self {
            addr,
            kind,
            flip,
            offset: offset as u16,
            or_zero: false,
            seed,
        }
    }

    fn pattern(&self) -> Pattern {
        let near = |seed| Pattern::Near {
            seed,
            offset: self.offset.into(),
            flip: self.flip,
        };
        match self.kind {
            0 => Pattern::Zero,
            1 => Pattern::Seed(self.seed),
            2 => near(Some(self.seed)),
            _ => near(None),
        }
    }
}

/// See the module. Addresses are those of the process that uses it.
pub struct Ledger {
    /// In ascending order of addresses, the first `len` of them.
    entries: Shared<Entry>,
    len: usize,
    corrupt: bool,
}

impl Ledger {
    /// An empty one. With `corrupt` it changes one byte of the memory before it looks: what it is there to find.
    pub fn new(corrupt: bool) -> Result<Self> {
        Ok(Self {
            // SAFETY: An entry of zeroes is a page of zeroes at address 0.
            entries: unsafe { Shared::zeroed(CAPACITY) }?,
            len: 0,
            corrupt,
        })
    }

    /// Another one with the same in it, for a process forked next.
    pub fn copy(&self) -> Result<Self> {
        let mut copy = Self::new(self.corrupt)?;
        copy.entries.all_mut()[..self.len].copy_from_slice(self.known());
        copy.len = self.len;
        Ok(copy)
    }

    /// Number of pages it knows.
    pub fn len(&self) -> usize {
        self.len
    }

    fn known(&self) -> &[Entry] {
        &self.entries.all()[..self.len]
    }

    /// The entries of the pages of a region.
    fn range(&self, region: Region) -> std::ops::Range<usize> {
        let known = self.known();
        let end = region.addr + region.len();
        let first = known.partition_point(|entry| entry.addr < region.addr);
        first..known.partition_point(|entry| entry.addr < end)
    }

    /// Puts entries in the place of what is known of a region; they are of that region, in order.
    fn replace(&mut self, region: Region, new: &[Entry]) -> Result<()> {
        let old = self.range(region);
        let len = self.len - old.len() + new.len();
        ensure!(len <= CAPACITY, "the ledger is full");
        let tail = old.end..self.len;
        let entries = self.entries.all_mut();
        entries.copy_within(tail, old.start + new.len());
        entries[old.start..old.start + new.len()].copy_from_slice(new);
        self.len = len;
        Ok(())
    }

    /// Notes that every page of a region contains this.
    pub fn note(&mut self, region: Region, pattern: Pattern) -> Result<()> {
        let new: Vec<Entry> = region
            .addresses()
            .map(|addr| Entry::new(addr, pattern))
            .collect();
        self.replace(region, &new)
    }

    /// Writes this to every page of a region, and notes it.
    pub fn write(&mut self, region: Region, pattern: Pattern) -> Result<()> {
        let pages: Vec<_> = region.addresses().map(|addr| (addr, pattern)).collect();
        // SAFETY: Actors pass regions that they have mapped writable. A mistake kills the actor, which is seen.
        unsafe { memory::paint(&pages) };
        self.note(region, pattern)
    }

    /// Notes that each page of a region, all of which are known, has become zeroes or stayed as it was.
    pub fn note_maybe_zero(&mut self, region: Region) {
        let range = self.range(region);
        for entry in &mut self.entries.all_mut()[range] {
            entry.or_zero = true;
        }
    }

    /// Notes that the pages of a region are now at another address.
    pub fn note_moved(&mut self, from: Region, to: usize) -> Result<()> {
        let mut moved = self.known()[self.range(from)].to_vec();
        for entry in &mut moved {
            entry.addr = entry.addr - from.addr + to;
        }
        self.forget(from);
        let to = Region { addr: to, ..from };
        self.replace(to, &moved)
    }

    /// Notes that the pages of another region contain the same.
    pub fn note_copied(&mut self, from: Region, to: usize) -> Result<()> {
        let mut copied = self.known()[self.range(from)].to_vec();
        for entry in &mut copied {
            entry.addr = entry.addr - from.addr + to;
        }
        let to = Region { addr: to, ..from };
        self.replace(to, &copied)
    }

    /// Knows nothing of a region any more.
    pub fn forget(&mut self, region: Region) {
        let old = self.range(region);
        let end = self.len;
        self.entries.all_mut().copy_within(old.end..end, old.start);
        self.len -= old.len();
    }

    /// Knows nothing any more.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// What a page must contain.
    pub fn pattern(&self, addr: usize) -> Result<Pattern> {
        let page = Region { addr, pages: 1 };
        match &self.known()[self.range(page)] {
            [entry] => Ok(entry.pattern()),
            _ => bail!("nothing is known of the page at {addr:#x}"),
        }
    }

    /// Fails unless every page of a region is known and is as noted. The region must be readable.
    pub fn check(&self, region: Region) -> Result<()> {
        let range = self.range(region);
        ensure!(
            range.len() == region.pages,
            "of {} pages at {:#x} only {} are known",
            region.pages,
            region.addr,
            range.len()
        );
        self.check_entries(&self.known()[range])
    }

    /// The same for everything that is known.
    pub fn check_all(&self) -> Result<()> {
        self.check_entries(self.known())
    }

    /// Fails unless these bytes, read from a region by whatever means, are as noted.
    pub fn check_bytes(&self, region: Region, seen: &[u8]) -> Result<()> {
        ensure!(
            seen.len() == region.len(),
            "{} bytes of {} pages",
            seen.len(),
            region.pages
        );
        for (addr, seen) in region.addresses().zip(seen.chunks(PAGE)) {
            let page = Region { addr, pages: 1 };
            match &self.known()[self.range(page)] {
                [entry] => compare(entry, seen)?,
                _ => bail!("nothing is known of the page at {addr:#x}"),
            }
        }
        Ok(())
    }

    fn check_entries(&self, entries: &[Entry]) -> Result<()> {
        if let (true, Some(victim)) = (self.corrupt, entries.get(entries.len() / 2)) {
            harm(victim.addr + PAGE - 3)?;
        }
        for entry in entries {
            // SAFETY: As for `write`, but readable is enough.
            compare(entry, &unsafe { memory::read(entry.addr, PAGE) })?;
        }
        Ok(())
    }
}

fn compare(entry: &Entry, seen: &[u8]) -> Result<()> {
    let wanted = entry.pattern().page().bytes();
    let fine = seen == wanted || entry.or_zero && seen.iter().all(|&byte| byte == 0);
    ensure!(fine, difference(entry, seen, &wanted));
    Ok(())
}

/// Changes a byte of this process behind its back, whatever the protection of the page.
fn harm(addr: usize) -> Result<()> {
    let memory = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/proc/self/mem")?;
    let mut byte = [0];
    memory.read_exact_at(&mut byte, addr as u64)?;
    byte[0] ^= 1;
    memory
        .write_all_at(&byte, addr as u64)
        .context("harming a byte")
}

fn difference(entry: &Entry, seen: &[u8], wanted: &[u8]) -> String {
    let wrong: Vec<usize> = (0..PAGE).filter(|&at| seen[at] != wanted[at]).collect();
    let at = wrong.first().copied().unwrap_or_default();
    let end = (at + 16).min(PAGE);
    let region = Region {
        addr: entry.addr,
        pages: 1,
    };
    let pid = std::process::id() as i32;
    let page = procfs::map_entries(pid, region).map(|entries| {
        let pfn = entries[0].pfn();
        let flags = pfn.and_then(|pfn| pfn.flags().ok());
        format!("{:?} {pfn:?} {flags:?}", entries[0])
    });
    format!(
        "MEMORY DIFFERS: page {:#x} of process {pid} should contain {:x?}{} but {} bytes differ, from offset {at:#x} on: \
         wanted {:02x?}, seen {:02x?}; {page:?} now",
        entry.addr,
        entry.pattern(),
        if entry.or_zero { " or zeroes" } else { "" },
        wrong.len(),
        &wanted[at..end],
        &seen[at..end],
    )
}
