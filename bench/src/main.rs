//! Measures ksm_rs against the kernel's own KSM.
//!
//! `scripts/bench` boots a kernel for each scenario and runs `ksm-bench guest` in it as root; `ksm-bench report`
//! then makes tables and charts of what the boots have written down.

mod chart;
mod cold;
mod emulated;
mod figures;
mod goals;
mod guests;
mod holds;
mod interference;
mod ksm;
mod memory;
mod memory_use;
mod probe;
mod record;
mod report;
mod scenario;
mod session;
mod sparse;
mod stats;
mod steady;
mod threads;
mod victim;
mod volatile;

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use clap::Subcommand;
use clap::ValueEnum;

use crate::record::Boot;
use crate::scenario::Scenario;
use crate::session::Session;

#[derive(Debug, Parser)]
#[command(about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say which scenarios there are: name, machine, memory in MiB, a title
    List {
        /// For the quick form
        #[arg(long)]
        quick: bool,
    },
    /// Measure a scenario in the kernel that is running, as root
    Guest {
        /// What to measure
        #[arg(long)]
        scenario: Scenario,
        /// How often each side has its turn
        #[arg(long, default_value_t = 5)]
        rounds: u32,
        /// Little memory, for a smoke test
        #[arg(long)]
        quick: bool,
        /// The module's file
        #[arg(long)]
        module: PathBuf,
        /// A folder with what the guests of make demo boot from: bzImage, initramfs.gz
        #[arg(long)]
        images: Option<PathBuf>,
        /// Where the results go
        #[arg(long)]
        out: PathBuf,
    },
    /// Make tables and charts of what guests have measured
    Report {
        /// The folder where they go
        #[arg(long)]
        out: PathBuf,
        /// What the guests have written
        #[arg(required = true)]
        results: Vec<PathBuf>,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::List { quick } => {
            for scenario in Scenario::value_variants() {
                if quick && !scenario.is_quick() {
                    continue;
                }
                let machine = scenario.machine().name();
                let memory = scenario.memory_mib(quick);
                println!(
                    "{} {machine} {memory} {}",
                    scenario.name(),
                    scenario.title()
                );
            }
            Ok(())
        }
        Command::Guest {
            scenario,
            rounds,
            quick,
            module,
            images,
            out,
        } => {
            let mut session = Session::new(scenario, rounds, quick, module, images, out)?;
            scenario.run(&mut session)?;
            session.finish()
        }
        Command::Report { out, results } => {
            let boots = results.iter().map(|path| Boot::load(path));
            report::make(&boots.collect::<Result<Vec<_>>>()?, &out)
        }
    }
}
