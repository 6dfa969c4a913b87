//! Processes whose memory is scanned.
//!
//! A victim is a fork of the bench that maps and fills memory, advises that it be merged, and then does what it is
//! told over a socket. It is killed when its [`Victim`] is dropped.

use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::exit;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use nix::sched::CpuSet;
use nix::sched::sched_setaffinity;
use nix::sys::signal::Signal;
use nix::sys::signal::kill;
use nix::sys::wait::waitpid;
use nix::unistd::ForkResult;
use nix::unistd::Pid;
use nix::unistd::SysconfVar;
use nix::unistd::fork;
use nix::unistd::sysconf;
use serde::Deserialize;
use serde::Serialize;

use crate::memory::Area;
use crate::memory::Content;
use crate::memory::Random;
use crate::memory::Shape;
use crate::probe;
use crate::probe::Latencies;

/// No victim needs longer for anything it is told.
const PATIENCE: Duration = Duration::from_secs(600);

/// What a victim's memory is.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// How the pages lie.
    pub shape: Shape,
    /// What they contain.
    pub content: Content,
    /// Changes everything that they contain.
    pub seed: u64,
    /// Number of the first page over all victims.
    pub first: u64,
    /// How many there are.
    pub pages: usize,
}

/// What a victim can be told to do.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum Command {
    /// Read all pages in the order of their addresses, on this CPU if one is given; answered with ns a page.
    Read(Option<usize>),
    /// Give so many of a thousand pages new contents, which are those of so many others as well.
    Rewrite {
        per_mille: u64,
        copies: u64,
        seed: u64,
    },
    /// Time page faults and mappings.
    Probe(Duration),
}

/// What a victim answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Answer {
    Ready,
    Number(f64),
    Latencies(Latencies),
    Failed(String),
}

/// A process whose memory is scanned.
#[derive(Debug)]
pub struct Victim {
    pid: Pid,
    link: BufReader<UnixStream>,
}

impl Victim {
    /// Starts a process; [`Victim::ready`] waits until its memory is there.
    pub fn start(spec: Spec) -> Result<Self> {
        let (near, far) = UnixStream::pair()?;
        // SAFETY: The bench has one thread only, so the child may do whatever the parent may.
        match unsafe { fork() }.context("fork")? {
            ForkResult::Parent { child } => {
                near.set_read_timeout(Some(PATIENCE))?;
                Ok(Self {
                    pid: child,
                    link: BufReader::new(near),
                })
            }
            ForkResult::Child => {
                drop(near);
                // SAFETY: The call takes two integers.
                unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
                let status = match serve(spec, far) {
                    Ok(()) => 0,
                    Err(error) => {
                        eprintln!("victim: {error:#}");
                        1
                    }
                };
                exit(status)
            }
        }
    }

    /// Starts a process and waits until its memory is there.
    pub fn spawn(spec: Spec) -> Result<Self> {
        let mut victim = Self::start(spec)?;
        victim.ready()?;
        Ok(victim)
    }

    /// So many processes that share the pages among them evenly.
    pub fn several(count: usize, spec: Spec) -> Result<Vec<Self>> {
        let pages = spec.pages / count;
        let start = |n| {
            Self::start(Spec {
                first: spec.first + (n * pages) as u64,
                pages,
                ..spec
            })
        };
        let mut victims = (0..count).map(start).collect::<Result<Vec<_>>>()?;
        victims.iter_mut().try_for_each(Self::ready)?;
        Ok(victims)
    }

    /// Waits until the memory is there.
    pub fn ready(&mut self) -> Result<()> {
        match self.receive()? {
            Answer::Ready => Ok(()),
            other => bail!("victim {} answers {other:?}", self.pid),
        }
    }

    fn receive(&mut self) -> Result<Answer> {
        let mut line = String::new();
        let read = self.link.read_line(&mut line);
        if read.with_context(|| format!("waiting for victim {}", self.pid))? == 0 {
            bail!("victim {} died", self.pid);
        }
        match serde_json::from_str(&line)? {
            Answer::Failed(message) => bail!("victim {}: {message}", self.pid),
            answer => Ok(answer),
        }
    }

    fn ask(&mut self, command: Command) -> Result<Answer> {
        self.tell(command)?;
        self.receive()
    }

    fn tell(&mut self, command: Command) -> Result<()> {
        let line = serde_json::to_string(&command)? + "\n";
        let link = self.link.get_mut();
        link.write_all(line.as_bytes())
            .with_context(|| format!("telling victim {} {command:?}", self.pid))
    }

    /// Lets the process read all of its pages in the order of their addresses; returns ns a page.
    pub fn read(&mut self) -> Result<f64> {
        self.tell(Command::Read(None))?;
        self.has_read()
    }

    /// Lets each of several processes read its pages on a CPU of its own, the last CPUs, all at the same time; returns ns
    /// a page for each of them.
    pub fn read_side_by_side(victims: &mut [Self]) -> Result<Vec<f64>> {
        let cpus = sysconf(SysconfVar::_NPROCESSORS_ONLN)?.context("how many CPUs are there?")?;
        let cpus = (0..usize::try_from(cpus)?).rev();
        for (victim, cpu) in victims.iter_mut().zip(cpus) {
            victim.tell(Command::Read(Some(cpu)))?;
        }
        victims.iter_mut().map(Self::has_read).collect()
    }

    fn has_read(&mut self) -> Result<f64> {
        match self.receive()? {
            Answer::Number(ns) => Ok(ns),
            other => bail!("victim {} answers {other:?}", self.pid),
        }
    }

    /// Gives so many of a thousand pages new contents, each given to so many pages on the average; returns how many
    /// pages that were.
    pub fn rewrite(&mut self, per_mille: u64, copies: u64, seed: u64) -> Result<f64> {
        let command = Command::Rewrite {
            per_mille,
            copies,
            seed,
        };
        match self.ask(command)? {
            Answer::Number(pages) => Ok(pages),
            other => bail!("victim {} answers {other:?}", self.pid),
        }
    }

    /// Times page faults and mappings of the process, for so long.
    pub fn probe(&mut self, time: Duration) -> Result<Latencies> {
        match self.ask(Command::Probe(time))? {
            Answer::Latencies(latencies) => Ok(latencies),
            other => bail!("victim {} answers {other:?}", self.pid),
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        // What is gone already needs no killing, and there is nobody to tell of anything else.
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

/// What the child does: prepares its memory, then obeys until the bench is gone.
fn serve(spec: Spec, link: UnixStream) -> Result<()> {
    let mut writer = link.try_clone()?;
    let mut send = |answer: Answer| -> Result<()> {
        let line = serde_json::to_string(&answer)? + "\n";
        Ok(writer.write_all(line.as_bytes())?)
    };
    let mut area = match prepare(spec) {
        Ok(area) => area,
        Err(error) => return send(Answer::Failed(format!("{error:#}"))),
    };
    send(Answer::Ready)?;
    for line in BufReader::new(link).lines() {
        let answer = obey(serde_json::from_str(&line?)?, spec, &mut area);
        send(answer.unwrap_or_else(|error| Answer::Failed(format!("{error:#}"))))?;
    }
    Ok(())
}

fn prepare(spec: Spec) -> Result<Area> {
    let mut area = Area::map(spec.pages, spec.shape)?;
    for index in 0..spec.pages {
        let number = spec.first + index as u64;
        spec.content.write(area.page(index), spec.seed, number);
    }
    area.mergeable()?;
    if spec.shape == Shape::Vmas {
        area.split()?;
    }
    Ok(area)
}

fn obey(command: Command, spec: Spec, area: &mut Area) -> Result<Answer> {
    match command {
        Command::Read(cpu) => {
            if let Some(cpu) = cpu {
                let mut cpus = CpuSet::new();
                cpus.set(cpu)?;
                sched_setaffinity(Pid::from_raw(0), &cpus)?;
            }
            area.read_all();
            let (start, mut times) = (Instant::now(), 0);
            while start.elapsed() < Duration::from_millis(100) {
                area.read_all();
                times += 1;
            }
            let pages = times * area.pages();
            Ok(Answer::Number(
                start.elapsed().as_nanos() as f64 / pages as f64,
            ))
        }
        Command::Rewrite {
            per_mille,
            copies,
            seed,
        } => {
            let mut random = Random(seed ^ spec.first);
            let mut rewritten = 0;
            for index in 0..area.pages() {
                if random.next() % 1000 < per_mille {
                    Content::Unique.write(area.page(index), seed, rewritten / copies);
                    rewritten += 1;
                }
            }
            Ok(Answer::Number(rewritten as f64))
        }
        Command::Probe(time) => Ok(Answer::Latencies(probe::run(time)?)),
    }
}
