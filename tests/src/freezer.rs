//! Suspending the system as far as the devices of a virtual machine bear it: all tasks are frozen and thawed.

use std::fs;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use crate::kmsg::Log;
use crate::wait;

const STATE: &str = "/sys/power/state";
const LEVEL: &str = "/sys/power/pm_test";
const LIMIT: &str = "/sys/power/pm_freeze_timeout";
const DELAY: &str = "/sys/module/suspend/parameters/pm_test_delay";

/// How long tasks may take to freeze, on a fast kernel: a quarter of what the kernel allows them otherwise.
const PATIENCE: Duration = Duration::from_secs(5);

fn read(path: &str) -> Result<String> {
    let text = fs::read_to_string(path)
        .with_context(|| format!("this test needs a kernel with PM_DEBUG: {path}"))?;
    // Of several values, the one in brackets counts.
    let value = text
        .split_once('[')
        .and_then(|(_, rest)| Some(rest.split_once(']')?.0))
        .unwrap_or(text.trim_end());
    Ok(value.to_owned())
}

fn write(path: &str, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("writing {text:?} to {path}"))
}

/// Suspends the system; what was changed for that is as it was when the value is dropped.
#[derive(Debug)]
pub struct Freezer {
    old: Vec<(&'static str, String)>,
}

impl Freezer {
    /// Prepares for suspending no further than to frozen tasks.
    pub fn new() -> Result<Self> {
        Self::patient(PATIENCE)
    }

    /// The same; tasks may take so long to freeze, on a fast kernel.
    pub fn patient(limit: Duration) -> Result<Self> {
        let mut freezer = Self { old: Vec::new() };
        let limit = limit * wait::slowness();
        for (path, value) in [
            (LEVEL, "freezer".to_owned()),
            (LIMIT, limit.as_millis().to_string()),
            (DELAY, "0".to_owned()),
        ] {
            freezer.old.push((path, read(path)?));
            write(path, &value)?;
        }
        Ok(freezer)
    }

    /// Freezes all tasks but the caller, keeps them so for some seconds, and thaws them. Returns how long the kernel's
    /// threads took to freeze.
    pub fn freeze(&self, seconds: u32) -> Result<Duration> {
        write(DELAY, &seconds.to_string())?;
        let mut log = Log::from_now()?;
        let result = write(STATE, "freeze");
        let lines = log.lines()?;
        let refused = |line: &&String| {
            line.contains("Freezing") && (line.contains("failed") || line.contains("aborted"))
        };
        if let Some(line) = lines.iter().find(refused) {
            return Err(result.err().unwrap_or_else(|| anyhow::anyhow!("refused")))
                .with_context(|| line.clone());
        }
        result?;
        // Freezing remaining freezable tasks completed (elapsed 0.004 seconds)
        let elapsed = lines.iter().find_map(|line| {
            let rest = line.strip_prefix("Freezing remaining freezable tasks completed")?;
            rest.split_whitespace().nth(1)?.parse().ok()
        });
        let elapsed: f64 = elapsed
            .with_context(|| format!("the log does not say that tasks were frozen: {lines:#?}"))?;
        ensure!(elapsed >= 0.0, "tasks were frozen within {elapsed} s");
        Ok(Duration::from_secs_f64(elapsed))
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        for (path, value) in &self.old {
            if let Err(error) = write(path, value) {
                eprintln!("{error:#}");
            }
        }
    }
}
