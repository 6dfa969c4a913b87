//! What the end-to-end tests of KSM are written with.
//!
//! The tests drive a producer of KSM pages only through what an administrator and a program see: the sysfs
//! directory ([`ksm`]), `madvise` and friends on memory of real processes ([`memory`], [`child`]) and what
//! `/proc` says about them ([`procfs`]). So the same tests run against ksm_rs and against the kernel's own KSM.
//!
//! Every test runs in a process of its own with a time limit ([`runner`]).

pub mod child;
pub mod kmsg;
pub mod ksm;
pub mod memory;
pub mod module;
pub mod numa;
pub mod passes;
pub mod procfs;
pub mod runner;
pub mod slow_file;
pub mod swap;
pub mod trace;
pub mod userfault;
pub mod wait;

pub use child::Child;
pub use ksm::Ksm;
pub use memory::Content;
pub use memory::Region;
pub use passes::Passes;
