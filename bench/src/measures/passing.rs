//! A lease on its way: made, sent to another process, mapped and touched there.
//!
//! With the library, against bare system calls that do the same, and against a memfd on the same
//! way, which has nothing to do with a device.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use barlease::{Bdf, Lease};
use barlease_guest_tests::PAGE;
use barlease_guest_tests::map::Map;
use barlease_guest_tests::pci::Function;
use barlease_guest_tests::process::{Child, Link};
use rustix::fs::{MemfdFlags, memfd_create};

use super::export::Payload;
use super::{BAR, Context, MEMORY, open};
use crate::report::{Goal, Measure, Unit};
use crate::rounds::{Batch, Rounds, Side};

/// To the child: another one comes.
const ANOTHER: u64 = 1;

pub(super) fn take(context: &Context) -> Vec<Measure> {
    let measure = Rounds::new(
        "passing",
        "A lease is made, sent, mapped and touched in another process",
        "bare calls: ioctl, SCM_RIGHTS, mmap",
        Unit::Nanoseconds,
    )
    .run(context.rounds(21), |side, batch| match side {
        Side::Ours => {
            with_library(batch, "a lease");
            with_library(batch, "a lease, against a memfd");
        }
        Side::Theirs => {
            let device = open(MEMORY, Side::Ours);
            let payload = Payload::new(1);
            bare(batch, "a lease", || payload.export(&device));
            bare(batch, "a lease, against a memfd", || {
                let memory = memfd_create("bench", MemfdFlags::CLOEXEC).expect("a memfd");
                File::from(memory.try_clone().expect("an fd"))
                    .set_len(PAGE)
                    .expect("its size");
                memory
            });
        }
    })
    .finish(|curve, _| (curve == "a lease").then_some(Goal::AtMost(1.15)));
    vec![measure]
}

const SAMPLES: u32 = 9;
const CALLS: u32 = 10;

fn with_library(batch: &mut Batch, curve: &str) {
    Function::named(MEMORY).bind(super::driver(Side::Ours));
    let bdf: Bdf = Function::named(MEMORY).bdf.parse().expect("an address");
    let device = barlease::Device::open(bdf).expect("the device");
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let _child = Child::start(&[theirs.as_fd()], |_| {
        loop {
            let lease = Lease::receive(&theirs).expect("a lease");
            let mapping = lease.map().expect("a mapping");
            let _: u32 = mapping.read(0).expect("memory");
            (&theirs).write_all(&[1]).expect("a listener");
        }
    });
    batch.time(curve, None, SAMPLES, CALLS, || {
        let lease = device.export(BAR).range(0..PAGE).writable().export();
        lease.expect("a lease").send(&ours).expect("sent");
        (&ours).read_exact(&mut [0]).expect("an answer");
    });
}

fn bare(batch: &mut Batch, curve: &str, make: impl Fn() -> OwnedFd) {
    let child = Child::start(&[], |link: &Link| {
        loop {
            let fd = link.receive_fd();
            let map = Map::new(&fd, PAGE).expect("a mapping");
            map.read(0).expect("memory");
            link.send(ANOTHER);
        }
    });
    batch.time(curve, None, SAMPLES, CALLS, || {
        child.link.send_fd(make());
        child.link.expect(ANOTHER);
    });
}
