// SPDX-License-Identifier: GPL-2.0

//! When the engine runs: the thread `ksmd_rs`, the states of `run`, the knobs that change the rules.
//!
//! Lock order: `control`, held by whoever changes `run`, the rules or the number of threads, for as long as that
//! takes → a thread's batch, held by the thread for one turn → the engine's mutex, held for one batch at a time, but not
//! while that is read. What comes below is in `mm/mod.rs`. A thread is never waited for with the engine's mutex held.

#![forbid(unsafe_code)]

use crate::{
    delay::{
        self,
        Point, //
    },
    domain::Scope,
    engine::{
        Engine,
        Policy, //
    },
    hash,
    knobs::{
        self,
        Knobs,
        Run, //
    },
    kthread::{
        self,
        Bell,
        OomOrigin,
        Work, //
    },
    mm::{
        self,
        hotplug::{
            Bystander,
            OfflineRange, //
        },
        owner,
        walk::BATCH_PAGES, //
    },
    registry::Registry,
    scan::{
        Batch,
        Begun, //
    },
    series,
    stats::Stats,
    stock::Stock,
    trace,
    tracepoints,
    unmerge::Unmerged,
    workers::Workers, //
};
use kernel::{
    new_condvar,
    new_mutex,
    prelude::*,
    sync::{
        lock::{
            mutex::MutexBackend,
            Guard, //
        },
        Arc,
        ArcBorrow,
        CondVar,
        Mutex, //
    },
    time::{
        delay::fsleep,
        msecs_to_jiffies,
        Delta, //
    }, //
};

/// How long the thread waits, having failed to adopt an address space.
const RETRY_MILLISECS: u32 = 100;

/// How often the first thread looks for address spaces to bury while others still scan.
const BURIAL_MILLISECS: u32 = 20;

/// How long to wait before an mmap lock that somebody else has is tried again.
const LOCK_PAUSE: Delta = Delta::from_millis(1);

/// How often, in all, whoever unmerges comes back to address spaces whose mmap locks were not to be had, after a pause each
/// time; and how often one after the other without having unmerged anything meanwhile.
const MOST_RETURNS: u32 = 60_000;
const MOST_FRUITLESS: u32 = 10_000;

/// How often unload tries again to undo all merges, and how long it waits in between.
const UNLOAD_TRIES: usize = 100;
const UNLOAD_PAUSE: Delta = Delta::from_millis(100);

/// What is under the engine's mutex.
pub(crate) struct State {
    engine: Engine,
    /// Memory is going offline: no stable node may be looked at.
    offlining: bool,
    turn: Turn,
}

/// What all threads do together between two sleeps of the first one.
#[derive(Default)]
struct Turn {
    /// Pages that are still to be looked at.
    budget: usize,
    /// It is on; once it is not, everybody leaves.
    open: bool,
    /// How many threads beside the first one take part.
    others: usize,
    /// What wakes them.
    bells: KVec<Arc<Bell>>,
}

/// Everything that the thread, the files and the notifiers share.
#[pin_data]
pub(crate) struct Ksm {
    pub(crate) knobs: Arc<Knobs>,
    pub(crate) stats: Arc<Stats>,
    pub(crate) registry: Arc<Registry>,
    /// Beside the first one.
    #[pin]
    control: Mutex<Workers>,
    /// The first thread's.
    #[pin]
    batch: Mutex<Batch>,
    #[pin]
    state: Mutex<State>,
    /// Signalled when `offlining` ends.
    #[pin]
    online: CondVar,
    /// Signalled when a thread has done its part of a turn.
    #[pin]
    parted: CondVar,
    key: hash::Key,
    /// The last to go: stock must not run as long as there are nodes of ours.
    pub(crate) stock: Stock,
}

type StateGuard<'a> = Guard<'a, State, MutexBackend>;

impl Ksm {
    /// A state with stock's defaults and nothing merged. Sleeps.
    pub(crate) fn new(seed: u64, registry: Arc<Registry>, stock: Stock) -> Result<Arc<Self>> {
        let stats = Arc::new(Stats::new(), GFP_KERNEL)?;
        let knobs = Arc::new(Knobs::new(), GFP_KERNEL)?;
        let key = hash::Key::new(seed);
        let engine = Engine::new(&key, knobs.clone(), stats.clone())?;
        Arc::pin_init(
            try_pin_init!(Self {
                knobs,
                stats,
                registry,
                control <- new_mutex!(Workers::default(), "ksm_rs::control"),
                batch <- new_mutex!(Batch::new()?, "ksm_rs::batch"),
                state <- new_mutex!(State {
                    engine,
                    offlining: false,
                    turn: Turn::default(),
                }, "ksm_rs::engine"),
                online <- new_condvar!("ksm_rs::online"),
                parted <- new_condvar!("ksm_rs::parted"),
                key,
                stock,
            }),
            GFP_KERNEL,
        )
    }

    /// The engine, once no memory is going offline. Sleeps.
    fn engine(&self) -> StateGuard<'_> {
        let mut guard = self.state.lock();
        while guard.offlining {
            self.online.wait(&mut guard);
        }
        guard
    }

    /// Fails with one line in the log if memory had begun to go offline before our notifier was there to be told. Sleeps.
    ///
    /// Stock is always told first, so nothing is missed between the two looks; at worst loading is refused needlessly.
    pub(crate) fn refuse_offlining(&self) -> Result {
        if self.stock.knows_of_offlining() && !self.state.lock().offlining {
            pr_err!("memory is going offline; wanted none that does: load the module again once it is\n");
            return Err(EBUSY);
        }
        Ok(())
    }

    fn policy(&self) -> Policy {
        Policy {
            use_zero_pages: self.knobs.use_zero_pages(),
            smart_scan: self.knobs.smart_scan(),
        }
    }

    /// Carries out a write of `text` to `pages_to_scan`. `Err(EINVAL)`: the advisor sets it, or it is no number.
    pub(crate) fn set_pages_to_scan(&self, text: &CStr) -> Result {
        if self.knobs.advisor() {
            return Err(EINVAL);
        }
        self.knobs.set_pages_to_scan(knobs::any_uint(text)?);
        Ok(())
    }

    /// Carries out a write to `advisor_mode`. Sleeps.
    pub(crate) fn set_advisor(&self, on: bool) {
        // The mutex keeps a pass that ends now from giving advice that is out of date.
        self.state.lock().engine.set_advisor(on);
    }

    /// Carries out a write to `run`. Sleeps.
    ///
    /// `Err(ENOMEM)`, `Err(ENOSPC)`, `Err(EAGAIN)` or `Err(ERESTARTSYS)`: unmerging was given up, and `run` is 0 now.
    pub(crate) fn set_run(&self, run: Run) -> Result {
        let _control = self.control.lock();
        let same = self.knobs.run() == run;
        self.knobs.set_run(run);
        // As with stock, no thread decides on anything when the write returns; after 0, for good. It may still be
        // reading the pages of a last batch.
        drop(self.engine());
        if same {
            return Ok(());
        }
        self.stock.set_unmerging(run == Run::Unmerge);
        if run == Run::Unmerge {
            let undone = self.unmerge_all(true, &mut 0);
            if undone.is_err() {
                self.knobs.set_run(Run::Stop);
                self.stock.set_unmerging(false);
            }
            undone?;
            // Or pages of somebody's who has nothing to do with us would keep knobs from being changed for ever.
            while !self.engine().engine.disown_orphans(BATCH_PAGES) {}
        }
        self.registry.bell().ring();
        Ok(())
    }

    /// Carries out a write to `merge_across_nodes`. Sleeps. `Err(EBUSY)`: pages are shared.
    #[cfg(CONFIG_NUMA)]
    pub(crate) fn set_merge_across_nodes(&self, across: bool) -> Result {
        let _control = self.control.lock();
        if self.engine().engine.merge_across_nodes == across {
            return Ok(());
        }
        self.without_nodes(|engine| engine.merge_across_nodes = across)?;
        self.knobs.set_merge_across_nodes(across);
        Ok(())
    }

    /// Carries out a write to `merge_scope`. Sleeps. `Err(EBUSY)`: pages are shared; `Err(EOPNOTSUPP)`: the kernel does
    /// not know what it would go by.
    pub(crate) fn set_merge_scope(&self, scope: Scope) -> Result {
        let known = match scope {
            Scope::Global | Scope::Process => true,
            Scope::Cgroup => owner::has_memory_cgroups(),
            Scope::User => owner::OWNERS,
        };
        if !known {
            return Err(series::not_supported());
        }
        let _control = self.control.lock();
        if self.engine().engine.scope == scope {
            return Ok(());
        }
        self.without_nodes(|engine| engine.scope = scope)?;
        self.knobs.set_merge_scope(scope);
        Ok(())
    }

    /// Carries out a write to `max_page_sharing`. Sleeps. `Err(EBUSY)`: pages are shared.
    pub(crate) fn set_max_page_sharing(&self, limit: u32) -> Result {
        if self.knobs.max_page_sharing() == limit {
            return Ok(());
        }
        let _control = self.control.lock();
        if self.engine().engine.max_page_sharing == limit {
            return Ok(());
        }
        self.without_nodes(|engine| engine.max_page_sharing = limit)?;
        self.knobs.set_max_page_sharing(limit);
        Ok(())
    }

    /// Carries out a write to `scan_threads`. Sleeps. `Err`: no more threads could be started.
    pub(crate) fn set_scan_threads(self: ArcBorrow<'_, Self>, threads: u32) -> Result {
        let mut workers = self.control.lock();
        let wanted = (threads as usize).saturating_sub(1);
        let changed = self.change_workers(&mut workers, wanted);
        // What there is, even if it is not what was wanted.
        self.knobs
            .set_scan_threads((workers.len() as u32).saturating_add(1));
        changed
    }

    /// Stops all threads beside the first one, but `most`. Sleeps.
    fn stop_workers(&self, workers: &mut Workers, most: usize) {
        while workers.len() > most {
            self.state.lock().turn.bells.pop();
            workers.stop_last();
        }
    }

    fn change_workers(self: ArcBorrow<'_, Self>, workers: &mut Workers, wanted: usize) -> Result {
        self.stop_workers(workers, wanted);
        while workers.len() < wanted {
            let bell = workers.start(self.into())?;
            let pushed = self.state.lock().turn.bells.push(bell, GFP_KERNEL);
            if pushed.is_err() {
                workers.stop_last();
                pushed?;
            }
        }
        Ok(())
    }

    /// Changes a rule that no stable node may have been made by. `Err(EBUSY)`: there is one. Sleeps.
    fn without_nodes(&self, change: impl FnOnce(&mut Engine)) -> Result {
        if self.stats.pages_shared.get() != 0 {
            return Err(EBUSY);
        }
        self.drop_unused_nodes();
        let mut guard = self.engine();
        if !guard.engine.stable.is_empty() {
            return Err(EBUSY);
        }
        change(&mut guard.engine);
        Ok(())
    }

    /// Drops the stable nodes whose pages are not mapped any more. Returns whether none is left. Sleeps.
    fn drop_unused_nodes(&self) -> bool {
        self.engine().engine.stable.restart_sweep();
        loop {
            let mut guard = self.engine();
            if guard.engine.sweep_orphans(BATCH_PAGES) {
                return guard.engine.stable.is_empty();
            }
        }
    }

    /// Gives every merged page of every address space a page of its own. Sleeps.
    ///
    /// If it cannot be done for one address space, `give_up` says whether to return at once, as also on a signal, or
    /// to go on with the others and return the error at the end. `Err(EAGAIN)`: all but those were done whose mmap locks were
    /// not to be had for long; `returns` counts how often it has come back to one.
    fn unmerge_all(&self, give_up: bool, returns: &mut u32) -> Result {
        let _origin = OomOrigin::mark();
        let mut result = Ok(());
        let mut locked = false;
        let mut fruitless = 0u32;
        // Since the last return.
        let mut fruit = false;
        let mut at = self.engine().engine.start_unmerging();
        loop {
            let mut guard = self.engine();
            let taken_in = self.take_in(&mut guard);
            if let Err(error) = taken_in {
                // Of an address space that we have no place for, nothing is merged by us; but its parent's pages may be.
                result = Err(error);
            }
            let patient =
                *returns < MOST_RETURNS && fruitless < MOST_FRUITLESS && !kthread::killed();
            let mut wait = false;
            match guard.engine.unmerge_some(&mut at) {
                Ok(Unmerged::Some) => fruit = true,
                Ok(Unmerged::All) if taken_in == Ok(true) => {}
                Ok(Unmerged::All) => break,
                Ok(Unmerged::Locked) if patient => {
                    if guard.engine.put_off(&mut at) {
                        *returns = returns.saturating_add(1);
                        wait = true;
                        fruitless = match fruit {
                            true => 0,
                            false => fruitless.saturating_add(1),
                        };
                        fruit = false;
                    }
                }
                Ok(Unmerged::Locked) => {
                    locked = true;
                    guard.engine.skip(&mut at);
                }
                Err(error) => {
                    result = Err(error);
                    guard.engine.skip(&mut at);
                }
            }
            drop(guard);
            if wait {
                fsleep(LOCK_PAUSE);
            }
            delay::at(Point::Unmerging);
            if give_up {
                result?;
                if kernel::current!().signal_pending() {
                    return Err(ERESTARTSYS);
                }
            }
            mm::breathe();
        }
        self.drop_unused_nodes();
        if locked {
            result = result.and(Err(EAGAIN));
        }
        if result.is_ok() {
            self.engine().engine.start_over();
        }
        result
    }

    /// Adopts fresh address spaces, a batch of them at the most. Returns whether there are more. Sleeps. On failure the rest
    /// stays fresh.
    fn take_in(&self, state: &mut State) -> Result<bool> {
        let mut visited = false;
        let slots = &mut state.engine.slots;
        for _ in 0..BATCH_PAGES {
            if self.registry.take_missed() {
                if visited {
                    self.registry.look_again();
                    return Err(ENOMEM);
                }
                tracepoints::visit_existing(&*self.registry);
                visited = true;
            }
            if !self.registry.has_fresh() {
                return Ok(false);
            }
            let slot = slots
                .reserve()
                .inspect_err(|_| self.stats.alloc_failures.up())?;
            let Some(space) = self.registry.adopt(slot) else {
                // It has exited, or there was no memory to note it.
                continue;
            };
            delay::at(Point::Adopting);
            trace::enter(space.key());
            slots.insert(slot, space);
        }
        Ok(self.registry.has_fresh())
    }

    /// Adopts fresh address spaces until there are none, or nobody wants that any more. Sleeps. On failure the rest stays
    /// fresh.
    fn take_all_in(&self) -> Result {
        let wanted = || self.knobs.run() == Run::Merge && !kthread::should_stop();
        while wanted() && self.take_in(&mut self.engine())? {
            mm::breathe();
        }
        Ok(())
    }

    /// Frees some of what is known of dead address spaces. Sleeps.
    fn bury_some(&self) {
        if let Some((key, slot)) = self.registry.next_dead() {
            if self.engine().engine.bury(slot, BATCH_PAGES) {
                delay::at(Point::Burying);
                self.registry.forget(key);
                trace::exit(key);
            }
        }
    }

    /// Scans as many pages as one turn allows, with the help of all other threads. Sleeps.
    fn scan_turn(&self) {
        let mut guard = self.engine();
        guard.turn.budget = self.knobs.pages_to_scan() as usize;
        guard.turn.open = true;
        for bell in guard.turn.bells.iter() {
            bell.ring();
        }
        drop(guard);
        self.scan(&mut self.batch.lock(), true);
        let mut guard = self.state.lock();
        while guard.turn.others != 0 {
            if self.should_pause() {
                // They leave after the page that they are at.
                guard.turn.open = false;
                self.parted.wait(&mut guard);
                continue;
            }
            // It may take long, which is no reason to call the thread hung; stopping and freezing wake it. And somebody
            // must bury the dead.
            let wait = msecs_to_jiffies(BURIAL_MILLISECS);
            let _ = self.parted.wait_interruptible_timeout(&mut guard, wait);
            drop(guard);
            if self.registry.has_dead() {
                self.bury_some();
            }
            guard = self.state.lock();
        }
        guard.turn.open = false;
    }

    /// Takes part in the turn that is on, if one is. For threads beside the first one. Sleeps.
    pub(crate) fn take_part(&self, batch: &mut Batch) {
        let mut guard = self.state.lock();
        guard.turn.others = guard.turn.others.saturating_add(1);
        drop(guard);
        self.scan(batch, false);
        let mut guard = self.state.lock();
        guard.turn.others = guard.turn.others.saturating_sub(1);
        drop(guard);
        self.parted.notify_all();
    }

    /// Whether the current thread should leave what it is at for later.
    fn should_pause(&self) -> bool {
        kthread::should_stop() || kthread::freezing() || self.knobs.run() != Run::Merge
    }

    /// Scans until the turn's budget is spent, the pass is over or the rest of it is in the hands of others. Sleeps.
    fn scan(&self, batch: &mut Batch, first: bool) {
        let pause = || self.should_pause();
        while !pause() {
            // Let go of after each batch: other threads, writers of knobs and memory hotplug wait for it.
            let mut guard = self.engine();
            let state = &mut *guard;
            // No more than a fair share, so that there is something for everybody.
            let threads = state.turn.bells.len().saturating_add(1);
            let budget = state.turn.budget.div_ceil(threads).min(BATCH_PAGES);
            if budget == 0 || !state.turn.open {
                break;
            }
            let mut wait = false;
            match state.engine.begin(batch, budget, self.policy(), pause) {
                Begun::Batch => {
                    // Nobody else may spend it meanwhile.
                    state.turn.budget = state.turn.budget.saturating_sub(budget);
                    drop(guard);
                    delay::at(Point::Gathered);
                    batch.read(&self.key);
                    delay::at(Point::Read);
                    guard = self.engine();
                    let pages = guard.engine.end(batch, self.policy(), pause);
                    let left = budget.saturating_sub(pages);
                    guard.turn.budget = guard.turn.budget.saturating_add(left);
                }
                Begun::Later(pages) => {
                    state.turn.budget = state.turn.budget.saturating_sub(pages);
                }
                Begun::Locked(pages) => {
                    state.turn.budget = state.turn.budget.saturating_sub(pages);
                    wait = true;
                }
                Begun::Nothing | Begun::PassDone => {
                    state.turn.open = false;
                    break;
                }
                Begun::Others => break,
            }
            drop(guard);
            if first && self.registry.has_dead() {
                self.bury_some();
            }
            if wait {
                fsleep(LOCK_PAUSE);
                self.engine().engine.waited(batch);
            }
            mm::breathe();
        }
    }

    /// Whether there is something to scan, and it is wanted. Sleeps.
    fn should_scan(&self) -> bool {
        self.knobs.run() == Run::Merge && !self.state.lock().engine.slots.is_empty()
    }

    /// Sleeps between two turns, while dead address spaces are still buried.
    fn sleep(&self) {
        let millisecs = self.knobs.sleep_millisecs();
        let mut left = msecs_to_jiffies(millisecs) as usize;
        if kthread::freezing() {
            // No sleep at all would be no chance to freeze.
            left = left.max(1);
        }
        loop {
            left = self.registry.bell().wait(Some(left));
            if left == 0
                || kthread::should_stop()
                || self.knobs.sleep_millisecs() != millisecs
                || self.knobs.run() != Run::Merge
            {
                break;
            }
            while self.registry.has_dead() && !kthread::should_stop() {
                self.bury_some();
            }
        }
    }

    /// Undoes everything, for unload: no structure of ours is read by anybody afterwards. Sleeps.
    ///
    /// What cannot be undone, for want of memory or as a process hangs in its exit or keeps its mmap lock, is tried again for a
    /// while, unless the current task is killed: by the kernel perhaps, for asking for memory that is not there. What is left then stays
    /// merged, as KSM pages that belong to no node.
    pub(crate) fn dismantle(&self) {
        let mut workers = self.control.lock();
        self.stop_workers(&mut workers, 0);
        self.knobs.set_run(Run::Unmerge);
        self.stock.set_unmerging(true);
        let mut returns = 0;
        for left in (0..UNLOAD_TRIES).rev() {
            let undone = self.unmerge_all(false, &mut returns);
            while self.registry.has_dead() {
                self.bury_some();
            }
            if self.drop_unused_nodes() && undone.is_ok() {
                break;
            }
            if left == 0 || undone == Err(EAGAIN) || kthread::killed() {
                break;
            }
            fsleep(UNLOAD_PAUSE);
        }
        let mut left = 0usize;
        while let Some(pages) = self.engine().engine.disown_some(BATCH_PAGES) {
            left = left.saturating_add(pages);
        }
        if left > 0 {
            pr_warn!(
                "{left} KSM pages could not be unmerged, as there is no memory, or a process hangs in its exit or keeps its mmap lock; they stay shared until they are written to\n"
            );
        }
        // Of what was left, address spaces still count what was known.
        let mut at = 0;
        while !self.engine().engine.forget_some(&mut at) {}
        self.registry.close();
    }
}

impl Work for Ksm {
    fn run(&self) {
        while !kthread::should_stop() {
            while self.registry.has_dead() && !kthread::should_stop() {
                self.bury_some();
            }
            if self.take_all_in().is_err() {
                // No place for an address space; memory may come back.
                self.registry
                    .bell()
                    .wait(Some(msecs_to_jiffies(RETRY_MILLISECS) as usize));
            }
            if self.should_scan() {
                self.scan_turn();
            }
            if self.should_scan() {
                self.sleep();
            } else {
                // Arrivals matter only to one who would scan them.
                self.registry.set_waiting(self.knobs.run() == Run::Merge);
                if self.knobs.run() != Run::Merge || !self.registry.has_fresh() {
                    self.registry.bell().wait(None);
                }
                self.registry.set_waiting(false);
            }
        }
    }
}

impl Bystander for Ksm {
    fn hold_still(&self) {
        self.state.lock().offlining = true;
        delay::at(Point::Offlining);
    }

    fn go_on(&self, offline: Option<OfflineRange>) {
        let mut guard = self.state.lock();
        if let Some(offline) = offline {
            guard.engine.drop_offline(&offline);
        }
        guard.offlining = false;
        drop(guard);
        self.online.notify_all();
    }
}
