//! `smart_scan`: pages that could not be merged for several passes are looked at less often.

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Passes;
use ksm_e2e::Region;
use ksm_e2e::ksm::Counters;

ksm_e2e::tests![
    unique_pages_are_looked_at_ever_less_often,
    without_smart_scan_no_page_is_skipped,
    pages_that_change_are_skipped_as_well,
    pages_that_become_equal_are_merged_when_they_are_due,
    merged_pages_are_never_skipped,
    a_merged_page_that_is_written_to_starts_over,
    skipped_pages_do_not_use_up_pages_to_scan,
    smart_scan_can_be_turned_off_and_on,
    every_page_has_an_age_of_its_own,
    a_page_that_is_merged_just_when_it_would_be_left_out_stays_merged,
];

/// Whether a page is looked at that has been visited so many times before.
fn looks(visit: u64) -> bool {
    matches!(visit, 0..=3 | 5 | 8) || visit >= 13 && (visit - 13).is_multiple_of(9)
}

/// Passes with smart scan, one at a time, and what each of them did.
struct Visits<'a> {
    ksm: &'a Ksm,
    passes: Passes<'a>,
}

impl<'a> Visits<'a> {
    fn of(ksm: &'a Ksm) -> Result<Self> {
        ksm.write("smart_scan", 1)?;
        let passes = Passes::of(ksm)?;
        Ok(Self { ksm, passes })
    }

    /// Makes a pass, which must look at and skip exactly so many pages.
    fn expect(&mut self, looked: u64, skipped: u64) -> Result<()> {
        let counts = |ksm: &Ksm| -> Result<_> {
            Ok((ksm.read("pages_scanned")?, ksm.read("pages_skipped")?))
        };
        let before = counts(self.ksm)?;
        self.passes.pass()?;
        let now = counts(self.ksm)?;
        let seen = (now.0 - before.0, now.1 - before.1);
        ensure!(
            seen == (looked, skipped),
            "the pass has looked at {} pages and skipped {} instead of {looked} and {skipped}",
            seen.0,
            seen.1
        );
        Ok(())
    }

    /// Makes the passes of these visits of so many pages.
    fn expect_visits(&mut self, visits: std::ops::Range<u64>, pages: u64) -> Result<()> {
        for visit in visits {
            let looked = if looks(visit) { pages } else { 0 };
            self.expect(looked, pages - looked)
                .with_context(|| format!("on visit {visit}"))?;
        }
        Ok(())
    }
}

fn unique_pages_are_looked_at_ever_less_often(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(1);
    let mut child = Child::spawn()?;
    let region = child.map_mergeable(40, content)?;
    let mut visits = Visits::of(ksm)?;
    for visit in 0..50 {
        visits.expect_visits(visit..visit + 1, 40)?;
        // What is skipped is in no tree.
        let wanted = if looks(visit) && visit > 0 {
            Counters::merged(0, 0).and_unshared(40)
        } else {
            Counters {
                volatile: 40,
                ..Counters::merged(0, 0)
            }
        };
        ksm.expect(wanted)
            .with_context(|| format!("on visit {visit}"))?;
    }
    child.verify(region, content)
}

fn without_smart_scan_no_page_is_skipped(ksm: &Ksm) -> Result<()> {
    let mut child = Child::spawn()?;
    child.map_mergeable(40, Content::Distinct(1))?;
    let mut visits = Visits::of(ksm)?;
    ksm.write("smart_scan", 0)?;
    for _ in 0..16 {
        visits.expect(40, 0)?;
    }
    ksm.expect(Counters::merged(0, 0).and_unshared(40))
}

fn pages_that_change_are_skipped_as_well(ksm: &Ksm) -> Result<()> {
    let mut child = Child::spawn()?;
    let region = child.map_mergeable(16, Content::Distinct(0))?;
    let mut visits = Visits::of(ksm)?;
    for visit in 0..24 {
        visits.expect_visits(visit..visit + 1, 16)?;
        child.fill(region, Content::Distinct(100 * (visit + 1)))?;
    }
    Ok(())
}

fn pages_that_become_equal_are_merged_when_they_are_due(ksm: &Ksm) -> Result<()> {
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(8, Content::Distinct(1))?;
    let there = other.map_mergeable(8, Content::Distinct(1001))?;
    let mut visits = Visits::of(ksm)?;
    visits.expect_visits(0..7, 16)?;
    // On visit 8 they are seen to have changed, on visit 13 not to have changed since.
    other.fill(there, Content::Distinct(1))?;
    for visit in 7..13 {
        visits.expect_visits(visit..visit + 1, 16)?;
        ensure!(
            ksm.read("pages_shared")? == 0,
            "the pages are merged on visit {visit} already"
        );
    }
    visits.expect_visits(13..14, 16)?;
    ksm.expect(Counters::merged(8, 8))?;
    ensure!(
        one.pfns(here)? == other.pfns(there)?,
        "the processes map different pages"
    );
    one.verify(here, Content::Distinct(1))?;
    other.verify(there, Content::Distinct(1))
}

fn merged(
    ksm: &Ksm,
    visits: &mut Visits,
    content: Content,
) -> Result<(Child, Region, Child, Region)> {
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(8, content)?;
    let there = other.map_mergeable(8, content)?;
    visits.expect_visits(0..2, 16)?;
    ksm.expect(Counters::merged(8, 8))?;
    Ok((one, here, other, there))
}

fn merged_pages_are_never_skipped(ksm: &Ksm) -> Result<()> {
    let mut visits = Visits::of(ksm)?;
    let (mut one, here, other, there) = merged(ksm, &mut visits, Content::Distinct(1))?;
    for _ in 0..20 {
        visits.expect(16, 0)?;
    }
    // Nor are those of which one sharer is left.
    other.exit()?;
    for _ in 0..6 {
        visits.expect(8, 0)?;
    }
    ksm.expect(Counters::merged(8, 0))?;
    ensure!(here.pages == there.pages, "regions of one size");
    one.verify(here, Content::Distinct(1))
}

fn a_merged_page_that_is_written_to_starts_over(ksm: &Ksm) -> Result<()> {
    let mut visits = Visits::of(ksm)?;
    let (mut one, here, mut other, there) = merged(ksm, &mut visits, Content::Distinct(1))?;
    for _ in 0..5 {
        visits.expect(16, 0)?;
    }
    one.fill(here, Content::Distinct(2001))?;
    // The pass that finds them written does not make them older yet: to it they are merged pages.
    visits.expect(16, 0)?;
    for visit in 0..23 {
        let looked = if looks(visit) { 16 } else { 8 };
        visits
            .expect(looked, 16 - looked)
            .with_context(|| format!("on visit {visit} after the write"))?;
    }
    one.verify(here, Content::Distinct(2001))?;
    other.verify(there, Content::Distinct(1))
}

fn skipped_pages_do_not_use_up_pages_to_scan(ksm: &Ksm) -> Result<()> {
    let mut child = Child::spawn()?;
    child.map_mergeable(600, Content::Distinct(1))?;
    let mut visits = Visits::of(ksm)?;
    visits.expect_visits(0..4, 600)?;
    // All of them are skipped, in one turn of ten pages.
    ksm.write("pages_to_scan", 10)?;
    visits.expect_visits(4..5, 600)?;
    // None is skipped: ten are looked at.
    let (scanned, full) = (ksm.read("pages_scanned")?, ksm.read("full_scans")?);
    visits.passes.turn()?;
    let seen = ksm.read("pages_scanned")? - scanned;
    ensure!(seen == 10, "{seen} pages were looked at in one turn");
    ensure!(ksm.read("full_scans")? == full, "that was a whole pass");
    // The rest of that pass; then two passes that skip all, with another process's ten pages behind them.
    ksm.write("pages_to_scan", 600)?;
    visits.expect(590, 0)?;
    let mut other = Child::spawn()?;
    other.map_mergeable(10, Content::Distinct(5001))?;
    ksm.write("pages_to_scan", 11)?;
    visits.expect(10, 600)?;
    visits.expect(10, 600)
}

fn smart_scan_can_be_turned_off_and_on(ksm: &Ksm) -> Result<()> {
    let mut child = Child::spawn()?;
    child.map_mergeable(24, Content::Distinct(1))?;
    let mut visits = Visits::of(ksm)?;
    visits.expect_visits(0..10, 24)?;
    // Visits that do not count.
    ksm.write("smart_scan", 0)?;
    for _ in 0..7 {
        visits.expect(24, 0)?;
    }
    ksm.write("smart_scan", 1)?;
    visits.expect_visits(10..16, 24)
}

fn every_page_has_an_age_of_its_own(ksm: &Ksm) -> Result<()> {
    let mut child = Child::spawn()?;
    let mut visits = Visits::of(ksm)?;
    let mut ages = Vec::new();
    for pass in 0..24 {
        // One area more on every other pass.
        if pass < 16 && pass % 2 == 0 {
            child.map_mergeable(3, Content::Distinct(1 + 100 * pass))?;
            ages.push(0);
        }
        let looked = ages.iter().filter(|&&age| looks(age)).count() as u64;
        visits
            .expect(3 * looked, 3 * (ages.len() as u64 - looked))
            .with_context(|| format!("on pass {pass}"))?;
        for age in &mut ages {
            *age += 1;
        }
    }
    Ok(())
}

fn a_page_that_is_merged_just_when_it_would_be_left_out_stays_merged(ksm: &Ksm) -> Result<()> {
    if ksm.is_stock() {
        // It finds no page that it leaves out.
        return Ok(());
    }
    let content = Content::Distinct(1);
    let mut child = Child::spawn()?;
    let old = child.map_mergeable(4, content)?;
    ksm.write("smart_scan", 1)?;
    let mut passes = Passes::of(ksm)?;
    passes.make(3)?;
    // New pages at a lower address: they are looked at before the old ones of the same batch.
    let new = child.map_mergeable(4, content)?;
    ensure!(new.addr < old.addr, "the new pages are behind the old ones");
    passes.pass()?;
    ksm.expect(Counters {
        volatile: 4,
        ..Counters::merged(0, 0).and_unshared(4)
    })?;
    // The fifth visit of the old ones, which leaves them out, and the second one of the new ones.
    passes.pass()?;
    ksm.expect(Counters::merged(4, 4))?;
    child.verify(old, content)?;
    child.verify(new, content)
}
