// SPDX-License-Identifier: GPL-2.0

//! The merge itself: write-protect a page, prove it equal, map the KSM page in its place.

use super::{
    bindings,
    page::{
        KsmPage,
        NotMerged,
        PageLock,
        PageRef, //
    },
    space::Vma, //
};
use crate::delay::{
    self,
    Point, //
};

/// The announcement to secondary MMUs (KVM) that one page's mapping is about to change.
///
/// It spans write protection, comparison and replacement, so that no guest can map the page meanwhile.
///
/// # Invariants
///
/// `invalidate_range_start` was called for `range`, which covers one page.
pub(super) struct Notified {
    range: bindings::mmu_notifier_range,
}

impl Notified {
    /// Announces the change. Sleeps.
    pub(super) fn start(vma: &Vma<'_>, address: usize) -> Self {
        let mut range = bindings::mmu_notifier_range::default();
        // SAFETY: The mm is valid and in use, as its mmap lock is held; sleeping is allowed here.
        unsafe { bindings::ksm_rs_notifier_range_start(&mut range, vma.mm(), address) };
        // INVARIANT: Just started.
        Self { range }
    }
}

impl Drop for Notified {
    fn drop(&mut self) {
        // SAFETY: Started by the invariant.
        unsafe { bindings::ksm_rs_notifier_range_end(&mut self.range) };
    }
}

/// The page table entry of one address, with its table locked.
///
/// # Invariants
///
/// `ptep` is mapped, belongs to `address` of the VMA, and `lock`, which is held, protects it.
pub(super) struct LockedPte<'a> {
    vma: &'a Vma<'a>,
    address: usize,
    ptep: *mut bindings::pte_t,
    lock: *mut bindings::spinlock_t,
}

impl<'a> LockedPte<'a> {
    /// Locks the entry of `address`. `None`: there is no page table, or a huge page in its place.
    pub(super) fn lock(vma: &'a Vma<'a>, address: usize) -> Option<Self> {
        let mut lock = core::ptr::null_mut();
        // SAFETY: The mmap lock is held, which keeps the upper levels of the page table in place.
        // `pte_offset_map_lock()` copes with the entry turning into a huge page or vanishing.
        let ptep = unsafe {
            let pmdp = bindings::ksm_rs_mm_find_pmd(vma.mm(), address);
            if pmdp.is_null() {
                return None;
            }
            bindings::ksm_rs_pte_offset_map_lock(vma.mm(), pmdp, address, &mut lock)
        };
        if ptep.is_null() {
            return None;
        }
        // INVARIANT: Just locked.
        Some(Self {
            vma,
            address,
            ptep,
            lock,
        })
    }

    pub(super) fn get(&self) -> bindings::pte_t {
        // SAFETY: Valid by the invariant.
        unsafe { bindings::ksm_rs_ptep_get(self.ptep) }
    }

    /// Whether userfaultfd, in its read-write-protect mode, waits for the next access of any kind.
    fn awaits_access(&self) -> bool {
        let pte = self.get();
        // SAFETY: Plain values.
        unsafe { bindings::ksm_rs_pte_uffd(pte) && bindings::ksm_rs_pte_protnone(pte) }
    }

    /// The page that the entry maps; null if there is none, or a special one.
    pub(super) fn page(&self) -> *mut bindings::page {
        let pte = self.get();
        // SAFETY: The entry is locked, so the page that it maps stays.
        unsafe {
            if !bindings::ksm_rs_pte_present(pte) {
                return core::ptr::null_mut();
            }
            bindings::ksm_rs_vm_normal_page(self.vma.as_ptr(), self.address, pte)
        }
    }

    /// Whether the entry maps `page`.
    fn maps(&self, page: &PageRef) -> bool {
        self.page() == page.as_ptr()
    }

    /// Empties the entry, which maps the page of frame `pfn`, and flushes it from all caches and TLBs; returns what it held.
    pub(super) fn clear_and_flush(&self, pfn: usize) -> bindings::pte_t {
        let vma = self.vma.as_ptr();
        // SAFETY: Valid and locked by the invariant.
        unsafe {
            bindings::ksm_rs_flush_cache_page(vma, self.address, pfn);
            bindings::ksm_rs_ptep_clear_flush(vma, self.address, self.ptep)
        }
    }

    /// `new` with the marks of `old` that belong to the mapping, not to the page that it shows.
    pub(super) fn with_marks_of(old: bindings::pte_t, mut new: bindings::pte_t) -> bindings::pte_t {
        // SAFETY: Plain values.
        unsafe {
            if bindings::ksm_rs_pte_uffd(old) {
                new = bindings::ksm_rs_pte_mkuffd(new);
            }
            if bindings::ksm_rs_pte_soft_dirty(old) {
                new = bindings::ksm_rs_pte_mksoft_dirty(new);
            }
            // It may be userfaultfd that waits for the next access, which is the process's to make.
            if bindings::ksm_rs_pte_uffd(old) && bindings::ksm_rs_pte_protnone(old) {
                new = bindings::ksm_rs_pte_mkprotnone(new);
            }
        }
        new
    }

    /// Fills the empty entry.
    ///
    /// # Safety
    ///
    /// A page that `pte` maps must be accounted for this mapping: its reference, its mapcount.
    pub(super) unsafe fn set(&self, pte: bindings::pte_t) {
        // SAFETY: Valid and locked by the invariant; the rest is the caller's promise.
        unsafe { bindings::ksm_rs_set_pte_at(self.vma.mm(), self.address, self.ptep, pte) };
    }
}

impl Drop for LockedPte<'_> {
    fn drop(&mut self) {
        // SAFETY: Mapped and locked by the invariant.
        unsafe { bindings::ksm_rs_pte_unmap_unlock(self.ptep, self.lock) };
    }
}

/// The locked entry of a page that nobody can write to as long as this value lives: by a mapping, as none allows it; by
/// a reference, as there is none, or only such as were taken for reading. Dropped, it leaves the page mapped as before, but
/// write-protected.
///
/// # Invariants
///
/// `protected` is an entry for `page`, whose folio is locked. Either it is in place, or the place is empty, flushed
/// from all TLBs, and `emptied` is set.
pub(super) struct Protected<'a> {
    entry: LockedPte<'a>,
    page: &'a PageLock<'a>,
    protected: bindings::pte_t,
    emptied: bool,
}

impl Protected<'_> {
    /// Puts `new` in the place of the page, and takes the mapping off that page's accounts.
    ///
    /// # Safety
    ///
    /// What `new` maps must be equal to the page, and accounted for this mapping.
    pub(super) unsafe fn exchange(mut self, new: bindings::pte_t) {
        let (raw, folio) = (self.page.page().as_ptr(), self.page.page().folio());
        let new = LockedPte::with_marks_of(self.protected, new);
        // SAFETY: The entry is locked. The page loses the reference and the mapcount of its mapping after the entry is
        // flushed; the reference behind the folio lock keeps its folio.
        unsafe {
            if !self.emptied {
                self.entry.clear_and_flush(self.page.page().pfn());
            }
            self.entry.set(new);
            // INVARIANT: The place is not empty any more, and not to be filled by `drop()`.
            self.emptied = false;
            bindings::ksm_rs_folio_remove_rmap_ptes(folio, raw, 1, self.entry.vma.as_ptr());
            self.page.give_up_swap_if_unmapped();
            bindings::ksm_rs_folio_put(folio);
        }
    }
}

impl Drop for Protected<'_> {
    fn drop(&mut self) {
        if self.emptied {
            // SAFETY: The page was mapped here before, and still is on its accounts.
            unsafe { self.entry.set(self.protected) };
        }
    }
}

impl Vma<'_> {
    /// Whether userfaultfd waits for an access to `address`, so that no other page may be mapped there before. Of a huge
    /// page it is not known.
    pub(crate) fn awaits_access(&self, address: usize) -> bool {
        LockedPte::lock(self, address).is_some_and(|entry| entry.awaits_access())
    }

    /// Keeps everybody from writing to `page`, mapped at `address`.
    ///
    /// The folio is small and locked; the caller's is the only reference beside those of page tables and
    /// swap cache. The result holds a spinlock: nobody may sleep as long as it lives.
    pub(super) fn protect<'a>(
        &'a self,
        address: usize,
        page: &'a PageLock<'a>,
    ) -> Result<Protected<'a>, NotMerged> {
        let raw = page.page().as_ptr();
        let folio = page.page().folio();
        let entry = LockedPte::lock(self, address).ok_or(NotMerged::Gone)?;
        if !entry.maps(page.page()) {
            return Err(NotMerged::Gone);
        }
        let pte = entry.get();
        if entry.awaits_access() {
            return Err(NotMerged::Busy);
        }
        // SAFETY: The entry is locked and maps the page, whose folio is locked and referenced; so all of them
        // stay.
        unsafe {
            let exclusive = bindings::ksm_rs_page_anon_exclusive(raw);
            if !bindings::ksm_rs_pte_write(pte)
                && !bindings::ksm_rs_pte_dirty(pte)
                && !exclusive
                && !bindings::ksm_rs_mm_tlb_flush_pending(self.mm())
            {
                // INVARIANT: In place, and write-protected already.
                return Ok(Protected {
                    entry,
                    page,
                    protected: pte,
                    emptied: false,
                });
            }
            // The swap cache's reference can only come and go under the folio lock.
            let swap_cache = i32::from(bindings::ksm_rs_folio_test_swapcache(folio));
            // get_user_pages_fast() takes no lock. It cannot find the page once the entry is empty and flushed, so
            // whoever got a reference before shows in the count now, and nobody can get one after.
            let old = entry.clear_and_flush(page.page().pfn());
            let expected = bindings::ksm_rs_folio_mapcount(folio)
                .wrapping_add(1)
                .wrapping_add(swap_cache);
            if expected != bindings::ksm_rs_folio_ref_count(folio)
                || (exclusive && bindings::ksm_rs_folio_try_share_anon_rmap_pte(folio, raw) != 0)
            {
                entry.set(old);
                return Err(NotMerged::Busy);
            }
            if bindings::ksm_rs_pte_dirty(old) {
                bindings::ksm_rs_folio_mark_dirty(folio);
            }
            // INVARIANT: Just emptied and flushed; the entry's successor maps the same page.
            Ok(Protected {
                entry,
                page,
                protected: bindings::ksm_rs_pte_mkclean_wrprotect(old),
                emptied: true,
            })
        }
    }

    /// Checks what both kinds of merge want of a page, and that it is not a KSM page already.
    pub(super) fn check(page: &PageLock<'_>) -> Result<(), NotMerged> {
        let folio = page.page().folio();
        // SAFETY: The folio is referenced.
        let anon = unsafe { bindings::ksm_rs_folio_test_anon(folio) };
        if !anon || page.page().is_ksm() {
            return Err(NotMerged::Gone);
        }
        if page.page().is_large() || page.page().is_poisoned() {
            return Err(NotMerged::Busy);
        }
        Ok(())
    }

    /// Turns `page`, mapped at `address`, into a KSM page that belongs to no stable node yet.
    ///
    /// The caller's reference on the page must be the only one beside those of page tables and swap cache;
    /// otherwise the answer is `Busy`. Sleeps.
    pub(crate) fn make_ksm(
        &self,
        address: usize,
        page: &PageLock<'_>,
    ) -> Result<KsmPage, NotMerged> {
        Self::check(page)?;
        let _notified = Notified::start(self, address);
        drop(self.protect(address, page)?);
        delay::at(Point::WriteProtected);
        let folio = page.page().folio();
        // SAFETY: The folio is anonymous, small, locked, and every mapping of it is write-protected: what the
        // core expects of a KSM folio. A null node says that its mappings are not known yet.
        unsafe {
            page.set_mapping(bindings::FOLIO_MAPPING_KSM as usize);
            bindings::ksm_rs_folio_mark_accessed(folio);
        }
        page.mark_dirty();
        KsmPage::new(page).ok_or(NotMerged::Gone)
    }

    /// Maps the KSM page `kpage` at `address` in the place of `page`, if their contents are equal.
    ///
    /// The caller's reference on `page` must be the only one beside those of page tables and swap cache;
    /// otherwise the answer is `Busy`. Sleeps.
    pub(crate) fn replace(
        &self,
        address: usize,
        page: &PageLock<'_>,
        kpage: &KsmPage,
    ) -> Result<(), NotMerged> {
        Self::check(page)?;
        // It may have gone bad since it was looked up, for which nobody waits for us.
        if kpage.is_poisoned() {
            return Err(NotMerged::Busy);
        }
        let _notified = Notified::start(self, address);
        let protected = self.protect(address, page)?;
        delay::at(Point::Protected);
        // Under the spinlock, so that the entry is emptied and flushed once and not twice: other CPUs, and guests that
        // the memory belongs to, pay for a flush too.
        if !page.page().same_contents(kpage) {
            return Err(NotMerged::Different);
        }
        delay::at(Point::Compared);
        // SAFETY: The contents are equal, and nobody can change them. The KSM page gets the reference and the mapcount
        // of its new mapping before it is mapped.
        unsafe {
            let new = bindings::ksm_rs_mk_pte(kpage.as_ptr(), self.as_ptr());
            let kfolio = kpage.folio();
            bindings::ksm_rs_folio_get(kfolio);
            bindings::ksm_rs_folio_add_anon_rmap_ptes(
                kfolio,
                kpage.as_ptr(),
                1,
                self.as_ptr(),
                address,
                0,
            );
            protected.exchange(new);
        }
        Ok(())
    }
}
