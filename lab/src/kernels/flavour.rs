//! Flavours: what Debian builds of one source besides its kernel for everybody.
//!
//! A kernel of another flavour is looked for when it is asked for, and not before: whoever does not
//! test on it downloads nothing of it.

use serde::{Deserialize, Serialize};

use crate::packages::arch::Arch;
use crate::packages::plan::KernelPlan;

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
    /// For everybody with 64-bit ARM, with pages of 4 KiB.
    Arm64,
    /// The same with pages of 16 KiB.
    Arm64Of16K,
    /// For 64-bit ARM with PREEMPT_RT.
    Arm64RealTime,
    /// For guests of clouds on 64-bit ARM.
    Arm64Cloud,
}

impl Flavour {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Plain,
        Self::RealTime,
        Self::Cloud,
        // The longer names before their beginning.
        Self::Arm64Of16K,
        Self::Arm64RealTime,
        Self::Arm64Cloud,
        Self::Arm64,
    ];

    /// The word that asks for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "amd64",
            Self::RealTime => "rt",
            Self::Cloud => "cloud",
            Self::Arm64 => "arm64",
            Self::Arm64Of16K => "arm64-16k",
            Self::Arm64RealTime => "arm64-rt",
            Self::Arm64Cloud => "arm64-cloud",
        }
    }

    /// The architecture of its kernels.
    #[must_use]
    pub fn arch(self) -> Arch {
        match self {
            Self::Plain | Self::RealTime | Self::Cloud => Arch::Amd64,
            Self::Arm64 | Self::Arm64Of16K | Self::Arm64RealTime | Self::Arm64Cloud => Arch::Arm64,
        }
    }

    /// The part of its kernels' releases after their first `-`.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Self::Plain => "amd64",
            Self::RealTime => "rt-amd64",
            Self::Cloud => "cloud-amd64",
            Self::Arm64 => "arm64",
            Self::Arm64Of16K => "arm64-16k",
            Self::Arm64RealTime => "rt-arm64",
            Self::Arm64Cloud => "cloud-arm64",
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
        assert_eq!(asked("arm64"), (Flavour::Arm64, None));
        assert_eq!(asked("arm64-7.3"), (Flavour::Arm64, Some("7.3")));
        assert_eq!(asked("arm64-16k"), (Flavour::Arm64Of16K, None));
        assert_eq!(asked("arm64-16k-7.2"), (Flavour::Arm64Of16K, Some("7.2")));
        assert_eq!(
            asked("7.3-rt-arm64"),
            (Flavour::Arm64RealTime, Some("7.3-rt-arm64"))
        );
        assert_eq!(asked("rtx"), (Flavour::Plain, Some("rtx")));
    }
}
