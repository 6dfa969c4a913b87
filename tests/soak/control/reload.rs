//! The module goes and comes back, with pages merged and without; now and then the kernel's own KSM has a turn between.

use std::ffi::CString;
use std::fs;
use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::io::Write;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::ksm::STOCK;
use ksm_e2e::module;
use ksm_e2e::procfs;
use ksm_e2e::wait;
use nix::errno::Errno;
use nix::kmod::DeleteModuleFlags;
use nix::kmod::delete_module;

use super::knobs;
use crate::actor::PATIENCE;
use crate::actor::Stage;

/// Unloads, with signs of life. While somebody has one of the files open the kernel refuses.
fn unload(stage: &Stage) -> Result<()> {
    let name = CString::new(module::NAME)?;
    wait::until("the module is unloaded", PATIENCE, || {
        stage.beat();
        match delete_module(&name, DeleteModuleFlags::O_NONBLOCK) {
            Ok(()) => Ok(true),
            // The last one: when everybody is frozen and thawed.
            Err(Errno::EAGAIN | Errno::EBUSY | Errno::EINTR) => Ok(false),
            Err(errno) => bail!("rmmod: {errno}"),
        }
    })
}

/// Has a byte for each beginning, and for each end, of a turn of the kernel's own KSM.
const STOCK_TURNS: &str = "/tmp/ksm-soak-stock-turns";

/// How many times the kernel's own KSM has begun to merge, or ended: odd while it does.
pub fn stock_turns() -> Result<u64> {
    match fs::metadata(STOCK_TURNS) {
        Ok(file) => Ok(file.len()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error).context(STOCK_TURNS),
    }
}

fn note_stock_turn() -> Result<()> {
    let mut options = OpenOptions::new();
    let file = options.append(true).create(true).open(STOCK_TURNS);
    file.and_then(|mut file| file.write_all(b"."))
        .context(STOCK_TURNS)
}

/// The kernel's own KSM merges for a while, and gives everything back.
fn let_stock_merge(stage: &mut Stage, region: Region) -> Result<()> {
    stage.doing("letting the kernel's own KSM merge");
    let stock = Ksm::at(STOCK);
    let before = stock.remember()?;
    note_stock_turn()?;
    stock.scan_fast()?;
    stock.start()?;
    stage.let_merge(region)?;
    stage.check_all()?;
    // It may not find the memory for that at once.
    wait::until(
        "the kernel's own KSM has unmerged everything",
        PATIENCE,
        || {
            stage.beat();
            Ok(stock.unmerge().is_ok() && stock.read("pages_shared")? == 0)
        },
    )?;
    before.finish()?;
    note_stock_turn()?;
    stage.check_all()
}

/// See the module.
pub fn unload_and_load(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(64..512);
    let region = stage.mergeable(pages)?;
    for _ in 0..stage.rng.usize(1..4) {
        stage.let_merge(region)?;
        stage.check(region)?;
    }
    if stage.rng.u32(..4) == 0 {
        stage.doing("unmerging");
        // Nothing is merged when the module goes, unless somebody starts it again.
        let _ = stage.ksm.unmerge();
    }
    stage.doing("unloading");
    unload(stage)?;
    let left = procfs::ksm_pages(std::process::id() as i32, region)?;
    ensure!(left == 0, "{left} merged pages have outlived the module");
    stage.check_all()?;
    if stage.rng.u32(..4) == 0 {
        let_stock_merge(stage, region)?;
    }
    stage.doing("loading");
    let run = stage.rng.choice(["0", "1", "1", "1", "2"]).context("run")?;
    let drop_in = stage.rng.choice(["0", "1"]).context("drop_in")?;
    let parameters = format!("run={run} drop_in={drop_in}");
    wait::until("the module is loaded", PATIENCE, || {
        stage.beat();
        match module::try_load(&parameters)? {
            Ok(()) => Ok(true),
            // While memory goes offline; when everybody is frozen and thawed.
            Err(Errno::EBUSY | Errno::EINTR) => Ok(false),
            Err(errno) => bail!("loading the module with {parameters:?}: {errno}"),
        }
    })?;
    stage.dally(50);
    knobs::flat_out(&stage.ksm)?;
    stage.let_merge(region)?;
    stage.check_all()
}
