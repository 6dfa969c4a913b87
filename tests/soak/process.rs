//! Processes that come and go: forks of forks, exec, exit, SIGKILL in the middle of a scan, vfork, threads.

use std::env;
use std::ffi::CString;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use fastrand::Rng;
use ksm_e2e::Region;
use ksm_e2e::memory;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::PAGE;
use ksm_e2e::memory::Pattern;
use nix::errno::Errno;
use nix::sys::wait::WaitStatus;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::actor;
use crate::actor::Actor;
use crate::actor::Stage;
use crate::ledger::Ledger;

/// First argument of this program when an actor executes it; the others are a seed and how often to go on doing so.
const EXECUTED: &str = "--executed";

/// How long an executed program, or one of several threads, goes on at most, on a fast kernel.
const SHORT: Duration = Duration::from_secs(20);

/// Size of the stack of a child that shares its parent's memory.
const VFORK_STACK: usize = 64 * PAGE;

pub fn actors() -> Vec<Actor> {
    let actor = |name, step| Actor {
        name,
        group: "process",
        step,
    };
    vec![
        actor("fork-tree", fork_tree),
        actor("exec", exec),
        actor("sigkill", sigkill),
        actor("vfork", vfork),
        actor("threads", threads),
    ]
}

/// Serves as the program that an actor executes, if this process is one, and never returns then.
pub fn serve_if_asked() {
    let mut arguments = env::args().skip(1);
    if arguments.next().as_deref() != Some(EXECUTED) {
        return;
    }
    let mut number = || arguments.next()?.parse::<u64>().ok();
    let result = match (number(), number()) {
        (Some(seed), Some(left)) => actor::caught(|| executed(seed, left)),
        _ => Err(anyhow::anyhow!("{EXECUTED} needs a seed and a number")),
    };
    if let Err(error) = &result {
        eprintln!("soak: in an executed program: {error:#}");
    }
    exit(i32::from(result.is_err()))
}

/// Everyone writes to what all have inherited merged, and forks again.
fn fork_tree(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(20..200);
    let region = stage.mergeable(pages)?;
    stage.doing("merging before the fork");
    stage.let_merge(region)?;
    grow(stage, region, 3)?;
    stage.doing("the last check");
    stage.check_all()
}

fn grow(stage: &mut Stage, region: Region, depth: u32) -> Result<()> {
    let mut kids = Vec::new();
    for _ in 0..stage.rng.usize(1..=3) {
        let kid = stage.fork(|stage| {
            // Some end at once: their memory is torn down while it is being looked at.
            if stage.rng.u32(..5) == 0 {
                return Ok(());
            }
            stage.check_all()?;
            if stage.rng.bool() {
                stage.paint_some(region, 30)?;
            }
            if depth > 0 && stage.rng.bool() {
                grow(stage, region, depth - 1)?;
            }
            if stage.rng.bool() {
                stage.let_merge(region)?;
            }
            stage.paint_some(region, 10)?;
            stage.check_all()
        })?;
        kids.push(kid);
    }
    stage.doing("writing beside the children");
    stage.paint_some(region, 20)?;
    stage.check_all()?;
    stage.doing("waiting for the children");
    for kid in kids {
        if stage.rng.u32(..4) == 0 {
            stage.dally(50);
            kid.kill()?;
        } else {
            kid.join()?;
        }
    }
    stage.check_all()
}

/// A process whose memory is merged executes a program, which does so again.
fn exec(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(20..150);
    let region = stage.mergeable(pages)?;
    let (seed, left) = (stage.rng.u64(..), stage.rng.u64(..3));
    // All of the program's memory is mergeable then, from its first page on.
    let everything = stage.rng.bool();
    stage.doing("forking who executes");
    let kid = stage.fork(|stage| {
        stage.paint_some(region, 20)?;
        stage.let_merge(region)?;
        stage.check_all()?;
        if everything {
            merge_everything(true)?;
        }
        execute(seed, left)
    })?;
    stage.let_merge(region)?;
    stage.paint_some(region, 20)?;
    stage.doing("waiting for the program");
    kid.join()?;
    stage.check_all()
}

/// Turns `PR_SET_MEMORY_MERGE` on or off.
pub fn merge_everything(on: bool) -> Result<(), Errno> {
    let option = libc::PR_SET_MEMORY_MERGE;
    // SAFETY: The call takes integers only; what memory contains does not change.
    Errno::result(unsafe { libc::prctl(option, u64::from(on), 0_u64, 0_u64, 0_u64) }).map(drop)
}

fn execute(seed: u64, left: u64) -> Result<()> {
    let error = Command::new("/proc/self/exe")
        .args([EXECUTED, &seed.to_string(), &left.to_string()])
        .exec();
    Err(error).context("exec")
}

fn executed(seed: u64, left: u64) -> Result<()> {
    let actor = Actor {
        name: "executed",
        group: "process",
        step: |_| Ok(()),
    };
    let deadline = Instant::now() + SHORT;
    let slot = &actor::slots(1)?[0];
    let mut stage = Stage::new(actor, slot, seed, left, deadline, false)?;
    let pages = stage.rng.usize(10..100);
    let region = stage.mergeable(pages)?;
    stage.let_merge(region)?;
    stage.check_all()?;
    stage.paint_some(region, 30)?;
    let seed = stage.rng.u64(..);
    if left > 0 {
        // In the middle of whatever the scanner does with the memory.
        stage.dally(30);
        return execute(seed, left - 1);
    }
    stage.check_all()
}

/// Processes that write and look are killed at any moment.
fn sigkill(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(20..150);
    let region = stage.mergeable(pages)?;
    let own_memory = stage.rng.bool();
    let everything = stage.rng.u32(..3) == 0;
    let mut kids = Vec::new();
    for _ in 0..stage.rng.usize(2..=5) {
        kids.push(stage.fork(|stage| {
            if everything {
                merge_everything(true)?;
            }
            let region = if own_memory {
                stage.mergeable(pages)?
            } else {
                region
            };
            loop {
                stage.paint_some(region, 40)?;
                stage.check_all()?;
                stage.dally(20);
            }
        })?);
    }
    stage.doing("killing children");
    stage.let_merge(region)?;
    for kid in kids {
        stage.dally(100);
        kid.kill()?;
        stage.paint_some(region, 5)?;
    }
    stage.check_all()
}

/// What a child that shares its parent's memory is to do.
struct InParent {
    pages: Vec<(usize, Pattern)>,
    advice: Option<(Region, i32)>,
    /// Paths and arguments for `execv`, null at their end.
    program: Option<(CString, Vec<*const libc::c_char>)>,
}

extern "C" fn in_parent(argument: *mut libc::c_void) -> libc::c_int {
    // SAFETY: The parent waits, and so does what it passes.
    let work = unsafe { &*argument.cast::<InParent>() };
    // SAFETY: The regions are the actor's.
    unsafe { memory::paint(&work.pages) };
    if let Some((region, advice)) = work.advice
        && memory::advise(region, advice).is_err()
    {
        return 2;
    }
    if let Some((path, arguments)) = &work.program {
        // SAFETY: The path is a string, and the arguments are strings with a null behind them.
        unsafe { libc::execv(path.as_ptr(), arguments.as_ptr()) };
        return 3;
    }
    0
}

/// A child writes to its parent's own merged memory while that waits, and executes a program or ends.
fn vfork(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(20..150);
    let region = stage.mergeable(pages)?;
    let stack = stage.map(Mapping::pages(VFORK_STACK / PAGE))?;
    for _ in 0..stage.rng.usize(1..8) {
        stage.let_merge(region)?;
        let seed = stage.rng.u64(..).to_string();
        let arguments = [c"soak", c"--executed"].map(std::borrow::ToOwned::to_owned);
        let arguments: Vec<CString> = arguments
            .into_iter()
            .chain([CString::new(seed)?, c"0".to_owned()])
            .collect();
        let mut pointers: Vec<_> = arguments.iter().map(|text| text.as_ptr()).collect();
        pointers.push(std::ptr::null());
        let mut work = InParent {
            pages: Vec::new(),
            advice: None,
            program: (stage.rng.u32(..3) == 0).then(|| (c"/proc/self/exe".to_owned(), pointers)),
        };
        if stage.rng.u32(..3) == 0 {
            let advice = [libc::MADV_MERGEABLE, libc::MADV_UNMERGEABLE][stage.rng.usize(..2)];
            work.advice = Some((region, advice));
        }
        for addr in region.addresses() {
            if stage.rng.u32(..4) == 0 {
                let pattern = stage.content();
                work.pages.push((addr, pattern));
                stage.ledger.note(Region { addr, pages: 1 }, pattern)?;
            }
        }
        stage.doing("vfork");
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        // SAFETY: The child has a stack of its own, which nobody else uses, and touches only what it is given; this
        // process waits until it has executed something or ended.
        let pid = unsafe {
            libc::clone(
                in_parent,
                (stack.addr + stack.len()) as *mut libc::c_void,
                flags,
                (&raw mut work).cast(),
            )
        };
        let pid = Errno::result(pid).context("clone")?;
        // The program runs while its parent goes on.
        stage.check_all()?;
        stage.paint_some(region, 10)?;
        stage.doing("waiting for the vforked child");
        let status = waitpid(Pid::from_raw(pid), None)?;
        ensure!(
            matches!(status, WaitStatus::Exited(_, 0)),
            "a vforked child ended with {status:?}"
        );
        memory::advise(region, libc::MADV_MERGEABLE)?;
        stage.check_all()?;
    }
    Ok(())
}

/// Threads write each to its part of merged memory, the first of them ends long before the last, and the last ends the
/// process; or somebody kills it.
fn threads(stage: &mut Stage) -> Result<()> {
    let count = stage.rng.usize(2..=4);
    let share = stage.rng.usize(8..50);
    let region = stage.mergeable(count * share)?;
    stage.let_merge(region)?;
    let killed = stage.rng.u32(..3) == 0;
    let leader_first = stage.rng.bool();
    stage.doing("forking who has threads");
    let kid = stage.fork(|stage| {
        if stage.rng.bool() {
            merge_everything(true)?;
        }
        let left = Arc::new(AtomicUsize::new(count));
        let mut handles = Vec::new();
        for index in 0..count {
            let mut own = OneThread {
                region: region.part(index * share, share),
                rng: stage.rng.fork(),
                ledger: stage.ledger.copy()?,
            };
            let left = left.clone();
            handles.push(thread::spawn(move || {
                let result = own.work();
                if leader_first {
                    let bad = result.is_err();
                    if let Err(error) = &result {
                        eprintln!("soak: in a thread: {error:#}");
                    }
                    if left.fetch_sub(1, Ordering::AcqRel) == 1 || bad {
                        // SAFETY: The last thread ends the process, whose first thread is gone; _exit may be called
                        // at any time.
                        unsafe { libc::_exit(i32::from(bad)) };
                    }
                }
                result
            }));
        }
        if leader_first {
            // SAFETY: The thread has nothing left to do: what it owns stays, as the others may use it.
            unsafe { libc::syscall(libc::SYS_exit, 0) };
        }
        for handle in handles {
            handle
                .join()
                .map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        Ok(())
    })?;
    stage.paint_some(region, 20)?;
    stage.check_all()?;
    if killed {
        stage.dally(300);
        kid.kill()?;
    } else {
        stage.doing("waiting for who has threads");
        kid.join()?;
    }
    stage.check_all()
}

/// A thread, which knows its own part of the memory only.
struct OneThread {
    region: Region,
    rng: Rng,
    ledger: Ledger,
}

impl OneThread {
    fn work(&mut self) -> Result<()> {
        // One of them is the last.
        for _ in 0..self.rng.usize(1..12) {
            for index in 0..self.region.pages {
                if self.rng.u32(..3) == 0 {
                    let pattern = actor::common(&mut self.rng);
                    self.ledger.write(self.region.part(index, 1), pattern)?;
                }
            }
            // Changes the areas that the scanner, and the other threads' page faults, look at.
            let advices = [
                libc::MADV_MERGEABLE,
                libc::MADV_UNMERGEABLE,
                libc::MADV_COLD,
            ];
            memory::advise(self.region, advices[self.rng.usize(..advices.len())])?;
            thread::sleep(Duration::from_millis(self.rng.u64(..40)));
            self.ledger.check(self.region)?;
            memory::advise(self.region, libc::MADV_MERGEABLE)?;
        }
        self.ledger.check(self.region)
    }
}
