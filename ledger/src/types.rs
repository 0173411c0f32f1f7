//! The words of the core: numbers with a meaning each, ranges, and what a client can ask for.

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::Serialize;

/// Declares numbers that cannot be taken for one another.
macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident($inner:ty);)+) => {
        $(
            $(#[$doc])*
            #[derive(
                Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
            )]
            #[serde(transparent)]
            pub struct $name(pub $inner);

            impl fmt::Display for $name {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    self.0.fmt(f)
                }
            }
        )+
    };
}

numbers! {
    /// Milliseconds since boot, sleep included (`CLOCK_BOOTTIME`): what the ledger means by a time
    /// is the same after a restart of the service, and nothing of it outlives the boot.
    Time(u64);
    /// A span in milliseconds.
    Millis(u64);
    /// A lease: unique for the life of a ledger, never used again.
    LeaseId(u64);
    /// A buffer of the kernel: inode number of its dma-buf, unique until the next boot.
    BufferId(u64);
    /// A connection of a client, named by the daemon; unique for the life of the process.
    ConnectionId(u64);
    /// A call of a client that is to be answered, named by the daemon as connections are.
    RequestId(u64);
    /// A process: inode number of its pidfd, unique until the next boot.
    ProcessId(u64);
    /// A control group, by its id.
    CgroupId(u64);
}

impl Time {
    /// Later than any time.
    pub const NEVER: Self = Self(u64::MAX);

    /// So much later; [`Time::NEVER`] where no number says it.
    #[must_use]
    pub fn after(self, span: Millis) -> Self {
        Self(self.0.saturating_add(span.0))
    }
}

/// Bytes of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Range {
    /// Offset of the first byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

impl Range {
    /// The byte after the last; saturates.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    /// Whether they share a byte.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.length != 0
            && other.length != 0
            && self.offset < other.end()
            && other.offset < self.end()
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.offset, self.length)
    }
}

/// Most ranges of a lease: the kernel's limit of a buffer.
pub const MAX_RANGES: usize = 65_536;

/// The ranges of a lease, in the order of its concatenation. One takes no memory of its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Ranges {
    /// One.
    One(Range),
    /// Several.
    Many(Box<[Range]>),
}

impl Ranges {
    /// From a list, which is not empty.
    #[must_use]
    pub fn from_list(list: Vec<Range>) -> Option<Self> {
        match list[..] {
            [] => None,
            [one] => Some(Self::One(one)),
            _ => Some(Self::Many(list.into_boxed_slice())),
        }
    }

    /// As a slice.
    #[must_use]
    pub fn as_slice(&self) -> &[Range] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }

    /// The sum of the lengths; saturates.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.as_slice()
            .iter()
            .fold(0, |sum, range| sum.saturating_add(range.length))
    }
}

/// The rights of a holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Access {
    /// Read.
    Read,
    /// Read and write.
    ReadWrite,
}

/// The memory type that mappings get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum MemoryType {
    /// Uncached.
    #[serde(rename = "nc")]
    Uncached,
    /// Write-combining.
    #[serde(rename = "wc")]
    WriteCombining,
}

/// Steering tags, as the kernel's `DmaBufTph` takes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Tph {
    /// 8-bit tag.
    pub tag: Option<u8>,
    /// 16-bit tag.
    pub extended: Option<u16>,
    /// Processing hint, 0 to 3.
    pub hint: u8,
}

/// The end that a lease lives to by itself. A time limit ends any of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Lifetime {
    /// The end of the connection that it was asked for over.
    Connection,
    /// The end of the process that connected.
    Process,
    /// The end of the last process in the control group of the process that connected.
    Cgroup,
    /// The end of the claim that the connection speaks for.
    Claim,
    /// Nobody has it any more.
    Holders,
}

/// Somebody who connected: credentials are those of `connect()`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Peer {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Further groups.
    pub groups: Arc<[u32]>,
    /// Process, as a number for people.
    pub pid: u32,
    /// Process, if the kernel told.
    pub process: Option<ProcessId>,
    /// Control group, if the kernel told.
    pub cgroup: Option<CgroupId>,
    /// Path of the control group from the root of the hierarchy; empty if unknown.
    pub cgroup_path: Arc<str>,
    /// Unit of the system's manager that the control group belongs to; else empty.
    pub unit: Arc<str>,
    /// The claim whose socket was connected to.
    pub claim: Option<Arc<str>>,
}

impl Peer {
    /// Whether one may do with the leases of the other as with one's own: a claim is somebody for
    /// itself, whatever its user.
    #[must_use]
    pub fn is_as(&self, other: &Self) -> bool {
        match (&self.claim, &other.claim) {
            (Some(one), Some(other)) => one == other,
            (None, None) => self.uid == other.uid,
            _ => false,
        }
    }
}

/// The object of a request.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum What {
    /// So many bytes of a pool; all of it without a size.
    Pool {
        /// Name of the pool.
        pool: Arc<str>,
        /// Bytes.
        size: Option<u64>,
    },
    /// These ranges, in this order.
    Ranges {
        /// Name of the device.
        device: Arc<str>,
        /// The BAR, 0 to 5.
        bar: u8,
        /// The ranges.
        ranges: Vec<Range>,
    },
}

/// A request for a lease.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ask {
    /// Of what.
    pub what: What,
    /// With which rights.
    pub access: Access,
    /// Of which memory type.
    pub memory_type: MemoryType,
    /// With steering tags.
    pub tph: Option<Tph>,
    /// Until when.
    pub lifetime: Lifetime,
    /// And no longer than this.
    pub ttl: Option<Millis>,
    /// How long to wait in line; 0: not.
    pub wait: Millis,
}

/// Why a lease ended, or is about to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndReason {
    /// The holder gave it back.
    Released,
    /// Nobody had it any more.
    Dropped,
    /// Its time was over.
    Expired,
    /// The connection, process, control group or claim that it lived by ended.
    HolderGone,
    /// Nobody came back for it after a restart of the service.
    NotResumed,
    /// An administrator revoked it.
    Revoked,
    /// Its device is drained or taken away.
    DeviceGoing,
    /// Its device was closed.
    DeviceClosed,
    /// The policy allows it no longer.
    NoLongerAllowed,
    /// The holder did not take the answer.
    Undelivered,
    /// Somebody else revoked it.
    RevokedElsewhere,
    /// It was being granted when the service ended.
    NeverGranted,
    /// The ledger and the kernel do not agree on it.
    Inconsistent,
}
