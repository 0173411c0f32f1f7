//! Answers and news of the service.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Instant;

use barlease_proto::Client;
use barlease_proto::DeviceInfo;
use barlease_proto::Devices;
use barlease_proto::LeaseInfo;
use barlease_proto::List;
use barlease_proto::RecordKind;
use barlease_proto::Waiter;

use crate::failure::Failure;
use crate::service;
use crate::service::holder::Program;
use crate::service::holder::program;

/// The service at one time.
#[derive(Clone, Debug, Default)]
pub(super) struct View {
    pub(super) devices: Vec<DeviceInfo>,
    pub(super) leases: Vec<(LeaseInfo, Program)>,
    pub(super) waiters: Vec<(Waiter, Program)>,
    pub(super) rates: Rates,
    /// Milliseconds since boot.
    pub(super) now: u64,
    /// Why it is not of now.
    pub(super) trouble: Option<String>,
}

/// A second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rates {
    pub(super) grants: f64,
    pub(super) ends: f64,
    pub(super) refusals: f64,
}

/// How often each came, counted as it comes.
#[derive(Debug, Default)]
struct Counts([AtomicU64; 3]);

impl Counts {
    fn read(&self) -> [u64; 3] {
        self.0.each_ref().map(|count| count.load(Ordering::Relaxed))
    }
}

/// A connection for questions, and one for what happens.
struct Connected {
    client: Client,
    counts: Arc<Counts>,
    last: ([u64; 3], Instant),
}

/// The service, which may go and come.
pub(super) struct Source {
    socket: PathBuf,
    connected: Option<Connected>,
}

impl Source {
    pub(super) fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            connected: None,
        }
    }

    pub(super) fn ask(&mut self) -> Result<View, Failure> {
        let mut connected = match self.connected.take() {
            Some(connected) => connected,
            None => self.connect()?,
        };
        let view = connected.ask()?;
        self.connected = Some(connected);
        Ok(view)
    }

    fn connect(&self) -> Result<Connected, Failure> {
        let client = service::connect(&self.socket)?;
        let records = service::connect(&self.socket)?
            .monitor()
            .map_err(|error| service::failed("monitor", "leases", error))?;
        let counts = Arc::new(Counts::default());
        let seen = counts.clone();
        thread::spawn(move || {
            for record in records.map_while(Result::ok) {
                let count = match record.kind {
                    RecordKind::Granted => 0,
                    RecordKind::Ended => 1,
                    RecordKind::Refused => 2,
                    _ => continue,
                };
                if let Some(count) = seen.0.get(count) {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Ok(Connected {
            client,
            counts,
            last: ([0; 3], Instant::now()),
        })
    }
}

impl Connected {
    fn ask(&mut self) -> Result<View, Failure> {
        let failed = |error| service::failed("top", "leases", error);
        let devices = self.client.call(&Devices {}).map_err(failed)?.devices;
        let list = List {
            pool: None,
            usage: None,
        };
        let now = service::now();
        let mut view = View {
            devices,
            now,
            ..View::default()
        };
        for listed in self.client.stream(&list).map_err(failed)? {
            let listed = listed.map_err(failed)?;
            if let Some(lease) = listed.lease {
                view.leases.push((lease, Program::default()));
            }
            if let Some(waiter) = listed.waiter {
                let program = program(&waiter.holder, now);
                view.waiters.push((waiter, program));
            }
        }
        // One look at a process, however many leases it has.
        let mut last = None;
        for (lease, known) in &mut view.leases {
            let key = (lease.holder.pid, lease.holder.uid);
            *known = match last.take() {
                Some((same, program)) if same == key => program,
                _ => program(&lease.holder, lease.since),
            };
            last = Some((key, known.clone()));
        }
        view.rates = self.rates();
        Ok(view)
    }

    fn rates(&mut self) -> Rates {
        let (before, at) = self.last;
        let (counts, now) = (self.counts.read(), Instant::now());
        self.last = (counts, now);
        let seconds = now.duration_since(at).as_secs_f64().max(1e-3);
        let rate = |kind: usize| {
            let of = |counts: [u64; 3]| counts.get(kind).copied().unwrap_or(0);
            of(counts).saturating_sub(of(before)) as f64 / seconds
        };
        Rates {
            grants: rate(0),
            ends: rate(1),
            refusals: rate(2),
        }
    }
}
