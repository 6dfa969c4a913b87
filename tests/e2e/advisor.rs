//! `advisor_mode`: the scan time advisor, which sets `pages_to_scan`.

use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Passes;
use ksm_e2e::ksm_events::Trace;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;
use nix::errno::Errno;

ksm_e2e::tests![
    a_mode_brings_its_own_pages_to_scan,
    pages_to_scan_is_the_advisors_while_it_is_on,
    fast_passes_raise_pages_to_scan_to_the_maximum,
    a_lower_maximum_counts_at_the_next_pass,
    the_minimum_is_kept,
    slow_passes_raise_pages_to_scan_within_the_cpu_s_share,
];

fn expect_pages_to_scan(ksm: &Ksm, wanted: u64) -> Result<()> {
    let seen = ksm.read("pages_to_scan")?;
    ensure!(
        seen == wanted,
        "pages_to_scan is {seen} instead of {wanted}"
    );
    Ok(())
}

fn a_mode_brings_its_own_pages_to_scan(ksm: &Ksm) -> Result<()> {
    let mode = |wanted: &str| -> Result<()> {
        let seen = ksm.text("advisor_mode")?;
        ensure!(seen == wanted, "advisor_mode is {seen:?}");
        Ok(())
    };
    ksm.write("pages_to_scan", 4321)?;
    mode("[none] scan-time\n")?;
    // The mode that it is in already changes nothing.
    ksm.write_text("advisor_mode", "none")?;
    expect_pages_to_scan(ksm, 4321)?;
    for minimum in [500, 777] {
        ksm.write("advisor_min_pages_to_scan", minimum)?;
        ksm.write_text("advisor_mode", "scan-time")?;
        mode("none [scan-time]\n")?;
        expect_pages_to_scan(ksm, minimum)?;
        ksm.write("advisor_min_pages_to_scan", 555)?;
        ksm.write_text("advisor_mode", "scan-time")?;
        expect_pages_to_scan(ksm, minimum)?;
        ksm.write_text("advisor_mode", "none")?;
        mode("[none] scan-time\n")?;
        expect_pages_to_scan(ksm, 100)?;
    }
    Ok(())
}

fn pages_to_scan_is_the_advisors_while_it_is_on(ksm: &Ksm) -> Result<()> {
    ksm.write_text("advisor_mode", "scan-time")?;
    for text in ["1000", "500", "0", "x", ""] {
        let result = ksm.write_bytes("pages_to_scan", format!("{text}\n").as_bytes());
        ensure!(
            result == Err(Errno::EINVAL),
            "writing {text:?} to pages_to_scan: {result:?}"
        );
        expect_pages_to_scan(ksm, 500)?;
    }
    ksm.write_text("advisor_mode", "none")?;
    ksm.write("pages_to_scan", 1000)?;
    expect_pages_to_scan(ksm, 1000)
}

/// The advisor at work on a few pages: its knobs, what it remembers, and the law by which it goes.
struct Work<'a> {
    ksm: &'a Ksm,
    passes: Passes<'a>,
    trace: Trace,
    target: u64,
    max_cpu: u64,
    min: u64,
    max: u64,
    scan_time: u64,
    change: u64,
}

impl<'a> Work<'a> {
    /// Turns the advisor on with these limits.
    fn start(ksm: &'a Ksm, target: u64, max_cpu: u64, min: u64, max: u64) -> Result<Self> {
        let passes = Passes::of(ksm)?;
        ksm.write("advisor_target_scan_time", target)?;
        ksm.write("advisor_max_cpu", max_cpu)?;
        ksm.write("advisor_min_pages_to_scan", min)?;
        ksm.write("advisor_max_pages_to_scan", max)?;
        ksm.write_text("advisor_mode", "scan-time")?;
        expect_pages_to_scan(ksm, min)?;
        Ok(Self {
            ksm,
            passes,
            trace: Trace::of(ksm, &["advisor"])?,
            target,
            max_cpu,
            min,
            max,
            scan_time: 0,
            change: 0,
        })
    }

    fn set(&mut self, min: u64, max: u64) -> Result<()> {
        (self.min, self.max) = (min, max);
        self.ksm.write("advisor_min_pages_to_scan", min)?;
        self.ksm.write("advisor_max_pages_to_scan", max)
    }

    /// Makes a pass and checks what the advisor made of it.
    fn pass(&mut self) -> Result<u64> {
        let before = self.ksm.read("pages_to_scan")?;
        let passes = self.ksm.read("full_scans")?;
        // Of several turns, perhaps: stock's first advice charges the pass with all that its thread ever did.
        while self.ksm.read("full_scans")? == passes {
            self.passes.turn()?;
        }
        self.check(before)
    }

    /// Checks what the advisor made of the pass that has just ended, with `before` pages between two sleeps. Returns
    /// what it would be but for the most of a CPU.
    fn check(&mut self, before: u64) -> Result<u64> {
        let events = self.trace.events()?;
        ensure!(events.len() == 1, "events of one pass: {events:?}");
        let event = &events[0];
        let scan_time: u64 = event.number("scan time")?;
        let cpu: u64 = event.number("cpu percent")?;
        ensure!(
            scan_time >= 1 && cpu >= 1,
            "no pass takes nothing: {event:?}"
        );

        let last = if self.scan_time == 0 {
            scan_time
        } else {
            self.scan_time
        };
        let change = (70 * self.change + 30 * (scan_time * 100 / last)) / 100;
        let factor = (self.target * 100 / scan_time).max(1);
        let per_percent = (before / cpu).max(1);
        // Stock goes by the minimum when it begins, and never again.
        let min = if self.ksm.is_stock() { 0 } else { self.min };
        let wanted = before * 100 / factor * change / 100;
        let bounded = |most: u64| {
            (wanted.min(most))
                .max(per_percent * 10)
                .max(min)
                .min(self.max)
        };
        let law = bounded(per_percent * self.max_cpu);
        let said: u64 = event.number("pages_to_scan")?;
        ensure!(
            said == law,
            "the advisor says {said} instead of {law}: {event:?} after {before} with a change of {change} %"
        );
        expect_pages_to_scan(self.ksm, law)?;
        let unbounded = bounded(u64::MAX);
        (self.scan_time, self.change) = (scan_time, change);
        Ok(unbounded)
    }
}

fn few_pages() -> Result<Child> {
    let mut child = Child::spawn()?;
    child.map_mergeable(64, Content::Distinct(1))?;
    Ok(child)
}

fn fast_passes_raise_pages_to_scan_to_the_maximum(ksm: &Ksm) -> Result<()> {
    let _child = few_pages()?;
    let mut work = Work::start(ksm, 200, 70, 500, 30_000)?;
    // Tenfold each time, as 10 % of a CPU are always allowed; less if the machine is so slow that a pass takes
    // several percent.
    wait::until_or_explain("the maximum is reached", PATIENCE, || {
        work.pass()?;
        let now = ksm.read("pages_to_scan")?;
        Ok((now != 30_000).then(|| format!("pages_to_scan is {now}")))
    })?;
    for _ in 0..3 {
        work.pass()?;
        expect_pages_to_scan(ksm, 30_000)?;
    }
    // It begins anew when it is turned on anew.
    ksm.write_text("advisor_mode", "none")?;
    work.passes.pass()?;
    expect_pages_to_scan(ksm, 100)?;
    ensure!(
        work.trace.events()?.is_empty(),
        "advice from an advisor that is off"
    );
    ksm.write_text("advisor_mode", "scan-time")?;
    expect_pages_to_scan(ksm, 500)?;
    (work.scan_time, work.change) = (0, 0);
    work.pass()?;
    work.pass().map(drop)
}

fn a_lower_maximum_counts_at_the_next_pass(ksm: &Ksm) -> Result<()> {
    let _child = few_pages()?;
    let mut work = Work::start(ksm, 200, 70, 500, 30_000)?;
    work.pass()?;
    for max in [900, 450, 200, 30_000] {
        let before = ksm.read("pages_to_scan")?;
        work.set(100, max)?;
        expect_pages_to_scan(ksm, before)?;
        work.pass()?;
        let now = ksm.read("pages_to_scan")?;
        ensure!(now <= max, "pages_to_scan is {now} of {max} at the most");
    }
    Ok(())
}

fn the_minimum_is_kept(ksm: &Ksm) -> Result<()> {
    let _child = few_pages()?;
    let mut work = Work::start(ksm, 200, 70, 100, 30_000)?;
    work.pass()?;
    // More than ten times as many.
    work.set(20_000, 30_000)?;
    work.pass()?;
    if !ksm.is_stock() {
        expect_pages_to_scan(ksm, 20_000)?;
    }
    // The maximum has the last word.
    work.set(20_000, 300)?;
    work.pass()?;
    let now = ksm.read("pages_to_scan")?;
    ensure!(now <= 300, "pages_to_scan is {now} of 300 at the most");
    Ok(())
}

/// How long a slow pass takes, in milliseconds.
const SLOW: u64 = 6300;

fn slow_passes_raise_pages_to_scan_within_the_cpu_s_share(ksm: &Ksm) -> Result<()> {
    let _child = few_pages()?;
    // A target of a second, missed by several: many more pages than the share that is always allowed comes to.
    let mut work = Work::start(ksm, 1, 100, 70, 30_000)?;
    work.pass()?;
    work.pass()?;
    let few = 20;
    let slow_pass = |work: &mut Work| -> Result<u64> {
        work.set(few, few)?;
        work.pass()?;
        expect_pages_to_scan(ksm, few)?;
        work.set(few, 30_000)?;
        let begun = Instant::now();
        work.passes.turn()?;
        wait::until("the pass is a slow one", PATIENCE, || {
            Ok(begun.elapsed() > Duration::from_millis(SLOW))
        })?;
        let passes = ksm.read("full_scans")?;
        while ksm.read("full_scans")? == passes {
            work.passes.turn()?;
        }
        work.check(few).context("after a slow pass")
    };
    let unbounded = slow_pass(&mut work)?;
    let now = ksm.read("pages_to_scan")?;
    ensure!(
        now == unbounded && now > 10 * few,
        "pages_to_scan is {now}, which neither the time nor its change has to do with"
    );
    work.max_cpu = 11;
    ksm.write("advisor_max_cpu", work.max_cpu)?;
    let unbounded = slow_pass(&mut work)?;
    let now = ksm.read("pages_to_scan")?;
    ensure!(
        now < unbounded,
        "pages_to_scan is {now}, which the CPU's share has nothing to do with"
    );
    Ok(())
}
