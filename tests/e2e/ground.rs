//! A short life of the module on whatever ground the kernel was booted with: huge pages, nodes, CPUs, page tables, slabs.
//!
//! The environment variable `KSM_E2E_GROUND` names the one that is meant, and the test makes sure that it is there.

use std::fs;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::Sharer;
use ksm_e2e::kmsg::Log;
use ksm_e2e::ksm::Counters;
use ksm_e2e::ksm::STOCK;
use ksm_e2e::memory::HUGE;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::PAGES_PER_HUGE;
use ksm_e2e::module;
use ksm_e2e::numa;
use ksm_e2e::procfs;
use ksm_e2e::sharer::shared_by;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;

ksm_e2e::tests![module_test:
    a_life_on_this_ground,
];

const PAGES: usize = 64;

const CONTENT: Content = Content::Distinct(1);

/// What the areas contain that huge pages could be in.
const LARGE: Content = Content::Distinct(10_000);

/// The first address that needs a fifth level of page tables.
const FIFTH_LEVEL: usize = 1 << 47;

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).context(path.to_owned())
}

fn log_says(text: &str) -> Result<bool> {
    let lines = Log::from_boot()?.lines()?;
    Ok(lines.iter().any(|line| line.contains(text)))
}

fn has_five_levels() -> Result<bool> {
    let cpus = read("/proc/cpuinfo")?;
    Ok(cpus.split_whitespace().any(|flag| flag == "la57"))
}

/// Huge pages that a process gets which asks for none and declines none; `None` if that depends.
fn unasked_huge_pages() -> Result<Option<usize>> {
    let Ok(text) = read("/sys/kernel/mm/transparent_hugepage/enabled") else {
        return Ok(Some(0));
    };
    Ok(if text.contains("[always]") {
        Some(1)
    } else if text.contains("[never]") {
        Some(0)
    } else {
        None
    })
}

/// Makes sure that the kernel was booted as `KSM_E2E_GROUND` says.
fn survey() -> Result<()> {
    let Ok(ground) = std::env::var("KSM_E2E_GROUND") else {
        return Ok(());
    };
    let there = match &*ground {
        "huge pages never" => unasked_huge_pages()? == Some(0),
        "huge pages always" => unasked_huge_pages()? == Some(1),
        // The machine has two nodes.
        "no NUMA" => log_says("NUMA turned off")? && numa::nodes()? == [0],
        "one CPU" => read("/sys/devices/system/cpu/online")?.trim_end() == "0",
        "slabs of their own" => {
            // Caches that were merged have names that begin so.
            let caches = fs::read_dir("/sys/kernel/slab")?;
            let mut names = caches.map(|entry| Ok(entry?.file_name()));
            names.try_fold(true, |alone, name: Result<_>| {
                anyhow::Ok(alone && !name?.to_string_lossy().starts_with(':'))
            })?
        }
        "memory wiped when freed" => log_says("heap free:on")?,
        "memory wiped when allocated" => log_says("heap alloc:on")?,
        // Both are asked for, and only one can be.
        "poisoned pages" => log_says("CONFIG_PAGE_POISONING is on, will take precedence")?,
        "four levels of page tables" => !has_five_levels()?,
        "five levels of page tables" => has_five_levels()?,
        "little memory" => procfs::meminfo("MemTotal")? < 400 << 10,
        other => bail!("KSM_E2E_GROUND={other:?} is unknown"),
    };
    ensure!(there, "the kernel was not booted with {ground}");
    Ok(())
}

/// Moves a process's memory to where only five levels of page tables reach.
fn move_up(child: &mut Child, region: Region) -> Result<Region> {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    child.remap(region, region.pages, flags, FIFTH_LEVEL + (HUGE << 10))
}

/// Two processes, with memory that is huge if the kernel gives huge pages to everybody.
fn spawn_large() -> Result<[(Child, Region); 2]> {
    let unasked = unasked_huge_pages()?;
    let spawn = || -> Result<_> {
        let mut child = Child::spawn()?;
        let region = child.map(Mapping {
            huge: None,
            ..Mapping::huge(1)
        })?;
        child.fill(region, LARGE)?;
        let huge = procfs::smaps_kb(child.pid(), region, "AnonHugePages")? as usize * 1024 / HUGE;
        ensure!(
            unasked.is_none_or(|unasked| unasked == huge),
            "the kernel gave {huge} huge pages instead of {unasked:?}"
        );
        child.advise(region, libc::MADV_MERGEABLE)?;
        Ok((child, region))
    };
    Ok([spawn()?, spawn()?])
}

fn a_life_on_this_ground(ksm: &Ksm) -> Result<()> {
    survey()?;
    let files = Ksm::at(STOCK).snapshot()?;
    let mut early = Sharer::spawn(PAGES, CONTENT)?;
    module::load("")?;
    ksm.scan_fast()?;
    ksm.write("smart_scan", 0)?;
    ksm.write("use_zero_pages", 1)?;
    ksm.write("scan_threads", 2)?;
    let mut late = Sharer::spawn(PAGES, CONTENT)?;
    if has_five_levels()? {
        let moved = move_up(&mut late.child, late.region)?;
        ensure!(moved.addr >= FIFTH_LEVEL, "moved to {:#x}", moved.addr);
        late.region = moved;
    }
    ksm.merge_until(shared_by(2, PAGES))?;
    let mut fork = late.fork()?;
    let mut empty = Sharer::spawn(PAGES, Content::Zero)?;
    ksm.merge_until(shared_by(3, PAGES))?;
    ksm.start()?;
    wait::until("empty pages become the zero page", PATIENCE, || {
        Ok(ksm.read("ksm_zero_pages")? == PAGES as u64)
    })?;
    let large = spawn_large()?;
    let pages = (PAGES + PAGES_PER_HUGE) as u64;
    let all = Counters::merged(pages, pages + PAGES as u64);
    ksm.merge_until(all)?;
    let mut large = large;
    for (child, region) in &mut large {
        child.verify(*region, LARGE)?;
    }

    // Some write, some go.
    fork.child
        .fill(fork.region.part(0, PAGES / 2), Content::Distinct(5000))?;
    let [(one, _), (mut other, there)] = large;
    one.kill()?;
    ksm.start()?;
    ksm.full_scans(2)?;
    other.verify(there, LARGE)?;
    other.kill()?;
    fork.child
        .verify(fork.region.part(0, PAGES / 2), Content::Distinct(5000))?;
    fork.child.kill()?;
    for sharer in [&mut early, &mut late, &mut empty] {
        sharer.verify()?;
    }

    ksm.unmerge()?;
    ksm.expect(Counters::merged(0, 0))?;
    for sharer in [&mut early, &mut late, &mut empty] {
        sharer.expect_private()?;
    }
    ksm.merge_until(shared_by(2, PAGES))?;
    module::unload()?;
    for sharer in [&mut early, &mut late, &mut empty] {
        sharer.expect_private()?;
    }
    let now = Ksm::at(STOCK).snapshot()?;
    ensure!(now == files, "stock's files were {files:?} and are {now:?}");
    Ok(())
}
