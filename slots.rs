// SPDX-License-Identifier: GPL-2.0

//! The address spaces that the engine scans, by number.

#![forbid(unsafe_code)]

use crate::{
    arena::Id,
    items::MAX_SLOTS,
    mm::space::AddressSpace,
    registry::SlotId, //
};
use kernel::prelude::*;

/// An address space under scan.
pub(crate) struct MmSlot {
    /// The address space.
    pub(crate) space: AddressSpace,
    /// Its item with the lowest address.
    pub(crate) first: Id,
    /// How many it has. The core's own counter may know some of stock's as well.
    pub(crate) items: usize,
    /// The last round of unmerging that it has been through; 0 if none.
    pub(crate) unmerged: u32,
    /// Its number among all that there have ever been, from 1.
    pub(crate) serial: u64,
    /// Its mmap lock could not be had when it was last waited for.
    pub(crate) unreachable: bool,
    /// Where the last pass had to leave it for that, and the item of the last page before; the next one begins there.
    /// Forgotten when items are freed out of turn.
    pub(crate) left_at: Option<(usize, Id)>,
    /// Where a round of unmerging had to leave it for that, and which round.
    pub(crate) put_off_at: (u32, usize),
}

/// How often an mmap lock that somebody else has is tried in vain, a millisecond apart, before what is left of its address
/// space is passed over.
const MOST_TRIES: u32 = 20;

impl MmSlot {
    /// Notes that the scan could not have the mmap lock, for the last of `tries`. Returns whether to wait for it: once that was
    /// in vain, one try is enough until it can be had again.
    pub(crate) fn is_worth_waiting_for(&mut self, tries: u32) -> bool {
        if self.unreachable || tries >= MOST_TRIES {
            self.unreachable = true;
        }
        !self.unreachable
    }
}

/// The table of address spaces.
///
/// # Invariants
///
/// `vacant` holds exactly the numbers below `table.len()` without a slot, and has room for all of them.
pub(crate) struct Slots {
    table: KVVec<Option<MmSlot>>,
    vacant: KVVec<SlotId>,
    /// How many address spaces there have been.
    serials: u64,
}

impl Slots {
    /// An empty table.
    pub(crate) const fn new() -> Self {
        Self {
            table: KVVec::new(),
            vacant: KVVec::new(),
            serials: 0,
        }
    }

    /// Whether there is no address space.
    pub(crate) fn is_empty(&self) -> bool {
        self.table.len() == self.vacant.len()
    }

    /// One more than the highest number in use.
    pub(crate) fn end(&self) -> SlotId {
        self.table.len() as SlotId
    }

    /// A number that is free, for [`Slots::insert`]. Sleeps.
    pub(crate) fn reserve(&mut self) -> Result<SlotId> {
        if let Some(slot) = self.vacant.as_slice().last() {
            return Ok(*slot);
        }
        let slot = SlotId::try_from(self.table.len())?;
        if slot >= MAX_SLOTS {
            return Err(ENOSPC);
        }
        self.vacant
            .reserve(self.table.len().saturating_add(1), GFP_KERNEL)?;
        self.table.push(None, GFP_KERNEL)?;
        // INVARIANT: The new number is vacant; there is room, as all numbers fit.
        self.vacant.push_within_capacity(slot).map_err(|_| ENOMEM)?;
        Ok(slot)
    }

    /// Puts an address space under the number that [`Slots::reserve`] answered last.
    pub(crate) fn insert(&mut self, slot: SlotId, space: AddressSpace) {
        if self.vacant.as_slice().last() != Some(&slot) {
            return;
        }
        if let Some(entry) = self.table.get_mut(slot as usize) {
            let first = Id::NIL;
            self.serials = self.serials.wrapping_add(1);
            *entry = Some(MmSlot {
                space,
                first,
                unmerged: 0,
                items: 0,
                serial: self.serials,
                unreachable: false,
                left_at: None,
                put_off_at: (0, 0),
            });
            self.vacant.pop();
        }
    }

    /// The address space with a number.
    pub(crate) fn get(&self, slot: SlotId) -> Option<&MmSlot> {
        self.table.get(slot as usize)?.as_ref()
    }

    /// The address space with a number.
    pub(crate) fn get_mut(&mut self, slot: SlotId) -> Option<&mut MmSlot> {
        self.table.get_mut(slot as usize)?.as_mut()
    }

    /// Takes an address space out.
    pub(crate) fn remove(&mut self, slot: SlotId) -> Option<MmSlot> {
        let gone = self.table.get_mut(slot as usize)?.take()?;
        // There is room for every number, by the invariant.
        let _ = self.vacant.push_within_capacity(slot);
        Some(gone)
    }

    /// The first address space at or behind `from`, or from the start again, that has not been through a round of
    /// unmerging.
    pub(crate) fn next_of_round(&self, from: SlotId, round: u32) -> Option<SlotId> {
        let from = from.min(self.end());
        let left = |slot: &SlotId| self.get(*slot).is_some_and(|slot| slot.unmerged != round);
        (from..self.end())
            .find(left)
            .or_else(|| (0..from).find(left))
    }

    /// The first number in use at or behind `from`.
    pub(crate) fn next_used(&self, from: SlotId) -> Option<SlotId> {
        (from..self.end()).find(|slot| self.get(*slot).is_some())
    }
}
