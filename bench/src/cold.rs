//! From fresh memory until everything that is equal is merged.
//!
//! On ARCH=um every change of a page table entry is a system call of the host, several µs that no KSM can save. So the
//! same is measured in instructions as well, where it is not.

use anyhow::Result;

use crate::memory::Content;
use crate::memory::PAGES_PER_MIB;
use crate::memory::Shape;
use crate::record::Metric;
use crate::scenario::Machine;
use crate::session::Session;
use crate::victim::Spec;
use crate::victim::Victim;

/// A mixture of pages.
#[derive(Clone, Copy)]
struct Mix {
    name: &'static str,
    content: Content,
    /// How many of a hundred pages are equal to another.
    percent: u64,
    zero_pages: bool,
}

/// Starts the scan on memory of four processes that nobody has looked at yet.
pub fn run(session: &mut Session) -> Result<()> {
    let counted = session.machine() == Machine::Icount;
    let mib = session.pick(if counted { 64 } else { 256 }, 64);
    session.note(format!("{mib} MiB in four processes"));
    let pages = mib * PAGES_PER_MIB;
    let mix = |name, content, percent, zero_pages| Mix {
        name,
        content,
        percent,
        zero_pages,
    };
    let mixes = [
        mix("16 groups", Content::Groups(16), 100, false),
        mix("pairs", Content::Groups(pages as u64 / 2), 100, false),
        mix("all equal", Content::Groups(1), 100, false),
        mix("50 % zero", Content::HalfZero, 50, false),
        mix("50 % zero, use_zero_pages", Content::HalfZero, 50, true),
    ];
    session.alternate(|turn| {
        for mix in turn.rotate(&mixes) {
            let victims = Victim::several(
                4,
                Spec {
                    shape: Shape::Dense,
                    content: mix.content,
                    seed: u64::from(turn.round),
                    first: 0,
                    pages,
                },
            )?;
            turn.ksm.write("use_zero_pages", mix.zero_pages.into())?;
            // A page that is alone after the rest have filled their shares of max_page_sharing stays alone.
            let target = pages as u64 * mix.percent / 100 * 999 / 1000;
            let (first, all) = turn.ksm.merge(target)?;
            turn.ksm.stop()?;
            let merged = turn.ksm.merged()? as f64;
            if counted {
                let each = all.instructions() / merged;
                turn.record(mix.name, None, Metric::InstructionsPerMerged, each);
            } else {
                let cpu = all.cpu_seconds();
                turn.record(mix.name, None, Metric::MergedPerCpuSecond, merged / cpu);
                turn.record(mix.name, None, Metric::CpuSecondsToMerged, cpu);
                let first = first.ns_per_page(pages);
                turn.record(mix.name, None, Metric::FirstPassNsPerPage, first);
            }
            drop(victims);
            turn.clear()?;
        }
        Ok(())
    })
}
