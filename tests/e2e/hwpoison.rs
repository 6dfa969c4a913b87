//! Memory that goes bad.

use std::fs;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::child::BUS_MCEERR_AO;
use ksm_e2e::child::BusError;
use ksm_e2e::child::MCE_KILL_EARLY;
use ksm_e2e::child::MCE_KILL_LATE;
use ksm_e2e::ksm::Counters;
use ksm_e2e::memory::Mapping;
use ksm_e2e::procfs::Pfn;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

ksm_e2e::tests![
    a_bad_page_hits_those_who_map_it_and_nobody_else,
    nobody_merges_with_a_bad_page,
    a_page_taken_out_of_service_moves_for_all_who_map_it,
];

const CONTENT: Content = Content::Distinct(1);

/// Makes a page usable again when it is dropped: there is nothing wrong with it.
struct Cure(Pfn);

impl Drop for Cure {
    fn drop(&mut self) {
        let file = "/sys/kernel/debug/hwpoison/unpoison-pfn";
        if let Err(error) = fs::write(file, format!("{}\n", self.0.0)) {
            eprintln!("{file}: {error}");
        }
    }
}

/// Makes a page of a helper bad. The kernel kills the one who comes upon it, which is the helper.
fn poison(mut victim: Child, page: ksm_e2e::Region) -> Result<Cure> {
    ensure!(
        fs::exists("/sys/kernel/debug/hwpoison")?,
        "this test needs a kernel with HWPOISON_INJECT and debugfs mounted"
    );
    let pfn = victim.pfns(page)?[0];
    let cure = Cure(pfn);
    let pid = Pid::from_raw(victim.pid());
    victim.advise_at_any_cost(page, libc::MADV_HWPOISON)?;
    let status = victim.wait()?;
    let bus = |status| matches!(status, WaitStatus::Signaled(_, Signal::SIGBUS, _));
    ensure!(
        status.is_some_and(bus),
        "the process {pid} that met the bad page ended with {status:?}"
    );
    ensure!(pfn.flags()?.poisoned(), "the page is not marked as bad");
    Ok(cure)
}

fn a_bad_page_hits_those_who_map_it_and_nobody_else(ksm: &Ksm) -> Result<()> {
    let spawn = |policy| -> Result<Child> {
        let mut child = Child::spawn()?;
        child.catch_bus_errors()?;
        child.set_memory_error_policy(policy)?;
        Ok(child)
    };
    // Four who share pages 0 to 7, one who shares 1 to 7 with them, and one whose pages are equal but its own.
    let mut victim = Child::spawn()?;
    let (mut early, mut late, mut heir) = (
        spawn(MCE_KILL_EARLY)?,
        spawn(MCE_KILL_LATE)?,
        spawn(MCE_KILL_EARLY)?,
    );
    let (mut neighbour, mut bystander) = (spawn(MCE_KILL_EARLY)?, spawn(MCE_KILL_EARLY)?);
    let victims = victim.map_mergeable(8, CONTENT)?;
    // At different addresses in different processes.
    early.map(Mapping::pages(3))?;
    let earlys = early.map_mergeable(8, CONTENT)?;
    late.map(Mapping::pages(5))?;
    let lates = late.map_mergeable(8, CONTENT)?;
    heir.map(Mapping::pages(7))?;
    let heirs = heir.map_mergeable(8, CONTENT)?;
    let neighbours = neighbour.map_mergeable(7, CONTENT.from_page(1))?;
    let bystanders = bystander.map(Mapping::pages(8))?;
    bystander.fill(bystanders, CONTENT)?;
    ksm.merge_until(Counters::merged(8, 8 * 3 + 7))?;

    let cure = poison(victim, victims.part(0, 1))?;
    for (child, region) in [(&mut early, earlys), (&mut heir, heirs)] {
        let error = child.bus_error()?;
        let wanted = BusError {
            code: BUS_MCEERR_AO,
            addr: region.page(0),
        };
        ensure!(
            error == Some(wanted),
            "a process that wants to know early was told {error:?}, not {wanted:?}"
        );
    }
    for (name, child) in [
        ("late", &mut late),
        ("neighbour", &mut neighbour),
        ("bystander", &mut bystander),
    ] {
        ensure!(child.alive()?, "{name} was killed");
        let error = child.bus_error()?;
        ensure!(error.is_none(), "{name} was told {error:?}");
    }
    // Everything else is as it was.
    bystander.verify(bystanders, CONTENT)?;
    neighbour.verify(neighbours, CONTENT.from_page(1))?;
    for (child, region) in [(&mut early, earlys), (&mut heir, heirs), (&mut late, lates)] {
        child.verify(region.part(1, 7), CONTENT.from_page(1))?;
    }
    ksm.merge_until(Counters::merged(7, 7 * 3))?;

    // Who did not want to know early learns it on touching the page.
    ensure!(
        late.read(lates.page(0), 1).is_err(),
        "the bad page could be read"
    );
    let status = late.wait()?;
    let wanted = WaitStatus::Exited(Pid::from_raw(late.pid()), 128 + libc::SIGBUS);
    ensure!(
        status == Some(wanted),
        "the process that touched the bad page ended with {status:?}"
    );
    bystander.verify(bystanders, CONTENT)?;
    neighbour.verify(neighbours, CONTENT.from_page(1))?;
    early.verify(earlys.part(1, 7), CONTENT.from_page(1))?;
    ksm.unmerge()?;
    ksm.expect(Counters::merged(0, 0))?;
    drop((early, late, heir, neighbour, bystander));
    drop(cure);
    Ok(())
}

fn nobody_merges_with_a_bad_page(ksm: &Ksm) -> Result<()> {
    let (mut victim, mut other) = (Child::spawn()?, Child::spawn()?);
    let victims = victim.map_mergeable(4, CONTENT)?;
    let others = other.map_mergeable(4, CONTENT)?;
    ksm.merge_until(Counters::merged(4, 4))?;
    let cure = poison(victim, victims.part(0, 1))?;
    let (mut new, mut newer) = (Child::spawn()?, Child::spawn()?);
    let here = new.map_mergeable(4, CONTENT)?;
    let there = newer.map_mergeable(4, CONTENT)?;
    // The newcomers join the good pages, and make a new one instead of the bad one.
    ksm.merge_until(Counters::merged(4, 1 + 3 * 2))?;
    let pfns = new.pfns(here)?;
    ensure!(
        !pfns.contains(&cure.0),
        "a page was merged with the bad one"
    );
    ensure!(
        pfns == newer.pfns(there)?,
        "the newcomers map different pages"
    );
    ensure!(
        pfns[1..] == other.pfns(others.part(1, 3))?,
        "the newcomers have not joined the good pages"
    );
    new.verify(here, CONTENT)?;
    newer.verify(there, CONTENT)?;
    other.verify(others.part(1, 3), CONTENT.from_page(1))?;
    ksm.unmerge()?;
    drop((other, new, newer));
    drop(cure);
    Ok(())
}

fn a_page_taken_out_of_service_moves_for_all_who_map_it(ksm: &Ksm) -> Result<()> {
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(4, CONTENT)?;
    let there = other.map_mergeable(4, CONTENT)?;
    ksm.merge_until(Counters::merged(4, 4))?;
    let old = one.pfns(here.part(2, 1))?[0];
    one.advise(here.part(2, 1), libc::MADV_SOFT_OFFLINE)
        .context("taking a merged page out of service")?;
    let cure = Cure(old);
    ensure!(old.flags()?.poisoned(), "the page is still in service");
    let new = one.pfns(here)?;
    ensure!(
        !new.contains(&old) && new == other.pfns(there)?,
        "the page has not moved for all"
    );
    ensure!(one.ksm_pages(here)? == 4, "the new page is not a KSM page");
    one.verify(here, CONTENT)?;
    other.verify(there, CONTENT)?;
    ksm.merge_until(Counters::merged(4, 4))?;
    drop(cure);
    Ok(())
}
