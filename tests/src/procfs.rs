//! What `/proc` says about a process and its pages.

use std::collections::BTreeMap;
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
const KPF_SWAPBACKED: u64 = 14;
const KPF_HWPOISON: u64 = 19;
const KPF_NOPAGE: u64 = 20;
const KPF_KSM: u64 = 21;
const KPF_ZERO_PAGE: u64 = 24;
const KPF_RESERVED: u64 = 32;
const KPF_MLOCKED: u64 = 33;

/// See [`PageFlags::lasting`].
const LASTING: [(u64, &str); 13] = [
    (1, "error"),
    (3, "uptodate"),
    (11, "mmap"),
    (KPF_ANON, "anon"),
    (13, "swapcache"),
    (14, "swapbacked"),
    (15, "compound"),
    (18, "unevictable"),
    (KPF_HWPOISON, "hwpoison"),
    (KPF_KSM, "ksm"),
    (22, "thp"),
    (KPF_ZERO_PAGE, "zero"),
    (KPF_MLOCKED, "mlocked"),
];

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
        Ok(self.flags_from_here(1)?[0])
    }

    /// The same for as many pages from this one on.
    pub fn flags_from_here(self, pages: usize) -> Result<Vec<PageFlags>> {
        self.flags_in(&kpageflags()?, pages)
    }

    fn flags_in(self, file: &File, pages: usize) -> Result<Vec<PageFlags>> {
        let mut bytes = vec![0; pages * 8];
        file.read_exact_at(&mut bytes, self.0 * 8)
            .with_context(|| format!("flags of {pages} pages from {self:?} on"))?;
        let words = bytes
            .chunks_exact(8)
            .map(|word| PageFlags(u64::from_le_bytes(word.try_into().expect("8 bytes"))));
        Ok(words.collect())
    }
}

/// How many entries of page tables map a physical page.
pub fn mappings(pfn: Pfn) -> Result<u64> {
    let file = File::open("/proc/kpagecount").context("/proc/kpagecount")?;
    let mut word = [0; 8];
    file.read_exact_at(&mut word, pfn.0 * 8)
        .with_context(|| format!("mappings of {pfn:?}"))?;
    Ok(u64::from_le_bytes(word))
}

/// Flags of a physical page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFlags(u64);

impl PageFlags {
    fn bit(self, bit: u64) -> bool {
        self.0 >> bit & 1 == 1
    }

    /// The names of those flags that do not depend on who looked at the page, or which list it waits in.
    pub fn lasting(self) -> String {
        let names = LASTING.iter().filter(|(bit, _)| self.bit(*bit));
        names.map(|(_, name)| *name).collect::<Vec<_>>().join("|")
    }

    /// A page that KSM made.
    pub fn ksm(self) -> bool {
        self.bit(KPF_KSM)
    }

    /// An anonymous page.
    pub fn anonymous(self) -> bool {
        self.bit(KPF_ANON)
    }

    /// An anonymous page that must go to swap before it can be freed.
    pub fn swap_backed(self) -> bool {
        self.bit(KPF_SWAPBACKED)
    }

    /// The kernel's page of zeroes.
    pub fn zero_page(self) -> bool {
        self.bit(KPF_ZERO_PAGE)
    }

    /// A page that must not be used any more.
    pub fn poisoned(self) -> bool {
        self.bit(KPF_HWPOISON)
    }

    /// A page that the kernel took before its allocator was there.
    pub fn reserved(self) -> bool {
        self.bit(KPF_RESERVED)
    }

    /// No page at all.
    pub fn absent(self) -> bool {
        self.bit(KPF_NOPAGE)
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

fn kpageflags() -> Result<File> {
    File::open("/proc/kpageflags").context("/proc/kpageflags")
}

/// How many pages of a region are present and KSM pages.
pub fn ksm_pages(pid: i32, region: Region) -> Result<usize> {
    let file = kpageflags()?;
    let mut count = 0;
    for entry in map_entries(pid, region)? {
        if let Some(pfn) = entry.pfn()
            && pfn.flags_in(&file, 1)?[0].ksm()
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

/// The lines of `/proc/<pid>/ksm_stat`, each a name and a value.
pub fn ksm_stat_lines(pid: i32) -> Result<Vec<(String, String)>> {
    let text = process_file(pid, "ksm_stat")?;
    let lines = text.lines().map(|line| {
        let (name, value) = line
            .split_once(' ')
            .with_context(|| format!("ksm_stat has the line {line:?}"))?;
        Ok((name.trim_end_matches(':').to_owned(), value.to_owned()))
    });
    lines.collect()
}

/// The kernel's functions that a process is in, the innermost first.
pub fn stack(pid: i32) -> Result<String> {
    process_file(pid, "stack")
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

/// The numbers of kilobytes from `/proc/<pid>/smaps`, summed over the areas within a region; and how many areas that
/// are.
pub fn smaps_within(pid: i32, region: Region) -> Result<(BTreeMap<String, u64>, usize)> {
    let text = process_file(pid, "smaps")?;
    let bounds = |line: &str| {
        let (start, end) = line.split_whitespace().next()?.split_once('-')?;
        let number = |text| usize::from_str_radix(text, 16).ok();
        Some((number(start)?, number(end)?))
    };
    let mut sums = BTreeMap::new();
    let (mut areas, mut inside) = (0, false);
    for line in text.lines() {
        if let Some((start, end)) = bounds(line) {
            inside = start >= region.addr && end <= region.addr + region.len();
            areas += usize::from(inside);
        } else if inside && let Some(number) = line.strip_suffix(" kB") {
            let (name, number) = number.split_once(':').context("a line of smaps")?;
            *sums.entry(name.to_owned()).or_default() += number.trim_start().parse::<u64>()?;
        }
    }
    Ok((sums, areas))
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

/// CPU time that a process has used, in clock ticks.
pub fn cpu_ticks(pid: i32) -> Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).context(path)?;
    let (_, fields) = text.rsplit_once(')').context("a line without a name")?;
    // From the third field on: state, then ten others, then utime and stime.
    let mut times = fields.split_whitespace().skip(11).take(2);
    let mut next = || Ok::<u64, anyhow::Error>(times.next().context("too few fields")?.parse()?);
    Ok(next()? + next()?)
}

/// CPU time that a process has used, in nanoseconds, as of the last time that it was switched from, or of the last tick.
pub fn cpu_nanosecs(pid: i32) -> Result<u64> {
    let text = process_file(pid, "schedstat")?;
    let first = text.split_whitespace().next();
    first
        .context("an empty schedstat")?
        .parse()
        .context("schedstat")
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
