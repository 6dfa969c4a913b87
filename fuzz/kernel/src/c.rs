//! The kernel's C functions that turn text into numbers.

use std::ffi::c_char;
use std::ffi::c_int;
use std::ffi::c_uint;
use std::ffi::c_ulonglong;

extern "C" {
    /// `lib/kstrtox.c`
    pub fn kstrtouint(s: *const c_char, base: c_uint, res: *mut c_uint) -> c_int;
    /// `lib/kstrtox.c`
    pub fn kstrtoint(s: *const c_char, base: c_uint, res: *mut c_int) -> c_int;
    /// `lib/kstrtox.c`
    pub fn kstrtoull(s: *const c_char, base: c_uint, res: *mut c_ulonglong) -> c_int;
    /// `lib/kstrtox.c`
    pub fn kstrtobool(s: *const c_char, res: *mut bool) -> c_int;
    /// `lib/string_helpers.c`
    pub fn sysfs_streq(s1: *const c_char, s2: *const c_char) -> bool;
}
