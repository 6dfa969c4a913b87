//! What `/proc` and the counters say about merging.

use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Passes;
use ksm_e2e::ksm::Counters;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::PAGE;
use ksm_e2e::procfs;
use ksm_e2e::swap::Group;
use ksm_e2e::swap::Swap;

ksm_e2e::tests![
    proc_files_tell_the_truth,
    ksm_stat_says_all_there_is_to_say,
    general_profit_is_what_is_saved_less_what_it_costs,
    copies_of_merged_pages_read_back_from_swap_are_counted,
];

fn proc_files_tell_the_truth(ksm: &Ksm) -> Result<()> {
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let merged = one.map_mergeable(64, Content::Distinct(10))?;
    let unique = one.map_mergeable(32, Content::Distinct(1000))?;
    let there = other.map_mergeable(64, Content::Distinct(10))?;
    for child in [&one, &other] {
        ensure!(
            procfs::ksm_merging_pages(child.pid())? == 0,
            "pages are counted as merged too early"
        );
        ensure!(
            procfs::ksm_stat(child.pid(), "ksm_rmap_items")? == 0,
            "pages are tracked before a scan"
        );
    }
    ksm.merge_until(Counters::merged(64, 64).and_unshared(32))?;

    for (child, tracked) in [(&one, 96), (&other, 64)] {
        let pid = child.pid();
        let seen = procfs::ksm_merging_pages(pid)?;
        ensure!(
            seen == 64,
            "ksm_merging_pages of {pid} is {seen} instead of 64"
        );
        let seen = procfs::ksm_stat(pid, "ksm_merging_pages")?;
        ensure!(
            seen == 64,
            "ksm_merging_pages in ksm_stat of {pid} is {seen} instead of 64"
        );
        let seen = procfs::ksm_stat(pid, "ksm_rmap_items")?;
        ensure!(
            seen == tracked,
            "ksm_rmap_items of {pid} is {seen} instead of {tracked}"
        );
        let seen = procfs::ksm_stat(pid, "ksm_zero_pages")?;
        ensure!(seen == 0, "ksm_zero_pages of {pid} is {seen} instead of 0");
    }
    let kb = |child: &Child, region| procfs::smaps_kb(child.pid(), region, "KSM");
    ensure!(
        kb(&one, merged)? == 256,
        "smaps shows {} kB of KSM for 64 merged pages",
        kb(&one, merged)?
    );
    ensure!(kb(&one, unique)? == 0, "smaps shows KSM for unmerged pages");
    ensure!(
        kb(&other, there)? == 256,
        "smaps shows {} kB of KSM for 64 merged pages",
        kb(&other, there)?
    );

    // A write is seen on the next pass.
    one.fill(merged.part(0, 16), Content::Distinct(5000))?;
    ensure!(
        kb(&one, merged)? == 192,
        "smaps counts pages that were written to"
    );
    ksm.merge_until(Counters {
        shared: 64,
        sharing: 48,
        unshared: 48,
        volatile: 0,
    })?;
    ensure!(
        procfs::ksm_merging_pages(one.pid())? == 48,
        "pages that were written to count as merged"
    );
    ensure!(
        procfs::ksm_merging_pages(other.pid())? == 64,
        "the only mapping of a merged page does not count"
    );

    ksm.unmerge()?;
    for (child, region) in [(&one, merged), (&other, there)] {
        ensure!(
            procfs::ksm_merging_pages(child.pid())? == 0,
            "unmerged pages count as merged"
        );
        ensure!(
            procfs::ksm_stat(child.pid(), "ksm_rmap_items")? == 0,
            "unmerged pages are still tracked"
        );
        ensure!(
            kb(child, region)? == 0,
            "smaps shows KSM for unmerged pages"
        );
    }
    Ok(())
}

/// What `ksm_stat` says of a process, in the kernel's order.
fn ksm_stat(tracked: usize, zeroes: usize, merging: usize, any: bool, mergeable: bool) -> String {
    // The kernel counts its own record of a page, whoever keeps which.
    let profit = ((merging + zeroes) * PAGE) as i64 - (tracked * 64) as i64;
    let word = |truth| if truth { "yes" } else { "no" };
    format!(
        "ksm_rmap_items {tracked}\nksm_zero_pages {zeroes}\nksm_merging_pages {merging}\n\
         ksm_process_profit {profit}\nksm_merge_any: {}\nksm_mergeable: {}\n",
        word(any),
        word(mergeable)
    )
}

fn ksm_stat_says_all_there_is_to_say(ksm: &Ksm) -> Result<()> {
    let expect = |child: &Child, wanted: String| -> Result<()> {
        let seen = procfs::ksm_stat_text(child.pid())?;
        ensure!(
            seen == wanted,
            "ksm_stat of process {} is {seen:?} instead of {wanted:?}",
            child.pid()
        );
        Ok(())
    };
    ksm.write("use_zero_pages", 1)?;
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    expect(&one, ksm_stat(0, 0, 0, false, false))?;
    let here = one.map_mergeable(32, Content::Distinct(1))?;
    one.map_mergeable(16, Content::Distinct(1000))?;
    one.map_mergeable(8, Content::Zero)?;
    other.map_mergeable(32, Content::Distinct(1))?;
    expect(&one, ksm_stat(0, 0, 0, false, true))?;
    let mut passes = Passes::of(ksm)?;
    passes.make(1)?;
    expect(&one, ksm_stat(56, 0, 0, false, true))?;
    // Without a saving the profit is a loss.
    passes.make(2)?;
    expect(&one, ksm_stat(48, 8, 32, false, true))?;
    expect(&other, ksm_stat(32, 0, 32, false, true))?;
    ksm.expect(Counters::merged(32, 32).and_unshared(16))?;

    let mut child = one.fork()?;
    expect(&child, ksm_stat(0, 8, 0, false, true))?;
    passes.make(3)?;
    expect(&child, ksm_stat(48, 8, 32, false, true))?;
    child.advise(here, libc::MADV_UNMERGEABLE)?;
    passes.make(1)?;
    expect(&child, ksm_stat(16, 8, 0, false, true))?;
    child.prctl(libc::PR_SET_MEMORY_MERGE, 1)?;
    let seen = procfs::ksm_stat_text(child.pid())?;
    ensure!(
        seen.ends_with("ksm_merge_any: yes\nksm_mergeable: yes\n"),
        "ksm_stat of a marked process is {seen:?}"
    );
    child.kill()?;
    ksm.unmerge()?;
    expect(&one, ksm_stat(0, 0, 0, false, true))?;
    expect(&other, ksm_stat(0, 0, 0, false, true))
}

fn general_profit_is_what_is_saved_less_what_it_costs(ksm: &Ksm) -> Result<()> {
    let profit = || ksm.read_signed("general_profit");
    ensure!(profit()? == 0, "general_profit is {} of nothing", profit()?);
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let unique = one.map_mergeable(100, Content::Distinct(1))?;
    let mut passes = Passes::of(ksm)?;
    passes.make(2)?;
    // So many bytes for each page that is looked at, for nothing.
    let record = -profit()? / 100;
    ensure!(
        (16..=64).contains(&record) && profit()? == -100 * record,
        "general_profit of 100 unique pages is {}",
        profit()?
    );
    ensure!(
        !ksm.is_stock() || record == 64,
        "stock's records have become smaller"
    );

    // Sixty pages that serve 180 more. What our own records of mappings and of KSM pages take is counted as well.
    for _ in 0..2 {
        one.map_mergeable(60, Content::Distinct(1000))?;
        other.map_mergeable(60, Content::Distinct(1000))?;
    }
    passes.make(2)?;
    ksm.expect(Counters::merged(60, 180).and_unshared(100))?;
    let saved = 180 * PAGE as i64;
    let cost = saved - profit()?;
    let pages = 340 * record;
    let bounds = if ksm.is_stock() {
        pages..=pages
    } else {
        pages + 240 * 64..=pages + 240 * 128 + 60 * 256
    };
    ensure!(
        bounds.contains(&cost),
        "{saved} bytes are saved, and general_profit is {}",
        profit()?
    );
    // Each mapping of a zero page is a page saved, once it is not looked at any more.
    let before = profit()?;
    ksm.write("use_zero_pages", 1)?;
    other.map_mergeable(50, Content::Zero)?;
    passes.make(3)?;
    ensure!(
        profit()? == before + 50 * PAGE as i64,
        "50 zero pages have brought general_profit from {before} to {}",
        profit()?
    );
    one.munmap(unique)?;
    passes.make(1)?;
    ensure!(
        profit()? == before + 50 * PAGE as i64 + 100 * record,
        "100 pages that are gone still cost something: {}",
        profit()?
    );
    ksm.unmerge()?;
    ensure!(
        profit()? == 0,
        "run=2 leaves a general_profit of {}",
        profit()?
    );
    Ok(())
}

fn copies_of_merged_pages_read_back_from_swap_are_counted(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(1);
    let swap = Swap::on(4096)?;
    let group = Group::new()?;
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    group.add(&one)?;
    group.add(&other)?;
    let here = one.map_mergeable(64, content)?;
    let there = other.map_mergeable(64, content)?;
    // Something for reclaim to find when it wants more than is asked for.
    let decoy = one.map(Mapping::pages(256))?;
    one.fill(decoy, Content::Distinct(9000))?;
    ksm.merge_until(Counters::merged(64, 64))?;
    group.swap_out(&[(&one, here), (&other, there)])?;
    let copies = || procfs::vmstat("ksm_swpin_copy");
    let before = copies()?;
    // The first to read a page takes it for its own; the second one finds it there, and needs a copy.
    one.verify(here, content)?;
    ensure!(
        copies()? == before,
        "the first reader of a page was given a copy"
    );
    other.verify(there, content)?;
    ensure!(
        copies()? == before + 64,
        "{} copies were made for the second reader of 64 pages",
        copies()? - before
    );
    let (mine, theirs) = (one.pfns(here)?, other.pfns(there)?);
    ensure!(
        mine.iter().all(|pfn| !theirs.contains(pfn)),
        "the processes still share pages"
    );
    // They are merged again by and by.
    ksm.merge_until(Counters::merged(64, 64))?;
    one.verify(here, content)?;
    other.verify(there, content)?;
    drop((one, other, group));
    swap.off()
}
