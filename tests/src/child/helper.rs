//! The helper's side: what it does when a command arrives.

use std::cell::RefCell;
use std::fs;
use std::io;
use std::io::BufRead;
use std::io::BufReader;
use std::io::IoSlice;
use std::io::IoSliceMut;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

use anyhow::Result;
use nix::errno::Errno;
use nix::fcntl::SpliceFFlags;
use nix::fcntl::vmsplice;
use nix::sys::signal::SaFlags;
use nix::sys::signal::SigAction;
use nix::sys::signal::SigHandler;
use nix::sys::signal::SigSet;
use nix::sys::signal::Signal;
use nix::sys::signal::sigaction;
use nix::sys::socket::ControlMessageOwned;
use nix::sys::socket::MsgFlags;
use nix::sys::socket::recvmsg;
use nix::sys::wait::waitpid;
use nix::unistd::ForkResult;
use nix::unistd::Pid;
use nix::unistd::Uid;
use nix::unistd::fork;
use nix::unistd::pipe;
use nix::unistd::setresuid;

use crate::memory;
use crate::memory::Content;
use crate::memory::Region;
use crate::numa;

use super::BUS_MCEERR_AO;
use super::BusError;
use super::Command;
use super::HELPER_ARGUMENT;
use super::Reply;
use super::Span;

/// Serves as a helper and never returns, if the program was started as one.
pub fn serve_if_asked() {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() != Some(HELPER_ARGUMENT) {
        return;
    }
    let fd: RawFd = arguments
        .next()
        .and_then(|number| number.parse().ok())
        .expect("a descriptor");
    // SAFETY: The parent left this descriptor open for us, and nothing else in this process uses it.
    serve(UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// The helper's life.
pub(super) fn serve(socket: UnixStream) -> ! {
    // Helpers' own children are reaped by the kernel.
    // The handler that Rust's runtime has for SIGBUS expects that the access which failed is tried again, and does
    // not die of signals that come without one.
    // SAFETY: The only handler that is installed does nothing.
    unsafe {
        let _ = nix::sys::signal::signal(Signal::SIGCHLD, SigHandler::SigIgn);
        let _ = nix::sys::signal::signal(Signal::SIGBUS, SigHandler::SigDfl);
        let _ = nix::sys::signal::signal(Signal::SIGUSR1, SigHandler::Handler(interrupted));
    }
    let mut control = BufReader::new(socket);
    loop {
        let mut line = String::new();
        match control.read_line(&mut line) {
            Ok(0) => leave(0),
            Ok(_) => {}
            Err(_) => leave(101),
        }
        let Ok(command) = serde_json::from_str(&line) else {
            leave(102)
        };
        let reply = match command {
            Command::Exit(status) => leave(status),
            Command::Churn { region, seed } => churn(region, seed),
            Command::ForkForEver => fork_for_ever(),
            Command::Fork => match fork_helper(&mut control) {
                Ok(Some(pid)) => Reply::Number(pid.as_raw().into()),
                Ok(None) => continue,
                Err(errno) => Reply::Errno(errno as i32),
            },
            command => execute(command).unwrap_or_else(|errno| Reply::Errno(errno as i32)),
        };
        if send(&control, &reply).is_err() {
            leave(103);
        }
    }
}

fn send(control: &BufReader<UnixStream>, reply: &Reply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    control.get_ref().write_all(&line)
}

/// Ends the process without running anything that belongs to the test it was forked from.
pub(super) fn leave(status: i32) -> ! {
    // SAFETY: _exit may be called at any time.
    unsafe { libc::_exit(status) }
}

/// Forks. In the parent returns the child's id; in the child, which listens to a socket of its own, returns `None`.
fn fork_helper(control: &mut BufReader<UnixStream>) -> Result<Option<Pid>, Errno> {
    send(control, &Reply::Done).map_err(|_| Errno::EPIPE)?;
    let mut byte = [0];
    let mut space = nix::cmsg_space!(RawFd);
    let fd = {
        let mut iov = [IoSliceMut::new(&mut byte)];
        let socket = control.get_ref().as_raw_fd();
        let message = recvmsg::<()>(socket, &mut iov, Some(&mut space), MsgFlags::empty())?;
        let fds = message.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        fds.ok_or(Errno::EBADMSG)?
    };
    // SAFETY: The descriptor was just received and belongs to nobody else.
    let socket = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    // SAFETY: Helpers have one thread only.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(Some(child)),
        ForkResult::Child => {
            *control = BufReader::new(socket);
            Ok(None)
        }
    }
}

fn execute(command: Command) -> Result<Reply, Errno> {
    // SAFETY: The test names only regions that it had this helper map, or whose mapping it knows otherwise. A
    // mistake kills the helper, which the test notices.
    unsafe {
        match command {
            Command::Map(mapping) => return mapping.map().map(Reply::Region),
            Command::MapFile { path, pages } => return map_file(&path, pages).map(Reply::Region),
            Command::Munmap(region) => memory::munmap(region)?,
            Command::Remap {
                region,
                pages,
                flags,
                to,
            } => {
                return memory::remap(region, pages, flags, to).map(Reply::Region);
            }
            Command::Fill(region, content) => memory::fill(region, content),
            Command::Paint(pages) => memory::paint(&pages),
            Command::Differing(pages) => return Ok(Reply::Addresses(memory::differing(&pages))),
            Command::Checksums(region) => return Ok(Reply::Checksums(memory::checksums(region))),
            Command::Write { addr, bytes } => memory::write(addr, &bytes),
            Command::WriteTimed { addr, bytes } => {
                return Ok(Reply::Span(Span::of(|| memory::write(addr, &bytes))));
            }
            Command::Read { addr, len } => return Ok(Reply::Bytes(memory::read(addr, len))),
            Command::Advise(region, advice) => memory::advise(region, advice)?,
            Command::Protect(region, prot) => memory::protect(region, prot)?,
            Command::Lock { region, lock } => memory::lock(region, lock)?,
            Command::Prctl { option, arg } => {
                let value = Errno::result(libc::prctl(option, arg, 0_u64, 0_u64, 0_u64))?;
                return Ok(Reply::Number(value.into()));
            }
            Command::PrctlMce { policy } => {
                let set = libc::PR_MCE_KILL_SET as u64;
                Errno::result(libc::prctl(libc::PR_MCE_KILL, set, policy, 0_u64, 0_u64))?;
            }
            Command::ReadDirect { path, region } => return read_direct(&path, region),
            Command::WriteFile { path, text } => write_file(&path, &text)?,
            Command::Bind {
                region,
                node,
                move_all,
            } => numa::bind(region, node, move_all)?,
            Command::Pin(region) => pin(region)?,
            Command::Unpin => drop(PINS.take()),
            Command::SetUsers([real, effective, saved]) => {
                let [real, effective, saved] = [real, effective, saved].map(Uid::from_raw);
                setresuid(real, effective, saved)?;
                // A program that changes its user has secrets from the new one, unless it says otherwise.
                nix::sys::prctl::set_dumpable(true)?;
            }
            Command::TimeWrites(pages) => return Ok(Reply::Timings(memory::time_writes(&pages))),
            Command::CatchBusErrors => catch_bus_errors()?,
            Command::BusError => return Ok(Reply::BusError(caught_bus_error())),
            Command::Fork | Command::Churn { .. } | Command::ForkForEver | Command::Exit(_) => {
                unreachable!("handled by the caller")
            }
        }
    }
    Ok(Reply::Done)
}

fn errno_of(error: io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

fn map_file(path: &str, pages: usize) -> Result<Region, Errno> {
    let file = fs::File::open(path).map_err(errno_of)?;
    let len = std::num::NonZeroUsize::new(pages * memory::PAGE).ok_or(Errno::EINVAL)?;
    use nix::sys::mman::MapFlags;
    use nix::sys::mman::ProtFlags;
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: A new mapping at an address of the kernel's choice touches no existing memory.
    let addr = unsafe { nix::sys::mman::mmap(None, len, prot, MapFlags::MAP_PRIVATE, &file, 0) }?;
    Ok(Region {
        addr: addr.as_ptr() as usize,
        pages,
    })
}

fn read_direct(path: &str, region: Region) -> Result<Reply, Errno> {
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .map_err(errno_of)?;
    // SAFETY: The region is mapped memory of this helper, touched only through raw pointers.
    let read = unsafe {
        libc::read(
            file.as_raw_fd(),
            region.addr as *mut libc::c_void,
            region.len(),
        )
    };
    Ok(Reply::Number(Errno::result(read)? as i64))
}

fn write_file(path: &str, text: &str) -> Result<(), Errno> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .open(path)
        .map_err(errno_of)?;
    // `write_all` would try again what a signal has interrupted.
    let written = file.write(text.as_bytes()).map_err(errno_of)?;
    if written == text.len() {
        Ok(())
    } else {
        Err(Errno::EIO)
    }
}

thread_local! {
    /// The pipe with the pages that [`Command::Pin`] has put there.
    static PINS: RefCell<Option<(OwnedFd, OwnedFd)>> = const { RefCell::new(None) };
}

fn pin(region: Region) -> Result<(), Errno> {
    let (reader, writer) = pipe()?;
    // SAFETY: The region is mapped memory of this helper; the pipe is never read from.
    let bytes = unsafe { std::slice::from_raw_parts(region.addr as *const u8, region.len()) };
    let spliced = vmsplice(
        &writer,
        &[IoSlice::new(bytes)],
        SpliceFFlags::SPLICE_F_NONBLOCK,
    )?;
    if spliced != bytes.len() {
        return Err(Errno::ENOSPC);
    }
    PINS.set(Some((reader, writer)));
    Ok(())
}

extern "C" fn interrupted(_: i32) {}

static BUS_CODE: AtomicUsize = AtomicUsize::new(0);
static BUS_ADDR: AtomicUsize = AtomicUsize::new(0);

extern "C" fn note_bus_error(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: The kernel passes a valid siginfo to a handler installed with SA_SIGINFO, and for SIGBUS it has an
    // address.
    let (code, addr) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    BUS_ADDR.store(addr, Ordering::Relaxed);
    BUS_CODE.store(code as usize, Ordering::Relaxed);
    if code != BUS_MCEERR_AO {
        // Returning would repeat the access that failed.
        leave(128 + libc::SIGBUS);
    }
}

fn catch_bus_errors() -> Result<(), Errno> {
    let action = SigAction::new(
        SigHandler::SigAction(note_bus_error),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    // SAFETY: The handler only stores to atomics and calls _exit.
    unsafe { sigaction(Signal::SIGBUS, &action) }.map(drop)
}

fn caught_bus_error() -> Option<BusError> {
    let code = BUS_CODE.load(Ordering::Relaxed) as i32;
    (code != 0).then(|| BusError {
        code,
        addr: BUS_ADDR.load(Ordering::Relaxed),
    })
}

/// Writes to pages and checks them for ever. Between two writes a page contains what many others do, so it is
/// merged whenever somebody looks in time.
fn churn(region: Region, seed: u64) -> ! {
    let mut round = 0_u64;
    loop {
        let content = Content::Same(seed + round % 4);
        // SAFETY: The test names a region that it had this helper map writable.
        let sums = unsafe {
            memory::fill(region, content);
            memory::checksums(region)
        };
        if content.check(&sums).is_err() {
            leave(104);
        }
        round += 1;
    }
}

/// Makes processes that make a process, one after the other, for ever.
fn fork_for_ever() -> ! {
    loop {
        // SAFETY: Helpers have one thread only.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                // SAFETY: As above.
                let _ = unsafe { fork() };
                leave(0)
            }
            Ok(ForkResult::Parent { child }) => {
                // Reaped by the kernel, so that waiting ends with an error, but when it is gone.
                let _ = waitpid(child, None);
            }
            Err(_) => leave(105),
        }
    }
}
