//! Processes that have memory through the whole soak, much of it like that of the actors.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use fastrand::Rng;
use ksm_e2e::Child;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::memory::Mapping;
use ksm_e2e::memory::Pattern;
use ksm_e2e::numa;
use ksm_e2e::procfs::Pfn;

use crate::actor;

/// Processes that are started, each of which forks another one.
const FAMILIES: usize = 3;

/// Pages of each.
const PAGES: usize = 192;

/// A process, its memory, and what that contains.
pub struct Holder {
    child: Child,
    region: Region,
    patterns: Vec<Pattern>,
}

impl Holder {
    fn spawn(rng: &mut Rng) -> Result<Self> {
        let mut child = Child::spawn()?;
        // Whatever the actors do to memory: it must not be the holders who are killed for it.
        let file = format!("/proc/{}/oom_score_adj", child.pid());
        fs::write(&file, "-1000").context(file)?;
        let region = child.map(Mapping::pages(PAGES))?;
        let patterns: Vec<_> = (0..PAGES).map(|_| content(rng)).collect();
        let mut holder = Self {
            child,
            region,
            patterns,
        };
        holder.paint(0..PAGES)?;
        holder.child.advise(region, libc::MADV_MERGEABLE)?;
        Ok(holder)
    }

    fn fork(&mut self) -> Result<Self> {
        Ok(Self {
            child: self.child.fork()?,
            region: self.region,
            patterns: self.patterns.clone(),
        })
    }

    fn paint(&mut self, pages: impl Iterator<Item = usize>) -> Result<()> {
        let pages: Vec<_> = pages
            .map(|index| (self.region.page(index), self.patterns[index]))
            .collect();
        self.child.paint(&pages)
    }

    fn verify(&mut self) -> Result<()> {
        let pages: Vec<_> = self
            .region
            .addresses()
            .zip(self.patterns.iter().copied())
            .collect();
        let wrong = self.child.differing(&pages)?;
        ensure!(
            wrong.is_empty(),
            "MEMORY DIFFERS: of holder {} at {wrong:x?}",
            self.child.pid()
        );
        Ok(())
    }

    /// None of its pages is merged.
    pub fn expect_private(&self) -> Result<()> {
        let merged = self.child.ksm_pages(self.region)?;
        ensure!(
            merged == 0,
            "{merged} merged pages have outlived the module"
        );
        Ok(())
    }

    /// Looks at its memory a last time and lets it go.
    pub fn exit(mut self) -> Result<()> {
        self.verify()?;
        self.child.exit()
    }
}

/// One in eight is nobody else's.
fn content(rng: &mut Rng) -> Pattern {
    if rng.u32(..8) == 0 {
        Pattern::Seed(rng.u64(..) | 1 << 63)
    } else {
        actor::common(rng)
    }
}

/// All of them.
pub struct Holders(Vec<Holder>);

impl Holders {
    /// Starts them.
    pub fn spawn(rng: &mut Rng) -> Result<Self> {
        let mut holders = Vec::new();
        for _ in 0..FAMILIES {
            let mut parent = Holder::spawn(rng)?;
            let child = parent.fork()?;
            holders.push(child);
            holders.push(parent);
        }
        Ok(Self(holders))
    }

    /// Every byte of each is right.
    pub fn verify(&mut self) -> Result<()> {
        self.0.iter_mut().try_for_each(Holder::verify)
    }

    /// Each writes to a third of its pages, merged or not.
    pub fn write_some(&mut self, rng: &mut Rng) -> Result<()> {
        for holder in &mut self.0 {
            let chosen: Vec<_> = (0..PAGES).filter(|_| rng.u32(..3) == 0).collect();
            for &index in &chosen {
                holder.patterns[index] = content(rng);
            }
            holder.paint(chosen.into_iter())?;
        }
        Ok(())
    }

    /// What could be merged is: of equal contents at most one page has found no partner, on each node if nodes are kept
    /// apart, in each process if processes are. Pages that a fork has left shared are one. All pages must be in memory, and
    /// merging must have come to rest.
    pub fn expect_merged(&self, ksm: &Ksm) -> Result<()> {
        let across = !ksm.has("merge_across_nodes") || ksm.read("merge_across_nodes")? == 1;
        // All holders have the same owner and the same memory cgroup.
        let apart = ksm.has("merge_scope") && ksm.text("merge_scope")?.contains("[process]");
        let mut single: BTreeMap<(Pattern, i32, Option<i32>), BTreeSet<Pfn>> = BTreeMap::new();
        for holder in &self.0 {
            let pid = holder.child.pid();
            let nodes = numa::nodes_of(pid, holder.region)?;
            let pfns = holder.child.pfns(holder.region)?;
            for (index, (pfn, node)) in pfns.into_iter().zip(nodes).enumerate() {
                let flags = pfn.flags()?;
                if !flags.ksm() && !flags.zero_page() {
                    let node = if across { 0 } else { node };
                    let key = (holder.patterns[index], node, apart.then_some(pid));
                    single.entry(key).or_default().insert(pfn);
                }
            }
        }
        for ((pattern, node, process), pages) in single {
            ensure!(
                pages.len() == 1,
                "{} pages with {pattern:x?} (node {node}, process {process:?}) are not merged: {pages:?}",
                pages.len()
            );
        }
        Ok(())
    }

    /// Lets all go but one, which is given back.
    pub fn exit_all_but_one(mut self) -> Result<Holder> {
        let one = self.0.pop().context("there are holders")?;
        self.0.into_iter().try_for_each(Holder::exit)?;
        Ok(one)
    }
}
