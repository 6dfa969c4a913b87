// SPDX-License-Identifier: GPL-2.0

//! Address spaces: holding one, entering it, locking it, its mergeable VMAs.

use super::bindings;
use kernel::{
    mm::{
        virt::VmaRef,
        Mm,
        MmWithUser,
        MmWithUserAsync,
        MmapReadGuard, //
    },
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        }, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// An address space whose `mm_struct` stays allocated, though the process may be gone.
#[derive(Clone)]
pub(crate) struct AddressSpace {
    mm: ARef<Mm>,
}

impl AddressSpace {
    /// Takes a reference (`mmgrab()`). Any context.
    ///
    /// # Safety
    ///
    /// `mm` must point at a live `mm_struct`.
    pub(crate) unsafe fn grab(mm: *mut bindings::mm_struct) -> Self {
        // SAFETY: The caller guarantees that it is live for the duration of this call.
        let mm: &Mm = unsafe { Mm::from_raw(mm) };
        Self { mm: mm.into() }
    }

    /// The address of the `mm_struct`, for telling address spaces apart.
    pub(crate) fn key(&self) -> usize {
        self.mm.as_raw() as usize
    }

    pub(super) fn as_raw(&self) -> *mut bindings::mm_struct {
        self.mm.as_raw()
    }

    /// Keeps the page tables from being torn down, unless that has begun already. Does not sleep.
    pub(crate) fn enter(&self) -> Option<Entered> {
        let mm = self.mm.mmget_not_zero()?;
        // Dropped asynchronously: our thread must not run somebody's `exit_mmap()`.
        Some(Entered {
            mm: MmWithUser::into_mmput_async(mm),
        })
    }

    /// Adds to the counter behind `ksm_rmap_items` in `/proc/PID/ksm_stat`.
    pub(crate) fn count_rmap_items(&self, difference: isize) {
        // SAFETY: The field is valid as long as the `mm_struct` is; the core only reads it once the mm is
        // registered, and we write it under the engine's mutex.
        let counter = unsafe {
            Atomic::<usize>::from_ptr(&raw mut (*self.as_raw()).__bindgen_anon_1.ksm_rmap_items)
        };
        counter.fetch_add(difference as usize, Relaxed);
    }

    /// Adds to the counter behind `ksm_merging_pages` in `/proc/PID`.
    pub(crate) fn count_merging_pages(&self, difference: isize) {
        // SAFETY: As in `count_rmap_items()`.
        let counter = unsafe {
            Atomic::<usize>::from_ptr(&raw mut (*self.as_raw()).__bindgen_anon_1.ksm_merging_pages)
        };
        counter.fetch_add(difference as usize, Relaxed);
    }
}

/// An address space that cannot be torn down while this value lives.
///
/// Its `Drop` does not sleep: a last reference is given up by a work item.
pub(crate) struct Entered {
    mm: ARef<MmWithUserAsync>,
}

impl Entered {
    /// How many anonymous pages are mapped, all CPUs asked. Does not sleep.
    pub(crate) fn anon_pages(&self) -> usize {
        // SAFETY: The mm is in use.
        unsafe { bindings::ksm_rs_mm_anon_pages(self.mm.as_raw()) }
    }

    /// As [`Entered::try_lock`], which is tried so many times, with a pause in between. Sleeps.
    pub(crate) fn lock_within(&self, tries: u32, pause: Delta) -> Option<Locked<'_>> {
        for _ in 1..tries {
            if let Some(locked) = self.try_lock() {
                return Some(locked);
            }
            fsleep(pause);
        }
        self.try_lock()
    }

    /// Read-locks the address space, unless somebody has it locked for writing or waits to. Does not sleep.
    ///
    /// They may take as long as they like, if a file system of theirs has to answer first (FUSE); so there is no way here to
    /// wait for them without a limit.
    pub(crate) fn try_lock(&self) -> Option<Locked<'_>> {
        let mm: &MmWithUser = &self.mm;
        Some(Locked {
            guard: mm.mmap_read_trylock()?,
            mm: mm.as_raw(),
        })
    }
}

/// An address space with its mmap lock held for reading.
///
/// # Invariants
///
/// `mm` is the `mm_struct` that `guard` locks.
pub(crate) struct Locked<'a> {
    #[expect(dead_code, reason = "held for its Drop")]
    guard: MmapReadGuard<'a>,
    mm: *mut bindings::mm_struct,
}

/// What comes next in an address space.
pub(crate) enum Next<'a> {
    /// This VMA.
    Vma(Vma<'a>),
    /// It is to be looked for from this address on.
    From(usize),
    /// No VMA whose pages may be merged.
    Nothing,
}

impl Locked<'_> {
    /// The first VMA that ends above `address` and whose anonymous pages may be merged. Others are passed, each of which is
    /// counted down from `steps`.
    pub(crate) fn mergeable_from(&self, address: usize, steps: &mut usize) -> Next<'_> {
        let mut vmas = bindings::vma_iterator::default();
        // SAFETY: The iterator is ours, the mm is valid.
        unsafe { bindings::ksm_rs_vma_iter_init(&mut vmas, self.mm, address) };
        loop {
            // SAFETY: The mmap lock is held by the invariant, since the iterator was made.
            let vma = unsafe { bindings::ksm_rs_vma_next(&mut vmas) };
            if vma.is_null() {
                return Next::Nothing;
            }
            // SAFETY: It is a VMA, and the lock keeps it valid as long as `self` is borrowed.
            let vma = unsafe { VmaRef::from_raw(vma) };
            let vma = Vma { vma };
            if vma.is_mergeable() {
                return Next::Vma(vma);
            }
            *steps = steps.saturating_sub(1);
            if *steps == 0 {
                return Next::From(vma.end());
            }
        }
    }

    /// Whether somebody waits for the mmap lock.
    pub(crate) fn contended(&self) -> bool {
        // SAFETY: The mm is valid by the invariant.
        unsafe { bindings::ksm_rs_mmap_lock_contended(self.mm) }
    }

    /// The VMA at `address` if its anonymous pages may be merged.
    pub(crate) fn mergeable_at(&self, address: usize) -> Option<Vma<'_>> {
        let mut vmas = bindings::vma_iterator::default();
        // SAFETY: The iterator is ours, the mm is valid, and the mmap lock is held by the invariant.
        let vma = unsafe {
            bindings::ksm_rs_vma_iter_init(&mut vmas, self.mm, address);
            bindings::ksm_rs_vma_next(&mut vmas)
        };
        if vma.is_null() {
            return None;
        }
        // SAFETY: It is a VMA, and the lock keeps it valid as long as `self` is borrowed.
        let vma = unsafe { VmaRef::from_raw(vma) };
        let vma = Vma { vma };
        (vma.start() <= address && vma.is_mergeable()).then_some(vma)
    }
}

/// A VMA under the mmap lock whose pages may be merged.
pub(crate) struct Vma<'a> {
    pub(super) vma: &'a VmaRef,
}

impl Vma<'_> {
    /// First address.
    pub(crate) fn start(&self) -> usize {
        self.vma.start()
    }

    /// Address behind the last.
    pub(crate) fn end(&self) -> usize {
        self.vma.end()
    }

    pub(super) fn as_ptr(&self) -> *mut bindings::vm_area_struct {
        self.vma.as_ptr()
    }

    pub(super) fn mm(&self) -> *mut bindings::mm_struct {
        self.vma.mm().as_raw()
    }

    /// Advised `MADV_MERGEABLE` (or by `PR_SET_MEMORY_MERGE`), with anonymous pages in it.
    fn is_mergeable(&self) -> bool {
        // SAFETY: The VMA is valid under the mmap lock.
        unsafe { bindings::ksm_rs_vma_mergeable(self.as_ptr()) }
    }
}
