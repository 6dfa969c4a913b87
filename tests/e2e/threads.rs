//! `scan_threads`: several threads that scan at the same time.

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::ksm::Counters;
use ksm_e2e::procfs;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;
use nix::errno::Errno;

ksm_e2e::tests![
    there_are_as_many_threads_as_asked_for,
    only_sensible_numbers_of_threads_are_taken,
    several_threads_merge_what_one_would,
    every_thread_does_a_part_of_the_work,
    the_number_changes_while_scanning_goes_on,
    processes_come_and_go_under_several_threads,
    unmerging_under_several_threads_leaves_nothing,
];

const CONTENT: Content = Content::Distinct(1);
const PAGES: usize = 700;

/// Names of the threads beside the first one.
fn others() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for number in 1..70 {
        let name = format!("ksmd_rs/{number}");
        if procfs::pid_of(&name)?.is_some() {
            found.push(name);
        }
    }
    Ok(found)
}

fn expect_threads(ksm: &Ksm, wanted: u64) -> Result<()> {
    let names: Vec<String> = (1..wanted)
        .map(|number| format!("ksmd_rs/{number}"))
        .collect();
    ensure!(
        ksm.read("scan_threads")? == wanted,
        "the file does not show {wanted}"
    );
    // One that has been stopped may still be on its way out.
    wait::until_or_explain("the threads are those wanted", PATIENCE, || {
        let seen = others()?;
        Ok((seen != names).then(|| format!("there are {seen:?}, wanted {names:?}")))
    })?;
    ensure!(
        procfs::pid_of("ksmd_rs")?.is_some(),
        "the first thread is gone"
    );
    Ok(())
}

/// Processes with the same pages, and some of its own in each.
struct Crowd {
    members: Vec<(Child, Region, Region)>,
    /// Number of the first one, which tells its own pages from all others'.
    first: usize,
}

impl Crowd {
    fn of(processes: usize) -> Result<Self> {
        Self::from_number(0, processes)
    }

    fn from_number(first: usize, processes: usize) -> Result<Self> {
        let mut members = Vec::new();
        for number in first..first + processes {
            let mut child = Child::spawn()?;
            let same = child.map_mergeable(PAGES, CONTENT)?;
            let own = child.map_mergeable(PAGES, Self::own(number))?;
            members.push((child, same, own));
        }
        Ok(Self { members, first })
    }

    fn own(number: usize) -> Content {
        Content::Distinct(100_000 * (number as u64 + 1))
    }

    fn merged(&self) -> Counters {
        let (pages, processes) = (PAGES as u64, self.members.len() as u64);
        Counters::merged(pages, (processes - 1) * pages).and_unshared(processes * pages)
    }

    fn verify(&mut self) -> Result<()> {
        for (index, (child, same, own)) in self.members.iter_mut().enumerate() {
            child.verify(*same, CONTENT)?;
            child.verify(*own, Self::own(self.first + index))?;
        }
        Ok(())
    }
}

fn there_are_as_many_threads_as_asked_for(ksm: &Ksm) -> Result<()> {
    expect_threads(ksm, 1)?;
    for threads in [2, 5, 64, 3, 3, 1] {
        ksm.write("scan_threads", threads)?;
        expect_threads(ksm, threads)?;
    }
    Ok(())
}

fn only_sensible_numbers_of_threads_are_taken(ksm: &Ksm) -> Result<()> {
    for text in ["0", "65", "-1", "4294967296", "", "two", "2 3"] {
        let error = ksm.write_bytes("scan_threads", text.as_bytes());
        ensure!(
            error == Err(Errno::EINVAL) || (text.is_empty() && error == Ok(0)),
            "{text:?} was answered by {error:?}"
        );
        expect_threads(ksm, 1)?;
    }
    Ok(())
}

fn several_threads_merge_what_one_would(ksm: &Ksm) -> Result<()> {
    for threads in [2, 4] {
        let mut crowd = Crowd::of(5)?;
        ksm.write("scan_threads", threads)?;
        ksm.merge_until(crowd.merged())?;
        crowd.verify()?;
        ksm.unmerge()?;
        crowd.verify()?;
    }
    Ok(())
}

fn every_thread_does_a_part_of_the_work(ksm: &Ksm) -> Result<()> {
    let crowd = Crowd::of(6)?;
    ksm.write("scan_threads", 3)?;
    ksm.merge_until(crowd.merged())?;
    ksm.scan_at_full_speed()?;
    let ticks = |name: &str| -> Result<u64> {
        let pid = procfs::pid_of(name)?.with_context(|| format!("there is no {name}"))?;
        procfs::cpu_ticks(pid)
    };
    ksm.start()?;
    wait::until(
        "all three threads have worked for a while",
        PATIENCE,
        || Ok(ticks("ksmd_rs")? > 20 && ticks("ksmd_rs/1")? > 10 && ticks("ksmd_rs/2")? > 10),
    )
}

fn the_number_changes_while_scanning_goes_on(ksm: &Ksm) -> Result<()> {
    let mut crowd = Crowd::of(4)?;
    ksm.scan_at_full_speed()?;
    ksm.start()?;
    for round in 0..60 {
        ksm.write("scan_threads", [4, 1, 2, 8, 3][round % 5])?;
    }
    ksm.scan_until(crowd.merged())?;
    crowd.verify()
}

fn processes_come_and_go_under_several_threads(ksm: &Ksm) -> Result<()> {
    let mut witnesses = Crowd::of(2)?;
    ksm.write("scan_threads", 4)?;
    ksm.scan_at_full_speed()?;
    ksm.start()?;
    for round in 0..25 {
        let mut crowd = Crowd::from_number(10, 3)?;
        if round % 3 == 0 {
            ksm.full_scans(2)?;
        }
        let (child, same, _) = &mut crowd.members[round % 3];
        child.advise(same.part(10, 300), libc::MADV_DONTNEED)?;
        child.munmap(same.part(400, 100))?;
        child.fill(same.part(600, 50), Content::Distinct(7))?;
        child.verify(same.part(600, 50), Content::Distinct(7))?;
        drop(crowd);
    }
    ksm.scan_until(witnesses.merged())?;
    witnesses.verify()
}

fn unmerging_under_several_threads_leaves_nothing(ksm: &Ksm) -> Result<()> {
    let mut crowd = Crowd::of(4)?;
    ksm.write("scan_threads", 4)?;
    ksm.scan_at_full_speed()?;
    for _ in 0..15 {
        ksm.start()?;
        ksm.full_scans(3)?;
        ksm.unmerge()?;
        ksm.expect(Counters::merged(0, 0))?;
        crowd.verify()?;
    }
    ksm.start()?;
    ksm.scan_until(crowd.merged())?;
    crowd.verify()
}
