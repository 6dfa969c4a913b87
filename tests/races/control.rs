//! Whoever writes to the files, against the threads that scan.

use std::time::Duration;

use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::delays::Hits;
use ksm_e2e::delays::Window;
use ksm_e2e::delays::rounds;
use ksm_e2e::ksm::Counters;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;

use crate::stage::CONTENT;
use crate::stage::OTHER;
use crate::stage::Witnesses;
use crate::stage::advise;
use crate::stage::newcomer;
use crate::stage::quiet;
use crate::stage::scan_briskly;

ksm_e2e::tests![
    stopping_against_batches_of_many_threads,
    unmerging_against_batches_of_many_threads,
    two_threads_against_each_other,
    knobs_against_a_merge,
    fewer_threads_against_batches,
];

/// How long the windows of several threads stay open at the most.
const LONG: Duration = Duration::from_secs(15);

/// How long something is watched that must not happen.
const WHILE: Duration = Duration::from_millis(20);

const THREADS: u32 = 3;
const PAGES: usize = 20;

/// More processes than there are threads, all with the same pages.
struct Crowd(Vec<(Child, Region)>);

impl Crowd {
    fn new() -> Result<Self> {
        let mut members = Vec::new();
        for _ in 0..THREADS + 2 {
            let mut child = Child::spawn()?;
            members.push((child.map_mergeable(PAGES, Content::Distinct(50))?, child));
        }
        Ok(Self(
            members
                .into_iter()
                .map(|(region, child)| (child, region))
                .collect(),
        ))
    }

    fn merged(&self) -> Counters {
        let pages = PAGES as u64;
        Counters::merged(pages, (self.0.len() as u64 - 1) * pages)
    }

    fn verify(&mut self) -> Result<()> {
        for (child, region) in &mut self.0 {
            child.verify(*region, Content::Distinct(50))?;
        }
        Ok(())
    }
}

/// Waits until all threads are in a batch. At the end of a pass there may be too little left for all of them: then once
/// more.
fn all_in_a_batch<'a>(hits: &'a Hits<'_>, place: &'static str, threads: u32) -> Result<Window<'a>> {
    loop {
        let mut window = hits.hold_all(place, threads, LONG)?;
        if window.wait_a_little()? {
            return Ok(window);
        }
        ensure!(
            hits.tried() < 20 * rounds(),
            "there is never a batch for all threads"
        );
        window.close()?;
    }
}

fn stopping_against_batches_of_many_threads(ksm: &Ksm) -> Result<()> {
    const AN_HOUR: u64 = 3_600_000;
    let hits = Hits::none(ksm);
    ksm.write("scan_threads", THREADS.into())?;
    ksm.write("pages_to_scan", 100_000)?;
    let mut crowd = Crowd::new()?;
    for round in 0..rounds() {
        // One pass, in which all pages are seen for the first time.
        ksm.unmerge()?;
        let passes = ksm.read("full_scans")?;
        ksm.write("sleep_millisecs", AN_HOUR)?;
        ksm.start()?;
        wait::until("the first pass is over", PATIENCE, || {
            Ok(ksm.read("full_scans")? > passes)
        })?;
        // In the next one they would be merged.
        let window = hits.hold_all(["read", "gathered"][round as usize % 2], THREADS, LONG)?;
        // A new sleeping time ends the sleep, once it has begun.
        let mut longer = 0;
        loop {
            longer += 1;
            ksm.write("sleep_millisecs", AN_HOUR + longer)?;
            if window.wait_a_little()? {
                break;
            }
            ensure!(longer < 60, "the next pass does not begin");
        }
        ksm.stop()?;
        let before = ksm.counters()?;
        ensure!(
            before.shared == 0,
            "something was merged by threads that wait: {before}"
        );
        window.hit()?;
        wait::while_holds(WHILE, || ksm.expect(before))?;
        crowd.verify()?;
    }
    scan_briskly(ksm)?;
    ksm.start()?;
    ksm.scan_until(crowd.merged())?;
    crowd.verify()?;
    hits.expect(rounds())
}

fn unmerging_against_batches_of_many_threads(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    ksm.write("scan_threads", THREADS.into())?;
    scan_briskly(ksm)?;
    let mut crowd = Crowd::new()?;
    for round in 0..rounds() {
        ksm.start()?;
        ksm.scan_until(crowd.merged())?;
        // Something to merge is in the batches.
        let (child, region) = &mut crowd.0[0];
        child.fill(*region, Content::Distinct(50))?;
        let place = ["read", "gathered"][round as usize % 2];
        let window = all_in_a_batch(&hits, place, THREADS)?;
        ksm.unmerge()?;
        ksm.expect(Counters::merged(0, 0))?;
        if round % 4 < 2 {
            // What the threads hold is out of date though scanning goes on.
            ksm.start()?;
            window.hit()?;
            ksm.scan_until(crowd.merged())?;
            ksm.unmerge()?;
        } else {
            window.hit()?;
        }
        wait::while_holds(WHILE, || ksm.expect(Counters::merged(0, 0)))?;
        for (child, region) in &crowd.0 {
            ensure!(child.ksm_pages(*region)? == 0, "pages are merged");
        }
        crowd.verify()?;
    }
    hits.expect(rounds())
}

fn two_threads_against_each_other(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    ksm.write("scan_threads", 2)?;
    scan_briskly(ksm)?;
    let (mut one, here) = newcomer(OTHER)?;
    let (mut other, there) = newcomer(OTHER)?;
    advise(&mut one, here)?;
    advise(&mut other, there)?;
    ksm.start()?;
    for round in 0..rounds() {
        // Each has read one of two pages that are equal.
        let content = Content::Same(100 + u64::from(round));
        one.fill(here, content)?;
        other.fill(there, content)?;
        all_in_a_batch(&hits, "read", 2)?.hit()?;
        ksm.scan_until(Counters::merged(1, 1))?;
        quiet(ksm)?;
        ensure!(
            one.pfns(here)? == other.pfns(there)?,
            "the processes map different pages"
        );
        one.verify(here, content)?;
        other.verify(there, content)?;
    }
    hits.expect(rounds())
}

/// Settings that decide what may be merged with what, while a merge is under way.
fn knobs_against_a_merge(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let mut witnesses = Witnesses::begin(ksm)?;
    let mut writer = Child::spawn()?;
    let (mut child, region) = newcomer(OTHER)?;
    advise(&mut child, region)?;
    for round in 0..rounds() {
        let place = ["mapped", "replacing"][round as usize % 2];
        let (file, text, done) = [
            ("max_page_sharing", "2", false),
            ("merge_across_nodes", "0", false),
            ("run", "2", true),
            ("scan_threads", "4", true),
            ("use_zero_pages", "1", true),
        ][round as usize % 5];
        let window = hits.hold(place)?;
        child.fill(region, CONTENT)?;
        window.wait()?;
        writer.begin_write_file(ksm.dir().join(file), text)?;
        wait::while_holds(WHILE / 4, || Ok(()))?;
        window.hit()?;
        let answer = writer.finish_write()?;
        ensure!(
            answer.is_ok() == done,
            "{file}={text} at {place}: {answer:?}"
        );
        if file == "run" {
            ksm.expect(Counters::merged(0, 0))?;
            ensure!(child.ksm_pages(region)? == 0, "a page is merged");
            child.verify(region, CONTENT)?;
            ksm.start()?;
        }
        ksm.write("scan_threads", 1)?;
        ksm.write("use_zero_pages", 0)?;
        witnesses.share_with(ksm, &mut [(&mut child, region)])?;
    }
    hits.expect(rounds())?;
    drop(child);
    witnesses.end(ksm)
}

fn fewer_threads_against_batches(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    scan_briskly(ksm)?;
    let mut crowd = Crowd::new()?;
    let mut writer = Child::spawn()?;
    for round in 0..rounds() {
        ksm.write("scan_threads", THREADS.into())?;
        ksm.start()?;
        let place = ["read", "gathered"][round as usize % 2];
        let window = all_in_a_batch(&hits, place, THREADS)?;
        writer.begin_write_file(ksm.dir().join("scan_threads"), "1")?;
        wait::while_holds(WHILE / 4, || {
            ensure!(!writer.answered()?, "a thread was stopped in its batch");
            Ok(())
        })?;
        window.hit()?;
        writer.finish_write()??;
        ksm.scan_until(crowd.merged())?;
        crowd.verify()?;
        ksm.unmerge()?;
    }
    hits.expect(rounds())
}
