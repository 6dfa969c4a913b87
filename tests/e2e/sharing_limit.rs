//! `max_page_sharing`, and the chains of pages with equal contents that come of it.

use std::collections::HashMap;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Passes;
use ksm_e2e::Region;
use ksm_e2e::ksm::Counters;
use ksm_e2e::procfs::Pfn;
use nix::errno::Errno;

ksm_e2e::tests![
    no_page_has_more_sharers_than_allowed,
    max_page_sharing_cannot_change_while_pages_are_shared,
    chains_and_dups_are_counted,
    new_sharers_fill_the_page_that_has_room,
    forks_may_exceed_the_limit_but_nobody_joins_them,
    dups_go_with_their_sharers,
    a_search_prunes_dups_that_are_gone,
    run_2_takes_chains_away_and_a_new_limit_holds,
];

const CONTENT: Content = Content::Same(5);

/// How many of these pages each physical page serves.
fn sharers(pages: &[(&Child, Region)]) -> Result<HashMap<Pfn, u32>> {
    let mut sharers = HashMap::new();
    for (child, region) in pages {
        for pfn in child.pfns(*region)? {
            *sharers.entry(pfn).or_insert(0) += 1;
        }
    }
    Ok(sharers)
}

fn expect_chains(ksm: &Ksm, chains: u64, dups: u64) -> Result<()> {
    let seen = (
        ksm.read("stable_node_chains")?,
        ksm.read("stable_node_dups")?,
    );
    ensure!(
        seen == (chains, dups),
        "chains and dups are {seen:?} instead of {:?}",
        (chains, dups)
    );
    Ok(())
}

fn no_page_has_more_sharers_than_allowed(ksm: &Ksm) -> Result<()> {
    ksm.write("max_page_sharing", 8)?;
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(25, CONTENT)?;
    let there = other.map_mergeable(25, CONTENT)?;
    // 50 = 6 * 8 + 2
    ksm.merge_until(Counters::merged(7, 43))?;
    let sharers = sharers(&[(&one, here), (&other, there)])?;
    ensure!(
        sharers.len() == 7,
        "there are {} pages instead of 7",
        sharers.len()
    );
    ensure!(
        sharers.values().all(|&sharers| sharers <= 8),
        "a page has too many sharers: {sharers:?}"
    );
    // It stays so.
    ksm.scan_passes(3)?;
    ksm.expect(Counters::merged(7, 43))?;
    one.verify(here, CONTENT)?;
    other.verify(there, CONTENT)
}

fn max_page_sharing_cannot_change_while_pages_are_shared(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(1);
    let mut child = Child::spawn()?;
    let (here, there) = (
        child.map_mergeable(8, content)?,
        child.map_mergeable(8, content)?,
    );
    ksm.merge_until(Counters::merged(8, 8))?;
    let value = ksm.read("max_page_sharing")?;
    let result = ksm.write_bytes("max_page_sharing", b"12");
    ensure!(
        result == Err(Errno::EBUSY),
        "changing max_page_sharing: {result:?}"
    );
    ensure!(
        ksm.read("max_page_sharing")? == value,
        "max_page_sharing has changed"
    );
    // Writing what it is already is no change, and nonsense is still nonsense.
    ksm.write("max_page_sharing", value)?;
    let result = ksm.write_bytes("max_page_sharing", b"1");
    ensure!(
        result == Err(Errno::EINVAL),
        "setting max_page_sharing to 1: {result:?}"
    );
    ksm.unmerge()?;
    ksm.write("max_page_sharing", 12)?;
    ksm.merge_until(Counters::merged(8, 8))?;
    child.verify(here, content)?;
    child.verify(there, content)?;
    ksm.unmerge()
}

fn chains_and_dups_are_counted(ksm: &Ksm) -> Result<()> {
    ksm.write("max_page_sharing", 4)?;
    let mut child = Child::spawn()?;
    let mut passes = Passes::of(ksm)?;
    // Four sharers fill one page: no chain.
    let four = child.map_mergeable(4, Content::Same(1))?;
    passes.make(2)?;
    ksm.expect(Counters::merged(1, 3))?;
    expect_chains(ksm, 0, 0)?;
    // Five times four.
    let twenty = child.map_mergeable(20, Content::Same(2))?;
    passes.make(2)?;
    ksm.expect(Counters::merged(1 + 5, 3 + 15))?;
    expect_chains(ksm, 1, 5)?;
    // Two times four and two: other contents are another chain.
    let ten = child.map_mergeable(10, Content::Same(3))?;
    passes.make(2)?;
    ksm.expect(Counters::merged(6 + 3, 18 + 7))?;
    expect_chains(ksm, 2, 8)?;
    // A page that is left over finds nobody to share with.
    let nine = child.map_mergeable(9, Content::Same(4))?;
    passes.make(2)?;
    ksm.expect(Counters::merged(9 + 2, 25 + 6).and_unshared(1))?;
    expect_chains(ksm, 3, 10)?;
    for (region, pages) in [(four, 1), (twenty, 5), (ten, 3)] {
        let sharers = sharers(&[(&child, region)])?;
        ensure!(
            sharers.len() == pages && sharers.values().all(|&sharers| sharers <= 4),
            "the pages are shared like this: {sharers:?}"
        );
    }
    // Nothing of it changes by itself.
    passes.make(3)?;
    ksm.expect(Counters::merged(11, 31).and_unshared(1))?;
    expect_chains(ksm, 3, 10)?;
    for (region, seed) in [(four, 1), (twenty, 2), (ten, 3), (nine, 4)] {
        child.verify(region, Content::Same(seed))?;
    }
    Ok(())
}

fn new_sharers_fill_the_page_that_has_room(ksm: &Ksm) -> Result<()> {
    ksm.write("max_page_sharing", 4)?;
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(10, CONTENT)?;
    let mut passes = Passes::of(ksm)?;
    passes.make(2)?;
    ksm.expect(Counters::merged(3, 7))?;
    // Room for two is found in the third page, not in a new one.
    let there = other.map_mergeable(2, CONTENT)?;
    passes.make(2)?;
    ksm.expect(Counters::merged(3, 9))?;
    expect_chains(ksm, 1, 3)?;
    let all = sharers(&[(&one, here), (&other, there)])?;
    ensure!(
        all.len() == 3 && all.values().all(|&sharers| sharers == 4),
        "the pages are shared like this: {all:?}"
    );
    // One leaves a full page, and one of two that come takes its place; the other one waits for company.
    one.fill(here.part(0, 1), Content::Same(9))?;
    passes.make(2)?;
    ksm.expect(Counters::merged(3, 8).and_unshared(1))?;
    let more = other.map_mergeable(2, CONTENT)?;
    passes.make(2)?;
    ksm.expect(Counters::merged(3, 9).and_unshared(2))?;
    expect_chains(ksm, 1, 3)?;
    one.verify(here.part(1, 9), CONTENT)?;
    other.verify(there, CONTENT)?;
    other.verify(more, CONTENT)
}

fn forks_may_exceed_the_limit_but_nobody_joins_them(ksm: &Ksm) -> Result<()> {
    ksm.write("max_page_sharing", 2)?;
    let mut parent = Child::spawn()?;
    let region = parent.map_mergeable(2, CONTENT)?;
    let mut passes = Passes::of(ksm)?;
    passes.make(2)?;
    ksm.expect(Counters::merged(1, 1))?;
    let mut children = Vec::new();
    for _ in 0..3 {
        children.push(parent.fork()?);
    }
    passes.make(2)?;
    ksm.expect(Counters::merged(1, 7))?;
    expect_chains(ksm, 0, 0)?;
    // A stranger stays alone, and two of them are a page of their own.
    let mut stranger = Child::spawn()?;
    let there = stranger.map_mergeable(1, CONTENT)?;
    passes.make(3)?;
    ksm.expect(Counters::merged(1, 7).and_unshared(1))?;
    let too = stranger.map_mergeable(1, CONTENT)?;
    passes.make(2)?;
    ksm.expect(Counters::merged(2, 8))?;
    expect_chains(ksm, 1, 2)?;
    // The page is over its limit until enough of its sharers are gone.
    children.pop().context("a child")?.exit()?;
    children.pop().context("a child")?.exit()?;
    passes.make(2)?;
    ksm.expect(Counters::merged(2, 4))?;
    let late = stranger.map_mergeable(1, CONTENT)?;
    passes.make(3)?;
    ksm.expect(Counters::merged(2, 4).and_unshared(1))?;
    let last = children.pop().context("a child")?;
    parent.fill(region.part(0, 1), Content::Same(9))?;
    last.exit()?;
    passes.make(3)?;
    // One sharer of the first page is left: the late one has joined it.
    ksm.expect(Counters::merged(2, 2).and_unshared(1))?;
    ensure!(
        stranger.pfns(late)? == parent.pfns(region.part(1, 1))?,
        "the page with room was not used"
    );
    for page in [there, too, late] {
        stranger.verify(page, CONTENT)?;
    }
    parent.verify(region.part(1, 1), CONTENT)
}

/// Processes with four equal pages each, and a limit of four: each has a page of its own in the chain.
fn chain(ksm: &Ksm, passes: &mut Passes, length: usize) -> Result<Vec<(Child, Region)>> {
    let mut links = Vec::new();
    for _ in 0..length {
        let mut child = Child::spawn()?;
        let region = child.map_mergeable(4, CONTENT)?;
        links.push((child, region));
    }
    passes.make(2)?;
    ksm.expect(Counters::merged(length as u64, 3 * length as u64))?;
    expect_chains(ksm, 1, length as u64)?;
    for (child, region) in &links {
        let sharers = sharers(&[(child, *region)])?;
        ensure!(sharers.len() == 1, "a process has pages of two dups");
    }
    Ok(links)
}

fn dups_go_with_their_sharers(ksm: &Ksm) -> Result<()> {
    // Stock forgets a dup when a search meets it after its page is gone, no sooner.
    let at_once = !ksm.is_stock();
    ksm.write("max_page_sharing", 4)?;
    let mut passes = Passes::of(ksm)?;
    let mut links = chain(ksm, &mut passes, 4)?;

    let (exits, _) = links.remove(0);
    exits.exit()?;
    passes.make(2)?;
    ksm.expect(Counters::merged(3, 9))?;
    if at_once {
        expect_chains(ksm, 1, 3)?;
    }
    let (unmaps, region) = &mut links[0];
    unmaps.munmap(*region)?;
    passes.make(2)?;
    ksm.expect(Counters::merged(2, 6))?;
    if at_once {
        expect_chains(ksm, 1, 2)?;
    }
    let (writes, region) = &mut links[1];
    writes.fill(*region, Content::Distinct(100))?;
    passes.make(2)?;
    ksm.expect(Counters::merged(1, 3).and_unshared(4))?;
    if at_once {
        // One is left: that is no chain.
        expect_chains(ksm, 0, 0)?;
    }
    writes.verify(*region, Content::Distinct(100))?;
    let (stays, region) = &mut links[2];
    stays.verify(*region, CONTENT)
}

fn a_search_prunes_dups_that_are_gone(ksm: &Ksm) -> Result<()> {
    ksm.write("max_page_sharing", 4)?;
    ksm.write("stable_node_chains_prune_millisecs", 0)?;
    let mut passes = Passes::of(ksm)?;
    let mut links = chain(ksm, &mut passes, 5)?;
    // A process of five is left, with three of its four pages; and a page that is looked for with the chain's hash.
    let (mut stays, region) = links.pop().context("five")?;
    for (child, _) in links {
        child.kill()?;
    }
    stays.fill(region.part(0, 1), Content::Same(9))?;
    let mut new = Child::spawn()?;
    let joins = new.map_mergeable(1, CONTENT)?;
    passes.make(3)?;
    ksm.expect(Counters::merged(1, 3).and_unshared(1))?;
    expect_chains(ksm, 0, 0)?;
    ensure!(
        new.pfns(joins)?[0] == stays.pfns(region)?[1],
        "the page that is left was not used"
    );
    new.verify(joins, CONTENT)?;
    stays.verify(region.part(1, 3), CONTENT)
}

fn run_2_takes_chains_away_and_a_new_limit_holds(ksm: &Ksm) -> Result<()> {
    ksm.write("max_page_sharing", 4)?;
    let mut child = Child::spawn()?;
    let region = child.map_mergeable(24, CONTENT)?;
    // Each limit in turn: pages, chains, dups.
    for (limit, pages) in [(4, 6), (12, 2), (24, 1), (2, 12)] {
        ksm.write("max_page_sharing", limit)?;
        let mut passes = Passes::of(ksm)?;
        passes.make(2)?;
        ksm.expect(Counters::merged(pages, 24 - pages))?;
        let chains = u64::from(pages > 1);
        expect_chains(ksm, chains, chains * pages)?;
        let result = ksm.write_bytes("max_page_sharing", b"5");
        ensure!(
            result == Err(Errno::EBUSY),
            "changing max_page_sharing: {result:?}"
        );
        ksm.write("max_page_sharing", limit)?;
        ksm.unmerge()?;
        expect_chains(ksm, 0, 0)?;
        child.verify(region, CONTENT)?;
    }
    Ok(())
}
