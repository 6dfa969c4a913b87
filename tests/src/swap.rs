//! Swap on a compressed RAM disk, and a control group to push processes' memory there.

use std::ffi::CString;
use std::fs;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use nix::errno::Errno;

use crate::child::Child;
use crate::memory::PAGE;
use crate::memory::Region;
use crate::procfs;
use crate::wait;
use crate::wait::PATIENCE;

const DEVICE: &str = "/dev/zram0";
const DEVICE_DIR: &str = "/sys/block/zram0";
const GROUPS: &str = "/sys/fs/cgroup";

fn write(path: impl AsRef<Path>, text: &str) -> Result<()> {
    let path = path.as_ref();
    fs::write(path, text).with_context(|| format!("writing {text:?} to {}", path.display()))
}

/// The lines of `/proc/swaps`, without its headline.
pub fn in_use() -> Result<Vec<String>> {
    Ok(fs::read_to_string("/proc/swaps")?
        .lines()
        .skip(1)
        .map(str::to_owned)
        .collect())
}

/// Swap space on a zram device; it is turned off when the value is dropped.
#[derive(Debug)]
pub struct Swap {
    on: bool,
}

impl Swap {
    /// Turns on swap space of so many pages.
    pub fn on(pages: u32) -> Result<Self> {
        ensure!(
            Path::new(DEVICE_DIR).exists(),
            "this test needs zram: {DEVICE_DIR} is missing"
        );
        ensure!(in_use()?.is_empty(), "swap is on before the test begins");
        write(format!("{DEVICE_DIR}/reset"), "1")?;
        write(
            format!("{DEVICE_DIR}/disksize"),
            &(pages as usize * PAGE).to_string(),
        )?;
        let mut header = vec![0; PAGE];
        header[1024..1028].copy_from_slice(&1_u32.to_le_bytes());
        header[1028..1032].copy_from_slice(&(pages - 1).to_le_bytes());
        header[PAGE - 10..].copy_from_slice(b"SWAPSPACE2");
        let device = OpenOptions::new()
            .write(true)
            .open(DEVICE)
            .context(DEVICE)?;
        device.write_all_at(&header, 0)?;
        device.sync_all()?;
        drop(device);
        let path = CString::new(DEVICE)?;
        // SAFETY: The path is a C string that outlives the call.
        Errno::result(unsafe { libc::swapon(path.as_ptr(), 0) }).context("swapon")?;
        Ok(Self { on: true })
    }

    /// Reads everything back and turns the space off.
    pub fn off(mut self) -> Result<()> {
        self.turn_off()
    }

    /// Kilobytes in use.
    pub fn used_kb(&self) -> Result<u64> {
        let lines = in_use()?;
        let line = lines.first().context("swap is off")?;
        line.split_whitespace()
            .nth(3)
            .context("column Used of /proc/swaps")?
            .parse()
            .context("a number")
    }

    fn turn_off(&mut self) -> Result<()> {
        self.on = false;
        let path = CString::new(DEVICE)?;
        // Freezing all tasks interrupts it, but starts it anew no more than a signal does.
        // SAFETY: The path is a C string that outlives the call.
        while let Err(errno) = Errno::result(unsafe { libc::swapoff(path.as_ptr()) }) {
            ensure!(errno == Errno::EINTR, "swapoff: {errno}");
        }
        write(format!("{DEVICE_DIR}/reset"), "1")
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        if self.on
            && let Err(error) = self.turn_off()
        {
            eprintln!("turning swap off failed: {error:#}");
        }
    }
}

/// A control group; it is removed when the value is dropped, by when its processes must be gone or moved away.
#[derive(Debug)]
pub struct Group(PathBuf);

impl Group {
    /// Makes a group.
    pub fn new() -> Result<Self> {
        write(format!("{GROUPS}/cgroup.subtree_control"), "+memory")?;
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(format!("{GROUPS}/ksm-e2e-{}-{number}", std::process::id()));
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }

    /// Moves the calling process, and so its future children, into the group.
    pub fn enter(&self) -> Result<()> {
        write(self.0.join("cgroup.procs"), &std::process::id().to_string())
    }

    /// Moves a helper into the group.
    pub fn add(&self, child: &Child) -> Result<()> {
        write(self.0.join("cgroup.procs"), &child.pid().to_string())
    }

    /// Writes to one of the group's files, `memory.max` for instance.
    pub fn set(&self, file: &str, text: &str) -> Result<()> {
        write(self.0.join(file), text)
    }

    /// Moves a helper out of the group; what it has stays the group's.
    pub fn release(&self, child: &Child) -> Result<()> {
        write(format!("{GROUPS}/cgroup.procs"), &child.pid().to_string())
    }

    /// Lets the group have what it has now, and so many bytes more.
    pub fn fill_up(&self, room: usize) -> Result<()> {
        // What it could give up would make room later.
        self.reclaim(usize::MAX >> 1)?;
        let current: usize = fs::read_to_string(self.0.join("memory.current"))?
            .trim_end()
            .parse()?;
        write(self.0.join("memory.max"), &(current + room).to_string())
    }

    /// Lets the group have as much as it wants.
    pub fn unlimit(&self) -> Result<()> {
        write(self.0.join("memory.max"), "max")
    }

    /// How often something has happened to the group, by its name in `memory.events`.
    pub fn events(&self, name: &str) -> Result<u64> {
        let text = fs::read_to_string(self.0.join("memory.events"))?;
        procfs::field(&text, name)
    }

    /// Asks the kernel to take pages from the group; it may manage fewer.
    pub fn reclaim(&self, bytes: usize) -> Result<()> {
        self.ask(&format!("{bytes} swappiness=max"))
    }

    /// The same for pages of any kind, those among them that may be dropped without going to swap.
    pub fn reclaim_anything(&self, bytes: usize) -> Result<()> {
        self.ask(&bytes.to_string())
    }

    fn ask(&self, words: &str) -> Result<()> {
        let path = self.0.join("memory.reclaim");
        let mut file = OpenOptions::new()
            .write(true)
            .open(&path)
            .context("memory.reclaim")?;
        match file.write_all(words.as_bytes()) {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(()),
            other => other.context("memory.reclaim"),
        }
    }

    /// Takes pages from the group until none of these is in memory.
    pub fn swap_out(&self, regions: &[(&Child, Region)]) -> Result<()> {
        let regions: Vec<_> = (regions.iter())
            .map(|(child, region)| (child.pid(), *region))
            .collect();
        self.swap_out_of(&regions)
    }

    /// The same for any processes, by their ids.
    pub fn swap_out_of(&self, regions: &[(i32, Region)]) -> Result<()> {
        wait::until_or_explain("the pages are swapped out", PATIENCE, || {
            let mut left = 0;
            for (pid, region) in regions {
                for entry in procfs::map_entries(*pid, *region)? {
                    if entry.pfn().is_none() && !entry.swapped() {
                        bail!("a page of process {pid} is neither in memory nor in swap");
                    }
                    left += usize::from(!entry.swapped());
                }
            }
            if left == 0 {
                return Ok(None);
            }
            self.reclaim(left * PAGE)?;
            Ok(Some(format!("{left} pages are still in memory")))
        })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = write(
            format!("{GROUPS}/cgroup.procs"),
            &std::process::id().to_string(),
        );
        let gone = wait::until("the group is removed", PATIENCE, || {
            Ok(fs::remove_dir(&self.0).is_ok())
        });
        if let Err(error) = gone {
            eprintln!("{error:#}");
        }
    }
}
