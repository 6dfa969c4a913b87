//! What does something hostile to its own memory, step after step, and looks whether the memory is still right.
//!
//! Every actor runs in a process of its own. Its functions are given a [`Stage`]; what a step maps with it is unmapped
//! when the step ends, and what the step writes there is noted in the stage's [`Ledger`], which knows every byte.
//! A step checks what it ought to and returns an error when anything is wrong; one that panics or dies fails as well.

use std::collections::HashSet;
use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::panic::AssertUnwindSafe;
use std::panic::catch_unwind;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use fastrand::Rng;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::memory;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::Pattern;
use ksm_e2e::procfs;
use ksm_e2e::wait;
use nix::errno::Errno;
use nix::sys::signal::SigHandler;
use nix::sys::signal::Signal;
use nix::sys::signal::kill;
use nix::sys::signal::signal;
use nix::sys::wait::WaitPidFlag;
use nix::sys::wait::WaitStatus;
use nix::sys::wait::waitpid;
use nix::unistd::ForkResult;
use nix::unistd::Pid;
use nix::unistd::fork;
use nix::unistd::getpid;

use crate::ledger::Ledger;
use crate::ledger::Shared;

/// How long a step waits for its pages to be merged, on a fast kernel. Nobody promises that they are: a knob may say
/// that there is no merging now.
const MERGE_PATIENCE: Duration = Duration::from_millis(1500);

/// How long may take, on a fast kernel, what happens sooner or later: everybody else is at work meanwhile, and may be the
/// one who freezes all tasks, takes away a CPU or uses up memory.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// Contents that all actors have in common, so that the memory of each is merged with that of others.
const COMMON: u64 = 24;

/// Most pages that a step lets be merged are of common contents.
const COMMON_PERCENT: u32 = 70;

/// See the module.
#[derive(Clone, Copy)]
pub struct Actor {
    /// As `--actors` and reports name it.
    pub name: &'static str,
    /// One of process, space, pressure, pins, control.
    pub group: &'static str,
    /// One step, of about a second; of a few when the machine is slow, or as long as it asks [`Stage::over`].
    pub step: Step,
}

/// A function that makes one step.
pub type Step = fn(&mut Stage) -> Result<()>;

/// What the main process sees of an actor while it runs. It lives in memory that both share.
pub struct Slot {
    /// Steps that were finished.
    pub steps: AtomicU64,
    /// Goes up with every sign of life.
    pub beats: AtomicU64,
    /// Pages that the actor saw merged.
    pub merged: AtomicU64,
    /// Pages that were compared with the ledger.
    pub checked: AtomicU64,
    doing: [AtomicU64; 12],
    doing_len: AtomicUsize,
}

impl Slot {
    /// What the actor said last that it does.
    pub fn doing(&self) -> String {
        let words = self.doing.iter().map(|word| word.load(Ordering::Relaxed));
        let mut bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        bytes.truncate(self.doing_len.load(Ordering::Relaxed));
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn say(&self, text: &str) {
        let len = text.len().min(self.doing.len() * 8);
        let mut chunks = text.as_bytes()[..len].chunks(8);
        for word in &self.doing {
            let mut bytes = [0; 8];
            if let Some(chunk) = chunks.next() {
                bytes[..chunk.len()].copy_from_slice(chunk);
            }
            word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
        }
        self.doing_len.store(len, Ordering::Relaxed);
        self.beats.fetch_add(1, Ordering::Relaxed);
    }
}

/// What a step works with.
pub struct Stage {
    /// Seeded from the seed of the run, the actor's name and how often it was started.
    pub rng: Rng,
    /// When the actor ends. A step that would take longer than a few seconds looks at it, with [`Stage::over`].
    pub deadline: Instant,
    /// What this process' memory must contain. It is empty when a step begins.
    pub ledger: Ledger,
    /// The files of ksm_rs, which are gone while somebody has unloaded it.
    pub ksm: Ksm,
    /// Seed of the run.
    pub seed: u64,
    /// Number of the step.
    pub step: u64,
    /// The actor.
    pub actor: Actor,
    slot: &'static Slot,
    mapped: Vec<Region>,
    next_own: u64,
}

impl Stage {
    /// For an actor that is started for the `incarnation`th time. With `corrupt` its ledger harms the memory before it
    /// looks, and so must find it wrong.
    pub fn new(
        actor: Actor,
        slot: &'static Slot,
        seed: u64,
        incarnation: u64,
        deadline: Instant,
        corrupt: bool,
    ) -> Result<Self> {
        // FNV-1a: the same for the same words, whatever is built by which compiler.
        let hash = |start: u64, bytes: &[u8]| {
            bytes.iter().fold(start, |hash, &byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            })
        };
        let own = hash(0xcbf2_9ce4_8422_2325, actor.name.as_bytes());
        let own = hash(own, &seed.to_le_bytes());
        let own = hash(own, &incarnation.to_le_bytes());
        Ok(Self {
            rng: Rng::with_seed(own),
            deadline,
            ledger: Ledger::new(corrupt)?,
            ksm: Ksm::from_env(),
            seed,
            step: 0,
            actor,
            slot,
            mapped: Vec::new(),
            next_own: own | 1 << 63,
        })
    }

    /// Whether the deadline has come.
    pub fn over(&self) -> bool {
        Instant::now() >= self.deadline
    }

    /// Says what is done now, for the report should it fail or hang. It is a sign of life as well.
    pub fn doing(&self, what: &str) {
        self.slot.say(what);
    }

    /// A sign of life, for a step that takes long.
    pub fn beat(&self) {
        self.slot.beats.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that so many merged pages were seen: a run in which nobody ever sees one proves nothing, and fails.
    pub fn saw_merged(&self, pages: usize) {
        self.slot.merged.fetch_add(pages as u64, Ordering::Relaxed);
    }

    /// A content that other actors have too.
    pub fn common(&mut self) -> Pattern {
        common(&mut self.rng)
    }

    /// A content that no other actor has, nor this one until now. What may end up in memory that is lost (poison) takes
    /// these only, several pages of each, so that it does nobody else harm.
    pub fn own(&mut self) -> Pattern {
        self.next_own = self.next_own.wrapping_add(0x1_0000_0001) | 1 << 63;
        Pattern::Seed(self.next_own)
    }

    /// Either, mostly common.
    pub fn content(&mut self) -> Pattern {
        if self.rng.u32(..100) < COMMON_PERCENT {
            self.common()
        } else {
            self.own()
        }
    }

    /// Maps memory, which is unmapped when the step ends, unless [`Stage::forget`] is told otherwise.
    pub fn map(&mut self, mapping: Mapping) -> Result<Region> {
        let region = mapping.map().context("mapping memory")?;
        self.mapped.push(region);
        Ok(region)
    }

    /// This region is not to be unmapped any more, and the ledger forgets it.
    pub fn forget(&mut self, region: Region) {
        self.ledger.forget(region);
        self.mapped.retain(|known| known.addr != region.addr);
    }

    /// Maps small pages, fills them with contents mostly common, notes those, and asks for merging.
    pub fn mergeable(&mut self, pages: usize) -> Result<Region> {
        let region = self.map(Mapping::pages(pages))?;
        self.paint(region)?;
        memory::advise(region, libc::MADV_MERGEABLE).context("MADV_MERGEABLE")?;
        Ok(region)
    }

    /// Writes new contents to pages, mostly common ones, and notes them.
    pub fn paint(&mut self, region: Region) -> Result<()> {
        for index in 0..region.pages {
            let pattern = self.content();
            self.ledger.write(region.part(index, 1), pattern)?;
        }
        Ok(())
    }

    /// Writes new contents to some of the pages.
    pub fn paint_some(&mut self, region: Region, percent: u32) -> Result<()> {
        for index in 0..region.pages {
            if self.rng.u32(..100) < percent {
                let pattern = self.content();
                self.ledger.write(region.part(index, 1), pattern)?;
            }
        }
        Ok(())
    }

    /// Fails unless every byte of a region is as noted.
    pub fn check(&mut self, region: Region) -> Result<()> {
        self.slot
            .checked
            .fetch_add(region.pages as u64, Ordering::Relaxed);
        self.beat();
        self.ledger.check(region)
    }

    /// Fails unless every byte that was noted anywhere is as noted.
    pub fn check_all(&mut self) -> Result<()> {
        let pages = self.ledger.len();
        self.slot.checked.fetch_add(pages as u64, Ordering::Relaxed);
        self.beat();
        self.ledger.check_all()
    }

    /// Waits until some of the pages are merged, or it seems that they will not be, and returns how many are.
    pub fn let_merge(&mut self, region: Region) -> Result<usize> {
        let patience = MERGE_PATIENCE * wait::slowness();
        let until = (Instant::now() + patience).min(self.deadline);
        // Not always the first few: all of them, now and then.
        let wanted = self.rng.usize(..=region.pages / 2).max(1);
        loop {
            let merged = procfs::ksm_pages(getpid().as_raw(), region)?;
            if merged >= wanted || Instant::now() >= until {
                self.saw_merged(merged);
                return Ok(merged);
            }
            sleep(Duration::from_millis(20));
        }
    }

    /// Sleeps for up to so many milliseconds: where in the scanner's doings the next thing falls is left to chance.
    pub fn dally(&mut self, milliseconds: u64) {
        sleep(Duration::from_micros(self.rng.u64(..=milliseconds * 1000)));
    }

    /// Forks. The child does this work with a stage of its own, whose ledger begins as a copy, and ends.
    pub fn fork(&mut self, work: impl FnOnce(&mut Stage) -> Result<()>) -> Result<Kid> {
        let ledger = self.ledger.copy()?;
        let rng = self.rng.fork();
        let own = self.rng.u64(..);
        let (near, far) = UnixStream::pair()?;
        let parent = getpid();
        // SAFETY: An actor forks from its only thread.
        match unsafe { fork() }.context("fork")? {
            ForkResult::Parent { child } => Ok(Kid {
                pid: child,
                said: near,
                reaped: false,
            }),
            ForkResult::Child => {
                drop(near);
                let result = die_with(parent).and_then(|()| {
                    let mut stage = Stage {
                        rng,
                        deadline: self.deadline,
                        ledger,
                        ksm: self.ksm.clone(),
                        seed: self.seed,
                        step: self.step,
                        actor: self.actor,
                        slot: self.slot,
                        mapped: Vec::new(),
                        next_own: own | 1 << 63,
                    };
                    caught(|| work(&mut stage))
                });
                end_with(result, far)
            }
        }
    }

    /// Steps until the deadline.
    pub fn run(&mut self) -> Result<()> {
        // The kernel's reports name the process that they are about.
        std::fs::write("/proc/self/comm", self.actor.name)?;
        while !self.over() {
            self.doing("a step");
            let step = self.actor.step;
            caught(|| step(self))?;
            let mut unmapped = HashSet::new();
            for region in std::mem::take(&mut self.mapped) {
                if unmapped.insert(region.addr) {
                    memory::munmap(region).context("munmap at the end of a step")?;
                }
            }
            self.ledger.clear();
            self.step += 1;
            self.slot.steps.store(self.step, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// A process that [`Stage::fork`] made. It is killed when this is dropped.
pub struct Kid {
    pid: Pid,
    said: UnixStream,
    reaped: bool,
}

impl Kid {
    /// The process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Waits until it ends, and fails unless it ended well.
    pub fn join(self) -> Result<()> {
        match self.join_or_killed()? {
            true => Ok(()),
            false => bail!("a child was killed"),
        }
    }

    /// The same, but it may also have been killed with SIGKILL; returns whether it ended by itself.
    pub fn join_or_killed(mut self) -> Result<bool> {
        let mut error = String::new();
        let read = self.said.read_to_string(&mut error);
        let status = self.reap()?;
        match status {
            WaitStatus::Exited(_, 0) => Ok(true),
            WaitStatus::Signaled(_, Signal::SIGKILL, _) => Ok(false),
            WaitStatus::Exited(..) => bail!("in a child: {error}"),
            other => bail!("a child ended with {other:?} ({read:?}) {error}"),
        }
    }

    /// Kills it with SIGKILL and waits until it is gone. Fails if it had already failed by itself.
    pub fn kill(self) -> Result<()> {
        kill(self.pid, Signal::SIGKILL).context("killing a child")?;
        self.join_or_killed().map(drop)
    }

    /// Whether it has not ended yet.
    pub fn runs(&mut self) -> Result<bool> {
        use nix::sys::wait::Id;
        let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        let status = nix::sys::wait::waitid(Id::Pid(self.pid), flags).context("waitid")?;
        Ok(status == WaitStatus::StillAlive)
    }

    fn reap(&mut self) -> Result<WaitStatus> {
        let status = waitpid(self.pid, None).context("waitpid")?;
        self.reaped = true;
        Ok(status)
    }
}

impl Drop for Kid {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = kill(self.pid, Signal::SIGKILL);
            let _ = waitpid(self.pid, None);
        }
    }
}

/// A content that all actors have.
pub fn common(rng: &mut Rng) -> Pattern {
    let seed = rng.u64(..COMMON);
    match rng.u32(..16) {
        0..2 => Pattern::Zero,
        2..4 => Pattern::Near {
            seed: Some(seed),
            offset: [0, memory::PAGE / 2, memory::PAGE - 1][rng.usize(..3)],
            flip: 0x10,
        },
        _ => Pattern::Seed(seed),
    }
}

/// Sees to it that this process dies when its parent does.
pub fn die_with(parent: Pid) -> Result<()> {
    let signal = Signal::SIGKILL as u64;
    // SAFETY: The call takes integers only.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal, 0_u64, 0_u64, 0_u64) })?;
    if nix::unistd::getppid() != parent {
        bail!("the parent is gone already");
    }
    Ok(())
}

/// Runs a function and makes an error of a panic.
pub fn caught(work: impl FnOnce() -> Result<()>) -> Result<()> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref().copied());
        bail!("panicked: {}", text.unwrap_or("?"))
    })
}

/// Ends a forked process, telling the other one what went wrong.
pub fn end_with(result: Result<()>, mut to: UnixStream) -> ! {
    if let Err(error) = &result {
        let _ = to.write_all(format!("{error:#}").as_bytes());
    }
    // SAFETY: _exit may be called at any time; nothing that was inherited is to be tidied up twice.
    unsafe { libc::_exit(i32::from(result.is_err())) }
}

/// Prepares a process for being an actor: a bad access kills it, as it does any program, and is seen by that.
pub fn prepare_process() -> Result<()> {
    for one in [Signal::SIGSEGV, Signal::SIGBUS] {
        // SAFETY: The default action runs nothing of ours.
        unsafe { signal(one, SigHandler::SigDfl) }?;
    }
    Ok(())
}

/// The slots of this many actors, in memory that is shared with every process forked from now on.
pub fn slots(count: usize) -> Result<&'static [Slot]> {
    // SAFETY: A slot of zeroes is one of nothing done yet.
    let shared = unsafe { Shared::<Slot>::zeroed(count) }?;
    Ok(shared.leak())
}
