//! What can be measured, where, and with how much memory.

use clap::ValueEnum;
use serde::Deserialize;
use serde::Serialize;

use anyhow::Result;

use crate::cold;
use crate::emulated;
use crate::guests;
use crate::interference;
use crate::memory_use;
use crate::session::Session;
use crate::sparse;
use crate::steady;
use crate::threads;
use crate::volatile;

/// A kernel to boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Machine {
    /// ARCH=um: the kernel as a process of the host, at native speed.
    Um,
    /// QEMU with a clock that counts instructions, one to a ns, for what the other cannot have.
    Icount,
    /// QEMU. Only ratios mean something there.
    Qemu,
}

impl Machine {
    /// As scripts/bench calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Um => "um",
            Self::Icount => "icount",
            Self::Qemu => "qemu",
        }
    }
}

/// Something to measure; each is a boot of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scenario {
    /// Steady state over unique pages, in growing amounts.
    Steady,
    /// Steady state over pages that are merged already.
    Merged,
    /// Steady state over pages that are equal but for eight bytes.
    Near,
    /// From fresh memory until everything equal is merged.
    Cold,
    /// Pages that lie far apart, in many VMAs, in many processes.
    Sparse,
    /// Memory of which a part changes between two passes.
    Volatile,
    /// Kernel memory for what is known of the pages.
    Memory,
    /// What a process notices of being scanned.
    Interference,
    /// How long the locks of page tables are held.
    TableLocks,
    /// Several scanning threads.
    Threads,
    /// What `cold` is, counted in instructions.
    ColdCounted,
    /// Memory of two NUMA nodes, merged on each of them.
    Numa,
    /// Memory in huge pages.
    Huge,
    /// The virtual machines of `make demo`.
    Guests,
}

impl Scenario {
    /// As it stands in tables and file names.
    pub fn name(self) -> String {
        self.to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default()
    }

    /// What it is, in a line.
    pub fn title(self) -> &'static str {
        match self {
            Self::Steady => "steady state, unique pages",
            Self::Merged => "steady state, everything merged",
            Self::Near => "steady state, pages equal but for 8 bytes",
            Self::Cold => "fresh memory until all is merged",
            Self::Sparse => "sparse and fragmented memory",
            Self::Volatile => "memory that changes between passes",
            Self::Memory => "kernel memory for what is known",
            Self::Interference => "latency of a process that is scanned",
            Self::TableLocks => "how long the locks of page tables are held",
            Self::Threads => "several scanning threads",
            Self::ColdCounted => "fresh memory until all is merged, in instructions",
            Self::Numa => "two NUMA nodes, merge_across_nodes=0",
            Self::Huge => "memory in huge pages",
            Self::Guests => "the guests of make demo",
        }
    }

    /// Where it runs.
    pub fn machine(self) -> Machine {
        match self {
            Self::ColdCounted | Self::TableLocks | Self::Numa | Self::Huge => Machine::Icount,
            Self::Guests => Machine::Qemu,
            _ => Machine::Um,
        }
    }

    /// Whether the quick form has it. An emulated machine takes longer to boot than that is to take.
    pub fn is_quick(self) -> bool {
        self.machine() == Machine::Um
    }

    /// Memory of the machine, in MiB.
    pub fn memory_mib(self, quick: bool) -> u64 {
        match (self, quick) {
            (Self::Sparse, _) => 1536,
            (Self::ColdCounted | Self::TableLocks | Self::Numa | Self::Huge, _) => 1024,
            // Three guests, QEMU's own memory, and the VM's.
            (Self::Guests, _) => 1344,
            (_, true) => 768,
            (Self::Steady, false) => 2816,
            (_, false) => 1536,
        }
    }

    /// Measures.
    pub fn run(self, session: &mut Session) -> Result<()> {
        match self {
            Self::Steady => steady::unique(session),
            Self::Merged => steady::merged(session),
            Self::Near => steady::near(session),
            Self::Cold | Self::ColdCounted => cold::run(session),
            Self::Sparse => sparse::run(session),
            Self::Volatile => volatile::run(session),
            Self::Memory => memory_use::run(session),
            Self::Interference => interference::run(session),
            Self::TableLocks => interference::table_locks(session),
            Self::Threads => threads::run(session),
            Self::Numa => emulated::numa(session),
            Self::Huge => emulated::huge(session),
            Self::Guests => guests::run(session),
        }
    }
}
