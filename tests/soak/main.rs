//! Tries to break ksm_rs: actors run side by side while it scans flat out, each in a process of its own, each checking
//! its own memory; and when they have ended, everything must be as quiet as if there had been none. It runs as root in
//! a virtual machine of its own, with the module loaded (`make soak`):
//!
//!     soak --minutes 30 --seed 42                  all actors
//!     soak --minutes 3 --actors pins,mremap        those of a group, or of a name
//!     soak --list                                  which there are
//!     soak --prove                                 every actor finds a byte that was changed behind its back
//!
//! What makes up the soak: [`actor`] runs an actor's steps, [`ledger`] knows what its memory must contain, and each of
//! [`process`], [`space`], [`pressure`], [`pins`] and [`control`] has a function `actors` that lists its group.
//! [`pressure::prepare`] and [`control::prepare`] set up, before the actors of a round start, what the selected ones need
//! of the system, and the value that they return undoes it. [`quiet`] looks at the system when no actor runs.

mod actor;
mod control;
mod ledger;
mod pins;
mod pressure;
mod process;
mod quiet;
mod space;

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use clap::Parser;
use fastrand::Rng;
use ksm_e2e::Ksm;
use ksm_e2e::child;
use ksm_e2e::kmsg::Log;
use ksm_e2e::procfs;
use ksm_e2e::runner;
use ksm_e2e::wait;
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::signal::killpg;
use nix::sys::wait::WaitPidFlag;
use nix::sys::wait::WaitStatus;
use nix::sys::wait::waitpid;
use nix::unistd::ForkResult;
use nix::unistd::Pid;
use nix::unistd::fork;
use nix::unistd::getpid;
use nix::unistd::setpgid;

use actor::Actor;
use actor::Slot;
use actor::Stage;

/// Longest time between two looks at a system at rest.
const ROUND: Duration = Duration::from_secs(600);

/// An actor that shows no sign of life for so long, on a fast kernel, is stuck.
const STUCK: Duration = Duration::from_secs(300);

/// How long an actor may take to find what `--corrupt` did, on a fast kernel.
const PROOF: Duration = Duration::from_secs(60);

/// How long processes may take to die, on a fast kernel.
const DYING: Duration = Duration::from_secs(60);

/// Priority of the actors: below that of the scanner's threads, of which there may be one or dozens, so that neither keeps
/// the other from the CPU; and of khugepaged, which has the least otherwise: so many actors would keep it for minutes from
/// leaving a critical section of RCU.
const NICE: libc::c_int = 10;

/// How often the system is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// How often a line says how it goes.
const NEWS: Duration = Duration::from_secs(30);

#[derive(Parser)]
#[command(about = "Tries to break ksm_rs, in a VM with the module loaded")]
struct Arguments {
    /// How long to go on
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// Repeats what chance decided in another run
    #[arg(long)]
    seed: Option<u64>,
    /// Only these actors, by name or group
    #[arg(long, value_delimiter = ',')]
    actors: Vec<String>,
    /// Change a byte of this actor's memory behind its back: it must fail
    #[arg(long, value_name = "ACTOR")]
    corrupt: Option<String>,
    /// Do so with every actor in turn
    #[arg(long, conflicts_with = "corrupt")]
    prove: bool,
    /// List the actors
    #[arg(long)]
    list: bool,
}

fn all_actors() -> Vec<Actor> {
    let mut actors = process::actors();
    actors.extend(space::actors());
    actors.extend(pressure::actors());
    actors.extend(pins::actors());
    actors.extend(control::actors());
    actors
}

fn main() -> ExitCode {
    child::serve_if_asked();
    process::serve_if_asked();
    let arguments = Arguments::parse();
    let seed = arguments.seed.unwrap_or_else(|| Rng::new().u64(..));
    match soak(&arguments, seed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let text = format!("{error:#}");
            match error.downcast_ref::<Failure>() {
                Some(failure) => println!("{failure}"),
                None => println!("SOAK FAILED seed={seed} actor=none step=0: {text}"),
            }
            ExitCode::FAILURE
        }
    }
}

fn soak(arguments: &Arguments, seed: u64) -> Result<()> {
    let mut actors = all_actors();
    for wanted in &arguments.actors {
        ensure!(
            (actors.iter()).any(|actor| actor.name == wanted || actor.group == wanted),
            "there is no actor and no group {wanted}"
        );
    }
    if !arguments.actors.is_empty() {
        let wanted = |name: &str| arguments.actors.iter().any(|wanted| wanted == name);
        actors.retain(|actor| wanted(actor.name) || wanted(actor.group));
    }
    if arguments.list {
        for actor in &actors {
            println!("{:10} {}", actor.group, actor.name);
        }
        return Ok(());
    }
    runner::prepare_process()?;
    actor::prepare_process()?;
    ensure!(Ksm::from_env().exists(), "ksm_rs is not loaded");
    if let Some(khugepaged) = procfs::pid_of("khugepaged")? {
        set_nice(khugepaged)?;
    }
    if arguments.prove {
        return prove(&actors, seed);
    }
    let corrupt = arguments.corrupt.as_deref();
    if let Some(name) = corrupt {
        ensure!(
            actors.iter().any(|actor| actor.name == name),
            "--corrupt {name}: there is no such actor among those selected"
        );
    }
    let total = Duration::from_secs_f64(arguments.minutes * 60.0);
    println!(
        "soak: seed={seed}, {} actors, {:.0} minutes",
        actors.len(),
        arguments.minutes
    );
    let rounds = total.as_secs_f64() / ROUND.as_secs_f64();
    let rounds = (rounds.ceil() as u32).max(1);
    let mut troupe = Troupe::new(actors, seed, corrupt.map(str::to_owned))?;
    let mut rng = Rng::with_seed(seed);
    let mut feats = pressure::Feats::begin(&troupe.actors)?;
    let mut quiet = quiet::Quiet::new(seed).context("before the first round")?;
    for round in 1..=rounds {
        println!("soak: round {round} of {rounds}: {}", settings(&mut rng)?);
        let prepared = (
            pressure::prepare().context("preparing for pressure")?,
            control::prepare(&troupe.actors).context("preparing for control")?,
        );
        troupe.play(total / rounds)?;
        prepared.1.undo().context("after the round")?;
        prepared.0.undo().context("after the round")?;
        feats.add(total / rounds)?;
        quiet
            .between()
            .context("when all was quiet after a round")?;
    }
    quiet.end().context("when all was quiet in the end")?;
    troupe.reports()?;
    troupe.summary()?;
    feats.end()?;
    println!("SOAK PASSED seed={seed}");
    Ok(())
}

/// Chooses knobs for a round, lets the module scan flat out, and says what was chosen. Nothing may be merged.
fn settings(rng: &mut Rng) -> Result<String> {
    let ksm = Ksm::from_env();
    ksm.stop()?;
    // As long as it is on, nobody else sets the pace.
    ksm.write_text("advisor_mode", "none")?;
    ksm.scan_at_full_speed()?;
    let mut text = String::new();
    let choices: [(&str, &[&str]); 6] = [
        ("use_zero_pages", &["0", "1"]),
        ("smart_scan", &["0", "0", "1"]),
        ("merge_across_nodes", &["0", "1", "1"]),
        ("max_page_sharing", &["2", "3", "8", "256"]),
        ("scan_threads", &["1", "1", "2", "3"]),
        (
            "merge_scope",
            &["global", "global", "cgroup", "user", "process"],
        ),
    ];
    for (knob, values) in choices {
        let value = values[rng.usize(..values.len())];
        if !ksm.has(knob) {
            continue;
        }
        match ksm.write_bytes(knob, value.as_bytes()) {
            Ok(_) => text += &format!("{knob}={value} "),
            Err(errno) => return Err(errno).context(knob),
        }
    }
    ksm.start()?;
    Ok(text)
}

/// What went wrong, and with whom.
#[derive(Debug)]
struct Failure {
    seed: u64,
    actor: &'static str,
    step: u64,
    doing: String,
    what: String,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            seed,
            actor,
            step,
            doing,
            what,
        } = self;
        write!(
            f,
            "SOAK FAILED seed={seed} actor={actor} step={step} doing={doing:?}: {what}"
        )
    }
}

impl std::error::Error for Failure {}

/// An actor's process.
struct Running {
    index: usize,
    pid: Pid,
    said: UnixStream,
    beats: u64,
    alive: Instant,
}

/// All actors, and how they fare.
struct Troupe {
    actors: Vec<Actor>,
    slots: &'static [Slot],
    incarnations: Vec<u64>,
    steps_before: Vec<u64>,
    seed: u64,
    corrupt: Option<String>,
    log: Log,
    running: Vec<Running>,
}

impl Troupe {
    fn new(actors: Vec<Actor>, seed: u64, corrupt: Option<String>) -> Result<Self> {
        Ok(Self {
            slots: actor::slots(actors.len())?,
            incarnations: vec![0; actors.len()],
            steps_before: vec![0; actors.len()],
            actors,
            seed,
            corrupt,
            log: Log::from_now()?,
            running: Vec::new(),
        })
    }

    /// Lets all actors play for so long. None of them is left when this returns, however it does.
    fn play(&mut self, time: Duration) -> Result<()> {
        let begun = Instant::now();
        let deadline = begun + time;
        let played = (0..self.actors.len())
            .try_for_each(|index| self.start(index, deadline))
            .and_then(|()| self.watch(begun));
        for running in std::mem::take(&mut self.running) {
            // What had failed is told before what cannot be killed.
            let gone = end_group(running.pid);
            if played.is_ok() {
                gone?;
            }
        }
        played
    }

    fn start(&mut self, index: usize, deadline: Instant) -> Result<()> {
        let actor = self.actors[index];
        let corrupt = self.corrupt.as_deref() == Some(actor.name);
        let incarnation = self.incarnations[index];
        self.incarnations[index] += 1;
        let slot = &self.slots[index];
        self.steps_before[index] += slot.steps.swap(0, Ordering::Relaxed);
        let (near, far) = UnixStream::pair()?;
        near.set_nonblocking(true)?;
        let parent = getpid();
        // SAFETY: The main process has one thread only, so the child may do whatever the parent may.
        match unsafe { fork() }.context("fork")? {
            ForkResult::Parent { child } => {
                // Both sides do this, for nobody knows which runs first.
                let _ = setpgid(child, child);
                self.running.push(Running {
                    index,
                    pid: child,
                    said: near,
                    beats: 0,
                    alive: Instant::now(),
                });
                Ok(())
            }
            ForkResult::Child => {
                drop(near);
                let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0));
                let result = actor::die_with(parent).and_then(|()| {
                    set_nice(0)?;
                    Stage::new(actor, slot, self.seed, incarnation, deadline, corrupt)?.run()
                });
                actor::end_with(result, far)
            }
        }
    }

    fn failure(&self, index: usize, what: String) -> anyhow::Error {
        let slot = &self.slots[index];
        anyhow::Error::new(Failure {
            seed: self.seed,
            actor: self.actors[index].name,
            step: slot.steps.load(Ordering::Relaxed),
            doing: slot.doing(),
            what,
        })
    }

    /// Fails if the kernel has reported anything.
    fn reports(&mut self) -> Result<()> {
        let reports = self.log.reports()?;
        ensure!(
            reports.is_empty(),
            "the kernel reported faults: {reports:#?}"
        );
        Ok(())
    }

    /// Until all actors have ended by themselves.
    fn watch(&mut self, begun: Instant) -> Result<()> {
        let mut news = Instant::now();
        while !self.running.is_empty() {
            self.reports()?;
            let mut at = 0;
            while at < self.running.len() {
                let Some(status) = ended(self.running[at].pid)? else {
                    at += 1;
                    continue;
                };
                let running = self.running.swap_remove(at);
                let index = running.index;
                match status {
                    WaitStatus::Exited(_, 0) => end_group(running.pid)?,
                    _ => {
                        let mut said = String::new();
                        // Ends with an error for want of more, when a child still holds the other end.
                        let _ = (&running.said).read_to_string(&mut said);
                        let _ = end_group(running.pid);
                        let what = match status {
                            WaitStatus::Exited(..) => said,
                            other => format!("the process ended with {other:?}; {said}"),
                        };
                        // The kernel may have more to say about it.
                        let what = match self.reports() {
                            Ok(()) => what,
                            Err(reports) => format!("{what}\n{reports:#}"),
                        };
                        return Err(self.failure(index, what));
                    }
                }
            }
            for at in 0..self.running.len() {
                let running = &mut self.running[at];
                let beats = self.slots[running.index].beats.load(Ordering::Relaxed);
                if beats != running.beats {
                    running.beats = beats;
                    running.alive = Instant::now();
                } else if running.alive.elapsed() > STUCK * wait::slowness() {
                    let (index, pid) = (running.index, running.pid);
                    let text = format!(
                        "stuck: no sign of life for {:?}\n{}",
                        running.alive.elapsed(),
                        where_things_are(pid)
                    );
                    return Err(self.failure(index, text));
                }
            }
            if news.elapsed() > NEWS {
                news = Instant::now();
                self.news(begun);
            }
            sleep(LOOK);
        }
        self.reports()
    }

    fn sum(&self, of: impl Fn(&Slot) -> u64) -> u64 {
        self.slots.iter().map(of).sum()
    }

    fn news(&self, begun: Instant) {
        let steps = self.sum(|slot| slot.steps.load(Ordering::Relaxed));
        let steps = steps + self.steps_before.iter().sum::<u64>();
        let checked = self.sum(|slot| slot.checked.load(Ordering::Relaxed));
        let merged = self.sum(|slot| slot.merged.load(Ordering::Relaxed));
        let counters = Ksm::from_env()
            .counters()
            .map_or_else(|_| "not loaded".to_owned(), |counters| counters.to_string());
        println!(
            "soak: {:4} s, {} actors play: {steps} steps, {checked} pages checked, {merged} seen merged; {counters}",
            begun.elapsed().as_secs(),
            self.running.len(),
        );
    }

    /// Says what every actor did, and fails if one did nothing.
    fn summary(&self) -> Result<()> {
        println!("soak: actor            steps    pages checked    seen merged");
        let mut idle = Vec::new();
        for (index, actor) in self.actors.iter().enumerate() {
            let slot = &self.slots[index];
            let steps = self.steps_before[index] + slot.steps.load(Ordering::Relaxed);
            let checked = slot.checked.load(Ordering::Relaxed);
            let merged = slot.merged.load(Ordering::Relaxed);
            println!("soak: {:14} {steps:7} {checked:16} {merged:14}", actor.name);
            if steps == 0 || checked == 0 {
                idle.push(actor.name);
            }
        }
        ensure!(
            idle.is_empty(),
            "these actors finished no step, or checked no memory: {idle:?}"
        );
        let merged = self.sum(|slot| slot.merged.load(Ordering::Relaxed));
        ensure!(merged > 0, "no actor ever saw a merged page");
        Ok(())
    }
}

/// Gives a process, 0 for the calling one, less priority than programs have, and more than the least.
fn set_nice(pid: i32) -> Result<()> {
    // SAFETY: The call takes integers only.
    Errno::result(unsafe { libc::setpriority(libc::PRIO_PROCESS, pid as libc::id_t, NICE) })
        .context("setpriority")?;
    Ok(())
}

/// How the first process of a group has ended, if it has. Orphans of the group are reaped on the way.
fn ended(group: Pid) -> Result<Option<WaitStatus>> {
    loop {
        let any = Pid::from_raw(-group.as_raw());
        match waitpid(any, Some(WaitPidFlag::WNOHANG)).context("waitpid")? {
            WaitStatus::StillAlive => return Ok(None),
            status if status.pid() == Some(group) => return Ok(Some(status)),
            _ => {}
        }
    }
}

/// Kills what is left of a group and waits until all of it is gone.
fn end_group(group: Pid) -> Result<()> {
    let any = Pid::from_raw(-group.as_raw());
    let gone = wait::until("an actor's processes are gone", DYING, || {
        let gone = killpg(group, Signal::SIGKILL) == Err(Errno::ESRCH);
        while !matches!(
            waitpid(any, Some(WaitPidFlag::WNOHANG)),
            Ok(WaitStatus::StillAlive) | Err(_)
        ) {}
        Ok(gone)
    });
    gone.with_context(|| where_things_are(group))
}

/// State and kernel stacks of a group's processes and of the module's threads; the kernel's log has those of all tasks
/// that are blocked.
fn where_things_are(group: Pid) -> String {
    let mut text = String::from("Kernel stacks:");
    let Ok(processes) = fs::read_dir("/proc") else {
        return text;
    };
    for process in processes.flatten() {
        let read = |file: &str| fs::read_to_string(process.path().join(file)).unwrap_or_default();
        let stat = read("stat");
        // The name, in parentheses, may have anything in it.
        let Some((_, fields)) = stat.rsplit_once(") ") else {
            continue;
        };
        let comm = read("comm");
        let fields: Vec<&str> = fields.split(' ').collect();
        let of_group = fields.get(2) == Some(&group.to_string().as_str());
        if !of_group && !comm.starts_with("ksmd_rs") {
            continue;
        }
        let Ok(tasks) = fs::read_dir(process.path().join("task")) else {
            continue;
        };
        for task in tasks.flatten() {
            let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
            text += &format!(
                "\n{} {} state {} in {}\n{}",
                task.file_name().display(),
                comm.trim_end(),
                fields[0],
                read("wchan"),
                read("stack")
            );
        }
    }
    for key in ["w", "l"] {
        let _ = fs::write("/proc/sysrq-trigger", key);
    }
    text
}

/// Harms the memory of each actor in turn, which must see it.
fn prove(actors: &[Actor], seed: u64) -> Result<()> {
    let mut blind = Vec::new();
    for &actor in actors {
        let begun = Instant::now();
        settings(&mut Rng::with_seed(seed))?;
        let mut troupe = Troupe::new(vec![actor], seed, Some(actor.name.to_owned()))?;
        let prepared = (pressure::prepare()?, control::prepare(&[actor])?);
        let played = troupe.play(PROOF * wait::slowness());
        prepared.1.undo()?;
        prepared.0.undo()?;
        let text = match played {
            Ok(()) => "has not noticed".to_owned(),
            Err(error) => match error.downcast::<Failure>() {
                Ok(failure) => failure.what,
                Err(error) => return Err(error).context(actor.name),
            },
        };
        let seen = text.contains("MEMORY DIFFERS");
        println!(
            "soak: {:14} {} after {:.1} s: {text:.150}",
            actor.name,
            if seen { "saw it" } else { "DID NOT SEE IT" },
            begun.elapsed().as_secs_f64()
        );
        if !seen {
            blind.push(actor.name);
        }
    }
    if !blind.is_empty() {
        bail!("these actors do not find a byte that was changed: {blind:?}");
    }
    println!(
        "SOAK PROVED: each of {} actors finds a byte that was changed behind its back",
        actors.len()
    );
    Ok(())
}
