//! Memory that a userfaultfd watches.
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::ksm::Counters;
use ksm_e2e::memory::{self, Mapping};
use ksm_e2e::procfs;
use ksm_e2e::userfault::{Userfault, Watch};
ksm_e2e::tests![experiment];
fn experiment(ksm: &Ksm) -> Result<()> {
    let content = Content::Distinct(1);
    let region = Mapping::pages(8).map()?;
    unsafe { memory::fill(region, content) };
    memory::advise(region, libc::MADV_MERGEABLE)?;
    let mut other = Child::spawn()?;
    let there = other.map_mergeable(8, content)?;
    let mut fd = Userfault::open()?;
    fd.watch(region, Watch::WriteProtected)?;
    fd.write_protect(region, true)?;
    let pid = std::process::id() as i32;
    eprintln!(
        "before {:?}",
        procfs::map_entries(pid, region)?
            .iter()
            .map(|e| e.uffd_write_protected())
            .collect::<Vec<_>>()
    );
    ksm.scan_passes(5)?;
    eprintln!("counters {}", ksm.counters()?);
    eprintln!(
        "after {:?} ksm {}",
        procfs::map_entries(pid, region)?
            .iter()
            .map(|e| e.uffd_write_protected())
            .collect::<Vec<_>>(),
        procfs::ksm_pages(pid, region)?
    );
    ksm.unmerge()?;
    eprintln!(
        "unmerged {:?}",
        procfs::map_entries(pid, region)?
            .iter()
            .map(|e| e.uffd_write_protected())
            .collect::<Vec<_>>()
    );
    // the other order: protect merged pages, then unmerge
    fd.write_protect(region, false)?;
    ksm.merge_until(Counters::merged(8, 8))?;
    fd.write_protect(region, true)?;
    eprintln!(
        "protected merged {:?}",
        procfs::map_entries(pid, region)?
            .iter()
            .map(|e| e.uffd_write_protected())
            .collect::<Vec<_>>()
    );
    ksm.unmerge()?;
    eprintln!(
        "unmerged {:?} ksm {}",
        procfs::map_entries(pid, region)?
            .iter()
            .map(|e| e.uffd_write_protected())
            .collect::<Vec<_>>(),
        procfs::ksm_pages(pid, region)?
    );
    ensure!(fd.fault()?.is_none());
    other.verify(there, content)
}
