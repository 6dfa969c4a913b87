//! Waiting for a condition, with a deadline.

use std::sync::OnceLock;
use std::thread::sleep;
use std::time::Duration;
use std::time::Instant;

use anyhow::Result;
use anyhow::bail;

/// How long to wait for something that is sure to happen on a healthy kernel.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Pause between two looks at a condition.
const PAUSE: Duration = Duration::from_millis(4);

/// Whether this is a kernel with KASAN or lockdep, which is several times slower.
pub fn checks_itself() -> bool {
    static CHECKS: OnceLock<bool> = OnceLock::new();
    *CHECKS.get_or_init(|| {
        let symbols = std::fs::read("/proc/kallsyms").unwrap_or_default();
        let has = |name: &[u8]| symbols.windows(name.len()).any(|window| window == name);
        has(b" kasan_report\n") || has(b" lockdep_init_map_type\n")
    })
}

/// By how much limits are stretched: on a slow kernel, and on a machine that has other work to do, which the environment
/// variable `KSM_E2E_SLOWNESS` says.
pub fn slowness() -> u32 {
    static SLOWNESS: OnceLock<u32> = OnceLock::new();
    *SLOWNESS.get_or_init(|| {
        let busy = std::env::var("KSM_E2E_SLOWNESS").ok();
        let busy = busy.and_then(|text| text.parse().ok()).unwrap_or(1);
        if checks_itself() { 4 * busy } else { busy }
    })
}

/// Polls `condition` until it holds. Fails when it does not hold within `limit`, stretched on a slow kernel;
/// `what` completes the sentence "timed out waiting until ...".
pub fn until(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result<()> {
    until_or_explain(what, limit, || Ok((!condition()?).then(String::new)))
}

/// Like [`until`] for a condition that can say what is wrong: `problem` returns `None` when all is well, and its
/// last answer is part of the error.
pub fn until_or_explain(
    what: &str,
    limit: Duration,
    mut problem: impl FnMut() -> Result<Option<String>>,
) -> Result<()> {
    let limit = limit * slowness();
    let start = Instant::now();
    loop {
        let Some(explanation) = problem()? else {
            return Ok(());
        };
        if start.elapsed() > limit {
            bail!("timed out after {limit:?} waiting until {what}: {explanation}");
        }
        sleep(PAUSE);
    }
}

/// Looks again and again, for so long, that `condition` holds: what must not happen is given the time in which it
/// would. Fails with the first error.
pub fn while_holds(time: Duration, mut condition: impl FnMut() -> Result<()>) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < time {
        condition()?;
        sleep(PAUSE);
    }
    condition()
}
