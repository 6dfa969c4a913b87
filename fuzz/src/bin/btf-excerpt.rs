//! Cuts type information down to some structures and what they consist of; pointers lead nowhere then.
//!
//!     objcopy --dump-section .BTF=vmlinux.btf vmlinux /dev/null
//!     btf-excerpt vmlinux.btf EXCERPT ksm_stable_node ksm_rmap_item

use std::collections::HashMap;
use std::env;
use std::error::Error;
use std::fs;

use ksm_fuzz::btf_writer::write;
use ksm_fuzz::btf_writer::Frame;
use ksm_fuzz::btf_writer::Kind;
use ksm_fuzz::btf_writer::Member;
use ksm_fuzz::btf_writer::Qualifier;
use ksm_fuzz::btf_writer::Reference;
use ksm_fuzz::btf_writer::Type;

/// A type as it was read.
struct Raw {
    name: u32,
    info: u32,
    rest: u32,
    parts: Vec<u32>,
}

impl Raw {
    fn kind(&self) -> u32 {
        self.info >> 24 & 0x7f
    }
}

struct Whole {
    /// From the number 1 on.
    types: Vec<Raw>,
    strings: Vec<u8>,
}

impl Whole {
    fn read(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk::<4>()?));
        let field = |at| word(at).map(|word| word as usize);
        let body = field(4)?;
        let (types_at, types_len) = (body + field(8)?, field(12)?);
        let (strings_at, strings_len) = (body + field(16)?, field(20)?);
        let strings = bytes.get(strings_at..strings_at + strings_len)?.to_vec();
        let (mut types, mut at) = (Vec::new(), types_at);
        while at < types_at + types_len {
            let info = word(at + 4)?;
            let count = (info & 0x00ff_ffff) as usize;
            let parts = match info >> 24 & 0x7f {
                1 | 14 | 17 => 1,
                3 => 3,
                4 | 5 | 15 | 19 => 3 * count,
                6 | 13 => 2 * count,
                _ => 0,
            };
            types.push(Raw {
                name: word(at)?,
                info,
                rest: word(at + 8)?,
                parts: (0..parts)
                    .map(|part| word(at + 12 + 4 * part))
                    .collect::<Option<_>>()?,
            });
            at += 12 + 4 * parts;
        }
        Some(Self { types, strings })
    }

    fn name(&self, offset: u32) -> String {
        let rest = &self.strings[offset as usize..];
        let len = rest.iter().position(|byte| *byte == 0).unwrap_or(0);
        String::from_utf8_lossy(&rest[..len]).into_owned()
    }
}

/// The types that are kept, and the places of those that have one already.
struct Excerpt<'a> {
    whole: &'a Whole,
    kept: Vec<Type>,
    places: HashMap<u32, usize>,
}

impl Excerpt<'_> {
    fn keep(&mut self, number: u32) -> Reference {
        if number == 0 {
            return None;
        }
        if let Some(place) = self.places.get(&number) {
            return Some(*place);
        }
        let place = self.kept.len();
        self.places.insert(number, place);
        let whole = self.whole;
        let raw = &whole.types[number as usize - 1];
        self.kept.push(Type {
            name: whole.name(raw.name),
            kind: Kind::Forward,
        });
        let kind = match raw.kind() {
            1 => Kind::Int(raw.parts[0] & 0xff),
            2 => Kind::Pointer(None),
            3 => Kind::Array(self.keep(raw.parts[0]), raw.parts[2]),
            kind @ (4 | 5) => {
                let wide = raw.info >> 31 != 0;
                let members = raw.parts.chunks(3).map(|member| {
                    let place = member[2];
                    Member {
                        name: whole.name(member[0]),
                        of: self.keep(member[1]),
                        bits: if wide { place & 0x00ff_ffff } else { place },
                        width: (wide && place >> 24 != 0).then_some(place >> 24),
                    }
                });
                let members = members.collect();
                match kind {
                    4 => Kind::Struct(raw.rest, members),
                    _ => Kind::Union(raw.rest, members),
                }
            }
            6 => Kind::Enum(raw.info & 0x00ff_ffff),
            8 => Kind::Typedef(self.keep(raw.rest)),
            9 => Kind::Qualified(Qualifier::Volatile, self.keep(raw.rest)),
            10 => Kind::Qualified(Qualifier::Const, self.keep(raw.rest)),
            18 => Kind::Qualified(Qualifier::Tag, self.keep(raw.rest)),
            16 => Kind::Float(raw.rest),
            19 => Kind::Enum64(raw.info & 0x00ff_ffff),
            _ => Kind::Forward,
        };
        self.kept[place].kind = kind;
        Some(place)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [from, to, structures @ ..] = &arguments[..] else {
        return Err("usage: btf-excerpt BTF EXCERPT STRUCTURE…".into());
    };
    let whole = Whole::read(&fs::read(from)?).ok_or("the type information is damaged")?;
    let mut excerpt = Excerpt {
        whole: &whole,
        kept: Vec::new(),
        places: HashMap::new(),
    };
    for structure in structures {
        let wanted = |raw: &Raw| raw.kind() == 4 && whole.name(raw.name) == *structure;
        let index = whole.types.iter().position(wanted);
        let index = index.ok_or_else(|| format!("there is no struct {structure}"))?;
        excerpt.keep(index as u32 + 1);
    }
    let frame = Frame {
        share_names: true,
        ..Frame::default()
    };
    fs::write(to, write(&excerpt.kept, frame))?;
    Ok(())
}
