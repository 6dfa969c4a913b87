//! The tables, results.json and the charts.

use std::fs;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::chart;
use crate::figures::Figure;
use crate::figures::Figures;
use crate::goals;
use crate::goals::Goal;
use crate::goals::Verdict;
use crate::record::Boot;
use crate::record::Side;
use crate::scenario::Machine;

/// What results.json holds.
#[derive(Debug, Serialize)]
struct Results<'a> {
    goals: &'a [Goal],
    #[serde(flatten)]
    figures: &'a Figures,
    boots: &'a [Boot],
}

/// Makes everything of what the boots have measured, in a folder, and prints the tables.
pub fn make(boots: &[Boot], folder: &Path) -> Result<()> {
    let figures = Figures::of(boots);
    let goals = goals::all(&figures);
    let results = Results {
        goals: &goals,
        figures: &figures,
        boots,
    };
    fs::write(
        folder.join("results.json"),
        serde_json::to_string_pretty(&results)?,
    )?;
    let charts = chart::draw_all(&figures, folder)?;
    for boot in boots {
        print!("{}", heading(boot));
        print!("{}", align(&rows(&figures, boot), 2));
    }
    println!();
    print!("{}", align(&goal_rows(&goals), 4));
    for line in summary(&goals, boots) {
        println!("{line}");
    }
    for name in std::iter::once("results.json").chain(charts.iter().map(String::as_str)) {
        println!("{}", folder.join(name).display());
    }
    Ok(())
}

fn heading(boot: &Boot) -> String {
    let mut text = format!(
        "\n{}: {} (Linux {} on {}, {} MiB, {} CPUs, {})\n",
        boot.scenario.name(),
        boot.scenario.title(),
        boot.kernel,
        boot.machine.name(),
        boot.memory_mib,
        boot.cpus,
        match boot.rounds {
            1 => "1 round".to_owned(),
            rounds => format!("{rounds} rounds"),
        }
    );
    match boot.machine {
        Machine::Um => {}
        Machine::Icount => text += "  on an emulated CPU, whose clock counts instructions\n",
        Machine::Qemu => text += "  on an emulated CPU: only the ratios mean something\n",
    }
    for note in &boot.notes {
        text += &format!("  {note}\n");
    }
    text
}

/// The rows of a scenario's table, the first its head.
fn rows(figures: &Figures, boot: &Boot) -> Vec<Vec<String>> {
    let sides: Vec<Side> = [Side::Idle, Side::Stock, Side::KsmRs, Side::Limit]
        .into_iter()
        .filter(|side| {
            figures
                .scenario(boot.scenario)
                .any(|figure| figure.sides.contains_key(side))
        })
        .collect();
    let mut head = vec![String::new(), String::new()];
    head.extend(sides.iter().map(|side| side.name().to_owned()));
    head.push("better".to_owned());
    let mut rows = vec![head];
    for figure in figures.scenario(boot.scenario) {
        let mut row = vec![figure.case.clone(), figure.metric.name().to_owned()];
        row.extend(sides.iter().map(|&side| cell(figure, side)));
        row.push(figure.times_better.map_or(String::new(), |ratio| {
            format!(
                "× {}",
                with_spread(ratio.median, ratio.spread_percent(), ratio.count, "")
            )
        }));
        rows.push(row);
    }
    rows
}

fn cell(figure: &Figure, side: Side) -> String {
    figure.sides.get(&side).map_or(String::new(), |summary| {
        with_spread(
            summary.median,
            summary.spread_percent(),
            summary.count,
            figure.unit,
        )
    })
}

/// A figure with three digits that count, its unit, and how far rounds lie from it.
fn with_spread(value: f64, percent: f64, count: usize, unit: &str) -> String {
    let mut text = digits(value);
    if !unit.is_empty() {
        text += " ";
        text += unit;
    }
    if count > 1 {
        text += &format!(" ± {percent:.0} %");
    }
    text
}

fn digits(value: f64) -> String {
    let decimals = match value.abs() {
        size if size >= 99.95 => 0,
        size if size >= 9.995 => 1,
        size if size >= 0.0995 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

fn goal_rows(goals: &[Goal]) -> Vec<Vec<String>> {
    let mut rows = vec![
        ["goal", "wanted", "measured", ""]
            .map(str::to_owned)
            .to_vec(),
    ];
    rows.extend(goals.iter().map(|goal| {
        vec![
            goal.what.clone(),
            goal.wanted.clone(),
            goal.measured.clone(),
            goal.verdict.name().to_owned(),
        ]
    }));
    rows
}

/// What is to be said in words: goals that are missed, boots that are not complete.
fn summary(goals: &[Goal], boots: &[Boot]) -> Vec<String> {
    let mut lines = Vec::new();
    let of = |verdict| goals.iter().filter(move |goal| goal.verdict == verdict);
    let missed: Vec<String> = of(Verdict::Missed)
        .map(|goal| format!("{} ({})", goal.what, goal.wanted))
        .collect();
    lines.push(format!(
        "{} goals met, {} missed, {} not measured",
        of(Verdict::Met).count(),
        missed.len(),
        of(Verdict::Unknown).count()
    ));
    if !missed.is_empty() {
        lines.push(format!("missed: {}", missed.join("; ")));
    }
    for boot in boots.iter().filter(|boot| !boot.complete) {
        lines.push(format!("{} was cut short", boot.scenario.name()));
    }
    if boots.iter().any(|boot| boot.quick) {
        lines
            .push("the quick form: little memory, one round; these figures mean little".to_owned());
    }
    lines
}

/// Rows as text, columns in line: so many to the left, as words are read, the rest to the right, as figures are.
fn align(rows: &[Vec<String>], words: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell: &String| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::from(" ");
        for (column, cell) in row.iter().enumerate() {
            line += " ";
            let room = " ".repeat(widths[column] - cell.chars().count());
            line += &if column < words {
                format!("{cell}{room}")
            } else {
                format!("{room}{cell}")
            };
            line += " ";
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::boot_with;
    use crate::record::Metric;
    use crate::scenario::Scenario;

    fn table(boot: Boot) -> Vec<Vec<String>> {
        rows(&Figures::of(std::slice::from_ref(&boot)), &boot)
    }

    #[test]
    fn a_row_has_both_sides_and_the_ratio() {
        let metric = Metric::NsPerPage;
        let table = table(boot_with(
            Scenario::Near,
            &[
                ("random", Side::Stock, 0, metric, 5000.0),
                ("random", Side::KsmRs, 0, metric, 500.0),
                ("random", Side::Limit, 0, metric, 250.0),
            ],
        ));
        assert_eq!(table[0], ["", "", "stock", "ksm_rs", "limit", "better"]);
        assert_eq!(
            table[1],
            [
                "random",
                "CPU a page and pass",
                "5000 ns",
                "500 ns",
                "250 ns",
                "× 10.0"
            ]
        );
    }

    #[test]
    fn several_rounds_have_a_spread() {
        let metric = Metric::NsPerPage;
        let table = table(boot_with(
            Scenario::Near,
            &[
                ("random", Side::KsmRs, 0, metric, 90.0),
                ("random", Side::KsmRs, 1, metric, 100.0),
                ("random", Side::KsmRs, 2, metric, 110.0),
            ],
        ));
        assert_eq!(
            table[1],
            ["random", "CPU a page and pass", "100 ns ± 10 %", ""]
        );
    }

    #[test]
    fn three_digits_count() {
        let cells = [12_345.6, 99.99, 12.345, 1.2345, 0.0123].map(digits);
        assert_eq!(cells, ["12346", "100", "12.3", "1.23", "0.012"]);
    }

    #[test]
    fn every_missed_goal_is_named() {
        let boot = boot_with(
            Scenario::Memory,
            &[
                ("unmerged", Side::Stock, 0, Metric::BytesPerPage, 66.0),
                ("unmerged", Side::KsmRs, 0, Metric::BytesPerPage, 49.0),
            ],
        );
        let goals = goals::all(&Figures::of(std::slice::from_ref(&boot)));
        let lines = summary(&goals, &[boot]);
        assert_eq!(lines[0], "0 goals met, 1 missed, 11 not measured");
        assert_eq!(
            lines[1],
            "missed: kernel memory of an unmerged page (≤ 48 B, everything counted)"
        );
    }

    #[test]
    fn columns_are_in_line() {
        let rows =
            [["a", "b", "1"], ["ccc", "µµ", "100"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(align(&rows, 2), "  a    b     1\n  ccc  µµ  100\n");
    }
}
