// SPDX-License-Identifier: GPL-2.0

//! Empty pages: mapping the kernel's zero page in their place.
//!
//! Such a mapping is no KSM page: it has no stable node. The core tells it by the dirty bit of its entry,
//! and counts it down when it goes away; we count it up.

use super::{
    bindings,
    page::{
        NotMerged,
        PageLock, //
    },
    replace::Notified,
    space::Vma, //
};
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

/// Address of the core's count of all mappings of the zero page made for KSM.
static ALL: Atomic<usize> = Atomic::new(0);

/// Sets where the core counts the mappings of the zero page made for KSM.
///
/// # Safety
///
/// `address` must be that of the core's `ksm_zero_pages`.
pub(crate) unsafe fn bind(address: usize) {
    ALL.store(address, Relaxed);
}

/// The core's count; null before [`bind`].
pub(super) fn counter() -> *mut bindings::atomic_long_t {
    ALL.load(Relaxed) as *mut bindings::atomic_long_t
}

/// How many mappings of the zero page there are that were made for KSM.
pub(crate) fn count() -> isize {
    let all = counter();
    if all.is_null() {
        return 0;
    }
    // SAFETY: The address is that of the core's variable, as `bind()` was promised.
    unsafe { bindings::ksm_rs_atomic_long_read(all) }
}

/// Frame number of the zero page, for events.
pub(crate) fn pfn() -> usize {
    // SAFETY: The zero page is there from early in boot on.
    unsafe { bindings::ksm_rs_zero_pfn() }
}

/// Corrects what a child has inherited of the count of its parent's zero pages, if `mm` is one that is being made.
///
/// The core copies the count before it takes the mmap lock for the page tables, and so miscounts for ever what KSM has done in
/// between (`dup_mm()`). When the probe is called in a fork, the mmap lock of the parent's is held for writing and all its VMAs are
/// locked, so what it counts now is what was copied; exceptions: `docs/concurrency.md`. Any context.
///
/// # Safety
///
/// `mm` must be what the probe of `ksm_enter` was given, which must not have returned yet.
pub(crate) unsafe fn correct_inherited(mm: *mut bindings::mm_struct) {
    let all = counter();
    if all.is_null() {
        return;
    }
    // SAFETY: The parent is valid as the current task keeps its mm, and the child as the probe has not returned. Both are counted
    // atomically. Another address space than the current task's enters by its doing only when it is made: for a child, or
    // without any code yet for a program that is to be started. Nobody writes `start_code` then, which says which it is.
    unsafe {
        let parent = bindings::ksm_rs_task_user_mm(kernel::current!().as_ptr());
        if parent.is_null() || parent == mm || (*mm).__bindgen_anon_1.start_code == 0 {
            return;
        }
        let wanted = bindings::ksm_rs_mm_zero_pages(parent);
        let difference = wanted.wrapping_sub(bindings::ksm_rs_mm_zero_pages(mm));
        if difference != 0 {
            bindings::ksm_rs_adjust_zero_pages(mm, all, difference);
        }
    }
}

impl Vma<'_> {
    /// Maps the zero page at `address` in the place of `page`, if that is empty.
    ///
    /// The caller's reference on `page` must be the only one beside those of page tables and swap cache;
    /// otherwise the answer is `Busy`. Sleeps.
    pub(crate) fn replace_by_zero_page(
        &self,
        address: usize,
        page: &PageLock<'_>,
    ) -> Result<(), NotMerged> {
        Self::check(page)?;
        let all = counter();
        if all.is_null() {
            return Err(NotMerged::Busy);
        }
        let _notified = Notified::start(self, address);
        let protected = self.protect(address, page)?;
        if !page.page().is_empty() {
            return Err(NotMerged::Different);
        }
        // SAFETY: The page is empty, and nobody can write to it; the new entry maps the zero page, which is neither
        // referenced nor counted as a mapping, but in the counters that are told.
        unsafe {
            let new = bindings::ksm_rs_mk_ksm_zero_pte(self.as_ptr(), address);
            // Before anybody can unmap it, who counts it down.
            bindings::ksm_rs_count_zero_page(self.mm(), all);
            protected.exchange(new);
        }
        Ok(())
    }
}
