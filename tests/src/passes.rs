//! Passes made one at a time, for what has to be counted pass by pass.

use std::fs;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use crate::Ksm;
use crate::ksm::MERGE;
use crate::procfs;
use crate::wait;
use crate::wait::PATIENCE;

/// Longer than any test.
const AN_HOUR: u64 = 3_600_000;

/// A thread that scans only when it is told to: it sleeps for an hour after each turn, and a new sleeping time ends
/// the sleep.
#[derive(Debug)]
pub struct Passes<'a> {
    ksm: &'a Ksm,
    thread: i32,
    sleep: u64,
}

impl<'a> Passes<'a> {
    /// Takes the thread, which must not be scanning, in hand.
    pub fn of(ksm: &'a Ksm) -> Result<Self> {
        let name = if ksm.is_stock() { "ksmd" } else { "ksmd_rs" };
        let thread = procfs::pid_of(name)?.with_context(|| format!("there is no thread {name}"))?;
        ensure!(ksm.read("run")? != MERGE, "the thread scans already");
        ksm.write("pages_to_scan", 100_000)?;
        ksm.write("sleep_millisecs", AN_HOUR)?;
        Ok(Self {
            ksm,
            thread,
            sleep: AN_HOUR,
        })
    }

    /// Whether the thread sleeps and has heard of everything that was written to the files: a write wakes it before it
    /// returns, and nothing that the thread does in a turn is an interruptible sleep.
    fn rests(&self) -> Result<bool> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.thread))?;
        Ok(stat.contains(") S "))
    }

    fn rest(&self) -> Result<()> {
        wait::until("the thread rests", PATIENCE, || self.rests())
    }

    /// One turn: `pages_to_scan` pages, or what is left of the pass.
    pub fn turn(&mut self) -> Result<()> {
        self.rest()?;
        let scanned = || -> Result<_> {
            let skipped = if self.ksm.has("pages_skipped") {
                self.ksm.read("pages_skipped")?
            } else {
                0
            };
            Ok((
                self.ksm.read("full_scans")?,
                self.ksm.read("pages_scanned")?,
                skipped,
            ))
        };
        let before = scanned()?;
        if self.ksm.read("run")? != MERGE {
            self.ksm.start()?;
            self.rest()?;
        }
        // Starting makes a turn by itself, unless the thread slept between two of them when it was stopped.
        if scanned()? == before {
            self.sleep += 1;
            self.ksm.write("sleep_millisecs", self.sleep)?;
            wait::until("a turn is made", PATIENCE, || Ok(scanned()? != before))?;
            self.rest()?;
        }
        Ok(())
    }

    /// One turn, though nothing may come of it that is counted.
    pub fn turn_in_vain(&mut self) -> Result<()> {
        self.rest()?;
        let before = procfs::context_switches(self.thread)?;
        if self.ksm.read("run")? != MERGE {
            self.ksm.start()?;
        } else {
            self.sleep += 1;
            self.ksm.write("sleep_millisecs", self.sleep)?;
        }
        wait::until("the thread has woken", PATIENCE, || {
            Ok(procfs::context_switches(self.thread)? != before)
        })?;
        self.rest()
    }

    /// One whole pass. There must be something to scan, and no more than `pages_to_scan`.
    pub fn pass(&mut self) -> Result<()> {
        let before = self.ksm.read("full_scans")?;
        self.turn()?;
        let now = self.ksm.read("full_scans")?;
        ensure!(
            now == before + 1,
            "a turn has brought full_scans from {before} to {now}"
        );
        Ok(())
    }

    /// So many whole passes.
    pub fn make(&mut self, passes: usize) -> Result<()> {
        (0..passes).try_for_each(|_| self.pass())
    }
}
