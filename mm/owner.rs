// SPDX-License-Identifier: GPL-2.0

//! Whom an address space belongs to: the users and the memory cgroup of the task that the core calls its owner.
//!
//! The owner is the task that runs in the address space, or one of them if there are several: threads, or processes
//! made with `CLONE_VM`. The core keeps it because memory is charged to its cgroup, so without memory cgroups there is
//! none.

use super::{
    bindings,
    space::AddressSpace, //
};
use crate::domain::User;
use kernel::sync::rcu;

/// Whether the kernel knows the owners of address spaces.
pub(crate) const OWNERS: bool = cfg!(CONFIG_MEMCG);

/// Whether memory cgroups tell address spaces apart.
pub(crate) fn has_memory_cgroups() -> bool {
    // SAFETY: Reads a switch that is set in boot.
    OWNERS && !unsafe { bindings::ksm_rs_memcg_disabled() }
}

impl AddressSpace {
    /// Asks the owner something. `None` if there is no task whose answer could be relied upon: the address space is about
    /// to be left, or its task is just being made. Does not sleep.
    fn ask_owner<T>(&self, question: impl FnOnce(*mut bindings::task_struct) -> T) -> Option<T> {
        let _rcu = rcu::read_lock();
        // SAFETY: The `mm_struct` stays allocated as long as `self`; its owner, read under RCU, until that ends.
        unsafe {
            let task = bindings::ksm_rs_mm_owner(self.as_raw());
            // One that has gone on to another program may have other rights there; one that is being made is in
            // no cgroup yet.
            if task.is_null()
                || bindings::ksm_rs_task_user_mm(task) != self.as_raw()
                || bindings::ksm_rs_task_is_new(task)
            {
                return None;
            }
            let answer = question(task);
            // It takes on the address space of another program before its rights: so these were of this one.
            bindings::ksm_rs_smp_rmb();
            (bindings::ksm_rs_task_user_mm(task) == self.as_raw()).then_some(answer)
        }
    }

    /// The number of the owner's memory cgroup, which is never used again. Does not sleep.
    pub(crate) fn memory_cgroup(&self) -> Option<u64> {
        // SAFETY: The task is valid, and RCU is held as long as it is asked.
        self.ask_owner(|task| unsafe { bindings::ksm_rs_task_memcg_id(task) })
    }

    /// The owner's user. Does not sleep.
    pub(crate) fn user(&self) -> Option<User> {
        // SAFETY: The task is valid and not a new one, so it has credentials and an exec state; RCU, which is held as long as
        // it is asked, keeps both allocated though the task may get others meanwhile.
        self.ask_owner(|task| unsafe {
            let cred = bindings::ksm_rs_task_cred(task);
            let ids = [(*cred).uid.val, (*cred).euid.val, (*cred).suid.val];
            // Who takes on other credentials stops being dumpable first: who sees the new ones sees that.
            bindings::ksm_rs_smp_rmb();
            let dumpable = bindings::ksm_rs_task_is_dumpable(task);
            User { ids, dumpable }
        })
    }
}
