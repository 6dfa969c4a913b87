//! Makes one memory allocation of the module after the other fail, in a life of the module that allocates everywhere:
//! load, merge, unmerge, unload. Runs as root in a virtual machine of its own, on a kernel with fault injection:
//!
//!     KSM_RS_KO=/path/to/ksm_rs.ko faults --log FILE
//!
//! `allocation-sites` tells from the log which places in the source were reached.

mod life;

use std::cell::Cell;
use std::cell::RefCell;
use std::fs::File;
use std::io::Write;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use clap::Parser;
use ksm_e2e::Ksm;
use ksm_e2e::child;
use ksm_e2e::faults;
use ksm_e2e::faults::Allocator;
use ksm_e2e::faults::Injector;
use ksm_e2e::faults::Recorder;
use ksm_e2e::kmsg::Log;
use ksm_e2e::ksm::OURS;
use ksm_e2e::module;
use ksm_e2e::runner;

use crate::life::HasFailed;
use crate::life::Life;
use crate::life::Loaded;

/// How often a line is printed.
const REPORT: u64 = 20;

/// Makes the module's memory allocations fail.
#[derive(Parser)]
struct Arguments {
    /// Where to note each failure: `failed ALLOCATOR NUMBER in a PART: CALLERS`.
    #[arg(long)]
    log: PathBuf,
    /// Only those of one allocator: slab, pages, or droughts, in which all fail for a while.
    #[arg(long)]
    only: Option<String>,
    /// The number of the first one, for slab counted from when the module is loaded.
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// The number of the last one.
    #[arg(long, default_value_t = u64::MAX)]
    to: u64,
}

impl Arguments {
    fn wants(&self, what: &str) -> bool {
        self.only.as_deref().is_none_or(|only| only == what)
    }
}

fn main() -> Result<()> {
    child::serve_if_asked();
    let arguments = Arguments::parse();
    runner::prepare_process()?;
    faults::expect_no_other_module()?;
    if module::loaded()? {
        module::unload()?;
    }
    let ksm = Ksm::at(OURS);
    let life = Life::new(&ksm)?;
    // The life as it is meant to be.
    let nothing_fails: HasFailed = &|| Ok(false);
    life.live(nothing_fails, &|| Ok(()))
        .context("without any failure")?;
    let mut work = Work {
        life: &life,
        recorder: Recorder::new()?,
        notes: File::create(&arguments.log).context("the log")?,
        kernel: Log::from_now()?,
        complaints: Vec::new(),
    };
    if arguments.wants("droughts") {
        work.droughts()?;
        work.full_group()?;
    }
    let live: Part = &|has_failed, loaded| life.live(has_failed, loaded);
    for allocator in [Allocator::Slab, Allocator::Pages] {
        if !arguments.wants(allocator.name()) {
            continue;
        }
        let mut injector = Injector::new(allocator)?;
        let all = 1..=u64::MAX;
        if arguments.from == 1 {
            let be_refused: Part = &|has_failed, _| life.be_refused(has_failed);
            let numbers = all.clone();
            work.one_by_one(&mut injector, numbers, "refusal", When::Always, be_refused)?;
        }
        let numbers = arguments.from..=arguments.to;
        if allocator == Allocator::Pages {
            work.one_by_one(&mut injector, numbers, "life", When::Always, live)?;
            continue;
        }
        // Files in sysfs have numbers that go up and up, for which memory is wanted in some lives and not in others: so what
        // comes after loading is counted from there.
        if arguments.from == 1 {
            work.count_anew(&mut injector)?;
            work.one_by_one(&mut injector, all, "load", When::Loading, live)?;
            work.count_anew(&mut injector)?;
        }
        work.one_by_one(&mut injector, numbers, "life", When::Loaded, live)?;
    }
    // Nothing is left of it all.
    life.live(nothing_fails, &|| Ok(()))
        .context("after all failures")?;
    life.expect_stock_to_work()?;
    let complaints = work.complaints;
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(())
}

/// Something that wants memory.
type Part<'a> = &'a dyn Fn(HasFailed, Loaded) -> Result<()>;

/// Which of a part's allocations count.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    Always,
    /// Until the module is loaded.
    Loading,
    /// From then on.
    Loaded,
}

struct Work<'a> {
    life: &'a Life<'a>,
    recorder: Recorder,
    notes: File,
    /// The kernel's log.
    kernel: Log,
    /// What went wrong, as long as going on made sense.
    complaints: Vec<String>,
}

impl Work<'_> {
    /// Does the same again and again, and lets another allocation fail each time, until there are no more.
    fn one_by_one(
        &mut self,
        injector: &mut Injector,
        numbers: RangeInclusive<u64>,
        what: &str,
        when: When,
        part: Part,
    ) -> Result<()> {
        let name = injector.allocator().name();
        let last = *numbers.end();
        for number in numbers {
            let start = Instant::now();
            let failed = Cell::new(None);
            let armed = RefCell::new(&mut *injector);
            let arm = || armed.borrow_mut().arm(number);
            let disarm = || {
                failed.set(Some(armed.borrow_mut().disarm(number)?));
                anyhow::Ok(())
            };
            if when != When::Loaded {
                arm()?;
            }
            let loaded = || match when {
                When::Always => Ok(()),
                When::Loading => disarm(),
                When::Loaded => arm(),
            };
            let done = part(&|| armed.borrow().has_failed(), &loaded);
            if failed.get().is_none() {
                disarm()?;
            }
            let failed = failed.get() == Some(true);
            let went_well = done.is_ok();
            let recorded = self.note(&format!("{name} {number} in a {what}"))?;
            self.judge(&format!("{name} {number} in a {what}"), done)?;
            // It would go wrong again for ever.
            ensure!(
                failed || went_well,
                "no allocation failed, and yet: {}",
                self.complaints.join("\n")
            );
            if !failed {
                let all = number - 1;
                println!("{name}: {all} allocations in a {what} failed, one after the other");
                return Ok(());
            }
            ensure!(
                recorded <= 1,
                "{name} {number} in a {what} failed, and was recorded {recorded} times"
            );
            if number.is_multiple_of(REPORT) {
                let seconds = start.elapsed().as_secs_f32();
                println!("{name}: {number} allocations, {seconds:.1} s for the last");
            }
        }
        println!("{name}: given up after allocation {last}");
        Ok(())
    }

    fn count_anew(&mut self, injector: &mut Injector) -> Result<()> {
        let done = injector.count_anew(|| self.life.come_and_go());
        self.note("counting anew")?;
        self.judge("counting anew", done)
    }

    fn droughts(&mut self) -> Result<()> {
        let mut slab = Injector::new(Allocator::Slab)?;
        let mut pages = Injector::new(Allocator::Pages)?;
        let done = self.life.live_through_droughts(&mut slab, &mut pages);
        drop((slab, pages));
        let failures = self.note("all in droughts")?;
        println!("droughts: {failures} allocations failed");
        self.judge("droughts", done)
    }

    fn full_group(&mut self) -> Result<()> {
        let done = self.life.live_in_a_full_group();
        let failures = self.note("charges to a full group")?;
        println!("a full group: {failures} charges failed");
        self.judge("a full group", done)
    }

    /// Notes what failed. Returns how many.
    fn note(&mut self, what: &str) -> Result<usize> {
        let failures = self.recorder.take()?;
        for failed in &failures {
            writeln!(self.notes, "failed {what}: {failed}")?;
        }
        Ok(failures.len())
    }

    /// Complains about what went wrong, and tries to go on.
    fn judge(&mut self, what: &str, done: Result<()>) -> Result<()> {
        let reports = self.kernel.reports()?;
        let wrong = done.err().map(|error| format!("{error:#}"));
        if reports.is_empty() && wrong.is_none() {
            return Ok(());
        }
        let complaint = format!("{what}: {wrong:?}; the kernel reported {reports:?}");
        println!("{complaint}");
        self.complaints.push(complaint);
        if module::loaded()? {
            module::unload()?;
        }
        self.life
            .expect_gone()
            .context("going on after a complaint")
    }
}
