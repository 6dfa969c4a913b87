// SPDX-License-Identifier: GPL-2.0

//! Walking page tables: gathering candidates for merging, finding KSM pages to unmerge.

use super::{
    bindings,
    page::PageRef,
    space::Vma, //
};
use core::ptr::NonNull;
use kernel::{
    ffi,
    page::PAGE_SIZE,
    prelude::*, //
};

/// Bytes that one page table (one PMD entry) maps.
pub(crate) const PAGE_TABLE_SPAN: usize = 1 << bindings::PMD_SHIFT;

/// Most candidates a batch can hold. Enough of them that taking the locks costs next to nothing, and so few that
/// the locks are not held for longer than by others who walk page tables.
pub(crate) const BATCH_PAGES: usize = 128;

/// Most page tables and VMAs without anything for us that are passed under one hold of the mmap lock: about a millisecond's
/// work.
pub(crate) const MOST_STEPS: usize = 512;

/// An entry without a page for us costs less than to ask whether anybody waits for the locks: that is asked behind every 64th.
const ASK_SPAN_MASK: usize = 64 * PAGE_SIZE - 1;

/// An anonymous page found in a page table.
pub(crate) struct Found {
    /// Where it is mapped, page-aligned.
    pub(crate) address: usize,
    /// The page.
    pub(crate) page: PageRef,
}

/// What `pmd_entry` callbacks share with their caller.
struct Gather<'a> {
    found: &'a mut KVec<Found>,
    limit: usize,
    /// How many pages are worth ending the walk for.
    enough: usize,
    /// Where the next gathering goes on.
    resume: usize,
    steps: Steps<'a>,
}

/// What is looked for by [`Vma::next_ksm_page`].
struct Search<'a> {
    /// The page.
    found: Option<usize>,
    /// Where to go on from, once there are no more steps.
    resume: usize,
    steps: Steps<'a>,
}

/// What [`Vma::next_ksm_page`] has found.
pub(super) enum KsmPage {
    /// A page at this address.
    At(usize),
    /// None so far; it is to be looked for from this address on.
    From(usize),
    /// None.
    Nothing,
}

/// How many page tables a walk may still pass.
struct Steps<'a> {
    left: &'a mut usize,
    /// Places without a page table that were passed.
    holes: usize,
}

/// So many places without a page table cost as much as a page table.
const HOLES_PER_STEP: usize = 512;

impl Steps<'_> {
    /// A page table is passed. Returns whether to end. May sleep.
    fn table(&mut self) -> bool {
        *self.left = self.left.saturating_sub(1);
        super::breathe();
        *self.left == 0
    }

    /// A place without a page table is passed. Returns whether to end. May sleep.
    fn hole(&mut self) -> bool {
        self.holes = self.holes.saturating_add(1);
        self.holes % HOLES_PER_STEP == 0 && self.table()
    }
}

impl Vma<'_> {
    /// Collects anonymous pages mapped in `[from, end of the VMA)`, in address order, with a reference on
    /// each, into the spare capacity of `found`, until that has `limit` of them. Ends sooner when there are `enough` at the
    /// end of a page table, or when somebody waits for the mmap lock or the page table's.
    ///
    /// Page tables are counted down from `steps`, and many places without: with none left it ends too.
    ///
    /// Returns the address to go on from. Sleeps between page tables, never allocates.
    pub(crate) fn gather(
        &self,
        from: usize,
        limit: usize,
        enough: usize,
        found: &mut KVec<Found>,
        steps: &mut usize,
    ) -> usize {
        let from = from.max(self.start());
        if from >= self.end() {
            return self.end();
        }
        let mut gather = Gather {
            found,
            limit,
            enough,
            resume: self.end(),
            steps: Steps {
                left: steps,
                holes: 0,
            },
        };
        // SAFETY: The mmap lock is held for reading, the range lies inside the VMA, and `gather` outlives the
        // walk.
        let stopped = unsafe {
            bindings::ksm_rs_walk_page_range_vma(
                self.as_ptr(),
                from,
                self.end(),
                &GATHER_OPS.0,
                (&raw mut gather).cast(),
            )
        };
        if stopped == 0 {
            gather.resume = self.end();
        }
        gather.resume
    }

    /// The anonymous page mapped at `address`, with a reference.
    pub(crate) fn page_at(&self, address: usize) -> Option<PageRef> {
        let mut found = None;
        // SAFETY: The mmap lock is held for reading; the caller's address is checked to lie inside the VMA; the
        // callback writes to `found` only during the walk.
        unsafe {
            if address < self.start() || address >= self.end() {
                return None;
            }
            bindings::ksm_rs_walk_page_range_vma(
                self.as_ptr(),
                address,
                address.wrapping_add(PAGE_SIZE),
                &PAGE_AT_OPS.0,
                (&raw mut found).cast(),
            );
        }
        found
    }

    /// The first address in `[from, to)` where a KSM page, or a zero page that KSM put there, is mapped. Page tables are
    /// counted down from `steps`, each time that they are looked at, and many places without one: with none left it ends, and
    /// when somebody waits for the mmap lock. Sleeps between page tables.
    pub(super) fn next_ksm_page(&self, from: usize, to: usize, steps: &mut usize) -> KsmPage {
        let (from, to) = (from.max(self.start()), to.min(self.end()));
        if from >= to {
            return KsmPage::Nothing;
        }
        let mut search = Search {
            found: None,
            resume: to,
            steps: Steps {
                left: steps,
                holes: 0,
            },
        };
        // SAFETY: The mmap lock is held for reading; the range lies inside the VMA; `search` outlives the walk.
        let stopped = unsafe {
            bindings::ksm_rs_walk_page_range_vma(
                self.as_ptr(),
                from,
                to,
                &KSM_PAGE_OPS.0,
                (&raw mut search).cast(),
            )
        };
        match search.found {
            Some(address) => KsmPage::At(address),
            None if stopped != 0 && search.resume < to => KsmPage::From(search.resume),
            None => KsmPage::Nothing,
        }
    }
}

/// `mm_walk_ops` in a static.
struct WalkOps(bindings::mm_walk_ops);

// SAFETY: The core only reads it.
unsafe impl Sync for WalkOps {}

type PmdEntry = unsafe extern "C" fn(
    *mut bindings::pmd_t,
    ffi::c_ulong,
    ffi::c_ulong,
    *mut bindings::mm_walk,
) -> ffi::c_int;

type Hole = unsafe extern "C" fn(
    ffi::c_ulong,
    ffi::c_ulong,
    ffi::c_int,
    *mut bindings::mm_walk,
) -> ffi::c_int;

const fn walk_ops(pmd_entry: PmdEntry, hole: Option<Hole>) -> WalkOps {
    WalkOps(bindings::mm_walk_ops {
        pgd_entry: None,
        p4d_entry: None,
        pud_entry: None,
        pmd_entry: Some(pmd_entry),
        pte_entry: None,
        pte_hole: hole,
        hugetlb_entry: None,
        test_walk: None,
        pre_vma: None,
        post_vma: None,
        install_pte: None,
        walk_lock: bindings::page_walk_lock_PGWALK_RDLOCK,
    })
}

static GATHER_OPS: WalkOps = walk_ops(gather_pmd_entry, Some(gather_hole));
static PAGE_AT_OPS: WalkOps = walk_ops(page_at_pmd_entry, None);
static KSM_PAGE_OPS: WalkOps = walk_ops(ksm_page_pmd_entry, Some(ksm_page_hole));

/// Takes a reference on `page` if it is an anonymous page of ordinary memory.
///
/// # Safety
///
/// `page` must be null or mapped by a page table entry whose lock the caller holds.
pub(super) unsafe fn anon_page(page: *mut bindings::page) -> Option<PageRef> {
    let page = NonNull::new(page)?;
    // SAFETY: The entry that maps the page holds a reference on its folio, and cannot go away as long as its
    // lock is held.
    unsafe {
        let folio = bindings::ksm_rs_page_folio(page.as_ptr());
        if bindings::ksm_rs_folio_is_zone_device(folio) || !bindings::ksm_rs_folio_test_anon(folio)
        {
            return None;
        }
        bindings::ksm_rs_folio_get(folio);
        Some(PageRef::from_raw(page))
    }
}

/// Calls `each` with the address of every anonymous page that the page table, or the huge page, behind
/// `pmdp` maps in `[address, end)`, under its lock, until `each` answers `false`, or somebody waits for one of the locks
/// that are held: page faults of the process are not to notice that it is scanned.
///
/// Returns the first address that was not dealt with, which is behind `address` if `each` always answers `true`.
///
/// # Safety
///
/// The arguments must be those of a `pmd_entry` callback.
unsafe fn for_each_anon_page(
    pmdp: *mut bindings::pmd_t,
    mut address: usize,
    end: usize,
    walk: *mut bindings::mm_walk,
    mut each: impl FnMut(usize, PageRef) -> bool,
) -> usize {
    // SAFETY: The walker hands us a valid PMD entry of `walk.mm`, whose mmap lock is held. Every entry is read
    // under the lock of its table; the lock is released on every path.
    unsafe {
        let (mm, vma) = ((*walk).mm, (*walk).vma);
        let pmd = bindings::ksm_rs_pmdp_get_lockless(pmdp);
        if !bindings::ksm_rs_pmd_present(pmd) {
            return end;
        }
        if bindings::ksm_rs_pmd_leaf(pmd) {
            let lock = bindings::ksm_rs_pmd_lock(mm, pmdp);
            let pmd = bindings::ksm_rs_pmdp_get_lockless(pmdp);
            let huge = bindings::ksm_rs_pmd_present(pmd) && bindings::ksm_rs_pmd_leaf(pmd);
            if huge {
                let head = bindings::ksm_rs_pmd_page(vma, address, pmd);
                while address < end {
                    let index = (address & (PAGE_TABLE_SPAN - 1)) / PAGE_SIZE;
                    // A page of ordinary memory, as the pages of a huge page lie side by side.
                    let page = (!head.is_null()).then(|| anon_page(head.add(index)));
                    let Some(page) = page.flatten() else {
                        address = end;
                        break;
                    };
                    if !each(address, page) {
                        break;
                    }
                    address = address.wrapping_add(PAGE_SIZE);
                    if is_awaited(mm, lock) {
                        break;
                    }
                }
            }
            bindings::ksm_rs_spin_unlock(lock);
            if huge {
                return address;
            }
        }

        let mut lock = core::ptr::null_mut();
        let first = bindings::ksm_rs_pte_offset_map_lock(mm, pmdp, address, &mut lock);
        if first.is_null() {
            return end;
        }
        let mut ptep = first;
        'table: while address < end {
            let stop = end.min((address | ASK_SPAN_MASK).wrapping_add(1));
            while address < stop {
                let pte = bindings::ksm_rs_ptep_get(ptep);
                let mut page = None;
                if bindings::ksm_rs_pte_present(pte) {
                    page = anon_page(bindings::ksm_rs_vm_normal_page(vma, address, pte));
                }
                let at = address;
                address = address.wrapping_add(PAGE_SIZE);
                ptep = ptep.add(1);
                let Some(page) = page else { continue };
                if !each(at, page) {
                    address = at;
                    break 'table;
                }
                if is_awaited(mm, lock) {
                    break 'table;
                }
            }
            if is_awaited(mm, lock) {
                break;
            }
        }
        bindings::ksm_rs_pte_unmap_unlock(first, lock);
    }
    address
}

/// Whether somebody waits for the mmap lock, or for the lock of a page table.
///
/// # Safety
///
/// The caller holds both.
#[inline(always)]
unsafe fn is_awaited(mm: *mut bindings::mm_struct, lock: *mut bindings::spinlock_t) -> bool {
    // SAFETY: Both are valid, as the caller holds them.
    unsafe { bindings::ksm_rs_spin_is_contended(lock) || bindings::ksm_rs_mmap_lock_contended(mm) }
}

/// Collects the pages behind one PMD entry; stops the walk once there are enough.
///
/// # Safety
///
/// The arguments must be those of a `pmd_entry` callback, with `walk.private` as [`Vma::gather`] sets it.
unsafe extern "C" fn gather_pmd_entry(
    pmdp: *mut bindings::pmd_t,
    address: ffi::c_ulong,
    end: ffi::c_ulong,
    walk: *mut bindings::mm_walk,
) -> ffi::c_int {
    // SAFETY: `gather()` passed a `Gather` that outlives the walk and is used by nobody else during it.
    let gather = unsafe { &mut *(*walk).private.cast::<Gather<'_>>() };
    // SAFETY: Our arguments are those of a `pmd_entry` callback.
    gather.resume = unsafe {
        for_each_anon_page(pmdp, address, end, walk, |address, page| {
            let full = gather.found.len() >= gather.limit;
            // A vector without room drops the page again, and the walk goes on from there.
            !full
                && gather
                    .found
                    .push_within_capacity(Found { address, page })
                    .is_ok()
        })
    };
    if gather.resume < end || gather.found.len() >= gather.enough {
        return 1;
    }
    let over = gather.steps.table();
    // SAFETY: The walk's mm is valid.
    let contended = unsafe { bindings::ksm_rs_mmap_lock_contended((*walk).mm) };
    ffi::c_int::from(over || contended)
}

/// Passes a place that has no page table.
///
/// # Safety
///
/// The arguments must be those of a `pte_hole` callback, with `walk.private` as [`Vma::gather`] sets it.
unsafe extern "C" fn gather_hole(
    _: ffi::c_ulong,
    end: ffi::c_ulong,
    _: ffi::c_int,
    walk: *mut bindings::mm_walk,
) -> ffi::c_int {
    // SAFETY: `gather()` passed a `Gather` that outlives the walk and is used by nobody else during it.
    let gather = unsafe { &mut *(*walk).private.cast::<Gather<'_>>() };
    gather.resume = end;
    let over = gather.steps.hole();
    // SAFETY: The walk's mm is valid.
    let contended = unsafe { bindings::ksm_rs_mmap_lock_contended((*walk).mm) };
    ffi::c_int::from(over || contended)
}

/// Takes the page of one address.
///
/// # Safety
///
/// The arguments must be those of a `pmd_entry` callback, with `walk.private` as [`Vma::page_at`] sets it.
unsafe extern "C" fn page_at_pmd_entry(
    pmdp: *mut bindings::pmd_t,
    address: ffi::c_ulong,
    end: ffi::c_ulong,
    walk: *mut bindings::mm_walk,
) -> ffi::c_int {
    // SAFETY: `page_at()` passed a pointer to its result, which is used by nobody else during the walk.
    let result = unsafe { &mut *(*walk).private.cast::<Option<PageRef>>() };
    // SAFETY: Our arguments are those of a `pmd_entry` callback.
    unsafe {
        for_each_anon_page(pmdp, address, end, walk, |_, page| {
            *result = Some(page);
            false
        });
    }
    0
}

/// Looks for a KSM page; stops the walk at one.
///
/// # Safety
///
/// The arguments must be those of a `pmd_entry` callback, with `walk.private` as [`Vma::next_ksm_page`] sets it.
unsafe extern "C" fn ksm_page_pmd_entry(
    pmdp: *mut bindings::pmd_t,
    mut address: ffi::c_ulong,
    end: ffi::c_ulong,
    walk: *mut bindings::mm_walk,
) -> ffi::c_int {
    // SAFETY: `next_ksm_page()` passed a `Search` that outlives the walk and is used by nobody else during it.
    let search = unsafe { &mut *(*walk).private.cast::<Search<'_>>() };
    search.resume = end;
    // SAFETY: The walker hands us a valid PMD entry of `walk.mm`, whose mmap lock is held. Folios are looked at under the lock
    // of the table that maps them; a migration entry keeps its folio alive in the same way.
    unsafe {
        let mut lock = core::ptr::null_mut();
        let first = bindings::ksm_rs_pte_offset_map_lock((*walk).mm, pmdp, address, &mut lock);
        if first.is_null() {
            return ffi::c_int::from(search.steps.table());
        }
        let mut ptep = first;
        while address < end {
            let pte = bindings::ksm_rs_ptep_get(ptep);
            let folio = if bindings::ksm_rs_pte_present(pte) {
                let page = bindings::ksm_rs_vm_normal_page((*walk).vma, address, pte);
                if page.is_null() {
                    core::ptr::null_mut()
                } else {
                    bindings::ksm_rs_page_folio(page)
                }
            } else if bindings::ksm_rs_pte_none(pte) {
                core::ptr::null_mut()
            } else {
                bindings::ksm_rs_pte_migration_folio(pte)
            };
            if (!folio.is_null() && bindings::ksm_rs_folio_test_ksm(folio))
                || bindings::ksm_rs_pte_is_ksm_zero(pte)
            {
                search.found = Some(address);
                break;
            }
            address = address.wrapping_add(PAGE_SIZE);
            ptep = ptep.add(1);
        }
        bindings::ksm_rs_pte_unmap_unlock(first, lock);
    }
    let over = search.steps.table();
    // SAFETY: The walk's mm is valid.
    let contended = unsafe { bindings::ksm_rs_mmap_lock_contended((*walk).mm) };
    ffi::c_int::from(search.found.is_some() || over || contended)
}

/// Passes a place that has no page table.
///
/// # Safety
///
/// The arguments must be those of a `pte_hole` callback, with `walk.private` as [`Vma::next_ksm_page`] sets it.
unsafe extern "C" fn ksm_page_hole(
    _: ffi::c_ulong,
    end: ffi::c_ulong,
    _: ffi::c_int,
    walk: *mut bindings::mm_walk,
) -> ffi::c_int {
    // SAFETY: `next_ksm_page()` passed a `Search` that outlives the walk and is used by nobody else during it.
    let search = unsafe { &mut *(*walk).private.cast::<Search<'_>>() };
    search.resume = end;
    ffi::c_int::from(search.steps.hole())
}
