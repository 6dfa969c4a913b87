//! What a boot writes down and the report reads: single measurements, with who was measured and under which name.

use std::fs;
use std::path::Path;

use anyhow::Context;
use anyhow::Result;
use serde::Deserialize;
use serde::Serialize;

use crate::scenario::Machine;
use crate::scenario::Scenario;

/// Who was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The kernel's own KSM.
    Stock,
    /// The module.
    KsmRs,
    /// What the hardware allows: a loop that reads the same pages.
    Limit,
    /// Nobody merges.
    Idle,
}

impl Side {
    /// As it stands in tables and charts.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::KsmRs => "ksm_rs",
            Self::Limit => "limit",
            Self::Idle => "no KSM",
        }
    }
}

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// CPU time of the scanning threads for a page and pass.
    NsPerPage,
    /// The same for the first pass over fresh memory.
    FirstPassNsPerPage,
    /// CPU time of the scanning threads for a pass.
    CpuMsPerPass,
    /// How long a pass takes.
    WallMsPerPass,
    /// CPU time of the scanning threads until everything that is equal is merged.
    CpuSecondsToMerged,
    /// Pages merged for each of these CPU seconds.
    MergedPerCpuSecond,
    /// Instructions of the scanning threads for a page and pass.
    InstructionsPerPage,
    /// Instructions of the scanning threads for each page merged, from fresh memory on.
    InstructionsPerMerged,
    /// CPU time of the scanning threads until 95 % of the final savings are there.
    CpuSecondsTo95,
    /// Memory saved in the end.
    MibSaved,
    /// Merged pages that had to be copied as they were written to, in percent of the pages rewritten.
    UndonePercent,
    /// Kernel memory for each page that is known.
    BytesPerPage,
    /// Latency of a page fault: median.
    FaultP50,
    /// 99th percentile.
    FaultP99,
    /// Longest.
    FaultMax,
    /// Latency of mmap: median.
    MmapP50,
    /// 99th percentile.
    MmapP99,
    /// Longest.
    MmapMax,
    /// Latency of munmap: median.
    MunmapP50,
    /// 99th percentile.
    MunmapP99,
    /// Longest.
    MunmapMax,
    /// For how much of the time the scanner holds the mmap lock.
    HoldShare,
    /// How long the scanner holds the mmap lock at a time: median.
    HoldP50,
    /// 99th percentile.
    HoldP99,
    /// Longest.
    HoldMax,
}

impl Metric {
    /// As it stands in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::NsPerPage => "CPU a page and pass",
            Self::FirstPassNsPerPage => "CPU a page, first pass",
            Self::CpuMsPerPass => "CPU a pass",
            Self::WallMsPerPass => "time of a pass",
            Self::CpuSecondsToMerged => "CPU until merged",
            Self::MergedPerCpuSecond => "merged a CPU second",
            Self::InstructionsPerPage => "instructions a page and pass",
            Self::InstructionsPerMerged => "instructions a merged page",
            Self::CpuSecondsTo95 => "CPU until 95 % saved",
            Self::MibSaved => "saved in the end",
            Self::UndonePercent => "merges undone",
            Self::BytesPerPage => "kernel memory a page",
            Self::FaultP50 => "page fault, p50",
            Self::FaultP99 => "page fault, p99",
            Self::FaultMax => "page fault, max",
            Self::MmapP50 => "mmap, p50",
            Self::MmapP99 => "mmap, p99",
            Self::MmapMax => "mmap, max",
            Self::MunmapP50 => "munmap, p50",
            Self::MunmapP99 => "munmap, p99",
            Self::MunmapMax => "munmap, max",
            Self::HoldShare => "lock held, in all",
            Self::HoldP50 => "lock held, p50",
            Self::HoldP99 => "lock held, p99",
            Self::HoldMax => "lock held, max",
        }
    }

    /// What the figures are counted in.
    pub fn unit(self) -> &'static str {
        match self {
            Self::NsPerPage | Self::FirstPassNsPerPage => "ns",
            Self::CpuMsPerPass | Self::WallMsPerPass => "ms",
            Self::CpuSecondsToMerged | Self::CpuSecondsTo95 => "s",
            Self::MergedPerCpuSecond => "pages",
            Self::MibSaved => "MiB",
            Self::UndonePercent | Self::HoldShare => "%",
            Self::InstructionsPerPage | Self::InstructionsPerMerged => "",
            Self::BytesPerPage => "B",
            _ => "µs",
        }
    }

    /// Whether a higher figure is the better one.
    pub fn more_is_better(self) -> bool {
        matches!(self, Self::MergedPerCpuSecond | Self::MibSaved)
    }
}

/// One measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sample {
    /// What of the scenario it is, "512 MiB" for instance.
    pub case: String,
    /// Where that is on the axis of a chart, if the cases lie on one.
    pub x: Option<f64>,
    /// Who was measured.
    pub side: Side,
    /// In which round, from 0.
    pub round: u32,
    /// What was measured.
    pub metric: Metric,
    /// The figure.
    pub value: f64,
}

/// Everything that one boot has measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Boot {
    /// What ran.
    pub scenario: Scenario,
    /// On which machine.
    pub machine: Machine,
    /// Version of the kernel.
    pub kernel: String,
    /// CPUs of the machine.
    pub cpus: usize,
    /// Its memory.
    pub memory_mib: u64,
    /// Rounds that were asked for.
    pub rounds: u32,
    /// Whether this is the quick form.
    pub quick: bool,
    /// Whether everything that was asked for has been measured.
    pub complete: bool,
    /// What the reader should know: sizes that were scaled down, cases that were left out.
    pub notes: Vec<String>,
    /// The measurements, in the order in which they were made.
    pub samples: Vec<Sample>,
}

impl Boot {
    /// Writes the file as a whole: a boot that ends early leaves what it had.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        fs::write(path, text).with_context(|| format!("writing {}", path.display()))
    }

    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("what is in {}", path.display()))
    }
}
