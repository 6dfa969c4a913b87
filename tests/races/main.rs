//! Races, found on purpose: tests of pairs of code paths that may run at once on the same object, with the window
//! between them held open (`docs/concurrency.md` lists the pairs). They need the module's test build:
//!
//!     KSM_RS_KO=/path/to/ksm_rs.ko races [FILTER]

mod content;
mod control;
mod frames;
mod loading;
mod spaces;
mod stage;

use ksm_e2e::child;
use ksm_e2e::runner;
use libtest_mimic::Arguments;

fn main() -> anyhow::Result<()> {
    child::serve_if_asked();
    runner::prepare_process()?;
    let mut arguments = Arguments::from_args();
    // KSM is one for the whole system, and tests fork.
    arguments.test_threads = Some(1);
    let mut tests = content::tests();
    tests.extend(spaces::tests());
    tests.extend(frames::tests());
    tests.extend(control::tests());
    tests.extend(loading::tests());
    libtest_mimic::run(&arguments, tests).exit()
}
