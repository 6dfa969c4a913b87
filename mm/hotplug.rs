// SPDX-License-Identifier: GPL-2.0

//! Memory that goes offline: the frames of stable nodes must not be looked at once it has.

use super::bindings;
use kernel::{
    error::to_result,
    ffi,
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

/// It does not matter when among the core's callbacks ours runs.
const PRIORITY: ffi::c_int = 0;

/// `NOTIFY_OK`.
const NOTIFY_OK: ffi::c_int = 1;

/// Page frames that have gone offline.
///
/// # Invariants
///
/// The core has said so, and nothing is in those frames any more.
pub(crate) struct OfflineRange {
    start: usize,
    end: usize,
}

impl OfflineRange {
    /// Whether a frame is among them.
    pub(crate) fn contains(&self, pfn: usize) -> bool {
        (self.start..self.end).contains(&pfn)
    }
}

/// Who looks at page frames. The methods may sleep. Going on may be said without
/// having been told to hold still.
pub(crate) trait Bystander: Send + Sync + 'static {
    /// Memory is about to go offline: look at no stable node from the return of this on.
    fn hold_still(&self);
    /// The frames, if it succeeded, are gone: forget what was there and go on.
    fn go_on(&self, offline: Option<OfflineRange>);
}

#[repr(C)]
#[pin_data]
struct Block<T: Bystander> {
    #[pin]
    block: Opaque<bindings::notifier_block>,
    bystander: Arc<T>,
}

/// The memory notifier, registered.
///
/// # Invariants
///
/// `block` is registered.
pub(crate) struct Notifier<T: Bystander> {
    block: Pin<KBox<Block<T>>>,
}

// SAFETY: Registration works from any task.
unsafe impl<T: Bystander> Send for Notifier<T> {}
// SAFETY: `&Notifier` offers nothing.
unsafe impl<T: Bystander> Sync for Notifier<T> {}

impl<T: Bystander> Notifier<T> {
    /// Registers the notifier. Sleeps.
    pub(crate) fn register(bystander: Arc<T>) -> Result<Self> {
        let block = KBox::pin_init(
            pin_init!(Block {
                block: Opaque::new(bindings::notifier_block {
                    notifier_call: Some(notified::<T>),
                    next: core::ptr::null_mut(),
                    priority: PRIORITY,
                }),
                bystander,
            }),
            GFP_KERNEL,
        )?;
        // SAFETY: The block is initialised and pinned, and stays so until it is unregistered.
        to_result(unsafe { bindings::ksm_rs_register_memory_notifier(block.block.get()) })?;
        // INVARIANT: Just registered.
        Ok(Self { block })
    }
}

impl<T: Bystander> Drop for Notifier<T> {
    fn drop(&mut self) {
        // SAFETY: Registered by the invariant. Waits for callbacks that are running.
        unsafe { bindings::ksm_rs_unregister_memory_notifier(self.block.block.get()) };
    }
}

/// The notifier's callback.
///
/// # Safety
///
/// `block` must be the first field of a live [`Block<T>`], and `data` what the core passes with `action`.
unsafe extern "C" fn notified<T: Bystander>(
    block: *mut bindings::notifier_block,
    action: ffi::c_ulong,
    data: *mut ffi::c_void,
) -> ffi::c_int {
    // SAFETY: The core passes the block that was registered, which is the first field of a `Block`.
    let bystander = unsafe { &(*block.cast::<Block<T>>()).bystander };
    match bindings::memory_block_state::try_from(action) {
        Ok(bindings::memory_block_state_MEM_GOING_OFFLINE) => bystander.hold_still(),
        Ok(bindings::memory_block_state_MEM_CANCEL_OFFLINE) => bystander.go_on(None),
        Ok(bindings::memory_block_state_MEM_OFFLINE) => {
            // SAFETY: With this action `data` is a `memory_notify`.
            let (start, pages) = unsafe {
                let notify = data.cast::<bindings::memory_notify>();
                ((*notify).start_pfn, (*notify).nr_pages)
            };
            // INVARIANT: The core says so.
            bystander.go_on(Some(OfflineRange {
                start,
                end: start.saturating_add(pages),
            }));
        }
        _ => {}
    }
    NOTIFY_OK
}
