// SPDX-License-Identifier: GPL-2.0

//! References to pages, their contents, and the folio lock.

use super::bindings;
use crate::hash;
use core::ptr::NonNull;
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

/// 64-bit words in a page.
const WORDS: usize = PAGE_SIZE / size_of::<u64>();

/// Hash of a page that is all zero.
pub(crate) fn hash_of_empty(key: &hash::Key) -> u64 {
    hash::hash_zeroes::<WORDS>(key)
}

/// Why a page could not be merged now. The page is left as it was in every case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotMerged {
    /// The mapping changed: the address space exits, the VMA or the page is another one now.
    Gone,
    /// The folio is locked, pinned, bad, or could not be split; worth another try on a later pass.
    Busy,
    /// The mmap lock could not be had; worth another try on a later pass.
    Locked,
    /// The contents differ.
    Different,
}

/// For events: 0 if a page was merged, or else an errno.
pub(crate) fn errno_of<T>(merged: &Result<T, NotMerged>) -> i32 {
    match merged {
        Ok(_) => 0,
        Err(NotMerged::Gone) => ENOENT.to_errno(),
        Err(NotMerged::Busy | NotMerged::Locked) => EBUSY.to_errno(),
        Err(NotMerged::Different) => EFAULT.to_errno(),
    }
}

/// A page whose folio we hold a reference on.
///
/// May be dropped in any context that allows `folio_put()`.
///
/// # Invariants
///
/// `page` points at a page of a folio on which this value owns one reference.
pub(crate) struct PageRef {
    page: NonNull<bindings::page>,
}

// SAFETY: A folio reference belongs to nobody in particular; `folio_put()` works from any task.
unsafe impl Send for PageRef {}

impl PageRef {
    /// Takes over a reference.
    ///
    /// # Safety
    ///
    /// `page` must be valid and the caller must own a reference on its folio, which it gives up.
    pub(super) unsafe fn from_raw(page: NonNull<bindings::page>) -> Self {
        // INVARIANT: The caller hands over its reference.
        Self { page }
    }

    /// The raw page.
    pub(super) fn as_ptr(&self) -> *mut bindings::page {
        self.page.as_ptr()
    }

    /// The folio that the page belongs to now; a split gives the page a folio of its own.
    pub(super) fn folio(&self) -> *mut bindings::folio {
        // SAFETY: The page is valid by the invariant, and our reference keeps its folio from being freed.
        unsafe { bindings::ksm_rs_page_folio(self.page.as_ptr()) }
    }

    /// Whether this is the very same page as `other`.
    pub(crate) fn is(&self, other: &PageRef) -> bool {
        self.page == other.page
    }

    /// Whether the page is a KSM page, anybody's.
    pub(crate) fn is_ksm(&self) -> bool {
        // SAFETY: The folio is valid, see `folio()`.
        unsafe { bindings::ksm_rs_folio_test_ksm(self.folio()) }
    }

    /// Whether the page is part of a large folio, which must be split before it can be merged.
    pub(crate) fn is_large(&self) -> bool {
        // SAFETY: The folio is valid, see `folio()`.
        unsafe { bindings::ksm_rs_folio_test_large(self.folio()) }
    }

    /// Whether somebody beside page tables, swap cache and this reference holds the small folio now, such as a
    /// direct transfer. A hint: merging finds out for certain.
    pub(crate) fn has_other_users(&self) -> bool {
        if self.is_large() {
            return false;
        }
        // SAFETY: The folio is valid, see `folio()`.
        unsafe {
            let folio = self.folio();
            let swap_cache = i32::from(bindings::ksm_rs_folio_test_swapcache(folio));
            let expected = bindings::ksm_rs_folio_mapcount(folio)
                .wrapping_add(1)
                .wrapping_add(swap_cache);
            bindings::ksm_rs_folio_ref_count(folio) > expected
        }
    }

    /// Whether no page table maps the folio any more, but the swap cache has it. A hint, as the folio is not locked.
    pub(super) fn is_left_to_swap(&self) -> bool {
        // SAFETY: The folio is valid, see `folio()`.
        unsafe {
            bindings::ksm_rs_folio_test_swapcache(self.folio())
                && !bindings::ksm_rs_folio_mapped(self.folio())
        }
    }

    /// Whether the memory has gone bad: reading it may bring the machine down.
    pub(crate) fn is_poisoned(&self) -> bool {
        // SAFETY: The page is valid by the invariant.
        unsafe { bindings::ksm_rs_page_hwpoison(self.page.as_ptr()) }
    }

    /// NUMA node of the page's memory.
    pub(crate) fn nid(&self) -> usize {
        // SAFETY: The page is valid by the invariant, so its frame is online.
        let nid = unsafe { bindings::ksm_rs_pfn_to_nid(self.pfn()) };
        usize::try_from(nid).unwrap_or(0)
    }

    /// Address of the `struct page`, for events.
    pub(crate) fn address_of(&self) -> usize {
        self.page.as_ptr() as usize
    }

    /// Page frame number.
    pub(crate) fn pfn(&self) -> usize {
        // SAFETY: The page is valid by the invariant.
        unsafe { bindings::ksm_rs_page_to_pfn(self.page.as_ptr()) }
    }

    /// Value of `folio->mapping` with its flag bits.
    pub(super) fn mapping(&self) -> usize {
        // SAFETY: The folio is valid, see `folio()`.
        unsafe { bindings::ksm_rs_folio_mapping(self.folio()) as usize }
    }

    /// Hash of the page's contents, which may change while it is read.
    pub(crate) fn hash(&self, key: &hash::Key) -> u64 {
        let map = Mapped::new(self);
        hash::hash_words::<WORDS>(key, |word| map.load(word))
    }

    /// Compares the contents of two pages byte for byte, right now. Without write protection the answer
    /// may be out of date when it is returned.
    pub(crate) fn same_contents(&self, other: &PageRef) -> bool {
        // SAFETY: Both pages are valid by the invariant. User space may write to them at the same time, which the
        // core's own comparison copes with; it also knows of architectures where equal bytes are not enough.
        unsafe { bindings::ksm_rs_memcmp_pages(self.as_ptr(), other.as_ptr()) == 0 }
    }

    /// Whether all bytes are zero, right now.
    pub(crate) fn is_empty(&self) -> bool {
        let map = Mapped::new(self);
        (0..WORDS).all(|word| map.load(word) == 0)
    }

    /// Locks the folio if nobody else holds its lock.
    pub(crate) fn try_lock(&self) -> Option<PageLock<'_>> {
        // SAFETY: The folio is valid, see `folio()`.
        if unsafe { bindings::ksm_rs_folio_trylock(self.folio()) } {
            // INVARIANT: Just locked.
            Some(PageLock { page: self })
        } else {
            None
        }
    }

    /// Locks the folio. Sleeps.
    pub(crate) fn lock(&self) -> PageLock<'_> {
        // SAFETY: The folio is valid, see `folio()`.
        unsafe { bindings::ksm_rs_folio_lock(self.folio()) };
        // INVARIANT: Just locked.
        PageLock { page: self }
    }
}

impl Drop for PageRef {
    fn drop(&mut self) {
        // SAFETY: We own a reference by the invariant, and this value is gone afterwards.
        unsafe { bindings::ksm_rs_folio_put(self.folio()) };
    }
}

/// A KSM page that cannot be on its way to another frame: the page to map in the place of others.
///
/// Migration of an anonymous folio looks at the reference count only once, under the folio lock. So a
/// reference counts for it only if it was taken before, which whoever has held the lock since knows.
///
/// # Invariants
///
/// The page is a KSM page, and its folio was locked at some time since the reference was taken. So it stays
/// one, with the same contents, at the same frame, as long as this value lives.
pub(crate) struct KsmPage {
    page: PageRef,
}

impl KsmPage {
    /// Takes a reference of its own on a locked KSM page.
    pub(super) fn new(page: &PageLock<'_>) -> Option<Self> {
        let page = page.page();
        if !page.is_ksm() {
            return None;
        }
        // SAFETY: The folio is valid, as `page` holds a reference.
        unsafe { bindings::ksm_rs_folio_get(page.folio()) };
        // INVARIANT: The lock is still held.
        Some(Self {
            // SAFETY: The reference was just taken.
            page: unsafe { PageRef::from_raw(page.page) },
        })
    }
}

impl core::ops::Deref for KsmPage {
    type Target = PageRef;

    fn deref(&self) -> &PageRef {
        &self.page
    }
}

/// A page whose folio is locked.
///
/// # Invariants
///
/// This value owns the lock of the folio that `page` belongs to.
pub(crate) struct PageLock<'a> {
    page: &'a PageRef,
}

impl PageLock<'_> {
    /// The page.
    pub(crate) fn page(&self) -> &PageRef {
        self.page
    }

    /// Splits the large folio so that the page has a folio of its own, which is locked now. Fails when
    /// anybody else holds a reference. Sleeps.
    pub(crate) fn split(&self) -> Result<(), NotMerged> {
        // SAFETY: The folio is locked and referenced by us, as splitting wants it. Lock and reference move on
        // to the page's new folio, which is what `folio()` answers from then on.
        match unsafe { bindings::ksm_rs_split_huge_page(self.page.as_ptr()) } {
            0 => Ok(()),
            _ => Err(NotMerged::Busy),
        }
    }

    /// Whether any page table maps the folio.
    pub(crate) fn is_mapped(&self) -> bool {
        // SAFETY: The folio is valid by the invariants of `PageRef`.
        unsafe { bindings::ksm_rs_folio_mapped(self.page.folio()) }
    }

    /// Gives up the swap space of a folio that no page table maps any more, unless somebody refers to it.
    pub(super) fn give_up_swap_if_unmapped(&self) {
        if !self.is_mapped() {
            // SAFETY: The folio is valid by the invariants of `PageRef`, and locked.
            unsafe { bindings::ksm_rs_folio_free_swap(self.page.folio()) };
        }
    }

    /// Says that the contents are needed: reclaim frees a clean anonymous folio without writing it to swap.
    pub(super) fn mark_dirty(&self) {
        let folio = self.page.folio();
        // SAFETY: The folio is valid by the invariants of `PageRef`, and locked.
        unsafe {
            if !bindings::ksm_rs_folio_test_dirty(folio) {
                bindings::ksm_rs_folio_mark_dirty(folio);
            }
        }
    }

    /// Whether no other page table maps the small folio, or will when it comes back from swap; the mmap lock of the one that
    /// does keeps it so until the folio is unlocked.
    pub(crate) fn is_alone(&self) -> bool {
        let folio = self.page.folio();
        // SAFETY: The folio is valid by the invariants of `PageRef`, and locked. Swap space that nobody refers to is given
        // up; what is left in the swap cache then, somebody does.
        unsafe {
            bindings::ksm_rs_folio_free_swap(folio);
            !bindings::ksm_rs_folio_test_swapcache(folio)
                && bindings::ksm_rs_folio_mapcount(folio) == 1
        }
    }

    /// Replaces `folio->mapping`.
    ///
    /// # Safety
    ///
    /// The folio must be an anonymous one and `mapping` a value with KSM's flag bits whose pointer part is
    /// null or a [`StableNode`](super::node::StableNode) that outlives the folio's use of it.
    pub(super) unsafe fn set_mapping(&self, mapping: usize) {
        // SAFETY: The folio lock, which we hold, protects the field; the value is the caller's promise.
        unsafe {
            bindings::ksm_rs_folio_set_mapping(
                self.page.folio(),
                mapping as *mut kernel::ffi::c_void,
            )
        };
    }
}

impl Drop for PageLock<'_> {
    fn drop(&mut self) {
        // SAFETY: We own the lock by the invariant.
        unsafe { bindings::ksm_rs_folio_unlock(self.page.folio()) };
    }
}

/// A page mapped into the kernel's address space for as long as this value lives.
///
/// # Invariants
///
/// `address` is the start of a mapping of [`PAGE_SIZE`] bytes.
struct Mapped<'a> {
    address: *const kernel::ffi::c_void,
    _page: core::marker::PhantomData<&'a PageRef>,
}

impl<'a> Mapped<'a> {
    fn new(page: &'a PageRef) -> Self {
        // SAFETY: The page is valid by the invariant of `PageRef`, which outlives the mapping.
        let address = unsafe { bindings::kmap_local_page(page.as_ptr()) };
        Self {
            address,
            _page: core::marker::PhantomData,
        }
    }

    /// Reads the `word`-th 64-bit word of the page.
    #[inline(always)]
    fn load(&self, word: usize) -> u64 {
        let word = word & (WORDS - 1);
        // SAFETY: The mask keeps the access inside the page; the address is aligned. User space may be
        // writing: a volatile load is what the kernel uses for such memory, and any value is fine.
        unsafe { self.address.cast::<u64>().add(word).read_volatile() }
    }
}

impl Drop for Mapped<'_> {
    fn drop(&mut self) {
        // SAFETY: Local mappings nest: those of one function are dropped in reverse order of creation.
        unsafe { bindings::kunmap_local(self.address) };
    }
}
