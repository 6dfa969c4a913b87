//! Latencies that a process sees: page faults, mmap and munmap, timed with the CPU's own counter.
//!
//! Reading the clock is a system call on ARCH=um, and would cost as much as what is timed.

use std::arch::x86_64::_rdtsc;
use std::time::Duration;
use std::time::Instant;

use anyhow::Result;
use serde::Deserialize;
use serde::Serialize;

use crate::memory;
use crate::memory::PAGE;
use crate::stats;

/// Pages of each mapping that is made, touched and unmapped again.
const PAGES: usize = 16;

/// Of latencies, in µs.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Latency {
    /// The median.
    pub p50: f64,
    /// The 99th percentile.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl Latency {
    /// Of ticks of the counter, so many a µs.
    pub fn of(mut ticks: Vec<f64>, per_us: f64) -> Self {
        ticks.sort_by(f64::total_cmp);
        let at = |fraction| stats::quantile(&ticks, fraction).unwrap_or(0.0) / per_us;
        Self {
            p50: at(0.5),
            p99: at(0.99),
            max: at(1.0),
        }
    }
}

/// What a process saw.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Latencies {
    /// Of page faults.
    pub fault: Latency,
    /// Of mmap.
    pub mmap: Latency,
    /// Of munmap.
    pub munmap: Latency,
}

fn ticks() -> u64 {
    // SAFETY: Every x86-64 CPU has the instruction.
    unsafe { _rdtsc() }
}

fn ticks_per_us() -> f64 {
    let (start, first) = (Instant::now(), ticks());
    while start.elapsed() < Duration::from_millis(20) {}
    let last = ticks();
    (last - first) as f64 / start.elapsed().as_secs_f64() / 1e6
}

/// Maps some pages, touches each and unmaps them, for so long.
pub fn run(time: Duration) -> Result<Latencies> {
    let per_us = ticks_per_us();
    let (mut fault, mut mmap, mut munmap) = (Vec::new(), Vec::new(), Vec::new());
    let start = Instant::now();
    while start.elapsed() < time {
        for _ in 0..64 {
            let t0 = ticks();
            let base = memory::map_anonymous(PAGES * PAGE)?;
            let mut last = ticks();
            mmap.push((last - t0) as f64);
            for index in 0..PAGES {
                // SAFETY: The page lies in the mapping just made.
                unsafe { memory::touch(base.add(index * PAGE)) };
                let now = ticks();
                fault.push((now - last) as f64);
                last = now;
            }
            let t0 = ticks();
            // SAFETY: Nothing refers to the mapping.
            unsafe { memory::unmap(base, PAGES * PAGE) };
            munmap.push((ticks() - t0) as f64);
        }
    }
    Ok(Latencies {
        fault: Latency::of(fault, per_us),
        mmap: Latency::of(mmap, per_us),
        munmap: Latency::of(munmap, per_us),
    })
}
