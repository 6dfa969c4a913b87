//! Helper processes that do what a test tells them to.
//!
//! A helper is a fork of the test (or of another helper) that executes commands which arrive on a socket, one at
//! a time, and answers each. It is killed when its [`Child`] is dropped.

mod helper;

use std::io;
use std::io::BufRead;
use std::io::BufReader;
use std::io::IoSlice;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command as Program;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::anyhow;
use anyhow::bail;
use anyhow::ensure;
use nix::errno::Errno;
use nix::poll::PollFd;
use nix::poll::PollFlags;
use nix::poll::PollTimeout;
use nix::poll::poll;
use nix::sys::signal::Signal;
use nix::sys::socket::ControlMessage;
use nix::sys::socket::MsgFlags;
use nix::sys::socket::sendmsg;
use nix::sys::wait::WaitStatus;
use nix::sys::wait::waitpid;
use nix::unistd::ForkResult;
use nix::unistd::Pid;
use nix::unistd::fork;
use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::memory::Content;
use crate::memory::Mapping;
use crate::memory::Pattern;
use crate::memory::Region;
use crate::memory::Timing;
use crate::procfs;
use crate::procfs::MapEntry;
use crate::procfs::Pfn;
use crate::wait;
use crate::wait::PATIENCE;

use helper::leave;
use helper::serve;
pub use helper::serve_if_asked;

/// What a helper can be told to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Command {
    Map(Mapping),
    MapFile {
        path: String,
        pages: usize,
    },
    Munmap(Region),
    Remap {
        region: Region,
        pages: usize,
        flags: i32,
        to: usize,
    },
    Fill(Region, Content),
    Paint(Vec<(usize, Pattern)>),
    Differing(Vec<(usize, Pattern)>),
    Checksums(Region),
    Write {
        addr: usize,
        bytes: Vec<u8>,
    },
    WriteTimed {
        addr: usize,
        bytes: Vec<u8>,
    },
    Read {
        addr: usize,
        len: usize,
    },
    Advise(Region, i32),
    Protect(Region, i32),
    Lock {
        region: Region,
        lock: bool,
    },
    Prctl {
        option: i32,
        arg: u64,
    },
    PrctlMce {
        policy: u64,
    },
    Fork,
    ReadDirect {
        path: String,
        region: Region,
    },
    WriteFile {
        path: String,
        text: String,
    },
    Bind {
        region: Region,
        node: u32,
        move_all: bool,
    },
    Pin(Region),
    Unpin,
    SetUsers([u32; 3]),
    TimeWrites(Vec<usize>),
    CatchBusErrors,
    BusError,
    Churn {
        region: Region,
        seed: u64,
    },
    ForkForEver,
    Exit(i32),
}

/// What a helper answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Reply {
    Done,
    Number(i64),
    Region(Region),
    Checksums(Vec<u64>),
    Addresses(Vec<usize>),
    Bytes(Vec<u8>),
    Span(Span),
    Timings(Vec<Timing>),
    BusError(Option<BusError>),
    Errno(i32),
}

/// When something began and when it was over, by the monotonic clock, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Its beginning.
    pub from: u64,
    /// Its end.
    pub to: u64,
}

impl Span {
    /// The span of what a function does.
    pub fn of(work: impl FnOnce()) -> Self {
        let from = now();
        work();
        Self { from, to: now() }
    }

    /// Whether both were going on at the same time.
    pub fn overlaps(self, other: Self) -> bool {
        self.from < other.to && other.from < self.to
    }
}

/// The monotonic clock.
fn now() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: The structure is what the call expects.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A SIGBUS that a helper caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BusError {
    /// The signal's code, `BUS_MCEERR_AO` for instance.
    pub code: i32,
    /// The address it is about.
    pub addr: usize,
}

/// `BUS_MCEERR_AO`: a page went bad that the process maps; nothing need be done at once.
pub const BUS_MCEERR_AO: i32 = 5;

/// `PR_MCE_KILL_LATE` and `PR_MCE_KILL_EARLY`: when a process wants to hear that one of its pages went bad.
pub const MCE_KILL_LATE: u64 = 0;
/// See [`MCE_KILL_LATE`].
pub const MCE_KILL_EARLY: u64 = 1;

/// First argument of a program that is to serve as a helper; the second is the descriptor of its socket.
const HELPER_ARGUMENT: &str = "--serve-as-helper";

/// A helper process.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    pidfd: OwnedFd,
    control: BufReader<UnixStream>,
    /// Helpers forked by helpers are reaped by their own parent.
    ours: bool,
}

impl Child {
    /// Forks a helper.
    pub fn spawn() -> Result<Self> {
        let (near, far) = UnixStream::pair()?;
        // SAFETY: Tests have one thread only, so the child may do whatever the parent may.
        match unsafe { fork() }.context("fork")? {
            ForkResult::Parent { child } => Self::new(child, near, true),
            ForkResult::Child => {
                drop(near);
                serve(far)
            }
        }
    }

    /// Starts a helper with `exec`, so that it has an address space of its own from the beginning. `prepare` runs
    /// in the new process just before.
    pub fn spawn_program(
        prepare: impl Fn() -> io::Result<()> + Send + Sync + 'static,
    ) -> Result<Self> {
        let (near, far) = UnixStream::pair()?;
        let number = far.as_raw_fd();
        let mut program = Program::new("/proc/self/exe");
        program.arg(HELPER_ARGUMENT).arg(number.to_string());
        // SAFETY: Tests have one thread only, so the child may do whatever the parent may.
        unsafe {
            program.pre_exec(move || {
                nix::fcntl::fcntl(
                    std::os::fd::BorrowedFd::borrow_raw(number),
                    nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
                )?;
                prepare()
            })
        };
        let child = program.spawn().context("starting the helper program")?;
        Self::new(Pid::from_raw(child.id() as i32), near, true)
    }

    fn new(pid: Pid, control: UnixStream, ours: bool) -> Result<Self> {
        // SAFETY: pidfd_open takes two integers and returns a new descriptor.
        let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })
            .context("pidfd_open")?;
        // SAFETY: The descriptor was just opened and belongs to nobody else.
        let pidfd = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
        control.set_read_timeout(Some(2 * PATIENCE * wait::slowness()))?;
        Ok(Self {
            pid,
            pidfd,
            control: BufReader::new(control),
            ours,
        })
    }

    /// The helper's process id.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    fn begin(&self, command: &Command) -> Result<()> {
        let mut line = serde_json::to_vec(command)?;
        line.push(b'\n');
        self.control
            .get_ref()
            .write_all(&line)
            .with_context(|| format!("telling helper {} {command:?}", self.pid))
    }

    fn finish(&mut self) -> Result<Reply> {
        match self.receive()? {
            Reply::Errno(number) => Err(anyhow!(Errno::from_raw(number))),
            reply => Ok(reply),
        }
    }

    fn receive(&mut self) -> Result<Reply> {
        let mut line = String::new();
        let read = self
            .control
            .read_line(&mut line)
            .with_context(|| format!("answer of helper {}", self.pid))?;
        if read == 0 {
            bail!("helper {} died instead of answering", self.pid);
        }
        Ok(serde_json::from_str(&line)?)
    }

    fn order(&mut self, command: &Command) -> Result<Reply> {
        self.begin(command)?;
        self.finish()
            .with_context(|| format!("helper {} doing {command:.80?}", self.pid))
    }

    fn done(&mut self, command: &Command) -> Result<()> {
        match self.order(command)? {
            Reply::Done => Ok(()),
            other => bail!("unexpected answer {other:?} to {command:?}"),
        }
    }

    fn region(&mut self, command: &Command) -> Result<Region> {
        match self.order(command)? {
            Reply::Region(region) => Ok(region),
            other => bail!("unexpected answer {other:?} to {command:?}"),
        }
    }

    /// Maps memory.
    pub fn map(&mut self, mapping: Mapping) -> Result<Region> {
        self.region(&Command::Map(mapping))
    }

    /// Maps memory in small pages, fills it and advises that it be merged.
    pub fn map_mergeable(&mut self, pages: usize, content: Content) -> Result<Region> {
        let region = self.map(Mapping::pages(pages))?;
        self.fill(region, content)?;
        self.advise(region, libc::MADV_MERGEABLE)?;
        Ok(region)
    }

    /// Maps the beginning of a file privately.
    pub fn map_file(&mut self, path: &str, pages: usize) -> Result<Region> {
        self.region(&Command::MapFile {
            path: path.to_owned(),
            pages,
        })
    }

    /// Unmaps memory.
    pub fn munmap(&mut self, region: Region) -> Result<()> {
        self.done(&Command::Munmap(region))
    }

    /// `mremap` with any flags; `to` counts with `MREMAP_FIXED` only.
    pub fn remap(&mut self, region: Region, pages: usize, flags: i32, to: usize) -> Result<Region> {
        self.region(&Command::Remap {
            region,
            pages,
            flags,
            to,
        })
    }

    /// Fills memory.
    pub fn fill(&mut self, region: Region, content: Content) -> Result<()> {
        self.done(&Command::Fill(region, content))
    }

    /// Fills single pages, each given by its address.
    pub fn paint(&mut self, pages: &[(usize, Pattern)]) -> Result<()> {
        self.done(&Command::Paint(pages.to_vec()))
    }

    /// The addresses of those pages that do not contain what they should, in every byte.
    pub fn differing(&mut self, pages: &[(usize, Pattern)]) -> Result<Vec<usize>> {
        match self.order(&Command::Differing(pages.to_vec()))? {
            Reply::Addresses(addresses) => Ok(addresses),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Fails unless memory contains exactly this.
    pub fn verify(&mut self, region: Region, content: Content) -> Result<()> {
        let sums = self.checksums(region)?;
        content
            .check(&sums)
            .with_context(|| format!("memory of helper {}", self.pid))
    }

    /// Starts reading all of a region; [`Child::finish_verify`] waits for its end.
    pub fn begin_verify(&mut self, region: Region) -> Result<()> {
        self.begin(&Command::Checksums(region))
    }

    /// Waits until the region is read, and fails unless it contains exactly this.
    pub fn finish_verify(&mut self, content: Content) -> Result<()> {
        match self.finish()? {
            Reply::Checksums(sums) => content
                .check(&sums)
                .with_context(|| format!("memory of helper {}", self.pid)),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Checksums of pages.
    pub fn checksums(&mut self, region: Region) -> Result<Vec<u64>> {
        match self.order(&Command::Checksums(region))? {
            Reply::Checksums(sums) => Ok(sums),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Writes bytes.
    pub fn write(&mut self, addr: usize, bytes: &[u8]) -> Result<()> {
        self.done(&Command::Write {
            addr,
            bytes: bytes.to_vec(),
        })
    }

    /// Starts writing bytes; [`Child::finish_timed`] waits for it.
    pub fn begin_write(&mut self, addr: usize, bytes: &[u8]) -> Result<()> {
        self.begin(&Command::WriteTimed {
            addr,
            bytes: bytes.to_vec(),
        })
    }

    /// Waits until the bytes are written; says when that was.
    pub fn finish_timed(&mut self) -> Result<Span> {
        match self.finish()? {
            Reply::Span(span) => Ok(span),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Starts unmapping memory; [`Child::finish_done`] waits for it.
    pub fn begin_munmap(&mut self, region: Region) -> Result<()> {
        self.begin(&Command::Munmap(region))
    }

    /// Starts `madvise`; [`Child::finish_done`] waits for it.
    pub fn begin_advise(&mut self, region: Region, advice: i32) -> Result<()> {
        self.begin(&Command::Advise(region, advice))
    }

    /// Starts `mremap` to an address; [`Child::finish_remap`] waits for it.
    pub fn begin_remap(&mut self, region: Region, flags: i32, to: usize) -> Result<()> {
        self.begin(&Command::Remap {
            region,
            pages: region.pages,
            flags,
            to,
        })
    }

    /// Waits for the end of what was started.
    pub fn finish_done(&mut self) -> Result<()> {
        match self.finish()? {
            Reply::Done => Ok(()),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Waits until memory has moved; says where to.
    pub fn finish_remap(&mut self) -> Result<Region> {
        match self.finish()? {
            Reply::Region(region) => Ok(region),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Reads bytes.
    pub fn read(&mut self, addr: usize, len: usize) -> Result<Vec<u8>> {
        match self.order(&Command::Read { addr, len })? {
            Reply::Bytes(bytes) => Ok(bytes),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// `madvise`.
    pub fn advise(&mut self, region: Region, advice: i32) -> Result<()> {
        self.done(&Command::Advise(region, advice))
    }

    /// `madvise` that may kill the caller; nothing is said about how it went.
    pub fn advise_at_any_cost(&mut self, region: Region, advice: i32) -> Result<()> {
        self.begin(&Command::Advise(region, advice))
    }

    /// `mprotect`.
    pub fn protect(&mut self, region: Region, prot: i32) -> Result<()> {
        self.done(&Command::Protect(region, prot))
    }

    /// `mlock` or `munlock`.
    pub fn lock(&mut self, region: Region, lock: bool) -> Result<()> {
        self.done(&Command::Lock { region, lock })
    }

    /// `prctl` with one argument.
    pub fn prctl(&mut self, option: i32, arg: u64) -> Result<i64> {
        match self.order(&Command::Prctl { option, arg })? {
            Reply::Number(number) => Ok(number),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Says when the helper wants to hear of bad pages: [`MCE_KILL_LATE`] or [`MCE_KILL_EARLY`].
    pub fn set_memory_error_policy(&mut self, policy: u64) -> Result<()> {
        self.done(&Command::PrctlMce { policy })
    }

    /// Makes the helper note the next SIGBUS instead of dying of it.
    pub fn catch_bus_errors(&mut self) -> Result<()> {
        self.done(&Command::CatchBusErrors)
    }

    /// The SIGBUS that was caught, if any.
    pub fn bus_error(&mut self) -> Result<Option<BusError>> {
        match self.order(&Command::BusError)? {
            Reply::BusError(error) => Ok(error),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Starts an `O_DIRECT` read of a file into memory; [`Child::finish_read`] waits for its end.
    pub fn begin_read_direct(&mut self, path: &str, region: Region) -> Result<()> {
        self.begin(&Command::ReadDirect {
            path: path.to_owned(),
            region,
        })
    }

    /// Waits for the read to end and returns the number of bytes.
    pub fn finish_read(&mut self) -> Result<i64> {
        match self.finish()? {
            Reply::Number(number) => Ok(number),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Starts a single `write(2)` to a file; [`Child::finish_write`] waits for its end.
    pub fn begin_write_file(&mut self, path: impl AsRef<Path>, text: &str) -> Result<()> {
        self.begin(&Command::WriteFile {
            path: path.as_ref().to_string_lossy().into_owned(),
            text: text.to_owned(),
        })
    }

    /// Waits for the write to end and returns what the kernel said.
    pub fn finish_write(&mut self) -> Result<Result<(), Errno>> {
        match self.receive()? {
            Reply::Done => Ok(Ok(())),
            Reply::Errno(number) => Ok(Err(Errno::from_raw(number))),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Whether the helper has answered what it was told last.
    pub fn answered(&self) -> Result<bool> {
        let mut fds = [PollFd::new(
            self.control.get_ref().as_fd(),
            PollFlags::POLLIN,
        )];
        Ok(poll(&mut fds, PollTimeout::ZERO).context("poll")? != 0)
    }

    /// Sends a signal that does nothing but interrupt what the kernel is doing for the helper.
    pub fn interrupt(&self) -> Result<()> {
        self.signal(libc::SIGUSR1)
    }

    /// Lets memory come from one NUMA node only; `move_all` moves what is elsewhere, whoever else maps it.
    pub fn bind(&mut self, region: Region, node: u32, move_all: bool) -> Result<()> {
        self.done(&Command::Bind {
            region,
            node,
            move_all,
        })
    }

    /// Puts the pages themselves, 16 at the most, into a pipe: the kernel can neither move nor free them until
    /// [`Child::unpin`].
    pub fn pin(&mut self, region: Region) -> Result<()> {
        self.done(&Command::Pin(region))
    }

    /// Undoes [`Child::pin`].
    pub fn unpin(&mut self) -> Result<()> {
        self.done(&Command::Unpin)
    }

    /// Makes the helper another user's, the real, the effective and the saved one, who may debug it.
    pub fn set_users(&mut self, real: u32, effective: u32, saved: u32) -> Result<()> {
        self.done(&Command::SetUsers([real, effective, saved]))
    }

    /// Writes to pages, each given by its address, what they contain; returns what each of the writes took.
    pub fn time_writes(&mut self, pages: &[usize]) -> Result<Vec<Timing>> {
        match self.order(&Command::TimeWrites(pages.to_vec()))? {
            Reply::Timings(timings) => Ok(timings),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Makes the helper write to the region's pages and check them, for ever and without answering again. It exits
    /// with a status other than 0 when it reads something that it did not write.
    pub fn churn(&mut self, region: Region, seed: u64) -> Result<()> {
        self.begin(&Command::Churn { region, seed })
    }

    /// Makes the helper fork, for ever and without answering again. Each of its children forks once and exits.
    pub fn fork_for_ever(&mut self) -> Result<()> {
        self.begin(&Command::ForkForEver)
    }

    /// Forks the helper; the new one has a copy of its memory.
    pub fn fork(&mut self) -> Result<Self> {
        let near = self.begin_fork()?;
        self.finish_fork(near)
    }

    /// Starts to fork the helper; [`Child::finish_fork`] waits for it, and wants what this returns.
    pub fn begin_fork(&mut self) -> Result<UnixStream> {
        let (near, far) = UnixStream::pair()?;
        self.done(&Command::Fork)?;
        let fds = [far.as_raw_fd()];
        let message = [ControlMessage::ScmRights(&fds)];
        let socket = self.control.get_ref().as_raw_fd();
        sendmsg::<()>(
            socket,
            &[IoSlice::new(b"f")],
            &message,
            MsgFlags::empty(),
            None,
        )
        .context("passing a socket")?;
        Ok(near)
    }

    /// Waits until the helper has forked.
    pub fn finish_fork(&mut self, near: UnixStream) -> Result<Self> {
        match self.finish()? {
            Reply::Number(pid) => Self::new(Pid::from_raw(pid as i32), near, false),
            other => bail!("unexpected answer {other:?}"),
        }
    }

    /// Tells the helper to exit, and waits until it has.
    pub fn exit(mut self) -> Result<()> {
        self.begin(&Command::Exit(0))?;
        let status = self.wait()?;
        ensure!(
            status.is_none_or(|status| status == WaitStatus::Exited(self.pid, 0)),
            "helper ended with {status:?}"
        );
        Ok(())
    }

    /// Kills the helper, and waits until it is gone.
    pub fn kill(mut self) -> Result<()> {
        let status = self.kill_and_wait()?;
        let killed = WaitStatus::Signaled(self.pid, Signal::SIGKILL, false);
        ensure!(
            status.is_none_or(|status| status == killed),
            "helper ended with {status:?}"
        );
        Ok(())
    }

    fn signal(&self, signal: i32) -> Result<()> {
        // SAFETY: The descriptor is a pidfd, and no siginfo is passed.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.pidfd.as_raw_fd(),
                signal,
                0,
                0,
            )
        };
        Errno::result(result).context("sending a signal")?;
        Ok(())
    }

    fn kill_and_wait(&mut self) -> Result<Option<WaitStatus>> {
        // It may have ended by itself.
        let _ = self.signal(libc::SIGKILL);
        self.wait()
    }

    /// Whether the helper still runs.
    pub fn alive(&self) -> Result<bool> {
        Ok(!self.ended_within(Duration::ZERO)?)
    }

    fn ended_within(&self, limit: Duration) -> Result<bool> {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(limit).expect("a limit of minutes");
        Ok(poll(&mut fds, timeout).context("poll")? != 0)
    }

    /// Waits until the helper has ended. How it ended is known only if this process is its parent.
    pub fn wait(&mut self) -> Result<Option<WaitStatus>> {
        ensure!(
            self.ended_within(PATIENCE * wait::slowness())?,
            "helper {} does not end",
            self.pid
        );
        if self.ours {
            self.ours = false;
            return Ok(Some(waitpid(self.pid, None)?));
        }
        Ok(None)
    }

    /// `pagemap` entries of the helper's memory.
    pub fn map_entries(&self, region: Region) -> Result<Vec<MapEntry>> {
        procfs::map_entries(self.pid(), region)
    }

    /// The physical pages of the helper's memory, all of which must be present.
    pub fn pfns(&self, region: Region) -> Result<Vec<Pfn>> {
        procfs::pfns(self.pid(), region)
    }

    /// How many of the pages are KSM pages.
    pub fn ksm_pages(&self, region: Region) -> Result<usize> {
        procfs::ksm_pages(self.pid(), region)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // A helper that cannot be killed is found by the runner, which waits for the whole process group.
        let _ = self.kill_and_wait();
    }
}

/// Runs a function in a fork of this process, and returns what it returned.
pub fn in_a_fork<T: Serialize + DeserializeOwned>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let (mut near, mut far) = UnixStream::pair()?;
    near.set_read_timeout(Some(PATIENCE * wait::slowness()))?;
    // SAFETY: Tests have one thread only, so the child may do whatever the parent may.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Parent { child } => {
            drop(far);
            let mut answer = String::new();
            let read = near.read_to_string(&mut answer);
            if read.is_err() {
                nix::sys::signal::kill(child, Signal::SIGKILL)?;
            }
            waitpid(child, None)?;
            read.context("answer of a fork")?;
            let answer: Result<T, String> = serde_json::from_str(&answer)?;
            answer.map_err(|error| anyhow!(error))
        }
        ForkResult::Child => {
            let answer = work().map_err(|error| format!("{error:#}"));
            let sent = serde_json::to_vec(&answer).is_ok_and(|text| far.write_all(&text).is_ok());
            leave(i32::from(!sent))
        }
    }
}
