//! Suspending the system while pages are merged.

use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::freezer::Freezer;
use ksm_e2e::ksm::Counters;
use ksm_e2e::trace::Trace;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;

ksm_e2e::tests![
    nothing_is_scanned_while_the_system_is_suspended,
    suspending_does_not_wait_for_a_pass,
    the_thread_freezes_whatever_it_waits_for,
];

const CONTENT: Content = Content::Distinct(1);

/// So many pages that a pass takes a while.
const MANY: usize = 8192;

fn thread_name(ksm: &Ksm) -> &'static str {
    if ksm.is_stock() { "ksmd" } else { "ksmd_rs" }
}

/// Scans as fast as can be, in turns that only the end of a pass ends.
fn scan_flat_out(ksm: &Ksm) -> Result<()> {
    ksm.write("pages_to_scan", 1_000_000_000)?;
    // Without any sleep stock's thread does not freeze at all.
    ksm.write("sleep_millisecs", u64::from(ksm.is_stock()))
}

/// Fails unless the trace has the thread switched off from the moment when all tasks were frozen to that when they
/// were thawed.
fn expect_asleep(trace: &Trace, thread: &str) -> Result<()> {
    let lines = trace.lines()?;
    let find = |what: &str| lines.iter().position(|line| line.contains(what));
    let frozen = find("freeze_processes[0] end").context("no task was frozen")?;
    let thawed = find("thaw_processes[0] begin").context("no task was thawed")?;
    let on = format!("next_comm={thread} ");
    let off = format!("prev_comm={thread} ");
    let last = lines[..frozen]
        .iter()
        .rev()
        .find(|line| line.contains("sched_switch"));
    ensure!(
        last.is_some_and(|line| line.contains(&off)),
        "the thread was not switched off by the time that all tasks were frozen: {last:?}"
    );
    let run: Vec<&String> = lines[frozen..thawed]
        .iter()
        .filter(|line| line.contains(&on))
        .collect();
    ensure!(run.is_empty(), "the thread ran when frozen: {run:#?}");
    ensure!(
        lines[thawed..].iter().any(|line| line.contains(&on)),
        "the thread did not run after it was thawed"
    );
    Ok(())
}

fn nothing_is_scanned_while_the_system_is_suspended(ksm: &Ksm) -> Result<()> {
    let freezer = Freezer::new()?;
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(MANY, CONTENT)?;
    let there = other.map_mergeable(MANY, CONTENT)?;
    let all = MANY as u64;
    let thread = thread_name(ksm);
    scan_flat_out(ksm)?;
    // A fast machine may be done with it before tasks freeze.
    let mut attempts = 0;
    loop {
        attempts += 1;
        ensure!(
            attempts <= 20,
            "merging was never under way when tasks froze"
        );
        let trace = Trace::new()?;
        trace.event("power/suspend_resume", None)?;
        let filter = format!("prev_comm == \"{thread}\" || next_comm == \"{thread}\"");
        trace.event("sched/sched_switch", Some(&filter))?;
        ksm.start()?;
        wait::until("pages are being merged", PATIENCE, || {
            Ok(ksm.read("pages_sharing")? > 0)
        })?;
        freezer.freeze(1)?;
        let merged = ksm.read("pages_sharing")?;
        if merged < all {
            ksm.full_scans(1)?;
            expect_asleep(&trace, thread)?;
            break;
        }
        ksm.unmerge()?;
    }
    ksm.scan_until(Counters::merged(all, all))?;
    one.verify(here, CONTENT)?;
    other.verify(there, CONTENT)
}

fn suspending_does_not_wait_for_a_pass(ksm: &Ksm) -> Result<()> {
    let freezer = Freezer::new()?;
    let mut child = Child::spawn()?;
    let region = child.map_mergeable(4 * MANY, CONTENT)?;
    scan_flat_out(ksm)?;
    ksm.start()?;
    ksm.scan_until(Counters::merged(0, 0).and_unshared(4 * MANY as u64))?;
    let start = Instant::now();
    let passes = ksm.read("full_scans")?;
    ksm.full_scans(1)?;
    let pass = start.elapsed() / u32::try_from(ksm.read("full_scans")? - passes)?;
    // Somewhere in a pass. Where passes take no time, tasks take longer by themselves.
    let limit = (pass / 2).max(Duration::from_millis(50));
    for _ in 0..10 {
        let took = freezer.freeze(0)?;
        ensure!(
            took <= limit,
            "a pass takes {pass:?}; the thread took {took:?} to freeze"
        );
    }
    ksm.full_scans(1)?;
    child.verify(region, CONTENT)
}

fn the_thread_freezes_whatever_it_waits_for(ksm: &Ksm) -> Result<()> {
    let freezer = Freezer::new()?;
    let freeze = |what: &str| freezer.freeze(0).with_context(|| what.to_owned());
    freeze("stopped")?;
    ksm.start()?;
    freeze("nothing to scan")?;
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(64, CONTENT)?;
    let there = other.map_mergeable(64, CONTENT)?;
    ksm.merge_until(Counters::merged(64, 64))?;
    freeze("stopped, with pages merged")?;
    for sleep in [20, u64::from(ksm.is_stock())] {
        ksm.write("sleep_millisecs", sleep)?;
        ksm.start()?;
        let what = format!("{sleep} ms between two turns");
        freeze(&what)?;
        ksm.full_scans(1).context(what)?;
    }
    // Nor does it forget its work.
    ksm.write("sleep_millisecs", 3_600_000)?;
    freeze("a long sleep")?;
    other.fill(there, Content::Distinct(9000))?;
    other.fill(there, CONTENT)?;
    ksm.scan_fast()?;
    ksm.full_scans(1)?;
    ksm.scan_until(Counters::merged(64, 64))?;
    ensure!(
        other.pfns(there)? == one.pfns(here)?,
        "the processes map different pages"
    );
    one.verify(here, CONTENT)?;
    other.verify(there, CONTENT)?;
    ksm.unmerge()?;
    freeze("unmerged").map(drop)
}
