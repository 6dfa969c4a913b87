//! The host takes memory from the machine, and gives other memory back.
//!
//! The guest asks for that itself: QEMU's monitor is at the other end of a serial port (scripts/soak). So the
//! balloon follows the seed like everything else, and is empty when the actor ends.

use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::io::Read;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use ksm_e2e::memory::PAGE;
use ksm_e2e::procfs;
use ksm_e2e::wait;
use serde_json::Value;
use serde_json::json;

use crate::actor::PATIENCE;
use crate::actor::Stage;

/// Name of the serial port.
const PORT: &str = "ksm_rs.qmp";
const PORTS: &str = "/sys/class/virtio-ports";

/// Most memory that is taken, in pages: an eighth of what the machine has, so that nobody is killed for it.
const MOST: u64 = 96 * 1024;

/// QEMU's monitor.
struct Monitor {
    port: File,
    unread: Vec<u8>,
}

impl Monitor {
    fn open() -> Result<Self> {
        for entry in
            fs::read_dir(PORTS).context("the soak needs QEMU's monitor; see scripts/soak")?
        {
            let entry = entry?;
            let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim_end() == PORT {
                let path = PathBuf::from("/dev").join(entry.file_name());
                let port = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(&path)
                    .with_context(|| path.display().to_string())?;
                let unread = Vec::new();
                let mut monitor = Self { port, unread };
                // A monitor says nothing else before this; it may have been said to the one before.
                monitor
                    .execute(&json!({ "execute": "qmp_capabilities" }))
                    .ok();
                return Ok(monitor);
            }
        }
        bail!("no serial port is called {PORT}; see scripts/soak")
    }

    /// The next line that the monitor says.
    fn line(&mut self) -> Result<Value> {
        let mut line = None;
        wait::until("QEMU's monitor answers", PATIENCE, || {
            let mut buffer = [0; 4096];
            match self.port.read(&mut buffer) {
                Ok(len) => self.unread.extend(&buffer[..len]),
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(error) => return Err(error).context("reading what QEMU's monitor says"),
            }
            if let Some(end) = self.unread.iter().position(|&byte| byte == b'\n') {
                line = Some(self.unread.drain(..=end).collect::<Vec<u8>>());
            }
            Ok(line.is_some())
        })?;
        // The first one may be the rest of one that was begun when nobody listened.
        Ok(serde_json::from_slice(&line.unwrap_or_default()).unwrap_or_default())
    }

    /// Gives an order and returns what came of it. Greetings and events in between are not of interest.
    fn execute(&mut self, order: &Value) -> Result<Value> {
        self.port
            .write_all(format!("{order}\n").as_bytes())
            .context("telling QEMU's monitor")?;
        loop {
            let mut said = self.line()?;
            if let Some(error) = said.get("error") {
                bail!("QEMU's monitor answers {order} with {error}");
            }
            if let Some(result) = said.get_mut("return") {
                return Ok(result.take());
            }
        }
    }

    /// How much memory the machine has in all, in bytes.
    fn memory(&mut self) -> Result<u64> {
        let order = json!({ "execute": "query-memory-size-summary" });
        let answer = self.execute(&order)?;
        answer["base-memory"]
            .as_u64()
            .with_context(|| order.to_string())
    }

    /// Sets how much of it there should be outside of the balloon.
    fn set_memory(&mut self, bytes: u64) -> Result<()> {
        let order = json!({ "execute": "balloon", "arguments": { "value": bytes } });
        self.execute(&order).map(drop)
    }
}

fn pages() -> Result<u64> {
    procfs::vmstat("nr_balloon_pages")
}

/// Memory is taken, used by the host, and given back.
pub fn inflate_and_deflate(stage: &mut Stage) -> Result<()> {
    let mut monitor = Monitor::open()?;
    let all = monitor.memory()?;
    let count = stage.rng.usize(64..256);
    let region = stage.mergeable(count)?;
    stage.let_merge(region)?;
    for _ in 0..stage.rng.usize(1..4) {
        let wanted = stage.rng.u64(1..MOST);
        stage.doing("changing the size of the balloon");
        monitor.set_memory(all - wanted * PAGE as u64)?;
        let begun = Instant::now();
        // It goes on moving while the next size is set.
        while pages()? != wanted && begun.elapsed() < Duration::from_millis(500) * wait::slowness()
        {
            stage.check(region)?;
        }
        stage.paint_some(region, 10)?;
    }
    stage.doing("emptying the balloon");
    monitor.set_memory(all)?;
    wait::until_or_explain("the balloon is empty", PATIENCE, || {
        stage.beat();
        let left = pages()?;
        Ok((left != 0).then(|| format!("{left} pages are in it")))
    })?;
    stage.check_all()
}
