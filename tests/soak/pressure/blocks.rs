//! Blocks of memory that go offline and come back.

use std::fs;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use ksm_e2e::Region;
use ksm_e2e::hotplug;
use ksm_e2e::hotplug::Block;
use ksm_e2e::memory;
use ksm_e2e::memory::Mapping;
use ksm_e2e::numa;
use ksm_e2e::procfs;
use ksm_e2e::wait;
use nix::errno::Errno;

use super::feats;
use super::poison;
use crate::actor::Stage;

/// How long the kernel may try to empty a block, in seconds: it would try for ever if a page is pinned, and nothing is merged
/// meanwhile. Short ones end many attempts half way, the long one lets it succeed on a machine that has much to do.
const LIMITS: [u64; 3] = [2, 5, 15];

/// The most that the slowest machine gets: who waits for the kernel's own hold on memory counts as hung after four minutes.
const MOST: Duration = Duration::from_secs(60);

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(100);

/// What the kernel may say when it cannot empty a block. It also says EINTR, to the freezer, upon which `fs::write` tries again.
const NOT_OFFLINE: [Errno; 3] = [Errno::EAGAIN, Errno::EBUSY, Errno::ENOMEM];

/// The block that one of the region's pages is in, if it can go offline.
fn block_of(region: Region, blocks: &[Block]) -> Result<Option<Block>> {
    let entries = procfs::map_entries(std::process::id() as i32, region)?;
    for pfn in entries.into_iter().filter_map(procfs::MapEntry::pfn) {
        let block = Block::of(pfn)?;
        if blocks.contains(&block) {
            return Ok(Some(block));
        }
    }
    Ok(None)
}

/// A block, if possible one with merged memory in it, is emptied while others use it.
pub fn take_offline_and_back(stage: &mut Stage) -> Result<()> {
    // A block with a bad page in it could not come back.
    let _nothing_goes_bad = poison::claim()?;
    let blocks = hotplug::movable_blocks()?;
    let nodes = numa::require_nodes()?;
    let node = *stage.rng.choice(&nodes).context("nodes")?;
    let pages = stage.rng.usize(64..512);
    let region = stage.map(Mapping::pages(pages).on_node(node))?;
    stage.paint(region)?;
    memory::advise(region, libc::MADV_MERGEABLE)?;
    stage.let_merge(region)?;
    let ours = block_of(region, &blocks)?;
    let any = stage.rng.choice(&blocks).copied();
    let Some(block) = ours.or(any) else {
        bail!(
            "the soak needs blocks of movable memory: movablecore= on the kernel's command line; of {blocks:?} none is"
        );
    };
    if !block.is_movable()? {
        // It has a page that is bad, or is no page.
        return stage.check_all();
    }
    let keep = block.keep();
    stage.doing(&format!("taking {block:?} offline"));
    let seconds = *stage.rng.choice(&LIMITS).context("limits")?;
    let limit = (Duration::from_secs(seconds) * wait::slowness()).min(MOST);
    let begun = Instant::now();
    let mut kid = stage.fork(|_| {
        loop {
            match fs::write(block.state_file(), "offline") {
                Ok(()) => return Ok(()),
                Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                    Some(errno) if NOT_OFFLINE.contains(&errno) => {}
                    _ => return Err(error).context("taking a block offline"),
                },
            }
            if begun.elapsed() > limit {
                return Ok(());
            }
            thread::sleep(PAUSE);
        }
    })?;
    while kid.runs()? && begun.elapsed() < limit && !stage.over() {
        stage.check_all()?;
    }
    if kid.runs()? {
        kid.kill()?;
    } else {
        kid.join()?;
    }
    stage.check_all()?;
    if block.state()? == "offline" {
        feats::note(feats::OFFLINE)?;
        stage.doing("using what is left of memory");
        stage.paint_some(region, 30)?;
        stage.let_merge(region)?;
        stage.check_all()?;
        stage.doing("bringing the block back");
        keep.online()?;
    }
    stage.check_all()
}
