//! Pages that are moved together: compaction, and huge pages made of small ones.

use std::fs;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use ksm_e2e::memory;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::PAGES_PER_HUGE;
use nix::errno::Errno;

use crate::actor::Stage;

const COMPACT: &str = "/proc/sys/vm/compact_memory";
const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage";

/// What `MADV_COLLAPSE` may say when a page is shared, busy, or there is no huge page to be had.
const NOT_COLLAPSED: [Errno; 4] = [Errno::EAGAIN, Errno::EBUSY, Errno::EINVAL, Errno::ENOMEM];

fn write(path: &str, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("writing {text:?} to {path}"))
}

/// All memory is compacted, again and again.
pub fn compact(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(64..1024);
    let region = stage.mergeable(pages)?;
    stage.let_merge(region)?;
    // Holes for others to be moved into.
    for _ in 0..8 {
        let first = stage.rng.usize(..region.pages - 16);
        let part = region.part(first, stage.rng.usize(1..16));
        memory::advise(part, libc::MADV_DONTNEED)?;
        stage.paint(part)?;
    }
    for _ in 0..stage.rng.usize(1..4) {
        stage.doing("compacting");
        write(COMPACT, "1")?;
        stage.check_all()?;
    }
    Ok(())
}

/// Huge pages are made of pages that are merged and parted again.
pub fn collapse(stage: &mut Stage) -> Result<()> {
    write(&format!("{HUGE_PAGES}/enabled"), "madvise")?;
    let khugepaged =
        |file: &str, text: &str| write(&format!("{HUGE_PAGES}/khugepaged/{file}"), text);
    khugepaged("scan_sleep_millisecs", "1")?;
    khugepaged("alloc_sleep_millisecs", "1")?;
    khugepaged("pages_to_scan", "4096")?;
    // Whether pages shared by several processes are taken is a matter of these.
    let most = stage.rng.choice(["0", "256", "511"]).context("a choice")?;
    khugepaged("max_ptes_shared", most)?;
    khugepaged("max_ptes_swap", most)?;
    let huge = stage.rng.usize(1..3);
    let region = stage.map(Mapping::huge(huge))?;
    stage.paint(region)?;
    memory::advise(region, libc::MADV_MERGEABLE)?;
    for _ in 0..3 {
        stage.doing("waiting for a merge");
        stage.let_merge(region)?;
        stage.check(region)?;
        let part = region.part(stage.rng.usize(..huge) * PAGES_PER_HUGE, PAGES_PER_HUGE);
        // Parted by writing, or as they are.
        if stage.rng.bool() {
            stage.paint(part)?;
        }
        if stage.rng.bool() {
            stage.doing("MADV_COLLAPSE");
            match memory::advise(part, libc::MADV_COLLAPSE) {
                Err(errno) if !NOT_COLLAPSED.contains(&errno) => {
                    bail!("MADV_COLLAPSE: {errno}")
                }
                Ok(()) | Err(_) => {}
            }
        } else {
            stage.dally(200);
        }
        stage.check_all()?;
    }
    Ok(())
}
