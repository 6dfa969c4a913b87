//! Empty pages that `use_zero_pages` has replaced by the zero page.

use anyhow::Result;
use anyhow::ensure;

use crate::child::Child;
use crate::ksm::Ksm;
use crate::memory::Region;
use crate::procfs;

/// How many pages of a region, all of which must be present, are the zero page.
pub fn of(child: &Child, region: Region) -> Result<usize> {
    let mut zeroes = 0;
    for pfn in child.pfns(region)? {
        let flags = pfn.flags()?;
        ensure!(
            !(flags.zero_page() && flags.ksm()),
            "{pfn:?} is both the zero page and a KSM page"
        );
        zeroes += usize::from(flags.zero_page());
    }
    Ok(zeroes)
}

/// Fails unless the mappings of the zero page are counted like this, by the system and for each process.
pub fn expect(ksm: &Ksm, wanted: &[(&Child, usize)]) -> Result<()> {
    let all: usize = wanted.iter().map(|(_, pages)| pages).sum();
    let seen = ksm.read("ksm_zero_pages")?;
    ensure!(
        seen == all as u64,
        "ksm_zero_pages is {seen} instead of {all}"
    );
    for (child, pages) in wanted {
        let seen = procfs::ksm_stat(child.pid(), "ksm_zero_pages")?;
        ensure!(
            seen == *pages as u64,
            "ksm_zero_pages of process {} is {seen} instead of {pages}",
            child.pid()
        );
    }
    Ok(())
}
