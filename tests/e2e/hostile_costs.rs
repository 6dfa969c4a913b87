//! What processes cost that want to make the thread work for nothing, or the kernel use memory: with ksm_rs, and with the
//! kernel's own KSM in the same boot. Prints a table, and fails where ksm_rs costs much more.
//!
//! What is compared as time is instructions: QEMU must count them (`--cpus 1 --qemu-opts "-icount shift=0,sleep=off"`), a thousand
//! to a microsecond, and `KSM_E2E_ICOUNT=1` says that it does. `make test` sees to that.

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Passes;
use ksm_e2e::Region;
use ksm_e2e::child;
use ksm_e2e::hash_key::HashKey;
use ksm_e2e::kprobe::Calls;
use ksm_e2e::ksm::OURS;
use ksm_e2e::ksm::STOCK;
use ksm_e2e::memory;
use ksm_e2e::memory::HUGE;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::PAGE;
use ksm_e2e::memory::PAGES_PER_HUGE;
use ksm_e2e::module;
use ksm_e2e::procfs;
use ksm_e2e::settings::Settings;
use ksm_e2e::userfault::Userfault;
use ksm_e2e::userfault::Watch;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;
use serde::Deserialize;
use serde::Serialize;

ksm_e2e::tests![module_test:
    contents_cost_no_more_time_than_with_stock,
    areas_cost_no_more_time_than_with_stock,
    sharing_costs_no_more_time_than_with_stock,
    processes_cost_no_more_time_than_with_stock,
    pages_that_cannot_be_merged_cost_no_more_time_than_with_stock,
    no_memory_costs_more_kernel_memory_than_with_stock,
];

/// A process that is up to something.
struct Scene {
    /// Pages that it has.
    pages: u64,
    /// What it does before each measurement.
    before: Box<dyn FnMut() -> Result<()>>,
    /// Passes that its doing takes to have its effect.
    passes: usize,
}

impl Scene {
    fn at_rest(pages: usize) -> Self {
        Self::active(pages, 1, || Ok(()))
    }

    fn active(pages: usize, passes: usize, before: impl FnMut() -> Result<()> + 'static) -> Self {
        Self {
            pages: pages as u64,
            before: Box::new(before),
            passes,
        }
    }
}

type Make = fn(&Ksm) -> Result<Scene>;

/// Scenes with their names, and by what factor ksm_rs may cost more than stock: where a pass is short, what it takes to
/// begin and end one shows.
type Scenes<'a> = &'a [(&'a str, Make, f64)];

fn contents_cost_no_more_time_than_with_stock(_: &Ksm) -> Result<()> {
    compare(&[
        ("nothing special: unique pages", unique, 1.5),
        ("pages that change before every pass", changing, 1.5),
        ("pages written to as soon as they are merged", broken, 1.5),
    ])
}

fn areas_cost_no_more_time_than_with_stock(_: &Ksm) -> Result<()> {
    compare(&[
        ("an area for every page", many_areas, 1.5),
        ("areas that nobody advised", unadvised_areas, 1.5),
        ("a page in every page table", sparse, 1.5),
        ("page tables full of the zero page", zero_page, 1.5),
    ])
}

fn sharing_costs_no_more_time_than_with_stock(_: &Ksm) -> Result<()> {
    compare(&[
        ("advice given and taken back all the time", readvised, 1.5),
        ("more equal pages than may share one", chain, 1.5),
    ])
}

fn processes_cost_no_more_time_than_with_stock(_: &Ksm) -> Result<()> {
    compare(&[
        ("forks of merged memory that come and go", forks, 2.5),
        ("processes without a page", empty_processes, 3.0),
    ])
}

fn pages_that_cannot_be_merged_cost_no_more_time_than_with_stock(_: &Ksm) -> Result<()> {
    compare(&[
        ("equal pages that are pinned", pinned, 1.5),
        // Which stock replaces.
        ("equal pages that may not be replaced", watched, 6.0),
        ("pages made to collide by who knows the key", colliding, 4.0),
    ])
}

/// What something costs for each pass.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Cost {
    pages: u64,
    cpu_nanosecs: u64,
    comparisons: u64,
    flushes: u64,
    copies: u64,
}

fn fill(region: Region, content: Content) {
    // SAFETY: Scenes fill what they have just mapped writable.
    unsafe { memory::fill(region, content) };
}

fn map(pages: usize, content: Content) -> Result<Region> {
    let region = Mapping::pages(pages).map()?;
    fill(region, content);
    memory::advise(region, libc::MADV_MERGEABLE)?;
    Ok(region)
}

/// As many areas as there are pages: every other one cannot be written to.
fn split(region: Region) -> Result<()> {
    for index in (0..region.pages).step_by(2) {
        memory::protect(region.part(index, 1), libc::PROT_READ)?;
    }
    Ok(())
}

fn unique(_: &Ksm) -> Result<Scene> {
    map(2048, Content::Distinct(1))?;
    Ok(Scene::at_rest(2048))
}

fn changing(_: &Ksm) -> Result<Scene> {
    let region = map(2048, Content::Distinct(1))?;
    let mut round = 0_u64;
    Ok(Scene::active(region.pages, 1, move || {
        round += 1;
        for addr in region.addresses() {
            // SAFETY: The region is mapped writable.
            unsafe { memory::write(addr + PAGE - 8, &round.to_le_bytes()) };
        }
        Ok(())
    }))
}

fn broken(_: &Ksm) -> Result<Scene> {
    let one = map(1024, Content::Distinct(1))?;
    let other = map(1024, Content::Distinct(1))?;
    Ok(Scene::active(2048, 2, move || {
        fill(one, Content::Distinct(1));
        fill(other, Content::Distinct(1));
        Ok(())
    }))
}

fn readvised(_: &Ksm) -> Result<Scene> {
    let one = map(1024, Content::Distinct(1))?;
    let other = map(1024, Content::Distinct(1))?;
    Ok(Scene::active(2048, 2, move || {
        for region in [one, other] {
            memory::advise(region, libc::MADV_UNMERGEABLE)?;
            memory::advise(region, libc::MADV_MERGEABLE)?;
        }
        Ok(())
    }))
}

fn many_areas(_: &Ksm) -> Result<Scene> {
    let region = map(4096, Content::Distinct(1))?;
    split(region)?;
    Ok(Scene::at_rest(region.pages))
}

fn unadvised_areas(_: &Ksm) -> Result<Scene> {
    let region = Mapping::pages(16_384).map()?;
    split(region)?;
    map(1, Content::Distinct(1))?;
    Ok(Scene::at_rest(1))
}

fn sparse(_: &Ksm) -> Result<Scene> {
    const TABLES: usize = 512;
    let region = Mapping::pages(TABLES * PAGES_PER_HUGE).map()?;
    memory::advise(region, libc::MADV_MERGEABLE)?;
    for table in 0..TABLES {
        fill(
            region.part(table * PAGES_PER_HUGE, 1),
            Content::Distinct(table as u64),
        );
    }
    Ok(Scene::at_rest(TABLES))
}

fn zero_page(_: &Ksm) -> Result<Scene> {
    let region = Mapping::pages(16_384).map()?;
    memory::advise(region, libc::MADV_MERGEABLE)?;
    // One page of its own, without which nobody looks at an area.
    fill(region.part(0, 1), Content::Distinct(1));
    for addr in region.addresses() {
        // SAFETY: The region is mapped.
        unsafe { memory::read(addr, 1) };
    }
    Ok(Scene::at_rest(1))
}

fn empty_processes(_: &Ksm) -> Result<Scene> {
    map(1, Content::Distinct(1))?;
    let region = Mapping::pages(1).map()?;
    memory::advise(region, libc::MADV_MERGEABLE)?;
    let mut children = Vec::new();
    for _ in 0..64 {
        let mut child = Child::spawn_program(|| Ok(()))?;
        let region = child.map(Mapping::pages(1))?;
        child.advise(region, libc::MADV_MERGEABLE)?;
        children.push(child);
    }
    Ok(Scene::active(1, 1, move || {
        children.iter().try_for_each(|child| {
            ensure!(child.alive()?, "a child is gone");
            Ok(())
        })
    }))
}

fn forks(_: &Ksm) -> Result<Scene> {
    const PAGES: usize = 256;
    const CHILDREN: usize = 8;
    map(PAGES, Content::Distinct(1))?;
    map(PAGES, Content::Distinct(1))?;
    let mut children = Vec::new();
    Ok(Scene::active(2 * PAGES * (CHILDREN + 1), 1, move || {
        children.clear();
        for _ in 0..CHILDREN {
            children.push(Child::spawn()?);
        }
        Ok(())
    }))
}

fn chain(ksm: &Ksm) -> Result<Scene> {
    ksm.write("max_page_sharing", 2)?;
    let region = map(4096, Content::Same(1))?;
    Ok(Scene::active(region.pages, 2, move || {
        fill(region.part(0, 64), Content::Same(1));
        Ok(())
    }))
}

fn pinned(_: &Ksm) -> Result<Scene> {
    const PIPES: usize = 32;
    let region = map(16 * PIPES, Content::Same(1))?;
    let mut held = Vec::new();
    for pipe in 0..PIPES {
        // SAFETY: The region is mapped, and not written to any more.
        held.push(unsafe { memory::hold(region.part(16 * pipe, 16)) }?);
    }
    Ok(Scene::active(region.pages, 1, move || {
        ensure!(held.len() == PIPES, "pages are held no more");
        Ok(())
    }))
}

fn watched(_: &Ksm) -> Result<Scene> {
    let region = map(256, Content::Same(1))?;
    let watcher = Userfault::open_for_protection()?;
    if let Some(watcher) = &watcher {
        watcher.watch(region, Watch::Protected)?;
        watcher.protect(region, true)?;
    }
    // What could merge with it.
    map(1, Content::Same(1))?;
    Ok(Scene::active(257, 1, move || {
        let _ = &watcher;
        Ok(())
    }))
}

fn colliding(ksm: &Ksm) -> Result<Scene> {
    let region = Mapping::pages(512).map()?;
    fill(region, Content::Same(1));
    let numbers = 1..=region.pages as u64;
    if ksm.is_stock() {
        for (addr, number) in region.addresses().zip(numbers) {
            // SAFETY: The region is mapped writable.
            unsafe { memory::write(addr + PAGE - 8, &number.to_le_bytes()) };
        }
    } else {
        let key = HashKey::of_the_module()?;
        // SAFETY: The region is mapped writable.
        unsafe { key.collide(region, numbers) };
    }
    memory::advise(region, libc::MADV_MERGEABLE)?;
    Ok(Scene::at_rest(region.pages))
}

/// CPU time of a thread that goes to sleep, once it sleeps: what it has used is known when another one runs.
fn cpu_when_asleep(thread: i32) -> Result<u64> {
    let seen = || -> Result<_> {
        Ok((
            procfs::cpu_nanosecs(thread)?,
            procfs::context_switches(thread)?,
        ))
    };
    let mut last = seen()?;
    wait::until("the thread sleeps", PATIENCE, || {
        let now = seen()?;
        Ok(std::mem::replace(&mut last, now) == now)
    })?;
    Ok(last.0)
}

/// Plays a scene in a process of its own, and measures what the thread does.
fn play(ksm: &Ksm, make: Make) -> Result<Cost> {
    const WARM: usize = 3;
    const ROUNDS: usize = 3;
    let settings = Settings::remember(ksm)?;
    ksm.write("smart_scan", 0)?;
    let cost = child::in_a_fork(|| {
        let mut passes = Passes::of(ksm)?;
        let name = if ksm.is_stock() { "ksmd" } else { "ksmd_rs" };
        let thread = procfs::pid_of(name)?.context("the thread is gone")?;
        let mut scene = make(ksm)?;
        for _ in 0..WARM {
            (scene.before)()?;
            passes.make(scene.passes)?;
        }
        let mut rounds = [0; ROUNDS];
        for round in &mut rounds {
            // A pass may be over sooner than the clock by which CPU time is counted goes on.
            wait::until("the thread's CPU time goes on", PATIENCE, || {
                (scene.before)()?;
                let before = cpu_when_asleep(thread)?;
                passes.make(scene.passes)?;
                *round = cpu_when_asleep(thread)? - before;
                Ok(*round > 0)
            })?;
        }
        // The one in the middle: one may be of a pass that had been made already.
        rounds.sort_unstable();
        let cpu_nanosecs = rounds[ROUNDS / 2];
        // Counting takes time of its own.
        (scene.before)()?;
        let comparisons = Calls::of("memcmp_pages")?;
        let flushes = Calls::of("ptep_clear_flush")?;
        let copies = procfs::vmstat("cow_ksm")?;
        passes.make(scene.passes)?;
        let per_pass = |count: u64| count / scene.passes as u64;
        Ok(Cost {
            pages: scene.pages,
            cpu_nanosecs: per_pass(cpu_nanosecs),
            comparisons: per_pass(comparisons.so_far()?),
            flushes: per_pass(flushes.so_far()?),
            copies: per_pass(procfs::vmstat("cow_ksm")? - copies),
        })
    })?;
    settings.bring_back()?;
    Ok(cost)
}

fn compare(scenes: Scenes) -> Result<()> {
    ensure!(
        std::env::var_os("KSM_E2E_ICOUNT").is_some(),
        "this test needs QEMU to count instructions: make test TEST=hostile_costs"
    );
    let all = |ksm: &Ksm| {
        let play = |(name, make, _): &(&str, Make, f64)| {
            play(ksm, *make).with_context(|| format!("{name}, with {}", ksm.dir().display()))
        };
        scenes.iter().map(play).collect::<Result<Vec<Cost>>>()
    };
    let stock = Ksm::at(STOCK);
    let wanted = all(&stock)?;
    stock.unmerge()?;
    stock.stop()?;
    module::load("")?;
    let seen = all(&Ksm::at(OURS))?;
    eprintln!(
        "\nper page and pass: microseconds, comparisons of pages, flushes of a mapping, copies; stock | ksm_rs"
    );
    let mut worse = Vec::new();
    for (((name, _, most), stock), ours) in scenes.iter().zip(&wanted).zip(&seen) {
        let row = |cost: &Cost| {
            let each = |number: u64| number as f64 / cost.pages as f64;
            format!(
                "{:8.2} {:6.2} {:5.2} {:5.2}",
                each(cost.cpu_nanosecs) / 1000.0,
                each(cost.comparisons),
                each(cost.flushes),
                each(cost.copies)
            )
        };
        let factor = ours.cpu_nanosecs as f64 / stock.cpu_nanosecs as f64;
        eprintln!("{name:45} {} | {} | {factor:5.2}", row(stock), row(ours));
        if factor > *most {
            worse.push(format!(
                "{name}: {factor:.2} times the time of stock, at most {most}"
            ));
        }
    }
    ensure!(worse.is_empty(), "{worse:#?}");
    Ok(())
}

/// What memory the kernel takes for something, in bytes for each of `pages`; measured after `make`, and given back after.
fn kernel_bytes<T>(pages: usize, make: impl FnOnce() -> Result<T>) -> Result<f64> {
    let used = || -> Result<u64> {
        // What is free in a cache is nobody's.
        for cache in procfs::kmalloc_caches()? {
            procfs::slab_objects(&cache)?;
        }
        for cache in ["ksm_rmap_item", "ksm_stable_node", "ksm_mm_slot"] {
            // Some of these are merged with others of their size.
            let _ = std::fs::write(format!("/sys/kernel/slab/{cache}/shrink"), "1");
        }
        Ok(procfs::meminfo("SUnreclaim")? + procfs::meminfo("VmallocUsed")?)
    };
    let before = used()?;
    let made = make()?;
    let after = used()?;
    drop(made);
    Ok((after as f64 - before as f64) * 1024.0 / pages as f64)
}

/// Bytes of kernel memory for each page.
#[derive(Clone, Copy, Debug)]
struct Memory {
    unique: f64,
    merged: f64,
    /// Records for each page that a process has, while it walks in front of the scan.
    walk: f64,
}

fn measure_memory(ksm: &Ksm) -> Result<Memory> {
    const PAGES: usize = 24_000;
    let settings = Settings::remember(ksm)?;
    ksm.write("smart_scan", 0)?;
    let scan = |region: Region, content: Content, passes: usize| {
        // The process and its page tables are there before; what is measured is what scanning adds.
        fill(region, content);
        kernel_bytes(PAGES, || {
            memory::advise(region, libc::MADV_MERGEABLE)?;
            Passes::of(ksm)?.make(passes)
        })
    };
    let region = Mapping::pages(PAGES).map()?;
    let unique = scan(region, Content::Distinct(1), 3)?;
    ksm.unmerge()?;
    ksm.stop()?;
    memory::munmap(region)?;
    // Each content twice.
    let region = Mapping::pages(PAGES).map()?;
    fill(region.part(PAGES / 2, PAGES / 2), Content::Distinct(1));
    fill(region.part(0, PAGES / 2), Content::Distinct(1));
    let merged = kernel_bytes(PAGES, || {
        memory::advise(region, libc::MADV_MERGEABLE)?;
        Passes::of(ksm)?.make(3)
    })?;
    ensure!(
        ksm.read("pages_sharing")? == PAGES as u64 / 2,
        "not all has merged"
    );
    ksm.unmerge()?;
    ksm.stop()?;
    memory::munmap(region)?;
    let walk = walk(ksm)?;
    settings.bring_back()?;
    Ok(Memory {
        unique,
        merged,
        walk,
    })
}

/// A process that moves its pages on as soon as they are scanned: most records that there are, for each page.
fn walk(ksm: &Ksm) -> Result<f64> {
    const STEPS: usize = 100;
    // A page table for each step, as the scan looks at whole ones.
    const PAGES: usize = PAGES_PER_HUGE;
    child::in_a_fork(|| {
        let mapping = Mapping {
            align: HUGE,
            ..Mapping::pages(PAGES * STEPS)
        };
        let region = mapping.map()?;
        memory::advise(region, libc::MADV_MERGEABLE)?;
        let mut passes = Passes::of(ksm)?;
        ksm.write("pages_to_scan", PAGES as u64)?;
        let mut most = 0;
        for step in 0..STEPS {
            let here = region.part(step * PAGES, PAGES);
            fill(here, Content::Distinct((step * PAGES) as u64));
            if step > 0 {
                memory::advise(region.part((step - 1) * PAGES, PAGES), libc::MADV_DONTNEED)?;
            }
            passes.turn_in_vain()?;
            most = most.max(procfs::ksm_stat(
                std::process::id() as i32,
                "ksm_rmap_items",
            )?);
        }
        Ok(most as f64 / PAGES as f64)
    })
}

fn no_memory_costs_more_kernel_memory_than_with_stock(_: &Ksm) -> Result<()> {
    let stock = Ksm::at(STOCK);
    let wanted = measure_memory(&stock)?;
    stock.unmerge()?;
    stock.stop()?;
    wait::until("stock has done", PATIENCE, || {
        Ok(stock.read("pages_shared")? == 0)
    })?;
    module::load("")?;
    let seen = measure_memory(&Ksm::at(OURS))?;
    for (what, stock, ours) in [
        ("bytes for a unique page", wanted.unique, seen.unique),
        ("bytes for a merged page", wanted.merged, seen.merged),
        ("records for a page that moves on", wanted.walk, seen.walk),
    ] {
        eprintln!("{what}: stock {stock:.1}, ksm_rs {ours:.1}");
    }
    ensure!(
        seen.unique <= wanted.unique && seen.walk <= wanted.walk / 2.0,
        "{seen:?}, where stock has {wanted:?}"
    );
    // An arena's record for each page and each mapping, with what the core reads of it, and of half a node.
    ensure!(
        seen.merged <= 190.0,
        "{} bytes for a merged page",
        seen.merged
    );
    Ok(())
}
