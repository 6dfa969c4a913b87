//! Writes BTF, from the format's description and not from the parser that is to be tried with it.

/// A type of the kernel, by its place in the list of types. `None` stands for `void`.
pub type Reference = Option<usize>;

/// A member of a structure or union.
#[derive(Clone, Debug)]
pub struct Member {
    /// Name; empty for an anonymous one.
    pub name: String,
    /// Its type.
    pub of: Reference,
    /// Its offset in bits.
    pub bits: u32,
    /// The bits that it takes if it is a bitfield.
    pub width: Option<u32>,
}

/// What a type is.
#[derive(Clone, Debug)]
pub enum Kind {
    /// An integer of so many bits.
    Int(u32),
    /// A pointer.
    Pointer(Reference),
    /// An array of so many.
    Array(Reference, u32),
    /// A structure of so many bytes.
    Struct(u32, Vec<Member>),
    /// A union of so many bytes.
    Union(u32, Vec<Member>),
    /// An enumeration of so many values.
    Enum(u32),
    /// A structure that is only declared.
    Forward,
    /// A type by another name.
    Typedef(Reference),
    /// A type with a qualifier: `volatile`, `const`, `restrict` or a tag.
    Qualified(Qualifier, Reference),
    /// A function of a prototype.
    Function(Reference),
    /// A prototype with so many parameters.
    Prototype(Reference, u32),
    /// A variable.
    Variable(Reference),
    /// A section with so many variables.
    Section(u32),
    /// A floating-point number of so many bytes.
    Float(u32),
    /// A tag of a declaration.
    DeclarationTag(Reference),
    /// An enumeration with so many 64-bit values.
    Enum64(u32),
}

/// What a type can be qualified with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qualifier {
    /// `volatile`
    Volatile,
    /// `const`
    Const,
    /// `restrict`, which only pointers can be.
    Restrict,
    /// An attribute.
    Tag,
}

/// A type with its name.
#[derive(Clone, Debug)]
pub struct Type {
    /// Name; empty if it has none.
    pub name: String,
    /// What it is.
    pub kind: Kind,
}

/// How the bytes are arranged around the types.
#[derive(Clone, Copy, Debug, Default)]
pub struct Frame {
    /// Bytes of the header beyond the 24 that each has.
    pub longer_header: u8,
    /// Bytes in front of the first section.
    pub before: u8,
    /// Bytes between the two.
    pub between: u8,
    /// Bytes behind the last.
    pub behind: u8,
    /// The strings come first.
    pub strings_first: bool,
    /// The same name is stored only once.
    pub share_names: bool,
}

struct Strings {
    bytes: Vec<u8>,
    share: bool,
}

impl Strings {
    fn offset_of(&mut self, name: &str) -> u32 {
        if name.is_empty() {
            return 0;
        }
        let mut whole = name.as_bytes().to_vec();
        whole.push(0);
        let known = |bytes: &[u8]| bytes.windows(whole.len()).position(|part| part == whole);
        // As pahole does, a name may be the end of another one.
        if let Some(at) = self.share.then(|| known(&self.bytes)).flatten() {
            return at as u32;
        }
        let at = self.bytes.len();
        self.bytes.extend(whole);
        at as u32
    }
}

fn number(reference: Reference) -> u32 {
    reference.map_or(0, |index| index as u32 + 1)
}

fn words(bytes: &mut Vec<u8>, words: &[u32]) {
    bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
}

fn write_members(types: &mut Vec<u8>, strings: &mut Strings, members: &[Member], wide: bool) {
    for member in members {
        let place = match (wide, member.width) {
            (true, width) => member.bits | width.unwrap_or(0) << 24,
            (false, _) => member.bits,
        };
        let name = strings.offset_of(&member.name);
        words(types, &[name, number(member.of), place]);
    }
}

/// Writes the types, each of which has the number after its place in the list.
pub fn write(list: &[Type], frame: Frame) -> Vec<u8> {
    let mut strings = Strings {
        bytes: vec![0],
        share: frame.share_names,
    };
    let mut types = Vec::new();
    for one in list {
        let name = strings.offset_of(&one.name);
        let mut head = |kind: u32, flag: bool, count: u32, rest: u32| {
            words(
                &mut types,
                &[name, kind << 24 | u32::from(flag) << 31 | count, rest],
            );
        };
        match &one.kind {
            Kind::Int(bits) => {
                head(1, false, 0, bits.div_ceil(8));
                words(&mut types, &[*bits]);
            }
            Kind::Pointer(to) => head(2, false, 0, number(*to)),
            Kind::Array(of, len) => {
                head(3, false, 0, 0);
                words(&mut types, &[number(*of), number(*of), *len]);
            }
            Kind::Struct(size, members) | Kind::Union(size, members) => {
                let kind = if matches!(one.kind, Kind::Struct(..)) {
                    4
                } else {
                    5
                };
                let wide = members.iter().any(|member| member.width.is_some());
                head(kind, wide, members.len() as u32, *size);
                write_members(&mut types, &mut strings, members, wide);
            }
            Kind::Enum(values) => {
                head(6, false, *values, 4);
                (0..*values).for_each(|value| words(&mut types, &[0, value]));
            }
            Kind::Forward => head(7, false, 0, 0),
            Kind::Typedef(of) => head(8, false, 0, number(*of)),
            Kind::Qualified(qualifier, of) => {
                let kind = match qualifier {
                    Qualifier::Volatile => 9,
                    Qualifier::Const => 10,
                    Qualifier::Restrict => 11,
                    Qualifier::Tag => 18,
                };
                head(kind, false, 0, number(*of));
            }
            Kind::Function(of) => head(12, false, 0, number(*of)),
            Kind::Prototype(result, parameters) => {
                head(13, false, *parameters, number(*result));
                (0..*parameters).for_each(|_| words(&mut types, &[0, number(*result)]));
            }
            Kind::Variable(of) => {
                head(14, false, 0, number(*of));
                words(&mut types, &[1]);
            }
            Kind::Section(variables) => {
                head(15, false, *variables, 8 * *variables);
                (0..*variables).for_each(|at| words(&mut types, &[0, 8 * at, 8]));
            }
            Kind::Float(bytes) => head(16, false, 0, *bytes),
            Kind::DeclarationTag(of) => {
                head(17, false, 0, number(*of));
                words(&mut types, &[u32::MAX]);
            }
            Kind::Enum64(values) => {
                head(19, false, *values, 8);
                (0..*values).for_each(|value| words(&mut types, &[0, value, 0]));
            }
        }
    }
    arrange(&types, &strings.bytes, frame)
}

fn arrange(types: &[u8], strings: &[u8], frame: Frame) -> Vec<u8> {
    let mut body = vec![0xee; frame.before.into()];
    let mut put = |part: &[u8], behind: u8| {
        let at = body.len() as u32;
        body.extend_from_slice(part);
        body.extend(vec![0xee; behind.into()]);
        at
    };
    let (types_at, strings_at);
    if frame.strings_first {
        strings_at = put(strings, frame.between);
        types_at = put(types, frame.behind);
    } else {
        types_at = put(types, frame.between);
        strings_at = put(strings, frame.behind);
    }
    let mut bytes = Vec::new();
    bytes.extend(0xeb9f_u16.to_ne_bytes());
    bytes.extend([1, 0]);
    words(
        &mut bytes,
        &[
            24 + u32::from(frame.longer_header),
            types_at,
            types.len() as u32,
            strings_at,
            strings.len() as u32,
        ],
    );
    bytes.extend(vec![0xdd; frame.longer_header.into()]);
    bytes.extend(body);
    bytes
}
