// SPDX-License-Identifier: GPL-2.0

//! The proof that the running kernel lays out its private structures as this module does.
//!
//! The core of the kernel reads some members of the nodes that a producer of shared pages makes.
//! Their structures are private to `mm/`, so no header tells where these members are. The kernel's
//! BTF does: what is wanted is compared with it before anything else is done, and any difference
//! is a reason not to load.

#![forbid(unsafe_code)]

use crate::btf::{
    Btf,
    BtfError,
    Struct, //
};
use kernel::{
    fmt,
    prelude::*, //
};

/// A member that has to be at a certain place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// Name of the structure, without `struct`.
    pub(crate) structure: &'static str,
    /// Name of the member, which may be in anonymous structures and unions of the structure.
    pub(crate) field: &'static str,
    /// Its offset in bytes.
    pub(crate) offset: usize,
}

/// A structure that has to have a certain size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WantedSize {
    /// Name of the structure, without `struct`.
    pub(crate) structure: &'static str,
    /// Its size in bytes.
    pub(crate) size: usize,
}

/// How the kernel differs from what is wanted. Displays as one line without its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mismatch {
    /// The structure does not exist; wanted is the offset of a member in bytes.
    NoStruct {
        /// Name of the structure.
        structure: &'static str,
        /// Name of the member that is wanted in it.
        field: &'static str,
        /// Its offset, in bytes.
        wanted: usize,
    },
    /// The structure has no such member.
    NoField {
        /// Name of the structure.
        structure: &'static str,
        /// Name of the member.
        field: &'static str,
        /// Its offset, in bytes.
        wanted: usize,
    },
    /// The member is somewhere else.
    Offset {
        /// Name of the structure.
        structure: &'static str,
        /// Name of the member.
        field: &'static str,
        /// The offset in the kernel, in bytes.
        found: u32,
        /// The offset that is wanted, in bytes.
        wanted: usize,
    },
    /// The structure has another size, or does not exist.
    Size {
        /// Name of the structure.
        structure: &'static str,
        /// The size in the kernel, in bytes.
        found: Option<u32>,
        /// The size that is wanted, in bytes.
        wanted: usize,
    },
    /// The BTF cannot be read as far as needed.
    Btf {
        /// Name of the structure that was looked for.
        structure: &'static str,
        /// What is wrong.
        error: BtfError,
    },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoStruct {
                structure,
                field,
                wanted,
            } => write!(
                f,
                "struct {structure}: not found, wanted with {field} at offset {wanted}"
            ),
            Self::NoField {
                structure,
                field,
                wanted,
            } => write!(
                f,
                "struct {structure}: {field} not found, wanted at offset {wanted}"
            ),
            Self::Offset {
                structure,
                field,
                found,
                wanted,
            } => write!(
                f,
                "struct {structure}: {field} found at offset {found}, wanted at offset {wanted}"
            ),
            Self::Size {
                structure,
                found: Some(found),
                wanted,
            } => write!(
                f,
                "struct {structure}: {found} bytes found, {wanted} bytes wanted"
            ),
            Self::Size {
                structure,
                found: None,
                wanted,
            } => write!(f, "struct {structure}: not found, {wanted} bytes wanted"),
            Self::Btf { structure, error } => {
                write!(f, "struct {structure}: type information unusable: ")?;
                fmt::Display::fmt(&error, f)
            }
        }
    }
}

/// Looks structures up by name, and remembers the last one.
///
/// A lookup walks over all types of the kernel, and tables name a structure several times in a row.
struct Finder<'a, 'b> {
    btf: &'b Btf<'a>,
    last: Option<(&'static str, Option<Struct<'a>>)>,
}

impl<'a, 'b> Finder<'a, 'b> {
    fn new(btf: &'b Btf<'a>) -> Self {
        Self { btf, last: None }
    }

    fn find(&mut self, structure: &'static str) -> Result<Option<Struct<'a>>, Mismatch> {
        if let Some((name, found)) = self.last {
            if name == structure {
                return Ok(found);
            }
        }
        let found = self
            .btf
            .find_struct(structure)
            .map_err(|error| Mismatch::Btf { structure, error })?;
        self.last = Some((structure, found));
        Ok(found)
    }
}

/// Verifies that all members are where they are wanted.
///
/// Does not allocate or sleep. Takes a walk over all types of the kernel for each structure, so
/// members of the same one should follow each other in `wanted`.
///
/// # Errors
///
/// The first [`Mismatch`] in the order of `wanted`.
pub(crate) fn prove(btf: &Btf<'_>, wanted: &[Wanted]) -> Result<(), Mismatch> {
    let mut finder = Finder::new(btf);
    for &Wanted {
        structure,
        field,
        offset: wanted,
    } in wanted
    {
        let Some(found) = finder.find(structure)? else {
            return Err(Mismatch::NoStruct {
                structure,
                field,
                wanted,
            });
        };
        match found.offset_of(btf, field) {
            Ok(Some(found)) if found as usize == wanted => {}
            Ok(Some(found)) => {
                return Err(Mismatch::Offset {
                    structure,
                    field,
                    found,
                    wanted,
                })
            }
            Ok(None) => {
                return Err(Mismatch::NoField {
                    structure,
                    field,
                    wanted,
                })
            }
            Err(error) => return Err(Mismatch::Btf { structure, error }),
        }
    }
    Ok(())
}

/// Verifies that all structures have the sizes that are wanted.
///
/// As [`prove`] otherwise.
///
/// # Errors
///
/// The first [`Mismatch`] in the order of `wanted`.
pub(crate) fn prove_sizes(btf: &Btf<'_>, wanted: &[WantedSize]) -> Result<(), Mismatch> {
    let mut finder = Finder::new(btf);
    for &WantedSize {
        structure,
        size: wanted,
    } in wanted
    {
        let found = finder.find(structure)?.map(|found| found.size());
        if found.is_none_or(|found| found as usize != wanted) {
            return Err(Mismatch::Size {
                structure,
                found,
                wanted,
            });
        }
    }
    Ok(())
}
