//! Memory that is hard to walk: pages far apart, pages in many VMAs, pages in many processes.

use std::fs;
use std::time::Duration;

use anyhow::Result;
use nix::sys::resource::Resource;
use nix::sys::resource::setrlimit;

use crate::memory::Content;
use crate::memory::PAGE;
use crate::memory::Shape;
use crate::record::Metric;
use crate::session::Session;
use crate::session::Turn;
use crate::victim::Spec;
use crate::victim::Victim;

/// Pages of each of the many processes.
const PAGES_EACH: usize = 8;

/// Measures a pass over each kind.
pub fn run(session: &mut Session) -> Result<()> {
    // A second range of protection for each VMA, and some for everything else.
    fs::write("/proc/sys/vm/max_map_count", "1000000")?;
    // A socket for each process.
    setrlimit(Resource::RLIMIT_NOFILE, 16_384, 16_384)?;
    let reserved_gib = session.pick(1024, 128);
    let one_in = 10_000;
    let vmas = session.pick(50_000, 5_000);
    let processes = session.pick(2_000, 100);
    let far = (reserved_gib << 30) / PAGE / one_in;
    session.note(format!(
        "{reserved_gib} GiB reserved, every {one_in}th page touched: {far} pages; {vmas} VMAs of a page; \
         {processes} processes of {PAGES_EACH} pages. The thread has a CPU to itself and never sleeps: a pass takes as \
         long as it takes CPU time"
    ));
    session.alternate(|turn| {
        measure(turn, "reserved", 1, far, Shape::OneIn(one_in))?;
        measure(turn, "VMAs", 1, vmas, Shape::Vmas)?;
        let pages = processes * PAGES_EACH;
        measure(turn, "processes", processes, pages, Shape::Dense)
    })
}

fn measure(
    turn: &mut Turn<'_>,
    case: &str,
    processes: usize,
    pages: usize,
    shape: Shape,
) -> Result<()> {
    let victims = Victim::several(
        processes,
        Spec {
            shape,
            content: Content::Unique,
            seed: u64::from(turn.round),
            first: 0,
            pages,
        },
    )?;
    let spent = turn.ksm.measure(3, Duration::from_millis(200))?;
    turn.ksm.stop()?;
    turn.record(case, None, Metric::CpuMsPerPass, spent.cpu_ms_per_pass());
    turn.record(case, None, Metric::NsPerPage, spent.ns_per_page(pages));
    drop(victims);
    turn.clear()
}
