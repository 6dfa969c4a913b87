//! What the end-to-end tests of KSM are written with.
//!
//! The tests drive a producer of KSM pages only through what an administrator and a program see: the sysfs
//! directory ([`ksm`]), `madvise` and friends on memory of real processes ([`memory`], [`child`]) and what
//! `/proc` says about them ([`procfs`]). So the same tests run against ksm_rs and against the kernel's own KSM.
//!
//! Every test runs in a process of its own with a time limit ([`runner`]).

pub mod child;
pub mod delays;
pub mod doctor;
pub mod exhausted;
pub mod faults;
pub mod freezer;
pub mod hash_key;
pub mod hotplug;
pub mod kmsg;
pub mod kprobe;
pub mod ksm;
pub mod ksm_events;
pub mod leftovers;
pub mod memory;
pub mod module;
pub mod numa;
pub mod passes;
pub mod procfs;
pub mod record;
pub mod runner;
pub mod settings;
pub mod sharer;
pub mod slow_file;
pub mod swap;
pub mod trace;
pub mod userfault;
pub mod wait;
pub mod world;
pub mod zero_pages;

pub use child::Child;
pub use ksm::Ksm;
pub use memory::Content;
pub use memory::Region;
pub use passes::Passes;
pub use sharer::Sharer;

/// The seeds to use for what is made at random: those given, or the one that the environment variable
/// `KSM_E2E_SEED` names.
pub fn seeds(usual: &[u64]) -> anyhow::Result<Vec<u64>> {
    use anyhow::Context;
    match std::env::var("KSM_E2E_SEED") {
        Ok(seed) => Ok(vec![seed.parse().context("KSM_E2E_SEED")?]),
        Err(_) => Ok(usual.to_vec()),
    }
}
