//! What a native kernel does not have: NUMA nodes and huge pages.
//!
//! Counted in instructions, which do not know of caches: how often something is done shows, not how long it takes.

use std::time::Duration;

use anyhow::Result;

use crate::memory::Content;
use crate::memory::PAGES_PER_MIB;
use crate::memory::Shape;
use crate::record::Metric;
use crate::session::Session;
use crate::session::Turn;
use crate::victim::Spec;
use crate::victim::Victim;

/// MiB that are scanned: an emulated CPU is slow.
const MIB: usize = 64;

/// Memory on two nodes, merged on each by itself.
pub fn numa(session: &mut Session) -> Result<()> {
    session.note(format!("{MIB} MiB in two processes, in turns on each node"));
    session.alternate(|turn| {
        turn.ksm.write("merge_across_nodes", 0)?;
        both(turn, Shape::Interleaved)
    })
}

/// Memory in huge pages, which are split where a part of them is merged.
pub fn huge(session: &mut Session) -> Result<()> {
    session.note(format!("{MIB} MiB in two processes"));
    session.alternate(|turn| both(turn, Shape::Huge))
}

/// Steady state over unique pages; then fresh pages, of which a sixteenth are equal, until these are merged.
fn both(turn: &mut Turn<'_>, shape: Shape) -> Result<()> {
    let pages = MIB * PAGES_PER_MIB;
    let start = |content| {
        Victim::several(
            2,
            Spec {
                shape,
                content,
                seed: 1,
                first: 0,
                pages,
            },
        )
    };
    let victims = start(Content::Unique)?;
    let spent = turn.ksm.measure(3, Duration::ZERO)?;
    turn.ksm.stop()?;
    let each = spent.ns_per_page(pages);
    turn.record("unique", None, Metric::InstructionsPerPage, each);
    drop(victims);
    turn.clear()?;

    let victims = start(Content::Groups(16))?;
    let (_, all) = turn.ksm.merge(pages as u64 * 999 / 1000)?;
    turn.ksm.stop()?;
    let each = all.instructions() / turn.ksm.merged()? as f64;
    turn.record("16 groups", None, Metric::InstructionsPerMerged, each);
    drop(victims);
    turn.clear()
}
