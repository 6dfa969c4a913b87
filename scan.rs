// SPDX-License-Identifier: GPL-2.0

//! Which page is next: cursors over address spaces, VMAs and page tables, a batch at a time.
//!
//! One turn of the mmap lock gathers a few page tables' worth of pages at the most; they are hashed with no lock
//! held, not even the engine's, and their references are given up before anything is decided, as a page
//! that we hold twice can neither be split nor merged.
//!
//! Any number of threads scan at the same time, each with a [`Batch`] of its own: in [`Engine::begin`] it takes a
//! cursor that nobody else holds and fills the batch, and in [`Engine::end`] it decides on what it has seen, and
//! lets go of the cursor. No two cursors are in the same address space.

#![forbid(unsafe_code)]

use crate::{
    arena::Id,
    domain::Domain,
    engine::{
        record_flags,
        Engine,
        PassStart,
        Policy, //
    },
    hash,
    items::{
        PageItem,
        State, //
    },
    knobs::MOST_THREADS,
    kthread,
    merge::Seen,
    mm::{
        self,
        space::Next,
        walk::{
            Found,
            BATCH_PAGES,
            MOST_STEPS, //
        }, //
    },
    registry::SlotId,
    trace, //
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// Where the scan of an address space is.
///
/// # Invariants
///
/// If `slot` is set, a pass is going on in that address space, and no other cursor is in it; `last` is its item with
/// the highest address at which a page was found, by this pass or by one that had to stop, or nil if there is none. Items
/// behind it and below `address` are of pages that are gone, and to be freed.
pub(crate) struct Cursor {
    /// The address space; `None` if the cursor is not in use.
    pub(crate) slot: Option<SlotId>,
    address: usize,
    last: Id,
    /// A thread is at work with it.
    held: bool,
    /// How often the mmap lock could not be had since it entered.
    tries: u32,
    /// How often it was sent back: what was gathered before that is out of date.
    rewinds: u32,
}

impl Default for Cursor {
    fn default() -> Self {
        Self {
            slot: None,
            address: 0,
            last: Id::NIL,
            held: false,
            tries: 0,
            rewinds: 0,
        }
    }
}

impl Cursor {
    /// To the start of another address space, or out of use.
    pub(crate) fn enter(&mut self, slot: Option<SlotId>) {
        self.slot = slot;
        self.rewind();
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
        self.tries = 0;
        self.rewinds = self.rewinds.wrapping_add(1);
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

/// All cursors, and how far the pass has come.
pub(crate) struct Cursors {
    /// One for each thread that there may be: more address spaces are not under scan at a time.
    all: KVec<Cursor>,
    /// The first address space that has had no cursor in it; `None` between passes.
    next: Option<SlotId>,
}

impl Cursors {
    /// All of them out of use. Sleeps.
    pub(crate) fn new() -> Result<Self> {
        let mut all = KVec::with_capacity(MOST_THREADS, GFP_KERNEL)?;
        for _ in 0..MOST_THREADS {
            all.push_within_capacity(Cursor::default())
                .map_err(|_| ENOMEM)?;
        }
        Ok(Self { all, next: None })
    }

    fn get(&self, at: usize) -> Option<&Cursor> {
        self.all.get(at)
    }

    fn get_mut(&mut self, at: usize) -> Option<&mut Cursor> {
        self.all.get_mut(at)
    }

    /// Sends the cursor in an address space, if there is one, back to its start.
    pub(crate) fn rewind(&mut self, slot: SlotId) {
        for cursor in self.all.iter_mut() {
            if cursor.slot == Some(slot) {
                cursor.rewind();
            }
        }
    }

    /// Gives the pass up: the next one begins at the first address space.
    pub(crate) fn reset(&mut self) {
        for cursor in self.all.iter_mut() {
            cursor.enter(None);
        }
        self.next = None;
    }
}

/// What a thread has gathered, from [`Engine::begin`] to [`Engine::end`]; kept from one time to the next.
///
/// # Invariants
///
/// Both vectors have room for [`BATCH_PAGES`]. Unless `found` is empty, there is a `seen` for each of it.
pub(crate) struct Batch {
    found: KVec<Found>,
    seen: KVec<(usize, Seen)>,
    /// The cursor that it came from, and how often that had been sent back.
    cursor: usize,
    rewinds: u32,
    /// Where the scan goes on behind it.
    resume: usize,
    /// How many items may be made for it.
    room: usize,
    /// What was freed before it was gathered, as so many pages.
    charged: usize,
    /// The CPU time of the thread that the engine knows of, in nanoseconds.
    cpu: u64,
}

/// How many items of pages that are gone are freed in the time of looking at one page, about.
const FREED_PER_PAGE: usize = 16;

/// How many items an address space may have beyond twice the pages that it has now.
///
/// Pages that go behind the cursor leave their items until the next pass. Without a limit a process could walk in front
/// of the cursor with a few pages, which it is charged for, and leave items behind, which nobody is charged for, as long as
/// there are addresses.
const SPARE_ITEMS: usize = 4096;

/// Page tables are gathered from under one hold of the mmap lock until there are this many pages: where memory is
/// sparse, getting there costs more than the pages.
const ENOUGH: usize = BATCH_PAGES / 4;

impl Batch {
    /// An empty batch, for one thread. Sleeps.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            found: KVec::with_capacity(BATCH_PAGES, GFP_KERNEL)?,
            seen: KVec::with_capacity(BATCH_PAGES, GFP_KERNEL)?,
            cursor: 0,
            rewinds: 0,
            resume: 0,
            room: 0,
            charged: 0,
            cpu: 0,
        })
    }

    /// Reads the pages that have to be, and gives up the references on all of them. Needs no lock.
    pub(crate) fn read(&mut self, key: &hash::Key) {
        for (page, (_, seen)) in self.found.iter().zip(self.seen.iter_mut()) {
            if let Seen::Unread = seen {
                *seen = Seen::of(&page.page, key);
                mm::breathe();
            }
        }
        self.found.clear();
    }
}

/// How many more items an address space with so many `items` may have. `pages` is asked for the pages that it has, which
/// is only done if there are many items.
pub(crate) fn room_for_items(items: usize, pages: impl FnOnce() -> usize) -> usize {
    match SPARE_ITEMS.checked_sub(items) {
        // More than any batch.
        Some(room) if room >= BATCH_PAGES => room,
        _ => pages()
            .saturating_mul(2)
            .saturating_add(SPARE_ITEMS)
            .saturating_sub(items),
    }
}

/// What one call of [`Engine::begin`] has done, other than looking at pages, while it has the engine for itself.
struct Effort {
    /// How many page tables, VMAs and address spaces without pages it may still pass.
    steps: usize,
    /// Items freed.
    freed: usize,
}

impl Effort {
    /// None so far.
    fn none() -> Self {
        Self {
            steps: MOST_STEPS,
            freed: 0,
        }
    }

    /// How many pages could have been looked at in the time of freeing.
    fn pages(&self) -> usize {
        self.freed / FREED_PER_PAGE
    }

    /// Whether it is enough for a call that may look at `limit` pages.
    fn is_enough(&self, limit: usize) -> bool {
        self.steps == 0 || self.freed >= BATCH_PAGES || self.pages() >= limit
    }
}

/// How a call of [`Engine::begin`] ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begun {
    /// The batch holds pages; [`Engine::end`] must follow.
    Batch,
    /// Nothing yet, for the price of looking at this many pages; the pass goes on.
    Later(usize),
    /// As before, as somebody has an mmap lock; [`Engine::waited`] must follow, once they have had time to let go of it.
    Locked(usize),
    /// There is nothing to scan.
    Nothing,
    /// What is left of the pass is in the hands of other threads.
    Others,
    /// The pass is complete.
    PassDone,
}

/// What gathering found.
enum Gathered {
    /// Pages; behind them the scan goes on from this address.
    Pages(usize),
    /// None yet, as somebody waits for the mmap lock, or there is much to free before; go on from this address.
    Later(usize),
    /// The mmap lock cannot be had.
    Locked,
    /// No more pages in this address space.
    End,
    /// The address space is being torn down.
    Exiting,
}

impl Engine {
    /// Gathers pages, `budget` or [`BATCH_PAGES`] at the most, where somebody left off. `pause` is asked whether to
    /// leave it for later. Sleeps.
    pub(crate) fn begin(
        &mut self,
        batch: &mut Batch,
        budget: usize,
        policy: Policy,
        pause: impl Fn() -> bool,
    ) -> Begun {
        let limit = budget.min(BATCH_PAGES);
        let mut effort = Effort::none();
        while !pause() && !effort.is_enough(limit) {
            effort.steps = effort.steps.saturating_sub(1);
            if self.cursors.next.is_none() {
                if self.slots.is_empty() {
                    return Begun::Nothing;
                }
                self.start_pass(batch);
            }
            let Some((at, slot)) = self.free_cursor() else {
                if self.cursors.all.iter().any(|cursor| cursor.held) {
                    return Begun::Others;
                }
                if !self.sweep_orphans(BATCH_PAGES) {
                    break;
                }
                self.finish_pass(batch);
                return Begun::PassDone;
            };
            let address = self.cursors.get(at).map_or(0, Cursor::address);
            if !self.free_items_before(at, slot, address, &mut effort.freed) {
                break;
            }
            let limit = limit.saturating_sub(effort.pages()).max(1);
            match self.gather(batch, at, slot, limit, policy, &mut effort) {
                Gathered::Pages(resume) => {
                    batch.cursor = at;
                    batch.resume = resume;
                    batch.charged = effort.pages();
                    if let Some(cursor) = self.cursors.get_mut(at) {
                        batch.rewinds = cursor.rewinds;
                        cursor.held = true;
                    }
                    return Begun::Batch;
                }
                Gathered::Later(resume) => {
                    self.skip_to(at, resume);
                    break;
                }
                Gathered::Locked => {
                    if self.waits_for_lock(at, slot) {
                        batch.cursor = at;
                        return Begun::Locked(effort.pages().saturating_add(ENOUGH));
                    }
                    // What is known of it stays as it is, until a pass that can have the lock, which begins here.
                    self.leave_off(at, slot);
                }
                Gathered::End => {
                    self.skip_to(at, usize::MAX);
                    if !self.free_items_before(at, slot, usize::MAX, &mut effort.freed) {
                        break;
                    }
                    self.leave(at);
                }
                Gathered::Exiting => {
                    // It never comes back: its items need not wait for the report of its exit.
                    let most = BATCH_PAGES.saturating_sub(effort.freed);
                    let known = |engine: &Self| engine.slots.get(slot).map_or(0, |slot| slot.items);
                    let before = known(self);
                    let all = self.free_items(slot, most);
                    let gone = before.saturating_sub(known(self));
                    effort.freed = effort.freed.saturating_add(gone);
                    if !all {
                        break;
                    }
                    self.leave(at);
                }
            }
        }
        Begun::Later(effort.pages())
    }

    /// The thread to which the batch belongs has waited for the mmap lock that [`Engine::begin`] could not have.
    pub(crate) fn waited(&mut self, batch: &Batch) {
        if let Some(cursor) = self.cursors.get_mut(batch.cursor) {
            cursor.held = false;
        }
    }

    /// Notes that a cursor's mmap lock could not be had. Returns whether to wait for it, with the cursor held.
    fn waits_for_lock(&mut self, at: usize, slot: SlotId) -> bool {
        let Some(cursor) = self.cursors.get_mut(at) else {
            return false;
        };
        cursor.tries = cursor.tries.saturating_add(1);
        cursor.held =
            (self.slots.get_mut(slot)).is_some_and(|slot| slot.is_worth_waiting_for(cursor.tries));
        cursor.held
    }

    /// Takes the cursor out of an address space in which the next pass is to begin where this one ends.
    fn leave_off(&mut self, at: usize, slot: SlotId) {
        if let (Some(cursor), Some(slot)) = (self.cursors.get(at), self.slots.get_mut(slot)) {
            slot.left_at = Some((cursor.address, cursor.last));
        }
        self.leave(at);
    }

    /// Decides on the pages of a batch that [`Engine::begin`] has filled and [`Batch::read`] has read. Returns how
    /// many were looked at. `pause` is asked between pages whether to leave the rest for later. Sleeps.
    pub(crate) fn end(
        &mut self,
        batch: &mut Batch,
        policy: Policy,
        pause: impl Fn() -> bool,
    ) -> usize {
        let at = batch.cursor;
        let slot = match self.cursors.get_mut(at) {
            Some(cursor) => {
                cursor.held = false;
                // Else what is known of the address space was freed meanwhile, and maybe all of it is gone.
                cursor.slot.filter(|_| cursor.rewinds == batch.rewinds)
            }
            None => None,
        };
        let mut pages = batch.charged;
        if let Some(slot) = slot {
            if let Some(domain) = self.domain_of(slot) {
                let (looked_at, all) = self.decide(batch, at, slot, domain, policy, &pause);
                pages = pages.saturating_add(looked_at);
                if all {
                    self.skip_to(at, batch.resume);
                }
            } else {
                // What is known of it stays as it is, until a pass that finds somebody there.
                self.leave(at);
            }
        }
        batch.seen.clear();
        self.account(batch);
        pages
    }

    /// Adds what the current thread, to which the batch belongs, has spent since the last time.
    fn account(&mut self, batch: &mut Batch) {
        let now = kthread::cpu_time();
        self.cpu = self.cpu.wrapping_add(now.wrapping_sub(batch.cpu));
        batch.cpu = now;
    }

    /// A cursor that nobody holds, in an address space: where somebody left off, or at the start of the next one.
    fn free_cursor(&mut self) -> Option<(usize, SlotId)> {
        for (at, cursor) in self.cursors.all.iter_mut().enumerate() {
            match cursor.slot {
                Some(slot) if !cursor.held => {
                    if self.slots.get(slot).is_some() {
                        return Some((at, slot));
                    }
                    cursor.enter(None);
                }
                _ => {}
            }
        }
        let slot = self.slots.next_used(self.cursors.next?)?;
        let all = &mut self.cursors.all;
        let at = all
            .iter()
            .position(|cursor| cursor.slot.is_none() && !cursor.held)?;
        let cursor = all.get_mut(at)?;
        cursor.enter(Some(slot));
        if let Some((address, last)) = self.slots.get_mut(slot)?.left_at.take() {
            cursor.address = address;
            cursor.last = last;
        }
        self.cursors.next = Some(slot.saturating_add(1));
        Some((at, slot))
    }

    fn skip_to(&mut self, at: usize, address: usize) {
        if let Some(cursor) = self.cursors.get_mut(at) {
            cursor.skip_to(address);
        }
    }

    /// Takes the cursor out of an address space that this pass has done with.
    fn leave(&mut self, at: usize) {
        if let Some(cursor) = self.cursors.get_mut(at) {
            cursor.enter(None);
        }
    }

    fn start_pass(&mut self, batch: &mut Batch) {
        self.account(batch);
        self.cursors.next = Some(0);
        self.pass_start = PassStart::now(self.cpu, self.knobs.advisor());
        trace::start_scan(self.pass_number(), self.stats.rmap_items.get() as u32);
        // Pages that wait in a per-CPU cache to get on an LRU list have a reference too many to be merged, and may
        // wait there for long.
        mm::drain_lru_caches();
    }

    /// For events, cut off as stock does.
    fn pass_number(&self) -> i32 {
        self.stats.full_scans.get() as i32
    }

    fn finish_pass(&mut self, batch: &mut Batch) {
        self.cursors.next = None;
        self.account(batch);
        self.advise();
        trace::stop_scan(self.pass_number(), self.stats.rmap_items.get() as u32);
        self.stats.full_scans.up();
    }

    /// Fills the batch with what is seen from a cursor on.
    fn gather(
        &mut self,
        batch: &mut Batch,
        cursor: usize,
        slot: SlotId,
        limit: usize,
        policy: Policy,
        effort: &mut Effort,
    ) -> Gathered {
        let Some(entered) = self.slots.get(slot).and_then(|slot| slot.space.enter()) else {
            return Gathered::Exiting;
        };
        let found = &mut batch.found;
        let enough = limit.min(ENOUGH);
        let Some(locked) = entered.try_lock() else {
            return Gathered::Locked;
        };
        let mut address = self.cursors.get(cursor).map_or(0, Cursor::address);
        let gathered = loop {
            let (at, more) = match locked.mergeable_from(address, &mut effort.steps) {
                Next::Vma(vma) => {
                    effort.steps = effort.steps.saturating_sub(1);
                    let at = vma.gather(address, limit, enough, found, &mut effort.steps);
                    (
                        at,
                        at >= vma.end() && effort.steps > 0 && !locked.contended(),
                    )
                }
                Next::From(at) => (at, false),
                Next::Nothing if found.is_empty() => break Gathered::End,
                Next::Nothing => break Gathered::Pages(address),
            };
            address = at;
            if more && found.len() < enough {
                continue;
            }
            break match found.is_empty() {
                true => Gathered::Later(address),
                false => Gathered::Pages(address),
            };
        };
        drop(locked);
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.unreachable = false;
            batch.room = room_for_items(slot.items, || entered.anon_pages());
        }
        drop(entered);

        if let Some(first) = batch.found.first().map(|page| page.address) {
            // They may be very many: the pages are found again, from here on, once all of them are freed.
            if !self.free_items_before(cursor, slot, first, &mut effort.freed) {
                batch.found.clear();
                return Gathered::Later(first);
            }
        }
        let last = self.cursors.get(cursor).map_or(Id::NIL, Cursor::last);
        let mut at = self.behind(slot, last);
        // Freeing what is in between is part of the work of this batch; what would be too much waits for another one.
        let mut gone = 0usize;
        let most_gone = limit.saturating_mul(FREED_PER_PAGE);
        let mut cut = None;
        for (index, page) in batch.found.iter().enumerate() {
            while gone <= most_gone
                && self
                    .items
                    .get(at)
                    .is_some_and(|item| item.address() < page.address)
            {
                at = self.items.get(at).map_or(Id::NIL, PageItem::next);
                gone = gone.saturating_add(1);
            }
            if index > 0 && (gone / FREED_PER_PAGE).saturating_add(index) >= limit {
                cut = Some((index, page.address));
                break;
            }
            let what = if policy.smart_scan && self.leave_out(at, page) {
                Seen::Skipped
            } else {
                self.see(&page.page)
            };
            // There is room for as many as were found.
            let _ = batch.seen.push_within_capacity((page.address, what));
        }
        if let Some((index, address)) = cut {
            batch.found.truncate(index);
            return Gathered::Pages(address);
        }
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

    /// Decides on the pages of the batch, in order, for an address space that belongs to `domain`. Returns how many were
    /// looked at, or could have been in that time, and whether these, and those that smart scan leaves out, are all.
    fn decide(
        &mut self,
        batch: &mut Batch,
        cursor: usize,
        slot: SlotId,
        domain: Domain,
        policy: Policy,
        pause: &impl Fn() -> bool,
    ) -> (usize, bool) {
        let mut pages = 0usize;
        let mut skipped = 0usize;
        let mut gone = 0usize;
        let mut all = true;
        for (address, what) in batch.seen.iter() {
            let mut freed = 0usize;
            all = !pause() && self.free_items_before(cursor, slot, *address, &mut freed);
            gone = gone.saturating_add(freed);
            if !all {
                break;
            }
            // Without an item, for want of memory or as there are too many of them, it is left alone.
            if let Some(id) = self.item_at(cursor, slot, *address, &mut batch.room) {
                if let Some(cursor) = self.cursors.get_mut(cursor) {
                    cursor.step(*address, id);
                }
                if let Seen::Skipped = what {
                    // No work: it is not charged to the budget.
                    self.skip_page(id);
                    skipped = skipped.saturating_add(1);
                    continue;
                }
                self.consider(id, *what, domain, policy);
                self.stats.pages_scanned.up();
            }
            pages = pages.saturating_add(1);
            mm::breathe();
        }
        if trace::batch_is_on() {
            if let (Some(slot), Some((first, _))) = (self.slots.get(slot), batch.seen.first()) {
                let all = pages.saturating_add(skipped) as u32;
                trace::batch(slot.space.key(), *first, all, skipped as u32);
            }
        }
        (pages.saturating_add(gone / FREED_PER_PAGE), all)
    }

    fn skip_page(&mut self, id: Id) {
        self.stats.pages_skipped.up();
        if let Some(State::Merged(_)) = self.items.get(id).map(PageItem::state) {
            // By one before it in the batch, or by another thread, after it was seen.
            return;
        }
        self.detach(id);
        if let Some(item) = self.items.get_mut(id) {
            item.grow_older();
        }
    }

    /// Frees the items behind the cursor's last one up to `address`, as no page was found there, until `freed`, to which
    /// each is added, is a batch. Returns whether none is left.
    fn free_items_before(
        &mut self,
        cursor: usize,
        slot: SlotId,
        address: usize,
        freed: &mut usize,
    ) -> bool {
        let last = self.cursors.get(cursor).map_or(Id::NIL, Cursor::last);
        while *freed < BATCH_PAGES {
            let next = self.behind(slot, last);
            match self.items.get(next).map(PageItem::address) {
                Some(at) if at < address && !next.is_nil() => {
                    let behind = self.free_item(slot, next);
                    self.set_behind(slot, last, behind);
                }
                _ => return true,
            }
            *freed = freed.saturating_add(1);
        }
        false
    }

    /// The item of a page, which is the one behind the cursor's last, or made now, if there is memory and `room`.
    fn item_at(
        &mut self,
        cursor: usize,
        slot: SlotId,
        address: usize,
        room: &mut usize,
    ) -> Option<Id> {
        let last = self.cursors.get(cursor).map_or(Id::NIL, Cursor::last);
        let next = self.behind(slot, last);
        if !next.is_nil() && self.items.get(next).map(PageItem::address) == Some(address) {
            return Some(next);
        }
        *room = room.checked_sub(1)?;
        let item = PageItem::new(slot, address, next);
        let Ok(id) = self.items.insert(item, record_flags()) else {
            self.stats.alloc_failures.up();
            return None;
        };
        self.stats.rmap_items.up();
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.items = slot.items.saturating_add(1);
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
