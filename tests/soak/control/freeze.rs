//! The system is suspended as far as a virtual machine bears it: every task is frozen and thawed.

use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use ksm_e2e::freezer::Freezer;

use crate::actor::Stage;

/// How long tasks may take to freeze, on a fast kernel: dozens of them want a CPU, and some are in the middle of a system
/// call that takes long, compacting all memory for instance. One that waits for what is frozen waits for ever.
const LIMIT: Duration = Duration::from_secs(60);

/// See the module.
pub fn freeze(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(16..256);
    let region = stage.mergeable(pages)?;
    for _ in 0..stage.rng.usize(1..4) {
        stage.let_merge(region)?;
        stage.paint_some(region, 20)?;
    }
    let freezer = Freezer::patient(LIMIT)?;
    for _ in 0..stage.rng.usize(1..3) {
        stage.doing("freezing all tasks");
        freezer.freeze(0).context("freezing all tasks")?;
        stage.check_all()?;
        stage.dally(100);
    }
    Ok(())
}
