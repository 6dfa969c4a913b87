//! As much of the kernel's `kernel` crate as the parsers of ksm_rs need, on the host.
//!
//! What decides which texts are numbers is the kernel's own: [`c`] is compiled from `lib/`, and
//! [`str::parse_int`] from `rust/kernel/`.

pub mod c;
pub mod error;
pub mod prelude;
pub mod str;
pub mod sync;

pub use std::fmt;
