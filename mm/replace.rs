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

    fn get(&self) -> bindings::pte_t {
        // SAFETY: Valid by the invariant.
        unsafe { bindings::ksm_rs_ptep_get(self.ptep) }
    }

    /// Whether the entry maps `page` and can be reached by the CPU.
    fn maps(&self, pte: bindings::pte_t, page: &PageRef) -> bool {
        // SAFETY: The entry is locked, so the page that it maps stays.
        unsafe {
            bindings::ksm_rs_pte_present(pte)
                && bindings::ksm_rs_vm_normal_page(self.vma.as_ptr(), self.address, pte)
                    == page.as_ptr()
        }
    }

    /// Empties the entry and flushes it from all TLBs; returns what it held.
    fn clear_and_flush(&self) -> bindings::pte_t {
        // SAFETY: Valid and locked by the invariant.
        unsafe { bindings::ksm_rs_ptep_clear_flush(self.vma.as_ptr(), self.address, self.ptep) }
    }

    /// Whether the entry is still the same.
    fn holds(&self, pte: bindings::pte_t) -> bool {
        // SAFETY: Plain values.
        unsafe { bindings::ksm_rs_pte_same(self.get(), pte) }
    }

    /// Puts `new` in the place of `old`, which maps `page`, and takes the mapping off that page's accounts.
    /// `Gone`: the entry is not `old` any more, and nothing was done.
    ///
    /// # Safety
    ///
    /// What `new` maps must be accounted for this mapping. `old` must be an entry for `page` of the VMA as
    /// [`Vma::write_protect`] left it, and `page` equal to what `new` maps.
    pub(super) unsafe fn exchange(
        &self,
        old: bindings::pte_t,
        mut new: bindings::pte_t,
        page: &PageLock<'_>,
    ) -> Result<(), NotMerged> {
        if !self.holds(old) {
            return Err(NotMerged::Gone);
        }
        let (raw, folio) = (page.page().as_ptr(), page.page().folio());
        // SAFETY: The entry is locked and still maps the write-protected page. That one loses the reference and the
        // mapcount of its mapping after the entry is flushed; our own reference keeps its folio.
        unsafe {
            // These belong to the mapping, not to the page that it shows.
            if bindings::ksm_rs_pte_uffd(old) {
                new = bindings::ksm_rs_pte_mkuffd(new);
            }
            if bindings::ksm_rs_pte_soft_dirty(old) {
                new = bindings::ksm_rs_pte_mksoft_dirty(new);
            }
            bindings::ksm_rs_flush_cache_page(self.vma.as_ptr(), self.address, page.page().pfn());
            self.clear_and_flush();
            self.set(new);
            bindings::ksm_rs_folio_remove_rmap_ptes(folio, raw, 1, self.vma.as_ptr());
            if !bindings::ksm_rs_folio_mapped(folio) {
                bindings::ksm_rs_folio_free_swap(folio);
            }
            bindings::ksm_rs_folio_put(folio);
        }
        Ok(())
    }

    /// Fills the empty entry.
    ///
    /// # Safety
    ///
    /// A page that `pte` maps must be accounted for this mapping: its reference, its mapcount.
    unsafe fn set(&self, pte: bindings::pte_t) {
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

impl Vma<'_> {
    /// Write-protects the mapping of `page` at `address` and makes sure that nobody else can write to the
    /// page by another way. Returns the resulting entry.
    ///
    /// The folio is small and locked; the caller's is the only reference beside those of page tables and
    /// swap cache.
    pub(super) fn write_protect(
        &self,
        address: usize,
        page: &PageLock<'_>,
    ) -> Result<bindings::pte_t, NotMerged> {
        let raw = page.page().as_ptr();
        let folio = page.page().folio();
        let entry = LockedPte::lock(self, address).ok_or(NotMerged::Gone)?;
        let pte = entry.get();
        if !entry.maps(pte, page.page()) {
            return Err(NotMerged::Gone);
        }
        // userfaultfd in its read-write-protect mode waits for the next access of any kind.
        // SAFETY: Plain values.
        if unsafe { bindings::ksm_rs_pte_uffd(pte) && bindings::ksm_rs_pte_protnone(pte) } {
            return Err(NotMerged::Busy);
        }
        // SAFETY: The entry is locked and maps the page, whose folio is locked and referenced; so all of them
        // stay. The entry is put back as it was, or write-protected, and maps the same page in both cases.
        unsafe {
            let exclusive = bindings::ksm_rs_page_anon_exclusive(raw);
            if !bindings::ksm_rs_pte_write(pte)
                && !bindings::ksm_rs_pte_dirty(pte)
                && !exclusive
                && !bindings::ksm_rs_mm_tlb_flush_pending(self.mm())
            {
                return Ok(pte);
            }
            // The swap cache's reference can only come and go under the folio lock.
            let swap_cache = i32::from(bindings::ksm_rs_folio_test_swapcache(folio));
            bindings::ksm_rs_flush_cache_page(self.as_ptr(), address, page.page().pfn());
            // get_user_pages_fast() takes no lock. It cannot find the page once the entry is empty and flushed, so
            // whoever got a reference before shows in the count now, and nobody can get one after.
            let old = entry.clear_and_flush();
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
            let protected = bindings::ksm_rs_pte_mkclean_wrprotect(old);
            entry.set(protected);
            Ok(protected)
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
        if page.page().is_large() {
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
        self.write_protect(address, page)?;
        let folio = page.page().folio();
        // SAFETY: The folio is anonymous, small, locked, and every mapping of it is write-protected: what the
        // core expects of a KSM folio. A null node says that its mappings are not known yet.
        unsafe {
            page.set_mapping(bindings::FOLIO_MAPPING_KSM as usize);
            bindings::ksm_rs_folio_mark_accessed(folio);
            // Reclaim frees a clean anonymous folio without writing it to swap.
            if !bindings::ksm_rs_folio_test_dirty(folio) {
                bindings::ksm_rs_folio_mark_dirty(folio);
            }
        }
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
        let _notified = Notified::start(self, address);
        let protected = self.write_protect(address, page)?;
        if !page.page().same_contents(kpage) {
            return Err(NotMerged::Different);
        }

        let entry = LockedPte::lock(self, address).ok_or(NotMerged::Gone)?;
        // SAFETY: The entry is locked. The KSM page gets the reference and the mapcount of its new mapping before
        // it is mapped, which cannot fail any more.
        unsafe {
            if !entry.holds(protected) {
                // Written to, or unmapped, while it was compared.
                return Err(NotMerged::Gone);
            }
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
            entry.exchange(protected, new, page)
        }
    }
}
