//! What the module's files import by a glob.

pub use crate::error::code::*;
pub use crate::error::Error;
pub use crate::error::Result;
pub use crate::str::CStrExt as _;
pub use core::ffi::CStr;
