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

ksm_e2e::tests![
    a_process_that_keeps_its_lock_keeps_nobody_else_from_merging,
    run_2_waits_for_a_lock_until_it_is_killed,
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

/// Two processes that have merged, one of which keeps its mmap lock: somebody reads its memory where a slow file is mapped,
/// and holds the lock for reading; and it wants to unmap something, so nobody else can have it.
struct Pair {
    file: SlowFile,
    reader: process::Child,
    locked: Child,
    here: Region,
    other: Child,
    there: Region,
}

impl Pair {
    fn new(ksm: &Ksm) -> Result<Self> {
        let mut file = SlowFile::mount()?;
        let (mut locked, mut other) = (Child::spawn()?, Child::spawn()?);
        let here = locked.map_mergeable(PAGES, CONTENT)?;
        let there = other.map_mergeable(PAGES, CONTENT)?;
        ksm.merge_until(Counters::merged(PAGES as u64, PAGES as u64))?;
        // With that the kernel knows how long it is.
        fs::metadata(file.path()).context("the slow file")?;
        let slow = locked.map_file(file.path(), 1)?;
        let doomed = locked.map(Mapping::pages(1))?;
        let reader = Command::new("dd")
            .arg(format!("if=/proc/{}/mem", locked.pid()))
            .arg(format!("skip={}", slow.addr / PAGE))
            .args([&format!("bs={PAGE}"), "count=1", "of=/dev/null"])
            .stderr(Stdio::null())
            .spawn()
            .context("dd")?;
        file.wait_for_read()?;
        locked.begin_munmap(doomed)?;
        wait::until("the mmap lock is waited for", PATIENCE, || {
            Ok(procfs::stack(locked.pid())?.contains("munmap"))
        })?;
        Ok(Self {
            file,
            reader,
            locked,
            here,
            other,
            there,
        })
    }

    /// The file system answers.
    fn unlock(&mut self) -> Result<()> {
        self.file.answer(&[0; PAGE])?;
        let status = self.reader.wait()?;
        ensure!(status.success(), "dd ended with {status}");
        self.locked.finish_done()
    }

    fn verify(&mut self) -> Result<()> {
        self.locked.verify(self.here, CONTENT)?;
        self.other.verify(self.there, CONTENT)
    }

    /// What was locked is merged, which nobody can see before it is unlocked: even a look at its pages wants the lock.
    fn expect_still_merged(&self) -> Result<()> {
        let pages = self.locked.ksm_pages(self.here)?;
        ensure!(pages == PAGES, "{pages} pages of {PAGES} are still merged");
        Ok(())
    }

    /// Everything merges again.
    fn expect_to_merge(&mut self, ksm: &Ksm) -> Result<()> {
        ksm.merge_until(Counters::merged(PAGES as u64, PAGES as u64))?;
        self.expect_still_merged()?;
        self.verify()
    }
}

fn a_process_that_keeps_its_lock_keeps_nobody_else_from_merging(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::new(ksm)?;
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
    fork.fill(pair.there, OTHER)?;
    ksm.full_scans(3)?;
    ksm.scan_until(Counters::merged(2 * pages, 4 * pages))?;
    ksm.stop()?;
    fork.verify(pair.there, OTHER)?;
    fork.exit()?;
    one.verify(region, CONTENT)?;
    one.verify(here, OTHER)?;
    two.verify(there, OTHER)?;
    one.exit()?;
    two.exit()?;
    pair.unlock()?;
    pair.expect_still_merged()?;
    pair.locked.fill(pair.here.part(0, 1), OTHER)?;
    pair.locked.fill(pair.here.part(0, 1), CONTENT)?;
    pair.expect_to_merge(ksm)
}

fn run_2_waits_for_a_lock_until_it_is_killed(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::new(ksm)?;
    let mut writer = Child::spawn()?;
    writer.begin_write_file(ksm.dir().join("run"), "2")?;
    // All others are unmerged before.
    wait::until_or_explain("the other process is unmerged", PATIENCE, || {
        let counters = ksm.counters()?;
        let wanted = (counters.shared, counters.sharing) == (PAGES as u64, 0);
        Ok((!wanted).then(|| counters.to_string()))
    })?;
    ensure!(
        pair.other.ksm_pages(pair.there)? == 0,
        "something of the other process is still merged"
    );
    ensure!(!writer.answered()?, "run=2 has ended with pages merged");
    writer.kill()?;
    ensure!(
        ksm.read("run")? == 0,
        "run is not 0 once unmerging was given up"
    );
    let mut writer = Child::spawn()?;
    writer.begin_write_file(ksm.dir().join("run"), "2")?;
    pair.unlock()?;
    writer.finish_write()??;
    ksm.expect(Counters::merged(0, 0))?;
    ensure!(
        pair.locked.ksm_pages(pair.here)? == 0,
        "something of the process that was locked is still merged"
    );
    pair.verify()?;
    pair.expect_to_merge(ksm)
}

fn unloading_does_not_wait_for_a_lock_for_ever(ksm: &Ksm) -> Result<()> {
    module::load("")?;
    let mut pair = Pair::new(ksm)?;
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
        pair.other.ksm_pages(pair.there)? == 0,
        "something of the other process is still merged"
    );
    pair.unlock()?;
    pair.expect_still_merged()?;
    pair.verify()?;
    module::load("")?;
    pair.expect_to_merge(ksm)?;
    module::unload()?;
    pair.verify()
}
