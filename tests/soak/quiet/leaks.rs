//! Whether anything is left of what the kernel allocated while the module was loaded.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::procfs;
use ksm_e2e::wait;

/// Objects of address spaces: what the module holds on to, or keeps others from letting go of. A soak makes and ends
/// some ten processes a second, each with dozens of areas, so what is lost once per process, or once per merge, comes to
/// hundreds within a minute. Nearly always there are as many as before; the tolerance is for a CPU that idles and keeps
/// the address space of whom it ran last, and for this program, which may have an area or two more than when it began.
const ADDRESS_SPACES: [(&str, u64); 4] = [
    ("mm_struct", 4),
    ("anon_vma", 16),
    ("anon_vma_chain", 16),
    ("vm_area_struct", 32),
];

/// The same for what the module allocates itself: 32 to 120 bytes for each page that it ever merged, of which a soak
/// has thousands within a minute. All else in the kernel allocates from these caches too, and keeps what it may want
/// again: some dozens.
const COMMON: u64 = 500;

/// How long the last processes, and what is freed after a grace period, may take to go.
const GOING: Duration = Duration::from_secs(60);

/// An object that nothing points at is reported from this age on.
const AGE: Duration = Duration::from_secs(6);

const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";

fn count() -> Result<BTreeMap<String, (u64, u64)>> {
    let mut objects = BTreeMap::new();
    for (cache, tolerance) in ADDRESS_SPACES {
        objects.insert(cache.to_owned(), (procfs::slab_objects(cache)?, tolerance));
    }
    for cache in procfs::kmalloc_caches()? {
        let now = procfs::slab_objects(&cache)?;
        objects.insert(cache, (now, COMMON));
    }
    Ok(objects)
}

/// How many objects there are of each kind, and how many more there may be later.
pub struct Objects(BTreeMap<String, (u64, u64)>);

impl Objects {
    /// Counts them, and lets kmemleak forget what it has found until now.
    pub fn count() -> Result<Self> {
        if kmemleak()? {
            scan()?;
            fs::write(KMEMLEAK, "clear").context(KMEMLEAK)?;
        }
        Ok(Self(count()?))
    }

    /// Fails if there are more now, and do not go away.
    pub fn expect_no_more(&self) -> Result<()> {
        let mut left = BTreeMap::new();
        let gone = wait::until_or_explain("all objects are freed", GOING, || {
            left = count()?;
            let grown: Vec<String> = left
                .iter()
                .filter_map(|(cache, (now, tolerance))| {
                    let (then, _) = self.0.get(cache).copied().unwrap_or_default();
                    (*now > then + tolerance).then(|| format!("{cache} from {then} to {now}"))
                })
                .collect();
            Ok((!grown.is_empty()).then(|| grown.join(", ")))
        });
        let mut differences: Vec<String> = Vec::new();
        for (cache, (now, _)) in &left {
            let (then, _) = self.0.get(cache).copied().unwrap_or_default();
            let difference = *now as i64 - then as i64;
            if difference != 0 {
                differences.push(format!("{cache} {difference:+}"));
            }
        }
        println!(
            "soak: objects since before the module was loaded: {}",
            differences.join(", ")
        );
        gone
    }
}

/// Whether this kernel looks for objects that nothing points at.
fn kmemleak() -> Result<bool> {
    Ok(fs::exists(KMEMLEAK)?)
}

fn scan() -> Result<()> {
    fs::write(KMEMLEAK, "scan").context(KMEMLEAK)
}

/// Fails if there is an object that nothing points at. On a kernel that does not look for them nothing is found.
pub fn expect_none_lost() -> Result<()> {
    if !kmemleak()? {
        return Ok(());
    }
    // Old enough to be reported, and seen by two scans after that.
    let begun = Instant::now();
    let mut scans = 0;
    wait::until("kmemleak has looked twice", GOING, || {
        scan()?;
        scans = if begun.elapsed() > AGE { scans + 1 } else { 0 };
        Ok(scans >= 2)
    })?;
    let found = fs::read_to_string(KMEMLEAK).context(KMEMLEAK)?;
    ensure!(found.is_empty(), "kmemleak has found:\n{found:.8000}");
    Ok(())
}
