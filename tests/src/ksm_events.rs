//! The events of a producer of KSM pages, below `/sys/kernel/tracing`.

use std::cell::RefCell;
use std::fs;
use std::fs::File;
use std::io::ErrorKind;
use std::io::Read;
use std::os::fd::FromRawFd;
use std::os::fd::RawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use nix::errno::Errno;
use nix::mount::MsFlags;
use nix::mount::mount;

use crate::Ksm;

const ROOT: &str = "/sys/kernel/tracing";

/// The events that stock KSM has too, without the prefix.
pub const COMMON: [&str; 9] = [
    "start_scan",
    "stop_scan",
    "enter",
    "exit",
    "merge_one_page",
    "merge_with_ksm_page",
    "remove_ksm_page",
    "remove_rmap_item",
    "advisor",
];

/// The events that ksm_rs alone has.
pub const OURS: [&str; 2] = ["batch", "lookup"];

/// The folder of the events below `events`, which is a prefix of their names as well.
fn system(ksm: &Ksm) -> &'static str {
    if ksm.is_stock() { "ksm" } else { "ksm_rs" }
}

/// Makes sure that tracefs is there.
fn mounted() -> Result<()> {
    if !Path::new(ROOT).join("events").exists() {
        let none: Option<&str> = None;
        mount(none, ROOT, Some("tracefs"), MsFlags::empty(), none).context("mounting tracefs")?;
    }
    Ok(())
}

/// Whether the kernel knows of the events at all.
pub fn known(ksm: &Ksm) -> Result<bool> {
    mounted()?;
    Ok(Path::new(ROOT).join("events").join(system(ksm)).exists())
}

/// An event that was recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its name, without the prefix.
    pub name: String,
    text: String,
}

impl Event {
    /// The word behind `key` in the event's text.
    pub fn word(&self, key: &str) -> Result<&str> {
        let text = self.text.as_str();
        let behind = if let Some(rest) = text.strip_prefix(key) {
            rest.strip_prefix(' ')
        } else {
            text.split_once(&format!(" {key} ")).map(|(_, rest)| rest)
        };
        behind
            .and_then(|rest| rest.split_whitespace().next())
            .with_context(|| format!("no {key} in {self:?}"))
    }

    /// The number behind `key`.
    pub fn number<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(
        &self,
        key: &str,
    ) -> Result<T> {
        let word = self.word(key)?;
        word.parse()
            .with_context(|| format!("{key} of {self:?} is no number"))
    }

    /// Whether the event's text begins like this.
    pub fn begins_with(&self, beginning: &str) -> bool {
        self.text.starts_with(beginning)
    }
}

/// A buffer of its own for events; they are turned off, and it is removed, when the value is dropped.
#[derive(Debug)]
pub struct Trace {
    dir: PathBuf,
    system: &'static str,
    pipe: File,
    /// What was read, up to the last line that is complete.
    rest: RefCell<String>,
}

impl Trace {
    /// Records events of these names from now on.
    pub fn of(ksm: &Ksm, names: &[&str]) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        mounted()?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir =
            Path::new(ROOT).join(format!("instances/ksm-e2e-{}-{number}", std::process::id()));
        fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
        fs::write(dir.join("buffer_size_kb"), "2048")?;
        let pipe = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(dir.join("trace_pipe"))
            .context("trace_pipe")?;
        let trace = Self {
            dir,
            system: system(ksm),
            pipe,
            rest: RefCell::default(),
        };
        for name in names {
            trace.set(name, true)?;
        }
        Ok(trace)
    }

    fn events_dir(&self) -> PathBuf {
        self.dir.join("events").join(self.system)
    }

    fn switch(&self, name: &str) -> PathBuf {
        let event = format!("{}_{name}", self.system);
        self.events_dir().join(event).join("enable")
    }

    /// Turns an event on or off.
    pub fn set(&self, name: &str, on: bool) -> Result<()> {
        let path = self.switch(name);
        fs::write(&path, if on { "1" } else { "0" }).with_context(|| path.display().to_string())
    }

    /// Whether an event is on. An error if there is no such event.
    pub fn is_on(&self, name: &str) -> Result<bool> {
        let path = self.switch(name);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(text.starts_with('1'))
    }

    /// Whether the buffer knows of the events at all.
    pub fn knows_events(&self) -> bool {
        self.events_dir().exists()
    }

    /// The events recorded since the last call, in order.
    pub fn events(&self) -> Result<Vec<Event>> {
        let mut text = self.rest.borrow_mut();
        let mut bytes = [0; 16384];
        loop {
            match (&self.pipe).read(&mut bytes) {
                Ok(0) => break,
                Ok(read) => text.push_str(std::str::from_utf8(&bytes[..read])?),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("reading trace_pipe"),
            }
        }
        let complete = text.rfind('\n').map_or(0, |end| end + 1);
        let lines: String = text.drain(..complete).collect();
        lines.lines().map(|line| self.parse(line)).collect()
    }

    /// `ksmd_rs-75 [001] ..... 1.234567: ksm_rs_start_scan: seq 0 rmap size 0`
    fn parse(&self, line: &str) -> Result<Event> {
        ensure!(!line.contains("LOST"), "events were lost: {line}");
        let event = line
            .split_once(&format!(": {}_", self.system))
            .and_then(|(_, event)| event.split_once(": "));
        let Some((name, text)) = event else {
            bail!("not an event of {}: {line:?}", self.system)
        };
        Ok(Event {
            name: name.to_owned(),
            text: text.to_owned(),
        })
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        if let Ok(null) = File::open("/dev/null") {
            // An instance cannot be removed while its pipe is open.
            self.pipe = null;
        }
        if let Err(error) = fs::remove_dir(&self.dir) {
            eprintln!("removing {}: {error}", self.dir.display());
        }
    }
}

/// How often an event occurred in a thread, as `perf stat` counts.
#[derive(Debug)]
pub struct PerfCount(File);

impl PerfCount {
    /// Counts from now on.
    pub fn of(ksm: &Ksm, name: &str, thread: i32) -> Result<Self> {
        mounted()?;
        let system = system(ksm);
        let path = format!("{ROOT}/events/{system}/{system}_{name}/id");
        let id: u64 = fs::read_to_string(&path)
            .context(path)?
            .trim_end()
            .parse()?;
        // `struct perf_event_attr` of the first version: type (PERF_TYPE_TRACEPOINT), size, config; all else is 0.
        let mut attributes = [0_u64; 8];
        attributes[0] = 2 | 64 << 32;
        attributes[1] = id;
        // SAFETY: The attributes outlive the call, and are as large as they say.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                attributes.as_ptr(),
                thread,
                -1,
                -1,
                0,
            )
        };
        let fd = Errno::result(fd).context("perf_event_open")?;
        // SAFETY: The descriptor was just opened and belongs to nobody else.
        Ok(Self(unsafe { File::from_raw_fd(fd as RawFd) }))
    }

    /// The count.
    pub fn read(&self) -> Result<u64> {
        let mut count = [0; 8];
        let read = nix::unistd::read(&self.0, &mut count).context("reading the counter")?;
        ensure!(read == 8, "a counter of {read} bytes");
        Ok(u64::from_le_bytes(count))
    }
}
