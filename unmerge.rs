// SPDX-License-Identifier: GPL-2.0

//! Undoing merges: of all address spaces for `run=2` and unload, of one that is gone.

#![forbid(unsafe_code)]

use crate::{
    arena::Id,
    engine::Engine,
    mm::{
        self,
        hotplug::OfflineRange,
        space::Next,
        unshare::Zeal,
        walk::{
            BATCH_PAGES,
            MOST_STEPS, //
        }, //
    },
    registry::SlotId, //
};
use kernel::prelude::*;

/// How far a round of unmerging has come.
#[derive(Clone, Copy)]
pub(crate) struct Unmerging {
    /// The address space; those of the round that are left are looked for from here on, and round.
    slot: SlotId,
    /// Which of those that have had this number: it may have exited since, and another one have come in its place.
    serial: u64,
    address: usize,
    /// All pages are private again; items are being freed.
    unshared: bool,
}

impl Unmerging {
    fn of(slot: SlotId, serial: u64) -> Self {
        Self {
            slot,
            serial,
            address: 0,
            unshared: false,
        }
    }
}

/// What came of a stretch of unmerging.
pub(crate) enum Unmerged {
    /// It is done; there is more.
    Some,
    /// All address spaces are.
    All,
    /// The mmap lock cannot be had.
    Locked,
}

/// What came of unsharing a stretch of one address space.
enum Stretch {
    /// It is private, up to this address.
    Until(usize),
    /// There is none left.
    Last,
    /// The mmap lock cannot be had.
    Locked,
}

impl Engine {
    /// Begins a round of unmerging, of all address spaces that there are and of those that come meanwhile: a
    /// child of a process that is still merged is merged too.
    pub(crate) fn start_unmerging(&mut self) -> Unmerging {
        self.round = self.round.wrapping_add(1).max(1);
        Unmerging::of(0, 0)
    }

    /// Unmerges the next stretch of memory. Sleeps.
    ///
    /// `Err(ENOMEM)`: there was no memory for private pages of one address space; nothing is lost, the rest of it
    /// stays merged. The next call tries the same again, as after `Locked`, unless [`Engine::skip`] or [`Engine::put_off`]
    /// is called before.
    pub(crate) fn unmerge_some(&mut self, at: &mut Unmerging) -> Result<Unmerged> {
        let Some(slot) = self.slots.next_of_round(at.slot, self.round) else {
            return Ok(Unmerged::All);
        };
        let serial = self.slots.get(slot).map_or(0, |slot| slot.serial);
        if (slot, serial) != (at.slot, at.serial) {
            *at = Unmerging::of(slot, serial);
            let put_off = self.slots.get(slot).map(|slot| slot.put_off_at);
            if let Some((round, address)) = put_off {
                if round == self.round {
                    at.address = address;
                }
            }
        }
        if !at.unshared {
            match self.unshare_stretch(slot, at.address)? {
                Stretch::Until(address) => at.address = address,
                Stretch::Last => at.unshared = true,
                Stretch::Locked => return Ok(Unmerged::Locked),
            }
        } else if self.free_items(slot, BATCH_PAGES) {
            self.skip(at);
        }
        Ok(Unmerged::Some)
    }

    /// Goes on with the next address space, the current one being done or hopeless.
    pub(crate) fn skip(&mut self, at: &mut Unmerging) {
        if let Some(slot) = self.slots.get_mut(at.slot) {
            slot.unmerged = self.round;
        }
        *at = Unmerging::of(at.slot.saturating_add(1), 0);
    }

    /// Goes on with the next address space, and comes back to the current one when the others have had their turn. Returns
    /// whether they have had it now.
    pub(crate) fn put_off(&mut self, at: &mut Unmerging) -> bool {
        if let Some(slot) = self.slots.get_mut(at.slot) {
            slot.put_off_at = (self.round, at.address);
        }
        let slot = at.slot;
        *at = Unmerging::of(slot.saturating_add(1), 0);
        (self.slots.next_of_round(at.slot, self.round)).is_none_or(|next| next <= slot)
    }

    /// Makes pages from `address` on private again.
    fn unshare_stretch(&self, slot: SlotId, address: usize) -> Result<Stretch> {
        let Some(entered) = self.slots.get(slot).and_then(|slot| slot.space.enter()) else {
            // All of it is about to be unmapped.
            return Ok(Stretch::Last);
        };
        let Some(locked) = entered.try_lock() else {
            return Ok(Stretch::Locked);
        };
        let mut steps = MOST_STEPS;
        let vma = match locked.mergeable_from(address, &mut steps) {
            Next::Vma(vma) => vma,
            Next::From(address) => return Ok(Stretch::Until(address)),
            Next::Nothing => return Ok(Stretch::Last),
        };
        let from = address.max(vma.start());
        let to = vma.unshare(from, vma.end(), Zeal::AsFault, &mut steps)?;
        Ok(Stretch::Until(to))
    }

    /// Frees what is known of an address space that has exited, `most` items at the most. Returns whether it
    /// is forgotten entirely. Sleeps.
    pub(crate) fn bury(&mut self, slot: SlotId, most: usize) -> bool {
        if !self.free_items(slot, most) {
            return false;
        }
        // A cursor in it finds another address space by itself, being at this one's start.
        drop(self.slots.remove(slot));
        true
    }

    /// Parts with nodes, mapped or not, `most` at the most, for unload. Returns how many had a page still; `None`: there is no node
    /// left. Sleeps.
    pub(crate) fn disown_some(&mut self, most: usize) -> Option<usize> {
        self.stable.first()?;
        let mut pages = 0usize;
        for _ in 0..most {
            let Some(id) = self.stable.first() else { break };
            pages = pages.saturating_add(usize::from(self.disown(id)));
        }
        Some(pages)
    }

    /// Parts with nodes that have no mapping any more that is known, `most` at the most. Where their pages are still mapped,
    /// in memory that is none of ours or that could not be copied, they stay KSM pages that belong to nobody. Returns whether
    /// none is left. Sleeps.
    pub(crate) fn disown_orphans(&mut self, most: usize) -> bool {
        for _ in 0..most {
            let Some(id) = self.stable.first_orphan() else {
                return true;
            };
            let node = self.stable.node(id);
            if node.is_some_and(|node| node.sharers() == 0) {
                self.disown(id);
            } else {
                self.stable.unlist_orphan(id);
            }
        }
        false
    }

    /// Parts with a node. Returns whether it had a page. Sleeps.
    fn disown(&mut self, id: Id) -> bool {
        let mut mapped = false;
        if let Some(node) = self.stable.node_mut(id) {
            if let Some(page) = node.page() {
                node.disown(&page.lock());
                mapped = true;
            }
        }
        self.retire(id);
        mm::breathe();
        mapped
    }

    /// Frees what is known of the address spaces from `at` on, a batch of it; moves `at` on. Returns whether nothing is left.
    /// Sleeps.
    pub(crate) fn forget_some(&mut self, at: &mut SlotId) -> bool {
        let Some(slot) = self.slots.next_used(*at) else {
            return true;
        };
        *at = slot;
        if self.free_items(slot, BATCH_PAGES) {
            *at = slot.saturating_add(1);
        }
        false
    }

    /// Begins a new count of passes. All items must have been freed.
    pub(crate) fn start_over(&mut self) {
        self.cursors.reset();
        self.stats.full_scans.clear();
    }

    /// Drops the nodes whose pages lay in memory that has gone offline. Sleeps.
    pub(crate) fn drop_offline(&mut self, offline: &OfflineRange) {
        let mut at = self.stable.first();
        while let Some(id) = at {
            at = self.stable.next(id);
            if self
                .stable
                .node_mut(id)
                .is_some_and(|node| node.abandon(offline))
            {
                self.retire(id);
            }
        }
    }
}
