//! Clients of the daemon: one, 64, and thousands that do nothing.

use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use barlease_bench::report::Goal;
use barlease_bench::report::Measure;
use barlease_bench::report::Unit;
use barlease_bench::rounds::Batch;
use barlease_bench::rounds::Rounds;
use barlease_bench::rounds::Side;
use barlease_bench::rounds::nanoseconds;
use barlease_proto::Access;
use barlease_proto::Acquire;
use barlease_proto::Client;
use rustix::process::Resource;

use crate::daemon::CLEARED;
use crate::daemon::Daemon;
use crate::daemon::PAGE;

const CLIENTS: usize = 64;
const IDLE: usize = 10_000;
/// The baseline of the rate of 64 clients.
const RATE: f64 = 10_000.0;

pub(crate) fn take(quick: bool) -> Vec<Measure> {
    let rounds = if quick { 3 } else { 9 };
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    rustix::process::setrlimit(Resource::Nofile, limit).expect("a limit");
    let [rate, work] = rate(rounds);
    vec![rate, work, idle(rounds), hanging(rounds), clearing(rounds)]
}

fn rows() -> Acquire {
    Acquire::of_pool("rows", PAGE, Access::ReadWrite)
}

/// A lease is asked for, and is here; how long that took. Then it goes back.
fn grant(client: &mut Client) -> f64 {
    let mut lease = None;
    let took = nanoseconds(|| lease = Some(client.acquire(&rows()).expect("a lease")));
    let (acquired, _fd) = lease.expect("a lease");
    client.release(acquired.lease).expect("an answer");
    took
}

/// Grants a second of so many clients, each of which gives its lease back at once.
fn grants(daemon: &Daemon, clients: usize) -> f64 {
    const LONG: Duration = Duration::from_millis(400);
    let granted = AtomicU64::new(0);
    let is_over = AtomicBool::new(false);
    let clients: Vec<_> = (0..clients).map(|_| daemon.client()).collect();
    let mut seconds = 0.0;
    thread::scope(|scope| {
        for client in clients {
            scope.spawn(|| {
                let mut client = client;
                while !is_over.load(Ordering::Relaxed) {
                    grant(&mut client);
                    granted.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let start = Instant::now();
        let before = granted.load(Ordering::Relaxed);
        thread::sleep(LONG);
        let count = granted.load(Ordering::Relaxed) - before;
        seconds = count as f64 / start.elapsed().as_secs_f64();
        is_over.store(true, Ordering::Relaxed);
    });
    seconds
}

/// Grants a second, and the daemon's own part of each: its processor time says what it could do if it had a
/// processor for itself, however busy the machine is.
fn rate(rounds: u32) -> [Measure; 2] {
    let daemon = Daemon::start();
    let mut work = Rounds::new(
        "service-work",
        "Processor time of the service for a grant to one of 64 clients, and for giving it back",
        "100 us: 10,000 a second of one processor",
        Unit::Native,
    );
    let rate = Rounds::new(
        "service-rate",
        "Grants a second of 64 clients, each of which gives its lease back",
        "10,000 a second",
        Unit::Rate,
    )
    .run(rounds, |side, batch| match side {
        Side::Ours => {
            let before = (daemon.busy(), daemon.granted());
            batch.add("grants", None, grants(&daemon, CLIENTS));
            let each = (daemon.busy() - before.0) / (daemon.granted() - before.1);
            for (side, value) in [(Side::Ours, each), (Side::Theirs, 1e9 / RATE)] {
                let mut batch = Batch::default();
                batch.add("grants", None, value);
                work.add(side, &batch);
            }
        }
        Side::Theirs => batch.add("grants", None, RATE),
    })
    .finish(|_, _| Some(Goal::AtLeast(1.0)));
    [rate, work.finish(|_, _| Some(Goal::AtMost(1.0)))]
}

fn idle(rounds: u32) -> Measure {
    let daemon = Daemon::start();
    let crowded = Daemon::start();
    let _idle: Vec<_> = (0..IDLE).map(|_| crowded.idle()).collect();
    // They are taken when this is answered.
    grant(&mut crowded.client());
    beside(
        "service-idle",
        "Grants a second of 64 clients beside 10,000 connections that do nothing",
        "without those",
        Some(Goal::AtLeast(0.9)),
        rounds,
        |side| match side {
            Side::Ours => grants(&crowded, CLIENTS),
            Side::Theirs => grants(&daemon, CLIENTS),
        },
    )
}

fn beside(
    name: &str,
    title: &str,
    baseline: &str,
    goal: Option<Goal>,
    rounds: u32,
    mut grants: impl FnMut(Side) -> f64,
) -> Measure {
    let fill = |side, batch: &mut Batch| batch.add("grants", None, grants(side));
    Rounds::new(name, title, baseline, Unit::Rate)
        .run(rounds, fill)
        .finish(|_, _| goal)
}

fn hanging(rounds: u32) -> Measure {
    let daemon = Daemon::start();
    let mut stuck = Daemon::start();
    let mut holder = stuck.client();
    let (_, fd) = holder.acquire(&rows()).expect("a lease");
    let id = rustix::fs::fstat(fd.as_fd()).expect("its id").st_ino;
    stuck.hold(id, 1);
    drop(holder);
    let mut other = stuck.client();
    while other
        .list(None)
        .expect("a list")
        .first()
        .map(|lease| lease.state)
        != Some(barlease_proto::State::Revoking)
    {
        thread::sleep(Duration::from_millis(2));
    }
    let measure = beside(
        "service-stuck",
        "Grants a second of 64 clients while a revocation waits for an importer",
        "while none does",
        Some(Goal::AtLeast(0.95)),
        rounds,
        |side| match side {
            Side::Ours => grants(&stuck, CLIENTS),
            Side::Theirs => grants(&daemon, CLIENTS),
        },
    );
    stuck.hold(id, 0);
    measure
}

/// A client that asks for 64 MiB again and again, which are cleared each time.
fn clearing(rounds: u32) -> Measure {
    let daemon = Daemon::start();
    let is_over = AtomicBool::new(false);
    let clears = AtomicBool::new(false);
    let mut measure = None;
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut client = daemon.client();
            let large = Acquire::of_pool("cleared", CLEARED / 16 * PAGE, Access::ReadWrite);
            while !is_over.load(Ordering::Relaxed) {
                if !clears.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(1));
                    continue;
                }
                let (acquired, _fd) = client.acquire(&large).expect("a lease");
                client.release(acquired.lease).expect("an answer");
            }
        });
        let rounds = Rounds::new(
            "service-clearing",
            "A grant while another client's 4 MiB are cleared again and again",
            "while nothing is cleared",
            Unit::Native,
        )
        .run(rounds, |side, batch| {
            clears.store(side == Side::Ours, Ordering::Relaxed);
            let mut client = daemon.client();
            for _ in 0..300 {
                batch.add("acquire", None, grant(&mut client));
            }
        });
        is_over.store(true, Ordering::Relaxed);
        measure = Some(rounds.finish(|_, _| None));
    });
    measure.expect("a measure")
}
