//! Processes that want to make the module work for nothing: what each can bring about is limited.
//!
//! `hostile_costs.rs` measures such processes against the kernel's own KSM; here are the limits that are ours.

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Passes;
use ksm_e2e::Region;
use ksm_e2e::hash_key::HashKey;
use ksm_e2e::kprobe::Calls;
use ksm_e2e::ksm::Counters;
use ksm_e2e::memory;
use ksm_e2e::memory::Mapping;
use ksm_e2e::procfs;
use ksm_e2e::userfault::Userfault;
use ksm_e2e::userfault::Watch;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;

ksm_e2e::tests![
    pages_made_to_collide_cost_so_many_comparisons_and_no_more,
    merged_pages_made_to_collide_cost_so_many_comparisons_and_no_more,
    a_page_that_waits_for_an_access_costs_its_likes_no_copies,
    a_walk_in_front_of_the_scan_leaves_few_records_behind,
    records_of_pages_that_are_gone_are_freed_within_the_budget,
    many_areas_are_not_passed_in_one_go,
    a_large_empty_area_is_little_work_for_run_2,
    everything_is_unmerged_while_processes_fork_without_end,
    kernel_memory_of_a_process_is_back_when_it_is_gone,
];

/// How many pages of its hash a page is compared with, at the most, in either tree.
const MOST: u64 = 16;

const CONTENT: Content = Content::Same(77);

fn own_pid() -> i32 {
    std::process::id() as i32
}

/// Comparisons of whole pages in one pass over memory that has come to rest.
fn comparisons_per_pass(passes: &mut Passes) -> Result<u64> {
    let calls = Calls::of("memcmp_pages")?;
    const PASSES: u64 = 2;
    passes.make(PASSES as usize)?;
    Ok(calls.so_far()? / PASSES)
}

/// Maps pages that are equal but for their last eight bytes, which are `numbers`, and that have the same hash.
fn map_colliding(key: &HashKey, numbers: &[u64]) -> Result<Region> {
    let region = Mapping::pages(numbers.len()).map()?;
    // SAFETY: The region was just mapped.
    unsafe {
        memory::fill(region, CONTENT);
        key.collide(region, numbers.iter().copied());
    }
    memory::advise(region, libc::MADV_MERGEABLE)?;
    Ok(region)
}

/// Fails unless the pages still have their numbers.
fn check_numbers(region: Region, numbers: &[u64]) -> Result<()> {
    for (addr, number) in region.addresses().zip(numbers) {
        // SAFETY: The region is mapped.
        let bytes = unsafe { memory::read(addr + memory::PAGE - 8, 8) };
        ensure!(bytes == number.to_le_bytes(), "a page has changed");
    }
    Ok(())
}

fn pages_made_to_collide_cost_so_many_comparisons_and_no_more(ksm: &Ksm) -> Result<()> {
    let key = HashKey::of_the_module()?;
    for pages in [64_u64, 256, 1024] {
        let numbers: Vec<u64> = (0..pages).collect();
        let region = map_colliding(&key, &numbers)?;
        let mut passes = Passes::of(ksm)?;
        passes.make(3)?;
        ksm.expect(Counters::merged(0, 0).and_unshared(pages))?;
        let comparisons = comparisons_per_pass(&mut passes)?;
        eprintln!(
            "{pages} pages of one hash: {:.1} comparisons for each and pass",
            comparisons as f64 / pages as f64
        );
        // If they did not collide, there would be none.
        ensure!(
            comparisons >= pages * MOST / 2,
            "only {comparisons} comparisons: these pages do not collide"
        );
        ensure!(
            comparisons <= pages * MOST,
            "{comparisons} comparisons for {pages} pages"
        );
        check_numbers(region, &numbers)?;
        ksm.stop()?;
        memory::munmap(region)?;
        ksm.unmerge()?;
    }
    Ok(())
}

fn merged_pages_made_to_collide_cost_so_many_comparisons_and_no_more(ksm: &Ksm) -> Result<()> {
    const PAIRS_AT_ONCE: u64 = 6;
    const LONERS: u64 = 8;
    let key = HashKey::of_the_module()?;
    let mut passes = Passes::of(ksm)?;
    let mut pairs = Vec::new();
    let mut merged = 0;
    let loners: Vec<u64> = (0..LONERS).map(|number| u64::MAX - number).collect();
    // What is merged is looked for by nobody but those who are of the same hash: one half of them after the other.
    for wanted in [12, 96] {
        while merged < wanted {
            // Few enough that each finds its like among those that it is compared with.
            let numbers: Vec<u64> = (merged..merged + PAIRS_AT_ONCE)
                .flat_map(|number| [number, number])
                .collect();
            let region = map_colliding(&key, &numbers)?;
            pairs.push((region, numbers));
            merged += PAIRS_AT_ONCE;
            passes.make(3)?;
        }
        ksm.expect(Counters::merged(merged, merged))?;
        let alone = map_colliding(&key, &loners)?;
        passes.make(3)?;
        ksm.expect(Counters::merged(merged, merged).and_unshared(LONERS))?;
        let comparisons = comparisons_per_pass(&mut passes)?;
        eprintln!(
            "{merged} KSM pages of one hash: {:.1} comparisons for each other page of it and pass",
            comparisons as f64 / LONERS as f64
        );
        ensure!(
            comparisons >= LONERS * merged.min(MOST),
            "only {comparisons} comparisons: these pages do not collide"
        );
        ensure!(
            comparisons <= 2 * LONERS * MOST,
            "{comparisons} comparisons for {LONERS} pages with {merged} KSM pages"
        );
        check_numbers(alone, &loners)?;
        memory::munmap(alone)?;
        passes.make(1)?;
    }
    for (region, numbers) in &pairs {
        check_numbers(*region, numbers)?;
    }
    Ok(())
}

fn a_page_that_waits_for_an_access_costs_its_likes_no_copies(ksm: &Ksm) -> Result<()> {
    const PAGES: usize = 64;
    let Some(watcher) = Userfault::open_for_protection()? else {
        // A kernel without this kind of protection has no such pages.
        return Ok(());
    };
    // Before there is anything that it would have from us.
    let mut other = Child::spawn()?;
    let region = Mapping::pages(PAGES).map()?;
    // SAFETY: The region was just mapped.
    unsafe { memory::fill(region, CONTENT) };
    memory::advise(region, libc::MADV_MERGEABLE)?;
    watcher.watch(region, Watch::Protected)?;
    watcher.protect(region, true)?;
    let mut passes = Passes::of(ksm)?;
    passes.make(3)?;
    ensure!(
        ksm.read("pages_shared")? == 0,
        "protected pages were merged"
    );

    // Pages of somebody else, equal to those that nobody may replace, merge with each other.
    let there = other.map_mergeable(PAGES, CONTENT)?;
    let before = procfs::vmstat("cow_ksm")?;
    passes.make(6)?;
    let copies = procfs::vmstat("cow_ksm")? - before;
    let pages = PAGES as u64;
    eprintln!("{copies} copies of KSM pages in 6 passes over {pages} pages");
    ensure!(copies == 0, "{copies} KSM pages were made in vain");
    other.verify(there, CONTENT)?;
    watcher.protect(region, false)?;
    passes.make(3)?;
    ksm.expect(Counters::merged(1, 2 * pages - 1))?;
    other.verify(there, CONTENT)?;
    // SAFETY: The region is mapped.
    CONTENT.check(&unsafe { memory::checksums(region) })
}

fn a_walk_in_front_of_the_scan_leaves_few_records_behind(ksm: &Ksm) -> Result<()> {
    // As many pages as are scanned in a turn, moved on after each: the pass goes on as long as there are addresses.
    // A page table for each step, as the scan looks at whole ones.
    const PAGES: usize = memory::PAGES_PER_HUGE;
    const STEPS: usize = 60;
    let mapping = Mapping {
        align: memory::HUGE,
        ..Mapping::pages(PAGES * STEPS)
    };
    let region = mapping.map()?;
    memory::advise(region, libc::MADV_MERGEABLE)?;
    let mut passes = Passes::of(ksm)?;
    ksm.write("pages_to_scan", PAGES as u64)?;
    let mut most = 0;
    for step in 0..STEPS {
        let here = region.part(step * PAGES, PAGES);
        // SAFETY: The region is mapped.
        unsafe { memory::fill(here, Content::Distinct((step * PAGES) as u64)) };
        if step > 0 {
            memory::advise(region.part((step - 1) * PAGES, PAGES), libc::MADV_DONTNEED)?;
        }
        passes.turn_in_vain()?;
        most = most.max(procfs::ksm_stat(own_pid(), "ksm_rmap_items")?);
    }
    let pages = PAGES as u64;
    eprintln!("{most} records of {pages} pages that were moved {STEPS} times in a pass");
    // Twice what it has, some to spare, and one batch.
    ensure!(
        most <= 2 * (pages + 1000) + 4096 + 128,
        "{most} records for {pages} pages"
    );
    // And they are gone with the next pass.
    ksm.write("pages_to_scan", 100_000)?;
    passes.turn_in_vain()?;
    passes.pass()?;
    let left = procfs::ksm_stat(own_pid(), "ksm_rmap_items")?;
    ensure!(left == pages, "{left} records are left");
    Ok(())
}

fn records_of_pages_that_are_gone_are_freed_within_the_budget(ksm: &Ksm) -> Result<()> {
    // Of every 128 pages all but one go: a batch of those that are left has very many records in between.
    const GROUP: usize = 128;
    const GROUPS: usize = 64;
    const BUDGET: u64 = 64;
    let region = Mapping::pages(GROUP * GROUPS).map()?;
    // SAFETY: The region was just mapped.
    unsafe { memory::fill(region, Content::Distinct(1)) };
    memory::advise(region, libc::MADV_MERGEABLE)?;
    let mut passes = Passes::of(ksm)?;
    passes.make(2)?;
    let records = || procfs::ksm_stat(own_pid(), "ksm_rmap_items");
    ensure!(
        records()? == (GROUP * GROUPS) as u64,
        "not all pages are known"
    );
    for group in 0..GROUPS {
        memory::advise(
            region.part(group * GROUP + 1, GROUP - 1),
            libc::MADV_DONTNEED,
        )?;
    }
    ksm.write("pages_to_scan", BUDGET)?;
    let mut most = 0;
    let mut before = records()?;
    let mut turns = 0;
    while before > GROUPS as u64 {
        passes.turn()?;
        let now = records()?;
        most = most.max(before - now);
        before = now;
        turns += 1;
        ensure!(turns < 1000, "{now} records are left after {turns} turns");
    }
    eprintln!("{most} records freed in a turn of {BUDGET} pages, at the most; {turns} turns");
    // Sixteen for a page, and a batch of them.
    ensure!(
        most <= 16 * BUDGET + 2 * 128,
        "{most} records freed in a turn of {BUDGET} pages"
    );
    Ok(())
}

fn many_areas_are_not_passed_in_one_go(ksm: &Ksm) -> Result<()> {
    const AREAS: usize = 8192;
    /// After so many without pages the scan lets go of everything.
    const STEPS: u64 = 512;
    let region = Mapping::pages(AREAS).map()?;
    // SAFETY: The region was just mapped.
    unsafe { memory::fill(region.part(0, 1), CONTENT) };
    memory::advise(region, libc::MADV_MERGEABLE)?;
    for index in (0..AREAS).step_by(2) {
        memory::protect(region.part(index, 1), libc::PROT_READ)?;
    }
    let mut passes = Passes::of(ksm)?;
    passes.make(1)?;
    let tries = Calls::of("down_read_trylock")?;
    passes.make(1)?;
    let tries = tries.so_far()?;
    eprintln!("{AREAS} areas were passed under {tries} holds of the mmap lock");
    ensure!(
        tries >= AREAS as u64 / STEPS,
        "{AREAS} areas were passed under {tries} holds of the mmap lock"
    );
    Ok(())
}

fn a_large_empty_area_is_little_work_for_run_2(ksm: &Ksm) -> Result<()> {
    const BYTES: usize = 16 << 40;
    /// There would be half a million if it were done 32 MB at a time.
    const MOST_HOLDS: u64 = 100;
    // SAFETY: A new mapping at an address of the kernel's choice touches no existing memory.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            BYTES,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    ensure!(base != libc::MAP_FAILED, "no room for a large area");
    let region = Region {
        addr: base as usize,
        pages: BYTES / memory::PAGE,
    };
    memory::advise(region, libc::MADV_NOHUGEPAGE)?;
    memory::advise(region, libc::MADV_MERGEABLE)?;
    let (first, last) = (region.part(0, 1), region.part(region.pages - 1, 1));
    for page in [first, last] {
        // SAFETY: The region was just mapped.
        unsafe { memory::fill(page, CONTENT) };
    }
    ksm.merge_until(Counters::merged(1, 1))?;
    let holds = Calls::of("down_read_trylock")?;
    ksm.unmerge()?;
    let holds = holds.so_far()?;
    eprintln!("{holds} holds of mmap locks");
    ksm.expect(Counters::merged(0, 0))?;
    for page in [first, last] {
        let pages = procfs::ksm_pages(own_pid(), page)?;
        ensure!(pages == 0, "a page is still merged");
        // SAFETY: It is mapped.
        CONTENT.check(&unsafe { memory::checksums(page) })?;
    }
    ensure!(
        holds <= MOST_HOLDS,
        "run=2 took {holds} holds of mmap locks for two pages"
    );
    Ok(())
}

fn everything_is_unmerged_while_processes_fork_without_end(ksm: &Ksm) -> Result<()> {
    const PAGES: usize = 2048;
    const FORKERS: usize = 4;
    ksm.write("max_page_sharing", 4 * PAGES as u64)?;
    let mut keeper = Child::spawn()?;
    let kept = keeper.map_mergeable(PAGES, CONTENT)?;
    let region = Mapping::pages(PAGES).map()?;
    // SAFETY: The region was just mapped.
    unsafe { memory::fill(region, CONTENT) };
    memory::advise(region, libc::MADV_MERGEABLE)?;
    ksm.merge_until(Counters::merged(1, 2 * PAGES as u64 - 1))?;
    let mut forkers = Vec::new();
    for _ in 0..FORKERS {
        let mut forker = Child::spawn()?;
        forker.fork_for_ever()?;
        forkers.push(forker);
    }
    let began = forks_since_boot()?;
    wait::until("they fork", PATIENCE, || {
        Ok(forks_since_boot()? > began + 50)
    })?;
    ksm.start()?;
    ksm.full_scans(2)?;
    let (start, forks) = (std::time::Instant::now(), forks_since_boot()?);
    ksm.unmerge()?;
    let (took, forks) = (start.elapsed(), forks_since_boot()? - forks);
    eprintln!("run=2 took {took:.1?}, in which {forks} processes were made");
    // The forkers themselves were merged before they forked again, and are not now.
    for forker in forkers {
        forker.kill()?;
    }
    wait::until("nothing is shared", PATIENCE, || {
        let counters = ksm.counters()?;
        Ok(counters.shared == 0 && counters.sharing == 0)
    })?;
    ensure!(took < PATIENCE, "unmerging took {took:?}");
    keeper.verify(kept, CONTENT)?;
    ensure!(keeper.ksm_pages(kept)? == 0, "something is still merged");
    // SAFETY: The region is mapped.
    CONTENT.check(&unsafe { memory::checksums(region) })
}

fn forks_since_boot() -> Result<u64> {
    procfs::field(&std::fs::read_to_string("/proc/stat")?, "processes")
}

fn kernel_memory_of_a_process_is_back_when_it_is_gone(ksm: &Ksm) -> Result<()> {
    const PAGES: usize = 6000;
    /// What others may take or give back meanwhile: a tenth of what one of three lives takes.
    const NOISE: u64 = 1800;
    let measure = || -> Result<Vec<(String, u64)>> {
        let mut objects = Vec::new();
        for cache in procfs::kmalloc_caches()? {
            // Those of others, which come and go.
            if !cache.contains("cg") && !cache.contains("rcl") {
                objects.push((cache.clone(), procfs::slab_objects(&cache)?));
            }
        }
        objects.push(("anon_vma".to_owned(), procfs::slab_objects("anon_vma")?));
        objects.push(("mm_struct".to_owned(), procfs::slab_objects("mm_struct")?));
        Ok(objects)
    };
    let live = |ksm: &Ksm| -> Result<(Child, Child)> {
        let mut children = [Child::spawn()?, Child::spawn()?];
        for (number, child) in children.iter_mut().enumerate() {
            child.map_mergeable(PAGES, Content::Distinct(1))?;
            child.map_mergeable(PAGES, Content::Distinct(1_000_000 * (number as u64 + 1)))?;
        }
        let pages = PAGES as u64;
        ksm.merge_until(Counters::merged(pages, pages).and_unshared(2 * pages + 2))?;
        let [one, other] = children;
        Ok((one, other))
    };
    // A node whose page is freed late, out of a CPU's cache of pages, goes at the end of a pass; for one there must be something
    // to scan.
    let mut witness = Child::spawn()?;
    witness.map_mergeable(2, Content::Distinct(100_000_000))?;
    let settle = || -> Result<()> {
        ksm.start()?;
        ksm.full_scans(2)?;
        ksm.stop()
    };
    // What is made once and kept is made now.
    drop(live(ksm)?);
    wait::until("all is forgotten", PATIENCE, || {
        settle()?;
        Ok(ksm.read("pages_shared")? + ksm.read("pages_sharing")? == 0)
    })?;
    let before = measure()?;
    for _ in 0..3 {
        let (one, other) = live(ksm)?;
        let used = procfs::slab_objects("kmalloc-64").context("rmap items are 64 bytes")?;
        let then = before.iter().find(|(cache, _)| cache == "kmalloc-64");
        let then = then.map_or(0, |(_, objects)| *objects);
        // A node for each KSM page, an item for each mapping.
        ensure!(
            used + NOISE >= then + 3 * PAGES as u64,
            "{used} objects, {then} before: what is measured is not where it is"
        );
        one.kill()?;
        other.kill()?;
    }
    wait::until_or_explain("memory is back to what it was", PATIENCE, || {
        settle()?;
        let grown: Vec<String> = measure()?
            .into_iter()
            .filter_map(|(cache, now)| {
                let then = before.iter().find(|(name, _)| *name == cache);
                let then = then.map_or(0, |(_, then)| *then);
                (now > then + NOISE).then(|| format!("{cache} grew from {then} to {now}"))
            })
            .collect();
        Ok((!grown.is_empty()).then(|| grown.join(", ")))
    })
}
