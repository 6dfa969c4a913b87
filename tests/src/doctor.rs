//! Copies of the module that want something else than the real one: how it is refused by a kernel that does not fit.

use std::ops::Range;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;

use crate::module;

/// Size of a section header.
const SECTION_HEADER: usize = 64;

/// The module's file, to be changed before it is loaded.
#[derive(Clone, Debug)]
pub struct Image {
    bytes: Vec<u8>,
    /// Where its constants are.
    constants: Range<usize>,
}

impl Image {
    /// The file as it is.
    pub fn read() -> Result<Self> {
        let path = module::file()?;
        let bytes = std::fs::read(&path).with_context(|| path.display().to_string())?;
        let constants = section(&bytes, b".rodata").context("the module's file")?;
        Ok(Self { bytes, constants })
    }

    /// The bytes, for loading.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Replaces a constant text by another one of the same length. It must be there once.
    pub fn replace(self, old: &[u8], new: &[u8]) -> Result<Self> {
        let places = self.places_of(old);
        ensure!(
            places.len() == 1,
            "the module has the text {:?} at {places:?} instead of once",
            String::from_utf8_lossy(old)
        );
        self.overwrite(&places, old, new)
    }

    /// The same for a C string, whose terminator tells it from parts of other texts. The compiler may have made several
    /// of one; all of them are replaced.
    pub fn replace_name(self, old: &str, new: &str) -> Result<Self> {
        let terminated = |text: &str| [text.as_bytes(), &[0]].concat();
        self.replace_all(&terminated(old), &terminated(new))
    }

    /// The same for a text that is there several times, to no harm.
    pub fn replace_all(self, old: &[u8], new: &[u8]) -> Result<Self> {
        let places = self.places_of(old);
        ensure!(
            !places.is_empty(),
            "the module has no text {:?}",
            String::from_utf8_lossy(old)
        );
        self.overwrite(&places, old, new)
    }

    /// Where in the file a constant text is.
    fn places_of(&self, text: &[u8]) -> Vec<usize> {
        let found = |&at: &usize| self.bytes[at..self.constants.end].starts_with(text);
        self.constants.clone().filter(found).collect()
    }

    fn overwrite(mut self, places: &[usize], old: &[u8], new: &[u8]) -> Result<Self> {
        ensure!(old.len() == new.len(), "texts of different lengths");
        for &at in places {
            self.bytes[at..at + new.len()].copy_from_slice(new);
        }
        Ok(self)
    }

    /// Lets the module want the member of a structure 8 bytes further on; returns where it wanted it before. The lengths
    /// of the two names must tell the entry of its table from the others.
    pub fn shift_member(mut self, structure: &str, member: &str) -> Result<(Self, u64)> {
        // Two texts, each an address that is filled in at load and a length, then the offset.
        let wanted = [0, structure.len() as u64, 0, member.len() as u64];
        let constants = &self.bytes[self.constants.clone()];
        let words: Vec<u64> = constants
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")))
            .collect();
        let places: Vec<usize> = (0..words.len().saturating_sub(wanted.len()))
            .filter(|&at| words[at..].starts_with(&wanted))
            .collect();
        let [place] = places[..] else {
            bail!("the module wants {member} of {structure} at {places:?} instead of once");
        };
        let offset = words[place + wanted.len()];
        let at = self.constants.start + (place + wanted.len()) * 8;
        self.bytes[at..at + 8].copy_from_slice(&(offset + 8).to_le_bytes());
        Ok((self, offset))
    }
}

/// Where a section of a 64-bit ELF file is.
fn section(file: &[u8], name: &[u8]) -> Result<Range<usize>> {
    let number = |at: usize, len: usize| -> Result<usize> {
        let bytes = file.get(at..at + len).context("the file is too short")?;
        let mut word = [0; 8];
        word[..len].copy_from_slice(bytes);
        Ok(u64::from_le_bytes(word) as usize)
    };
    ensure!(
        file.starts_with(b"\x7fELF\x02\x01"),
        "no 64-bit ELF file of this machine's byte order"
    );
    let (headers, count, names) = (number(0x28, 8)?, number(0x3c, 2)?, number(0x3e, 2)?);
    let header = |index: usize| headers + index * SECTION_HEADER;
    let names = number(header(names) + 0x18, 8)?;
    for index in 0..count {
        let at = names + number(header(index), 4)?;
        let rest = file.get(at..).context("a name outside of the file")?;
        if rest
            .strip_prefix(name)
            .is_some_and(|rest| rest.first() == Some(&0))
        {
            let start = number(header(index) + 0x18, 8)?;
            let end = start + number(header(index) + 0x20, 8)?;
            ensure!(end <= file.len(), "a section outside of the file");
            return Ok(start..end);
        }
    }
    bail!("there is no section {}", String::from_utf8_lossy(name))
}
