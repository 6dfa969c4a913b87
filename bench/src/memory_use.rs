//! Kernel memory for what is known of the pages, everything counted.
//!
//! Counting the objects of slab caches would leave out what is not in one: arrays of tree roots, tables, half-empty
//! slabs. So this counts all memory that belongs neither to processes nor to the page cache nor to nobody, before
//! the first pass and after the last, with the thread at rest: the difference is what the KSM took. Free are the pages
//! on the lists of single CPUs as well, and the counters of single CPUs are added up before. What was freed just before
//! (by the other side's turn, by the end of the module's loading) is given time to be free.

use std::fs;
use std::thread::sleep;
use std::time::Duration;

use anyhow::Result;

use crate::memory::Content;
use crate::memory::PAGE;
use crate::memory::PAGES_PER_MIB;
use crate::memory::Shape;
use crate::record::Metric;
use crate::session::Session;
use crate::session::Turn;
use crate::session::meminfo_kb;
use crate::victim::Spec;
use crate::victim::Victim;

/// Measures the memory for pages that are not merged, and for pages that are.
pub fn run(session: &mut Session) -> Result<()> {
    let mib = session.pick(1024, 128);
    session.note(format!("{mib} MiB"));
    let pages = mib * PAGES_PER_MIB;
    session.alternate(|turn| {
        measure(turn, "unmerged", pages, Content::Unique)?;
        measure(turn, "merged, 16 groups", pages, Content::Groups(16))?;
        let pairs = Content::Groups(pages as u64 / 2);
        measure(turn, "merged, pairs", pages, pairs)
    })
}

fn measure(turn: &mut Turn<'_>, case: &str, pages: usize, content: Content) -> Result<()> {
    let victim = Victim::spawn(Spec {
        shape: Shape::Dense,
        content,
        seed: u64::from(turn.round),
        first: 0,
        pages,
    })?;
    let before = kernel_kb()?;
    turn.ksm.start()?;
    if content == Content::Unique {
        turn.ksm.passes(3)?;
    } else {
        turn.ksm.merge(pages as u64 * 999 / 1000)?;
        turn.ksm.passes(2)?;
    }
    turn.ksm.stop()?;
    let taken = kernel_kb()? - before;
    let bytes = taken as f64 * 1024.0 / pages as f64;
    turn.record(case, None, Metric::BytesPerPage, bytes);
    drop(victim);
    turn.clear()
}

/// Memory that is neither free nor a process's nor the page cache's.
fn kernel_kb() -> Result<i64> {
    sleep(Duration::from_millis(300));
    for cache in fs::read_dir("/sys/kernel/slab")? {
        // The cache may be gone by now.
        let _ = fs::write(cache?.path().join("shrink"), "1");
    }
    // Caches of the file system come and go. 4: without a line in the log.
    fs::write("/proc/sys/vm/drop_caches", "4")?;
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    fs::write("/proc/sys/vm/stat_refresh", "1")?;
    let zones = fs::read_to_string("/proc/zoneinfo")?;
    let of_cpus = zones
        .lines()
        .filter_map(|line| line.trim().strip_prefix("count:"));
    let pages = of_cpus.map(|count| count.trim().parse::<i64>());
    let on_lists = pages.sum::<Result<i64, _>>()? * (PAGE >> 10) as i64;
    let mut rest = meminfo_kb("MemTotal")? as i64 - on_lists;
    for other in [
        "MemFree",
        "Buffers",
        "Cached",
        "SwapCached",
        "AnonPages",
        "PageTables",
    ] {
        rest -= meminfo_kb(other)? as i64;
    }
    Ok(rest)
}
