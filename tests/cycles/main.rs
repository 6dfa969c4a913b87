//! Loads and unloads the module a thousand times, while processes with memory to merge come and go. Runs as root in a
//! virtual machine of its own:
//!
//!     KSM_RS_KO=/path/to/ksm_rs.ko cycles --count 1000
//!
//! Fails if a byte of anybody's memory is not what was written there, if anything is merged when the module is gone, or if
//! anything is left of it in the end.

use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::anyhow;
use anyhow::ensure;
use clap::Parser;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Sharer;
use ksm_e2e::child;
use ksm_e2e::kmsg::Log;
use ksm_e2e::ksm::OURS;
use ksm_e2e::ksm::STOCK;
use ksm_e2e::leftovers::Leftovers;
use ksm_e2e::module;
use ksm_e2e::procfs;
use ksm_e2e::runner;
use ksm_e2e::sharer::shared_by;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;
use nix::errno::Errno;
use nix::sys::wait::WaitPidFlag;
use nix::sys::wait::WaitStatus;
use nix::sys::wait::waitpid;

/// Equal pages of each process.
const PAGES: usize = 64;

const CONTENT: Content = Content::Distinct(1);

/// Cycles before anything is counted: caches fill.
const WARM_UP: usize = 8;

/// How often a line is printed.
const REPORT: usize = 100;

/// Loads and unloads the module again and again.
#[derive(Parser)]
struct Arguments {
    /// How often.
    #[arg(long, default_value_t = 1000)]
    count: usize,
}

fn main() -> Result<()> {
    child::serve_if_asked();
    let arguments = Arguments::parse();
    runner::prepare_process()?;
    // Children of guests that were killed are ours then, and so are their remains.
    nix::sys::prctl::set_child_subreaper(true)?;
    if module::loaded()? {
        module::unload()?;
    }
    let files = Ksm::at(STOCK).snapshot()?;
    let mut log = Log::from_now()?;
    let mut load = Load::new()?;
    for cycle in 0..WARM_UP {
        load.cycle(cycle)
            .with_context(|| format!("in cycle {cycle} before counting"))?;
        bury_the_adopted()?;
    }
    let before = Leftovers::now()?;
    let start = Instant::now();
    let mut merged = 0;
    for cycle in 0..arguments.count {
        merged += load
            .cycle(cycle)
            .with_context(|| format!("in cycle {cycle}"))?;
        bury_the_adopted()?;
        let reports = log.reports()?;
        ensure!(reports.is_empty(), "in cycle {cycle}: {reports:#?}");
        if (cycle + 1) % REPORT == 0 {
            println!("{} cycles, {} s", cycle + 1, start.elapsed().as_secs());
        }
    }
    before.expect_no_more()?;
    ensure!(
        Ksm::at(STOCK).snapshot()? == files,
        "stock's files are not what they were"
    );
    println!(
        "{} cycles in {} s, in which {merged} times pages were merged when the module was unloaded",
        arguments.count,
        start.elapsed().as_secs()
    );
    Ok(())
}

/// Buries the adopted; all other children that have ended have been waited for.
fn bury_the_adopted() -> Result<()> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("waiting for the adopted"),
        }
    }
}

/// Processes, some of which stay.
struct Load {
    ksm: Ksm,
    stay: [Sharer; 2],
}

impl Load {
    fn new() -> Result<Self> {
        let spawn = || Sharer::spawn(PAGES, CONTENT);
        Ok(Self {
            ksm: Ksm::at(OURS),
            stay: [spawn()?, spawn()?],
        })
    }

    /// One cycle. Returns 1 if something was merged when the module was unloaded, or else 0.
    fn cycle(&mut self, cycle: usize) -> Result<usize> {
        module::load("run=1")?;
        self.ksm.scan_at_full_speed()?;
        self.ksm.write("scan_threads", 1 + cycle as u64 % 3)?;
        // Comes, and goes before, during and after unloading by turns.
        let mut writer = Sharer::spawn(PAGES, CONTENT)?;
        let mut guest = Sharer::spawn(PAGES, CONTENT)?;
        writer.child.churn(writer.region, cycle as u64)?;
        // Nothing, something, everything is merged.
        let wanted = [0, 1, PAGES as u64 / 3, shared_by(3, PAGES).sharing][cycle % 4];
        wait::until("enough pages are merged", PATIENCE, || {
            Ok(self.ksm.read("pages_sharing")? >= wanted)
        })?;
        let mut forks = vec![guest.fork()?, self.stay[0].fork()?];
        if cycle.is_multiple_of(3) {
            guest.verify()?;
            guest.child.kill()?;
        } else {
            forks.push(guest);
        }
        let merged = self.ksm.read("pages_sharing")?;
        let unloader = std::thread::spawn(module::unload);
        while !unloader.is_finished() {
            // From an existing process: this one has two threads now, and must not fork.
            forks.push(self.stay[1].fork()?);
            forks.remove(0).child.kill()?;
        }
        let unloaded = unloader.join();
        unloaded.map_err(|_| anyhow!("the unloader panicked"))??;
        ensure!(
            writer.child.alive()?,
            "a process has read something that it did not write"
        );
        writer.child.kill()?;
        for sharer in self.stay.iter_mut().chain(&mut forks) {
            sharer.expect_private()?;
        }
        ensure!(
            !self.ksm.dir().exists() && procfs::pid_of("ksmd_rs")?.is_none(),
            "something has outlived the module"
        );
        Ok(usize::from(merged > 0))
    }
}
