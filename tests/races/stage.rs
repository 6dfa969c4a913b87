//! The processes that most of the tests need.

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::ksm::Counters;
use ksm_e2e::memory::Mapping;
use ksm_e2e::procfs;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;

/// What the page contains that the witnesses share.
pub const CONTENT: Content = Content::Same(1);

/// What other pages contain, that are merged with each other.
pub const OTHER: Content = Content::Same(2);

/// Short enough that a round takes no longer than a few passes, long enough that others get the CPU.
pub fn scan_briskly(ksm: &Ksm) -> Result<()> {
    ksm.write("pages_to_scan", 100_000)?;
    ksm.write("sleep_millisecs", 2)
}

/// Two processes that share one page through it all.
pub struct Witnesses {
    pub one: Child,
    pub here: Region,
    pub other: Child,
    pub there: Region,
}

impl Witnesses {
    /// Makes them, with the page on a certain NUMA node if one is given, merges it and leaves the thread scanning.
    pub fn begin(ksm: &Ksm) -> Result<Self> {
        let (one, other) = (Child::spawn()?, Child::spawn()?);
        Self::with(ksm, one, other)
    }

    /// The same with these processes.
    pub fn with(ksm: &Ksm, mut one: Child, mut other: Child) -> Result<Self> {
        let here = one.map_mergeable(1, CONTENT)?;
        let there = other.map_mergeable(1, CONTENT)?;
        scan_briskly(ksm)?;
        ksm.start()?;
        ksm.scan_until(Counters::merged(1, 1))?;
        Ok(Self {
            one,
            here,
            other,
            there,
        })
    }

    /// Their page is as it was.
    pub fn verify(&mut self) -> Result<()> {
        self.one
            .verify(self.here, CONTENT)
            .context("a witness has another page")?;
        self.other
            .verify(self.there, CONTENT)
            .context("a witness has another page")
    }

    /// Waits until they share one page, and these others share it with them, and the counters say so: they may say so
    /// before, of a mapping that is gone already.
    pub fn share_with(&mut self, ksm: &Ksm, others: &mut [(&mut Child, Region)]) -> Result<()> {
        self.map_the_same(others)?;
        let sharing = 1 + others.len() as u64;
        ksm.scan_until(Counters::merged(1, sharing))
    }

    /// Waits until they share one page, and these others share it with them.
    pub fn map_the_same(&mut self, others: &mut [(&mut Child, Region)]) -> Result<()> {
        wait::until("all map the same page", PATIENCE, || {
            self.verify()?;
            let pfn = self.one.pfns(self.here)?;
            let mut same = pfn == self.other.pfns(self.there)?;
            for (child, region) in others.iter_mut() {
                child.verify(*region, CONTENT)?;
                same &= child.pfns(*region)? == pfn;
            }
            Ok(same)
        })
    }

    /// All others are gone: what is left is what the witnesses share, and all counters say so.
    pub fn end(mut self, ksm: &Ksm) -> Result<()> {
        self.verify()?;
        ksm.merge_until(Counters::merged(1, 1))?;
        self.share_with(ksm, &mut [])?;
        for child in [&self.one, &self.other] {
            for (name, wanted) in [("ksm_rmap_items", 1), ("ksm_merging_pages", 1)] {
                let seen = procfs::ksm_stat(child.pid(), name)?;
                ensure!(seen == wanted, "{name} of a witness is {seen}");
            }
        }
        quiet(ksm)?;
        ksm.unmerge()?;
        ksm.expect(Counters::merged(0, 0))?;
        self.verify()
    }
}

/// Nothing is left of stable nodes beside the first of a content.
pub fn quiet(ksm: &Ksm) -> Result<()> {
    for file in ["stable_node_dups", "stable_node_chains", "ksm_zero_pages"] {
        let left = ksm.read(file)?;
        ensure!(left == 0, "{file} is {left}");
    }
    Ok(())
}

/// A process with one page, which is not mergeable yet.
pub fn newcomer(content: Content) -> Result<(Child, Region)> {
    let mut child = Child::spawn()?;
    let region = child.map(Mapping::pages(1))?;
    child.fill(region, content)?;
    Ok((child, region))
}

/// Advises memory of a process.
pub fn advise(child: &mut Child, region: Region) -> Result<()> {
    child.advise(region, libc::MADV_MERGEABLE)
}

/// Fails unless a page contains these bytes, with those given at its beginning.
pub fn expect_page(
    child: &mut Child,
    region: Region,
    content: Content,
    start: &[u8],
) -> Result<()> {
    let mut wanted = content.page(0).bytes();
    wanted[..start.len()].copy_from_slice(start);
    let seen = child.read(region.addr, wanted.len())?;
    ensure!(
        seen == wanted,
        "a page begins with {:x?}, wanted {:x?}",
        &seen[..8],
        &wanted[..8]
    );
    Ok(())
}
