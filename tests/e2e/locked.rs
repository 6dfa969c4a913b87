//! Processes whose mmap lock nobody can have: a file system that does not answer keeps it, and whoever serves one may be
//! anybody.

use std::fs;
use std::process;
use std::process::Command;
use std::process::Stdio;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Passes;
use ksm_e2e::Region;
use ksm_e2e::kmsg::Log;
use ksm_e2e::ksm::Counters;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::PAGE;
use ksm_e2e::module;
use ksm_e2e::procfs;
use ksm_e2e::slow_file::SlowFile;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;
use libtest_mimic::Trial;
use nix::errno::Errno;

ksm_e2e::tests![
    a_process_that_keeps_its_lock_keeps_nobody_else_from_merging,
    a_pass_goes_on_where_the_last_one_had_to_leave_a_locked_process,
    run_2_does_not_wait_for_a_lock_for_ever,
];

/// The one that loads and unloads the module.
pub fn module_tests() -> Vec<Trial> {
    vec![ksm_e2e::runner::module_test(
        "e2e::locked::unloading_does_not_wait_for_a_lock_for_ever",
        unloading_does_not_wait_for_a_lock_for_ever,
    )]
}

const PAGES: usize = 8;
const CONTENT: Content = Content::Distinct(1);
const OTHER: Content = Content::Distinct(5000);

/// A process's mmap lock that nobody can have: somebody reads its memory where a slow file is mapped, and holds the lock for
/// reading; and it wants to unmap something, so nobody else gets it.
struct Lock {
    file: SlowFile,
    reader: process::Child,
}

impl Lock {
    fn of(child: &mut Child) -> Result<Self> {
        let mut file = SlowFile::mount()?;
        // With that the kernel knows how long it is.
        fs::metadata(file.path()).context("the slow file")?;
        let slow = child.map_file(file.path(), 1)?;
        let doomed = child.map(Mapping::pages(1))?;
        let reader = Command::new("dd")
            .arg(format!("if=/proc/{}/mem", child.pid()))
            .arg(format!("skip={}", slow.addr / PAGE))
            .args([&format!("bs={PAGE}"), "count=1", "of=/dev/null"])
            .stderr(Stdio::null())
            .spawn()
            .context("dd")?;
        file.wait_for_read()?;
        child.begin_munmap(doomed)?;
        wait::until("the mmap lock is waited for", PATIENCE, || {
            Ok(procfs::stack(child.pid())?.contains("munmap"))
        })?;
        Ok(Self { file, reader })
    }

    /// The file system answers.
    fn release(mut self, child: &mut Child) -> Result<()> {
        self.file.answer(&[0; PAGE])?;
        let status = self.reader.wait()?;
        ensure!(status.success(), "dd ended with {status}");
        child.finish_done()
    }
}

/// Two processes that have merged, one of which keeps its mmap lock.
struct Pair {
    lock: Lock,
    locked: Child,
    other: Child,
    shared: Shared,
}

/// Where the memory of both is.
#[derive(Clone, Copy)]
struct Shared {
    here: Region,
    there: Region,
}

impl Pair {
    fn new(ksm: &Ksm) -> Result<Self> {
        let (mut locked, mut other) = (Child::spawn()?, Child::spawn()?);
        let here = locked.map_mergeable(PAGES, CONTENT)?;
        let there = other.map_mergeable(PAGES, CONTENT)?;
        ksm.merge_until(Counters::merged(PAGES as u64, PAGES as u64))?;
        Ok(Self {
            lock: Lock::of(&mut locked)?,
            locked,
            other,
            shared: Shared { here, there },
        })
    }

    /// The lock can be had again. What is merged of the locked process is so still, which nobody could see before: even a
    /// look at its pages wants the lock.
    fn unlock(self) -> Result<Unlocked> {
        let Self {
            lock,
            mut locked,
            other,
            shared,
        } = self;
        lock.release(&mut locked)?;
        Ok(Unlocked {
            locked,
            other,
            shared,
        })
    }
}

/// Two processes one of which has kept its mmap lock.
struct Unlocked {
    locked: Child,
    other: Child,
    shared: Shared,
}

impl Unlocked {
    fn verify(&mut self) -> Result<()> {
        let Shared { here, there } = self.shared;
        self.locked.verify(here, CONTENT)?;
        self.other.verify(there, CONTENT)
    }

    fn expect_merged(&mut self, pages: usize) -> Result<()> {
        let merged = self.locked.ksm_pages(self.shared.here)?;
        ensure!(
            merged == pages,
            "{merged} pages of the process that was locked are merged instead of {pages}"
        );
        self.verify()
    }

    /// Everything merges again.
    fn expect_to_merge(&mut self, ksm: &Ksm) -> Result<()> {
        ksm.merge_until(Counters::merged(PAGES as u64, PAGES as u64))?;
        self.expect_merged(PAGES)
    }
}

fn a_process_that_keeps_its_lock_keeps_nobody_else_from_merging(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::new(ksm)?;
    let shared = pair.shared;
    for threads in [1, 3] {
        ksm.write("scan_threads", threads)?;
        let (mut one, mut two) = (Child::spawn()?, Child::spawn()?);
        let here = one.map_mergeable(PAGES, OTHER)?;
        let there = two.map_mergeable(PAGES, OTHER)?;
        ksm.start()?;
        ksm.full_scans(3)?;
        let pages = PAGES as u64;
        ksm.scan_until(Counters::merged(2 * pages, 2 * pages))?;
        // Pages like those of the locked process, and forks of them.
        let region = one.map_mergeable(PAGES, CONTENT)?;
        let mut fork = pair.other.fork()?;
        ksm.full_scans(3)?;
        ksm.scan_until(Counters::merged(2 * pages, 4 * pages))?;
        fork.fill(shared.there, OTHER)?;
        ksm.full_scans(3)?;
        ksm.scan_until(Counters::merged(2 * pages, 4 * pages))?;
        ksm.stop()?;
        fork.verify(shared.there, OTHER)?;
        fork.exit()?;
        one.verify(region, CONTENT)?;
        one.verify(here, OTHER)?;
        two.verify(there, OTHER)?;
        one.exit()?;
        two.exit()?;
    }
    let mut pair = pair.unlock()?;
    pair.expect_merged(PAGES)?;
    pair.locked.fill(shared.here.part(0, 1), OTHER)?;
    pair.locked.fill(shared.here.part(0, 1), CONTENT)?;
    pair.expect_to_merge(ksm)
}

fn a_pass_goes_on_where_the_last_one_had_to_leave_a_locked_process(ksm: &Ksm) -> Result<()> {
    const MANY: usize = 2048;
    const TURN: usize = 64;
    let mut child = Child::spawn()?;
    let region = child.map_mergeable(MANY, CONTENT)?;
    let mut passes = Passes::of(ksm)?;
    ksm.write("pages_to_scan", TURN as u64)?;
    let known = |child: &Child| procfs::ksm_stat(child.pid(), "ksm_rmap_items");
    for _ in 0..8 {
        passes.turn()?;
    }
    let before = known(&child)?;
    ensure!(
        (1..MANY as u64 / 2).contains(&before),
        "{before} pages of {MANY} are known after 8 turns"
    );
    let lock = Lock::of(&mut child)?;
    // Waiting is charged.
    ksm.write("pages_to_scan", 2 * MANY as u64)?;
    passes.make(2)?;
    ksm.write("pages_to_scan", TURN as u64)?;
    lock.release(&mut child)?;
    // Fewer than it took to get there.
    for _ in 0..4 {
        passes.turn()?;
    }
    let after = known(&child)?;
    ensure!(
        after > before,
        "the scan began anew: {before} pages were known before, {after} are now"
    );
    // What comes before is not forgotten.
    ksm.write("pages_to_scan", 2 * MANY as u64)?;
    passes.make(4)?;
    let all = known(&child)?;
    ensure!(all == MANY as u64, "{all} pages of {MANY} are known");
    child.verify(region, CONTENT)
}

fn run_2_does_not_wait_for_a_lock_for_ever(ksm: &Ksm) -> Result<()> {
    let pair = Pair::new(ksm)?;
    let mut writer = Child::spawn()?;
    writer.begin_write_file(ksm.dir().join("run"), "2")?;
    // All others are unmerged before.
    wait::until_or_explain("the other process is unmerged", PATIENCE, || {
        let counters = ksm.counters()?;
        let wanted = (counters.shared, counters.sharing) == (PAGES as u64, 0);
        Ok((!wanted).then(|| counters.to_string()))
    })?;
    ensure!(
        pair.other.ksm_pages(pair.shared.there)? == 0,
        "something of the other process is still merged"
    );
    ensure!(!writer.answered()?, "run=2 has ended with pages merged");
    writer.kill()?;
    ensure!(
        ksm.read("run")? == 0,
        "run is not 0 once unmerging was given up"
    );
    let outcome = ksm.write_bytes("run", b"2");
    ensure!(
        outcome == Err(Errno::EAGAIN),
        "run=2 with memory that nobody can reach: {outcome:?}"
    );
    ensure!(ksm.read("run")? == 0, "run is not 0 after EAGAIN");
    let mut writer = Child::spawn()?;
    writer.begin_write_file(ksm.dir().join("run"), "2")?;
    let mut pair = pair.unlock()?;
    writer.finish_write()??;
    ksm.expect(Counters::merged(0, 0))?;
    pair.expect_merged(0)?;
    pair.expect_to_merge(ksm)
}

fn unloading_does_not_wait_for_a_lock_for_ever(ksm: &Ksm) -> Result<()> {
    module::load("")?;
    let pair = Pair::new(ksm)?;
    let mut log = Log::from_now()?;
    module::unload()?;
    let lines = log.lines()?;
    ensure!(
        lines
            .iter()
            .any(|line| line.contains(&format!("{PAGES} KSM pages could not be unmerged"))),
        "the log does not say what was left: {lines:#?}"
    );
    ensure!(
        pair.other.ksm_pages(pair.shared.there)? == 0,
        "something of the other process is still merged"
    );
    let mut pair = pair.unlock()?;
    pair.expect_merged(PAGES)?;
    module::load("")?;
    pair.expect_to_merge(ksm)?;
    module::unload()?;
    pair.verify()
}
