//! CPUs go offline and come back.

use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::wait;

use crate::actor::PATIENCE;
use crate::actor::Stage;

const CPUS: &str = "/sys/devices/system/cpu";

/// The files that take CPUs offline: the first CPU has none.
fn switches() -> Result<Vec<PathBuf>> {
    let mut switches = Vec::new();
    for entry in fs::read_dir(CPUS).context(CPUS)? {
        let path = entry?.path().join("online");
        // The directory has a list of that name, and others that are no CPUs.
        let is_cpu = path.parent().is_some_and(|dir| {
            let name = dir.file_name().unwrap_or_default().to_string_lossy();
            let number = name.strip_prefix("cpu").unwrap_or_default();
            number.parse::<u32>().is_ok()
        });
        if is_cpu && path.exists() {
            switches.push(path);
        }
    }
    switches.sort();
    ensure!(!switches.is_empty(), "no CPU can go offline");
    Ok(switches)
}

/// Switches a CPU; not while the system is being suspended, which passes.
fn switch(file: &PathBuf, to: &str) -> Result<()> {
    wait::until("a CPU is switched", PATIENCE, || {
        match fs::write(file, to) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(false),
            Err(error) => Err(error).with_context(|| format!("{to} to {}", file.display())),
        }
    })
}

/// Fails if a CPU is offline.
pub fn expect_all_online() -> Result<()> {
    for file in switches()? {
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        ensure!(text.trim_end() == "1", "{} is {text:?}", file.display());
    }
    Ok(())
}

/// See the module.
pub fn take_offline_and_back(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(16..128);
    let region = stage.mergeable(pages)?;
    stage.let_merge(region)?;
    let switches = switches()?;
    for _ in 0..stage.rng.usize(1..2 * switches.len() + 1) {
        let file = stage.rng.choice(&switches).context("a CPU")?;
        stage.doing("taking a CPU offline");
        switch(file, "0")?;
        stage.dally(100);
        stage.paint_some(region, 20)?;
        stage.check(region)?;
        if stage.rng.bool() {
            switch(file, "1")?;
        }
    }
    stage.let_merge(region)?;
    for file in &switches {
        stage.doing("bringing the CPUs back");
        switch(file, "1")?;
    }
    stage.check_all()
}
