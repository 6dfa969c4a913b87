//! Probes in the kernel's functions: how often these are called, and what is in the kernel's memory.

use std::fs;
use std::fs::OpenOptions;
use std::io::Write;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use crate::trace::Trace;

const TRACING: &str = "/sys/kernel/tracing";

/// The probes' folder below `events`.
const GROUP: &str = "ksm_e2e";

/// Most words that one argument of a probe can fetch.
const WORDS_AT_ONCE: usize = 64;

/// A probe, until it is dropped.
#[derive(Debug)]
struct Probe {
    name: String,
}

impl Probe {
    fn new(function: &str, arguments: &str) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{function}_{}_{number}", std::process::id());
        command(&format!("p:{GROUP}/{name} {function} {arguments}"))?;
        Ok(Self { name })
    }

    fn enable(&self, on: bool) -> Result<()> {
        let path = format!("{TRACING}/events/{GROUP}/{}/enable", self.name);
        fs::write(&path, if on { "1" } else { "0" }).context(path)
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // One that is on cannot be removed.
        let _ = self.enable(false);
        if let Err(error) = command(&format!("-:{GROUP}/{}", self.name)) {
            eprintln!("{error:#}");
        }
    }
}

fn command(text: &str) -> Result<()> {
    let path = format!("{TRACING}/kprobe_events");
    let mut file = OpenOptions::new()
        .append(true)
        .open(&path)
        .with_context(|| format!("this test needs kprobes: {path}"))?;
    file.write_all(format!("{text}\n").as_bytes())
        .with_context(|| format!("writing {text:?} to {path}"))
}

/// Counts the calls of a function.
#[derive(Debug)]
pub struct Calls {
    probe: Probe,
}

impl Calls {
    /// Counts from now on.
    pub fn of(function: &str) -> Result<Self> {
        let probe = Probe::new(function, "")?;
        probe.enable(true)?;
        Ok(Self { probe })
    }

    /// How many there have been.
    pub fn so_far(&self) -> Result<u64> {
        let path = format!("{TRACING}/kprobe_profile");
        let text = fs::read_to_string(&path).context(path)?;
        let line = text.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next()? == self.probe.name).then_some((words.next()?, words.next()?))
        });
        let (hits, misses) = line.context("the probe is not in the profile")?;
        ensure!(misses == "0", "{misses} calls were not counted");
        hits.parse().context("hits")
    }
}

/// The address of a symbol, of the kernel or of a module, whose name ends so.
pub fn address_of(name_ends: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/kallsyms")?;
    let mut found = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let (address, _, name) = (words.next()?, words.next()?, words.next()?);
        name.ends_with(name_ends).then_some(address)
    });
    let address = found.next().with_context(|| format!("no {name_ends}"))?;
    ensure!(found.next().is_none(), "several symbols end in {name_ends}");
    let address = u64::from_str_radix(address, 16)?;
    ensure!(address != 0, "addresses are hidden from this process");
    Ok(address)
}

/// Words of the kernel's memory, from `offset` bytes behind the place that the pointer at `pointer` leads to.
pub fn words_behind(pointer: u64, offset: usize, count: usize) -> Result<Vec<u64>> {
    const FUNCTION: &str = "do_sys_openat2";
    let mut words = Vec::new();
    while words.len() < count {
        let some = WORDS_AT_ONCE.min(count - words.len());
        let from = offset + 8 * words.len();
        let probe = Probe::new(
            FUNCTION,
            &format!("words=+{from}(@0x{pointer:x}):x64[{some}]"),
        )?;
        let trace = Trace::new()?;
        trace.event(&format!("{GROUP}/{}", probe.name), None)?;
        // Any file will do.
        fs::read("/proc/self/comm")?;
        let lines = trace.lines()?;
        drop(trace);
        let line = lines.first().context("the probe was not hit")?;
        let (_, list) = line.split_once("words={").context("no words")?;
        let (list, _) = list.split_once('}').context("no end of the words")?;
        for word in list.split(',') {
            let word = word.trim_start_matches("0x");
            words.push(u64::from_str_radix(word, 16).with_context(|| line.clone())?);
        }
    }
    Ok(words)
}
