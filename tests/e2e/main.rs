//! End-to-end tests of KSM. They run as root in a virtual machine of their own:
//!
//!     e2e [FILTER]                            all tests, or those whose name contains FILTER
//!     KSM_DIR=/sys/kernel/mm/ksm e2e          the same against the kernel's own KSM
//!     KSM_RS_KO=/path/to/ksm_rs.ko e2e        with the module to load and unload
//!     KSM_E2E_SEED=42 e2e                     another seed for what is made at random
//!     KSM_E2E_ONLY=numa:: e2e [FILTER]        only those whose name begins with it
//!     KSM_E2E_ICOUNT=1 e2e hostile_costs      where QEMU counts instructions (hostile_costs.rs)
//!     KSM_E2E_GROUND="no NUMA" e2e ground     on a kernel that was booted so (ground.rs)

mod advisor;
mod events;
mod exhaustion;
mod fork;
mod freezer;
mod ground;
mod hostile_costs;
mod hostility;
mod hotplug;
mod hugepages;
mod hwpoison;
mod knobs;
mod lifecycle;
mod locked;
mod merge_scope;
mod merging;
mod numa;
mod pins;
mod prctl;
mod privileges;
mod proc_files;
mod reclaim;
mod refusals;
mod sharing_limit;
mod smart_scan;
mod stock_interface;
mod stock_results;
mod threads;
mod unmerge;
mod userfault;
mod while_scanning;
mod zero_pages;

use ksm_e2e::Ksm;
use ksm_e2e::child;
use ksm_e2e::runner;
use libtest_mimic::Arguments;

fn main() -> anyhow::Result<()> {
    child::serve_if_asked();
    runner::prepare_process()?;
    let mut arguments = Arguments::from_args();
    // KSM is one for the whole system, and tests fork.
    arguments.test_threads = Some(1);
    let ksm = Ksm::from_env();
    let mut tests = Vec::new();
    if !ksm.is_stock() {
        // First, as it compares with what nobody has touched since boot.
        tests.extend(stock_interface::tests());
    }
    tests.extend(knobs::untouched_tests());
    tests.extend(knobs::tests());
    tests.extend(merging::tests());
    tests.extend(zero_pages::tests());
    tests.extend(sharing_limit::tests());
    tests.extend(smart_scan::tests());
    tests.extend(advisor::tests());
    tests.extend(proc_files::tests());
    tests.extend(prctl::tests());
    tests.extend(events::tests());
    tests.extend(fork::tests());
    tests.extend(unmerge::tests());
    tests.extend(hugepages::tests());
    tests.extend(pins::tests());
    tests.extend(reclaim::tests());
    tests.extend(exhaustion::tests());
    tests.extend(numa::tests());
    tests.extend(hotplug::tests());
    tests.extend(freezer::tests());
    if !ksm.is_stock() {
        tests.extend(threads::tests());
        tests.extend(hostility::tests());
        tests.extend(locked::tests());
        tests.extend(merge_scope::tests());
    }
    tests.extend(hwpoison::tests());
    tests.extend(userfault::tests());
    tests.extend(while_scanning::tests());
    if !ksm.is_stock() {
        tests.extend(events::module_tests());
        tests.extend(exhaustion::module_tests());
        tests.extend(locked::module_tests());
        tests.extend(lifecycle::tests());
        tests.extend(refusals::tests());
        tests.extend(ground::tests());
        tests.extend(stock_results::tests());
        tests.extend(privileges::tests());
        tests.extend(hostile_costs::tests());
    }
    if exhaustion::is_small_machine()? {
        tests.extend(exhaustion::system_tests());
    }
    if let Ok(start) = std::env::var("KSM_E2E_ONLY") {
        tests.retain(|test| test.name().starts_with(&start));
    }
    libtest_mimic::run(&arguments, tests).exit()
}
