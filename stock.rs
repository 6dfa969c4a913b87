// SPDX-License-Identifier: GPL-2.0

//! The stock KSM: proving that it is idle, keeping it so, giving it back.
//!
//! One producer at a time: stock's thread would misread the private part of our nodes. Without its
//! attribute group nobody can start it; with a symlink in its place the tools that drive it drive us.

use crate::{
    mm::bindings,
    symbols::Variables,
    sysfs::Directory, //
};
use kernel::{
    error::to_result,
    prelude::*,
    sync::atomic::{
        Atomic,
        AtomicFlag,
        Relaxed, //
    },
    time::{
        delay::fsleep,
        Delta, //
    }, //
};

/// Stock's value of `run` for unmerging.
const RUN_UNMERGE: usize = 2;

/// Stock's value of `run` while memory goes offline; memory hotplug sets it, whether stock merges or not.
const RUN_OFFLINE: usize = 4;

/// How often giving stock's files back is tried, and how long to wait in between: they want a little memory, and without
/// them stock could not be used until the next boot.
const GIVE_BACK_TRIES: usize = 100;
const GIVE_BACK_PAUSE: Delta = Delta::from_millis(100);

/// Name of stock's directory, below `/sys/kernel/mm`.
const DIRECTORY: &CStr = c"ksm";

/// The stock KSM with its controls taken away; dropping this gives them back.
///
/// # Invariants
///
/// The addresses are those of the core's variables, which are static. Stock's attribute group is removed.
pub(crate) struct Stock {
    mm_kobj: *mut bindings::kobject,
    group: *const bindings::attribute_group,
    run: *mut usize,
    thread_mutex: *mut bindings::mutex,
    /// Whether the bit for unmerging in `run` is ours.
    unmerging: AtomicFlag,
}

// SAFETY: The pointers are to objects that the core shares between all tasks.
unsafe impl Send for Stock {}
// SAFETY: As above; `&self` methods serialise by the core's own mutex.
unsafe impl Sync for Stock {}

impl Stock {
    /// Takes stock's controls away, if it is idle. Sleeps.
    ///
    /// `Err(EBUSY)` after one line in the log if it runs or holds pages; nothing has changed then.
    pub(crate) fn take_over(variables: &Variables) -> Result<Self> {
        Self::check_idle(variables)?;
        // SAFETY: The addresses are those of the core's variables by these names: `mm_kobj` a pointer that is set
        // early in boot, `ksm_attr_group` a constant group that was added to it when KSM initialised. Removing
        // it waits for writers that are in it.
        let stock = unsafe {
            let mm_kobj = *(variables.mm_kobj as *const *mut bindings::kobject);
            let group = variables.ksm_attr_group as *const bindings::attribute_group;
            bindings::sysfs_remove_group(mm_kobj, group);
            // INVARIANT: The group was just removed.
            Self {
                mm_kobj,
                group,
                run: variables.ksm_run as *mut usize,
                thread_mutex: variables.ksm_thread_mutex as *mut bindings::mutex,
                unmerging: AtomicFlag::new(false),
            }
        };
        // A writer may have started it between the first look and the removal; `Drop` gives the group back.
        Self::check_idle(variables)?;
        Ok(stock)
    }

    fn check_idle(variables: &Variables) -> Result {
        // SAFETY: Both are `unsigned long` variables of the core, which it reads without a lock as well.
        let (run, shared) = unsafe {
            (
                Atomic::<usize>::from_ptr(variables.ksm_run as *mut usize).load(Relaxed),
                Atomic::<usize>::from_ptr(variables.ksm_pages_shared as *mut usize).load(Relaxed),
            )
        };
        if run & !RUN_OFFLINE != 0 || shared != 0 {
            pr_err!(
                "the kernel's own KSM is in use (run={run} pages_shared={shared}); wanted run=0 pages_shared=0: echo 2 > /sys/kernel/mm/ksm/run; echo 0 > /sys/kernel/mm/ksm/run\n"
            );
            return Err(EBUSY);
        }
        Ok(())
    }

    /// Address of the kobject of `/sys/kernel/mm`.
    pub(crate) fn mm_kobj(&self) -> *mut bindings::kobject {
        self.mm_kobj
    }

    /// Whether stock has been told that memory is going offline, and not yet how that ended.
    pub(crate) fn knows_of_offlining(&self) -> bool {
        // SAFETY: The variable is the core's, which reads it without a lock as well.
        let run = unsafe { Atomic::<usize>::from_ptr(self.run) };
        run.load(Relaxed) & RUN_OFFLINE != 0
    }

    /// Tells the core that merged pages are being unmerged: from now on a KSM page that is swapped in is
    /// copied instead of being mapped again. Sleeps.
    ///
    /// Only the bit for unmerging is changed: memory hotplug uses another one of the same word.
    pub(crate) fn set_unmerging(&self, on: bool) {
        if self.unmerging.xchg(on, Relaxed) == on {
            return;
        }
        // SAFETY: The mutex and the variable are the core's, whose rule it is that the one protects the other. Its
        // thread only looks at the bit for merging, which we never set.
        unsafe {
            bindings::mutex_lock(self.thread_mutex);
            let run = Atomic::<usize>::from_ptr(self.run);
            let old = run.load(Relaxed);
            let new = if on {
                old | RUN_UNMERGE
            } else {
                old & !RUN_UNMERGE
            };
            run.store(new, Relaxed);
            bindings::mutex_unlock(self.thread_mutex);
        }
    }
}

impl Drop for Stock {
    fn drop(&mut self) {
        self.set_unmerging(false);
        for left in (0..GIVE_BACK_TRIES).rev() {
            // SAFETY: The group is the core's own and not in sysfs, by the invariant; what fails leaves nothing there.
            let error = unsafe { bindings::sysfs_create_group(self.mm_kobj, self.group) };
            if error == 0 {
                return;
            }
            // Any other error would come again.
            if error != ENOMEM.to_errno() || left == 0 {
                pr_err!("giving /sys/kernel/mm/ksm back failed with error {error}\n");
                return;
            }
            fsleep(GIVE_BACK_PAUSE);
        }
    }
}

/// A symlink in the place of stock's directory. Dropping it removes it.
///
/// # Invariants
///
/// The symlink is there.
pub(crate) struct Symlink {
    mm_kobj: *mut bindings::kobject,
}

// SAFETY: Kobjects belong to no task.
unsafe impl Send for Symlink {}
// SAFETY: `&Symlink` offers nothing.
unsafe impl Sync for Symlink {}

impl Symlink {
    /// Makes a symlink to a directory of ours. Sleeps.
    pub(crate) fn to(directory: &Directory, stock: &Stock) -> Result<Self> {
        // SAFETY: Both kobjects are in sysfs; should the target go first, the link dangles, no more.
        let error = unsafe {
            bindings::sysfs_create_link(stock.mm_kobj, directory.kobject(), DIRECTORY.as_char_ptr())
        };
        to_result(error)?;
        // INVARIANT: Just made.
        Ok(Self {
            mm_kobj: stock.mm_kobj,
        })
    }
}

impl Drop for Symlink {
    fn drop(&mut self) {
        // SAFETY: The link is there by the invariant.
        unsafe { bindings::sysfs_remove_link(self.mm_kobj, DIRECTORY.as_char_ptr()) };
    }
}
