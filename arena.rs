// SPDX-License-Identifier: GPL-2.0

//! Storage for very many small records, addressed by index.
//!
//! A scan keeps a record for every page it has ever looked at, and links those records into trees.
//! Were the links pointers, every tree operation would be `unsafe` and every link eight bytes. Here
//! the records live in an [`Arena`], and whoever wants to refer to one keeps its [`Id`]: four
//! bytes, and the worst that a wrong one can do is to find no record or the wrong one.
//!
//! Records live in chunks of one page each. Within a fresh chunk they are handed out in order, so
//! that records made one after the other by a scan are neighbours in memory and are met in the same
//! order by the next scan. A chunk is given back to the kernel with its last record.
//!
//! # Examples
//!
//! ```ignore
//! #[derive(Default)]
//! struct Thing {
//!     value: u64,
//! }
//!
//! impl Record for Thing {
//!     type Page = [Self; arena::slots::<Self>()];
//! }
//!
//! let mut things = Arena::new();
//! let id = things.insert(Thing { value: 5 }, GFP_KERNEL)?;
//! assert_eq!(things.get(id).map(|thing| thing.value), Some(5));
//! ```

#![forbid(unsafe_code)]

use core::mem;
use kernel::{
    alloc::{
        AllocError,
        Flags, //
    },
    fmt,
    prelude::*, //
};

/// Bytes that a chunk of records takes at most.
///
/// One page of the smallest size there is, whatever the page size of the architecture: a chunk only
/// returns to the kernel when all of its records are gone, so bigger ones would hold on to more.
const CHUNK_BYTES: usize = 4096;

/// Most records in a chunk, so that its occupancy fits four words.
const MAX_SLOTS: usize = 256;

/// Words of a chunk's occupancy bitmap.
const BITMAP_WORDS: usize = MAX_SLOTS / 64;

/// Ids are below this.
///
/// The trees keep a colour in the top bit of an id, and two values of the remaining 31 bits for
/// themselves.
const ID_LIMIT: u64 = 0x7fff_fffe;

/// Index of no chunk.
const NO_CHUNK: u32 = u32::MAX;

/// Returns how many records of type `T` fit a chunk; for the array in [`Record::Page`].
///
/// At least 1, even if `T` does not fit a page.
pub(crate) const fn slots<T>() -> usize {
    let fit = match CHUNK_BYTES.checked_div(size_of::<T>()) {
        Some(fit) => fit,
        None => MAX_SLOTS,
    };
    match fit {
        0 => 1,
        1..MAX_SLOTS => fit,
        _ => MAX_SLOTS,
    }
}

/// Something that an [`Arena`] can store.
///
/// The [`Default`] is what an empty slot holds. It should be cheap to make and to drop.
pub(crate) trait Record: Default {
    /// A chunk of such records: always `[Self; arena::slots::<Self>()]`.
    ///
    /// It is an associated type because only where the record is a concrete type can the length of
    /// the array be computed from its size. With it a chunk is reached through a thin pointer.
    type Page: Page<Self>;
}

/// A chunk of records; implemented by arrays.
pub(crate) trait Page<T>: Sized {
    /// Records in the chunk.
    const SLOTS: usize;

    /// Allocates a chunk of default records.
    ///
    /// Sleeps if `flags` allow it.
    ///
    /// # Errors
    ///
    /// [`AllocError`] if there is no memory.
    fn new(flags: Flags) -> Result<KBox<Self>, AllocError>;

    /// Returns the record in `slot`.
    fn get(&self, slot: usize) -> Option<&T>;

    /// Returns the record in `slot`.
    fn get_mut(&mut self, slot: usize) -> Option<&mut T>;
}

impl<T: Default, const N: usize> Page<T> for [T; N] {
    const SLOTS: usize = N;

    fn new(flags: Flags) -> Result<KBox<Self>, AllocError> {
        // In place, as a page is too much for the stack.
        KBox::init(::pin_init::init_array_from_fn(|_| T::default()), flags).map_err(|_| AllocError)
    }

    #[inline]
    fn get(&self, slot: usize) -> Option<&T> {
        self.as_slice().get(slot)
    }

    #[inline]
    fn get_mut(&mut self, slot: usize) -> Option<&mut T> {
        self.as_mut_slice().get_mut(slot)
    }
}

/// The place of a record in an [`Arena`], or [`Id::NIL`].
///
/// An id stays valid, and the record where it is, until the record is removed. Afterwards the id
/// may be given to another record.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Id(u32);

impl Id {
    /// The id of no record.
    pub(crate) const NIL: Self = Self(u32::MAX);

    /// Returns whether this is [`Id::NIL`].
    #[inline]
    pub(crate) const fn is_nil(self) -> bool {
        self.0 == Self::NIL.0
    }

    /// Returns the number behind the id: below 2^31 - 2, or [`u32::MAX`] for [`Id::NIL`].
    #[inline]
    pub(crate) const fn raw(self) -> u32 {
        self.0
    }

    /// Makes an id from a number that came from [`Id::raw`].
    ///
    /// Any other number gives an id that may belong to no record.
    #[inline]
    pub(crate) const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }
}

impl Default for Id {
    fn default() -> Self {
        Self::NIL
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_nil() {
            f.write_str("nil")
        } else {
            write!(f, "{}", self.0)
        }
    }
}

/// What is known about a chunk apart from its records.
///
/// It is kept away from the pointers to the chunks, as looking up a record does not need it.
struct Chunk {
    /// A bit for each slot, set where there is a record.
    occupied: [u64; BITMAP_WORDS],
    /// Bits set in `occupied`.
    used: u32,
    /// Previous in the list of chunks with room.
    previous: u32,
    /// Next in the list of chunks with room, or in that of table entries without a chunk.
    next: u32,
}

impl Chunk {
    const EMPTY: Self = Self {
        occupied: [0; BITMAP_WORDS],
        used: 0,
        previous: NO_CHUNK,
        next: NO_CHUNK,
    };

    /// Occupies the lowest free one of the first `slots` slots.
    fn claim(&mut self, slots: usize) -> Option<usize> {
        let mut base: usize = 0;
        for word in &mut self.occupied {
            let bit = word.trailing_ones();
            if bit < u64::BITS {
                let slot = base.wrapping_add(bit as usize);
                if slot >= slots {
                    return None;
                }
                *word |= 1u64.wrapping_shl(bit);
                self.used = self.used.wrapping_add(1);
                return Some(slot);
            }
            base = base.wrapping_add(u64::BITS as usize);
        }
        None
    }

    /// Frees `slot`; returns whether it was occupied.
    fn release(&mut self, slot: usize) -> bool {
        let Some(word) = self.occupied.get_mut(slot / u64::BITS as usize) else {
            return false;
        };
        let bit = 1u64.wrapping_shl(slot as u32 % u64::BITS);
        let occupied = *word & bit != 0;
        if occupied {
            *word &= !bit;
            self.used = self.used.wrapping_sub(1);
        }
        occupied
    }
}

/// A growing and shrinking set of records of type `T`, each reached by its [`Id`].
///
/// Looking up a record takes two memory accesses that depend on each other: the table entry of its
/// chunk (eight bytes), and the record. Inserting and removing take constant time, apart from the
/// table's rare growth by doubling.
///
/// # Invariants
///
/// - `pages` and `chunks` have the same length, and `pages[i]` is `Some` iff `chunks[i].used` is not
///   0.
/// - The list from `room` through `next` and `previous` holds exactly the chunks that have a page
///   and a free slot.
/// - The list from `vacant` through `next` holds exactly the entries without a page.
/// - Slots without a record hold the default record.
pub(crate) struct Arena<T: Record> {
    pages: KVVec<Option<KBox<T::Page>>>,
    chunks: KVVec<Chunk>,
    room: u32,
    vacant: u32,
    len: usize,
    live: usize,
}

impl<T: Record> Arena<T> {
    /// Records in a chunk.
    const SLOTS: usize = {
        let count = <T::Page as Page<T>>::SLOTS;
        assert!(
            count == slots::<T>(),
            "`Page` is not `[Self; slots::<Self>()]`"
        );
        count
    };

    /// Low bits of an id that tell the slot; the others tell the chunk.
    const SHIFT: u32 = Self::SLOTS.next_power_of_two().trailing_zeros();

    /// Creates an empty arena. Allocates nothing.
    pub(crate) const fn new() -> Self {
        Self {
            pages: KVVec::new(),
            chunks: KVVec::new(),
            room: NO_CHUNK,
            vacant: NO_CHUNK,
            len: 0,
            live: 0,
        }
    }

    /// Returns the number of records.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Returns the kernel memory held, in bytes: the chunks and the tables.
    #[cfg_attr(not(ksm_rs_kunit), expect(dead_code))]
    pub(crate) fn bytes(&self) -> usize {
        // Chunks come from the power-of-two caches of the slab allocator.
        let chunk = size_of::<T::Page>().next_power_of_two();
        let entry = size_of::<Option<KBox<T::Page>>>();
        self.live
            .wrapping_mul(chunk)
            .wrapping_add(self.pages.capacity().wrapping_mul(entry))
            .wrapping_add(self.chunks.capacity().wrapping_mul(size_of::<Chunk>()))
    }

    /// Splits an id into the indices of its chunk and its slot.
    #[inline]
    fn place(id: Id) -> (usize, usize) {
        let raw = id.raw() as usize;
        let mask = 1usize.wrapping_shl(Self::SHIFT).wrapping_sub(1);
        (raw.wrapping_shr(Self::SHIFT), raw & mask)
    }

    /// Returns the record with the given id.
    ///
    /// The id of a record that was removed gives `None`, or the record that took its place since, or
    /// the default one: whether a slot is occupied is not looked up here, as this is the innermost
    /// step of every tree operation.
    #[inline]
    pub(crate) fn get(&self, id: Id) -> Option<&T> {
        let (chunk, slot) = Self::place(id);
        self.pages.get(chunk)?.as_ref()?.get(slot)
    }

    /// Returns the record with the given id; see [`Arena::get`] for ids of removed records.
    #[inline]
    pub(crate) fn get_mut(&mut self, id: Id) -> Option<&mut T> {
        let (chunk, slot) = Self::place(id);
        self.pages.get_mut(chunk)?.as_mut()?.get_mut(slot)
    }

    /// Stores a record.
    ///
    /// Sleeps if `flags` allow it.
    ///
    /// # Errors
    ///
    /// [`AllocError`] if there is no memory, or if the arena has no more ids (2^31 at most).
    /// `value` is dropped then, and the arena is as before.
    pub(crate) fn insert(&mut self, value: T, flags: Flags) -> Result<Id, AllocError> {
        if self.room == NO_CHUNK {
            self.grow(flags)?;
        }
        let index = self.room;
        let chunk = self.chunks.get_mut(index as usize).ok_or(AllocError)?;
        let page = self
            .pages
            .get_mut(index as usize)
            .and_then(Option::as_mut)
            .ok_or(AllocError)?;

        let slot = chunk.claim(Self::SLOTS).ok_or(AllocError)?;
        let full = chunk.used as usize == Self::SLOTS;
        if let Some(place) = page.get_mut(slot) {
            *place = value;
        }
        if full {
            self.leave_room(index);
        }
        self.len = self.len.wrapping_add(1);
        Ok(Id(index.wrapping_shl(Self::SHIFT) | slot as u32))
    }

    /// Takes a record out, and frees its chunk if that was the last one in it.
    ///
    /// Returns `None` if there is no such record.
    ///
    /// May sleep, as large tables are freed with the last record.
    pub(crate) fn remove(&mut self, id: Id) -> Option<T> {
        let (index, slot) = Self::place(id);
        let page = self.pages.get_mut(index)?;
        let chunk = self.chunks.get_mut(index)?;
        if !chunk.release(slot) {
            return None;
        }
        let used = chunk.used as usize;
        let value = page
            .as_mut()
            .and_then(|page| page.get_mut(slot))
            .map(mem::take);
        if used == 0 {
            *page = None;
        }

        let index = index as u32;
        let was_full = used.wrapping_add(1) == Self::SLOTS;
        if was_full && used != 0 {
            self.enter_room(index);
        } else if !was_full && used == 0 {
            self.leave_room(index);
        }
        if used == 0 {
            self.live = self.live.wrapping_sub(1);
            if let Some(chunk) = self.chunks.get_mut(index as usize) {
                chunk.next = self.vacant;
            }
            self.vacant = index;
        }

        self.len = self.len.wrapping_sub(1);
        if self.len == 0 {
            *self = Self::new();
        }
        value
    }

    /// Adds an empty chunk to the list of those with room.
    fn grow(&mut self, flags: Flags) -> Result<(), AllocError> {
        let reuse = self.vacant != NO_CHUNK;
        let index = if reuse {
            self.vacant
        } else {
            let index = self.pages.len() as u64;
            let last = (index.wrapping_add(1) << Self::SHIFT).wrapping_sub(1);
            if last >= ID_LIMIT {
                return Err(AllocError);
            }
            index as u32
        };

        let page = <T::Page as Page<T>>::new(flags)?;
        if reuse {
            let (Some(entry), Some(chunk)) = (
                self.pages.get_mut(index as usize),
                self.chunks.get_mut(index as usize),
            ) else {
                return Err(AllocError);
            };
            self.vacant = chunk.next;
            *chunk = Chunk::EMPTY;
            *entry = Some(page);
        } else {
            self.chunks.reserve(1, flags)?;
            self.pages.push(Some(page), flags)?;
            // Cannot fail, as there is room for it.
            let _ = self.chunks.push_within_capacity(Chunk::EMPTY);
        }
        // INVARIANT: The chunk has no record for a moment, until `insert()` adds one.
        self.live = self.live.wrapping_add(1);
        self.enter_room(index);
        Ok(())
    }

    /// Puts a chunk in front of those with room.
    ///
    /// In front, because it has either just been full, and should be again, or is in the cache.
    fn enter_room(&mut self, index: u32) {
        let next = self.room;
        if let Some(chunk) = self.chunks.get_mut(index as usize) {
            chunk.previous = NO_CHUNK;
            chunk.next = next;
        }
        if let Some(chunk) = self.chunks.get_mut(next as usize) {
            chunk.previous = index;
        }
        self.room = index;
    }

    /// Takes a chunk from those with room.
    fn leave_room(&mut self, index: u32) {
        let Some(chunk) = self.chunks.get_mut(index as usize) else {
            return;
        };
        let previous = mem::replace(&mut chunk.previous, NO_CHUNK);
        let next = mem::replace(&mut chunk.next, NO_CHUNK);
        match self.chunks.get_mut(previous as usize) {
            Some(chunk) => chunk.next = next,
            None => self.room = next,
        }
        if let Some(chunk) = self.chunks.get_mut(next as usize) {
            chunk.previous = previous;
        }
    }
}
