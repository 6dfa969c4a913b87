//! The kernel's log.

use std::fs::File;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::Context;
use anyhow::Result;

/// What a line looks like that reports a fault of the kernel.
const REPORTS: [&str; 22] = [
    "BUG:",
    "kernel BUG at",
    "WARNING:",
    "Oops",
    "general protection fault",
    "KASAN:",
    "UBSAN:",
    "possible circular locking dependency",
    "possible recursive locking",
    "inconsistent lock state",
    "suspicious RCU usage",
    "blocked for more than",
    "soft lockup",
    "hard LOCKUP",
    "rcu_preempt detected stalls",
    "Bad page state",
    "Bad rss-counter",
    "refcount_t:",
    "unreferenced object",
    "list_del corruption",
    "pagealloc: ",
    "this is a bug in ksm_rs",
];

/// The log from a certain moment on.
#[derive(Debug)]
pub struct Log(File);

impl Log {
    /// The log from now on.
    pub fn from_now() -> Result<Self> {
        let mut log = Self::from_boot()?;
        log.0.seek(SeekFrom::End(0))?;
        Ok(log)
    }

    /// The log from the oldest line on that is still there.
    pub fn from_boot() -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .context("/dev/kmsg")?;
        Ok(Self(file))
    }

    /// The lines that were added since the last call.
    pub fn lines(&mut self) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(0) => return Ok(lines),
                Ok(len) => {
                    let text = String::from_utf8_lossy(&record[..len]);
                    // "level,sequence,time,flags;message", then lines of "key=value" that begin with a space.
                    if let Some((_, message)) = text.split_once(';') {
                        lines.push(message.lines().next().unwrap_or_default().to_owned());
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(lines),
                // The log was faster than we: some records were overwritten. Go on with the oldest that is left.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) => return Err(error).context("reading /dev/kmsg"),
            }
        }
    }

    /// The lines added since the last call that report a fault of the kernel.
    pub fn reports(&mut self) -> Result<Vec<String>> {
        let is_report = |line: &String| REPORTS.iter().any(|report| line.contains(report));
        Ok(self.lines()?.into_iter().filter(is_report).collect())
    }
}
