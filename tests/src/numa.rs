//! NUMA nodes.

use std::ptr;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use nix::errno::Errno;

use crate::memory::Region;

const MPOL_BIND: libc::c_int = 2;
const MPOL_MF_MOVE_ALL: libc::c_int = 4;

/// A list of numbers as the kernel writes it, `0-2,5`.
fn parse_list(text: &str) -> Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for range in text.trim_end().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        numbers.extend(first.parse::<u32>()?..=last.parse::<u32>()?);
    }
    Ok(numbers)
}

/// The nodes with memory, in ascending order.
pub fn nodes() -> Result<Vec<u32>> {
    let text = std::fs::read_to_string("/sys/devices/system/node/has_memory")?;
    parse_list(&text).with_context(|| format!("nodes with memory: {text:?}"))
}

/// The same; fails with a clear message unless there are several.
pub fn require_nodes() -> Result<Vec<u32>> {
    let nodes = nodes()?;
    ensure!(
        nodes.len() >= 2,
        "this test needs several NUMA nodes with memory; there are: {nodes:?}"
    );
    Ok(nodes)
}

/// Lets a region of this process take its memory from one node only; `move_all` moves what is elsewhere, whoever
/// else maps it.
pub fn bind(region: Region, node: u32, move_all: bool) -> Result<(), Errno> {
    let mask: libc::c_ulong = 1 << node;
    let flags = if move_all { MPOL_MF_MOVE_ALL } else { 0 };
    // SAFETY: The mask outlives the call, and a memory policy does not change what memory contains.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            region.addr,
            region.len(),
            MPOL_BIND,
            &raw const mask,
            64,
            flags,
        )
    };
    Errno::result(result).map(drop)
}

/// Moves what process `pid` has on one node to another one, whoever else maps it.
pub fn migrate(pid: i32, from: u32, to: u32) -> Result<()> {
    let (from, to): (libc::c_ulong, libc::c_ulong) = (1 << from, 1 << to);
    // SAFETY: The masks outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_migrate_pages,
            pid,
            64,
            &raw const from,
            &raw const to,
        )
    };
    Errno::result(result).context("migrate_pages")?;
    Ok(())
}

fn move_pages(pid: i32, region: Region, node: Option<u32>) -> Result<Vec<i32>, Errno> {
    let pages: Vec<usize> = region.addresses().collect();
    let nodes = node.map(|node| vec![node as libc::c_int; pages.len()]);
    let mut status = vec![libc::c_int::MIN; pages.len()];
    let flags = if node.is_some() { MPOL_MF_MOVE_ALL } else { 0 };
    // SAFETY: The three arrays have `pages.len()` elements and outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            pid,
            pages.len(),
            pages.as_ptr(),
            nodes.as_ref().map_or(ptr::null(), |nodes| nodes.as_ptr()),
            status.as_mut_ptr(),
            flags,
        )
    };
    Errno::result(result)?;
    Ok(status)
}

/// The node of each page of a region of process `pid`; a negative error number where there is none.
pub fn nodes_of(pid: i32, region: Region) -> Result<Vec<i32>> {
    Ok(move_pages(pid, region, None)?)
}

/// Asks that the pages of a region of process `pid` be moved to a node, whoever else maps them. Returns how many
/// are there now.
pub fn move_to(pid: i32, region: Region, node: u32) -> Result<usize> {
    move_pages(pid, region, Some(node))?;
    Ok(nodes_of(pid, region)?
        .into_iter()
        .filter(|&now| now == node as i32)
        .count())
}
