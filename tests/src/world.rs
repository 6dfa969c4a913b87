//! Memory of several processes, made at random, of which the rules say how it must be merged in the end.
//!
//! A [`World`] keeps a model of what it does to real processes: what each page contains, which pages share memory
//! since a fork, and which must share it once merging has come to rest. The model knows the rules of merging, but of
//! no producer how it goes about it, so it is compared with either.

mod records;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::collections::HashMap;

use anyhow::Result;
use anyhow::ensure;
use fastrand::Rng;

use crate::Child;
use crate::Ksm;
use crate::Region;
use crate::memory::Mapping;
use crate::memory::PAGE;
use crate::memory::Pattern;
use crate::passes::Passes;

/// Passes without any change after which merging is taken to be at rest.
const QUIET: u32 = 3;

/// Passes after which it must have come to rest.
const MANY: u32 = 40;

/// The knobs that decide what is merged with what.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Empty pages become the zero page.
    pub use_zero_pages: bool,
    /// Pages of all NUMA nodes are merged.
    pub across_nodes: bool,
    /// Most mappings of a KSM page.
    pub limit: u64,
    /// Pages that were not merged for long are skipped.
    pub smart_scan: bool,
    /// Only pages of the same process are merged.
    pub by_process: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            use_zero_pages: false,
            across_nodes: true,
            limit: 256,
            smart_scan: false,
            by_process: false,
        }
    }
}

impl Rules {
    /// Sets the knobs. Nothing may be merged.
    pub fn apply(&self, ksm: &Ksm) -> Result<()> {
        ksm.write("use_zero_pages", self.use_zero_pages.into())?;
        ksm.write("merge_across_nodes", self.across_nodes.into())?;
        ksm.write("max_page_sharing", self.limit)?;
        // A producer that has no such knob never skips.
        if ksm.has("smart_scan") {
            ksm.write("smart_scan", self.smart_scan.into())?;
        }
        if ksm.has("merge_scope") {
            let scope = if self.by_process { "process" } else { "global" };
            ksm.write_text("merge_scope", scope)?;
        }
        Ok(())
    }
}

/// What has nothing in common with others: a process, if they merge by themselves, and a node, if they do.
type Forest = (usize, u32);

/// What a world is made of.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Processes.
    pub processes: usize,
    /// Areas in each.
    pub areas: usize,
    /// Pages in each.
    pub pages: usize,
    /// What the pages contain.
    pub contents: Contents,
    /// Some pages change before every pass.
    pub volatile: bool,
    /// Each area is bound to a NUMA node, 0 or 1.
    pub bound: bool,
    /// Some parts of areas are not advised.
    pub unadvised: bool,
    /// Processes that are forked before merging begins, and then write.
    pub forks: usize,
}

/// What the pages of a world contain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contents {
    /// Duplicates, pages that differ from others in one byte, unique pages, empty and nearly empty pages, holes.
    Everything,
    /// Each content more than once.
    Duplicates,
    /// Each content as often as the limit allows to tell what becomes of it.
    AroundLimit,
    /// Each content once.
    Unique,
}

/// Whose memory a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Frame {
    /// Its own, or shared by forks.
    Plain(u64),
    /// A KSM page.
    Merged(u64),
    /// One of the KSM pages of a [`Crowd`].
    OneOf(usize),
    /// The zero page.
    Zero,
}

/// Pages of equal contents that are too many for one KSM page. Which of the KSM pages one of them shares is not
/// determined.
#[derive(Clone, Debug)]
struct Crowd {
    /// How many mappings each of the KSM pages has, in ascending order.
    mappings: Vec<u64>,
    /// Whether one page, any of them, has found no partner.
    one_left: bool,
}

#[derive(Clone, Copy, Debug)]
struct Page {
    pattern: Pattern,
    frame: Frame,
    volatile: bool,
}

/// A page's worth of addresses.
#[derive(Clone, Copy, Debug)]
struct Place {
    mapped: bool,
    mergeable: bool,
    page: Option<Page>,
}

#[derive(Clone, Debug)]
struct Area {
    region: Region,
    node: Option<u32>,
    places: Vec<Place>,
}

#[derive(Debug)]
struct Process {
    child: Child,
    areas: Vec<Area>,
}

/// The counters of the directory that must come to rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    shared: u64,
    sharing: u64,
    unshared: u64,
    volatile: u64,
    chains: u64,
    dups: u64,
}

/// See the module.
#[derive(Debug)]
pub struct World {
    rules: Rules,
    processes: Vec<Process>,
    /// The contents to choose from.
    pool: Vec<u64>,
    crowds: Vec<Crowd>,
    /// The process that has merged a page, by the page's number; what that is worth, the rules say.
    owners: HashMap<u64, i32>,
    totals: Totals,
    next: u64,
    round: u64,
}

impl World {
    /// Makes processes and their memory.
    pub fn make(random: &mut Rng, shape: Shape, rules: Rules) -> Result<Self> {
        let places = shape.processes * shape.areas * shape.pages;
        let mut world = Self {
            rules,
            processes: Vec::new(),
            pool: (0..places / 5).map(|_| random.u64(..)).collect(),
            crowds: Vec::new(),
            owners: HashMap::new(),
            totals: Totals::default(),
            next: 0,
            round: 0,
        };
        for _ in 0..shape.processes {
            let mut process = Process {
                child: Child::spawn()?,
                areas: Vec::new(),
            };
            for _ in 0..shape.areas {
                let node = shape.bound.then(|| random.u32(..2));
                let mapping = Mapping {
                    node,
                    ..Mapping::pages(shape.pages)
                };
                process.areas.push(Area {
                    region: process.child.map(mapping)?,
                    node,
                    places: vec![
                        Place {
                            mapped: true,
                            mergeable: false,
                            page: None,
                        };
                        shape.pages
                    ],
                });
            }
            world.processes.push(process);
        }
        let patterns = world.choose(random, shape);
        for (at, pattern) in world.all_places().into_iter().zip(patterns) {
            let Some(pattern) = pattern else { continue };
            let frame = world.new_frame();
            world.place_mut(at).page = Some(Page {
                pattern,
                frame,
                volatile: shape.volatile && random.u32(..100) < 8,
            });
        }
        world.paint_all(|_| true)?;
        for process in 0..world.processes.len() {
            for area in 0..world.processes[process].areas.len() {
                let all = 0..shape.pages;
                let advised = if shape.unadvised && random.u32(..3) == 0 {
                    part(random, shape.pages)
                } else {
                    all
                };
                world.advise(process, area, advised, true)?;
            }
        }
        for _ in 0..shape.forks {
            let parent = random.usize(..world.processes.len());
            let child = world.fork(parent)?;
            world.write_some(random, child, 30)?;
            world.write_some(random, parent, 15)?;
        }
        Ok(world)
    }

    /// What each place contains; `None` is a hole.
    fn choose(&mut self, random: &mut Rng, shape: Shape) -> Vec<Option<Pattern>> {
        let count = self.all_places().len();
        match shape.contents {
            Contents::Everything => (0..count).map(|_| self.anything(random)).collect(),
            Contents::Unique => (0..count)
                .map(|_| Some(Pattern::Seed(random.u64(..))))
                .collect(),
            Contents::Duplicates => {
                let mut patterns: Vec<_> = (0..count)
                    .map(|index| Some(Pattern::Seed(self.pool[index / 2 % self.pool.len()])))
                    .collect();
                random.shuffle(&mut patterns);
                patterns
            }
            Contents::AroundLimit => self.around_limit(random, shape),
        }
    }

    /// Contents that go with any others, a hole now and then.
    fn anything(&self, random: &mut Rng) -> Option<Pattern> {
        let seed = *random.choice(&self.pool).expect("a pool of contents");
        let offset = *random
            .choice(&[0, PAGE - 1, random.clone().usize(..PAGE)])
            .expect("offsets");
        let flip = *random.choice(&[0x01, 0x80]).expect("bits");
        Some(match random.u32(..100) {
            0..45 => Pattern::Seed(seed),
            45..60 => Pattern::Near {
                seed: Some(seed),
                offset,
                flip,
            },
            60..75 => Pattern::Seed(random.u64(..)),
            75..86 => Pattern::Zero,
            86..92 => Pattern::Near {
                seed: None,
                offset,
                flip,
            },
            _ => return None,
        })
    }

    /// Contents each of which fills as many KSM pages as allowed, or leaves over enough for one more. A single page
    /// left over is one that any process may be left with; so that only one can, it has all the others too.
    fn around_limit(&self, random: &mut Rng, shape: Shape) -> Vec<Option<Pattern>> {
        let limit = self.rules.limit as usize;
        let places = self.all_places();
        let mut patterns = vec![None; places.len()];
        // Places of different forests have nothing in common.
        let mut forests: BTreeMap<Forest, Vec<usize>> = BTreeMap::new();
        for (index, &at) in places.iter().enumerate() {
            forests.entry(self.forest(at)).or_default().push(index);
        }
        let lonely = Pattern::Seed(random.u64(..));
        for indices in forests.values_mut() {
            // The first area of a forest begins with one page too many.
            let first = indices[0] / shape.pages;
            let mut left: Vec<usize> = indices.clone();
            if 2 * limit < shape.pages {
                for index in left.drain(..=2 * limit) {
                    assert!(index / shape.pages == first, "not in the first area");
                    patterns[index] = Some(lonely);
                }
            }
            random.shuffle(&mut left);
            let mut empty = true;
            while !left.is_empty() {
                let mut copies = random.usize(1..=4 * limit + 1);
                if copies % limit == 1 % limit && copies > 1 {
                    copies += 1;
                }
                let copies = if copies <= left.len() { copies } else { 1 };
                let pattern = if copies > 1 && std::mem::take(&mut empty) {
                    Pattern::Zero
                } else {
                    Pattern::Seed(random.u64(..))
                };
                for index in left.drain(..copies) {
                    patterns[index] = Some(pattern);
                }
            }
        }
        patterns
    }

    fn all_places(&self) -> Vec<At> {
        let mut places = Vec::new();
        for (process, owner) in self.processes.iter().enumerate() {
            for (area, of) in owner.areas.iter().enumerate() {
                places.extend((0..of.places.len()).map(|index| At {
                    process,
                    area,
                    index,
                }));
            }
        }
        places
    }

    fn place(&self, at: At) -> &Place {
        &self.processes[at.process].areas[at.area].places[at.index]
    }

    fn place_mut(&mut self, at: At) -> &mut Place {
        &mut self.processes[at.process].areas[at.area].places[at.index]
    }

    fn address(&self, at: At) -> usize {
        self.processes[at.process].areas[at.area]
            .region
            .page(at.index)
    }

    /// Which forest a page of this place belongs to.
    fn forest(&self, at: At) -> Forest {
        let process = if self.rules.by_process { at.process } else { 0 };
        let node = if self.rules.across_nodes {
            0
        } else {
            self.processes[at.process].areas[at.area]
                .node
                .expect("an area that is bound to a node")
        };
        (process, node)
    }

    fn new_frame(&mut self) -> Frame {
        self.next += 1;
        Frame::Plain(self.next)
    }

    /// Writes what the model says to those pages.
    fn paint_all(&mut self, which: impl Fn(&Page) -> bool) -> Result<()> {
        for process in &mut self.processes {
            let mut pages = Vec::new();
            for area in &process.areas {
                for (place, addr) in area.places.iter().zip(area.region.addresses()) {
                    if let Some(page) = place.page.filter(&which) {
                        pages.push((addr, page.pattern));
                    }
                }
            }
            if !pages.is_empty() {
                process.child.paint(&pages)?;
            }
        }
        Ok(())
    }

    /// Advises part of an area, which was not advised so before.
    fn advise(
        &mut self,
        process: usize,
        area: usize,
        part: std::ops::Range<usize>,
        mergeable: bool,
    ) -> Result<()> {
        let owner = &mut self.processes[process];
        let region = owner.areas[area].region.part(part.start, part.len());
        let advice = if mergeable {
            libc::MADV_MERGEABLE
        } else {
            libc::MADV_UNMERGEABLE
        };
        owner.child.advise(region, advice)?;
        for index in part {
            let at = At {
                process,
                area,
                index,
            };
            self.place_mut(at).mergeable = mergeable;
            if !mergeable {
                self.separate(at);
            }
        }
        Ok(())
    }

    /// Gives a merged page memory of its own.
    fn separate(&mut self, at: At) {
        let frame = self.new_frame();
        if let Some(page) = &mut self.place_mut(at).page
            && !matches!(page.frame, Frame::Plain(_))
        {
            page.frame = frame;
        }
    }

    fn fork(&mut self, parent: usize) -> Result<usize> {
        let parent = &mut self.processes[parent];
        let child = Process {
            child: parent.child.fork()?,
            areas: parent.areas.clone(),
        };
        self.processes.push(child);
        Ok(self.processes.len() - 1)
    }

    /// Has a process write new contents to some of its pages.
    fn write_some(&mut self, random: &mut Rng, process: usize, percent: u32) -> Result<()> {
        let mut pages = Vec::new();
        for at in self.all_places() {
            if at.process != process
                || self.place(at).page.is_none()
                || random.u32(..100) >= percent
            {
                continue;
            }
            let Some(pattern) = self.anything(random) else {
                continue;
            };
            let frame = self.new_frame();
            let addr = self.address(at);
            let page = self.place_mut(at).page.as_mut().expect("checked above");
            (page.pattern, page.frame) = (pattern, frame);
            pages.push((addr, pattern));
        }
        self.processes[process].child.paint(&pages)
    }

    /// Rewrites the pages that change before every pass. Some of them are equal then.
    fn stir(&mut self) -> Result<()> {
        self.round += 1;
        for at in self.all_places() {
            let seed = 10_000 * self.round + at.index as u64 % 3;
            let frame = self.new_frame();
            if let Some(page) = &mut self.place_mut(at).page
                && page.volatile
            {
                (page.pattern, page.frame) = (Pattern::Seed(seed), frame);
            }
        }
        self.paint_all(|page| page.volatile)
    }

    /// Makes passes until nothing changes any more, and fails if that is not what the rules lead to.
    pub fn settle(&mut self, passes: &mut Passes, ksm: &Ksm) -> Result<()> {
        let (mut before, mut quiet, mut scanned) = (None, 0, 0);
        for _ in 0..MANY {
            self.stir()?;
            let scanned_before = ksm.read("pages_scanned")?;
            passes.pass()?;
            scanned = ksm.read("pages_scanned")? - scanned_before;
            let now = (ksm.counters()?, ksm.read("ksm_zero_pages")?);
            quiet = if before == Some(now) { quiet + 1 } else { 0 };
            before = Some(now);
            if quiet >= QUIET {
                break;
            }
        }
        ensure!(
            quiet >= QUIET,
            "after {MANY} passes the counters still change: {before:?}"
        );
        self.merge();
        let known = self.count(|place| self.is_item(place));
        ensure!(
            self.rules.smart_scan || scanned == known,
            "{scanned} pages are scanned in a pass instead of {known}"
        );
        Ok(())
    }

    /// Gives pages of their own to those that share merged ones by a fork only, if they may not.
    fn part_families(&mut self) {
        for at in self.all_places() {
            let place = *self.place(at);
            if let Some(page) = place.page.filter(|_| place.mergeable)
                && let Frame::Merged(number) = page.frame
                && self.rules.by_process
                && self.owners.get(&number) != Some(&self.processes[at.process].child.pid())
            {
                self.separate(at);
            }
        }
    }

    /// Brings the model to where merging must end.
    fn merge(&mut self) {
        let mut groups: BTreeMap<(Forest, Pattern), Vec<At>> = BTreeMap::new();
        let mut totals = Totals::default();
        self.part_families();
        for at in self.all_places() {
            let place = *self.place(at);
            let Some(page) = place.page.filter(|_| place.mergeable) else {
                continue;
            };
            let empty = page.pattern == Pattern::Zero && self.rules.use_zero_pages;
            if page.volatile {
                totals.volatile += 1;
            } else if empty && !matches!(page.frame, Frame::Merged(_)) {
                self.set_frame(at, Frame::Zero);
            } else {
                let group = groups.entry((self.forest(at), page.pattern)).or_default();
                group.push(at);
            }
        }
        for group in groups.into_values() {
            let count = group.len() as u64;
            let frames: BTreeSet<Frame> = group
                .iter()
                .filter_map(|&at| self.place(at).page.map(|page| page.frame))
                .collect();
            let merged = frames
                .iter()
                .find(|frame| matches!(frame, Frame::Merged(_)));
            if frames.len() == 1 && merged.is_none() {
                // Unique, or shared by forks only, which is as good as merged: one of them is found to have no like,
                // and the others to be the same page.
                totals.unshared += 1;
                totals.volatile += count - 1;
            } else if count <= self.rules.limit || merged.is_some() {
                totals.shared += 1;
                totals.sharing += count - 1;
                let frame = match merged {
                    Some(&frame) => frame,
                    None => {
                        self.next += 1;
                        let owner = self.processes[group[0].process].child.pid();
                        self.owners.insert(self.next, owner);
                        Frame::Merged(self.next)
                    }
                };
                for at in group {
                    self.set_frame(at, frame);
                }
            } else {
                // A new KSM page is begun only when all others are full.
                assert!(
                    frames.len() as u64 == count,
                    "forks are let over the limit, as far as it happens"
                );
                let (full, left) = (count / self.rules.limit, count % self.rules.limit);
                let mut mappings = vec![self.rules.limit; full as usize];
                match left {
                    0 => {}
                    1 => totals.unshared += 1,
                    left => mappings.insert(0, left),
                }
                let pages = mappings.len() as u64;
                totals.shared += pages;
                totals.sharing += mappings.iter().sum::<u64>() - pages;
                if pages > 1 {
                    totals.chains += 1;
                    totals.dups += pages;
                }
                for at in group {
                    self.set_frame(at, Frame::OneOf(self.crowds.len()));
                }
                self.crowds.push(Crowd {
                    mappings,
                    one_left: left == 1,
                });
            }
        }
        self.totals = totals;
    }

    fn set_frame(&mut self, at: At, frame: Frame) {
        if let Some(page) = &mut self.place_mut(at).page {
            page.frame = frame;
        }
    }

    /// Writes, forks, moves, unmaps and unmerges parts of what is merged; one process exits.
    pub fn disturb(&mut self, random: &mut Rng) -> Result<()> {
        assert!(
            self.crowds.is_empty(),
            "what becomes of several KSM pages of one content is not determined"
        );
        let parent = random.usize(..self.processes.len());
        let child = self.fork(parent)?;
        self.write_some(random, child, 25)?;
        for process in 0..self.processes.len() {
            self.write_some(random, process, 8)?;
        }
        for process in 0..self.processes.len() {
            for area in 0..self.processes[process].areas.len() {
                let places = &self.processes[process].areas[area].places;
                let pages = places.len();
                // Areas that were split are left alone.
                if !places.iter().all(|place| place.mergeable && place.mapped) {
                    continue;
                }
                match random.u32(..5) {
                    0 => {
                        let part = part(random, pages);
                        self.end_sharing(process, area, part.clone())?;
                        self.advise(process, area, part, false)?;
                    }
                    1 => self.unmap(process, area, part(random, pages))?,
                    2 => self.move_away(process, area)?,
                    _ => {}
                }
            }
        }
        self.stir()?;
        // Any but the two that have just been forked.
        if self.processes.len() > 3 {
            let leaver = (0..child)
                .find(|&process| process != parent)
                .expect("three others");
            self.processes.remove(leaver).child.kill()?;
        }
        Ok(())
    }

    fn unmap(&mut self, process: usize, area: usize, part: std::ops::Range<usize>) -> Result<()> {
        let owner = &mut self.processes[process];
        let region = owner.areas[area].region.part(part.start, part.len());
        owner.child.munmap(region)?;
        for place in &mut owner.areas[area].places[part] {
            *place = Place {
                mapped: false,
                mergeable: false,
                page: None,
            };
        }
        Ok(())
    }

    /// Has a process write what is there already, so that it shares no page with a fork.
    ///
    /// Of two pages that are merged either may become the KSM page, and be one then wherever it is mapped, even where
    /// nobody has advised it: which one depends on the order of scanning.
    fn end_sharing(
        &mut self,
        process: usize,
        area: usize,
        part: std::ops::Range<usize>,
    ) -> Result<()> {
        let mut pages = Vec::new();
        for index in part {
            let at = At {
                process,
                area,
                index,
            };
            let (frame, addr) = (self.new_frame(), self.address(at));
            if let Some(page) = &mut self.place_mut(at).page {
                page.frame = frame;
                pages.push((addr, page.pattern));
            }
        }
        self.processes[process].child.paint(&pages)
    }

    /// Moves an area, which the kernel unmerges first.
    fn move_away(&mut self, process: usize, area: usize) -> Result<()> {
        let owner = &mut self.processes[process];
        let region = owner.areas[area].region;
        let to = owner.child.map(Mapping::pages(region.pages))?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let moved = owner.child.remap(region, region.pages, flags, to.addr)?;
        ensure!(moved == to, "memory was moved to {moved:?}, not to {to:?}");
        owner.areas[area].region = moved;
        for index in 0..region.pages {
            self.separate(At {
                process,
                area,
                index,
            });
        }
        Ok(())
    }

    /// Brings the model to where `run=2` must end.
    pub fn unmerge(&mut self) {
        for at in self.all_places() {
            self.separate(at);
        }
        self.crowds.clear();
        self.totals = Totals::default();
    }

    /// Fails unless every byte of every page is what it should be.
    pub fn verify(&mut self) -> Result<()> {
        for (number, process) in self.processes.iter_mut().enumerate() {
            let mut pages = Vec::new();
            for area in &process.areas {
                for (place, addr) in area.places.iter().zip(area.region.addresses()) {
                    // A look at a hole would put a page there.
                    if let Some(page) = place.page {
                        pages.push((addr, page.pattern));
                    }
                }
            }
            let wrong = process.child.differing(&pages)?;
            ensure!(
                wrong.is_empty(),
                "{} of {} pages of process {number} have the wrong contents, the first at {:#x}",
                wrong.len(),
                pages.len(),
                wrong[0]
            );
        }
        Ok(())
    }

    /// Whether a producer has a record of this place.
    fn is_item(&self, place: &Place) -> bool {
        place.mergeable && place.page.is_some_and(|page| page.frame != Frame::Zero)
    }

    fn count(&self, which: impl Fn(&Place) -> bool) -> u64 {
        let places = self.processes.iter().flat_map(|process| &process.areas);
        let places = places.flat_map(|area| &area.places);
        places.filter(|place| which(place)).count() as u64
    }
}

/// A place in a world.
#[derive(Clone, Copy, Debug)]
struct At {
    process: usize,
    area: usize,
    index: usize,
}

fn is_zero(place: &Place) -> bool {
    place.page.is_some_and(|page| page.frame == Frame::Zero)
}

fn is_of_crowd(place: &Place) -> bool {
    place
        .page
        .is_some_and(|page| matches!(page.frame, Frame::OneOf(_)))
}

fn is_merged(place: &Place) -> bool {
    place
        .page
        .is_some_and(|page| matches!(page.frame, Frame::Merged(_) | Frame::OneOf(_)))
}

/// Some of `pages`, neither none nor all.
fn part(random: &mut Rng, pages: usize) -> std::ops::Range<usize> {
    let start = random.usize(..pages - 1);
    let end = random.usize(start + 1..=pages);
    if (start, end) == (0, pages) {
        return 0..pages - 1;
    }
    start..end
}
