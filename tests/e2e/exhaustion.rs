//! Undoing merges when there is no memory for private copies: in a control group that is full, and in a system that is.
//!
//! What stock KSM promises: `run=2` gives up with an error or kills, as any page fault may, and nothing is lost; once there
//! is memory it succeeds. Unloading cannot fail: what does not fit stays shared, and belongs to nobody then.

use std::fs;
use std::process::Command;
use std::process::ExitStatus;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::Sharer;
use ksm_e2e::exhausted::Brief;
use ksm_e2e::exhausted::CONTENT;
use ksm_e2e::exhausted::FullGroup;
use ksm_e2e::exhausted::PAGES;
use ksm_e2e::exhausted::favour;
use ksm_e2e::exhausted::protect;
use ksm_e2e::kmsg::Log;
use ksm_e2e::ksm::Counters;
use ksm_e2e::ksm::STOCK;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::PAGE;
use ksm_e2e::module;
use ksm_e2e::numa;
use ksm_e2e::procfs;
use ksm_e2e::runner;
use ksm_e2e::sharer::shared_by;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;
use libtest_mimic::Trial;
use nix::errno::Errno;

ksm_e2e::tests![
    run_2_is_refused_by_a_full_group_and_loses_nothing,
    run_2_in_a_full_group_kills_nobody_outside,
];

/// Those that load and unload the module.
pub fn module_tests() -> Vec<Trial> {
    vec![
        runner::module_test(
            "e2e::exhaustion::unloading_leaves_shared_what_does_not_fit_into_a_full_group",
            unloading_leaves_shared_what_does_not_fit_into_a_full_group,
        ),
        runner::module_test(
            "e2e::exhaustion::unloading_waits_for_room_in_a_full_group",
            unloading_waits_for_room_in_a_full_group,
        ),
    ]
}

/// Those that use up all memory there is, which must not be much.
pub fn system_tests() -> Vec<Trial> {
    vec![
        runner::test(
            "e2e::exhaustion::run_2_in_a_full_system_kills_the_writer_and_loses_nothing",
            run_2_in_a_full_system_kills_the_writer_and_loses_nothing,
        ),
        runner::module_test(
            "e2e::exhaustion::unloading_in_a_full_system_kills_nobody_else_and_loses_nothing",
            unloading_in_a_full_system_kills_nobody_else_and_loses_nothing,
        ),
    ]
}

/// Whether the machine has so little memory that it can be used up in a moment.
pub fn is_small_machine() -> Result<bool> {
    Ok(procfs::meminfo("MemTotal")? < 1 << 20)
}

fn run_2_is_refused_by_a_full_group_and_loses_nothing(ksm: &Ksm) -> Result<()> {
    let mut full = FullGroup::new(ksm)?;
    for _ in 0..3 {
        let undone = ksm.write_bytes("run", b"2");
        ensure!(undone == Err(Errno::ENOMEM), "run=2: {undone:?}");
        ensure!(ksm.read("run")? == 0, "run is {}", ksm.read("run")?);
        ensure!(
            full.inside.ksm_pages()? > PAGES / 2,
            "there was room for copies"
        );
        full.verify()?;
        // What fits together goes together again.
        ksm.merge_until(shared_by(3, PAGES))?;
    }
    let undone = ksm.write_bytes("run", b"2");
    ensure!(undone == Err(Errno::ENOMEM), "run=2: {undone:?}");
    full.group.unlimit()?;
    ksm.unmerge()?;
    ksm.expect(Counters::merged(0, 0))?;
    full.expect_private()
}

fn run_2_in_a_full_group_kills_nobody_outside(ksm: &Ksm) -> Result<()> {
    let mut full = FullGroup::new(ksm)?;
    protect(&full.inside.child, false)?;
    let undone = ksm.write_bytes("run", b"2");
    ensure!(
        matches!(undone, Ok(_) | Err(Errno::ENOMEM)),
        "run=2: {undone:?}"
    );
    wait::until("the process in the group is killed", PATIENCE, || {
        Ok(!full.inside.child.alive()?)
    })?;
    for sharer in &mut full.outside {
        ensure!(sharer.child.alive()?, "a process outside was killed");
        sharer.verify()?;
    }
    ksm.unmerge()?;
    ksm.expect(Counters::merged(0, 0))?;
    for sharer in &mut full.outside {
        sharer.expect_private()?;
    }
    Ok(())
}

/// The number of pages that the log says were left shared.
fn left_shared(log: &mut Log) -> Result<usize> {
    let lines = log.lines()?;
    let line = lines
        .iter()
        .find(|line| line.contains("KSM pages could not be unmerged"))
        .context("the log does not say that pages were left shared")?;
    let number = line.trim_start_matches("ksm_rs: ").split(' ').next();
    number.context("a number")?.parse().context(line.clone())
}

/// The stock KSM is there, knows of nothing, and works.
fn expect_stock_to_work() -> Result<()> {
    let stock = Ksm::at(STOCK);
    stock.expect(Counters::merged(0, 0))?;
    let restore = stock.prepare()?;
    let content = Content::Distinct(100_000);
    let mut pair = [Sharer::spawn(64, content)?, Sharer::spawn(64, content)?];
    stock.start()?;
    wait::until("stock KSM merges", PATIENCE, || {
        Ok(pair[0].ksm_pages()? + pair[1].ksm_pages()? == 128)
    })?;
    for sharer in &mut pair {
        sharer.verify()?;
    }
    restore.finish()?;
    for sharer in &mut pair {
        sharer.verify()?;
    }
    Ok(())
}

/// Has the core look at pages in every way that follows their mappings, should it do so for pages of nobody.
fn handle(sharer: &mut Sharer) -> Result<()> {
    let region: Region = sharer.region;
    sharer.child.advise(region, libc::MADV_COLD)?;
    sharer.child.advise(region, libc::MADV_PAGEOUT)?;
    fs::write("/proc/sys/vm/compact_memory", "1")?;
    for node in numa::nodes()? {
        // Not all of them can be moved, which is no error.
        let _ = numa::move_to(sharer.child.pid(), region, node)?;
    }
    sharer.verify()?;
    let mut fork = sharer.fork()?;
    fork.verify()?;
    fork.child.exit()
}

fn unloading_leaves_shared_what_does_not_fit_into_a_full_group(ksm: &Ksm) -> Result<()> {
    module::load("")?;
    let mut full = FullGroup::new(ksm)?;
    let mut log = Log::from_now()?;
    module::unload()?;
    let left = left_shared(&mut log)?;
    ensure!(
        left > PAGES / 2 && full.inside.ksm_pages()? == left,
        "the log says that {left} pages are shared; {} are",
        full.inside.ksm_pages()?
    );
    full.verify()?;
    for sharer in &mut full.outside {
        sharer.expect_private()?;
    }
    // As long as the kernel's own KSM has not scanned, which makes records of its own.
    let pid = full.inside.child.pid();
    ensure!(
        procfs::ksm_merging_pages(pid)? == 0 && procfs::ksm_stat(pid, "ksm_rmap_items")? == 0,
        "process {pid} counts pages that nobody knows any more"
    );
    Ksm::at(STOCK).expect(Counters::merged(0, 0))?;
    // The next owner finds pages that are nobody's.
    module::load("run=1")?;
    ksm.scan_fast()?;
    ksm.full_scans(3)?;
    ksm.stop()?;
    full.verify()?;
    module::unload()?;
    full.verify()?;
    full.group.release(&full.inside.child)?;
    handle(&mut full.inside)?;
    expect_stock_to_work()?;
    full.verify()
}

fn unloading_waits_for_room_in_a_full_group(ksm: &Ksm) -> Result<()> {
    module::load("")?;
    let mut full = FullGroup::new(ksm)?;
    let mut log = Log::from_now()?;
    let failures = full.group.events("max")?;
    let unloader = std::thread::spawn(module::unload);
    wait::until("unloading wants room", PATIENCE, || {
        Ok(full.group.events("max")? > failures)
    })?;
    full.group.unlimit()?;
    let unloaded = unloader.join();
    unloaded.map_err(|_| anyhow::anyhow!("the unloader panicked"))??;
    let lines = log.lines()?;
    ensure!(
        !lines
            .iter()
            .any(|line| line.contains("could not be unmerged")),
        "pages were left: {lines:#?}"
    );
    full.expect_private()?;
    expect_stock_to_work()
}

/// Processes that share more than there is memory for, the rest of which is in use.
struct Crowded {
    sharers: Vec<Sharer>,
    hog: Option<Child>,
    _brief: Brief,
}

impl Crowded {
    /// Processes.
    const SHARERS: usize = 4;
    /// Pages of each.
    const PAGES: usize = 8192;
    /// Kilobytes that are left for everybody else.
    const LEFT: u64 = 40 << 10;

    fn new(ksm: &Ksm) -> Result<Self> {
        let _brief = Brief::new()?;
        ksm.scan_at_full_speed()?;
        if ksm.has("smart_scan") {
            ksm.write("smart_scan", 0)?;
        }
        let mut sharers = Vec::new();
        for _ in 0..Self::SHARERS {
            sharers.push(Sharer::spawn(Self::PAGES, CONTENT)?);
        }
        ksm.merge_until(shared_by(Self::SHARERS, Self::PAGES))?;
        let mut crowded = Self {
            sharers,
            hog: Some(Child::spawn()?),
            _brief,
        };
        // Who unmerges comes first. But then any page fault of anybody asks for another victim, which has to be the hog.
        for sharer in &crowded.sharers {
            favour(&sharer.child)?;
        }
        let hog = crowded.hog.as_mut().context("a hog")?;
        // In steps, as the kernel gets some back from its caches on the way.
        wait::until_or_explain("memory is used up", PATIENCE, || {
            let left = procfs::meminfo("MemAvailable")?;
            if left <= Self::LEFT {
                return Ok(None);
            }
            let pages = (left - Self::LEFT).min(64 << 10) as usize * 1024 / PAGE + 1;
            let region = hog.map(Mapping::pages(pages))?;
            hog.fill(region, Content::Same(7))?;
            Ok(Some(format!("{left} kB are left")))
        })?;
        Ok(crowded)
    }

    fn verify(&mut self) -> Result<()> {
        for sharer in &mut self.sharers {
            ensure!(sharer.child.alive()?, "an innocent process was killed");
            sharer.verify()?;
        }
        Ok(())
    }

    fn make_room(&mut self) -> Result<()> {
        match self.hog.take() {
            Some(hog) if hog.alive()? => hog.kill(),
            _ => Ok(()),
        }
    }

    fn ksm_pages(&self) -> Result<usize> {
        self.sharers.iter().map(Sharer::ksm_pages).sum()
    }
}

/// Whether a process was killed for want of memory.
fn was_killed(status: ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt;
    status.signal() == Some(libc::SIGKILL)
}

fn run_2_in_a_full_system_kills_the_writer_and_loses_nothing(ksm: &Ksm) -> Result<()> {
    let mut crowded = Crowded::new(ksm)?;
    let mut writer = Command::new("sh")
        .args(["-c", "echo 2 > \"$0\""])
        .arg(ksm.dir().join("run"))
        .spawn()?;
    let status = writer.wait()?;
    ensure!(was_killed(status), "the writer ended with {status}");
    wait::until("the write is given up", PATIENCE, || {
        Ok(ksm.read("run")? == 0)
    })?;
    ensure!(crowded.ksm_pages()? > 0, "there was memory enough");
    crowded.verify()?;
    crowded.make_room()?;
    ksm.unmerge()?;
    ksm.expect(Counters::merged(0, 0))?;
    for sharer in &mut crowded.sharers {
        sharer.expect_private()?;
    }
    Ok(())
}

fn unloading_in_a_full_system_kills_nobody_else_and_loses_nothing(ksm: &Ksm) -> Result<()> {
    module::load("")?;
    let mut crowded = Crowded::new(ksm)?;
    let mut log = Log::from_now()?;
    let status = Command::new("rmmod").arg(module::NAME).status()?;
    ensure!(was_killed(status), "rmmod ended with {status}");
    ensure!(!module::loaded()?, "the module is still there");
    let left = left_shared(&mut log)?;
    ensure!(
        left > 0 && crowded.ksm_pages()? > 0,
        "there was memory enough"
    );
    crowded.verify()?;
    crowded.make_room()?;
    for sharer in &mut crowded.sharers {
        handle(sharer)?;
    }
    expect_stock_to_work()?;
    // A write gives everybody a page again.
    for sharer in &mut crowded.sharers {
        sharer.child.fill(sharer.region, CONTENT)?;
        sharer.expect_private()?;
    }
    Ok(())
}
