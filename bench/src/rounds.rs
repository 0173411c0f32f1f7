//! Taking turns: what is compared is measured in small batches, one after the other, again and
//! again.
//!
//! Other work that the machine does then falls on both sides. A batch is short against the time
//! slice of a scheduler, its value is the median of its samples, and a ratio is made of the two
//! batches of one round, which began with the one side and the next time begins with the other.

use std::time::Instant;

use crate::profile::{self, Samples, Symbols};
use crate::report::{Goal, Measure, Point, Unit};
use crate::statistics::{Summary, median};

/// The side that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Barlease.
    Ours,
    /// The side that it is compared with.
    Theirs,
}

/// The operation that is measured in a turn of one side.
#[derive(Debug, Default)]
pub struct Batch {
    values: Vec<(Place, Vec<f64>)>,
    profiles: Vec<(Place, Samples)>,
}

/// A curve, and where on it.
type Place = (String, Option<u64>);

impl Batch {
    /// Adds a sample of a curve.
    pub fn add(&mut self, curve: &str, x: impl Into<Option<u64>>, value: f64) {
        let place = (curve.to_owned(), x.into());
        match self.values.iter_mut().find(|(known, _)| *known == place) {
            Some((_, samples)) => samples.push(value),
            None => self.values.push((place, vec![value])),
        }
    }

    /// Adds `samples` samples of what a call of `f` takes, each of `calls` calls in a row.
    pub fn time(
        &mut self,
        curve: &str,
        x: impl Into<Option<u64>>,
        samples: u32,
        calls: u32,
        mut f: impl FnMut(),
    ) {
        let x = x.into();
        for _ in 0..samples {
            let start = Instant::now();
            for _ in 0..calls {
                f();
            }
            let taken = start.elapsed().as_nanos() as f64;
            self.add(curve, x, taken / f64::from(calls));
        }
        // Of calls of their own: those that are sampled take longer.
        if let Some(profile) = profile::sampled(f) {
            self.profiles.push(((curve.to_owned(), x), profile));
        }
    }
}

/// The time that `f` takes, in nanoseconds.
pub fn nanoseconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_nanos() as f64
}

/// A measure in the making.
#[derive(Debug)]
pub struct Rounds {
    measure: Measure,
    /// For each place the medians of its batches.
    values: Vec<(Place, Vec<f64>, Vec<f64>)>,
    /// For each place the samples of each side.
    profiles: Vec<(Place, Samples, Samples)>,
}

impl Rounds {
    /// Measures `name`, which is shown as `title`, against `baseline`.
    #[must_use]
    pub fn new(name: &str, title: &str, baseline: &str, unit: Unit) -> Self {
        Self {
            measure: Measure {
                name: name.to_owned(),
                title: title.to_owned(),
                baseline: baseline.to_owned(),
                unit,
                axis: None,
                points: Vec::new(),
            },
            values: Vec::new(),
            profiles: Vec::new(),
        }
    }

    /// Its curves have this axis.
    #[must_use]
    pub fn axis(mut self, axis: &str) -> Self {
        self.measure.axis = Some(axis.to_owned());
        self
    }

    /// Takes `rounds` turns of each side, after one that does not count.
    #[must_use]
    pub fn run(mut self, rounds: u32, mut turn: impl FnMut(Side, &mut Batch)) -> Self {
        for round in 0..=rounds {
            let order = if round % 2 == 0 {
                [Side::Theirs, Side::Ours]
            } else {
                [Side::Ours, Side::Theirs]
            };
            for side in order {
                let mut batch = Batch::default();
                turn(side, &mut batch);
                if round > 0 {
                    self.add(side, &batch);
                    self.add_profiles(side, batch.profiles);
                }
            }
        }
        self
    }

    /// Adds a batch of one side.
    pub fn add(&mut self, side: Side, batch: &Batch) {
        for (place, samples) in &batch.values {
            let Some(value) = median(samples) else {
                continue;
            };
            let at = self.values.iter().position(|(known, ..)| known == place);
            let at = at.unwrap_or_else(|| {
                self.values.push((place.clone(), Vec::new(), Vec::new()));
                self.values.len() - 1
            });
            let (_, ours, theirs) = &mut self.values[at];
            match side {
                Side::Ours => ours.push(value),
                Side::Theirs => theirs.push(value),
            }
        }
    }

    fn add_profiles(&mut self, side: Side, profiles: Vec<(Place, Samples)>) {
        for (place, samples) in profiles {
            let at = self.profiles.iter().position(|(known, ..)| *known == place);
            let at = at.unwrap_or_else(|| {
                let none = Samples::default;
                self.profiles.push((place, none(), none()));
                self.profiles.len() - 1
            });
            let (_, ours, theirs) = &mut self.profiles[at];
            match side {
                Side::Ours => ours.merge(samples),
                Side::Theirs => theirs.merge(samples),
            }
        }
    }

    fn print_profiles(&self) {
        if self.profiles.is_empty() {
            return;
        }
        let symbols = Symbols::read();
        for (place, ours, theirs) in &self.profiles {
            let of_place = self.values.iter().find(|(known, ..)| known == place);
            let Some((_, our_values, their_values)) = of_place else {
                continue;
            };
            let whole = |values: &[f64]| median(values).unwrap_or_default();
            let (curve, x) = place;
            let axis = self.measure.axis.as_deref().unwrap_or_default();
            let title = match x {
                Some(x) => format!("{curve}, {x} {axis}"),
                None => curve.clone(),
            };
            let ours = (ours, whole(our_values));
            let theirs = (theirs, whole(their_values));
            println!("{}", profile::table(&title, ours, theirs, &symbols));
        }
    }

    /// Sums up. `goal` says what is to be reached where.
    #[must_use]
    pub fn finish(mut self, goal: impl Fn(&str, Option<u64>) -> Option<Goal>) -> Measure {
        self.print_profiles();
        for ((curve, x), ours, theirs) in self.values {
            let Some(sum) = Summary::of(&ours) else {
                continue;
            };
            let pairs = ours
                .iter()
                .zip(&theirs)
                .filter(|(_, theirs)| **theirs != 0.0);
            let ratios: Vec<_> = pairs.map(|(ours, theirs)| ours / theirs).collect();
            self.measure.points.push(Point {
                goal: goal(&curve, x),
                curve,
                x,
                ours: sum,
                theirs: Summary::of(&theirs),
                ratio: Summary::of(&ratios),
            });
        }
        // As the curves first came, and along them.
        let order: Vec<String> = self
            .measure
            .curves()
            .iter()
            .map(|&c| c.to_owned())
            .collect();
        let rank = |curve: &str| order.iter().position(|known| known == curve);
        self.measure
            .points
            .sort_by_key(|point| (rank(&point.curve), point.x));
        self.measure
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_take_turns_and_the_first_turn_does_not_count() {
        let mut turns = Vec::new();
        let rounds = Rounds::new("m", "", "", Unit::Count).run(2, |side, batch| {
            turns.push(side);
            batch.add("c", 1, turns.len() as f64);
        });
        use Side::{Ours, Theirs};
        assert_eq!(turns, [Theirs, Ours, Ours, Theirs, Theirs, Ours]);
        let measure = rounds.finish(|_, _| None);
        let [point] = &measure.points[..] else {
            panic!()
        };
        assert_eq!(point.ours.samples, 2);
        // The third and sixth turn.
        assert_eq!(point.ours.median, 4.5);
        assert_eq!(point.theirs.unwrap().median, 4.5);
    }

    #[test]
    fn the_ratio_is_that_of_each_round() {
        // Both sides are ten times as slow in the second round.
        let speeds = [1.0, 1.0, 10.0, 1.0];
        let mut turn = 0;
        let measure = Rounds::new("m", "", "", Unit::Count)
            .run(3, |side, batch| {
                let slow = speeds[turn / 2];
                turn += 1;
                let value = if side == Side::Ours { 2.0 } else { 4.0 };
                batch.add("c", None, value * slow);
            })
            .finish(|_, _| Some(Goal::AtMost(0.5)));
        let point = &measure.points[0];
        let ratio = point.ratio.unwrap();
        assert_eq!((ratio.low, ratio.median, ratio.high), (0.5, 0.5, 0.5));
        assert_eq!(point.is_met(), Some(true));
    }

    #[test]
    fn nothing_is_no_part_of_a_ratio() {
        let mut rounds = Rounds::new("m", "", "", Unit::Bytes);
        for theirs in [0.0, 4.0] {
            for (side, value) in [(Side::Ours, 2.0), (Side::Theirs, theirs)] {
                let mut batch = Batch::default();
                batch.add("c", None, value);
                rounds.add(side, &batch);
            }
        }
        let measure = rounds.finish(|_, _| None);
        assert_eq!(measure.points[0].ratio.unwrap().median, 0.5);
    }

    #[test]
    fn a_batch_is_worth_the_median_of_its_samples() {
        let mut batch = Batch::default();
        for value in [1.0, 100.0, 2.0] {
            batch.add("c", None, value);
        }
        let mut rounds = Rounds::new("m", "", "", Unit::Count);
        rounds.add(Side::Ours, &batch);
        let measure = rounds.finish(|_, _| None);
        assert_eq!(measure.points[0].ours.median, 2.0);
        assert!(measure.points[0].ratio.is_none());
    }

    #[test]
    fn points_are_in_the_order_of_curves_and_along_them() {
        let mut batch = Batch::default();
        batch.add("b", 10, 1.0);
        batch.add("a", 5, 1.0);
        batch.add("b", 1, 1.0);
        let mut rounds = Rounds::new("m", "", "", Unit::Count);
        rounds.add(Side::Ours, &batch);
        let measure = rounds.finish(|_, _| None);
        let places: Vec<_> = measure
            .points
            .iter()
            .map(|point| (point.curve.as_str(), point.x))
            .collect();
        assert_eq!(places, [("b", Some(1)), ("b", Some(10)), ("a", Some(5))]);
    }
}
