// SPDX-License-Identifier: GPL-2.0

//! What to do with a page: look for its like in the stable tree, then in the unstable tree, and merge.
//!
//! Hashes only suggest; that two pages are equal is established by the boundary, byte for byte and under
//! write protection, in the merge itself.

#![forbid(unsafe_code)]

use crate::{
    arena::Id,
    delay::{
        self,
        Point, //
    },
    domain::{
        Domain,
        Scope, //
    },
    engine::{
        Engine,
        MergedRmap,
        Policy, //
    },
    hash,
    items::{
        ContentHash,
        PageItem,
        Planted,
        State, //
    },
    mm::{
        self,
        node::{
            NodePage,
            StableNode, //
        },
        page::{
            errno_of,
            KsmPage,
            NotMerged,
            PageRef, //
        },
        space::{
            AddressSpace,
            Vma, //
        },
        unshare::Zeal,
        walk::MOST_STEPS, //
    },
    trace, //
};
use kernel::{
    prelude::*,
    time::Delta, //
};

/// What was seen at an address.
#[derive(Clone, Copy)]
pub(crate) enum Seen {
    /// A page of its own that has not been read yet.
    Unread,
    /// A page of its own, with the hash of its contents and the NUMA node of its memory.
    Page {
        /// Hash.
        hash: ContentHash,
        /// NUMA node.
        nid: usize,
    },
    /// A mapping of our KSM page with this stable node, and the NUMA node of its memory.
    Merged(Id, usize),
    /// A KSM page that is not ours, or not yet.
    Foreign,
    /// A page that smart scan leaves out this time.
    Skipped,
}

/// How many pages of the same hash one page is compared with in either tree, at the most: more is wasted on pages that
/// change, or cannot be merged. Whoever knew the key of the hash could otherwise make a search as long as they like.
const MOST_CANDIDATES: usize = 16;

/// How often the mmap lock is tried before a merge that has to be taken back is left so until the next pass, and the time in
/// between. Until then reclaim and migration can do nothing with the page: worth a wait, though not a long one.
const UNSHARE_TRIES: u32 = 10;
const UNSHARE_PAUSE: Delta = Delta::from_micros(100);

/// How a search in a tree ended.
enum Found {
    /// The page is dealt with for this pass.
    Done,
    /// Nothing is equal to it.
    Nothing,
    /// There are pages of the same hash, but none of them can be merged with it now.
    Twins,
}

impl Seen {
    /// What a page of its own contains.
    pub(crate) fn of(page: &PageRef, key: &hash::Key) -> Self {
        Self::Page {
            hash: ContentHash::new(page.hash(key)),
            nid: page.nid(),
        }
    }
}

impl Engine {
    /// What `page` is, to be decided on once it has been read and the reference is gone.
    pub(crate) fn see(&self, page: &PageRef) -> Seen {
        if !page.is_ksm() {
            return Seen::Unread;
        }
        match StableNode::owner_of(page) {
            Some(id)
                if self
                    .stable
                    .node(id)
                    .is_some_and(|node| node.stands_for(page)) =>
            {
                Seen::Merged(id, page.nid())
            }
            _ => Seen::Foreign,
        }
    }

    /// Decides on the page of an item in an address space of `domain`. Sleeps.
    pub(crate) fn consider(&mut self, id: Id, seen: Seen, domain: Domain, policy: Policy) {
        if self.scope != Scope::Global {
            // As of now: it may have changed since the batch began. The next pass knows the new one.
            let slot = self.items.get(id).map(PageItem::slot);
            if slot.and_then(|slot| self.domain_of(slot)) != Some(domain) {
                return;
            }
        }
        if !matches!(seen, Seen::Merged(..)) && self.may_be_merged_now(id) {
            // By one before it in the batch, or by another thread, after it was seen; or the next pass finds that it is not.
            return;
        }
        match seen {
            Seen::Page { hash, nid } => self.consider_page(id, hash, nid, domain, policy),
            Seen::Merged(node, nid) => self.consider_merged(id, node, nid, domain),
            Seen::Foreign => {
                self.detach(id);
                // Left over from a merge that could not be recorded, or taken back, for want of memory.
                self.unshare(id, 1);
            }
            Seen::Unread | Seen::Skipped => {}
        }
    }

    /// Whether an item that says it is merged may still map its node's page. Sleeps.
    fn may_be_merged_now(&self, id: Id) -> bool {
        let Some(State::Merged(rmap)) = self.items.get(id).map(PageItem::state) else {
            return false;
        };
        let node = self.rmaps.get(rmap).and_then(|rmap| rmap.node);
        node.is_some_and(|node| self.maps_page_of(id, node) != Some(false))
    }

    /// Whether a node's page is what is mapped in the item's place. `None`: that cannot be told, as the mmap lock is not to be
    /// had. Sleeps.
    fn maps_page_of(&self, id: Id, node: Id) -> Option<bool> {
        let Some(node) = self.stable.node(node) else {
            return Some(false);
        };
        match self.fetch(id) {
            Ok(page) => Some(page.is_ksm() && node.stands_for(&page)),
            Err(NotMerged::Locked) => None,
            Err(_) => Some(false),
        }
    }

    fn consider_page(
        &mut self,
        id: Id,
        contents: ContentHash,
        nid: usize,
        domain: Domain,
        policy: Policy,
    ) {
        if policy.smart_scan {
            if let Some(item) = self.items.get_mut(id) {
                item.grow_older();
            }
        }
        let nid = self.forest_of(nid);
        // The zero page is everybody's, and is mapped whether or not others have empty pages: it tells nothing of them.
        let zero = policy.use_zero_pages && contents == self.empty;
        // In another domain it is another page, and has to look for its like anew.
        let hash = contents.in_domain(domain);
        let Some(item) = self.items.get(id) else {
            return;
        };
        let unchanged = item.hash() == hash;
        let settled = item.state() == State::Unstable(Planted { nid, twin: false });
        // It has looked for its like in the unstable tree before, and what came later has looked for it.
        if unchanged && settled && !zero && self.stable.first_equal(nid, hash, domain).is_none() {
            self.trace_lookup(true, nid, hash, domain);
            return;
        }
        // Not a KSM page, or changed: the item's place in a tree, if it has one, is history.
        self.detach(id);
        if !unchanged {
            // It changes often, or was never seen: not worth a search.
            if let Some(item) = self.items.get_mut(id) {
                item.set_idle(hash);
            }
            return;
        }
        if zero {
            // A mapping that is gone needs nothing more, and one that cannot be looked at has to wait; otherwise an empty page
            // is a page like others.
            let mapped = self.map_zero_page(id);
            if let Some(space) = self.space_of(id) {
                trace::merge_one_page(mm::zero::pfn(), 0, space.key(), errno_of(&mapped));
            }
            if let Ok(()) | Err(NotMerged::Gone | NotMerged::Locked) = mapped {
                return;
            }
        }
        self.trace_lookups(hash, nid, domain);
        if let Found::Done = self.merge_with_stable(id, hash, nid, domain) {
            return;
        }
        let twin = match self.merge_with_unstable(id, hash, nid, domain) {
            Found::Done => return,
            Found::Nothing => false,
            Found::Twins => true,
        };
        let planted = Planted { nid, twin };
        self.unstable
            .insert(&mut self.items, id, planted, &self.stats);
    }

    fn trace_lookups(&self, hash: ContentHash, nid: usize, domain: Domain) {
        self.trace_lookup(true, nid, hash, domain);
        if trace::lookup_is_on() && self.stable.first_equal(nid, hash, domain).is_none() {
            self.trace_lookup(false, nid, hash, domain);
        }
    }

    fn trace_lookup(&self, stable: bool, nid: usize, hash: ContentHash, domain: Domain) {
        if !trace::lookup_is_on() {
            return;
        }
        let (found, depth) = if stable {
            (
                self.stable.first_equal(nid, hash, domain),
                self.stable.depth_of(nid, hash),
            )
        } else {
            (
                self.unstable.first_equal(&self.items, nid, hash),
                self.unstable.depth_of(&self.items, nid, hash),
            )
        };
        trace::lookup(stable, nid as i32, depth, found.is_some());
    }

    /// A mapping of a merged page: known already, or made by a fork, which does not ask for any limit.
    fn consider_merged(&mut self, id: Id, node_id: Id, nid: usize, domain: Domain) {
        if self.stable.domain(node_id).is_some_and(|of| of != domain) {
            // Else the page has been replaced since it was seen, which the next pass finds.
            if self.maps_page_of(id, node_id) == Some(true) {
                self.part(id, node_id);
            }
            return;
        }
        if let Some(State::Merged(rmap)) = self.items.get(id).map(PageItem::state) {
            if self.rmaps.get(rmap).and_then(|rmap| rmap.node) == Some(node_id) {
                self.settle_at_home(node_id, nid);
                return;
            }
        }
        self.detach(id);
        // The page may have been another's since it was seen, and the node may be gone, or another one.
        let Some(node) = self.stable.node_mut(node_id) else {
            return;
        };
        match node.try_page() {
            NodePage::Live(page) => {
                self.settle_at_home(node_id, page.nid());
                let _ = self.merge_with(id, node_id, &page);
            }
            NodePage::Busy | NodePage::Bad => {}
            NodePage::Stale => self.retire(node_id),
        }
    }

    /// Takes a mapping off the page of another domain's node: its address space belonged to that domain when it was
    /// merged, or was forked by one that did. Sleeps.
    fn part(&mut self, id: Id, node_id: Id) {
        self.unshare(id, 1);
        // It stays if there is no memory for a copy, or the mmap lock is not to be had: the next pass tries again, and as long
        // as the mapping may be there, the core must find it.
        let stays = self.maps_page_of(id, node_id) != Some(false);
        if let Some(State::Merged(rmap)) = self.items.get(id).map(PageItem::state) {
            if stays && self.rmaps.get(rmap).and_then(|rmap| rmap.node) == Some(node_id) {
                return;
            }
        }
        self.detach(id);
        if !stays {
            return;
        }
        let Some(node) = self.stable.node_mut(node_id) else {
            return;
        };
        match node.try_page() {
            NodePage::Live(page) => {
                let _ = self.record(id, node_id, &page, Self::find_in_place);
            }
            NodePage::Busy | NodePage::Bad => {}
            NodePage::Stale => self.retire(node_id),
        }
    }

    /// Moves a node to the forest for its page's NUMA node, if it is not there.
    fn settle_at_home(&mut self, node_id: Id, nid: usize) {
        let home = self.forest_of(nid);
        if self.stable.nid(node_id).is_some_and(|at| at != home) {
            self.stable.rehome(node_id, home);
        }
    }

    fn merge_with_stable(
        &mut self,
        id: Id,
        hash: ContentHash,
        nid: usize,
        domain: Domain,
    ) -> Found {
        let mut candidate = self.stable.first_equal(nid, hash, domain);
        // Nodes that are dropped or moved on the way count too, as that is work; the next search does not see them.
        for _ in 0..MOST_CANDIDATES {
            let Some(node_id) = candidate else { break };
            candidate = self.stable.next_equal(node_id);
            mm::breathe();
            let Some(node) = self.stable.node_mut(node_id) else {
                continue;
            };
            let page = match node.try_page() {
                NodePage::Live(page) => page,
                NodePage::Busy => return Found::Done,
                NodePage::Bad => continue,
                NodePage::Stale => {
                    self.retire(node_id);
                    continue;
                }
            };
            let home = self.forest_of(page.nid());
            if home != nid {
                self.stable.rehome(node_id, home);
                continue;
            }
            match self.merge_with(id, node_id, &page) {
                Err(NotMerged::Different) => {}
                Ok(()) | Err(_) => return Found::Done,
            }
        }
        Found::Nothing
    }

    /// Maps a node's page in the place of the item's page and records it. Sleeps.
    fn merge_with(&mut self, id: Id, node_id: Id, page: &KsmPage) -> Result<(), NotMerged> {
        self.record(id, node_id, page, Self::map_in_place)
    }

    /// Records that a node's page is mapped in the item's place, once `map` has seen to it. Sleeps.
    fn record(
        &mut self,
        id: Id,
        node_id: Id,
        page: &KsmPage,
        map: fn(&Self, Id, &KsmPage, &mut MergedRmap) -> Result<(), NotMerged>,
    ) -> Result<(), NotMerged> {
        let mut rmap = self.prepare_rmap(id).map_err(|_| NotMerged::Busy)?;
        if let Err(why) = map(self, id, page, &mut rmap) {
            self.discard_rmap(rmap);
            return Err(why);
        }
        delay::at(Point::Mapped);
        let lock = page.lock();
        let attached = self.attach(id, node_id, rmap, &lock);
        drop(lock);
        attached.map_err(|rmap| {
            self.undo(id, rmap);
            NotMerged::Busy
        })
    }

    /// Whether `kpage` is in the item's place already, which a fork may have mapped there. Sleeps.
    fn find_in_place(
        &self,
        id: Id,
        kpage: &KsmPage,
        rmap: &mut MergedRmap,
    ) -> Result<(), NotMerged> {
        self.in_place(id, |vma, _, page| {
            if !page.is(kpage) {
                return Err(NotMerged::Gone);
            }
            rmap.item.bind(vma);
            Ok(())
        })
    }

    /// Maps `kpage` in the place of the item's page, if they are equal. Sleeps.
    fn map_in_place(
        &self,
        id: Id,
        kpage: &KsmPage,
        rmap: &mut MergedRmap,
    ) -> Result<(), NotMerged> {
        let mapped = self.try_map_in_place(id, kpage, rmap);
        let (item, err) = (&rmap.item, errno_of(&mapped));
        trace::merge_with_ksm_page(
            kpage.address_of(),
            kpage.pfn(),
            item.address_of(),
            item.mm(),
            err,
        );
        mapped
    }

    fn try_map_in_place(
        &self,
        id: Id,
        kpage: &KsmPage,
        rmap: &mut MergedRmap,
    ) -> Result<(), NotMerged> {
        self.in_place(id, |vma, address, page| {
            if page.is(kpage) {
                // There already: a fork's child, or a parent's.
                rmap.item.bind(vma);
                return Ok(());
            }
            if page.is_ksm() {
                return Err(NotMerged::Gone);
            }
            let lock = page.try_lock().ok_or(NotMerged::Busy)?;
            if page.is_large() {
                // A huge page is not given up for a hash.
                if !page.same_contents(kpage) {
                    return Err(NotMerged::Different);
                }
                lock.split()?;
            }
            delay::at(Point::Replacing);
            vma.replace(address, &lock, kpage)?;
            rmap.item.bind(vma);
            Ok(())
        })
    }

    /// Maps the zero page in the place of the item's page, if that is empty. Sleeps.
    fn map_zero_page(&self, id: Id) -> Result<(), NotMerged> {
        self.in_place(id, |vma, address, page| {
            if page.is_ksm() {
                return Err(NotMerged::Gone);
            }
            let lock = page.try_lock().ok_or(NotMerged::Busy)?;
            if page.is_large() {
                if !page.is_empty() {
                    return Err(NotMerged::Different);
                }
                lock.split()?;
            }
            delay::at(Point::Emptying);
            vma.replace_by_zero_page(address, &lock)
        })
    }

    fn merge_with_unstable(
        &mut self,
        id: Id,
        hash: ContentHash,
        nid: usize,
        domain: Domain,
    ) -> Found {
        let mut candidate = self.unstable.first_equal(&self.items, nid, hash);
        let found = match candidate {
            Some(_) => Found::Twins,
            None => Found::Nothing,
        };
        for _ in 0..MOST_CANDIDATES {
            let Some(other) = candidate else { break };
            mm::breathe();
            candidate = self.unstable.next_equal(&self.items, nid, other);
            match self.merge_pair(id, other, nid, domain) {
                Err(NotMerged::Different) => {}
                Ok(()) | Err(_) => return Found::Done,
            }
        }
        found
    }

    /// Merges the pages of two items: that of `id`, whose address space belongs to `domain`, becomes a KSM page, which is
    /// mapped in the place of that of `other` too.
    ///
    /// `Different` says that `other` is not the one to merge with; all else that `id` is done with for this
    /// pass. Sleeps.
    fn merge_pair(
        &mut self,
        id: Id,
        other: Id,
        nid: usize,
        domain: Domain,
    ) -> Result<(), NotMerged> {
        // As of now: the other one's may have changed since it was put into the tree.
        let other_slot = self.items.get(other).ok_or(NotMerged::Different)?.slot();
        if self.domain_of(other_slot) != Some(domain) {
            return Err(NotMerged::Different);
        }
        self.check_pair(id, other, nid)?;

        // All that can fail for want of memory comes before the first page is touched.
        let mut rmap = self.prepare_rmap(id).map_err(|_| NotMerged::Busy)?;
        let mut other_rmap = match self.prepare_rmap(other) {
            Ok(rmap) => rmap,
            Err(_) => {
                self.discard_rmap(rmap);
                return Err(NotMerged::Busy);
            }
        };
        let Ok(node_id) = self.stable.prepare() else {
            self.stats.alloc_failures.up();
            self.discard_rmap(rmap);
            self.discard_rmap(other_rmap);
            return Err(NotMerged::Busy);
        };

        delay::at(Point::Paired);
        let mut undone = false;
        let merged = self.make_ksm(id, &mut rmap).and_then(|page| {
            delay::at(Point::KsmMade);
            match self.map_in_place(other, &page, &mut other_rmap) {
                Ok(()) => Ok(page),
                Err(why) => {
                    drop(page);
                    undone = true;
                    self.unshare(id, UNSHARE_TRIES);
                    Err(why)
                }
            }
        });
        let page = match merged {
            Ok(page) => page,
            Err(why) => {
                drop(self.stable.remove(node_id));
                self.discard_rmap(rmap);
                self.discard_rmap(other_rmap);
                if undone {
                    // Enough work for this page and pass; the next one tries another page first.
                    self.detach(other);
                    return Err(NotMerged::Busy);
                }
                return Err(why);
            }
        };

        delay::at(Point::Unadopted);
        let hash = self.items.get(id).map(PageItem::hash).unwrap_or_default();
        self.detach(other);
        let lock = page.lock();
        let adopted = self
            .stable
            .node_mut(node_id)
            .is_some_and(|node| node.adopt(&lock).is_ok());
        if !adopted {
            drop(lock);
            drop(page);
            drop(self.stable.remove(node_id));
            self.undo(id, rmap);
            self.undo(other, other_rmap);
            return Err(NotMerged::Busy);
        }
        let home = self.forest_of(page.nid());
        self.stable.plant(node_id, hash, domain, home);
        let first = self.attach(other, node_id, other_rmap, &lock);
        let second = self.attach(id, node_id, rmap, &lock);
        drop(lock);
        drop(page);
        if let Err(rmap) = first {
            self.undo(other, rmap);
        }
        if let Err(rmap) = second {
            self.undo(id, rmap);
        }
        let node = self.stable.node(node_id);
        if node.is_some_and(|node| node.sharers() == 0) {
            self.stable.set_full(node_id, true);
            self.stable.list_orphan(node_id);
        }
        Ok(())
    }

    /// Whether the pages of two items are worth a try, without touching either; splits those of huge pages.
    fn check_pair(&mut self, id: Id, other: Id, nid: usize) -> Result<(), NotMerged> {
        let page = self.fetch_replaceable(id)?;
        if page.has_other_users() {
            return Err(NotMerged::Busy);
        }
        // One that cannot be had must not keep those behind it from merging with each other, nor one that cannot be merged.
        let other_page = match self.fetch_replaceable(other) {
            Ok(other_page) => other_page,
            Err(why) => {
                if let NotMerged::Locked = why {
                    drop(page);
                    let slot = self.items.get(other).map(PageItem::slot);
                    let slot = slot.and_then(|slot| self.slots.get(slot));
                    if slot.is_some_and(|slot| slot.unreachable) {
                        // Nobody scans it, so it would stay in front.
                        self.detach(other);
                    }
                }
                return Err(NotMerged::Different);
            }
        };
        if page.is(&other_page) || page.is_ksm() {
            // Shared by a fork, or merged in some other way.
            return Err(NotMerged::Gone);
        }
        if other_page.has_other_users() || other_page.is_ksm() || !page.same_contents(&other_page) {
            return Err(NotMerged::Different);
        }
        if self.forest_of(other_page.nid()) != nid {
            return Err(NotMerged::Gone);
        }
        // Splitting wants no other reference than that of the one who asks for it, and both may be pages of one
        // huge page.
        let other_large = other_page.is_large();
        drop(other_page);
        if page.is_large() {
            page.try_lock().ok_or(NotMerged::Busy)?.split()?;
        }
        drop(page);
        if other_large {
            let page = self.fetch(other).map_err(|_| NotMerged::Different)?;
            if page.is_large() {
                // One that is pinned cannot be split, and must not keep others from merging either.
                let split = page.try_lock().ok_or(NotMerged::Different)?.split();
                split.map_err(|_| NotMerged::Different)?;
            }
        }
        Ok(())
    }

    /// Turns the item's page into a KSM page. Sleeps.
    fn make_ksm(&self, id: Id, rmap: &mut MergedRmap) -> Result<KsmPage, NotMerged> {
        self.in_place(id, |vma, address, page| {
            let lock = page.try_lock().ok_or(NotMerged::Busy)?;
            if self.scope != Scope::Global && !page.is_large() && !lock.is_alone() {
                // Relatives have it by a fork, maybe in other domains. They keep it; the next pass merges a copy.
                drop(lock);
                drop(page);
                if vma.unshare_page(address, Zeal::Modest).is_err() {
                    self.stats.alloc_failures.up();
                }
                return Err(NotMerged::Busy);
            }
            let made = vma.make_ksm(address, &lock);
            let (item, err) = (&rmap.item, errno_of(&made));
            trace::merge_with_ksm_page(0, page.pfn(), item.address_of(), item.mm(), err);
            let ksm_page = made?;
            rmap.item.bind(vma);
            Ok(ksm_page)
        })
    }

    /// Does something with the page of an item, where it is mapped now. `Gone`: there is none. Sleeps.
    fn in_place<T>(
        &self,
        id: Id,
        work: impl FnOnce(&Vma<'_>, usize, PageRef) -> Result<T, NotMerged>,
    ) -> Result<T, NotMerged> {
        let (space, address) = self.place_of(id).ok_or(NotMerged::Gone)?;
        let entered = space.enter().ok_or(NotMerged::Gone)?;
        let locked = entered.try_lock().ok_or(NotMerged::Locked)?;
        let vma = locked.mergeable_at(address).ok_or(NotMerged::Gone)?;
        let page = vma.page_at(address).ok_or(NotMerged::Gone)?;
        work(&vma, address, page)
    }

    /// Takes a merge back that could not be recorded. Sleeps.
    fn undo(&mut self, id: Id, rmap: MergedRmap) {
        self.discard_rmap(rmap);
        self.unshare(id, UNSHARE_TRIES);
    }

    /// Gives the item's address a page of its own, if a KSM page is mapped there. What cannot be copied now, for want of
    /// memory or of the mmap lock, which is tried so many times, stays a KSM page, which the next pass finds. Sleeps.
    fn unshare(&self, id: Id, tries: u32) {
        let Some((space, address)) = self.place_of(id) else {
            return;
        };
        let Some(entered) = space.enter() else { return };
        let Some(locked) = entered.lock_within(tries, UNSHARE_PAUSE) else {
            return;
        };
        let Some(vma) = locked.mergeable_at(address) else {
            return;
        };
        let end = address.saturating_add(kernel::page::PAGE_SIZE);
        let mut steps = MOST_STEPS;
        if vma.unshare(address, end, Zeal::Modest, &mut steps).is_err() {
            self.stats.alloc_failures.up();
        }
    }

    /// The page of an item, with a reference. `Gone`: there is none. Sleeps.
    fn fetch(&self, id: Id) -> Result<PageRef, NotMerged> {
        self.in_place(id, |_, _, page| Ok(page))
    }

    /// As [`Engine::fetch`]; also `Gone`: no other page may be mapped in its place.
    fn fetch_replaceable(&self, id: Id) -> Result<PageRef, NotMerged> {
        self.in_place(id, |vma, address, page| match vma.awaits_access(address) {
            true => Err(NotMerged::Gone),
            false => Ok(page),
        })
    }

    fn space_of(&self, id: Id) -> Option<&AddressSpace> {
        Some(self.place_of(id)?.0)
    }

    fn place_of(&self, id: Id) -> Option<(&AddressSpace, usize)> {
        let item = self.items.get(id)?;
        Some((&self.slots.get(item.slot())?.space, item.address()))
    }
}
