// SPDX-License-Identifier: GPL-2.0

//! One record per page that was seen: where it is, its hash, which tree it is in.

#![forbid(unsafe_code)]

use crate::{
    arena::{
        self,
        Id,
        Record, //
    },
    domain::Domain,
    forest::Keyed,
    mm::node::RmapItem,
    rbtree::{
        Links,
        Node, //
    },
    registry::SlotId, //
};
use kernel::page::PAGE_SHIFT;

/// Bits of a hash that are kept; the low ones make room for [`Age`] and [`Planted`].
const HASH_MASK: u64 = !0xffff;

/// Bits of a place that hold the page number; x86-64 with five levels has 56-bit user addresses.
const PAGE_BITS: u32 = 44;
/// Bits of a place that hold the slot.
const SLOT_BITS: u32 = 18;

/// Most address spaces that can be scanned at a time.
pub(crate) const MAX_SLOTS: SlotId = 1 << SLOT_BITS;

/// The hash of a page's contents, and of the domain that it belongs to, as the trees use it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct ContentHash(u64);

impl ContentHash {
    /// From a full 64-bit hash. Never equal to [`ContentHash::default`], which stands for "none yet".
    pub(crate) fn new(hash: u64) -> Self {
        match hash & HASH_MASK {
            0 => Self(HASH_MASK),
            hash => Self(hash),
        }
    }

    /// The same contents in a domain, where they are equal to none of another domain's.
    pub(crate) fn in_domain(self, domain: Domain) -> Self {
        Self::new(self.0 ^ domain.mix())
    }

    /// As a key for a forest.
    pub(crate) fn key(self) -> u64 {
        self.0
    }
}

/// What a page is to us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum State {
    /// In no tree.
    Idle,
    /// In the unstable tree.
    Unstable(Planted),
    /// Merged: the [`Rmap`] record of the mapping.
    Merged(Id),
}

/// Where and beside what an item was put into the unstable tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Planted {
    /// NUMA node of the forest.
    pub(crate) nid: usize,
    /// There were items of the same hash already, but their pages could not be merged with this one's then.
    pub(crate) twin: bool,
}

/// How many passes have looked at a page in vain, as far as smart scan wants to know: the longer, the more
/// passes leave it out.
///
/// Stock counts an age and the passes still to be left out; but the one follows from the other, and from some age on
/// it is always eight passes of nine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Age(u8);

impl Age {
    /// From here on every ninth pass looks.
    const OLD: u8 = 13;
    /// The last of the nine.
    const OLDEST: u8 = 21;

    /// Whether this pass should look at the page.
    pub(crate) fn is_due(self) -> bool {
        matches!(self.0, 0..=3 | 5 | 8 | Self::OLD)
    }

    /// One pass older.
    pub(crate) fn next(self) -> Self {
        Self(if self.0 >= Self::OLDEST {
            Self::OLD
        } else {
            self.0.saturating_add(1)
        })
    }
}

/// Low bits of a word that hold the NUMA node; the kernel has at most 2^10.
const NID_BITS: u32 = 10;
/// The bit above them that says that there is a twin.
const TWIN: u64 = 1 << NID_BITS;
/// Where the age is, above both.
const AGE_SHIFT: u32 = 11;
const AGE_MASK: u64 = 0x1f << AGE_SHIFT;

const TAG_IDLE: u64 = 0;
const TAG_UNSTABLE: u64 = 1;
const TAG_MERGED: u64 = 2;

/// A page at an address of an address space: 32 bytes, as there is one for every page that is scanned.
///
/// # Invariants
///
/// `place` is, from the top bit down: page number, slot, tag. `word` is, by tag: the hash, the age, the twin's bit and
/// the NUMA node; or the id of the rmap record.
#[derive(Default)]
pub(crate) struct PageItem {
    links: Links,
    /// The address space's item with the next higher address.
    next: u32,
    word: u64,
    place: u64,
}

impl PageItem {
    /// An item for `address` in the address space `slot`, followed by `next` in its list.
    pub(crate) fn new(slot: SlotId, address: usize, next: Id) -> Self {
        let page = (address >> PAGE_SHIFT) as u64 & ((1 << PAGE_BITS) - 1);
        let slot = u64::from(slot & (MAX_SLOTS - 1));
        // INVARIANT: As the fields are laid out.
        Self {
            links: Links::new(),
            next: next.raw(),
            word: 0,
            place: page << (SLOT_BITS + 2) | slot << 2 | TAG_IDLE,
        }
    }

    /// Where the page is mapped.
    pub(crate) fn address(&self) -> usize {
        ((self.place >> (SLOT_BITS + 2)) as usize) << PAGE_SHIFT
    }

    /// The address space.
    pub(crate) fn slot(&self) -> SlotId {
        (self.place >> 2) as SlotId & (MAX_SLOTS - 1)
    }

    /// The next item of the address space.
    pub(crate) fn next(&self) -> Id {
        Id::from_raw(self.next)
    }

    /// Links another item behind this one.
    pub(crate) fn set_next(&mut self, next: Id) {
        self.next = next.raw();
    }

    /// What the page is now.
    pub(crate) fn state(&self) -> State {
        match self.place & 3 {
            TAG_UNSTABLE => State::Unstable(Planted {
                nid: self.word as usize & ((1 << NID_BITS) - 1),
                twin: self.word & TWIN != 0,
            }),
            TAG_MERGED => State::Merged(Id::from_raw(self.word as u32)),
            _ => State::Idle,
        }
    }

    /// The hash of the last pass, unless the page is merged.
    pub(crate) fn hash(&self) -> ContentHash {
        match self.place & 3 {
            TAG_MERGED => ContentHash::default(),
            _ => ContentHash(self.word & HASH_MASK),
        }
    }

    /// How often the page has been looked at. That of a merged page is forgotten: it starts over.
    pub(crate) fn age(&self) -> Age {
        match self.place & 3 {
            TAG_MERGED => Age::default(),
            _ => Age(((self.word & AGE_MASK) >> AGE_SHIFT) as u8),
        }
    }

    /// Makes the page one pass older, unless it is merged.
    pub(crate) fn grow_older(&mut self) {
        if self.place & 3 != TAG_MERGED {
            let age = u64::from(self.age().next().0) << AGE_SHIFT;
            self.word = self.word & !AGE_MASK | age;
        }
    }

    fn set(&mut self, tag: u64, word: u64) {
        self.place = self.place & !3 | tag;
        self.word = word;
    }

    /// Out of all trees, with a hash to compare with on the next pass.
    pub(crate) fn set_idle(&mut self, hash: ContentHash) {
        let age = u64::from(self.age().0) << AGE_SHIFT;
        self.set(TAG_IDLE, hash.0 | age);
    }

    /// In the unstable tree, with the hash that it has.
    pub(crate) fn set_unstable(&mut self, planted: Planted) {
        let nid = planted.nid as u64 & ((1 << NID_BITS) - 1);
        let twin = if planted.twin { TWIN } else { 0 };
        let age = u64::from(self.age().0) << AGE_SHIFT;
        self.set(TAG_UNSTABLE, self.hash().0 | age | twin | nid);
    }

    /// Merged, with its rmap record.
    pub(crate) fn set_merged(&mut self, rmap: Id) {
        self.set(TAG_MERGED, u64::from(rmap.raw()));
    }
}

impl Record for PageItem {
    type Page = [Self; arena::slots::<Self>()];
}

impl Node for PageItem {
    fn links(&self) -> &Links {
        &self.links
    }

    fn links_mut(&mut self) -> &mut Links {
        &mut self.links
    }
}

impl Keyed for PageItem {
    fn key(&self) -> u64 {
        self.hash().key()
    }
}

/// A mapping of a merged page: the structure that the core reads, and our way from it to the stable node.
#[derive(Default)]
pub(crate) struct Rmap {
    /// What is linked to the node; `None` only in an empty record.
    pub(crate) item: Option<RmapItem>,
    /// The node's record in the stable tree.
    pub(crate) node: Option<Id>,
}

impl Record for Rmap {
    type Page = [Self; arena::slots::<Self>()];
}
