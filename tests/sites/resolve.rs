//! From addresses in the module to lines of its source.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

/// An allocation that was made to fail.
pub struct Failure {
    /// File and line of the innermost call in the module's own source.
    pub place: (String, usize),
}

/// A section of the module, and an offset in it.
type Address = (String, u64);

/// Reads lines like `failed slab 17: .text+0x123 .text+0x45`, the innermost caller first.
pub fn failures(log: &str, module: &Path, top: &Path) -> Result<Vec<Failure>> {
    let mut stacks = Vec::new();
    for line in log.lines() {
        let Some((_, frames)) = line
            .strip_prefix("failed ")
            .and_then(|line| line.split_once(": "))
        else {
            continue;
        };
        let stack = frames.split_whitespace().map(address);
        stacks.push((line, stack.collect::<Result<Vec<_>>>()?));
    }
    ensure!(!stacks.is_empty(), "the log has no failure in it");
    let all: BTreeSet<&Address> = stacks.iter().flat_map(|(_, stack)| stack).collect();
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

fn address(text: &str) -> Result<Address> {
    let (section, offset) = text.split_once("+0x").context("section+0xoffset")?;
    Ok((section.to_owned(), u64::from_str_radix(offset, 16)?))
}

/// For each return address the innermost line of our Rust source that it belongs to, if any.
fn lines(
    all: &BTreeSet<&Address>,
    module: &Path,
    top: &Path,
) -> Result<BTreeMap<Address, (String, usize)>> {
    let mut sections: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for (section, offset) in all {
        sections.entry(section).or_default().push(*offset);
    }
    let mut lines = BTreeMap::new();
    for (section, offsets) in sections {
        // The call is before the address that it returns to.
        let calls = offsets.iter().map(|offset| format!("{:#x}", offset - 1));
        let output = Command::new("addr2line")
            .args(["--addresses", "--inlines", "--section", section, "--exe"])
            .arg(module)
            .args(calls)
            .output()
            .context("addr2line, of binutils")?;
        ensure!(output.status.success(), "addr2line: {}", output.status);
        let mut at = None;
        for line in String::from_utf8(output.stdout)?.lines() {
            if let Some(call) = line.strip_prefix("0x") {
                at = Some((section.to_owned(), u64::from_str_radix(call, 16)? + 1));
                continue;
            }
            let address = at.clone().context("addr2line: no address")?;
            if let Some(place) = ours(line, top) {
                lines.entry(address).or_insert(place);
            }
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
