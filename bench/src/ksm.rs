//! Driving either KSM: its files, its threads, waiting for what it does.
//!
//! # CPU time
//!
//! On ARCH=um the scheduler's clock, and every figure of CPU time with it, counts in steps of 10 ms. So there the scanning
//! thread is given the second CPU for itself, everything else the first, and what is taken for its CPU time is how long it
//! ran: it never sleeps during a measurement. The scheduler's own figure checks that. Elsewhere the thread's CPU clock
//! is exact.

use std::cell::RefCell;
use std::ffi::CString;
use std::fs;
use std::fs::File;
use std::path::Path;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use nix::errno::Errno;
use nix::kmod::DeleteModuleFlags;
use nix::kmod::ModuleInitFlags;
use nix::kmod::delete_module;
use nix::kmod::finit_module;
use nix::sched::CpuSet;
use nix::sched::sched_setaffinity;
use nix::time::ClockId;
use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;

use crate::record::Side;

/// Between two looks at the counters, where what comes next is measured.
const PAUSE: Duration = Duration::from_micros(200);

/// The same while passes go by, whose ends matter little among many: looking takes CPU time itself.
const LONG_PAUSE: Duration = Duration::from_millis(1);

/// What the scheduler's clock counts in on ARCH=um.
const TICK: Duration = Duration::from_millis(10);

/// A KSM that is the system's only one at the moment.
#[derive(Debug)]
pub struct Ksm {
    side: Side,
    dir: PathBuf,
    loaded: bool,
    native: bool,
    threads: RefCell<Vec<i32>>,
}

/// The counters at one time.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    passes: u64,
    cpu: Duration,
    at: Instant,
}

/// What happened between two samples.
#[derive(Clone, Copy, Debug)]
pub struct Spent {
    /// Complete passes.
    pub passes: u64,
    /// CPU time of the scanning threads.
    pub cpu: Duration,
    /// How long it took.
    pub wall: Duration,
}

impl Spent {
    /// CPU time of each of so many threads, or of their sum, is known in steps only if the kernel is `native`.
    fn between(from: Sample, to: Sample, native: bool, threads: usize) -> Self {
        let (mut cpu, wall) = (to.cpu - from.cpu, to.at - from.at);
        if native && threads == 1 {
            let most_asleep = wall / 10 + 2 * TICK;
            if cpu + most_asleep < wall {
                println!(
                    "bench: the thread ran for {cpu:?} of {wall:?} only, and was measured in steps"
                );
            } else {
                cpu = wall;
            }
        }
        Self {
            passes: to.passes - from.passes,
            cpu,
            wall,
        }
    }

    /// CPU time, in seconds.
    pub fn cpu_seconds(self) -> f64 {
        self.cpu.as_secs_f64()
    }

    /// Instructions of the scanning threads, on a machine whose clock is the number of instructions.
    pub fn instructions(self) -> f64 {
        self.cpu.as_nanos() as f64
    }

    /// CPU time for each of so many pages in each pass, in ns.
    pub fn ns_per_page(self, pages: usize) -> f64 {
        self.cpu.as_nanos() as f64 / (self.passes as f64 * pages as f64)
    }

    /// CPU time of a pass, in ms.
    pub fn cpu_ms_per_pass(self) -> f64 {
        self.cpu.as_secs_f64() * 1e3 / self.passes as f64
    }

    /// How long a pass took, in ms.
    pub fn wall_ms_per_pass(self) -> f64 {
        self.wall.as_secs_f64() * 1e3 / self.passes as f64
    }
}

impl Ksm {
    /// The kernel's own.
    pub fn stock() -> Result<Self> {
        Self::at(Side::Stock, "/sys/kernel/mm/ksm", false)
    }

    /// The module, loaded for the purpose.
    pub fn load(module: &Path) -> Result<Self> {
        let stock = Self::stock()?;
        stock.rest()?;
        let file = File::open(module).with_context(|| module.display().to_string())?;
        // A native kernel has no kprobes, with which the module finds the address by itself.
        let parameters = match symbol("kallsyms_lookup_name")? {
            Some(address) if stock.native => format!("kallsyms_lookup_name={address:#x}"),
            _ => String::new(),
        };
        finit_module(&file, &CString::new(parameters)?, ModuleInitFlags::empty())
            .context("loading ksm_rs; the kernel log says why")?;
        Self::at(Side::KsmRs, "/sys/kernel/mm/ksm_rs", true)
    }

    fn at(side: Side, dir: &str, loaded: bool) -> Result<Self> {
        let ksm = Self {
            side,
            dir: PathBuf::from(dir),
            loaded,
            native: fs::read_to_string("/proc/cpuinfo")?.contains("User Mode Linux"),
            threads: RefCell::default(),
        };
        ensure!(ksm.has("run"), "there is no {dir}/run");
        Ok(ksm)
    }

    /// Ends the turn: nothing is merged any more, and the module is gone if it was loaded for the turn.
    pub fn leave(mut self) -> Result<()> {
        self.rest()?;
        self.unload()
    }

    fn unload(&mut self) -> Result<()> {
        if !self.loaded {
            return Ok(());
        }
        let deadline = Instant::now() + Duration::from_secs(60);
        // Somebody may still have one of its files open.
        while let Err(errno) = delete_module(c"ksm_rs", DeleteModuleFlags::O_NONBLOCK) {
            let passing = matches!(errno, Errno::EAGAIN | Errno::EBUSY);
            if !passing || Instant::now() > deadline {
                return Err(errno).context("unloading ksm_rs");
            }
            sleep(PAUSE);
        }
        self.loaded = false;
        Ok(())
    }

    /// Which one this is.
    pub fn side(&self) -> Side {
        self.side
    }

    /// Whether there is such a file.
    pub fn has(&self, file: &str) -> bool {
        self.dir.join(file).exists()
    }

    /// The number in a file.
    pub fn read(&self, file: &str) -> Result<u64> {
        let path = self.dir.join(file);
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let number = text.trim_end().parse();
        number.with_context(|| format!("{} contains {text:?}", path.display()))
    }

    /// Writes a number.
    pub fn write(&self, file: &str, value: u64) -> Result<()> {
        let path = self.dir.join(file);
        fs::write(&path, value.to_string())
            .with_context(|| format!("writing {value} to {}", path.display()))
    }

    /// Undoes all merging and waits until nothing is known of any page.
    pub fn rest(&self) -> Result<()> {
        self.write("run", 2)?;
        self.wait("nothing is merged", PATIENCE, LONG_PAUSE, || {
            Ok(self.read("pages_shared")? == 0)
        })?;
        self.stop()
    }

    /// Sets the knobs that every scenario starts from: scan flat out, look at every page in every pass.
    pub fn prepare(&self) -> Result<()> {
        self.rest()?;
        self.write("sleep_millisecs", 0)?;
        self.write("pages_to_scan", 100_000)?;
        self.write("smart_scan", 0)?;
        self.write("use_zero_pages", 0)?;
        if self.has("scan_threads") {
            self.write("scan_threads", 1)?;
        }
        self.find_threads()
    }

    /// Lets the threads scan.
    pub fn start(&self) -> Result<()> {
        self.write("run", 1)
    }

    /// Lets them rest; what is merged stays so.
    pub fn stop(&self) -> Result<()> {
        self.write("run", 0)
    }

    /// CPU time of the scanning threads so far.
    pub fn cpu(&self) -> Result<Duration> {
        let threads = self.threads.borrow();
        ensure!(!threads.is_empty(), "nobody has looked for the threads");
        let clocks = threads.iter().map(|&pid| -> Result<Duration> {
            // A kernel thread is its whole process.
            let clock: ClockId = clock_getcpuclockid(Pid::from_raw(pid))?;
            Ok(Duration::from(clock.now()?))
        });
        clocks.sum()
    }

    /// Looks for the scanning thread and its helpers, which is to be done again when there may be other helpers.
    pub fn find_threads(&self) -> Result<()> {
        let name = if self.side == Side::Stock {
            "ksmd"
        } else {
            "ksmd_rs"
        };
        let mut threads = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let file_name = entry?.file_name();
            let Some(pid) = file_name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            let Ok(comm) = fs::read_to_string(format!("/proc/{pid}/comm")) else {
                continue;
            };
            let comm = comm.trim_end();
            let helper = comm.strip_prefix(name);
            if helper.is_some_and(|rest| rest.is_empty() || rest.starts_with('/')) {
                threads.push(pid);
            }
        }
        ensure!(!threads.is_empty(), "there is no thread {name}");
        if self.native {
            let alone = threads.len() == 1;
            for &pid in &threads {
                set_cpus(pid, if alone { &[1] } else { &[0, 1] })?;
            }
            set_cpus(0, if alone { &[0] } else { &[0, 1] })?;
        }
        self.threads.replace(threads);
        Ok(())
    }

    /// The threads that were found.
    pub fn threads(&self) -> Vec<i32> {
        self.threads.borrow().clone()
    }

    fn spent(&self, from: Sample, to: Sample) -> Spent {
        Spent::between(from, to, self.native, self.threads.borrow().len())
    }

    /// The counters now.
    pub fn sample(&self) -> Result<Sample> {
        Ok(Sample {
            cpu: self.cpu()?,
            at: Instant::now(),
            passes: self.read("full_scans")?,
        })
    }

    /// Pages that share their memory, or need none.
    pub fn merged(&self) -> Result<u64> {
        Ok(self.read("pages_shared")?
            + self.read("pages_sharing")?
            + self.read("ksm_zero_pages")?)
    }

    fn wait(
        &self,
        what: &str,
        limit: Duration,
        pause: Duration,
        mut condition: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let deadline = Instant::now() + limit;
        while !condition()? {
            if Instant::now() > deadline {
                bail!(
                    "{}: timed out after {limit:?} waiting until {what}; {} passes, {} pages scanned, {} merged",
                    self.side.name(),
                    self.read("full_scans")?,
                    self.read("pages_scanned")?,
                    self.merged()?
                );
            }
            sleep(pause);
        }
        Ok(())
    }

    /// Waits until so many more passes are complete.
    pub fn passes(&self, count: u64) -> Result<Sample> {
        let target = self.read("full_scans")? + count;
        self.wait(
            &format!("pass {target} is done"),
            PATIENCE,
            LONG_PAUSE,
            || Ok(self.read("full_scans")? >= target),
        )?;
        self.sample()
    }

    /// Lets the threads warm up for so many passes, then measures whole passes: two at the least, and for so much CPU
    /// time.
    pub fn measure(&self, warm_up: u64, least: Duration) -> Result<Spent> {
        self.start()?;
        let from = self.passes(warm_up)?;
        loop {
            let to = self.passes(1)?;
            let spent = self.spent(from, to);
            if spent.passes >= 2 && spent.cpu >= least {
                return Ok(spent);
            }
        }
    }

    /// Makes one pass over everything, and lets the threads rest again.
    ///
    /// They sleep for an hour after each turn, and a new sleeping time ends the sleep.
    pub fn one_pass(&self) -> Result<Spent> {
        let from = self.sample()?;
        if self.read("run")? == 1 {
            self.write("sleep_millisecs", self.read("sleep_millisecs")? + 1)?;
        } else {
            self.write("pages_to_scan", 100_000_000)?;
            self.write("sleep_millisecs", 3_600_000)?;
            self.start()?;
        }
        self.wait("a pass is done", PATIENCE, PAUSE, || {
            Ok(self.read("full_scans")? > from.passes && self.sleeps()?)
        })?;
        let spent = self.spent(from, self.sample()?);
        ensure!(spent.passes == 1, "{} passes instead of one", spent.passes);
        Ok(spent)
    }

    /// Whether all threads sleep, for the next turn or for something to do; nothing else lets them sleep so lightly.
    fn sleeps(&self) -> Result<bool> {
        for pid in self.threads.borrow().iter() {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
            if !stat.contains(") S ") {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Starts the threads and waits until so many pages are merged; also says what the first pass took.
    pub fn merge(&self, target: u64) -> Result<(Spent, Spent)> {
        let from = self.sample()?;
        let mut first = None;
        self.start()?;
        self.wait(
            &format!("{target} pages are merged"),
            PATIENCE,
            PAUSE,
            || {
                if first.is_none() && self.read("full_scans")? > from.passes {
                    first = Some(self.spent(from, self.sample()?));
                }
                Ok(self.merged()? >= target && first.is_some())
            },
        )?;
        let all = self.spent(from, self.sample()?);
        let first = first.context("no pass was made")?;
        Ok((first, all))
    }
}

/// Limit for what the threads do: the largest memory takes stock half a minute.
const PATIENCE: Duration = Duration::from_secs(300);

impl Drop for Ksm {
    fn drop(&mut self) {
        // Only where an error has ended the turn early; that error is the one to report.
        if self.loaded {
            let _ = self.unload();
        }
    }
}

/// Lets a process, 0 being this one, run on these CPUs only.
fn set_cpus(pid: i32, cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    cpus.iter().try_for_each(|&cpu| set.set(cpu))?;
    sched_setaffinity(Pid::from_raw(pid), &set)
        .with_context(|| format!("giving process {pid} the CPUs {cpus:?}"))
}

/// The address of a kernel's function, from kallsyms.
fn symbol(name: &str) -> Result<Option<u64>> {
    let text = fs::read_to_string("/proc/kallsyms").context("/proc/kallsyms")?;
    let line = text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let (address, _, symbol) = (words.next()?, words.next()?, words.next()?);
        (symbol == name).then(|| address.to_owned())
    });
    let address = line.map(|address| u64::from_str_radix(&address, 16));
    // Zero is what those see who may not see it.
    Ok(address.transpose()?.filter(|&address| address != 0))
}
