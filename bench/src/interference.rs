//! What a process notices of being scanned flat out: how long its page faults, mmaps and munmaps take. And what the
//! scanner does to it: how long it holds the mmap lock at a time.

use std::time::Duration;

use anyhow::Result;

use crate::holds;
use crate::holds::Holds;
use crate::holds::Lock;
use crate::memory::Content;
use crate::memory::PAGES_PER_MIB;
use crate::memory::Shape;
use crate::probe::Latencies;
use crate::record::Metric;
use crate::record::Side;
use crate::session::Session;
use crate::session::Turn;
use crate::victim::Spec;
use crate::victim::Victim;

/// The only case.
const CASE: &str = "latency";

/// Times the process while nobody scans, then while its pages are scanned again and again.
pub fn run(session: &mut Session) -> Result<()> {
    let mib = session.pick(256, 64);
    let time = Duration::from_millis(session.pick(4000, 1000));
    session.note(format!("{mib} MiB; each figure is of {time:?}"));
    session.alternate(|turn| {
        let mut victim = Victim::spawn(Spec {
            shape: Shape::Dense,
            content: Content::Unique,
            seed: u64::from(turn.round),
            first: 0,
            pages: mib * PAGES_PER_MIB,
        })?;
        if turn.side() == Side::Stock {
            let idle = victim.probe(time)?;
            record(turn, Side::Idle, idle);
        }
        turn.ksm.start()?;
        turn.ksm.passes(3)?;
        let scanned = victim.probe(time)?;
        let holds = holds::measure(Lock::Mmap, &turn.ksm.threads())?;
        turn.ksm.stop()?;
        record(turn, turn.side(), scanned);
        record_holds(turn, CASE, holds);
        drop(victim);
        turn.clear()
    })
}

/// Times how long the locks of page tables are held, in pages that stay as they are and in pages that are merged, where a
/// µs is a thousand instructions.
pub fn table_locks(session: &mut Session) -> Result<()> {
    let mib = session.pick(64, 16);
    session.note(format!(
        "{mib} MiB; 1 µs is 1000 instructions, some of them the probes'"
    ));
    session.alternate(|turn| {
        for (case, content) in [
            ("unique pages", Content::Unique),
            ("pages that are merged", Content::Groups(16)),
        ] {
            let victim = Victim::spawn(Spec {
                shape: Shape::Dense,
                content,
                seed: u64::from(turn.round),
                first: 0,
                pages: mib * PAGES_PER_MIB,
            })?;
            turn.ksm.start()?;
            // The first pass merges nothing.
            turn.ksm
                .passes(if content == Content::Unique { 3 } else { 1 })?;
            let holds = holds::measure(Lock::Table, &turn.ksm.threads())?;
            turn.ksm.stop()?;
            record_holds(turn, case, holds);
            drop(victim);
            turn.clear()?;
        }
        Ok(())
    })
}

fn record_holds(turn: &mut Turn<'_>, case: &str, holds: Holds) {
    turn.record(case, None, Metric::HoldP50, holds.each.p50);
    turn.record(case, None, Metric::HoldP99, holds.each.p99);
    turn.record(case, None, Metric::HoldMax, holds.each.max);
    turn.record(case, None, Metric::HoldShare, holds.percent);
}

fn record(turn: &mut Turn<'_>, side: Side, latencies: Latencies) {
    let Latencies {
        fault,
        mmap,
        munmap,
    } = latencies;
    for (metric, value) in [
        (Metric::FaultP50, fault.p50),
        (Metric::FaultP99, fault.p99),
        (Metric::FaultMax, fault.max),
        (Metric::MmapP50, mmap.p50),
        (Metric::MmapP99, mmap.p99),
        (Metric::MmapMax, mmap.max),
        (Metric::MunmapP50, munmap.p50),
        (Metric::MunmapP99, munmap.p99),
        (Metric::MunmapMax, munmap.max),
    ] {
        turn.record_of(side, CASE, None, metric, value);
    }
}
