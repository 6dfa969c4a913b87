// SPDX-License-Identifier: GPL-2.0

//! Learning of address spaces: the tracepoints `ksm_enter` and `ksm_exit`, and one walk over all tasks.
//!
//! An address space that was being made for a fork or an exec when the probes were registered may have been reported
//! before, and is in no list of tasks before it is done: the tracepoints of the end of both tell of it.

use crate::{
    delay::{
        self,
        Point, //
    },
    mm::{
        bindings,
        space::AddressSpace,
        zero, //
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
    /// `space` may have mergeable memory from now on. It may have been told of before.
    fn enter(&self, space: AddressSpace);
    /// The last user of the address space with this key is gone; its memory is about to be unmapped.
    fn exit(&self, key: usize);
}

/// A tracepoint, and the function that is called there.
#[derive(Clone, Copy)]
struct Probe {
    tracepoint: NonNull<bindings::tracepoint>,
    function: *mut ffi::c_void,
}

/// How many tracepoints there are to hear of.
const PROBES: usize = 4;

/// The probes, registered. Dropping it waits until none runs any more.
///
/// # Invariants
///
/// The first `registered` probes, which are functions for `T`, are registered with a pointer to `observer`.
pub(crate) struct Probes<T: Observer> {
    probes: [Probe; PROBES],
    registered: usize,
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
        let probe = |name, function| -> Result<Probe> {
            Ok(Probe {
                tracepoint: find(name)?,
                function,
            })
        };
        // INVARIANT: None is registered yet.
        let mut probes = Self {
            probes: [
                // First, so that nobody is heard of who exits unheard.
                probe(c"ksm_exit", on_exit::<T> as *mut ffi::c_void)?,
                probe(c"ksm_enter", on_enter::<T> as *mut ffi::c_void)?,
                probe(c"sched_process_fork", on_fork::<T> as *mut ffi::c_void)?,
                probe(c"sched_process_exec", on_exec::<T> as *mut ffi::c_void)?,
            ],
            registered: 0,
            observer,
        };
        for probe in probes.probes {
            // SAFETY: The probes have their tracepoints' signatures, with a pointer in front to `data`, which stays valid
            // until they are unregistered and synchronised with.
            kernel::error::to_result(unsafe {
                bindings::tracepoint_probe_register(
                    probe.tracepoint.as_ptr(),
                    probe.function,
                    probes.data(),
                )
            })?;
            // INVARIANT: One more is registered.
            probes.registered = probes.registered.saturating_add(1);
        }
        Ok(probes)
    }

    fn data(&self) -> *mut ffi::c_void {
        core::ptr::from_ref::<T>(&self.observer).cast_mut().cast()
    }
}

impl<T: Observer> Drop for Probes<T> {
    fn drop(&mut self) {
        // SAFETY: Registered with the same arguments, by the invariant. After the synchronisation no CPU is in a
        // probe, so the observer and the module's code may go.
        unsafe {
            for probe in self.probes.iter().take(self.registered) {
                bindings::tracepoint_probe_unregister(
                    probe.tracepoint.as_ptr(),
                    probe.function,
                    self.data(),
                );
            }
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
    // SAFETY: The probe's own argument.
    unsafe { zero::correct_inherited(mm.cast()) };
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

/// Probe of `sched_process_fork`: a fork that began before the probes were registered was not reported by `ksm_enter`,
/// nor is the child in a list of tasks before its fork is done. The child does not run yet.
///
/// # Safety
///
/// `data` must be a live `T`, `child` a task that has not run yet.
unsafe extern "C" fn on_fork<T: Observer>(
    data: *mut ffi::c_void,
    _parent: *mut bindings::task_struct,
    child: *mut bindings::task_struct,
) {
    // SAFETY: As this function's caller promises. A task that does not run does not part with its mm.
    unsafe { enter_mergeable::<T>(data, bindings::ksm_rs_task_user_mm(child)) };
}

/// Probe of `sched_process_exec`: as [`on_fork`], for a program that is being started.
///
/// # Safety
///
/// `data` must be a live `T`, `task` the current task.
unsafe extern "C" fn on_exec<T: Observer>(
    data: *mut ffi::c_void,
    task: *mut bindings::task_struct,
    _old_pid: ffi::c_int,
    _program: *mut ffi::c_void,
) {
    // SAFETY: As this function's caller promises. The current task keeps its mm.
    unsafe { enter_mergeable::<T>(data, bindings::ksm_rs_task_user_mm(task)) };
}

/// Tells of an address space that is mergeable.
///
/// # Safety
///
/// `data` must be a live `T`, `mm` null or an `mm_struct` that is in use.
unsafe fn enter_mergeable<T: Observer>(data: *mut ffi::c_void, mm: *mut bindings::mm_struct) {
    // SAFETY: As this function's caller promises.
    unsafe {
        if !mm.is_null() && bindings::ksm_rs_mm_mergeable(mm) {
            (*data.cast::<T>()).enter(AddressSpace::grab(mm));
        }
    }
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
            "this kernel has no tracepoint {name}; wanted ksm_enter, ksm_exit, sched_process_fork and sched_process_exec: load on a kernel built with CONFIG_KSM=y CONFIG_TRACEPOINTS=y\n"
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
