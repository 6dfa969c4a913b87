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
    walk::{
        KsmPage,
        MOST_STEPS, //
    },
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

/// Times that a page is looked at anew at most because it has changed.
const MOST_LOOKS: u32 = 100;

// A page that changes whenever it is looked at does not use up all steps before it is left alone.
const _: () = assert!(MOST_STEPS > MOST_LOOKS as usize);

/// What may be done to get the memory of a copy.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Zeal {
    /// What a page fault may do: wait until others have given memory back, and have one of them killed.
    AsFault,
    /// Look for some that can be had at once, or nearly: a process whose control group is full could otherwise hold up all
    /// others.
    Modest,
}

/// What came of unsharing one page.
pub(crate) enum Unshared {
    /// It was copied.
    Done,
    /// Something else was mapped by the time when there was a copy, or before, or it was on its way and has been waited for:
    /// look again.
    Changed,
    /// Its memory has gone bad.
    Hopeless,
}

/// What an address shows.
enum Shown {
    /// An anonymous page that the mapping does not have for itself: by a merge, or by a fork.
    Shared(PageRef),
    /// The zero page, where KSM has put it.
    Zero,
    /// An anonymous page that is on its way to another frame.
    Moving,
    /// Nothing that would have to be copied.
    Other,
}

impl LockedPte<'_> {
    fn shown(&self) -> Shown {
        let pte = self.get();
        // SAFETY: The entry is locked, so what it maps stays mapped, and has a reference that we may double. The folio of a
        // migration entry is locked and referenced by who moves it, until the entry is replaced under the lock that we hold.
        unsafe {
            if bindings::ksm_rs_pte_is_ksm_zero(pte) {
                return Shown::Zero;
            }
            if !bindings::ksm_rs_pte_present(pte) {
                if bindings::ksm_rs_pte_none(pte) {
                    return Shown::Other;
                }
                let folio = bindings::ksm_rs_pte_migration_folio(pte);
                // That of a file may wait for a file system.
                return match !folio.is_null() && bindings::ksm_rs_folio_test_anon(folio) {
                    true => Shown::Moving,
                    false => Shown::Other,
                };
            }
            let Some(page) = super::walk::anon_page(self.page()) else {
                return Shown::Other;
            };
            if bindings::ksm_rs_page_anon_exclusive(page.as_ptr()) {
                return Shown::Other;
            }
            Shown::Shared(page)
        }
    }
}

/// A page that is to be mapped, for the first time.
///
/// # Invariants
///
/// The folio is small, new, charged to the cgroup of the address space that it is for, and up to date. Nothing maps it, and
/// nobody else knows it.
struct Fresh(PageRef);

impl Vma<'_> {
    /// Gives every mapping of a KSM page in `[from, to)` a private copy, as far as it comes with so many `steps`: each look at a
    /// page table takes one, so each copy does, and so do many places without a page table. Returns the address up to which it
    /// is done; sooner also if somebody waits for the mmap lock once a page table is done. Sleeps.
    ///
    /// Left as they are, as stock leaves them, are pages whose memory has gone bad, and one that changes whenever it is looked
    /// at. `Err(ENOMEM)`: there was no memory for a copy; some pages may be left merged.
    pub(crate) fn unshare(
        &self,
        from: usize,
        to: usize,
        zeal: Zeal,
        steps: &mut usize,
    ) -> Result<usize> {
        let mut address = from;
        let mut looks = 0u32;
        loop {
            let at = match self.next_ksm_page(address, to, steps) {
                KsmPage::At(at) => at,
                KsmPage::From(at) => return Ok(at),
                KsmPage::Nothing => return Ok(to),
            };
            if at != address {
                looks = 0;
            }
            address = at;
            delay::at(Point::Unsharing);
            looks = match self.unshare_page(at, zeal)? {
                Unshared::Done => 0,
                Unshared::Changed => looks.saturating_add(1),
                Unshared::Hopeless => MOST_LOOKS,
            };
            if looks >= MOST_LOOKS {
                address = at.wrapping_add(PAGE_SIZE);
                looks = 0;
            }
            super::breathe();
            if *steps == 0 {
                return Ok(address);
            }
        }
    }

    /// Gives the mapping at `address`, which lies in the VMA, a page that it shares with nobody, neither by a merge nor by
    /// a fork. A page that is on its way to another frame is waited for, and is as shared as before then. Sleeps.
    ///
    /// `Err(ENOMEM)`: there was no memory for a copy.
    pub(crate) fn unshare_page(&self, address: usize, zeal: Zeal) -> Result<Unshared> {
        if address < self.start() || address >= self.end() {
            return Ok(Unshared::Changed);
        }
        let shown = LockedPte::lock(self, address).map_or(Shown::Other, |entry| entry.shown());
        let original = match shown {
            Shown::Shared(page) => Some(page),
            Shown::Zero => None,
            Shown::Moving => {
                self.await_migration(address);
                return Ok(Unshared::Changed);
            }
            Shown::Other => return Ok(Unshared::Changed),
        };
        let Some(copy) = self.copy(address, original.as_ref(), zeal)? else {
            return Ok(Unshared::Hopeless);
        };
        Ok(self.map_copy(address, original.as_ref(), copy))
    }

    /// A copy of `original`; without one, an empty page. `None`: the memory has gone bad. Sleeps.
    fn copy(
        &self,
        address: usize,
        original: Option<&PageRef>,
        zeal: Zeal,
    ) -> Result<Option<Fresh>> {
        if original.is_some_and(PageRef::is_poisoned) {
            return Ok(None);
        }
        let modest = match zeal {
            Zeal::AsFault => 0,
            Zeal::Modest => bindings::KSM_RS_GFP_MODEST as bindings::gfp_t,
        };
        let zero = match original {
            Some(_) => 0,
            None => bindings::KSM_RS_GFP_ZERO as bindings::gfp_t,
        };
        // SAFETY: The mmap lock is held, so VMA and mm are valid. What is allocated has one reference, which we own, and
        // nobody else knows it. The original is valid by its reference; if somebody wrote to it, the copy would be of no use,
        // but that is for `map_copy()` to say.
        unsafe {
            let folio = bindings::ksm_rs_vma_alloc_folio(self.as_ptr(), address, zero | modest);
            if folio.is_null() {
                return Err(ENOMEM);
            }
            let page = NonNull::new(bindings::ksm_rs_folio_page(folio)).ok_or(ENOMEM)?;
            let copy = PageRef::from_raw(page);
            if bindings::ksm_rs_mem_cgroup_charge(folio, self.mm(), modest) != 0 {
                return Err(ENOMEM);
            }
            if let Some(original) = original {
                let (to, from) = (copy.as_ptr(), original.as_ptr());
                let left = bindings::ksm_rs_copy_mc_user_highpage(to, from, address, self.as_ptr());
                if left != 0 {
                    return Ok(None);
                }
                if original.is_ksm() {
                    // Where the core counts its own copies of KSM pages.
                    bindings::ksm_rs_count_ksm_copy();
                }
            }
            // What was written to the page comes before everything that can be seen of it from now on.
            bindings::ksm_rs_folio_mark_uptodate(folio);
            // INVARIANT: Just made.
            Ok(Some(Fresh(copy)))
        }
    }

    /// Maps `copy` in the place of `original`, or of the zero page without one, if that is still mapped there. Sleeps.
    fn map_copy(&self, address: usize, original: Option<&PageRef>, copy: Fresh) -> Unshared {
        let notified = Notified::start(self, address);
        let Some(entry) = LockedPte::lock(self, address) else {
            return Unshared::Changed;
        };
        match (entry.shown(), original) {
            (Shown::Shared(page), Some(original)) if page.is(original) => {}
            (Shown::Zero, None) => {}
            _ => return Unshared::Changed,
        }
        let pfn = original.map_or_else(zero::pfn, PageRef::pfn);
        let copy = copy.0;
        // SAFETY: The entry is locked. It maps the original, as it did when our reference on that was taken, which was before
        // it was copied. A page that is not exclusive is written to only by who finds that nobody else has a reference, and
        // makes it exclusive; a KSM page by nobody. So since then it was neither written to nor moved. The copy gets the
        // reference and the mapcount of its mapping before it is mapped, in a VMA that has an anon_vma, as all mergeable ones.
        // The original loses its own after the entry is flushed. Where there is a zero page of KSM's, its counter is known, as
        // loading has found it.
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
        if let Some(original) = original.filter(|original| original.is_left_to_swap()) {
            if let Some(lock) = original.try_lock() {
                lock.give_up_swap_if_unmapped();
            }
        }
        Unshared::Done
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
