//! Errors.

use std::io;

use serde::Deserialize;
use serde::Serialize;

use crate::types::HeldBy;
use crate::types::Reason;

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of a call.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The socket.
    #[error("{operation}: the service's socket")]
    Io {
        /// The operation that failed.
        operation: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The peer closed the connection.
    #[error("the service closed the connection")]
    Closed,
    /// The peer sent what is not understood.
    #[error("the service sent something that is not understood: {0}")]
    Malformed(String),
    /// The service refused.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// The service refused for a reason that is unknown here.
    #[error("the service refused: {name} {parameters}")]
    Other {
        /// Full name of the error.
        name: String,
        /// Its parameters.
        parameters: serde_json::Value,
    },
}

impl Error {
    pub(crate) fn io(operation: &'static str, source: io::Error) -> Self {
        Self::Io { operation, source }
    }
}

/// The errors of the interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "error", content = "parameters", rename_all_fields = "camelCase")]
#[allow(
    missing_docs,
    reason = "each field is one of the IDL, which has the text"
)]
pub enum Refusal {
    #[error("there is no pool {pool}")]
    NoSuchPool { pool: String },
    #[error("there is no device {device}")]
    NoSuchDevice { device: String },
    #[error("you have no lease {lease}")]
    NoSuchLease { lease: u64 },
    #[error("there is no claim {claim}")]
    NoSuchClaim { claim: String },
    #[error("no pool of {device} BAR {bar} has all of the ranges")]
    OutsidePools { device: String, bar: u8 },
    #[error("{reason}")]
    Invalid { reason: String },
    #[error("no rule allows it: pool {pool}")]
    NotAllowed { pool: String },
    #[error("pool {pool}: {reason}")]
    NotOffered { pool: String, reason: String },
    #[error("the limit of {rule} is reached: {have} are in use")]
    LimitReached {
        rule: String,
        leases: Option<u32>,
        bytes: Option<u64>,
        have: u64,
    },
    #[error("others have it: {}", holders(held_by))]
    Busy {
        held_by: Vec<HeldBy>,
        waiting: u64,
        timed_out: bool,
    },
    #[error("too many wait in line")]
    QueueFull {},
    #[error("{device} is being let go")]
    DeviceGoing { device: String },
    #[error("lease {lease} is being taken back")]
    Ending { lease: u64 },
    #[error("it was taken back before it was granted")]
    Cancelled { reason: Reason },
    #[error("{operation}: errno {errno}")]
    Failed { operation: String, errno: i32 },
    #[error("there is nothing to resume")]
    NothingToResume {},
    #[error("this is for administrators")]
    NotAdministrator {},
    #[error("the policy is not valid: {}", errors.join("; "))]
    PolicyInvalid { errors: Vec<String> },
}

fn holders(held_by: &[HeldBy]) -> String {
    if held_by.is_empty() {
        return "they wait in line".to_owned();
    }
    let one = |held: &HeldBy| {
        let holder = &held.holder;
        let unit = holder
            .unit
            .as_ref()
            .map(|unit| format!(", {unit}"))
            .unwrap_or_default();
        format!(
            "lease {} of uid {} (pid {}{unit})",
            held.lease, holder.uid, holder.pid
        )
    };
    held_by.iter().map(one).collect::<Vec<_>>().join(", ")
}
