//! Damaged BTF: whatever the bytes are, the parser ends, soon, with an answer that can be.

use nix::time::clock_gettime;
use nix::time::ClockId;
use proptest::prelude::*;
use std::time::Duration;

use crate::btf::Btf;
use crate::btf_layouts::any_plan;
use crate::btf_layouts::names;
use crate::btf_layouts::STRUCTURES;
use crate::btf_writer::write;
use crate::btf_writer::Frame;
use crate::btf_writer::Kind;
use crate::btf_writer::Member;
use crate::btf_writer::Qualifier;
use crate::btf_writer::Type;
use crate::layout::prove;
use crate::layout::prove_sizes;
use crate::layout::Wanted;
use crate::layout::WantedSize;

/// Asks for everything that the module asks for, and some more. What comes out must be possible; that it comes out at all
/// is what this is about.
pub(crate) fn ask_everything(bytes: &[u8]) {
    let Ok(btf) = Btf::parse(bytes) else { return };
    for structure in STRUCTURES {
        if let Ok(Some(found)) = btf.find_struct(structure) {
            for name in &names()[..12] {
                if let Ok(Some(offset)) = found.offset_of(&btf, name) {
                    assert!(
                        offset <= found.size(),
                        "{structure}.{name} at {offset} of {}",
                        found.size()
                    );
                }
            }
        }
        let wanted = names()[..6].iter().map(|field| Wanted {
            structure,
            field,
            offset: 8,
        });
        let wanted: Vec<Wanted> = wanted.collect();
        // What is wrong is said in words, too.
        let _ = prove(&btf, &wanted).map_err(|mismatch| mismatch.to_string());
        let size = [WantedSize {
            structure,
            size: 64,
        }];
        let _ = prove_sizes(&btf, &size).map_err(|mismatch| mismatch.to_string());
    }
}

/// Values that lengths and offsets are wrong with.
const EDGES: [u32; 14] = [
    0,
    1,
    2,
    11,
    12,
    24,
    0x7f,
    0xffff,
    0x00ff_ffff,
    0x0100_0000,
    0x7fff_ffff,
    0x8000_0000,
    u32::MAX - 1,
    u32::MAX,
];

/// A change to some bytes.
#[derive(Clone, Debug)]
enum Damage {
    Truncate(prop::sample::Index),
    Flip(prop::sample::Index, u8),
    Word(prop::sample::Index, u32),
    /// The info of a type: its kind, flag and count.
    Info(prop::sample::Index, u8, bool, u32),
    Copy(prop::sample::Index, prop::sample::Index, u8),
    Insert(prop::sample::Index, Vec<u8>),
}

fn any_damage() -> impl Strategy<Value = Damage> {
    let index = any::<prop::sample::Index>;
    let word = prop_oneof![prop::sample::select(&EDGES[..]), any::<u32>(), 0u32..64];
    prop_oneof![
        1 => index().prop_map(Damage::Truncate),
        3 => (index(), 1u8..).prop_map(|(at, bits)| Damage::Flip(at, bits)),
        4 => (index(), word.clone()).prop_map(|(at, word)| Damage::Word(at, word)),
        3 => (index(), 0u8..24, any::<bool>(), word)
            .prop_map(|(at, kind, flag, count)| Damage::Info(at, kind, flag, count)),
        1 => (index(), index(), 1u8..64).prop_map(|(from, to, len)| Damage::Copy(from, to, len)),
        1 => (index(), prop::collection::vec(any::<u8>(), 1..16))
            .prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
    ]
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let len = bytes.len();
        if len < 8 {
            return;
        }
        let put = |bytes: &mut Vec<u8>, at: &prop::sample::Index, word: u32| {
            // Most of what matters is aligned.
            let at = at.index(len - 3) & !3;
            bytes[at..at + 4].copy_from_slice(&word.to_ne_bytes());
        };
        match self {
            Self::Truncate(at) => bytes.truncate(at.index(len)),
            Self::Flip(at, bits) => bytes[at.index(len)] ^= bits,
            Self::Word(at, word) => put(bytes, at, *word),
            Self::Info(at, kind, flag, count) => put(
                bytes,
                at,
                u32::from(*kind) << 24 | u32::from(*flag) << 31 | count & 0x00ff_ffff,
            ),
            Self::Copy(from, to, part) => {
                let part = usize::from(*part).min(len);
                let (from, to) = (from.index(len - part + 1), to.index(len - part + 1));
                bytes.copy_within(from..from + part, to);
            }
            Self::Insert(at, more) => {
                let at = at.index(len);
                bytes.splice(at..at, more.iter().copied());
            }
        }
    }
}

proptest! {
    #[test]
    fn any_damage_is_survived(
        plan in any_plan(),
        damages in prop::collection::vec(any_damage(), 1..6),
    ) {
        let mut bytes = plan.bytes();
        for damage in damages {
            damage.apply(&mut bytes);
        }
        ask_everything(&bytes);
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        ask_everything(&bytes);
    }

    #[test]
    fn any_types_behind_a_good_header_are_survived(
        types in prop::collection::vec(prop_oneof![any::<u32>(), 0u32..32, (0u32..24).prop_map(|kind| kind << 24 | 1)], 0..120),
    ) {
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let strings = b"\0ksm_stable_node\0ksm_rmap_item\0kpfn\0";
        let mut bytes = Vec::new();
        bytes.extend(0xeb9f_u16.to_ne_bytes());
        bytes.extend([1, 0]);
        for word in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            bytes.extend(u32::to_ne_bytes(word));
        }
        bytes.extend(types);
        bytes.extend(strings);
        ask_everything(&bytes);
    }

    #[test]
    fn references_that_go_round_end(
        kinds in prop::collection::vec((0u8..6, 0usize..12, 0usize..12), 1..12),
        root in 0usize..12,
    ) {
        // Anonymous parts and qualifiers that refer to each other in any way, in circles too.
        let count = kinds.len();
        let anonymous = |of: usize| Member { name: String::new(), of: Some(of % count), bits: 0, width: None };
        let mut types: Vec<Type> = kinds
            .iter()
            .map(|(kind, one, other)| {
                let of = Some(one % count);
                let members = vec![anonymous(*one), anonymous(*other)];
                let kind = match kind {
                    0 => Kind::Struct(64, members),
                    1 => Kind::Union(64, members),
                    2 => Kind::Qualified(Qualifier::Const, of),
                    3 => Kind::Qualified(Qualifier::Volatile, of),
                    4 => Kind::Qualified(Qualifier::Tag, of),
                    _ => Kind::Typedef(of),
                };
                Type { name: String::new(), kind }
            })
            .collect();
        types.push(Type { name: STRUCTURES[0].to_owned(), kind: Kind::Struct(64, vec![anonymous(root)]) });
        ask_everything(&write(&types, Frame::default()));
    }
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("the thread has a clock");
    Duration::from(time)
}

/// The least that some work took of a few times, as others run beside it.
fn least_time(work: impl Fn()) -> Duration {
    let times = (0..5).map(|_| {
        let start = cpu_time();
        work();
        cpu_time() - start
    });
    times.min().expect("five times")
}

/// A lookup takes a walk over all types, of which there are 64 at the most for each member that is asked for, whatever
/// the types look like.
#[test]
fn the_worst_types_cost_so_many_walks_and_no_more() {
    const WALKS: u32 = 65;
    const TYPES: usize = 60_000;
    let anonymous = |of: usize, bits: u32| Member {
        name: String::new(),
        of: Some(of),
        bits,
        width: None,
    };
    let filler = |types: &mut Vec<Type>| {
        let kind = Kind::Pointer(None);
        let name = String::new();
        types.resize(TYPES, Type { name, kind });
    };
    let whole = |kind: Kind| Type {
        name: STRUCTURES[0].to_owned(),
        kind,
    };
    let unnamed = |kind: Kind| Type {
        name: String::new(),
        kind,
    };
    let last = TYPES;
    let worst: [(&str, Vec<Type>, Type); 4] = [
        // A qualifier of itself, at the end of a long list.
        (
            "a circle of one",
            vec![whole(Kind::Struct(64, vec![anonymous(last, 0)]))],
            unnamed(Kind::Qualified(Qualifier::Const, Some(last))),
        ),
        // A structure that is a part of itself.
        (
            "a structure in itself",
            vec![whole(Kind::Struct(64, vec![anonymous(last, 0)]))],
            unnamed(Kind::Struct(
                64,
                vec![anonymous(last, 0), anonymous(last, 0)],
            )),
        ),
        // More parts than can be, each at the end of the list.
        (
            "very many parts",
            vec![whole(Kind::Struct(64, vec![anonymous(last, 0); 10_000]))],
            unnamed(Kind::Union(64, Vec::new())),
        ),
        // Parts that are no structures.
        (
            "very many parts without a name",
            vec![whole(Kind::Struct(64, vec![anonymous(last, 0); 10_000]))],
            unnamed(Kind::Int(32)),
        ),
    ];
    for (what, mut types, end) in worst {
        filler(&mut types);
        types.push(end);
        let bytes = write(&types, Frame::default());
        let btf = Btf::parse(&bytes).expect("a good header");
        let walk = least_time(|| {
            assert!(matches!(btf.find_struct("no_such_struct"), Ok(None)));
        });
        let found = btf.find_struct(STRUCTURES[0]).expect("good types");
        let found = found.expect("the structure");
        let search = least_time(|| {
            assert!(!matches!(found.offset_of(&btf, "kpfn"), Ok(Some(_))));
        });
        println!(
            "{what}: {:.1} walks",
            search.as_secs_f64() / walk.as_secs_f64()
        );
        assert!(
            search <= 2 * WALKS * walk,
            "{what}: {search:?}, where a walk takes {walk:?}"
        );
    }
}
