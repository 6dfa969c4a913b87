// SPDX-License-Identifier: GPL-2.0

//! Undoing a merge, or a fork's sharing: giving a mapping an exclusive anonymous page again.
//!
//! A page fault would do it too. But of an address that has become empty meanwhile it makes a page, and where a file is mapped
//! there, it waits for the file system: as long as its server likes, whom anybody may have written (FUSE).

use super::{
    bindings,
    page::PageRef,
    replace::{
        LockedPte,
        Notified, //
    },
    space::Vma,
    zero, //
};
use crate::delay::{
    self,
    Point, //
};
use core::ptr::NonNull;
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// What an address shows.
enum Shown {
    /// An anonymous page that the mapping does not have for itself: by a merge, or by a fork.
    Shared(PageRef),
    /// The zero page, where KSM has put it.
    Zero,
    /// A page that is on its way to another frame.
    Moving,
    /// Nothing that would have to be copied.
    Other,
}

impl LockedPte<'_> {
    fn shown(&self) -> Shown {
        let pte = self.get();
        // SAFETY: The entry is locked, so what it maps stays mapped, and has a reference that we may double.
        unsafe {
            if bindings::ksm_rs_pte_is_ksm_zero(pte) {
                return Shown::Zero;
            }
            if !bindings::ksm_rs_pte_present(pte) {
                let moving = !bindings::ksm_rs_pte_none(pte)
                    && !bindings::ksm_rs_pte_migration_folio(pte).is_null();
                return if moving { Shown::Moving } else { Shown::Other };
            }
            let Some(page) = super::walk::anon_page(self.normal_page(pte)) else {
                return Shown::Other;
            };
            if bindings::ksm_rs_page_anon_exclusive(page.as_ptr()) {
                return Shown::Other;
            }
            Shown::Shared(page)
        }
    }
}

impl Vma<'_> {
    /// Gives every mapping of a KSM page in `[from, to)` a private copy. Sleeps.
    ///
    /// Left as they are, as stock leaves them, are pages whose memory has gone bad, and those that userfaultfd keeps from
    /// being read. `Err(ENOMEM)`: there was no memory for a copy; some pages may be left merged.
    pub(crate) fn unshare(&self, from: usize, to: usize) -> Result {
        let mut address = from;
        while let Some(at) = self.next_ksm_page(address, to) {
            // What has changed meanwhile may be a KSM page still, so the same address is looked at again.
            address = at;
            delay::at(Point::Unsharing);
            if !self.unshare_page(at)? {
                address = at.wrapping_add(PAGE_SIZE);
            }
            super::breathe();
        }
        Ok(())
    }

    /// Gives the mapping at `address`, which lies in the VMA, a page that it shares with nobody, neither by a merge nor by
    /// a fork. Where something else is mapped, or the page is on its way to another frame, which is waited for, nothing is
    /// done. `false`: it is no use to try again now, as the memory has gone bad, or userfaultfd keeps it from being
    /// read. Sleeps.
    ///
    /// `Err(ENOMEM)`: there was no memory for a copy.
    pub(crate) fn unshare_page(&self, address: usize) -> Result<bool> {
        if address < self.start() || address >= self.end() {
            return Ok(false);
        }
        let Some(entry) = LockedPte::lock(self, address) else {
            return Ok(true);
        };
        if entry.awaits_access() {
            return Ok(false);
        }
        let shown = entry.shown();
        drop(entry);
        let original = match shown {
            Shown::Shared(page) => Some(page),
            Shown::Zero => None,
            Shown::Moving => {
                self.await_migration(address);
                return Ok(true);
            }
            Shown::Other => return Ok(true),
        };
        let Some(copy) = self.copy(address, original.as_ref())? else {
            return Ok(false);
        };
        self.map_copy(address, original.as_ref(), &copy);
        Ok(true)
    }

    /// A copy of `original`, which nobody can write to: it is shared. Without one, an empty page. `None`: the memory has gone
    /// bad. Sleeps.
    fn copy(&self, address: usize, original: Option<&PageRef>) -> Result<Option<PageRef>> {
        if original.is_some_and(PageRef::is_poisoned) {
            return Ok(None);
        }
        let zeroed = original.is_none();
        // SAFETY: The mmap lock is held, so VMA and mm are valid. What is allocated has one reference, which we own, and
        // nobody else knows it.
        unsafe {
            let folio = bindings::ksm_rs_vma_alloc_folio(self.as_ptr(), address, zeroed);
            if folio.is_null() {
                return Err(ENOMEM);
            }
            let page = NonNull::new(bindings::ksm_rs_folio_page(folio)).ok_or(ENOMEM)?;
            let copy = PageRef::from_raw(page);
            if bindings::ksm_rs_mem_cgroup_charge(folio, self.mm()) != 0 {
                return Err(ENOMEM);
            }
            if let Some(original) = original {
                let (to, from) = (copy.as_ptr(), original.as_ptr());
                let left = bindings::ksm_rs_copy_mc_user_highpage(to, from, address, self.as_ptr());
                if left != 0 {
                    return Ok(None);
                }
            }
            // What was written to the page comes before everything that can be seen of it from now on.
            bindings::ksm_rs_folio_mark_uptodate(folio);
            Ok(Some(copy))
        }
    }

    /// Maps `copy` in the place of `original`, or of the zero page without one, unless something else is mapped there by
    /// now. Sleeps.
    fn map_copy(&self, address: usize, original: Option<&PageRef>, copy: &PageRef) {
        let notified = Notified::start(self, address);
        let Some(entry) = LockedPte::lock(self, address) else {
            return;
        };
        if entry.awaits_access() {
            return;
        }
        match (entry.shown(), original) {
            (Shown::Shared(page), Some(original)) if page.is(original) => {}
            (Shown::Zero, None) => {}
            _ => return,
        }
        let pfn = original.map_or_else(zero::pfn, PageRef::pfn);
        // SAFETY: The entry is locked and maps the original still, which nobody could write to since it was copied: a page
        // that is not exclusive is copied by whoever wants to write. The copy is new, so its folio is small and in nobody's
        // hands; it gets the reference and the mapcount of its mapping before it is mapped. The VMA has an anon_vma, as
        // all mergeable ones. The original loses its own after the entry is flushed.
        unsafe {
            let old = entry.clear_and_flush(pfn);
            let folio = copy.folio();
            bindings::ksm_rs_folio_get(folio);
            let exclusive = bindings::KSM_RS_RMAP_EXCLUSIVE as bindings::rmap_t;
            bindings::ksm_rs_folio_add_new_anon_rmap(folio, self.as_ptr(), address, exclusive);
            bindings::ksm_rs_folio_add_lru_vma(folio, self.as_ptr());
            let new = bindings::ksm_rs_mk_pte(copy.as_ptr(), self.as_ptr());
            entry.set(LockedPte::with_marks_of(old, new));
            match original {
                Some(original) => {
                    let (folio, raw) = (original.folio(), original.as_ptr());
                    bindings::ksm_rs_folio_remove_rmap_ptes(folio, raw, 1, self.as_ptr());
                    bindings::ksm_rs_folio_put(folio);
                }
                None => bindings::ksm_rs_uncount_zero_page(self.mm(), zero::counter()),
            }
        }
        drop(entry);
        drop(notified);
        if let Some(lock) = original.and_then(PageRef::try_lock) {
            lock.give_up_swap_if_unmapped();
        }
    }

    /// Waits until the page mapped at `address` has arrived at another frame, or is back where it was. Sleeps.
    fn await_migration(&self, address: usize) {
        // SAFETY: The mmap lock is held, which keeps the upper levels of the page table in place; the core looks for itself
        // whether anything moves.
        unsafe {
            let pmdp = bindings::ksm_rs_mm_find_pmd(self.mm(), address);
            if !pmdp.is_null() {
                bindings::ksm_rs_await_migration(self.mm(), pmdp, address);
            }
        }
    }
}
