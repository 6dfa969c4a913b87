//! Loading and unloading the module, against all who come in by a probe or a file.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Ksm;
use ksm_e2e::Region;
use ksm_e2e::child::Span;
use ksm_e2e::delays::Hits;
use ksm_e2e::delays::rounds;
use ksm_e2e::kmsg::Log;
use ksm_e2e::ksm::Counters;
use ksm_e2e::module;
use ksm_e2e::procfs;
use ksm_e2e::slow_file::SlowFile;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;

use crate::stage::CONTENT;
use crate::stage::advise;
use crate::stage::newcomer;
use crate::stage::scan_briskly;

ksm_e2e::tests![module_test:
    unloading_against_probes,
    unloading_against_a_writer,
    loading_against_exec,
    loading_against_fork,
];

/// How long a window stays open that nobody can close, as the file for that is gone already.
const LONG: Duration = Duration::from_millis(200);

/// How many forks are left alive at a time.
const FORKS: usize = 4;

/// How long a thread can wait in a probe.
const MOMENT: Duration = Duration::from_millis(10);

/// When the place was held open, as the module has told the log on its way out.
fn span_of(log: &mut Log, place: &str) -> Result<Span> {
    let lines = log.lines()?;
    let start = format!("ksm_rs: delay {place} ");
    let line = lines
        .iter()
        .find_map(|line| line.strip_prefix(&start))
        .with_context(|| format!("nobody was at {place}: {lines:#?}"))?;
    let numbers: Vec<u64> = line
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    let [_, _, from, to] = numbers[..] else {
        anyhow::bail!("{line:?}");
    };
    Ok(Span { from, to })
}

/// Two processes with a page each, that outlive the module.
struct Pair {
    one: Child,
    here: Region,
    other: Child,
    there: Region,
}

impl Pair {
    fn new() -> Result<Self> {
        let (mut one, here) = newcomer(CONTENT)?;
        let (mut other, there) = newcomer(CONTENT)?;
        advise(&mut one, here)?;
        advise(&mut other, there)?;
        Ok(Self {
            one,
            here,
            other,
            there,
        })
    }

    /// Waits until they share the page.
    fn merge(&self, ksm: &Ksm) -> Result<()> {
        scan_briskly(ksm)?;
        wait::until("the pages are merged", PATIENCE, || {
            Ok(self.one.ksm_pages(self.here)? == 1 && self.other.ksm_pages(self.there)? == 1)
        })
    }

    fn verify_unmerged(&mut self) -> Result<()> {
        for (child, region) in [(&mut self.one, self.here), (&mut self.other, self.there)] {
            child.verify(region, CONTENT)?;
            ensure!(child.ksm_pages(region)? == 0, "a page is still merged");
        }
        Ok(())
    }
}

/// Everything is undone, but the probes are there, and somebody is in one, when the module wants to go.
fn unloading_against_probes(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let mut pair = Pair::new()?;
    let mut parent = pair.one.fork()?;
    for _ in hits.rounds() {
        module::load("run=1")?;
        pair.merge(ksm)?;
        let mut log = Log::from_now()?;
        for (place, threads, limit) in [
            ("dismantled", 1, LONG),
            ("entering", 1000, MOMENT),
            ("exiting", 1000, MOMENT),
        ] {
            (ksm).write_text(
                "delays",
                &format!("{place} {} {threads}", limit.as_micros()),
            )?;
        }
        let unload = std::thread::spawn(module::unload);
        // Processes that enter and leave all the time until the module is gone.
        let mut spans = Vec::new();
        while !unload.is_finished() {
            let mut child = None;
            spans.push(Span::of(|| child = Some(parent.fork())));
            let mut child = child.context("a span without a fork")??;
            child.verify(pair.here, CONTENT)?;
            child.kill()?;
        }
        match unload.join() {
            Ok(result) => result?,
            Err(_) => anyhow::bail!("the unloader panicked"),
        }
        let open = span_of(&mut log, "dismantled")?;
        if spans.iter().any(|span| span.overlaps(open)) {
            hits.count();
        }
        pair.verify_unmerged()?;
        parent.verify(pair.here, CONTENT)?;
    }
    hits.expect(rounds())
}

fn unloading_against_a_writer(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    let mut writer = Child::spawn()?;
    let mut pair = Pair::new()?;
    for round in hits.rounds() {
        module::load("run=1")?;
        pair.merge(ksm)?;
        let mut log = Log::from_now()?;
        (ksm).write_text("delays", &format!("storing {} 1", LONG.as_micros()))?;
        let run = ["0", "1", "2"][round as usize % 3];
        writer.begin_write_file(ksm.dir().join("run"), run)?;
        wait::until("the writer is in the file", PATIENCE, || {
            let text = ksm.text("delays")?;
            Ok(text.lines().any(|line| line.starts_with("storing 1 ")))
        })?;
        let span = Span::of(|| ());
        module::unload()?;
        let answer = writer.finish_write()?;
        ensure!(answer.is_ok(), "writing {run} ended with {answer:?}");
        let gone = Span::of(|| ());
        let open = span_of(&mut log, "storing")?;
        ensure!(
            open.to <= gone.from,
            "the module has gone while somebody was in its file"
        );
        if span.overlaps(open) || (open.from <= span.from && span.to <= open.to) {
            hits.count();
        }
        pair.verify_unmerged()?;
    }
    hits.expect(rounds())
}

/// A program is being started when the module is loaded: its address space has entered before, and no task has it yet.
fn loading_against_exec(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    for _ in 0..rounds() {
        let mut file = SlowFile::mount()?;
        let mut program = Command::new(file.path());
        program.stdout(Stdio::null()).stdin(Stdio::null());
        // SAFETY: prctl may be called between fork and exec.
        unsafe {
            program.pre_exec(|| {
                match libc::prctl(libc::PR_SET_MEMORY_MERGE, 1_u64, 0_u64, 0_u64, 0_u64) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            })
        };
        let starter = std::thread::spawn(move || program.spawn());
        let size = file.wait_for_read()?;
        module::load("run=1")?;
        scan_briskly(ksm)?;
        hits.count();
        // A script: what is started in the end is a program that reads the file, and waits for that.
        let mut script = b"#!/bin/cat\n".to_vec();
        script.resize(size.min(256).max(script.len()), b'\n');
        file.answer(&script)?;
        let spawned = match starter.join() {
            Ok(spawned) => spawned,
            Err(_) => anyhow::bail!("the starter panicked"),
        };
        let mut process = spawned.context("starting the program")?;
        let pid = process.id() as i32;
        let scanned = wait::until("the new program is scanned", PATIENCE, || {
            Ok(procfs::ksm_stat(pid, "ksm_rmap_items")? > 0)
        });
        process.kill()?;
        // Who waits for a file's server does so even when killed, as long as there is one.
        drop(file);
        process.wait()?;
        scanned?;
        module::unload()?;
    }
    hits.expect(rounds())
}

/// Processes fork without end while the module is loaded: all of them are found.
fn loading_against_fork(ksm: &Ksm) -> Result<()> {
    let hits = Hits::none(ksm);
    for _ in hits.rounds() {
        let (mut parent, region) = newcomer(CONTENT)?;
        advise(&mut parent, region)?;
        let load = std::thread::spawn(|| {
            let mut result = Ok(());
            let span = Span::of(|| result = module::load("run=1"));
            result.map(|()| span)
        });
        let mut children = Vec::new();
        let mut spans = Vec::new();
        while !load.is_finished() || children.len() < FORKS {
            let mut result = None;
            spans.push(Span::of(|| result = Some(parent.fork())));
            children.push(result.context("a span without a fork")??);
            if children.len() > FORKS {
                children.remove(0).kill()?;
            }
        }
        let loading = match load.join() {
            Ok(result) => result?,
            Err(_) => anyhow::bail!("the loader panicked"),
        };
        if spans.iter().any(|span| span.overlaps(loading)) {
            hits.count();
        }
        scan_briskly(ksm)?;
        // Pages that are shared by forks merge once they are written to.
        for child in &mut children {
            child.fill(region, CONTENT)?;
        }
        let others = children.len() as u64;
        parent.fill(region, CONTENT)?;
        ksm.scan_until(Counters::merged(1, others))?;
        for child in &mut children {
            child.verify(region, CONTENT)?;
        }
        drop(children);
        drop(parent);
        module::unload()?;
    }
    hits.expect(rounds())
}
