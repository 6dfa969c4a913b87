//! Memory that goes offline under merged pages.

use std::time::Duration;
use std::time::Instant;

use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::hotplug::Block;
use ksm_e2e::hotplug::Finder;
use ksm_e2e::kmsg::Log;
use ksm_e2e::ksm::Counters;
use ksm_e2e::ksm::STOCK;
use ksm_e2e::module;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;
use nix::errno::Errno;

ksm_e2e::tests![
    merged_pages_leave_memory_that_goes_offline,
    what_was_in_memory_that_is_gone_is_forgotten,
    scanning_waits_while_memory_goes_offline,
    scanning_goes_on_when_memory_stays_online,
    offlining_during_scanning_harms_nobody,
    loading_is_refused_while_memory_goes_offline,
];

const CONTENT: Content = Content::Distinct(1);
const PAGES: usize = 16;

/// How much of the memory is pinned where a block is to be kept from going offline.
const PINNED: usize = 2;

/// Two processes with equal pages in one block of memory.
struct Pair {
    block: Block,
    one: Child,
    here: Region,
    other: Child,
    there: Region,
}

impl Pair {
    /// Maps the memory and merges it.
    fn merged(ksm: &Ksm) -> Result<Self> {
        let pair = Self::spawn(&mut Finder::default())?;
        ksm.merge_until(Counters::merged(16, 16))?;
        ensure!(
            pair.one.pfns(pair.here)? == pair.other.pfns(pair.there)?,
            "the processes map different pages"
        );
        ensure!(
            pair.in_block()? == PAGES,
            "merging has moved pages out of the block"
        );
        Ok(pair)
    }

    fn spawn(finder: &mut Finder) -> Result<Self> {
        let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
        let (here, block) = finder.map(&mut one, PAGES, CONTENT, None)?;
        let (there, _) = finder.map(&mut other, PAGES, CONTENT, Some(block))?;
        // Not before both are where they should be: they merge from here on.
        one.advise(here, libc::MADV_MERGEABLE)?;
        other.advise(there, libc::MADV_MERGEABLE)?;
        Ok(Self {
            block,
            one,
            here,
            other,
            there,
        })
    }

    /// How many of the first one's pages are in the block.
    fn in_block(&self) -> Result<usize> {
        let pfns = self.one.pfns(self.here)?;
        Ok(pfns.iter().filter(|&&pfn| self.block.contains(pfn)).count())
    }

    /// Pins some pages and has a process take the block offline, which cannot succeed then. Returns that process, once
    /// everybody in the kernel has been told.
    fn begin_to_go_offline(&mut self) -> Result<Child> {
        let pinned = self.here.part(0, PINNED);
        self.one.pin(pinned)?;
        let pins: Vec<String> = self
            .one
            .pfns(pinned)?
            .iter()
            .map(|pfn| format!("migrating pfn {:x} failed", pfn.0))
            .collect();
        let mut log = Log::from_now()?;
        let mut writer = Child::spawn()?;
        writer.begin_write_file(self.block.state_file(), "offline")?;
        // The kernel tries to move pages only then.
        wait::until("the kernel tries to move pinned pages", PATIENCE, || {
            let lines = log.lines()?;
            Ok(lines
                .iter()
                .any(|line| pins.iter().any(|pin| line.contains(pin))))
        })?;
        Ok(writer)
    }

    fn verify(&mut self) -> Result<()> {
        self.one.verify(self.here, CONTENT)?;
        self.other.verify(self.there, CONTENT)
    }

    /// Everything of both is merged, one with the other.
    fn expect_merged(&mut self) -> Result<()> {
        for (child, region) in [(&self.one, self.here), (&self.other, self.there)] {
            ensure!(
                child.ksm_pages(region)? == region.pages,
                "pages are not merged any more"
            );
        }
        ensure!(
            self.one.pfns(self.here)? == self.other.pfns(self.there)?,
            "the processes map different pages"
        );
        self.verify()
    }
}

/// A process with the same content, which is to join those that have it already.
fn newcomer() -> Result<(Child, Region)> {
    let mut child = Child::spawn()?;
    let region = child.map_mergeable(PAGES, CONTENT)?;
    Ok((child, region))
}

fn merged_pages_leave_memory_that_goes_offline(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::merged(ksm)?;
    // A fork that was never scanned is reached by way of its relatives.
    let mut late = pair.one.fork()?;
    let offline = pair.block.offline()?;
    ensure!(
        pair.in_block()? == 0,
        "there are pages in memory that is gone"
    );
    pair.expect_merged()?;
    ensure!(
        late.pfns(pair.here)? == pair.one.pfns(pair.here)?,
        "a mapping was left behind"
    );
    late.verify(pair.here, CONTENT)?;
    late.kill()?;
    ksm.expect(Counters::merged(16, 16))?;

    // They are found where they are now, and writing gives copies.
    let (mut third, elsewhere) = newcomer()?;
    ksm.merge_until(Counters::merged(16, 32))?;
    ensure!(
        third.pfns(elsewhere)? == pair.one.pfns(pair.here)?,
        "a newcomer was merged with something else"
    );
    third.fill(elsewhere, Content::Distinct(9000))?;
    pair.expect_merged()?;
    third.fill(elsewhere, CONTENT)?;
    offline.online()?;
    ksm.merge_until(Counters::merged(16, 32))?;
    third.verify(elsewhere, CONTENT)?;
    pair.expect_merged()?;
    ksm.unmerge()?;
    ksm.expect(Counters::merged(0, 0))?;
    third.verify(elsewhere, CONTENT)?;
    pair.verify()
}

fn what_was_in_memory_that_is_gone_is_forgotten(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::merged(ksm)?;
    // The thread rests, so nobody looks at these pages again before their frames are gone.
    pair.one.munmap(pair.here.part(0, 8))?;
    pair.other.munmap(pair.there.part(0, 8))?;
    let offline = pair.block.offline()?;
    let counters = ksm.counters()?;
    ensure!(
        (counters.shared, counters.sharing) == (8, 8),
        "pages that are gone still count: {counters}"
    );
    (pair.here, pair.there) = (pair.here.part(8, 8), pair.there.part(8, 8));
    let rest = CONTENT.from_page(8);
    pair.one.verify(pair.here, rest)?;
    pair.other.verify(pair.there, rest)?;
    ksm.scan_passes(3)?;
    ksm.expect(Counters::merged(8, 8))?;
    ksm.unmerge()?;
    ksm.expect(Counters::merged(0, 0))?;
    // Refused as long as there is anything that stands for a merged page.
    let old = ksm.read("max_page_sharing")?;
    ksm.write("max_page_sharing", old + 1)?;
    ksm.write("max_page_sharing", old)?;
    ksm.merge_until(Counters::merged(8, 8))?;
    offline.online()?;
    ksm.scan_passes(3)?;
    ksm.expect(Counters::merged(8, 8))?;
    pair.one.verify(pair.here, rest)?;
    pair.other.verify(pair.there, rest)
}

/// A block on its way offline, which cannot go there as long as pages in it are pinned.
struct Stuck {
    pair: Pair,
    /// Takes the block offline.
    writer: Child,
    /// The time in which the thread made many passes before.
    while_passes: Duration,
}

impl Stuck {
    fn new(ksm: &Ksm) -> Result<Self> {
        let mut pair = Pair::merged(ksm)?;
        ksm.start()?;
        let start = Instant::now();
        ksm.full_scans(20)?;
        let while_passes = start.elapsed();
        let writer = pair.begin_to_go_offline()?;
        Ok(Self {
            pair,
            writer,
            while_passes,
        })
    }

    /// Nothing is scanned for as long as many passes took before, and `waiting` gets no answer.
    fn expect_standstill(&mut self, ksm: &Ksm, waiting: &[&Child]) -> Result<()> {
        let progress =
            || -> Result<_> { Ok((ksm.read("pages_scanned")?, ksm.read("full_scans")?)) };
        let before = progress()?;
        wait::while_holds(self.while_passes, || {
            let now = progress()?;
            ensure!(
                now == before,
                "scanning goes on while memory goes offline: {before:?} became {now:?}"
            );
            for child in waiting {
                ensure!(
                    !child.answered()?,
                    "a write did not wait for memory that goes offline"
                );
            }
            ensure!(
                self.pair.block.state()? == "going-offline" && !self.writer.answered()?,
                "the block is not going offline any more: {}",
                self.pair.block.state()?
            );
            Ok(())
        })
    }
}

fn scanning_waits_while_memory_goes_offline(ksm: &Ksm) -> Result<()> {
    let mut stopper = Child::spawn()?;
    let mut stuck = Stuck::new(ksm)?;
    let keep = stuck.pair.block.keep();
    stuck.expect_standstill(ksm, &[])?;
    stopper.begin_write_file(ksm.dir().join("run"), "0")?;
    let (third, _) = newcomer()?;
    stuck.expect_standstill(ksm, &[&stopper])?;
    // Whoever uses merged pages need not wait: not for a copy, nor to exit.
    let pair = &mut stuck.pair;
    pair.one
        .fill(pair.here.part(8, 8), Content::Distinct(9000))?;
    pair.other.verify(pair.there, CONTENT)?;
    third.kill()?;

    pair.one.unpin()?;
    let outcome = stuck.writer.finish_write()?;
    ensure!(outcome == Ok(()), "taking the block offline: {outcome:?}");
    let outcome = stopper.finish_write()?;
    ensure!(outcome == Ok(()), "stopping: {outcome:?}");
    let pair = &mut stuck.pair;
    ensure!(
        pair.in_block()? == 0,
        "there are pages in memory that is gone"
    );
    pair.one.fill(pair.here.part(8, 8), CONTENT.from_page(8))?;
    let (mut fourth, elsewhere) = newcomer()?;
    ksm.merge_until(Counters::merged(16, 32))?;
    fourth.verify(elsewhere, CONTENT)?;
    pair.expect_merged()?;
    keep.online()
}

fn scanning_goes_on_when_memory_stays_online(ksm: &Ksm) -> Result<()> {
    let mut changer = Child::spawn()?;
    let mut stuck = Stuck::new(ksm)?;
    let _keep = stuck.pair.block.keep();
    let limit = ksm.read("max_page_sharing")? + 1;
    changer.begin_write_file(ksm.dir().join("max_page_sharing"), &limit.to_string())?;
    stuck.expect_standstill(ksm, &[&changer])?;
    let (mut third, elsewhere) = newcomer()?;
    stuck.writer.interrupt()?;
    let outcome = stuck.writer.finish_write()?;
    ensure!(
        outcome == Err(Errno::EINTR),
        "taking the block offline: {outcome:?}"
    );
    let state = stuck.pair.block.state()?;
    ensure!(state == "online", "the block is {state}");
    let outcome = changer.finish_write()?;
    ensure!(
        outcome == Err(Errno::EBUSY),
        "changing max_page_sharing with pages shared: {outcome:?}"
    );
    ksm.full_scans(3)?;
    ksm.scan_until(Counters::merged(16, 32))?;
    third.verify(elsewhere, CONTENT)?;
    stuck.pair.expect_merged()?;
    // The next time it works.
    stuck.pair.one.unpin()?;
    let offline = stuck.pair.block.offline()?;
    ensure!(
        stuck.pair.in_block()? == 0,
        "there are pages in memory that is gone"
    );
    ksm.full_scans(3)?;
    ksm.expect(Counters::merged(16, 32))?;
    third.verify(elsewhere, CONTENT)?;
    stuck.pair.expect_merged()?;
    offline.online()
}

fn offlining_during_scanning_harms_nobody(ksm: &Ksm) -> Result<()> {
    let mut finder = Finder::default();
    ksm.scan_at_full_speed()?;
    ksm.start()?;
    let mut writer = Child::spawn()?;
    let region = writer.map_mergeable(64, CONTENT)?;
    writer.churn(region, 1)?;
    for _ in 0..4 {
        let mut pair = Pair::spawn(&mut finder)?;
        let block = pair.block;
        // At any stage of merging, and with some of it gone by the time that the block is.
        let offline = block.offline()?;
        pair.verify()?;
        pair.one.munmap(pair.here)?;
        offline.online()?;
        let again = block.offline()?;
        pair.other.verify(pair.there, CONTENT)?;
        again.online()?;
        ensure!(
            writer.alive()?,
            "a process has read something that it did not write"
        );
    }
    writer.kill()?;
    let mut pair = Pair::spawn(&mut finder)?;
    ksm.merge_until(Counters::merged(16, 16))?;
    pair.expect_merged()
}

/// The module has not been told that memory is going offline, and would look at what is going.
fn loading_is_refused_while_memory_goes_offline(ksm: &Ksm) -> Result<()> {
    let mut pair = Pair::spawn(&mut Finder::default())?;
    let _keep = pair.block.keep();
    module::unload()?;
    let mut writer = pair.begin_to_go_offline()?;
    let line = module::expect_refusal(Errno::EBUSY, || module::try_load(""))?;
    let wanted = "memory is going offline; wanted none that does: load the module again once it is";
    ensure!(
        line == wanted,
        "the log says {line:?} instead of {wanted:?}"
    );
    ensure!(
        Ksm::at(STOCK).exists(),
        "the kernel's own KSM was not given back"
    );
    writer.interrupt()?;
    let outcome = writer.finish_write()?;
    ensure!(
        outcome == Err(Errno::EINTR),
        "taking the block offline: {outcome:?}"
    );
    pair.one.unpin()?;
    module::load("")?;
    ksm.merge_until(Counters::merged(16, 16))?;
    pair.expect_merged()
}
