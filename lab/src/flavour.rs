//! Flavours: what Debian builds of one source besides its kernel for everybody.
//!
//! A kernel of another flavour is looked for when it is asked for, and not before: whoever does not
//! test on it downloads nothing of it.

use serde::{Deserialize, Serialize};

use crate::plan::KernelPlan;

/// A flavour of Debian's kernels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flavour {
    /// For everybody.
    #[default]
    Plain,
    /// With PREEMPT_RT: spinlocks sleep, and there are no transparent huge pages.
    RealTime,
    /// For guests of clouds: fewer drivers.
    Cloud,
}

impl Flavour {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Plain, Self::RealTime, Self::Cloud];

    /// The word that asks for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "amd64",
            Self::RealTime => "rt",
            Self::Cloud => "cloud",
        }
    }

    /// The part of its kernels' releases after their first `-`.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::Plain => "amd64",
            Self::RealTime => "rt-amd64",
            Self::Cloud => "cloud-amd64",
        }
    }

    /// The meaning of `rt`, `rt-7.2` or `7.3-rt-amd64`: the flavour, and the beginning of a
    /// release if one is asked for. Any other word is the beginning of a release of the kernel for
    /// everybody.
    pub(crate) fn asked_for(kernel: &str) -> (Self, Option<&str>) {
        for flavour in Self::ALL {
            if kernel == flavour.name() {
                return (flavour, None);
            }
            let release = kernel.strip_prefix(flavour.name());
            let release = release.and_then(|rest| rest.strip_prefix('-'));
            if release.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit())) {
                return (flavour, release);
            }
            let suffix = kernel.split_once('-').map(|(_, suffix)| suffix);
            if suffix == Some(flavour.suffix()) {
                return (flavour, Some(kernel));
            }
        }
        (Self::Plain, Some(kernel))
    }
}

/// The kernels of a flavour, as they are kept in the cache.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Found {
    /// The compiler that they were judged by.
    pub(crate) rustc: String,
    /// Newest first.
    pub(crate) kernels: Vec<KernelPlan>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flavour_is_asked_for_by_its_name_or_a_release() {
        let asked = Flavour::asked_for;
        assert_eq!(asked("rt"), (Flavour::RealTime, None));
        assert_eq!(asked("rt-7.2"), (Flavour::RealTime, Some("7.2")));
        assert_eq!(asked("cloud"), (Flavour::Cloud, None));
        assert_eq!(
            asked("7.3-rt-amd64"),
            (Flavour::RealTime, Some("7.3-rt-amd64"))
        );
        assert_eq!(asked("7.3"), (Flavour::Plain, Some("7.3")));
        assert_eq!(asked("7.3-amd64"), (Flavour::Plain, Some("7.3-amd64")));
        assert_eq!(asked("amd64"), (Flavour::Plain, None));
        assert_eq!(asked("rtx"), (Flavour::Plain, Some("rtx")));
    }
}
