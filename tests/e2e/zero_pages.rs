//! Empty pages, and `use_zero_pages`.

use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Passes;
use ksm_e2e::Region;
use ksm_e2e::ksm::Counters;
use ksm_e2e::procfs;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;
use ksm_e2e::zero_pages;

ksm_e2e::tests![
    every_page_of_zeroes_becomes_one_page,
    empty_pages_become_the_zero_page,
    the_zero_page_is_for_empty_pages_only,
    a_write_takes_one_zero_page_away,
    unmapping_and_moving_take_zero_pages_away,
    unmergeable_advice_takes_zero_pages_away,
    zero_pages_are_inherited_and_go_with_the_process,
    run_2_takes_all_zero_pages_away,
    zero_pages_can_be_had_and_given_up_at_any_time,
    a_merged_empty_page_stays_merged,
];

const PAGES: usize = 32;

fn every_page_of_zeroes_becomes_one_page(ksm: &Ksm) -> Result<()> {
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(32, Content::Zero)?;
    let there = other.map_mergeable(32, Content::Zero)?;
    ksm.merge_until(Counters::merged(1, 63))?;
    ensure!(
        one.ksm_pages(here)? == 32,
        "zeroes are not shown as KSM pages"
    );
    ensure!(
        ksm.read("ksm_zero_pages")? == 0,
        "zero pages are counted, though they are not wanted"
    );
    one.verify(here, Content::Zero)?;
    other.verify(there, Content::Zero)
}

/// Two processes whose empty pages have become the zero page; scanning rests.
struct Pair {
    one: Child,
    here: Region,
    other: Child,
    there: Region,
}

impl Pair {
    fn of_zero_pages(ksm: &Ksm) -> Result<Self> {
        ksm.write("use_zero_pages", 1)?;
        let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
        let here = one.map_mergeable(PAGES, Content::Zero)?;
        let there = other.map_mergeable(PAGES, Content::Zero)?;
        replace_all(ksm, 2 * PAGES)?;
        let pair = Self {
            one,
            here,
            other,
            there,
        };
        pair.expect(ksm, PAGES, PAGES)?;
        Ok(pair)
    }

    fn expect(&self, ksm: &Ksm, here: usize, there: usize) -> Result<()> {
        zero_pages::expect(ksm, &[(&self.one, here), (&self.other, there)])
    }
}

/// Scans until there are so many mappings of the zero page.
fn replace_all(ksm: &Ksm, wanted: usize) -> Result<()> {
    ksm.start()?;
    wait::until_or_explain("the empty pages are replaced", PATIENCE, || {
        let seen = ksm.read("ksm_zero_pages")?;
        Ok((seen != wanted as u64).then(|| format!("{seen} of {wanted}")))
    })?;
    ksm.stop()
}

fn empty_pages_become_the_zero_page(ksm: &Ksm) -> Result<()> {
    let Pair {
        mut one,
        here,
        mut other,
        there,
    } = Pair::of_zero_pages(ksm)?;
    for (child, region) in [(&one, here), (&other, there)] {
        ensure!(
            zero_pages::of(child, region)? == PAGES,
            "not all empty pages are the zero page"
        );
        ensure!(
            procfs::ksm_merging_pages(child.pid())? == 0,
            "zero pages count as merged pages"
        );
    }
    // The zero page is no page to look at: nothing is known of any of them after a pass.
    ksm.merge_until(Counters::merged(0, 0))?;
    ensure!(
        procfs::ksm_stat(one.pid(), "ksm_rmap_items")? == 0,
        "zero pages are tracked"
    );
    zero_pages::expect(ksm, &[(&one, PAGES), (&other, PAGES)])?;
    let profit = ksm.read_signed("general_profit")?;
    ensure!(
        profit == (2 * PAGES * 4096) as i64,
        "general_profit is {profit} with {} zero pages and nothing else",
        2 * PAGES
    );
    let profit = procfs::ksm_stat(one.pid(), "ksm_process_profit")?;
    ensure!(
        profit == (PAGES * 4096) as u64,
        "ksm_process_profit is {profit} with {PAGES} zero pages and nothing else"
    );
    one.verify(here, Content::Zero)?;
    other.verify(there, Content::Zero)
}

fn the_zero_page_is_for_empty_pages_only(ksm: &Ksm) -> Result<()> {
    ksm.write("use_zero_pages", 1)?;
    let mut child = Child::spawn()?;
    let region = child.map_mergeable(PAGES, Content::Zero)?;
    // Pages with one byte in them, at the beginning, at the end, and in the middle.
    let bytes = [(3, 0), (4, 4095), (5, 2048), (6, 8), (7, 4088)];
    for (page, offset) in bytes {
        child.write(region.page(page) + offset, b"!")?;
    }
    replace_all(ksm, PAGES - bytes.len())?;
    ksm.scan_passes(3)?;
    zero_pages::expect(ksm, &[(&child, PAGES - bytes.len())])?;
    let zero = Content::Zero.page(0);
    let mut wanted = Content::Zero.checksums(PAGES);
    for (page, offset) in bytes {
        wanted[page] = zero.clone().with_byte(offset, b'!').checksum();
        ensure!(
            zero_pages::of(&child, region.part(page, 1))? == 0,
            "page {page} is not empty, but the zero page"
        );
    }
    ensure!(child.checksums(region)? == wanted, "the pages have changed");
    Ok(())
}

fn a_write_takes_one_zero_page_away(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::of_zero_pages(ksm)?;
    pair.one.verify(pair.here, Content::Zero)?;
    pair.expect(ksm, PAGES, PAGES)?;
    for written in 1..4 {
        let new = pair.here.part(0, written);
        pair.one.fill(new, Content::Distinct(1))?;
        pair.expect(ksm, PAGES - written, PAGES)?;
        ensure!(
            zero_pages::of(&pair.one, pair.here)? == PAGES - written,
            "a page that was written to is still the zero page"
        );
        pair.one.verify(new, Content::Distinct(1))?;
    }
    // A write of nothing but zeroes is a write.
    pair.one.fill(pair.here.part(3, 1), Content::Zero)?;
    pair.expect(ksm, PAGES - 4, PAGES)?;
    pair.one
        .verify(pair.here.part(3, PAGES - 3), Content::Zero)?;
    pair.other.verify(pair.there, Content::Zero)?;
    // What is empty again is replaced again.
    pair.one.fill(pair.here, Content::Zero)?;
    pair.expect(ksm, 0, PAGES)?;
    replace_all(ksm, 2 * PAGES)?;
    pair.expect(ksm, PAGES, PAGES)
}

fn unmapping_and_moving_take_zero_pages_away(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::of_zero_pages(ksm)?;
    pair.one.munmap(pair.here.part(0, 5))?;
    pair.expect(ksm, PAGES - 5, PAGES)?;
    pair.one.advise(pair.here.part(5, 4), libc::MADV_DONTNEED)?;
    pair.expect(ksm, PAGES - 9, PAGES)?;
    // An area that is moved is unmerged before.
    let rest = pair.here.part(9, PAGES - 9);
    let grown = pair.one.remap(rest, PAGES + 50, libc::MREMAP_MAYMOVE, 0)?;
    ensure!(grown.addr != rest.addr, "the area was not moved");
    pair.expect(ksm, 0, PAGES)?;
    let moved = grown.part(0, rest.pages);
    pair.one.verify(moved, Content::Zero)?;
    replace_all(ksm, 2 * PAGES - 9)?;
    pair.expect(ksm, PAGES - 9, PAGES)?;
    pair.one.verify(moved, Content::Zero)
}

fn unmergeable_advice_takes_zero_pages_away(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::of_zero_pages(ksm)?;
    let part = pair.here.part(8, 16);
    pair.one.advise(part, libc::MADV_UNMERGEABLE)?;
    pair.expect(ksm, PAGES - 16, PAGES)?;
    ensure!(
        zero_pages::of(&pair.one, part)? == 0,
        "zero pages are left where nothing is to be merged"
    );
    ensure!(
        zero_pages::of(&pair.one, pair.here)? == PAGES - 16,
        "zero pages outside the part are gone"
    );
    ksm.scan_passes(3)?;
    pair.expect(ksm, PAGES - 16, PAGES)?;
    pair.one.verify(pair.here, Content::Zero)?;
    pair.other.verify(pair.there, Content::Zero)
}

fn zero_pages_are_inherited_and_go_with_the_process(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::of_zero_pages(ksm)?;
    let mut child = pair.one.fork()?;
    let counts = |ksm, pair: &Pair, child: &Child, wanted: [usize; 3]| {
        let [here, there, childs] = wanted;
        zero_pages::expect(
            ksm,
            &[(&pair.one, here), (&pair.other, there), (child, childs)],
        )
    };
    counts(ksm, &pair, &child, [PAGES, PAGES, PAGES])?;
    child.fill(pair.here.part(0, 7), Content::Distinct(1))?;
    counts(ksm, &pair, &child, [PAGES, PAGES, PAGES - 7])?;
    pair.one.fill(pair.here.part(0, 2), Content::Distinct(1))?;
    counts(ksm, &pair, &child, [PAGES - 2, PAGES, PAGES - 7])?;
    ksm.scan_passes(2)?;
    counts(ksm, &pair, &child, [PAGES - 2, PAGES, PAGES - 7])?;
    pair.one
        .verify(pair.here.part(2, PAGES - 2), Content::Zero)?;
    child.verify(pair.here.part(7, PAGES - 7), Content::Zero)?;
    let Pair { one, other, .. } = pair;
    one.exit()?;
    let gone = |wanted: u64| {
        wait::until("the process's pages are gone", PATIENCE, || {
            Ok(ksm.read("ksm_zero_pages")? == wanted)
        })
    };
    gone((PAGES + PAGES - 7) as u64)?;
    zero_pages::expect(ksm, &[(&other, PAGES), (&child, PAGES - 7)])?;
    child.kill()?;
    gone(PAGES as u64)?;
    other.kill()?;
    gone(0)
}

fn run_2_takes_all_zero_pages_away(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::of_zero_pages(ksm)?;
    let mut child = pair.one.fork()?;
    ksm.unmerge()?;
    zero_pages::expect(ksm, &[(&pair.one, 0), (&pair.other, 0), (&child, 0)])?;
    for (child, region) in [
        (&mut pair.one, pair.here),
        (&mut pair.other, pair.there),
        (&mut child, pair.here),
    ] {
        ensure!(
            zero_pages::of(child, region)? == 0,
            "run=2 has left zero pages in process {}",
            child.pid()
        );
        child.verify(region, Content::Zero)?;
    }
    replace_all(ksm, 3 * PAGES)?;
    zero_pages::expect(
        ksm,
        &[(&pair.one, PAGES), (&pair.other, PAGES), (&child, PAGES)],
    )?;
    child.verify(pair.here, Content::Zero)
}

fn zero_pages_can_be_had_and_given_up_at_any_time(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::of_zero_pages(ksm)?;
    ksm.write("use_zero_pages", 0)?;
    // Those that are there stay; new empty pages are pages like others.
    let more = pair.one.map_mergeable(8, Content::Zero)?;
    ksm.merge_until(Counters::merged(1, 7))?;
    pair.expect(ksm, PAGES, PAGES)?;
    ensure!(
        pair.one.ksm_pages(more)? == 8,
        "empty pages are not merged with each other"
    );
    ksm.write("use_zero_pages", 1)?;
    let again = pair.other.map_mergeable(8, Content::Zero)?;
    replace_all(ksm, 2 * PAGES + 8)?;
    pair.expect(ksm, PAGES, PAGES + 8)?;
    ensure!(
        zero_pages::of(&pair.other, again)? == 8,
        "empty pages are not replaced again"
    );
    pair.one.verify(more, Content::Zero)?;
    pair.other.verify(again, Content::Zero)
}

fn a_merged_empty_page_stays_merged(ksm: &Ksm) -> Result<()> {
    let mut child = Child::spawn()?;
    let region = child.map_mergeable(PAGES, Content::Zero)?;
    let mut passes = Passes::of(ksm)?;
    passes.make(2)?;
    ksm.expect(Counters::merged(1, PAGES as u64 - 1))?;
    ksm.write("use_zero_pages", 1)?;
    passes.make(3)?;
    ksm.expect(Counters::merged(1, PAGES as u64 - 1))?;
    zero_pages::expect(ksm, &[(&child, 0)])?;
    child.verify(region, Content::Zero)
}
