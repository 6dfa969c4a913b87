//! Several scanning threads, which only the module has.

use std::time::Duration;

use anyhow::Result;

use crate::memory::Content;
use crate::memory::PAGES_PER_MIB;
use crate::memory::Shape;
use crate::record::Metric;
use crate::record::Side;
use crate::session::Session;
use crate::victim::Spec;
use crate::victim::Victim;

/// Measures how long a pass over eight processes takes, with one thread and with two.
pub fn run(session: &mut Session) -> Result<()> {
    let mib = session.pick(512, 128);
    session.note(format!("{mib} MiB in eight processes"));
    let pages = mib * PAGES_PER_MIB;
    let mut missing = false;
    session.alternate(|turn| {
        if turn.side() == Side::KsmRs && !turn.ksm.has("scan_threads") {
            missing = true;
        }
        let counts: &[u64] = if turn.ksm.has("scan_threads") {
            &[1, 2]
        } else {
            &[1]
        };
        let mut victims = Victim::several(
            8,
            Spec {
                shape: Shape::Dense,
                content: Content::Unique,
                seed: u64::from(turn.round),
                first: 0,
                pages,
            },
        )?;
        for &count in counts {
            turn.ksm.stop()?;
            if turn.ksm.has("scan_threads") {
                turn.ksm.write("scan_threads", count)?;
                turn.ksm.find_threads()?;
            }
            let spent = turn.ksm.measure(3, Duration::from_millis(300))?;
            let case = if count == 1 { "1 thread" } else { "2 threads" };
            turn.record(case, None, Metric::WallMsPerPass, spent.wall_ms_per_pass());
            turn.record(case, None, Metric::CpuMsPerPass, spent.cpu_ms_per_pass());
        }
        turn.ksm.stop()?;
        if turn.side() == Side::Stock {
            // What the machine's memory allows: loops that read, as many at a time as there are threads.
            for (case, readers) in [("1 thread", 1), ("2 threads", 2)] {
                let ns = Victim::read_side_by_side(&mut victims[..readers])?;
                let pages_a_ns: f64 = ns.iter().map(|ns| 1.0 / ns).sum();
                let ms = pages as f64 / pages_a_ns / 1e6;
                turn.record_of(Side::Limit, case, None, Metric::WallMsPerPass, ms);
            }
        }
        drop(victims);
        turn.clear()
    })?;
    if missing {
        session.note("this module has no scan_threads");
    }
    Ok(())
}
