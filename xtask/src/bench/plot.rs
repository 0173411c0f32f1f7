//! Plots of curves, as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use barlease_bench::report::{Clock, Measure, Point, Report, Unit};
use barlease_bench::statistics::Summary;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::page;

/// A pair of colours per curve, which can be told apart in grey, too.
const OURS: [RGBColor; 4] = [
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(86, 180, 233),
    RGBColor(117, 112, 179),
];
const THEIRS: [RGBColor; 4] = [
    RGBColor(213, 94, 0),
    RGBColor(230, 159, 0),
    RGBColor(204, 121, 167),
    RGBColor(148, 103, 60),
];

/// Plots every curve of a report into a folder.
pub(super) fn all(report: &Report, folder: &Path) -> Result<()> {
    let clock = report.system.clock;
    for measure in report.measures.iter().filter(|m| m.axis.is_some()) {
        if clock == Clock::Instructions && measure.unit != Unit::Nanoseconds {
            continue;
        }
        let path = folder.join(page::plot(clock, measure));
        let area = SVGBackend::new(&path, (760, 480)).into_drawing_area();
        let drawn = draw(measure, clock, &area);
        drawn.map_err(|error| anyhow!("plot {}: {error}", path.display()))?;
    }
    Ok(())
}

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw(measure: &Measure, clock: Clock, area: &DrawingArea<SVGBackend<'_>, Shift>) -> Drawn {
    area.fill(&WHITE)?;
    let xs = measure.points.iter().filter_map(|point| point.x);
    let (Some(first), Some(last)) = (xs.clone().min(), xs.max()) else {
        return Ok(());
    };
    let values = measure.points.iter().flat_map(|point| {
        let theirs = point.theirs.map(|theirs| theirs.median);
        [Some(point.ours.median), theirs].into_iter().flatten()
    });
    let values: Vec<f64> = values.filter(|value| *value > 0.0).collect();
    let lowest = values.iter().copied().fold(f64::INFINITY, f64::min);
    let highest = values.iter().copied().fold(0.0, f64::max);
    if highest == 0.0 {
        return Ok(());
    }
    let mut chart = ChartBuilder::on(area)
        .caption(&measure.title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(80)
        .build_cartesian_2d(
            (first as f64 * 0.8..last as f64 * 1.25).log_scale(),
            (lowest * 0.5..highest * 4.0).log_scale(),
        )?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc(measure.axis.clone().unwrap_or_default())
        .y_desc(unit(measure.unit, clock))
        .x_label_formatter(&|x| short(*x))
        .y_label_formatter(&|y| short(*y))
        .draw()?;
    for (number, curve) in measure.curves().into_iter().enumerate() {
        let points: Vec<_> = measure.points_of(curve).collect();
        type Value = fn(&Point) -> Option<Summary>;
        let sides: [(&str, Value, RGBColor); 2] = [
            ("Barlease", |point| Some(point.ours), OURS[number % 4]),
            ("baseline", |point| point.theirs, THEIRS[number % 4]),
        ];
        for (side, value, colour) in sides {
            let line: Vec<(f64, f64)> = points
                .iter()
                .filter_map(|point| Some((point.x? as f64, value(point)?.median)))
                .filter(|(_, y)| *y > 0.0)
                .collect();
            if line.is_empty() {
                continue;
            }
            chart
                .draw_series(LineSeries::new(line.clone(), colour.stroke_width(2)))?
                .label(format!("{side}: {curve}"))
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2))
                });
            let bars = points.iter().filter_map(|point| {
                let (x, summary) = (point.x? as f64, value(point)?);
                let low = summary.low.max(lowest * 0.5);
                Some(ErrorBar::new_vertical(
                    x,
                    low,
                    summary.median,
                    summary.high,
                    colour.filled(),
                    6,
                ))
            });
            chart.draw_series(bars)?;
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    area.present()?;
    Ok(())
}

fn unit(unit: Unit, clock: Clock) -> &'static str {
    match (unit, clock) {
        (Unit::Nanoseconds, Clock::Time) | (Unit::Native, _) => "nanoseconds",
        (Unit::Nanoseconds, Clock::Instructions) => "instructions",
        (Unit::Count, _) => "number",
        (Unit::Bytes, _) => "bytes",
        (Unit::Rate, _) => "a second",
    }
}

/// A number with the prefix that fits.
fn short(value: f64) -> String {
    match value {
        v if v >= 1e9 => format!("{:.3}G", v / 1e9),
        v if v >= 1e6 => format!("{:.3}M", v / 1e6),
        v if v >= 1e3 => format!("{:.3}k", v / 1e3),
        v => format!("{v:.3}"),
    }
    .replace(".000", "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_on_an_axis_are_short() {
        let shown = [1.0, 10.0, 1000.0, 1_500_000.0, 1e9].map(short);
        assert_eq!(shown, ["1", "10", "1k", "1.500M", "1G"]);
    }

    #[test]
    fn a_curve_becomes_a_picture() {
        let folder = std::env::temp_dir().join(format!("barlease-plot-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let point = |x: u64| Point {
            curve: "c".to_owned(),
            x: Some(x),
            ours: Summary::of(&[x as f64, 2.0 * x as f64]).unwrap(),
            theirs: None,
            ratio: None,
            goal: None,
        };
        let measure = Measure {
            name: "m".to_owned(),
            title: "A measure".to_owned(),
            baseline: String::new(),
            unit: Unit::Nanoseconds,
            axis: Some("things".to_owned()),
            points: [1, 10, 100].map(point).into(),
        };
        let report = Report {
            system: Default::default(),
            measures: vec![measure],
        };
        all(&report, &folder).unwrap();
        let text = std::fs::read_to_string(folder.join("m-time.svg")).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(text.contains("A measure") && text.contains("Barlease: c"));
        assert!(text.contains("<polyline"));
    }
}
