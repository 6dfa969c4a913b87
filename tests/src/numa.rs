//! NUMA nodes.

use std::ptr;

use anyhow::Result;
use anyhow::ensure;
use nix::errno::Errno;

use crate::memory::Region;

const MPOL_BIND: libc::c_int = 2;
const MPOL_MF_MOVE_ALL: libc::c_int = 4;

/// Fails with a clear message unless nodes 0 and 1 have memory.
pub fn require_two_nodes() -> Result<()> {
    let nodes = std::fs::read_to_string("/sys/devices/system/node/has_memory")?;
    ensure!(
        nodes.trim_end() == "0-1",
        "this test needs two NUMA nodes with memory, 0-1; there are: {nodes}"
    );
    Ok(())
}

/// Lets a region of this process take its memory from one node only.
pub fn bind(region: Region, node: u32) -> Result<(), Errno> {
    let mask: libc::c_ulong = 1 << node;
    // SAFETY: The mask outlives the call, and a memory policy does not change what memory contains.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            region.addr,
            region.len(),
            MPOL_BIND,
            &raw const mask,
            64,
            0,
        )
    };
    Errno::result(result).map(drop)
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
