//! Arguments of commands that go to the service.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use barlease::BarRange;
use clap::Subcommand;
use clap::ValueEnum;

use crate::args::MemoryType;
use crate::args::TphArgs;
use crate::names;
use crate::number;

/// Where the service is.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Service {
    /// Socket of barleased
    #[arg(long = "service", value_name = "SOCKET", env = "BARLEASE_SOCKET")]
    #[arg(default_value = barlease_proto::SOCKET)]
    pub(crate) socket: PathBuf,
}

/// The object of a request: a pool, or ranges of a BAR.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct WhatArgs {
    /// The pool
    #[arg(required_unless_present = "device", conflicts_with = "device")]
    pub(crate) pool: Option<String>,
    /// How much of it, such as 64K; all of it if not given
    #[arg(value_parser = number::size, conflicts_with = "device")]
    pub(crate) size: Option<u64>,
    /// Instead of a pool: ranges of this device, by its name in the policy
    #[arg(long, value_name = "NAME", requires_all = ["bar", "range"])]
    pub(crate) device: Option<String>,
    /// The BAR
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..6))]
    #[arg(requires = "device")]
    pub(crate) bar: Option<u8>,
    /// A range of the BAR, OFFSET+LENGTH; more ranges make one lease in this order
    #[arg(long, value_name = "OFFSET+LENGTH", value_parser = number::range)]
    #[arg(requires = "device")]
    pub(crate) range: Vec<BarRange>,
    /// For reading only
    #[arg(long)]
    pub(crate) read_only: bool,
    /// The event that ends the lease by itself
    #[arg(long, value_enum, default_value = "connection")]
    pub(crate) lifetime: Lifetime,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Lifetime {
    /// The end of the connection, which the command inherits
    Connection,
    /// The end of the process
    Process,
    /// The end of the last process of its control group
    Cgroup,
    /// The end of the claim whose socket it is
    Claim,
    /// Nobody has it any more
    Holders,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct AcquireArgs {
    #[command(flatten)]
    pub(crate) what: WhatArgs,
    /// Memory type of mappings
    #[arg(long, value_enum, default_value = "nc")]
    pub(crate) memory_type: MemoryType,
    /// For this time at most, such as 90s, 10m, 2h or 1d
    #[arg(long, value_name = "TIME", value_parser = names::duration)]
    pub(crate) ttl: Option<Duration>,
    /// Wait in line for so long
    #[arg(long, value_name = "TIME", value_parser = names::duration)]
    pub(crate) wait: Option<Duration>,
    #[command(flatten)]
    pub(crate) tph: TphArgs,
    #[command(flatten)]
    pub(crate) service: Service,
    /// The command and its arguments. Without one, the lease is held until a signal comes
    #[arg(last = true)]
    pub(crate) command: Vec<OsString>,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ListArgs {
    /// Of this pool only
    #[arg(long)]
    pub(crate) pool: Option<String>,
    #[command(flatten)]
    pub(crate) service: Service,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct WatchArgs {
    /// Leases of all users, for administrators
    #[arg(long)]
    pub(crate) all: bool,
    #[command(flatten)]
    pub(crate) service: Service,
}

#[derive(Clone, Debug, clap::Args)]
#[group(id = "whose", required = true, multiple = false)]
pub(crate) struct WhoseArgs {
    /// Socket of `barlease lease grant`, or number of a lease of barleased
    pub(crate) what: Option<PathBuf>,
    /// Leases of this user, by name or number
    #[arg(long, value_parser = names::user)]
    pub(crate) user: Option<u32>,
    /// Leases of this process
    #[arg(long)]
    pub(crate) pid: Option<u32>,
    /// Leases of this unit
    #[arg(long)]
    pub(crate) unit: Option<String>,
    /// Leases of this claim
    #[arg(long)]
    pub(crate) claim: Option<String>,
    /// Leases of this pool
    #[arg(long)]
    pub(crate) pool: Option<String>,
    /// All leases
    #[arg(long)]
    pub(crate) all: bool,
}

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct RevokeArgs {
    #[command(flatten)]
    pub(crate) whose: WhoseArgs,
    /// How long holders have to give leases back, if less than the policy says; 0 for not at all
    #[arg(long, value_name = "TIME", value_parser = grace)]
    pub(crate) grace: Option<Duration>,
    /// By a socket: do not wait for devices that have the lease imported. Nobody else has it any
    /// more then, and `draining` is printed while an importer has still to let go
    #[arg(long)]
    pub(crate) no_wait: bool,
    #[command(flatten)]
    pub(crate) service: Service,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BrokerCommand {
    /// List the devices and pools of the service, with what is free and how many wait
    #[command(alias = "list", alias = "devices")]
    Show {
        #[command(flatten)]
        service: Service,
    },
    /// Reclaim all leases of a device, then close it; it is opened again by `reload`
    ///
    /// Returns when it is closed.
    Drain {
        /// The device, by its name in the policy; all devices if not given
        device: Option<String>,
        /// How long holders have to give leases back, if less than the policy says; 0 for not at
        /// all
        #[arg(long, value_name = "TIME", value_parser = grace)]
        grace: Option<Duration>,
        #[command(flatten)]
        service: Service,
    },
    /// Have the policy read again: any error leaves the old one in force
    Reload {
        #[command(flatten)]
        service: Service,
    },
}

/// A time that may be 0.
fn grace(text: &str) -> Result<Duration, String> {
    match text {
        "0" | "0s" => Ok(Duration::ZERO),
        text => names::duration(text),
    }
}

/// Milliseconds, as the protocol counts.
pub(crate) fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
