//! Medians, spread, growth.

use serde::{Deserialize, Serialize};

/// The middle of some values, and how far they spread.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// How many values there were.
    pub samples: usize,
    /// The median.
    pub median: f64,
    /// A quarter of the values is below.
    pub low: f64,
    /// A quarter of the values is above.
    pub high: f64,
}

impl Summary {
    /// Sums values up; `None` when there are none, or one is not a number.
    #[must_use]
    pub fn of(values: &[f64]) -> Option<Self> {
        if values.is_empty() || values.iter().any(|value| value.is_nan()) {
            return None;
        }
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            samples: sorted.len(),
            median: quantile(&sorted, 0.5),
            low: quantile(&sorted, 0.25),
            high: quantile(&sorted, 0.75),
        })
    }
}

/// The quantile `part` (0 to 1) of sorted values, between two of them where it falls there.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let place = part * (sorted.len() - 1) as f64;
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    let share = place - place.floor();
    sorted[below] * (1.0 - share) + sorted[above] * share
}

/// The median of values; `None` as for [`Summary::of`].
#[must_use]
pub fn median(values: &[f64]) -> Option<f64> {
    Summary::of(values).map(|summary| summary.median)
}

/// The exponent `k` of `y = c·x^k`, by least squares over the logarithms.
///
/// `None` where there is nothing to fit: fewer than three points above zero, or all of the same
/// `x`.
#[must_use]
pub fn exponent(points: &[(f64, f64)]) -> Option<f64> {
    let logs: Vec<_> = points
        .iter()
        .filter(|(x, y)| *x > 0.0 && *y > 0.0)
        .map(|(x, y)| (x.ln(), y.ln()))
        .collect();
    if logs.len() < 3 {
        return None;
    }
    let count = logs.len() as f64;
    let mean_x = logs.iter().map(|(x, _)| x).sum::<f64>() / count;
    let mean_y = logs.iter().map(|(_, y)| y).sum::<f64>() / count;
    let spread: f64 = logs.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
    if spread == 0.0 {
        return None;
    }
    let common: f64 = logs.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
    Some(common / spread)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_an_odd_number_of_values_is_one_of_them() {
        let summary = Summary::of(&[9.0, 1.0, 5.0, 3.0, 7.0]).unwrap();
        assert_eq!((summary.low, summary.median, summary.high), (3.0, 5.0, 7.0));
        assert_eq!(summary.samples, 5);
    }

    #[test]
    fn the_middle_of_an_even_number_of_values_is_between_two() {
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn one_value_has_no_spread() {
        let summary = Summary::of(&[2.0]).unwrap();
        assert_eq!((summary.low, summary.high), (2.0, 2.0));
    }

    #[test]
    fn one_outlier_does_not_move_the_middle() {
        assert_eq!(median(&[1.0, 1.0, 1.0, 1.0, 1e9]), Some(1.0));
    }

    #[test]
    fn nothing_has_no_summary() {
        assert_eq!(Summary::of(&[]), None);
        assert_eq!(Summary::of(&[1.0, f64::NAN]), None);
    }

    #[test]
    fn the_exponent_of_a_power_is_found() {
        for power in [-1.0, 0.0, 0.5, 1.0, 2.0] {
            let points: Vec<_> = [1.0_f64, 10.0, 100.0, 1000.0]
                .iter()
                .map(|x| (*x, 7.0 * x.powf(power)))
                .collect();
            let found = exponent(&points).unwrap();
            assert!((found - power).abs() < 1e-9, "{power}: {found}");
        }
    }

    #[test]
    fn what_cannot_be_fitted_has_no_exponent() {
        assert_eq!(exponent(&[(1.0, 1.0), (10.0, 10.0)]), None);
        assert_eq!(exponent(&[(2.0, 1.0), (2.0, 2.0), (2.0, 3.0)]), None);
        assert_eq!(exponent(&[(0.0, 1.0), (1.0, 0.0), (2.0, 3.0)]), None);
    }
}
