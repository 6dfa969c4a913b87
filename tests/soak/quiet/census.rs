//! What page tables say of merged pages, over all processes.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::Result;
use ksm_e2e::Region;
use ksm_e2e::memory::PAGE;
use ksm_e2e::procfs;
use ksm_e2e::procfs::PageFlags;
use ksm_e2e::procfs::Pfn;

/// Areas begin below this address, but for one of the kernel's own that looks like a process's.
const END: usize = 1 << 47;

/// A process and what it maps.
struct Process {
    pid: i32,
    name: String,
    /// Mappings of KSM pages, in memory that may be merged.
    merged: u64,
    /// Mappings of the zero page in memory that may be merged.
    zero: u64,
    /// Mappings of anonymous pages, KSM pages among them.
    anonymous: u64,
    /// Entries of pages that are in swap, or on their way to another place.
    elsewhere: u64,
    /// The CPU time that its first thread had before its pages were counted, in nanoseconds.
    ran: u64,
    /// Pages that the module knows, as `/proc` says.
    items: u64,
}

/// See the module. Nothing may be going on while it is taken.
pub struct Census {
    processes: Vec<Process>,
    /// The KSM pages.
    pages: BTreeMap<Pfn, Mappings>,
}

/// How many page table entries map a KSM page.
#[derive(Default)]
struct Mappings {
    all: u64,
    /// In memory that may be merged. A page that was merged in a child is a KSM page in its parent too, whose memory may
    /// be none of KSM's business; nobody counts it there, with the kernel's own KSM neither.
    mergeable: u64,
}

/// The areas of a process that begin and end where a page does, and whether each may be merged.
fn areas(pid: i32) -> Result<Vec<(Region, bool)>> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut areas: Vec<(Region, bool)> = Vec::new();
    for line in text.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some((_, mergeable)) = areas.last_mut() {
                *mergeable = flags.split_whitespace().any(|flag| flag == "mg");
            }
        } else if let Some((start, end)) = first.split_once('-') {
            let (addr, end) = (
                usize::from_str_radix(start, 16)?,
                usize::from_str_radix(end, 16)?,
            );
            let pages = (end - addr) / PAGE;
            areas.push((Region { addr, pages }, false));
        }
    }
    areas.retain(|(region, _)| region.addr < END);
    Ok(areas)
}

/// Whether a process has ended, or is about to and has no memory any more.
fn has_ended(pid: i32) -> bool {
    areas(pid).is_ok_and(|areas| areas.is_empty())
        || !Path::new("/proc").join(pid.to_string()).exists()
}

/// See [`Census::sizes`].
#[derive(Default)]
pub struct Sizes {
    /// Where the kernel says that a process has more or less anonymous memory than its page tables do.
    pub wrong: Vec<String>,
    /// The same of processes that ran while they were counted, as those of the machine itself may, so that it proves nothing.
    pub unsure: Vec<String>,
}

impl Process {
    /// See [`Census::sizes`].
    fn size(&self, sizes: &mut Sizes) -> Result<()> {
        let Self {
            pid,
            name,
            anonymous,
            elsewhere,
            ..
        } = self;
        let said = procfs::status(*pid, "RssAnon")? * 1024 / PAGE as u64;
        let swapped = procfs::status(*pid, "VmSwap")? * 1024 / PAGE as u64;
        if said == *anonymous {
            return Ok(());
        }
        let problem = format!(
            "RssAnon of {name} {pid} is {said} pages, but there are {anonymous}; VmSwap is {swapped} pages, {elsewhere} are in \
             swap or on their way"
        );
        if procfs::cpu_nanosecs(*pid)? == self.ran {
            sizes.wrong.push(problem);
        } else {
            sizes.unsure.push(problem);
        }
        Ok(())
    }
}

impl Census {
    /// Counts.
    pub fn take() -> Result<Self> {
        let mut census = Self {
            processes: Vec::new(),
            pages: BTreeMap::new(),
        };
        let mut flags = HashMap::new();
        for entry in fs::read_dir("/proc")? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            // One that has just ended has no memory any more, and kernel threads never have.
            let Ok(areas) = areas(pid) else { continue };
            if areas.is_empty() {
                continue;
            }
            let counted = fs::read_to_string(entry.path().join("comm"))
                .map_err(anyhow::Error::from)
                .and_then(|name| Self::count(pid, name.trim_end().to_owned(), &areas, &mut flags));
            match counted {
                Ok((process, pages)) => {
                    census.processes.push(process);
                    for (pfn, more) in pages {
                        let mappings = census.pages.entry(pfn).or_default();
                        mappings.all += more.all;
                        mappings.mergeable += more.mergeable;
                    }
                }
                // It has ended meanwhile.
                Err(_) if has_ended(pid) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(census)
    }

    /// One process, and the KSM pages that it maps.
    fn count(
        pid: i32,
        name: String,
        areas: &[(Region, bool)],
        known: &mut HashMap<Pfn, PageFlags>,
    ) -> Result<(Process, BTreeMap<Pfn, Mappings>)> {
        let mut pages: BTreeMap<Pfn, Mappings> = BTreeMap::new();
        let mut process = Process {
            pid,
            name,
            merged: 0,
            zero: 0,
            anonymous: 0,
            elsewhere: 0,
            ran: procfs::cpu_nanosecs(pid)?,
            items: procfs::ksm_stat(pid, "ksm_rmap_items")?,
        };
        for (region, mergeable) in areas {
            for entry in procfs::map_entries(pid, *region)? {
                process.elsewhere += u64::from(entry.swapped());
                let Some(pfn) = entry.pfn() else { continue };
                let flags = match known.get(&pfn) {
                    Some(flags) => *flags,
                    None => {
                        let flags = pfn.flags()?;
                        known.insert(pfn, flags);
                        flags
                    }
                };
                process.anonymous += u64::from(flags.anonymous());
                process.zero += u64::from(*mergeable && flags.zero_page());
                if flags.ksm() {
                    process.merged += u64::from(*mergeable);
                    let mappings = pages.entry(pfn).or_default();
                    mappings.all += 1;
                    mappings.mergeable += u64::from(*mergeable);
                }
            }
        }
        Ok((process, pages))
    }

    /// KSM pages that are mapped in memory that may be merged.
    pub fn pages(&self) -> u64 {
        let pages = self.pages.values();
        pages.filter(|mappings| mappings.mergeable > 0).count() as u64
    }

    /// KSM pages that are mapped anywhere.
    pub fn all_pages(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Mappings of KSM pages in memory that may be merged.
    pub fn mappings(&self) -> u64 {
        self.pages.values().map(|mappings| mappings.mergeable).sum()
    }

    /// Mappings of KSM pages in other memory.
    pub fn elsewhere(&self) -> u64 {
        let pages = self.pages.values();
        pages
            .map(|mappings| mappings.all - mappings.mergeable)
            .sum()
    }

    /// Mappings of the zero page that stand for empty pages.
    pub fn zero_pages(&self) -> u64 {
        self.processes.iter().map(|process| process.zero).sum()
    }

    /// Pages that the module knows.
    pub fn items(&self) -> u64 {
        self.processes.iter().map(|process| process.items).sum()
    }

    /// How much anonymous memory the kernel says that processes have, compared with what their page tables do.
    pub fn sizes(&self) -> Result<Sizes> {
        // This process's own memory grows as it counts.
        let me = std::process::id() as i32;
        let mut sizes = Sizes::default();
        for process in self.processes.iter().filter(|process| process.pid != me) {
            match process.size(&mut sizes) {
                Ok(()) => {}
                Err(_) if has_ended(process.pid) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(sizes)
    }

    /// Where what the kernel says of merged pages of single processes, and of single pages, is not what their page tables
    /// say.
    pub fn problems(&self) -> Result<Vec<String>> {
        let mut problems = Vec::new();
        for process in self
            .processes
            .iter()
            .filter(|process| !has_ended(process.pid))
        {
            let pid = process.pid;
            let mut expect = |what: &str, said: u64, seen: u64| {
                if said != seen {
                    let name = &process.name;
                    problems.push(format!(
                        "{what} of {name} {pid} is {said}, but there are {seen}"
                    ));
                }
            };
            expect(
                "ksm_merging_pages",
                procfs::ksm_merging_pages(pid)?,
                process.merged,
            );
            expect(
                "ksm_merging_pages in ksm_stat",
                procfs::ksm_stat(pid, "ksm_merging_pages")?,
                process.merged,
            );
            expect(
                "ksm_zero_pages",
                procfs::ksm_stat(pid, "ksm_zero_pages")?,
                process.zero,
            );
        }
        for (pfn, mappings) in &self.pages {
            let (said, seen) = (procfs::mappings(*pfn)?, mappings.all);
            if said != seen {
                problems.push(format!(
                    "{pfn:?} has {said} mappings, but {seen} were found"
                ));
            }
        }
        Ok(problems)
    }
}

impl fmt::Display for Census {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} processes have {} mappings of {} KSM pages, {} in memory that is not mergeable, {} of the zero page; {} pages are \
             known",
            self.processes.len(),
            self.mappings(),
            self.pages(),
            self.elsewhere(),
            self.zero_pages(),
            self.items()
        )
    }
}
