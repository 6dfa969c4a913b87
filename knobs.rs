// SPDX-License-Identifier: GPL-2.0

//! What is written to the files of `/sys/kernel/mm/ksm_rs`: parsing, bounds, errors; all as stock has them.

#![forbid(unsafe_code)]

use crate::{
    advisor::Limits,
    domain::Scope,
    parse, //
};
use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        AtomicFlag,
        Relaxed, //
    }, //
};

/// Default of `max_page_sharing`.
pub(crate) const MAX_PAGE_SHARING: u32 = 256;

/// Most threads that can scan at the same time.
pub(crate) const MOST_THREADS: usize = 64;

/// Default of `pages_to_scan` without an advisor.
const PAGES_TO_SCAN: u32 = 100;

/// What the thread does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Run {
    /// Nothing; what is merged stays merged.
    Stop = 0,
    /// Scan and merge.
    Merge = 1,
    /// Nothing; what was merged has been given pages of its own again.
    Unmerge = 2,
}

impl Run {
    /// From a number; `None` if it is none of these.
    pub(crate) fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::Stop),
            1 => Some(Self::Merge),
            2 => Some(Self::Unmerge),
            _ => None,
        }
    }
}

/// What `run` takes: 0, 1 or 2; `EINVAL` for all else.
pub(crate) fn run(text: &CStr) -> Result<Run> {
    let number = parse::uint(text).map_err(|_| EINVAL)?;
    Run::from_number(number).ok_or(EINVAL)
}

/// What `sleep_millisecs`, `pages_to_scan` and `stable_node_chains_prune_millisecs` take: any `unsigned int`; `EINVAL` for all else.
pub(crate) fn any_uint(text: &CStr) -> Result<u32> {
    parse::uint(text).map_err(|_| EINVAL)
}

/// What `merge_across_nodes` takes: 0 or 1. `ERANGE` past an `unsigned long`, else `EINVAL`.
#[cfg_attr(not(CONFIG_NUMA), allow(dead_code))]
pub(crate) fn merge_across_nodes(text: &CStr) -> Result<bool> {
    match parse::ulong(text)? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(EINVAL),
    }
}

/// What `merge_scope` takes: the name of a scope; `EINVAL` for all else.
pub(crate) fn merge_scope(text: &CStr) -> Result<Scope> {
    let named = |scope: &Scope| parse::is_word(text, scope.name());
    Scope::ALL.into_iter().find(named).ok_or(EINVAL)
}

/// What `use_zero_pages` takes: what `kstrtobool()` does; `EINVAL` for all else.
pub(crate) fn use_zero_pages(text: &CStr) -> Result<bool> {
    parse::truth(text)
}

/// What `max_page_sharing` takes: an `int` from 2 up. `ERANGE` past an `int`, else `EINVAL`.
pub(crate) fn max_page_sharing(text: &CStr) -> Result<u32> {
    match parse::int(text)? {
        limit if limit >= 2 => Ok(limit.unsigned_abs()),
        _ => Err(EINVAL),
    }
}

/// What `smart_scan` takes: what `kstrtobool()` does; `EINVAL` for all else.
pub(crate) fn smart_scan(text: &CStr) -> Result<bool> {
    parse::truth(text)
}

/// What `advisor_mode` takes: `none` or `scan-time`; `EINVAL` for all else. Whether the advisor is on.
pub(crate) fn advisor_mode(text: &CStr) -> Result<bool> {
    if parse::is_word(text, c"scan-time") {
        Ok(true)
    } else if parse::is_word(text, c"none") {
        Ok(false)
    } else {
        Err(EINVAL)
    }
}

/// What the advisor's limits take: any `unsigned long`; `EINVAL` for all else.
pub(crate) fn any_ulong(text: &CStr) -> Result<u64> {
    parse::ulong(text).map_err(|_| EINVAL)
}

/// What `advisor_target_scan_time` takes: an `unsigned long` from 1 up; `EINVAL` for all else.
pub(crate) fn target_scan_time(text: &CStr) -> Result<u64> {
    match any_ulong(text)? {
        0 => Err(EINVAL),
        seconds => Ok(seconds),
    }
}

/// What `scan_threads` takes: a number from 1 to [`MOST_THREADS`]; `EINVAL` for all else.
pub(crate) fn scan_threads(text: &CStr) -> Result<u32> {
    match any_uint(text)? {
        threads if (1..=MOST_THREADS as u32).contains(&threads) => Ok(threads),
        _ => Err(EINVAL),
    }
}

/// What the parameter `drop_in` takes: 0 or 1; `None` for all else.
pub(crate) fn drop_in(number: u8) -> Option<bool> {
    match number {
        0 => Some(false),
        1 => Some(true),
        _ => None,
    }
}

/// The knobs. Written by whoever writes the files, read by anybody.
pub(crate) struct Knobs {
    run: Atomic<u32>,
    pages_to_scan: Atomic<u32>,
    sleep_millisecs: Atomic<u32>,
    max_page_sharing: Atomic<u32>,
    merge_across_nodes: AtomicFlag,
    merge_scope: Atomic<u32>,
    use_zero_pages: AtomicFlag,
    prune_millisecs: Atomic<u32>,
    smart_scan: AtomicFlag,
    advisor: AtomicFlag,
    advisor_max_cpu: Atomic<u32>,
    advisor_min_pages: Atomic<u64>,
    advisor_max_pages: Atomic<u64>,
    advisor_target_scan_time: Atomic<u64>,
    scan_threads: Atomic<u32>,
}

impl Knobs {
    /// Stock's defaults.
    pub(crate) const fn new() -> Self {
        Self {
            run: Atomic::new(Run::Stop as u32),
            pages_to_scan: Atomic::new(PAGES_TO_SCAN),
            sleep_millisecs: Atomic::new(20),
            max_page_sharing: Atomic::new(MAX_PAGE_SHARING),
            merge_across_nodes: AtomicFlag::new(true),
            merge_scope: Atomic::new(Scope::Global as u32),
            use_zero_pages: AtomicFlag::new(false),
            prune_millisecs: Atomic::new(2000),
            smart_scan: AtomicFlag::new(true),
            advisor: AtomicFlag::new(false),
            advisor_max_cpu: Atomic::new(70),
            advisor_min_pages: Atomic::new(500),
            advisor_max_pages: Atomic::new(30_000),
            advisor_target_scan_time: Atomic::new(200),
            scan_threads: Atomic::new(1),
        }
    }

    /// What the thread does.
    pub(crate) fn run(&self) -> Run {
        Run::from_number(self.run.load(Relaxed)).unwrap_or(Run::Stop)
    }

    /// Sets what the thread does.
    pub(crate) fn set_run(&self, run: Run) {
        self.run.store(run as u32, Relaxed);
    }

    /// Pages to scan between two sleeps.
    pub(crate) fn pages_to_scan(&self) -> u32 {
        self.pages_to_scan.load(Relaxed)
    }

    /// Sets the pages to scan between two sleeps.
    pub(crate) fn set_pages_to_scan(&self, pages: u32) {
        self.pages_to_scan.store(pages, Relaxed);
    }

    /// Milliseconds to sleep in between.
    pub(crate) fn sleep_millisecs(&self) -> u32 {
        self.sleep_millisecs.load(Relaxed)
    }

    /// Sets the milliseconds to sleep in between.
    pub(crate) fn set_sleep_millisecs(&self, millisecs: u32) {
        self.sleep_millisecs.store(millisecs, Relaxed);
    }

    /// Whether empty pages are replaced by the zero page.
    pub(crate) fn use_zero_pages(&self) -> bool {
        self.use_zero_pages.load(Relaxed)
    }

    /// Sets whether empty pages are replaced by the zero page.
    pub(crate) fn set_use_zero_pages(&self, on: bool) {
        self.use_zero_pages.store(on, Relaxed);
    }

    /// Milliseconds between two prunings of the copies of a KSM page. Kept for those who set it: a copy without
    /// mappings goes with the last of them.
    pub(crate) fn prune_millisecs(&self) -> u32 {
        self.prune_millisecs.load(Relaxed)
    }

    /// Sets the milliseconds between two prunings.
    pub(crate) fn set_prune_millisecs(&self, millisecs: u32) {
        self.prune_millisecs.store(millisecs, Relaxed);
    }

    /// Whether pages that could not be merged for several passes are looked at less often.
    pub(crate) fn smart_scan(&self) -> bool {
        self.smart_scan.load(Relaxed)
    }

    /// Sets whether such pages are looked at less often.
    pub(crate) fn set_smart_scan(&self, on: bool) {
        self.smart_scan.store(on, Relaxed);
    }

    /// Whether the advisor sets `pages_to_scan`.
    pub(crate) fn advisor(&self) -> bool {
        self.advisor.load(Relaxed)
    }

    /// Sets whether the advisor sets `pages_to_scan`, which starts from that mode's default.
    pub(crate) fn set_advisor(&self, on: bool) {
        self.advisor.store(on, Relaxed);
        self.set_pages_to_scan(if on {
            // Cut off as stock does.
            self.advisor_min_pages() as u32
        } else {
            PAGES_TO_SCAN
        });
    }

    /// Most percent of a CPU for the advisor.
    pub(crate) fn advisor_max_cpu(&self) -> u32 {
        self.advisor_max_cpu.load(Relaxed)
    }

    /// Sets the most percent of a CPU for the advisor.
    pub(crate) fn set_advisor_max_cpu(&self, percent: u32) {
        self.advisor_max_cpu.store(percent, Relaxed);
    }

    /// Least `pages_to_scan` for the advisor.
    pub(crate) fn advisor_min_pages(&self) -> u64 {
        self.advisor_min_pages.load(Relaxed)
    }

    /// Sets the least `pages_to_scan` for the advisor.
    pub(crate) fn set_advisor_min_pages(&self, pages: u64) {
        self.advisor_min_pages.store(pages, Relaxed);
    }

    /// Most `pages_to_scan` for the advisor.
    pub(crate) fn advisor_max_pages(&self) -> u64 {
        self.advisor_max_pages.load(Relaxed)
    }

    /// Sets the most `pages_to_scan` for the advisor.
    pub(crate) fn set_advisor_max_pages(&self, pages: u64) {
        self.advisor_max_pages.store(pages, Relaxed);
    }

    /// Seconds that a pass should take, for the advisor.
    pub(crate) fn advisor_target_scan_time(&self) -> u64 {
        self.advisor_target_scan_time.load(Relaxed)
    }

    /// Sets the seconds that a pass should take.
    pub(crate) fn set_advisor_target_scan_time(&self, seconds: u64) {
        self.advisor_target_scan_time.store(seconds, Relaxed);
    }

    /// The advisor's limits, all together.
    pub(crate) fn advisor_limits(&self) -> Limits {
        Limits {
            target_scan_time: self.advisor_target_scan_time(),
            max_cpu: self.advisor_max_cpu(),
            min_pages: self.advisor_min_pages(),
            max_pages: self.advisor_max_pages(),
        }
    }

    /// How many threads scan.
    pub(crate) fn scan_threads(&self) -> u32 {
        self.scan_threads.load(Relaxed)
    }

    /// Sets how many threads scan.
    pub(crate) fn set_scan_threads(&self, threads: u32) {
        self.scan_threads.store(threads, Relaxed);
    }

    /// Most mappings of one KSM page.
    pub(crate) fn max_page_sharing(&self) -> u32 {
        self.max_page_sharing.load(Relaxed)
    }

    /// Sets the most mappings of one KSM page.
    pub(crate) fn set_max_page_sharing(&self, limit: u32) {
        self.max_page_sharing.store(limit, Relaxed);
    }

    /// Whether pages of different NUMA nodes are merged.
    #[cfg_attr(not(CONFIG_NUMA), allow(dead_code))]
    pub(crate) fn merge_across_nodes(&self) -> bool {
        self.merge_across_nodes.load(Relaxed)
    }

    /// Sets whether pages of different NUMA nodes are merged.
    #[cfg_attr(not(CONFIG_NUMA), allow(dead_code))]
    pub(crate) fn set_merge_across_nodes(&self, across: bool) {
        self.merge_across_nodes.store(across, Relaxed);
    }

    /// Whose pages are merged with whose.
    pub(crate) fn merge_scope(&self) -> Scope {
        let scope = self.merge_scope.load(Relaxed) as usize;
        Scope::ALL.get(scope).copied().unwrap_or(Scope::Global)
    }

    /// Sets whose pages are merged with whose.
    pub(crate) fn set_merge_scope(&self, scope: Scope) {
        self.merge_scope.store(scope as u32, Relaxed);
    }
}
