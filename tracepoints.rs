// SPDX-License-Identifier: GPL-2.0

//! Learning of address spaces: the tracepoints `ksm_enter` and `ksm_exit`, and one walk over all tasks.

use crate::{
    delay::{
        self,
        Point, //
    },
    mm::{
        bindings,
        space::AddressSpace, //
    },
};
use core::ptr::NonNull;
use kernel::{
    ffi,
    prelude::*,
    sync::Arc, //
};

/// Who wants to know. The methods run in the context of any task, which may hold locks of the core, in a
/// read-side section of RCU: they must not sleep.
pub(crate) trait Observer: Send + Sync + 'static {
    /// `space` may have mergeable memory from now on.
    fn enter(&self, space: AddressSpace);
    /// The last user of the address space with this key is gone; its memory is about to be unmapped.
    fn exit(&self, key: usize);
}

/// Both probes, registered. Dropping it waits until none runs any more.
///
/// # Invariants
///
/// The probes of `T` are registered on both tracepoints with a pointer to `observer`.
pub(crate) struct Probes<T: Observer> {
    enter: NonNull<bindings::tracepoint>,
    exit: NonNull<bindings::tracepoint>,
    observer: Arc<T>,
}

// SAFETY: Tracepoints are static objects; registration works from any task.
unsafe impl<T: Observer> Send for Probes<T> {}
// SAFETY: `&Probes` offers nothing that needs exclusion.
unsafe impl<T: Observer> Sync for Probes<T> {}

impl<T: Observer> Probes<T> {
    /// Registers the probes. Sleeps.
    ///
    /// `Err(ENOENT)` after one line in the log if the kernel lacks a tracepoint.
    pub(crate) fn register(observer: Arc<T>) -> Result<Self> {
        let (enter, exit) = (find(c"ksm_enter")?, find(c"ksm_exit")?);
        let data = core::ptr::from_ref::<T>(&observer).cast_mut().cast();
        // SAFETY: The probes have the tracepoints' signature, `(void *data, void *mm)`; `data` stays valid until
        // they are unregistered and synchronised with.
        unsafe {
            kernel::error::to_result(bindings::tracepoint_probe_register(
                enter.as_ptr(),
                on_enter::<T> as *mut ffi::c_void,
                data,
            ))?;
            let error = bindings::tracepoint_probe_register(
                exit.as_ptr(),
                on_exit::<T> as *mut ffi::c_void,
                data,
            );
            if error != 0 {
                bindings::tracepoint_probe_unregister(
                    enter.as_ptr(),
                    on_enter::<T> as *mut ffi::c_void,
                    data,
                );
                bindings::ksm_rs_tracepoint_synchronize();
                return Err(Error::from_errno(error));
            }
        }
        // INVARIANT: Both are registered.
        Ok(Self {
            enter,
            exit,
            observer,
        })
    }
}

impl<T: Observer> Drop for Probes<T> {
    fn drop(&mut self) {
        let data = core::ptr::from_ref::<T>(&self.observer).cast_mut().cast();
        // SAFETY: Registered with the same arguments, by the invariant. After the synchronisation no CPU is in a
        // probe, so the observer and the module's code may go.
        unsafe {
            bindings::tracepoint_probe_unregister(
                self.exit.as_ptr(),
                on_exit::<T> as *mut ffi::c_void,
                data,
            );
            bindings::tracepoint_probe_unregister(
                self.enter.as_ptr(),
                on_enter::<T> as *mut ffi::c_void,
                data,
            );
            bindings::ksm_rs_tracepoint_synchronize();
        }
    }
}

/// Probe of `ksm_enter`.
///
/// # Safety
///
/// `data` must be a live `T`, `mm` a live `mm_struct`.
unsafe extern "C" fn on_enter<T: Observer>(data: *mut ffi::c_void, mm: *mut ffi::c_void) {
    delay::at(Point::Entering);
    // SAFETY: `data` is the observer, see `register()`; the core passes a live `mm_struct`.
    unsafe { (*data.cast::<T>()).enter(AddressSpace::grab(mm.cast())) };
}

/// Probe of `ksm_exit`.
///
/// # Safety
///
/// `data` must be a live `T`.
unsafe extern "C" fn on_exit<T: Observer>(data: *mut ffi::c_void, mm: *mut ffi::c_void) {
    delay::at(Point::Exiting);
    // SAFETY: `data` is the observer, see `register()`.
    unsafe { (*data.cast::<T>()).exit(mm as usize) };
}

/// What [`find_one`] looks for, and what it found.
struct Search {
    name: &'static CStr,
    found: *mut bindings::tracepoint,
}

fn find(name: &'static CStr) -> Result<NonNull<bindings::tracepoint>> {
    let mut search = Search {
        name,
        found: core::ptr::null_mut(),
    };
    // SAFETY: The callback uses `search` only during the call.
    unsafe { bindings::for_each_kernel_tracepoint(Some(find_one), (&raw mut search).cast()) };
    NonNull::new(search.found).ok_or_else(|| {
        pr_err!(
            "this kernel has no tracepoint {name}; wanted ksm_enter and ksm_exit: load on a kernel built with CONFIG_KSM=y CONFIG_TRACEPOINTS=y\n"
        );
        ENOENT
    })
}

/// Compares one tracepoint's name.
///
/// # Safety
///
/// `tracepoint` must be a tracepoint, `search` a [`Search`] that nobody else uses.
unsafe extern "C" fn find_one(tracepoint: *mut bindings::tracepoint, search: *mut ffi::c_void) {
    // SAFETY: `search` comes from `find()`; a tracepoint's name is a C string that lives as long as it.
    unsafe {
        let search = &mut *search.cast::<Search>();
        if CStr::from_char_ptr((*tracepoint).name) == search.name {
            search.found = tracepoint;
        }
    }
}

/// Tells `observer` of every address space that was mergeable before its probes were registered.
///
/// Does not sleep. Address spaces that come or go meanwhile are seen by the probes.
pub(crate) fn visit_existing(observer: &impl Observer) {
    let _rcu = kernel::sync::rcu::read_lock();
    // SAFETY: Under RCU the lists of tasks and threads can be walked. `task_lock()` keeps a thread from parting
    // with its mm, so the mm is in use, and its exit, which the probe reports, is still to come.
    unsafe {
        let first = &raw mut bindings::init_task;
        let mut process = bindings::ksm_rs_next_task(first);
        while process != first {
            // A leader may have exited before its threads, which all share one mm.
            let mut thread = process;
            while !thread.is_null() {
                bindings::ksm_rs_task_lock(thread);
                let mm = bindings::ksm_rs_task_user_mm(thread);
                let has_mm = !mm.is_null();
                if has_mm && bindings::ksm_rs_mm_mergeable(mm) {
                    observer.enter(AddressSpace::grab(mm));
                }
                bindings::ksm_rs_task_unlock(thread);
                if has_mm {
                    break;
                }
                thread = bindings::ksm_rs_next_thread(thread);
            }
            process = bindings::ksm_rs_next_task(process);
        }
    }
}
