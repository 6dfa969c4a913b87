//! Strings.

use core::ffi::c_char;
use core::ffi::CStr;
use core::ops::Deref;

include!(concat!(env!("OUT_DIR"), "/parse_int.rs"));

/// What the kernel's crate adds to C strings.
pub trait CStrExt {
    /// The string as C takes it.
    fn as_char_ptr(&self) -> *const c_char;
}

impl CStrExt for CStr {
    fn as_char_ptr(&self) -> *const c_char {
        self.as_ptr()
    }
}

/// Bytes that need not be UTF-8.
#[repr(transparent)]
pub struct BStr([u8]);

impl BStr {
    /// From bytes.
    pub fn from_bytes(bytes: &[u8]) -> &Self {
        // SAFETY: `BStr` is transparent to `[u8]`.
        unsafe { &*(core::ptr::from_ref(bytes) as *const Self) }
    }
}

impl Deref for BStr {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<BStr> for [u8] {
    fn as_ref(&self) -> &BStr {
        BStr::from_bytes(self)
    }
}
