//! Memory that is wanted elsewhere: everything by which the kernel takes pages away from processes or moves them.

mod balloon;
mod blocks;
mod compaction;
mod feats;
mod nodes;
mod poison;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::hotplug;
use ksm_e2e::memory;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::PAGE;
use ksm_e2e::settings;
use ksm_e2e::swap;
use ksm_e2e::swap::Group;
use ksm_e2e::swap::Swap;

pub use feats::Feats;

use crate::actor::Actor;
use crate::actor::Kid;
use crate::actor::Stage;

/// Room for a good part of what all actors have together.
const SWAP_PAGES: u32 = 32 * 1024;

/// What the group may have from which the OOM killer takes its victims, in pages.
const OOM_LIMIT: usize = 1024;

/// Where there are settings that the actors change.
const SETTINGS: [&str; 4] = [
    "/proc/sys/kernel/numa_balancing",
    "/sys/kernel/debug/sched/numa_balancing",
    "/sys/kernel/mm/transparent_hugepage/enabled",
    "/sys/kernel/mm/transparent_hugepage/khugepaged",
];

/// All actors of this group.
pub fn actors() -> Vec<Actor> {
    let actor = |name, step| Actor {
        name,
        group: "pressure",
        step,
    };
    vec![
        actor("swap", cycle_swap),
        actor("reclaim", reclaim),
        actor("oom", oom),
        actor("compaction", compaction::compact),
        actor("khugepaged", compaction::collapse),
        actor("nodes", nodes::migrate),
        actor("balancing", nodes::balance),
        actor("blocks", blocks::take_offline_and_back),
        actor("poison-soft", poison::soft),
        actor("poison-hard", poison::hard),
        actor("balloon", balloon::inflate_and_deflate),
    ]
}

/// The system before a round.
pub struct Prepared {
    settings: BTreeMap<PathBuf, String>,
}

/// Remembers what the actors of this group may change.
pub fn prepare() -> Result<Prepared> {
    let mut texts = BTreeMap::new();
    for path in SETTINGS.map(PathBuf::from) {
        let files = if path.is_dir() {
            let entries = fs::read_dir(&path).with_context(|| path.display().to_string())?;
            let files: std::io::Result<_> = entries.map(|entry| Ok(entry?.path())).collect();
            files?
        } else {
            vec![path]
        };
        for file in files {
            let read = || file.display().to_string();
            // What nobody may write is a counter, what nobody may read an order.
            if fs::metadata(&file).with_context(read)?.mode() & 0o600 == 0o600 {
                let text = fs::read_to_string(&file).with_context(read)?;
                texts.insert(file, settings::to_write(&text).to_owned());
            }
        }
    }
    Ok(Prepared { settings: texts })
}

impl Prepared {
    /// Brings the settings back, and fails if an actor has left the system without some of its memory, or with swap.
    pub fn undo(self) -> Result<()> {
        for (file, text) in self.settings {
            let now = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
            if settings::to_write(&now) != text {
                fs::write(&file, &text).with_context(|| file.display().to_string())?;
            }
        }
        let swaps = swap::in_use()?;
        ensure!(swaps.is_empty(), "swap was left on: {swaps:?}");
        ensure!(
            !hotplug::bring_back()?,
            "a block of memory was left offline"
        );
        Ok(())
    }
}

/// Swap space comes and goes, with pages of all actors in it.
fn cycle_swap(stage: &mut Stage) -> Result<()> {
    stage.doing("turning swap on");
    let space = Swap::on(SWAP_PAGES)?;
    let region = stage.mergeable(512)?;
    stage.let_merge(region)?;
    for _ in 0..stage.rng.usize(2..8) {
        stage.doing("MADV_PAGEOUT");
        let first = stage.rng.usize(..region.pages);
        let part = region.part(first, stage.rng.usize(..=region.pages - first));
        memory::advise(part, libc::MADV_PAGEOUT).context("MADV_PAGEOUT")?;
        stage.dally(100);
        if stage.rng.bool() {
            stage.check(part)?;
        }
        stage.paint_some(part, 5)?;
    }
    if stage.rng.bool() {
        stage.check_all()?;
    }
    stage.doing("turning swap off");
    space.off()?;
    stage.check_all()
}

/// A control group whose memory is reclaimed while its processes use it.
fn reclaim(stage: &mut Stage) -> Result<()> {
    let group = Group::new()?;
    let mut kids = Vec::new();
    for _ in 0..stage.rng.usize(2..4) {
        kids.push(stage.fork(|stage| {
            group.enter()?;
            let pages = stage.rng.usize(128..512);
            let region = stage.mergeable(pages)?;
            stage.let_merge(region)?;
            for _ in 0..stage.rng.usize(2..6) {
                stage.paint_some(region, 10)?;
                stage.check_all()?;
                stage.dally(50);
            }
            stage.let_merge(region)?;
            stage.check_all()
        })?);
    }
    while any_runs(&mut kids)? {
        stage.doing("reclaiming");
        let bytes = stage.rng.usize(1..400) * PAGE;
        if stage.rng.bool() {
            group.reclaim(bytes)?;
        } else {
            // Taken back at once: above its limit a group is made to wait for seconds.
            group.set("memory.high", &bytes.to_string())?;
            group.set("memory.high", "max")?;
        }
        stage.dally(50);
    }
    kids.into_iter().try_for_each(Kid::join)
}

fn any_runs(kids: &mut [Kid]) -> Result<bool> {
    for kid in kids {
        if kid.runs()? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A control group with less memory than its processes need: the OOM killer takes one, and leaves the memory of those
/// that are left as it was.
fn oom(stage: &mut Stage) -> Result<()> {
    let group = Group::new()?;
    group.set("memory.max", &(OOM_LIMIT * PAGE).to_string())?;
    group.set("memory.swap.max", "0")?;
    let together = stage.rng.bool();
    group.set("memory.oom.group", if together { "1" } else { "0" })?;
    let modest = stage.fork(|stage| {
        group.enter()?;
        let region = stage.mergeable(128)?;
        for _ in 0..4 {
            stage.let_merge(region)?;
            stage.check_all()?;
            stage.paint_some(region, 20)?;
        }
        Ok(())
    })?;
    let glutton = stage.fork(|stage| {
        group.enter()?;
        let mergeable = stage.mergeable(128)?;
        stage.let_merge(mergeable)?;
        let region = stage.map(Mapping::pages(2 * OOM_LIMIT))?;
        memory::advise(region, libc::MADV_MERGEABLE)?;
        for index in 0..region.pages {
            // Nobody has anything like it, so merging saves nothing.
            let pattern = stage.own();
            stage.ledger.write(region.part(index, 1), pattern)?;
            if index % 64 == 0 {
                stage.check(mergeable)?;
            }
        }
        Ok(())
    })?;
    stage.doing("waiting for the OOM killer");
    let survived = glutton.join_or_killed()?;
    ensure!(
        !survived,
        "a process has {} pages of its own in a group with room for {OOM_LIMIT}",
        2 * OOM_LIMIT
    );
    let killed = 1 + u64::from(!modest.join_or_killed()?);
    let counted = group.events("oom_kill")?;
    ensure!(
        counted >= killed,
        "{killed} processes were killed, but the OOM killer killed {counted}"
    );
    // What was merged with memory of the killed is somebody else's still.
    let region = stage.mergeable(64)?;
    stage.let_merge(region)?;
    stage.check_all()
}
