//! What merges and what does not.

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Passes;
use ksm_e2e::ksm::Counters;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::PAGE;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;

ksm_e2e::tests![
    identical_pages_of_two_processes_merge_and_read_back_right,
    identical_pages_of_one_process_become_one_page,
    pages_that_differ_in_one_byte_never_merge,
    pages_that_change_in_every_pass_are_volatile,
    a_page_of_two_hundred_processes_is_one_page,
    pages_behind_any_protection_merge,
    only_memory_that_was_advised_merges,
    only_anonymous_memory_merges,
    areas_with_holes_merge,
    a_page_merges_with_one_behind_it_that_has_not_changed_for_long,
    a_page_that_has_waited_for_long_merges_with_one_that_comes,
];

fn identical_pages_of_two_processes_merge_and_read_back_right(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(1);
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(64, content)?;
    let there = other.map_mergeable(64, content)?;
    let unmergeable = one.map(Mapping::pages(64))?;
    one.fill(unmergeable, content)?;
    one.verify(here, content)?;
    other.verify(there, content)?;

    ksm.merge_until(Counters::merged(64, 64))?;
    let pfns = one.pfns(here)?;
    ensure!(
        pfns == other.pfns(there)?,
        "the processes map different pages"
    );
    for pfn in &pfns {
        let flags = pfn.flags()?;
        ensure!(
            flags.ksm() && flags.anonymous(),
            "{pfn:?} is not shown as a KSM page"
        );
    }
    ensure!(
        one.ksm_pages(unmergeable)? == 0,
        "a page that was not to be merged was merged"
    );
    one.verify(here, content)?;
    other.verify(there, content)?;

    ksm.unmerge()?;
    one.verify(here, content)?;
    other.verify(there, content)
}

fn identical_pages_of_one_process_become_one_page(ksm: &Ksm) -> Result<()> {
    let content = Content::Same(2);
    let mut child = Child::spawn()?;
    let region = child.map_mergeable(64, content)?;
    ksm.merge_until(Counters::merged(1, 63))?;
    let pfns = child.pfns(region)?;
    ensure!(
        pfns.iter().all(|pfn| *pfn == pfns[0]),
        "there is more than one page: {pfns:?}"
    );
    child.verify(region, content)
}

fn pages_that_differ_in_one_byte_never_merge(ksm: &Ksm) -> Result<()> {
    // Pages that are all equal but for one byte, which is another one or has another value in each.
    let offsets = [
        0,
        1,
        7,
        8,
        63,
        64,
        2047,
        2048,
        4032,
        PAGE - 8,
        PAGE - 2,
        PAGE - 1,
    ];
    let original = Content::Same(3).page(0);
    let old = original.bytes();
    let mut child = Child::spawn()?;
    let region = child.map_mergeable(2 * offsets.len() + 1, Content::Same(3))?;
    let mut wanted = vec![original.checksum()];
    for (index, offset) in offsets.into_iter().enumerate() {
        for (twin, flip) in [(0, 0x01), (1, 0x80)] {
            let byte = old[offset] ^ flip;
            child.write(region.page(1 + 2 * index + twin) + offset, &[byte])?;
            wanted.push(original.clone().with_byte(offset, byte).checksum());
        }
    }
    ksm.start()?;
    ksm.full_scans(6)?;
    ksm.stop()?;
    ksm.expect(Counters::merged(0, 0).and_unshared(region.pages as u64))?;
    ensure!(child.checksums(region)? == wanted, "the pages have changed");

    // The same pages in another process: each finds its twin, and only its twin.
    let mut other = child.fork()?;
    let again = other.map(Mapping::pages(region.pages))?;
    for (to, from) in again.addresses().zip(region.addresses()) {
        let page = other.read(from, PAGE)?;
        other.write(to, &page)?;
    }
    other.munmap(region)?;
    other.advise(again, libc::MADV_MERGEABLE)?;
    ksm.merge_until(Counters::merged(region.pages as u64, region.pages as u64))?;
    ensure!(
        child.checksums(region)? == wanted && other.checksums(again)? == wanted,
        "the pages have changed"
    );
    Ok(())
}

fn pages_that_change_in_every_pass_are_volatile(ksm: &Ksm) -> Result<()> {
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(16, Content::Same(0))?;
    let there = other.map_mergeable(16, Content::Same(0))?;
    // A whole pass, then a sleep that lasts until the sleeping time is changed.
    let mut sleep = 3_600_000;
    ksm.write("sleep_millisecs", sleep)?;
    ksm.start()?;
    for round in 1..8 {
        let next_pass = |passes| ksm.read("full_scans").map(|now| now > passes);
        let passes = ksm.read("full_scans")?;
        sleep += 1;
        ksm.write("sleep_millisecs", sleep)?;
        wait::until("a pass has been made", PATIENCE, || next_pass(passes))?;
        if round > 1 {
            let wanted = Counters {
                volatile: 32,
                ..Counters::merged(0, 0)
            };
            ksm.expect(wanted)
                .with_context(|| format!("in round {round}"))?;
        }
        one.verify(here, Content::Same(round - 1))?;
        other.verify(there, Content::Same(round - 1))?;
        one.fill(here, Content::Same(round))?;
        other.fill(there, Content::Same(round))?;
    }
    ksm.scan_fast()?;
    ksm.merge_until(Counters::merged(1, 31))
}

fn a_page_of_two_hundred_processes_is_one_page(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(4);
    let mut children = Vec::new();
    let mut regions = Vec::new();
    for _ in 0..200 {
        let mut child = Child::spawn()?;
        regions.push(child.map_mergeable(4, content)?);
        children.push(child);
    }
    ksm.merge_until(Counters::merged(4, 796))?;
    let pfns = children[0].pfns(regions[0])?;
    for (child, &region) in children.iter_mut().zip(&regions) {
        ensure!(
            child.pfns(region)? == pfns,
            "process {} maps other pages",
            child.pid()
        );
        child.verify(region, content)?;
    }
    // Half of them go; the others keep everything.
    for child in children.drain(100..) {
        child.kill()?;
    }
    ksm.merge_until(Counters::merged(4, 396))?;
    for (child, &region) in children.iter_mut().zip(&regions) {
        child.verify(region, content)?;
    }
    Ok(())
}

fn pages_behind_any_protection_merge(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(6);
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let reading = one.map_mergeable(16, content)?;
    let nothing = other.map_mergeable(16, content)?;
    one.protect(reading, libc::PROT_READ)?;
    other.protect(nothing, libc::PROT_NONE)?;
    ksm.merge_until(Counters::merged(16, 16))?;
    ensure!(
        one.ksm_pages(reading)? == 16,
        "the readable pages are not merged"
    );
    one.verify(reading, content)?;
    // Unmerging reaches the inaccessible pages too.
    other.advise(nothing, libc::MADV_UNMERGEABLE)?;
    other.protect(nothing, libc::PROT_READ)?;
    ensure!(
        other.ksm_pages(nothing)? == 0,
        "an inaccessible page stayed merged"
    );
    other.verify(nothing, content)?;
    one.verify(reading, content)
}

fn only_memory_that_was_advised_merges(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(7);
    let mut child = Child::spawn()?;
    let advised = child.map_mergeable(16, content)?;
    let bystander = child.map(Mapping::pages(16))?;
    child.fill(bystander, content)?;
    ksm.start()?;
    ksm.full_scans(4)?;
    ksm.stop()?;
    ksm.expect(Counters::merged(0, 0).and_unshared(16))?;
    child.advise(bystander.part(0, 8), libc::MADV_MERGEABLE)?;
    ksm.merge_until(Counters::merged(8, 8).and_unshared(8))?;
    ensure!(
        child.ksm_pages(bystander.part(8, 8))? == 0,
        "a page that was not advised was merged"
    );
    child.verify(advised, content)?;
    child.verify(bystander, content)
}

fn only_anonymous_memory_merges(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(8);
    let path = format!("/run/ksm-e2e-file-{}", std::process::id());
    let bytes: Vec<u8> = (0..16)
        .flat_map(|index| content.page(index).bytes())
        .collect();
    std::fs::write(&path, bytes)?;
    let mut child = Child::spawn()?;
    let anonymous = child.map_mergeable(16, content)?;
    let shared = child.map(Mapping {
        shared: true,
        ..Mapping::pages(16)
    })?;
    child.fill(shared, content)?;
    child.advise(shared, libc::MADV_MERGEABLE)?;
    let file = child.map_file(&path, 16)?;
    std::fs::remove_file(&path)?;
    child.verify(file, content)?;
    child.advise(file, libc::MADV_MERGEABLE)?;
    ksm.start()?;
    ksm.full_scans(4)?;
    ksm.stop()?;
    ksm.expect(Counters::merged(0, 0).and_unshared(16))?;

    // Private copies of the file's pages are anonymous: they do merge.
    child.fill(file.part(0, 8), content)?;
    ksm.merge_until(Counters::merged(8, 8).and_unshared(8))?;
    ensure!(
        child.ksm_pages(file.part(0, 8))? == 8,
        "private copies of file pages are not merged"
    );
    ensure!(
        child.ksm_pages(file.part(8, 8))? == 0,
        "pages of a file were merged"
    );
    ensure!(child.ksm_pages(shared)? == 0, "shared memory was merged");
    child.verify(anonymous, content)?;
    child.verify(shared, content)?;
    child.verify(file, content)
}

fn areas_with_holes_merge(ksm: &Ksm) -> Result<()> {
    // Every fourth page exists, in areas larger than what one page table maps.
    let content = Content::Distinct(9);
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let mut regions = Vec::new();
    for child in [&mut one, &mut other] {
        let region = child.map(Mapping::pages(1500))?;
        for index in (0..region.pages).step_by(4) {
            child.fill(region.part(index, 1), content.from_page(index))?;
        }
        child.advise(region, libc::MADV_MERGEABLE)?;
        regions.push(region);
    }
    ksm.merge_until(Counters::merged(375, 375))?;
    for (child, region) in [(&mut one, regions[0]), (&mut other, regions[1])] {
        let entries = child.map_entries(region)?;
        let present: Vec<usize> = (0..region.pages)
            .filter(|&index| entries[index].pfn().is_some())
            .collect();
        ensure!(
            present.iter().all(|index| index % 4 == 0),
            "scanning has filled a hole"
        );
        for index in present {
            child.verify(region.part(index, 1), content.from_page(index))?;
        }
    }
    Ok(())
}

fn a_page_merges_with_one_behind_it_that_has_not_changed_for_long(ksm: &Ksm) -> Result<()> {
    let mut child = Child::spawn()?;
    let region = child.map_mergeable(8, Content::Distinct(1))?;
    let mut passes = Passes::of(ksm)?;
    passes.make(4)?;
    ksm.expect(Counters::merged(0, 0).and_unshared(8))?;
    // Page 2 becomes equal to page 5. Both are looked at in the same batch, and merged while page 5 waits for its turn.
    child.fill(region.part(2, 1), Content::Distinct(6))?;
    passes.make(2)?;
    ksm.expect(Counters::merged(1, 1).and_unshared(6))?;
    passes.pass()?;
    ksm.expect(Counters::merged(1, 1).and_unshared(6))?;
    child.verify(region.part(2, 1), Content::Distinct(6))?;
    child.verify(region.part(3, 5), Content::Distinct(4))
}

fn a_page_that_has_waited_for_long_merges_with_one_that_comes(ksm: &Ksm) -> Result<()> {
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(8, Content::Distinct(1))?;
    let mut passes = Passes::of(ksm)?;
    passes.make(6)?;
    ksm.expect(Counters::merged(0, 0).and_unshared(8))?;
    let there = other.map_mergeable(3, Content::Distinct(3))?;
    passes.make(2)?;
    ksm.expect(Counters::merged(3, 3).and_unshared(5))?;
    // One that has come and gone in between is no obstacle.
    one.fill(here.part(0, 1), Content::Distinct(500))?;
    passes.pass()?;
    let late = other.map_mergeable(1, Content::Distinct(500))?;
    passes.make(2)?;
    ksm.expect(Counters::merged(4, 4).and_unshared(4))?;
    one.verify(here.part(1, 7), Content::Distinct(2))?;
    other.verify(there, Content::Distinct(3))?;
    other.verify(late, Content::Distinct(500))
}
