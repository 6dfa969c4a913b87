//! Scanning memory in which nothing happens any more: what every pass costs for ever after.

use std::time::Duration;

use anyhow::Result;

use crate::memory::Content;
use crate::memory::PAGES_PER_MIB;
use crate::memory::Place;
use crate::memory::Shape;
use crate::record::Metric;
use crate::record::Side;
use crate::session::Session;
use crate::session::Turn;
use crate::victim::Spec;
use crate::victim::Victim;

/// Passes until nothing changes: the first looks, the second compares.
const WARM_UP: u64 = 3;

/// CPU time that is measured at the least.
const LEAST: Duration = Duration::from_millis(300);

/// Pages that differ, in growing amounts.
pub fn unique(session: &mut Session) -> Result<()> {
    let room = session.room_mib();
    let wanted: &[usize] = session.pick(&[64, 128, 256, 512, 1024, 2048], &[64, 128]);
    let sizes: Vec<usize> = wanted.iter().copied().filter(|&mib| mib <= room).collect();
    if let Some(missing) = wanted.get(sizes.len()) {
        session.note(format!(
            "sizes from {missing} MiB on do not fit the machine's memory"
        ));
    }
    session.alternate(|turn| {
        for mib in turn.rotate(&sizes) {
            measure(
                turn,
                &format!("{mib} MiB"),
                Some(mib as f64),
                mib,
                Content::Unique,
            )?;
        }
        Ok(())
    })
}

/// Pages that are equal but for eight bytes: the worst case for trees that are ordered by content.
pub fn near(session: &mut Session) -> Result<()> {
    let mib = session.pick(256, 64);
    session.note(format!("{mib} MiB"));
    let cases = [
        ("random", Content::Unique),
        ("first 8 bytes differ", Content::Near(Place::First)),
        ("middle 8 bytes differ", Content::Near(Place::Middle)),
        ("last 8 bytes differ", Content::Near(Place::Last)),
    ];
    session.alternate(|turn| {
        for (case, content) in turn.rotate(&cases) {
            measure(turn, case, None, mib, content)?;
        }
        Ok(())
    })
}

/// Scans memory of one process, and reads it for comparison.
fn measure(
    turn: &mut Turn<'_>,
    case: &str,
    x: Option<f64>,
    mib: usize,
    content: Content,
) -> Result<()> {
    let pages = mib * PAGES_PER_MIB;
    let mut victim = Victim::spawn(Spec {
        shape: Shape::Dense,
        content,
        seed: u64::from(turn.round),
        first: 0,
        pages,
    })?;
    let spent = turn.ksm.measure(WARM_UP, LEAST)?;
    turn.ksm.stop()?;
    turn.record(case, x, Metric::NsPerPage, spent.ns_per_page(pages));
    if turn.side() == Side::Stock {
        let limit = victim.read()?;
        turn.record_of(Side::Limit, case, x, Metric::NsPerPage, limit);
    }
    drop(victim);
    turn.clear()
}

/// Memory that is all merged.
pub fn merged(session: &mut Session) -> Result<()> {
    let mib = session.pick(256, 64);
    session.note(format!("{mib} MiB in four processes"));
    let pages = mib * PAGES_PER_MIB;
    let cases = [
        ("all equal", Content::Groups(1)),
        ("16 groups", Content::Groups(16)),
        ("pairs", Content::Groups(pages as u64 / 2)),
    ];
    session.alternate(|turn| {
        for (case, content) in turn.rotate(&cases) {
            let victims = Victim::several(
                4,
                Spec {
                    shape: Shape::Dense,
                    content,
                    seed: u64::from(turn.round),
                    first: 0,
                    pages,
                },
            )?;
            // A page that is alone after the rest have filled their shares of max_page_sharing stays alone.
            turn.ksm.merge(pages as u64 * 999 / 1000)?;
            let spent = turn.ksm.measure(WARM_UP, LEAST)?;
            turn.ksm.stop()?;
            turn.record(case, None, Metric::NsPerPage, spent.ns_per_page(pages));
            turn.record(case, None, Metric::CpuMsPerPass, spent.cpu_ms_per_pass());
            drop(victims);
            turn.clear()?;
        }
        Ok(())
    })
}
