//! Memory that a userfaultfd watches.

use std::os::unix::fs::FileExt;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::ksm::Counters;
use ksm_e2e::memory;
use ksm_e2e::memory::Mapping;
use ksm_e2e::procfs;
use ksm_e2e::userfault::Fault;
use ksm_e2e::userfault::Userfault;
use ksm_e2e::userfault::Watch;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;

ksm_e2e::tests![
    missing_pages_are_left_to_the_watcher,
    protecting_merged_pages_survives_unmerging,
    watched_pages_that_merge_keep_their_content,
    pages_that_may_not_be_read_are_unmerged_and_stay_so,
    marked_pages_of_inaccessible_memory_are_unmerged,
];

const CONTENT: Content = Content::Distinct(1);
const PAGES: usize = 16;

fn own_pid() -> i32 {
    std::process::id() as i32
}

fn map_watched(content: Content, watch: Watch) -> Result<(Region, Userfault)> {
    let region = Mapping::pages(PAGES).map()?;
    // SAFETY: The region was just mapped.
    unsafe { memory::fill(region, content) };
    memory::advise(region, libc::MADV_MERGEABLE)?;
    let watcher = Userfault::open()?;
    watcher.watch(region, watch)?;
    Ok((region, watcher))
}

/// Checks this process' memory. Reading it through `/proc` fails where there is no page, instead of waiting for ever.
fn verify(region: Region, content: Content) -> Result<()> {
    let file = std::fs::File::open("/proc/self/mem")?;
    for (index, addr) in region.addresses().enumerate() {
        let mut bytes = vec![0; memory::PAGE];
        file.read_exact_at(&mut bytes, addr as u64)
            .with_context(|| format!("reading page {index}"))?;
        ensure!(
            bytes == content.page(index).bytes(),
            "page {index} does not contain {content:?}"
        );
    }
    Ok(())
}

fn protected(region: Region) -> Result<usize> {
    let entries = procfs::map_entries(own_pid(), region)?;
    Ok(entries
        .iter()
        .filter(|entry| entry.uffd_write_protected())
        .count())
}

fn missing_pages_are_left_to_the_watcher(ksm: &Ksm) -> Result<()> {
    let mut other = Child::spawn()?;
    let there = other.map_mergeable(PAGES, CONTENT)?;
    let (region, mut watcher) = map_watched(CONTENT, Watch::Missing)?;
    let (kept, dropped) = (region.part(0, PAGES / 2), region.part(PAGES / 2, PAGES / 2));
    memory::advise(dropped, libc::MADV_DONTNEED)?;
    let half = PAGES as u64 / 2;
    ksm.merge_until(Counters::merged(half, half).and_unshared(half))?;
    ksm.scan_passes(3)?;
    ensure!(
        watcher.fault()?.is_none(),
        "scanning has touched a page that is missing"
    );
    let entries = procfs::map_entries(own_pid(), dropped)?;
    ensure!(
        entries.iter().all(|entry| entry.pfn().is_none()),
        "scanning has filled in a page that is missing"
    );
    verify(kept, CONTENT)?;

    // Unmerging does not touch them either, and what is dropped after merging is the watcher's again.
    memory::advise(kept.part(0, 1), libc::MADV_DONTNEED)?;
    ksm.unmerge()?;
    ensure!(
        watcher.fault()?.is_none(),
        "unmerging has touched a page that is missing"
    );
    let pid = own_pid();
    ensure!(
        procfs::map_entries(pid, kept)?[0].pfn().is_none(),
        "unmerging has filled in a page that is missing"
    );
    verify(kept.part(1, PAGES / 2 - 1), CONTENT.from_page(1))?;
    watcher.zero(dropped)?;
    verify(dropped, Content::Zero)?;
    other.verify(there, CONTENT)
}

/// Lets a thread write to a page of this process, which the watcher may or may not hear of.
fn write_and_wait_for_fault(watcher: &mut Userfault, page: Region) -> Result<Option<Fault>> {
    let mut fault = None;
    let addr = page.addr;
    let writer = std::thread::spawn(move || {
        // SAFETY: The page is mapped, and nobody else touches it until this thread has been joined.
        unsafe { memory::write(addr, b"!") };
    });
    wait::until("the write is done or caught", PATIENCE, || {
        if fault.is_none() {
            fault = watcher.fault()?;
        }
        Ok(fault.is_some() || writer.is_finished())
    })?;
    if fault.is_some() {
        watcher.write_protect(page, false)?;
    }
    writer
        .join()
        .map_err(|_| anyhow::anyhow!("the writer panicked"))?;
    Ok(fault)
}

fn protecting_merged_pages_survives_unmerging(ksm: &Ksm) -> Result<()> {
    let mut other = Child::spawn()?;
    let there = other.map_mergeable(PAGES, CONTENT)?;
    let (region, mut watcher) = map_watched(CONTENT, Watch::WriteProtected)?;
    let pages = PAGES as u64;
    ksm.merge_until(Counters::merged(pages, pages))?;
    watcher.write_protect(region, true)?;
    ksm.scan_passes(3)?;
    ensure!(
        protected(region)? == PAGES,
        "merged pages have lost their protection"
    );
    ensure!(
        procfs::ksm_pages(own_pid(), region)? == PAGES,
        "protecting has unmerged pages"
    );

    // A write is held up, and goes to a private copy once it may go on.
    let fault = write_and_wait_for_fault(&mut watcher, region.part(0, 1))?;
    let wanted = Fault {
        addr: region.addr,
        write: true,
        protected: true,
    };
    ensure!(
        fault == Some(wanted),
        "a write to a protected merged page: {fault:?}"
    );
    other.verify(there, CONTENT)?;

    ksm.unmerge()?;
    let rest = region.part(1, PAGES - 1);
    ensure!(
        protected(rest)? == PAGES - 1,
        "unmerging has taken protection away"
    );
    verify(rest, CONTENT.from_page(1))?;
    let fault = write_and_wait_for_fault(&mut watcher, region.part(3, 1))?;
    ensure!(
        fault.is_some_and(|fault| fault.protected),
        "a write to a protected page that was merged: {fault:?}"
    );
    other.verify(there, CONTENT)
}

/// Pages of this process that are merged with those of another one, and that userfaultfd waits for the next access to.
pub struct Guarded {
    pub other: Child,
    pub there: Region,
    pub region: Region,
    pub watcher: Userfault,
}

impl Guarded {
    /// Merges them, and protects them then. `None`: the kernel has no protection from accesses of any kind.
    pub fn merge(ksm: &Ksm) -> Result<Option<Self>> {
        let Some(watcher) = Userfault::open_for_protection()? else {
            return Ok(None);
        };
        let mut other = Child::spawn()?;
        let there = other.map_mergeable(PAGES, CONTENT)?;
        let region = Mapping::pages(PAGES).map()?;
        // SAFETY: The region was just mapped.
        unsafe { memory::fill(region, CONTENT) };
        memory::advise(region, libc::MADV_MERGEABLE)?;
        ksm.merge_until(Counters::merged(PAGES as u64, PAGES as u64))?;
        watcher.watch(region, Watch::Protected)?;
        watcher.protect(region, true)?;
        Ok(Some(Self {
            other,
            there,
            region,
            watcher,
        }))
    }

    /// They are not merged any more, but protected still, which nobody but this has noticed; and contain what they did.
    pub fn expect_private(mut self) -> Result<()> {
        ensure!(
            procfs::ksm_pages(own_pid(), self.region)? == 0,
            "protected pages are still merged"
        );
        ensure!(
            self.watcher.fault()?.is_none(),
            "the watcher was told of an access that nobody made"
        );
        self.other.verify(self.there, CONTENT)?;
        expect_every_access_is_caught(&mut self.watcher, self.region, CONTENT)
    }
}

/// Lets a thread read each page of protected memory of this process: the watcher must hear of each, and the thread must see what
/// is there once it may go on.
fn expect_every_access_is_caught(
    watcher: &mut Userfault,
    region: Region,
    content: Content,
) -> Result<()> {
    for (index, addr) in region.addresses().enumerate() {
        let page = region.part(index, 1);
        // SAFETY: The page is mapped, and nobody writes to it.
        let reader = std::thread::spawn(move || unsafe { memory::checksums(page) });
        let mut fault = None;
        wait::until("the read is done or caught", PATIENCE, || {
            if fault.is_none() {
                fault = watcher.fault()?;
            }
            Ok(fault.is_some() || reader.is_finished())
        })?;
        ensure!(
            fault.is_some_and(|fault| fault.addr == addr && !fault.write),
            "a read of protected page {index}: {fault:?}"
        );
        watcher.protect(page, false)?;
        let seen = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the reader panicked"))?;
        content.from_page(index).check(&seen)?;
    }
    Ok(())
}

fn pages_that_may_not_be_read_are_unmerged_and_stay_so(ksm: &Ksm) -> Result<()> {
    let Some(guarded) = Guarded::merge(ksm)? else {
        return Ok(());
    };
    ksm.unmerge()?;
    ksm.expect(Counters::merged(0, 0))?;
    guarded.expect_private()
}

/// Marked for the watcher, and then not accessible at all: that looks like pages that it waits for, and they are not.
fn marked_pages_of_inaccessible_memory_are_unmerged(ksm: &Ksm) -> Result<()> {
    let mut other = Child::spawn()?;
    let there = other.map_mergeable(PAGES, CONTENT)?;
    let (region, watcher) = map_watched(CONTENT, Watch::WriteProtected)?;
    let pages = PAGES as u64;
    ksm.merge_until(Counters::merged(pages, pages))?;
    watcher.write_protect(region, true)?;
    memory::protect(region, libc::PROT_NONE)?;
    ksm.unmerge()?;
    ksm.expect(Counters::merged(0, 0))?;
    ensure!(
        procfs::ksm_pages(own_pid(), region)? == 0,
        "inaccessible pages are still merged"
    );
    memory::protect(region, libc::PROT_READ | libc::PROT_WRITE)?;
    ensure!(
        protected(region)? == PAGES,
        "unmerging has taken protection away"
    );
    verify(region, CONTENT)?;
    other.verify(there, CONTENT)
}

fn watched_pages_that_merge_keep_their_content(ksm: &Ksm) -> Result<()> {
    // Pages that are merged already, so that those of this process are the ones to be replaced.
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(PAGES, CONTENT)?;
    let there = other.map_mergeable(PAGES, CONTENT)?;
    let pages = PAGES as u64;
    ksm.merge_until(Counters::merged(pages, pages))?;
    let (region, mut watcher) = map_watched(CONTENT, Watch::WriteProtected)?;
    watcher.write_protect(region, true)?;
    ksm.scan_passes(5)?;
    verify(region, CONTENT)?;
    // The kernel's own KSM replaces the page table entry with one that is not protected by the watcher any more. A
    // producer that knows better, or that leaves such pages alone, is as welcome; a mixture is not.
    let left = protected(region)?;
    ensure!(
        left == 0 || left == PAGES,
        "{left} of {PAGES} pages are still protected"
    );
    ensure!(
        ksm.is_stock() || left == PAGES,
        "merging has taken the watcher's protection away"
    );
    let fault = write_and_wait_for_fault(&mut watcher, region.part(0, 1))?;
    ensure!(
        fault.is_some() == (left != 0),
        "protected pages: {left}, but a write to one: {fault:?}"
    );
    one.verify(here, CONTENT)?;
    other.verify(there, CONTENT)?;
    verify(region.part(1, PAGES - 1), CONTENT.from_page(1))
}
