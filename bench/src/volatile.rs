//! Memory of which a part is rewritten between two passes.
//!
//! Passes are made one at a time, so that every page is as old as it should be when it is looked at. *Unique*
//! pages are never equal to another, which shows what looking costs. *Pairs* are rewritten so that two are equal: who
//! merges a page that does not last has done wrong work, which shows in the copies that the next write makes.

use std::fs;

use anyhow::Context;
use anyhow::Result;

use crate::memory::Content;
use crate::memory::PAGES_PER_MIB;
use crate::memory::Shape;
use crate::record::Metric;
use crate::record::Side;
use crate::session::Session;
use crate::session::Turn;
use crate::victim::Spec;
use crate::victim::Victim;

/// Passes, with rewriting between them, until everything is as it will stay.
const WARM_UP: u64 = 4;

/// Passes that are measured.
const MEASURED: u64 = 4;

/// Rewrites 1, 10 and 50 % of the pages between passes.
pub fn run(session: &mut Session) -> Result<()> {
    let mib = session.pick(256, 64);
    session.note(format!("{mib} MiB"));
    let pages = mib * PAGES_PER_MIB;
    session.alternate(|turn| {
        for percent in [1, 10, 50] {
            measure(turn, percent, pages, "unique", Content::Unique, 1)?;
            let pairs = Content::Groups(pages as u64 / 2);
            measure(turn, percent, pages, "pairs", pairs, 2)?;
        }
        Ok(())
    })
}

fn measure(
    turn: &mut Turn<'_>,
    percent: u64,
    pages: usize,
    name: &str,
    content: Content,
    copies: u64,
) -> Result<()> {
    let case = format!("{percent} % {name}");
    let mut victim = Victim::spawn(Spec {
        shape: Shape::Dense,
        content,
        seed: u64::from(turn.round),
        first: 0,
        pages,
    })?;
    let (mut cpu, mut rewritten, mut undone) = (0.0, 0.0, 0);
    for pass in 0..WARM_UP + MEASURED {
        let before = copies_made()?;
        let changed = victim.rewrite(percent * 10, copies, (pass + 1) << 32)?;
        let copied = copies_made()? - before;
        let spent = turn.ksm.one_pass()?;
        if pass >= WARM_UP {
            cpu += spent.ns_per_page(pages);
            rewritten += changed;
            undone += copied;
        }
    }
    turn.ksm.stop()?;
    turn.record(&case, None, Metric::NsPerPage, cpu / MEASURED as f64);
    if turn.side() == Side::Stock {
        let limit = victim.read()?;
        turn.record_of(Side::Limit, &case, None, Metric::NsPerPage, limit);
    }
    if copies > 1 {
        let undone = undone as f64 / rewritten * 100.0;
        turn.record(&case, None, Metric::UndonePercent, undone);
    }
    drop(victim);
    turn.clear()
}

/// How many merged pages were copied as somebody wrote to them, since boot.
fn copies_made() -> Result<u64> {
    let text = fs::read_to_string("/proc/vmstat")?;
    let value = text.lines().find_map(|line| line.strip_prefix("cow_ksm "));
    value
        .context("/proc/vmstat has no cow_ksm")?
        .parse()
        .context("cow_ksm")
}
