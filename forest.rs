// SPDX-License-Identifier: GPL-2.0

//! Forests: many small trees that act as one big one.
//!
//! A red-black tree of a million records is twenty levels high, and each level is a cache miss. But
//! the records here are found by a hash of 64 evenly spread bits, so its top bits can choose one of
//! an array of trees, which then hold one record each on average. Since the *top* bits choose, the
//! trees in the order of the array hold the records in the order of their keys.
//!
//! The array follows the number of records, with no step that takes long: as in linear hashing, a
//! new array of twice (or half) the size takes over from the old one a few trees at a time, with
//! each insertion and removal. The first trees of the order are in the new array then, and the rest
//! is in the old one:
//!
//! ```text
//!              order of keys -->
//! old (n):     .     .     .     | D     E     F     G     H
//! new (2n):    a  a' b  b' c  c' |
//! ```

#![forbid(unsafe_code)]

use crate::{
    arena::{
        Arena,
        Id, //
    },
    rbtree::{
        self,
        Node,
        Root, //
    },
};
use core::mem;
use kernel::{
    alloc::Flags,
    prelude::*, //
};

/// How the array is allocated: without waiting for memory, without complaining if there is none.
///
/// A forest can do without a bigger array, so nobody's pages should be reclaimed for one.
const ARRAY_FLAGS: Flags = GFP_NOWAIT;

/// How many steps towards a bigger array each insertion or removal pays for.
///
/// With 1 an array would just be ready when the next one is due. With 4 there are two of them
/// during a quarter of that time only.
const STEPS_UP: usize = 4;

/// How many steps towards a smaller array each insertion or removal pays for.
///
/// More, as there are few records left then, and most of the trees are empty.
const STEPS_DOWN: usize = 16;

/// After a failure to allocate an array, how many insertions or removals go by before the next try.
const PAUSE: u32 = 1024;

/// An array is not made smaller than 2 to this power, which is one page.
const LEAST_BITS: u32 = 10;

/// An array does not get bigger than 2 to this power: one root for each possible record.
const MOST_BITS: u32 = 31;

/// A node with a 64-bit key.
pub(crate) trait Keyed: Node {
    /// Returns the key, which must not change while the node is in a forest.
    ///
    /// Its top bits must be evenly spread, or the forest degrades to a single tree.
    fn key(&self) -> u64;
}

/// A place in the root arrays.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Slot {
    /// In the array that is being filled.
    New(usize),
    /// In the array that is being emptied, or the only one.
    Old(usize),
}

/// A multimap of records by their 64-bit keys.
///
/// Records with equal keys stand next to each other, in the order in which they were inserted.
///
/// No operation waits for memory, but all that take `&mut self` may free an array, which may sleep.
///
/// # Invariants
///
/// - `old` has 2^`bits` roots, or none if `bits` is 0; `single` stands for its one root then.
/// - While a resize is going on, `new_bits` is `bits` + 1 or `bits` - 1, `new` has fewer than
///   2^`new_bits` roots and room for all of them, and the roots of `old` that come before or among
///   those of `new` in the order of keys are empty. Otherwise `new_bits` is `bits` and `new` is
///   empty.
/// - A record with key `k` is in the tree at `slot(k)`, ordered by key there.
/// - No record has a key below `lowest`, and the tree at `slot(lowest)` is not empty, unless the
///   forest is.
/// - `len` is the number of records.
pub(crate) struct Forest {
    single: Root,
    old: KVVec<Root>,
    bits: u32,
    new: KVVec<Root>,
    new_bits: u32,
    len: usize,
    lowest: u64,
    /// Insertions and removals before the next allocation may be tried.
    pause: u32,
}

/// Returns the top `bits` of a key: an index into 2^`bits` roots.
#[inline]
const fn top_bits(key: u64, bits: u32) -> usize {
    match key.checked_shr(u64::BITS.wrapping_sub(bits)) {
        Some(index) => index as usize,
        None => 0,
    }
}

/// Returns the least key that has `index` for its top `bits`.
#[inline]
const fn least_key(index: usize, bits: u32) -> u64 {
    match (index as u64).checked_shl(u64::BITS.wrapping_sub(bits)) {
        Some(key) => key,
        None => 0,
    }
}

/// Returns an id, or `None` if it is nil.
#[inline]
fn some(id: Id) -> Option<Id> {
    if id.is_nil() {
        None
    } else {
        Some(id)
    }
}

impl Forest {
    /// Creates an empty forest, which has a single root. Allocates nothing.
    pub(crate) const fn new() -> Self {
        Self {
            single: Root::new(),
            old: KVVec::new(),
            bits: 0,
            new: KVVec::new(),
            new_bits: 0,
            len: 0,
            lowest: u64::MAX,
            pause: 0,
        }
    }

    /// Returns the number of records.
    #[cfg_attr(not(ksm_rs_kunit), expect(dead_code))]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Returns the kernel memory held by the root arrays, in bytes.
    #[cfg_attr(not(ksm_rs_kunit), expect(dead_code))]
    pub(crate) fn bytes(&self) -> usize {
        self.old
            .capacity()
            .wrapping_add(self.new.capacity())
            .wrapping_mul(size_of::<Root>())
    }

    /// Adds a record, after any others with the same key.
    ///
    /// `id` must be a record of `arena` that is in no tree; otherwise nothing is done. A forest that
    /// cannot get a bigger array just becomes slower. Does not wait for memory, but may sleep.
    pub(crate) fn insert<T: Keyed>(&mut self, arena: &mut Arena<T>, id: Id) {
        let Some(node) = arena.get(id) else {
            return;
        };
        let key = node.key();
        let slot = self.slot(key);
        let mut root = self.root(slot);
        if !root.insert_by(arena, id, |node| key < node.key()) {
            return;
        }
        self.set_root(slot, root);
        self.lowest = self.lowest.min(key);
        self.len = self.len.wrapping_add(1);

        let roots = self.roots();
        if self.len > roots && self.bits < MOST_BITS {
            self.start_resize(self.bits.wrapping_add(1));
        }
        self.step(arena);
    }

    /// Returns the first record with the given key.
    #[inline]
    pub(crate) fn first_equal<T: Keyed>(&self, arena: &Arena<T>, key: u64) -> Option<Id> {
        let root = self.root(self.slot(key));
        let id = root.partition_point(arena, |node| node.key() < key);
        (arena.get(id)?.key() == key).then_some(id)
    }

    /// Returns how many records [`Forest::first_equal`] passes for the given key.
    pub(crate) fn depth_of<T: Keyed>(&self, arena: &Arena<T>, key: u64) -> u32 {
        let mut passed = 0u32;
        self.root(self.slot(key)).partition_point(arena, |node| {
            passed = passed.saturating_add(1);
            node.key() < key
        });
        passed
    }

    /// Returns the record after `id`, which must be in this forest, if it has the same key.
    pub(crate) fn next_equal<T: Keyed>(&self, arena: &Arena<T>, id: Id) -> Option<Id> {
        let key = arena.get(id)?.key();
        // Equal keys are in the same tree.
        let next = rbtree::next(arena, id);
        (arena.get(next)?.key() == key).then_some(next)
    }

    /// Takes out a record, which must be in this forest.
    ///
    /// Nothing is done if there is no such record or its links say that it is in no tree. Does not
    /// wait for memory, but may sleep.
    pub(crate) fn remove<T: Keyed>(&mut self, arena: &mut Arena<T>, id: Id) {
        let Some(node) = arena.get(id) else {
            return;
        };
        let slot = self.slot(node.key());
        let mut root = self.root(slot);
        if !root.erase(arena, id) {
            return;
        }
        self.set_root(slot, root);
        self.len = self.len.wrapping_sub(1);
        if self.len == 0 {
            *self = Self::new();
            return;
        }
        if root.is_empty() {
            self.raise_lowest();
        }

        if self.len < self.roots() / 8 && self.bits > LEAST_BITS {
            self.start_resize(self.bits.wrapping_sub(1));
        }
        self.step(arena);
    }

    /// Returns the first record in the order of keys.
    pub(crate) fn first<T: Keyed>(&self, arena: &Arena<T>) -> Option<Id> {
        if self.len == 0 {
            return None;
        }
        let (_, root) = self.first_tree(self.slot(self.lowest))?;
        some(root.first(arena))
    }

    /// Returns the record after `id`, which must be in this forest, in the order of keys.
    ///
    /// All records are visited, each once, by going from [`Forest::first`] to the next until there
    /// is none, if the forest does not change on the way. Taking the current record out is allowed
    /// once the next one is known.
    pub(crate) fn next<T: Keyed>(&self, arena: &Arena<T>, id: Id) -> Option<Id> {
        let node = arena.get(id)?;
        if let Some(next) = some(rbtree::next(arena, id)) {
            return Some(next);
        }
        let slot = self.slot_after(self.slot(node.key()))?;
        let (_, root) = self.first_tree(slot)?;
        some(root.first(arena))
    }

    /// Verifies the forest and all of its trees. Takes O(n log n) time for n records.
    ///
    /// # Errors
    ///
    /// What is wrong with a tree; what is wrong with the forest itself counts as
    /// [`rbtree::Damage::Order`].
    #[cfg(ksm_rs_kunit)]
    pub(crate) fn check<T: Keyed>(&self, arena: &Arena<T>) -> Result<(), rbtree::Damage> {
        let resizing = self.bits != self.new_bits;
        let roots = 1usize.wrapping_shl(self.new_bits);
        if self.roots() != self.old.len().max(1)
            || resizing != (self.new.capacity() != 0)
            || (resizing && (self.new.capacity() < roots || self.new.len() >= roots))
        {
            return Err(rbtree::Damage::Order);
        }

        let mut count: usize = 0;
        let mut slot = if self.new.is_empty() {
            Slot::Old(0)
        } else {
            Slot::New(0)
        };
        loop {
            let root = self.root(slot);
            let nodes = root.check(arena, |one, other| one.key() <= other.key())?;
            count = count.wrapping_add(nodes);
            let mut at = root.first(arena);
            while let Some(node) = arena.get(at) {
                if self.slot(node.key()) != slot || node.key() < self.lowest {
                    return Err(rbtree::Damage::Order);
                }
                at = rbtree::next(arena, at);
            }
            match self.slot_after(slot) {
                Some(next) => slot = next,
                None => break,
            }
        }
        if count == self.len && (count == 0 || !self.root(self.slot(self.lowest)).is_empty()) {
            Ok(())
        } else {
            Err(rbtree::Damage::Order)
        }
    }

    /// Returns the number of roots, not counting those of a resize that is going on.
    fn roots(&self) -> usize {
        1usize.wrapping_shl(self.bits)
    }

    /// Returns where records with the given key are.
    #[inline]
    fn slot(&self, key: u64) -> Slot {
        if self.new_bits != self.bits {
            let index = top_bits(key, self.new_bits);
            if index < self.new.len() {
                return Slot::New(index);
            }
        }
        Slot::Old(top_bits(key, self.bits))
    }

    /// Returns the root at `slot`.
    #[inline]
    fn root(&self, slot: Slot) -> Root {
        let root = match slot {
            Slot::New(index) => self.new.get(index),
            Slot::Old(index) if self.bits != 0 => self.old.get(index),
            Slot::Old(_) => Some(&self.single),
        };
        root.copied().unwrap_or_default()
    }

    /// Replaces the root at `slot`.
    #[inline]
    fn set_root(&mut self, slot: Slot, root: Root) {
        let place = match slot {
            Slot::New(index) => self.new.get_mut(index),
            Slot::Old(index) if self.bits != 0 => self.old.get_mut(index),
            Slot::Old(_) => Some(&mut self.single),
        };
        if let Some(place) = place {
            *place = root;
        }
    }

    /// Returns the least key that belongs to `slot`.
    fn least_key_in(&self, slot: Slot) -> u64 {
        match slot {
            Slot::New(index) => least_key(index, self.new_bits),
            Slot::Old(index) => least_key(index, self.bits),
        }
    }

    /// Returns how many roots of the old array the new one has taken over.
    fn taken(&self) -> usize {
        if self.new_bits > self.bits {
            self.new.len() / 2
        } else {
            self.new.len().wrapping_mul(2)
        }
    }

    /// Returns the slot after the given one in the order of keys.
    fn slot_after(&self, slot: Slot) -> Option<Slot> {
        let old = match slot {
            Slot::New(index) => {
                let next = index.wrapping_add(1);
                if next < self.new.len() {
                    return Some(Slot::New(next));
                }
                self.taken()
            }
            Slot::Old(index) => index.wrapping_add(1),
        };
        (old < self.roots()).then_some(Slot::Old(old))
    }

    /// Returns the first tree at or after `slot` that is not empty.
    fn first_tree(&self, slot: Slot) -> Option<(Slot, Root)> {
        let mut slot = slot;
        loop {
            let root = self.root(slot);
            if !root.is_empty() {
                return Some((slot, root));
            }
            // Ends, as each slot comes after the last in a finite order.
            slot = self.slot_after(slot)?;
        }
    }

    /// Makes `lowest` lead to a tree that is not empty again, after a tree became empty.
    ///
    /// The trees that are passed here are not looked at by [`Forest::first`] any more, which is what
    /// makes draining a forest from its front take linear time.
    fn raise_lowest(&mut self) {
        let slot = self.slot(self.lowest);
        if self.root(slot).is_empty() {
            self.lowest = match self.first_tree(slot) {
                Some((slot, _)) => self.least_key_in(slot),
                None => u64::MAX,
            };
        }
    }

    /// Begins to replace the array by one of 2^`bits` roots, unless one is being replaced already.
    fn start_resize(&mut self, bits: u32) {
        if self.new_bits != self.bits {
            return;
        }
        if self.pause != 0 {
            self.pause = self.pause.wrapping_sub(1);
            return;
        }
        match KVVec::with_capacity(1usize.wrapping_shl(bits), ARRAY_FLAGS) {
            Ok(roots) => {
                self.new = roots;
                self.new_bits = bits;
            }
            Err(_) => self.pause = PAUSE,
        }
    }

    /// Goes on with a resize, if there is one.
    fn step<T: Keyed>(&mut self, arena: &mut Arena<T>) {
        let steps = if self.new_bits > self.bits {
            STEPS_UP
        } else {
            STEPS_DOWN
        };
        for _ in 0..steps {
            if self.new_bits == self.bits {
                return;
            }
            let taken = self.taken();
            let root = self.take_root(taken);
            if self.new_bits > self.bits {
                // The lower half of the keys has a 0 in the bit that the index gets in addition.
                let bit = 1u64.wrapping_shl(u64::BITS.wrapping_sub(self.new_bits));
                let (low, high) = root.split(arena, |node| node.key() & bit == 0);
                self.push(low);
                self.push(high);
                self.raise_lowest();
            } else {
                let high = self.take_root(taken.wrapping_add(1));
                let root = Root::join(arena, root, high);
                self.push(root);
            }
            if self.new.len() == 1usize.wrapping_shl(self.new_bits) {
                self.old = mem::take(&mut self.new);
                self.bits = self.new_bits;
            }
        }
    }

    /// Takes a root out of the old array.
    fn take_root(&mut self, index: usize) -> Root {
        let slot = Slot::Old(index);
        let root = self.root(slot);
        self.set_root(slot, Root::new());
        root
    }

    /// Adds a root to the new array.
    fn push(&mut self, root: Root) {
        // Cannot fail: there is room for all of them since the array was allocated.
        let _ = self.new.push_within_capacity(root);
    }
}
