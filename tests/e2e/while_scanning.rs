//! What processes do while scanning goes on at full speed.

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::ksm::Counters;
use ksm_e2e::memory::Mapping;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;

ksm_e2e::tests![
    processes_exit,
    processes_are_killed,
    processes_fork_and_exit,
    memory_is_unmapped,
    memory_is_moved,
    memory_is_moved_without_unmapping,
    memory_is_grown_and_shrunk,
    memory_is_advised_back_and_forth,
    memory_is_discarded,
    memory_is_protected_back_and_forth,
    memory_is_locked_and_unlocked,
    memory_is_written_to,
    everything_is_unmerged_again_and_again,
];

const CONTENT: Content = Content::Distinct(1);
const PAGES: usize = 32;
const ROUNDS: usize = 40;

/// Two processes that share pages through it all, while others come and go.
struct Witnesses {
    children: Vec<(Child, Region)>,
}

impl Witnesses {
    fn begin(ksm: &Ksm) -> Result<Self> {
        let mut children = Vec::new();
        for _ in 0..2 {
            let mut child = Child::spawn()?;
            let region = child.map_mergeable(PAGES, CONTENT)?;
            children.push((child, region));
        }
        ksm.scan_at_full_speed()?;
        ksm.start()?;
        ksm.scan_until(Counters::merged(PAGES as u64, PAGES as u64))?;
        Ok(Self { children })
    }

    fn verify(&mut self) -> Result<()> {
        for (child, region) in &mut self.children {
            child.verify(*region, CONTENT).context("a witness")?;
        }
        Ok(())
    }

    /// All others are gone: only what the witnesses share is left.
    fn end(mut self, ksm: &Ksm) -> Result<()> {
        self.verify()?;
        ksm.merge_until(Counters::merged(PAGES as u64, PAGES as u64))?;
        self.verify()
    }
}

/// Waits until some pages are merged: none, a few or all of them, by turns, so that what follows meets the scanning
/// at different points.
fn let_merge(round: usize, child: &Child, region: Region) -> Result<()> {
    let wanted = [0, 1, region.pages / 2, region.pages][round % 4];
    wait::until("enough pages are merged", PATIENCE, || {
        Ok(child.ksm_pages(region)? >= wanted)
    })
}

fn processes_exit(ksm: &Ksm) -> Result<()> {
    let mut witnesses = Witnesses::begin(ksm)?;
    for round in 0..ROUNDS {
        let mut child = Child::spawn()?;
        let region = child.map_mergeable(PAGES, CONTENT)?;
        let_merge(round, &child, region)?;
        child.verify(region, CONTENT)?;
        child.exit()?;
        witnesses.verify()?;
    }
    witnesses.end(ksm)
}

fn processes_are_killed(ksm: &Ksm) -> Result<()> {
    let mut witnesses = Witnesses::begin(ksm)?;
    for round in 0..ROUNDS {
        let (mut idle, mut busy) = (Child::spawn()?, Child::spawn()?);
        let region = idle.map_mergeable(PAGES, CONTENT)?;
        let busys = busy.map_mergeable(PAGES, CONTENT)?;
        busy.churn(busys, 1)?;
        let_merge(round, &idle, region)?;
        ensure!(
            busy.alive()?,
            "a process has read something that it did not write"
        );
        busy.kill()?;
        idle.kill()?;
        witnesses.verify()?;
    }
    witnesses.end(ksm)
}

fn processes_fork_and_exit(ksm: &Ksm) -> Result<()> {
    let mut witnesses = Witnesses::begin(ksm)?;
    for round in 0..ROUNDS {
        let mut parent = Child::spawn()?;
        let region = parent.map_mergeable(PAGES, CONTENT)?;
        let_merge(round, &parent, region)?;
        let mut child = parent.fork()?;
        let mut grandchild = child.fork()?;
        child.fill(region.part(0, 8), Content::Same(3))?;
        parent.verify(region, CONTENT)?;
        parent.exit()?;
        grandchild.verify(region, CONTENT)?;
        let_merge(round + 1, &grandchild, region)?;
        child.verify(region.part(0, 8), Content::Same(3))?;
        child.verify(region.part(8, PAGES - 8), CONTENT.from_page(8))?;
        child.kill()?;
        grandchild.verify(region, CONTENT)?;
        grandchild.exit()?;
    }
    witnesses.verify()?;
    witnesses.end(ksm)
}

/// Runs `step` on merged memory of one process again and again; it returns where the memory is then, to be unmapped.
fn again_and_again(
    ksm: &Ksm,
    step: impl Fn(&mut Child, Region, usize) -> Result<Vec<Region>>,
) -> Result<()> {
    let mut witnesses = Witnesses::begin(ksm)?;
    let mut child = Child::spawn()?;
    for round in 0..ROUNDS {
        let region = child.map_mergeable(PAGES, CONTENT)?;
        let_merge(round, &child, region)?;
        for left in step(&mut child, region, round).with_context(|| format!("in round {round}"))? {
            child.munmap(left)?;
        }
    }
    witnesses.verify()?;
    child.exit()?;
    witnesses.end(ksm)
}

fn memory_is_unmapped(ksm: &Ksm) -> Result<()> {
    again_and_again(ksm, |child, region, round| {
        let hole = round % (PAGES - 8);
        child.munmap(region.part(hole, 8))?;
        child.verify(region.part(0, hole), CONTENT)?;
        child.verify(
            region.part(hole + 8, PAGES - 8 - hole),
            CONTENT.from_page(hole + 8),
        )?;
        Ok(vec![region])
    })
}

fn memory_is_moved(ksm: &Ksm) -> Result<()> {
    again_and_again(ksm, |child, region, _| {
        let to = child.map(Mapping::pages(PAGES))?;
        let moved = child.remap(
            region,
            PAGES,
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
            to.addr,
        )?;
        child.verify(moved, CONTENT)?;
        let_merge(3, child, moved)?;
        // Its second half over its first.
        let (first, second) = (moved.part(0, PAGES / 2), moved.part(PAGES / 2, PAGES / 2));
        let over = child.remap(
            second,
            PAGES / 2,
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
            first.addr,
        )?;
        child.verify(over, CONTENT.from_page(PAGES / 2))?;
        let_merge(3, child, over)?;
        child.verify(over, CONTENT.from_page(PAGES / 2))?;
        Ok(vec![over])
    })
}

fn memory_is_moved_without_unmapping(ksm: &Ksm) -> Result<()> {
    again_and_again(ksm, |child, region, round| {
        let moved = child.remap(
            region,
            PAGES,
            libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP,
            0,
        )?;
        child.verify(moved, CONTENT)?;
        child.fill(region, Content::Same(round as u64 % 3))?;
        child.verify(moved, CONTENT)?;
        child.verify(region, Content::Same(round as u64 % 3))?;
        Ok(vec![region, moved])
    })
}

fn memory_is_grown_and_shrunk(ksm: &Ksm) -> Result<()> {
    again_and_again(ksm, |child, region, round| {
        let grown = child.remap(region, 2 * PAGES, libc::MREMAP_MAYMOVE, 0)?;
        child.verify(grown.part(0, PAGES), CONTENT)?;
        child.fill(grown.part(PAGES, PAGES), CONTENT)?;
        let_merge(round + 1, child, grown)?;
        let shrunk = child.remap(grown, PAGES / 2, 0, 0)?;
        child.verify(shrunk, CONTENT)?;
        Ok(vec![shrunk])
    })
}

fn memory_is_advised_back_and_forth(ksm: &Ksm) -> Result<()> {
    again_and_again(ksm, |child, region, round| {
        let part = region.part(round % 16, 16);
        child.advise(part, libc::MADV_UNMERGEABLE)?;
        ensure!(child.ksm_pages(part)? == 0, "pages are still shared");
        child.verify(region, CONTENT)?;
        child.advise(part, libc::MADV_MERGEABLE)?;
        let_merge(round + 1, child, region)?;
        child.verify(region, CONTENT)?;
        Ok(vec![region])
    })
}

fn memory_is_discarded(ksm: &Ksm) -> Result<()> {
    again_and_again(ksm, |child, region, round| {
        let part = region.part(round % 16, 16);
        child.advise(part, libc::MADV_DONTNEED)?;
        child.verify(part, Content::Zero)?;
        child.fill(part, CONTENT.from_page(round % 16))?;
        child.verify(region, CONTENT)?;
        Ok(vec![region])
    })
}

fn memory_is_protected_back_and_forth(ksm: &Ksm) -> Result<()> {
    again_and_again(ksm, |child, region, round| {
        let part = region.part(round % 16, 16);
        for prot in [
            libc::PROT_NONE,
            libc::PROT_READ,
            libc::PROT_READ | libc::PROT_WRITE,
        ] {
            child.protect(part, prot)?;
        }
        child.write(part.addr, b"!")?;
        ensure!(
            child.ksm_pages(part.part(0, 1))? == 0 || child.read(part.addr, 1)? == b"!",
            "a write was lost"
        );
        child.fill(part, CONTENT.from_page(round % 16))?;
        child.verify(region, CONTENT)?;
        Ok(vec![region])
    })
}

fn memory_is_locked_and_unlocked(ksm: &Ksm) -> Result<()> {
    again_and_again(ksm, |child, region, round| {
        child.lock(region, true)?;
        let_merge(round + 1, child, region)?;
        child.fill(region.part(0, 4), Content::Same(9))?;
        child.verify(region.part(0, 4), Content::Same(9))?;
        child.verify(region.part(4, PAGES - 4), CONTENT.from_page(4))?;
        if round % 2 == 0 {
            child.lock(region, false)?;
        }
        Ok(vec![region])
    })
}

fn memory_is_written_to(ksm: &Ksm) -> Result<()> {
    let mut witnesses = Witnesses::begin(ksm)?;
    let mut writers = Vec::new();
    for seed in [0, 1, 2] {
        let mut child = Child::spawn()?;
        let region = child.map_mergeable(PAGES, CONTENT)?;
        child.churn(region, seed)?;
        writers.push(child);
    }
    let merged_before = ksm.read("pages_scanned")?;
    ksm.full_scans(200)?;
    ensure!(
        ksm.read("pages_scanned")? > merged_before,
        "nothing was scanned"
    );
    witnesses.verify()?;
    for child in &writers {
        ensure!(
            child.alive()?,
            "a process has read something that it did not write"
        );
    }
    drop(writers);
    witnesses.end(ksm)
}

fn everything_is_unmerged_again_and_again(ksm: &Ksm) -> Result<()> {
    let mut witnesses = Witnesses::begin(ksm)?;
    let mut child = Child::spawn()?;
    let region = child.map_mergeable(PAGES, CONTENT)?;
    let mut writer = Child::spawn()?;
    let written = writer.map_mergeable(PAGES, CONTENT)?;
    writer.churn(written, 1)?;
    for round in 0..ROUNDS {
        let_merge(round, &child, region)?;
        ksm.unmerge()?;
        ksm.expect(Counters::merged(0, 0))?;
        ensure!(child.ksm_pages(region)? == 0, "pages are still shared");
        child.verify(region, CONTENT)?;
        witnesses.verify()?;
        ensure!(
            writer.alive()?,
            "a process has read something that it did not write"
        );
        ksm.start()?;
    }
    drop((child, writer));
    witnesses.end(ksm)
}
