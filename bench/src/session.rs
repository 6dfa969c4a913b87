//! One boot: the rounds in which either KSM has its turn, and what is written down.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;

use crate::ksm::Ksm;
use crate::record::Boot;
use crate::record::Metric;
use crate::record::Sample;
use crate::record::Side;
use crate::scenario::Machine;
use crate::scenario::Scenario;

/// What is measured in a boot, and how far that is.
#[derive(Debug)]
pub struct Session {
    module: PathBuf,
    images: Option<PathBuf>,
    out: PathBuf,
    start: Instant,
    boot: Boot,
}

/// The turn of one KSM in one round.
#[derive(Debug)]
pub struct Turn<'a> {
    /// The one whose turn it is.
    pub ksm: &'a Ksm,
    /// The round, from 0.
    pub round: u32,
    samples: &'a mut Vec<Sample>,
    start: Instant,
}

impl Session {
    /// Begins. Results go to the file `out`, from time to time.
    pub fn new(
        scenario: Scenario,
        rounds: u32,
        quick: bool,
        module: PathBuf,
        images: Option<PathBuf>,
        out: PathBuf,
    ) -> Result<Self> {
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        Ok(Self {
            module,
            images,
            out,
            start: Instant::now(),
            boot: Boot {
                scenario,
                machine: scenario.machine(),
                kernel: kernel.trim_end().to_owned(),
                cpus: std::thread::available_parallelism()?.get(),
                memory_mib: meminfo_kb("MemTotal")? >> 10,
                rounds,
                quick,
                complete: false,
                notes: Vec::new(),
                samples: Vec::new(),
            },
        })
    }

    /// Where this is.
    pub fn machine(&self) -> Machine {
        self.boot.machine
    }

    /// The first of two values, or in the quick form the second.
    pub fn pick<T>(&self, full: T, quick: T) -> T {
        if self.boot.quick { quick } else { full }
    }

    /// What virtual machines boot from.
    pub fn images(&self) -> Result<PathBuf> {
        self.images.clone().context("--images is wanted")
    }

    /// How many MiB victims may have: what is there, less room for everything else.
    pub fn room_mib(&self) -> usize {
        (self.boot.memory_mib * 7 / 8).saturating_sub(192) as usize
    }

    /// Says something that the reader of the results should know.
    pub fn note(&mut self, text: impl Into<String>) {
        let text = text.into();
        say(self.start, &text);
        if !self.boot.notes.contains(&text) {
            self.boot.notes.push(text);
        }
    }

    /// Alternates: in each round the kernel's own KSM has its turn, then the module, each from a clean start.
    pub fn alternate(&mut self, mut work: impl FnMut(&mut Turn<'_>) -> Result<()>) -> Result<()> {
        for round in 0..self.boot.rounds {
            for side in [Side::Stock, Side::KsmRs] {
                let ksm = if side == Side::Stock {
                    Ksm::stock()?
                } else {
                    Ksm::load(&self.module)?
                };
                ksm.prepare()?;
                let mut turn = Turn {
                    ksm: &ksm,
                    round,
                    samples: &mut self.boot.samples,
                    start: self.start,
                };
                let result = work(&mut turn);
                // What has been measured so far is worth keeping whatever happened.
                self.boot.save(&self.out)?;
                result.with_context(|| format!("{}, round {round}", side.name()))?;
                ksm.leave()?;
            }
        }
        Ok(())
    }

    /// All has been measured.
    pub fn finish(&mut self) -> Result<()> {
        self.boot.complete = true;
        self.boot.save(&self.out)
    }
}

impl Turn<'_> {
    /// Which KSM this is.
    pub fn side(&self) -> Side {
        self.ksm.side()
    }

    /// The cases of a scenario in the order of this round: each round begins with another, so that no case is always
    /// measured on memory that is as fresh, or as fragmented.
    pub fn rotate<T: Clone>(&self, cases: &[T]) -> Vec<T> {
        let mut cases = cases.to_vec();
        if !cases.is_empty() {
            let first = self.round as usize % cases.len();
            cases.rotate_left(first);
        }
        cases
    }

    /// Writes down a figure of this KSM.
    pub fn record(&mut self, case: &str, x: Option<f64>, metric: Metric, value: f64) {
        self.record_of(self.side(), case, x, metric, value);
    }

    /// Writes down a figure of somebody else.
    pub fn record_of(
        &mut self,
        side: Side,
        case: &str,
        x: Option<f64>,
        metric: Metric,
        value: f64,
    ) {
        let text = format!(
            "round {}, {case}: {}: {} {value:.*} {}",
            self.round + 1,
            side.name(),
            metric.name(),
            if value < 100.0 { 2 } else { 0 },
            metric.unit()
        );
        say(self.start, &text);
        self.samples.push(Sample {
            case: case.to_owned(),
            x,
            side,
            round: self.round,
            metric,
            value,
        });
    }

    /// Ends a case: nothing is merged or known any more.
    pub fn clear(&self) -> Result<()> {
        self.ksm.prepare()
    }
}

/// A number of kilobytes from `/proc/meminfo`.
pub fn meminfo_kb(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| {
        let (key, rest) = line.split_once(':')?;
        (key == name).then(|| rest.trim().trim_end_matches(" kB"))
    });
    line.with_context(|| format!("/proc/meminfo has no {name}"))?
        .parse()
        .context(name.to_owned())
}

/// A line of progress; scripts/bench shows those with this mark.
fn say(start: Instant, text: &str) {
    println!("bench: {:4} s  {text}", start.elapsed().as_secs());
}
