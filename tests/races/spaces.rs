//! Whatever an address space goes through, against merging in it and against what is known of it.

use std::fs;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::delays::Hits;
use ksm_e2e::delays::rounds;
use ksm_e2e::ksm::Counters;
use ksm_e2e::ksm::MERGE;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::PAGE;
use ksm_e2e::procfs;
use ksm_e2e::slow_file::SlowFile;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;
use ksm_e2e::zero_pages;

use crate::stage::CONTENT;
use crate::stage::OTHER;
use crate::stage::Witnesses;
use crate::stage::advise;
use crate::stage::newcomer;
use crate::stage::scan_briskly;

ksm_e2e::tests![
    exit_against_a_batch,
    exit_against_a_merge,
    exit_against_make_ksm,
    exit_against_adoption,
    exit_against_burial,
    munmap_against_a_merge,
    mremap_against_a_merge,
    mremap_against_make_ksm,
    fork_against_a_merge,
    fork_against_unmerge,
    fork_against_zero_pages_that_go,
    fork_against_zero_pages_that_come,
    dontneed_against_unmerge,
    prctl_against_a_merge,
];

/// How long something is watched that must wait.
const SHORTLY: Duration = Duration::from_millis(5);

fn exit_against_a_batch(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    scan_briskly(ksm)?;
    ksm.start()?;
    for round in 0..rounds() {
        let place = ["gathered", "read"][round as usize % 2];
        let (mut one, here) = newcomer(CONTENT)?;
        let (mut other, there) = newcomer(CONTENT)?;
        let window = hits.hold(place)?;
        advise(&mut one, here)?;
        advise(&mut other, there)?;
        window.wait()?;
        // It is the batch of one of the two.
        one.kill()?;
        other.kill()?;
        // A new one may get the number of one of them, and its place in memory.
        let (mut new, region) = newcomer(CONTENT)?;
        advise(&mut new, region)?;
        window.hit()?;
        ksm.scan_until(Counters::merged(0, 0).and_unshared(1))?;
        new.verify(region, CONTENT)?;
        new.kill()?;
        ksm.scan_until(Counters::merged(0, 0))?;
    }
    hits.expect(rounds())
}

fn exit_against_a_merge(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let mut witnesses = Witnesses::begin(ksm)?;
    for round in 0..rounds() {
        let place = ["node_found", "replacing", "mapped"][round as usize % 3];
        let (mut victim, region) = newcomer(CONTENT)?;
        let window = hits.hold(place)?;
        advise(&mut victim, region)?;
        window.wait()?;
        victim.kill()?;
        window.hit()?;
        ksm.scan_until(Counters::merged(1, 1))?;
        witnesses.verify()?;
    }
    hits.expect(rounds())?;
    witnesses.end(ksm)
}

fn exit_against_make_ksm(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let witnesses = Witnesses::begin(ksm)?;
    for round in 0..rounds() {
        let place = [
            "paired",
            "write_protected",
            "ksm_made",
            "replacing",
            "unadopted",
        ][round as usize % 5];
        let (mut one, here) = newcomer(OTHER)?;
        let (mut other, there) = newcomer(OTHER)?;
        let window = hits.hold(place)?;
        advise(&mut one, here)?;
        advise(&mut other, there)?;
        window.wait()?;
        // One of them or both.
        let (one, other) = match round / 5 % 3 {
            0 => {
                one.kill()?;
                (None, Some(other))
            }
            1 => {
                other.kill()?;
                (Some(one), None)
            }
            _ => {
                one.kill()?;
                other.kill()?;
                (None, None)
            }
        };
        window.hit()?;
        let left = u64::from(one.is_some() || other.is_some());
        // The one that is left may keep a KSM page that it has for itself.
        wait::until_or_explain("what is known of the dead is forgotten", PATIENCE, || {
            let seen = ksm.counters()?;
            let alone = [
                Counters::merged(1, 1).and_unshared(left),
                Counters::merged(1 + left, 1),
            ];
            Ok((!alone.contains(&seen)).then(|| seen.to_string()))
        })?;
        for (child, region) in [(one, here), (other, there)] {
            if let Some(mut child) = child {
                child.verify(region, OTHER)?;
                child.kill()?;
            }
        }
        ksm.scan_until(Counters::merged(1, 1))?;
    }
    hits.expect(rounds())?;
    witnesses.end(ksm)
}

fn exit_against_adoption(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let witnesses = Witnesses::begin(ksm)?;
    for _ in 0..rounds() {
        let (mut brief, region) = newcomer(CONTENT)?;
        let (mut lasting, there) = newcomer(CONTENT)?;
        let window = hits.hold("adopting")?;
        advise(&mut brief, region)?;
        window.wait()?;
        brief.kill()?;
        advise(&mut lasting, there)?;
        window.hit()?;
        ksm.scan_until(Counters::merged(1, 2))?;
        lasting.verify(there, CONTENT)?;
        lasting.kill()?;
        ksm.scan_until(Counters::merged(1, 1))?;
    }
    hits.expect(rounds())?;
    witnesses.end(ksm)
}

fn exit_against_burial(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let mut witnesses = Witnesses::begin(ksm)?;
    for _ in 0..rounds() {
        let (mut dead, region) = newcomer(CONTENT)?;
        advise(&mut dead, region)?;
        ksm.scan_until(Counters::merged(1, 2))?;
        let window = hits.hold("burying")?;
        dead.kill()?;
        window.wait()?;
        // It has no number any more, but is still known: another one comes, and one that comes exits.
        let (mut brief, here) = newcomer(CONTENT)?;
        advise(&mut brief, here)?;
        let (mut lasting, there) = newcomer(CONTENT)?;
        advise(&mut lasting, there)?;
        brief.kill()?;
        window.hit()?;
        witnesses.share_with(ksm, &mut [(&mut lasting, there)])?;
        lasting.kill()?;
        ksm.scan_until(Counters::merged(1, 1))?;
    }
    hits.expect(rounds())?;
    witnesses.end(ksm)
}

fn munmap_against_a_merge(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let mut witnesses = Witnesses::begin(ksm)?;
    let mut child = Child::spawn()?;
    for round in 0..rounds() {
        let place = ["replacing", "mapped", "node_found"][round as usize % 3];
        let region = child.map(Mapping::pages(1))?;
        child.fill(region, CONTENT)?;
        let window = hits.hold(place)?;
        advise(&mut child, region)?;
        window.wait()?;
        child.begin_munmap(region)?;
        if place == "replacing" {
            wait::while_holds(SHORTLY, || {
                ensure!(
                    !child.answered()?,
                    "memory was unmapped while it was merged"
                );
                Ok(())
            })?;
            window.hit()?;
            child.finish_done()?;
        } else {
            child.finish_done()?;
            window.hit()?;
        }
        ksm.scan_until(Counters::merged(1, 1))?;
        witnesses.verify()?;
    }
    hits.expect(rounds())?;
    drop(child);
    witnesses.end(ksm)
}

const MOVE: i32 = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;

fn mremap_against_a_merge(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let mut witnesses = Witnesses::begin(ksm)?;
    let mut child = Child::spawn()?;
    for round in 0..rounds() {
        let place = ["replacing", "mapped", "node_found"][round as usize % 3];
        let region = child.map(Mapping::pages(1))?;
        child.fill(region, CONTENT)?;
        let to = child.map(Mapping::pages(1))?;
        let window = hits.hold(place)?;
        advise(&mut child, region)?;
        window.wait()?;
        child.begin_remap(region, MOVE, to.addr)?;
        let moved = if place == "replacing" {
            wait::while_holds(SHORTLY, || {
                ensure!(!child.answered()?, "memory was moved while it was merged");
                Ok(())
            })?;
            window.hit()?;
            child.finish_remap()?
        } else {
            let moved = child.finish_remap()?;
            window.hit()?;
            moved
        };
        child.verify(moved, CONTENT)?;
        witnesses.share_with(ksm, &mut [(&mut child, moved)])?;
        child.munmap(moved)?;
        ksm.scan_until(Counters::merged(1, 1))?;
    }
    hits.expect(rounds())?;
    drop(child);
    witnesses.end(ksm)
}

fn mremap_against_make_ksm(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let witnesses = Witnesses::begin(ksm)?;
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    for round in 0..rounds() {
        let place = ["ksm_made", "unadopted", "paired"][round as usize % 3];
        let mut moves = Vec::new();
        for child in [&mut one, &mut other] {
            let region = child.map(Mapping::pages(1))?;
            child.fill(region, OTHER)?;
            moves.push((region, child.map(Mapping::pages(1))?));
        }
        let window = hits.hold(place)?;
        for (child, (region, _)) in [&mut one, &mut other].into_iter().zip(&moves) {
            advise(child, *region)?;
        }
        window.wait()?;
        for (child, (region, to)) in [&mut one, &mut other].into_iter().zip(&moves) {
            child.remap(*region, 1, MOVE, to.addr)?;
        }
        window.hit()?;
        for (child, (_, to)) in [&mut one, &mut other].into_iter().zip(&moves) {
            child
                .verify(*to, OTHER)
                .with_context(|| format!("moved at {place}"))?;
        }
        ksm.scan_until(Counters::merged(2, 2))?;
        for (child, (_, to)) in [&mut one, &mut other].into_iter().zip(&moves) {
            child.verify(*to, OTHER)?;
            child.munmap(*to)?;
        }
        ksm.scan_until(Counters::merged(1, 1))?;
    }
    hits.expect(rounds())?;
    drop((one, other));
    witnesses.end(ksm)
}

fn fork_against_a_merge(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let mut witnesses = Witnesses::begin(ksm)?;
    for round in 0..rounds() {
        let place = ["node_found", "mapped"][round as usize % 2];
        let (mut parent, region) = newcomer(CONTENT)?;
        let window = hits.hold(place)?;
        advise(&mut parent, region)?;
        window.wait()?;
        let mut child = parent.fork()?;
        window.hit()?;
        child.verify(region, CONTENT)?;
        if round % 4 < 2 {
            parent.write(region.addr, b"!")?;
            child.verify(region, CONTENT)?;
            parent.fill(region, CONTENT)?;
        }
        witnesses.share_with(ksm, &mut [(&mut parent, region), (&mut child, region)])?;
        drop((child, parent));
        ksm.scan_until(Counters::merged(1, 1))?;
    }
    hits.expect(rounds())?;
    witnesses.end(ksm)
}

/// Of two processes that share a page, one is unmerged already. It exits, and what comes in its place is a child of the
/// other one, which is still merged.
fn fork_against_unmerge(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    scan_briskly(ksm)?;
    let mut writer = Child::spawn()?;
    for _ in 0..rounds() {
        let (mut one, here) = newcomer(CONTENT)?;
        let (mut other, there) = newcomer(CONTENT)?;
        advise(&mut one, here)?;
        advise(&mut other, there)?;
        ksm.start()?;
        ksm.scan_until(Counters::merged(1, 1))?;
        let window = hits.hold("unmerging")?;
        writer.begin_write_file(ksm.dir().join("run"), "2")?;
        window.wait()?;
        let (done, mut left, region) = match (one.ksm_pages(here)?, other.ksm_pages(there)?) {
            (0, 1) => (one, other, there),
            (1, 0) => (other, one, here),
            counts => anyhow::bail!("after the first step {counts:?} pages are merged"),
        };
        done.kill()?;
        wait::until("the dead process is buried", PATIENCE, || {
            Ok(ksm.read("pages_sharing")? == 0)
        })?;
        let mut child = left.fork()?;
        window.hit()?;
        writer.finish_write()??;
        for process in [&mut left, &mut child] {
            ensure!(
                process.ksm_pages(region)? == 0,
                "a process that came while everything was unmerged is still merged"
            );
            process.verify(region, CONTENT)?;
        }
        ksm.expect(Counters::merged(0, 0))?;
        ensure!(ksm.read("run")? != MERGE, "scanning goes on");
        drop((child, left));
    }
    hits.expect(rounds())
}

/// Empty pages of a process that forks.
const ZEROES: usize = 64;

/// Lets `parent` fork, which waits for its mmap lock when this returns.
fn begin_fork(parent: &mut Child) -> Result<UnixStream> {
    let forking = parent.begin_fork()?;
    wait::until("a fork waits for the mmap lock", PATIENCE, || {
        Ok(procfs::stack(parent.pid())?.contains("dup_mmap"))
    })?;
    Ok(forking)
}

/// The core copies a process's count of zero pages, then waits for the lock that keeps them as they are.
fn fork_against_zero_pages_that_go(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    scan_briskly(ksm)?;
    ksm.write("use_zero_pages", 1)?;
    let mut writer = Child::spawn()?;
    for _ in 0..rounds() {
        let mut parent = Child::spawn()?;
        let region = parent.map_mergeable(ZEROES, Content::Zero)?;
        ksm.start()?;
        wait::until("all are the zero page", PATIENCE, || {
            Ok(ksm.read("ksm_zero_pages")? == ZEROES as u64)
        })?;
        let window = hits.hold("unsharing")?;
        writer.begin_write_file(ksm.dir().join("run"), "2")?;
        window.wait()?;
        let forking = begin_fork(&mut parent)?;
        window.hit()?;
        let mut child = parent.finish_fork(forking)?;
        writer.finish_write()??;
        zero_pages::expect(ksm, &[(&parent, 0), (&child, 0)])?;
        child.verify(region, Content::Zero)?;
        parent.verify(region, Content::Zero)?;
        child.exit()?;
        parent.exit()?;
        zero_pages::expect(ksm, &[])?;
    }
    hits.expect(rounds())
}

/// As before, but they become the zero page meanwhile.
fn fork_against_zero_pages_that_come(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    scan_briskly(ksm)?;
    ksm.write("use_zero_pages", 1)?;
    for _ in 0..rounds() {
        let mut parent = Child::spawn()?;
        let region = parent.map_mergeable(ZEROES, Content::Zero)?;
        let window = hits.hold("emptying")?;
        ksm.start()?;
        window.wait()?;
        let forking = begin_fork(&mut parent)?;
        window.hit()?;
        let mut child = parent.finish_fork(forking)?;
        wait::until("all are the zero page", PATIENCE, || {
            let (ours, theirs) = (
                zero_pages::of(&parent, region)?,
                zero_pages::of(&child, region)?,
            );
            Ok(ours == ZEROES && theirs == ZEROES)
        })?;
        ksm.stop()?;
        zero_pages::expect(ksm, &[(&parent, ZEROES), (&child, ZEROES)])?;
        child.verify(region, Content::Zero)?;
        child.exit()?;
        parent.exit()?;
        zero_pages::expect(ksm, &[])?;
    }
    hits.expect(rounds())
}

/// A page of a file's private mapping goes just as it is to be unmerged: it must not be asked for again, as the file system
/// may take for ever.
fn dontneed_against_unmerge(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let mut file = SlowFile::mount()?;
    let (mut child, mut writer) = (Child::spawn()?, Child::spawn()?);
    scan_briskly(ksm)?;
    // With that the kernel knows how long it is.
    fs::metadata(file.path()).context("the slow file")?;
    for _ in 0..rounds() {
        let region = child.map_file(file.path(), 2)?;
        for address in region.addresses() {
            child.begin_write(address, &CONTENT.page(0).bytes())?;
            file.wait_for_read()?;
            file.answer(&[0; PAGE])?;
            child.finish_timed()?;
        }
        // With that the kernel forgets what it has read of the file.
        File::open(file.path()).context("the slow file")?;
        advise(&mut child, region)?;
        ksm.start()?;
        ksm.scan_until(Counters::merged(1, 1))?;
        let window = hits.hold("unsharing")?;
        writer.begin_write_file(ksm.dir().join("run"), "2")?;
        window.wait()?;
        child.advise(region.part(0, 1), libc::MADV_DONTNEED)?;
        window.hit()?;
        writer
            .finish_write()?
            .context("run=2, which may have waited for the file")?;
        ksm.expect(Counters::merged(0, 0))?;
        ensure!(child.ksm_pages(region)? == 0, "pages are still merged");
        child.verify(region.part(1, 1), CONTENT)?;
        child.munmap(region)?;
    }
    hits.expect(rounds())
}

fn prctl_against_a_merge(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let mut witnesses = Witnesses::begin(ksm)?;
    for round in 0..rounds() {
        let place = ["node_found", "mapped"][round as usize % 2];
        let (mut child, region) = newcomer(OTHER)?;
        // It has nothing but this page that is equal to the witnesses'; what else it has may merge with itself.
        child.prctl(libc::PR_SET_MEMORY_MERGE, 1)?;
        let window = hits.hold(place)?;
        child.fill(region, CONTENT)?;
        window.wait()?;
        child.prctl(libc::PR_SET_MEMORY_MERGE, 0)?;
        ensure!(
            child.ksm_pages(region)? == 0,
            "a page is merged though the process has left, at {place}"
        );
        if round % 4 < 2 {
            window.hit()?;
            child.verify(region, CONTENT)?;
            drop(child);
        } else {
            child.kill()?;
            window.hit()?;
        }
        ksm.scan_until(Counters::merged(1, 1))?;
        witnesses.verify()?;
    }
    hits.expect(rounds())?;
    witnesses.end(ksm)
}
