//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use barlease::BarRange;
use barlease::Bdf;
use barlease::VfToken;
use clap::Parser;
use clap::Subcommand;
use clap::ValueEnum;

use crate::names;
use crate::number;
use crate::policy::PolicyCommand;
use crate::service::args::AcquireArgs;
use crate::service::args::BrokerCommand;
use crate::service::args::ListArgs;
use crate::service::args::RevokeArgs;
use crate::service::args::Service;
use crate::service::args::WatchArgs;
use crate::top::TopArgs;

/// Lease pieces of a PCI device's memory to other processes and devices, and take them back
#[derive(Debug, Parser)]
#[command(
    name = "barlease",
    version,
    infer_subcommands = true,
    after_help = "Exit codes: 0 success, 1 failure, 2 wrong usage, 3 not supported by this driver, \
                  kernel or device, 128 and more ended by a signal, 141 nobody reads the output.\n\
                  Addresses of devices are 0000:00:05.0 or 00:05.0. Numbers are decimal or 0x..., \
                  sizes take K, M and G (powers of 1024)."
)]
pub(crate) struct Args {
    /// Print JSON
    #[arg(short, long, global = true)]
    pub(crate) json: bool,

    /// Print JSON for people to read
    #[arg(short, long, global = true)]
    pub(crate) pretty: bool,

    /// Say on standard error what is done: each write to sysfs, each module that is loaded; twice,
    /// each ioctl, too
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,

    #[command(subcommand)]
    pub(crate) object: Object,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Object {
    /// PCI devices and their drivers
    Device {
        #[command(subcommand)]
        command: Option<DeviceCommand>,
    },
    /// Leases of BAR ranges
    Lease {
        #[command(subcommand)]
        command: Option<LeaseCommand>,
    },
    /// Claims of the service, by which containers lease
    Claim {
        #[command(subcommand)]
        command: Option<ClaimCommand>,
        /// Of `show`, which is the default command
        #[command(flatten)]
        service: Service,
    },
    /// Leases for containers, by the Container Device Interface
    Cdi {
        #[command(subcommand)]
        command: CdiCommand,
    },
    /// The service barleased: its devices and pools
    Broker {
        #[command(subcommand)]
        command: Option<BrokerCommand>,
        /// Of `show`, which is the default command
        #[command(flatten)]
        service: Service,
    },
    /// The policy of the service: check its files, explain what it allows
    Policy {
        #[command(subcommand)]
        command: PolicyCommand,
    },
    /// Show the service live: each BAR as a strip, its leases by holder, who waits
    ///
    /// A letter is a holder: capital where leases have most of a cell, `.` is free, `-` of no pool,
    /// `!` revoked while an importer has it. Arrows scroll and sort, q ends. NO_COLOR is heeded.
    Top(TopArgs),
    /// Print all that the service does from now on, as JSON lines (for administrators)
    Monitor {
        #[command(flatten)]
        service: Service,
    },
    /// Say what is missing for leases to work, and how to mend it
    Doctor {
        /// Check this device too
        bdf: Option<Bdf>,
        /// And whether this other one can reach its leases, by which way
        #[arg(long, value_name = "BDF", requires = "bdf")]
        peer: Option<Bdf>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ClaimCommand {
    /// List the claims that are open
    #[command(alias = "list")]
    Show {
        #[command(flatten)]
        service: Service,
    },
    /// Make the directory of a claim, unless it is there, and print it
    ///
    /// Mount it into a container: each process that connects to `sock` in it speaks for the claim.
    /// JSON has claim and directory.
    Open {
        /// Its name
        claim: String,
        #[command(flatten)]
        service: Service,
    },
    /// End a claim: its directory goes, and all its leases are revoked
    End {
        /// Its name
        claim: String,
        #[command(flatten)]
        service: Service,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum CdiCommand {
    /// Write a CDI specification, by which podman, docker, containerd and CRI-O give claims to
    /// containers
    ///
    /// The claims are opened. Each is a device, `barlease.dev/lease=CLAIM`, with which a container
    /// gets the directory of the claim and the variable BARLEASE_SOCKET. Claims end with the boot:
    /// so should the file, as it does in /var/run/cdi.
    Generate {
        /// Claims, each with the pool that its container is told in BARLEASE_POOL, if any
        #[arg(required = true, value_name = "CLAIM[=POOL]")]
        claims: Vec<String>,
        /// The file, such as /var/run/cdi/barlease.json; else it is printed
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
        #[command(flatten)]
        service: Service,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum DeviceCommand {
    /// List PCI devices; of one device, its BARs too. Touches no hardware
    ///
    /// Others than root see neither the processes of other users nor where the MSI-X table is. JSON
    /// is a list of devices, each with the same keys: bdf, vendor, device, class, driver,
    /// driver_override, iommu_group, iommu_group_type, iommu_group_others, numa_node, vfio,
    /// persistent, open, openers (pid, uid, command, exe, unit, container), bars (bar, address,
    /// size, prefetchable, msix_table, msix_pending, exportable), backend, regions, features.
    /// docs/json.md says what they are.
    #[command(alias = "list")]
    Show {
        /// The device
        bdf: Option<Bdf>,
        /// Ask the device for its regions and features, which opens and resets it
        #[arg(long, requires = "bdf")]
        features: bool,
        /// The token of a virtual function, to open it: see `lease grant --help`
        #[arg(long, value_name = "UUID", requires = "features")]
        vf_token: Option<VfToken>,
    },
    /// Bind devices to a vfio driver, taking them from the driver they have: all or none
    ///
    /// The module is loaded if it is not. A device that the host uses (mounted file system, swap,
    /// network interface that is up, virtual functions) is refused. When a device fails, or a
    /// signal comes, those before it go back to the drivers that they had. JSON is a list of what
    /// was done: bdf, before, driver, persistent; after an error, `undone` is the list of what went
    /// back.
    Bind(BindArgs),
    /// Open a device, make a region that maps one of its BARs write-combining, and show it
    ///
    /// It ends with this command, which closes the device. A program that opens the device and asks
    /// for an alias itself (BARLEASE_FEATURE_ALIAS_REGION) finds its first one at the same index
    /// and offset.
    Alias {
        /// The device
        bdf: Bdf,
        /// The BAR
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..6))]
        bar: u32,
        /// The token of a virtual function: see `lease grant --help`
        #[arg(long, value_name = "UUID")]
        vf_token: Option<VfToken>,
    },
    /// Reset a device that nobody has open
    Reset {
        /// The device
        bdf: Bdf,
        /// Also one that is in use: its users lose its state, and leases are taken away
        #[arg(long)]
        force: bool,
    },
    /// Give devices back to the driver that the kernel would choose
    ///
    /// All or none, as for `bind`.
    Unbind(UnbindArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct BindArgs {
    /// The devices
    #[arg(required = true)]
    pub(crate) bdf: Vec<Bdf>,
    /// The driver
    #[arg(long, default_value = "barlease-vfio-pci", value_parser = names::driver)]
    pub(crate) driver: String,
    /// Take devices that are in use, too: their users lose them
    #[arg(long)]
    pub(crate) force: bool,
    /// The other functions of their IOMMU groups, too, but for bridges
    #[arg(long)]
    pub(crate) group: bool,
    /// At each boot, too: by a rule in /etc/udev/rules.d for each device
    #[arg(long)]
    pub(crate) persist: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct UnbindArgs {
    /// The devices
    #[arg(required = true)]
    pub(crate) bdf: Vec<Bdf>,
    /// The other functions of their IOMMU groups that a vfio driver has, too
    #[arg(long)]
    pub(crate) group: bool,
    /// And do not bind them at the next boot: take back what `bind --persist` did
    #[arg(long)]
    pub(crate) persist: bool,
}

impl Default for DeviceCommand {
    fn default() -> Self {
        Self::Show {
            bdf: None,
            features: false,
            vf_token: None,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum LeaseCommand {
    /// List the leases that the module has, and mappings of BARs (needs debugfs, as root)
    ///
    /// `lease list` has those of barleased.
    ///
    /// MEMATTR is the memory type of the next mapping. Mappings keep the type that they were made
    /// with: of the MMAPS that there are, WC_MMAPS are write-combining and the others uncached.
    Show {
        /// Of this device only
        bdf: Option<Bdf>,
    },
    /// Lease ranges of BARs to processes that connect to a socket, until revoked
    ///
    /// Leases are revoked by SIGINT, SIGTERM, SIGHUP, the line `revoke` on standard input, the end
    /// of their term, and when the kernel asks for the device, as for `barlease device unbind` and
    /// hot-unplug. The line `revoke NAME` (or socket) revokes one of them, `status` prints their
    /// states. In the background nothing is read from a terminal.
    Grant(GrantArgs),
    /// Have a lease revoked, of another `barlease lease grant` or of barleased
    ///
    /// By the socket of a `barlease lease grant`: for the user that granted it, and for root; of
    /// several leases of that process it ends this one only, and waits for its end. Leases of
    /// barleased, by number or by whose they are: for its administrators; holders are told, with
    /// the grace of the policy.
    Revoke(RevokeArgs),
    /// Ask barleased for a lease, and run a command with it
    ///
    /// The command finds the number of the file descriptor in BARLEASE_FD, that of the lease in
    /// BARLEASE_LEASE, and inherits the connection, which the lease lives by. Without a command the
    /// lease is held until a signal comes, and its news are printed.
    Acquire(AcquireArgs),
    /// List the leases of barleased, and the requests in line
    ///
    /// Administrators see all, others their own. MAPS/ATT are mappings in processes and devices
    /// that have it attached. JSON is a list of leases, each with lease (null in line), pool,
    /// device, bar, ranges, size, access, memory_type, lifetime, uid, gid, pid, exe, command, unit,
    /// claim, state, reasons, reason, age_ms, ttl_ms, deadline_ms, mappings, attachments. Further
    /// keys may come.
    List(ListArgs),
    /// Print news of one's own leases of barleased, with the deadlines of those that are reclaimed
    Watch(WatchArgs),
    /// Give a lease of barleased back
    Release {
        /// Its number
        lease: u64,
        #[command(flatten)]
        service: Service,
    },
    /// Have a lease of barleased live longer
    Renew {
        /// Its number
        lease: u64,
        /// From now on, such as 90s, 10m, 2h or 1d; for as long as the policy allows if not given
        #[arg(long, value_name = "TIME", value_parser = names::duration)]
        ttl: Option<Duration>,
        #[command(flatten)]
        service: Service,
    },
    /// List the processes that have leases open or mapped, or devices open
    ///
    /// Processes of others are seen by root only. The id of a lease is the inode number of its
    /// dma-buf.
    Holders {
        /// Only of this lease (its id or name) or device (its address)
        what: Option<String>,
    },
    /// Receive a lease and run a command with it (also: exec)
    ///
    /// The command finds the number of the file descriptor in BARLEASE_FD.
    #[command(alias = "exec")]
    Take {
        /// Socket of `barlease lease grant`
        socket: PathBuf,
        /// The command and its arguments
        #[arg(required = true, last = true)]
        command: Vec<OsString>,
    },
    /// Print the content of a lease
    Dump {
        #[command(flatten)]
        source: SourceArgs,
        /// Only these bytes: OFFSET+LENGTH
        #[arg(long, value_parser = number::range)]
        range: Option<BarRange>,
        /// Width of an access in bytes: devices differ in what they answer to
        #[arg(long, value_enum, default_value = "4")]
        width: Width,
    },
    /// Read a number from a lease, in one access
    Read {
        /// Socket of `barlease lease grant`, or fd:N for an inherited file descriptor
        source: Source,
        /// Offset in the lease in bytes, a multiple of the width
        #[arg(value_parser = number::size)]
        offset: u64,
        /// Width of the access in bytes
        #[arg(long, value_enum, default_value = "4")]
        width: Width,
    },
    /// Write a number to a lease again and again, access by access
    Fill {
        /// Socket of `barlease lease grant`, or fd:N for an inherited file descriptor
        source: Source,
        /// The number
        #[arg(value_parser = number::integer)]
        value: u64,
        /// These bytes: OFFSET+LENGTH, multiples of the width
        #[arg(long, value_parser = number::range)]
        range: BarRange,
        /// Width of an access in bytes
        #[arg(long, value_enum, default_value = "4")]
        width: Width,
    },
    /// Write a number to a lease, in one access
    Write {
        /// Socket of `barlease lease grant`, or fd:N for an inherited file descriptor
        source: Source,
        /// Offset in the lease in bytes, a multiple of the width
        #[arg(value_parser = number::size)]
        offset: u64,
        /// The number
        #[arg(value_parser = number::integer)]
        value: u64,
        /// Width of the access in bytes
        #[arg(long, value_enum, default_value = "4")]
        width: Width,
    },
}

impl Default for LeaseCommand {
    fn default() -> Self {
        Self::Show { bdf: None }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct GrantArgs {
    /// The device
    #[arg(required_unless_present_any = ["file", "lease"])]
    pub(crate) bdf: Option<Bdf>,
    /// The BAR
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..6))]
    #[arg(required_unless_present_any = ["file", "lease"])]
    pub(crate) bar: Option<u32>,
    /// A range of the BAR, OFFSET+LENGTH; more ranges make one lease in this order. Without any,
    /// all of the BAR that can be leased
    #[arg(long, value_name = "OFFSET+LENGTH", value_parser = number::range)]
    pub(crate) range: Vec<BarRange>,
    /// Let holders map it for reading only
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Memory type of mappings
    #[arg(long, value_enum, default_value = "nc")]
    pub(crate) memory_type: MemoryType,
    /// Name, shown by `lease show` and in /proc/PID/maps
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Where holders connect: `barlease lease take PATH`
    #[arg(long, value_name = "PATH", required_unless_present_any = ["file", "lease"])]
    pub(crate) socket: Option<PathBuf>,
    /// Serve processes of this user, by name or number, and let them connect. May be repeated
    #[arg(long, visible_alias = "uid", value_parser = names::user)]
    pub(crate) user: Vec<u32>,
    /// Serve processes of users in this group, and let them connect. May be repeated
    #[arg(long, value_parser = names::group)]
    pub(crate) group: Vec<u32>,
    /// Serve one holder, then no more
    #[arg(long)]
    pub(crate) once: bool,
    /// Revoke it after this time, such as 90s, 10m, 2h or 1d
    #[arg(long, value_name = "TIME", value_parser = names::duration)]
    pub(crate) term: Option<Duration>,
    /// One of several leases: KEY=VALUE,... of device, bar, range, user, group, socket, name, term,
    /// memory-type, vf-token, steering-tag, steering-tag-ext, processing-hint, and the words
    /// read-only and once. Keys that it leaves out are as the other options say. May be repeated
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub(crate) lease: Vec<String>,
    /// Of a virtual function: the token that the owner of its physical function has set. Of a
    /// physical function: the token that its virtual functions need from now on. Others see it in
    /// the list of processes, unless it is in a file
    #[arg(long, value_name = "UUID")]
    pub(crate) vf_token: Option<VfToken>,
    /// Leases from a file of TOML: a table [[lease]] for each, with the keys of --lease. Keys
    /// before the first table are for all of them, as the other options are
    #[arg(long, value_name = "PATH")]
    pub(crate) file: Option<PathBuf>,
    /// Go to the background once everything is granted, and say as which process. A failure before
    /// that is said, and ends the command as without it. Then standard output and error go where
    /// they went if that is a file, else nowhere
    #[arg(long)]
    pub(crate) detach: bool,
    #[command(flatten)]
    pub(crate) tph: TphArgs,
}

/// The steering tags that devices that import the lease put into their writes to it.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Steering tags, for devices that import the lease")]
pub(crate) struct TphArgs {
    /// 8-bit steering tag
    #[arg(long, value_name = "TAG", value_parser = number::integer_of::<u8>)]
    pub(crate) steering_tag: Option<u8>,
    /// 16-bit steering tag, which is not an 8-bit one made longer
    #[arg(long, value_name = "TAG", value_parser = number::integer_of::<u16>)]
    pub(crate) steering_tag_ext: Option<u16>,
    /// Processing hint: 0 bidirectional, 1 requester, 2 target, 3 target with priority
    #[arg(long, value_name = "PH", value_parser = clap::value_parser!(u8).range(0..4))]
    pub(crate) processing_hint: Option<u8>,
}

impl TphArgs {
    /// The tags to set, if any.
    pub(crate) fn tph(&self) -> Option<barlease::Tph> {
        let asked = self.steering_tag.is_some()
            || self.steering_tag_ext.is_some()
            || self.processing_hint.is_some();
        asked.then(|| {
            let mut tph = barlease::Tph::new();
            tph.steering_tag = self.steering_tag;
            tph.steering_tag_ext = self.steering_tag_ext;
            tph.processing_hint = self.processing_hint.unwrap_or_default();
            tph
        })
    }
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub(crate) struct SourceArgs {
    /// Socket of `barlease lease grant`, or fd:N for an inherited file descriptor
    source: Option<Source>,
    /// Inherited file descriptor
    #[arg(long)]
    fd: Option<i32>,
}

impl SourceArgs {
    pub(crate) fn source(self) -> Source {
        match (self.source, self.fd) {
            (Some(source), _) => source,
            // One of them is there: clap asks for it.
            (None, fd) => Source::Fd(fd.unwrap_or(-1)),
        }
    }
}

/// Where a lease comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Socket(PathBuf),
    Fd(i32),
}

impl From<OsString> for Source {
    fn from(text: OsString) -> Self {
        let number = text
            .to_str()
            .and_then(|text| text.strip_prefix("fd:"))
            .and_then(|number| number.parse().ok());
        match number {
            Some(number) => Self::Fd(number),
            None => Self::Socket(text.into()),
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum MemoryType {
    /// Uncached
    Nc,
    /// Write-combining
    Wc,
}

impl From<MemoryType> for barlease::MemoryType {
    fn from(memory_type: MemoryType) -> Self {
        match memory_type {
            MemoryType::Nc => Self::Nc,
            MemoryType::Wc => Self::Wc,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Width {
    #[value(name = "1")]
    One,
    #[value(name = "2")]
    Two,
    #[value(name = "4")]
    Four,
    #[value(name = "8")]
    Eight,
}

impl Width {
    /// Bytes.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::One => 1,
            Self::Two => 2,
            Self::Four => 4,
            Self::Eight => 8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn show_is_the_default_command() {
        for object in ["device", "lease", "claim", "broker"] {
            Args::try_parse_from(["barlease", object]).unwrap();
            Args::try_parse_from(["barlease", object, "show", "-p"]).unwrap();
        }
    }

    #[test]
    fn a_source_is_a_socket_or_a_descriptor() {
        let source = |text: &str| Source::from(OsString::from(text));
        assert_eq!(source("fd:7"), Source::Fd(7));
        assert_eq!(source("/run/x"), Source::Socket("/run/x".into()));
        assert_eq!(source("fd:x"), Source::Socket("fd:x".into()));

        let parse =
            |args: &[&str]| Args::try_parse_from(["barlease", "lease", "dump"].iter().chain(args));
        assert!(parse(&[]).is_err());
        assert!(parse(&["--fd", "3"]).is_ok());
        assert!(parse(&["/run/x"]).is_ok());
        assert!(parse(&["/run/x", "--fd", "3"]).is_err());
    }
}
