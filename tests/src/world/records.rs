//! What must be seen of a world, and what is seen.

use std::collections::BTreeMap;
use std::collections::HashMap;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use crate::Ksm;
use crate::memory::PAGE;
use crate::procfs;
use crate::procfs::Pfn;
use crate::record::Record;

use super::Area;
use super::Frame;
use super::Page;
use super::Place;
use super::Totals;
use super::World;
use super::is_merged;
use super::is_of_crowd;
use super::is_zero;

/// The lines of `smaps` that do not depend on who looked at a page lately.
const SMAPS: [&str; 11] = [
    "Size",
    "Rss",
    "Pss",
    "Shared_Clean",
    "Shared_Dirty",
    "Private_Clean",
    "Private_Dirty",
    "Anonymous",
    "KSM",
    "AnonHugePages",
    "Swap",
];

impl World {
    /// What must be seen now, after [`World::settle`]; or after `run=2`, when nothing is known of any page.
    pub fn predict(&self, when: &str) -> Record {
        let at_rest = self.totals != Totals::default();
        let mut record = Record::default();
        let counters = format!("{when}: counters");
        let zero = self.count(is_zero);
        for (name, value) in [
            ("pages_shared", self.totals.shared),
            ("pages_sharing", self.totals.sharing),
            ("pages_unshared", self.totals.unshared),
            ("pages_volatile", self.totals.volatile),
            ("ksm_zero_pages", zero),
            ("stable_node_chains", self.totals.chains),
            ("stable_node_dups", self.totals.dups),
        ] {
            record.note(&counters, name, value);
        }
        let mut mappings: HashMap<Frame, u64> = HashMap::new();
        for at in self.all_places() {
            if let Some(page) = self.place(at).page {
                *mappings.entry(page.frame).or_default() += 1;
            }
        }
        for (index, crowd) in self.crowds.iter().enumerate() {
            record.note(
                format!("{when}: content {index} with many copies"),
                "mappings",
                format!("{:?}", crowd.mappings),
            );
        }
        let mut numbers = Numbers::default();
        for (number, process) in self.processes.iter().enumerate() {
            let topic = format!("{when}: process {number}");
            let places = || process.areas.iter().flat_map(|area| &area.places);
            let items = places().filter(|place| at_rest && self.is_item(place));
            let left: u64 = self
                .crowds
                .iter()
                .enumerate()
                .filter(|(index, crowd)| {
                    let frame = Frame::OneOf(*index);
                    let has = |place: &Place| place.page.is_some_and(|page| page.frame == frame);
                    // All of such a crowd are in one process.
                    crowd.one_left && places().any(has)
                })
                .count() as u64;
            let merged = places().filter(|place| is_merged(place)).count() as u64 - left;
            record.note(&topic, "ksm_rmap_items", items.count());
            record.note(&topic, "ksm_merging_pages", merged);
            record.note(&topic, "ksm_merging_pages by itself", merged);
            record.note(
                &topic,
                "ksm_zero_pages",
                places().filter(|place| is_zero(place)).count(),
            );
            record.note(&topic, "ksm_merge_any", "no");
            let mergeable = places().any(|place| place.mergeable);
            record.note(
                &topic,
                "ksm_mergeable",
                if mergeable { "yes" } else { "no" },
            );
            for (index, area) in process.areas.iter().enumerate() {
                let topic = format!("{topic} area {index}");
                let kb = |which: fn(&Place) -> bool| {
                    area.places.iter().filter(|place| which(place)).count() * PAGE / 1024
                };
                record.note(&topic, "Size", kb(|place| place.mapped));
                record.note(
                    &topic,
                    "Rss",
                    kb(|place| place.page.is_some() && !is_zero(place)),
                );
                if !self.has_left_over(area) {
                    record.note(&topic, "KSM", kb(is_merged));
                }
                record.note(&topic, "Swap", 0);
                let tokens = area.places.iter().map(|place| match place.page {
                    None => "-".to_owned(),
                    Some(page) => match page.frame {
                        Frame::Zero => "zero".to_owned(),
                        Frame::OneOf(crowd) => format!("of-{crowd}"),
                        frame => {
                            let kind = if matches!(frame, Frame::Merged(_)) {
                                "ksm"
                            } else {
                                "own"
                            };
                            format!("{kind}-{}x{}", numbers.of(frame), mappings[&frame])
                        }
                    },
                });
                record.note(&topic, "pages", tokens.collect::<Vec<_>>().join(" "));
            }
        }
        record
    }

    /// Whether one of an area's pages may be the one that found no partner.
    fn has_left_over(&self, area: &Area) -> bool {
        area.places.iter().any(|place| match place.page {
            Some(Page {
                frame: Frame::OneOf(crowd),
                ..
            }) => self.crowds[crowd].one_left,
            _ => false,
        })
    }

    /// What is seen now. Where the rules leave a choice, it is not told.
    pub fn observe(&self, when: &str, ksm: &Ksm) -> Result<Record> {
        let mut record = Record::default();
        let counters = format!("{when}: counters");
        for name in [
            "pages_shared",
            "pages_sharing",
            "pages_unshared",
            "pages_volatile",
            "ksm_zero_pages",
            "stable_node_chains",
            "stable_node_dups",
        ] {
            if ksm.has(name) {
                record.note(&counters, name, ksm.read(name)?);
            }
        }
        let mut crowds: Vec<BTreeMap<Pfn, u64>> = vec![BTreeMap::new(); self.crowds.len()];
        let mut numbers = Numbers::default();
        for (number, process) in self.processes.iter().enumerate() {
            let topic = format!("{when}: process {number}");
            let pid = process.child.pid();
            for (name, value) in procfs::ksm_stat_lines(pid)? {
                record.note(&topic, name, value);
            }
            record.note(
                &topic,
                "ksm_merging_pages by itself",
                procfs::ksm_merging_pages(pid)?,
            );
            for (index, area) in process.areas.iter().enumerate() {
                let topic = format!("{topic} area {index}");
                let undetermined = |name: &str| match name {
                    "Pss" => area.places.iter().any(is_of_crowd),
                    // The one that is left over is a page of its own.
                    "Shared_Clean" | "Shared_Dirty" | "Private_Clean" | "Private_Dirty" | "KSM" => {
                        self.has_left_over(area)
                    }
                    _ => false,
                };
                let (smaps, areas) = procfs::smaps_within(pid, area.region)?;
                record.note(&topic, "areas", areas);
                for name in SMAPS {
                    if !undetermined(name) {
                        record.note(&topic, name, smaps.get(name).copied().unwrap_or_default());
                    }
                }
                let (mut tokens, mut flags) = (Vec::new(), Vec::new());
                let entries = procfs::map_entries(pid, area.region)?;
                for (place, entry) in area.places.iter().zip(entries) {
                    let Some(pfn) = entry.pfn() else {
                        ensure!(!entry.swapped(), "a page was swapped out");
                        tokens.push("-".to_owned());
                        flags.push(String::new());
                        continue;
                    };
                    let seen = pfn.flags()?;
                    let token = match place.page.map(|page| page.frame) {
                        Some(Frame::OneOf(crowd)) => {
                            if seen.ksm() {
                                *crowds[crowd].entry(pfn).or_default() += 1;
                            }
                            format!("of-{crowd}")
                        }
                        _ if seen.zero_page() => "zero".to_owned(),
                        _ => {
                            let kind = if seen.ksm() { "ksm" } else { "own" };
                            format!("{kind}-{}x{}", numbers.of(pfn), procfs::mappings(pfn)?)
                        }
                    };
                    tokens.push(token);
                    flags.push(seen.lasting());
                }
                record.note(&topic, "pages", tokens.join(" "));
                if !self.has_left_over(area) {
                    record.note(&topic, "flags", flags.join(" "));
                }
            }
        }
        for (index, crowd) in crowds.into_iter().enumerate() {
            let mut mappings: Vec<u64> = crowd.into_values().collect();
            mappings.sort_unstable();
            record.note(
                format!("{when}: content {index} with many copies"),
                "mappings",
                format!("{mappings:?}"),
            );
        }
        self.check_profit(ksm).context(when.to_owned())?;
        Ok(record)
    }

    /// What is saved, less what the records of pages cost, which is each producer's own affair within reason.
    fn check_profit(&self, ksm: &Ksm) -> Result<()> {
        const MOST_PER_ITEM: u64 = 128;
        const MOST_PER_KSM_PAGE: u64 = 256;
        if !ksm.has("general_profit") {
            return Ok(());
        }
        let profit: i64 = ksm.text("general_profit")?.trim_end().parse()?;
        let saved = (ksm.read("pages_sharing")? + ksm.read("ksm_zero_pages")?) * PAGE as u64;
        let items = ["shared", "sharing", "unshared", "volatile"]
            .iter()
            .map(|name| ksm.read(&format!("pages_{name}")))
            .sum::<Result<u64>>()?;
        let most = items * MOST_PER_ITEM + ksm.read("pages_shared")? * MOST_PER_KSM_PAGE;
        let least = saved as i64 - most as i64;
        ensure!(
            (least..saved as i64).contains(&profit) || items == 0 && profit == saved as i64,
            "general_profit is {profit}, with {saved} bytes saved and {items} records"
        );
        Ok(())
    }
}

/// Numbers for things in the order of their first appearance.
#[derive(Debug)]
struct Numbers<T>(HashMap<T, usize>);

impl<T> Default for Numbers<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: std::hash::Hash + Eq> Numbers<T> {
    fn of(&mut self, thing: T) -> usize {
        let next = self.0.len();
        *self.0.entry(thing).or_insert(next)
    }
}
