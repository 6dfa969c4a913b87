//! Makes one memory allocation of the module after the other fail, in a life of the module that allocates everywhere:
//! load, merge, unmerge, unload. Runs as root in a virtual machine of its own, on a kernel with fault injection:
//!
//!     KSM_RS_KO=/path/to/ksm_rs.ko faults
//!
//! Prints a line `failed ALLOCATOR NUMBER: CALLERS` for each; `allocation-sites` tells from them which places in the
//! source were reached.

mod life;

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

use crate::life::Life;

/// What the core says of its own failures that are caused here: it does not expect a kprobe to want memory in vain.
const REPORT_OF_THE_CORE: &str = "arm_kprobe";

/// Makes the module's memory allocations fail.
#[derive(Parser)]
struct Arguments {
    /// Only those of one allocator: slab, pages, or droughts, in which all fail for a while.
    #[arg(long)]
    only: Option<String>,
    /// The number of the first one.
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
    let mut log = Log::from_now()?;
    let mut recorder = Recorder::new()?;
    let life = Life::new(&ksm)?;
    // The life as it is meant to be.
    life.live(&|| Ok(false)).context("without any failure")?;
    for allocator in [Allocator::Slab, Allocator::Pages] {
        if arguments.wants(allocator.name()) {
            one_by_one(&arguments, allocator, &life, &mut recorder, &mut log)?;
        }
    }
    if arguments.wants("droughts") {
        let mut slab = Injector::new(Allocator::Slab)?;
        let mut pages = Injector::new(Allocator::Pages)?;
        life.live_through_droughts(&mut slab, &mut pages)
            .context("in droughts")?;
        drop((slab, pages));
        let failures = recorder.take()?;
        for failed in &failures {
            println!("failed droughts 0: {failed}");
        }
        println!("droughts: {} allocations failed", failures.len());
        expect_no_report(&mut log)?;
    }
    // Nothing is left of it all.
    life.live(&|| Ok(false)).context("after all failures")?;
    life.expect_stock_to_work()
}

fn one_by_one(
    arguments: &Arguments,
    allocator: Allocator,
    life: &Life,
    recorder: &mut Recorder,
    log: &mut Log,
) -> Result<()> {
    let name = allocator.name();
    let mut injector = Injector::new(allocator)?;
    for number in arguments.from..=arguments.to {
        injector.arm(number)?;
        let lived = life.live(&|| injector.has_failed());
        let failed = injector.disarm(number)?;
        let failures = recorder.take()?;
        for failed in &failures {
            println!("failed {name} {number}: {failed}");
        }
        lived.with_context(|| format!("{name}: the failure of allocation {number}"))?;
        expect_no_report(log)?;
        if !failed {
            println!(
                "{name}: {} allocations failed, each in a life of its own",
                number - 1
            );
            return Ok(());
        }
        ensure!(
            failures.len() == 1,
            "{name}: allocation {number} failed, and was recorded {} times",
            failures.len()
        );
    }
    println!("{name}: given up after allocation {}", arguments.to);
    Ok(())
}

fn expect_no_report(log: &mut Log) -> Result<()> {
    let reports = log.reports()?;
    let ours = reports
        .iter()
        .filter(|line| !line.contains(REPORT_OF_THE_CORE));
    let ours: Vec<&String> = ours.collect();
    ensure!(ours.is_empty(), "the kernel reported faults: {ours:#?}");
    Ok(())
}
