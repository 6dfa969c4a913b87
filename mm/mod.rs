// SPDX-License-Identifier: GPL-2.0

//! The boundary: safe types over the kernel's memory management.
//!
//! Everything that touches a folio, a page table or a structure the core reads is here; the policy
//! above it is safe Rust. The rules that make the surface safe:
//!
//! - A mapping is only ever changed to another page by [`Vma::replace`] and its like for the zero page, which
//!   keep everybody from writing, compare all bytes and exchange the PTE by themselves: no caller can make a wrong merge.
//! - The way back is [`Vma::unshare_page`]: it copies what nobody can write to, as its reference keeps all others from having
//!   the page for themselves, and exchanges the PTE only if that is still mapped.
//! - A [`StableNode`] is freed only when no folio points at it, an [`RmapItem`] only when no node lists
//!   it; both are leaked otherwise, because the core may still read them.
//! - Page tables are only touched with `mm_users` held ([`Entered`]) and the mmap lock read-locked
//!   ([`Locked`]), so never after `exit_mmap()` began.
//!
//! # Lock order
//!
//! Outermost first: `control` → a thread's batch → the engine's mutex (all in `ksmd.rs`) → mmap lock → folio lock → MMU
//! notifier range → anon_vma → PTE lock. The registry's spinlock (`registry.rs`) and the bell's nest inside whatever the core
//! holds when it calls the probes, `task_lock()` included, and take nothing. The stock KSM's `ksm_thread_mutex` is taken
//! inside `control`, for an instant.
//!
//! [`Vma::replace`]: replace
//! [`Vma::unshare_page`]: unshare
//! [`StableNode`]: node::StableNode
//! [`RmapItem`]: node::RmapItem
//! [`Entered`]: space::Entered
//! [`Locked`]: space::Locked

pub(crate) mod bindings;
pub(crate) mod hotplug;
pub(crate) mod node;
pub(crate) mod owner;
pub(crate) mod page;
pub(crate) mod replace;
pub(crate) mod space;
pub(crate) mod unshare;
pub(crate) mod walk;
pub(crate) mod zero;

/// Drains the per-CPU LRU caches of all CPUs, so that pages waiting there lose the extra reference that
/// would keep them from being merged. Sleeps.
pub(crate) fn drain_lru_caches() {
    // SAFETY: Bound at load before any use; it may be called wherever sleeping is allowed.
    unsafe { bindings::ksm_rs_lru_add_drain_all() };
}

/// Lets other tasks run if they have to. May sleep.
pub(crate) fn breathe() {
    // SAFETY: Only called in contexts that may sleep.
    unsafe { bindings::ksm_rs_cond_resched() };
}

/// Number of NUMA nodes the machine may have.
pub(crate) fn nr_nodes() -> usize {
    #[cfg(CONFIG_NUMA)]
    // SAFETY: Written once, early in boot.
    let nodes = unsafe { bindings::nr_node_ids } as usize;
    #[cfg(not(CONFIG_NUMA))]
    let nodes = 1;
    nodes.max(1)
}
