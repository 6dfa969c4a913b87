//! What others than root may do and see: nothing of ours can be written to, and what can be read is what the kernel's own
//! KSM shows too, or says nothing of anybody's memory.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs;
use std::fs::OpenOptions;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::Child;
use ksm_e2e::Content;
use ksm_e2e::Ksm;
use ksm_e2e::Passes;
use ksm_e2e::child;
use ksm_e2e::hash_key::HashKey;
use ksm_e2e::kmsg::Log;
use ksm_e2e::ksm::OURS;
use ksm_e2e::ksm::STOCK;
use ksm_e2e::module;
use ksm_e2e::trace::Trace;
use nix::errno::Errno;
use nix::sys::stat::Mode;
use nix::unistd::Gid;
use nix::unistd::Uid;

ksm_e2e::tests![module_test:
    nobody_but_root_changes_anything,
    others_read_what_stock_shows_and_little_more,
    no_address_and_no_key_is_told,
    every_load_has_a_key_of_its_own,
];

const NOBODY: u32 = 65534;
const MODULE: &str = "/sys/module/ksm_rs";
const EVENTS: &str = "/sys/kernel/tracing/events/ksm_rs";

/// Everything below a folder, links not followed.
fn below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = vec![dir.to_owned()];
    for entry in fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if fs::symlink_metadata(&path)?.is_dir() {
            found.extend(below(&path)?);
        } else {
            found.push(path);
        }
    }
    Ok(found)
}

/// All that the module has put into the file system.
fn ours() -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for dir in [OURS, MODULE, EVENTS] {
        all.extend(below(Path::new(dir))?);
    }
    ensure!(all.len() > 100, "hardly any files: {all:?}");
    Ok(all)
}

fn become_nobody() -> Result<()> {
    nix::unistd::setgroups(&[])?;
    nix::unistd::setgid(Gid::from_raw(NOBODY))?;
    nix::unistd::setuid(Uid::from_raw(NOBODY))?;
    Ok(())
}

fn refused(what: &str, result: std::io::Result<()>) -> Result<()> {
    let errno = result.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)));
    ensure!(
        matches!(errno, Err(Errno::EACCES | Errno::EPERM)),
        "{what}: {errno:?}"
    );
    Ok(())
}

fn nobody_but_root_changes_anything(_: &Ksm) -> Result<()> {
    module::load("")?;
    let all = ours()?;
    for path in &all {
        let metadata = fs::symlink_metadata(path)?;
        ensure!(
            (metadata.uid(), metadata.gid()) == (0, 0),
            "{} is not root's",
            path.display()
        );
        ensure!(
            metadata.is_symlink() || metadata.mode() & 0o022 == 0,
            "{} has mode {:o}",
            path.display(),
            metadata.mode()
        );
    }
    let texts = || -> Result<Vec<String>> {
        let files = fs::read_dir(OURS)?;
        let mut files = files.collect::<Result<Vec<_>, _>>()?;
        files.sort_by_key(|file| file.file_name());
        let writable = |file: &fs::DirEntry| {
            file.metadata()
                .is_ok_and(|metadata| metadata.mode() & 0o222 != 0)
        };
        let text = |file: &fs::DirEntry| Ok(fs::read_to_string(file.path())?);
        files
            .iter()
            .filter(|file| writable(file))
            .map(text)
            .collect()
    };
    let before = texts()?;
    child::in_a_fork(|| {
        become_nobody()?;
        for path in &all {
            let name = path.display().to_string();
            // A folder cannot be opened for writing by anybody.
            if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file()) {
                for (how, options) in [
                    ("write", OpenOptions::new().write(true)),
                    ("append", OpenOptions::new().append(true)),
                    ("read and write", OpenOptions::new().read(true).write(true)),
                    ("truncate", OpenOptions::new().write(true).truncate(true)),
                ] {
                    refused(&format!("{how} {name}"), options.open(path).map(drop))?;
                }
            }
            refused(
                &format!("chmod {name}"),
                fs::set_permissions(path, fs::Permissions::from_mode(0o666)),
            )?;
            refused(&format!("unlink {name}"), fs::remove_file(path))?;
        }
        for dir in [OURS, MODULE, EVENTS] {
            let made = nix::unistd::mkdir(&Path::new(dir).join("new"), Mode::S_IRWXU);
            refused(
                &format!("mkdir in {dir}"),
                made.map_err(std::io::Error::from),
            )?;
        }
        Ok(())
    })?;
    ensure!(texts()? == before, "something has changed");
    Ok(())
}

/// Files below a folder that others may read, with their modes.
fn readable(dir: &str) -> Result<BTreeMap<String, u32>> {
    let dir = Path::new(dir);
    let mut files = BTreeMap::new();
    for path in below(dir)? {
        let metadata = fs::symlink_metadata(&path)?;
        if metadata.is_file() && metadata.mode() & 0o004 != 0 {
            let name = path.strip_prefix(dir)?.display().to_string();
            files.insert(name, metadata.mode());
        }
    }
    Ok(files)
}

/// What others may read of the events, by the file's name only, as ours have other names.
fn readable_of_events(dir: &str) -> Result<BTreeSet<String>> {
    let files = readable(dir)?.into_keys();
    let last = |name: String| name.rsplit('/').next().unwrap_or_default().to_owned();
    Ok(files.map(last).collect())
}

fn others_read_what_stock_shows_and_little_more(_: &Ksm) -> Result<()> {
    let stock = readable(STOCK)?;
    let stock_events = readable_of_events("/sys/kernel/tracing/events/ksm")?;
    module::load("")?;
    let mut seen = readable(OURS)?;
    // How many threads scan, which `ps` tells as well; whose pages are merged with whose; how often memory was short for us.
    for (name, mode) in [
        ("scan_threads", 0o100_644),
        ("merge_scope", 0o100_644),
        ("alloc_failures", 0o100_444),
    ] {
        ensure!(seen.remove(name) == Some(mode), "{name} has another mode");
    }
    ensure!(seen == stock, "stock: {stock:?}, ksm_rs: {seen:?}");
    let events = readable_of_events(EVENTS)?;
    ensure!(
        events.is_subset(&stock_events),
        "events: stock {stock_events:?}, ksm_rs {events:?}"
    );
    // Parameters are not to be seen at all, one of them being an address.
    ensure!(
        !Path::new(MODULE).join("parameters").exists(),
        "parameters can be read"
    );
    // All else in the module's folder is the kernel's own, the same for any module; addresses of sections are root's.
    for path in below(&Path::new(MODULE).join("sections"))? {
        let metadata = fs::symlink_metadata(&path)?;
        ensure!(
            metadata.is_dir() || metadata.mode() & 0o077 == 0,
            "{} has mode {:o}",
            path.display(),
            metadata.mode()
        );
    }
    Ok(())
}

/// Words of at least 12 hexadecimal digits, as addresses of the kernel and hashes have.
fn long_numbers(text: &str) -> Vec<u64> {
    text.split(|letter: char| !letter.is_ascii_alphanumeric())
        .map(|word| word.trim_start_matches("0x"))
        .filter(|word| word.len() >= 12)
        .filter_map(|word| u64::from_str_radix(word, 16).ok())
        .collect()
}

fn is_kernel_address(number: u64) -> bool {
    number >= 0xffff_8000_0000_0000
}

/// What merging makes the module say, in every way that it has.
fn all_that_is_said() -> Result<Vec<(String, String)>> {
    let mut said = Vec::new();
    let mut log = Log::from_now()?;
    module::load("")?;
    let ksm = Ksm::at(OURS);
    let trace = Trace::new()?;
    trace.event("ksm_rs", None)?;
    let mut other = Child::spawn()?;
    let mut one = Child::spawn()?;
    for child in [&mut one, &mut other] {
        child.map_mergeable(16, Content::Distinct(1))?;
        child.map_mergeable(4, Content::Zero)?;
    }
    ksm.write("use_zero_pages", 1)?;
    let mut passes = Passes::of(&ksm)?;
    passes.make(3)?;
    ensure!(ksm.read("pages_sharing")? > 0, "nothing was merged");
    let all = ours()?;
    let readable = child::in_a_fork(|| {
        become_nobody()?;
        let mut texts = Vec::new();
        for path in &all {
            if let Ok(text) = fs::read_to_string(path) {
                texts.push((path.display().to_string(), text));
            }
        }
        Ok(texts)
    })?;
    ensure!(readable.len() > 20, "nobody could read anything");
    said.extend(readable);
    one.kill()?;
    ksm.unmerge()?;
    let lines = trace.lines()?;
    ensure!(lines.len() > 50, "hardly any events: {lines:#?}");
    drop(trace);
    said.push(("events".to_owned(), lines.join("\n")));
    drop(other);
    module::unload()?;
    let lines = log.lines()?.into_iter().filter(|line| line.contains("ksm"));
    said.push(("the log".to_owned(), lines.collect::<Vec<_>>().join("\n")));
    Ok(said)
}

fn no_address_and_no_key_is_told(_: &Ksm) -> Result<()> {
    let said = all_that_is_said()?;
    let mut pointers = 0;
    for (place, text) in &said {
        for number in long_numbers(text) {
            ensure!(
                !is_kernel_address(number),
                "{place} tells the address {number:#x}"
            );
            pointers += 1;
        }
    }
    // The events have pointers, but as the kernel prints them for everybody: hashed with a key of its own.
    ensure!(pointers > 10, "there was nothing to be seen at all");
    Ok(())
}

fn every_load_has_a_key_of_its_own(_: &Ksm) -> Result<()> {
    let mut keys = BTreeSet::new();
    for _ in 0..3 {
        module::load("")?;
        keys.insert(HashKey::of_the_module()?.secrets());
        module::unload()?;
    }
    ensure!(keys.len() == 3, "keys are used again: {keys:x?}");
    Ok(())
}
