//! A file whose reads take as long as the test wants.
//!
//! It is the root of a FUSE file system that a helper process serves. The kernel pins the pages of a direct read
//! until the file system answers.

use std::fs::File;
use std::fs::OpenOptions;
use std::io::Read;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use nix::errno::Errno;
use nix::mount::MntFlags;
use nix::mount::MsFlags;
use nix::mount::mount;
use nix::mount::umount2;
use nix::poll::PollFd;
use nix::poll::PollFlags;
use nix::poll::PollTimeout;
use nix::poll::poll;
use nix::sys::signal::Signal;
use nix::sys::signal::kill;
use nix::sys::wait::waitpid;
use nix::unistd::ForkResult;
use nix::unistd::Pid;
use nix::unistd::fork;

use crate::wait;
use crate::wait::PATIENCE;

const FUSE_FORGET: u32 = 2;
const FUSE_GETATTR: u32 = 3;
const FUSE_OPEN: u32 = 14;
const FUSE_READ: u32 = 15;
const FUSE_RELEASE: u32 = 18;
const FUSE_FLUSH: u32 = 25;
const FUSE_INIT: u32 = 26;
const FUSE_INTERRUPT: u32 = 36;
const FUSE_BATCH_FORGET: u32 = 42;

/// The protocol spoken: 7.31.
const VERSION: (u32, u32) = (7, 31);

/// `FOPEN_DIRECT_IO`: reads bypass the page cache.
const DIRECT_IO: u32 = 1;

/// How much could be written at a time; requests are read into a buffer that is larger.
const MAX_WRITE: u32 = 4096;

/// The size that the file claims to have.
const SIZE: u64 = 16 << 20;

/// A mounted slow file; it is unmounted when the value is dropped.
#[derive(Debug)]
pub struct SlowFile {
    path: PathBuf,
    server: Pid,
    control: UnixStream,
}

impl SlowFile {
    /// Mounts a slow file.
    pub fn mount() -> Result<Self> {
        ensure!(
            Path::new("/dev/fuse").exists(),
            "this test needs FUSE: /dev/fuse is missing"
        );
        let path = PathBuf::from(format!("/run/ksm-e2e-slow-{}", std::process::id()));
        File::create(&path).with_context(|| path.display().to_string())?;
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .context("/dev/fuse")?;
        let options = format!(
            "fd={},rootmode=100000,user_id=0,group_id=0",
            device.as_raw_fd()
        );
        mount(
            Some("slow"),
            &path,
            Some("fuse"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            Some(options.as_str()),
        )
        .context("mounting the slow file")?;
        let (near, far) = UnixStream::pair()?;
        near.set_read_timeout(Some(PATIENCE * wait::slowness()))?;
        // SAFETY: Tests have one thread only, so the child may do whatever the parent may.
        match unsafe { fork() }.context("fork")? {
            ForkResult::Parent { child } => Ok(Self {
                path,
                server: child,
                control: near,
            }),
            ForkResult::Child => {
                drop(near);
                let status = serve(device, far).map_or(1, |()| 0);
                // SAFETY: _exit may be called at any time.
                unsafe { libc::_exit(status) }
            }
        }
    }

    /// Path of the file.
    pub fn path(&self) -> &str {
        self.path.to_str().expect("made by format!")
    }

    /// Waits until somebody reads, and returns how much.
    pub fn wait_for_read(&mut self) -> Result<usize> {
        let mut size = [0; 8];
        self.control
            .read_exact(&mut size)
            .context("waiting for somebody to read the slow file")?;
        Ok(u64::from_le_bytes(size) as usize)
    }

    /// Lets the read finish with these bytes.
    pub fn answer(&mut self, bytes: &[u8]) -> Result<()> {
        self.control
            .write_all(&(bytes.len() as u64).to_le_bytes())?;
        self.control.write_all(bytes).context("answering the read")
    }
}

impl Drop for SlowFile {
    fn drop(&mut self) {
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        // The connection dies with the server, which ends whatever still waits for an answer.
        let _ = kill(self.server, Signal::SIGKILL);
        let _ = waitpid(self.server, None);
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Collects the fields of a structure of the protocol.
#[derive(Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn zeroes(mut self, bytes: usize) -> Self {
        self.0.resize(self.0.len() + bytes, 0);
        self
    }
}

fn serve(mut device: File, mut control: UnixStream) -> Result<()> {
    let mut request = vec![0; 1 << 16];
    let mut waiting = None;
    loop {
        let mut fds = [
            PollFd::new(device.as_fd(), PollFlags::POLLIN),
            PollFd::new(control.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut fds, PollTimeout::NONE)?;
        let [asked, told] = fds.map(|fd| fd.any().unwrap_or(true));
        if told {
            let mut size = [0; 8];
            control.read_exact(&mut size)?;
            let mut bytes = vec![0; u64::from_le_bytes(size) as usize];
            control.read_exact(&mut bytes)?;
            let unique = waiting.take().context("nobody is reading")?;
            reply(&mut device, unique, Ok(&bytes))?;
        }
        if !asked {
            continue;
        }
        let len = match device.read(&mut request) {
            Ok(len) => len,
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let request = &request[..len];
        let u32_at =
            |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().expect("4 bytes"));
        let u64_at =
            |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().expect("8 bytes"));
        let unique = u64_at(8);
        match u32_at(4) {
            FUSE_INIT => {
                // max_readahead, flags, max_background and congestion_threshold, max_write, time_gran, the rest.
                let init = Fields::default()
                    .u32(VERSION.0)
                    .u32(VERSION.1)
                    .u32(0)
                    .u32(0)
                    .u32(0)
                    .u32(MAX_WRITE)
                    .u32(1);
                reply(&mut device, unique, Ok(&init.zeroes(36).0))?;
            }
            FUSE_GETATTR => {
                // Validity, inode, size, blocks, three times, their nanoseconds, mode, links, owner and device,
                // block size, flags.
                let attributes = Fields::default()
                    .zeroes(16)
                    .u64(1)
                    .u64(SIZE)
                    .u64(SIZE / 512)
                    .zeroes(36);
                let attributes = attributes
                    .u32(libc::S_IFREG | 0o700)
                    .u32(1)
                    .zeroes(12)
                    .u32(4096)
                    .u32(0);
                reply(&mut device, unique, Ok(&attributes.0))?;
            }
            FUSE_OPEN => reply(
                &mut device,
                unique,
                Ok(&Fields::default().u64(0).u32(DIRECT_IO).u32(0).0),
            )?,
            FUSE_READ => {
                waiting = Some(unique);
                // After the header of 40 bytes: handle, offset, size.
                control.write_all(&u64::from(u32_at(40 + 16)).to_le_bytes())?;
            }
            FUSE_RELEASE | FUSE_FLUSH => reply(&mut device, unique, Ok(&[]))?,
            FUSE_FORGET | FUSE_BATCH_FORGET | FUSE_INTERRUPT => {}
            _ => reply(&mut device, unique, Err(Errno::ENOSYS))?,
        }
    }
}

fn reply(device: &mut File, unique: u64, result: Result<&[u8], Errno>) -> Result<()> {
    let (error, body) = match result {
        Ok(body) => (0, body),
        Err(errno) => (-(errno as i32), &[][..]),
    };
    let header = Fields::default()
        .u32(16 + body.len() as u32)
        .u32(error as u32)
        .u64(unique);
    let message = [&header.0, body].concat();
    device.write_all(&message).context("answering the kernel")
}
