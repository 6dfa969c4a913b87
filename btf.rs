// SPDX-License-Identifier: GPL-2.0

//! Reading where the members of a structure are from BTF, the type information that a kernel
//! carries of itself.
//!
//! BTF is a header, a section of types and a section of strings. Types follow each other without
//! padding: twelve bytes with the name, the kind and the number of parts, then what the kind adds
//! to it, for a structure twelve bytes for each member. A type is referred to by its number in this
//! order; 1 is the first, and 0 stands for `void`.
//!
//! Nothing in the data is trusted: each offset and each length is checked before it is used, and
//! what cannot be right is a [`BtfError`].
//!
//! C header: [`include/uapi/linux/btf.h`](srctree/include/uapi/linux/btf.h)
//!
//! Reference: <https://docs.kernel.org/bpf/btf.html>

#![forbid(unsafe_code)]

use kernel::{
    fmt,
    prelude::*, //
};

/// First two bytes of BTF in the byte order of the machine.
const MAGIC: u16 = 0xeb9f;

/// The only version there is.
const VERSION: u8 = 1;

/// Bytes of the header that are always there; newer ones may have more.
const HEADER_BYTES: usize = 24;

/// Bytes of each type that do not depend on its kind.
const TYPE_BYTES: usize = 12;

/// Bytes of each member of a structure or union.
const MEMBER_BYTES: usize = 12;

/// How many types [`Struct::offset_of`] may look up on its way through anonymous members.
///
/// A lookup walks over the types from the first on, so damaged data could keep it busy otherwise. A
/// few are enough: it takes one for each anonymous structure or union in front of the member.
const MAX_LOOKUPS: u32 = 64;

/// How many structures and unions may be in each other there; each takes a frame on the stack.
const MAX_DEPTH: u32 = 16;

/// The kinds that matter here by name.
mod kind {
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const TYPE_TAG: u32 = 18;
}

/// What is wrong with the BTF.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum BtfError {
    /// It does not begin with the magic number, in the byte order of the machine.
    Magic,
    /// It has a version that is not known.
    Version(u8),
    /// It ends too early, or a section goes beyond its end.
    Truncated,
    /// The strings do not begin and end with a zero byte, or a name begins outside of them.
    Strings,
    /// A type has a kind that is not known, so that its length is not known either.
    Kind(u32),
    /// A member refers to a type that does not exist or is not what it should be.
    Reference(u32),
    /// A member lies outside of its structure.
    Member,
    /// Anonymous members lead to more types than can be.
    Nesting,
    /// There are several structures of the same name.
    Ambiguous,
}

impl fmt::Display for BtfError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic => f.write_str("wrong magic number"),
            Self::Version(version) => write!(f, "unknown version {version}"),
            Self::Truncated => f.write_str("truncated"),
            Self::Strings => f.write_str("broken string section"),
            Self::Kind(kind) => write!(f, "unknown kind of type {kind}"),
            Self::Reference(id) => write!(f, "bad reference to type {id}"),
            Self::Member => f.write_str("member outside of its structure"),
            Self::Nesting => f.write_str("members nested too deeply"),
            Self::Ambiguous => f.write_str("several structures of this name"),
        }
    }
}

/// Returns the 32-bit number at `offset` of `data`.
fn word(data: &[u8], offset: usize) -> Option<u32> {
    let bytes = data.get(offset..)?.first_chunk::<4>()?;
    Some(u32::from_ne_bytes(*bytes))
}

/// Returns `len` bytes from `offset` of `data`, both as BTF stores them.
fn section(data: &[u8], offset: u32, len: u32) -> Option<&[u8]> {
    let offset = usize::try_from(offset).ok()?;
    let len = usize::try_from(len).ok()?;
    data.get(offset..)?.get(..len)
}

/// BTF whose header is good and whose sections are where it says.
///
/// # Invariants
///
/// `strings` begins and ends with a zero byte.
pub(crate) struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
}

/// A type as it stands in the type section.
struct Type<'a> {
    name: u32,
    kind: u32,
    /// The kind's flag: of structures, that the offsets of members tell their bits too.
    flag: bool,
    /// The size in bytes, or the type that this one modifies.
    size_or_type: u32,
    /// What the kind adds.
    parts: &'a [u8],
}

/// Takes the first type off `types`, which is not empty.
fn next_type<'a>(types: &mut &'a [u8]) -> Result<Type<'a>, BtfError> {
    let (head, rest) = types
        .split_at_checked(TYPE_BYTES)
        .ok_or(BtfError::Truncated)?;
    let name = word(head, 0).ok_or(BtfError::Truncated)?;
    let info = word(head, 4).ok_or(BtfError::Truncated)?;
    let size_or_type = word(head, 8).ok_or(BtfError::Truncated)?;

    // Up to 7.2 there were 16 bits of the number of parts, 5 bits of the kind, and zeroes around
    // them. Since then both have all the bits there are.
    let count = (info & 0x00ff_ffff) as usize;
    let kind = (info >> 24) & 0x7f;
    let parts_bytes = match kind {
        // Pointer, forward, typedef, volatile, const, restrict, function, float, type tag.
        2 | 7..=12 | 16 | 18 => 0,
        // Integer, variable, declaration tag.
        1 | 14 | 17 => 4,
        // Array.
        3 => 12,
        kind::STRUCT | kind::UNION => count.wrapping_mul(MEMBER_BYTES),
        // Enumeration, prototype.
        6 | 13 => count.wrapping_mul(8),
        // Section, 64-bit enumeration.
        15 | 19 => count.wrapping_mul(12),
        _ => return Err(BtfError::Kind(kind)),
    };
    let (parts, rest) = rest
        .split_at_checked(parts_bytes)
        .ok_or(BtfError::Truncated)?;
    *types = rest;
    Ok(Type {
        name,
        kind,
        flag: info >> 31 != 0,
        size_or_type,
        parts,
    })
}

impl<'a> Btf<'a> {
    /// Reads the header of the BTF in `data`, all of it and nothing more, except for padding.
    ///
    /// # Errors
    ///
    /// A [`BtfError`] for what is wrong with the header. What is wrong with the types comes out when
    /// they are walked over, by [`Btf::find_struct`] and [`Struct::offset_of`].
    pub(crate) fn parse(data: &'a [u8]) -> Result<Self, BtfError> {
        let magic = data.first_chunk::<2>().ok_or(BtfError::Truncated)?;
        if u16::from_ne_bytes(*magic) != MAGIC {
            return Err(BtfError::Magic);
        }
        match data.get(2) {
            Some(&VERSION) => {}
            Some(&version) => return Err(BtfError::Version(version)),
            None => return Err(BtfError::Truncated),
        }

        // The magic number, the version and flags take four bytes. The other fields have four each.
        let header_bytes = word(data, 4).ok_or(BtfError::Truncated)? as usize;
        if header_bytes < HEADER_BYTES {
            return Err(BtfError::Truncated);
        }
        let body = data.get(header_bytes..).ok_or(BtfError::Truncated)?;
        let part = |at| {
            let offset = word(data, at)?;
            let len = word(data, at.wrapping_add(4))?;
            section(body, offset, len)
        };
        let types = part(8).ok_or(BtfError::Truncated)?;
        let strings = part(16).ok_or(BtfError::Truncated)?;
        if strings.first() != Some(&0) || strings.last() != Some(&0) {
            return Err(BtfError::Strings);
        }
        // INVARIANT: Just checked.
        Ok(Self { types, strings })
    }

    /// Returns whether the name that begins at `offset` of the strings is `name`.
    fn is_named(&self, offset: u32, name: &str) -> Result<bool, BtfError> {
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.strings.get(offset..))
            .filter(|rest| !rest.is_empty())
            .ok_or(BtfError::Strings)?;
        Ok(rest
            .strip_prefix(name.as_bytes())
            .is_some_and(|rest| rest.first() == Some(&0)))
    }

    /// Returns the type with the given number.
    fn type_by_id(&self, id: u32) -> Result<Type<'a>, BtfError> {
        let mut types = self.types;
        let mut at: u32 = 1;
        while !types.is_empty() {
            let found = next_type(&mut types)?;
            if at == id {
                return Ok(found);
            }
            at = at.wrapping_add(1);
        }
        Err(BtfError::Reference(id))
    }

    /// Returns the structure, not union, with the given name, or `None` if there is none.
    ///
    /// Walks over all types once.
    ///
    /// # Errors
    ///
    /// A [`BtfError`] if any type is damaged, or if there are two structures of this name: they
    /// would have the same members at the same places only if they were one.
    pub(crate) fn find_struct(&self, name: &str) -> Result<Option<Struct<'a>>, BtfError> {
        let mut found = None;
        let mut types = self.types;
        while !types.is_empty() {
            let one = next_type(&mut types)?;
            if self.is_named(one.name, name)? && one.kind == kind::STRUCT {
                let one = Struct {
                    size: one.size_or_type,
                    flag: one.flag,
                    members: one.parts,
                };
                if found.replace(one).is_some() {
                    return Err(BtfError::Ambiguous);
                }
            }
        }
        Ok(found)
    }
}

/// A structure or union.
#[derive(Clone, Copy)]
pub(crate) struct Struct<'a> {
    size: u32,
    /// See [`Type::flag`].
    flag: bool,
    members: &'a [u8],
}

impl<'a> Struct<'a> {
    /// Returns the size in bytes.
    pub(crate) fn size(&self) -> u32 {
        self.size
    }

    /// Returns the offset of a member in bytes, or `None` if there is no such member.
    ///
    /// Members of anonymous structures and unions count as members of what they are in, as in C. A
    /// bitfield has no offset in bytes, so it counts as not there.
    ///
    /// `btf` must be what the structure was found in.
    ///
    /// # Errors
    ///
    /// A [`BtfError`] if one of the types on the way is damaged.
    pub(crate) fn offset_of(&self, btf: &Btf<'a>, field: &str) -> Result<Option<u32>, BtfError> {
        // This would find the anonymous members.
        if field.is_empty() {
            return Ok(None);
        }
        let mut search = Search {
            btf,
            field,
            whole: self.size,
            lookups: MAX_LOOKUPS,
        };
        search.run(self, 0, MAX_DEPTH)
    }
}

/// The search for a member.
struct Search<'a, 'b> {
    btf: &'b Btf<'a>,
    field: &'b str,
    /// Size of the outermost structure in bytes.
    whole: u32,
    /// Types that may still be looked up.
    lookups: u32,
}

impl<'a> Search<'a, '_> {
    /// Searches `part`, which begins `base` bytes into the whole, and `depth` levels below it.
    fn run(&mut self, part: &Struct<'a>, base: u32, depth: u32) -> Result<Option<u32>, BtfError> {
        let depth = depth.checked_sub(1).ok_or(BtfError::Nesting)?;
        for member in part.members.chunks_exact(MEMBER_BYTES) {
            let name = word(member, 0).ok_or(BtfError::Truncated)?;
            let id = word(member, 4).ok_or(BtfError::Truncated)?;
            let place = word(member, 8).ok_or(BtfError::Truncated)?;

            let (bits, is_bitfield) = if part.flag {
                (place & 0x00ff_ffff, place >> 24 != 0)
            } else {
                (place, false)
            };
            // A flexible array member may begin where the structure ends.
            let offset = base
                .checked_add(bits / 8)
                .filter(|&offset| bits / 8 <= part.size && offset <= self.whole)
                .ok_or(BtfError::Member)?;
            let on_byte = bits % 8 == 0 && !is_bitfield;

            if self.btf.is_named(name, self.field)? {
                return Ok(on_byte.then_some(offset));
            }
            if on_byte && self.btf.is_named(name, "")? {
                if let Some(inner) = self.anonymous(id)? {
                    if let Some(found) = self.run(&inner, offset, depth)? {
                        return Ok(Some(found));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Returns the structure or union that is the type of an anonymous member.
    ///
    /// Anything else without a name is padding, and gives `None`.
    fn anonymous(&mut self, id: u32) -> Result<Option<Struct<'a>>, BtfError> {
        let mut id = id;
        loop {
            self.lookups = self.lookups.checked_sub(1).ok_or(BtfError::Nesting)?;
            let found = self.btf.type_by_id(id)?;
            match found.kind {
                kind::STRUCT | kind::UNION => {
                    return Ok(Some(Struct {
                        size: found.size_or_type,
                        flag: found.flag,
                        members: found.parts,
                    }))
                }
                kind::VOLATILE | kind::CONST | kind::TYPE_TAG => id = found.size_or_type,
                _ => return Ok(None),
            }
        }
    }
}
