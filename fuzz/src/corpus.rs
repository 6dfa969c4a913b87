//! What is kept in `corpus/`: type information cut out of real kernels, whole and damaged in every single place; texts.

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use crate::btf::Btf;
use crate::btf_damage::ask_everything;
use crate::file_text;
use crate::layout::prove;
use crate::layout::prove_sizes;
use crate::layout::Wanted;
use crate::layout::WantedSize;
use crate::parameter_text;

fn files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(folder);
    let entries = fs::read_dir(&folder).expect("a folder of the corpus");
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", folder.display());
    files
}

/// Members of a structure with their offsets.
fn of<'a>(
    structure: &'static str,
    fields: &'a [(&'static str, usize)],
) -> impl Iterator<Item = Wanted> + 'a {
    fields.iter().map(move |&(field, offset)| Wanted {
        structure,
        field,
        offset,
    })
}

/// What pahole says of the structures of the kernels that the excerpts are of.
fn wanted(name: &str) -> Vec<Wanted> {
    let node = [("hlist", 40), ("kpfn", 48)];
    let item = [("anon_vma", 8), ("mm", 16), ("address", 24), ("hlist", 48)];
    let index = [("linear_page_index", 32)];
    let index = if name.contains("7.3") {
        &index[..]
    } else {
        &[]
    };
    of("ksm_stable_node", &node)
        .chain(of("ksm_rmap_item", &item))
        .chain(of("ksm_rmap_item", index))
        .collect()
}

const SIZES: [WantedSize; 2] = [
    WantedSize {
        structure: "ksm_stable_node",
        size: 64,
    },
    WantedSize {
        structure: "ksm_rmap_item",
        size: 64,
    },
];

fn fits(bytes: &[u8], wanted: &[Wanted]) -> bool {
    Btf::parse(bytes)
        .is_ok_and(|btf| prove(&btf, wanted).is_ok() && prove_sizes(&btf, &SIZES).is_ok())
}

#[test]
fn excerpts_of_real_kernels_fit_and_with_one_thing_changed_do_not() {
    for file in files("btf") {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let bytes = fs::read(&file).expect("an excerpt");
        let wanted = wanted(&name);
        assert!(fits(&bytes, &wanted), "{name}");
        for at in 0..wanted.len() {
            for offset in (0..64).filter(|offset| *offset != wanted[at].offset) {
                let mut other = wanted.clone();
                other[at].offset = offset;
                assert!(!fits(&bytes, &other), "{name}: {:?}", other[at]);
            }
        }
    }
}

#[test]
fn excerpts_cut_off_anywhere_or_with_any_bit_turned_are_survived() {
    for file in files("btf") {
        let bytes = fs::read(&file).expect("an excerpt");
        for len in 0..bytes.len() {
            ask_everything(&bytes[..len]);
        }
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut copy = bytes.clone();
                copy[at] ^= 1 << bit;
                ask_everything(&copy);
            }
            for value in [0, 0x7f, 0xff] {
                let mut copy = bytes.clone();
                copy[at] = value;
                ask_everything(&copy);
            }
        }
    }
}

#[test]
fn texts_that_were_worth_keeping_are_taken_as_the_rules_say() {
    for file in files("text") {
        let text = fs::read(&file).expect("a text");
        file_text::check(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        parameter_text::check(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    }
}
