//! The events that tracers see.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Passes;
use ksm_e2e::Region;
use ksm_e2e::ksm::Counters;
use ksm_e2e::ksm_events;
use ksm_e2e::ksm_events::Event;
use ksm_e2e::ksm_events::PerfCount;
use ksm_e2e::ksm_events::Trace;
use ksm_e2e::memory;
use ksm_e2e::memory::Mapping;
use ksm_e2e::module;
use ksm_e2e::procfs;
use ksm_e2e::procfs::Pfn;
use ksm_e2e::runner;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;
use libtest_mimic::Trial;
use nix::errno::Errno;
use nix::kmod::DeleteModuleFlags;
use nix::kmod::delete_module;

const CONTENT: Content = Content::Distinct(1);

ksm_e2e::tests![
    passes_tell_their_number_and_what_is_known,
    every_merge_is_told,
    empty_pages_are_told,
    pages_that_cannot_be_merged_are_told_with_an_error,
    address_spaces_that_come_and_go_are_told,
    pages_that_are_gone_are_told,
    batches_add_up_to_what_is_scanned_and_skipped,
    lookups_tell_where_and_how_deep,
    only_what_is_turned_on_is_told,
];

/// Tests that load and unload the module.
pub fn module_tests() -> Vec<Trial> {
    let tests: [(&str, runner::Body); 3] = [
        (
            "e2e::events::used_events_do_not_keep_the_module",
            used_events_do_not_keep_the_module,
        ),
        (
            "e2e::events::a_listening_buffer_does_not_keep_the_module",
            a_listening_buffer_does_not_keep_the_module,
        ),
        ("e2e::events::perf_keeps_the_module", perf_keeps_the_module),
    ];
    tests
        .map(|(name, body)| runner::module_test(name, body))
        .into()
}

/// Two processes with eight equal pages each, and four more pages that are equal to none.
struct Scene {
    one: Child,
    here: Region,
    other: Child,
    there: Region,
}

impl Scene {
    fn new() -> Result<Self> {
        let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
        let here = one.map_mergeable(8, CONTENT)?;
        let there = other.map_mergeable(8, CONTENT)?;
        one.map_mergeable(4, Content::Distinct(1000))?;
        Ok(Self {
            one,
            here,
            other,
            there,
        })
    }

    fn merged() -> Counters {
        Counters::merged(8, 8).and_unshared(4)
    }
}

fn named<'a>(events: &'a [Event], name: &str) -> Vec<&'a Event> {
    events.iter().filter(|event| event.name == name).collect()
}

/// How often each value of a field occurs.
fn values<'a>(events: &[&'a Event], key: &str) -> Result<BTreeMap<&'a str, usize>> {
    let mut values = BTreeMap::new();
    for event in events {
        *values.entry(event.word(key)?).or_insert(0) += 1;
    }
    Ok(values)
}

fn frames(events: &[&Event]) -> Result<BTreeMap<Pfn, usize>> {
    let mut frames = BTreeMap::new();
    for event in events {
        *frames.entry(Pfn(event.number("pfn")?)).or_insert(0) += 1;
    }
    Ok(frames)
}

fn passes_tell_their_number_and_what_is_known(ksm: &Ksm) -> Result<()> {
    let scene = Scene::new()?;
    let mut passes = Passes::of(ksm)?;
    let trace = Trace::of(ksm, &["start_scan", "stop_scan"])?;
    let first: i64 = ksm.read("full_scans")?.try_into()?;
    for pass in 0..5 {
        passes.pass()?;
        let events = trace.events()?;
        let seen = events
            .iter()
            .map(|event| {
                let (seq, size): (i64, u64) = (event.number("seq")?, event.number("rmap size")?);
                Ok((event.name.as_str(), seq, size))
            })
            .collect::<Result<Vec<_>>>()?;
        let known = if pass == 0 { 0 } else { 20 };
        let wanted = [
            ("start_scan", first + pass, known),
            ("stop_scan", first + pass, 20),
        ];
        ensure!(seen == wanted, "pass {pass} told {seen:?}");
    }
    // Pages that are gone are not known any more, and run=2 begins a new count.
    scene.one.exit()?;
    passes.pass()?;
    let events = trace.events()?;
    let last = events.last().context("no event")?;
    ensure!(
        last.number::<u64>("rmap size")? == 8,
        "with eight pages left: {last:?}"
    );
    ksm.unmerge()?;
    passes.pass()?;
    let events = trace.events()?;
    ensure!(
        events[0].number::<u64>("seq")? == 0 && events[0].number::<u64>("rmap size")? == 0,
        "after run=2: {events:?}"
    );
    Ok(())
}

fn every_merge_is_told(ksm: &Ksm) -> Result<()> {
    let scene = Scene::new()?;
    let mut passes = Passes::of(ksm)?;
    let trace = Trace::of(ksm, &["merge_with_ksm_page", "merge_one_page"])?;
    passes.pass()?;
    ensure!(
        trace.events()?.is_empty(),
        "merges before any page was seen twice"
    );
    passes.pass()?;
    ksm.expect(Scene::merged())?;
    let events = trace.events()?;
    let merges: Vec<&Event> = events.iter().collect();
    // For each pair: one page becomes a KSM page, which then takes the place of the other one.
    let (joined, made): (Vec<&Event>, Vec<&Event>) = merges
        .iter()
        .partition(|event| event.begins_with("ksm pfn "));
    ensure!(
        (made.len(), joined.len()) == (8, 8) && merges.iter().all(|e| e.name != "merge_one_page"),
        "eight pairs of pages: {merges:#?}"
    );
    ensure!(
        values(&merges, "error")? == BTreeMap::from([("0", 16)]),
        "a merge has failed: {merges:#?}"
    );
    ensure!(
        values(&merges, "mm")?.into_values().collect::<Vec<_>>() == [8, 8],
        "each process has eight of the pages: {merges:#?}"
    );
    ensure!(
        values(&merges, "rmap_item")?.len() == 16,
        "sixteen mappings: {merges:#?}"
    );
    let pages: BTreeMap<Pfn, usize> = scene
        .one
        .pfns(scene.here)?
        .into_iter()
        .map(|pfn| (pfn, 1))
        .collect();
    ensure!(
        frames(&made)? == pages && frames(&joined)? == pages,
        "the pages are {pages:?}, told was {merges:#?}"
    );

    // A third process joins them, and nothing else is told. Nor is anything when all is merged.
    let mut third = Child::spawn()?;
    let region = third.map_mergeable(8, CONTENT)?;
    passes.make(2)?;
    let events = trace.events()?;
    let merges: Vec<&Event> = events.iter().collect();
    ensure!(
        merges.iter().all(|event| event.begins_with("ksm pfn "))
            && frames(&merges)? == pages
            && values(&merges, "mm")?.len() == 1
            && values(&merges, "error")? == BTreeMap::from([("0", 8)]),
        "the third process's pages are told like this: {merges:#?}"
    );
    passes.make(2)?;
    ensure!(trace.events()?.is_empty(), "there was nothing to merge");
    third.verify(region, CONTENT)
}

fn empty_pages_are_told(ksm: &Ksm) -> Result<()> {
    ksm.write("use_zero_pages", 1)?;
    let mut child = Child::spawn()?;
    let region = child.map_mergeable(8, Content::Zero)?;
    child.map_mergeable(4, CONTENT)?;
    let mut passes = Passes::of(ksm)?;
    let trace = Trace::of(ksm, &["merge_with_ksm_page", "merge_one_page"])?;
    passes.make(3)?;
    let events = trace.events()?;
    let merges: Vec<&Event> = events.iter().collect();
    let zero = child.pfns(region)?[0];
    ensure!(zero.flags()?.zero_page(), "the pages were not replaced");
    ensure!(
        named(&events, "merge_one_page").len() == events.len()
            && frames(&merges)? == BTreeMap::from([(zero, 8)])
            && values(&merges, "error")? == BTreeMap::from([("0", 8)])
            && values(&merges, "mm")?.len() == 1,
        "eight empty pages were told like this: {events:#?}"
    );
    Ok(())
}

fn pages_that_cannot_be_merged_are_told_with_an_error(ksm: &Ksm) -> Result<()> {
    let mut scene = Scene::new()?;
    let mut passes = Passes::of(ksm)?;
    passes.make(2)?;
    ksm.expect(Scene::merged())?;
    // Pages equal to merged ones, to which a pipe refers.
    let region = Mapping::pages(8).map()?;
    // SAFETY: The region was just mapped, and nothing else refers to it.
    unsafe { memory::fill(region, CONTENT) };
    memory::advise(region, libc::MADV_MERGEABLE)?;
    // SAFETY: As above.
    let held = unsafe { memory::hold(region) }?;
    let trace = Trace::of(ksm, &["merge_with_ksm_page"])?;
    passes.make(2)?;
    let events = trace.events()?;
    let merges: Vec<&Event> = events.iter().collect();
    let pages: BTreeMap<Pfn, usize> = scene
        .one
        .pfns(scene.here)?
        .into_iter()
        .map(|pfn| (pfn, 1))
        .collect();
    ensure!(
        frames(&merges)? == pages && !values(&merges, "error")?.contains_key("0"),
        "eight merges were tried in vain: {events:#?}"
    );
    let tried = ksm.counters()?;
    ensure!(
        (tried.shared, tried.sharing) == (8, 8),
        "pages that are in use were merged: {tried}"
    );
    drop(held);
    passes.make(2)?;
    ksm.expect(Counters::merged(8, 16).and_unshared(4))?;
    scene.one.verify(scene.here, CONTENT)?;
    // SAFETY: The region is still mapped.
    CONTENT.check(&unsafe { memory::checksums(region) })
}

fn address_spaces_that_come_and_go_are_told(ksm: &Ksm) -> Result<()> {
    let trace = Trace::of(ksm, &["enter", "exit"])?;
    let mut passes = Passes::of(ksm)?;
    let mut scene = Scene::new()?;
    // Not one that has nothing to merge.
    let _bystander = Child::spawn()?;
    passes.make(2)?;
    let events = trace.events()?;
    let entered = named(&events, "enter");
    let mms: BTreeSet<&str> = values(&entered, "mm")?.into_keys().collect();
    ensure!(
        events.len() == 2 && entered.len() == 2 && mms.len() == 2,
        "two processes came: {events:?}"
    );
    scene.one.exit()?;
    passes.make(2)?;
    let exits = trace.events()?;
    ensure!(
        exits.len() == 1 && exits[0].name == "exit" && mms.contains(exits[0].word("mm")?),
        "one process went: {exits:?}"
    );
    let child = scene.other.fork()?;
    passes.make(2)?;
    let events = trace.events()?;
    ensure!(
        events.len() == 1 && events[0].name == "enter",
        "a process forked: {events:?}"
    );
    drop(child);
    Ok(())
}

fn pages_that_are_gone_are_told(ksm: &Ksm) -> Result<()> {
    let Scene {
        mut one,
        here,
        mut other,
        there,
    } = Scene::new()?;
    let mut passes = Passes::of(ksm)?;
    passes.make(2)?;
    ksm.expect(Scene::merged())?;
    let pages = one.pfns(here)?;
    let times = |times| -> BTreeMap<Pfn, usize> { pages.iter().map(|pfn| (*pfn, times)).collect() };
    // Stock does not tell the last mapping of a page.
    let told = if ksm.is_stock() { 1 } else { 2 };
    let trace = Trace::of(ksm, &["remove_ksm_page", "remove_rmap_item"])?;
    one.munmap(here)?;
    other.munmap(there)?;
    passes.make(2)?;
    let events = trace.events()?;
    let (nodes, mappings) = (
        named(&events, "remove_ksm_page"),
        named(&events, "remove_rmap_item"),
    );
    ensure!(
        frames(&nodes)? == times(1) && frames(&mappings)? == times(told),
        "the pages {pages:?} went, told was {events:#?}"
    );
    ensure!(
        values(&mappings, "rmap_item")?.len() == 8 * told
            && values(&mappings, "mm")?.into_values().collect::<Vec<_>>() == vec![8; told],
        "mappings of eight pages in two processes: {events:#?}"
    );
    ksm.expect(Counters::merged(0, 0).and_unshared(4))
}

fn batches_add_up_to_what_is_scanned_and_skipped(ksm: &Ksm) -> Result<()> {
    if ksm.is_stock() {
        return Ok(());
    }
    ksm.write("smart_scan", 1)?;
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    // More than a page table's worth; an area without pages; merged pages, which are never skipped.
    let here = one.map_mergeable(1300, Content::Distinct(10_000))?;
    let there = other.map_mergeable(50, CONTENT)?;
    let again = other.map_mergeable(50, CONTENT)?;
    let counts =
        || -> Result<(u64, u64)> { Ok((ksm.read("pages_scanned")?, ksm.read("pages_skipped")?)) };
    let mut passes = Passes::of(ksm)?;
    let trace = Trace::of(ksm, &["batch"])?;
    let mut skipped_ever = 0;
    for pass in 0..8 {
        let before = counts()?;
        passes.pass()?;
        let now = counts()?;
        let events = trace.events()?;
        let batches: Vec<&Event> = events.iter().collect();
        let (mut pages, mut skipped) = (0, 0);
        let mut covered: BTreeMap<&str, u64> = BTreeMap::new();
        for batch in &batches {
            let (found, left_out): (u64, u64) = (batch.number("pages")?, batch.number("skipped")?);
            let address = batch
                .word("address")?
                .strip_prefix("0x")
                .context("no hexadecimal number")?;
            let address = usize::from_str_radix(address, 16)?;
            ensure!(
                [here, there, again]
                    .iter()
                    .any(|region| region.addresses().any(|page| page == address)),
                "a batch elsewhere: {batch:?}"
            );
            ensure!(
                (1..=512).contains(&found) && left_out <= found,
                "no such batch: {batch:?}"
            );
            pages += found;
            skipped += left_out;
            *covered.entry(batch.word("mm")?).or_insert(0) += found;
        }
        ensure!(
            pages - skipped == now.0 - before.0 && skipped == now.1 - before.1,
            "pass {pass} has scanned {} pages and skipped {}: {events:#?}",
            now.0 - before.0,
            now.1 - before.1
        );
        let mut each: Vec<u64> = covered.into_values().collect();
        each.sort_unstable();
        ensure!(
            each == [100, 1300],
            "the processes have 100 and 1300 pages: {events:#?}"
        );
        skipped_ever += skipped;
    }
    ensure!(
        skipped_ever == 3 * 1300,
        "{skipped_ever} pages were skipped in eight passes"
    );
    Ok(())
}

fn lookups_tell_where_and_how_deep(ksm: &Ksm) -> Result<()> {
    if ksm.is_stock() {
        return Ok(());
    }
    let mut scene = Scene::new()?;
    let mut passes = Passes::of(ksm)?;
    let trace = Trace::of(ksm, &["lookup"])?;
    passes.pass()?;
    ensure!(
        trace.events()?.is_empty(),
        "something was looked for before any page was seen twice"
    );
    // What was looked for: in the stable tree and found there, not found there, and the same for the other tree.
    let lookups = |events: &[Event]| -> Result<[usize; 4]> {
        let mut seen = [0; 4];
        for event in events {
            let stable = event.begins_with("stable ");
            ensure!(
                stable || event.begins_with("unstable "),
                "no such tree: {event:?}"
            );
            let depth: u32 = event.number("depth")?;
            let found = event.word("found")? == "1";
            ensure!(event.word("nid")? == "0", "no such node: {event:?}");
            ensure!(
                depth <= 8 && (depth > 0 || !found),
                "20 pages cannot lie so deep: {event:?}"
            );
            seen[2 * usize::from(!stable) + usize::from(!found)] += 1;
        }
        Ok(seen)
    };
    passes.pass()?;
    ksm.expect(Scene::merged())?;
    // None is in the stable tree; of the pairs, the second ones find the first ones.
    let seen = lookups(&trace.events()?)?;
    ensure!(
        seen == [0, 20, 8, 12],
        "20 pages, of which 8 are equal to 8 others, were looked for like this: {seen:?}"
    );
    // Merged pages need no search, and the others stay where they are in the unstable tree.
    passes.pass()?;
    let seen = lookups(&trace.events()?)?;
    ensure!(
        seen == [0, 4, 0, 0],
        "4 pages of 20 that are not merged were looked for like this: {seen:?}"
    );
    let more = scene.one.map_mergeable(5, CONTENT)?;
    passes.make(2)?;
    let seen = lookups(&trace.events()?)?;
    ensure!(
        seen == [5, 8, 0, 0],
        "5 pages that are equal to merged ones were looked for like this: {seen:?}"
    );
    scene.one.verify(more, CONTENT)
}

fn only_what_is_turned_on_is_told(ksm: &Ksm) -> Result<()> {
    ensure!(ksm_events::known(ksm)?, "there are no events");
    let scene = Scene::new()?;
    let mut passes = Passes::of(ksm)?;
    let trace = Trace::of(ksm, &["stop_scan"])?;
    let elsewhere = Trace::of(ksm, &[])?;
    let names = ksm_events::COMMON
        .into_iter()
        .chain(ksm_events::OURS.into_iter().filter(|_| !ksm.is_stock()));
    for name in names.clone() {
        ensure!(
            trace.is_on(name)? == (name == "stop_scan") && !elsewhere.is_on(name)?,
            "{name} is on or off by mistake"
        );
    }
    passes.make(3)?;
    let events = trace.events()?;
    ensure!(
        events.len() == 3 && named(&events, "stop_scan").len() == 3,
        "three passes: {events:?}"
    );
    trace.set("stop_scan", false)?;
    scene.one.exit()?;
    passes.make(3)?;
    ksm.unmerge()?;
    let told = [trace.events()?, elsewhere.events()?];
    ensure!(
        told.iter().all(Vec::is_empty),
        "nothing is turned on: {told:?}"
    );
    Ok(())
}

fn all_events() -> Vec<&'static str> {
    ksm_events::COMMON
        .into_iter()
        .chain(ksm_events::OURS)
        .collect()
}

/// Loads the module, merges with all events on, and says how many there were.
fn use_events(ksm: &Ksm, trace: &Trace) -> Result<usize> {
    let scene = Scene::new()?;
    ksm.write("smart_scan", 0)?;
    Passes::of(ksm)?.make(2)?;
    ksm.expect(Scene::merged())?;
    scene.other.exit()?;
    ksm.stop()?;
    Ok(trace.events()?.len())
}

fn used_events_do_not_keep_the_module(ksm: &Ksm) -> Result<()> {
    for _ in 0..3 {
        module::load("")?;
        let trace = Trace::of(ksm, &all_events())?;
        ensure!(use_events(ksm, &trace)? > 50, "nothing is told");
        drop(trace);
        module::unload()?;
        ensure!(
            !ksm_events::known(ksm)?,
            "the events have outlived the module"
        );
    }
    Ok(())
}

fn a_listening_buffer_does_not_keep_the_module(ksm: &Ksm) -> Result<()> {
    module::load("")?;
    let trace = Trace::of(ksm, &all_events())?;
    for life in 0..3 {
        ensure!(use_events(ksm, &trace)? > 50, "nothing is told");
        // With events in the buffer that nobody has read.
        let scene = Scene::new()?;
        Passes::of(ksm)?.make(2)?;
        module::unload()?;
        ensure!(
            !trace.knows_events(),
            "the buffer knows of events of a module that is gone"
        );
        // What is left in the buffer cannot be told any more, which harms nobody.
        let _ = trace.events();
        drop(scene);
        module::load("")?;
        for name in all_events() {
            ensure!(
                !trace.is_on(name)?,
                "in life {life}: {name} is on, though nobody has turned it on"
            );
            trace.set(name, true)?;
        }
    }
    Ok(())
}

fn perf_keeps_the_module(ksm: &Ksm) -> Result<()> {
    module::load("")?;
    let thread = procfs::pid_of("ksmd_rs")?.context("there is no thread ksmd_rs")?;
    let mut scene = Scene::new()?;
    // Not before: the helpers would have it open as well.
    let count = PerfCount::of(ksm, "stop_scan", thread)?;
    ksm.write("smart_scan", 0)?;
    let mut passes = Passes::of(ksm)?;
    passes.make(2)?;
    ensure!(
        count.read()? == 2,
        "perf has counted {} passes of 2",
        count.read()?
    );
    let name = std::ffi::CString::new(module::NAME)?;
    let result = delete_module(&name, DeleteModuleFlags::O_NONBLOCK);
    ensure!(
        result == Err(Errno::EAGAIN),
        "unloading while perf counts: {result:?}"
    );
    // Nothing has happened.
    ksm.expect(Scene::merged())?;
    passes.pass()?;
    ensure!(
        count.read()? == 3,
        "perf has counted {} passes of 3",
        count.read()?
    );
    scene.one.verify(scene.here, CONTENT)?;
    drop(count);
    wait::until("the module is free", PATIENCE, || {
        Ok(delete_module(&name, DeleteModuleFlags::O_NONBLOCK).is_ok())
    })?;
    scene.one.verify(scene.here, CONTENT)?;
    scene.other.verify(scene.there, CONTENT)?;
    module::load("")
}
