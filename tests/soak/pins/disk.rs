//! A disk to read from and write to directly: a loop device on memory of its own.

use std::fs::File;
use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::Context;
use anyhow::Result;
use ksm_e2e::memory::PAGE;
use ksm_e2e::wait;
use nix::errno::Errno;
use nix::sys::memfd::MFdFlags;
use nix::sys::memfd::memfd_create;

use crate::actor::PATIENCE;

/// The device is given back when nobody has it open any more.
const AUTOCLEAR: u32 = 4;

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo {
    numbers: [u64; 5],
    number: u32,
    encryption: [u32; 2],
    flags: u32,
    names: [u8; 160],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
pub struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

nix::ioctl_none_bad!(loop_get_free, 0x4c82);
nix::ioctl_write_ptr_bad!(loop_configure, 0x4c0a, LoopConfig);

/// See the module. The device is gone when this is dropped.
pub struct Disk {
    /// The device, open for direct I/O.
    pub file: File,
    backing: File,
    pages: usize,
}

impl Disk {
    /// A disk of so many pages.
    pub fn new(pages: usize) -> Result<Self> {
        let backing = File::from(memfd_create(c"soak-disk", MFdFlags::MFD_CLOEXEC)?);
        backing.set_len((pages * PAGE) as u64)?;
        let control = File::open("/dev/loop-control").context("/dev/loop-control")?;
        let mut disk = None;
        // Somebody else may be given the same device and be faster.
        wait::until("there is a free loop device", PATIENCE, || {
            // SAFETY: The call takes nothing and returns a number.
            let number =
                unsafe { loop_get_free(control.as_raw_fd()) }.context("LOOP_CTL_GET_FREE")?;
            let path = format!("/dev/loop{number}");
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_DIRECT)
                .open(&path)
                .context(path)?;
            let config = LoopConfig {
                fd: backing.as_raw_fd() as u32,
                block_size: PAGE as u32,
                info: LoopInfo {
                    numbers: [0; 5],
                    number: 0,
                    encryption: [0; 2],
                    flags: AUTOCLEAR,
                    names: [0; 160],
                    init: [0; 2],
                },
                reserved: [0; 8],
            };
            // SAFETY: The structure is what the call expects.
            match unsafe { loop_configure(file.as_raw_fd(), &config) } {
                Ok(_) => {
                    disk = Some(file);
                    Ok(true)
                }
                Err(Errno::EBUSY) => Ok(false),
                Err(errno) => Err(errno).context("LOOP_CONFIGURE"),
            }
        })?;
        Ok(Self {
            file: disk.context("no loop device")?,
            backing,
            pages,
        })
    }

    /// What is on it.
    pub fn content(&self) -> Result<Vec<u8>> {
        let mut content = vec![0; self.pages * PAGE];
        self.backing
            .read_exact_at(&mut content, 0)
            .context("the disk's memory")?;
        Ok(content)
    }
}
