//! What the rounds of all boots come to: medians, spreads, and how many times better the module is.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::record::Boot;
use crate::record::Metric;
use crate::record::Side;
use crate::scenario::Scenario;
use crate::stats::Summary;

/// One metric of one case, over all rounds and sides.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// Of which scenario.
    pub scenario: Scenario,
    /// Of which case of it.
    pub case: String,
    /// Where the case is on the axis of a chart.
    pub x: Option<f64>,
    /// What was measured.
    pub metric: Metric,
    /// In which unit.
    pub unit: &'static str,
    /// For each side that was measured.
    pub sides: BTreeMap<Side, Summary>,
    /// How many times better the module is than stock, from round to round.
    pub times_better: Option<Summary>,
}

/// All figures of all boots, in the order in which they were first measured.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// The boots' own notes, by scenario.
    pub notes: BTreeMap<Scenario, Vec<String>>,
    /// The figures.
    pub figures: Vec<Figure>,
}

impl Figures {
    /// Sums up what the boots have measured.
    pub fn of(boots: &[Boot]) -> Self {
        let mut figures: Vec<Figure> = Vec::new();
        let mut notes = BTreeMap::new();
        for boot in boots {
            notes.insert(boot.scenario, boot.notes.clone());
            for sample in &boot.samples {
                let known = figures.iter().any(|figure| {
                    figure.scenario == boot.scenario
                        && figure.case == sample.case
                        && figure.metric == sample.metric
                });
                if !known {
                    figures.push(figure(boot, &sample.case, sample.x, sample.metric));
                }
            }
        }
        Self { notes, figures }
    }

    /// The figures of a scenario.
    pub fn scenario(&self, scenario: Scenario) -> impl Iterator<Item = &Figure> {
        self.figures
            .iter()
            .filter(move |figure| figure.scenario == scenario)
    }

    /// The figures of a scenario with this metric.
    pub fn metric(&self, scenario: Scenario, metric: Metric) -> Vec<&Figure> {
        self.scenario(scenario)
            .filter(|figure| figure.metric == metric)
            .collect()
    }

    /// One figure.
    pub fn case(&self, scenario: Scenario, case: &str, metric: Metric) -> Option<&Figure> {
        self.scenario(scenario)
            .find(|figure| figure.case == case && figure.metric == metric)
    }
}

impl Figure {
    /// The median of a side.
    pub fn median(&self, side: Side) -> Option<f64> {
        self.sides.get(&side).map(|summary| summary.median)
    }
}

fn figure(boot: &Boot, case: &str, x: Option<f64>, metric: Metric) -> Figure {
    let values = |side| {
        let samples = boot.samples.iter();
        samples
            .filter(move |sample| {
                sample.case == case && sample.metric == metric && sample.side == side
            })
            .map(|sample| (sample.round, sample.value))
    };
    let mut sides = BTreeMap::new();
    for side in [Side::Idle, Side::Stock, Side::KsmRs, Side::Limit] {
        if let Some(summary) = Summary::of(values(side).map(|(_, value)| value)) {
            sides.insert(side, summary);
        }
    }
    // Both sides of a round ran one after the other: what disturbed the machine then disturbed both.
    let ours: BTreeMap<u32, f64> = values(Side::KsmRs).collect();
    let ratios = values(Side::Stock).filter_map(|(round, stock)| {
        let ours = *ours.get(&round)?;
        let (good, bad) = if metric.more_is_better() {
            (ours, stock)
        } else {
            (stock, ours)
        };
        (bad != 0.0).then(|| good / bad)
    });
    Figure {
        scenario: boot.scenario,
        case: case.to_owned(),
        x,
        metric,
        unit: metric.unit(),
        sides,
        times_better: Summary::of(ratios),
    }
}

/// A boot with these samples of one case, for tests.
#[cfg(test)]
pub fn boot_with(scenario: Scenario, samples: &[(&str, Side, u32, Metric, f64)]) -> Boot {
    use crate::record::Sample;
    Boot {
        scenario,
        machine: scenario.machine(),
        kernel: String::new(),
        cpus: 2,
        memory_mib: 1024,
        rounds: 1,
        quick: false,
        complete: true,
        notes: Vec::new(),
        samples: samples
            .iter()
            .map(|&(case, side, round, metric, value)| Sample {
                case: case.to_owned(),
                x: case
                    .split(' ')
                    .next()
                    .and_then(|number| number.parse().ok()),
                side,
                round,
                metric,
                value,
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_those_of_each_round() {
        let metric = Metric::NsPerPage;
        // The machine is three times slower in the second round, which leaves the ratio as it was.
        let boot = boot_with(
            Scenario::Steady,
            &[
                ("64 MiB", Side::Stock, 0, metric, 100.0),
                ("64 MiB", Side::KsmRs, 0, metric, 10.0),
                ("64 MiB", Side::Stock, 1, metric, 300.0),
                ("64 MiB", Side::KsmRs, 1, metric, 30.0),
            ],
        );
        let figures = Figures::of(&[boot]);
        let [figure] = &figures.figures[..] else {
            panic!("{figures:?}");
        };
        let ratio = figure.times_better.unwrap();
        assert_eq!((ratio.median, ratio.min, ratio.max), (10.0, 10.0, 10.0));
        assert_eq!(figure.median(Side::Stock), Some(200.0));
        assert_eq!(figure.x, Some(64.0));
    }

    #[test]
    fn more_merged_a_second_is_better() {
        let metric = Metric::MergedPerCpuSecond;
        let boot = boot_with(
            Scenario::Cold,
            &[
                ("pairs", Side::Stock, 0, metric, 100.0),
                ("pairs", Side::KsmRs, 0, metric, 300.0),
            ],
        );
        let figures = Figures::of(&[boot]);
        assert_eq!(figures.figures[0].times_better.unwrap().median, 3.0);
    }

    #[test]
    fn a_side_alone_has_no_ratio() {
        let boot = boot_with(
            Scenario::Threads,
            &[("2 threads", Side::KsmRs, 0, Metric::WallMsPerPass, 1.0)],
        );
        assert_eq!(Figures::of(&[boot]).figures[0].times_better, None);
    }
}
