//! NUMA: pages that move between nodes, and merging within nodes only. There may be any number of nodes from two on,
//! and those without CPUs are nodes like others.

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
    a_page_that_has_moved_merges_on_its_new_node_only,
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
    let nodes = numa::require_nodes()?;
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(PAGES, CONTENT)?;
    let there = other.map_mergeable(PAGES, CONTENT)?;
    let mut child = other.fork()?;
    ksm.merge_until(Counters::merged(16, 32))?;
    // A fork that was never scanned is reached by way of its relatives.
    let mut late = one.fork()?;
    // To each of them, and back again.
    let tour = nodes.iter().skip(1).chain(&nodes[..1]).chain(&nodes[1..2]);
    for (step, &node) in tour.enumerate() {
        let before = one.pfns(here)?;
        move_all(&one, here, node)?;
        let after = one.pfns(here)?;
        // Before the first step they may be there already.
        if step > 0 {
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
    let nodes = numa::require_nodes()?;
    let mut sharers = Vec::new();
    for _ in 0..2 {
        let mut child = Child::spawn()?;
        let region = map_on(&mut child, nodes[0])?;
        sharers.push((child, region));
    }
    ksm.merge_until(Counters::merged(16, 16))?;
    for &node in &nodes[1..] {
        move_all(&sharers[0].0, sharers[0].1, node)?;
        let mut newcomer = Child::spawn()?;
        let region = map_on(&mut newcomer, nodes[0])?;
        sharers.push((newcomer, region));
        let sharing = 16 * (sharers.len() as u64 - 1);
        ksm.merge_until(Counters::merged(16, sharing))?;
        let pfns = sharers[0].0.pfns(sharers[0].1)?;
        for (child, region) in &mut sharers {
            ensure!(
                child.pfns(*region)? == pfns,
                "the processes map different pages"
            );
            ensure!(all_on(child, *region, node)?, "merging has moved the page");
            child.verify(*region, CONTENT)?;
        }
    }
    Ok(())
}

fn moving_during_scanning_harms_nobody(ksm: &Ksm) -> Result<()> {
    let nodes = numa::require_nodes()?;
    let (mut one, mut other, mut third) = (Child::spawn()?, Child::spawn()?, Child::spawn()?);
    let here = map_on(&mut one, nodes[0])?;
    let there = map_on(&mut other, nodes[0])?;
    ksm.scan_at_full_speed()?;
    ksm.start()?;
    let mut moved = 0;
    for round in 0..30 {
        let elsewhere = map_on(&mut third, nodes[0])?;
        moved += numa::move_to(one.pid(), here, nodes[(round + 1) % nodes.len()])?;
        numa::move_to(third.pid(), elsewhere, nodes[1])?;
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
    let nodes = numa::require_nodes()?;
    let mut children = Vec::new();
    for &node in &nodes {
        let mut child = Child::spawn()?;
        let region = map_on(&mut child, node)?;
        children.push((child, region));
    }
    ksm.merge_until(Counters::merged(16, 16 * (nodes.len() as u64 - 1)))?;
    let pfns = children[0].0.pfns(children[0].1)?;
    for (child, region) in &mut children {
        ensure!(
            child.pfns(*region)? == pfns,
            "the processes map different pages"
        );
        child.verify(*region, CONTENT)?;
    }
    Ok(())
}

fn without_merging_across_nodes_each_node_has_its_own_page(ksm: &Ksm) -> Result<()> {
    let nodes = numa::require_nodes()?;
    let pages_of_nodes = 16 * nodes.len() as u64;
    ksm.write("merge_across_nodes", 0)?;
    let mut children = Vec::new();
    // One on the first node, two on each of the others.
    for &node in nodes.iter().chain(&nodes[1..]) {
        let mut child = Child::spawn()?;
        let region = map_on(&mut child, node)?;
        children.push((child, region, node));
    }
    // The lonely one stays alone.
    let others = pages_of_nodes - 16;
    ksm.merge_until(Counters::merged(others, others).and_unshared(16))?;
    ksm.scan_passes(3)?;
    ksm.expect(Counters::merged(others, others).and_unshared(16))?;
    let mut child = Child::spawn()?;
    let region = map_on(&mut child, nodes[0])?;
    children.push((child, region, nodes[0]));
    ksm.merge_until(Counters::merged(pages_of_nodes, pages_of_nodes))?;
    for (child, region, node) in &mut children {
        ensure!(
            all_on(child, *region, *node)?,
            "a page of node {node} has become one of another node"
        );
        child.verify(*region, CONTENT)?;
    }
    // With the setting changed they all become one.
    ksm.unmerge()?;
    ksm.write("merge_across_nodes", 1)?;
    ksm.merge_until(Counters::merged(16, 2 * pages_of_nodes - 16))?;
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

fn a_page_that_has_moved_merges_on_its_new_node_only(ksm: &Ksm) -> Result<()> {
    let nodes = numa::require_nodes()?;
    ksm.write("merge_across_nodes", 0)?;
    let mut sharers = Vec::new();
    for _ in 0..2 {
        let mut child = Child::spawn()?;
        let region = map_on(&mut child, nodes[0])?;
        sharers.push((child, region));
    }
    ksm.merge_until(Counters::merged(16, 16))?;
    // Round the nodes, and at least once in each of the ways to move memory.
    for step in 0..nodes.len().max(3) {
        let (from, to) = (nodes[step % nodes.len()], nodes[(step + 1) % nodes.len()]);
        let (child, region) = &mut sharers[0];
        wait::until("the pages have moved", PATIENCE, || {
            match step % 3 {
                0 => move_all(child, *region, to)?,
                1 => numa::migrate(child.pid(), from, to)?,
                _ => child.bind(*region, to, true)?,
            }
            all_on(child, *region, to)
        })?;
        for (child, region) in &mut sharers {
            ensure!(
                all_on(child, *region, to)?,
                "step {step}: the pages have not moved to node {to}"
            );
        }
        let mut newcomer = Child::spawn()?;
        let region = map_on(&mut newcomer, to)?;
        sharers.push((newcomer, region));
        let joined = Counters::merged(16, 16 * (sharers.len() as u64 - 1));
        ksm.merge_until(joined)?;
        // Not before that: a search on the old node might be what finds out that the page has moved.
        let mut left = Child::spawn()?;
        let behind = map_on(&mut left, from)?;
        let wanted = joined.and_unshared(16);
        ksm.merge_until(wanted)?;
        // However long it is tried.
        ksm.scan_passes(3)?;
        ksm.expect(wanted)?;
        ensure!(
            left.ksm_pages(behind)? == 0,
            "step {step}: a page was merged with one that is on another node"
        );
        left.verify(behind, CONTENT)?;
        let pfns = sharers[0].0.pfns(sharers[0].1)?;
        for (child, region) in &mut sharers {
            ensure!(
                child.pfns(*region)? == pfns,
                "step {step}: the processes map different pages"
            );
            child.verify(*region, CONTENT)?;
        }
        ensure!(
            all_on(&sharers[0].0, sharers[0].1, to)?,
            "step {step}: merging has moved the page"
        );
    }
    Ok(())
}

fn pages_moved_to_a_node_that_merges_alone_stay_right(ksm: &Ksm) -> Result<()> {
    let nodes = numa::require_nodes()?;
    ksm.write("merge_across_nodes", 0)?;
    let mut children = Vec::new();
    for &node in nodes.iter().chain(&nodes) {
        let mut child = Child::spawn()?;
        let region = map_on(&mut child, node)?;
        children.push((child, region, node));
    }
    let pages_of_nodes = 16 * nodes.len() as u64;
    ksm.merge_until(Counters::merged(pages_of_nodes, pages_of_nodes))?;
    // Now the last node has the same content twice, and the first not at all.
    let (first, last) = (nodes[0], nodes[nodes.len() - 1]);
    move_all(&children[0].0, children[0].1, last)?;
    ksm.scan_passes(4)?;
    for (child, region, node) in &mut children {
        let home = if *node == first { last } else { *node };
        ensure!(
            all_on(child, *region, home)?,
            "a page of node {home} has gone to another node"
        );
        child.verify(*region, CONTENT)?;
    }
    // Newcomers on the first node merge with one another, and not with what has left.
    for _ in 0..2 {
        let mut child = Child::spawn()?;
        let region = map_on(&mut child, first)?;
        children.push((child, region, first));
    }
    ksm.scan_passes(4)?;
    let newcomers = 2 * nodes.len();
    for (child, region, _) in &mut children[newcomers..] {
        ensure!(
            all_on(child, *region, first)?,
            "a page has gone to another node"
        );
        ensure!(
            child.ksm_pages(*region)? == PAGES,
            "newcomers were not merged"
        );
    }
    for (child, region, _) in &mut children {
        child.verify(*region, CONTENT)?;
    }
    ksm.unmerge()?;
    for (child, region, _) in &mut children {
        ensure!(
            child.ksm_pages(*region)? == 0,
            "run=2 has left pages merged"
        );
        child.verify(*region, CONTENT)?;
    }
    Ok(())
}
