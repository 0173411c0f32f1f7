//! The service: a lease from a daemon, against one that is made and sent by bare calls; the end of
//! a client with many; what many leases take.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use barlease_guest_tests::map::Map;
use barlease_guest_tests::page_size;
use barlease_guest_tests::pci::Function;
use barlease_guest_tests::process::{Child, End, Link};
use barlease_guest_tests::vfio::Device;
use barlease_proto::{Access, Acquire, Client, Devices, Lifetime};
use barleased::keep::Keeper;
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal, getrlimit, setrlimit};

use super::export::Payload;
use super::{BAR, Context, MEMORY, driver, open};
use crate::report::{Goal, Measure, Unit};
use crate::rounds::{Batch, Rounds, Side, nanoseconds};
use crate::statistics::median;

const BIG: &str = super::BIG;
/// This program is the daemon.
pub const DAEMON: &str = "daemon";
/// Its own signal, to end.
const SIGTERM: i32 = 15;
/// To the owner: a lease is wanted.
const WANTED: u64 = 1;
/// Leases of a client that dies.
const DYING: u64 = 1000;
/// Leases that are there at once, and the bytes of the daemon that each may take, and all of them.
const FEW: u64 = 1000;
const MANY: u64 = 100_000;
const EACH: f64 = 400.0;
const ALL: f64 = 50.0 * (1 << 20) as f64;
const DESCRIPTORS: f64 = 64.0;

pub(super) fn take(context: &Context) -> Vec<Measure> {
    let mut measures = grants(context);
    measures.push(death(context));
    measures.extend(many(context));
    measures
}

/// The resources of this machine that a daemon has.
#[derive(Clone, Copy)]
struct Kept {
    /// Bytes of its own, and all that are resident.
    own: f64,
    whole: f64,
    descriptors: f64,
}

/// A daemon that has a device; it ends with this.
struct Daemon {
    directory: PathBuf,
    child: Child,
}

/// The files that the daemon is started with.
type Arguments = [PathBuf; 4];

impl Daemon {
    fn start(device: &str) -> Self {
        Self::of(device, |arguments, _| {
            let words = [PathBuf::from("barleased")].into_iter().chain(arguments);
            barleased::run(words, &barleased::device::open);
        })
    }

    /// One that is started again at once when it is killed. It is another program then, as it is
    /// for systemd.
    fn kept(device: &str) -> Self {
        Self::of(device, |arguments, directory| {
            let make = || -> io::Result<Command> {
                let mut command = Command::new(std::env::current_exe()?);
                command.arg(DAEMON).args(&arguments).arg("--kept");
                Ok(command)
            };
            let mut keeper = Keeper::new(directory, Box::new(make)).expect("a parent");
            keeper.pause = (Duration::ZERO, Duration::ZERO);
            keeper.run().expect("a daemon");
        })
    }

    fn of(device: &str, run: impl FnOnce(Arguments, &Path)) -> Self {
        let function = Function::named(device);
        function.bind(driver(Side::Ours));
        let directory = PathBuf::from("/tmp/barleased");
        let policy = directory.join("policy");
        fs::create_dir_all(&policy).expect("a directory");
        let text = format!(
            "[device.card]\nmatch = \"{}\"\n\
             [pool.rows]\ndevice = \"card\"\nbar = {BAR}\nunit = \"4K\"\ncontents = \"memory\"\n\
             [[allow]]\npools = [\"rows\"]\nwho = {{ user = \"*\" }}\naccess = \"read-write\"\n\
             lifetime = [\"connection\", \"holders\"]\nqueue = \"1m\"\n",
            function.bdf
        );
        fs::write(policy.join("a.toml"), text).expect("a policy");
        let arguments = [
            "--policy".into(),
            policy,
            "--socket".into(),
            directory.clone(),
        ];
        let log = directory.with_extension("log");
        let child = Child::start(&[], |_| {
            // A line for each lease would cost more than the lease, on the guest's serial port.
            let log = File::create(log).expect("a file");
            rustix::stdio::dup2_stderr(log).expect("standard error");
            run(arguments, &directory);
        });
        let daemon = Self { directory, child };
        while daemon.try_client().is_none() {
            thread::sleep(Duration::from_millis(5));
        }
        daemon
    }

    fn try_client(&self) -> Option<Client> {
        Client::connect(self.directory.join("leases.sock")).ok()
    }

    fn client(&self) -> Client {
        self.try_client().expect("a daemon that serves")
    }

    /// The process that serves: the child of one that keeps it.
    fn process(&self) -> Pid {
        let parent = self.child.id();
        let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"));
        let children = children.expect("its child");
        let pid = children
            .split_whitespace()
            .next()
            .and_then(|pid| pid.parse().ok());
        Pid::from_raw(pid.expect("its child")).expect("a process")
    }

    fn kept_in_memory(&self) -> Kept {
        let pid = self.process().as_raw_nonzero();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
        let bytes = |line: &str| {
            let line = status.lines().find_map(|text| text.strip_prefix(line));
            let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
            kib.expect("a number") * 1024.0
        };
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors");
        Kept {
            own: bytes("RssAnon:"),
            whole: bytes("VmRSS:"),
            descriptors: descriptors.count() as f64,
        }
    }

    /// Has it end as it does where nothing else keeps its device.
    fn ends(mut self) {
        self.child.signal(SIGTERM);
        assert_eq!(self.child.wait(), End::Code(0));
    }

    /// Kills the daemon, and tells how long it is until its successor has answered.
    fn killed(&self) -> f64 {
        let process =
            rustix::process::pidfd_open(self.process(), PidfdFlags::empty()).expect("a process");
        let start = Instant::now();
        rustix::process::pidfd_send_signal(&process, Signal::KILL).expect("a process");
        let mut poll = [PollFd::new(&process, PollFlags::IN)];
        rustix::event::poll(&mut poll, None).expect("its end");
        // The socket is there all the time.
        self.client().call(&Devices {}).expect("an answer");
        start.elapsed().as_nanos() as f64
    }
}

fn rows() -> Acquire {
    Acquire::of_pool("rows", page_size(), Access::ReadWrite)
}

/// One that ends when nobody has it.
fn lasting() -> Acquire {
    Acquire {
        lifetime: Some(Lifetime::Holders),
        ..rows()
    }
}

/// How many leases are asked for in a turn.
const ASKED: usize = 300;

fn grants(context: &Context) -> Vec<Measure> {
    let mut tail = Vec::new();
    let middle = Rounds::new(
        "service",
        "A lease of the service, from the call to the descriptor",
        "export, and a bare exchange with SCM_RIGHTS",
        Unit::Nanoseconds,
    )
    .run(context.rounds(15), |side, batch| match side {
        Side::Ours => {
            let daemon = Daemon::start(MEMORY);
            let mut client = daemon.client();
            let mut took: Vec<f64> = (0..ASKED)
                .map(|_| {
                    let mut lease = None;
                    let took =
                        nanoseconds(|| lease = Some(client.acquire(&rows()).expect("a lease")));
                    let (acquired, _fd) = lease.expect("a lease");
                    client.release(acquired.lease).expect("an answer");
                    took
                })
                .collect();
            took.drain(..ASKED / 10);
            for time in &took {
                batch.add("acquire", None, *time);
            }
            took.sort_by(f64::total_cmp);
            tail.push((took[took.len() * 99 / 100], median(&took).unwrap_or(0.0)));
        }
        Side::Theirs => bare(batch),
    })
    .finish(|_, _| Some(Goal::AtMost(2.0)));
    let mut rounds = Rounds::new(
        "service-tail",
        "The slowest of a hundred leases of the service",
        "the median",
        Unit::Nanoseconds,
    );
    for (slow, middle) in tail.into_iter().skip(1) {
        for (side, value) in [(Side::Ours, slow), (Side::Theirs, middle)] {
            let mut batch = Batch::default();
            batch.add("acquire, 99 of 100", None, value);
            rounds.add(side, &batch);
        }
    }
    vec![middle, rounds.finish(|_, _| Some(Goal::AtMost(5.0)))]
}

/// A process that has the device exports what it is asked for.
fn bare(batch: &mut Batch) {
    let owner = Child::start(&[], |link: &Link| {
        let device = open(MEMORY, Side::Ours);
        let payload = Payload::new(1);
        loop {
            link.expect(WANTED);
            link.send_fd(payload.export(&device));
        }
    });
    let get = || {
        owner.link.send(WANTED);
        owner.link.receive_fd()
    };
    for _ in 0..ASKED / 10 {
        drop(get());
    }
    for _ in 0..ASKED {
        let mut fd = None;
        batch.add("acquire", None, nanoseconds(|| fd = Some(get())));
    }
}

/// The bare side of a death: leases, and their revocation one after the other.
fn revoke_all(device: &Device) -> f64 {
    let payload = Payload::new(1);
    let leases: Vec<OwnedFd> = (0..DYING).map(|_| payload.export(device)).collect();
    nanoseconds(|| {
        for lease in &leases {
            device.revoke(lease).expect("revoked");
        }
    })
}

fn death(context: &Context) -> Measure {
    Rounds::new(
        "service-death",
        "A client with 1,000 leases goes, until others have all of them",
        "1,000 bare REVOKEs",
        Unit::Nanoseconds,
    )
    .run(context.rounds(9), |side, batch| match side {
        Side::Ours => {
            let daemon = Daemon::start(MEMORY);
            let mut client = daemon.client();
            let mut leases = Vec::new();
            for _ in 0..DYING {
                leases.push(client.acquire(&rows()).expect("a lease"));
            }
            // The first lease is the last to be revoked: whoever waits for its range has it then.
            let first = leases[0].0.ranges.clone();
            let wanted = Acquire {
                wait: Some(60_000),
                ..Acquire::of_ranges("card", BAR as u8, first, Access::Read)
            };
            let mut other = daemon.client();
            // A call first: it is known when the other side has answered.
            assert!(
                other
                    .acquire(&Acquire {
                        wait: None,
                        ..wanted.clone()
                    })
                    .is_err()
            );
            let start = Instant::now();
            drop(client);
            other.acquire(&wanted).expect("its range");
            batch.add("until the last", None, start.elapsed().as_nanos() as f64);
            drop(leases);
            batch.add("until the first", None, until_the_first(&daemon));
        }
        Side::Theirs => {
            let device = open(MEMORY, Side::Ours);
            batch.add("until the last", None, revoke_all(&device));
            // The most that it may take.
            batch.add("until the first", None, 10e6);
        }
    })
    .finish(|curve, _| match curve {
        "until the first" => Some(Goal::AtMost(1.0)),
        _ => Some(Goal::AtMost(1.3)),
    })
}

/// The time from the end of a client with many leases to the first that is gone.
fn until_the_first(daemon: &Daemon) -> f64 {
    let mut client = daemon.client();
    let mut leases = Vec::new();
    for _ in 0..DYING {
        leases.push(client.acquire(&rows()).expect("a lease").1);
    }
    // The newest is the first.
    let map = Map::new(leases.last().expect("a lease"), page_size()).expect("a mapping");
    map.read(0).expect("memory");
    let start = Instant::now();
    drop(client);
    while map.read(0).is_ok() {
        thread::sleep(Duration::from_micros(100));
    }
    start.elapsed().as_nanos() as f64
}

/// Makes room for so many descriptors, and gives back what there was.
fn make_room(count: u64) -> Rlimit {
    let limit = getrlimit(Resource::Nofile);
    let most = Some(count + 1000);
    let more = Rlimit {
        current: most,
        maximum: most,
    };
    setrlimit(Resource::Nofile, more).expect("root may");
    limit
}

/// Many leases at once, whose descriptors are with this process: what the daemon keeps of them, and
/// how long its restart takes.
fn many(context: &Context) -> Vec<Measure> {
    let most = if context.quick { MANY / 20 } else { MANY };
    let limit = make_room(most);
    let daemon = Daemon::kept(BIG);
    let mut client = daemon.client();
    let mut leases = Vec::new();
    let mut restart = Rounds::new(
        "service-restart",
        "A kill of the service, until its successor has answered",
        "150 ms with 1,000 leases, 1.5 s with 100,000",
        Unit::Nanoseconds,
    )
    .axis("leases");
    let mut kept = Vec::new();
    for (count, goal) in [(FEW, 150e6), (most, 1.5e9 * most as f64 / MANY as f64)] {
        while (leases.len() as u64) < count {
            leases.push(client.acquire(&lasting()).expect("a lease").1);
        }
        kept.push(daemon.kept_in_memory());
        for _ in 0..context.rounds(7) {
            for (side, value) in [(Side::Ours, daemon.killed()), (Side::Theirs, goal)] {
                let mut batch = Batch::default();
                batch.add("killed", count, value);
                restart.add(side, &batch);
            }
            client = daemon.client();
            let listed = client.list(None).expect("a list").len();
            assert_eq!(listed, leases.len(), "no lease is lost");
        }
        kept.push(daemon.kept_in_memory());
    }
    drop(leases);
    daemon.ends();
    setrlimit(Resource::Nofile, limit).expect("less than there was");
    let restart = restart.finish(|_, _| Some(Goal::AtMost(1.0)));
    let [_, few, many, restarted] = kept[..] else {
        unreachable!("two times two");
    };
    let each = |then: &Kept| (then.own - few.own) / (most - FEW) as f64;
    let one = |name: &str, title: &str, unit, values: [f64; 2], goal: f64| {
        let mut rounds = Rounds::new(name, title, "the most that it may be", unit);
        let curves = [
            format!("{most} leases"),
            "the same after a restart".to_owned(),
        ];
        for (curve, value) in curves.iter().zip(values) {
            for (side, value) in [(Side::Ours, value), (Side::Theirs, goal)] {
                let mut batch = Batch::default();
                batch.add(curve, None, value);
                rounds.add(side, &batch);
            }
        }
        rounds.finish(|_, _| Some(Goal::AtMost(1.0)))
    };
    vec![
        one(
            "service-lease",
            "Memory of the service for a lease",
            Unit::Bytes,
            [each(&many), each(&restarted)],
            EACH,
        ),
        one(
            "service-memory",
            "Memory of the service, all that is resident",
            Unit::Bytes,
            [many.whole, restarted.whole],
            ALL,
        ),
        one(
            "service-descriptors",
            "Descriptors of the service, beside one connection",
            Unit::Count,
            [many.descriptors - 1.0, restarted.descriptors - 1.0],
            DESCRIPTORS,
        ),
        restart,
    ]
}
