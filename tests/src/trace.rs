//! The kernel's own tracing.

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;
use anyhow::Result;

const INSTANCES: &str = "/sys/kernel/tracing/instances";

fn write(path: PathBuf, text: &str) -> Result<()> {
    fs::write(&path, text).with_context(|| format!("writing {text:?} to {}", path.display()))
}

/// A trace buffer of the test's own; it is removed when the value is dropped.
#[derive(Debug)]
pub struct Trace(PathBuf);

impl Trace {
    /// A buffer that records nothing yet.
    pub fn new() -> Result<Self> {
        let dir = Path::new(INSTANCES).join(format!("ksm-e2e-{}", std::process::id()));
        fs::create_dir(&dir)
            .with_context(|| format!("this test needs tracefs: {}", dir.display()))?;
        let trace = Self(dir);
        // One order for what happens on all CPUs.
        write(trace.0.join("trace_clock"), "global")?;
        Ok(trace)
    }

    /// Records an event, `sched/sched_switch` for instance, if the filter says so.
    pub fn event(&self, event: &str, filter: Option<&str>) -> Result<()> {
        let dir = self.0.join("events").join(event);
        if let Some(filter) = filter {
            write(dir.join("filter"), filter)?;
        }
        write(dir.join("enable"), "1")
    }

    /// Has something done with an event, `stacktrace if result != 0` for instance.
    pub fn trigger(&self, event: &str, trigger: &str) -> Result<()> {
        let dir = self.0.join("events").join(event);
        write(dir.join("trigger"), trigger)
    }

    /// Sets an option of what records look like.
    pub fn option(&self, name: &str, on: bool) -> Result<()> {
        write(
            self.0.join("options").join(name),
            if on { "1" } else { "0" },
        )
    }

    /// Records no more events.
    pub fn silence(&self) -> Result<()> {
        write(self.0.join("events/enable"), "0")
    }

    /// Records calls of one function.
    pub fn function(&self, name: &str) -> Result<()> {
        write(self.0.join("set_ftrace_filter"), name)?;
        write(self.0.join("current_tracer"), "function")
    }

    /// What was recorded, in order.
    pub fn lines(&self) -> Result<Vec<String>> {
        let text = fs::read_to_string(self.0.join("trace"))?;
        let records = text.lines().filter(|line| !line.starts_with('#'));
        Ok(records.map(str::to_owned).collect())
    }

    /// What was recorded, in order; it is forgotten then.
    pub fn take(&self) -> Result<Vec<String>> {
        let lines = self.lines()?;
        write(self.0.join("trace"), "")?;
        Ok(lines)
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}
