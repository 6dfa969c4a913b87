//! Memory that somebody besides page tables reads and writes while it is being merged: the disk, io_uring, a pipe,
//! another process, a debugger, a guest.

mod disk;
mod kvm;

use std::fs::File;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::io::IoSlice;
use std::io::IoSliceMut;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use io_uring::IoUring;
use io_uring::opcode;
use io_uring::types;
use ksm_e2e::Region;
use ksm_e2e::memory;
use ksm_e2e::memory::PAGE;
use ksm_e2e::memory::Pattern;
use nix::fcntl::SpliceFFlags;
use nix::fcntl::vmsplice;
use nix::sys::ptrace;
use nix::sys::uio::RemoteIoVec;
use nix::sys::uio::process_vm_readv;
use nix::sys::uio::process_vm_writev;
use nix::sys::wait::WaitStatus;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use nix::unistd::pipe;

use crate::actor::Actor;
use crate::actor::Kid;
use crate::actor::Stage;
use crate::ledger::Ledger;

use disk::Disk;

/// Room in a pipe, in pages.
const PIPE: usize = 16;

/// Requests under way at a time.
const REQUESTS: usize = 16;

pub fn actors() -> Vec<Actor> {
    let actor = |name, step| Actor {
        name,
        group: "pins",
        step,
    };
    let mut actors = vec![
        actor("direct-io", direct_io),
        actor("io-uring", registered),
        actor("vmsplice", pages_in_a_pipe),
        actor("vm-readv", other_process),
        actor("ptrace", debugger),
    ];
    if kvm::available() {
        actors.push(actor("kvm", kvm::guest));
    }
    actors
}

/// The bytes of a region of this process, as the kernel takes them. Nobody may write there while the slice is in use.
fn slice(region: Region) -> &'static [u8] {
    // SAFETY: Actors pass regions that are mapped until their step ends, and do not write meanwhile.
    unsafe { std::slice::from_raw_parts(region.addr as *const u8, region.len()) }
}

/// Reads from a disk into merged pages, with the processor's own writes beside it, and writes merged pages to it.
fn direct_io(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(REQUESTS..150);
    let disk = Disk::new(pages)?;
    let region = stage.mergeable(pages)?;
    stage.let_merge(region)?;
    stage.doing("writing merged pages to a disk");
    disk.file.write_all_at(slice(region), 0)?;
    stage.ledger.check_bytes(region, &disk.content()?)?;
    let on_disk = stage.ledger.copy()?;

    let mut ring = IoUring::new(REQUESTS as u32).context("io_uring")?;
    for _ in 0..stage.rng.usize(1..6) {
        stage.paint_some(region, 50)?;
        stage.let_merge(region)?;
        stage.doing("reading from a disk into merged pages");
        // Each page at most once: two reads into one page would race.
        let mut order: Vec<usize> = (0..pages).collect();
        stage.rng.shuffle(&mut order);
        let (reads, rest) = order.split_at(REQUESTS);
        let mut under_way = Vec::new();
        for (number, &index) in reads.iter().enumerate() {
            let from = stage.rng.usize(..pages);
            let page = region.part(index, 1);
            let read = opcode::Read::new(
                types::Fd(disk.file.as_raw_fd()),
                page.addr as *mut u8,
                PAGE as u32,
            );
            let read = read.offset((from * PAGE) as u64).build();
            let read = read.user_data(number as u64);
            // SAFETY: The page is mapped until the step ends, when nothing is under way any more, and nobody looks
            // at it until then.
            unsafe { ring.submission().push(&read) }.context("a full queue")?;
            under_way.push((page, on_disk.pattern(region.page(from))?));
        }
        ring.submit()?;
        let kid = if stage.rng.bool() {
            // What is being read is copied for the child, or is its parent's and nobody else's.
            let rest = rest.to_vec();
            Some(stage.fork(|stage| {
                for index in rest {
                    let page = region.part(index, 1);
                    stage.check(page)?;
                    let pattern = stage.content();
                    stage.ledger.write(page, pattern)?;
                    stage.check(page)?;
                }
                Ok(())
            })?)
        } else {
            None
        };
        for &index in rest {
            let page = region.part(index, 1);
            stage.check(page)?;
            if stage.rng.u32(..4) == 0 {
                let pattern = stage.content();
                stage.ledger.write(page, pattern)?;
            }
        }
        complete(stage, &mut ring, REQUESTS)?;
        for (page, pattern) in under_way {
            stage.ledger.note(page, pattern)?;
        }
        stage.check(region)?;
        if let Some(kid) = kid {
            kid.join()?;
        }
    }
    drop(ring);
    stage.let_merge(region)?;
    stage.check(region)
}

/// Waits for so many requests, each of a page.
fn complete(stage: &Stage, ring: &mut IoUring, count: usize) -> Result<()> {
    stage.doing("waiting for io_uring");
    for _ in 0..count {
        let done = loop {
            if let Some(done) = ring.completion().next() {
                break done;
            }
            match ring.submit_and_wait(1) {
                Ok(_) => {}
                // Everybody may have been frozen and thawed.
                Err(error) if error.kind() == ErrorKind::Interrupted => stage.beat(),
                Err(error) => return Err(error).context("waiting for io_uring"),
            }
        };
        ensure!(
            done.result() == PAGE as i32,
            "request {} ended with {}",
            done.user_data(),
            done.result()
        );
    }
    Ok(())
}

/// Pages registered with io_uring are read and written through the pins, which must be the process' own pages all the
/// time.
fn registered(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(REQUESTS..60);
    let disk = Disk::new(pages)?;
    let region = stage.mergeable(pages)?;
    let mut ring = IoUring::new(REQUESTS as u32).context("io_uring")?;
    for _ in 0..stage.rng.usize(1..4) {
        stage.let_merge(region)?;
        stage.doing("registering buffers");
        let buffer = libc::iovec {
            iov_base: region.addr as *mut libc::c_void,
            iov_len: region.len(),
        };
        // SAFETY: The region is mapped until the step ends, and unregistered before.
        unsafe { ring.submitter().register_buffers(&[buffer]) }?;
        stage.check(region)?;
        for _ in 0..stage.rng.usize(1..4) {
            // Common contents again: they would be merged if they might.
            stage.paint_some(region, 50)?;
            if stage.rng.u32(..3) == 0 {
                let kid = stage.fork(|stage| {
                    stage.check_all()?;
                    stage.paint_some(region, 50)?;
                    stage.check_all()
                })?;
                stage.paint_some(region, 20)?;
                stage.check(region)?;
                kid.join()?;
            }
            stage.dally(100);
            let first = stage.rng.usize(..=pages - REQUESTS);
            let part = region.part(first, REQUESTS);
            let fd = types::Fd(disk.file.as_raw_fd());
            let requests = part.addresses().map(|addr| {
                let offset = (addr - region.addr) as u64;
                opcode::WriteFixed::new(fd, addr as *const u8, PAGE as u32, 0)
                    .offset(offset)
                    .build()
            });
            submit(&mut ring, requests)?;
            complete(stage, &mut ring, REQUESTS)?;
            let content = disk.content()?;
            stage
                .ledger
                .check_bytes(part, &content[first * PAGE..][..part.len()])
                .context("written from registered pages")?;

            // Back into other pages than they came from.
            let to = region.part(stage.rng.usize(..=pages - REQUESTS), REQUESTS);
            let requests = to.addresses().zip(part.addresses()).map(|(addr, from)| {
                let offset = (from - region.addr) as u64;
                opcode::ReadFixed::new(fd, addr as *mut u8, PAGE as u32, 0)
                    .offset(offset)
                    .build()
            });
            submit(&mut ring, requests)?;
            complete(stage, &mut ring, REQUESTS)?;
            let patterns: Result<Vec<Pattern>> = part
                .addresses()
                .map(|addr| stage.ledger.pattern(addr))
                .collect();
            for (addr, pattern) in to.addresses().zip(patterns?) {
                stage.ledger.note(Region { addr, pages: 1 }, pattern)?;
            }
            stage.check(region)?;
        }
        stage.doing("unregistering buffers");
        ring.submitter().unregister_buffers()?;
        stage.check(region)?;
    }
    stage.let_merge(region)?;
    stage.check(region)
}

/// Submits requests on pages that stay mapped until they are complete.
fn submit(
    ring: &mut IoUring,
    requests: impl Iterator<Item = io_uring::squeue::Entry>,
) -> Result<()> {
    for request in requests {
        // SAFETY: As the callers promise.
        unsafe { ring.submission().push(&request) }.context("a full queue")?;
    }
    ring.submit()?;
    Ok(())
}

/// Pages in a pipe: what comes out is what was there, or what was written meanwhile, each page as a whole.
fn pages_in_a_pipe(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(PIPE..100);
    let region = stage.mergeable(pages)?;
    for _ in 0..stage.rng.usize(2..12) {
        if stage.rng.u32(..3) > 0 {
            stage.let_merge(region)?;
        }
        let first = stage.rng.usize(..=pages - PIPE);
        let held = region.part(first, PIPE);
        let (reader, writer) = pipe()?;
        stage.doing("vmsplice");
        let spliced = vmsplice(&writer, &[IoSlice::new(slice(held))], SpliceFFlags::empty())?;
        ensure!(spliced == held.len(), "only {spliced} bytes were spliced");
        let old = stage.ledger.copy()?;
        let write = stage.rng.bool();
        if write {
            stage.paint_some(region, 40)?;
        }
        if stage.rng.u32(..4) == 0 {
            stage
                .fork(|stage| {
                    stage.paint_some(region, 40)?;
                    stage.check(region)
                })?
                .join()?;
        }
        stage.dally(200);
        stage.check(region)?;
        let mut seen = vec![0; held.len()];
        File::from(reader).read_exact(&mut seen)?;
        for (addr, seen) in held.addresses().zip(seen.chunks(PAGE)) {
            let page = Region { addr, pages: 1 };
            let unchanged = old.check_bytes(page, seen);
            if unchanged.is_err() && write {
                stage.ledger.check_bytes(page, seen)
            } else {
                unchanged
            }
            .context("out of the pipe")?;
        }
        drop(writer);
    }
    stage.check(region)
}

/// A forked process that does nothing to the region, and in the end looks whether it is what is noted in the ledger,
/// which is shared with it.
fn sitter(
    stage: &mut Stage,
    region: Region,
    theirs: &Ledger,
    protect: bool,
) -> Result<(Kid, File)> {
    let (reader, writer) = pipe()?;
    let writer = File::from(writer);
    let kid = stage.fork(|_| {
        // The end that the parent keeps, to say when it is over.
        // SAFETY: In this process nobody uses the descriptor, which its owner will not close before the process ends.
        unsafe { libc::close(writer.as_raw_fd()) };
        if protect {
            memory::protect(region, libc::PROT_READ)?;
        }
        File::from(reader).read_to_end(&mut Vec::new())?;
        theirs.check(region)
    })?;
    Ok((kid, writer))
}

fn remote(region: Region) -> [RemoteIoVec; 1] {
    [RemoteIoVec {
        base: region.addr,
        len: region.len(),
    }]
}

/// Fails unless a region of another process is as noted.
fn check_theirs(stage: &Stage, pid: i32, region: Region, theirs: &Ledger) -> Result<()> {
    stage.beat();
    let mut seen = vec![0; region.len()];
    let read = process_vm_readv(
        Pid::from_raw(pid),
        &mut [IoSliceMut::new(&mut seen)],
        &remote(region),
    )
    .context("process_vm_readv")?;
    ensure!(read == region.len(), "only {read} bytes were read");
    theirs
        .check_bytes(region, &seen)
        .context("the other process")
}

/// Reads and writes what another process has merged with this one's.
fn other_process(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(20..150);
    let region = stage.mergeable(pages)?;
    stage.let_merge(region)?;
    let mut theirs = stage.ledger.copy()?;
    let (kid, writer) = sitter(stage, region, &theirs, false)?;
    for _ in 0..stage.rng.usize(2..8) {
        stage.let_merge(region)?;
        stage.doing("process_vm_readv and process_vm_writev");
        check_theirs(stage, kid.pid(), region, &theirs)?;
        for addr in region.addresses() {
            if stage.rng.u32(..4) == 0 {
                let page = Region { addr, pages: 1 };
                let pattern = stage.content();
                let bytes = pattern.page().bytes();
                let written = process_vm_writev(
                    Pid::from_raw(kid.pid()),
                    &[IoSlice::new(&bytes)],
                    &remote(page),
                )
                .context("process_vm_writev")?;
                ensure!(written == PAGE, "only {written} bytes were written");
                theirs.note(page, pattern)?;
            }
        }
        stage.paint_some(region, 10)?;
        stage.check(region)?;
        check_theirs(stage, kid.pid(), region, &theirs)?;
    }
    drop(writer);
    stage.doing("waiting for the other process");
    kid.join()?;
    stage.check(region)
}

/// A debugger writes to another process' merged pages, which that one may not write to itself.
fn debugger(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(20..100);
    let region = stage.mergeable(pages)?;
    stage.let_merge(region)?;
    let mut theirs = stage.ledger.copy()?;
    let protect = stage.rng.bool();
    let (kid, writer) = sitter(stage, region, &theirs, protect)?;
    let pid = Pid::from_raw(kid.pid());
    for _ in 0..stage.rng.usize(1..6) {
        stage.let_merge(region)?;
        stage.doing("stopping the other process");
        ptrace::seize(pid, ptrace::Options::empty()).context("PTRACE_SEIZE")?;
        ptrace::interrupt(pid).context("PTRACE_INTERRUPT")?;
        let status = waitpid(pid, None)?;
        ensure!(
            matches!(status, WaitStatus::PtraceEvent(..)),
            "the process did not stop: {status:?}"
        );
        stage.doing("poking");
        for addr in region.addresses() {
            // One byte of it; two changes of one page are not what a pattern says.
            let seed = match theirs.pattern(addr)? {
                Pattern::Zero => None,
                Pattern::Seed(seed) => Some(seed),
                Pattern::Near { .. } => continue,
            };
            if stage.rng.u32(..3) > 0 {
                continue;
            }
            let word = stage.rng.usize(..PAGE / 8) * 8;
            let at = (addr + word) as ptrace::AddressType;
            let flip = stage.rng.u8(1..);
            let old = ptrace::read(pid, at).context("PTRACE_PEEKDATA")?;
            ptrace::write(pid, at, old ^ i64::from(flip)).context("PTRACE_POKEDATA")?;
            let pattern = Pattern::Near {
                seed,
                offset: word,
                flip,
            };
            theirs.note(Region { addr, pages: 1 }, pattern)?;
        }
        stage.doing("writing to the process' memory file");
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))?;
        for addr in region.addresses() {
            if stage.rng.u32(..6) == 0 {
                let pattern = stage.content();
                memory.write_all_at(&pattern.page().bytes(), addr as u64)?;
                theirs.note(Region { addr, pages: 1 }, pattern)?;
            }
        }
        check_theirs(stage, kid.pid(), region, &theirs)?;
        ptrace::detach(pid, None).context("PTRACE_DETACH")?;
        stage.check(region)?;
    }
    drop(writer);
    stage.doing("waiting for the other process");
    kid.join()?;
    stage.check(region)
}
