//! Structures laid out at random: what the parser and the proof say of them is what they were made with.

use std::sync::OnceLock;

use proptest::prelude::*;

use crate::btf::Btf;
use crate::btf_writer::write;
use crate::btf_writer::Frame;
use crate::btf_writer::Kind;
use crate::btf_writer::Member;
use crate::btf_writer::Qualifier;
use crate::btf_writer::Reference;
use crate::btf_writer::Type;
use crate::layout::prove;
use crate::layout::prove_sizes;
use crate::layout::Mismatch;
use crate::layout::Wanted;
use crate::layout::WantedSize;

/// The structures that the module looks for.
pub(crate) const STRUCTURES: [&str; 2] = ["ksm_stable_node", "ksm_rmap_item"];

/// Names of members: first those that the module looks for, then as many others as may be needed.
pub(crate) fn names() -> &'static [&'static str] {
    static NAMES: OnceLock<Vec<&'static str>> = OnceLock::new();
    NAMES.get_or_init(|| {
        let wanted = [
            "hlist",
            "kpfn",
            "anon_vma",
            "mm",
            "address",
            "linear_page_index",
        ];
        let others = (0..250).map(|number| &*format!("member_{number}").leak());
        wanted.into_iter().chain(others).collect()
    })
}

/// A part of a structure, before it has a place.
#[derive(Clone, Debug)]
pub(crate) enum Piece {
    /// A member with a name.
    Plain(Plain),
    /// A bitfield with a name.
    Bits(u32),
    /// A bitfield without one.
    Blank(u32),
    /// Bytes that belong to nothing.
    Gap(u32),
    /// An anonymous structure or union.
    Part {
        is_union: bool,
        pieces: Vec<Piece>,
        qualifiers: Vec<Qualifier>,
    },
}

/// The type of a member.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Plain {
    Int,
    Pointer,
    Array(u32),
    /// A structure with a name, whose members do not count as those of what it is in.
    Named,
    Alias,
}

/// Where a member is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) name: &'static str,
    /// In bytes; `None` for a bitfield, which has no such place.
    pub(crate) offset: Option<u32>,
}

/// Types, with what is known of two of them.
#[derive(Clone, Debug)]
pub(crate) struct Made {
    pub(crate) types: Vec<Type>,
    pub(crate) structures: Vec<Structure>,
}

/// What a structure should be found to be.
#[derive(Clone, Debug)]
pub(crate) struct Structure {
    pub(crate) name: &'static str,
    pub(crate) size: u32,
    pub(crate) members: Vec<Placed>,
}

struct Maker {
    types: Vec<Type>,
    int: usize,
    pointer: usize,
    named: usize,
    alias: usize,
    /// What the structure that is being made has so far.
    placed: Vec<Placed>,
}

impl Maker {
    fn new() -> Self {
        let mut maker = Self {
            types: Vec::new(),
            int: 0,
            pointer: 0,
            named: 0,
            alias: 0,
            placed: Vec::new(),
        };
        maker.int = maker.add("unsigned int", Kind::Int(32));
        maker.pointer = maker.add("", Kind::Pointer(None));
        let member = |name: &str, of, bits| Member {
            name: name.to_owned(),
            of: Some(of),
            bits,
            width: None,
        };
        // Its members have names that the module looks for, somewhere else.
        let inner = vec![
            member("kpfn", maker.pointer, 0),
            member("mm", maker.pointer, 64),
        ];
        maker.named = maker.add("hlist_node", Kind::Struct(16, inner));
        maker.alias = maker.add("ksm_rmap_item", Kind::Typedef(Some(maker.pointer)));
        maker
    }

    fn add(&mut self, name: &str, kind: Kind) -> usize {
        self.types.push(Type {
            name: name.to_owned(),
            kind,
        });
        self.types.len() - 1
    }

    fn plain(&mut self, plain: Plain) -> (usize, u32) {
        match plain {
            Plain::Int => (self.int, 4),
            Plain::Pointer => (self.pointer, 8),
            Plain::Named => (self.named, 16),
            Plain::Alias => (self.alias, 8),
            Plain::Array(len) => {
                let of = Some(self.pointer);
                (self.add("", Kind::Array(of, len)), 8 * len)
            }
        }
    }

    /// The next name, for a member at an offset in bytes.
    fn place(&mut self, offset: Option<u32>) -> String {
        let name = names()[self.placed.len()];
        self.placed.push(Placed { name, offset });
        name.to_owned()
    }

    /// Lays pieces out one behind the other, or all at the start, `base` bytes into the whole; returns the members, and
    /// the size in bits.
    fn lay(&mut self, pieces: &[Piece], is_union: bool, base: u32) -> (Vec<Member>, u32) {
        let (mut members, mut at, mut size) = (Vec::new(), 0u32, 0u32);
        for piece in pieces {
            if is_union {
                at = 0;
            }
            if !matches!(piece, Piece::Bits(_) | Piece::Blank(_)) {
                at = at.next_multiple_of(8);
            }
            let (name, of, width, bits) = match piece {
                Piece::Gap(bytes) => {
                    at += 8 * bytes;
                    size = size.max(at);
                    continue;
                }
                Piece::Plain(plain) => {
                    let (of, bytes) = self.plain(*plain);
                    (self.place(Some(base + at / 8)), of, None, 8 * bytes)
                }
                Piece::Bits(width) => (self.place(None), self.int, Some(*width), *width),
                Piece::Blank(width) => (String::new(), self.int, Some(*width), *width),
                Piece::Part {
                    is_union,
                    pieces,
                    qualifiers,
                } => {
                    let (members, bits) = self.lay(pieces, *is_union, base + at / 8);
                    let bits = bits.next_multiple_of(8);
                    let kind = match is_union {
                        true => Kind::Union(bits / 8, members),
                        false => Kind::Struct(bits / 8, members),
                    };
                    let mut of = self.add("", kind);
                    for qualifier in qualifiers {
                        of = self.add("", Kind::Qualified(*qualifier, Some(of)));
                    }
                    (String::new(), of, None, bits)
                }
            };
            members.push(Member {
                name,
                of: Some(of),
                bits: at,
                width,
            });
            at += bits;
            size = size.max(at);
        }
        (members, size)
    }

    fn structure(&mut self, name: &'static str, pieces: &[Piece]) -> Structure {
        self.placed.clear();
        let (members, bits) = self.lay(pieces, false, 0);
        let size = bits.div_ceil(8);
        self.add(name, Kind::Struct(size, members));
        Structure {
            name,
            size,
            members: std::mem::take(&mut self.placed),
        }
    }
}

/// Puts the types into another order.
fn shuffle(types: &mut Vec<Type>, mut seed: u64) {
    let mut order: Vec<usize> = (0..types.len()).collect();
    for last in (1..order.len()).rev() {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        order.swap(last, (seed >> 33) as usize % (last + 1));
    }
    let mut places = vec![0; order.len()];
    for (place, index) in order.iter().enumerate() {
        places[*index] = place;
    }
    let moved = |of: &mut Reference| {
        if let Some(index) = of {
            *index = places[*index];
        }
    };
    for one in types.iter_mut() {
        match &mut one.kind {
            Kind::Pointer(of)
            | Kind::Array(of, _)
            | Kind::Typedef(of)
            | Kind::Qualified(_, of)
            | Kind::Function(of)
            | Kind::Prototype(of, _)
            | Kind::Variable(of)
            | Kind::DeclarationTag(of) => moved(of),
            Kind::Struct(_, members) | Kind::Union(_, members) => {
                members.iter_mut().for_each(|member| moved(&mut member.of));
            }
            Kind::Int(_)
            | Kind::Enum(_)
            | Kind::Forward
            | Kind::Section(_)
            | Kind::Float(_)
            | Kind::Enum64(_) => {}
        }
    }
    *types = order.iter().map(|index| types[*index].clone()).collect();
}

/// What is random about a whole.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) pieces: [Vec<Piece>; 2],
    /// Types that have nothing to do with it, some with names that mislead.
    pub(crate) others: Vec<(usize, Kind)>,
    pub(crate) order: u64,
    pub(crate) frame: Frame,
}

/// Names that are not those of the structures that are looked for, or not structures.
const MISLEADING: [&str; 8] = [
    "",
    "ksm_stable_node",
    "ksm_rmap_item",
    "ksm_stable_nod",
    "ksm_stable_node_",
    "node",
    "rmap_item",
    "kpfn",
];

impl Plan {
    pub(crate) fn make(&self) -> Made {
        let mut maker = Maker::new();
        let structures = STRUCTURES
            .iter()
            .zip(&self.pieces)
            .map(|(name, pieces)| maker.structure(name, pieces))
            .collect();
        for (name, kind) in &self.others {
            let name = match kind {
                // Two structures of the same name would be no longer told apart.
                Kind::Struct(..) => MISLEADING[3 + name % 5],
                _ => MISLEADING[name % 8],
            };
            maker.add(name, kind.clone());
        }
        let mut types = maker.types;
        shuffle(&mut types, self.order);
        Made { types, structures }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        write(&self.make().types, self.frame)
    }

    /// Whether there are no more anonymous parts than the parser looks at, which no real structure comes near.
    fn is_modest(&self) -> bool {
        self.pieces.iter().all(|pieces| lookups(pieces) <= 64)
    }
}

/// Types to look up for all that is anonymous.
fn lookups(pieces: &[Piece]) -> usize {
    let of = |piece: &Piece| match piece {
        Piece::Part {
            pieces, qualifiers, ..
        } => 1 + qualifiers.len() + lookups(pieces),
        _ => 0,
    };
    pieces.iter().map(of).sum()
}

impl Made {
    /// Where all members are that have a place.
    pub(crate) fn wanted(&self) -> Vec<Wanted> {
        let of = |structure: &Structure| {
            let name = structure.name;
            let placed = structure.members.clone().into_iter();
            placed.filter_map(move |member| {
                Some(Wanted {
                    structure: name,
                    field: member.name,
                    offset: member.offset? as usize,
                })
            })
        };
        self.structures.iter().flat_map(of).collect()
    }

    fn wanted_sizes(&self) -> Vec<WantedSize> {
        let of = |structure: &Structure| WantedSize {
            structure: structure.name,
            size: structure.size as usize,
        };
        self.structures.iter().map(of).collect()
    }
}

fn any_plain() -> impl Strategy<Value = Plain> {
    prop_oneof![
        Just(Plain::Int),
        Just(Plain::Pointer),
        (0u32..5).prop_map(Plain::Array),
        Just(Plain::Named),
        Just(Plain::Alias),
    ]
}

fn any_qualifiers() -> impl Strategy<Value = Vec<Qualifier>> {
    let one = prop_oneof![
        Just(Qualifier::Volatile),
        Just(Qualifier::Const),
        Just(Qualifier::Tag),
    ];
    prop::collection::vec(one, 0..3)
}

fn any_piece() -> impl Strategy<Value = Piece> {
    let leaf = prop_oneof![
        6 => any_plain().prop_map(Piece::Plain),
        1 => (1u32..32).prop_map(Piece::Bits),
        1 => (1u32..32).prop_map(Piece::Blank),
        1 => (1u32..24).prop_map(Piece::Gap),
    ];
    leaf.prop_recursive(4, 10, 4, |inner| {
        let pieces = prop::collection::vec(inner, 0..4);
        (any::<bool>(), pieces, any_qualifiers()).prop_map(|(is_union, pieces, qualifiers)| {
            Piece::Part {
                is_union,
                pieces,
                qualifiers,
            }
        })
    })
}

fn any_other() -> impl Strategy<Value = Kind> {
    // Types 0 to 3 are always there.
    let reference = || prop::option::of(0usize..4);
    let member = (0usize..250, reference(), 0u32..64).prop_map(|(name, of, bits)| Member {
        name: names()[name].to_owned(),
        of,
        bits,
        width: None,
    });
    let members = prop::collection::vec(member, 0..4);
    prop_oneof![
        (1u32..128).prop_map(Kind::Int),
        reference().prop_map(Kind::Pointer),
        (reference(), any::<u32>()).prop_map(|(of, len)| Kind::Array(of, len)),
        members
            .clone()
            .prop_map(|members| Kind::Struct(64, members)),
        members.prop_map(|members| Kind::Union(64, members)),
        (0u32..5).prop_map(Kind::Enum),
        Just(Kind::Forward),
        reference().prop_map(Kind::Typedef),
        reference().prop_map(|of| Kind::Qualified(Qualifier::Restrict, of)),
        reference().prop_map(Kind::Function),
        (reference(), 0u32..5).prop_map(|(of, count)| Kind::Prototype(of, count)),
        reference().prop_map(Kind::Variable),
        (0u32..4).prop_map(Kind::Section),
        Just(Kind::Float(8)),
        reference().prop_map(Kind::DeclarationTag),
        (0u32..4).prop_map(Kind::Enum64),
    ]
}

fn any_frame() -> impl Strategy<Value = Frame> {
    let bytes = (0u8..40, 0u8..40, 0u8..40, 0u8..40);
    (bytes, any::<bool>(), any::<bool>()).prop_map(
        |((longer_header, before, between, behind), strings_first, share_names)| Frame {
            longer_header,
            before,
            between,
            behind,
            strings_first,
            share_names,
        },
    )
}

/// Types with the two structures among them.
pub(crate) fn any_plan() -> impl Strategy<Value = Plan> {
    let pieces = || prop::collection::vec(any_piece(), 0..6);
    let others = prop::collection::vec((0usize..100, any_other()), 0..20);
    let plan = (pieces(), pieces(), others, any::<u64>(), any_frame()).prop_map(
        |(one, other, others, order, frame)| Plan {
            pieces: [one, other],
            others,
            order,
            frame,
        },
    );
    plan.prop_filter("too many anonymous parts", Plan::is_modest)
}

fn parse(bytes: &[u8]) -> Result<Btf<'_>, TestCaseError> {
    Btf::parse(bytes).map_err(|error| TestCaseError::fail(format!("{error:?}")))
}

proptest! {
    #[test]
    fn members_are_found_where_they_were_put(plan in any_plan()) {
        let made = plan.make();
        let bytes = plan.bytes();
        let btf = parse(&bytes)?;
        for structure in &made.structures {
            let found = btf.find_struct(structure.name);
            let Ok(Some(found)) = found else {
                return Err(TestCaseError::fail(format!("{} is not found", structure.name)));
            };
            prop_assert_eq!(found.size(), structure.size);
            for member in &structure.members {
                prop_assert_eq!(found.offset_of(&btf, member.name), Ok(member.offset), "{}", member.name);
            }
            for name in &names()[structure.members.len()..structure.members.len() + 8] {
                prop_assert_eq!(found.offset_of(&btf, name), Ok(None), "{}", name);
            }
            prop_assert_eq!(found.offset_of(&btf, ""), Ok(None));
        }
        prop_assert!(matches!(btf.find_struct("no_such_struct"), Ok(None)));
        prop_assert_eq!(prove(&btf, &made.wanted()), Ok(()));
        prop_assert_eq!(prove_sizes(&btf, &made.wanted_sizes()), Ok(()));
    }

    #[test]
    fn a_module_that_wants_something_else_is_refused(
        plan in any_plan(),
        which in any::<prop::sample::Index>(),
        offset in 0usize..4096,
        size in 0usize..4096,
    ) {
        let made = plan.make();
        let bytes = plan.bytes();
        let btf = parse(&bytes)?;
        let mut wanted = made.wanted();
        if !wanted.is_empty() {
            let index = which.index(wanted.len());
            let before = wanted[index].offset;
            wanted[index].offset = offset;
            let Wanted { structure, field, .. } = wanted[index];
            let mismatch = Mismatch::Offset { structure, field, found: before as u32, wanted: offset };
            let answer = if before == offset { Ok(()) } else { Err(mismatch) };
            prop_assert_eq!(prove(&btf, &wanted), answer);
            // A member that is not there, and a structure that is not.
            wanted[index].field = "no_such_member";
            let missing = Mismatch::NoField { structure, field: "no_such_member", wanted: offset };
            prop_assert_eq!(prove(&btf, &wanted), Err(missing));
            wanted[index].structure = "no_such_struct";
            let missing = Mismatch::NoStruct {
                structure: "no_such_struct",
                field: "no_such_member",
                wanted: offset,
            };
            prop_assert_eq!(prove(&btf, &wanted), Err(missing));
        }
        let mut sizes = made.wanted_sizes();
        let index = which.index(sizes.len());
        let WantedSize { structure, size: before } = sizes[index];
        sizes[index].size = size;
        let mismatch = Mismatch::Size { structure, found: Some(before as u32), wanted: size };
        let answer = if before == size { Ok(()) } else { Err(mismatch) };
        prop_assert_eq!(prove_sizes(&btf, &sizes), answer);
    }

    #[test]
    fn a_kernel_with_another_layout_is_refused(
        plan in any_plan(),
        structure in 0usize..2,
        at in any::<prop::sample::Index>(),
        gap in 1u32..64,
    ) {
        let before = plan.make();
        let mut other = plan;
        let pieces = &mut other.pieces[structure];
        let at = at.index(pieces.len() + 1);
        pieces.insert(at, Piece::Gap(gap));
        let after = other.make();
        let first = before.wanted().into_iter().zip(after.wanted()).find(|(one, other)| one.offset != other.offset);
        let answer = match first {
            None => Ok(()),
            Some((Wanted { structure, field, offset }, found)) => Err(Mismatch::Offset {
                structure,
                field,
                found: found.offset as u32,
                wanted: offset,
            }),
        };
        let bytes = other.bytes();
        prop_assert_eq!(prove(&parse(&bytes)?, &before.wanted()), answer);
        // It has grown in any case.
        prop_assert!(prove_sizes(&parse(&bytes)?, &before.wanted_sizes()).is_err());
    }

    #[test]
    fn two_structures_of_one_name_are_refused(plan in any_plan(), which in 0usize..2) {
        let mut made = plan.make();
        let name = STRUCTURES[which].to_owned();
        made.types.push(Type { name, kind: Kind::Struct(8, Vec::new()) });
        let bytes = write(&made.types, plan.frame);
        prop_assert!(parse(&bytes)?.find_struct(STRUCTURES[which]).is_err());
        prop_assert!(prove_sizes(&parse(&bytes)?, &made.wanted_sizes()).is_err());
    }
}
