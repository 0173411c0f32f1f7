//! Tables of results.

use std::fmt::Write;

use barlease_bench::report::{Clock, Goal, Measure, Point, Report, Unit};
use barlease_bench::statistics::Summary;

/// The unit of a clock; results with it are called so.
pub(super) fn name(clock: Clock) -> &'static str {
    match clock {
        Clock::Time => "time",
        Clock::Instructions => "instructions",
    }
}

/// The page of all results.
pub(super) fn results(reports: &[Report]) -> String {
    let mut text = String::from(
        "# Results of the benchmarks\n\n\
         Written by `cargo xtask bench --publish`; what each measure is, and what bounds it, is in [benchmarks](../benchmarks.md).\n\n",
    );
    for report in reports {
        let system = &report.system;
        let _ = writeln!(
            text,
            "- [{0}.json]({0}.json): kernel {1}, module {2}, guest of {3} processors ({4}), its clock counts {0}{5}",
            name(system.clock),
            system.kernel,
            system.module,
            system.processors,
            system.acceleration,
            if system.quick { ", a short run" } else { "" },
        );
    }
    text.push_str(
        "\nA value is the median of the rounds, with its quartiles in brackets; the ratio, ours divided by the \
         baseline's, is the median of the rounds' ratios.\n",
    );
    let Some(first) = reports.first() else {
        return text;
    };
    let others = &reports[1..];
    for measure in &first.measures {
        let twins: Vec<_> = others
            .iter()
            .filter_map(|report| Some((report.system.clock, twin(report, measure)?)))
            .collect();
        section(&mut text, first.system.clock, measure, &twins);
    }
    text
}

/// The same measure in another report, where another clock makes a difference.
fn twin<'a>(report: &'a Report, measure: &Measure) -> Option<&'a Measure> {
    let clocked = measure.unit == Unit::Nanoseconds;
    let mut measures = report.measures.iter();
    measures.find(|other| clocked && other.name == measure.name)
}

fn section(text: &mut String, clock: Clock, measure: &Measure, twins: &[(Clock, &Measure)]) {
    let _ = writeln!(
        text,
        "\n## {}\n\n`{}`, against {}; {}.\n",
        measure.title,
        measure.name,
        measure.baseline,
        unit(measure.unit)
    );
    table(text, measure, clock);
    if measure.axis.is_some() {
        let _ = writeln!(text, "\n![{}]({})", measure.title, plot(clock, measure));
    }
    for (clock, twin) in twins {
        let _ = writeln!(text, "\nCounted in {}:\n", name(*clock));
        table(text, twin, *clock);
        if twin.axis.is_some() {
            let _ = writeln!(text, "\n![{}]({})", twin.title, plot(*clock, twin));
        }
    }
}

/// The file of a measure's plot.
pub(super) fn plot(clock: Clock, measure: &Measure) -> String {
    format!("{}-{}.svg", measure.name, name(clock))
}

fn unit(unit: Unit) -> &'static str {
    match unit {
        Unit::Nanoseconds => "on the guest's clock",
        Unit::Native => "on this machine, in no guest",
        Unit::Count => "a number",
        Unit::Bytes => "bytes",
        Unit::Rate => "a second",
    }
}

fn table(text: &mut String, measure: &Measure, clock: Clock) {
    let axis = measure.axis.as_deref();
    let head = axis.map_or(String::new(), |axis| format!(" {axis} |"));
    let rule = if axis.is_some() { "---:|" } else { "" };
    let _ = writeln!(
        text,
        "| |{head} Barlease | baseline | ratio | goal |\n|---|{rule}---:|---:|---:|---|"
    );
    for point in &measure.points {
        let x = match (axis, point.x) {
            (Some(_), Some(x)) => format!(" {} |", thousands(x as f64)),
            (Some(_), None) => " |".to_owned(),
            (None, _) => String::new(),
        };
        let _ = writeln!(
            text,
            "| {} |{x} {} | {} | {} | {} |",
            point.curve,
            spread(&point.ours, measure.unit, clock),
            point.theirs.map_or("-".to_owned(), |theirs| spread(
                &theirs,
                measure.unit,
                clock
            )),
            point.ratio.map_or("-".to_owned(), ratio),
            verdict(point),
        );
    }
    for growth in measure.growth() {
        let theirs = growth.theirs.map_or(String::new(), |theirs| {
            format!(", the baseline with {theirs:.2}")
        });
        let _ = writeln!(
            text,
            "\n{} grows with the power {:.2}{theirs}.",
            growth.curve,
            growth.ours.unwrap_or_default()
        );
    }
}

fn spread(summary: &Summary, unit: Unit, clock: Clock) -> String {
    let show = |value: f64| value_of(value, unit, clock);
    if summary.low == summary.high {
        return show(summary.median);
    }
    format!(
        "{} [{}, {}]",
        show(summary.median),
        show(summary.low),
        show(summary.high)
    )
}

fn value_of(value: f64, unit: Unit, clock: Clock) -> String {
    match (unit, clock) {
        (Unit::Native, _) => format!("{value:.2} ns"),
        (Unit::Nanoseconds, Clock::Time) => time(value),
        _ => thousands(value),
    }
}

fn time(nanoseconds: f64) -> String {
    match nanoseconds {
        ns if ns < 1e3 => format!("{ns:.0} ns"),
        ns if ns < 1e5 => format!("{:.2} µs", ns / 1e3),
        ns if ns < 1e6 => format!("{:.0} µs", ns / 1e3),
        ns if ns < 1e8 => format!("{:.2} ms", ns / 1e6),
        ns => format!("{:.0} ms", ns / 1e6),
    }
}

/// A whole number with its thousands apart.
fn thousands(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    if value < 0.0 {
        format!("-{text}")
    } else {
        text
    }
}

fn ratio(summary: Summary) -> String {
    let show = |value: f64| match value {
        value if value < 0.1 => format!("{value:.4}"),
        value if value < 10.0 => format!("{value:.3}"),
        value => format!("{value:.1}"),
    };
    if summary.low == summary.high {
        return show(summary.median);
    }
    format!(
        "{} [{}, {}]",
        show(summary.median),
        show(summary.low),
        show(summary.high)
    )
}

fn verdict(point: &Point) -> String {
    let Some(goal) = point.goal else {
        return String::new();
    };
    let goal = match goal {
        Goal::AtMost(most) if most < 0.1 => format!("≤ 1/{:.0}", 1.0 / most),
        Goal::AtMost(most) => format!("≤ {most}"),
        Goal::AtLeast(least) => format!("≥ {least}"),
        Goal::More(more) => format!("+{more} ns"),
    };
    match point.is_met() {
        Some(true) => format!("{goal}: met"),
        Some(false) => format!("{goal}: **missed**"),
        None => goal,
    }
}

/// The text for a terminal: every point with a goal.
pub(super) fn summary(reports: &[Report]) -> String {
    let mut text = String::new();
    for report in reports {
        let _ = writeln!(text, "Counted in {}:", name(report.system.clock));
        for measure in &report.measures {
            for point in &measure.points {
                let Some(ratios) = point.ratio else {
                    continue;
                };
                let place = point.x.map_or(String::new(), |x| thousands(x as f64));
                let _ = writeln!(
                    text,
                    "  {:<20} {:<42} {place:>13}  {:<24} {}",
                    measure.name,
                    point.curve,
                    ratio(ratios),
                    verdict(point).replace("**", "")
                );
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_their_thousands_apart() {
        let shown = [0.0, 999.0, 1000.0, 1_234_567.0, -1000.0].map(thousands);
        assert_eq!(shown, ["0", "999", "1,000", "1,234,567", "-1,000"]);
    }

    #[test]
    fn times_have_the_unit_that_fits() {
        let shown = [12.3, 1234.0, 123_456.0, 1_234_567.0, 1.3e9].map(time);
        assert_eq!(shown, ["12 ns", "1.23 µs", "123 µs", "1.23 ms", "1300 ms"]);
    }

    #[test]
    fn a_missed_goal_is_seen() {
        let summary = Summary::of(&[2.0]).unwrap();
        let point = Point {
            curve: "c".to_owned(),
            x: None,
            ours: summary,
            theirs: Some(summary),
            ratio: Some(summary),
            goal: Some(Goal::AtMost(1.0 / 256.0)),
        };
        assert_eq!(verdict(&point), "≤ 1/256: **missed**");
    }
}
