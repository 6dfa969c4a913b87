//! Whatever changes what a page contains, against the comparison of pages and the replacement of one by the other.

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
use ksm_e2e::ksm::Counters;
use ksm_e2e::memory;
use ksm_e2e::memory::Mapping;
use ksm_e2e::procfs;
use ksm_e2e::swap::Group;
use ksm_e2e::swap::Swap;
use ksm_e2e::userfault::Userfault;
use ksm_e2e::userfault::Watch;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;

use crate::stage::CONTENT;
use crate::stage::OTHER;
use crate::stage::Witnesses;
use crate::stage::advise;
use crate::stage::expect_page;
use crate::stage::newcomer;
use crate::stage::scan_briskly;

ksm_e2e::tests![
    a_write_against_the_comparison,
    a_write_against_make_ksm,
    dontneed_against_make_ksm,
    a_pin_against_a_merge,
    userfaultfd_against_a_merge,
    free_against_a_merge,
];

/// How long a thread can wait that must not sleep.
const MOMENT: Duration = Duration::from_millis(20);

fn a_write_against_the_comparison(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let mut witnesses = Witnesses::begin(ksm)?;
    let (mut writer, region) = newcomer(OTHER)?;
    advise(&mut writer, region)?;
    for round in hits.rounds() {
        let place = ["protected", "compared", "replacing"][round as usize % 3];
        let spins = place != "replacing";
        let window = if spins {
            hits.hold_all(place, 1, MOMENT)?
        } else {
            hits.hold(place)?
        };
        writer.fill(region, CONTENT)?;
        window.wait()?;
        let bytes = round.to_le_bytes();
        writer.begin_write(region.addr, &bytes)?;
        let span = writer.finish_timed()?;
        if spins {
            window.hit_if_meanwhile(span)?;
        } else {
            window.hit()?;
        }
        expect_page(&mut writer, region, CONTENT, &bytes)
            .with_context(|| format!("a write was lost at {place}"))?;
        ksm.scan_until(Counters::merged(1, 1).and_unshared(1))?;
        expect_page(&mut writer, region, CONTENT, &bytes)?;
        witnesses.verify()?;
    }
    hits.expect(rounds())?;
    drop(writer);
    witnesses.end(ksm)
}

/// Two processes whose pages are equal to each other's and to nobody else's.
struct Pair {
    one: Child,
    here: Region,
    other: Child,
    there: Region,
}

impl Pair {
    fn new() -> Result<Self> {
        let (mut one, here) = newcomer(Content::Same(10))?;
        let (mut other, there) = newcomer(Content::Same(11))?;
        advise(&mut one, here)?;
        advise(&mut other, there)?;
        Ok(Self {
            one,
            here,
            other,
            there,
        })
    }

    fn fill(&mut self, content: Content) -> Result<()> {
        self.one.fill(self.here, content)?;
        self.other.fill(self.there, content)
    }

    fn each(&mut self) -> [(&mut Child, Region); 2] {
        [(&mut self.one, self.here), (&mut self.other, self.there)]
    }
}

fn a_write_against_make_ksm(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let witnesses = Witnesses::begin(ksm)?;
    let mut pair = Pair::new()?;
    for round in 0..rounds() {
        let place = [
            "paired",
            "write_protected",
            "ksm_made",
            "replacing",
            "unadopted",
        ][round as usize % 5];
        // What no KSM page contains, as one may be left from the round before.
        let content = Content::Same(1000 + u64::from(round));
        let window = hits.hold(place)?;
        pair.fill(content)?;
        window.wait()?;
        // Nobody knows which of the two becomes the KSM page; or one of them writes only.
        let start = [[1, 1], [1, 2], [3, 1], [1, 3]][round as usize / 5 % 4];
        for ((child, region), start) in pair.each().into_iter().zip(start) {
            if start != 3 {
                child.write(region.addr, &[start])?;
            }
        }
        window.hit()?;
        for ((child, region), start) in pair.each().into_iter().zip(start) {
            let written = [start];
            let written = if start == 3 { &[] } else { &written[..] };
            expect_page(child, region, content, written)
                .with_context(|| format!("a write was lost at {place}"))?;
        }
        // One that has not written may keep a KSM page that it has for itself.
        let wanted = if start == [1, 1] {
            [Counters::merged(2, 2); 2]
        } else {
            [
                Counters::merged(1, 1).and_unshared(2),
                Counters::merged(2, 1).and_unshared(1),
            ]
        };
        wait::until_or_explain("the counters are right", PATIENCE, || {
            let seen = ksm.counters()?;
            Ok((!wanted.contains(&seen)).then(|| format!("{seen}, wanted {wanted:?}")))
        })?;
        for ((child, region), start) in pair.each().into_iter().zip(start) {
            let written = [start];
            let written = if start == 3 { &[] } else { &written[..] };
            expect_page(child, region, content, written)?;
        }
    }
    hits.expect(rounds())?;
    drop(pair);
    witnesses.end(ksm)
}

fn dontneed_against_make_ksm(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let witnesses = Witnesses::begin(ksm)?;
    let mut pair = Pair::new()?;
    for round in 0..rounds() {
        let place = ["write_protected", "ksm_made", "replacing", "unadopted"][round as usize % 4];
        // What no KSM page contains, as one may be left from the round before.
        let content = Content::Same(1000 + u64::from(round));
        let window = hits.hold(place)?;
        pair.fill(content)?;
        window.wait()?;
        for (child, region) in pair.each() {
            child.advise(region, libc::MADV_DONTNEED)?;
        }
        window.hit()?;
        for (index, (child, region)) in pair.each().into_iter().enumerate() {
            child
                .verify(region, Content::Zero)
                .with_context(|| format!("old contents are back after {place}"))?;
            child.fill(region, Content::Same(20 + index as u64))?;
        }
        ksm.scan_until(Counters::merged(1, 1).and_unshared(2))?;
        for (index, (child, region)) in pair.each().into_iter().enumerate() {
            child.verify(region, Content::Same(20 + index as u64))?;
        }
    }
    hits.expect(rounds())?;
    drop(pair);
    witnesses.end(ksm)
}

fn a_pin_against_a_merge(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let mut witnesses = Witnesses::begin(ksm)?;
    let (mut user, region) = newcomer(OTHER)?;
    advise(&mut user, region)?;
    for round in 0..rounds() {
        let place = ["node_found", "replacing"][round as usize % 2];
        let window = hits.hold(place)?;
        user.fill(region, CONTENT)?;
        window.wait()?;
        user.pin(region)?;
        window.hit()?;
        let pfn = user.pfns(region)?;
        ksm.full_scans(2)?;
        ensure!(
            user.pfns(region)? == pfn && !pfn[0].flags()?.ksm(),
            "a page that is in use was replaced at {place}"
        );
        user.unpin()?;
        witnesses.share_with(ksm, &mut [(&mut user, region)])?;
    }
    hits.expect(rounds())?;
    drop(user);
    witnesses.end(ksm)
}

fn userfaultfd_against_a_merge(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let mut witnesses = Witnesses::begin(ksm)?;
    // Memory of this process, as the watcher has to be of the same one; the witnesses do not inherit it.
    let region = Mapping::pages(1).map()?;
    // SAFETY: The region was just mapped.
    unsafe { memory::fill(region, OTHER) };
    memory::advise(region, libc::MADV_MERGEABLE)?;
    let mut watcher = Userfault::open()?;
    watcher.watch(region, Watch::WriteProtected)?;
    let own = std::process::id() as i32;
    let protected =
        || -> Result<bool> { Ok(procfs::map_entries(own, region)?[0].uffd_write_protected()) };
    for round in 0..rounds() {
        let window = hits.hold("replacing")?;
        // SAFETY: The region stays mapped, and nobody else writes to it now.
        unsafe { memory::fill(region, CONTENT) };
        window.wait()?;
        watcher.write_protect(region, true)?;
        window.hit()?;
        ksm.scan_until(Counters::merged(1, 2))?;
        ensure!(protected()?, "merging has taken the protection away");

        // The write is held up, and is the writer's alone when it is let go.
        let bytes = round.to_le_bytes();
        let writer = std::thread::spawn(move || {
            // SAFETY: The page is mapped, and nobody else touches it until this thread has been joined.
            unsafe { memory::write(region.addr, &bytes) };
        });
        let mut fault = None;
        wait::until("the write is done or caught", PATIENCE, || {
            fault = fault.or(watcher.fault()?);
            Ok(fault.is_some() || writer.is_finished())
        })?;
        watcher.write_protect(region, false)?;
        let joined = writer.join();
        ensure!(joined.is_ok(), "the writer panicked");
        ensure!(
            fault.is_some_and(|fault| fault.protected),
            "a write to a protected page: {fault:?}"
        );
        // SAFETY: The region stays mapped.
        let seen = unsafe { memory::read(region.addr, 8) };
        ensure!(seen[..4] == bytes, "a write was lost");
        witnesses.verify()?;
    }
    hits.expect(rounds())?;
    memory::munmap(region)?;
    witnesses.end(ksm)
}

fn free_against_a_merge(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let swap = Swap::on(2048)?;
    let group = Group::new()?;
    for round in 0..rounds() {
        // One process is left of two that shared a page, and says that it does not need it any more: just before
        // another one is merged with it, or just after.
        let (mut first, mut second, mut joining) =
            (Child::spawn()?, Child::spawn()?, Child::spawn()?);
        group.add(&joining)?;
        group.add(&first)?;
        group.add(&second)?;
        let here = first.map_mergeable(1, CONTENT)?;
        let there = second.map_mergeable(1, CONTENT)?;
        scan_briskly(ksm)?;
        ksm.start()?;
        ksm.scan_until(Counters::merged(1, 1))?;
        second.kill()?;
        ksm.scan_until(Counters::merged(1, 0))?;
        let _ = there;
        let place = ["node_found", "replacing", "mapped"][round as usize % 3];
        let window = hits.hold(place)?;
        let region = joining.map_mergeable(1, CONTENT)?;
        window.wait()?;
        first.advise(here, libc::MADV_FREE)?;
        window.hit()?;
        ksm.scan_until(Counters::merged(1, 1))?;
        ksm.stop()?;
        // Reclaim takes what was given up without asking; so it finds out that this was not.
        wait::until("reclaim has looked at the page", PATIENCE, || {
            group.reclaim_anything(64 * memory::PAGE)?;
            Ok(match joining.map_entries(region)?[0].pfn() {
                Some(pfn) => pfn.flags()?.swap_backed(),
                None => true,
            })
        })?;
        group
            .swap_out(&[(&joining, region)])
            .with_context(|| format!("memory was given up that is needed, at {place}"))?;
        joining
            .verify(region, CONTENT)
            .with_context(|| format!("memory was lost at {place}"))?;
        drop((first, joining));
        ksm.start()?;
        ksm.scan_until(Counters::merged(0, 0))?;
    }
    hits.expect(rounds())?;
    drop(group);
    swap.off()
}
