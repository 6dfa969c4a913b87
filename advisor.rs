// SPDX-License-Identifier: GPL-2.0

//! The scan time advisor: after each pass it sets `pages_to_scan` so that a pass takes the time wanted, within
//! the share of a CPU allowed. `Documentation/admin-guide/mm/ksm.rst` has the law; numbers are whole ones, as there.

#![forbid(unsafe_code)]

/// What `advisor_*` say, as they were when a pass ended.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    /// Seconds that a pass should take; at least 1.
    pub(crate) target_scan_time: u64,
    /// Most percent of a CPU.
    pub(crate) max_cpu: u32,
    /// Least pages between two sleeps.
    pub(crate) min_pages: u64,
    /// Most pages between two sleeps.
    pub(crate) max_pages: u64,
}

/// Percent of a CPU that may be used in any case.
const MIN_CPU: u64 = 10;

/// Weight of the newest change among all, in percent.
const WEIGHT: u64 = 30;

/// What a pass took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Spent {
    /// Milliseconds of time.
    pub(crate) millisecs: u64,
    /// Milliseconds of CPU time, of all threads together.
    pub(crate) cpu_millisecs: u64,
}

/// What the advisor says after a pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Advice {
    /// The new `pages_to_scan`.
    pub(crate) pages_to_scan: u32,
    /// Seconds that the pass took, at least 1.
    pub(crate) scan_time: u64,
    /// Percent of a CPU that it took, at least 1.
    pub(crate) cpu_percent: u32,
}

/// What the advisor remembers from pass to pass.
#[derive(Default)]
pub(crate) struct Advisor {
    /// Seconds that the last pass took; 0 before the first.
    scan_time: u64,
    /// Average of how one pass's time compares with that of the pass before, in percent.
    change: u64,
}

impl Advisor {
    /// After a pass that took `spent`, with `pages_to_scan` as it was meanwhile.
    pub(crate) fn advise(&mut self, spent: Spent, pages_to_scan: u32, limits: Limits) -> Advice {
        let pages_to_scan = u64::from(pages_to_scan);
        let scan_time = (spent.millisecs / 1000).max(1);
        let cpu_percent = percent(spent.cpu_millisecs, scan_time.saturating_mul(1000)).max(1);
        let last = if self.scan_time == 0 {
            scan_time
        } else {
            self.scan_time
        };

        let factor = percent(limits.target_scan_time, scan_time).max(1);
        let change = percent(scan_time, last).max(1);
        let kept = self.change.saturating_mul(100 - WEIGHT);
        let change = kept.saturating_add(change.saturating_mul(WEIGHT)) / 100;

        // As many as reach the target at the present rate, the more so as passes have become slower.
        let pages = percent(pages_to_scan, factor).saturating_mul(change) / 100;
        // What one percent of a CPU scans bounds them from both sides.
        let per_percent = pages_to_scan.checked_div(cpu_percent).unwrap_or(1).max(1);
        let pages = pages
            .min(per_percent.saturating_mul(limits.max_cpu.into()))
            .max(per_percent.saturating_mul(MIN_CPU))
            .max(limits.min_pages)
            .min(limits.max_pages);

        self.change = change;
        self.scan_time = scan_time;
        Advice {
            pages_to_scan: u32::try_from(pages).unwrap_or(u32::MAX),
            scan_time,
            cpu_percent: u32::try_from(cpu_percent).unwrap_or(u32::MAX),
        }
    }
}

/// `part` in percent of `whole`; 0 of nothing.
fn percent(part: u64, whole: u64) -> u64 {
    part.saturating_mul(100).checked_div(whole).unwrap_or(0)
}
