//! What ksm_rs makes of memory against what the kernel's own KSM makes of the same, in one boot; and both against what
//! the rules say.
//!
//! Compared are final states only, and of these what the rules determine. They leave open:
//!
//! - how many passes it takes, which depends on the order in which address spaces are scanned;
//! - which of several KSM pages of one content a page shares, and hence its Pss; therefore a content has more than
//!   one KSM page only where nothing is forked or taken away later. Forks are let over the limit, and stock keeps
//!   the last of many copies in a chain until it prunes it;
//! - which of two equal pages becomes the KSM page, and is one then in forks that share it although they did not ask for
//!   it; therefore nothing that is not advised shares pages with what is;
//! - which page is left over if one is, over a limit; therefore its like are all in one process;
//! - what pages look like that are skipped by smart scanning in one pass and not in the next; therefore smart
//!   scanning is on only where everything is merged before it begins to skip, or where skipping itself is watched.

use anyhow::Context;
use anyhow::Result;
use anyhow::ensure;
use fastrand::Rng;
use ksm_e2e::Ksm;
use ksm_e2e::ksm::OURS;
use ksm_e2e::ksm::STOCK;
use ksm_e2e::module;
use ksm_e2e::numa;
use ksm_e2e::passes::Passes;
use ksm_e2e::record::Record;
use ksm_e2e::settings::Settings;
use ksm_e2e::world::Contents;
use ksm_e2e::world::Rules;
use ksm_e2e::world::Shape;
use ksm_e2e::world::World;

ksm_e2e::tests![module_test:
    duplicates_and_near_duplicates,
    empty_pages_as_the_zero_page,
    volatile_pages,
    forks,
    many_copies,
    many_copies_on_each_node,
    bound_memory_merged_across_nodes,
    bound_memory_merged_within_nodes,
    parts_that_are_moved_unmapped_and_unmerged,
    everything_at_once,
    smart_scanning_merges_what_is_there_from_the_start,
    smart_scanning_skips_what_is_unique,
];

const SEEDS: [u64; 2] = [1, 2];

const SHAPE: Shape = Shape {
    processes: 3,
    areas: 3,
    pages: 48,
    contents: Contents::Everything,
    volatile: false,
    bound: false,
    unadvised: true,
    forks: 0,
};

/// Observes stock, then ksm_rs, with each of the seeds.
fn compare(observe: impl Fn(&Ksm, &mut Rng) -> Result<Record>) -> Result<()> {
    numa::require_nodes()?;
    let seeds = ksm_e2e::seeds(&SEEDS)?;
    let all = |ksm: &Ksm| {
        let mut records = Vec::new();
        for &seed in &seeds {
            let settings = Settings::remember(ksm)?;
            let record = observe(ksm, &mut Rng::with_seed(seed))
                .with_context(|| format!("with seed {seed} and {}", ksm.dir().display()))?;
            settings.bring_back()?;
            records.push(record);
        }
        Ok::<_, anyhow::Error>(records)
    };
    let stock = Ksm::at(STOCK);
    let wanted = all(&stock)?;
    stock.stop()?;
    module::load("")?;
    let seen = all(&Ksm::at(OURS))?;
    for ((wanted, seen), seed) in wanted.iter().zip(&seen).zip(&seeds) {
        wanted
            .expect_same("stock", seen, "ksm_rs", |_, _| false)
            .with_context(|| format!("with seed {seed}"))?;
    }
    Ok(())
}

/// Merges a world, has something happen to it if `disturbed`, and merges again; unmerges it at the end.
pub fn live(
    ksm: &Ksm,
    random: &mut Rng,
    shape: Shape,
    rules: Rules,
    disturbed: bool,
) -> Result<Record> {
    let mut record = Record::default();
    let mut look = |world: &mut World, when: &str| -> Result<()> {
        let seen = world.observe(when, ksm)?;
        world
            .predict(when)
            .expect_within("the rules", &seen, "what is seen")?;
        record.extend(seen);
        world.verify()
    };
    rules.apply(ksm)?;
    let mut world = World::make(random, shape, rules)?;
    let mut passes = Passes::of(ksm)?;
    world.settle(&mut passes, ksm)?;
    look(&mut world, "merged")?;
    if disturbed {
        world.disturb(random)?;
        world.settle(&mut passes, ksm)?;
        look(&mut world, "merged again")?;
    }
    let counters = ksm.counters()?;
    ksm.stop()?;
    ksm.expect(counters)?;
    ksm.unmerge()?;
    world.unmerge();
    look(&mut world, "unmerged")?;
    Ok(record)
}

fn duplicates_and_near_duplicates(_: &Ksm) -> Result<()> {
    compare(|ksm, random| live(ksm, random, SHAPE, Rules::default(), false))
}

fn empty_pages_as_the_zero_page(_: &Ksm) -> Result<()> {
    let rules = Rules {
        use_zero_pages: true,
        ..Rules::default()
    };
    compare(|ksm, random| live(ksm, random, SHAPE, rules, true))
}

fn volatile_pages(_: &Ksm) -> Result<()> {
    let shape = Shape {
        volatile: true,
        ..SHAPE
    };
    compare(|ksm, random| live(ksm, random, shape, Rules::default(), false))
}

fn forks(_: &Ksm) -> Result<()> {
    let shape = Shape { forks: 3, ..SHAPE };
    compare(|ksm, random| live(ksm, random, shape, Rules::default(), false))
}

fn many_copies(_: &Ksm) -> Result<()> {
    let shape = Shape {
        contents: Contents::AroundLimit,
        unadvised: false,
        ..SHAPE
    };
    compare(|ksm, random| {
        let rules = Rules {
            limit: random.u64(2..8),
            ..Rules::default()
        };
        live(ksm, random, shape, rules, false)
    })
}

fn many_copies_on_each_node(_: &Ksm) -> Result<()> {
    let shape = Shape {
        contents: Contents::AroundLimit,
        unadvised: false,
        bound: true,
        ..SHAPE
    };
    compare(|ksm, random| {
        let rules = Rules {
            limit: random.u64(2..8),
            across_nodes: false,
            ..Rules::default()
        };
        live(ksm, random, shape, rules, false)
    })
}

fn bound_memory_merged_across_nodes(_: &Ksm) -> Result<()> {
    let shape = Shape {
        bound: true,
        ..SHAPE
    };
    compare(|ksm, random| live(ksm, random, shape, Rules::default(), false))
}

fn bound_memory_merged_within_nodes(_: &Ksm) -> Result<()> {
    let shape = Shape {
        bound: true,
        forks: 1,
        ..SHAPE
    };
    let rules = Rules {
        across_nodes: false,
        ..Rules::default()
    };
    compare(|ksm, random| live(ksm, random, shape, rules, true))
}

fn parts_that_are_moved_unmapped_and_unmerged(_: &Ksm) -> Result<()> {
    compare(|ksm, random| live(ksm, random, SHAPE, Rules::default(), true))
}

fn everything_at_once(_: &Ksm) -> Result<()> {
    let shape = Shape {
        volatile: true,
        bound: true,
        forks: 2,
        ..SHAPE
    };
    compare(|ksm, random| {
        let rules = Rules {
            use_zero_pages: random.bool(),
            across_nodes: random.bool(),
            ..Rules::default()
        };
        live(ksm, random, shape, rules, true)
    })
}

fn smart_scanning_merges_what_is_there_from_the_start(_: &Ksm) -> Result<()> {
    let shape = Shape {
        contents: Contents::Duplicates,
        unadvised: false,
        ..SHAPE
    };
    let rules = Rules {
        smart_scan: true,
        ..Rules::default()
    };
    compare(|ksm, random| live(ksm, random, shape, rules, false))
}

/// In which passes a page is looked at that never merges, from its first on: in the first three, then in one after
/// each skip of 1, 2, 4 and then always 8 passes, by its age in passes.
fn looked_at(passes: usize) -> Vec<bool> {
    let (mut looked, mut skips) = (Vec::new(), 0);
    for age in 0..passes {
        let look = age < 3 || skips == 0;
        if !look {
            skips -= 1;
        } else if age >= 3 {
            skips = match age {
                ..=3 => 1,
                4..=5 => 2,
                6..=8 => 4,
                _ => 8,
            };
        }
        looked.push(look);
    }
    looked
}

fn smart_scanning_skips_what_is_unique(_: &Ksm) -> Result<()> {
    // More than a byte can count, in which stock keeps a page's age.
    const PASSES: usize = 280;
    let shape = Shape {
        processes: 2,
        areas: 1,
        pages: 8,
        contents: Contents::Unique,
        unadvised: false,
        ..SHAPE
    };
    let rules = Rules {
        smart_scan: true,
        ..Rules::default()
    };
    compare(|ksm, random| {
        let count = (shape.processes * shape.areas * shape.pages) as u64;
        rules.apply(ksm)?;
        let mut world = World::make(random, shape, rules)?;
        let mut record = Record::default();
        let skipped_before = ksm.read("pages_skipped")?;
        let scanned_before = ksm.read("pages_scanned")?;
        let mut passes = Passes::of(ksm)?;
        let (mut scanned, mut skipped) = (0, 0);
        for (pass, look) in looked_at(PASSES).into_iter().enumerate() {
            passes.pass()?;
            *(if look { &mut scanned } else { &mut skipped }) += count;
            // A page that is skipped leaves the tree; in the first pass it is not known whether it changes.
            let unshared = if look && pass > 0 { count } else { 0 };
            for (name, seen, wanted) in [
                (
                    "pages_skipped",
                    ksm.read("pages_skipped")? - skipped_before,
                    skipped,
                ),
                (
                    "pages_scanned",
                    ksm.read("pages_scanned")? - scanned_before,
                    scanned,
                ),
                ("pages_unshared", ksm.read("pages_unshared")?, unshared),
                (
                    "pages_volatile",
                    ksm.read("pages_volatile")?,
                    count - unshared,
                ),
            ] {
                ensure!(
                    seen == wanted,
                    "{name} is {seen} instead of {wanted} after pass {pass}"
                );
                record.note(format!("pass {pass}"), name, seen);
            }
        }
        ksm.unmerge()?;
        world.verify()?;
        Ok(record)
    })
}
