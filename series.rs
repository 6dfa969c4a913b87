// SPDX-License-Identifier: GPL-2.0

//! What the `kernel` crate and its bindings call by other names from one kernel series to the next.
//!
//! `Kbuild` sets `linux_7_3` for that series and later ones; `docs/kernel-series.md` says where else they differ.

#![forbid(unsafe_code)]

/// What a knob asks for is not there in this kernel.
pub(crate) fn not_supported() -> kernel::error::Error {
    // One series has no constant for it.
    kernel::error::Error::from_errno(-(kernel::bindings::EOPNOTSUPP as i32))
}

/// Orders the reads before the call before those behind it. Any context.
pub(crate) fn smp_rmb() {
    #[cfg(linux_7_3)]
    kernel::sync::barrier::smp_mb(kernel::sync::barrier::Read);
    #[cfg(not(linux_7_3))]
    kernel::sync::barrier::smp_rmb();
}

/// Sets what reads and, perhaps, what writes the file of a `kobj_attribute`.
macro_rules! set_callbacks {
    ($attribute:ident, $show:expr, $store:expr) => {
        #[cfg(linux_7_3)]
        {
            $attribute.__bindgen_anon_1.show = Some($show);
            $attribute.__bindgen_anon_2.store = $store;
        }
        #[cfg(not(linux_7_3))]
        {
            $attribute.show = Some($show);
            $attribute.store = $store;
        }
    };
}
pub(crate) use set_callbacks;

/// The value of a module parameter, which one series gives by value and another by reference.
pub(crate) fn parameter<T: Copy>(value: impl core::borrow::Borrow<T>) -> T {
    *value.borrow()
}
