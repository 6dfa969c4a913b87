// SPDX-License-Identifier: GPL-2.0

//! The kernel's C types and functions: the `kernel` crate's bindings and, by bindgen, `helpers.h`.

#![allow(
    clippy::all,
    clippy::pedantic,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_upper_case_globals,
    non_snake_case,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]

pub(crate) use kernel::bindings::*;
use kernel::ffi;

include!(env!("KSM_RS_BINDINGS"));
