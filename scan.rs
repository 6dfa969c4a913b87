// SPDX-License-Identifier: GPL-2.0

//! Which page is next: the cursor over address spaces, VMAs and page tables, a batch at a time.
//!
//! One turn of the mmap lock and of a page table's lock gathers up to a page table's worth of pages; they
//! are hashed with no lock held, and their references are given up before anything is decided, as a page
//! that we hold twice can neither be split nor merged.

#![forbid(unsafe_code)]

use crate::{
    arena::Id,
    engine::{
        record_flags,
        Engine,
        PassStart,
        Policy, //
    },
    items::{
        PageItem,
        State, //
    },
    merge::Seen,
    mm::{
        self,
        walk::{
            Found,
            BATCH_PAGES, //
        }, //
    },
    registry::SlotId,
    trace, //
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// Where the scan is.
///
/// # Invariants
///
/// If `slot` is set, a pass is going on in that address space; `last` is its item with the highest address
/// at which a page was found, or nil if there is none. Items behind it and below `address` are of pages that are
/// gone, and to be freed.
pub(crate) struct Cursor {
    /// The address space; `None` between passes.
    pub(crate) slot: Option<SlotId>,
    address: usize,
    last: Id,
}

impl Default for Cursor {
    fn default() -> Self {
        Self {
            slot: None,
            address: 0,
            last: Id::NIL,
        }
    }
}

impl Cursor {
    /// At the start of an address space.
    pub(crate) fn at(slot: SlotId) -> Self {
        Self {
            slot: Some(slot),
            ..Self::default()
        }
    }

    /// Where the scan goes on.
    pub(crate) fn address(&self) -> usize {
        self.address
    }

    /// The item of the last page found.
    pub(crate) fn last(&self) -> Id {
        self.last
    }

    /// Back to the start of the address space, whose items are about to be freed.
    pub(crate) fn rewind(&mut self) {
        self.address = 0;
        self.last = Id::NIL;
    }

    /// Behind a page that has been dealt with, whose item is `last`.
    pub(crate) fn step(&mut self, address: usize, last: Id) {
        self.address = address.saturating_add(PAGE_SIZE);
        self.last = last;
    }

    /// On to an address behind the last page that was gathered.
    pub(crate) fn skip_to(&mut self, address: usize) {
        self.address = self.address.max(address);
    }
}

/// Room for a batch, kept from one to the next.
///
/// # Invariants
///
/// Both vectors have room for [`BATCH_PAGES`].
pub(crate) struct Batch {
    found: KVec<Found>,
    seen: KVec<(usize, Seen)>,
}

/// How many items of pages that are gone are freed in the time of looking at one page, about.
const FREED_PER_PAGE: usize = 16;

/// How many pages one call of [`Engine::scan`] finds at the most, those that smart scan leaves out included.
const MOST_FOUND: usize = 4 * BATCH_PAGES;

impl Batch {
    /// An empty batch. Sleeps.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            found: KVec::with_capacity(BATCH_PAGES, GFP_KERNEL)?,
            seen: KVec::with_capacity(BATCH_PAGES, GFP_KERNEL)?,
        })
    }
}

/// How a call of [`Engine::scan`] ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Looked at this many pages; the pass goes on.
    Pages(usize),
    /// There is nothing to scan.
    Nothing,
    /// The pass is complete.
    PassDone,
}

/// What gathering found.
enum Gathered {
    /// Pages; behind them the scan goes on from this address.
    Pages(usize),
    /// None yet, as somebody waits for the mmap lock, or there is much to free before; go on from this address.
    Later(usize),
    /// No more pages in this address space.
    End,
    /// The address space is being torn down.
    Exiting,
}

impl Engine {
    /// Looks at pages, `budget` or [`BATCH_PAGES`] at the most, where the last call left off. `pause` is asked
    /// between pages whether to leave the rest for later. Sleeps.
    pub(crate) fn scan(
        &mut self,
        budget: usize,
        policy: Policy,
        pause: impl Fn() -> bool,
    ) -> Progress {
        let mut left = budget.min(BATCH_PAGES);
        let mut found = 0usize;
        // Page tables and address spaces without pages cost time too.
        for _ in 0..BATCH_PAGES {
            if pause() {
                break;
            }
            let Some(slot) = self.current_slot() else {
                return if self.cursor.slot.is_some() {
                    self.finish_pass();
                    Progress::PassDone
                } else {
                    Progress::Nothing
                };
            };
            if !self.free_items_before(slot, self.cursor.address()) {
                // Less work than looking at pages, but work: the thread gets its sleep.
                left = left.saturating_sub(BATCH_PAGES / FREED_PER_PAGE);
                break;
            }
            match self.gather(slot, left, policy) {
                Gathered::Pages(resume) => {
                    found = found.saturating_add(self.batch.seen.len());
                    left = left.saturating_sub(self.decide(slot, policy, &pause));
                    let paused = !self.batch.seen.is_empty();
                    self.batch.seen.clear();
                    if paused {
                        break;
                    }
                    self.cursor.skip_to(resume);
                }
                Gathered::Later(resume) => {
                    self.cursor.skip_to(resume);
                    break;
                }
                Gathered::End => {
                    self.cursor.skip_to(usize::MAX);
                    if !self.free_items_before(slot, usize::MAX) {
                        break;
                    }
                    if self.leave(slot) {
                        return Progress::PassDone;
                    }
                }
                Gathered::Exiting => {
                    // It never comes back: its items need not wait for the report of its exit.
                    if !self.free_items(slot, BATCH_PAGES) {
                        break;
                    }
                    if self.leave(slot) {
                        return Progress::PassDone;
                    }
                }
            }
            if left == 0 || found >= MOST_FOUND {
                break;
            }
        }
        Progress::Pages(budget.min(BATCH_PAGES).saturating_sub(left))
    }

    /// The address space under the cursor, or the next one; starts a pass if none is going on. `None` at the
    /// end of a pass, or if there is no address space.
    fn current_slot(&mut self) -> Option<SlotId> {
        let from = match self.cursor.slot {
            Some(slot) => slot,
            None => {
                self.slots.next_used(0)?;
                self.start_pass();
                0
            }
        };
        let slot = self.slots.next_used(from)?;
        if self.cursor.slot != Some(slot) {
            self.cursor = Cursor::at(slot);
        }
        Some(slot)
    }

    fn start_pass(&mut self) {
        // Pages that wait in a per-CPU cache to get on an LRU list have a reference too many to be merged, and may
        // wait there for long.
        self.pass_start = PassStart::now(self.knobs.advisor());
        trace::start_scan(self.pass_number(), self.stats.rmap_items.get() as u32);
        mm::drain_lru_caches();
    }

    /// For events, cut off as stock does.
    fn pass_number(&self) -> i32 {
        self.stats.full_scans.get() as i32
    }

    fn finish_pass(&mut self) {
        self.cursor = Cursor::default();
        self.sweep_orphans();
        self.advise();
        trace::stop_scan(self.pass_number(), self.stats.rmap_items.get() as u32);
        self.stats.full_scans.up();
    }

    /// Leaves an address space that has been scanned to its end. Returns whether that completed the pass.
    fn leave(&mut self, slot: SlotId) -> bool {
        let next = slot.saturating_add(1);
        let last = self.slots.next_used(next).is_none();
        if last {
            self.finish_pass();
        } else {
            self.cursor = Cursor::at(next);
        }
        last
    }

    /// Fills the batch with what is seen from the cursor on.
    fn gather(&mut self, slot: SlotId, limit: usize, policy: Policy) -> Gathered {
        let Some(entered) = self.slots.get(slot).and_then(|slot| slot.space.enter()) else {
            return Gathered::Exiting;
        };
        let mut found = core::mem::replace(&mut self.batch.found, KVec::new());
        let locked = entered.lock();
        let mut address = self.cursor.address();
        let gathered = loop {
            let Some(vma) = locked.mergeable_from(address) else {
                break Gathered::End;
            };
            address = vma.gather(address, limit, &mut found);
            if !found.is_empty() {
                break Gathered::Pages(address);
            }
            if address < vma.end() || locked.contended() {
                break Gathered::Later(address);
            }
        };
        drop(locked);
        drop(entered);

        if let Some(first) = found.first().map(|page| page.address) {
            // They may be very many: the pages are found again, from here on, once all of them are freed.
            if !self.free_items_before(slot, first) {
                found.clear();
                self.batch.found = found;
                return Gathered::Later(first);
            }
        }
        let mut seen = core::mem::replace(&mut self.batch.seen, KVec::new());
        seen.clear();
        let mut at = self.behind(slot, self.cursor.last());
        for page in found.iter() {
            while self
                .items
                .get(at)
                .is_some_and(|item| item.address() < page.address)
            {
                at = self.items.get(at).map_or(Id::NIL, PageItem::next);
            }
            let what = if policy.smart_scan && self.leave_out(at, page) {
                Seen::Skipped
            } else {
                self.see(&page.page)
            };
            // There is room for as many as were found.
            let _ = seen.push_within_capacity((page.address, what));
        }
        found.clear();
        self.batch.found = found;
        self.batch.seen = seen;
        gathered
    }

    /// Whether smart scan leaves out a page: one that could not be merged for several passes, unless it is due
    /// again. `at` is the item behind the last page.
    fn leave_out(&self, at: Id, page: &Found) -> bool {
        self.items.get(at).is_some_and(|item| {
            item.address() == page.address
                && !matches!(item.state(), State::Merged(_))
                && !item.age().is_due()
        }) && !page.page.is_ksm()
    }

    /// Decides on the pages of the batch, in order; leaves an empty one unless it was paused. Returns how many
    /// were decided on.
    fn decide(&mut self, slot: SlotId, policy: Policy, pause: &impl Fn() -> bool) -> usize {
        let mut seen = core::mem::replace(&mut self.batch.seen, KVec::new());
        let mut pages = 0usize;
        let mut skipped = 0usize;
        let mut paused = false;
        for (address, what) in seen.iter() {
            if pause() || !self.free_items_before(slot, *address) {
                paused = true;
                break;
            }
            match self.item_at(slot, *address) {
                Some(id) => {
                    self.cursor.step(*address, id);
                    if let Seen::Skipped = what {
                        // No work: it is not charged to the budget.
                        self.skip_page(id);
                        skipped = skipped.saturating_add(1);
                        continue;
                    }
                    self.consider(id, *what, policy);
                    self.stats.pages_scanned.up();
                }
                None => self.stats.alloc_failures.up(),
            }
            pages = pages.saturating_add(1);
            mm::breathe();
        }
        if trace::batch_is_on() {
            if let (Some(slot), Some((first, _))) = (self.slots.get(slot), seen.first()) {
                let all = pages.saturating_add(skipped) as u32;
                trace::batch(slot.space.key(), *first, all, skipped as u32);
            }
        }
        if !paused {
            seen.clear();
        }
        self.batch.seen = seen;
        pages
    }

    fn skip_page(&mut self, id: Id) {
        self.detach(id);
        if let Some(item) = self.items.get_mut(id) {
            item.grow_older();
        }
        self.stats.pages_skipped.up();
    }

    /// Frees the items behind the cursor's last one up to `address`, as no page was found there; a batch of them
    /// at the most. Returns whether all are gone.
    fn free_items_before(&mut self, slot: SlotId, address: usize) -> bool {
        let last = self.cursor.last();
        for _ in 0..BATCH_PAGES {
            let next = self.behind(slot, last);
            match self.items.get(next).map(PageItem::address) {
                Some(at) if at < address && !next.is_nil() => {
                    let behind = self.free_item(slot, next);
                    self.set_behind(slot, last, behind);
                }
                _ => return true,
            }
        }
        false
    }

    /// The item of a page, which is the one behind the cursor's last, or made now.
    fn item_at(&mut self, slot: SlotId, address: usize) -> Option<Id> {
        let last = self.cursor.last();
        let next = self.behind(slot, last);
        if !next.is_nil() && self.items.get(next).map(PageItem::address) == Some(address) {
            return Some(next);
        }
        let item = PageItem::new(slot, address, next);
        let id = self.items.insert(item, record_flags()).ok()?;
        self.stats.rmap_items.up();
        if let Some(slot) = self.slots.get(slot) {
            slot.space.count_rmap_items(1);
        }
        self.set_behind(slot, last, id);
        Some(id)
    }

    /// The item behind `last` in an address space's list; its first one if `last` is nil.
    fn behind(&self, slot: SlotId, last: Id) -> Id {
        let next = if last.is_nil() {
            self.slots.get(slot).map(|slot| slot.first)
        } else {
            self.items.get(last).map(PageItem::next)
        };
        next.unwrap_or(Id::NIL)
    }

    fn set_behind(&mut self, slot: SlotId, last: Id, next: Id) {
        if last.is_nil() {
            if let Some(slot) = self.slots.get_mut(slot) {
                slot.first = next;
            }
        } else if let Some(item) = self.items.get_mut(last) {
            item.set_next(next);
        }
    }
}
