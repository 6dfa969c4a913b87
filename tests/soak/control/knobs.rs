//! Files that are rewritten at random by several writers at once, and read by them.

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use ksm_e2e::Ksm;
use ksm_e2e::settings;
use nix::errno::Errno;

use crate::actor::Stage;

/// What a file says that goes with the module, or is gone.
const GONE: [Errno; 2] = [Errno::ENODEV, Errno::ENOENT];

/// What is refused wherever it is written to, and how.
const NONSENSE: [&str; 4] = ["x", "?1", " ", "=0"];
const REFUSED: [Errno; 2] = [Errno::EINVAL, Errno::ERANGE];

/// What a number may not be. A truth value goes by its first letter.
const NO_NUMBERS: [&str; 4] = ["-1", "1 2", "18446744073709551616", "0x"];

struct Knob {
    file: &'static str,
    values: &'static [&'static str],
    /// What it may answer to one of these, by reason of other knobs, or of the state that things are in.
    refusals: &'static [Errno],
}

const fn knob(
    file: &'static str,
    values: &'static [&'static str],
    refusals: &'static [Errno],
) -> Knob {
    Knob {
        file,
        values,
        refusals,
    }
}

const ADVISORS: &[&str] = &["none", "scan-time"];

const SCOPES: &[&str] = &["global", "cgroup", "user", "process"];

/// Files that show all words they take, the one that holds in brackets.
const CHOICES: [(&str, &[&str]); 2] = [("advisor_mode", ADVISORS), ("merge_scope", SCOPES)];

const TRUTH: &[&str] = &["0", "1", "y", "off"];

const KNOBS: [Knob; 14] = [
    // Not while the advisor is on.
    knob(
        "pages_to_scan",
        &["0", "1", "100", "5000", "100000", "4294967295"],
        &[Errno::EINVAL],
    ),
    knob("sleep_millisecs", &["0", "1", "20", "4294967295"], &[]),
    // Not while pages are shared.
    knob("merge_across_nodes", &["0", "1"], &[Errno::EBUSY]),
    knob(
        "max_page_sharing",
        &["2", "3", "7", "256", "2147483647"],
        &[Errno::EBUSY],
    ),
    knob("merge_scope", SCOPES, &[Errno::EBUSY]),
    knob("use_zero_pages", TRUTH, &[]),
    knob("smart_scan", TRUTH, &[]),
    knob(
        "scan_threads",
        &["1", "2", "3", "8", "64"],
        &[Errno::EINTR, Errno::ENOMEM],
    ),
    knob(
        "stable_node_chains_prune_millisecs",
        &["0", "1", "2000"],
        &[],
    ),
    knob("advisor_mode", ADVISORS, &[]),
    knob("advisor_max_cpu", &["0", "70", "100"], &[]),
    knob("advisor_min_pages_to_scan", &["0", "500", "100000"], &[]),
    knob("advisor_max_pages_to_scan", &["0", "30000"], &[]),
    knob("advisor_target_scan_time", &["1", "200"], &[]),
];

/// What makes for much merging.
const FLAT_OUT: [(&str, &str); 6] = [
    ("advisor_mode", "none"),
    ("pages_to_scan", "100000"),
    ("sleep_millisecs", "1"),
    ("smart_scan", "0"),
    ("scan_threads", "2"),
    ("run", "1"),
];

/// What `run` may answer: no memory to undo all, or a signal, that of the freezer for instance.
const RUN_REFUSALS: [Errno; 2] = [Errno::EINTR, Errno::ENOMEM];

/// Writes to a file, which may refuse with one of these.
fn write(ksm: &Ksm, file: &str, text: &str, refusals: &[Errno]) -> Result<()> {
    match ksm.write_bytes(file, text.as_bytes()) {
        Ok(taken) => ensure!(taken == text.len(), "{file} took {taken} bytes of {text:?}"),
        Err(errno) if GONE.contains(&errno) || refusals.contains(&errno) => {}
        Err(errno) => bail!("{file} refused {text:?} with {errno}"),
    }
    Ok(())
}

/// Lets the scanner scan as fast as it can. Others may say otherwise at the same time; and there may be no module.
pub fn flat_out(ksm: &Ksm) -> Result<()> {
    for (file, text) in FLAT_OUT {
        let refusals: &[Errno] = match file {
            "run" => &RUN_REFUSALS,
            "scan_threads" => &[Errno::EINTR, Errno::ENOMEM],
            // Somebody may have switched the advisor on again.
            "pages_to_scan" => &[Errno::EINVAL],
            _ => &[],
        };
        write(ksm, file, text, refusals)?;
    }
    Ok(())
}

fn write_nonsense(stage: &mut Stage, knob: &Knob) -> Result<()> {
    let words = knob.values == TRUTH || CHOICES.iter().any(|(file, _)| *file == knob.file);
    let texts: &[&str] = if words || stage.rng.bool() {
        &NONSENSE
    } else {
        &NO_NUMBERS
    };
    let text = *stage.rng.choice(texts).context("a text")?;
    match stage.ksm.write_bytes(knob.file, text.as_bytes()) {
        Err(errno) if GONE.contains(&errno) || REFUSED.contains(&errno) => Ok(()),
        other => bail!("{} answered {text:?} with {other:?}", knob.file),
    }
}

/// Whether a line has all these words in order, one of them in brackets.
fn is_choice(line: &str, words: &[&str]) -> bool {
    words.iter().any(|&chosen| {
        let shown = words.iter().map(|&word| match word {
            word if word == chosen => format!("[{word}]"),
            word => word.to_owned(),
        });
        shown.collect::<Vec<_>>().join(" ") == line
    })
}

/// Every file can be read, and contains what such a file may.
fn read_all(ksm: &Ksm) -> Result<()> {
    // A directory that goes while it is read has no files.
    for name in settings::names(ksm).unwrap_or_default() {
        let text = match ksm.text(&name) {
            Ok(text) => text,
            Err(error) => {
                let errno = (error.downcast_ref::<std::io::Error>())
                    .and_then(std::io::Error::raw_os_error)
                    .map(Errno::from_raw);
                if errno.is_some_and(|errno| GONE.contains(&errno)) {
                    continue;
                }
                return Err(error);
            }
        };
        let line = text.strip_suffix('\n').unwrap_or_default();
        let choice = CHOICES.iter().find(|(file, _)| *file == name);
        let fits = match (choice, name.as_str()) {
            (Some((_, words)), _) => is_choice(line, words),
            (_, "general_profit" | "ksm_zero_pages") => line.parse::<i64>().is_ok(),
            _ => line.parse::<u64>().is_ok(),
        };
        ensure!(fits, "{name} contains {text:?}");
    }
    Ok(())
}

/// Writes what comes to mind to any of the files.
pub fn rewrite(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(16..128);
    let region = stage.mergeable(pages)?;
    for _ in 0..stage.rng.usize(4..16) {
        let knob = stage.rng.choice(&KNOBS).context("a knob")?;
        stage.doing(knob.file);
        if stage.rng.u32(..4) == 0 {
            write_nonsense(stage, knob)?;
        }
        let value = stage.rng.choice(knob.values).context("a value")?;
        write(&stage.ksm, knob.file, value, knob.refusals)?;
        match stage.rng.u32(..8) {
            0 => read_all(&stage.ksm)?,
            1..4 => stage.dally(100),
            _ => {}
        }
    }
    flat_out(&stage.ksm)?;
    stage.let_merge(region)?;
    stage.check_all()
}

/// Stops, unmerges and goes on, in any order.
pub fn cycle_run(stage: &mut Stage) -> Result<()> {
    let pages = stage.rng.usize(64..512);
    let region = stage.mergeable(pages)?;
    stage.let_merge(region)?;
    for _ in 0..stage.rng.usize(1..5) {
        let run = *stage.rng.choice(&["0", "1", "2"]).context("a state")?;
        stage.doing(run);
        write(&stage.ksm, "run", run, &RUN_REFUSALS)?;
        stage.dally(50);
        if stage.rng.bool() {
            stage.check_all()?;
        }
    }
    flat_out(&stage.ksm)?;
    stage.let_merge(region)?;
    stage.check_all()
}
