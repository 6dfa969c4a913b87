// SPDX-License-Identifier: GPL-2.0

//! Kernel Samepage Merging in Rust, as a module for an unmodified kernel.
//!
//! Linux knows what a KSM page is and how to reclaim, migrate and unshare it; this module makes such pages,
//! in the place of the core's own `mm/ksm.c`. Data flows one way: [`ksmd`] (when) → [`scan`] (which page) →
//! [`merge`] (what to do with it) → the trees (what is like it) → [`mm`] (make it so). The README has the
//! picture.
//!
//! This file is the order of bring-up and its mirror image.

use crate::{
    btf::Btf,
    delay::Point,
    knobs::Run,
    ksmd::Ksm,
    kthread::Thread,
    mm::hotplug::Notifier,
    registry::Registry,
    stock::{
        Stock,
        Symlink, //
    },
    symbols::Variables,
    sysfs::Directory,
    tracepoints::Probes, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

mod advisor;
mod arena;
mod btf;
mod delay;
mod domain;
mod engine;
mod forest;
mod hash;
mod items;
mod knobs;
mod ksmd;
mod kthread;
mod layout;
mod merge;
mod mm;
mod parse;
mod rbtree;
mod registry;
mod scan;
mod series;
mod slots;
mod stable_tree;
mod stats;
mod stock;
mod symbols;
mod sysfs;
mod trace;
mod tracepoints;
mod unmerge;
mod unstable_tree;
mod workers;

#[cfg(ksm_rs_kunit)]
#[path = "tests-kunit/advisor.rs"]
mod kunit_advisor;
#[cfg(ksm_rs_kunit)]
#[path = "tests-kunit/arena.rs"]
mod kunit_arena;
#[cfg(ksm_rs_kunit)]
#[path = "tests-kunit/btf.rs"]
mod kunit_btf;
#[cfg(ksm_rs_kunit)]
#[path = "tests-kunit/domain.rs"]
mod kunit_domain;
#[cfg(ksm_rs_kunit)]
#[path = "tests-kunit/forest.rs"]
mod kunit_forest;
#[cfg(ksm_rs_kunit)]
#[path = "tests-kunit/hash.rs"]
mod kunit_hash;
#[cfg(ksm_rs_kunit)]
#[path = "tests-kunit/items.rs"]
mod kunit_items;
#[cfg(ksm_rs_kunit)]
#[path = "tests-kunit/knobs.rs"]
mod kunit_knobs;
#[cfg(ksm_rs_kunit)]
#[path = "tests-kunit/layout.rs"]
mod kunit_layout;
#[cfg(ksm_rs_kunit)]
#[path = "tests-kunit/rbtree.rs"]
mod kunit_rbtree;
#[cfg(ksm_rs_kunit)]
#[path = "tests-kunit/scan.rs"]
mod kunit_scan;
#[cfg(ksm_rs_kunit)]
#[path = "tests-kunit/stable_tree.rs"]
mod kunit_stable_tree;
#[cfg(ksm_rs_kunit)]
#[path = "tests-kunit/unstable_tree.rs"]
mod kunit_unstable_tree;

module! {
    type: KsmRs,
    name: "ksm_rs",
    authors: ["The ksm_rs developers"],
    description: "Kernel Samepage Merging in Rust",
    license: "GPL",
    params: {
        drop_in: u8 {
            default: 1,
            description: "1: put a symlink to /sys/kernel/mm/ksm_rs in the place of /sys/kernel/mm/ksm; 0: do not (default: 1)",
        },
        kallsyms_lookup_name: u64 {
            default: 0,
            description: "Address of the function of this name, for kernels without kprobes (default: found by a kprobe)",
        },
        run: u32 {
            default: 0,
            description: "Initial value of /sys/kernel/mm/ksm_rs/run: 0, 1 or 2 (default: 0)",
        },
    },
}

/// The module, loaded.
///
/// What is there goes down in the mirror image of how it came up; see [`Drop`].
struct KsmRs {
    symlink: Option<Symlink>,
    directory: Option<Directory>,
    thread: Option<Thread<Ksm>>,
    ksm: Arc<Ksm>,
    _probes: Probes<Registry>,
    _notifier: Notifier<Ksm>,
}

impl kernel::Module for KsmRs {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let run = series::parameter(module_parameters::run.value());
        let run = Run::from_number(run).ok_or_else(|| {
            pr_err!("parameter run={run} makes no sense; wanted 0, 1 or 2\n");
            EINVAL
        })?;
        let drop_in = series::parameter(module_parameters::drop_in.value());
        let drop_in = knobs::drop_in(drop_in).ok_or_else(|| {
            pr_err!("parameter drop_in={drop_in} makes no sense; wanted 0 or 1\n");
            EINVAL
        })?;
        let kallsyms: u64 = series::parameter(module_parameters::kallsyms_lookup_name.value());

        let variables = symbols::resolve(kallsyms as usize)?;
        prove_layout(&variables)?;
        // SAFETY: The address of the variable of this name.
        unsafe { mm::zero::bind(variables.ksm_zero_pages) };
        let stock = Stock::take_over(&variables)?;
        let registry = Arc::pin_init(Registry::new(), GFP_KERNEL)?;
        let ksm = Ksm::new(random_seed(), registry.clone(), stock)?;
        let notifier = Notifier::register(ksm.clone())?;
        ksm.refuse_offlining()?;
        let probes = Probes::register(registry.clone())?;
        tracepoints::visit_existing(&*registry);

        // From here on pages may be merged: every failure goes through `Drop`.
        let mut module = Self {
            symlink: None,
            directory: None,
            thread: None,
            ksm: ksm.clone(),
            _probes: probes,
            _notifier: notifier,
        };
        ksm.set_run(run)?;
        module.thread = Some(Thread::start(ksm.clone(), 0)?);
        let directory = Directory::create(&ksm.stock, ksm.clone())?;
        if drop_in {
            module.symlink = Some(Symlink::to(&directory, &ksm.stock)?);
        }
        module.directory = Some(directory);
        pr_info!("loaded; /sys/kernel/mm/ksm_rs/run is {}\n", run as u32);
        Ok(module)
    }
}

impl Drop for KsmRs {
    fn drop(&mut self) {
        self.symlink = None;
        self.directory = None;
        // Nobody can ask for anything any more, and nothing new is merged; but forks of what is merged are still
        // seen, until nothing is.
        self.thread = None;
        self.ksm.dismantle();
        delay::at(Point::Dismantled);
        #[cfg(ksm_rs_delays)]
        delay::report();
        pr_info!("unloaded\n");
        // The fields go in order: the probes, the notifier, and with the last reference the stock KSM is given back.
    }
}

fn random_seed() -> u64 {
    // SAFETY: May be called in any context.
    unsafe { mm::bindings::get_random_u64() }
}

/// Compares our layout of the structures that the core reads with the running kernel's own. Sleeps.
fn prove_layout(variables: &Variables) -> Result {
    let length = variables.btf_end.saturating_sub(variables.btf_start);
    // SAFETY: The linker puts the kernel's type information between these symbols, in read-only memory that
    // stays.
    let data = unsafe { core::slice::from_raw_parts(variables.btf_start as *const u8, length) };
    let btf = Btf::parse(data).map_err(|error| {
        pr_err!("this kernel's BTF cannot be read ({error}); wanted one that says where KSM's structures have their members: load on a kernel built with CONFIG_DEBUG_INFO_BTF=y\n");
        EINVAL
    })?;
    let mut proof = layout::prove_sizes(&btf, &mm::node::WANTED_SIZES);
    for wanted in mm::node::WANTED {
        // The first mismatch is the one to name.
        proof = proof.and_then(|()| layout::prove(&btf, wanted));
    }
    proof.map_err(|mismatch| {
        pr_err!("{mismatch}; this kernel is too new or too old for this module: get a version of ksm_rs that supports it\n");
        EINVAL
    })
}
