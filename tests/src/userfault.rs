//! userfaultfd: hearing of page faults.

use std::fs::File;
use std::io::ErrorKind;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::fd::FromRawFd;
use std::os::fd::RawFd;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use nix::errno::Errno;

use crate::memory::Region;

const UFFD_API: u64 = 0xaa;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1;
const FEATURE_RWP: u64 = 1 << 17;
const MODE_MISSING: u64 = 1;
const MODE_WP: u64 = 2;
const MODE_RWP: u64 = 8;
const WRITEPROTECT_WP: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;
const PAGEFAULT_FLAG_WRITE: u64 = 1;
const PAGEFAULT_FLAG_WP: u64 = 2;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

#[repr(C)]
struct Zeropage {
    start: u64,
    len: u64,
    mode: u64,
    zeropage: i64,
}

/// The calls, as functions that nix makes (public ones, whatever they are here).
#[allow(missing_docs)]
mod calls {
    use super::*;

    nix::ioctl_readwrite!(api, 0xaa, 0x3f, Api);
    nix::ioctl_readwrite!(register, 0xaa, 0x00, Register);
    nix::ioctl_readwrite!(zeropage, 0xaa, 0x04, Zeropage);
    nix::ioctl_readwrite!(writeprotect, 0xaa, 0x06, WriteProtect);
    nix::ioctl_readwrite!(rwprotect, 0xaa, 0x09, WriteProtect);
}

/// What a region is watched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Accesses to pages that are not there.
    Missing,
    /// Writes to pages that were write-protected with [`Userfault::write_protect`].
    WriteProtected,
    /// Accesses of any kind to pages that were protected with [`Userfault::protect`].
    Protected,
}

/// A page fault that waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The address, rounded down to a page.
    pub addr: usize,
    /// Whether it was a write.
    pub write: bool,
    /// Whether it was a write to a protected page.
    pub protected: bool,
}

/// A userfaultfd of this process.
#[derive(Debug)]
pub struct Userfault(File);

impl Userfault {
    /// Opens one.
    pub fn open() -> Result<Self> {
        Self::with(FEATURE_PAGEFAULT_FLAG_WP)?
            .context("this test needs write protection by userfaultfd")
    }

    /// Opens one that can protect from accesses of any kind; `None`: the kernel does not know of such.
    pub fn open_for_protection() -> Result<Option<Self>> {
        Self::with(FEATURE_PAGEFAULT_FLAG_WP | FEATURE_RWP)
    }

    fn with(features: u64) -> Result<Option<Self>> {
        // SAFETY: The call takes flags and returns a new descriptor.
        let fd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        let fd = Errno::result(fd).context("this test needs userfaultfd")?;
        // SAFETY: The descriptor was just opened and belongs to nobody else.
        let file = unsafe { File::from_raw_fd(fd as RawFd) };
        let mut api = Api {
            api: UFFD_API,
            features,
            ioctls: 0,
        };
        // SAFETY: The structure is what the call expects.
        match unsafe { calls::api(file.as_raw_fd(), &mut api) } {
            Ok(_) => Ok(Some(Self(file))),
            Err(Errno::EINVAL) => Ok(None),
            Err(errno) => Err(errno).context("UFFDIO_API"),
        }
    }

    /// Watches a region.
    pub fn watch(&self, region: Region, watch: Watch) -> Result<()> {
        let mode = match watch {
            Watch::Missing => MODE_MISSING,
            Watch::WriteProtected => MODE_WP,
            Watch::Protected => MODE_RWP,
        };
        let mut register = Register {
            start: region.addr as u64,
            len: region.len() as u64,
            mode,
            ioctls: 0,
        };
        // SAFETY: The structure is what the call expects.
        unsafe { calls::register(self.0.as_raw_fd(), &mut register) }.context("UFFDIO_REGISTER")?;
        Ok(())
    }

    /// Write-protects a region, or lifts the protection and wakes who waits.
    pub fn write_protect(&self, region: Region, protect: bool) -> Result<()> {
        let mode = if protect { WRITEPROTECT_WP } else { 0 };
        let mut arg = WriteProtect {
            start: region.addr as u64,
            len: region.len() as u64,
            mode,
        };
        // SAFETY: The structure is what the call expects.
        unsafe { calls::writeprotect(self.0.as_raw_fd(), &mut arg) }
            .context("UFFDIO_WRITEPROTECT")?;
        Ok(())
    }

    /// Protects a region from accesses of any kind, or lifts the protection and wakes who waits.
    pub fn protect(&self, region: Region, protect: bool) -> Result<()> {
        let mut arg = WriteProtect {
            start: region.addr as u64,
            len: region.len() as u64,
            mode: protect.into(),
        };
        // SAFETY: The structure is what the call expects.
        unsafe { calls::rwprotect(self.0.as_raw_fd(), &mut arg) }.context("UFFDIO_RWPROTECT")?;
        Ok(())
    }

    /// Answers faults of missing pages with zeroes.
    pub fn zero(&self, region: Region) -> Result<()> {
        let mut arg = Zeropage {
            start: region.addr as u64,
            len: region.len() as u64,
            mode: 0,
            zeropage: 0,
        };
        // SAFETY: The structure is what the call expects.
        unsafe { calls::zeropage(self.0.as_raw_fd(), &mut arg) }.context("UFFDIO_ZEROPAGE")?;
        Ok(())
    }

    /// The next fault, if one waits.
    pub fn fault(&mut self) -> Result<Option<Fault>> {
        let mut message = [0; 32];
        match self.0.read(&mut message) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            result => result.context("reading the userfaultfd")?,
        };
        ensure!(
            message[0] == EVENT_PAGEFAULT,
            "unexpected event {:#x}",
            message[0]
        );
        let word = |at: usize| u64::from_le_bytes(message[at..at + 8].try_into().expect("8 bytes"));
        let flags = word(8);
        Ok(Some(Fault {
            addr: word(16) as usize & !(crate::memory::PAGE - 1),
            write: flags & PAGEFAULT_FLAG_WRITE != 0,
            protected: flags & PAGEFAULT_FLAG_WP != 0,
        }))
    }
}
