//! What the module is meant to reach, beside what it was measured to reach.

use serde::Serialize;

use crate::figures::Figure;
use crate::figures::Figures;
use crate::record::Metric;
use crate::record::Side;
use crate::scenario::Scenario;

/// How a goal stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It is reached.
    Met,
    /// It is not.
    Missed,
    /// What it takes to tell was not measured.
    Unknown,
}

impl Verdict {
    /// As it stands in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Met => "met",
            Self::Missed => "MISSED",
            Self::Unknown => "not measured",
        }
    }
}

/// A goal and how it stands.
#[derive(Clone, Debug, Serialize)]
pub struct Goal {
    /// What it is about.
    pub what: String,
    /// What it asks for.
    pub wanted: String,
    /// What was measured.
    pub measured: String,
    /// How it stands.
    pub verdict: Verdict,
}

/// All goals.
pub fn all(figures: &Figures) -> Vec<Goal> {
    vec![
        steady_cost(figures),
        steady_ratio(figures),
        growth(figures),
        merged(figures),
        cold(figures, Scenario::Cold, Metric::CpuSecondsToMerged),
        cold(
            figures,
            Scenario::ColdCounted,
            Metric::InstructionsPerMerged,
        ),
        near(figures),
        memory(figures),
        latency(figures),
        holds(figures),
        table_holds(figures),
        threads(figures),
    ]
}

/// A goal with a figure, or without one if there is none.
fn goal(what: &str, wanted: &str, outcome: Option<(String, bool)>) -> Goal {
    let (measured, verdict) = match outcome {
        None => (String::new(), Verdict::Unknown),
        Some((measured, true)) => (measured, Verdict::Met),
        Some((measured, false)) => (measured, Verdict::Missed),
    };
    Goal {
        what: what.to_owned(),
        wanted: wanted.to_owned(),
        measured,
        verdict,
    }
}

/// The figure in which a number is the greatest.
fn worst<'a>(
    figures: &[&'a Figure],
    key: impl Fn(&Figure) -> Option<f64>,
) -> Option<(&'a Figure, f64)> {
    figures
        .iter()
        .filter_map(|figure| Some((*figure, key(figure)?)))
        .max_by(|a, b| a.1.total_cmp(&b.1))
}

fn steady_cost(figures: &Figures) -> Goal {
    let all = figures.metric(Scenario::Steady, Metric::NsPerPage);
    let outcome = worst(&all, |figure| figure.median(Side::KsmRs)).map(|(figure, ns)| {
        let text = format!("{:.2} µs at the most, at {}", ns / 1000.0, figure.case);
        (text, ns <= 600.0)
    });
    goal(
        "unique pages, a page and pass",
        "≤ 0.6 µs from 64 MiB to 2 GiB",
        outcome,
    )
}

fn steady_ratio(figures: &Figures) -> Goal {
    let outcome = figures
        .case(Scenario::Steady, "512 MiB", Metric::NsPerPage)
        .and_then(|figure| figure.times_better)
        .map(|ratio| {
            let text = format!("{:.1} times cheaper than stock", ratio.median);
            (text, ratio.median >= 10.0)
        });
    goal("unique pages, 512 MiB", "≥ 10 times cheaper", outcome)
}

fn growth(figures: &Figures) -> Goal {
    let at = |case| figures.case(Scenario::Steady, case, Metric::NsPerPage);
    let of = |side| Some(at("2048 MiB")?.median(side)? / at("64 MiB")?.median(side)?);
    let outcome = of(Side::KsmRs).map(|ours| {
        let stock = of(Side::Stock).map_or(String::new(), |stock| format!(" (stock: {stock:.2})"));
        (format!("{ours:.2} times{stock}"), ours <= 1.25)
    });
    goal("growth from 64 MiB to 2 GiB", "≤ 1.25 times", outcome)
}

fn merged(figures: &Figures) -> Goal {
    let all = figures.metric(Scenario::Merged, Metric::NsPerPage);
    let outcome = worst(&all, slower).map(|(figure, times)| {
        let text = format!(
            "{:.2} µs, stock {:.2} µs ({})",
            figure.median(Side::KsmRs).unwrap_or(0.0) / 1000.0,
            figure.median(Side::Stock).unwrap_or(0.0) / 1000.0,
            figure.case
        );
        (text, times <= 1.0)
    });
    goal(
        "everything merged, a page and pass",
        "not slower than stock",
        outcome,
    )
}

/// How many times slower than stock.
fn slower(figure: &Figure) -> Option<f64> {
    Some(1.0 / figure.times_better?.median)
}

fn cold(figures: &Figures, scenario: Scenario, metric: Metric) -> Goal {
    let all = figures.metric(scenario, metric);
    let outcome = worst(&all, slower).map(|(figure, times)| {
        let text = format!(
            "{:.1} times fewer at the least ({})",
            1.0 / times,
            figure.case
        );
        (text, 1.0 / times >= 3.0)
    });
    let wanted = if metric == Metric::InstructionsPerMerged {
        "≥ 3 times fewer instructions, every mix"
    } else {
        "≥ 3 times fewer CPU seconds, every mix"
    };
    goal("fresh memory until all is merged", wanted, outcome)
}

fn near(figures: &Figures) -> Goal {
    let all = figures.metric(Scenario::Near, Metric::NsPerPage);
    let ours: Vec<f64> = all
        .iter()
        .filter_map(|figure| figure.median(Side::KsmRs))
        .collect();
    let most = ours.iter().copied().reduce(f64::max);
    let least = ours.iter().copied().reduce(f64::min);
    let outcome = most
        .zip(least)
        .filter(|_| ours.len() > 1)
        .map(|(most, least)| {
            let text = format!("{:.2} to {:.2} µs", least / 1000.0, most / 1000.0);
            // A tenth is what rounds of the same differ by.
            (text, most <= least * 1.1)
        });
    goal("near-duplicates", "the same wherever pages differ", outcome)
}

fn memory(figures: &Figures) -> Goal {
    let outcome = figures
        .case(Scenario::Memory, "unmerged", Metric::BytesPerPage)
        .and_then(|figure| figure.median(Side::KsmRs).zip(figure.median(Side::Stock)))
        .map(|(ours, stock)| (format!("{ours:.1} B (stock: {stock:.1} B)"), ours <= 48.0));
    goal(
        "kernel memory of an unmerged page",
        "≤ 48 B, everything counted",
        outcome,
    )
}

fn latency(figures: &Figures) -> Goal {
    let all: Vec<&Figure> = [Metric::FaultP99, Metric::MmapP99, Metric::MunmapP99]
        .iter()
        .flat_map(|&metric| figures.metric(Scenario::Interference, metric))
        .collect();
    let outcome = worst(&all, slower).map(|(figure, times)| {
        let text = format!(
            "{}: {:.1} µs, stock {:.1} µs",
            figure.metric.name(),
            figure.median(Side::KsmRs).unwrap_or(0.0),
            figure.median(Side::Stock).unwrap_or(0.0)
        );
        (text, times <= 1.0)
    });
    goal(
        "latency of who is scanned, p99",
        "not worse than stock",
        outcome,
    )
}

fn holds(figures: &Figures) -> Goal {
    let outcome = figures
        .case(Scenario::Interference, "latency", Metric::HoldP99)
        .and_then(|figure| figure.median(Side::KsmRs).zip(figure.median(Side::Stock)))
        .map(|(ours, stock)| (format!("{ours:.1} µs, stock {stock:.1} µs"), ours <= stock));
    goal(
        "mmap lock held at a time, p99",
        "not longer than stock",
        outcome,
    )
}

fn table_holds(figures: &Figures) -> Goal {
    let all = figures.metric(Scenario::TableLocks, Metric::HoldP99);
    let outcome = worst(&all, slower).map(|(figure, times)| {
        let text = format!(
            "{:.1} thousand instructions, stock {:.1} ({})",
            figure.median(Side::KsmRs).unwrap_or(0.0),
            figure.median(Side::Stock).unwrap_or(0.0),
            figure.case
        );
        (text, times <= 1.0)
    });
    goal(
        "page table lock held at a time, p99",
        "not longer than stock",
        outcome,
    )
}

fn threads(figures: &Figures) -> Goal {
    let of = |case, side| {
        figures
            .case(Scenario::Threads, case, Metric::WallMsPerPass)
            .and_then(|figure| figure.median(side))
    };
    let times = |side| Some(of("1 thread", side)? / of("2 threads", side)?);
    let outcome = times(Side::KsmRs).map(|ours| {
        let limit = times(Side::Limit).map_or(String::new(), |limit| {
            format!(" (two loops that read: {limit:.2})")
        });
        (format!("{ours:.2} times{limit}"), ours >= 1.8)
    });
    goal(
        "two scanning threads",
        "≥ 1.8 times faster than one",
        outcome,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::boot_with;

    fn steady(ours: f64) -> Figures {
        let metric = Metric::NsPerPage;
        Figures::of(&[boot_with(
            Scenario::Steady,
            &[
                ("64 MiB", Side::Stock, 0, metric, 3300.0),
                ("64 MiB", Side::KsmRs, 0, metric, 500.0),
                ("512 MiB", Side::Stock, 0, metric, 5800.0),
                ("512 MiB", Side::KsmRs, 0, metric, ours),
                ("2048 MiB", Side::Stock, 0, metric, 10_200.0),
                ("2048 MiB", Side::KsmRs, 0, metric, ours),
            ],
        )])
    }

    fn verdicts(figures: &Figures) -> Vec<Verdict> {
        all(figures).iter().map(|goal| goal.verdict).collect()
    }

    #[test]
    fn what_was_not_measured_is_neither_met_nor_missed() {
        let nothing = Figures::of(&[]);
        assert!(
            verdicts(&nothing)
                .iter()
                .all(|&verdict| verdict == Verdict::Unknown)
        );
    }

    #[test]
    fn a_goal_is_met_by_the_worst_case() {
        assert_eq!(verdicts(&steady(550.0))[..3], [Verdict::Met; 3]);
        let missed = &all(&steady(650.0))[..3];
        assert!(missed.iter().all(|goal| goal.verdict == Verdict::Missed));
        assert!(missed[0].measured.starts_with("0.65 µs"), "{missed:?}");
        assert_eq!(missed[1].measured, "8.9 times cheaper than stock");
        assert_eq!(missed[2].measured, "1.30 times (stock: 3.09)");
    }

    #[test]
    fn one_slow_mix_misses_the_goal() {
        let metric = Metric::CpuSecondsToMerged;
        let figures = Figures::of(&[boot_with(
            Scenario::Cold,
            &[
                ("pairs", Side::Stock, 0, metric, 9.0),
                ("pairs", Side::KsmRs, 0, metric, 2.0),
                ("groups", Side::Stock, 0, metric, 4.0),
                ("groups", Side::KsmRs, 0, metric, 2.0),
            ],
        )]);
        let goal = cold(&figures, Scenario::Cold, metric);
        assert_eq!(goal.verdict, Verdict::Missed);
        assert_eq!(goal.measured, "2.0 times fewer at the least (groups)");
    }
}
