//! Merging and `fork`.

use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::ksm::Counters;
use ksm_e2e::procfs;

ksm_e2e::tests![
    pages_shared_by_fork_merge_with_those_of_a_stranger,
    a_process_forked_from_merged_memory_joins_the_sharers,
    the_parent_may_exit_first,
    a_write_in_the_child_is_the_childs_alone,
    a_child_that_was_never_scanned_is_unmerged_too,
    generations_of_children_keep_their_memory,
];

fn pages_shared_by_fork_merge_with_those_of_a_stranger(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(1);
    let (mut parent, mut stranger) = (Child::spawn()?, Child::spawn()?);
    let region = parent.map_mergeable(32, content)?;
    let mut child = parent.fork()?;
    ensure!(
        parent.pfns(region)? == child.pfns(region)?,
        "fork has copied pages at once"
    );
    let there = stranger.map_mergeable(32, content)?;
    ksm.merge_until(Counters::merged(32, 64))?;
    let pfns = parent.pfns(region)?;
    ensure!(
        pfns == child.pfns(region)? && pfns == stranger.pfns(there)?,
        "the processes map different pages"
    );
    parent.verify(region, content)?;
    child.verify(region, content)?;
    stranger.verify(there, content)
}

fn a_process_forked_from_merged_memory_joins_the_sharers(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(2);
    let (mut parent, mut other) = (Child::spawn()?, Child::spawn()?);
    let region = parent.map_mergeable(32, content)?;
    let there = other.map_mergeable(32, content)?;
    ksm.merge_until(Counters::merged(32, 32))?;

    let mut child = parent.fork()?;
    ensure!(
        child.ksm_pages(region)? == 32,
        "the child does not map the merged pages"
    );
    ensure!(
        procfs::ksm_merging_pages(child.pid())? == 0,
        "the child counts pages before it was scanned"
    );
    ensure!(
        procfs::ksm_stat(child.pid(), "ksm_rmap_items")? == 0,
        "the child counts pages before it was scanned"
    );
    ksm.expect(Counters::merged(32, 32))?;
    child.verify(region, content)?;

    ksm.merge_until(Counters::merged(32, 64))?;
    ensure!(
        procfs::ksm_merging_pages(child.pid())? == 32,
        "the child's pages are not counted"
    );
    ensure!(
        child.pfns(region)? == other.pfns(there)?,
        "the processes map different pages"
    );
    parent.verify(region, content)?;
    child.verify(region, content)?;
    other.verify(there, content)
}

fn the_parent_may_exit_first(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(3);
    let (mut parent, mut other) = (Child::spawn()?, Child::spawn()?);
    let region = parent.map_mergeable(32, content)?;
    let there = other.map_mergeable(32, content)?;
    ksm.merge_until(Counters::merged(32, 32))?;
    let mut child = parent.fork()?;
    parent.exit()?;
    child.verify(region, content)?;
    ksm.merge_until(Counters::merged(32, 32))?;
    ensure!(
        child.pfns(region)? == other.pfns(there)?,
        "the processes map different pages"
    );
    other.exit()?;
    ksm.merge_until(Counters::merged(32, 0))?;
    child.verify(region, content)?;
    let mut grandchild = child.fork()?;
    child.kill()?;
    grandchild.verify(region, content)?;
    ksm.unmerge()?;
    ensure!(
        grandchild.ksm_pages(region)? == 0,
        "run=2 has left pages merged"
    );
    grandchild.verify(region, content)
}

fn a_write_in_the_child_is_the_childs_alone(ksm: &Ksm) -> Result<()> {
    let (old, new) = (Content::Distinct(4), Content::Distinct(4000));
    let (mut parent, mut other) = (Child::spawn()?, Child::spawn()?);
    let region = parent.map_mergeable(32, old)?;
    let there = other.map_mergeable(32, old)?;
    ksm.merge_until(Counters::merged(32, 32))?;
    let mut child = parent.fork()?;
    child.fill(region, new)?;
    ensure!(
        child.ksm_pages(region)? == 0,
        "the child has written to merged pages"
    );
    child.verify(region, new)?;
    parent.verify(region, old)?;
    other.verify(there, old)?;
    ksm.merge_until(Counters::merged(32, 32).and_unshared(32))?;
    parent.fill(region, new)?;
    ksm.merge_until(Counters::merged(64, 32))?;
    child.verify(region, new)?;
    parent.verify(region, new)?;
    other.verify(there, old)
}

fn a_child_that_was_never_scanned_is_unmerged_too(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(5);
    let (mut parent, mut other) = (Child::spawn()?, Child::spawn()?);
    let region = parent.map_mergeable(32, content)?;
    let there = other.map_mergeable(32, content)?;
    ksm.merge_until(Counters::merged(32, 32))?;
    let mut children = Vec::new();
    for _ in 0..3 {
        children.push(parent.fork()?);
    }
    let grandchild = children[0].fork()?;
    children.push(grandchild);
    parent.exit()?;
    ksm.unmerge()?;
    ksm.expect(Counters::merged(0, 0))?;
    for child in &mut children {
        ensure!(
            child.ksm_pages(region)? == 0,
            "run=2 has left pages of helper {} merged",
            child.pid()
        );
        child.verify(region, content)?;
    }
    ensure!(other.ksm_pages(there)? == 0, "run=2 has left pages merged");
    other.verify(there, content)
}

fn generations_of_children_keep_their_memory(ksm: &Ksm) -> Result<()> {
    // Every process maps what its ancestors left it, writes to a part, and forks, while all of it is being merged.
    let old = Content::Distinct(6);
    let mut family = vec![Child::spawn()?];
    let region = family[0].map_mergeable(24, old)?;
    ksm.scan_at_full_speed()?;
    ksm.start()?;
    for generation in 1..8 {
        let mut child = family[generation - 1].fork()?;
        // Every generation writes what the first one wrote, to one page more.
        child.fill(region.part(0, generation), Content::Same(6))?;
        family.push(child);
        ksm.full_scans(1)?;
    }
    for (generation, child) in family.iter_mut().enumerate() {
        child.verify(region.part(0, generation), Content::Same(6))?;
        child.verify(
            region.part(generation, 24 - generation),
            old.from_page(generation),
        )?;
    }
    // Eldest and youngest go first.
    while family.len() > 2 {
        family.remove(0).exit()?;
        family.pop().expect("more than one is left").kill()?;
        ksm.full_scans(1)?;
    }
    let [third, fourth] = &mut family[..] else {
        unreachable!("two are left")
    };
    third.verify(region.part(0, 3), Content::Same(6))?;
    third.verify(region.part(3, 21), old.from_page(3))?;
    fourth.verify(region.part(0, 4), Content::Same(6))?;
    fourth.verify(region.part(4, 20), old.from_page(4))
}
