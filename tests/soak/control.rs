//! Whoever has the machine in hand changes their mind: knobs, the module itself, CPUs, suspending.

mod cpus;
mod freeze;
mod knobs;
pub mod reload;

use anyhow::Result;
use anyhow::ensure;
use ksm_e2e::module;

use crate::actor::Actor;

/// All actors of this group.
pub fn actors() -> Vec<Actor> {
    let actor = |name, step| Actor {
        name,
        group: "control",
        step,
    };
    vec![
        actor("knobs-1", knobs::rewrite),
        actor("knobs-2", knobs::rewrite),
        actor("knobs-3", knobs::rewrite),
        actor("run", knobs::cycle_run),
        actor("reload", reload::unload_and_load),
        actor("cpus", cpus::take_offline_and_back),
        actor("freeze", freeze::freeze),
    ]
}

/// Nothing: see [`Prepared::undo`].
pub struct Prepared;

/// Looks that there is something to control.
pub fn prepare(_: &[Actor]) -> Result<Prepared> {
    cpus::expect_all_online()?;
    Ok(Prepared)
}

impl Prepared {
    /// Fails if an actor has left the system without the module, or without a CPU.
    pub fn undo(self) -> Result<()> {
        ensure!(module::loaded()?, "the module was left unloaded");
        cpus::expect_all_online()
    }
}
