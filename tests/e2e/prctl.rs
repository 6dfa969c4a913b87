//! `prctl(PR_SET_MEMORY_MERGE)`: processes marked as a whole.

use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::ksm::Counters;
use ksm_e2e::memory;
use ksm_e2e::memory::Mapping;
use ksm_e2e::procfs;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;

ksm_e2e::tests![
    a_process_marked_by_prctl_merges_and_so_do_its_children,
    a_program_started_by_a_marked_process_is_marked,
    taking_the_mark_away_unmerges_and_lasts,
    a_mark_set_late_reaches_memory_that_is_there,
    what_a_child_merges_of_its_parents_keeps_no_knob_from_changing,
];

fn a_process_marked_by_prctl_merges_and_so_do_its_children(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(11);
    let mut parent = Child::spawn()?;
    parent.prctl(libc::PR_SET_MEMORY_MERGE, 1)?;
    let region = parent.map(Mapping::pages(32))?;
    parent.fill(region, content)?;
    let mut child = parent.fork()?;
    ensure!(
        child.prctl(libc::PR_GET_MEMORY_MERGE, 0)? == 1,
        "the mark was not inherited"
    );
    let new = child.map(Mapping::pages(32))?;
    child.fill(new, content)?;

    // Other memory of the two, heap and stack, is marked as well, so that absolute numbers cannot be demanded.
    ksm.start()?;
    wait::until("the pages are merged", PATIENCE, || {
        Ok(parent.ksm_pages(region)? == 32
            && child.ksm_pages(new)? == 32
            && child.ksm_pages(region)? == 32)
    })?;
    parent.verify(region, content)?;
    child.verify(region, content)?;
    child.verify(new, content)?;

    child.prctl(libc::PR_SET_MEMORY_MERGE, 0)?;
    ensure!(
        child.ksm_pages(new)? == 0 && child.ksm_pages(region)? == 0,
        "taking the mark away does not unmerge"
    );
    ensure!(
        parent.prctl(libc::PR_GET_MEMORY_MERGE, 0)? == 1,
        "the parent has lost its mark"
    );
    parent.verify(region, content)?;
    child.verify(region, content)?;
    child.verify(new, content)
}

fn a_program_started_by_a_marked_process_is_marked(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(12);
    let mut program = Child::spawn_program(|| {
        // SAFETY: The call takes integers only.
        let result = unsafe { libc::prctl(libc::PR_SET_MEMORY_MERGE, 1_u64, 0_u64, 0_u64, 0_u64) };
        nix::errno::Errno::result(result)
            .map(drop)
            .map_err(memory::os_error)
    })?;
    ensure!(
        program.prctl(libc::PR_GET_MEMORY_MERGE, 0)? == 1,
        "the mark was not inherited"
    );
    let (here, there) = (
        program.map(Mapping::pages(32))?,
        program.map(Mapping::pages(32))?,
    );
    program.fill(here, content)?;
    program.fill(there, content)?;
    ksm.start()?;
    wait::until("the pages are merged", PATIENCE, || {
        Ok(program.ksm_pages(here)? == 32 && program.ksm_pages(there)? == 32)
    })?;
    program.verify(here, content)?;
    program.verify(there, content)
}

/// Fails unless a process is marked, or is not, and says so everywhere.
fn expect_mark(child: &mut Child, marked: bool) -> Result<()> {
    let seen = child.prctl(libc::PR_GET_MEMORY_MERGE, 0)?;
    ensure!(
        seen == i64::from(marked),
        "PR_GET_MEMORY_MERGE of process {} is {seen}",
        child.pid()
    );
    let text = procfs::ksm_stat_text(child.pid())?;
    let word = if marked { "yes" } else { "no" };
    ensure!(
        text.contains(&format!("ksm_merge_any: {word}\n")),
        "ksm_stat of process {} is {text:?}",
        child.pid()
    );
    Ok(())
}

fn taking_the_mark_away_unmerges_and_lasts(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(13);
    let (mut marked, mut stranger) = (Child::spawn()?, Child::spawn()?);
    let there = stranger.map_mergeable(32, content)?;
    expect_mark(&mut marked, false)?;
    marked.prctl(libc::PR_SET_MEMORY_MERGE, 1)?;
    // Twice is once.
    marked.prctl(libc::PR_SET_MEMORY_MERGE, 1)?;
    expect_mark(&mut marked, true)?;
    let region = marked.map(Mapping::pages(32))?;
    marked.fill(region, content)?;
    ensure!(
        procfs::has_vm_flag(marked.pid(), region, "mg")?,
        "new memory of a marked process is not mergeable"
    );
    ksm.start()?;
    wait::until("the pages are merged", PATIENCE, || {
        Ok(marked.ksm_pages(region)? == 32)
    })?;
    ensure!(
        marked.pfns(region)? == stranger.pfns(there)?,
        "the processes map different pages"
    );

    marked.prctl(libc::PR_SET_MEMORY_MERGE, 0)?;
    marked.prctl(libc::PR_SET_MEMORY_MERGE, 0)?;
    expect_mark(&mut marked, false)?;
    ensure!(
        marked.ksm_pages(region)? == 0,
        "taking the mark away does not unmerge"
    );
    let new = marked.map(Mapping::pages(32))?;
    marked.fill(new, content)?;
    let mut child = marked.fork()?;
    expect_mark(&mut child, false)?;
    let childs = child.map(Mapping::pages(32))?;
    child.fill(childs, content)?;
    ksm.full_scans(4)?;
    ksm.stop()?;
    for (process, region) in [(&marked, region), (&marked, new), (&child, childs)] {
        ensure!(
            !procfs::has_vm_flag(process.pid(), region, "mg")? && process.ksm_pages(region)? == 0,
            "memory of a process without a mark is merged"
        );
    }
    for process in [&marked, &child] {
        let text = procfs::ksm_stat_text(process.pid())?;
        ensure!(
            text.ends_with("ksm_mergeable: no\n")
                && procfs::ksm_stat(process.pid(), "ksm_merging_pages")? == 0
                && procfs::ksm_stat(process.pid(), "ksm_rmap_items")? == 0,
            "ksm_stat of a process without a mark is {text:?}"
        );
    }
    ensure!(
        stranger.ksm_pages(there)? == 32,
        "the stranger's pages are not merged any more"
    );
    marked.verify(region, content)?;
    marked.verify(new, content)?;
    child.verify(region, content)?;
    child.verify(childs, content)?;
    stranger.verify(there, content)
}

fn a_mark_set_late_reaches_memory_that_is_there(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(14);
    let (mut late, mut stranger) = (Child::spawn()?, Child::spawn()?);
    let region = late.map(Mapping::pages(32))?;
    late.fill(region, content)?;
    let there = stranger.map_mergeable(32, content)?;
    ksm.start()?;
    ksm.full_scans(3)?;
    ensure!(
        late.ksm_pages(region)? == 0,
        "memory of a process without a mark is merged"
    );
    late.prctl(libc::PR_SET_MEMORY_MERGE, 1)?;
    wait::until("the pages are merged", PATIENCE, || {
        Ok(late.ksm_pages(region)? == 32)
    })?;
    // A mark that goes and comes back.
    late.prctl(libc::PR_SET_MEMORY_MERGE, 0)?;
    ensure!(
        late.ksm_pages(region)? == 0,
        "taking the mark away does not unmerge"
    );
    late.prctl(libc::PR_SET_MEMORY_MERGE, 1)?;
    expect_mark(&mut late, true)?;
    wait::until("the pages are merged again", PATIENCE, || {
        Ok(late.ksm_pages(region)? == 32)
    })?;
    late.verify(region, content)?;
    stranger.verify(there, content)
}

/// A page that becomes a KSM page in a child is one in its parent too, whose memory nobody unmerges.
fn what_a_child_merges_of_its_parents_keeps_no_knob_from_changing(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(17);
    let mut parent = Child::spawn()?;
    let regions = [
        parent.map(Mapping::pages(32))?,
        parent.map(Mapping::pages(32))?,
    ];
    for region in regions {
        parent.fill(region, content)?;
    }
    let mut child = parent.fork()?;
    child.prctl(libc::PR_SET_MEMORY_MERGE, 1)?;
    ksm.start()?;
    wait::until("the child's pages are merged", PATIENCE, || {
        Ok(child.ksm_pages(regions[0])? == 32 && child.ksm_pages(regions[1])? == 32)
    })?;
    let merged = |parent: &Child| -> Result<usize> {
        Ok(parent.ksm_pages(regions[0])? + parent.ksm_pages(regions[1])?)
    };
    ensure!(
        merged(&parent)? > 0,
        "the child's KSM pages were not its parent's"
    );
    ksm.unmerge()?;
    ksm.expect(Counters::merged(0, 0))?;
    ensure!(
        child.ksm_pages(regions[0])? + child.ksm_pages(regions[1])? == 0,
        "the child has merged pages after run=2"
    );
    let old = ksm.read("max_page_sharing")?;
    // The kernel's own KSM says that it is busy.
    if !ksm.is_stock() {
        ksm.write("max_page_sharing", old + 1)?;
        ksm.write("max_page_sharing", old)?;
    }
    for child in [&mut parent, &mut child] {
        for region in regions {
            child.verify(region, content)?;
        }
    }
    // Pages that belong to nobody are in nobody's way.
    ksm.start()?;
    wait::until("the child's pages are merged again", PATIENCE, || {
        Ok(child.ksm_pages(regions[0])? == 32 && child.ksm_pages(regions[1])? == 32)
    })?;
    parent.fill(regions[0], Content::Distinct(900))?;
    child.verify(regions[0], content)?;
    ksm.unmerge()?;
    child.verify(regions[0], content)?;
    parent.verify(regions[1], content)
}
