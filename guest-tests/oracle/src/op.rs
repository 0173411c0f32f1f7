//! Steps, and what can come of them.

use crate::{Protection, world::State};

/// A step of the random test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The operation.
    pub op: Op,
    /// Whether all processes touch their mappings of the device while it is done.
    pub under_fire: bool,
}

/// An operation. It names devices, buffers, mappings, attachments and processes by number; new ones
/// get the next. Offsets and lengths are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are what they are called")]
pub enum Op {
    /// Opens a device. One that mappings keep open gets another fd.
    Open { device: usize },
    /// Closes the fd of a device.
    Close { device: usize },
    /// Unbinds a device, and what is in its group, and binds it again.
    Rebind { device: usize },
    /// Exports ranges.
    Export {
        device: usize,
        ranges: Vec<(u64, u64)>,
        writable: bool,
    },
    /// Exports what must be refused.
    ExportSpoilt { device: usize, spoil: Spoil },
    /// Revokes a buffer.
    Revoke { device: usize, buffer: usize },
    /// Revokes what is no buffer.
    RevokeNothing { device: usize, what: NoBuffer },
    /// Revokes a buffer by its id, and waits for its importers, or does not.
    RevokeId {
        device: usize,
        buffer: usize,
        nowait: bool,
    },
    /// Asks for the list of buffers, so many records a call.
    List { device: usize, at_a_time: u32 },
    /// Gives a device an eventfd for changes, a new one, or takes it away.
    Events { device: usize, armed: bool },
    /// Asks for the status of a buffer.
    Status { device: usize, buffer: usize },
    /// Sets the memory type of later mappings.
    MemoryType {
        device: usize,
        buffer: usize,
        value: u32,
    },
    /// Sets steering tags.
    SteeringTags {
        device: usize,
        buffer: usize,
        flags: u32,
        tag: u8,
        extended: u16,
        hint: u8,
    },
    /// Reads a steering tag as an importer does.
    ReadTag { buffer: usize, extended: bool },
    /// Closes a process's fd of a buffer.
    CloseBuffer { buffer: usize, process: usize },
    /// Sends a process an fd of a buffer.
    Send { buffer: usize, process: usize },
    /// Maps a part of a buffer; `large` at a multiple of 2 MiB.
    Map {
        buffer: usize,
        process: usize,
        offset: u64,
        length: u64,
        protection: Protection,
        large: bool,
    },
    /// Maps what must be refused.
    MapSpoilt { buffer: usize, how: WrongMap },
    /// Maps a part of the BAR, or its alias, through the device fd.
    MapBar {
        device: usize,
        alias: bool,
        offset: u64,
        length: u64,
    },
    /// Asks for a write-combining alias of the BAR.
    Alias { device: usize },
    /// Asks for an alias that must be refused: of the alias, if `of_alias`, or of config space.
    AliasSpoilt { device: usize, of_alias: bool },
    /// Unmaps a mapping.
    Unmap { mapping: usize },
    /// Unmaps pages of a mapping.
    UnmapPart {
        mapping: usize,
        first: u64,
        pages: u64,
    },
    /// Changes the protection of pages of a mapping.
    Protect {
        mapping: usize,
        first: u64,
        pages: u64,
        protection: Protection,
    },
    /// Moves a mapping.
    Move { mapping: usize },
    /// Touches pages in a forked process.
    Fork { touches: Vec<(usize, u64)> },
    /// Makes a process that has all mappings that this one has.
    Spawn,
    /// Ends a process.
    Kill { process: usize },
    /// Loads a word.
    Read { mapping: usize, at: u64 },
    /// Stores a word.
    Write { mapping: usize, at: u64, value: u32 },
    /// Reads a word through the device fd.
    ReadFd { device: usize, alias: bool, at: u64 },
    /// Writes a word through the device fd.
    WriteFd {
        device: usize,
        alias: bool,
        at: u64,
        value: u32,
    },
    /// Attaches the importer.
    Attach { buffer: usize },
    /// Attaches an importer that cannot be told to stop, or cannot do peer-to-peer DMA.
    AttachSpoilt { buffer: usize, peer_to_peer: bool },
    /// Detaches it.
    Detach { attachment: usize },
    /// Maps for DMA.
    MapDma { attachment: usize },
    /// Undoes that.
    UnmapDma { attachment: usize },
    /// Lets an importer keep its mapping when it is told to give it up, or not.
    Hold { attachment: usize, hold: bool },
    /// Adds a fence.
    Fence { attachment: usize },
    /// Signals it.
    Signal { attachment: usize },
    /// Moves bytes from the buffer by DMA.
    ReadDma { attachment: usize, at: u64 },
    /// Moves bytes to the buffer by DMA: words from `value` on.
    WriteDma {
        attachment: usize,
        at: u64,
        value: u32,
    },
    /// Turns memory decoding on or off, with a write of COMMAND alone or of 64 bytes.
    Memory { device: usize, on: bool, long: bool },
    /// Writes another bit of COMMAND.
    Master { device: usize, on: bool },
    /// Asks for a power state.
    Power { device: usize, state: u8 },
    /// Enters low power; until the next access if `wake_up`.
    EnterLowPower { device: usize, wake_up: bool },
    /// Leaves low power.
    LeaveLowPower { device: usize },
    /// An ioctl that does nothing.
    Access { device: usize },
    /// `VFIO_DEVICE_RESET`.
    Reset { device: usize },
    /// A reset through sysfs.
    SysfsReset { device: usize },
    /// A function-level reset through config space.
    FunctionReset { device: usize },
    /// `VFIO_DEVICE_PCI_HOT_RESET`.
    HotReset { device: usize },
    /// A reset of the bus through sysfs.
    BusReset { device: usize },
    /// A device reports an error, and recovery from it is waited for.
    Error { device: usize, severity: Severity },
    /// A device is pulled out of its slot, without a word to anybody before.
    Pull { device: usize },
    /// Another one is put in, and bound.
    Plug { device: usize },
    /// The system falls asleep as far as to freeze processes, and wakes up.
    Sleep,
    /// Threads that use the device in every way at once, so many times each. It ends with memory on
    /// and awake.
    Storm { device: usize, rounds: u32 },
    /// Threads that use the device in every way at once while it is pulled out, and that many times
    /// after that.
    PullInStorm { device: usize, rounds: u32 },
}

/// How bad an error is that a device reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The hardware has corrected it.
    Corrected,
    /// A request was lost.
    NonFatal,
}

/// The mistake in an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "named after what is wrong")]
pub enum Spoil {
    Flags,
    OpenFlags,
    NoRanges,
    TooManyRanges,
    EmptyRange,
    UnalignedOffset,
    UnalignedLength,
    PastEnd,
    ConfigRegion,
    NoRegion,
    ShortArgument,
    /// The MSI-X table; only where there is one.
    Msix,
}

impl Spoil {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Flags,
        Self::OpenFlags,
        Self::NoRanges,
        Self::TooManyRanges,
        Self::EmptyRange,
        Self::UnalignedOffset,
        Self::UnalignedLength,
        Self::PastEnd,
        Self::ConfigRegion,
        Self::NoRegion,
        Self::ShortArgument,
        Self::Msix,
    ];

    /// The errno of the contract.
    #[must_use]
    pub fn errno(self) -> i32 {
        match self {
            Self::TooManyRanges => libc::E2BIG,
            Self::ConfigRegion | Self::NoRegion => libc::ENODEV,
            Self::Msix => libc::EPERM,
            _ => libc::EINVAL,
        }
    }
}

/// Descriptors that are no buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoBuffer {
    /// No open fd.
    Closed,
    /// An fd of something else.
    Other,
}

/// The mistake in an mmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WrongMap {
    /// `MAP_PRIVATE`.
    Private,
    /// Longer than the buffer.
    PastEnd,
    /// To write, of a read-only fd.
    Writable,
}

/// The outcome of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Done,
    /// It was refused with this errno.
    Refused(i32),
    /// A touch gave SIGBUS.
    Sigbus,
    /// These words were read.
    Words(Vec<u32>),
    /// The device is open; whether its memory is on.
    Opened(bool),
    /// A steering tag and a hint.
    Tag(u16, u8),
    /// A status.
    Status(Seen),
    /// The records of a list, in its order.
    Listed(Vec<Record>),
}

/// A record of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The buffer; `None` for an internal one.
    pub buffer: Option<usize>,
    /// With the answer of STATUS.
    pub seen: Seen,
    /// Whether it is draining.
    pub draining: bool,
    /// Mappings of importers.
    pub mappings: u32,
    /// Mappings of processes.
    pub vmas: u32,
    /// Those of them that are write-combining.
    pub combining: u32,
    /// Whether its fds can be written to.
    pub writable: bool,
}

/// The answer of STATUS.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields of the contract")]
pub struct Seen {
    pub state: State,
    pub memattr: u32,
    pub region: u32,
    pub size: u64,
    pub ranges: u32,
    pub attachments: u32,
}

impl Outcome {
    /// For counting.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Refused(errno) => match *errno {
                libc::EPERM => "EPERM".to_owned(),
                libc::ENOENT => "ENOENT".to_owned(),
                libc::EIO => "EIO".to_owned(),
                libc::ENXIO => "ENXIO".to_owned(),
                libc::E2BIG => "E2BIG".to_owned(),
                libc::EBADF => "EBADF".to_owned(),
                libc::EACCES => "EACCES".to_owned(),
                libc::EBUSY => "EBUSY".to_owned(),
                libc::ENODEV => "ENODEV".to_owned(),
                libc::EINVAL => "EINVAL".to_owned(),
                libc::EBADFD => "EBADFD".to_owned(),
                libc::EOPNOTSUPP => "EOPNOTSUPP".to_owned(),
                libc::EINPROGRESS => "EINPROGRESS".to_owned(),
                other => format!("errno {other}"),
            },
            Self::Sigbus => "SIGBUS".to_owned(),
            Self::Status(seen) => match seen.state {
                State::Ok => "OK".to_owned(),
                State::Revoked(_) => "REVOKED".to_owned(),
                State::Dead => "DEAD".to_owned(),
            },
            Self::Done | Self::Words(_) | Self::Opened(_) | Self::Tag(..) | Self::Listed(_) => {
                "done".to_owned()
            }
        }
    }
}

macro_rules! kinds {
    ($($name:ident)+) => {
        /// Which operation a step is.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[expect(missing_docs, reason = "those of `Op`")]
        pub enum Kind { $($name,)+ }

        impl Kind {
            /// Every operation.
            pub const ALL: &[Self] = &[$(Self::$name,)+];
        }

        impl Op {
            /// Which operation it is.
            #[must_use]
            pub fn kind(&self) -> Kind {
                match self { $(Self::$name { .. } => Kind::$name,)+ }
            }
        }
    };
}

kinds! {
    Open Close Rebind Export ExportSpoilt Revoke RevokeNothing RevokeId List Events Status MemoryType SteeringTags ReadTag
    CloseBuffer Send Map MapSpoilt MapBar Alias AliasSpoilt Unmap UnmapPart Protect Move Fork Spawn Kill
    Read Write ReadFd WriteFd Attach AttachSpoilt Detach MapDma UnmapDma Hold Fence Signal ReadDma WriteDma
    Memory Master Power EnterLowPower LeaveLowPower Access Reset SysfsReset FunctionReset HotReset BusReset
    Error Pull Plug Sleep Storm PullInStorm
}
