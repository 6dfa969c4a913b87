// SPDX-License-Identifier: GPL-2.0

//! What the files of `/sys/kernel/mm/ksm_rs` count. Written under the engine's mutex, read by anybody.

#![forbid(unsafe_code)]

use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

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
        self.0.fetch_add(1usize, Relaxed);
    }

    /// One less.
    pub(crate) fn down(&self) {
        self.0.fetch_sub(1usize, Relaxed);
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
            alloc_failures: Count::new(),
        }
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
