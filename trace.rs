// SPDX-License-Identifier: GPL-2.0

//! The events below `/sys/kernel/tracing/events/ksm_rs`, which `ksm_rs_events.h` defines. One that nobody listens to
//! costs a no-op.
//!
//! This is what `kernel::declare_trace!` does; that macro itself finds only events of the core's own bindings.

use crate::mm::bindings;
use kernel::{
    jump_label::static_branch_unlikely,
    macros::paste, //
};

macro_rules! events {
    ($($(#[$attribute:meta])* fn $name:ident($($argument:ident: $type:ty),+ $(,)?);)+) => { paste! {$(
        $(#[$attribute])*
        ///
        /// Any context.
        #[inline(always)]
        pub(crate) fn $name($($argument: $type),+) {
            if [<$name _is_on>]() {
                // SAFETY: The event takes numbers only, and addresses for printing.
                unsafe { bindings::[<rust_do_trace_ksm_rs_ $name>]($($argument),+) };
            }
        }

        /// Whether somebody listens to the event of this name.
        #[inline(always)]
        pub(crate) fn [<$name _is_on>]() -> bool {
            // SAFETY: The key is that of a tracepoint, defined by C.
            unsafe {
                static_branch_unlikely!(bindings::[<__tracepoint_ksm_rs_ $name>], bindings::tracepoint, key)
            }
        }
    )+}};
}

events! {
    /// A pass begins; `seq` is its number, `rmap_entries` the number of pages known.
    fn start_scan(seq: i32, rmap_entries: u32);
    /// A pass has come to its end.
    fn stop_scan(seq: i32, rmap_entries: u32);
    /// An address space, by its `mm_struct`, is scanned from now on.
    fn enter(mm: usize);
    /// It is no more.
    fn exit(mm: usize);
    /// The zero page, which is at `pfn`, was to be mapped in the place of an empty page.
    fn merge_one_page(pfn: usize, rmap_item: usize, mm: usize, err: i32);
    /// A page was to become a KSM page (`ksm_page` is 0), or `ksm_page` to be mapped in its place.
    fn merge_with_ksm_page(ksm_page: usize, pfn: usize, rmap_item: usize, mm: usize, err: i32);
    /// A stable node was dropped.
    fn remove_ksm_page(pfn: usize);
    /// A mapping was taken off its stable node, which is being dropped.
    fn remove_rmap_item(pfn: usize, rmap_item: usize, mm: usize);
    /// The advisor set `pages_to_scan` after a pass of `scan_time` seconds.
    fn advisor(scan_time: i64, pages_to_scan: usize, cpu_percent: u32);
    /// `pages` were found from `address` on; smart scan left `skipped` of them out.
    fn batch(mm: usize, address: usize, pages: u32, skipped: u32);
    /// A search for a hash in a forest passed `depth` nodes.
    fn lookup(stable: bool, nid: i32, depth: u32, found: bool);
}
