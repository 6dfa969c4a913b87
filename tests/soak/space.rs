//! Address spaces that change under the scanner: mapping, unmapping, moving, protecting, every advice, the break, the
//! stack, merging of whole processes, write protection by userfaultfd.

use std::hint::black_box;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::anyhow;
use anyhow::bail;
use anyhow::ensure;
use ksm_e2e::Region;
use ksm_e2e::memory;
use ksm_e2e::memory::HUGE;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::PAGE;
use ksm_e2e::memory::PAGES_PER_HUGE;
use ksm_e2e::memory::Pattern;
use ksm_e2e::procfs;
use ksm_e2e::swap;
use ksm_e2e::userfault::Userfault;
use ksm_e2e::userfault::Watch;
use nix::errno::Errno;
use nix::unistd::getpid;

use crate::actor::Actor;
use crate::actor::Stage;
use crate::control::reload::stock_turns;
use crate::process::merge_everything;

/// Bytes of stack in use at each depth of [`descend`], a little more than the pages that it fills.
const FRAME: usize = 18 * PAGE;

/// Deepest that a stack grows, well below its usual limit of 8 MiB.
const DEPTH: usize = 64;

pub fn actors() -> Vec<Actor> {
    let actor = |name, step| Actor {
        name,
        group: "space",
        step,
    };
    vec![
        actor("mmap", mmap),
        actor("mremap", mremap),
        actor("mprotect", mprotect),
        actor("madvise", madvise),
        actor("huge", huge),
        actor("brk", brk),
        actor("stack", stack),
        actor("prctl", prctl),
        actor("userfault", userfault),
    ]
}

/// A part of a region, of at least a page.
fn part(stage: &mut Stage, region: Region) -> Region {
    let first = stage.rng.usize(..region.pages);
    let pages = stage.rng.usize(1..=region.pages - first);
    region.part(first, pages)
}

/// Maps anew in the place of what is there, if anything; the memory is empty.
fn map_at(region: Region) -> Result<()> {
    // SAFETY: Regions are an actor's own, and touched through raw pointers only.
    let mapped = unsafe {
        libc::mmap(
            region.addr as *mut libc::c_void,
            region.len(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    if mapped == libc::MAP_FAILED {
        bail!("mmap at {:#x}: {}", region.addr, Errno::last());
    }
    Ok(())
}

/// Fails if any page of a region is a KSM page, which nobody can bring in any more. From swap space a page comes back
/// as it went.
fn expect_unmerged(region: Region) -> Result<()> {
    if !swap::in_use()?.is_empty() {
        return Ok(());
    }
    let left = procfs::ksm_pages(getpid().as_raw(), region)?;
    ensure!(
        left == 0,
        "{left} pages are merged after they were unmerged"
    );
    Ok(())
}

/// Unmaps parts, and maps others in their place.
fn mmap(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(30..300);
    let whole = stage.mergeable(pages)?;
    for _ in 0..stage.rng.usize(2..15) {
        if stage.rng.bool() {
            stage.let_merge(whole)?;
        }
        stage.dally(20);
        let part = part(stage, whole);
        stage.doing("munmap of a part");
        if stage.rng.bool() {
            memory::munmap(part)?;
        }
        stage.doing("mmap in its place");
        map_at(part)?;
        stage.ledger.note(part, Pattern::Zero)?;
        memory::advise(part, libc::MADV_NOHUGEPAGE)?;
        if stage.rng.u32(..4) > 0 {
            memory::advise(part, libc::MADV_MERGEABLE)?;
        }
        if stage.rng.bool() {
            stage.paint_some(part, 70)?;
        }
        stage.check(whole)?;
    }
    stage.let_merge(whole)?;
    let hole = part(stage, whole);
    stage.check(whole)?;
    stage.ledger.forget(hole);
    memory::munmap(hole)?;
    stage.check_all()?;
    // So that nobody else's memory is there when it is.
    map_at(hole)
}

/// Moves, grows and shrinks merged memory, and moves its pages away from under it.
fn mremap(stage: &mut Stage) -> Result<()> {
    // Both halves of this are reserved, so that nothing of the allocator's comes to lie there.
    let room = 600;
    let place = stage.map(Mapping::pages(room))?;
    let mut at = 0;
    let mut pages = stage.rng.usize(20..150);
    let half = room / 2;
    let mut now = place.part(0, pages);
    stage.paint(now)?;
    memory::advise(now, libc::MADV_MERGEABLE)?;
    for _ in 0..stage.rng.usize(2..12) {
        if stage.rng.u32(..3) > 0 {
            stage.let_merge(now)?;
        }
        stage.dally(20);
        let to = place.part((1 - at) * half, half).addr;
        match stage.rng.u32(..4) {
            0 => {
                stage.doing("mremap, moving");
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                let moved = memory::remap(now, pages, flags, to)?;
                stage.ledger.note_moved(now, to)?;
                // What is left is a hole, into which somebody else might map.
                map_at(now)?;
                now = moved;
                at = 1 - at;
            }
            1 => {
                stage.doing("mremap, growing or shrinking as it moves");
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                let wanted = stage.rng.usize(1..half);
                let moved = memory::remap(now, wanted, flags, to)?;
                let kept = wanted.min(pages);
                stage.ledger.note_moved(now.part(0, kept), to)?;
                stage.ledger.forget(now);
                map_at(now)?;
                if wanted > kept {
                    let new = moved.part(kept, wanted - kept);
                    stage.ledger.note(new, Pattern::Zero)?;
                    stage.check(moved)?;
                    stage.paint_some(new, 50)?;
                }
                now = moved;
                pages = wanted;
                at = 1 - at;
            }
            2 => {
                stage.doing("mremap with DONTUNMAP");
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
                let moved = memory::remap(now, pages, flags, to)?;
                stage.ledger.note_moved(now, to)?;
                // The old area is empty and still mergeable.
                stage.ledger.note(now, Pattern::Zero)?;
                stage.check(now)?;
                stage.paint_some(now, 30)?;
                stage.let_merge(now)?;
                stage.check(now)?;
                stage.ledger.forget(now);
                map_at(now)?;
                now = moved;
                at = 1 - at;
            }
            _ => {
                stage.doing("mremap of a part onto another");
                let count = stage.rng.usize(1..=pages / 2 + 1).min(pages);
                let from = now.part(pages - count, count);
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                memory::remap(from, count, flags, to)?;
                stage.ledger.note_moved(from, to)?;
                let away = Region {
                    addr: to,
                    pages: count,
                };
                stage.check(away)?;
                // And back.
                memory::remap(away, count, flags, from.addr)?;
                stage.ledger.note_moved(away, from.addr)?;
                map_at(away)?;
            }
        }
        memory::advise(now, libc::MADV_NOHUGEPAGE)?;
        memory::advise(now, libc::MADV_MERGEABLE)?;
        stage.check(now)?;
        stage.paint_some(now, 15)?;
    }
    stage.check_all()
}

/// Protection that comes and goes, in parts, while pages are write-protected and replaced.
fn mprotect(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(30..300);
    let whole = stage.mergeable(pages)?;
    let all = libc::PROT_READ | libc::PROT_WRITE;
    for _ in 0..stage.rng.usize(4..40) {
        if stage.rng.u32(..4) == 0 {
            stage.let_merge(whole)?;
        }
        let part = part(stage, whole);
        stage.doing("mprotect");
        if stage.rng.bool() {
            memory::protect(part, libc::PROT_READ)?;
            stage.dally(10);
            stage.check(part)?;
        } else {
            memory::protect(part, libc::PROT_NONE)?;
            stage.dally(10);
        }
        memory::protect(part, all)?;
        stage.paint_some(part, 20)?;
        stage.check(whole)?;
    }
    Ok(())
}

/// Every advice that changes what becomes of memory, in any order.
fn madvise(stage: &mut Stage) -> Result<()> {
    const FEW: [(i32, &str); 12] = [
        (libc::MADV_MERGEABLE, "MADV_MERGEABLE"),
        (libc::MADV_MERGEABLE, "MADV_MERGEABLE"),
        (libc::MADV_UNMERGEABLE, "MADV_UNMERGEABLE"),
        (libc::MADV_DONTNEED, "MADV_DONTNEED"),
        (libc::MADV_FREE, "MADV_FREE"),
        (libc::MADV_PAGEOUT, "MADV_PAGEOUT"),
        (libc::MADV_COLD, "MADV_COLD"),
        (libc::MADV_HUGEPAGE, "MADV_HUGEPAGE"),
        (libc::MADV_NOHUGEPAGE, "MADV_NOHUGEPAGE"),
        (libc::MADV_COLLAPSE, "MADV_COLLAPSE"),
        (libc::MADV_POPULATE_WRITE, "MADV_POPULATE_WRITE"),
        (libc::MADV_WILLNEED, "MADV_WILLNEED"),
    ];
    let pages = stage.rng.usize(30..300);
    let whole = stage.mergeable(pages)?;
    for _ in 0..stage.rng.usize(4..40) {
        if stage.rng.u32(..3) == 0 {
            stage.let_merge(whole)?;
        }
        stage.dally(10);
        let part = part(stage, whole);
        let (advice, name) = FEW[stage.rng.usize(..FEW.len())];
        stage.doing(name);
        advise(stage, part, advice).context(name)?;
        if stage.rng.bool() {
            stage.check(whole)?;
        }
        if stage.rng.bool() {
            stage.paint_some(part, 25)?;
        }
        stage.check(whole)?;
    }
    Ok(())
}

/// Gives the advice, notes what it does to contents, and expects what it promises.
fn advise(stage: &mut Stage, part: Region, advice: i32) -> Result<()> {
    match memory::advise(part, advice) {
        Ok(()) => {}
        // No huge page at hand, none aligned, or a page was in somebody's hands.
        Err(Errno::EINVAL | Errno::ENOMEM | Errno::EAGAIN | Errno::EBUSY)
            if advice == libc::MADV_COLLAPSE => {}
        Err(errno) => return Err(errno.into()),
    }
    match advice {
        libc::MADV_DONTNEED => stage.ledger.note(part, Pattern::Zero)?,
        libc::MADV_FREE => stage.ledger.note_maybe_zero(part),
        libc::MADV_UNMERGEABLE => expect_unmerged(part)?,
        _ => {}
    }
    Ok(())
}

/// Huge pages that are split by merging, collapsed again over merged pages, and moved in halves.
fn huge(stage: &mut Stage) -> Result<()> {
    let count = stage.rng.usize(1..=2);
    let region = stage.map(Mapping::huge(count))?;
    // One content for most of it: hundreds of mappings of one page, and of the zero page.
    let most = stage.common();
    stage.ledger.write(region, most)?;
    stage.paint_some(region, 20)?;
    memory::advise(region, libc::MADV_MERGEABLE)?;
    for _ in 0..stage.rng.usize(1..6) {
        stage.doing("merging huge pages");
        stage.let_merge(region)?;
        stage.check_all()?;
        match stage.rng.u32(..5) {
            0..3 => {
                stage.doing("collapsing merged pages");
                advise(stage, region, libc::MADV_COLLAPSE)?;
            }
            3 => {
                stage.doing("dropping every other page");
                for index in (0..region.pages).step_by(2) {
                    let page = region.part(index, 1);
                    advise(stage, page, libc::MADV_DONTNEED)?;
                }
            }
            _ => {
                stage.doing("advising half of a huge page");
                let half = region.part(0, PAGES_PER_HUGE / 2);
                advise(stage, half, libc::MADV_UNMERGEABLE)?;
                stage.check(half)?;
                memory::advise(half, libc::MADV_MERGEABLE)?;
            }
        }
        stage.check_all()?;
        stage.paint_some(region, 10)?;
    }
    let pages = Region {
        addr: region.addr.next_multiple_of(HUGE),
        pages: PAGES_PER_HUGE,
    };
    stage.check(pages)
}

/// Moves the break of this process, whose allocator does so as well, and returns where it was.
fn move_break(by: isize) -> Result<usize, Errno> {
    // SAFETY: The caller gives back only what it took, while the break is where it left it.
    let old = unsafe { libc::sbrk(by) };
    if old as isize == -1 {
        return Err(Errno::last());
    }
    Ok(old as usize)
}

/// Merged memory between the allocator's own, taken and given back.
fn brk(stage: &mut Stage) -> Result<()> {
    // What the allocator has to go round stays behind in a child.
    let kid = stage.fork(|stage| {
        if stage.rng.bool() {
            merge_everything(true)?;
        }
        for _ in 0..stage.rng.usize(2..10) {
            stage.doing("raising the break");
            let pages = stage.rng.usize(10..100);
            let start = move_break(((pages + 1) * PAGE) as isize)?;
            let region = Region {
                addr: start.next_multiple_of(PAGE),
                pages,
            };
            let end = start + (pages + 1) * PAGE;
            stage.ledger.note(region, Pattern::Zero)?;
            stage.check(region)?;
            memory::advise(region, libc::MADV_MERGEABLE)?;
            stage.paint(region)?;
            stage.let_merge(region)?;
            stage.check(region)?;
            stage.paint_some(region, 20)?;
            stage.dally(20);
            stage.check_all()?;
            stage.doing("lowering the break");
            if stage.rng.u32(..4) > 0 && move_break(0)? == end {
                stage.ledger.forget(region);
                move_break(-(((pages + 1) * PAGE) as isize))?;
            }
        }
        stage.check_all()
    })?;
    kid.join()
}

/// A deep stack all of which may be merged, return addresses and all.
fn stack(stage: &mut Stage) -> Result<()> {
    let depth = stage.rng.usize(4..DEPTH);
    let kid = stage.fork(|stage| {
        merge_everything(true)?;
        for _ in 0..stage.rng.usize(1..4) {
            stage.doing("descending");
            descend(stage, depth)?;
            if stage.rng.u32(..3) == 0 {
                // A child has such a stack from the beginning.
                stage.fork(|stage| descend(stage, depth))?.join()?;
            }
        }
        Ok(())
    })?;
    kid.join()
}

#[inline(never)]
fn descend(stage: &mut Stage, depth: usize) -> Result<()> {
    let mut room = [0_u8; FRAME];
    let start = black_box(&raw mut room) as usize;
    let region = Region {
        addr: start.next_multiple_of(PAGE),
        pages: FRAME / PAGE - 1,
    };
    stage.paint(region)?;
    if depth > 0 {
        descend(stage, depth - 1)?;
    } else {
        let here = Region {
            addr: region.addr,
            pages: region.pages * 4,
        };
        stage.doing("merging the stack");
        stage.let_merge(here)?;
    }
    if stage.rng.u32(..8) == 0 {
        stage.paint_some(region, 30)?;
        stage.let_merge(region)?;
    }
    stage.check(region)?;
    stage.ledger.forget(region);
    black_box(&raw const room);
    Ok(())
}

/// Whole processes that are mergeable, and not any more, and again.
fn prctl(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(20..200);
    let kid = stage.fork(|stage| {
        let region = stage.map(Mapping::pages(pages))?;
        stage.paint(region)?;
        for _ in 0..stage.rng.usize(2..8) {
            stage.doing("PR_SET_MEMORY_MERGE on");
            merge_everything(true)?;
            // Memory that is mapped now is mergeable from the beginning.
            let more = stage.map(Mapping::pages(pages))?;
            stage.paint(more)?;
            stage.let_merge(region)?;
            stage.let_merge(more)?;
            stage.check_all()?;
            let kid = if stage.rng.u32(..3) == 0 {
                let kid = stage.fork(|stage| {
                    stage.paint_some(region, 20)?;
                    stage.let_merge(region)?;
                    stage.check_all()?;
                    merge_everything(false)?;
                    expect_unmerged(region)?;
                    stage.check_all()
                })?;
                Some(kid)
            } else {
                None
            };
            stage.paint_some(region, 20)?;
            stage.dally(30);
            stage.doing("PR_SET_MEMORY_MERGE off");
            merge_everything(false)?;
            expect_unmerged(region)?;
            expect_unmerged(more)?;
            stage.check_all()?;
            if let Some(kid) = kid {
                kid.join()?;
            }
            stage.forget(more);
            memory::munmap(more)?;
        }
        stage.check_all()
    })?;
    kid.join()
}

/// A thread writes to merged pages that were write-protected, and waits for somebody to let it.
fn userfault(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(20..150);
    let region = stage.mergeable(pages)?;
    let mut uffd = Userfault::open()?;
    if stage.rng.bool() {
        stage.let_merge(region)?;
    }
    stage.doing("UFFDIO_REGISTER");
    uffd.watch(region, Watch::WriteProtected)?;
    for _ in 0..stage.rng.usize(1..6) {
        stage.let_merge(region)?;
        stage.check(region)?;
        stage.doing("UFFDIO_WRITEPROTECT");
        let turns = stock_turns()?;
        let guarded = part(stage, region);
        uffd.write_protect(guarded, true)?;
        stage.check(region)?;
        // Protected pages may be merged or not: the writes must be heard of in either case.
        stage.let_merge(region)?;
        let mut work = Vec::new();
        let mut heard_of = 0;
        for addr in region.addresses() {
            if stage.rng.u32(..4) == 0 {
                work.push((addr, stage.content()));
                heard_of += usize::from(guarded.addresses().any(|page| page == addr));
            }
        }
        stage.doing("writing to pages that userfaultfd protects");
        let writes = work.clone();
        // SAFETY: The region is mapped until the step ends, and the thread has ended by then, or the process has.
        let writer = thread::spawn(move || unsafe { memory::paint(&writes) });
        let mut heard = 0;
        // A writer that is never let go on is stuck, and so is this; only a fault is a sign of life.
        while !writer.is_finished() {
            let Some(fault) = uffd.fault()? else {
                thread::sleep(Duration::from_millis(1));
                continue;
            };
            ensure!(
                fault.write && fault.protected,
                "not a write to a protected page: {fault:?}"
            );
            let page = Region {
                addr: fault.addr,
                pages: 1,
            };
            // Nothing has reached it yet.
            stage.check(page)?;
            heard += 1;
            stage.doing(&format!(
                "{heard} of {heard_of} protected pages were written to"
            ));
            uffd.write_protect(page, false)?;
        }
        writer.join().map_err(|_| anyhow!("the writer panicked"))?;
        for (addr, pattern) in work {
            stage.ledger.note(Region { addr, pages: 1 }, pattern)?;
        }
        // The kernel's own KSM, when it merges a page, takes the protection away.
        let rested = turns.is_multiple_of(2) && stock_turns()? == turns;
        ensure!(
            heard == heard_of || heard < heard_of && !rested,
            "{heard} writes to protected pages were heard of, of {heard_of}"
        );
        stage.check(region)?;
        uffd.write_protect(guarded, false)?;
    }
    drop(uffd);
    stage.let_merge(region)?;
    stage.check_all()
}
