//! Merged pages under memory pressure: swap, mlock, compaction.

use std::collections::HashSet;
use std::fs;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::ksm::Counters;
use ksm_e2e::memory;
use ksm_e2e::memory::Mapping;
use ksm_e2e::procfs;
use ksm_e2e::procfs::Pfn;
use ksm_e2e::swap::Group;
use ksm_e2e::swap::Swap;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;

ksm_e2e::tests![
    merged_pages_are_swapped_out_and_come_back_right,
    swapped_out_pages_are_forgotten_and_found_again,
    run_2_leaves_nothing_of_swapped_out_pages,
    run_2_while_pages_are_read_back_leaves_nothing,
    pages_held_in_the_swap_cache_come_back_merged,
    run_2_gives_up_pages_held_in_the_swap_cache,
    zero_pages_are_not_swapped_out,
    turning_swap_off_brings_merged_pages_back,
    pages_read_back_from_swap_merge,
    reclaim_during_scanning_harms_nobody,
    locked_pages_merge_and_stay_locked,
    locked_merged_pages_are_not_swapped_out,
    compaction_moves_merged_pages,
];

const CONTENT: Content = Content::Distinct(1);
const PAGES: usize = 64;

/// Two processes with equal pages in a control group, and swap space to push them to.
struct Scene {
    one: Child,
    here: Region,
    other: Child,
    there: Region,
    // Dropped in this order: the group must be empty, and nobody needs the space any more.
    group: Group,
    swap: Swap,
}

impl Scene {
    fn new() -> Result<Self> {
        Self::of(PAGES)
    }

    fn of(pages: usize) -> Result<Self> {
        let swap = Swap::on(8192)?;
        let group = Group::new()?;
        let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
        group.add(&one)?;
        group.add(&other)?;
        let here = one.map_mergeable(pages, CONTENT)?;
        let there = other.map_mergeable(pages, CONTENT)?;
        Ok(Self {
            one,
            here,
            other,
            there,
            group,
            swap,
        })
    }

    fn merged(ksm: &Ksm) -> Result<Self> {
        let scene = Self::new()?;
        ksm.merge_until(Counters::merged(PAGES as u64, PAGES as u64))?;
        Ok(scene)
    }

    fn swap_out(&self) -> Result<()> {
        self.group
            .swap_out(&[(&self.one, self.here), (&self.other, self.there)])
    }

    fn verify(&mut self) -> Result<()> {
        self.one.verify(self.here, CONTENT)?;
        self.other.verify(self.there, CONTENT)
    }
}

fn merged_pages_are_swapped_out_and_come_back_right(ksm: &Ksm) -> Result<()> {
    let mut scene = Scene::merged(ksm)?;
    for _ in 0..3 {
        scene.swap_out()?;
        scene.verify()?;
        ksm.merge_until(Counters::merged(PAGES as u64, PAGES as u64))?;
        ensure!(
            scene.one.pfns(scene.here)? == scene.other.pfns(scene.there)?,
            "the pages were not merged again"
        );
        scene.verify()?;
    }
    // A write to what is in swap is the writer's alone.
    scene.swap_out()?;
    scene.one.fill(scene.here, Content::Distinct(9000))?;
    scene.other.verify(scene.there, CONTENT)?;
    scene.one.verify(scene.here, Content::Distinct(9000))
}

fn swapped_out_pages_are_forgotten_and_found_again(ksm: &Ksm) -> Result<()> {
    let mut scene = Scene::merged(ksm)?;
    let mut bystander = Child::spawn()?;
    let unique = bystander.map_mergeable(8, Content::Distinct(70_000))?;
    scene.swap_out()?;
    // Scanning neither reads pages back nor counts those that are gone.
    ksm.merge_until(Counters::merged(0, 0).and_unshared(8))?;
    let swapped = |child: &Child, region| -> Result<bool> {
        Ok(child
            .map_entries(region)?
            .iter()
            .all(|entry| entry.swapped()))
    };
    ensure!(
        swapped(&scene.one, scene.here)? && swapped(&scene.other, scene.there)?,
        "scanning has read pages back from swap"
    );
    ensure!(
        procfs::ksm_merging_pages(scene.one.pid())? == 0,
        "swapped-out pages count as merged"
    );
    scene.verify()?;
    ksm.merge_until(Counters::merged(PAGES as u64, PAGES as u64).and_unshared(8))?;
    scene.verify()?;
    bystander.verify(unique, Content::Distinct(70_000))
}

fn run_2_leaves_nothing_of_swapped_out_pages(ksm: &Ksm) -> Result<()> {
    let mut scene = Scene::merged(ksm)?;
    scene.swap_out()?;
    // Half of it is back in memory.
    scene.one.verify(scene.here.part(0, PAGES / 2), CONTENT)?;
    ksm.unmerge()?;
    ksm.expect(Counters::merged(0, 0))?;
    scene.verify()?;
    for (child, region) in [(&scene.one, scene.here), (&scene.other, scene.there)] {
        ensure!(
            procfs::ksm_merging_pages(child.pid())? == 0,
            "unmerged pages count as merged"
        );
        ensure!(
            procfs::ksm_stat(child.pid(), "ksm_rmap_items")? == 0,
            "unmerged pages are still tracked"
        );
        let still = child.ksm_pages(region)?;
        ensure!(
            still == 0,
            "{still} pages that were in swap during run=2 are shared"
        );
    }
    scene.one.fill(scene.here, Content::Distinct(9000))?;
    scene.other.verify(scene.there, CONTENT)
}

fn run_2_while_pages_are_read_back_leaves_nothing(ksm: &Ksm) -> Result<()> {
    let mut scene = Scene::of(512)?;
    for _ in 0..3 {
        ksm.merge_until(Counters::merged(512, 512))?;
        scene.swap_out()?;
        // Both processes fault all of it in while it is unmerged.
        scene.one.begin_verify(scene.here)?;
        scene.other.begin_verify(scene.there)?;
        ksm.unmerge()?;
        ksm.expect(Counters::merged(0, 0))?;
        scene.one.finish_verify(CONTENT)?;
        scene.other.finish_verify(CONTENT)?;
        for (child, region) in [(&scene.one, scene.here), (&scene.other, scene.there)] {
            ensure!(
                child.ksm_pages(region)? == 0
                    && procfs::ksm_stat(child.pid(), "ksm_rmap_items")? == 0,
                "run=2 has left something"
            );
        }
        let (mine, theirs) = (scene.one.pfns(scene.here)?, scene.other.pfns(scene.there)?);
        let theirs: HashSet<_> = theirs.into_iter().collect();
        ensure!(
            mine.iter().all(|pfn| !theirs.contains(pfn)),
            "the processes still map the same pages"
        );
    }
    Ok(())
}

/// Merged pages that neither process maps any more, of which one is the test's own: they are on their way to swap, and
/// cannot leave memory as somebody holds them. The core still finds their stable nodes.
struct Limbo {
    own: Region,
    other: Child,
    there: Region,
    pfns: Vec<Pfn>,
    _held: memory::Held,
    _group: Group,
    _swap: Swap,
}

impl Limbo {
    const PAGES: usize = 16;

    fn new(ksm: &Ksm) -> Result<Self> {
        let swap = Swap::on(4096)?;
        let group = Group::new()?;
        group.enter()?;
        let mut other = Child::spawn()?;
        let there = other.map_mergeable(Self::PAGES, CONTENT)?;
        let own = Mapping::pages(Self::PAGES).map()?;
        // SAFETY: The region was just mapped, and nothing else refers to it.
        unsafe { memory::fill(own, CONTENT) };
        memory::advise(own, libc::MADV_MERGEABLE)?;
        ksm.merge_until(Self::merged())?;
        let pfns = other.pfns(there)?;
        // SAFETY: As above.
        let held = unsafe { memory::hold(own) }?;
        group.swap_out_of(&[(std::process::id() as i32, own), (other.pid(), there)])?;
        for pfn in &pfns {
            ensure!(pfn.flags()?.ksm(), "{pfn:?} is not held");
        }
        Ok(Self {
            own,
            other,
            there,
            pfns,
            _held: held,
            _group: group,
            _swap: swap,
        })
    }

    fn merged() -> Counters {
        Counters::merged(Self::PAGES as u64, Self::PAGES as u64)
    }

    fn verify(&mut self) -> Result<()> {
        // SAFETY: The region is still mapped.
        CONTENT.check(&unsafe { memory::checksums(self.own) })?;
        self.other.verify(self.there, CONTENT)
    }
}

fn pages_held_in_the_swap_cache_come_back_merged(ksm: &Ksm) -> Result<()> {
    let mut limbo = Limbo::new(ksm)?;
    let copies = procfs::vmstat("ksm_swpin_copy")?;
    limbo.verify()?;
    ensure!(
        limbo.other.pfns(limbo.there)? == limbo.pfns
            && procfs::pfns(std::process::id() as i32, limbo.own)? == limbo.pfns
            && procfs::vmstat("ksm_swpin_copy")? == copies,
        "the merged pages are not mapped again"
    );
    ksm.expect(Limbo::merged())?;
    ksm.scan_passes(3)?;
    ksm.expect(Limbo::merged())?;
    limbo.verify()
}

fn run_2_gives_up_pages_held_in_the_swap_cache(ksm: &Ksm) -> Result<()> {
    let mut limbo = Limbo::new(ksm)?;
    let copies = procfs::vmstat("ksm_swpin_copy")?;
    ksm.unmerge()?;
    ksm.expect(Counters::merged(0, 0))?;
    // As long as run is 2 the core shares nothing anyway.
    ksm.stop()?;
    limbo.verify()?;
    ensure!(
        limbo.other.ksm_pages(limbo.there)? == 0
            && procfs::ksm_pages(std::process::id() as i32, limbo.own)? == 0,
        "pages that were on their way to swap during run=2 are shared"
    );
    ensure!(
        procfs::vmstat("ksm_swpin_copy")? == copies + 2 * Limbo::PAGES as u64,
        "each process needs copies of its own"
    );
    ksm.merge_until(Limbo::merged())?;
    limbo.verify()
}

fn zero_pages_are_not_swapped_out(ksm: &Ksm) -> Result<()> {
    ksm.write("use_zero_pages", 1)?;
    let mut scene = Scene::new()?;
    let empty = scene.one.map_mergeable(PAGES, Content::Zero)?;
    ksm.merge_until(Counters::merged(PAGES as u64, PAGES as u64))?;
    let zeroes = || ksm.read("ksm_zero_pages");
    ensure!(
        zeroes()? == PAGES as u64,
        "the empty pages are not replaced"
    );
    let before = scene.one.pfns(empty)?;
    scene.swap_out()?;
    ensure!(
        zeroes()? == PAGES as u64 && scene.one.pfns(empty)? == before,
        "reclaim has taken zero pages away"
    );
    // An empty page that went to swap is an empty page again when it comes back.
    let written = empty.part(0, 8);
    scene.one.fill(written, Content::Zero)?;
    ensure!(zeroes()? == PAGES as u64 - 8, "a write was not noticed");
    scene.group.swap_out(&[(&scene.one, written)])?;
    scene.one.verify(empty, Content::Zero)?;
    ksm.start()?;
    wait::until("the empty pages are replaced again", PATIENCE, || {
        Ok(zeroes()? == PAGES as u64)
    })?;
    scene.one.verify(empty, Content::Zero)?;
    scene.verify()
}

fn turning_swap_off_brings_merged_pages_back(ksm: &Ksm) -> Result<()> {
    let scene = Scene::merged(ksm)?;
    scene.swap_out()?;
    ensure!(scene.swap.used_kb()? > 0, "nothing is in swap");
    ksm.start()?;
    let Scene {
        mut one,
        here,
        mut other,
        there,
        group,
        swap,
    } = scene;
    swap.off()?;
    ksm.merge_until(Counters::merged(PAGES as u64, PAGES as u64))?;
    one.verify(here, CONTENT)?;
    other.verify(there, CONTENT)?;
    drop((one, other, group));
    Ok(())
}

fn pages_read_back_from_swap_merge(ksm: &Ksm) -> Result<()> {
    // Not merged before: pages fresh from swap, whose swap slots still exist.
    let mut scene = Scene::new()?;
    scene.swap_out()?;
    scene.verify()?;
    ksm.merge_until(Counters::merged(PAGES as u64, PAGES as u64))?;
    scene.verify()?;
    scene.swap_out()?;
    scene.verify()
}

fn reclaim_during_scanning_harms_nobody(ksm: &Ksm) -> Result<()> {
    let mut scene = Scene::merged(ksm)?;
    ksm.scan_at_full_speed()?;
    ksm.start()?;
    for round in 0..20 {
        // Pages are touched, merged and taken away at the same time, so some attempts get none.
        wait::until("a page is swapped out", PATIENCE, || {
            scene.group.reclaim(2 * scene.here.len())?;
            let entries = scene.one.map_entries(scene.here)?;
            Ok(entries.iter().any(|entry| entry.swapped()))
        })?;
        if round % 2 == 0 {
            scene.one.verify(scene.here, CONTENT)?;
        } else {
            scene.other.verify(scene.there, CONTENT)?;
        }
    }
    scene.verify()?;
    ksm.merge_until(Counters::merged(PAGES as u64, PAGES as u64))?;
    scene.verify()
}

fn locked_pages_merge_and_stay_locked(ksm: &Ksm) -> Result<()> {
    let locked_in_system = procfs::meminfo("Mlocked")?;
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(PAGES, CONTENT)?;
    let there = other.map_mergeable(PAGES, CONTENT)?;
    one.lock(here, true)?;
    let kb = (here.len() / 1024) as u64;
    let locked = |child: &Child| procfs::status(child.pid(), "VmLck");
    ensure!(
        locked(&one)? == kb && locked(&other)? == 0,
        "VmLck is wrong before merging"
    );
    ksm.merge_until(Counters::merged(PAGES as u64, PAGES as u64))?;
    ensure!(
        one.pfns(here)? == other.pfns(there)?,
        "the processes map different pages"
    );
    ensure!(
        locked(&one)? == kb && locked(&other)? == 0,
        "VmLck is wrong after merging"
    );
    for pfn in one.pfns(here)? {
        ensure!(
            pfn.flags()?.mlocked(),
            "a page of a locked area is not locked"
        );
    }

    // A copy made by writing is locked as well.
    one.fill(here.part(0, 16), Content::Distinct(9000))?;
    for pfn in one.pfns(here.part(0, 16))? {
        ensure!(
            pfn.flags()?.mlocked(),
            "the copy of a locked page is not locked"
        );
    }
    one.verify(here.part(0, 16), Content::Distinct(9000))?;
    one.verify(here.part(16, PAGES - 16), CONTENT.from_page(16))?;
    other.verify(there, CONTENT)?;
    one.lock(here, false)?;
    ensure!(locked(&one)? == 0, "VmLck is wrong after unlocking");
    ksm.unmerge()?;
    one.exit()?;
    other.verify(there, CONTENT)?;
    other.exit()?;
    wait::until_or_explain("no page counts as locked", PATIENCE, || {
        let now = procfs::meminfo("Mlocked")?;
        Ok((now != locked_in_system).then(|| format!("{now} kB instead of {locked_in_system} kB")))
    })
}

fn locked_merged_pages_are_not_swapped_out(ksm: &Ksm) -> Result<()> {
    let mut scene = Scene::new()?;
    scene.one.lock(scene.here, true)?;
    // Something else to take away, to see that reclaim works at all.
    let decoy = scene.other.map(Mapping::pages(PAGES))?;
    scene.other.fill(decoy, Content::Distinct(9000))?;
    ksm.merge_until(Counters::merged(PAGES as u64, PAGES as u64))?;
    scene.group.swap_out(&[(&scene.other, decoy)])?;
    let present = |child: &Child, region| -> Result<bool> {
        Ok(child
            .map_entries(region)?
            .iter()
            .all(|entry| entry.pfn().is_some()))
    };
    ensure!(
        present(&scene.one, scene.here)?,
        "a locked page was swapped out"
    );
    ksm.expect(Counters::merged(PAGES as u64, PAGES as u64))?;
    scene.verify()?;
    scene.other.verify(decoy, Content::Distinct(9000))
}

fn compaction_moves_merged_pages(ksm: &Ksm) -> Result<()> {
    let compact = "/proc/sys/vm/compact_memory";
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let (parts, pages) = (64, 8);
    let (mut here, mut there) = (Vec::new(), Vec::new());
    // Compaction moves pages from the low end of a zone into the holes of blocks that are partly used, near its high
    // end. So the merged pages are spread over many blocks, few to a block; and they are on the node whose zone of
    // movable memory is used for little else, lest other pages fill the holes first.
    for (child, regions) in [(&mut one, &mut here), (&mut other, &mut there)] {
        let filler = child.map(Mapping::pages(parts * memory::PAGES_PER_HUGE).on_node(1))?;
        child.fill(filler, Content::Same(3))?;
        for part in 0..parts {
            let region = filler.part(part * memory::PAGES_PER_HUGE, pages);
            child.fill(region, CONTENT.from_page(part * pages))?;
            child.advise(region, libc::MADV_MERGEABLE)?;
            regions.push(region);
            let rest = filler.part(
                part * memory::PAGES_PER_HUGE + pages,
                memory::PAGES_PER_HUGE - pages,
            );
            child.advise(rest, libc::MADV_DONTNEED)?;
        }
    }
    let merged = Counters::merged((parts * pages) as u64, (parts * pages) as u64);
    ksm.merge_until(merged)?;
    let before = pfns(&one, &here)?;
    wait::until("compaction has moved a merged page", PATIENCE, || {
        fs::write(compact, "1").context(compact)?;
        Ok(pfns(&one, &here)? != before)
    })?;
    let now = pfns(&one, &here)?;
    ensure!(
        now == pfns(&other, &there)?,
        "a page was moved for one process only"
    );
    for pfn in now {
        ensure!(
            pfn.flags()?.ksm(),
            "a moved page is not a KSM page any more"
        );
    }
    for (part, (&here, &there)) in here.iter().zip(&there).enumerate() {
        one.verify(here, CONTENT.from_page(part * pages))?;
        other.verify(there, CONTENT.from_page(part * pages))?;
    }
    ksm.merge_until(merged)
}

/// The page frames behind several regions of a process, one after the other.
fn pfns(child: &Child, regions: &[Region]) -> Result<Vec<Pfn>> {
    let mut all = Vec::new();
    for &region in regions {
        all.extend(child.pfns(region)?);
    }
    Ok(all)
}
