//! What the actors of this group have brought about: an actor that never gets what it wants tests nothing.

use std::fs;
use std::fs::File;
use std::fs::OpenOptions;
use std::io::Write;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::procfs;

use crate::actor::Actor;

/// Where actors, each in a process of its own, note what the kernel does not count.
const FILE: &str = "/tmp/ksm-soak-feats";

/// Those who have played for so long must each have succeeded.
const LONG: Duration = Duration::from_secs(480);

/// Memory blocks that went offline.
pub const OFFLINE: &str = "blocks went offline";
/// Pages that were taken out of service.
pub const SOFT: &str = "pages taken out of service";
/// Processes that died of a bad page.
pub const HARD: &str = "processes died of a bad page";

/// Whose feats there are, and where they are counted: in `/proc/vmstat`, unless they are those above.
const FEATS: [(&str, &str); 13] = [
    ("swap", "pswpout"),
    ("swap", "pswpin"),
    ("reclaim", "pgsteal_proactive"),
    ("oom", "oom_kill"),
    ("compaction", "compact_isolated"),
    ("khugepaged", "thp_collapse_alloc"),
    ("nodes", "pgmigrate_success"),
    ("balancing", "numa_pte_updates"),
    ("balancing", "numa_pages_migrated"),
    ("blocks", OFFLINE),
    ("poison-soft", SOFT),
    ("poison-hard", HARD),
    ("balloon", "balloon_inflate"),
];

/// Notes one of these.
pub fn note(feat: &str) -> Result<()> {
    let mut file = OpenOptions::new().append(true).open(FILE).context(FILE)?;
    // One write, so that lines of several processes do not mix.
    file.write_all(format!("{feat}\n").as_bytes()).context(FILE)
}

fn count(feat: &str) -> Result<u64> {
    if feat.contains(' ') {
        let text = fs::read_to_string(FILE).context(FILE)?;
        return Ok(text.lines().filter(|line| *line == feat).count() as u64);
    }
    procfs::vmstat(feat)
}

/// The figures before the first round.
pub struct Feats {
    played: Duration,
    before: Vec<(&'static str, &'static str, u64)>,
}

impl Feats {
    /// Those of these actors.
    pub fn begin(actors: &[Actor]) -> Result<Self> {
        File::create(FILE).context(FILE)?;
        let mut before = Vec::new();
        for (name, feat) in FEATS {
            if actors.iter().any(|actor| actor.name == name) {
                before.push((name, feat, count(feat)?));
            }
        }
        Ok(Self {
            played: Duration::ZERO,
            before,
        })
    }

    /// Says what has been done so far, now that the actors have played for so long once more.
    pub fn add(&mut self, time: Duration) -> Result<()> {
        self.played += time;
        let mut text = Vec::new();
        for (_, feat, done) in self.done()? {
            text.push(format!("{feat} {done}"));
        }
        if !text.is_empty() {
            println!("soak: pressure: {}", text.join(", "));
        }
        Ok(())
    }

    /// Fails if there was much time and somebody has not succeeded once. A round alone may be too short for that, beside
    /// other virtual machines.
    pub fn end(self) -> Result<()> {
        let mut idle = Vec::new();
        for (name, feat, done) in self.done()? {
            if done == 0 {
                idle.push(format!("{name} ({feat})"));
            }
        }
        ensure!(
            idle.is_empty() || self.played < LONG,
            "these actors have not succeeded once: {}",
            idle.join(", ")
        );
        Ok(())
    }

    fn done(&self) -> Result<Vec<(&'static str, &'static str, u64)>> {
        let before = self.before.iter();
        before
            .map(|&(name, feat, before)| Ok((name, feat, count(feat)? - before)))
            .collect()
    }
}
