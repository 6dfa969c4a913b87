// SPDX-License-Identifier: GPL-2.0

//! The engine: everything that is known about pages, and the operations that keep it consistent.
//!
//! The parts work on it in turn: `scan.rs` decides which page is next, `merge.rs` what to do with it,
//! `unmerge.rs` undoes it. All of it is under one mutex, taken for one batch at a time (`ksmd.rs`).

#![forbid(unsafe_code)]

use crate::{
    advisor::{
        Advisor,
        Spent, //
    },
    arena::{
        Arena,
        Id, //
    },
    delay::{
        self,
        Point, //
    },
    domain::{
        Domain,
        Scope, //
    },
    hash,
    items::{
        ContentHash,
        PageItem,
        Rmap,
        State, //
    },
    knobs::{
        Knobs,
        MAX_PAGE_SHARING, //
    },
    mm::{
        self,
        node::{
            RmapItem,
            StableNode, //
        }, //
    },
    registry::SlotId,
    scan::{
        Cursors, //
    },
    slots::Slots,
    stable_tree::StableTree,
    stats::Stats,
    trace,
    unstable_tree::UnstableTree, //
};
use kernel::{
    alloc::Flags,
    prelude::*,
    sync::Arc,
    time::{
        Instant,
        Monotonic, //
    }, //
};

/// Knobs that the engine goes by, as they were when a batch began.
#[derive(Clone, Copy)]
pub(crate) struct Policy {
    /// Whether empty pages are replaced by the zero page.
    pub(crate) use_zero_pages: bool,
    /// Whether pages that could not be merged for several passes are looked at less often.
    pub(crate) smart_scan: bool,
}

/// When a pass began.
pub(crate) struct PassStart {
    at: Instant<Monotonic>,
    cpu: u64,
    /// The advisor has been on all the time since.
    pub(crate) advised: bool,
}

impl PassStart {
    /// Now, the scan having taken `cpu` nanoseconds of CPU time before.
    pub(crate) fn now(cpu: u64, advised: bool) -> Self {
        Self {
            at: Instant::now(),
            cpu,
            advised,
        }
    }

    /// What the pass has taken so far, the scan having taken `cpu` nanoseconds by now.
    pub(crate) fn spent(&self, cpu: u64) -> Spent {
        let nanosecs = cpu.wrapping_sub(self.cpu);
        Spent {
            millisecs: u64::try_from(self.at.elapsed().as_millis()).unwrap_or(0),
            cpu_millisecs: nanosecs / 1_000_000,
        }
    }
}

/// All that is known about pages.
pub(crate) struct Engine {
    /// What empty pages hash to.
    pub(crate) empty: ContentHash,
    pub(crate) stats: Arc<Stats>,
    pub(crate) knobs: Arc<Knobs>,
    pub(crate) slots: Slots,
    pub(crate) items: Arena<PageItem>,
    pub(crate) rmaps: Arena<Rmap>,
    pub(crate) stable: StableTree,
    pub(crate) unstable: UnstableTree,
    pub(crate) cursors: Cursors,
    /// What all threads have spent on scanning, as far as they have said, in nanoseconds of CPU time.
    pub(crate) cpu: u64,
    /// When the pass began, or the last one if none is going on.
    pub(crate) pass_start: PassStart,
    pub(crate) advisor: Advisor,
    /// Most mappings of one KSM page, but for those that a fork makes. Changes only while there is none.
    pub(crate) max_page_sharing: u32,
    /// Which round of unmerging is going on; see [`MmSlot::unmerged`](crate::slots::MmSlot::unmerged).
    pub(crate) round: u32,
    /// Whether pages of different NUMA nodes may be merged.
    pub(crate) merge_across_nodes: bool,
    /// Whose pages are merged with whose. Changes only while none are.
    pub(crate) scope: Scope,
}

impl Engine {
    /// An engine that knows nothing. Sleeps.
    pub(crate) fn new(key: &hash::Key, knobs: Arc<Knobs>, stats: Arc<Stats>) -> Result<Self> {
        Ok(Self {
            empty: ContentHash::new(mm::page::hash_of_empty(key)),
            stats: stats.clone(),
            knobs,
            slots: Slots::new(),
            items: Arena::new(),
            rmaps: Arena::new(),
            stable: StableTree::new(stats)?,
            unstable: UnstableTree::new()?,
            cursors: Cursors::new()?,
            cpu: 0,
            pass_start: PassStart::now(0, false),
            advisor: Advisor::default(),
            max_page_sharing: MAX_PAGE_SHARING,
            round: 0,
            merge_across_nodes: true,
            scope: Scope::Global,
        })
    }

    /// Lets the advisor, if it has been on for the whole pass that ends now, draw its conclusions.
    pub(crate) fn advise(&mut self) {
        if !self.pass_start.advised {
            return;
        }
        let advice = self.advisor.advise(
            self.pass_start.spent(self.cpu),
            self.knobs.pages_to_scan(),
            self.knobs.advisor_limits(),
        );
        self.knobs.set_pages_to_scan(advice.pages_to_scan);
        trace::advisor(
            advice.scan_time as i64,
            advice.pages_to_scan as usize,
            advice.cpu_percent,
        );
    }

    /// Turns the advisor on or off.
    pub(crate) fn set_advisor(&mut self, on: bool) {
        if self.knobs.advisor() != on {
            self.advisor = Advisor::default();
            self.pass_start.advised = false;
            self.knobs.set_advisor(on);
        }
    }

    /// The forest for pages of a NUMA node.
    pub(crate) fn forest_of(&self, nid: usize) -> usize {
        if self.merge_across_nodes {
            0
        } else {
            nid
        }
    }

    /// The domain that an address space belongs to now. `None`: that cannot be told, as nobody runs in it. One whose
    /// owner has rights of several users, or secrets from its own, is a domain of its own.
    pub(crate) fn domain_of(&self, slot: SlotId) -> Option<Domain> {
        if self.scope == Scope::Global {
            return Some(Domain::COMMON);
        }
        let slot = self.slots.get(slot)?;
        let alone = Domain::of_process(slot.serial);
        match self.scope {
            Scope::Global => Some(Domain::COMMON),
            Scope::Cgroup => slot.space.memory_cgroup().map(Domain::of_cgroup),
            Scope::User => (slot.space.user()).map(|user| Domain::of_user(&user).unwrap_or(alone)),
            Scope::Process => Some(alone),
        }
    }

    /// Takes an item out of whatever tree it is in. Its hash is kept unless it was merged. Sleeps.
    pub(crate) fn detach(&mut self, id: Id) {
        match self.items.get(id).map(PageItem::state) {
            Some(State::Unstable(_)) => self.unstable.remove(&mut self.items, id, &self.stats),
            Some(State::Merged(rmap)) => self.detach_merged(rmap),
            Some(State::Idle) | None => {}
        }
    }

    fn detach_merged(&mut self, rmap: Id) {
        let Some(node_id) = self.rmaps.get(rmap).and_then(|rmap| rmap.node) else {
            return;
        };
        let Some(node) = self.stable.node_mut(node_id) else {
            return;
        };
        let Some(page) = node.page() else {
            self.retire(node_id);
            return;
        };
        delay::at(Point::Unlinking);
        let lock = page.lock();
        if let Some(item) = self.rmaps.get_mut(rmap).and_then(|rmap| rmap.item.as_mut()) {
            node.unlink(&lock, item);
        }
        let empty = node.sharers() == 0;
        if empty {
            self.stats.pages_shared.down();
        } else {
            self.stats.pages_sharing.down();
        }
        let full = node.sharers() >= self.max_page_sharing;
        let unused = empty && node.release(&lock);
        drop(lock);
        drop(page);
        self.forget_rmap(rmap);
        // Nobody should join one that is about to lose its page, or even see it.
        self.stable.set_full(node_id, full || empty);
        if unused {
            self.drop_node(node_id);
        } else if empty {
            self.stable.list_orphan(node_id);
        }
    }

    /// Empties and drops a stable node whose page is gone. Sleeps.
    pub(crate) fn retire(&mut self, node_id: Id) {
        let pfn = self.stable.node(node_id).map_or(0, StableNode::pfn);
        while let Some(node) = self.stable.node_mut(node_id) {
            let Some(owner) = node.first_owner() else {
                break;
            };
            let Some(State::Merged(rmap)) = self.items.get(owner).map(PageItem::state) else {
                // Cannot be: linked items belong to merged records. The node is leaked below.
                break;
            };
            let Some(item) = self.rmaps.get_mut(rmap).and_then(|rmap| rmap.item.as_mut()) else {
                break;
            };
            if !node.unlink_stale(item) {
                break;
            }
            if node.sharers() == 0 {
                self.stats.pages_shared.down();
            } else {
                self.stats.pages_sharing.down();
            }
            trace::remove_rmap_item(pfn, item.address_of(), item.mm());
            self.forget_rmap(rmap);
            mm::breathe();
        }
        self.drop_node(node_id);
    }

    /// Drops a stable node that no mapping is listed at.
    fn drop_node(&mut self, node_id: Id) {
        if let Some(node) = self.stable.remove(node_id) {
            trace::remove_ksm_page(node.pfn());
        }
    }

    /// Drops the record of a mapping that is in no node's list any more; its item is idle then.
    fn forget_rmap(&mut self, rmap: Id) {
        let Some(item) = self.rmaps.remove(rmap).and_then(|rmap| rmap.item) else {
            return;
        };
        let owner = item.owner();
        drop(item);
        let Some(item) = self.items.get_mut(owner) else {
            return;
        };
        item.set_idle(ContentHash::default());
        let slot = item.slot();
        if let Some(slot) = self.slots.get(slot) {
            slot.space.count_merging_pages(-1);
        }
    }

    /// Records that an item's page has become a mapping of a node's page, which is locked by `lock`.
    ///
    /// On failure the page stays as it is and the item is given back: the caller has to unshare it.
    pub(crate) fn attach(
        &mut self,
        id: Id,
        node_id: Id,
        mut rmap: MergedRmap,
        lock: &mm::page::PageLock<'_>,
    ) -> Result<(), MergedRmap> {
        let Some(node) = self.stable.node_mut(node_id) else {
            return Err(rmap);
        };
        let Some(record) = self.rmaps.get_mut(rmap.id) else {
            return Err(rmap);
        };
        if node.link(lock, &mut rmap.item).is_err() {
            return Err(rmap);
        }
        if node.sharers() == 1 {
            self.stats.pages_shared.up();
        } else {
            self.stats.pages_sharing.up();
        }
        let full = node.sharers() >= self.max_page_sharing;
        record.item = Some(rmap.item);
        record.node = Some(node_id);
        if let Some(item) = self.items.get_mut(id) {
            item.set_merged(rmap.id);
            let slot = item.slot();
            if let Some(slot) = self.slots.get(slot) {
                slot.space.count_merging_pages(1);
            }
        }
        self.stable.set_full(node_id, full);
        Ok(())
    }

    /// Everything that recording a merge of the item's page will take, allocated before the merge. Sleeps.
    pub(crate) fn prepare_rmap(&mut self, id: Id) -> Result<MergedRmap> {
        let item = self.items.get(id).ok_or(ENOENT)?;
        let slot = self.slots.get(item.slot()).ok_or(ENOENT)?;
        let made = RmapItem::new(id, &slot.space, item.address(), merge_flags())
            .and_then(|item| Ok((self.rmaps.insert(Rmap::default(), merge_flags())?, item)));
        match made {
            Ok((id, item)) => Ok(MergedRmap { id, item }),
            Err(error) => {
                self.stats.alloc_failures.up();
                Err(error.into())
            }
        }
    }

    /// Gives back what [`Engine::prepare_rmap`] allocated.
    pub(crate) fn discard_rmap(&mut self, rmap: MergedRmap) {
        self.rmaps.remove(rmap.id);
        drop(rmap.item);
    }

    /// Frees items of an address space from the lowest address up, `most` at the most. Returns whether all
    /// are gone. Sleeps.
    pub(crate) fn free_items(&mut self, slot: SlotId, most: usize) -> bool {
        self.cursors.rewind(slot);
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.left_at = None;
        }
        for _ in 0..most {
            let Some(first) = self.slots.get(slot).map(|slot| slot.first) else {
                return true;
            };
            if first.is_nil() {
                return true;
            }
            let next = self.free_item(slot, first);
            if let Some(slot) = self.slots.get_mut(slot) {
                slot.first = next;
            }
        }
        self.slots.get(slot).is_none_or(|slot| slot.first.is_nil())
    }

    /// Frees an item that the caller takes out of its list; returns the one behind it. Sleeps.
    pub(crate) fn free_item(&mut self, slot: SlotId, id: Id) -> Id {
        self.detach(id);
        let Some(item) = self.items.remove(id) else {
            return Id::NIL;
        };
        self.stats.rmap_items.down();
        if let Some(slot) = self.slots.get_mut(slot) {
            slot.items = slot.items.saturating_sub(1);
            slot.space.count_rmap_items(-1);
        }
        mm::breathe();
        item.next()
    }

    /// Looks at stable nodes without mappings, `most` at the most, and drops those whose pages are gone by now; the next
    /// call goes on where this one ends. Returns whether all have been looked at. Sleeps.
    pub(crate) fn sweep_orphans(&mut self, most: usize) -> bool {
        for _ in 0..most {
            let Some(id) = self.stable.next_orphan() else {
                return true;
            };
            let node = self.stable.node(id);
            if node.is_some_and(|node| node.sharers() == 0) {
                self.drop_if_unused(id);
            } else {
                self.stable.unlist_orphan(id);
            }
        }
        false
    }

    /// Drops a stable node if its page is gone or no page table maps it any more. Sleeps.
    fn drop_if_unused(&mut self, id: Id) {
        let Some(node) = self.stable.node_mut(id) else {
            return;
        };
        if let Some(page) = node.page() {
            let lock = page.lock();
            let unused = node.sharers() == 0 && node.release(&lock);
            drop(lock);
            if unused {
                self.drop_node(id);
            }
        } else {
            self.retire(id);
        }
        mm::breathe();
    }
}

/// What is needed to record a merge.
pub(crate) struct MergedRmap {
    /// The empty record.
    id: Id,
    /// The structure for the core.
    pub(crate) item: RmapItem,
}

/// For records of pages: not worth reclaiming anything, so without memory at hand the page is left alone.
pub(crate) fn record_flags() -> Flags {
    GFP_NOWAIT | __GFP_NOWARN
}

/// For what a merge takes: it saves more than it costs.
pub(crate) fn merge_flags() -> Flags {
    GFP_KERNEL | __GFP_NOWARN
}
