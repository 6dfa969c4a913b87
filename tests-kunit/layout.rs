// SPDX-License-Identifier: GPL-2.0

//! Tests of the layout proof.

#![forbid(unsafe_code)]

use crate::{
    btf::{
        Btf,
        BtfError, //
    },
    layout::{
        prove,
        prove_sizes,
        Mismatch,
        Wanted,
        WantedSize, //
    },
};
use kernel::{
    fmt,
    prelude::*, //
};

/// BTF of `struct one { int a; int b; }` and `struct two { int c; }`, with the given offset of `b`
/// in bytes.
fn blob(b: u32) -> Result<KVec<u8>> {
    let strings = b"\0int\0one\0a\0b\0two\0c\0";
    let types = [
        // 1: the integer.
        [1, 1 << 24, 4],
        [32, 5, 4 << 24 | 2],
        [8, 9, 1],
        [0, 11, 1],
        [b * 8, 13, 4 << 24 | 1],
        [4, 17, 1],
    ];
    // The integer has a word more than three, so that all others are shifted by one.
    let last = 0u32;
    let len = (types.len() * 12 + 4) as u32;

    let mut blob = KVec::new();
    blob.extend_from_slice(&0xeb9f_u16.to_ne_bytes(), GFP_KERNEL)?;
    blob.extend_from_slice(&[1, 0], GFP_KERNEL)?;
    let header = [24, 0, len, len, strings.len() as u32];
    for words in [header.as_slice(), types.as_flattened(), &[last]] {
        for word in words {
            blob.extend_from_slice(&word.to_ne_bytes(), GFP_KERNEL)?;
        }
    }
    blob.extend_from_slice(strings, GFP_KERNEL)?;
    Ok(blob)
}

const fn wanted(structure: &'static str, field: &'static str, offset: usize) -> Wanted {
    Wanted {
        structure,
        field,
        offset,
    }
}

/// What is true of `blob(4)`.
const WANTED: [Wanted; 3] = [
    wanted("one", "a", 0),
    wanted("one", "b", 4),
    wanted("two", "c", 0),
];

/// A line of text.
struct Line {
    text: [u8; 128],
    len: usize,
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.len + text.len();
        self.text
            .get_mut(self.len..end)
            .ok_or(fmt::Error)?
            .copy_from_slice(text.as_bytes());
        self.len = end;
        Ok(())
    }
}

/// Returns whether a mismatch displays as `expected`.
fn displays_as(mismatch: &Mismatch, expected: &str) -> bool {
    use fmt::Write;

    let mut line = Line {
        text: [0; 128],
        len: 0,
    };
    line.write_fmt(kernel::prelude::fmt!("{mismatch}")).is_ok()
        && line.text.get(..line.len) == Some(expected.as_bytes())
}

#[kunit_tests(ksm_rs_layout)]
mod tests {
    use super::*;

    #[test]
    fn good() -> Result {
        let blob = blob(4)?;
        let btf = Btf::parse(&blob).map_err(|_| EINVAL)?;
        assert_eq!(prove(&btf, &WANTED), Ok(()));
        assert_eq!(prove(&btf, &[]), Ok(()));
        let sizes = [
            WantedSize {
                structure: "one",
                size: 8,
            },
            WantedSize {
                structure: "two",
                size: 4,
            },
        ];
        assert_eq!(prove_sizes(&btf, &sizes), Ok(()));
        Ok(())
    }

    #[test]
    fn other_offset() -> Result {
        let blob = blob(6)?;
        let btf = Btf::parse(&blob).map_err(|_| EINVAL)?;
        let mismatch = prove(&btf, &WANTED).err().ok_or(EINVAL)?;
        assert!(
            mismatch
                == Mismatch::Offset {
                    structure: "one",
                    field: "b",
                    found: 6,
                    wanted: 4
                }
        );
        assert!(displays_as(
            &mismatch,
            "struct one: b found at offset 6, wanted at offset 4"
        ));
        Ok(())
    }

    #[test]
    fn each_entry_counts() -> Result {
        let blob = blob(4)?;
        let btf = Btf::parse(&blob).map_err(|_| EINVAL)?;
        for at in 0..WANTED.len() {
            let mut wanted = WANTED;
            let Some(entry) = wanted.get_mut(at) else {
                continue;
            };
            entry.offset += 1;
            assert!(prove(&btf, &wanted).is_err());
            // The high bits are not cut off.
            let mut wanted = WANTED;
            let Some(entry) = wanted.get_mut(at) else {
                continue;
            };
            entry.offset |= 1 << 32;
            assert!(prove(&btf, &wanted).is_err());
        }
        Ok(())
    }

    #[test]
    fn missing() -> Result {
        let blob = blob(4)?;
        let btf = Btf::parse(&blob).map_err(|_| EINVAL)?;
        let field = prove(&btf, &[wanted("two", "b", 4)]).err().ok_or(EINVAL)?;
        assert!(displays_as(
            &field,
            "struct two: b not found, wanted at offset 4"
        ));
        let structure = prove(&btf, &[wanted("three", "d", 8)])
            .err()
            .ok_or(EINVAL)?;
        assert!(displays_as(
            &structure,
            "struct three: not found, wanted with d at offset 8"
        ));
        Ok(())
    }

    #[test]
    fn other_size() -> Result {
        let blob = blob(4)?;
        let btf = Btf::parse(&blob).map_err(|_| EINVAL)?;
        for (structure, line) in [
            ("one", "struct one: 8 bytes found, 16 bytes wanted"),
            ("three", "struct three: not found, 16 bytes wanted"),
        ] {
            let wanted = WantedSize {
                structure,
                size: 16,
            };
            let mismatch = prove_sizes(&btf, &[wanted]).err().ok_or(EINVAL)?;
            assert!(displays_as(&mismatch, line));
        }
        Ok(())
    }

    #[test]
    fn damaged() -> Result {
        // An integer that is none any more: everything after it is lost.
        let mut blob = blob(4)?;
        for byte in blob.iter_mut().skip(28).take(4) {
            *byte = 0;
        }
        let btf = Btf::parse(&blob).map_err(|_| EINVAL)?;
        let mismatch = prove(&btf, &WANTED).err().ok_or(EINVAL)?;
        assert!(
            mismatch
                == Mismatch::Btf {
                    structure: "one",
                    error: BtfError::Kind(0)
                }
        );
        assert!(displays_as(
            &mismatch,
            "struct one: type information unusable: unknown kind of type 0"
        ));
        Ok(())
    }
}
