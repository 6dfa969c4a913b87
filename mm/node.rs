// SPDX-License-Identifier: GPL-2.0

//! Stable nodes and rmap items: the structures through which the core finds every mapping of a KSM page.
//!
//! `rmap_walk_ksm()`, `collect_procs_ksm()` and `folio_migrate_ksm()` (`mm/ksm.c`) follow
//! `folio->mapping` to a stable node and its list of rmap items, under the folio lock. They read the
//! fields below at the offsets of the running kernel's private structures, which [`WANTED`] states and
//! `layout.rs` proves at load; the rest of both structures is ours.

use super::{
    bindings,
    hotplug::OfflineRange,
    page::{
        KsmPage,
        PageLock,
        PageRef, //
    },
    space::{
        AddressSpace,
        Vma, //
    },
};
use crate::{
    arena::Id,
    delay::{
        self,
        Point, //
    },
    layout::{
        Wanted,
        WantedSize, //
    },
    series::smp_rmb, //
};
use core::{cell::UnsafeCell, mem::offset_of, ptr::NonNull};
use kernel::{
    alloc::{
        AllocError,
        Flags, //
    },
    prelude::*,
    sync::atomic::{
        Atomic,
        AtomicFlag,
        Relaxed, //
    }, //
};

/// `folio->mapping` of a KSM page: the node's address with these bits.
const MAPPING_KSM: usize = bindings::FOLIO_MAPPING_KSM as usize;

/// A stable node as the core sees it.
#[repr(C)]
struct RawNode {
    owner: u32,
    /// Stock keeps its tree links here; we keep ours elsewhere.
    _private: [u32; 9],
    /// The rmap items of all mappings we know.
    hlist: bindings::hlist_head,
    /// The page's frame, updated by `folio_migrate_ksm()`.
    kpfn: Atomic<usize>,
    _stock_rmap_hlist_len: i32,
    _stock_nid: i32,
}

/// An rmap item as the core sees it.
#[repr(C)]
struct RawItem {
    owner: u32,
    _private: u32,
    anon_vma: *mut bindings::anon_vma,
    mm: *mut bindings::mm_struct,
    address: usize,
    linear_page_index: usize,
    _stock_head: usize,
    hlist: bindings::hlist_node,
}

/// Slab bytes of an [`RmapItem`].
pub(crate) const ITEM_BYTES: usize = size_of::<RawItem>();
/// Slab bytes of a [`StableNode`].
pub(crate) const NODE_BYTES: usize = size_of::<RawNode>();

macro_rules! wanted {
    ($structure:literal: $($raw:ident.$field:ident),+ $(,)?) => {
        [$(Wanted { structure: $structure, field: stringify!($field), offset: offset_of!($raw, $field) }),+]
    };
}

const WANTED_NODE: [Wanted; 2] = wanted!("ksm_stable_node": RawNode.hlist, RawNode.kpfn);
#[cfg(linux_7_3)]
const WANTED_ITEM: [Wanted; 5] = wanted!(
    "ksm_rmap_item": RawItem.anon_vma, RawItem.mm, RawItem.address, RawItem.linear_page_index, RawItem.hlist
);
/// Before Linux 7.3 the core looked at all of an anon_vma: the page's index is ours alone there, and harms nobody.
#[cfg(not(linux_7_3))]
const WANTED_ITEM: [Wanted; 4] = wanted!(
    "ksm_rmap_item": RawItem.anon_vma, RawItem.mm, RawItem.address, RawItem.hlist
);

/// The fields that the core reads, and where our structures have them.
pub(crate) const WANTED: [&[Wanted]; 2] = [&WANTED_NODE, &WANTED_ITEM];

/// Their sizes: one that grew has a member that we do not know.
pub(crate) const WANTED_SIZES: [WantedSize; 2] = [
    WantedSize {
        structure: "ksm_stable_node",
        size: size_of::<RawNode>(),
    },
    WantedSize {
        structure: "ksm_rmap_item",
        size: size_of::<RawItem>(),
    },
];

/// What became of the page that a node stands for.
pub(crate) enum NodePage {
    /// Still the node's page.
    Live(KsmPage),
    /// Somebody holds the folio lock, perhaps to move the page; worth another try later.
    Busy,
    /// Its memory has gone bad: nobody must be merged with it. It keeps its node until nobody maps it.
    Bad,
    /// Freed, or no KSM page of this node any more: the node is to be emptied and dropped.
    Stale,
}

/// A stable node: a KSM page and the list of its mappings.
///
/// It holds no reference on its page, so that the page can be freed or swapped out at any time; see
/// [`StableNode::page`].
///
/// # Invariants
///
/// - `raw` points at a slab object that this value owns.
/// - `items` is the number of [`RmapItem`]s in the raw node's list, all linked by [`StableNode::link`].
/// - Unless `unused` is set, a folio's `mapping` may point at the raw node.
/// - All changes of the list are made under the lock of the node's folio, or when no folio points at it.
pub(crate) struct StableNode {
    raw: NonNull<UnsafeCell<RawNode>>,
    items: u32,
    unused: bool,
}

// SAFETY: The node belongs to no task; all shared access to the raw node is by the rules of its fields.
unsafe impl Send for StableNode {}

impl StableNode {
    /// Allocates a node for the record `owner`. It stands for no page yet.
    pub(crate) fn new(owner: Id, flags: Flags) -> Result<Self, AllocError> {
        let raw = KBox::new(
            UnsafeCell::new(RawNode {
                owner: owner.raw(),
                _private: [0; 9],
                hlist: bindings::hlist_head::default(),
                kpfn: Atomic::new(0),
                _stock_rmap_hlist_len: 0,
                _stock_nid: 0,
            }),
            flags,
        )?;
        // INVARIANT: The list is empty, and no folio can point at a node that has just been made.
        Ok(Self {
            raw: NonNull::from(KBox::leak(raw)),
            items: 0,
            unused: true,
        })
    }

    fn raw(&self) -> *mut RawNode {
        UnsafeCell::raw_get(self.raw.as_ptr())
    }

    /// Value of `folio->mapping` for this node's page.
    fn mapping(&self) -> usize {
        self.raw.as_ptr() as usize | MAPPING_KSM
    }

    /// Frame number of its page, as the core last said; 0 before it had one.
    pub(crate) fn pfn(&self) -> usize {
        // SAFETY: The raw node is ours and `kpfn` is atomic.
        unsafe { &(*self.raw()).kpfn }.load(Relaxed)
    }

    /// Number of mappings in the node's list.
    pub(crate) fn sharers(&self) -> u32 {
        self.items
    }

    /// The owner's record of the node that `page` belongs to, if it is a KSM page of a node. The caller
    /// compares with [`StableNode::stands_for`], since it might be a node of the stock KSM.
    pub(crate) fn owner_of(page: &PageRef) -> Option<Id> {
        let mapping = page.mapping();
        let node = (mapping & !MAPPING_KSM) as *const RawNode;
        if mapping & MAPPING_KSM != MAPPING_KSM || node.is_null() {
            return None;
        }
        // SAFETY: A node is not freed while the folio, on which we hold a reference, points at it: ours by the
        // type invariants of `StableNode` (and we hold the engine's mutex, so nothing is being freed), the
        // stock's because its thread does not run. Both are 64 bytes; of a stock's node the value is
        // arbitrary.
        Some(Id::from_raw(unsafe { (*node).owner }))
    }

    /// Whether `page` is this node's page.
    pub(crate) fn stands_for(&self, page: &PageRef) -> bool {
        page.mapping() == self.mapping()
    }

    /// The node's page, as one that may be mapped; `None`: the page is gone, the node is to be emptied and
    /// dropped. Sleeps, to lock the folio.
    pub(crate) fn page(&mut self) -> Option<KsmPage> {
        loop {
            let page = self.find()?;
            let lock = page.lock();
            if let Some(page) = self.settle(&lock) {
                return Some(page);
            }
            // It moved while we waited for the lock.
        }
    }

    /// As [`StableNode::page`], but does not wait for the folio lock.
    pub(crate) fn try_page(&mut self) -> NodePage {
        loop {
            let Some(page) = self.find() else {
                return NodePage::Stale;
            };
            delay::at(Point::NodeFound);
            let Some(lock) = page.try_lock() else {
                return NodePage::Busy;
            };
            if let Some(page) = self.settle(&lock) {
                if page.is_poisoned() {
                    return NodePage::Bad;
                }
                return NodePage::Live(page);
            }
        }
    }

    fn settle(&self, page: &PageLock<'_>) -> Option<KsmPage> {
        if self.stands_for(page.page()) {
            KsmPage::new(page)
        } else {
            None
        }
    }

    /// The frame that holds the node's page, with a reference; does not sleep.
    ///
    /// The node itself holds none, so this has to be careful: the frame may have been freed and used again,
    /// or the page may be moving to another frame right now. `folio->mapping` tells: it points back at the
    /// node as long as, and only when, the frame holds the node's page.
    fn find(&mut self) -> Option<PageRef> {
        loop {
            let pfn = self.pfn();
            delay::at(Point::FrameRead);
            // SAFETY: The frame belonged to our page, so it has a `struct page`: no node is looked at while memory
            // goes offline, and those of frames that are gone are dropped before the next look (`hotplug.rs`).
            // Taking a reference by `folio_try_get()` is safe on any frame.
            unsafe {
                let folio = bindings::ksm_rs_pfn_folio(pfn);
                if bindings::ksm_rs_folio_mapping(folio) as usize == self.mapping() {
                    let mut got = bindings::ksm_rs_folio_try_get(folio);
                    // A count of zero means freed, unless the page sits in the swap cache: then migration may have
                    // frozen the count for a moment, and the node must not be given up.
                    while !got && bindings::ksm_rs_folio_test_swapcache(folio) {
                        core::hint::spin_loop();
                        got = bindings::ksm_rs_folio_try_get(folio);
                    }
                    if got {
                        let page = NonNull::new_unchecked(bindings::ksm_rs_folio_page(folio));
                        let page = PageRef::from_raw(page);
                        if self.stands_for(&page) {
                            return Some(page);
                        }
                    }
                }
            }
            // `folio_migrate_ksm()` writes `kpfn` before it clears the old folio's mapping: read in the opposite
            // order, a page that moved is seen at its new frame.
            smp_rmb();
            if self.pfn() == pfn {
                // INVARIANT: No folio points at the node, and none will: only `adopt()` makes one.
                self.unused = true;
                return None;
            }
        }
    }

    /// Makes the node stand for `page`, which is a KSM page without a node; see [`Vma::make_ksm`].
    pub(crate) fn adopt(&mut self, page: &PageLock<'_>) -> Result<(), ()> {
        if page.page().mapping() != MAPPING_KSM || !self.unused {
            return Err(());
        }
        // SAFETY: The raw node is ours and `kpfn` is atomic.
        unsafe { &(*self.raw()).kpfn }.store(page.page().pfn(), Relaxed);
        // INVARIANT: From here on a folio points at the node.
        self.unused = false;
        // SAFETY: The folio is a KSM folio and locked; the node stays allocated as long as `unused` is not set.
        unsafe { page.set_mapping(self.mapping()) };
        Ok(())
    }

    /// Parts the node from its page if no page table maps that page any more, as it waits in the swap cache
    /// or to be freed. `false`: it is still mapped, the node is needed.
    pub(crate) fn release(&mut self, page: &PageLock<'_>) -> bool {
        if !self.stands_for(page.page()) || page.is_mapped() {
            return false;
        }
        delay::at(Point::Releasing);
        // SAFETY: A KSM folio without a node is what the core knows from the moments before `adopt()`.
        unsafe { page.set_mapping(MAPPING_KSM) };
        // INVARIANT: The one folio that pointed at the node does so no more.
        self.unused = true;
        true
    }

    /// Parts the node from its page though that is still mapped: the page stays a KSM page, which the
    /// core copies on the next write and cannot move until then.
    pub(crate) fn disown(&mut self, page: &PageLock<'_>) {
        if self.stands_for(page.page()) {
            // SAFETY: A KSM folio without a node is what the core knows from the moments before `adopt()`.
            unsafe { page.set_mapping(MAPPING_KSM) };
            // INVARIANT: The one folio that pointed at the node does so no more.
            self.unused = true;
        }
    }

    /// Gives up a page whose memory has gone offline, as its frame must not be looked at any more. `false`: the
    /// page is elsewhere.
    pub(crate) fn abandon(&mut self, offline: &OfflineRange) -> bool {
        let gone = offline.contains(self.pfn());
        if gone {
            // INVARIANT: A page that has been freed points at no node.
            self.unused = true;
        }
        gone
    }

    /// Adds a mapping to the list, under the lock of the node's page, which must be there already.
    pub(crate) fn link(&mut self, page: &PageLock<'_>, item: &mut RmapItem) -> Result<(), ()> {
        if !self.stands_for(page.page()) || item.linked || !item.bound {
            return Err(());
        }
        // SAFETY: Both are ours; the folio lock keeps the core from walking the list meanwhile.
        unsafe {
            let (head, node) = (&raw mut (*self.raw()).hlist, &raw mut (*item.raw()).hlist);
            let first = (*head).first;
            (*node).next = first;
            if !first.is_null() {
                (*first).pprev = &raw mut (*node).next;
            }
            (*node).pprev = &raw mut (*head).first;
            (*head).first = node;
        }
        // As long as it was mapped once only, its process may have said by `MADV_FREE` that it needs it no more; from here
        // on there is another mapping, which keeps `MADV_FREE` from it.
        page.mark_dirty();
        // INVARIANT: One more item is in the list.
        self.items = self.items.saturating_add(1);
        item.linked = true;
        Ok(())
    }

    /// Takes a mapping out of the list, under the lock of the node's page.
    pub(crate) fn unlink(&mut self, page: &PageLock<'_>, item: &mut RmapItem) {
        if self.stands_for(page.page()) && item.linked {
            self.remove(item);
        }
    }

    /// The record that owns the first item of the list, for emptying a stale node.
    pub(crate) fn first_owner(&self) -> Option<Id> {
        // SAFETY: The list changes only through `&mut self`; its items are allocated as long as they are linked.
        unsafe {
            let first = (*self.raw()).hlist.first;
            if first.is_null() {
                return None;
            }
            let item = first.byte_sub(offset_of!(RawItem, hlist)).cast::<RawItem>();
            Some(Id::from_raw((*item).owner))
        }
    }

    /// Takes a mapping out of the list of a node that no folio points at. `false`: one may still do.
    pub(crate) fn unlink_stale(&mut self, item: &mut RmapItem) -> bool {
        let may = self.unused && item.linked;
        if may {
            self.remove(item);
        }
        may
    }

    fn remove(&mut self, item: &mut RmapItem) {
        // SAFETY: The item is in a list, so its neighbours are valid; the callers made sure that the core does
        // not walk it.
        unsafe {
            let node = &raw mut (*item.raw()).hlist;
            let (next, pprev) = ((*node).next, (*node).pprev);
            *pprev = next;
            if !next.is_null() {
                (*next).pprev = pprev;
            }
        }
        // INVARIANT: One item less is in the list.
        self.items = self.items.saturating_sub(1);
        item.linked = false;
    }
}

impl Drop for StableNode {
    fn drop(&mut self) {
        if self.unused && self.items == 0 {
            // SAFETY: The object came from a `KBox`; by the invariants neither a folio nor an item refers to it.
            drop(unsafe { KBox::from_raw(self.raw.as_ptr()) });
        } else {
            report_leak();
        }
    }
}

/// One mapping of a KSM page: the address space, the address, and the anon_vma through which the core finds
/// the VMAs that share it after a fork.
///
/// # Invariants
///
/// - `raw` points at a slab object that this value owns.
/// - If `bound`, the raw item holds a reference on its `anon_vma`.
/// - `linked` says whether the raw item is in a stable node's list.
pub(crate) struct RmapItem {
    raw: NonNull<UnsafeCell<RawItem>>,
    bound: bool,
    linked: bool,
}

// SAFETY: The item belongs to no task.
unsafe impl Send for RmapItem {}

impl RmapItem {
    /// Allocates an item for the record `owner`, which describes the page at `address` in `space`.
    pub(crate) fn new(
        owner: Id,
        space: &AddressSpace,
        address: usize,
        flags: Flags,
    ) -> Result<Self, AllocError> {
        let raw = KBox::new(
            UnsafeCell::new(RawItem {
                owner: owner.raw(),
                _private: 0,
                anon_vma: core::ptr::null_mut(),
                mm: space.as_raw(),
                address,
                linear_page_index: 0,
                _stock_head: 0,
                hlist: bindings::hlist_node::default(),
            }),
            flags,
        )?;
        Ok(Self {
            raw: NonNull::from(KBox::leak(raw)),
            bound: false,
            linked: false,
        })
    }

    fn raw(&self) -> *mut RawItem {
        UnsafeCell::raw_get(self.raw.as_ptr())
    }

    /// The record that owns the item.
    pub(crate) fn owner(&self) -> Id {
        // SAFETY: The item is ours and the field never changes.
        Id::from_raw(unsafe { (*self.raw()).owner })
    }

    /// Address of its `mm_struct`, for events.
    pub(crate) fn mm(&self) -> usize {
        // SAFETY: The item is ours and the field never changes.
        unsafe { (*self.raw()).mm as usize }
    }

    /// Its own address, for events.
    pub(crate) fn address_of(&self) -> usize {
        self.raw.as_ptr() as usize
    }

    /// Remembers the anon_vma of `vma`, which maps the item's address, with a reference; the mmap lock, which
    /// `vma` stands for, keeps it from changing.
    pub(crate) fn bind(&mut self, vma: &Vma<'_>) {
        if self.bound {
            return;
        }
        // SAFETY: The item is ours and not linked (only bound ones are); the VMA is valid and, being mergeable,
        // has an anon_vma.
        unsafe {
            let raw = self.raw();
            (*raw).anon_vma = (*vma.as_ptr()).anon_vma;
            (*raw).linear_page_index =
                bindings::ksm_rs_linear_page_index(vma.as_ptr(), (*raw).address);
            bindings::ksm_rs_get_anon_vma((*raw).anon_vma);
        }
        // INVARIANT: The reference was just taken.
        self.bound = true;
    }
}

impl Drop for RmapItem {
    fn drop(&mut self) {
        if self.linked {
            report_leak();
            return;
        }
        // SAFETY: The object came from a `KBox` and is in no list by the invariants, so nobody refers to it; a
        // bound item's reference on its anon_vma is given up with it. May sleep, as `Drop` of this type must
        // expect.
        unsafe {
            if self.bound {
                bindings::ksm_rs_put_anon_vma((*self.raw()).anon_vma);
            }
            drop(KBox::from_raw(self.raw.as_ptr()));
        }
    }
}

/// Says once that a structure had to be left to the core, which is a bug of ours but harms nobody.
fn report_leak() {
    static SAID: AtomicFlag = AtomicFlag::new(false);
    if !SAID.xchg(true, Relaxed) {
        pr_err!("structures that the kernel may still read are leaked; this is a bug in ksm_rs, please report it\n");
    }
}
