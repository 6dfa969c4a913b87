//! Runs each test in a process of its own, with a time limit, and looks after the system between tests.

use std::fs;
use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::panic::AssertUnwindSafe;
use std::panic::catch_unwind;
use std::thread::sleep;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use libtest_mimic::Failed;
use libtest_mimic::Trial;
use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::signal::killpg;
use nix::sys::wait::WaitPidFlag;
use nix::sys::wait::WaitStatus;
use nix::sys::wait::waitpid;
use nix::unistd::ForkResult;
use nix::unistd::Pid;
use nix::unistd::fork;
use nix::unistd::setpgid;

use crate::hotplug;
use crate::kmsg::Log;
use crate::ksm::Ksm;
use crate::ksm::STOCK;
use crate::module;
use crate::procfs;
use crate::swap;
use crate::wait;

/// How long a test may take on a fast kernel.
const LIMIT: Duration = Duration::from_secs(120);

/// How long it may take to leave the system as it was.
const CLEANUP_LIMIT: Duration = Duration::from_secs(60);

/// What a test is: a function that is given the KSM under test.
pub type Body = fn(&Ksm) -> Result<()>;

/// Prepares this process for running tests: lost grandchildren become its children, so that it can reap them.
pub fn prepare_process() -> Result<()> {
    // SAFETY: The call takes integers only.
    Errno::result(unsafe {
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1_u64, 0_u64, 0_u64, 0_u64)
    })?;
    Ok(())
}

/// Defines a function `tests` that returns the named functions of the module as tests made with [`test`].
#[macro_export]
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        $crate::tests!(test: $($name),*);
    };
    ($kind:ident: $($name:ident),* $(,)?) => {
        pub fn tests() -> Vec<libtest_mimic::Trial> {
            vec![$($crate::runner::$kind(concat!(module_path!(), "::", stringify!($name)), $name)),*]
        }
    };
}

/// The name to show: without the name of the test program.
fn short(name: &str) -> &str {
    name.split_once("::").map_or(name, |(_, short)| short)
}

/// A test that needs KSM for itself: its knobs are set for fast scanning before, and restored after.
pub fn test(name: &'static str, body: Body) -> Trial {
    Trial::test(short(name), move || {
        run(|ksm| {
            let restore = ksm.prepare()?;
            body(ksm)?;
            restore.finish()
        })
    })
}

/// A test that finds everything as it is when nobody has used KSM.
pub fn untouched_test(name: &'static str, body: Body) -> Trial {
    Trial::test(short(name), move || run(body))
}

/// A test that loads and unloads the module itself. It begins with the module unloaded.
pub fn module_test(name: &'static str, body: Body) -> Trial {
    Trial::test(short(name), move || {
        run(|ksm| {
            if module::loaded()? {
                module::unload()?;
            }
            body(ksm)
        })
    })
}

fn run(body: impl Fn(&Ksm) -> Result<()>) -> Result<(), Failed> {
    let ksm = Ksm::from_env();
    let start = Instant::now();
    let outcome = watched(&ksm, &body);
    // The test may have died half-way: what follows is its own fault, and must not become its successors'.
    let cleanup =
        isolated(CLEANUP_LIMIT, || clean_up(&ksm)).context("the test left the system in disorder");
    let outcome = match (outcome, cleanup) {
        (Ok(()), Ok(())) => Ok(()),
        (Err(error), Ok(())) | (Ok(()), Err(error)) => Err(format!("{error:#}")),
        (Err(error), Err(also)) => Err(format!("{error:#}\nand {also:#}")),
    };
    // The harness tells what went wrong at the very end only, which a machine that hangs does not reach.
    if let Err(error) = &outcome {
        eprint!("{error}\n... ");
    }
    if std::env::var_os("KSM_E2E_TIMES").is_some() {
        eprint!("{:.1} s ", start.elapsed().as_secs_f64());
    }
    outcome.map_err(Failed::from)
}

fn watched(ksm: &Ksm, body: &impl Fn(&Ksm) -> Result<()>) -> Result<()> {
    let mut log = Log::from_now()?;
    let result = isolated(LIMIT, || body(ksm));
    let reports = log.reports()?;
    ensure!(
        reports.is_empty(),
        "the kernel reported faults: {reports:#?}; the test itself: {result:?}"
    );
    result
}

/// Leaves the system so that another test can begin: all memory online, the module loaded, nothing merged, no swap.
fn clean_up(ksm: &Ksm) -> Result<()> {
    hotplug::bring_back()?;
    if !ksm.is_stock() && !module::loaded()? {
        // Nothing may be in stock's hands when the module takes over.
        let stock = Ksm::at(STOCK);
        stock.unmerge()?;
        stock.stop()?;
        module::load("")?;
    }
    ksm.unmerge()?;
    let counters = ksm.counters()?;
    ensure!(
        counters.shared == 0 && counters.sharing == 0,
        "after run=2 there are still merged pages: {counters}"
    );
    if ksm.has("merge_scope") {
        ksm.write_text("merge_scope", "global")?;
    }
    ksm.stop()?;
    let swaps = swap::in_use()?;
    ensure!(swaps.is_empty(), "swap was left on: {swaps:?}");
    Ok(())
}

/// Runs a function in a forked process group and fails if it fails, dies or does not end in time. All processes
/// of the group are gone when this returns.
fn isolated(limit: Duration, body: impl Fn() -> Result<()>) -> Result<()> {
    let limit = limit * wait::slowness();
    let (mut near, mut far) = UnixStream::pair()?;
    // SAFETY: The runner has one thread only, so the child may do whatever the parent may.
    let child = match unsafe { fork() }.context("fork")? {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            drop(near);
            let _ = setpgid(Pid::from_raw(0), Pid::from_raw(0));
            let result = catch_unwind(AssertUnwindSafe(&body)).unwrap_or_else(|panic| {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                bail!(
                    "panicked: {}",
                    text.or_else(|| panic.downcast_ref().copied())
                        .unwrap_or("?")
                )
            });
            if let Err(error) = &result {
                let _ = far.write_all(format!("{error:#}").as_bytes());
            }
            // SAFETY: _exit may be called at any time; the runner's own tidying up is not for this process.
            unsafe { libc::_exit(i32::from(result.is_err())) }
        }
    };
    drop(far);
    // Both sides do this, for nobody knows which runs first.
    let _ = setpgid(child, child);
    let ended = wait_for(child, limit)?;
    let stuck = if ended.is_none() {
        where_things_are(child)
    } else {
        String::new()
    };
    let _ = killpg(child, Signal::SIGKILL);
    let ended = match ended {
        Some(status) => Some(status),
        None => wait_for(child, CLEANUP_LIMIT)?,
    };
    reap_group(child)?;
    ensure!(
        stuck.is_empty(),
        "still running after {limit:?}; it was killed. {stuck}"
    );
    match ended {
        Some(WaitStatus::Exited(_, 0)) => Ok(()),
        Some(WaitStatus::Exited(_, _)) => {
            let mut error = String::new();
            near.set_nonblocking(true)?;
            // Ends with an error for want of more to read, when a helper that escaped still holds the other end.
            let _ = near.read_to_string(&mut error);
            bail!("{error}")
        }
        other => bail!("the test's process ended with {other:?}"),
    }
}

fn wait_for(child: Pid, limit: Duration) -> Result<Option<WaitStatus>> {
    let start = Instant::now();
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)).context("waitpid")? {
            WaitStatus::StillAlive if start.elapsed() > limit => return Ok(None),
            WaitStatus::StillAlive => sleep(Duration::from_millis(5)),
            status => return Ok(Some(status)),
        }
    }
}

/// Waits until no process of the group is left.
fn reap_group(group: Pid) -> Result<()> {
    wait::until("the test's helpers are gone", CLEANUP_LIMIT, || {
        let any = Pid::from_raw(-group.as_raw());
        while !matches!(
            waitpid(any, Some(WaitPidFlag::WNOHANG)),
            Ok(WaitStatus::StillAlive) | Err(_)
        ) {}
        Ok(killpg(group, Signal::SIGKILL) == Err(Errno::ESRCH))
    })
}

/// Kernel stacks of the processes that may be to blame for a test that hangs.
fn where_things_are(group: Pid) -> String {
    let mut suspects = vec![group.as_raw()];
    for name in ["ksmd_rs", "ksmd"] {
        suspects.extend(procfs::pid_of(name).ok().flatten());
    }
    if let Ok(children) = fs::read_to_string(format!("/proc/{group}/task/{group}/children")) {
        suspects.extend(
            children
                .split_whitespace()
                .filter_map(|pid| pid.parse::<i32>().ok()),
        );
    }
    let mut text = String::from("Kernel stacks:");
    for pid in suspects {
        let read =
            |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        text += &format!(
            "\n{pid} {} {}\n{}",
            read("comm").trim_end(),
            read("wchan"),
            read("stack")
        );
    }
    text
}
