//! Page faults of leases while another lease is being revoked.
//!
//! Tenants are processes of their own that map a lease of 512 single pages, touch each, and unmap
//! it, again and again. Beside them the owner revokes other leases, or is at work without the
//! kernel (the baseline, so that both leave the tenants the same share of the processors). Then an
//! importer sits on a lease that is being revoked.
//!
//! Where instructions are counted, processors take turns and each has its share of them, whatever
//! else the machine does.

use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use barlease_guest_tests::PAGE;
use barlease_guest_tests::importer::Importer;
use barlease_guest_tests::map::Map;
use barlease_guest_tests::process::Child;
use barlease_guest_tests::vfio::Device;

use super::export::Payload;
use super::{Context, MEMORY, open, pin};
use crate::report::{Goal, Measure, Unit};
use crate::rounds::{Batch, Rounds, Side};

/// Pages of a tenant's lease, each a range of its own: one fault each.
const PAGES: u64 = 512;

pub(super) fn take(context: &Context) -> Vec<Measure> {
    let device = open(MEMORY, Side::Ours);
    let tenants = [0, 1].map(|processor| Tenant::start(&device, processor));
    let slice = Duration::from_millis(250);
    let mut stalls = Rounds::new(
        "throughput-stall",
        "The longest that a tenant waited for a page",
        "no revocation going on",
        Unit::Nanoseconds,
    );
    let mut round = 0;
    let mut rates = Rounds::new(
        "throughput",
        "Page faults of tenants while another lease is revoked",
        "no revocation going on",
        Unit::Rate,
    )
    .run(context.rounds(11), |side, batch| {
        let mut waits = Batch::default();
        for (curve, tenants) in [
            ("one tenant, revocations in a loop", &tenants[..1]),
            ("two tenants, revocations in a loop", &tenants[..]),
        ] {
            // The owner has the second processor, alone or with a tenant.
            let sample = Tenant::together(tenants, slice, |end| {
                pin(1);
                match side {
                    Side::Ours => revoke_until(&device, end),
                    Side::Theirs => work_until(end),
                }
            });
            batch.add(curve, None, sample.rate);
            waits.add(curve, None, sample.longest);
        }
        if round >= 2 {
            stalls.add(side, &waits);
        }
        round += 1;
    });

    let curve = "two tenants, an importer sits on a lease";
    let sit = Duration::from_secs(if context.quick { 3 } else { 10 });
    let slices = (sit.as_millis() / slice.as_millis()) as usize - 2;
    let mut samples = |side: Side, count: usize| {
        for _ in 0..count {
            let sample = Tenant::together(&tenants, slice, |_| ());
            let mut batch = Batch::default();
            batch.add(curve, None, sample.rate);
            rates.add(side, &batch);
            let mut waits = Batch::default();
            waits.add(curve, None, sample.longest);
            stalls.add(side, &waits);
        }
    };
    samples(Side::Theirs, slices / 2);
    sits_on_a_lease(&device, sit, || samples(Side::Ours, slices));
    samples(Side::Theirs, slices - slices / 2);

    let rates = rates.finish(|_, _| Some(Goal::AtLeast(0.95)));
    vec![rates, stalls.finish(|_, _| None)]
}

/// Runs `meanwhile` while the device waits in a revocation for an importer, for a time of `sit` in
/// all.
fn sits_on_a_lease(device: &Device, sit: Duration, meanwhile: impl FnOnce()) {
    let importer = Importer::open();
    let lease = Payload::new(1).export(device);
    let attachment = importer.attach(&lease).expect("an attachment");
    attachment.map().expect("a mapping");
    attachment.hold(true);
    let start = Instant::now();
    thread::scope(|scope| {
        let revocation = scope.spawn(|| {
            device.revoke(&lease).expect("a revocation");
            Instant::now()
        });
        attachment.wait_for_interruption();
        meanwhile();
        thread::sleep(sit.saturating_sub(start.elapsed()));
        assert!(!revocation.is_finished());
        let ended = Instant::now();
        attachment.unmap().expect("the end of a mapping");
        let returned = revocation.join().expect("a revocation");
        assert!(returned > ended);
    });
}

fn revoke_until(device: &Device, end: Instant) {
    let payload = Payload::new(1);
    while Instant::now() < end {
        let lease = payload.export(device);
        let map = Map::new(&lease, PAGE).expect("a mapping");
        map.read(0).expect("memory");
        device.revoke(&lease).expect("a revocation");
    }
}

/// Without a `pause`: where processors take turns that would give the turn to the tenant.
fn work_until(end: Instant) {
    while Instant::now() < end {
        for number in 0..1000 {
            std::hint::black_box(number);
        }
    }
}

/// A process that holds a lease.
struct Tenant(Child);

/// How tenants did.
struct Sample {
    /// Faults a second, of all.
    rate: f64,
    /// The longest that one of them waited for a page, in nanoseconds.
    longest: f64,
}

impl Tenant {
    fn start(device: &Device, processor: usize) -> Self {
        let lease = Payload::new(PAGES).export(device);
        Self(Child::start(&[lease.as_fd()], |link| {
            pin(processor);
            loop {
                let end = Instant::now() + Duration::from_nanos(link.receive());
                let (mut faults, mut longest) = (0, 0);
                while Instant::now() < end {
                    let map = Map::new(&lease, PAGES * PAGE).expect("a mapping");
                    let mut before = Instant::now();
                    for page in 0..PAGES {
                        map.read(page * PAGE).expect("memory");
                        let now = Instant::now();
                        longest = longest.max((now - before).as_nanos() as u64);
                        before = now;
                        faults += 1;
                        if now >= end {
                            break;
                        }
                    }
                }
                link.send(faults);
                link.send(longest);
            }
        }))
    }

    /// Lets tenants touch pages for a time, with `beside` in a thread that has that end.
    fn together(tenants: &[Self], time: Duration, beside: impl FnOnce(Instant) + Send) -> Sample {
        for tenant in tenants {
            tenant.0.link.send(time.as_nanos() as u64);
        }
        let end = Instant::now() + time;
        thread::scope(|scope| {
            scope.spawn(|| beside(end));
            let (mut faults, mut longest) = (0, 0);
            for tenant in tenants {
                faults += tenant.0.link.receive();
                longest = longest.max(tenant.0.link.receive());
            }
            Sample {
                rate: faults as f64 / time.as_secs_f64(),
                longest: longest as f64,
            }
        })
    }
}
