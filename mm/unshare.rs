// SPDX-License-Identifier: GPL-2.0

//! Undoing a merge, or a fork's sharing: giving a mapping an exclusive anonymous page again.

use super::{
    bindings,
    space::Vma, //
};
use crate::delay::{
    self,
    Point, //
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};

impl Vma<'_> {
    /// Gives every mapping of a KSM page in `[from, to)` a private copy, by an unsharing fault as
    /// `MADV_UNMERGEABLE` causes it. Sleeps.
    ///
    /// Left as they are, as stock leaves them, are pages whose memory has gone bad, and those that userfaultfd keeps from
    /// being read. `Err(ENOMEM)`: there was no memory for a copy; some pages may be left merged.
    pub(crate) fn unshare(&self, from: usize, to: usize) -> Result {
        let mut address = from;
        while let Some(at) = self.next_ksm_page(address, to) {
            // The fault may back out without having done anything, so the same address is looked at again.
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
    /// a fork. May back out without having done anything. `false`: it is no use to try again now, as the memory
    /// has gone bad, or somebody would have to be waited for. Sleeps.
    ///
    /// `Err(ENOMEM)`: there was no memory for a copy.
    pub(crate) fn unshare_page(&self, address: usize) -> Result<bool> {
        if address < self.start() || address >= self.end() {
            return Ok(false);
        }
        // SAFETY: The mmap lock is held for reading and the address lies in the VMA; the fault's flags are such that the
        // core does not let go of the lock.
        let fault = unsafe { bindings::ksm_rs_unshare(self.as_ptr(), address) };
        if fault & bindings::vm_fault_reason_VM_FAULT_OOM != 0 {
            return Err(ENOMEM);
        }
        let vain = bindings::vm_fault_reason_VM_FAULT_SIGBUS
            | bindings::vm_fault_reason_VM_FAULT_SIGSEGV
            | bindings::vm_fault_reason_VM_FAULT_HWPOISON
            | bindings::vm_fault_reason_VM_FAULT_RETRY;
        Ok(fault & vain == 0)
    }
}
