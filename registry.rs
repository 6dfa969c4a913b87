// SPDX-License-Identifier: GPL-2.0

//! Which address spaces there are: between the probes, which must not sleep, and the engine, which does.
//!
//! An address space is *fresh* from its entry until the engine adopts it, then *adopted*, and *dead* from
//! its exit until the engine buries it. One that exits while fresh was never the engine's business, so
//! nobody is woken for it: while the module is idle, processes come and go at no cost.

#![forbid(unsafe_code)]

use crate::{
    kthread::Bell,
    mm::space::AddressSpace,
    tracepoints::Observer, //
};
use kernel::{
    new_spinlock,
    prelude::*,
    rbtree::{
        RBTree,
        RBTreeNode, //
    },
    sync::{
        atomic::{
            Atomic,
            Full,
            Relaxed, //
        },
        SpinLock, //
    }, //
};

/// The engine's number for an adopted address space.
pub(crate) type SlotId = u32;

/// An address space known to the engine; `slot` is set once it has one.
struct Entry {
    space: AddressSpace,
    slot: Option<SlotId>,
}

/// Every address space is in exactly one of the trees, by its key.
struct Inner {
    fresh: RBTree<usize, Entry>,
    adopted: RBTree<usize, Entry>,
    dead: RBTree<usize, Entry>,
    /// Set once the engine takes no more: everything that enters is ignored.
    closed: bool,
}

impl Inner {
    /// Whether an address space is known already, or does not matter any more.
    fn takes_no(&self, key: usize) -> bool {
        self.closed
            || self.fresh.get(&key).is_some()
            || self.adopted.get(&key).is_some()
            || self.dead.get(&key).is_some()
    }
}

/// The registry of address spaces.
#[pin_data]
pub(crate) struct Registry {
    #[pin]
    inner: SpinLock<Inner>,
    #[pin]
    bell: Bell,
    /// An address space could not be recorded for want of memory: all tasks must be visited again.
    missed: Atomic<bool>,
    /// Whether the engine wants to be told of arrivals at once, as it has nothing else to do.
    waiting: Atomic<bool>,
}

impl Registry {
    /// An empty registry.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            inner <- new_spinlock!(Inner {
                fresh: RBTree::new(),
                adopted: RBTree::new(),
                dead: RBTree::new(),
                closed: false,
            }, "ksm_rs::registry"),
            bell <- Bell::new(),
            missed: Atomic::new(false),
            waiting: Atomic::new(false),
        })
    }

    /// The bell that wakes the engine's thread.
    pub(crate) fn bell(&self) -> &Bell {
        &self.bell
    }

    /// Adopts a fresh address space under the number `slot`.
    pub(crate) fn adopt(&self, slot: SlotId) -> Option<AddressSpace> {
        let mut inner = self.inner.lock();
        let first = inner.fresh.cursor_front_mut()?;
        let key = *first.current().0;
        // In one step, so that its exit finds it in one tree or the other.
        let node = first.remove_current().1;
        let old = inner.adopted.insert(node);
        let space = inner.adopted.get_mut(&key).map(|entry| {
            entry.slot = Some(slot);
            entry.space.clone()
        });
        drop(inner);
        drop(old);
        space
    }

    /// Forgets an address space that the engine has done with.
    pub(crate) fn forget(&self, key: usize) {
        let mut inner = self.inner.lock();
        let gone = (
            inner.adopted.remove_node(&key),
            inner.dead.remove_node(&key),
        );
        drop(inner);
        drop(gone);
    }

    /// Number of a dead address space that still has to be buried; see [`Registry::forget`].
    pub(crate) fn next_dead(&self) -> Option<(usize, SlotId)> {
        let inner = self.inner.lock();
        let cursor = inner.dead.cursor_front()?;
        let (key, entry) = cursor.current();
        Some((*key, entry.slot?))
    }

    /// Whether there are fresh address spaces, or some were missed.
    pub(crate) fn has_fresh(&self) -> bool {
        self.missed.load(Relaxed) || !self.inner.lock().fresh.is_empty()
    }

    /// Whether there is anything to bury.
    pub(crate) fn has_dead(&self) -> bool {
        !self.inner.lock().dead.is_empty()
    }

    /// Says whether the bell should ring when an address space enters.
    pub(crate) fn set_waiting(&self, waiting: bool) {
        // A full barrier, as in `look_again()`: of one who writes the one flag and then reads the other, and one who does it
        // the other way round, one sees what the other has written.
        self.waiting.xchg(waiting, Full);
    }

    /// Whether an address space was missed since the last call.
    pub(crate) fn take_missed(&self) -> bool {
        self.missed.xchg(false, Relaxed)
    }

    /// Has all tasks visited again: an address space may have been missed.
    pub(crate) fn look_again(&self) {
        self.missed.xchg(true, Full);
        if self.waiting.load(Relaxed) {
            self.bell.ring();
        }
    }

    /// Lets nothing more in.
    pub(crate) fn close(&self) {
        self.inner.lock().closed = true;
    }
}

impl Observer for Registry {
    fn enter(&self, space: AddressSpace) {
        let key = space.key();
        if self.inner.lock().takes_no(key) {
            return;
        }
        // Allocated before the lock is taken, and atomically: we are in somebody else's context.
        let Ok(node) = RBTreeNode::new(key, Entry { space, slot: None }, GFP_NOWAIT) else {
            self.look_again();
            return;
        };
        let mut inner = self.inner.lock();
        if inner.takes_no(key) {
            drop(inner);
            drop(node);
            return;
        }
        let old = inner.fresh.insert(node);
        drop(inner);
        drop(old);
        if self.waiting.load(Relaxed) {
            self.bell.ring();
        }
    }

    fn exit(&self, key: usize) {
        let mut inner = self.inner.lock();
        if let Some(node) = inner.fresh.remove_node(&key) {
            drop(inner);
            drop(node);
            return;
        }
        if let Some(node) = inner.adopted.remove_node(&key) {
            let old = inner.dead.insert(node);
            drop(inner);
            drop(old);
            self.bell.ring();
        }
    }
}
