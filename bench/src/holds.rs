//! How long a scanning thread holds the mmap lock at a time, from the kernel's own events.
//!
//! There are no such events for the locks of page tables. Their effect is in the latency of page faults.

use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use crate::probe::Latency;

/// How long events are collected, which come by the hundred thousand a second.
const TIME: Duration = Duration::from_millis(100);

/// Buffer of each CPU.
const BUFFER_KIB: &str = "65536";

fn file(name: &str) -> PathBuf {
    PathBuf::from("/sys/kernel/tracing").join(name)
}

fn write(name: &str, text: &str) -> Result<()> {
    let path = file(name);
    fs::write(&path, text).with_context(|| format!("writing {text} to {}", path.display()))
}

/// What the events say.
#[derive(Clone, Copy, Debug)]
pub struct Holds {
    /// How long the lock is held at a time.
    pub each: Latency,
    /// For how many percent of the time it is held.
    pub percent: f64,
}

/// Listens to these threads for a while, which should be scanning.
pub fn measure(threads: &[i32]) -> Result<Holds> {
    let pids: Vec<String> = threads.iter().map(i32::to_string).collect();
    let events = ["acquire_returned", "released"]
        .map(|event| format!("events/mmap_lock/mmap_lock_{event}/enable"));
    write("tracing_on", "0")?;
    write("trace_clock", "mono")?;
    write("buffer_size_kb", BUFFER_KIB)?;
    write("set_event_pid", &pids.join(" "))?;
    events.iter().try_for_each(|event| write(event, "1"))?;
    write("tracing_on", "1")?;
    let start = Instant::now();
    sleep(TIME);
    write("tracing_on", "0")?;
    let time = start.elapsed();
    events.iter().try_for_each(|event| write(event, "0"))?;
    let text = fs::read_to_string(file("trace"))?;
    write("set_event_pid", "")?;
    // Gives the memory back.
    write("buffer_size_kb", "64")?;
    write("trace", "")?;
    let holds = parse(&text);
    ensure!(!holds.is_empty(), "the threads did not take an mmap lock");
    let percent = holds.iter().sum::<f64>() / time.as_micros() as f64 * 100.0;
    Ok(Holds {
        each: Latency::of(holds, 1.0),
        percent,
    })
}

/// Times between an acquisition and the release that follows it in the same thread, in µs.
fn parse(text: &str) -> Vec<f64> {
    let mut holds = Vec::new();
    let mut taken = None;
    for line in text.lines() {
        let Some((before, event)) = line.split_once(": mmap_lock_") else {
            continue;
        };
        let mut words = before.split_whitespace();
        let (Some(thread), Some(Ok(time))) =
            (words.next(), words.next_back().map(str::parse::<f64>))
        else {
            continue;
        };
        if event.starts_with("acquire_returned") && event.contains("success=true") {
            taken = Some((thread, time));
        } else if event.starts_with("released")
            && let Some((holder, since)) = taken.take()
            && holder == thread
        {
            holds.push((time - since) * 1e6);
        }
    }
    holds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_lasts_from_its_acquisition_to_its_release() {
        let text = "# tracer: nop
            ksmd-31 [001] ..... 12.000010: mmap_lock_released: mm=1 memcg_path=/ write=false
            ksmd-31 [001] ..... 12.000020: mmap_lock_acquire_returned: mm=1 memcg_path=/ write=false success=false
            ksmd-31 [001] ..... 12.000030: mmap_lock_acquire_returned: mm=1 memcg_path=/ write=false success=true
            ksmd-31 [001] ..... 12.000034: mmap_lock_released: mm=1 memcg_path=/ write=false
            ksmd-31 [001] ..... 12.000040: mmap_lock_acquire_returned: mm=1 memcg_path=/ write=false success=true\n";
        let holds: Vec<i64> = parse(text).iter().map(|us| us.round() as i64).collect();
        assert_eq!(holds, [4]);
    }
}
