//! The charts: stock, ksm_rs and the physical limit on the same axes.

use std::fs;
use std::path::Path;

use anyhow::Result;
use anyhow::anyhow;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;
use plotters::style::text_anchor::Pos;
use plotters::style::text_anchor::VPos;

use crate::figures::Figure;
use crate::figures::Figures;
use crate::record::Metric;
use crate::record::Side;
use crate::scenario::Scenario;

/// In pixels.
const SIZE: (u32, u32) = (760, 420);

/// The sides that are drawn, in this order.
const SIDES: [Side; 4] = [Side::Idle, Side::Stock, Side::KsmRs, Side::Limit];

/// A chart: which figures it shows.
struct Chart {
    scenario: Scenario,
    metric: Metric,
    title: &'static str,
}

/// All charts that there can be. Those with an axis become lines, the rest bars.
const CHARTS: [Chart; 12] = [
    Chart {
        scenario: Scenario::Steady,
        metric: Metric::NsPerPage,
        title: "Unique pages, steady state: CPU ns a page and pass",
    },
    Chart {
        scenario: Scenario::Merged,
        metric: Metric::NsPerPage,
        title: "Everything merged, steady state: CPU ns a page and pass",
    },
    Chart {
        scenario: Scenario::Near,
        metric: Metric::NsPerPage,
        title: "Pages equal but for 8 bytes: CPU ns a page and pass",
    },
    Chart {
        scenario: Scenario::Cold,
        metric: Metric::MergedPerCpuSecond,
        title: "From fresh memory: pages merged a CPU second",
    },
    Chart {
        scenario: Scenario::ColdCounted,
        metric: Metric::InstructionsPerMerged,
        title: "From fresh memory: instructions a merged page",
    },
    Chart {
        scenario: Scenario::Sparse,
        metric: Metric::CpuMsPerPass,
        title: "Sparse and fragmented memory: CPU ms a pass",
    },
    Chart {
        scenario: Scenario::Volatile,
        metric: Metric::NsPerPage,
        title: "A part rewritten between passes: CPU ns a page and pass",
    },
    Chart {
        scenario: Scenario::Memory,
        metric: Metric::BytesPerPage,
        title: "Kernel memory: bytes a page",
    },
    Chart {
        scenario: Scenario::Interference,
        metric: Metric::FaultP99,
        title: "Page faults while being scanned: p99, µs",
    },
    Chart {
        scenario: Scenario::Threads,
        metric: Metric::WallMsPerPass,
        title: "Scanning threads: ms a pass",
    },
    Chart {
        scenario: Scenario::Huge,
        metric: Metric::InstructionsPerMerged,
        title: "Memory in huge pages, from fresh: instructions a merged page",
    },
    Chart {
        scenario: Scenario::Guests,
        metric: Metric::CpuSecondsTo95,
        title: "Guests of make demo: CPU s until 95 % saved",
    },
];

/// Draws every chart for which there are figures; returns the names of the files.
pub fn draw_all(figures: &Figures, folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for chart in &CHARTS {
        let name = format!("{}.svg", chart.scenario.name());
        let path = folder.join(&name);
        let shown = figures.metric(chart.scenario, chart.metric);
        if shown.is_empty() {
            continue;
        }
        fs::write(path, draw(chart.title, &shown)?)?;
        names.push(name);
    }
    Ok(names)
}

fn color(side: Side) -> RGBColor {
    match side {
        Side::Idle => RGBColor(120, 160, 120),
        Side::Stock => RGBColor(140, 140, 150),
        Side::KsmRs => RGBColor(200, 80, 30),
        Side::Limit => RGBColor(40, 90, 160),
    }
}

fn draw(title: &str, figures: &[&Figure]) -> Result<String> {
    let mut text = String::new();
    let points: Option<Vec<f64>> = figures.iter().map(|figure| figure.x).collect();
    let result = match points {
        Some(points) if points.len() > 1 => lines(&mut text, title, figures, &points),
        _ => bars(&mut text, title, figures),
    };
    result.map_err(|error| anyhow!("drawing {title:?}: {error}"))?;
    Ok(text)
}

/// Somewhat more than the greatest value of any side.
fn top(figures: &[&Figure]) -> f64 {
    let values = figures
        .iter()
        .flat_map(|figure| figure.sides.values().map(|summary| summary.max));
    values.fold(0.0, f64::max).max(f64::MIN_POSITIVE) * 1.08
}

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// One line for each side, over an axis on which each step is a doubling.
fn lines(text: &mut String, title: &str, figures: &[&Figure], points: &[f64]) -> Outcome {
    let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let least = points.iter().copied().fold(f64::INFINITY, f64::min);
    let most = points.iter().copied().fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(14)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(
            (least..most)
                .log_scale()
                .base(2.0)
                .with_key_points(points.to_vec()),
            0.0..top(figures),
        )?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("MiB scanned")
        .y_desc(figures[0].unit)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .label_style(("sans-serif", 13))
        .draw()?;
    for side in SIDES {
        let line: Vec<(f64, f64)> = figures
            .iter()
            .filter_map(|figure| Some((figure.x?, figure.median(side)?)))
            .collect();
        if line.is_empty() {
            continue;
        }
        let style = color(side).stroke_width(2);
        chart
            .draw_series(LineSeries::new(line.clone(), style))?
            .label(side.name())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        let dot = |point| Circle::new(point, 3, color(side).filled());
        chart.draw_series(line.into_iter().map(dot))?;
        // From the least to the greatest of the rounds.
        let ranges = figures
            .iter()
            .filter_map(|figure| Some((figure.x?, figure.sides.get(&side)?)));
        chart
            .draw_series(ranges.map(|(x, range)| {
                PathElement::new([(x, range.min), (x, range.max)], color(side))
            }))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .border_style(TRANSPARENT)
        .label_font(("sans-serif", 13))
        .draw()?;
    root.present()?;
    Ok(())
}

/// A group of bars for each case, each with its value above it.
fn bars(text: &mut String, title: &str, figures: &[&Figure]) -> Outcome {
    let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let sides: Vec<Side> = SIDES
        .into_iter()
        .filter(|side| figures.iter().any(|figure| figure.sides.contains_key(side)))
        .collect();
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(14)
        .x_label_area_size(30)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..figures.len() as f64, 0.0..top(figures))?;
    let cases: Vec<String> = figures.iter().map(|figure| figure.case.clone()).collect();
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .light_line_style(TRANSPARENT)
        .y_desc(figures[0].unit)
        .y_label_formatter(&|y| short(*y))
        .label_style(("sans-serif", 13))
        .draw()?;
    // The middle fifth of each side is left and right of the bars.
    let width = 0.8 / sides.len() as f64;
    let centred = |size| {
        ("sans-serif", size)
            .into_font()
            .color(&BLACK)
            .pos(Pos::new(HPos::Center, VPos::Bottom))
    };
    for (place, &side) in sides.iter().enumerate() {
        let bar = |(group, figure): (usize, &&Figure)| {
            let left = group as f64 + 0.1 + place as f64 * width;
            Some((left, figure.median(side)?))
        };
        let bars: Vec<(f64, f64)> = figures.iter().enumerate().filter_map(bar).collect();
        let fill = color(side).filled();
        chart
            .draw_series(bars.iter().map(|&(left, value)| {
                Rectangle::new([(left, 0.0), (left + width * 0.92, value)], fill)
            }))?
            .label(side.name())
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], fill));
        chart.draw_series(bars.iter().map(|&(left, value)| {
            Text::new(short(value), (left + width * 0.46, value), centred(11))
        }))?;
    }
    let below = chart.plotting_area().get_pixel_range();
    for (group, case) in cases.into_iter().enumerate() {
        let step = f64::from(below.0.end - below.0.start) / figures.len() as f64;
        let x = f64::from(below.0.start) + (group as f64 + 0.5) * step;
        root.draw(&Text::new(case, (x as i32, below.1.end + 22), centred(13)))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(TRANSPARENT)
        .label_font(("sans-serif", 13))
        .draw()?;
    root.present()?;
    Ok(())
}

/// A number that takes little room.
fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 1e6 => format!("{:.1} M", value / 1e6),
        size if size >= 1e4 => format!("{:.0} k", value / 1e3),
        size if size >= 100.0 || size == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::boot_with;

    fn drawn(cases: &[&str]) -> String {
        let mut samples = Vec::new();
        for &case in cases {
            for (side, value) in [
                (Side::Stock, 3000.0),
                (Side::KsmRs, 300.0),
                (Side::Limit, 120.0),
            ] {
                samples.push((case, side, 0, Metric::NsPerPage, value));
            }
        }
        let figures = Figures::of(&[boot_with(Scenario::Steady, &samples)]);
        draw(
            "a title",
            &figures.metric(Scenario::Steady, Metric::NsPerPage),
        )
        .unwrap()
    }

    #[test]
    fn lines_show_all_sides() {
        let text = drawn(&["64 MiB", "128 MiB", "2048 MiB"]);
        for words in ["a title", "stock", "ksm_rs", "limit", "2048"] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert!(text.trim_end().ends_with("</svg>"));
    }

    #[test]
    fn bars_show_all_cases_and_values() {
        let text = drawn(&["random", "last 8 bytes differ"]);
        for words in ["random", "last 8 bytes differ", "3000", "300", "limit"] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }
}
