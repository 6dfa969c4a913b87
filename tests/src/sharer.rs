//! A process whose pages are equal to those of others.

use anyhow::Result;
use anyhow::ensure;

use crate::child::Child;
use crate::ksm::Counters;
use crate::memory::Content;
use crate::memory::Region;
use crate::procfs;

/// A helper process with some memory that may be merged.
#[derive(Debug)]
pub struct Sharer {
    /// The process.
    pub child: Child,
    /// Its memory.
    pub region: Region,
    content: Content,
}

impl Sharer {
    /// Makes a process with so many pages of this content, advised to be merged.
    pub fn spawn(pages: usize, content: Content) -> Result<Self> {
        Self::in_child(Child::spawn()?, pages, content)
    }

    /// The same for a process that is there.
    pub fn in_child(mut child: Child, pages: usize, content: Content) -> Result<Self> {
        let region = child.map_mergeable(pages, content)?;
        Ok(Self {
            child,
            region,
            content,
        })
    }

    /// Forks the process.
    pub fn fork(&mut self) -> Result<Self> {
        Ok(Self {
            child: self.child.fork()?,
            ..*self
        })
    }

    /// Fails unless all pages contain what was written to them.
    pub fn verify(&mut self) -> Result<()> {
        self.child.verify(self.region, self.content)
    }

    /// How many of its pages are KSM pages.
    pub fn ksm_pages(&self) -> Result<usize> {
        self.child.ksm_pages(self.region)
    }

    /// Fails unless nothing of it is merged, nobody thinks so, and all pages contain what was written to them.
    pub fn expect_private(&mut self) -> Result<()> {
        let pid = self.child.pid();
        ensure!(self.ksm_pages()? == 0, "process {pid} has merged pages");
        ensure!(
            procfs::ksm_merging_pages(pid)? == 0,
            "process {pid} counts pages as merged"
        );
        ensure!(
            procfs::ksm_stat(pid, "ksm_rmap_items")? == 0,
            "pages of process {pid} are tracked"
        );
        self.verify()
    }
}

/// The counters when so many processes share all of these pages.
pub fn shared_by(processes: usize, pages: usize) -> Counters {
    Counters::merged(pages as u64, (pages * (processes - 1)) as u64)
}
