// SPDX-License-Identifier: GPL-2.0

//! A kernel thread, and the bell that wakes it.

use crate::mm::bindings;
use core::ptr::NonNull;
use kernel::{
    error::from_err_ptr,
    ffi,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Full,
            Release, //
        },
        Arc, //
    },
    types::Opaque, //
};

/// What a thread does.
pub(crate) trait Work: Send + Sync + 'static {
    /// Runs in the thread until [`should_stop`] says so. May sleep.
    fn run(&self);
}

/// A running kernel thread. Dropping it stops the thread and waits for its end.
///
/// # Invariants
///
/// `task` is a kthread that runs `work` and does not end before `kthread_stop()` is called on it.
pub(crate) struct Thread<T: Work> {
    task: NonNull<bindings::task_struct>,
    // The thread borrows it.
    _work: Arc<T>,
}

// SAFETY: Any task may stop a kthread, and the work is `Send + Sync`.
unsafe impl<T: Work> Send for Thread<T> {}
// SAFETY: `&Thread` offers nothing.
unsafe impl<T: Work> Sync for Thread<T> {}

impl<T: Work> Thread<T> {
    /// Starts the thread: `ksmd_rs`, or `ksmd_rs/NUMBER` if that is not 0. Sleeps.
    pub(crate) fn start(work: Arc<T>, number: i32) -> Result<Self> {
        let data = core::ptr::from_ref::<T>(&work).cast_mut();
        // SAFETY: `main` is the function for this type of work, which stays allocated until the thread was stopped.
        let task = from_err_ptr(unsafe {
            bindings::ksm_rs_kthread_run(Some(main::<T>), data.cast(), number)
        })?;
        // INVARIANT: `main` returns only once it should stop.
        Ok(Self {
            task: NonNull::new(task).ok_or(ENOMEM)?,
            _work: work,
        })
    }
}

impl<T: Work> Drop for Thread<T> {
    fn drop(&mut self) {
        // SAFETY: The thread has not ended, by the invariant.
        unsafe { bindings::kthread_stop(self.task.as_ptr()) };
    }
}

/// The thread's function.
///
/// # Safety
///
/// `data` must be a `T` that outlives the thread.
unsafe extern "C" fn main<T: Work>(data: *mut ffi::c_void) -> ffi::c_int {
    // SAFETY: `Thread` keeps the work allocated until this function has returned.
    let work = unsafe { &*data.cast::<T>() };
    // SAFETY: Concerns the current task only.
    unsafe {
        bindings::set_freezable();
        bindings::ksm_rs_set_user_nice(5);
    }
    work.run();
    0
}

/// Whether the current kthread has been asked to end.
pub(crate) fn should_stop() -> bool {
    // SAFETY: Only called by kthreads.
    unsafe { bindings::kthread_should_stop() }
}

/// CPU time that the current task has used, in nanoseconds. Any context.
pub(crate) fn cpu_time() -> u64 {
    // SAFETY: Bound at load before any use; concerns the current task only.
    unsafe { bindings::ksm_rs_cpu_time() }
}

/// The monotonic clock, in nanoseconds. Any context.
#[cfg(ksm_rs_delays)]
pub(crate) fn now() -> u64 {
    // SAFETY: May be called in any context but an NMI.
    unsafe { bindings::ktime_get() as u64 }
}

/// Whether the current task should leave its work for the freezer.
pub(crate) fn freezing() -> bool {
    // SAFETY: Concerns the current task only.
    unsafe { bindings::ksm_rs_freezing() }
}

/// Whether the current task has been killed, and should do no more than it has to. Any context.
pub(crate) fn killed() -> bool {
    // SAFETY: Concerns the current task only.
    unsafe { bindings::ksm_rs_fatal_signal_pending() }
}

/// Marks the current task as the one to kill first when memory runs out, for as long as it lives: it asks
/// for memory to undo savings.
pub(crate) struct OomOrigin(());

impl OomOrigin {
    /// Marks the current task.
    pub(crate) fn mark() -> Self {
        // SAFETY: Concerns the current task only.
        unsafe { bindings::ksm_rs_set_oom_origin(true) };
        Self(())
    }
}

impl Drop for OomOrigin {
    fn drop(&mut self) {
        // SAFETY: Concerns the current task only.
        unsafe { bindings::ksm_rs_set_oom_origin(false) };
    }
}

/// Wakes a thread that waits for something to do.
#[pin_data]
pub(crate) struct Bell {
    #[pin]
    queue: Opaque<bindings::wait_queue_head>,
    rung: Atomic<i32>,
}

// SAFETY: Wait queues are made for sharing, and the flag is atomic.
unsafe impl Send for Bell {}
// SAFETY: As above.
unsafe impl Sync for Bell {}

impl Bell {
    /// A silent bell.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            queue <- Opaque::ffi_init(|queue| {
                // SAFETY: `queue` is the memory of a wait queue head, which does not move.
                unsafe { bindings::ksm_rs_init_waitqueue(queue) }
            }),
            rung: Atomic::new(0),
        })
    }

    /// Rings. Any context.
    pub(crate) fn ring(&self) {
        self.rung.store(1, Release);
        // SAFETY: The queue is initialised.
        unsafe { bindings::ksm_rs_wake_up(self.queue.get()) };
    }

    /// Waits until the bell rings, the thread should stop, or `jiffies` are over; returns the jiffies that
    /// were left. `None` waits for ever. Sleeps; the task may be frozen meanwhile.
    pub(crate) fn wait(&self, jiffies: Option<usize>) -> usize {
        let timeout = jiffies
            .and_then(|jiffies| isize::try_from(jiffies).ok())
            .unwrap_or(isize::MAX);
        // SAFETY: The queue is initialised and the flag an `int` that lives as long as `self`.
        let left = unsafe {
            bindings::ksm_rs_wait_freezable(self.queue.get(), self.rung.as_ptr(), timeout)
        };
        // A full barrier: what was written before a ring that is taken back here is seen by the caller.
        self.rung.xchg(0, Full);
        usize::try_from(left).unwrap_or(0)
    }
}
