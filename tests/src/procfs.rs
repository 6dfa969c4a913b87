//! What `/proc` says about a process and its pages.

use std::fs;
use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use crate::memory::PAGE;
use crate::memory::Region;

/// Bits of `/proc/kpageflags`.
const KPF_ANON: u64 = 12;
const KPF_HWPOISON: u64 = 19;
const KPF_KSM: u64 = 21;
const KPF_ZERO_PAGE: u64 = 24;
const KPF_MLOCKED: u64 = 33;

/// Bits of `/proc/<pid>/pagemap`.
const PM_UFFD_WP: u64 = 57;
const PM_SWAP: u64 = 62;
const PM_PRESENT: u64 = 63;

/// Number of a physical page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pfn(pub u64);

impl Pfn {
    /// The flags `/proc/kpageflags` shows.
    pub fn flags(self) -> Result<PageFlags> {
        let file = File::open("/proc/kpageflags").context("/proc/kpageflags")?;
        let mut word = [0; 8];
        file.read_exact_at(&mut word, self.0 * 8)
            .with_context(|| format!("flags of {self:?}"))?;
        Ok(PageFlags(u64::from_le_bytes(word)))
    }
}

/// Flags of a physical page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFlags(u64);

impl PageFlags {
    fn bit(self, bit: u64) -> bool {
        self.0 >> bit & 1 == 1
    }

    /// A page that KSM made.
    pub fn ksm(self) -> bool {
        self.bit(KPF_KSM)
    }

    /// An anonymous page.
    pub fn anonymous(self) -> bool {
        self.bit(KPF_ANON)
    }

    /// The kernel's page of zeroes.
    pub fn zero_page(self) -> bool {
        self.bit(KPF_ZERO_PAGE)
    }

    /// A page that must not be used any more.
    pub fn poisoned(self) -> bool {
        self.bit(KPF_HWPOISON)
    }

    /// A page that is locked into memory.
    pub fn mlocked(self) -> bool {
        self.bit(KPF_MLOCKED)
    }
}

/// An entry of `/proc/<pid>/pagemap`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry(u64);

impl MapEntry {
    /// The physical page, if one is mapped.
    pub fn pfn(self) -> Option<Pfn> {
        (self.0 >> PM_PRESENT & 1 == 1).then_some(Pfn(self.0 & ((1 << 55) - 1)))
    }

    /// Whether the page is in swap.
    pub fn swapped(self) -> bool {
        self.0 >> PM_SWAP & 1 == 1
    }

    /// Whether the page is write-protected by a userfaultfd.
    pub fn uffd_write_protected(self) -> bool {
        self.0 >> PM_UFFD_WP & 1 == 1
    }
}

/// The entries of a region of process `pid`.
pub fn map_entries(pid: i32, region: Region) -> Result<Vec<MapEntry>> {
    let file = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut bytes = vec![0; region.pages * 8];
    file.read_exact_at(&mut bytes, (region.addr / PAGE * 8) as u64)
        .context("pagemap")?;
    let words = bytes
        .chunks_exact(8)
        .map(|word| MapEntry(u64::from_le_bytes(word.try_into().expect("8 bytes"))));
    Ok(words.collect())
}

/// The physical pages of a region of process `pid`, all of which must be present.
pub fn pfns(pid: i32, region: Region) -> Result<Vec<Pfn>> {
    let entries = map_entries(pid, region)?;
    let pfns: Option<Vec<Pfn>> = entries.iter().map(|entry| entry.pfn()).collect();
    let pfns = pfns.with_context(|| format!("a page of process {pid} is not present"))?;
    ensure!(
        pfns.iter().all(|pfn| pfn.0 != 0),
        "pagemap hides page frame numbers; the tests must run as root"
    );
    Ok(pfns)
}

/// How many pages of a region are present and KSM pages.
pub fn ksm_pages(pid: i32, region: Region) -> Result<usize> {
    let mut count = 0;
    for entry in map_entries(pid, region)? {
        if let Some(pfn) = entry.pfn()
            && pfn.flags()?.ksm()
        {
            count += 1;
        }
    }
    Ok(count)
}

/// The number after `name` in a `/proc` file with one `name value` (or `name: value kB`) on each line.
pub fn field(text: &str, name: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()?.trim_end_matches(':') == name).then(|| words.next())?
    });
    line.with_context(|| format!("no {name} in {text:?}"))?
        .parse()
        .with_context(|| format!("value of {name}"))
}

fn process_file(pid: i32, file: &str) -> Result<String> {
    let path = format!("/proc/{pid}/{file}");
    fs::read_to_string(&path).context(path)
}

/// The whole of `/proc/<pid>/ksm_stat`.
pub fn ksm_stat_text(pid: i32) -> Result<String> {
    process_file(pid, "ksm_stat")
}

/// A number from `/proc/<pid>/ksm_stat`.
pub fn ksm_stat(pid: i32, name: &str) -> Result<u64> {
    field(&process_file(pid, "ksm_stat")?, name)
}

/// The number in `/proc/<pid>/ksm_merging_pages`.
pub fn ksm_merging_pages(pid: i32) -> Result<u64> {
    process_file(pid, "ksm_merging_pages")?
        .trim_end()
        .parse()
        .context("ksm_merging_pages")
}

/// A number from `/proc/<pid>/status`.
pub fn status(pid: i32, name: &str) -> Result<u64> {
    field(&process_file(pid, "status")?, name)
}

/// A number of kilobytes from `/proc/<pid>/smaps`, for the area that starts exactly at the region.
pub fn smaps_kb(pid: i32, region: Region, name: &str) -> Result<u64> {
    let text = process_file(pid, "smaps")?;
    let start = format!("{:x}-", region.addr);
    let mut lines = text.lines().skip_while(|line| !line.starts_with(&start));
    ensure!(
        lines.next().is_some(),
        "process {pid} has no area that starts at {:#x}",
        region.addr
    );
    // The next area's first line is the only kind that does not begin with `Name:`.
    let area: Vec<&str> = lines
        .take_while(|line| {
            line.split_whitespace()
                .next()
                .is_some_and(|word| word.ends_with(':'))
        })
        .collect();
    field(&area.join("\n"), name)
}

/// Whether the area that starts exactly at the region has a flag, by its two letters in `/proc/<pid>/smaps`.
pub fn has_vm_flag(pid: i32, region: Region, flag: &str) -> Result<bool> {
    let text = process_file(pid, "smaps")?;
    let start = format!("{:x}-", region.addr);
    let mut lines = text.lines().skip_while(|line| !line.starts_with(&start));
    let flags = lines
        .find_map(|line| line.strip_prefix("VmFlags:"))
        .with_context(|| {
            format!(
                "process {pid} has no area that starts at {:#x}",
                region.addr
            )
        })?;
    Ok(flags.split_whitespace().any(|word| word == flag))
}

/// A number from `/proc/vmstat`.
pub fn vmstat(name: &str) -> Result<u64> {
    field(&fs::read_to_string("/proc/vmstat")?, name)
}

/// A number from `/proc/meminfo`, in kilobytes.
pub fn meminfo(name: &str) -> Result<u64> {
    field(&fs::read_to_string("/proc/meminfo")?, name)
}

/// The process with this name, a kernel thread's for instance.
pub fn pid_of(name: &str) -> Result<Option<i32>> {
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        if fs::read_to_string(entry.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

/// How often process `pid` was switched to and from.
pub fn context_switches(pid: i32) -> Result<u64> {
    Ok(status(pid, "voluntary_ctxt_switches")? + status(pid, "nonvoluntary_ctxt_switches")?)
}

/// How many objects of a slab cache are in use, after caches of free objects were emptied.
pub fn slab_objects(cache: &str) -> Result<u64> {
    let shrink = format!("/sys/kernel/slab/{cache}/shrink");
    fs::write(&shrink, "1").context(shrink)?;
    field(&fs::read_to_string("/proc/slabinfo")?, cache)
}

/// Names of the slab caches that plain allocations come from.
pub fn kmalloc_caches() -> Result<Vec<String>> {
    let text = fs::read_to_string("/proc/slabinfo")?;
    let names = text
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    Ok(names
        .filter(|name| name.starts_with("kmalloc-"))
        .map(str::to_owned)
        .collect())
}
