//! The system when no actor runs: everything that is counted must be exact, and nothing may be left of anything.
//!
//! A few [`holders`] have memory through the whole soak, so that there is something to count when the actors are gone.
//! A [`census`] of all page tables says what the counters ought to say. [`leaks`] knows what there was of the kernel's
//! objects before the module was loaded.

pub mod census;
mod holders;
mod leaks;
mod tasks;

use std::time::Duration;
use std::time::Instant;

use anyhow::Context;
use anyhow::Result;
use anyhow::bail;
use anyhow::ensure;
use fastrand::Rng;
use ksm_e2e::Ksm;
use ksm_e2e::ksm::STOCK;
use ksm_e2e::module;
use ksm_e2e::procfs;
use ksm_e2e::wait;
use ksm_e2e::wait::PATIENCE;

use census::Census;
use census::Sizes;
use holders::Holders;
use leaks::Objects;

use crate::control::reload::stock_turns;

/// Passes in a row without any change after which nothing more is to be expected: a page is looked for in the trees
/// when it has not changed from one pass to the next, and its partner may come upon it one later.
const UNCHANGED: usize = 3;

/// Passes after which merging must have come to rest.
const MANY: usize = 60;

/// How long a mapping may take to go from a counter, on a fast kernel: the dead are buried between two turns.
const BURIAL: Duration = Duration::from_secs(30);

/// How long processes of the machine itself may be at work while they are counted, on a fast kernel.
const REST: Duration = Duration::from_secs(20);

/// What the counters say that must come to rest.
const RESTING: [&str; 7] = [
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "pages_volatile",
    "stable_node_chains",
    "stable_node_dups",
    "ksm_zero_pages",
];

/// See the module.
pub struct Quiet {
    ksm: Ksm,
    rng: Rng,
    objects: Objects,
    /// Names, modes and values of the files of the kernel's own KSM.
    stock: Vec<(String, u32, String)>,
    holders: Holders,
}

/// Those that count such pages of the kernel's own KSM as are mapped.
const MAPPED: [&str; 2] = ["stable_node_chains", "stable_node_dups"];

/// Those files of the kernel's own KSM that tell of more than what is now.
const HISTORY: [&str; 3] = ["full_scans", "pages_scanned", "pages_skipped"];

fn stock_files() -> Result<Vec<(String, u32, String)>> {
    let files = Ksm::at(STOCK).snapshot()?;
    Ok(files
        .into_iter()
        .filter(|(name, _)| !HISTORY.contains(&name.as_str()))
        .map(|(name, (mode, text))| (name, mode, text))
        .collect())
}

/// The kernel's own KSM counts a page that is still mapped when it has unmerged everything, and looks at it again only when it is
/// told to unmerge anew: only then is it right to want its counters as they were.
fn forget_stock_turns() -> Result<()> {
    if stock_turns()? == 0 {
        return Ok(());
    }
    let stock = Ksm::at(STOCK);
    stock.unmerge()?;
    stock.stop()
}

/// In what the files of the kernel's own KSM differ from what they were, if it has forgotten all it can.
///
/// A page that was merged in a child while its parent, which has nothing to do with KSM, mapped it too is a KSM page there as
/// well, and the kernel's own KSM counts it for as long as the parent has it.
fn stock_changes(before: &[(String, u32, String)]) -> Result<Option<String>> {
    let after = stock_files()?;
    let still_mapped = Census::take()?.all_pages();
    let may_differ = |name: &str, now: &str| -> Result<bool> {
        Ok(MAPPED.contains(&name)
            && stock_turns()? > 0
            && now.trim().parse::<u64>()? <= still_mapped)
    };
    let mut changes = Vec::new();
    for (name, mode, text) in before {
        let now = after.iter().find(|(other, ..)| other == name);
        match now {
            Some((_, now_mode, now))
                if now_mode == mode && (now == text || may_differ(name, now)?) => {}
            _ => changes.push(format!("{name} was {text:?} ({mode:o}), and is {now:?}")),
        }
    }
    let known = |name: &str| before.iter().any(|(other, ..)| other == name);
    changes.extend(
        after
            .iter()
            .filter(|(name, ..)| !known(name))
            .map(|(name, ..)| format!("{name} is new")),
    );
    if changes.is_empty() {
        return Ok(None);
    }
    changes.push(format!("{still_mapped} KSM pages are mapped"));
    Ok(Some(changes.join(", ")))
}

impl Quiet {
    /// Notes how things are without the module, which is loaded before and after, and lets the holders begin.
    pub fn new(seed: u64) -> Result<Self> {
        let ksm = Ksm::from_env();
        module::unload()?;
        let stock = stock_files()?;
        let objects = Objects::count()?;
        module::load("")?;
        let mut rng = Rng::with_seed(seed.wrapping_add(1));
        let holders = Holders::spawn(&mut rng)?;
        Ok(Self {
            ksm,
            rng,
            objects,
            stock,
            holders,
        })
    }

    /// To be called when a round is over. Nothing is merged when this returns, and `run` is 2.
    pub fn between(&mut self) -> Result<()> {
        tasks::expect_none_stuck()?;
        self.holders.verify()?;
        self.scan_as_usual()?;
        for write in [false, true] {
            if write {
                self.holders.write_some(&mut self.rng)?;
            }
            let passes = self.settle()?;
            let census = self.exact_census()?;
            self.holders.expect_merged(&self.ksm)?;
            self.holders.verify()?;
            println!("soak: quiet after {passes} passes: {census}");
        }
        self.ksm.unmerge()?;
        self.expect_nothing_merged()?;
        self.holders.verify()
    }

    /// To be called when all rounds are over: without holders and module all must be as it was before them.
    pub fn end(self) -> Result<()> {
        self.ksm.start()?;
        // With pages merged, or the last ones would leave an idle module.
        self.settle()?;
        let Self {
            holders,
            stock,
            objects,
            ..
        } = self;
        let one = holders.exit_all_but_one()?;
        module::unload()?;
        one.expect_private()?;
        one.exit()?;
        // What is left of a process that was killed may still have a page for a moment.
        let what = "the files of the kernel's own KSM are as they were";
        wait::until_or_explain(what, PATIENCE, || {
            forget_stock_turns()?;
            stock_changes(&stock)
        })?;
        objects.expect_no_more()?;
        leaks::expect_none_lost()?;
        tasks::expect_none_stuck()
    }

    /// Knobs under which a page that can be merged is, within a few passes; what decides with what stays as the actors
    /// have left it.
    fn scan_as_usual(&self) -> Result<()> {
        self.ksm.write_text("advisor_mode", "none")?;
        self.ksm.scan_fast()?;
        self.ksm.write("smart_scan", 0)?;
        self.ksm.start()
    }

    /// Scans until whole passes change nothing.
    fn settle(&self) -> Result<usize> {
        let read =
            || -> Result<Vec<u64>> { RESTING.iter().map(|name| self.ksm.read(name)).collect() };
        let mut before = Vec::new();
        let mut unchanged = 0;
        for pass in 1..=MANY {
            self.ksm.full_scans(1)?;
            let now = read()?;
            unchanged = if now == before { unchanged + 1 } else { 0 };
            if unchanged == UNCHANGED {
                return Ok(pass);
            }
            before = now;
        }
        bail!("merging has not come to rest after {MANY} passes: {RESTING:?} are {before:?}")
    }

    /// A census in which every counter says what the page tables do.
    fn exact_census(&self) -> Result<Census> {
        let census = Census::take()?;
        let wrong = self.problems(&census)?;
        ensure!(wrong.is_empty(), "counters are off: {wrong:#?}; {census}");
        expect_right_sizes()?;
        Ok(census)
    }

    /// Which counters say something else than the page tables.
    fn problems(&self, census: &Census) -> Result<Vec<String>> {
        let mut wrong = census.problems()?;
        let mut expect = |name: &str, wanted: u64| -> Result<()> {
            let said = self.ksm.read(name)?;
            if said != wanted {
                wrong.push(format!("{name} is {said}, but there are {wanted}"));
            }
            Ok(())
        };
        expect("pages_shared", census.pages())?;
        expect("pages_sharing", census.mappings() - census.pages())?;
        expect("ksm_zero_pages", census.zero_pages())?;
        let counters = self.ksm.counters()?;
        let known = counters.shared + counters.sharing + counters.unshared + counters.volatile;
        if known != census.items() {
            wrong.push(format!(
                "{counters} are {known} pages known, but all processes together have {}",
                census.items()
            ));
        }
        ensure!(
            census.mappings() > census.pages(),
            "nothing is merged: {census}"
        );
        Ok(wrong)
    }

    fn expect_nothing_merged(&self) -> Result<()> {
        wait::until_or_explain("the counters are 0 after run=2", BURIAL, || {
            let mut left = Vec::new();
            for name in RESTING {
                let said = self.ksm.read(name)?;
                if said != 0 {
                    left.push(format!("{name} is {said}"));
                }
            }
            Ok((!left.is_empty()).then(|| left.join(", ")))
        })?;
        let census = Census::take()?;
        ensure!(
            census.mappings() == 0 && census.zero_pages() == 0 && census.items() == 0,
            "run=2 has left something: {census}"
        );
        let wrong = census.problems()?;
        ensure!(wrong.is_empty(), "counters are off: {wrong:#?}; {census}");
        expect_right_sizes()?;
        let run = self.ksm.read("run")?;
        ensure!(run == 2, "run is {run}");
        let profit = self.ksm.read_signed("general_profit")?;
        ensure!(
            profit == 0,
            "general_profit is {profit} with nothing merged"
        );
        procfs::pid_of("ksmd_rs")?.context("the thread is gone")?;
        Ok(())
    }
}

/// All processes have as much memory as the kernel says. The kernel itself may still be at work on some for a moment, so they are
/// counted again. One that ran meanwhile each time, until half of the time is up, cannot be counted.
fn expect_right_sizes() -> Result<()> {
    let patient_until = Instant::now() + REST * wait::slowness() / 2;
    wait::until_or_explain("all processes are of the size that they show", REST, || {
        let Sizes { wrong, mut unsure } = Census::take()?.sizes()?;
        if Instant::now() >= patient_until {
            unsure.clear();
        }
        let problems = [wrong, unsure].concat();
        Ok((!problems.is_empty()).then(|| problems.join(", ")))
    })
}
