//! Property tests of what ksm_rs parses: the kernel's type information (BTF), what is written to its files, its
//! parameters; and of the hash that others would like to collide.
//!
//! The module's own files are compiled here, unchanged. `make fuzz` runs the tests, `CASES=` says with how many random
//! inputs each. Inputs that once failed are kept in `proptest-regressions/`, interesting ones in `corpus/`.

#![cfg_attr(not(test), allow(dead_code))]

#[allow(dead_code)]
#[path = "../../advisor.rs"]
mod advisor;
#[allow(dead_code)]
#[path = "../../btf.rs"]
mod btf;
#[allow(dead_code)]
#[path = "../../domain.rs"]
mod domain;
#[path = "../../hash.rs"]
mod hash;
#[allow(dead_code)]
#[path = "../../knobs.rs"]
mod knobs;
#[allow(dead_code)]
#[path = "../../layout.rs"]
mod layout;
#[path = "../../parse.rs"]
mod parse;

/// Where the module finds C functions.
mod mm {
    pub(crate) use kernel::c as bindings;
}

pub mod btf_writer;

#[cfg(test)]
mod btf_damage;
#[cfg(test)]
mod btf_layouts;
#[cfg(test)]
mod collisions;
#[cfg(test)]
mod corpus;
#[cfg(test)]
mod file_text;
#[cfg(test)]
mod parameter_text;
#[cfg(test)]
mod text;
