//! Objects in the kernel that a producer allocates or keeps alive: whether there are as many as there were.

use anyhow::Result;

use crate::procfs;
use crate::wait;
use crate::wait::PATIENCE;

/// A count of something, and by how much it differs when nothing leaks: what else goes on in the system adds some noise,
/// the more the more common a cache's users are.
#[derive(Clone, Debug)]
struct Count {
    what: String,
    count: u64,
    noise: u64,
}

/// How many objects there are.
#[derive(Clone, Debug)]
pub struct Leftovers(Vec<Count>);

impl Leftovers {
    /// Counts them.
    pub fn now() -> Result<Self> {
        let mut counts = Vec::new();
        let mut add = |what: &str, count, noise| {
            let what = what.to_owned();
            counts.push(Count { what, count, noise });
        };
        for (cache, noise) in [("mm_struct", 25), ("anon_vma", 40), ("task_struct", 25)] {
            add(cache, procfs::slab_objects(cache)?, noise);
        }
        for cache in procfs::kmalloc_caches()? {
            let noise = if cache.contains("cg") || cache.contains("rcl") {
                2000
            } else {
                600
            };
            add(&cache, procfs::slab_objects(&cache)?, noise);
        }
        add("kB of vmalloc", procfs::meminfo("VmallocUsed")?, 200);
        add("kB of slab", procfs::meminfo("SUnreclaim")?, 1500);
        Ok(Self(counts))
    }

    /// Waits until there are no more than there were: freeing may wait for a grace period, and the last processes for their
    /// parent.
    pub fn expect_no_more(&self) -> Result<()> {
        wait::until_or_explain("memory is back to what it was", PATIENCE / 2, || {
            let grown: Vec<String> = Self::now()?
                .0
                .into_iter()
                .filter_map(|now| {
                    let then = self.0.iter().find(|then| then.what == now.what);
                    let then = then.map_or(0, |then| then.count);
                    let Count { what, count, noise } = now;
                    (count > then + noise).then(|| format!("{what} grew from {then} to {count}"))
                })
                .collect();
            Ok((!grown.is_empty()).then(|| grown.join(", ")))
        })
    }
}
