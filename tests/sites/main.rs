//! Where the module allocates memory, and whether every one of these places was made to fail.
//!
//! A *site* is a call in the module's source
//!
//! - that is given allocation flags: a `GFP_` constant, or a constant, function or variable that stands for some; calls of
//!   functions of our own that only pass them on do not count, what these call does;
//! - or of one of the core's functions in [`NEED_MEMORY`].
//!
//! That the list is complete is not taken on trust: a failure that was injected anywhere else is an error.

mod resolve;
mod source;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use clap::Parser;
use clap::Subcommand;

use crate::source::Site;

/// Functions of the core that fail for want of memory.
pub const NEED_MEMORY: [&str; 7] = [
    "kobject_create_and_add",
    "ksm_rs_kthread_run",
    "ksm_rs_mem_cgroup_charge",
    "ksm_rs_vma_alloc_folio",
    "sysfs_create_group",
    "sysfs_create_link",
    "tracepoint_probe_register",
];

/// Functions of the core that may want memory, on other machines than this one perhaps, or do their work without it.
pub const COPE_WITHOUT: [&str; 5] = [
    "ksm_rs_lru_add_drain_all",
    "ksm_rs_split_huge_page",
    "register_kprobe",
    "tracepoint_probe_unregister",
    "unregister_kprobe",
];

/// Lists the places where the module allocates memory, or checks that all of them were made to fail.
#[derive(Parser)]
struct Arguments {
    /// The module's source.
    #[arg(long, default_value = ".")]
    source: PathBuf,
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// One line for each place: file, line, what is called.
    List,
    /// Compares them with what the fault injection has said.
    Check {
        /// The module that was used, with its debug information.
        #[arg(long)]
        module: PathBuf,
        /// What `tests/faults` printed.
        log: PathBuf,
    },
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let top = fs::canonicalize(&arguments.source).context("the module's source")?;
    let sites = source::sites(&top)?;
    match arguments.what {
        What::List => {
            for site in sites.iter().filter(|site| site.must_fail) {
                println!("{site}");
            }
            Ok(())
        }
        What::Check { module, log } => {
            let text = fs::read_to_string(&log).with_context(|| log.display().to_string())?;
            check(&sites, resolve::failures(&text, &module, &top)?)
        }
    }
}

/// Prints how often each site failed. Fails if one never did, or if something failed that is no site.
fn check(sites: &[Site], failures: Vec<resolve::Failure>) -> Result<()> {
    let mut counts: BTreeMap<&Site, usize> = sites.iter().map(|site| (site, 0)).collect();
    let mut strangers = BTreeMap::new();
    for failure in failures {
        let place = &failure.place;
        // The innermost of nested calls.
        let inside = sites.iter().filter(|site| site.contains(&place.0, place.1));
        match inside.min_by_key(|site| site.last - site.first) {
            Some(site) => *counts.entry(site).or_default() += 1,
            None => *strangers.entry(place.clone()).or_insert(0) += 1,
        }
    }
    let mut never = Vec::new();
    for (site, count) in &counts {
        if site.must_fail {
            println!("{count:6}  {site}");
            if *count == 0 {
                never.push(site.to_string());
            }
        } else if *count > 0 {
            println!("{count:6}  {site}: works without");
        }
    }
    for ((file, line), count) in &strangers {
        println!("{count:6}  {file}:{line}: not in the list");
    }
    let all = sites.iter().filter(|site| site.must_fail).count();
    println!(
        "allocation sites: {all} in the source, {} made to fail",
        all - never.len()
    );
    if !never.is_empty() {
        bail!("never failed: {}", never.join("; "));
    }
    if !strangers.is_empty() {
        bail!("allocations at places that are not in the list of sites");
    }
    Ok(())
}
