//! Tasks that do not get on.

use std::fs;
use std::time::Duration;

use anyhow::Result;
use ksm_e2e::wait;

/// How long a task may wait for something that no signal ends, on a fast kernel, when nobody does anything.
const LIMIT: Duration = Duration::from_secs(30);

/// The tasks that wait so now: their names, and where they wait.
fn waiting() -> Result<Vec<String>> {
    let mut waiting = Vec::new();
    for process in fs::read_dir("/proc")? {
        // It may end while it is looked at.
        let Ok(tasks) = fs::read_dir(process?.path().join("task")) else {
            continue;
        };
        for task in tasks.flatten() {
            let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
            let stat = read("stat");
            // The name, in parentheses, may have anything in it.
            if stat
                .rsplit_once(") ")
                .is_some_and(|(_, rest)| rest.starts_with('D'))
            {
                waiting.push(format!(
                    "{} {}:\n{}",
                    task.file_name().display(),
                    read("comm").trim_end(),
                    read("stack")
                ));
            }
        }
    }
    Ok(waiting)
}

/// Fails if a task waits for long.
pub fn expect_none_stuck() -> Result<()> {
    wait::until_or_explain("no task is stuck", LIMIT, || {
        let waiting = waiting()?;
        Ok((!waiting.is_empty()).then(|| waiting.join("\n")))
    })
}
