//! Pages that somebody besides page tables refers to: they must not be replaced meanwhile.

use std::fs::File;
use std::fs::OpenOptions;
use std::io::IoSlice;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use io_uring::IoUring;
use io_uring::opcode;
use io_uring::types;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::ksm::Counters;
use ksm_e2e::memory;
use ksm_e2e::memory::Mapping;
use ksm_e2e::procfs;
use ksm_e2e::slow_file::SlowFile;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;
use nix::fcntl::SpliceFFlags;
use nix::fcntl::vmsplice;
use nix::unistd::pipe;

ksm_e2e::tests![
    pages_in_a_pipe_are_not_merged_until_they_are_read,
    pages_that_were_in_use_merge_though_nothing_changed,
    a_huge_page_in_use_keeps_no_others_from_merging,
    pages_being_read_into_directly_are_not_merged,
    pages_in_use_are_not_replaced_by_merged_ones,
    pages_registered_with_io_uring_are_not_merged,
    registering_merged_pages_makes_them_private,
    a_long_term_pin_of_merged_pages_sees_what_the_process_writes,
    pages_pinned_for_reading_are_not_merged,
];

const OLD: Content = Content::Distinct(1);
const NEW: Content = Content::Distinct(5000);

/// Memory of the test's own process. Helpers must be spawned before, or they inherit it.
struct Own(Region);

impl Own {
    fn mergeable(pages: usize, content: Content) -> Result<Self> {
        let own = Self(Mapping::pages(pages).map()?);
        own.fill(content);
        memory::advise(own.0, libc::MADV_MERGEABLE)?;
        Ok(own)
    }

    fn fill(&self, content: Content) {
        // SAFETY: The region was mapped by `mergeable` and stays so.
        unsafe { memory::fill(self.0, content) };
    }

    fn verify(&self, content: Content) -> Result<()> {
        // SAFETY: The region was mapped by `mergeable` and stays so.
        content
            .check(&unsafe { memory::checksums(self.0) })
            .context("the test's own memory")
    }

    fn ksm_pages(&self) -> Result<usize> {
        procfs::ksm_pages(std::process::id() as i32, self.0)
    }

    /// Puts the pages themselves, not what they contain, into a pipe.
    fn put_into(&self, pipe: &OwnedFd) -> Result<()> {
        // SAFETY: The region stays mapped, and changes only when nobody looks at the slice.
        let bytes = unsafe { std::slice::from_raw_parts(self.0.addr as *const u8, self.0.len()) };
        let spliced = vmsplice(pipe, &[IoSlice::new(bytes)], SpliceFFlags::empty())?;
        ensure!(
            spliced == bytes.len(),
            "only {spliced} bytes went into the pipe"
        );
        Ok(())
    }

    fn iovec(&self) -> libc::iovec {
        libc::iovec {
            iov_base: self.0.addr as *mut libc::c_void,
            iov_len: self.0.len(),
        }
    }
}

fn bytes_of(content: Content, pages: usize) -> Vec<u8> {
    (0..pages)
        .flat_map(|index| content.page(index).bytes())
        .collect()
}

/// Makes enough passes for anything to be merged that can be, and fails if anything was.
fn expect_no_merge(ksm: &Ksm) -> Result<()> {
    ksm.start()?;
    ksm.full_scans(5)?;
    ksm.stop()?;
    let counters = ksm.counters()?;
    ensure!(
        (counters.shared, counters.sharing) == (0, 0),
        "a page that is in use was merged: {counters}"
    );
    Ok(())
}

fn pages_in_a_pipe_are_not_merged_until_they_are_read(ksm: &Ksm) -> Result<()> {
    let mut other = Child::spawn()?;
    let own = Own::mergeable(8, OLD)?;
    let there = other.map_mergeable(8, OLD)?;
    let (reader, writer) = pipe()?;
    own.put_into(&writer)?;

    expect_no_merge(ksm)?;
    own.verify(OLD)?;
    // The pipe still refers to this process' own pages.
    own.fill(NEW);
    let mut seen = vec![0; own.0.len()];
    File::from(reader).read_exact(&mut seen)?;
    let wanted = bytes_of(NEW, 8);
    ensure!(
        seen == wanted,
        "the pipe does not contain what the process wrote to its pages"
    );
    own.fill(OLD);

    ksm.merge_until(Counters::merged(8, 8))?;
    own.verify(OLD)?;
    other.verify(there, OLD)
}

fn pages_that_were_in_use_merge_though_nothing_changed(ksm: &Ksm) -> Result<()> {
    // Whichever of the two comes first.
    for pinned_first in [false, true] {
        let mut other = Child::spawn()?;
        let (reader, writer) = pipe()?;
        let (own, there) = if pinned_first {
            let own = Own::mergeable(8, OLD)?;
            own.put_into(&writer)?;
            ksm.scan_passes(3)?;
            (own, other.map_mergeable(8, OLD)?)
        } else {
            let there = other.map_mergeable(8, OLD)?;
            ksm.scan_passes(3)?;
            let own = Own::mergeable(8, OLD)?;
            own.put_into(&writer)?;
            (own, there)
        };
        expect_no_merge(ksm)?;
        File::from(reader).read_exact(&mut vec![0; own.0.len()])?;
        ksm.merge_until(Counters::merged(8, 8))?;
        own.verify(OLD)?;
        other.verify(there, OLD)?;
        memory::munmap(own.0)?;
        ksm.unmerge()?;
    }
    Ok(())
}

fn a_huge_page_in_use_keeps_no_others_from_merging(ksm: &Ksm) -> Result<()> {
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let own = Own(Mapping::huge(1).map()?);
    own.fill(OLD);
    memory::advise(own.0, libc::MADV_MERGEABLE)?;
    let (_reader, writer) = pipe()?;
    Own(own.0.part(0, 8)).put_into(&writer)?;
    ksm.scan_passes(3)?;
    let here = one.map_mergeable(8, OLD)?;
    let there = other.map_mergeable(8, OLD)?;
    ksm.start()?;
    wait::until("the pages that can be merged are", PATIENCE, || {
        let counters = ksm.counters()?;
        Ok((counters.shared, counters.sharing) == (8, 8))
    })?;
    ensure!(
        own.ksm_pages()? == 0,
        "pages of the huge page that is in use were merged"
    );
    own.verify(OLD)?;
    one.verify(here, OLD)?;
    other.verify(there, OLD)
}

fn pages_being_read_into_directly_are_not_merged(ksm: &Ksm) -> Result<()> {
    let mut file = SlowFile::mount()?;
    let (mut one, mut other) = (Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(8, OLD)?;
    let there = other.map_mergeable(8, OLD)?;
    one.begin_read_direct(file.path(), here)?;
    let size = file.wait_for_read()?;
    ensure!(
        size == here.len(),
        "the kernel asks for {size} bytes at a time"
    );

    expect_no_merge(ksm)?;
    other.verify(there, OLD)?;
    let bytes = bytes_of(NEW, 8);
    file.answer(&bytes)?;
    let read = one.finish_read()?;
    ensure!(read == here.len() as i64, "{read} bytes were read");
    one.verify(here, NEW)
        .context("what was read has not arrived")?;
    other.verify(there, OLD)?;

    other.fill(there, NEW)?;
    ksm.merge_until(Counters::merged(8, 8))?;
    // Into merged pages: the reader gets pages of its own for that.
    one.begin_read_direct(file.path(), here)?;
    file.wait_for_read()?;
    ksm.scan_passes(3)?;
    let bytes = bytes_of(OLD, 8);
    file.answer(&bytes)?;
    one.finish_read()?;
    one.verify(here, OLD)?;
    other.verify(there, NEW)
}

fn pages_in_use_are_not_replaced_by_merged_ones(ksm: &Ksm) -> Result<()> {
    // Above, two ordinary pages could have become one; here a merged page exists that could take their place.
    let (mut one, mut other, mut reader) = (Child::spawn()?, Child::spawn()?, Child::spawn()?);
    let here = one.map_mergeable(8, OLD)?;
    let there = other.map_mergeable(8, OLD)?;
    ksm.merge_until(Counters::merged(8, 8))?;
    let mut file = SlowFile::mount()?;
    let target = reader.map_mergeable(8, OLD)?;
    reader.begin_read_direct(file.path(), target)?;
    file.wait_for_read()?;
    let own = Own::mergeable(8, OLD)?;
    let (pipe, writer) = pipe()?;
    own.put_into(&writer)?;

    ksm.scan_passes(5)?;
    let counters = ksm.counters()?;
    ensure!(
        (counters.shared, counters.sharing) == (8, 8),
        "a page that is in use was merged: {counters}"
    );
    own.fill(NEW);
    let mut seen = vec![0; own.0.len()];
    File::from(pipe).read_exact(&mut seen)?;
    ensure!(
        seen == bytes_of(NEW, 8),
        "the pipe does not contain what the process wrote to its pages"
    );
    own.fill(OLD);
    file.answer(&bytes_of(NEW, 8))?;
    reader.finish_read()?;
    reader
        .verify(target, NEW)
        .context("what was read has not arrived")?;
    reader.fill(target, OLD)?;
    ksm.merge_until(Counters::merged(8, 3 * 8))?;
    own.verify(OLD)?;
    one.verify(here, OLD)?;
    other.verify(there, OLD)
}

/// Lets the kernel write to registered memory.
fn read_fixed(ring: &mut IoUring, region: Region, content: Content) -> Result<()> {
    let path = format!("/run/ksm-e2e-fixed-{}", std::process::id());
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    std::fs::remove_file(&path)?;
    for index in 0..region.pages {
        file.write_all(&content.page(index).bytes())?;
    }
    let read = opcode::ReadFixed::new(
        types::Fd(file.as_raw_fd()),
        region.addr as *mut u8,
        region.len() as u32,
        0,
    );
    // SAFETY: The region stays mapped, and the file open, until the operation is complete.
    unsafe { ring.submission().push(&read.build()) }?;
    ring.submit_and_wait(1)?;
    let result = ring.completion().next().context("no completion")?.result();
    ensure!(
        result == region.len() as i32,
        "reading into registered memory: {result}"
    );
    Ok(())
}

fn pages_registered_with_io_uring_are_not_merged(ksm: &Ksm) -> Result<()> {
    let mut other = Child::spawn()?;
    let own = Own::mergeable(8, OLD)?;
    let there = other.map_mergeable(8, OLD)?;
    let mut ring = IoUring::new(4).context("this test needs io_uring")?;
    // SAFETY: The region stays mapped for longer than the ring lives.
    unsafe { ring.submitter().register_buffers(&[own.iovec()]) }?;

    expect_no_merge(ksm)?;
    own.verify(OLD)?;
    read_fixed(&mut ring, own.0, NEW)?;
    own.verify(NEW)
        .context("the kernel wrote to pages that are not the process' any more")?;
    other.verify(there, OLD)?;
    own.fill(OLD);
    expect_no_merge(ksm)?;

    ring.submitter().unregister_buffers()?;
    drop(ring);
    ksm.merge_until(Counters::merged(8, 8))?;
    own.verify(OLD)?;
    other.verify(there, OLD)
}

fn registering_merged_pages_makes_them_private(ksm: &Ksm) -> Result<()> {
    let mut other = Child::spawn()?;
    let own = Own::mergeable(8, OLD)?;
    let there = other.map_mergeable(8, OLD)?;
    ksm.merge_until(Counters::merged(8, 8))?;
    let mut ring = IoUring::new(4).context("this test needs io_uring")?;
    // SAFETY: The region stays mapped for longer than the ring lives.
    unsafe { ring.submitter().register_buffers(&[own.iovec()]) }?;
    ensure!(own.ksm_pages()? == 0, "registered pages are still shared");
    ksm.scan_passes(4)?;
    ensure!(own.ksm_pages()? == 0, "registered pages were merged");
    read_fixed(&mut ring, own.0, NEW)?;
    own.verify(NEW)?;
    other.verify(there, OLD)
}

#[repr(C)]
struct LongTerm {
    addr: u64,
    size: u64,
    flags: u32,
}

nix::ioctl_write_ptr!(pin_long_term, b'g', 7, LongTerm);
nix::ioctl_none!(unpin, b'g', 8);
nix::ioctl_write_ptr!(read_pinned, b'g', 9, u64);

/// Pages pinned for reading for a long time by the kernel's own test device, until this is dropped.
struct Pinned {
    device: File,
    len: usize,
}

impl Pinned {
    fn for_reading(region: Region) -> Result<Self> {
        let device = OpenOptions::new()
            .read(true)
            .open("/sys/kernel/debug/gup_test")
            .context("this test needs a kernel with GUP_TEST and debugfs mounted")?;
        let pins = LongTerm {
            addr: region.addr as u64,
            size: region.len() as u64,
            flags: 0,
        };
        // SAFETY: The structure is what the call expects.
        unsafe { pin_long_term(device.as_raw_fd(), &pins) }.context("pinning")?;
        Ok(Self {
            device,
            len: region.len(),
        })
    }

    /// What the pinned pages contain.
    fn read(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.len];
        let to = bytes.as_mut_ptr() as u64;
        // SAFETY: The buffer is as large as the pinned memory.
        unsafe { read_pinned(self.device.as_raw_fd(), &to) }.context("reading pinned pages")?;
        Ok(bytes)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: The call has no argument.
        let _ = unsafe { unpin(self.device.as_raw_fd()) };
    }
}

fn a_long_term_pin_of_merged_pages_sees_what_the_process_writes(ksm: &Ksm) -> Result<()> {
    let mut other = Child::spawn()?;
    let own = Own::mergeable(8, OLD)?;
    let there = other.map_mergeable(8, OLD)?;
    ksm.merge_until(Counters::merged(8, 8))?;
    let pinned = Pinned::for_reading(own.0)?;
    ksm.scan_passes(4)?;
    ensure!(own.ksm_pages()? == 0, "pinned pages are shared");
    own.fill(NEW);
    let wanted = bytes_of(NEW, 8);
    ensure!(
        pinned.read()? == wanted,
        "the pinned pages are not the process' any more"
    );
    other.verify(there, OLD)?;
    drop(pinned);
    own.fill(OLD);
    ksm.merge_until(Counters::merged(8, 8))
}

fn pages_pinned_for_reading_are_not_merged(ksm: &Ksm) -> Result<()> {
    let mut other = Child::spawn()?;
    let own = Own::mergeable(8, OLD)?;
    let there = other.map_mergeable(8, OLD)?;
    let pinned = Pinned::for_reading(own.0)?;
    expect_no_merge(ksm)?;
    own.fill(NEW);
    let wanted = bytes_of(NEW, 8);
    ensure!(
        pinned.read()? == wanted,
        "the pinned pages are not the process' any more"
    );
    own.fill(OLD);
    drop(pinned);
    ksm.merge_until(Counters::merged(8, 8))?;
    own.verify(OLD)?;
    other.verify(there, OLD)
}
