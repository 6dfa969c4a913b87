//! How merged pages become private again.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use anyhow::Error;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Passes;
use ksm_e2e::Region;
use ksm_e2e::ksm::Counters;
use ksm_e2e::ksm_events::Trace;
use ksm_e2e::memory::PAGE;
use ksm_e2e::procfs;

ksm_e2e::tests![
    a_write_gives_a_private_copy,
    a_write_by_a_debugger_gives_a_private_copy,
    unmergeable_advice_makes_pages_private,
    unmergeable_advice_on_a_part_leaves_the_rest,
    stopping_keeps_pages_merged,
    run_2_makes_every_page_private_until_it_is_run_again,
    memory_that_was_advised_during_run_2_merges_later,
    unmapped_pages_leave_the_others_alone,
    discarded_pages_leave_the_others_alone,
    pages_that_are_gone_by_the_thousand_are_forgotten_without_looking_again,
    the_last_sharer_to_go_frees_the_page,
    a_moved_area_keeps_its_memory,
    a_grown_area_keeps_its_memory,
    a_shrunk_area_keeps_its_memory,
    an_area_moved_without_unmapping_keeps_its_memory,
];

const OLD: Content = Content::Distinct(1);
const NEW: Content = Content::Distinct(5000);

/// Two processes whose 32 pages are merged; scanning rests.
struct Pair {
    one: Child,
    here: Region,
    other: Child,
    there: Region,
}

impl Pair {
    fn merged(ksm: &Ksm) -> Result<Self> {
        let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
        let here = one.map_mergeable(32, OLD)?;
        let there = other.map_mergeable(32, OLD)?;
        ksm.merge_until(Counters::merged(32, 32))?;
        Ok(Self {
            one,
            here,
            other,
            there,
        })
    }
}

fn a_write_gives_a_private_copy(ksm: &Ksm) -> Result<()> {
    let mut children = Vec::new();
    for _ in 0..3 {
        let mut child = Child::spawn()?;
        let region = child.map_mergeable(32, OLD)?;
        children.push((child, region));
    }
    ksm.merge_until(Counters::merged(32, 64))?;
    let [(one, here), (two, there), (three, elsewhere)] = &mut children[..] else {
        unreachable!("three")
    };
    let copies = procfs::vmstat("cow_ksm")?;
    one.fill(here.part(0, 16), NEW)?;
    // A single byte at either end.
    let (first, last) = (here.page(16), here.page(17) + PAGE - 1);
    one.write(first, b"!")?;
    one.write(last, b"!")?;
    ensure!(
        procfs::vmstat("cow_ksm")? == copies + 18,
        "cow_ksm does not count copies right"
    );
    ensure!(
        one.ksm_pages(*here)? == 14,
        "the pages written to are still shared"
    );
    ensure!(
        two.ksm_pages(*there)? == 32 && three.ksm_pages(*elsewhere)? == 32,
        "others have lost shared pages"
    );

    one.verify(here.part(0, 16), NEW)?;
    let wanted = [
        OLD.page(16).with_byte(0, b'!').checksum(),
        OLD.page(17).with_byte(PAGE - 1, b'!').checksum(),
    ];
    ensure!(
        one.checksums(here.part(16, 2))? == wanted,
        "the copy of a page is wrong"
    );
    one.verify(here.part(18, 14), OLD.from_page(18))?;
    two.verify(*there, OLD)?;
    three.verify(*elsewhere, OLD)?;

    ksm.merge_until(Counters {
        shared: 32,
        sharing: 46,
        unshared: 18,
        volatile: 0,
    })?;
    two.verify(*there, OLD)?;
    three.verify(*elsewhere, OLD)?;
    // What becomes equal again is merged again.
    one.fill(*here, OLD)?;
    ksm.merge_until(Counters::merged(32, 64))?;
    one.verify(*here, OLD)
}

fn a_write_by_a_debugger_gives_a_private_copy(ksm: &Ksm) -> Result<()> {
    let Pair {
        mut one,
        here,
        mut other,
        there,
    } = Pair::merged(ksm)?;
    one.protect(here, libc::PROT_READ)?;
    let memory = OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/{}/mem", one.pid()))?;
    memory.write_all_at(&NEW.page(0).bytes(), here.page(0) as u64)?;
    ensure!(
        one.ksm_pages(here)? == 31,
        "a page written to is still shared"
    );
    one.verify(here.part(0, 1), NEW)?;
    one.verify(here.part(1, 31), OLD.from_page(1))?;
    other.verify(there, OLD)
}

fn unmergeable_advice_makes_pages_private(ksm: &Ksm) -> Result<()> {
    let Pair {
        mut one,
        here,
        mut other,
        there,
    } = Pair::merged(ksm)?;
    one.advise(here, libc::MADV_UNMERGEABLE)?;
    ensure!(one.ksm_pages(here)? == 0, "pages are still shared");
    one.verify(here, OLD)?;
    other.verify(there, OLD)?;
    // Not merged again either.
    ksm.scan_passes(4)?;
    ksm.expect(Counters::merged(32, 0))?;
    ensure!(one.ksm_pages(here)? == 0, "pages were merged again");
    ensure!(
        procfs::ksm_merging_pages(one.pid())? == 0,
        "private pages are counted as merged"
    );
    one.advise(here, libc::MADV_MERGEABLE)?;
    ksm.merge_until(Counters::merged(32, 32))?;
    one.verify(here, OLD)?;
    other.verify(there, OLD)
}

fn unmergeable_advice_on_a_part_leaves_the_rest(ksm: &Ksm) -> Result<()> {
    let Pair {
        mut one,
        here,
        mut other,
        there,
    } = Pair::merged(ksm)?;
    one.advise(here.part(8, 16), libc::MADV_UNMERGEABLE)?;
    ensure!(
        one.ksm_pages(here.part(8, 16))? == 0,
        "pages are still shared"
    );
    ensure!(
        one.ksm_pages(here)? == 16,
        "pages outside the part are not shared any more"
    );
    ksm.scan_passes(3)?;
    ksm.expect(Counters::merged(32, 16))?;
    one.verify(here, OLD)?;
    other.verify(there, OLD)
}

fn stopping_keeps_pages_merged(ksm: &Ksm) -> Result<()> {
    let Pair {
        mut one,
        here,
        mut other,
        there,
    } = Pair::merged(ksm)?;
    ensure!(ksm.read("run")? == 0, "run is not 0");
    let scanned = ksm.read("pages_scanned")?;
    let passes = ksm.read("full_scans")?;
    // New equal pages stay as they are while the thread rests. Its own pace is 5 ms.
    let (more, too) = (one.map_mergeable(32, NEW)?, other.map_mergeable(32, NEW)?);
    for _ in 0..20 {
        one.verify(here, OLD)?;
        other.verify(there, OLD)?;
    }
    ensure!(
        ksm.read("pages_scanned")? == scanned && ksm.read("full_scans")? == passes,
        "something was scanned"
    );
    ensure!(
        one.ksm_pages(here)? == 32 && other.ksm_pages(there)? == 32,
        "pages are not shared any more"
    );
    ensure!(
        one.ksm_pages(more)? == 0 && other.ksm_pages(too)? == 0,
        "pages were merged at rest"
    );
    ksm.expect(Counters::merged(32, 32))?;
    ksm.merge_until(Counters::merged(64, 64))?;
    one.verify(more, NEW)?;
    other.verify(too, NEW)
}

fn run_2_makes_every_page_private_until_it_is_run_again(ksm: &Ksm) -> Result<()> {
    let Pair {
        mut one,
        here,
        mut other,
        there,
    } = Pair::merged(ksm)?;
    for round in 0..3 {
        // From rest and from full activity.
        if round == 1 {
            ksm.start()?;
        }
        ksm.unmerge()?;
        ensure!(ksm.read("run")? == 2, "run is not 2");
        ksm.expect(Counters::merged(0, 0))?;
        ensure!(
            one.ksm_pages(here)? == 0 && other.ksm_pages(there)? == 0,
            "pages are still shared"
        );
        let (mine, theirs) = (one.pfns(here)?, other.pfns(there)?);
        ensure!(
            mine.iter().all(|pfn| !theirs.contains(pfn)),
            "the processes still map the same pages"
        );
        one.verify(here, OLD)?;
        other.verify(there, OLD)?;
        // Writing 2 again, and 0 after it, changes nothing.
        ksm.unmerge()?;
        ksm.stop()?;
        ksm.expect(Counters::merged(0, 0))?;
        ksm.merge_until(Counters::merged(32, 32))?;
        one.verify(here, OLD)?;
        other.verify(there, OLD)?;
    }
    Ok(())
}

fn memory_that_was_advised_during_run_2_merges_later(ksm: &Ksm) -> Result<()> {
    ksm.unmerge()?;
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(32, OLD)?;
    let there = other.map_mergeable(32, OLD)?;
    let mut child = one.fork()?;
    ksm.expect(Counters::merged(0, 0))?;
    ksm.merge_until(Counters::merged(32, 64))?;
    one.verify(here, OLD)?;
    child.verify(here, OLD)?;
    other.verify(there, OLD)
}

fn unmapped_pages_leave_the_others_alone(ksm: &Ksm) -> Result<()> {
    let Pair {
        mut one,
        here,
        mut other,
        there,
    } = Pair::merged(ksm)?;
    one.munmap(here.part(0, 8))?;
    one.munmap(here.part(20, 4))?;
    one.verify(here.part(8, 12), OLD.from_page(8))?;
    ksm.merge_until(Counters::merged(32, 20))?;
    other.munmap(there.part(4, 8))?;
    ksm.merge_until(Counters::merged(28, 16))?;
    one.verify(here.part(8, 12), OLD.from_page(8))?;
    one.verify(here.part(24, 8), OLD.from_page(24))?;
    other.verify(there.part(0, 4), OLD)?;
    other.verify(there.part(12, 20), OLD.from_page(12))
}

fn discarded_pages_leave_the_others_alone(ksm: &Ksm) -> Result<()> {
    let Pair {
        mut one,
        here,
        mut other,
        there,
    } = Pair::merged(ksm)?;
    one.advise(here.part(0, 16), libc::MADV_DONTNEED)?;
    ensure!(
        one.ksm_pages(here)? == 16,
        "discarded pages are still shared"
    );
    ksm.merge_until(Counters::merged(32, 16))?;
    one.verify(here.part(0, 16), Content::Zero)?;
    one.verify(here.part(16, 16), OLD.from_page(16))?;
    other.verify(there, OLD)?;
    one.advise(here, libc::MADV_UNMERGEABLE)?;
    one.verify(here.part(16, 16), OLD.from_page(16))?;
    other.verify(there, OLD)
}

fn pages_that_are_gone_by_the_thousand_are_forgotten_without_looking_again(
    ksm: &Ksm,
) -> Result<()> {
    const PAGES: usize = 20_000;
    const LEFT: usize = 100;
    let mut child = Child::spawn()?;
    let region = child.map_mergeable(PAGES, Content::Distinct(1))?;
    let mut passes = Passes::of(ksm)?;
    passes.pass()?;
    let known = || Ok::<_, Error>(ksm.read("pages_unshared")? + ksm.read("pages_volatile")?);
    ensure!(known()? == PAGES as u64, "{} pages are known", known()?);
    child.advise(region.part(0, PAGES - LEFT), libc::MADV_DONTNEED)?;
    let trace = match ksm.is_stock() {
        true => None,
        false => Some(Trace::of(ksm, &["batch"])?),
    };
    passes.pass()?;
    ensure!(known()? == LEFT as u64, "{} pages are known", known()?);
    if let Some(trace) = trace {
        // What is behind them is found once, and not again for each few that are forgotten.
        let batches = trace.events()?;
        let pages = batches.iter().map(|batch| batch.number::<usize>("pages"));
        let pages = pages.collect::<Result<Vec<_>>>()?;
        ensure!(
            !pages.contains(&0) && pages.iter().sum::<usize>() == LEFT,
            "batches of these pages: {pages:?}"
        );
    }
    child.verify(
        region.part(PAGES - LEFT, LEFT),
        Content::Distinct(1).from_page(PAGES - LEFT),
    )
}

fn the_last_sharer_to_go_frees_the_page(ksm: &Ksm) -> Result<()> {
    let Pair {
        one,
        here,
        mut other,
        there,
    } = Pair::merged(ksm)?;
    let pfns = one.pfns(here)?;
    // Somebody else has to be there: with nothing to scan, nothing is cleaned up either.
    let mut bystander = Child::spawn()?;
    let unique = bystander.map_mergeable(8, NEW)?;
    one.exit()?;
    ksm.merge_until(Counters::merged(32, 0).and_unshared(8))?;
    other.verify(there, OLD)?;
    other.kill()?;
    ksm.merge_until(Counters::merged(0, 0).and_unshared(8))?;
    for pfn in pfns {
        ensure!(!pfn.flags()?.ksm(), "{pfn:?} is still a KSM page");
    }
    bystander.verify(unique, NEW)
}

/// Somewhere to move things to.
fn destination(child: &mut Child) -> Result<usize> {
    let region = child.map(ksm_e2e::memory::Mapping::pages(64))?;
    child.munmap(region)?;
    Ok(region.addr)
}

fn a_moved_area_keeps_its_memory(ksm: &Ksm) -> Result<()> {
    let Pair {
        mut one,
        here,
        mut other,
        there,
    } = Pair::merged(ksm)?;
    let to = destination(&mut one)?;
    let moved = one.remap(here, 32, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to)?;
    ensure!(moved.addr == to, "moved to the wrong place");
    one.verify(moved, OLD)?;
    other.verify(there, OLD)?;
    ksm.merge_until(Counters::merged(32, 32))?;
    ensure!(
        one.pfns(moved)? == other.pfns(there)?,
        "the moved pages are not shared again"
    );
    // A part of it, elsewhere.
    let to = destination(&mut one)?;
    let part = one.remap(
        moved.part(8, 8),
        8,
        libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
        to,
    )?;
    ksm.merge_until(Counters::merged(32, 32))?;
    one.verify(moved.part(0, 8), OLD)?;
    one.verify(part, OLD.from_page(8))?;
    one.verify(moved.part(16, 16), OLD.from_page(16))?;
    ksm.unmerge()?;
    ensure!(
        one.ksm_pages(part)? == 0 && one.ksm_pages(moved.part(16, 16))? == 0,
        "pages are still shared"
    );
    one.verify(part, OLD.from_page(8))?;
    other.verify(there, OLD)
}

fn a_grown_area_keeps_its_memory(ksm: &Ksm) -> Result<()> {
    let Pair {
        mut one,
        here,
        mut other,
        there,
    } = Pair::merged(ksm)?;
    let grown = one.remap(here, 64, libc::MREMAP_MAYMOVE, 0)?;
    one.verify(grown.part(0, 32), OLD)?;
    one.fill(grown.part(32, 32), OLD)?;
    ksm.merge_until(Counters::merged(32, 64))?;
    one.verify(grown.part(0, 32), OLD)?;
    one.verify(grown.part(32, 32), OLD)?;
    other.verify(there, OLD)
}

fn a_shrunk_area_keeps_its_memory(ksm: &Ksm) -> Result<()> {
    let Pair {
        mut one,
        here,
        mut other,
        there,
    } = Pair::merged(ksm)?;
    let shrunk = one.remap(here, 16, 0, 0)?;
    ensure!(shrunk.addr == here.addr, "shrinking has moved the area");
    ensure!(
        one.ksm_pages(shrunk)? == 16,
        "shrinking has unshared pages that stay"
    );
    one.verify(shrunk, OLD)?;
    ksm.merge_until(Counters::merged(32, 16))?;
    one.verify(shrunk, OLD)?;
    other.verify(there, OLD)
}

fn an_area_moved_without_unmapping_keeps_its_memory(ksm: &Ksm) -> Result<()> {
    let Pair {
        mut one,
        here,
        mut other,
        there,
    } = Pair::merged(ksm)?;
    let moved = one.remap(here, 32, libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP, 0)?;
    one.verify(moved, OLD)?;
    ksm.merge_until(Counters::merged(32, 32))?;
    one.verify(here, Content::Zero)?;
    one.fill(here, OLD)?;
    ksm.merge_until(Counters::merged(32, 64))?;
    one.verify(here, OLD)?;
    one.verify(moved, OLD)?;
    other.verify(there, OLD)
}
