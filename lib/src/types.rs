//! Small values that several parts speak of.

use std::fmt;

use barlease_abi as abi;
use serde::Deserialize;
use serde::Serialize;

/// A range of a BAR, in bytes, aligned to pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BarRange {
    /// Offset in the BAR.
    pub offset: u64,
    /// Length, not 0.
    pub length: u64,
}

impl fmt::Display for BarRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.offset, self.length)
    }
}

/// Memory type of a lease's mappings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum MemoryType {
    /// Uncached: each access reaches the device by itself, in program order.
    #[default]
    Nc,
    /// Write-combining: stores are gathered into bursts and may be reordered.
    Wc,
}

impl MemoryType {
    pub(crate) fn to_abi(self) -> u32 {
        match self {
            Self::Nc => abi::MEMATTR_NC,
            Self::Wc => abi::MEMATTR_WC,
        }
    }

    pub(crate) fn from_abi(value: u32) -> Option<Self> {
        match value {
            abi::MEMATTR_NC => Some(Self::Nc),
            abi::MEMATTR_WC => Some(Self::Wc),
            _ => None,
        }
    }
}

impl fmt::Display for MemoryType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Nc => "nc",
            Self::Wc => "wc",
        })
    }
}

/// State of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum State {
    /// Accessible.
    Ok,
    /// Inaccessible while at least one of the [`Reasons`] holds.
    Revoked,
    /// Inaccessible for ever.
    Dead,
}

impl State {
    pub(crate) fn from_abi(value: u32) -> Option<Self> {
        match value {
            abi::STATE_OK => Some(Self::Ok),
            abi::STATE_REVOKED => Some(Self::Revoked),
            abi::STATE_DEAD => Some(Self::Dead),
            _ => None,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Revoked => "revoked",
            Self::Dead => "dead",
        })
    }
}

/// Why a lease is revoked for a time: a set.
///
/// # Examples
///
/// ```
/// use barlease::Reasons;
///
/// let reasons = Reasons::MEMORY_OFF | Reasons::RESET;
/// assert!(reasons.contains(Reasons::RESET));
/// assert_eq!(reasons.to_string(), "memory-off,reset");
/// assert_eq!(Reasons::default().to_string(), "-");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Reasons(u32);

impl Reasons {
    /// The memory bit of COMMAND is clear.
    pub const MEMORY_OFF: Self = Self(abi::REASON_MEMORY_OFF);
    /// The device is in reset.
    pub const RESET: Self = Self(abi::REASON_RESET);
    /// D1, D2, D3hot, low-power feature or system sleep.
    pub const LOW_POWER: Self = Self(abi::REASON_LOW_POWER);
    /// An AER error that is not yet recovered.
    pub const ERROR: Self = Self(abi::REASON_ERROR);
    /// A config-space write that may turn memory off is in progress.
    pub const CONFIG_WRITE: Self = Self(abi::REASON_CONFIG_WRITE);

    const NAMES: [(Self, &'static str); 5] = [
        (Self::MEMORY_OFF, "memory-off"),
        (Self::RESET, "reset"),
        (Self::LOW_POWER, "low-power"),
        (Self::ERROR, "error"),
        (Self::CONFIG_WRITE, "config-write"),
    ];

    /// The set with these bits (`REASON_*` of the uAPI), unknown ones included.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// The bits.
    #[must_use]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Whether no reason holds.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether all of `other` hold.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Names of the reasons that hold; of one that this version does not know, its bit.
    #[must_use]
    pub fn names(self) -> Vec<String> {
        let known = Self::NAMES
            .iter()
            .fold(0, |bits, (reason, _)| bits | reason.0);
        let mut names: Vec<String> = Self::NAMES
            .iter()
            .filter(|(reason, _)| self.contains(*reason))
            .map(|(_, name)| (*name).to_owned())
            .collect();
        if self.0 & !known != 0 {
            names.push(format!("{:#x}", self.0 & !known));
        }
        names
    }
}

impl std::ops::BitOr for Reasons {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Display for Reasons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.pad("-");
        }
        f.pad(&self.names().join(","))
    }
}

impl Serialize for Reasons {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.names())
    }
}

/// The state of a lease, as its owner's device says it. The number of processes' mappings is in its
/// [`LeaseRecord`](crate::LeaseRecord).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Status {
    /// Whether it is accessible.
    pub state: State,
    /// Why not, while `Revoked`; empty otherwise.
    pub reasons: Reasons,
    /// Memory type of mmaps made from now on.
    pub memory_type: MemoryType,
    /// The BAR.
    pub bar: u32,
    /// Bytes: the sum of the ranges.
    pub size: u64,
    /// Number of ranges.
    pub ranges: u32,
    /// Number of importers attached.
    pub attachments: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_print_unknown_bits_too() {
        assert_eq!(Reasons::from_bits(0x102).to_string(), "reset,0x100");
        assert_eq!(
            serde_json::to_string(&(Reasons::ERROR | Reasons::LOW_POWER)).unwrap(),
            r#"["low-power","error"]"#
        );
    }

    #[test]
    fn values_of_the_uapi_are_known() {
        for value in [abi::STATE_OK, abi::STATE_REVOKED, abi::STATE_DEAD] {
            assert!(State::from_abi(value).is_some());
        }
        assert_eq!(State::from_abi(3), None);
        for memory_type in [MemoryType::Nc, MemoryType::Wc] {
            assert_eq!(
                MemoryType::from_abi(memory_type.to_abi()),
                Some(memory_type)
            );
        }
    }
}
