//! Events, actions, and their parts.

use std::sync::Arc;

use crate::policy::Limits;
use crate::policy::Outcome;
use crate::policy::Place;
use crate::policy::Policy;
use crate::record::Holder;
use crate::record::Record;
use crate::types::Access;
use crate::types::Ask;
use crate::types::BufferId;
use crate::types::CgroupId;
use crate::types::ConnectionId;
use crate::types::EndReason;
use crate::types::LeaseId;
use crate::types::Lifetime;
use crate::types::MemoryType;
use crate::types::Millis;
use crate::types::Peer;
use crate::types::ProcessId;
use crate::types::Range;
use crate::types::Ranges;
use crate::types::RequestId;
use crate::types::Time;
use crate::types::Tph;

/// Something happened.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(test, derive(Hash))]
pub enum Event {
    /// Somebody connected.
    Connected {
        /// The connection.
        connection: ConnectionId,
        /// Its credentials.
        peer: Peer,
        /// A secret that the client was told, to come back with after a restart; 0: none.
        token: u128,
        /// Whether it is an administrator, for whom the limits of all tenants together are none.
        administrator: bool,
    },
    /// A client came back after a restart, with the secret of an earlier connection.
    Resume {
        /// The new connection.
        connection: ConnectionId,
        /// To be answered.
        request: RequestId,
        /// The secret.
        token: u128,
    },
    /// A connection ended.
    PeerGone(ConnectionId),
    /// A process that was to be watched is gone.
    ProcessGone(ProcessId),
    /// A control group that was to be watched has no process any more.
    CgroupEmpty(CgroupId),
    /// A claim ended.
    ClaimEnded(Arc<str>),
    /// A lease is asked for.
    Acquire {
        /// By whom.
        connection: ConnectionId,
        /// To be answered.
        request: RequestId,
        /// Which.
        ask: Ask,
    },
    /// A lease is given back.
    Release {
        /// By whom.
        connection: ConnectionId,
        /// To be answered.
        request: RequestId,
        /// Which.
        lease: LeaseId,
    },
    /// A lease is to live longer, from now on; for as long as the policy allows without a time.
    Renew {
        /// By whom.
        connection: ConnectionId,
        /// To be answered.
        request: RequestId,
        /// Which.
        lease: LeaseId,
        /// How long.
        ttl: Option<Millis>,
    },
    /// News of leases are to be told, as [`Action::Notify`], until the connection ends.
    Watch {
        /// The connection that is told.
        connection: ConnectionId,
        /// By this name.
        request: RequestId,
        /// Which leases; the daemon gives `true`, for all of them, to administrators only.
        all: bool,
    },
    /// [`Action::Scrub`] was carried out.
    Scrubbed {
        /// For this lease.
        lease: LeaseId,
        /// Or was not.
        result: Result<(), Errno>,
    },
    /// [`Action::Export`] was carried out.
    Exported {
        /// For this lease.
        lease: LeaseId,
        /// The buffer, whose descriptor the daemon keeps until [`Action::Reply`].
        result: Result<BufferId, Errno>,
    },
    /// The client did not take an answer with a lease. If the daemon closes the connection as well,
    /// it says that with [`Event::PeerGone`].
    Undelivered(LeaseId),
    /// The result of [`Action::Revoke`].
    Revoked {
        /// The buffer.
        buffer: BufferId,
        /// The kernel's answer.
        answer: RevokeAnswer,
    },
    /// All buffers of a device, as LIST says them. The daemon has carried out every action that it
    /// was given before it asked, and no buffer that was exported since is missing.
    Listed {
        /// Name of the device.
        device: Arc<str>,
        /// The buffers.
        buffers: Vec<Buffer>,
    },
    /// A device can be leased from: it was opened, or adopted.
    DeviceOpened {
        /// Its name in the policy.
        device: Arc<str>,
        /// Its BARs.
        facts: Facts,
    },
    /// A device is to be let go: the kernel asks for it, or an administrator drains it. Its leases
    /// are reclaimed, then comes [`Action::CloseDevice`].
    DeviceGoing {
        /// Name of the device.
        device: Arc<str>,
        /// No more grace than this, if less than the policy's.
        grace: Option<Millis>,
    },
    /// A device was closed, or pulled out: its leases are dead.
    DeviceClosed(Arc<str>),
    /// An administrator revokes leases.
    Revoke {
        /// To be answered.
        request: RequestId,
        /// Which.
        selector: Selector,
        /// No more grace than this, if less than the policy's.
        grace: Option<Millis>,
    },
    /// A new policy comes into force.
    PolicyReplaced(Arc<Policy>),
    /// Time passed.
    Tick,
}

/// A number of the kernel's that says why something failed.
pub type Errno = i32;

/// The answer of REVOKE_ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RevokeAnswer {
    /// 0: nothing reaches the buffer any more.
    Done,
    /// `EINPROGRESS`: an importer has still to let go. LIST will tell when.
    InProgress,
    /// `ENOENT`: there is no such buffer any more.
    Unknown,
    /// `EBADFD`: it was revoked before. LIST is to be asked what is left to wait for.
    Before,
    /// Anything else.
    Failed(Errno),
}

/// A buffer of a device, from LIST.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Buffer {
    /// Its id.
    pub id: BufferId,
    /// The BAR.
    pub bar: u8,
    /// Bytes.
    pub size: u64,
    /// Number of ranges.
    pub nr_ranges: u32,
    /// Inaccessible for ever.
    pub dead: bool,
    /// Dead, and an importer has still to let go.
    pub draining: bool,
    /// Why it is inaccessible for now; 0 if it is not.
    pub reasons: u32,
    /// A mapping of the owner's, not a lease.
    pub internal: bool,
}

/// The BARs of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Facts {
    /// Lengths of the BARs; 0: none.
    pub bars: [u64; 6],
    /// Bytes that are never leased, such as MSI-X tables: BAR and range.
    pub reserved: Vec<(u8, Range)>,
}

/// Leases.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Selector {
    /// One.
    Lease(LeaseId),
    /// Those of a user.
    User(u32),
    /// Those of a unit, or of a control group of which no unit is known.
    Unit(Arc<str>),
    /// Those of processes with this number.
    Pid(u32),
    /// Those of a claim.
    Claim(Arc<str>),
    /// Those of a pool.
    Pool(Arc<str>),
    /// All.
    All,
}

/// Something to do. Actions are carried out in their order, and each before the next event is
/// given, answers to actions excepted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Append it to the ledger, before the next action is begun.
    Append(Record),
    /// Put these in the place of all records, as `record` says how.
    Compact(Vec<Record>),
    /// Begin to fill the ranges through the owner's own mapping. [`Event::Scrubbed`] may come any
    /// time later, after other events.
    Scrub {
        /// For this lease.
        lease: LeaseId,
        /// Name of the device.
        device: Arc<str>,
        /// The BAR.
        bar: u8,
        /// The ranges.
        ranges: Ranges,
        /// 8 bytes, little-endian, again and again.
        pattern: u64,
    },
    /// Export a buffer. Answer: [`Event::Exported`].
    Export(Box<Export>),
    /// Revoke a buffer for good, without waiting for importers. Answer: [`Event::Revoked`].
    Revoke {
        /// Name of the device.
        device: Arc<str>,
        /// The buffer.
        buffer: BufferId,
    },
    /// Ask LIST, and give [`Event::Listed`].
    List(Arc<str>),
    /// Answer a request.
    Reply {
        /// The request.
        request: RequestId,
        /// With this.
        reply: Reply,
    },
    /// Refuse a request.
    Refuse {
        /// The request.
        request: RequestId,
        /// With this.
        refusal: Box<Refusal>,
    },
    /// Tell somebody who watches.
    Notify {
        /// The request by which leases are watched.
        watch: RequestId,
        /// The lease.
        lease: LeaseId,
        /// The news.
        news: News,
        /// The lease and its owner: it may be gone when this is read.
        about: Arc<About>,
    },
    /// Begin to watch a process: [`Event::ProcessGone`], at once if there is no such process.
    WatchProcess(ProcessId),
    /// End it.
    UnwatchProcess(ProcessId),
    /// Begin to watch a control group: [`Event::CgroupEmpty`], at once if it is gone.
    WatchCgroup(CgroupId, Arc<str>),
    /// End it.
    UnwatchCgroup(CgroupId),
    /// Close a device, in a place where it may take long. Then [`Event::DeviceClosed`].
    CloseDevice(Arc<str>),
    /// Give an event, if only [`Event::Tick`], at that time at the latest.
    SetTimer(Option<Time>),
}

/// A buffer to export.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Export {
    /// The lease.
    pub lease: LeaseId,
    /// Name of the device.
    pub device: Arc<str>,
    /// The BAR.
    pub bar: u8,
    /// The ranges.
    pub ranges: Ranges,
    /// The rights.
    pub access: Access,
    /// The memory type.
    pub memory_type: MemoryType,
    /// The steering tags.
    pub tph: Option<Tph>,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Reply {
    /// A lease, whose descriptor goes with it.
    Granted(Box<Grant>),
    /// It is given back: nothing is left to the holder.
    Released,
    /// It expires then.
    Renewed(Time),
    /// These leases are the connection's again.
    Resumed(Vec<LeaseId>),
    /// So many leases are on their way out.
    Revoking(usize),
}

/// A lease that was granted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Grant {
    /// The lease.
    pub lease: LeaseId,
    /// Its buffer.
    pub buffer: BufferId,
    /// Name of the device.
    pub device: Arc<str>,
    /// The BAR.
    pub bar: u8,
    /// The ranges.
    pub ranges: Ranges,
    /// The rights.
    pub access: Access,
    /// The memory type.
    pub memory_type: MemoryType,
    /// When it expires.
    pub expires: Time,
    /// How long before a reclaim the holder is told.
    pub grace: Millis,
}

/// A lease that there is news of.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct About {
    /// Its holder.
    pub holder: Arc<Holder>,
    /// Name of its pool.
    pub pool: Arc<str>,
    /// Name of its device.
    pub device: Arc<str>,
    /// The BAR.
    pub bar: u8,
    /// All its bytes.
    pub bytes: u64,
}

/// News of a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum News {
    /// It was granted.
    Granted,
    /// It is revoked at that time, unless it is given back before.
    Reclaim {
        /// When.
        deadline: Time,
        /// Why.
        reason: EndReason,
    },
    /// It is inaccessible for now, for these reasons of the kernel's.
    Suspended(u32),
    /// It is accessible again.
    Resumed,
    /// It is revoked. An importer may have to let go before the range is free.
    Revoked(EndReason),
    /// It is no more.
    Ended(EndReason),
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// The connection is not known.
    #[error("the connection is not known")]
    NotConnected,
    /// There is no such pool.
    #[error("there is no pool {0}")]
    NoPool(Arc<str>),
    /// No pool has these ranges.
    #[error("no pool of {device} BAR {bar} has all of the ranges")]
    OutsidePools {
        /// The device.
        device: Arc<str>,
        /// The BAR.
        bar: u8,
    },
    /// A request that cannot be right.
    #[error("{0}")]
    Invalid(&'static str),
    /// The sizes of the pool are multiples of its unit.
    #[error("size and ranges in {pool} are multiples of {unit:#x} bytes, from its beginning on")]
    NotUnits {
        /// The pool.
        pool: Arc<str>,
        /// Bytes of a unit.
        unit: u64,
    },
    /// The pool never has so much, or not the ranges.
    #[error("{pool} has {bytes:#x} bytes to lease, and not what was asked for")]
    TooLarge {
        /// The pool.
        pool: Arc<str>,
        /// Bytes of it that can be leased.
        bytes: u64,
    },
    /// No rule allows it.
    #[error("no rule allows it")]
    NotAllowed {
        /// The pool.
        pool: Arc<str>,
    },
    /// The pool has no such access or memory type.
    #[error("{pool} is not leased {what}")]
    NotOffered {
        /// The pool.
        pool: Arc<str>,
        /// Which.
        what: &'static str,
    },
    /// The lease cannot end with what the kernel did not tell of the peer.
    #[error("{}", no_identity(*.0))]
    NoIdentity(Lifetime),
    /// A limit of the policy.
    #[error("the limit of {place}: {limit}, of which {have} are in use")]
    Limit {
        /// The rule.
        place: Place,
        /// Leases or bytes.
        limit: Limit,
        /// How many are in use.
        have: u64,
    },
    /// Others have it.
    #[error("others have it")]
    Busy {
        /// Some of them.
        holders: Vec<HeldBy>,
        /// How many wait for the pool.
        waiting: usize,
        /// Whether the time to wait was over.
        timed_out: bool,
    },
    /// All tenants together have so many.
    #[error("all tenants together have {have}, and `{key}` of [tenants] in the policy is {most}")]
    Total {
        /// The key in the policy.
        key: &'static str,
        /// Its value.
        most: u32,
        /// How many there are.
        have: u64,
    },
    /// Too many wait.
    #[error("too many wait in line")]
    QueueFull,
    /// The device is not there.
    #[error("{0} is not there")]
    NoDevice(Arc<str>),
    /// The device is being let go.
    #[error("{0} is being let go")]
    DeviceGoing(Arc<str>),
    /// There is no such lease, or it is another's.
    #[error("you have no lease {0}")]
    NoLease(LeaseId),
    /// The lease is on its way out.
    #[error("lease {0} is being taken back")]
    Ending(LeaseId),
    /// The lease was taken back before it was there.
    #[error("it was taken back before it was granted")]
    Cancelled(EndReason),
    /// The kernel refused to export.
    #[error("the kernel does not export it: errno {0}")]
    Export(Errno),
    /// The range could not be cleared.
    #[error("the range cannot be cleared: errno {0}")]
    Scrub(Errno),
    /// No connection of before the restart has that secret, or it is another's, or it is too late.
    #[error("there is nothing to resume")]
    NothingToResume,
}

fn no_identity(lifetime: Lifetime) -> &'static str {
    match lifetime {
        Lifetime::Process => {
            "the kernel does not say which process connected: the lifetime `process` needs Linux \
             6.9 or later"
        }
        Lifetime::Cgroup => {
            "the process that connected is in no control group of version 2, or in its root: the \
             lifetime `cgroup` needs a host with that version (`stat -fc %T /sys/fs/cgroup` says \
             cgroup2fs), and Linux 6.5 or later"
        }
        Lifetime::Claim => "the lifetime `claim` is for those who connect to the socket of a claim",
        Lifetime::Connection | Lifetime::Holders => "the connection is not known",
    }
}

/// A limit of the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Limit {
    /// So many leases.
    Leases(u32),
    /// So many bytes.
    Bytes(u64),
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Leases(count) => write!(f, "{count} leases"),
            Self::Bytes(count) => write!(f, "{count:#x} bytes"),
        }
    }
}

/// A lease that is in the way, and its holder.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HeldBy {
    /// The lease.
    pub lease: LeaseId,
    /// Its holder.
    pub peer: Peer,
    /// Its first range.
    pub range: Range,
    /// All its bytes.
    pub bytes: u64,
    /// Since when.
    pub since: Time,
    /// Until when at most.
    pub expires: Time,
    /// Whether it is revoked, and an importer keeps its range.
    pub revoked: bool,
}

/// The outcome of a request that is not made, with its reasons.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// The pool, if there is one.
    pub pool: Option<Arc<str>>,
    /// The answer of each rule for the pool.
    pub rules: Vec<(Place, Outcome)>,
    /// The limits that count, for user, unit and claim.
    pub limits: Option<[Limits; 3]>,
    /// Whether it would be granted now.
    pub verdict: Result<(), Refusal>,
}

/// A request in line, to look at.
#[derive(Clone, Copy, Debug)]
pub struct WaiterView<'a> {
    /// Its place, to go on after it: see [`super::Core::waiters_after`].
    pub place: (usize, RequestId),
    /// Name of the pool.
    pub pool: &'a str,
    /// The peer that waits.
    pub peer: &'a Peer,
    /// For what.
    pub ask: &'a Ask,
    /// Until when.
    pub deadline: Time,
}

/// A lease, to look at.
#[derive(Clone, Copy, Debug)]
pub struct LeaseView<'a> {
    /// The lease.
    pub lease: LeaseId,
    /// Name of its pool.
    pub pool: &'a str,
    /// Name of its device.
    pub device: &'a str,
    /// The BAR.
    pub bar: u8,
    /// Its ranges.
    pub ranges: &'a [Range],
    /// Its holder.
    pub peer: &'a Peer,
    /// The rights.
    pub access: Access,
    /// The memory type.
    pub memory_type: MemoryType,
    /// The end that it lives to.
    pub lifetime: Lifetime,
    /// Since when it is.
    pub since: Time,
    /// When it expires.
    pub expires: Time,
    /// Its state.
    pub state: &'a super::State,
}
