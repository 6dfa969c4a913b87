//! Windows that the module's test build holds open: threads of the module that wait at a named place until the test
//! has done what it wants to be done just then.

use std::cell::Cell;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use crate::Ksm;
use crate::child::Span;
use crate::wait::PATIENCE;
use crate::wait::checks_itself;
use crate::wait::slowness;

/// The file that says who waits where.
const FILE: &str = "delays";

/// What is known of a place.
#[derive(Clone, Copy, Debug)]
struct Row {
    arrived: u32,
    left: u32,
    came: u64,
    went: u64,
}

fn row(ksm: &Ksm, place: &str) -> Result<Row> {
    let text = ksm
        .text(FILE)
        .context("this test needs the module's test build")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(place)?.strip_prefix(' '))
        .with_context(|| format!("no place {place} in {text:?}"))?;
    let numbers = line
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<Vec<u64>, _>>()?;
    let [arrived, left, came, went] = numbers[..] else {
        anyhow::bail!("{place} has the numbers {numbers:?}");
    };
    Ok(Row {
        arrived: arrived as u32,
        left: left as u32,
        came,
        went,
    })
}

/// How often the windows of a test were hit.
#[derive(Debug)]
pub struct Hits<'a> {
    ksm: &'a Ksm,
    hits: Cell<u32>,
    tried: Cell<u32>,
}

impl<'a> Hits<'a> {
    /// None yet.
    pub fn none(ksm: &'a Ksm) -> Self {
        Self {
            ksm,
            hits: Cell::new(0),
            tried: Cell::new(0),
        }
    }

    /// Rounds of a test that cannot make sure of a hit, as others may want the CPU just then: until there are as many hits as a
    /// test makes rounds otherwise, but not without end.
    pub fn rounds(&self) -> impl Iterator<Item = u32> + '_ {
        (0..PATIENT * rounds()).take_while(|_| self.hits.get() < rounds())
    }

    /// Makes the next thread that comes to a place wait there for a while: longer than the test needs, but not for ever.
    pub fn hold(&self, place: &'static str) -> Result<Window<'_>> {
        self.hold_all(place, 1, Duration::from_secs(15))
    }

    /// Makes so many threads wait at a place, each for so long at the most.
    pub fn hold_all(
        &self,
        place: &'static str,
        threads: u32,
        limit: Duration,
    ) -> Result<Window<'_>> {
        let before = row(self.ksm, place)?;
        ensure!(
            before.arrived == before.left,
            "somebody still waits at {place}: {before:?}"
        );
        let micros = limit.as_micros();
        (self.ksm).write_text(FILE, &format!("{place} {micros} {threads}"))?;
        self.tried.set(self.tried.get() + 1);
        Ok(Window {
            hits: self,
            place,
            threads,
            before,
            open: true,
        })
    }

    /// Says how often the windows were hit. Fails unless that is often enough.
    pub fn expect(&self, least: u32) -> Result<()> {
        // Windows that the test looked after by itself are not counted when they open.
        let (hits, tried) = (self.hits.get(), self.tried.get().max(least));
        eprint!("[{hits} of {tried} windows hit] ");
        ensure!(
            hits >= least && hits > 0,
            "the window was hit {hits} times of {tried}, wanted {least}"
        );
        Ok(())
    }

    /// How often the windows were hit so far.
    pub fn hits(&self) -> u32 {
        self.hits.get()
    }

    /// How many windows were opened so far.
    pub fn tried(&self) -> u32 {
        self.tried.get()
    }

    /// Counts a hit that the test has seen for itself.
    pub fn count(&self) {
        self.hits.set(self.hits.get() + 1);
    }
}

/// A place where threads are made to wait. They go on when it is dropped.
#[derive(Debug)]
pub struct Window<'a> {
    hits: &'a Hits<'a>,
    place: &'static str,
    threads: u32,
    before: Row,
    open: bool,
}

impl Window<'_> {
    fn row(&self) -> Result<Row> {
        row(self.hits.ksm, self.place)
    }

    /// How many threads have come to the place.
    pub fn arrived(&self) -> Result<u32> {
        Ok(self.row()?.arrived - self.before.arrived)
    }

    /// Waits until all of the threads are there. Looks all the time, as some can wait for some milliseconds only.
    pub fn wait(&self) -> Result<()> {
        let start = Instant::now();
        while self.arrived()? < self.threads {
            ensure!(
                start.elapsed() < PATIENCE * slowness(),
                "only {} of {} threads have come to {}",
                self.arrived()?,
                self.threads,
                self.place
            );
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Waits until all of the threads are there, if that is soon.
    pub fn wait_a_little(&self) -> Result<bool> {
        let start = Instant::now();
        while self.arrived()? < self.threads {
            if start.elapsed() > Duration::from_secs(1) * slowness() {
                return Ok(false);
            }
            std::thread::yield_now();
        }
        Ok(true)
    }

    /// Whether all of them are still there.
    pub fn holds(&self) -> Result<bool> {
        Ok(self.row()?.left == self.before.left)
    }

    /// Something was done with the window open: counts that, unless the window has closed by itself before this is
    /// called. Then the threads go on.
    pub fn hit(mut self) -> Result<()> {
        ensure!(
            self.holds()?,
            "the window at {} closed too early",
            self.place
        );
        self.hits.count();
        self.close()
    }

    /// The threads go on by themselves or now; counts a hit if that was while something else went on too.
    pub fn hit_if_meanwhile(mut self, span: Span) -> Result<()> {
        self.close()?;
        let row = self.row()?;
        let (from, to) = (row.came, row.went);
        if span.overlaps(Span { from, to }) {
            self.hits.count();
        }
        Ok(())
    }

    /// Waits until the threads, which nothing keeps any more, have gone on.
    pub fn close(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.open) {
            return Ok(());
        }
        (self.hits.ksm).write_text(FILE, &format!("{} 0 0", self.place))?;
        let start = Instant::now();
        loop {
            let row = self.row()?;
            if row.arrived == row.left {
                return Ok(());
            }
            ensure!(
                start.elapsed() < PATIENCE * slowness(),
                "somebody still waits at {}: {row:?}",
                self.place
            );
            std::thread::yield_now();
        }
    }

    /// Lets the threads go without a file to look at afterwards, as the module may be gone then; counts a hit if they
    /// were all there until now.
    pub fn hit_and_forget(mut self) -> Result<()> {
        ensure!(
            self.holds()?,
            "the window at {} closed too early",
            self.place
        );
        self.hits.count();
        self.open = false;
        (self.hits.ksm).write_text(FILE, &format!("{} 0 0", self.place))
    }
}

impl Drop for Window<'_> {
    fn drop(&mut self) {
        if self.open && self.hits.ksm.exists() {
            let _ = (self.hits.ksm).write_text(FILE, &format!("{} 0 0", self.place));
        }
    }
}

/// How many more rounds are made than must be hits, where nobody can make sure of them.
const PATIENT: u32 = 5;

/// How many rounds a test makes.
pub fn rounds() -> u32 {
    if checks_itself() { 12 } else { 50 }
}
