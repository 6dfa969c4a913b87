//! Whatever happens to the frames that pages lie in, against looking KSM pages up and listing their mappings.

use std::fs;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::delays::Hits;
use ksm_e2e::delays::rounds;
use ksm_e2e::hotplug::Block;
use ksm_e2e::hotplug::Hog;
use ksm_e2e::ksm::Counters;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::PAGES_PER_HUGE;
use ksm_e2e::memory::Pattern;
use ksm_e2e::numa;
use ksm_e2e::procfs::Pfn;
use ksm_e2e::swap::Group;
use ksm_e2e::swap::Swap;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use crate::stage::CONTENT;
use crate::stage::OTHER;
use crate::stage::Witnesses;
use crate::stage::advise;
use crate::stage::newcomer;
use crate::stage::scan_briskly;

ksm_e2e::tests![
    migration_against_lookup,
    migration_against_append,
    migration_against_release,
    compaction_against_release,
    swap_out_against_append,
    hwpoison_against_lookup,
    hwpoison_against_append,
    offline_against_lookup_and_merge,
    offline_against_unmerge,
    collapse_against_a_batch,
];

/// How long something is watched that must wait.
const SHORTLY: Duration = Duration::from_millis(5);

/// Moves the witnesses' page, which both map, to the other one of the first two nodes. Returns whether it is there.
fn move_page(witnesses: &Witnesses) -> Result<bool> {
    move_of(&witnesses.one, witnesses.here)
}

fn move_of(child: &Child, region: Region) -> Result<bool> {
    let nodes = numa::require_nodes()?;
    let now = numa::nodes_of(child.pid(), region)?[0];
    let to = if now == nodes[0] as i32 {
        nodes[1]
    } else {
        nodes[0]
    };
    Ok(numa::move_to(child.pid(), region, to)? == 1)
}

fn migration_against_lookup(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let mut witnesses = Witnesses::begin(ksm)?;
    let (mut child, region) = newcomer(OTHER)?;
    advise(&mut child, region)?;
    for round in 0..rounds() {
        // Every other round it is merged already, and looked up to be taken off the list first.
        if round % 2 == 0 {
            child.fill(region, OTHER)?;
            ksm.scan_until(Counters::merged(1, 1).and_unshared(1))?;
        }
        let window = hits.hold("frame_read")?;
        child.fill(region, CONTENT)?;
        window.wait()?;
        ensure!(move_page(&witnesses)?, "the page did not move");
        let moved = witnesses.one.pfns(witnesses.here)?;
        window.hit()?;
        witnesses.share_with(ksm, &mut [(&mut child, region)])?;
        ensure!(
            witnesses.one.pfns(witnesses.here)? == moved,
            "a page that had moved was given up, and another one made"
        );
    }
    hits.expect(rounds())?;
    drop(child);
    witnesses.end(ksm)
}

fn migration_against_append(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let mut witnesses = Witnesses::begin(ksm)?;
    let (mut child, region) = newcomer(OTHER)?;
    advise(&mut child, region)?;
    for round in 0..rounds() {
        let place = ["mapped", "replacing"][round as usize % 2];
        let window = hits.hold(place)?;
        child.fill(region, CONTENT)?;
        window.wait()?;
        ensure!(
            !move_page(&witnesses)?,
            "a page has moved that is being mapped, at {place}"
        );
        window.hit()?;
        witnesses.share_with(ksm, &mut [(&mut child, region)])?;
        ksm.stop()?;
        wait::until("the page moves with all its mappings", PATIENCE, || {
            move_page(&witnesses)
        })?;
        witnesses.share_with(ksm, &mut [(&mut child, region)])?;
        ksm.start()?;
    }
    hits.expect(rounds())?;
    drop(child);
    witnesses.end(ksm)
}

fn migration_against_release(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let mut witnesses = Witnesses::begin(ksm)?;
    let (mut child, region) = newcomer(CONTENT)?;
    advise(&mut child, region)?;
    for round in 0..rounds() {
        ksm.scan_until(Counters::merged(1, 2))?;
        let window = hits.hold("unlinking")?;
        child.fill(region, OTHER)?;
        window.wait()?;
        // The list changes under the folio lock, which moving needs as well; it must not move from under who waits.
        ensure!(
            !move_page(&witnesses)?,
            "a page has moved though a reference was taken under its lock"
        );
        window.hit()?;
        ksm.scan_until(Counters::merged(1, 1).and_unshared(1))?;
        wait::until("the page moves", PATIENCE, || move_page(&witnesses))?;
        witnesses.map_the_same(&mut [])?;
        child.verify(region, OTHER)?;
        if round + 1 < rounds() {
            child.fill(region, CONTENT)?;
        }
    }
    hits.expect(rounds())?;
    drop(child);
    witnesses.end(ksm)
}

fn compaction_against_release(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let witnesses = Witnesses::begin(ksm)?;
    let mut compactor = Child::spawn()?;
    let (mut one, here) = newcomer(OTHER)?;
    let (mut other, there) = newcomer(OTHER)?;
    advise(&mut one, here)?;
    advise(&mut other, there)?;
    for round in 0..rounds() {
        ksm.scan_until(Counters::merged(2, 2))?;
        let content = Content::Same(30 + u64::from(round));
        let last = round % 2 == 1;
        let window = hits.hold(if last { "releasing" } else { "unlinking" })?;
        if last {
            // Nobody maps it any more, but it is still there.
            other.pin(there)?;
            other.fill(there, Content::Same(29))?;
        }
        one.fill(here, content)?;
        window.wait()?;
        compactor.begin_write_file("/proc/sys/vm/compact_memory", "1")?;
        // It may wait for the folio lock, which the window may hold.
        wait::while_holds(SHORTLY, || Ok(()))?;
        window.hit()?;
        compactor.finish_write()??;
        one.verify(here, content)?;
        if last {
            other.unpin()?;
            ksm.scan_until(Counters::merged(1, 1).and_unshared(2))?;
            other.verify(there, Content::Same(29))?;
            other.fill(there, OTHER)?;
        } else {
            ksm.scan_until(Counters::merged(2, 1).and_unshared(1))?;
            other.verify(there, OTHER)?;
        }
        one.fill(here, OTHER)?;
    }
    hits.expect(rounds())?;
    drop((one, other));
    witnesses.end(ksm)
}

fn swap_out_against_append(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let swap = Swap::on(2048)?;
    let group = Group::new()?;
    let (one, other) = (Child::spawn()?, Child::spawn()?);
    group.add(&one)?;
    group.add(&other)?;
    let mut child = Child::spawn()?;
    group.add(&child)?;
    let mut witnesses = Witnesses::with(ksm, one, other)?;
    let region = child.map_mergeable(1, OTHER)?;
    for round in 0..rounds() {
        let place = ["mapped", "node_found", "replacing"][round as usize % 3];
        let window = hits.hold(place)?;
        child.fill(region, CONTENT)?;
        window.wait()?;
        group.reclaim(16 << 20)?;
        window.hit()?;
        wait::until_or_explain("nothing is half done", PATIENCE, || {
            let seen = ksm.counters()?;
            Ok((seen.volatile != 0).then(|| seen.to_string()))
        })?;
        ksm.stop()?;
        group
            .swap_out(&[
                (&witnesses.one, witnesses.here),
                (&witnesses.other, witnesses.there),
                (&child, region),
            ])
            .with_context(|| format!("after {place}"))?;
        witnesses.verify()?;
        child.verify(region, CONTENT)?;
        ksm.start()?;
        witnesses.share_with(ksm, &mut [(&mut child, region)])?;
        child.fill(region, OTHER)?;
        ksm.scan_until(Counters::merged(1, 1).and_unshared(1))?;
    }
    hits.expect(rounds())?;
    drop(child);
    witnesses.end(ksm)?;
    drop(group);
    swap.off()
}

/// Makes a page usable again: there is nothing wrong with it.
fn cure(pfn: Pfn) -> Result<()> {
    wait::until("the page is usable again", PATIENCE, || {
        match fs::write(
            "/sys/kernel/debug/hwpoison/unpoison-pfn",
            format!("{}\n", pfn.0),
        ) {
            Ok(()) => Ok(!pfn.flags()?.poisoned()),
            Err(error) if error.raw_os_error() == Some(Errno::EBUSY as i32) => Ok(false),
            Err(error) => Err(error).context("curing a page"),
        }
    })
}

/// Makes a page of a process bad, which kills the process. Fails if it does not.
fn poison(mut victim: Child, page: Region) -> Result<Pfn> {
    let pfn = victim.pfns(page)?[0];
    victim.advise_at_any_cost(page, libc::MADV_HWPOISON)?;
    let status = victim.wait()?;
    ensure!(
        matches!(
            status,
            Some(WaitStatus::Signaled(_, Signal::SIGBUS | Signal::SIGKILL, _))
        ),
        "the process that met the bad page ended with {status:?}"
    );
    ensure!(pfn.flags()?.poisoned(), "the page is not marked as bad");
    Ok(pfn)
}

/// A page goes bad while it is looked up, or before those are looked at again who map it: nobody joins them.
fn hwpoison_against_lookup(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    scan_briskly(ksm)?;
    for round in 0..rounds() {
        let place = ["frame_read", "node_found", "replacing"][round as usize % 3];
        let (mut new, region) = newcomer(OTHER)?;
        let (mut one, here) = newcomer(CONTENT)?;
        let (mut other, there) = newcomer(CONTENT)?;
        // The newcomer is scanned first.
        advise(&mut new, region)?;
        ksm.start()?;
        ksm.scan_until(Counters::merged(0, 0).and_unshared(1))?;
        advise(&mut one, here)?;
        advise(&mut other, there)?;
        ksm.scan_until(Counters::merged(1, 1).and_unshared(1))?;
        let window = hits.hold(place)?;
        new.fill(region, CONTENT)?;
        window.wait()?;
        let pfn = poison(one, here)?;
        window.hit()?;
        ksm.full_scans(3)?;
        ensure!(
            new.pfns(region)? != [pfn],
            "a process was merged with a bad page, at {place}"
        );
        new.verify(region, CONTENT)?;
        drop((new, other));
        ksm.scan_until(Counters::merged(0, 0))?;
        ksm.stop()?;
        cure(pfn)?;
    }
    hits.expect(rounds())
}

/// A page goes bad that is in the act of being mapped once more: the machine survives, and who maps it can be told.
fn hwpoison_against_append(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    scan_briskly(ksm)?;
    for _ in 0..rounds() {
        let (mut one, here) = newcomer(CONTENT)?;
        let (mut other, there) = newcomer(CONTENT)?;
        advise(&mut one, here)?;
        advise(&mut other, there)?;
        ksm.start()?;
        ksm.scan_until(Counters::merged(1, 1))?;
        let (mut new, region) = newcomer(CONTENT)?;
        let window = hits.hold("mapped")?;
        advise(&mut new, region)?;
        window.wait()?;
        let pfn = poison(one, here)?;
        window.hit()?;
        // Nobody else joins.
        let (mut late, place) = newcomer(CONTENT)?;
        advise(&mut late, place)?;
        ksm.full_scans(4)?;
        ensure!(
            late.pfns(place)? != [pfn],
            "a process was merged with a bad page"
        );
        late.verify(place, CONTENT)?;
        drop((new, other, late));
        ksm.scan_until(Counters::merged(0, 0))?;
        ksm.stop()?;
        cure(pfn)?;
    }
    hits.expect(rounds())
}

/// A process with two equal pages, the first of them in a block of memory that can go offline.
struct Twins {
    child: Child,
    region: Region,
    block: Block,
}

impl Twins {
    fn new(hog: &mut Hog) -> Result<Self> {
        let mut child = Child::spawn()?;
        let (region, block) = hog.map(&mut child, 2, CONTENT)?;
        Ok(Self {
            child,
            region,
            block,
        })
    }

    /// They are where memory is, and contain what they should.
    fn verify(&mut self) -> Result<()> {
        for pfn in self.child.pfns(self.region)? {
            ensure!(
                !self.block.contains(pfn),
                "a page is in memory that is gone"
            );
        }
        self.child.verify(self.region, CONTENT)
    }
}

fn offline_against_lookup_and_merge(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    scan_briskly(ksm)?;
    let mut admin = Child::spawn()?;
    let mut hog = Hog::new()?;
    for round in 0..rounds() {
        let place = [
            "gathered",
            "frame_read",
            "read",
            "replacing",
            "node_found",
            "mapped",
            "ksm_made",
            "unadopted",
        ][round as usize % 8];
        let mut twins = Twins::new(&mut hog)?;
        let (mut third, region) = newcomer(CONTENT)?;
        let early = matches!(place, "gathered" | "read" | "ksm_made" | "unadopted");
        let window = if early {
            let window = hits.hold(place)?;
            advise(&mut twins.child, twins.region)?;
            ksm.start()?;
            window
        } else {
            advise(&mut twins.child, twins.region)?;
            ksm.start()?;
            ksm.scan_until(Counters::merged(1, 1))?;
            let window = hits.hold(place)?;
            advise(&mut third, region)?;
            window
        };
        window.wait()?;
        admin.begin_write_file(twins.block.state_file(), "offline")?;
        let keep = twins.block.keep();
        if place == "read" {
            // Nobody holds anything that is in its way.
            admin
                .finish_write()?
                .with_context(|| format!("taking memory offline at {place}"))?;
            window.hit()?;
        } else {
            wait::while_holds(SHORTLY, || {
                ensure!(
                    !admin.answered()?,
                    "memory has gone offline that is in use, at {place}"
                );
                Ok(())
            })?;
            window.hit()?;
            admin
                .finish_write()?
                .with_context(|| format!("taking memory offline at {place}"))?;
        }
        if early {
            advise(&mut third, region)?;
        }
        ksm.scan_until(Counters::merged(1, 2))
            .with_context(|| format!("after {place}"))?;
        twins.verify()?;
        third.verify(region, CONTENT)?;
        let pfn = third.pfns(region)?[0];
        ensure!(
            twins.child.pfns(twins.region)? == [pfn, pfn],
            "the processes map different pages"
        );
        keep.online()?;
        drop((twins, third));
        ksm.scan_until(Counters::merged(0, 0))?;
        ksm.stop()?;
    }
    hits.expect(rounds())
}

fn offline_against_unmerge(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    scan_briskly(ksm)?;
    let (mut admin, mut writer) = (Child::spawn()?, Child::spawn()?);
    let mut hog = Hog::new()?;
    for round in 0..rounds() {
        let mut twins = Twins::new(&mut hog)?;
        advise(&mut twins.child, twins.region)?;
        ksm.start()?;
        ksm.scan_until(Counters::merged(1, 1))?;
        let keep = twins.block.keep();
        let state = twins.block.state_file();
        if round % 3 == 0 {
            // Everybody was told that memory goes: who wants to unmerge has to wait.
            let window = hits.hold("offlining")?;
            admin.begin_write_file(state, "offline")?;
            window.wait()?;
            writer.begin_write_file(ksm.dir().join("run"), "2")?;
            wait::while_holds(SHORTLY, || {
                ensure!(!writer.answered()?, "run was written while memory goes");
                Ok(())
            })?;
            window.hit()?;
        } else {
            let place = ["", "unsharing", "unmerging"][round as usize % 3];
            let window = hits.hold(place)?;
            writer.begin_write_file(ksm.dir().join("run"), "2")?;
            window.wait()?;
            admin.begin_write_file(state, "offline")?;
            wait::while_holds(SHORTLY, || Ok(()))?;
            window.hit()?;
        }
        writer.finish_write()??;
        admin.finish_write()?.context("taking memory offline")?;
        ksm.expect(Counters::merged(0, 0))?;
        ensure!(
            twins.child.ksm_pages(twins.region)? == 0,
            "pages are still merged"
        );
        twins.verify()?;
        keep.online()?;
    }
    hits.expect(rounds())
}

fn collapse_against_a_batch(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    scan_briskly(ksm)?;
    let mut child = Child::spawn()?;
    let region = child.map(Mapping {
        align: ksm_e2e::memory::HUGE,
        ..Mapping::pages(PAGES_PER_HUGE)
    })?;
    // Only two of them are equal to each other.
    let pattern = |index: usize| match index {
        7 | 300 => Pattern::Seed(1),
        index => Pattern::Seed(1000 + index as u64),
    };
    let pages: Vec<_> = region.addresses().enumerate().collect();
    let pages: Vec<_> = pages
        .into_iter()
        .map(|(index, addr)| (addr, pattern(index)))
        .collect();
    // In small pages first.
    child.paint(&pages)?;
    child.advise(region, libc::MADV_HUGEPAGE)?;
    advise(&mut child, region)?;
    for round in 0..rounds() {
        let place = ["gathered", "read", "paired"][round as usize % 3];
        child.paint(&pages)?;
        let window = hits.hold(place)?;
        ksm.start()?;
        window.wait()?;
        let collapsed = child.advise(region, libc::MADV_COLLAPSE);
        ensure!(
            place == "gathered" || collapsed.is_ok(),
            "pages that nobody holds, at {place}: {collapsed:?}"
        );
        window.hit()?;
        let wrong = child.differing(&pages)?;
        ensure!(
            wrong.is_empty(),
            "{} pages have other contents after {place}",
            wrong.len()
        );
        let rest = PAGES_PER_HUGE as u64 - 2;
        ksm.scan_until(Counters::merged(1, 1).and_unshared(rest))
            .with_context(|| format!("after {place}"))?;
        ensure!(
            child.differing(&pages)?.is_empty(),
            "pages have other contents after {place}"
        );
        // Their own again, so that all of them can be one huge page.
        ksm.unmerge()?;
    }
    hits.expect(rounds())
}
