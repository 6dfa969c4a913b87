//! Pages that go bad, and pages that are taken out of service before they do.

use std::fs;
use std::fs::File;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Region;
use ksm_e2e::memory;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::Pattern;
use ksm_e2e::procfs;
use ksm_e2e::procfs::Pfn;
use ksm_e2e::wait;
use nix::errno::Errno;
use nix::fcntl::Flock;
use nix::fcntl::FlockArg;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use super::feats;
use crate::actor::PATIENCE;
use crate::actor::Stage;

const UNPOISON: &str = "/sys/kernel/debug/hwpoison/unpoison-pfn";

/// Whom this file's lock belongs to either makes pages bad or takes blocks of memory offline.
const CLAIM: &str = "/tmp/ksm-soak-bad-memory";

/// Pages of each process that one goes bad for.
const PAGES: usize = 8;

/// What the kernel may say when it cannot take a page out of service.
const NOT_TAKEN: [Errno; 4] = [Errno::EAGAIN, Errno::EBUSY, Errno::EIO, Errno::ENOMEM];

/// Waits until nobody else makes pages bad, or takes memory offline, and keeps others from doing so.
pub fn claim() -> Result<Flock<File>> {
    let file = File::create(CLAIM).context(CLAIM)?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .context(CLAIM)
}

/// Makes a page usable again: nothing is wrong with it. Whoever has it must have let go of it.
fn cure(pfn: Pfn) -> Result<()> {
    if !pfn.flags()?.poisoned() {
        return Ok(());
    }
    wait::until(
        "a bad page is made good again",
        PATIENCE,
        || match fs::write(UNPOISON, format!("{}\n", pfn.0)) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(!pfn.flags()?.poisoned()),
            Err(error) => Err(error).context(UNPOISON),
        },
    )
}

fn pfn_of(pid: i32, page: Region) -> Result<Option<Pfn>> {
    Ok(procfs::map_entries(pid, page)?[0].pfn())
}

/// A page is taken out of service: whoever maps it gets another one, and notices nothing.
pub fn soft(stage: &mut Stage) -> Result<()> {
    let region = stage.map(Mapping::pages(64))?;
    for index in 0..region.pages {
        // Not the zero page, which cannot be spared.
        let pattern = match stage.content() {
            Pattern::Zero => stage.own(),
            other => other,
        };
        stage.ledger.write(region.part(index, 1), pattern)?;
    }
    memory::advise(region, libc::MADV_MERGEABLE)?;
    stage.let_merge(region)?;
    let _claim = claim()?;
    for _ in 0..stage.rng.usize(1..4) {
        let page = region.part(stage.rng.usize(..region.pages), 1);
        let pfn = pfn_of(std::process::id() as i32, page)?;
        stage.doing("MADV_SOFT_OFFLINE");
        match memory::advise(page, libc::MADV_SOFT_OFFLINE) {
            Err(errno) if !NOT_TAKEN.contains(&errno) => bail!("MADV_SOFT_OFFLINE: {errno}"),
            Ok(()) => feats::note(feats::SOFT)?,
            Err(_) => {}
        }
        stage.check_all()?;
        if let Some(pfn) = pfn {
            cure(pfn)?;
        }
    }
    Ok(())
}

/// A page goes bad: it costs whoever comes upon it, and nobody else.
pub fn hard(stage: &mut Stage) -> Result<()> {
    let bystander = stage.mergeable(64)?;
    stage.let_merge(bystander)?;
    let _claim = claim()?;
    // Nobody else's, so that nobody else pays.
    let content = Content::Distinct(stage.rng.u64(..) | 1 << 62);
    let mut victim = Child::spawn()?;
    let mut heir = Child::spawn()?;
    let here = victim.map_mergeable(PAGES, content)?;
    let there = heir.map_mergeable(PAGES, content)?;
    let mut fork = victim.fork()?;
    stage.doing("waiting for the victims' merge");
    let until = Instant::now() + Duration::from_secs(1) * wait::slowness();
    while stage.rng.u32(..16) != 0 && Instant::now() < until {
        if victim.ksm_pages(here)? == PAGES {
            break;
        }
        stage.check(bystander)?;
    }
    let index = stage.rng.usize(..PAGES);
    let Some(pfn) = pfn_of(victim.pid(), here.part(index, 1))? else {
        // In swap: there is nothing that could go bad.
        return stage.check_all();
    };
    stage.doing("MADV_HWPOISON");
    victim.advise_at_any_cost(here.part(index, 1), libc::MADV_HWPOISON)?;
    match victim.finish_write() {
        // It was not to be had, or has been thrown away before it was used.
        Ok(Ok(())) => verify_or_die(&mut victim, here, index, content)?,
        Ok(Err(errno)) if NOT_TAKEN.contains(&errno) => {
            verify_or_die(&mut victim, here, index, content)?;
        }
        Ok(Err(errno)) => bail!("MADV_HWPOISON: {errno}"),
        Err(_) => {
            expect_bus_error(&mut victim)?;
            feats::note(feats::HARD)?;
        }
    }
    for (child, region) in [(&mut heir, there), (&mut fork, here)] {
        verify_or_die(child, region, index, content)?;
    }
    stage.check_all()?;
    drop((victim, heir, fork));
    cure(pfn)?;
    stage.check_all()
}

/// All pages but the bad one must be right; who touches that one dies, unless it has a page of its own.
fn verify_or_die(child: &mut Child, region: Region, bad: usize, content: Content) -> Result<()> {
    for index in (0..region.pages).filter(|&index| index != bad) {
        child
            .verify(region.part(index, 1), content.from_page(index))
            .context("a page beside one that went bad")?;
    }
    match child.checksums(region.part(bad, 1)) {
        Ok(sums) => content.from_page(bad).check(&sums),
        Err(_) => expect_bus_error(child),
    }
}

fn expect_bus_error(child: &mut Child) -> Result<()> {
    let status = child.wait()?;
    // Of a fork of a fork nobody here learns how it ended.
    let bus = |status| matches!(status, WaitStatus::Signaled(_, Signal::SIGBUS, _));
    ensure!(
        status.is_none_or(bus),
        "a process that met a bad page ended with {status:?}"
    );
    Ok(())
}
