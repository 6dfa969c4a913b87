//! Transparent huge pages.

use std::fs;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::ksm::Counters;
use ksm_e2e::memory::HUGE;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::PAGES_PER_HUGE;
use ksm_e2e::procfs;

ksm_e2e::tests![
    identical_huge_pages_are_split_and_merged,
    huge_pages_with_nothing_to_merge_stay_huge,
    a_single_common_page_splits_only_the_huge_page_it_is_in,
    equal_pages_inside_one_huge_page_merge,
    a_huge_page_shared_by_fork_merges_with_that_of_a_stranger,
];

const SETTINGS: &str = "/sys/kernel/mm/transparent_hugepage";
const COLLAPSE_PAUSE: &str = "/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs";

/// Huge pages to be had on advice, and none put together again behind the test's back, until this is dropped.
struct HugePages {
    enabled: String,
    pause: String,
}

impl HugePages {
    fn enable() -> Result<Self> {
        let enabled = format!("{SETTINGS}/enabled");
        let text =
            fs::read_to_string(&enabled).context("this test needs transparent huge pages")?;
        let chosen = text
            .split(['[', ']'])
            .nth(1)
            .context("nothing is chosen")?
            .to_owned();
        let pause = fs::read_to_string(COLLAPSE_PAUSE)?;
        fs::write(&enabled, "madvise")?;
        fs::write(COLLAPSE_PAUSE, "4294967295")?;
        Ok(Self {
            enabled: chosen,
            pause,
        })
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(format!("{SETTINGS}/enabled"), &self.enabled);
        let _ = fs::write(COLLAPSE_PAUSE, &self.pause);
    }
}

fn huge_pages_of(child: &Child, region: Region) -> Result<usize> {
    Ok(procfs::smaps_kb(child.pid(), region, "AnonHugePages")? as usize * 1024 / HUGE)
}

fn map_huge(child: &mut Child, count: usize, content: Content) -> Result<Region> {
    let region = child.map(Mapping::huge(count))?;
    child.fill(region, content)?;
    let huge = huge_pages_of(child, region)?;
    ensure!(
        huge == count,
        "the kernel gave {huge} huge pages instead of {count}; is there enough memory?"
    );
    child.advise(region, libc::MADV_MERGEABLE)?;
    Ok(region)
}

fn identical_huge_pages_are_split_and_merged(ksm: &Ksm) -> Result<()> {
    let _settings = HugePages::enable()?;
    let content = Content::Distinct(1);
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = map_huge(&mut one, 1, content)?;
    let there = map_huge(&mut other, 1, content)?;
    let pages = PAGES_PER_HUGE as u64;
    ksm.merge_until(Counters::merged(pages, pages))?;
    ensure!(
        huge_pages_of(&one, here)? == 0 && huge_pages_of(&other, there)? == 0,
        "a huge page was not split"
    );
    ensure!(
        one.pfns(here)? == other.pfns(there)?,
        "the processes map different pages"
    );
    one.verify(here, content)?;
    other.verify(there, content)?;
    ksm.unmerge()?;
    one.verify(here, content)?;
    other.verify(there, content)
}

fn huge_pages_with_nothing_to_merge_stay_huge(ksm: &Ksm) -> Result<()> {
    let _settings = HugePages::enable()?;
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = map_huge(&mut one, 2, Content::Distinct(1))?;
    let there = map_huge(&mut other, 1, Content::Distinct(100_000))?;
    ksm.start()?;
    ksm.full_scans(5)?;
    ksm.stop()?;
    ksm.expect(Counters::merged(0, 0).and_unshared(3 * PAGES_PER_HUGE as u64))?;
    ensure!(
        huge_pages_of(&one, here)? == 2 && huge_pages_of(&other, there)? == 1,
        "a huge page was split"
    );
    one.verify(here, Content::Distinct(1))?;
    other.verify(there, Content::Distinct(100_000))
}

fn a_single_common_page_splits_only_the_huge_page_it_is_in(ksm: &Ksm) -> Result<()> {
    let _settings = HugePages::enable()?;
    let content = Content::Distinct(1);
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = map_huge(&mut one, 2, content)?;
    let there = other.map_mergeable(1, content.from_page(100))?;
    let rest = 2 * PAGES_PER_HUGE as u64 - 1;
    ksm.merge_until(Counters::merged(1, 1).and_unshared(rest))?;
    ensure!(
        huge_pages_of(&one, here)? == 1,
        "{} huge pages are left of 2",
        huge_pages_of(&one, here)?
    );
    ensure!(
        one.pfns(here.part(100, 1))? == other.pfns(there)?,
        "the processes map different pages"
    );
    one.verify(here, content)?;
    other.verify(there, content.from_page(100))
}

fn equal_pages_inside_one_huge_page_merge(ksm: &Ksm) -> Result<()> {
    let _settings = HugePages::enable()?;
    let content = Content::Same(1);
    let mut child = Child::spawn()?;
    let region = map_huge(&mut child, 1, content)?;
    // No page may have more than 256 sharers.
    ksm.merge_until(Counters::merged(2, 510))?;
    ensure!(
        child.ksm_pages(region)? == PAGES_PER_HUGE,
        "pages are left that are not merged"
    );
    child.verify(region, content)
}

fn a_huge_page_shared_by_fork_merges_with_that_of_a_stranger(ksm: &Ksm) -> Result<()> {
    let _settings = HugePages::enable()?;
    let content = Content::Distinct(1);
    let (mut parent, mut stranger) = (Child::spawn()?, Child::spawn()?);
    let region = map_huge(&mut parent, 1, content)?;
    let mut child = parent.fork()?;
    let there = map_huge(&mut stranger, 1, content)?;
    let pages = PAGES_PER_HUGE as u64;
    ksm.merge_until(Counters::merged(pages, 2 * pages))?;
    child.fill(region.part(7, 1), Content::Same(77))?;
    child.verify(region.part(0, 7), content)?;
    child.verify(region.part(8, PAGES_PER_HUGE - 8), content.from_page(8))?;
    parent.verify(region, content)?;
    stranger.verify(there, content)
}
