//! What merges and what does not.

use std::collections::HashMap;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::ksm::Counters;
use ksm_e2e::memory;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::PAGE;
use ksm_e2e::procfs;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;

ksm_e2e::tests![
    identical_pages_of_two_processes_merge_and_read_back_right,
    identical_pages_of_one_process_become_one_page,
    every_page_of_zeroes_becomes_one_page,
    pages_that_differ_in_one_byte_never_merge,
    pages_that_change_in_every_pass_are_volatile,
    a_page_of_two_hundred_processes_is_one_page,
    no_page_has_more_sharers_than_allowed,
    pages_behind_any_protection_merge,
    only_memory_that_was_advised_merges,
    only_anonymous_memory_merges,
    areas_with_holes_merge,
    proc_files_tell_the_truth,
    a_process_marked_by_prctl_merges_and_so_do_its_children,
    a_program_started_by_a_marked_process_is_marked,
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

fn every_page_of_zeroes_becomes_one_page(ksm: &Ksm) -> Result<()> {
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(32, Content::Zero)?;
    let there = other.map_mergeable(32, Content::Zero)?;
    ksm.merge_until(Counters::merged(1, 63))?;
    ensure!(
        one.ksm_pages(here)? == 32,
        "zeroes are not shown as KSM pages"
    );
    one.verify(here, Content::Zero)?;
    other.verify(there, Content::Zero)
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

fn no_page_has_more_sharers_than_allowed(ksm: &Ksm) -> Result<()> {
    let content = Content::Same(5);
    ksm.write("max_page_sharing", 8)?;
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(25, content)?;
    let there = other.map_mergeable(25, content)?;
    // 50 = 6 * 8 + 2
    ksm.merge_until(Counters::merged(7, 43))?;
    let mut sharers = HashMap::new();
    for pfn in one.pfns(here)?.into_iter().chain(other.pfns(there)?) {
        *sharers.entry(pfn).or_insert(0_u32) += 1;
    }
    ensure!(
        sharers.len() == 7,
        "there are {} pages instead of 7",
        sharers.len()
    );
    ensure!(
        sharers.values().all(|&sharers| sharers <= 8),
        "a page has too many sharers: {sharers:?}"
    );
    // It stays so.
    ksm.scan_passes(3)?;
    ksm.expect(Counters::merged(7, 43))?;
    one.verify(here, content)?;
    other.verify(there, content)
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

fn a_process_marked_by_prctl_merges_and_so_do_its_children(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(11);
    let mut parent = Child::spawn()?;
    parent.prctl(libc::PR_SET_MEMORY_MERGE, 1)?;
    let region = parent.map(Mapping::pages(32))?;
    parent.fill(region, content)?;
    let mut child = parent.fork()?;
    ensure!(
        child.prctl(libc::PR_GET_MEMORY_MERGE, 0)? == 1,
        "the mark was not inherited"
    );
    let new = child.map(Mapping::pages(32))?;
    child.fill(new, content)?;

    // Other memory of the two, heap and stack, is marked as well, so that absolute numbers cannot be demanded.
    ksm.start()?;
    wait::until("the pages are merged", PATIENCE, || {
        Ok(parent.ksm_pages(region)? == 32
            && child.ksm_pages(new)? == 32
            && child.ksm_pages(region)? == 32)
    })?;
    parent.verify(region, content)?;
    child.verify(region, content)?;
    child.verify(new, content)?;

    child.prctl(libc::PR_SET_MEMORY_MERGE, 0)?;
    ensure!(
        child.ksm_pages(new)? == 0 && child.ksm_pages(region)? == 0,
        "taking the mark away does not unmerge"
    );
    ensure!(
        parent.prctl(libc::PR_GET_MEMORY_MERGE, 0)? == 1,
        "the parent has lost its mark"
    );
    parent.verify(region, content)?;
    child.verify(region, content)?;
    child.verify(new, content)
}

fn a_program_started_by_a_marked_process_is_marked(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(12);
    let mut program = Child::spawn_program(|| {
        // SAFETY: The call takes integers only.
        let result = unsafe { libc::prctl(libc::PR_SET_MEMORY_MERGE, 1_u64, 0_u64, 0_u64, 0_u64) };
        nix::errno::Errno::result(result)
            .map(drop)
            .map_err(memory::os_error)
    })?;
    ensure!(
        program.prctl(libc::PR_GET_MEMORY_MERGE, 0)? == 1,
        "the mark was not inherited"
    );
    let (here, there) = (
        program.map(Mapping::pages(32))?,
        program.map(Mapping::pages(32))?,
    );
    program.fill(here, content)?;
    program.fill(there, content)?;
    ksm.start()?;
    wait::until("the pages are merged", PATIENCE, || {
        Ok(program.ksm_pages(here)? == 32 && program.ksm_pages(there)? == 32)
    })?;
    program.verify(here, content)?;
    program.verify(there, content)
}
