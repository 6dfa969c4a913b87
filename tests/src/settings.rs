//! All files of a producer's directory at once: their values, and bringing back those that were changed.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;

use crate::ksm::Ksm;

/// The file that says whether an advisor sets `pages_to_scan`, which cannot be written then; and what it contains
/// when none does.
const ADVISOR: &str = "advisor_mode";
const NO_ADVISOR: &str = "none";

/// The text of every file.
pub type Values = BTreeMap<String, String>;

/// The names of the files in a directory.
pub fn names(ksm: &Ksm) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(ksm.dir()).with_context(|| ksm.dir().display().to_string())? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// What has to be written to a file for it to show a text: the text, or the choice in brackets.
pub fn to_write(text: &str) -> &str {
    let text = text.trim_end();
    match text.split_once('[') {
        Some((_, rest)) => rest.split_once(']').map_or(text, |(choice, _)| choice),
        None => text,
    }
}

/// Files that are kept open, to be read again and again.
#[derive(Debug)]
pub struct Files {
    ksm: Ksm,
    files: BTreeMap<String, File>,
    writable: BTreeSet<String>,
}

impl Files {
    /// Opens those of the named files that there are.
    pub fn open(ksm: &Ksm, names: &[String]) -> Result<Self> {
        let mut files = BTreeMap::new();
        for name in names {
            if ksm.has(name) {
                let path = ksm.dir().join(name);
                let file = File::open(&path).with_context(|| path.display().to_string())?;
                files.insert(name.clone(), file);
            }
        }
        let writable = files.keys().filter(|name| ksm.writable(name));
        Ok(Self {
            ksm: ksm.clone(),
            writable: writable.cloned().collect(),
            files,
        })
    }

    /// The text of every file.
    pub fn values(&self) -> Result<Values> {
        let mut buffer = [0; 4096];
        let mut values = Values::new();
        for (name, file) in &self.files {
            let len = file
                .read_at(&mut buffer, 0)
                .with_context(|| format!("reading {name}"))?;
            values.insert(
                name.clone(),
                String::from_utf8_lossy(&buffer[..len]).into_owned(),
            );
        }
        Ok(values)
    }

    /// The names of those that somebody may write to.
    pub fn writable(&self) -> impl Iterator<Item = &String> {
        self.writable.iter()
    }

    fn wrong(&self, wanted: &Values) -> Result<Vec<String>> {
        let values = self.values()?;
        let wrong = |name: &&String| wanted.contains_key(*name) && values[*name] != wanted[*name];
        Ok(self.writable().filter(wrong).cloned().collect())
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let result = self.ksm.write_bytes(name, text.as_bytes());
        let written = result.with_context(|| format!("writing {text:?} to {name}"))?;
        ensure!(
            written == text.len(),
            "{name} took only {written} bytes of {text:?}"
        );
        Ok(())
    }

    /// Writes to those writable files that do not have these values.
    pub fn restore(&self, wanted: &Values) -> Result<()> {
        if self.wrong(wanted)?.is_empty() {
            return Ok(());
        }
        let advisor = wanted
            .get(ADVISOR)
            .filter(|_| self.writable.contains(ADVISOR));
        if advisor.is_some() {
            self.write(ADVISOR, NO_ADVISOR)?;
        }
        for name in self.wrong(wanted)? {
            if name != ADVISOR {
                self.write(&name, to_write(&wanted[&name]))?;
            }
        }
        if let Some(advisor) = advisor {
            self.write(ADVISOR, to_write(advisor))?;
        }
        let wrong = self.wrong(wanted)?;
        ensure!(
            wrong.is_empty(),
            "{wrong:?} cannot be brought back to {wanted:?}"
        );
        Ok(())
    }

    /// Gives as many files as possible another value, and returns what they all contain then.
    pub fn change_all(&self) -> Result<Values> {
        const CANDIDATES: [&str; 5] = ["2", "0", "1", "3", "scan-time"];
        let before = self.values()?;
        // An advisor changes another file, so it comes last.
        let (last, first): (Vec<_>, Vec<_>) = self.writable().partition(|name| *name == ADVISOR);
        for name in first.into_iter().chain(last) {
            for candidate in CANDIDATES {
                let taken = self.ksm.write_bytes(name, candidate.as_bytes()).is_ok();
                if taken && self.ksm.text(name)? != before[name] {
                    break;
                }
            }
        }
        self.values()
    }
}

/// The settings of a producer, brought back when this is dropped.
#[derive(Debug)]
pub struct Settings {
    files: Files,
    values: Values,
    done: bool,
}

impl Settings {
    /// Remembers all settings.
    pub fn remember(ksm: &Ksm) -> Result<Self> {
        let files = Files::open(ksm, &names(ksm)?)?;
        let values = files.values()?;
        Ok(Self {
            files,
            values,
            done: false,
        })
    }

    /// Unmerges everything and brings the settings back.
    pub fn bring_back(mut self) -> Result<()> {
        self.done = true;
        self.undo()
    }

    fn undo(&self) -> Result<()> {
        // Some settings change only while nothing is merged.
        self.files.ksm.unmerge()?;
        self.files.restore(&self.values)
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        if !self.done
            && let Err(error) = self.undo()
        {
            eprintln!("bringing settings back failed: {error:#}");
        }
    }
}

/// What differs between two readings of the files: `name="text"` of the later one.
pub fn changes(before: &Values, after: &Values) -> String {
    let mut text = String::new();
    for (name, value) in after {
        if before.get(name) != Some(value) {
            let _ = write!(text, " {name}={value:?}");
        }
    }
    for name in before.keys().filter(|name| !after.contains_key(*name)) {
        let _ = write!(text, " {name} is gone");
    }
    text
}
