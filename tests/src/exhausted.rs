//! Processes for whose copies there is no memory.

use std::fs;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use crate::Child;
use crate::Content;
use crate::Ksm;
use crate::Sharer;
use crate::memory::PAGE;
use crate::sharer::shared_by;
use crate::swap::Group;

/// Pages of each process in a group.
pub const PAGES: usize = 512;

/// Pages that a full group has room for, for other things than copies.
const ROOM: usize = 24;

/// What each of their pages contains.
pub const CONTENT: Content = Content::Distinct(1);

/// Keeps a process from being killed for want of memory, or lets it be.
pub fn protect(child: &Child, protect: bool) -> Result<()> {
    let score = if protect { "-1000" } else { "0" };
    let path = format!("/proc/{}/oom_score_adj", child.pid());
    fs::write(&path, score).context(path)
}

/// Has a process killed for want of memory after others of its size.
pub fn favour(child: &Child) -> Result<()> {
    let path = format!("/proc/{}/oom_score_adj", child.pid());
    fs::write(&path, "-100").context(path)
}

/// Keeps lists of all tasks out of the log, as long as it lives: there would be hundreds.
#[derive(Debug)]
pub struct Brief(String);

impl Brief {
    const FILE: &str = "/proc/sys/vm/oom_dump_tasks";

    /// From now on.
    pub fn new() -> Result<Self> {
        let old = fs::read_to_string(Self::FILE)?;
        fs::write(Self::FILE, "0")?;
        Ok(Self(old))
    }
}

impl Drop for Brief {
    fn drop(&mut self) {
        let _ = fs::write(Self::FILE, &self.0);
    }
}

/// Two processes outside of a control group share their pages with one in it, and the group has no room for copies.
#[derive(Debug)]
pub struct FullGroup {
    /// Those that have room.
    pub outside: [Sharer; 2],
    /// The one in the group, which is not to be killed.
    pub inside: Sharer,
    /// The group.
    pub group: Group,
    _brief: Brief,
}

impl FullGroup {
    /// Merges their pages, then takes the room. Without smart scan, at full speed.
    pub fn new(ksm: &Ksm) -> Result<Self> {
        let _brief = Brief::new()?;
        let outside = [
            Sharer::spawn(PAGES, CONTENT)?,
            Sharer::spawn(PAGES, CONTENT)?,
        ];
        ksm.scan_fast()?;
        if ksm.has("smart_scan") {
            ksm.write("smart_scan", 0)?;
        }
        // First, so that the group pays for none of the KSM pages.
        ksm.merge_until(shared_by(2, PAGES))?;
        let group = Group::new()?;
        let child = Child::spawn()?;
        group.add(&child)?;
        protect(&child, true)?;
        let inside = Sharer::in_child(child, PAGES, CONTENT)?;
        ksm.merge_until(shared_by(3, PAGES))?;
        group.fill_up(ROOM * PAGE)?;
        Ok(Self {
            outside,
            inside,
            group,
            _brief,
        })
    }

    /// Fails unless all live and find what they wrote.
    pub fn verify(&mut self) -> Result<()> {
        // To answer, the process needs a little memory of its own.
        self.group.release(&self.inside.child)?;
        for sharer in self.outside.iter_mut().chain([&mut self.inside]) {
            ensure!(sharer.child.alive()?, "a process was killed");
            sharer.verify()?;
        }
        self.group.add(&self.inside.child)
    }

    /// Fails unless nobody shares anything any more.
    pub fn expect_private(&mut self) -> Result<()> {
        for sharer in self.outside.iter_mut().chain([&mut self.inside]) {
            sharer.expect_private()?;
        }
        Ok(())
    }
}
