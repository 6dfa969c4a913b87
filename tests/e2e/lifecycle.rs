//! Loading and unloading the module.

use std::fs;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::ksm::Counters;
use ksm_e2e::ksm::STOCK;
use ksm_e2e::leftovers::Leftovers;
use ksm_e2e::memory;
use ksm_e2e::memory::Mapping;
use ksm_e2e::module;
use ksm_e2e::procfs;
use ksm_e2e::swap::Group;
use ksm_e2e::swap::Swap;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;
use nix::errno::Errno;

ksm_e2e::tests![module_test:
    loading_is_refused_while_stock_ksm_runs,
    loading_is_refused_while_stock_ksm_holds_pages,
    stock_files_make_way_for_a_link_and_come_back,
    without_drop_in_there_is_no_link,
    run_can_be_a_parameter,
    memory_that_was_advised_before_loading_is_found,
    unloading_restores_every_page_and_stock_ksm,
    unloading_reaches_children_that_were_never_scanned,
    an_open_file_does_not_keep_the_module,
    fifty_lives_leave_nothing_behind,
    unloading_while_processes_come_and_go,
    unloading_at_full_speed_keeps_memory_right,
    unloading_leaves_pages_in_swap_alone,
    unloading_while_pages_are_read_back,
    unloading_gives_up_pages_held_in_the_swap_cache,
    unloading_takes_zero_pages_away,
    unloading_ends_all_threads,
    an_idle_module_wakes_nobody,
];

const CONTENT: Content = Content::Distinct(1);
const PAGES: usize = 64;

fn stock() -> Ksm {
    Ksm::at(STOCK)
}

/// Two processes with equal pages that may be merged.
struct Pair {
    one: Child,
    here: Region,
    other: Child,
    there: Region,
}

impl Pair {
    fn spawn() -> Result<Self> {
        let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
        let here = one.map_mergeable(PAGES, CONTENT)?;
        let there = other.map_mergeable(PAGES, CONTENT)?;
        Ok(Self {
            one,
            here,
            other,
            there,
        })
    }

    fn verify(&mut self) -> Result<()> {
        self.one.verify(self.here, CONTENT)?;
        self.other.verify(self.there, CONTENT)
    }

    /// Nothing is merged, and nobody thinks so.
    fn expect_private(&mut self) -> Result<()> {
        for (child, region) in [(&self.one, self.here), (&self.other, self.there)] {
            let pid = child.pid();
            ensure!(
                child.ksm_pages(region)? == 0,
                "process {pid} has merged pages"
            );
            ensure!(
                procfs::ksm_merging_pages(pid)? == 0,
                "process {pid} counts pages as merged"
            );
            ensure!(
                procfs::ksm_stat(pid, "ksm_rmap_items")? == 0,
                "pages of process {pid} are tracked"
            );
        }
        self.verify()
    }
}

fn merged() -> Counters {
    Counters::merged(PAGES as u64, PAGES as u64)
}

/// Scans with the knobs that the tests like, until the pair is merged.
fn merge(ksm: &Ksm) -> Result<()> {
    ksm.scan_fast()?;
    if ksm.has("smart_scan") {
        ksm.write("smart_scan", 0)?;
    }
    ksm.merge_until(merged())
}

/// Tries to load, expects to be refused with this error and one line in the log.
fn expect_refusal(parameters: &str, wanted: Errno) -> Result<String> {
    module::expect_refusal(wanted, || module::try_load(parameters))
        .with_context(|| format!("loading with {parameters:?}"))
}

fn loading_is_refused_while_stock_ksm_runs(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::spawn()?;
    let before = stock().remember()?;
    stock().write("sleep_millisecs", 3_600_000)?;
    stock().start()?;
    let files = stock().snapshot()?;
    let line = expect_refusal("", Errno::EBUSY)?;
    ensure!(
        line.contains("/sys/kernel/mm/ksm/run"),
        "the line does not say what to do: {line:?}"
    );
    // `full_scans` and the like go on counting.
    let names = |files: &std::collections::BTreeMap<String, (u32, String)>| -> Vec<(String, u32)> {
        files
            .iter()
            .map(|(name, (mode, _))| (name.clone(), *mode))
            .collect()
    };
    ensure!(
        names(&stock().snapshot()?) == names(&files),
        "the refusal has changed stock's files"
    );
    ensure!(
        !ksm.exists(),
        "the refusal has left {}",
        ksm.dir().display()
    );
    ensure!(
        stock().read("run")? == 1,
        "the refusal has stopped stock KSM"
    );
    // Stock KSM works on.
    merge(&stock())?;
    pair.verify()?;
    before.finish()?;
    module::load("")
}

fn loading_is_refused_while_stock_ksm_holds_pages(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::spawn()?;
    let before = stock().remember()?;
    merge(&stock())?;
    ensure!(stock().read("run")? == 0, "stock KSM runs");
    let files = stock().snapshot()?;
    let line = expect_refusal("", Errno::EBUSY)?;
    ensure!(
        line.contains("/sys/kernel/mm/ksm/run"),
        "the line does not say what to do: {line:?}"
    );
    ensure!(
        stock().snapshot()? == files,
        "the refusal has changed stock's files"
    );
    ensure!(
        !ksm.exists(),
        "the refusal has left {}",
        ksm.dir().display()
    );
    stock().expect(merged())?;
    pair.verify()?;
    before.finish()?;
    module::load("")?;
    merge(ksm)?;
    pair.verify()
}

fn stock_files_make_way_for_a_link_and_come_back(ksm: &Ksm) -> Result<()> {
    let files = stock().snapshot()?;
    ensure!(
        files.contains_key("run") && files.contains_key("use_zero_pages"),
        "stock KSM is not there: {files:?}"
    );
    for _ in 0..3 {
        module::load("")?;
        let link =
            fs::read_link(STOCK).context("there is no link in the place of stock's files")?;
        ensure!(
            link == Path::new("ksm_rs"),
            "the link points to {}",
            link.display()
        );
        // What is done through the link is done to us.
        let through = Ksm::at(STOCK);
        through.write("pages_to_scan", 77)?;
        ensure!(ksm.read("pages_to_scan")? == 77, "the link leads elsewhere");
        module::unload()?;
        ensure!(
            !ksm.dir().exists(),
            "{} has outlived the module",
            ksm.dir().display()
        );
        ensure!(
            !fs::symlink_metadata(STOCK)?.is_symlink(),
            "the link has outlived the module"
        );
        ensure!(
            stock().snapshot()? == files,
            "stock's files are not what they were"
        );
    }
    Ok(())
}

fn without_drop_in_there_is_no_link(ksm: &Ksm) -> Result<()> {
    let files = stock().snapshot()?;
    module::load("drop_in=0")?;
    ensure!(
        fs::symlink_metadata(STOCK).is_err(),
        "there is something at {STOCK}"
    );
    let mut pair = Pair::spawn()?;
    merge(ksm)?;
    pair.verify()?;
    module::unload()?;
    ensure!(
        stock().snapshot()? == files,
        "stock's files are not what they were"
    );
    pair.expect_private()
}

fn run_can_be_a_parameter(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::spawn()?;
    module::load("run=1")?;
    ensure!(ksm.read("run")? == 1, "run is {}", ksm.read("run")?);
    // At its own pace of 100 pages every 20 ms.
    ksm.scan_until(merged())?;
    pair.verify()?;
    module::unload()?;
    pair.expect_private()?;
    for run in [0, 2] {
        module::load(&format!("run={run}"))?;
        ensure!(
            ksm.read("run")? == run,
            "run is {} instead of {run}",
            ksm.read("run")?
        );
        module::unload()?;
    }
    Ok(())
}

fn memory_that_was_advised_before_loading_is_found(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::spawn()?;
    // A fork of such a process, one that has exited, and one that is marked as a whole.
    let mut child = pair.one.fork()?;
    let gone = pair.other.fork()?;
    gone.exit()?;
    let mut marked = Child::spawn()?;
    marked.prctl(libc::PR_SET_MEMORY_MERGE, 1)?;
    let marks = marked.map(Mapping::pages(PAGES))?;
    marked.fill(marks, CONTENT)?;
    module::load("")?;
    ksm.scan_fast()?;
    ksm.start()?;
    wait::until("all of it is merged", PATIENCE, || {
        let everybody = [
            (&pair.one, pair.here),
            (&pair.other, pair.there),
            (&child, pair.here),
            (&marked, marks),
        ];
        let merged = everybody
            .iter()
            .map(|(child, region)| child.ksm_pages(*region));
        Ok(merged.sum::<Result<usize>>()? == 4 * PAGES)
    })?;
    child.verify(pair.here, CONTENT)?;
    marked.verify(marks, CONTENT)?;
    pair.verify()
}

fn unloading_restores_every_page_and_stock_ksm(ksm: &Ksm) -> Result<()> {
    let files = stock().snapshot()?;
    module::load("")?;
    let mut pair = Pair::spawn()?;
    merge(ksm)?;
    let mut child = pair.one.fork()?;
    module::unload()?;
    pair.expect_private()?;
    ensure!(
        child.ksm_pages(pair.here)? == 0,
        "a forked process has merged pages"
    );
    child.verify(pair.here, CONTENT)?;
    ensure!(
        procfs::pid_of("ksmd_rs")?.is_none(),
        "the thread has outlived the module"
    );
    ensure!(
        stock().snapshot()? == files,
        "stock's files are not what they were"
    );
    child.kill()?;

    // The same processes, in stock's hands now, and in ours again.
    let before = stock().remember()?;
    merge(&stock())?;
    ensure!(
        pair.one.pfns(pair.here)? == pair.other.pfns(pair.there)?,
        "stock KSM does not merge"
    );
    pair.verify()?;
    before.finish()?;
    pair.expect_private()?;
    module::load("")?;
    merge(ksm)?;
    pair.verify()
}

fn unloading_reaches_children_that_were_never_scanned(ksm: &Ksm) -> Result<()> {
    module::load("")?;
    let mut pair = Pair::spawn()?;
    merge(ksm)?;
    let mut family = vec![pair.one.fork()?];
    for generation in 0..3 {
        let child = family[generation].fork()?;
        family.push(child);
    }
    // Those in between are gone: the youngest one's pages are nobody's whom the module has met.
    let mut youngest = family.pop().context("there are four")?;
    drop(family);
    module::unload()?;
    ensure!(
        youngest.ksm_pages(pair.here)? == 0,
        "a forked process has merged pages"
    );
    youngest.verify(pair.here, CONTENT)?;
    pair.expect_private()
}

fn an_open_file_does_not_keep_the_module(ksm: &Ksm) -> Result<()> {
    module::load("")?;
    let file = File::open(ksm.dir().join("pages_shared"))?;
    let mut text = [0; 16];
    ensure!(file.read_at(&mut text, 0)? > 0, "nothing can be read");
    let knob = File::options().write(true).open(ksm.dir().join("run"))?;
    module::unload()?;
    let result = file.read_at(&mut text, 0);
    let gone = |error: &std::io::Error| error.raw_os_error() == Some(libc::ENODEV);
    ensure!(
        result.as_ref().is_err_and(gone),
        "reading a file of a module that is gone: {result:?}"
    );
    let result = knob.write_at(b"1", 0);
    ensure!(
        result.as_ref().is_err_and(gone),
        "writing a file of a module that is gone: {result:?}"
    );
    let result = File::open(ksm.dir().join("run"));
    ensure!(
        result.is_err_and(|error| error.kind() == ErrorKind::NotFound),
        "the file is still there"
    );
    Ok(())
}

/// One life: load, merge, unload. All processes are new, and gone at the end.
fn live(ksm: &Ksm, life: usize) -> Result<()> {
    // Advised before and after loading by turns.
    let early = if life.is_multiple_of(2) {
        Some(Pair::spawn()?)
    } else {
        None
    };
    module::load("")?;
    let mut pair = early.map_or_else(Pair::spawn, Ok)?;
    merge(ksm)?;
    if life.is_multiple_of(3) {
        // Some pages are swapped for others, some processes do not see the end.
        pair.one
            .fill(pair.here.part(0, 8), Content::Distinct(9000))?;
        pair.one.fork()?.kill()?;
        ksm.start()?;
        pair.one.fill(pair.here.part(0, 8), CONTENT)?;
    }
    module::unload()?;
    pair.expect_private()
}

fn fifty_lives_leave_nothing_behind(ksm: &Ksm) -> Result<()> {
    // One life handles 128 pages, 128 or more items, 64 nodes and two processes or more. So a leak of any kind, once in each
    // life, shows as 50 objects or many more.
    for life in 0..5 {
        live(ksm, life)?;
    }
    let before = Leftovers::now()?;
    for life in 0..50 {
        live(ksm, life).with_context(|| format!("in life {life}"))?;
    }
    before.expect_no_more()
}

fn unloading_while_processes_come_and_go(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::spawn()?;
    for life in 0..15 {
        module::load("run=1")?;
        ksm.scan_at_full_speed()?;
        let mut writer = Child::spawn()?;
        let region = writer.map_mergeable(PAGES, CONTENT)?;
        writer.churn(region, 1)?;
        let mut forks = Vec::new();
        for _ in 0..3 {
            forks.push(pair.one.fork()?);
        }
        if life % 3 != 0 {
            wait::until("something is merged", PATIENCE, || {
                Ok(ksm.read("pages_sharing")? > 0)
            })?;
        }
        // A helper that unloads, while this process goes on forking and killing.
        let unloader = std::thread::spawn(module::unload);
        while !unloader.is_finished() {
            // From an existing process: this one has two threads now, and must not fork.
            forks.push(pair.other.fork()?);
            forks.remove(0).kill()?;
        }
        unloader
            .join()
            .map_err(|_| anyhow::anyhow!("the unloader panicked"))??;
        ensure!(
            writer.alive()?,
            "a process has read something that it did not write"
        );
        writer.kill()?;
        pair.expect_private()?;
        for mut child in forks {
            // Forked from either of the two, and with either's memory at either's address.
            let (here, there) = (child.ksm_pages(pair.here), child.ksm_pages(pair.there));
            ensure!(
                here.unwrap_or(0) == 0 && there.unwrap_or(0) == 0,
                "a forked process has merged pages"
            );
            let region = if child
                .map_entries(pair.here)?
                .iter()
                .all(|entry| entry.pfn().is_some())
            {
                pair.here
            } else {
                pair.there
            };
            child.verify(region, CONTENT)?;
        }
    }
    pair.verify()
}

fn unloading_at_full_speed_keeps_memory_right(ksm: &Ksm) -> Result<()> {
    // Unloading at every stage of a merge: nothing scanned yet, something, everything.
    let mut pair = Pair::spawn()?;
    for life in 0..16 {
        module::load("run=1")?;
        ksm.scan_at_full_speed()?;
        let wanted = [0, 1, 20, 64][life % 4];
        wait::until("enough pages are merged", PATIENCE, || {
            Ok(ksm.read("pages_sharing")? >= wanted)
        })?;
        module::unload()?;
        pair.expect_private()
            .with_context(|| format!("in life {life}"))?;
    }
    Ok(())
}

fn unloading_leaves_pages_in_swap_alone(ksm: &Ksm) -> Result<()> {
    let swap = Swap::on(8192)?;
    let group = Group::new()?;
    module::load("")?;
    // Before there is any memory: it belongs to the group that it was touched in.
    group.enter()?;
    let mut pair = Pair::spawn()?;
    merge(ksm)?;
    group.swap_out(&[(&pair.one, pair.here), (&pair.other, pair.there)])?;
    // Some of it is back in memory, for one process only.
    pair.one.verify(pair.here.part(0, PAGES / 4), CONTENT)?;
    let used = swap.used_kb()?;
    module::unload()?;
    ensure!(
        used > 0 && swap.used_kb()? > 0,
        "unloading has read swap back"
    );
    pair.expect_private()?;
    let (mine, theirs) = (pair.one.pfns(pair.here)?, pair.other.pfns(pair.there)?);
    ensure!(
        mine.iter().all(|pfn| !theirs.contains(pfn)),
        "the processes share pages"
    );
    // Again, with a module that finds the pages in swap when it is loaded.
    group.swap_out(&[(&pair.one, pair.here), (&pair.other, pair.there)])?;
    module::load("")?;
    pair.verify()?;
    merge(ksm)?;
    pair.verify()?;
    drop((pair, group));
    swap.off()
}

fn unloading_while_pages_are_read_back(ksm: &Ksm) -> Result<()> {
    let pages = 512;
    let swap = Swap::on(8192)?;
    let group = Group::new()?;
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    group.add(&one)?;
    group.add(&other)?;
    let here = one.map_mergeable(pages, CONTENT)?;
    let there = other.map_mergeable(pages, CONTENT)?;
    for _ in 0..3 {
        module::load("")?;
        ksm.scan_fast()?;
        ksm.write("smart_scan", 0)?;
        ksm.merge_until(Counters::merged(pages as u64, pages as u64))?;
        group.swap_out(&[(&one, here), (&other, there)])?;
        one.begin_verify(here)?;
        other.begin_verify(there)?;
        module::unload()?;
        one.finish_verify(CONTENT)?;
        other.finish_verify(CONTENT)?;
        ensure!(
            one.ksm_pages(here)? == 0 && other.ksm_pages(there)? == 0,
            "merged pages have outlived the module"
        );
    }
    drop((one, other, group));
    swap.off()
}

fn unloading_gives_up_pages_held_in_the_swap_cache(ksm: &Ksm) -> Result<()> {
    // No page table maps these pages when the module goes, but the core finds their nodes until they leave memory,
    // which somebody who holds them prevents.
    let pages = 16;
    let swap = Swap::on(4096)?;
    let group = Group::new()?;
    group.enter()?;
    module::load("")?;
    let mut other = Child::spawn()?;
    let there = other.map_mergeable(pages, CONTENT)?;
    let own = Mapping::pages(pages).map()?;
    // SAFETY: The region was just mapped, and nothing else refers to it.
    unsafe { memory::fill(own, CONTENT) };
    memory::advise(own, libc::MADV_MERGEABLE)?;
    ksm.scan_fast()?;
    ksm.write("smart_scan", 0)?;
    ksm.merge_until(Counters::merged(pages as u64, pages as u64))?;
    let pfns = other.pfns(there)?;
    // SAFETY: As above.
    let held = unsafe { memory::hold(own) }?;
    let me = std::process::id() as i32;
    group.swap_out_of(&[(me, own), (other.pid(), there)])?;
    for pfn in pfns {
        ensure!(pfn.flags()?.ksm(), "{pfn:?} is not held");
    }
    let copies = procfs::vmstat("ksm_swpin_copy")?;
    module::unload()?;
    other.verify(there, CONTENT)?;
    // SAFETY: The region is still mapped.
    CONTENT.check(&unsafe { memory::checksums(own) })?;
    ensure!(
        other.ksm_pages(there)? == 0 && procfs::ksm_pages(me, own)? == 0,
        "merged pages have outlived the module"
    );
    ensure!(
        procfs::vmstat("ksm_swpin_copy")? == copies + 2 * pages as u64,
        "each process needs copies of its own"
    );
    drop((held, other));
    memory::munmap(own)?;
    drop(group);
    swap.off()
}

fn unloading_takes_zero_pages_away(ksm: &Ksm) -> Result<()> {
    module::load("")?;
    ksm.write("use_zero_pages", 1)?;
    let mut child = Child::spawn()?;
    let region = child.map_mergeable(PAGES, Content::Zero)?;
    ksm.scan_fast()?;
    ksm.start()?;
    wait::until("the empty pages are replaced", PATIENCE, || {
        Ok(procfs::ksm_stat(child.pid(), "ksm_zero_pages")? == PAGES as u64)
    })?;
    module::unload()?;
    ensure!(
        procfs::ksm_stat(child.pid(), "ksm_zero_pages")? == 0
            && stock().read("ksm_zero_pages")? == 0,
        "zero pages have outlived the module"
    );
    for pfn in child.pfns(region)? {
        ensure!(!pfn.flags()?.zero_page(), "a page is still the zero page");
    }
    child.verify(region, Content::Zero)
}

fn unloading_ends_all_threads(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::spawn()?;
    for threads in [2, 7] {
        module::load("run=1")?;
        ksm.scan_at_full_speed()?;
        ksm.write("scan_threads", threads)?;
        ksm.scan_until(Counters::merged(PAGES as u64, PAGES as u64))?;
        ensure!(
            procfs::pid_of("ksmd_rs/1")?.is_some(),
            "there is no second thread"
        );
        module::unload()?;
        for number in 1..threads {
            ensure!(
                procfs::pid_of(&format!("ksmd_rs/{number}"))?.is_none(),
                "thread {number} is left"
            );
        }
        pair.expect_private()?;
    }
    Ok(())
}

fn an_idle_module_wakes_nobody(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::spawn()?;
    module::load("")?;
    let thread = procfs::pid_of("ksmd_rs")?.context("there is no thread ksmd_rs")?;
    let niceness = fs::read_to_string(format!("/proc/{thread}/stat"))?;
    let niceness = niceness
        .rsplit(')')
        .next()
        .and_then(|rest| rest.split_whitespace().nth(16))
        .map(str::to_owned);
    ensure!(
        niceness.as_deref() == Some("5"),
        "ksmd_rs has niceness {niceness:?}"
    );
    let asleep = || -> Result<bool> {
        Ok(fs::read_to_string(format!("/proc/{thread}/stat"))?.contains(") S "))
    };
    for rested in ["never having run", "after running"] {
        wait::until("the thread sleeps", PATIENCE, asleep)?;
        let switches = procfs::context_switches(thread)?;
        // What goes on in the system without KSM, and with memory that could be merged.
        for _ in 0..50 {
            let mut child = Child::spawn()?;
            let region = child.map_mergeable(8, CONTENT)?;
            child.fork()?.exit()?;
            child.advise(region, libc::MADV_UNMERGEABLE)?;
            child.exit()?;
            pair.verify()?;
        }
        let now = procfs::context_switches(thread)?;
        ensure!(
            now == switches,
            "{rested}: the thread was woken {} times while run was 0",
            now - switches
        );
        merge(ksm)?;
    }
    pair.verify()
}
