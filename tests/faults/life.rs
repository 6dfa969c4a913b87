//! A life of the module in which it allocates at every place that it has, and what must be true at its end.

use std::collections::BTreeMap;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Sharer;
use ksm_e2e::exhausted::FullGroup;
use ksm_e2e::faults::Injector;
use ksm_e2e::ksm::Counters;
use ksm_e2e::ksm::STOCK;
use ksm_e2e::module;
use ksm_e2e::procfs;
use ksm_e2e::sharer;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;
use nix::errno::Errno;

/// Equal pages of each process. Few: each mapping and each copy of one is an allocation, and so a life.
const PAGES: usize = 6;

const CONTENT: Content = Content::Distinct(1);

/// Page allocations that fail in vain while the module is being unloaded.
const VAIN_COPIES: u32 = 40;

/// Says whether the failure that is to come has come.
pub type HasFailed<'a> = &'a dyn Fn() -> Result<bool>;

/// Is told that the module is loaded.
pub type Loaded<'a> = &'a dyn Fn() -> Result<()>;

fn spawn() -> Result<Sharer> {
    Sharer::spawn(PAGES, CONTENT)
}

/// The counters when so many processes share all pages.
fn shared_by(processes: usize) -> Counters {
    sharer::shared_by(processes, PAGES)
}

/// Does what may fail once, for want of memory, and then must not.
fn at_last(
    what: &str,
    has_failed: HasFailed,
    mut attempt: impl FnMut() -> Result<Result<(), Errno>>,
    mut after_failure: impl FnMut() -> Result<()>,
) -> Result<()> {
    let Err(errno) = attempt()? else {
        return Ok(());
    };
    ensure!(
        errno == Errno::ENOMEM && has_failed()?,
        "{what}: {errno}, and no allocation has failed"
    );
    after_failure().with_context(|| format!("after {what} has failed"))?;
    attempt()?.with_context(|| format!("{what}, again"))
}

/// What is to be lived.
pub struct Life<'a> {
    ksm: &'a Ksm,
    /// The stock KSM's files, while nobody uses it.
    stock: BTreeMap<String, (u32, String)>,
}

impl<'a> Life<'a> {
    /// For a system without the module.
    pub fn new(ksm: &'a Ksm) -> Result<Self> {
        let stock = Ksm::at(STOCK).snapshot()?;
        ensure!(stock.contains_key("run"), "stock KSM is not there");
        Ok(Self { ksm, stock })
    }

    /// Nothing of the module is there, and stock's files are.
    pub fn expect_gone(&self) -> Result<()> {
        ensure!(!module::loaded()?, "the module is there");
        ensure!(
            !self.ksm.dir().exists(),
            "{} has outlived the module",
            self.ksm.dir().display()
        );
        ensure!(
            procfs::pid_of("ksmd_rs")?.is_none(),
            "a thread has outlived the module"
        );
        let now = Ksm::at(STOCK).snapshot()?;
        ensure!(
            now == self.stock,
            "stock's files were {:?} and are {now:?}",
            self.stock
        );
        Ok(())
    }

    /// Loads with a parameter that makes no sense, which takes memory too.
    pub fn be_refused(&self, has_failed: HasFailed) -> Result<()> {
        match module::try_load("kallsyms_lookup_name=1")? {
            Err(Errno::EINVAL) => {}
            Err(Errno::ENOMEM) if has_failed()? => {}
            other => bail!("loading with a wrong address: {other:?}"),
        }
        self.expect_gone()
    }

    fn set_up(&self, has_failed: HasFailed) -> Result<()> {
        at_last(
            "starting a thread",
            has_failed,
            || Ok(self.ksm.write_bytes("scan_threads", b"2").map(drop)),
            || {
                let threads = self.ksm.read("scan_threads")?;
                ensure!(threads == 1, "there are {threads} threads");
                Ok(())
            },
        )?;
        self.ksm.write("smart_scan", 0)?;
        self.ksm.scan_fast()
    }

    fn merge(&self, processes: usize) -> Result<()> {
        self.ksm.start()?;
        self.ksm.scan_until(shared_by(processes))
    }

    fn unmerge(&self, has_failed: HasFailed) -> Result<()> {
        at_last(
            "run=2",
            has_failed,
            || Ok(self.ksm.write_bytes("run", b"2").map(drop)),
            || {
                let run = self.ksm.read("run")?;
                ensure!(run == 0, "run is {run}");
                Ok(())
            },
        )?;
        self.ksm.expect(Counters::merged(0, 0))
    }

    /// Tries to load, once, and unloads.
    pub fn come_and_go(&self) -> Result<()> {
        if module::try_load("")? == Ok(()) {
            module::unload()?;
        }
        self.expect_gone()
    }

    /// Lives it once, and says when the module is loaded. All processes are new, and gone at the end.
    pub fn live(&self, has_failed: HasFailed, loaded: Loaded) -> Result<()> {
        // Some memory was advised before the module is there, some after.
        let (mut one, mut other) = (spawn()?, spawn()?);
        at_last(
            "loading",
            has_failed,
            || module::try_load(""),
            || self.expect_gone(),
        )?;
        loaded()?;
        self.set_up(has_failed)?;
        let mut third = spawn()?;
        self.merge(3)?;
        for process in [&mut one, &mut other, &mut third] {
            process.verify()?;
        }
        self.ksm.stop()?;
        // The pages of those that the module knows are mapped by somebody else only, whom it learns of later.
        let mut heir = third.fork()?;
        for process in [one, other, third] {
            process.child.kill()?;
        }
        wait::until_or_explain("the dead are buried", PATIENCE, || {
            let counters = self.ksm.counters()?;
            Ok((counters.shared != 0).then(|| counters.to_string()))
        })?;
        heir.verify()?;
        self.merge(1)?;
        heir.verify()?;
        self.unmerge(has_failed)?;
        heir.expect_private()?;
        let mut friend = spawn()?;
        self.merge(2)?;
        heir.verify()?;
        friend.verify()?;
        module::unload()?;
        self.expect_gone()?;
        heir.expect_private()?;
        friend.expect_private()
    }

    /// Lives it in times when there is no memory at all for the module, for a while: each must end with nothing lost,
    /// and be forgotten with its end.
    pub fn live_through_droughts(&self, slab: &mut Injector, pages: &mut Injector) -> Result<()> {
        let (mut one, mut other) = (spawn()?, spawn()?);
        slab.drought(None)?;
        let loaded = module::try_load("")?;
        slab.rain()?;
        ensure!(loaded == Err(Errno::ENOMEM), "loading: {loaded:?}");
        self.expect_gone()?;
        module::load("")?;
        self.set_up(&|| Ok(false))?;

        // No memory for anything that merging takes.
        slab.drought(None)?;
        self.ksm.start()?;
        let failures = self.ksm.read("alloc_failures")?;
        wait::until("the module wants memory", PATIENCE, || {
            Ok(self.ksm.read("alloc_failures")? > failures + 10)
        })?;
        self.ksm.expect(Counters::merged(0, 0))?;
        slab.rain()?;
        self.ksm.scan_until(shared_by(2))?;
        one.verify()?;
        other.verify()?;

        // Nor for a note that a page has lost all mappings that were known, again and again.
        self.ksm.stop()?;
        let mut heir = one.fork()?;
        slab.drought(None)?;
        one.child.kill()?;
        other.child.kill()?;
        wait::until_or_explain("the dead are buried", PATIENCE, || {
            let counters = self.ksm.counters()?;
            Ok((counters.shared != 0).then(|| counters.to_string()))
        })?;
        self.ksm.start()?;
        self.ksm.full_scans(2)?;
        slab.rain()?;
        self.ksm.scan_until(shared_by(1))?;
        heir.verify()?;

        // Nor for copies.
        pages.drought(None)?;
        let undone = self.ksm.write_bytes("run", b"2");
        pages.rain()?;
        ensure!(undone == Err(Errno::ENOMEM), "run=2: {undone:?}");
        let run = self.ksm.read("run")?;
        ensure!(run == 0, "run is {run}");
        self.ksm.expect(shared_by(1))?;
        heir.verify()?;
        let mut friend = spawn()?;
        self.merge(2)?;

        // Unloading waits for rain.
        pages.drought(Some(VAIN_COPIES))?;
        module::unload()?;
        ensure!(pages.has_failed()?, "the drought was longer than unloading");
        pages.rain()?;
        self.expect_gone()?;
        heir.expect_private()?;
        friend.expect_private()
    }

    /// Lives it while the memory cgroup of one process has no room for copies of what that shares.
    pub fn live_in_a_full_group(&self) -> Result<()> {
        module::load("")?;
        let mut full = FullGroup::new(self.ksm)?;
        let undone = self.ksm.write_bytes("run", b"2");
        ensure!(undone == Err(Errno::ENOMEM), "run=2: {undone:?}");
        full.verify()?;
        full.group.unlimit()?;
        self.ksm.unmerge()?;
        full.expect_private()?;
        module::unload()?;
        self.expect_gone()
    }

    /// The stock KSM merges and unmerges.
    pub fn expect_stock_to_work(&self) -> Result<()> {
        let stock = Ksm::at(STOCK);
        let (mut one, mut other) = (spawn()?, spawn()?);
        let restore = stock.prepare()?;
        stock.merge_until(shared_by(2))?;
        one.verify()?;
        other.verify()?;
        restore.finish()?;
        one.verify()?;
        other.verify()
    }
}
