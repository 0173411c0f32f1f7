//! The types of the interface. [`crate::IDL`] says what they mean.

#![allow(
    missing_docs,
    reason = "each field is one of the IDL, which has the text"
)]

use serde::Deserialize;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A method: the type is its parameters.
pub trait Method: Serialize {
    /// Its name in the interface.
    const NAME: &'static str;
    /// Its reply.
    type Reply: DeserializeOwned;
}

macro_rules! methods {
    ($($name:ident -> $reply:ty;)+) => {
        $(
            impl Method for $name {
                const NAME: &'static str = stringify!($name);
                type Reply = $reply;
            }
        )+
    };
}

methods! {
    Acquire -> Acquired;
    Release -> Nothing;
    Renew -> Renewed;
    Token -> Secret;
    Resume -> Resumed;
    Watch -> Notice;
    List -> Listed;
    Explain -> Explained;
    Revoke -> Revoked;
    Drain -> Nothing;
    Reload -> Nothing;
    Devices -> DeviceList;
    OpenClaim -> Claim;
    EndClaim -> Revoked;
    Claims -> ClaimList;
    Monitor -> Told;
    Adopt -> Nothing;
}

/// Structures and enumerations as JSON writes them. A value that is not there is null.
macro_rules! types {
    ($(
        $(#[$doc:meta])*
        $kind:ident $name:ident { $($body:tt)* }
    )+) => {
        $(types!(@$kind [$(#[$doc])*] $name { $($body)* });)+
    };
    (@structure [$(#[$doc:meta])*] $name:ident { $($field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "camelCase")]
        pub struct $name {
            $(pub $field: $type,)*
        }
    };
    (@choice [$(#[$doc:meta])*] $name:ident { $($value:ident,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name {
            $($value,)*
        }
    };
}

types! {
    structure Range { offset: u64, length: u64, }
    choice Access { Read, ReadWrite, }
    choice MemoryType { Nc, Wc, }
    choice Lifetime { Connection, Process, Cgroup, Claim, Holders, }
    structure SteeringTag { tag: Option<u8>, extended: Option<u16>, hint: u8, }
    choice Reason {
        Released, Dropped, Expired, HolderGone, NotResumed, Revoked, DeviceGoing, DeviceClosed,
        NoLongerAllowed, Undelivered, RevokedElsewhere, NeverGranted, Inconsistent,
    }
    choice Event { Granted, Reclaim, Suspended, Resumed, Revoked, Ended, }
    choice State { Preparing, Granted, Suspended, Orphaned, Reclaiming, Revoking, }
    structure Holder {
        uid: u32, gid: u32, pid: u32, unit: Option<String>, claim: Option<String>,
    }
    structure HeldBy {
        lease: u64, holder: Holder, range: Range, size: u64, since: u64, expires: Option<u64>,
        revoked: bool,
    }
    structure LeaseInfo {
        lease: u64, pool: String, device: String, bar: u8, ranges: Vec<Range>, size: u64,
        access: Access, memory_type: MemoryType, lifetime: Lifetime, holder: Holder, state: State,
        reasons: u32, reason: Option<Reason>, since: u64, expires: Option<u64>,
        deadline: Option<u64>, usage: Option<Usage>,
    }
    structure Usage { mappings: u32, attachments: u32, }
    structure Waiter {
        pool: String, size: Option<u64>, ranges: Option<Vec<Range>>, access: Access, holder: Holder,
        deadline: u64,
    }
    structure Rule { file: String, line: u32, allows: bool, why: Option<String>, }
    structure PoolInfo {
        name: String, bar: u8, at: u64, length: u64, unit: u64, size: u64, free: u64, waiting: u64,
    }
    structure DeviceInfo {
        name: String, address: Option<String>, state: String, bars: Vec<u64>, pools: Vec<PoolInfo>,
    }
    choice RecordKind {
        Granted, Refused, Reclaim, Suspended, Resumed, Revoked, Ended, RevokeAsked, DrainAsked,
        PolicyLoaded, PolicyRefused, DeviceOpened, DeviceAbsent, DeviceClosed,
    }
    structure Record {
        kind: RecordKind, time: u64, message: String, lease: Option<u64>, pool: Option<String>,
        device: Option<String>, bar: Option<u8>, size: Option<u64>, holder: Option<Holder>,
        reason: Option<Reason>, reasons: Option<u32>, deadline: Option<u64>, error: Option<String>,
    }

    /// Parameters of Acquire.
    structure Acquire {
        pool: Option<String>, size: Option<u64>, device: Option<String>, bar: Option<u8>,
        ranges: Option<Vec<Range>>, access: Access, memory_type: Option<MemoryType>,
        steering_tag: Option<SteeringTag>, lifetime: Option<Lifetime>, ttl: Option<u64>,
        wait: Option<u64>,
    }
    /// A lease. Its descriptor is number [`Acquired::file_descriptor`] of those of the message.
    structure Acquired {
        lease: u64, file_descriptor: u32, device: String, bar: u8, ranges: Vec<Range>, size: u64,
        access: Access, memory_type: MemoryType, expires: Option<u64>, grace: u64,
    }
    structure Release { lease: u64, }
    structure Renew { lease: u64, ttl: Option<u64>, }
    structure Renewed { expires: Option<u64>, }
    structure Token {}
    /// The reply of Token.
    structure Secret { token: String, }
    structure Resume { token: String, }
    structure Resumed { leases: Vec<u64>, }
    structure Watch { all: Option<bool>, }
    /// A reply of Watch.
    structure Notice {
        lease: u64, event: Event, reason: Option<Reason>, deadline: Option<u64>,
        reasons: Option<u32>,
    }
    structure List { pool: Option<String>, usage: Option<bool>, }
    /// A reply of List; the last has neither.
    structure Listed { lease: Option<LeaseInfo>, waiter: Option<Waiter>, }
    structure Explain {
        pool: Option<String>, size: Option<u64>, device: Option<String>, bar: Option<u8>,
        ranges: Option<Vec<Range>>, access: Access, memory_type: Option<MemoryType>,
        steering_tag: Option<SteeringTag>, lifetime: Option<Lifetime>, as_uid: Option<u32>, as_unit: Option<String>,
        as_cgroup: Option<String>, as_claim: Option<String>,
    }
    structure Explained {
        granted: bool, why: Option<String>, pool: Option<String>, rules: Vec<Rule>,
        held_by: Vec<HeldBy>, waiting: u64,
    }
    structure Revoke {
        lease: Option<u64>, uid: Option<u32>, pid: Option<u32>, unit: Option<String>,
        claim: Option<String>, pool: Option<String>, all: Option<bool>, grace: Option<u64>,
    }
    structure Revoked { leases: u64, }
    structure Drain { device: Option<String>, grace: Option<u64>, }
    structure Reload {}
    structure Devices {}
    structure Monitor {}
    /// A reply of Monitor.
    structure Told { record: Record, }
    /// With what is wrong with the policy's files, if an older policy is in force.
    structure DeviceList { devices: Vec<DeviceInfo>, policy_errors: Option<Vec<String>>, }
    structure OpenClaim { claim: String, }
    /// The reply of OpenClaim.
    structure Claim { directory: String, }
    structure EndClaim { claim: String, }
    structure Claims {}
    structure ClaimList { claims: Vec<String>, }
    /// The descriptor is number [`Adopt::file_descriptor`] of those of the message.
    structure Adopt { device: String, file_descriptor: u32, }
    /// A reply without anything in it.
    structure Nothing {}
}

impl Acquire {
    fn of(access: Access) -> Self {
        Self {
            pool: None,
            size: None,
            device: None,
            bar: None,
            ranges: None,
            access,
            memory_type: None,
            steering_tag: None,
            lifetime: None,
            ttl: None,
            wait: None,
        }
    }

    /// So many bytes of a pool.
    #[must_use]
    pub fn of_pool(pool: impl Into<String>, size: u64, access: Access) -> Self {
        Self {
            pool: Some(pool.into()),
            size: Some(size),
            ..Self::of(access)
        }
    }

    /// Ranges of a BAR.
    #[must_use]
    pub fn of_ranges(
        device: impl Into<String>,
        bar: u8,
        ranges: Vec<Range>,
        access: Access,
    ) -> Self {
        Self {
            device: Some(device.into()),
            bar: Some(bar),
            ranges: Some(ranges),
            ..Self::of(access)
        }
    }
}
