// SPDX-License-Identifier: GPL-2.0

//! Numbers and words in text, by the kernel's own `kstrto*()` and `sysfs_streq()`: what the stock KSM accepts, we accept.

use crate::mm::bindings;
use kernel::{error::to_result, prelude::*};

/// Decimal, as all of stock's files want it.
const BASE: u32 = 10;

/// An `unsigned int`: `EINVAL` if it is none, `ERANGE` if it is too large.
pub(crate) fn uint(text: &CStr) -> Result<u32> {
    let mut value = 0;
    // SAFETY: A C string and a place for the result.
    to_result(unsafe { bindings::kstrtouint(text.as_char_ptr(), BASE, &mut value) })?;
    Ok(value)
}

/// An `int`: `EINVAL` if it is none, `ERANGE` if it is out of range.
pub(crate) fn int(text: &CStr) -> Result<i32> {
    let mut value = 0;
    // SAFETY: A C string and a place for the result.
    to_result(unsafe { bindings::kstrtoint(text.as_char_ptr(), BASE, &mut value) })?;
    Ok(value)
}

/// An `unsigned long`: `EINVAL` if it is none, `ERANGE` if it is too large.
pub(crate) fn ulong(text: &CStr) -> Result<u64> {
    let mut value = 0;
    // SAFETY: A C string and a place for the result. On the 64-bit kernels that the module builds for, an
    // `unsigned long long` is the same.
    to_result(unsafe { bindings::kstrtoull(text.as_char_ptr(), BASE, &mut value) })?;
    Ok(value)
}

/// A truth value, as `kstrtobool()` takes it: `EINVAL` if it is none.
pub(crate) fn truth(text: &CStr) -> Result<bool> {
    let mut value = false;
    // SAFETY: A C string and a place for the result.
    to_result(unsafe { bindings::kstrtobool(text.as_char_ptr(), &mut value) })?;
    Ok(value)
}

/// Whether the text is `word`, perhaps with a newline behind.
pub(crate) fn is_word(text: &CStr, word: &CStr) -> bool {
    // SAFETY: Two C strings.
    unsafe { bindings::sysfs_streq(text.as_char_ptr(), word.as_char_ptr()) }
}
