//! From addresses in the module to lines of its source.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

/// Tells lines from addresses. That of binutils 2.40 does not see what clang and rustc have inlined.
const ADDR2LINE: &str = "llvm-addr2line-19";

/// An allocation that was made to fail.
pub struct Failure {
    /// File and line of the innermost call in the module's own source.
    pub place: (String, usize),
}

/// Reads lines like `failed slab 17 in a life: 0x123 0x45`: where the callers return to in the module's code, the innermost
/// first.
pub fn failures(log: &str, module: &Path, top: &Path) -> Result<Vec<Failure>> {
    let mut stacks = Vec::new();
    for line in log.lines() {
        let Some((_, addresses)) = line
            .strip_prefix("failed ")
            .and_then(|line| line.split_once(": "))
        else {
            continue;
        };
        let stack = addresses.split_whitespace().map(number);
        stacks.push((line, stack.collect::<Result<Vec<_>>>()?));
    }
    ensure!(!stacks.is_empty(), "the log has no failure in it");
    let all: BTreeSet<u64> = stacks.iter().flat_map(|(_, stack)| stack.clone()).collect();
    let lines = lines(&all, module, top)?;
    let mut failures = Vec::new();
    for (line, stack) in &stacks {
        // A function of the core's that was not inlined has no line of ours.
        let place = stack.iter().find_map(|address| lines.get(address));
        let place = place.with_context(|| format!("no line of the module's source: {line:?}"))?;
        failures.push(Failure {
            place: place.clone(),
        });
    }
    Ok(failures)
}

fn number(text: &str) -> Result<u64> {
    let digits = text.strip_prefix("0x");
    Ok(u64::from_str_radix(digits.context("0x")?, 16)?)
}

/// For each address the innermost line of our Rust source that it belongs to, if any.
fn lines(all: &BTreeSet<u64>, module: &Path, top: &Path) -> Result<BTreeMap<u64, (String, usize)>> {
    // The call is before the address that it returns to.
    let calls = all.iter().map(|address| format!("{:#x}", address - 1));
    let output = Command::new(ADDR2LINE)
        .args(["--addresses", "--inlines", "--exe"])
        .arg(module)
        .args(calls)
        .output()
        .with_context(|| format!("{ADDR2LINE}, of the compiler of the debug kernel"))?;
    ensure!(output.status.success(), "{ADDR2LINE}: {}", output.status);
    let mut lines = BTreeMap::new();
    let mut at = None;
    for line in String::from_utf8(output.stdout)?.lines() {
        if line.starts_with("0x") {
            at = Some(number(line)? + 1);
            continue;
        }
        let address = at.with_context(|| format!("{ADDR2LINE}: no address"))?;
        if let Some(place) = ours(line, top) {
            lines.entry(address).or_insert(place);
        }
    }
    Ok(lines)
}

/// The place, if it is in Rust source of the module's: the calls of the core that C makes are one-line wrappers.
fn ours(line: &str, top: &Path) -> Option<(String, usize)> {
    let (file, line) = line
        .split_once(" (")
        .map_or(line, |(place, _)| place)
        .rsplit_once(':')?;
    let file = Path::new(file).strip_prefix(top).ok()?;
    let rust = file.extension().is_some_and(|extension| extension == "rs");
    Some((
        rust.then(|| file.display().to_string())?,
        line.parse().ok()?,
    ))
}
