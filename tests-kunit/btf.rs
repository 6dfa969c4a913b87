// SPDX-License-Identifier: GPL-2.0

//! Tests of the BTF parser, with good and damaged data.

#![forbid(unsafe_code)]

use crate::btf::{
    Btf,
    BtfError, //
};
use kernel::prelude::*;

/// Makes BTF. The first type that is added has number 1.
struct Builder {
    types: KVec<u8>,
    strings: KVec<u8>,
}

impl Builder {
    fn new() -> Result<Self> {
        let mut strings = KVec::new();
        strings.push(0, GFP_KERNEL)?;
        Ok(Self {
            types: KVec::new(),
            strings,
        })
    }

    fn string(&mut self, text: &str) -> Result<u32> {
        if text.is_empty() {
            return Ok(0);
        }
        let offset = self.strings.len() as u32;
        self.strings
            .extend_from_slice(text.as_bytes(), GFP_KERNEL)?;
        self.strings.push(0, GFP_KERNEL)?;
        Ok(offset)
    }

    fn words(&mut self, words: &[u32]) -> Result {
        for word in words {
            self.types
                .extend_from_slice(&word.to_ne_bytes(), GFP_KERNEL)?;
        }
        Ok(())
    }

    /// Adds a type with `info` as in `struct btf_type`, and what its kind adds.
    fn raw(&mut self, name: &str, info: u32, size_or_type: u32, parts: &[u32]) -> Result {
        let name = self.string(name)?;
        self.words(&[name, info, size_or_type])?;
        self.words(parts)
    }

    /// Adds a structure or union with members of a name, a type, and an offset in bits.
    fn composite(
        &mut self,
        kind: u32,
        name: &str,
        size: u32,
        members: &[(&str, u32, u32)],
    ) -> Result {
        self.raw(name, kind | members.len() as u32, size, &[])?;
        for &(name, id, bits) in members {
            let name = self.string(name)?;
            self.words(&[name, id, bits])?;
        }
        Ok(())
    }

    fn finish(&self) -> Result<KVec<u8>> {
        let mut blob = KVec::new();
        blob.extend_from_slice(&0xeb9f_u16.to_ne_bytes(), GFP_KERNEL)?;
        blob.extend_from_slice(&[1, 0], GFP_KERNEL)?;
        let types = self.types.len() as u32;
        let strings = self.strings.len() as u32;
        for word in [24, 0, types, types, strings] {
            blob.extend_from_slice(&u32::to_ne_bytes(word), GFP_KERNEL)?;
        }
        blob.extend_from_slice(&self.types, GFP_KERNEL)?;
        blob.extend_from_slice(&self.strings, GFP_KERNEL)?;
        Ok(blob)
    }
}

const STRUCT: u32 = 4 << 24;
const UNION: u32 = 5 << 24;
const FLAG: u32 = 1 << 31;

/// Fields of [`good`] with the offsets where they are.
const FIELDS: [(&str, &str, u32); 19] = [
    ("ksm_stable_node", "node", 0),
    ("ksm_stable_node", "head", 0),
    ("ksm_stable_node", "hlist_dup", 8),
    ("ksm_stable_node", "list", 24),
    ("ksm_stable_node", "hlist", 40),
    ("ksm_stable_node", "kpfn", 48),
    ("ksm_stable_node", "chain_prune_time", 48),
    ("ksm_stable_node", "rmap_hlist_len", 56),
    ("ksm_stable_node", "nid", 60),
    ("ksm_rmap_item", "rmap_list", 0),
    ("ksm_rmap_item", "anon_vma", 8),
    ("ksm_rmap_item", "mm", 16),
    ("ksm_rmap_item", "address", 24),
    ("ksm_rmap_item", "oldchecksum", 32),
    ("ksm_rmap_item", "age", 36),
    ("ksm_rmap_item", "linear_page_index", 32),
    ("ksm_rmap_item", "node", 40),
    ("ksm_rmap_item", "hlist", 48),
    ("flexible", "tail", 4),
];

/// Returns BTF with a type of each kind, and the two structures that this is all about.
fn good() -> Result<KVec<u8>> {
    let mut b = Builder::new()?;
    // 1 to 4.
    b.raw("int", 1 << 24, 4, &[32])?;
    b.raw("", 2 << 24, 0, &[])?;
    b.raw("", 3 << 24, 0, &[1, 1, 8])?;
    b.composite(
        STRUCT,
        "hlist_node",
        16,
        &[("next", 2, 0), ("pprev", 2, 64)],
    )?;
    // 5 to 8, among them a structure in front of what it consists of.
    b.composite(
        STRUCT,
        "ksm_stable_node",
        64,
        &[
            ("", 6, 0),
            ("hlist", 4, 40 * 8),
            ("", 9, 48 * 8),
            ("rmap_hlist_len", 1, 56 * 8),
            ("nid", 1, 60 * 8),
        ],
    )?;
    b.composite(UNION, "", 40, &[("node", 4, 0), ("", 7, 0)])?;
    b.composite(STRUCT, "", 40, &[("head", 2, 0), ("", 8, 64)])?;
    b.composite(STRUCT, "", 32, &[("hlist_dup", 4, 0), ("list", 4, 128)])?;
    // 9 to 14; 11 is a structure whose offsets have room for the number of bits.
    b.composite(UNION, "", 8, &[("kpfn", 1, 0), ("chain_prune_time", 1, 0)])?;
    b.composite(UNION, "", 8, &[("", 12, 0), ("linear_page_index", 1, 0)])?;
    b.composite(
        STRUCT | FLAG,
        "ksm_rmap_item",
        64,
        &[
            ("rmap_list", 2, 0),
            ("", 13, 8 * 8),
            ("mm", 2, 16 * 8),
            ("address", 1, 24 * 8),
            ("", 10, 32 * 8),
            ("", 14, 40 * 8),
        ],
    )?;
    b.composite(
        STRUCT | FLAG,
        "",
        8,
        &[
            ("oldchecksum", 1, 0),
            ("age", 1, 32),
            ("a_bit", 1, 1 << 24 | 40),
            ("", 1, 2 << 24 | 41),
            ("more_bits", 1, 3 << 24 | 43),
        ],
    )?;
    b.composite(UNION, "", 8, &[("anon_vma", 2, 0), ("nid", 1, 0)])?;
    b.composite(UNION, "", 24, &[("node", 4, 0), ("", 15, 0)])?;
    // 15 and 16: an anonymous structure that is const.
    b.raw("", 10 << 24, 16, &[])?;
    b.composite(STRUCT, "", 24, &[("head", 2, 0), ("hlist", 4, 64)])?;
    // The other kinds, with names that mislead.
    b.raw("color", 6 << 24 | 2, 4, &[0, 1, 0, 2])?;
    b.raw("ksm_stable_node", 7 << 24, 0, &[])?;
    b.raw("ksm_rmap_item", 8 << 24, 11, &[])?;
    b.raw("", 9 << 24, 1, &[])?;
    b.raw("", 11 << 24, 2, &[])?;
    b.raw("", 13 << 24 | 2, 0, &[0, 1, 0, 2])?;
    b.raw("function", 12 << 24, 22, &[])?;
    b.raw("variable", 14 << 24, 1, &[0])?;
    b.raw(".data", 15 << 24 | 1, 4, &[24, 0, 4])?;
    b.raw("float", 16 << 24, 4, &[])?;
    b.raw("tag", 17 << 24, 1, &[u32::MAX])?;
    b.raw("tag", 18 << 24, 1, &[])?;
    b.raw("huge", 19 << 24 | 1, 8, &[0, 1, 2])?;
    b.composite(UNION, "a_union", 4, &[("field", 1, 0)])?;
    b.composite(STRUCT, "twice", 4, &[("field", 1, 0)])?;
    b.composite(STRUCT, "twice", 8, &[("field", 1, 32)])?;
    b.composite(STRUCT, "flexible", 4, &[("head", 1, 0), ("tail", 3, 32)])?;
    b.finish()
}

fn offset(blob: &[u8], structure: &str, field: &str) -> Result<Option<u32>, BtfError> {
    let btf = Btf::parse(blob)?;
    match btf.find_struct(structure)? {
        Some(found) => found.offset_of(&btf, field),
        None => Ok(None),
    }
}

/// Asks for everything, and returns whether no answer is absurd, as a member outside of the
/// structure that it is in.
fn is_sane(blob: &[u8]) -> bool {
    let Ok(btf) = Btf::parse(blob) else {
        return true;
    };
    FIELDS.iter().all(|&(structure, field, _)| {
        let Ok(Some(found)) = btf.find_struct(structure) else {
            return true;
        };
        match found.offset_of(&btf, field) {
            Ok(Some(offset)) => offset <= found.size(),
            _ => true,
        }
    })
}

/// Returns whether all of [`FIELDS`] are found where they are.
fn is_right(blob: &[u8]) -> bool {
    FIELDS
        .iter()
        .all(|&(structure, field, expected)| offset(blob, structure, field) == Ok(Some(expected)))
}

/// Returns a copy with the word at `at` replaced.
fn with_word(blob: &[u8], at: usize, word: u32) -> Result<KVec<u8>> {
    let mut copy = KVec::new();
    copy.extend_from_slice(blob, GFP_KERNEL)?;
    copy.get_mut(at..at + 4)
        .ok_or(EINVAL)?
        .copy_from_slice(&word.to_ne_bytes());
    Ok(copy)
}

#[kunit_tests(ksm_rs_btf)]
mod tests {
    use super::*;

    #[test]
    fn finds_members() -> Result {
        let blob = good()?;
        for (structure, field, expected) in FIELDS {
            assert_eq!(offset(&blob, structure, field), Ok(Some(expected)));
        }
        let btf = Btf::parse(&blob).map_err(|_| EINVAL)?;
        for (structure, size) in [("ksm_stable_node", 64), ("hlist_node", 16), ("flexible", 4)] {
            let found = btf.find_struct(structure).map_err(|_| EINVAL)?;
            assert_eq!(found.map(|found| found.size()), Some(size));
        }
        assert!(is_right(&blob));
        Ok(())
    }

    #[test]
    fn does_not_find_what_is_not_there() -> Result {
        let blob = good()?;
        for (structure, field) in [
            ("ksm_stable_node", "mm"),
            ("ksm_stable_node", "kpf"),
            ("ksm_stable_node", "kpfnn"),
            ("ksm_stable_node", ""),
            // A member of a member that has a name.
            ("ksm_stable_node", "pprev"),
            // Bitfields.
            ("ksm_rmap_item", "a_bit"),
            ("ksm_rmap_item", "more_bits"),
            ("a_union", "field"),
            ("no_such_struct", "field"),
            ("ksm_stable", "hlist"),
            ("int", "int"),
        ] {
            assert_eq!(offset(&blob, structure, field), Ok(None));
        }
        assert_eq!(offset(&blob, "twice", "field"), Err(BtfError::Ambiguous));
        Ok(())
    }

    #[test]
    fn bad_headers() -> Result {
        let blob = good()?;
        assert!(Btf::parse(&[]).is_err());
        for magic in [0, u32::MAX] {
            assert!(Btf::parse(&with_word(&blob, 0, magic)?).err() == Some(BtfError::Magic));
        }
        let mut version = with_word(&blob, 4, 24)?;
        if let Some(byte) = version.get_mut(2) {
            *byte = 2;
        }
        assert!(Btf::parse(&version).err() == Some(BtfError::Version(2)));
        // The lengths and offsets of the header and the two sections.
        for at in [4, 8, 12, 16, 20] {
            for word in [0x7fff_ffff, 0x8000_0000, u32::MAX, u32::MAX - 3] {
                assert!(
                    Btf::parse(&with_word(&blob, at, word)?).err() == Some(BtfError::Truncated)
                );
            }
        }
        for word in [0, 4, 23] {
            assert!(Btf::parse(&with_word(&blob, 4, word)?).err() == Some(BtfError::Truncated));
        }
        // No strings at all.
        assert!(Btf::parse(&with_word(&blob, 20, 0)?).err() == Some(BtfError::Strings));
        Ok(())
    }

    #[test]
    fn longer_headers_and_padding() -> Result {
        let blob = good()?;
        let mut longer = KVec::new();
        longer.extend_from_slice(blob.get(..24).ok_or(EINVAL)?, GFP_KERNEL)?;
        longer.extend_from_slice(&[0xff; 8], GFP_KERNEL)?;
        longer.extend_from_slice(blob.get(24..).ok_or(EINVAL)?, GFP_KERNEL)?;
        longer.extend_from_slice(&[0xff; 3], GFP_KERNEL)?;
        let longer = with_word(&longer, 4, 32)?;
        assert!(is_right(&longer));
        Ok(())
    }

    #[test]
    fn truncated_anywhere() -> Result {
        let blob = good()?;
        for len in 0..blob.len() {
            let short = blob.get(..len).ok_or(EINVAL)?;
            assert!(Btf::parse(short).is_err());
        }
        Ok(())
    }

    #[test]
    fn truncated_types() -> Result {
        // The type section ends within a type, though there is more data after it.
        let blob = good()?;
        let types =
            u32::from_ne_bytes(*blob.get(12..).and_then(|b| b.first_chunk()).ok_or(EINVAL)?);
        for len in 0..types {
            let short = with_word(&blob, 12, len)?;
            assert!(is_sane(&short));
            assert!(!is_right(&short));
            if len % 4 != 0 {
                assert!(offset(&short, "ksm_stable_node", "kpfn").is_err());
            }
        }
        Ok(())
    }

    #[test]
    fn damaged_bytes() -> Result {
        let mut blob = good()?;
        assert!(is_right(&blob));
        for at in 0..blob.len() {
            for mask in [0xff, 0x01, 0x80] {
                if let Some(byte) = blob.get_mut(at) {
                    *byte ^= mask;
                }
                assert!(is_sane(&blob));
                if let Some(byte) = blob.get_mut(at) {
                    *byte ^= mask;
                }
            }
        }
        // Nothing was left behind by the loop.
        assert!(is_right(&blob));
        Ok(())
    }

    #[test]
    fn bad_types() -> Result {
        // Each of these is the only type, or the last one.
        for (info, parts, error) in [
            // Counts that go past the end.
            (STRUCT | 2, 3, BtfError::Truncated),
            (STRUCT | 0x00ff_ffff, 3, BtfError::Truncated),
            (UNION | 2, 5, BtfError::Truncated),
            (6 << 24 | 0x1_0000, 3, BtfError::Truncated),
            (1 << 24, 0, BtfError::Truncated),
            (3 << 24, 2, BtfError::Truncated),
            // Kinds that do not exist.
            (0, 0, BtfError::Kind(0)),
            (20 << 24, 0, BtfError::Kind(20)),
            (127 << 24, 0, BtfError::Kind(127)),
            // Not a whole type after a good one.
            (2 << 24, 1, BtfError::Truncated),
        ] {
            let mut b = Builder::new()?;
            b.raw("s", info, 8, [0; 5].get(..parts).ok_or(EINVAL)?)?;
            let blob = b.finish()?;
            assert_eq!(offset(&blob, "s", "f"), Err(error));
        }
        Ok(())
    }

    #[test]
    fn bad_names() -> Result {
        for bad in [u32::MAX, 0x8000_0000, 1000] {
            // Of a type, of a member, and of a member that comes after the one that is wanted.
            for (at, expected) in [
                (24, Err(BtfError::Strings)),
                (36, Err(BtfError::Strings)),
                (48, Ok(Some(0))),
            ] {
                let mut b = Builder::new()?;
                b.composite(STRUCT, "s", 8, &[("f", 1, 0), ("g", 1, 32)])?;
                let blob = with_word(&b.finish()?, at, bad)?;
                assert_eq!(offset(&blob, "s", "f"), expected);
                assert!(offset(&blob, "s", "g").is_err());
            }
        }
        // A name that begins right after the last string.
        let mut b = Builder::new()?;
        b.composite(STRUCT, "s", 8, &[("f", 1, 0)])?;
        let blob = with_word(&b.finish()?, 36, b.strings.len() as u32)?;
        assert_eq!(offset(&blob, "s", "f"), Err(BtfError::Strings));
        Ok(())
    }

    #[test]
    fn bad_references() -> Result {
        for id in [0, 2, 1000, u32::MAX] {
            let mut b = Builder::new()?;
            b.composite(STRUCT, "s", 8, &[("", id, 0), ("f", 1, 32)])?;
            assert_eq!(offset(&b.finish()?, "s", "f"), Err(BtfError::Reference(id)));
        }
        Ok(())
    }

    #[test]
    fn bad_offsets() -> Result {
        for bits in [9 * 8, 0x8000_0000, u32::MAX] {
            let mut b = Builder::new()?;
            b.composite(STRUCT, "s", 8, &[("f", 1, bits)])?;
            assert_eq!(offset(&b.finish()?, "s", "f"), Err(BtfError::Member));
        }
        // Inside of the part that it is in, but outside of the whole.
        let mut b = Builder::new()?;
        b.composite(STRUCT, "s", 8, &[("", 2, 32)])?;
        b.composite(STRUCT, "", 16, &[("f", 1, 64)])?;
        assert_eq!(offset(&b.finish()?, "s", "f"), Err(BtfError::Member));
        Ok(())
    }

    #[test]
    fn nesting() -> Result {
        for levels in 1..40 {
            let mut b = Builder::new()?;
            for level in 1..levels {
                let name = if level == 1 { "s" } else { "" };
                b.composite(STRUCT, name, 400, &[("", level + 1, 64)])?;
            }
            let name = if levels == 1 { "s" } else { "" };
            b.composite(STRUCT, name, 400, &[("f", 99, 0)])?;
            let expected = if levels <= 16 {
                Ok(Some((levels - 1) * 8))
            } else {
                Err(BtfError::Nesting)
            };
            assert_eq!(offset(&b.finish()?, "s", "f"), expected);
        }
        Ok(())
    }

    #[test]
    fn loops_of_types() -> Result {
        // A structure in itself.
        let mut b = Builder::new()?;
        b.composite(STRUCT, "s", 8, &[("", 1, 0), ("f", 1, 32)])?;
        assert_eq!(offset(&b.finish()?, "s", "f"), Err(BtfError::Nesting));

        // Two in each other, each several times, so that following all would never end.
        let mut b = Builder::new()?;
        b.composite(STRUCT, "s", 8, &[("", 2, 0), ("", 2, 0), ("", 2, 0)])?;
        b.composite(UNION, "", 8, &[("", 1, 0), ("", 1, 0), ("", 1, 0)])?;
        assert_eq!(offset(&b.finish()?, "s", "f"), Err(BtfError::Nesting));

        // A modifier of itself.
        let mut b = Builder::new()?;
        b.composite(STRUCT, "s", 8, &[("", 2, 0)])?;
        b.raw("", 10 << 24, 2, &[])?;
        assert_eq!(offset(&b.finish()?, "s", "f"), Err(BtfError::Nesting));

        // No loop, but more parts than there can be.
        let mut b = Builder::new()?;
        b.composite(STRUCT, "s", 8, &[("", 2, 0); 100])?;
        b.composite(STRUCT, "", 8, &[])?;
        assert_eq!(offset(&b.finish()?, "s", "f"), Err(BtfError::Nesting));
        Ok(())
    }
}
