//! Blocks of memory that go offline and come back.

use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;

use crate::child::Child;
use crate::memory::Content;
use crate::memory::Mapping;
use crate::memory::PAGE;
use crate::memory::Region;
use crate::numa;
use crate::procfs::Pfn;

const MEMORY: &str = "/sys/devices/system/memory";

/// Pages that are put aside at a time, on the way to those of a certain block.
const STEP: usize = 2048;

/// How many steps are tried: as much as a node of the test machine has of movable memory.
const STEPS: usize = 64;

fn pages_per_block() -> Result<u64> {
    let path = format!("{MEMORY}/block_size_bytes");
    let text = fs::read_to_string(&path).context("this test needs a kernel with MEMORY_HOTPLUG")?;
    let bytes = u64::from_str_radix(text.trim_end(), 16).context(path)?;
    Ok(bytes / PAGE as u64)
}

/// A block of memory, the unit in which it goes offline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    number: u64,
    pages: u64,
}

impl Block {
    /// The block that a page is in.
    pub fn of(pfn: Pfn) -> Result<Self> {
        let pages = pages_per_block()?;
        Ok(Self {
            number: pfn.0 / pages,
            pages,
        })
    }

    /// Whether a page is in the block.
    pub fn contains(self, pfn: Pfn) -> bool {
        pfn.0 / self.pages == self.number
    }

    fn dir(self) -> PathBuf {
        PathBuf::from(format!("{MEMORY}/memory{}", self.number))
    }

    /// The file that shows and changes whether the block is online.
    pub fn state_file(self) -> PathBuf {
        self.dir().join("state")
    }

    /// `online`, `offline`, or on the way there.
    pub fn state(self) -> Result<String> {
        let text = fs::read_to_string(self.state_file())
            .with_context(|| self.state_file().display().to_string())?;
        Ok(text.trim_end().to_owned())
    }

    /// Whether the block is online and all of it in the zone for memory that can be moved.
    fn is_in_movable_zone(self) -> Result<bool> {
        let zones = fs::read_to_string(self.dir().join("valid_zones"))?;
        Ok(self.state()? == "online" && zones.trim_end() == "Movable")
    }

    /// Whether nothing in the block keeps it from going offline for good. This looks at every page.
    pub fn is_movable(self) -> Result<bool> {
        if !self.is_in_movable_zone()? {
            return Ok(false);
        }
        // A block with a bad page could not come back.
        let flags = Pfn(self.number * self.pages).flags_from_here(self.pages as usize)?;
        Ok(!flags
            .iter()
            .any(|flags| flags.absent() || flags.reserved() || flags.poisoned()))
    }

    /// Brings the block back when the value is dropped, should it be offline by then.
    pub fn keep(self) -> Keep {
        Keep(self)
    }

    /// Takes the block offline.
    pub fn offline(self) -> Result<Keep> {
        let keep = self.keep();
        fs::write(self.state_file(), "offline")
            .with_context(|| format!("taking {} offline", self.dir().display()))?;
        ensure!(
            self.state()? == "offline",
            "the block is {} instead of offline",
            self.state()?
        );
        Ok(keep)
    }

    fn online(self) -> Result<()> {
        // Where it was: otherwise the kernel could put what is not movable there.
        fs::write(self.state_file(), "online_movable")
            .with_context(|| format!("bringing {} back", self.dir().display()))
    }
}

/// A block that has to be online in the end.
#[derive(Debug)]
pub struct Keep(Block);

impl Keep {
    /// Brings the block back.
    pub fn online(self) -> Result<()> {
        self.0.online()?;
        ensure!(self.0.state()? == "online", "the block is not online");
        Ok(())
    }
}

impl Drop for Keep {
    fn drop(&mut self) {
        let back = || -> Result<()> {
            if self.0.state()? == "offline" {
                self.0.online()?;
            }
            Ok(())
        };
        if let Err(error) = back() {
            eprintln!("{error:#}");
        }
    }
}

/// All blocks. A kernel without hotplug has none.
fn blocks() -> Result<Vec<Block>> {
    let Ok(entries) = fs::read_dir(MEMORY) else {
        return Ok(Vec::new());
    };
    let pages = pages_per_block()?;
    let mut blocks = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("memory"));
        if let Some(number) = number.and_then(|number| number.parse().ok()) {
            blocks.push(Block { number, pages });
        }
    }
    Ok(blocks)
}

/// All blocks that are online and consist of memory that can be moved.
pub fn movable_blocks() -> Result<Vec<Block>> {
    let mut movable = Vec::new();
    for block in blocks()? {
        if block.is_in_movable_zone()? {
            movable.push(block);
        }
    }
    Ok(movable)
}

/// Brings back all blocks that are offline. Returns whether there were any.
pub fn bring_back() -> Result<bool> {
    let mut any = false;
    for block in blocks()? {
        if block.state()? == "offline" {
            block.online()?;
            any = true;
        }
    }
    Ok(any)
}

/// A process that keeps the memory that cannot go offline, so that others get what can.
#[derive(Debug)]
pub struct Hog {
    child: Child,
    node: u32,
}

impl Hog {
    /// Takes memory of the last node until what the next one gets can go offline.
    pub fn new() -> Result<Self> {
        let nodes = numa::nodes()?;
        let mut hog = Self {
            child: Child::spawn()?,
            node: *nodes.last().context("a machine without memory")?,
        };
        for _ in 0..STEPS {
            if hog.try_next()?.1.is_movable()? {
                return Ok(hog);
            }
            hog.eat()?;
        }
        bail!(
            "there is no memory that can go offline, as with movablecore= on the kernel's command line"
        )
    }

    fn eat(&mut self) -> Result<()> {
        let step = self.child.map(Mapping::pages(STEP).on_node(self.node))?;
        self.child.fill(step, Content::Same(0))
    }

    fn try_next(&mut self) -> Result<(Region, Block)> {
        let region = self.child.map(Mapping::pages(1).on_node(self.node))?;
        self.child.fill(region, Content::Same(0))?;
        let block = Block::of(self.child.pfns(region)?[0])?;
        Ok((region, block))
    }

    /// Maps memory of a helper, filled and not yet advised, and says in which block its first page is, which can go offline.
    pub fn map(
        &mut self,
        child: &mut Child,
        pages: usize,
        content: Content,
    ) -> Result<(Region, Block)> {
        for _ in 0..STEPS {
            let region = child.map(Mapping::pages(pages).on_node(self.node))?;
            child.fill(region, content)?;
            let block = Block::of(child.pfns(region)?[0])?;
            if block.is_movable()? {
                return Ok((region, block));
            }
            child.munmap(region)?;
            self.eat()?;
        }
        bail!("there is no more memory that can go offline")
    }
}

/// Finds memory in blocks that can go offline.
#[derive(Debug, Default)]
pub struct Finder {
    unfit: Vec<Block>,
}

impl Finder {
    /// Maps memory of the helper, filled and not yet advised, all of whose pages are in one block that can go
    /// offline: in `block`, if one is given.
    pub fn map(
        &mut self,
        child: &mut Child,
        pages: usize,
        content: Content,
        block: Option<Block>,
    ) -> Result<(Region, Block)> {
        let nodes = numa::nodes()?;
        let node = *nodes.last().context("a machine without memory")?;
        let mut aside = Vec::new();
        for _ in 0..STEPS {
            let region = child.map(Mapping::pages(pages).on_node(node))?;
            child.fill(region, content)?;
            let pfns = child.pfns(region)?;
            let found = Block::of(pfns[0])?;
            let together = pfns.iter().all(|&pfn| found.contains(pfn));
            if together && self.fits(found, block)? {
                for region in aside {
                    child.munmap(region)?;
                }
                return Ok((region, found));
            }
            aside.push(region);
            // Pages of the other blocks are used up until it is the turn of the right one.
            let step = child.map(Mapping::pages(STEP).on_node(node))?;
            child.fill(step, Content::Same(0))?;
            aside.push(step);
        }
        bail!(
            "this test needs blocks of movable memory, as with movablecore= on the kernel's command line; in {block:?} of node {node} there are none"
        )
    }

    fn fits(&mut self, found: Block, wanted: Option<Block>) -> Result<bool> {
        if let Some(wanted) = wanted {
            return Ok(found == wanted);
        }
        if self.unfit.contains(&found) {
            return Ok(false);
        }
        let fits = found.is_movable()?;
        if !fits {
            self.unfit.push(found);
        }
        Ok(fits)
    }
}
