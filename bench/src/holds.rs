//! How long a scanning thread holds a lock at a time, from the kernel's own events, or from probes of its functions.

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

/// Which lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// The mmap lock, which the kernel has events for.
    Mmap,
    /// Those of page tables, but not of huge pages. Their functions are probed, which wants an architecture that has
    /// kprobes; each hold seems longer by what one probe takes.
    Table,
}

impl Lock {
    /// The events that tell of its acquisition and of its release.
    fn events(self) -> [&'static str; 2] {
        match self {
            Self::Mmap => ["mmap_lock_acquire_returned", "mmap_lock_released"],
            Self::Table => ["table_taken", "table_released"],
        }
    }

    fn group(self) -> &'static str {
        match self {
            Self::Mmap => "mmap_lock",
            Self::Table => "bench",
        }
    }

    /// The word of an event that says which lock, and whether it was taken.
    fn identity(self, event: &str) -> Option<&str> {
        let mark = match self {
            Self::Mmap => "mm=",
            Self::Table => "lock=",
        };
        let identity = event
            .split_whitespace()
            .find(|word| word.starts_with(mark))?;
        (!event.contains("success=false") && !identity.ends_with("=0x0")).then_some(identity)
    }
}

/// Probes of kernel functions, which are gone when this is dropped.
struct Probes;

impl Probes {
    fn new() -> Result<Self> {
        let probes = Self;
        write(
            "kprobe_events",
            "r:bench/table_taken pte_offset_map_lock lock=+0($arg4):x64\n\
             p:bench/table_released _raw_spin_unlock lock=%di:x64\n",
        )?;
        Ok(probes)
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        // What remains costs time, but does no harm.
        let _ = write("kprobe_events", "");
    }
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
pub fn measure(lock: Lock, threads: &[i32]) -> Result<Holds> {
    let pids: Vec<String> = threads.iter().map(i32::to_string).collect();
    write("tracing_on", "0")?;
    let probes = (lock == Lock::Table).then(Probes::new).transpose()?;
    let events = lock
        .events()
        .map(|event| format!("events/{}/{event}/enable", lock.group()));
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
    drop(probes);
    let holds = parse(lock, &text);
    ensure!(!holds.is_empty(), "the threads took no such lock");
    let percent = holds.iter().sum::<f64>() / time.as_micros() as f64 * 100.0;
    Ok(Holds {
        each: Latency::of(holds, 1.0),
        percent,
    })
}

/// Times between an acquisition and the release of the same lock that follows it in the same thread, in µs.
fn parse(lock: Lock, text: &str) -> Vec<f64> {
    let [acquired, released] = lock.events();
    let mut holds = Vec::new();
    let mut taken = None;
    for line in text.lines() {
        let mut parts = line.splitn(3, ": ");
        let (Some(before), Some(event), Some(fields)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let mut words = before.split_whitespace();
        let (Some(thread), Some(Ok(time)), Some(which)) = (
            words.next(),
            words.next_back().map(str::parse::<f64>),
            lock.identity(fields),
        ) else {
            continue;
        };
        if event == acquired {
            taken = Some((thread, which, time));
        } else if event == released
            && let Some((_, _, since)) =
                taken.take_if(|(holder, of, _)| (*holder, *of) == (thread, which))
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
        let holds: Vec<i64> = parse(Lock::Mmap, text)
            .iter()
            .map(|us| us.round() as i64)
            .collect();
        assert_eq!(holds, [4]);
    }

    #[test]
    fn only_the_release_of_the_same_lock_ends_a_hold() {
        let text = "ksmd-31 [000] d..1. 1.000001: table_taken: (f+0x1/0x2 <- pte_offset_map_lock) lock=0x0
            ksmd-31 [000] d..1. 1.000010: table_taken: (f+0x1/0x2 <- pte_offset_map_lock) lock=0xffff88800001
            ksmd-31 [000] d..1. 1.000012: table_released: (_raw_spin_unlock+0x0/0x40) lock=0xffff88800009
            ksmd-31 [000] d..1. 1.000017: table_released: (_raw_spin_unlock+0x0/0x40) lock=0xffff88800001
            ksmd-31 [000] d..1. 1.000019: table_released: (_raw_spin_unlock+0x0/0x40) lock=0xffff88800001\n";
        let holds: Vec<i64> = parse(Lock::Table, text)
            .iter()
            .map(|us| us.round() as i64)
            .collect();
        assert_eq!(holds, [7]);
    }
}
