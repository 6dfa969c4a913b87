// SPDX-License-Identifier: GPL-2.0

//! What the files of `/sys/kernel/mm/ksm_rs` count. Written under the engine's mutex, read by anybody.

#![forbid(unsafe_code)]

use crate::{
    items::{
        PageItem,
        Rmap, //
    },
    mm::node,
    stable_tree::StableEntry, //
};
use kernel::{
    page::PAGE_SIZE,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

/// Bytes of the records of a mapping of a KSM page, beside those of any page.
const MERGED_BYTES: usize = size_of::<Rmap>() + node::ITEM_BYTES;
/// Bytes of the records of a KSM page.
const SHARED_BYTES: usize = size_of::<StableEntry>() + node::NODE_BYTES;

/// A counter.
pub(crate) struct Count(Atomic<usize>);

impl Count {
    const fn new() -> Self {
        Self(Atomic::new(0))
    }

    /// The value now.
    pub(crate) fn get(&self) -> usize {
        self.0.load(Relaxed)
    }

    /// One more.
    pub(crate) fn up(&self) {
        self.add(1);
    }

    /// One less.
    pub(crate) fn down(&self) {
        self.subtract(1);
    }

    /// Some more.
    pub(crate) fn add(&self, number: usize) {
        self.0.fetch_add(number, Relaxed);
    }

    /// Some less.
    pub(crate) fn subtract(&self, number: usize) {
        self.0.fetch_sub(number, Relaxed);
    }

    /// Starts over.
    pub(crate) fn clear(&self) {
        self.0.store(0, Relaxed);
    }
}

/// All counters; those that stock has are named as its files are.
pub(crate) struct Stats {
    /// KSM pages in use: stable nodes with a mapping.
    pub(crate) pages_shared: Count,
    /// Mappings of KSM pages beyond the first of each: the pages saved.
    pub(crate) pages_sharing: Count,
    /// Pages in the unstable tree: unchanged, and equal to none.
    pub(crate) pages_unshared: Count,
    /// Pages looked at since load.
    pub(crate) pages_scanned: Count,
    /// Passes over all mergeable memory completed since load or since the last `run=2`.
    pub(crate) full_scans: Count,
    /// Records of pages; what they are not otherwise is volatile.
    pub(crate) rmap_items: Count,
    /// Stable nodes that stand for the same contents as others in their forest.
    pub(crate) stable_node_dups: Count,
    /// Contents for which there are several stable nodes in a forest.
    pub(crate) stable_node_chains: Count,
    /// Times that smart scan left a page out.
    pub(crate) pages_skipped: Count,
    /// Times that a page or an address space was left alone for want of memory.
    pub(crate) alloc_failures: Count,
}

impl Stats {
    /// All zero.
    pub(crate) const fn new() -> Self {
        Self {
            pages_shared: Count::new(),
            pages_sharing: Count::new(),
            pages_unshared: Count::new(),
            pages_scanned: Count::new(),
            full_scans: Count::new(),
            rmap_items: Count::new(),
            stable_node_dups: Count::new(),
            stable_node_chains: Count::new(),
            pages_skipped: Count::new(),
            alloc_failures: Count::new(),
        }
    }

    /// Bytes of memory saved, `zero_pages` mappings of the zero page included, less what our records take.
    pub(crate) fn general_profit(&self, zero_pages: isize) -> i64 {
        let shared = self.pages_shared.get();
        let sharing = self.pages_sharing.get();
        let saved = sharing
            .saturating_add_signed(zero_pages)
            .saturating_mul(PAGE_SIZE);
        let mappings = shared.saturating_add(sharing);
        let cost = (self.rmap_items.get().saturating_mul(size_of::<PageItem>()))
            .saturating_add(mappings.saturating_mul(MERGED_BYTES))
            .saturating_add(shared.saturating_mul(SHARED_BYTES));
        (saved as i64).saturating_sub(cost as i64)
    }

    /// Pages that changed between two passes. The counters are read one by one while they change, so the
    /// difference could be negative; it is 0 then.
    pub(crate) fn pages_volatile(&self) -> usize {
        self.rmap_items
            .get()
            .saturating_sub(self.pages_shared.get())
            .saturating_sub(self.pages_sharing.get())
            .saturating_sub(self.pages_unshared.get())
    }
}
