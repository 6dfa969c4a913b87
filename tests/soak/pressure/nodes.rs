//! Pages that move from one NUMA node to another: by order, and as the kernel finds them used from afar.

use std::fs;

use anyhow::Context;
use anyhow::Result;
use ksm_e2e::Region;
use ksm_e2e::memory;
use ksm_e2e::numa;
use nix::errno::Errno;

use crate::actor::Stage;

const BALANCING: &str = "/proc/sys/kernel/numa_balancing";
const SCHEDULER: &str = "/sys/kernel/debug/sched/numa_balancing";

/// What the kernel may say to a request to move pages: somebody else uses them, or there is no room.
const NOT_MOVED: [Errno; 4] = [Errno::EAGAIN, Errno::EBUSY, Errno::EIO, Errno::ENOMEM];

fn is_harmless(error: &anyhow::Error) -> bool {
    (error.downcast_ref()).is_some_and(|errno| NOT_MOVED.contains(errno))
}

/// Moves the region, or all that this process has, to some node.
fn move_somewhere(stage: &mut Stage, region: Region, nodes: &[u32]) -> Result<()> {
    let pid = std::process::id() as i32;
    let node = *stage.rng.choice(nodes).context("a machine with memory")?;
    let from = *stage.rng.choice(nodes).context("a machine with memory")?;
    let moved = match stage.rng.u32(..3) {
        0 => {
            stage.doing("move_pages");
            numa::move_to(pid, region, node).map(drop)
        }
        1 => {
            stage.doing("migrate_pages");
            numa::migrate(pid, from, node)
        }
        _ => {
            stage.doing("mbind");
            numa::bind(region, node, true).map_err(Into::into)
        }
    };
    match moved {
        Err(error) if !is_harmless(&error) => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Two processes that have the same pages move them, each as it likes.
pub fn migrate(stage: &mut Stage) -> Result<()> {
    let nodes = numa::require_nodes()?;
    let pages = stage.rng.usize(32..256);
    let region = stage.mergeable(pages)?;
    stage.let_merge(region)?;
    let work = |stage: &mut Stage| -> Result<()> {
        for _ in 0..stage.rng.usize(4..12) {
            let first = stage.rng.usize(..region.pages);
            let part = region.part(first, stage.rng.usize(1..=region.pages - first));
            move_somewhere(stage, part, &nodes)?;
            if stage.rng.u32(..4) == 0 {
                stage.paint_some(part, 10)?;
            }
            stage.check(part)?;
        }
        stage.check_all()
    };
    let kid = stage.fork(work)?;
    work(stage)?;
    kid.join()
}

/// Lets this process run on one CPU only. That may be offline now: then it runs where it did.
fn run_on(cpu: usize) -> Result<()> {
    // SAFETY: A set of CPUs is plain bits, all of which may be zero.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: The set is this function's own; numbers past its end are ignored.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: The set outlives the call.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) };
    match Errno::result(result) {
        Ok(_) | Err(Errno::EINVAL) => Ok(()),
        Err(errno) => Err(errno).context("sched_setaffinity"),
    }
}

/// A process that goes from CPU to CPU, and whose pages follow it.
pub fn balance(stage: &mut Stage) -> Result<()> {
    for (file, text) in [
        ("scan_delay_ms", "1"),
        ("scan_period_min_ms", "10"),
        ("scan_period_max_ms", "100"),
    ] {
        let path = format!("{SCHEDULER}/{file}");
        fs::write(&path, text).context(path)?;
    }
    let on = if stage.rng.u32(..8) == 0 { "0" } else { "1" };
    fs::write(BALANCING, on).context(BALANCING)?;
    // In a child: the CPU that it is bound to goes with it.
    let kid = stage.fork(|stage| {
        let cpus = std::thread::available_parallelism()?.get();
        let pages = stage.rng.usize(64..512);
        let region = stage.mergeable(pages)?;
        stage.let_merge(region)?;
        for _ in 0..6 {
            run_on(stage.rng.usize(..cpus))?;
            for _ in 0..stage.rng.usize(2..6) {
                stage.check(region)?;
            }
            stage.paint_some(region, 10)?;
        }
        memory::advise(region, libc::MADV_UNMERGEABLE)?;
        stage.check_all()
    })?;
    kid.join()
}
