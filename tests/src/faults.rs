//! Failures of memory allocations on purpose, by the kernel's own fault injection
//! (`Documentation/fault-injection/fault-injection.rst`), and which allocations they were.
//!
//! An allocation counts if code of the module is among its callers, so the module's own allocations do and those that the
//! core makes for it. What is done in interrupts, and by tasks that have nothing to do with the test, does not.

use std::fs;
use std::ops::Range;
use std::path::Path;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;

use crate::module;
use crate::trace::Trace;

const DEBUGFS: &str = "/sys/kernel/debug";
const TRACEFS: &str = "/sys/kernel/tracing";

/// Where the kernel's address space for modules ends.
const MODULES_END: u64 = 0xffff_ffff_ff00_0000;

/// Name of the group of our own trace events.
const EVENTS: &str = "ksm_faults";

/// Of them those that tell of failures.
const FAILURES: [&str; 3] = ["slab", "pages", "charge"];

/// Functions that take memory for themselves and cope without it, which is no allocation of ours: KASAN keeps stacks, and what is
/// freed waits for its RCU callback in a note, or with its likes in a sheaf.
const COPING: [&str; 3] = ["stack_depot_save_flags", "kmem_cache_free", "kfree"];

/// Most callers that the kernel looks at.
const DEPTH: u64 = 32;

/// What allocates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocator {
    /// The slab allocator: `kmalloc()` and its like.
    Slab,
    /// The page allocator.
    Pages,
}

impl Allocator {
    /// Its name in what is printed.
    pub fn name(self) -> &'static str {
        match self {
            Allocator::Slab => "slab",
            Allocator::Pages => "pages",
        }
    }

    fn dir(self) -> &'static str {
        match self {
            Allocator::Slab => "failslab",
            Allocator::Pages => "fail_page_alloc",
        }
    }

    /// The function that decides whether an allocation fails, and what it returns.
    fn decision(self) -> (&'static str, &'static str) {
        match self {
            Allocator::Slab => ("should_failslab", "s32"),
            Allocator::Pages => ("should_fail_alloc_page", "u8"),
        }
    }

    fn set(self, file: &str, value: impl ToString) -> Result<()> {
        let path = Path::new(DEBUGFS).join(self.dir()).join(file);
        fs::write(&path, value.to_string())
            .with_context(|| format!("writing {} to {}", value.to_string(), path.display()))
    }

    fn times(self) -> Result<i64> {
        let path = Path::new(DEBUGFS).join(self.dir()).join("times");
        Ok(fs::read_to_string(&path)?.trim_end().parse()?)
    }
}

/// The kernel's fault injection, set up for the module; nothing fails until it is armed.
#[derive(Debug)]
pub struct Injector {
    allocator: Allocator,
    /// Allocations that the kernel has counted so far.
    counted: u64,
    /// One is to fail, or has.
    armed: bool,
}

impl Injector {
    /// Sets it up. The calling process and its future children take part, and all kernel threads that are made from now
    /// on. There may be one for each allocator at a time.
    pub fn new(allocator: Allocator) -> Result<Self> {
        let dir = Path::new(DEBUGFS).join(allocator.dir());
        ensure!(
            dir.join("require-start").exists(),
            "{}: this kernel has no fault injection with a filter for callers; use the debug kernel",
            dir.display()
        );
        allocator.set("probability", 0)?;
        allocator.set("space", 0)?;
        // The kernel's own report leaves out allocations that ask for no warning.
        allocator.set("verbose", 0)?;
        allocator.set("ignore-gfp-wait", "N")?;
        if allocator == Allocator::Pages {
            allocator.set("ignore-gfp-highmem", "N")?;
            allocator.set("min-order", 0)?;
        }
        allocator.set("task-filter", "Y")?;
        for task in ["self", "2"] {
            // 2 is the parent of all kernel threads.
            let path = format!("/proc/{task}/make-it-fail");
            fs::write(&path, "1").context(path)?;
        }
        let symbols = Symbols::read()?;
        // No other module is loaded, which the caller makes sure of.
        allocator.set("stacktrace-depth", DEPTH)?;
        allocator.set("require-start", symbols.start_of("_end")?)?;
        allocator.set("require-end", MODULES_END)?;
        // The leak detector's notes on an allocation are no allocations of ours, and need not succeed.
        if let Ok(start) = symbols.start_of("__alloc_object") {
            allocator.set("reject-start", start)?;
            allocator.set("reject-end", symbols.next_after(start)?)?;
        }
        Ok(Self {
            allocator,
            counted: 0,
            armed: false,
        })
    }

    /// Whose allocations fail.
    pub fn allocator(&self) -> Allocator {
        self.allocator
    }

    /// Makes the `number`-th allocation from now on fail, counted from 1.
    pub fn arm(&mut self, number: u64) -> Result<()> {
        // The kernel never forgets its count, and fails what makes it a multiple of the interval.
        let interval = self.counted + number;
        self.allocator.set("interval", interval)?;
        self.allocator.set("times", 1)?;
        self.armed = true;
        self.allocator.set("probability", 100)
    }

    /// Makes all allocations fail from now on, or so many of them.
    pub fn drought(&mut self, times: Option<u32>) -> Result<()> {
        self.armed = true;
        self.allocator.set("interval", 1)?;
        self.allocator.set("times", times.map_or(-1, i64::from))?;
        self.allocator.set("probability", 100)
    }

    /// Whether the allocation that [`Injector::arm`] was told has been made, and has failed. Not before that nor after
    /// [`Injector::disarm`].
    pub fn has_failed(&self) -> Result<bool> {
        Ok(self.armed && self.allocator.times()? == 0)
    }

    /// Lets all allocations succeed again. Returns whether one failed, which must be so unless the one before, done the
    /// same way, was the last.
    pub fn disarm(&mut self, number: u64) -> Result<bool> {
        self.allocator.set("probability", 0)?;
        if !self.armed {
            return Ok(false);
        }
        let failed = self.has_failed()?;
        self.armed = false;
        let made = if failed { number } else { number - 1 };
        // With an interval of 1 the kernel does not count.
        if self.counted + number > 1 {
            self.counted += made;
        }
        Ok(failed)
    }

    /// After a life in which less was allocated than expected the kernel's count is behind: has something done that
    /// allocates, until it is known again. One allocation fails in that.
    pub fn count_anew(&mut self, mut allocate: impl FnMut() -> Result<()>) -> Result<()> {
        const AHEAD: u64 = 100;
        self.arm(AHEAD)?;
        // Each try counts once at least, and so many may be missing.
        for _ in 0..4 * AHEAD {
            if self.has_failed()? {
                break;
            }
            allocate()?;
        }
        ensure!(self.disarm(AHEAD)?, "nothing is allocated that counts");
        Ok(())
    }

    /// Ends a drought.
    pub fn rain(&mut self) -> Result<()> {
        self.armed = false;
        self.allocator.set("probability", 0)
    }
}

impl Drop for Injector {
    fn drop(&mut self) {
        if let Err(error) = self.rain() {
            eprintln!("{error:#}");
        }
    }
}

/// The kernel's symbols.
struct Symbols(Vec<(u64, String)>);

impl Symbols {
    fn read() -> Result<Self> {
        let text = fs::read_to_string("/proc/kallsyms")?;
        let mut symbols = Vec::new();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let address = u64::from_str_radix(words.next().unwrap_or_default(), 16)?;
            symbols.push((address, words.nth(1).unwrap_or_default().to_owned()));
        }
        symbols.sort();
        Ok(Self(symbols))
    }

    fn start_of(&self, name: &str) -> Result<u64> {
        let found = self.0.iter().find(|(_, symbol)| symbol == name);
        let (address, _) = found.with_context(|| format!("no symbol {name} in /proc/kallsyms"))?;
        ensure!(*address != 0, "/proc/kallsyms hides its addresses");
        Ok(*address)
    }

    fn next_after(&self, address: u64) -> Result<u64> {
        let next = self.0.iter().find(|(next, _)| *next > address);
        Ok(next.context("no symbol behind it")?.0)
    }
}

/// Records which allocations were made to fail.
#[derive(Debug)]
pub struct Recorder {
    trace: Trace,
    /// Where the module's code begins and ends, from the start of its memory on.
    code: Range<u64>,
}

/// An allocation that was made to fail, by its callers: the addresses in the module's code that they return to, the innermost
/// first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed(Vec<u64>);

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let addresses: Vec<String> = self.0.iter().map(|at| format!("{at:#x}")).collect();
        f.write_str(&addresses.join(" "))
    }
}

impl Recorder {
    /// Records from now on. The module must not be loaded; it is, for a moment.
    pub fn new() -> Result<Self> {
        let _ = fs::write(format!("{TRACEFS}/kprobe_events"), "");
        let mut events = String::new();
        for allocator in [Allocator::Slab, Allocator::Pages] {
            let (function, kind) = allocator.decision();
            let name = allocator.name();
            events += &format!("r64:{EVENTS}/{name} {function} failed=$retval:{kind}\n");
        }
        // Fails where a memory cgroup is full, with or without fault injection.
        events += &format!("r64:{EVENTS}/charge __mem_cgroup_charge failed=$retval:s32\n");
        // Where the module is. It may be gone by the time when its addresses are looked at.
        events += &format!("p:{EVENTS}/load do_init_module text=mod->mem:x64\n");
        fs::write(format!("{TRACEFS}/kprobe_events"), &events)
            .with_context(|| format!("these events: {events}"))?;
        let trace = Trace::new()?;
        trace.option("sym-addr", true)?;
        // Other tasks in a full cgroup have it fail too.
        let mine = format!("failed != 0 && common_pid == {}", std::process::id());
        for (event, filter) in FAILURES
            .into_iter()
            .zip(["failed != 0", "failed != 0", &mine])
        {
            let event = format!("{EVENTS}/{event}");
            trace.trigger(&event, &format!("stacktrace if {filter}"))?;
            trace.event(&event, Some(filter))?;
        }
        trace.event(&format!("{EVENTS}/load"), None)?;
        let mut recorder = Self { trace, code: 0..0 };
        recorder.find_code()?;
        Ok(recorder)
    }

    fn find_code(&mut self) -> Result<()> {
        module::load("")?;
        let lines = self.trace.take()?;
        let base = lines.iter().rev().find_map(|line| base(line));
        let base = base.context("loading the module was not recorded")?;
        let section = |name: &str| -> Result<u64> {
            let path = format!("/sys/module/{}/sections/{name}", module::NAME);
            let text = fs::read_to_string(&path).context(path)?;
            let address = u64::from_str_radix(text.trim_end().trim_start_matches("0x"), 16)?;
            let offset = address.checked_sub(base);
            offset.with_context(|| format!("{name} is before {base:#x}"))
        };
        // What comes behind it in the same memory.
        self.code = section(".text")?..section(".exit.text")?;
        module::unload()
    }

    /// The failures since the last call.
    pub fn take(&mut self) -> Result<Vec<Failed>> {
        let mut failures: Vec<Failed> = Vec::new();
        let mut at = None;
        let mut in_stack = false;
        for line in self.trace.take()? {
            if let Some(base) = base(&line) {
                at = Some(base);
            } else if line.contains("<stack trace>") {
                failures.push(Failed(Vec::new()));
                in_stack = true;
            } else if !line.trim_start().starts_with("=>") {
                in_stack = false;
            } else if in_stack && COPING.iter().any(|name| line.contains(name)) {
                failures.pop();
                in_stack = false;
            } else if in_stack
                && let Some(address) = caller(&line)
                && let Some(place) = self.place(address, at)
                && let Some(failure) = failures.last_mut()
            {
                failure.0.push(place);
            }
        }
        for failure in &failures {
            ensure!(
                !failure.0.is_empty(),
                "an allocation failed without a caller in the module: {:#?}",
                self.trace.lines()
            );
        }
        Ok(failures)
    }

    /// The offset in its code of an address in the module, which is at `base`.
    fn place(&self, address: u64, base: Option<u64>) -> Option<u64> {
        let offset = address.checked_sub(base?)?;
        self.code
            .contains(&offset)
            .then(|| offset - self.code.start)
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // An event that a buffer listens to cannot be removed.
        for event in FAILURES {
            let event = format!("{EVENTS}/{event}");
            let _ = self.trace.trigger(&event, "!stacktrace");
        }
        let silent = self.trace.silence();
        let gone = fs::write(format!("{TRACEFS}/kprobe_events"), "");
        if silent.is_err() || gone.is_err() {
            eprintln!("the trace events are left: {silent:?}, {gone:?}");
        }
    }
}

/// Where the module is, in the record of its being loaded.
fn base(line: &str) -> Option<u64> {
    let (_, text) = line.split_once(": load: ")?;
    let (_, address) = text.split_once("text=0x")?;
    u64::from_str_radix(address.split_whitespace().next()?, 16).ok()
}

/// The address in a line like ` => function <ffffffff81000000>`.
fn caller(line: &str) -> Option<u64> {
    let (_, address) = line.rsplit_once('<')?;
    u64::from_str_radix(address.trim_end().trim_end_matches('>'), 16).ok()
}

/// Fails if another module is loaded: its allocations would count too.
pub fn expect_no_other_module() -> Result<()> {
    let modules = fs::read_to_string("/proc/modules")?;
    for line in modules.lines() {
        let name = line.split_whitespace().next().unwrap_or_default();
        if name != module::NAME {
            bail!("the module {name} is loaded");
        }
    }
    Ok(())
}
