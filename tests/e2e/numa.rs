//! NUMA: pages that move between nodes, and merging within nodes only.

use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::ksm::Counters;
use ksm_e2e::memory::Mapping;
use ksm_e2e::numa;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;
use nix::errno::Errno;

ksm_e2e::tests![
    a_merged_page_moves_between_nodes_with_all_its_mappings,
    others_join_a_page_that_has_moved,
    moving_during_scanning_harms_nobody,
    merging_across_nodes_is_the_default,
    without_merging_across_nodes_each_node_has_its_own_page,
    merge_across_nodes_cannot_change_while_pages_are_shared,
    pages_moved_to_a_node_that_merges_alone_stay_right,
];

const CONTENT: Content = Content::Distinct(1);
const PAGES: usize = 16;

fn map_on(child: &mut Child, node: u32) -> Result<Region> {
    let region = child.map(Mapping::pages(PAGES).on_node(node))?;
    child.fill(region, CONTENT)?;
    // Before it is advised: from then on it may merge with what is elsewhere.
    ensure!(
        all_on(child, region, node)?,
        "memory was not taken from node {node}"
    );
    child.advise(region, libc::MADV_MERGEABLE)?;
    Ok(region)
}

fn all_on(child: &Child, region: Region, node: u32) -> Result<bool> {
    Ok(numa::nodes_of(child.pid(), region)?
        .iter()
        .all(|&now| now == node as i32))
}

/// Moves all pages; a page that is in somebody's hands for a moment is tried again.
fn move_all(child: &Child, region: Region, node: u32) -> Result<()> {
    wait::until_or_explain("the pages have moved", PATIENCE, || {
        let moved = numa::move_to(child.pid(), region, node)?;
        Ok((moved < region.pages)
            .then(|| format!("{moved} of {} are on node {node}", region.pages)))
    })
}

fn a_merged_page_moves_between_nodes_with_all_its_mappings(ksm: &Ksm) -> Result<()> {
    numa::require_two_nodes()?;
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(PAGES, CONTENT)?;
    let there = other.map_mergeable(PAGES, CONTENT)?;
    let mut child = other.fork()?;
    ksm.merge_until(Counters::merged(16, 32))?;
    // A fork that was never scanned is reached by way of its relatives.
    let mut late = one.fork()?;
    for node in [1, 0, 1] {
        let before = one.pfns(here)?;
        move_all(&one, here, node)?;
        let after = one.pfns(here)?;
        if node == 0 {
            ensure!(
                before.iter().zip(&after).all(|(old, new)| old != new),
                "a page was moved and is where it was"
            );
        }
        for (process, region) in [
            (&mut other, there),
            (&mut child, there),
            (&mut late, here),
            (&mut one, here),
        ] {
            ensure!(process.pfns(region)? == after, "a mapping was left behind");
            ensure!(
                process.ksm_pages(region)? == PAGES,
                "moved pages are not KSM pages any more"
            );
            process.verify(region, CONTENT)?;
        }
        ksm.expect(Counters::merged(16, 32))?;
    }
    late.kill()?;
    // Scanning recognises them, and writing still gives copies.
    ksm.scan_passes(3)?;
    ksm.expect(Counters::merged(16, 32))?;
    other.fill(there, Content::Distinct(9000))?;
    child.verify(there, CONTENT)?;
    one.verify(here, CONTENT)?;
    ksm.unmerge()?;
    child.verify(there, CONTENT)?;
    one.verify(here, CONTENT)
}

fn others_join_a_page_that_has_moved(ksm: &Ksm) -> Result<()> {
    numa::require_two_nodes()?;
    let (mut one, mut other, mut third) = (Child::spawn()?, Child::spawn()?, Child::spawn()?);
    let here = map_on(&mut one, 0)?;
    let there = map_on(&mut other, 0)?;
    ksm.merge_until(Counters::merged(16, 16))?;
    move_all(&one, here, 1)?;
    let elsewhere = map_on(&mut third, 0)?;
    ksm.merge_until(Counters::merged(16, 32))?;
    ensure!(
        third.pfns(elsewhere)? == one.pfns(here)?,
        "the processes map different pages"
    );
    ensure!(all_on(&third, elsewhere, 1)?, "merging has moved the page");
    one.verify(here, CONTENT)?;
    other.verify(there, CONTENT)?;
    third.verify(elsewhere, CONTENT)
}

fn moving_during_scanning_harms_nobody(ksm: &Ksm) -> Result<()> {
    numa::require_two_nodes()?;
    let (mut one, mut other, mut third) = (Child::spawn()?, Child::spawn()?, Child::spawn()?);
    let here = map_on(&mut one, 0)?;
    let there = map_on(&mut other, 0)?;
    ksm.scan_at_full_speed()?;
    ksm.start()?;
    let mut moved = 0;
    for round in 0..30 {
        let elsewhere = map_on(&mut third, 0)?;
        moved += numa::move_to(one.pid(), here, (round + 1) % 2)?;
        numa::move_to(third.pid(), elsewhere, 1)?;
        third.verify(elsewhere, CONTENT)?;
        third.munmap(elsewhere)?;
        one.verify(here, CONTENT)?;
        other.verify(there, CONTENT)?;
    }
    ensure!(moved > 0, "no page was ever moved");
    ksm.merge_until(Counters::merged(16, 16))?;
    one.verify(here, CONTENT)?;
    other.verify(there, CONTENT)
}

fn merging_across_nodes_is_the_default(ksm: &Ksm) -> Result<()> {
    numa::require_two_nodes()?;
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = map_on(&mut one, 0)?;
    let there = map_on(&mut other, 1)?;
    ksm.merge_until(Counters::merged(16, 16))?;
    ensure!(
        one.pfns(here)? == other.pfns(there)?,
        "the processes map different pages"
    );
    one.verify(here, CONTENT)?;
    other.verify(there, CONTENT)
}

fn without_merging_across_nodes_each_node_has_its_own_page(ksm: &Ksm) -> Result<()> {
    numa::require_two_nodes()?;
    ksm.write("merge_across_nodes", 0)?;
    let mut children = Vec::new();
    for node in [0, 1, 1] {
        let mut child = Child::spawn()?;
        let region = map_on(&mut child, node)?;
        children.push((child, region, node));
    }
    // The lonely one on node 0 stays alone.
    ksm.merge_until(Counters::merged(16, 16).and_unshared(16))?;
    ksm.scan_passes(3)?;
    ksm.expect(Counters::merged(16, 16).and_unshared(16))?;
    let mut child = Child::spawn()?;
    let region = map_on(&mut child, 0)?;
    children.push((child, region, 0));
    ksm.merge_until(Counters::merged(32, 32))?;
    for (child, region, node) in &mut children {
        ensure!(
            all_on(child, *region, *node)?,
            "a page of node {node} has become one of the other node"
        );
        child.verify(*region, CONTENT)?;
    }
    // With the setting changed they all become one.
    ksm.unmerge()?;
    ksm.write("merge_across_nodes", 1)?;
    ksm.merge_until(Counters::merged(16, 48))?;
    for (child, region, _) in &mut children {
        child.verify(*region, CONTENT)?;
    }
    Ok(())
}

fn merge_across_nodes_cannot_change_while_pages_are_shared(ksm: &Ksm) -> Result<()> {
    let mut child = Child::spawn()?;
    let (here, there) = (
        child.map_mergeable(PAGES, CONTENT)?,
        child.map_mergeable(PAGES, CONTENT)?,
    );
    for old in [1, 0] {
        ksm.write("merge_across_nodes", old)?;
        // In one place, so that they merge under either setting.
        numa::move_to(child.pid(), here, 0)?;
        numa::move_to(child.pid(), there, 0)?;
        ksm.merge_until(Counters::merged(16, 16))?;
        let new = (1 - old).to_string();
        for run in [0, 1] {
            ksm.write("run", run)?;
            let result = ksm.write_bytes("merge_across_nodes", new.as_bytes());
            ensure!(
                result == Err(Errno::EBUSY),
                "changing it with pages shared: {result:?}"
            );
            ensure!(ksm.read("merge_across_nodes")? == old, "it has changed");
        }
        // What is no change is no problem, and nonsense is nonsense.
        ksm.write("merge_across_nodes", old)?;
        let result = ksm.write_bytes("merge_across_nodes", b"2");
        ensure!(result == Err(Errno::EINVAL), "setting it to 2: {result:?}");
        ksm.unmerge()?;
        ksm.write("merge_across_nodes", 1 - old)?;
        ensure!(
            ksm.read("merge_across_nodes")? == 1 - old,
            "it has not changed"
        );
    }
    child.verify(here, CONTENT)?;
    child.verify(there, CONTENT)
}

fn pages_moved_to_a_node_that_merges_alone_stay_right(ksm: &Ksm) -> Result<()> {
    numa::require_two_nodes()?;
    ksm.write("merge_across_nodes", 0)?;
    let mut children = Vec::new();
    for node in [0, 0, 1, 1] {
        let mut child = Child::spawn()?;
        let region = map_on(&mut child, node)?;
        children.push((child, region));
    }
    ksm.merge_until(Counters::merged(32, 32))?;
    // Now node 1 has the same content twice, and node 0 not at all.
    move_all(&children[0].0, children[0].1, 1)?;
    ksm.scan_passes(4)?;
    for (child, region) in &mut children {
        ensure!(
            all_on(child, *region, 1)?,
            "a page has gone to the other node"
        );
        child.verify(*region, CONTENT)?;
    }
    // Newcomers on node 0 merge with one another, and not with what has left.
    for _ in 0..2 {
        let mut child = Child::spawn()?;
        let region = map_on(&mut child, 0)?;
        children.push((child, region));
    }
    ksm.scan_passes(4)?;
    for (child, region) in &mut children[4..] {
        ensure!(
            all_on(child, *region, 0)?,
            "a page has gone to the other node"
        );
        ensure!(
            child.ksm_pages(*region)? == PAGES,
            "newcomers were not merged"
        );
    }
    for (child, region) in &mut children {
        child.verify(*region, CONTENT)?;
    }
    ksm.unmerge()?;
    for (child, region) in &mut children {
        ensure!(
            child.ksm_pages(*region)? == 0,
            "run=2 has left pages merged"
        );
        child.verify(*region, CONTENT)?;
    }
    Ok(())
}
