//! The sysfs directory of a producer of KSM pages.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::path::PathBuf;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use nix::errno::Errno;

use crate::wait;
use crate::wait::PATIENCE;

/// Where ksm_rs has its files.
pub const OURS: &str = "/sys/kernel/mm/ksm_rs";

/// Where the kernel's own KSM has its files.
pub const STOCK: &str = "/sys/kernel/mm/ksm";

/// The writable files whose values a test may change, in an order in which they can be restored.
const KNOBS: [&str; 12] = [
    "pages_to_scan",
    "sleep_millisecs",
    "merge_across_nodes",
    "max_page_sharing",
    "use_zero_pages",
    "stable_node_chains_prune_millisecs",
    "smart_scan",
    "advisor_max_cpu",
    "advisor_min_pages_to_scan",
    "advisor_max_pages_to_scan",
    "advisor_target_scan_time",
    "scan_threads",
];

/// `run`: the thread rests and merged pages stay merged.
pub const STOP: u64 = 0;

/// What stock's `run` says beside the rest while memory goes offline.
const OFFLINING: u64 = 4;

/// `run`: the thread scans and merges.
pub const MERGE: u64 = 1;

/// `run`: the thread rests and every merged page is made private.
pub const UNMERGE: u64 = 2;

/// The counters of the directory, read one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Pages that are shared.
    pub shared: u64,
    /// Mappings of those pages beyond the first of each: the pages saved.
    pub sharing: u64,
    /// Pages that were compared and found unique.
    pub unshared: u64,
    /// Pages known to the producer that are none of the above.
    pub volatile: u64,
}

impl Counters {
    /// Counters of a system in which `shared` pages stand for `shared + sharing` and nothing else was found.
    pub fn merged(shared: u64, sharing: u64) -> Self {
        Self {
            shared,
            sharing,
            unshared: 0,
            volatile: 0,
        }
    }

    /// The same with `unshared` unique pages.
    pub fn and_unshared(self, unshared: u64) -> Self {
        Self { unshared, ..self }
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            shared,
            sharing,
            unshared,
            volatile,
        } = self;
        write!(
            f,
            "shared {shared}, sharing {sharing}, unshared {unshared}, volatile {volatile}"
        )
    }
}

/// A directory with KSM's files.
#[derive(Clone, Debug)]
pub struct Ksm {
    dir: PathBuf,
}

impl Ksm {
    /// The directory that the environment variable `KSM_DIR` names, or else that of ksm_rs.
    pub fn from_env() -> Self {
        Self::at(std::env::var_os("KSM_DIR").map_or_else(|| PathBuf::from(OURS), PathBuf::from))
    }

    /// The directory `dir`.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Where the files are.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether this is the kernel's own KSM under its usual name.
    pub fn is_stock(&self) -> bool {
        self.dir == Path::new(STOCK)
    }

    /// Whether the directory is there.
    pub fn exists(&self) -> bool {
        self.dir.join("run").exists()
    }

    /// Whether there is a file of that name.
    pub fn has(&self, file: &str) -> bool {
        self.dir.join(file).exists()
    }

    /// Whether somebody may write to a file of that name.
    pub fn writable(&self, file: &str) -> bool {
        let metadata = fs::metadata(self.dir.join(file));
        metadata.is_ok_and(|metadata| metadata.mode() & 0o222 != 0)
    }

    /// The whole text of a file.
    pub fn text(&self, file: &str) -> Result<String> {
        let path = self.dir.join(file);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }

    /// The number in a file.
    pub fn read(&self, file: &str) -> Result<u64> {
        let text = self.text(file)?;
        text.trim_end()
            .parse()
            .with_context(|| format!("{file} contains {text:?}"))
    }

    /// The number in a file that may be negative.
    pub fn read_signed(&self, file: &str) -> Result<i64> {
        let text = self.text(file)?;
        text.trim_end()
            .parse()
            .with_context(|| format!("{file} contains {text:?}"))
    }

    /// Writes bytes with a single `write(2)`, as `echo` does, and returns what the kernel returned.
    pub fn write_bytes(&self, file: &str, bytes: &[u8]) -> Result<usize, Errno> {
        let errno = |error: io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(0));
        let mut file = fs::OpenOptions::new()
            .write(true)
            .open(self.dir.join(file))
            .map_err(errno)?;
        file.write(bytes).map_err(errno)
    }

    /// Writes a number.
    pub fn write(&self, file: &str, value: u64) -> Result<()> {
        self.write_text(file, &value.to_string())
    }

    /// Writes a line.
    pub fn write_text(&self, file: &str, value: &str) -> Result<()> {
        let text = format!("{value}\n");
        let written = self
            .write_bytes(file, text.as_bytes())
            .with_context(|| format!("writing {value} to {file}"))?;
        ensure!(
            written == text.len(),
            "writing {value} to {file}: only {written} bytes were taken"
        );
        Ok(())
    }

    /// The names of all files, and for each its mode and what it contains.
    pub fn snapshot(&self) -> Result<BTreeMap<String, (u32, String)>> {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(&self.dir).with_context(|| self.dir.display().to_string())? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let text = self.text(&name)?;
            files.insert(name, (entry.metadata()?.mode(), text));
        }
        Ok(files)
    }

    /// Reads the counters.
    pub fn counters(&self) -> Result<Counters> {
        Ok(Counters {
            shared: self.read("pages_shared")?,
            sharing: self.read("pages_sharing")?,
            unshared: self.read("pages_unshared")?,
            volatile: self.read("pages_volatile")?,
        })
    }

    /// Lets the thread scan.
    pub fn start(&self) -> Result<()> {
        self.write("run", MERGE)
    }

    /// Lets the thread rest; what is merged stays so. No page is being scanned when this returns.
    pub fn stop(&self) -> Result<()> {
        self.write("run", STOP)
    }

    /// Makes every page private.
    pub fn unmerge(&self) -> Result<()> {
        self.write("run", UNMERGE)
    }

    /// A pass over everything at each of many short intervals: how the tests scan unless they need something else.
    pub fn scan_fast(&self) -> Result<()> {
        self.write("pages_to_scan", 100_000)?;
        self.write("sleep_millisecs", 5)
    }

    /// Scans without any pause.
    pub fn scan_at_full_speed(&self) -> Result<()> {
        self.write("pages_to_scan", 100_000)?;
        self.write("sleep_millisecs", 0)
    }

    /// Waits until the counters are exactly as wanted. The thread must be scanning.
    pub fn scan_until(&self, wanted: Counters) -> Result<()> {
        wait::until_or_explain("the counters are right", PATIENCE, || {
            let seen = self.counters()?;
            Ok((seen != wanted).then(|| format!("wanted {wanted}; seen {seen}")))
        })
    }

    /// Makes a whole pass and then more until the counters are exactly as wanted, stops the thread and looks again.
    pub fn merge_until(&self, wanted: Counters) -> Result<()> {
        self.start()?;
        // The counters may look right before the thread has heard of what was changed.
        self.full_scans(1)?;
        self.scan_until(wanted)?;
        self.stop()?;
        self.expect(wanted)
    }

    /// Fails unless the counters are exactly as wanted now.
    pub fn expect(&self, wanted: Counters) -> Result<()> {
        let seen = self.counters()?;
        ensure!(seen == wanted, "counters: wanted {wanted}; seen {seen}");
        Ok(())
    }

    /// Waits until `passes` whole passes have been made that began after the call. The thread must be scanning,
    /// and there must be something to scan.
    pub fn full_scans(&self, passes: u64) -> Result<()> {
        // The pass that is under way does not count.
        let wanted = self.read("full_scans")? + passes + 1;
        wait::until_or_explain("enough passes have been made", PATIENCE, || {
            let seen = self.read("full_scans")?;
            Ok((seen < wanted).then(|| format!("full_scans is {seen}, wanted {wanted}")))
        })
    }

    /// Starts the thread, waits for whole passes, stops it.
    pub fn scan_passes(&self, passes: u64) -> Result<()> {
        self.start()?;
        self.full_scans(passes)?;
        self.stop()
    }

    /// Remembers the knobs, to have them restored when the value is dropped.
    pub fn remember(&self) -> Result<Restore> {
        let knobs = KNOBS.into_iter().filter(|knob| self.has(knob));
        let knobs = knobs
            .map(|knob| Ok((knob, self.read(knob)?)))
            .collect::<Result<_>>()?;
        Ok(Restore {
            ksm: self.clone(),
            knobs,
            run: self.read("run")? & !OFFLINING,
            done: false,
        })
    }

    /// Prepares a test: remembers the knobs, insists that nothing is shared, sets a fast pace, and turns off
    /// smart scanning where it exists, for it makes the number of passes until a merge hard to predict.
    pub fn prepare(&self) -> Result<Restore> {
        let restore = self.remember()?;
        let counters = self.counters()?;
        ensure!(
            counters.shared == 0 && counters.sharing == 0 && self.read("run")? != MERGE,
            "KSM is in use before the test begins: {counters}"
        );
        if self.has("smart_scan") {
            self.write("smart_scan", 0)?;
        }
        self.scan_fast()?;
        Ok(restore)
    }
}

/// Restores the knobs and the run state of a [`Ksm`].
#[derive(Debug)]
pub struct Restore {
    ksm: Ksm,
    knobs: Vec<(&'static str, u64)>,
    run: u64,
    done: bool,
}

impl Restore {
    /// Makes every page private, restores the knobs and the run state, and fails if anything is still shared.
    pub fn finish(mut self) -> Result<()> {
        self.restore()
    }

    fn restore(&mut self) -> Result<()> {
        self.done = true;
        if !self.ksm.exists() {
            bail!("{} is gone", self.ksm.dir.display());
        }
        self.ksm.unmerge()?;
        let counters = self.ksm.counters()?;
        ensure!(
            counters == Counters::merged(0, 0),
            "run=2 left something: {counters}"
        );
        if self.ksm.has("advisor_mode") {
            // As long as it is on, nobody else may write to pages_to_scan.
            self.ksm.write_text("advisor_mode", "none")?;
        }
        if self.ksm.has("merge_scope") {
            self.ksm.write_text("merge_scope", "global")?;
        }
        for (knob, value) in &self.knobs {
            self.ksm.write(knob, *value)?;
        }
        self.ksm.write("run", self.run)
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        if !self.done
            && let Err(error) = self.restore()
        {
            eprintln!("restoring the knobs failed: {error:#}");
        }
    }
}
