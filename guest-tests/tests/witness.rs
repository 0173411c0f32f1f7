//! The device as a witness: its own log says that nothing reached its memory when nothing may. Run
//! on the machine `device`.
//!
//! An access that is made while the device's decoding is off, or not in D0, does not get to the
//! device: the emulator keeps it, and counts it. There must be none of these either.
#![cfg(barlease_guest)]

use std::{
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use barlease_abi::{ALIAS_WC, MEMATTR_WC, REASON_LOW_POWER, REASON_RESET};
use barlease_guest_tests::{
    errno::{EBUSY, ENODEV},
    huge_size,
    importer::{Attachment, Importer},
    lease::State,
    map::{How, Map, Sigbus},
    page_size,
    pci::{BARLEASE, Function},
    race::{Loop, meanwhile, whatever},
    vfio::{COMMAND, Device, LOW_POWER_ENTRY, LOW_POWER_EXIT, SET},
    wait::{A_WHILE, until},
    witness::{self, MARK, Witness},
};
use serde_json::{Value, json};

/// BAR0: memory, every access to which is in the log.
const MEMORY: u32 = 0;
const MEMORY_LEN: u64 = 16 << 20;
/// BAR2: registers.
const REGISTERS: u32 = 2;

/// The device and all ways that a process has to its memory.
struct Setup {
    witness: Witness,
    stray: u64,
    device: Device,
    /// Leases: uncached, and write-combining.
    leases: [OwnedFd; 2],
    /// Mappings: of the leases, of the BAR, of its alias.
    maps: [Map; 4],
}

fn setup() -> Setup {
    let witness = Witness::new("trapped");
    let device = Device::open("trapped");
    let lease = |memattr| {
        let fd = device.export(MEMORY, &[(0, 2 * huge_size())]).unwrap();
        device.memattr(&fd, memattr).unwrap();
        fd
    };
    let leases = [lease(0), lease(MEMATTR_WC)];
    let alias = device.alias(MEMORY, ALIAS_WC).unwrap();
    let how = How::shared().align(huge_size());
    let bar = |region: u32| {
        let offset = u64::from(region) << 40;
        how.map(device.as_fd(), offset, 2 * huge_size()).unwrap()
    };
    let maps = [
        how.map(&leases[0], 0, 2 * huge_size()).unwrap(),
        how.skew(page_size())
            .map(&leases[1], 0, 2 * huge_size())
            .unwrap(),
        bar(MEMORY),
        bar(alias),
    ];
    // Opening resets.
    witness.clear();
    Setup {
        witness,
        stray: stray(witness, device.function()),
        device,
        leases,
        maps,
    }
}

fn stray(witness: Witness, function: &Function) -> u64 {
    let (start, length) = function.bar(MEMORY);
    assert_eq!(length, MEMORY_LEN);
    witness.stray(start, length)
}

/// Writes here and there, whatever comes of it. A read waits until the writes have arrived: without
/// it there would be more and more on their way.
fn scribble(map: &Map, value: u32) {
    for at in [
        0,
        4,
        page_size(),
        7 * page_size(),
        huge_size(),
        2 * huge_size() - page_size(),
    ] {
        let _ = map.write(at, value);
    }
    let _ = map.read(huge_size() + page_size());
}

impl Setup {
    /// Runs `body` while threads write through all mappings, all the time.
    fn while_all_write<R>(&self, body: impl FnOnce() -> R) -> R {
        let [lease, combining, bar, alias] = &self.maps;
        let first = || scribble(lease, 1);
        let second = || scribble(combining, 2);
        let third = || scribble(bar, 3);
        let fourth = || scribble(alias, 4);
        meanwhile(&[&first, &second, &third, &fourth], body)
    }

    /// Waits until so many more accesses have reached the memory.
    fn wait_for_accesses(&self, number: u64) {
        let query = json!({"region": MEMORY});
        let wanted = self.witness.count(&query) + number;
        until("accesses", || self.witness.count(&query) >= wanted);
    }

    /// Asserts that the memory was reached only when it may be, and that it was reached.
    #[track_caller]
    fn assert_never_when_it_must_not(&self) {
        assert!(self.witness.count(&json!({"region": MEMORY})) > 0);
        assert_saw_none(self.witness);
        let stray = stray(self.witness, self.device.function());
        assert_eq!(stray, self.stray, "accesses that the emulator kept");
    }

    /// How often that has happened.
    fn entries(&self, kind: &str) -> u64 {
        self.witness.count(&json!({"kind": kind}))
    }
}

/// Asserts that the device saw no access to its memory in a state in which there must be none.
#[track_caller]
fn assert_saw_none(witness: Witness) {
    for state in [
        json!({"region": MEMORY, "memory": false}),
        json!({"region": MEMORY, "power": 1}),
        json!({"region": MEMORY, "power": 2}),
        json!({"region": MEMORY, "power": 3}),
        json!({"region": MEMORY, "reset": true}),
    ] {
        witness.assert_none(&state);
    }
}

/// Marks a place in the log, in order with the accesses of all threads before and after it.
fn mark(device: &Device) -> u32 {
    static LAST: AtomicU32 = AtomicU32::new(0);
    let value = LAST.fetch_add(1, Ordering::Relaxed) + 1;
    device.write32(REGISTERS, MARK, value);
    value
}

// ---- The witness itself -------------------------------------------------------------------------

#[test]
fn the_witness_sees_every_access_in_order() {
    let Setup {
        witness,
        device,
        maps,
        ..
    } = setup();
    let [lease, _, bar, _] = &maps;
    lease.write(3 * page_size(), 0x1111_2222).unwrap();
    let value = mark(&device);
    bar.write(huge_size() + 8, 0x3333_4444).unwrap();
    assert_eq!(lease.read(huge_size() + 8), Ok(0x3333_4444));
    let place = witness.place_of_mark(value);
    let before = witness.first(&json!({"region": MEMORY, "before": place}));
    assert_eq!(before["offset"], 3 * page_size());
    assert_eq!(before["value"], 0x1111_2222);
    assert_eq!(before["size"], 4);
    assert_eq!(before["op"], "write");
    assert_eq!(before["state"]["memory"], true);
    let after =
        json!({"region": MEMORY, "after": place, "offset": huge_size() + 8, "value": 0x3333_4444});
    assert_eq!(witness.count(&after), 2);
    assert_eq!(witness.count(&json!({"region": MEMORY})), 3);
    // As does what is read through the device fd.
    assert_eq!(device.read32(MEMORY, 3 * page_size()), 0x1111_2222);
    let read = json!({"region": MEMORY, "op": "read", "offset": 3 * page_size()});
    assert_eq!(witness.count(&read), 1);
}

#[test]
fn the_witness_sees_what_the_emulator_keeps_and_what_comes_during_a_reset() {
    /// Device Control of our own device.
    const DEVICE_CONTROL: u64 = 0x58;
    let witness = Witness::new("trapped");
    let function = Function::named("trapped");
    // Nothing of ours takes anything away here.
    function.unbind();
    let open = |path: &Path| File::options().read(true).write(true).open(path).unwrap();
    let config = open(&witness::sysfs(&function, "config"));
    let command = |value: u8| config.write_all_at(&[value, 0], COMMAND).unwrap();
    let map = Map::new(open(&witness::sysfs(&function, "resource0")), page_size()).unwrap();
    let reached = || witness.count(&json!({"region": MEMORY}));
    command(2);
    map.write(0, 5).unwrap();
    assert_eq!(reached(), 1);
    let before = stray(witness, &function);
    command(0);
    map.write(0, 6).unwrap();
    assert_ne!(map.read(0), Ok(5));
    assert_eq!(stray(witness, &function), before + 2);
    assert_eq!(reached(), 1);
    command(2);
    assert_eq!(map.read(0), Ok(5));
    witness.set(&json!({"reset_fails": true}));
    config.write_all_at(&[0x10, 0xa8], DEVICE_CONTROL).unwrap();
    map.write(0, 7).unwrap();
    assert_eq!(witness.count(&json!({"region": MEMORY, "reset": true})), 1);
    witness.set(&json!({"reset_fails": false}));
    command(2);
    assert_eq!(map.read(0), Ok(5));
    command(0);
    function.bind(BARLEASE);
}

// ---- Config space -------------------------------------------------------------------------------

/// A request that a function in reset drops is an error of its port, which the neighbours pay for.
#[test]
fn nobody_asks_a_function_that_is_in_reset() {
    let witness = Witness::new("trapped");
    let device = Device::open("trapped");
    // The kernel lets it be for 100 ms.
    witness.set(&json!({"reset_ms": 90}));
    for method in ["flr", "bus"] {
        witness::set_reset_method(device.function(), method);
        device.set_power_state(3);
        witness.clear();
        let ask = || device.info().map(drop).unwrap();
        meanwhile(&[&ask, &ask], || device.function().reset().unwrap());
        assert_eq!(witness.count(&json!({"kind": "reset_end"})), 1, "{method}");
        witness.assert_none(&json!({"region": 7, "reset": true, "op": "read", "offset": COMMAND}));
        let fd = device.export(MEMORY, &[(0, page_size())]).unwrap();
        assert_eq!(device.state(&fd), State::Ok, "{method}");
    }
    witness::set_reset_method(device.function(), "default");
}

/// A function may have several, and the core takes each for one.
#[test]
fn every_power_management_capability_counts() {
    let device = Device::open("mapped");
    let fd = device.export(MEMORY, &[(0, page_size())]).unwrap();
    let map = Map::new(&fd, page_size()).unwrap();
    let [first, second] = power_management(&device);
    for control in [second, first, second] {
        map.write(0, 0x5afe).unwrap();
        device.set_config(control, &[3]);
        assert_eq!(device.function().power_state(), "D3hot");
        assert_eq!(device.state(&fd), State::Revoked(REASON_LOW_POWER));
        assert_eq!(map.read(0), Err(Sigbus));
        device.set_config(control, &[0]);
        assert_eq!(device.function().power_state(), "D0");
        assert_eq!(device.state(&fd), State::Ok);
        assert_eq!(map.read(0), Ok(0x5afe));
    }
}

/// The offsets of both PMCSR.
fn power_management(device: &Device) -> [u64; 2] {
    let [mut at]: [u8; 1] = device.config(0x34);
    let mut found = Vec::new();
    while at != 0 {
        let [id, next] = device.config(u64::from(at));
        if id == 0x01 {
            found.push(u64::from(at) + 4);
        }
        at = next;
    }
    found.try_into().expect("two of them")
}

// ---- Revocation ---------------------------------------------------------------------------------

#[test]
fn nothing_reaches_the_device_after_a_revocation_has_returned() {
    let witness = Witness::new("trapped");
    let device = Device::open("trapped");
    let offset = 4 * huge_size();
    for round in 0..24 {
        let fd = device.export(MEMORY, &[(offset, huge_size())]).unwrap();
        device.memattr(&fd, round % 2).unwrap();
        let skew = page_size() * u64::from(round / 2 % 2);
        let map = How::shared()
            .align(huge_size())
            .skew(skew)
            .map(&fd, 0, huge_size())
            .unwrap();
        // Another lease of the same range, which stays.
        let other = device.export(MEMORY, &[(offset, huge_size())]).unwrap();
        let other = Map::aligned(&other, huge_size()).unwrap();
        let tries = AtomicU32::new(0);
        let write = || {
            for at in [0, 4, page_size(), huge_size() - page_size()] {
                let _ = map.write(at, 100 + round);
            }
            let _ = map.read(8);
            tries.fetch_add(1, Ordering::Relaxed);
        };
        let stay = || {
            other.write(16, 99).unwrap();
            other.read(16).unwrap();
        };
        let written = |more: &Value| {
            let mut query = json!({"region": MEMORY, "value": 100 + round});
            query
                .as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            query
        };
        meanwhile(&[&write, &write, &write, &stay], || {
            until("a write", || witness.count(&written(&json!({}))) > 0);
            thread::sleep(Duration::from_millis(u64::from(round % 5)));
            device.revoke(&fd).unwrap();
            let place = witness.place_of_mark(mark(&device));
            // All have tried since, and one that may has reached it.
            let before = tries.load(Ordering::Relaxed);
            until("tries", || tries.load(Ordering::Relaxed) > before + 10);
            until("a write after it", || {
                witness.count(&json!({"region": MEMORY, "value": 99, "after": place})) > 0
            });
            witness.assert_none(&written(&json!({"after": place})));
        });
        witness.clear();
    }
}

#[test]
fn no_transfer_of_a_peer_reaches_the_device_after_a_revocation_has_returned() {
    let witness = Witness::new("trapped");
    let device = Device::open("trapped");
    let importer = Importer::open();
    let fd = device
        .export(MEMORY, &[(huge_size(), huge_size())])
        .unwrap();
    let attachment = importer.attach(&fd).unwrap();
    attachment.map().unwrap();
    attachment.write(64, &[0x77; 64]).unwrap();
    let in_place = json!({"region": MEMORY, "op": "write"});
    assert!(witness.count(&in_place) > 0);
    let first = witness.first(&in_place);
    assert_eq!(first["offset"], huge_size() + 64);
    device.revoke(&fd).unwrap();
    let place = witness.place_of_mark(mark(&device));
    // Where it was mapped before.
    attachment.write_stale(64, &[0x88; 64]);
    let _ = attachment.read_stale(64, 64);
    assert!(attachment.write(64, &[0x99; 64]).is_err());
    witness.assert_none(&json!({"region": MEMORY, "after": place}));
}

/// The pattern that a peer writes: four bytes of it.
const PEER: u32 = 0xdada_dada;

/// edu with a mapping of a lease, or where it was, writing all the time.
struct Peer {
    attachment: Attachment,
    tries: AtomicU32,
}

impl Peer {
    fn new(fd: &OwnedFd) -> Self {
        Self {
            attachment: Importer::open().attach(fd).unwrap(),
            tries: AtomicU32::new(0),
        }
    }

    fn write(&self) {
        let bytes = PEER.to_ne_bytes();
        match self.attachment.map() {
            // It may be gone again by now.
            Ok(()) | Err(EBUSY) => drop(self.attachment.write(64, &bytes)),
            Err(_) => self.attachment.write_stale(64, &bytes),
        }
        self.tries.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits until it has tried from beginning to end.
    fn wait_for_a_try(&self) {
        let before = self.tries.load(Ordering::Relaxed);
        until("a try of the peer", || {
            self.tries.load(Ordering::Relaxed) >= before + 2
        });
    }
}

/// Entries of the log that are the peer's.
fn of_the_peer(more: &Value) -> Value {
    let mut query = json!({"region": MEMORY, "op": "write", "value": PEER});
    let members = more.as_object().unwrap().clone();
    query.as_object_mut().unwrap().extend(members);
    query
}

/// Runs `body` with a peer that writes all the time, and has reached the device before and does so
/// again after it.
fn with_peer(body: impl FnOnce(Witness, &Device, &Peer)) {
    let witness = Witness::new("trapped");
    let device = Device::open("trapped");
    // Opening resets.
    witness.clear();
    let before = stray(witness, device.function());
    let fd = device
        .export(MEMORY, &[(huge_size(), huge_size())])
        .unwrap();
    let peer = Peer::new(&fd);
    meanwhile(&[&|| peer.write()], || {
        let arrives = || {
            let place = witness.mark("from here on");
            until("a write of the peer", || {
                witness.count(&of_the_peer(&json!({"after": place}))) > 0
            });
        };
        arrives();
        body(witness, &device, &peer);
        arrives();
    });
    assert_saw_none(witness);
    let kept = stray(witness, device.function());
    assert_eq!(kept, before, "accesses that the emulator kept");
}

/// Asserts that nothing of the peer arrives from now on until `undo` begins, in which time it
/// tries.
fn peer_is_kept_out(witness: Witness, peer: &Peer, undo: impl FnOnce()) {
    // Nothing is on its way any more.
    let _ = witness.count(&json!({}));
    let begin = witness.mark("taken away");
    peer.wait_for_a_try();
    let end = witness.mark("given back");
    undo();
    witness.assert_none(&of_the_peer(&json!({"after": begin, "before": end})));
}

#[test]
fn no_transfer_of_a_busy_peer_reaches_the_device_after_a_revocation_has_returned() {
    let witness = Witness::new("trapped");
    let device = Device::open("trapped");
    for _ in 0..5 {
        let fd = device
            .export(MEMORY, &[(huge_size(), huge_size())])
            .unwrap();
        let peer = Peer::new(&fd);
        witness.clear();
        meanwhile(&[&|| peer.write()], || {
            until("a write of the peer", || {
                witness.count(&of_the_peer(&json!({}))) > 0
            });
            device.revoke(&fd).unwrap();
            peer_is_kept_out(witness, &peer, || {});
        });
    }
}

#[test]
fn no_transfer_of_a_peer_reaches_the_device_while_decoding_is_off() {
    with_peer(|witness, device, peer| {
        for _ in 0..5 {
            device.set_memory(false);
            peer_is_kept_out(witness, peer, || device.set_memory(true));
        }
    });
}

#[test]
fn no_transfer_of_a_peer_reaches_the_device_in_d3hot() {
    with_peer(|witness, device, peer| {
        for _ in 0..3 {
            device.set_power_state(3);
            peer_is_kept_out(witness, peer, || device.set_power_state(0));
        }
    });
}

#[test]
fn no_transfer_of_a_peer_reaches_the_device_in_low_power() {
    with_peer(|witness, device, peer| {
        assert_eq!(device.feature(SET | LOW_POWER_ENTRY, &mut []), Ok(0));
        until("the device to sleep", || {
            device.function().runtime_status() == "suspended"
        });
        peer_is_kept_out(witness, peer, || {
            assert_eq!(device.feature(SET | LOW_POWER_EXIT, &mut []), Ok(0));
        });
    });
}

#[test]
fn no_transfer_of_a_peer_reaches_the_device_during_a_reset() {
    let function = Function::named("trapped");
    let by_sysfs = |method: &'static str| {
        let function = &function;
        move |_: &Device| {
            witness::set_reset_method(function, method);
            function.reset().unwrap();
            witness::set_reset_method(function, "default");
        }
    };
    let (flr, bus) = (by_sysfs("flr"), by_sysfs("bus"));
    let resets: [&dyn Fn(&Device); 4] = [
        &|device| device.reset().unwrap(),
        &|device| device.hot_reset(&[device.group()]).unwrap(),
        &flr,
        &bus,
    ];
    for reset in resets {
        with_peer(|witness, device, peer| {
            witness.set(&json!({"reset_ms": 300}));
            // A transfer takes a tenth of a second.
            let mut tried = 0;
            while tried < 2 {
                let before = peer.tries.load(Ordering::Relaxed);
                reset(device);
                tried += peer.tries.load(Ordering::Relaxed) - before;
            }
            assert!(witness.count(&json!({"kind": "reset_begin"})) > 0);
        });
    }
}

#[test]
fn a_reset_that_does_not_end_keeps_peers_away_until_it_does() {
    with_peer(|witness, device, peer| {
        witness.set(&json!({"reset_fails": true}));
        thread::scope(|scope| {
            let resetting = scope.spawn(|| device.function().reset());
            // Nobody gets at config space meanwhile, so the log is asked as it is: a reset comes
            // behind all writes before it.
            let begun = json!({"query": {"kind": "reset_begin"}});
            until("a reset", || witness.ask(&begun)["count"] != 0);
            let begin = witness.mark("in reset");
            peer.wait_for_a_try();
            let end = witness.mark("given back");
            witness.set(&json!({"reset_fails": false}));
            resetting.join().unwrap().unwrap();
            witness.assert_none(&of_the_peer(&json!({"after": begin, "before": end})));
        });
    });
}

#[test]
fn no_transfer_of_a_peer_reaches_a_device_that_plays_dead_after_a_revocation() {
    let witness = Witness::new("trapped");
    let device = Device::open("trapped");
    let fd = device
        .export(MEMORY, &[(huge_size(), huge_size())])
        .unwrap();
    let peer = Peer::new(&fd);
    meanwhile(&[&|| peer.write()], || {
        until("a write of the peer", || {
            witness.count(&of_the_peer(&json!({}))) > 0
        });
        witness.set(&json!({"dead": true}));
        device.revoke(&fd).unwrap();
        peer_is_kept_out(witness, &peer, || witness.set(&json!({"dead": false})));
        peer_is_kept_out(witness, &peer, || {});
    });
}

// ---- Memory off, low power ----------------------------------------------------------------------

#[test]
fn nothing_reaches_the_device_while_decoding_is_off() {
    let setup = setup();
    setup.while_all_write(|| {
        setup.wait_for_accesses(20);
        for round in 0..30 {
            setup.device.set_memory(false);
            thread::sleep(Duration::from_micros(300 * (round % 5)));
            setup.device.set_memory(true);
            thread::sleep(Duration::from_millis(1));
        }
        setup.wait_for_accesses(20);
    });
    setup.assert_never_when_it_must_not();
}

/// Writes all the time, while the device is now and then in a power state.
fn nothing_reaches_it_in(state: u8) {
    let setup = setup();
    setup.while_all_write(|| {
        for _ in 0..5 {
            setup.wait_for_accesses(10);
            setup.device.set_power_state(state.into());
            assert_eq!(setup.device.power_state(), state);
            thread::sleep(Duration::from_millis(5));
            setup.device.set_power_state(0);
        }
        setup.wait_for_accesses(10);
    });
    let there = json!({"region": 7, "power": state});
    assert!(setup.witness.count(&there) > 0);
    setup.assert_never_when_it_must_not();
}

#[test]
fn nothing_reaches_the_device_in_d3hot() {
    nothing_reaches_it_in(3);
}

#[test]
fn nothing_reaches_the_device_in_d1() {
    nothing_reaches_it_in(1);
}

#[test]
fn nothing_reaches_the_device_in_d2() {
    nothing_reaches_it_in(2);
}

#[test]
fn d1_and_d2_take_away_until_d0() {
    let setup = setup();
    let device = &setup.device;
    let importer = Importer::open();
    let attachment = importer.attach(&setup.leases[0]).unwrap();
    let is = |power: u8, expected: State| {
        assert_eq!(device.power_state(), power);
        for lease in &setup.leases {
            assert_eq!(device.state(lease), expected);
        }
        for map in &setup.maps {
            match expected {
                State::Ok => assert_eq!(map.read(page_size()), Ok(7)),
                _ => assert_eq!(map.read(page_size()), Err(Sigbus)),
            }
        }
        match expected {
            State::Ok => attachment.map().unwrap(),
            _ => {
                assert!(!attachment.is_mapped());
                assert_eq!(attachment.map(), Err(ENODEV));
            }
        }
    };
    let low_power = State::Revoked(REASON_LOW_POWER);
    setup.maps[0].write(page_size(), 7).unwrap();
    for state in [1, 2] {
        is(0, State::Ok);
        device.set_power_state(state.into());
        is(state, low_power);
        // A buffer that is exported now is born REVOKED.
        let fd = device
            .export(MEMORY, &[(page_size(), page_size())])
            .unwrap();
        assert_eq!(device.state(&fd), low_power);
        let map = Map::new(&fd, page_size()).unwrap();
        assert_eq!(map.read(0), Err(Sigbus));
        // Memory decoding has nothing to do with it.
        device.set_memory(false);
        device.set_memory(true);
        is(state, low_power);
        device.set_power_state(0);
        assert_eq!(map.read(0), Ok(7));
    }
    is(0, State::Ok);
    assert_eq!(attachment.status().interruptions, 2);
    // From a state the way is to a deeper one, or to D0 (PCI PM 1.2, 5.1).
    for (asked, state) in [(1, 1), (2, 2), (1, 2), (3, 3), (2, 3)] {
        device.set_power_state(asked);
        is(state, low_power);
    }
    device.set_power_state(0);
    is(0, State::Ok);
}

#[test]
fn a_reset_in_d1_wakes_the_device() {
    for state in [1, 2] {
        let setup = setup();
        setup.device.set_power_state(state);
        setup.device.reset().unwrap();
        assert_eq!(setup.device.power_state(), 0);
        assert_eq!(setup.device.state(&setup.leases[0]), State::Ok);
        for map in &setup.maps {
            map.read(0).unwrap();
        }
    }
}

#[test]
fn nothing_reaches_the_device_in_low_power() {
    let setup = setup();
    setup.while_all_write(|| {
        for _ in 0..3 {
            setup.wait_for_accesses(10);
            assert_eq!(setup.device.feature(SET | LOW_POWER_ENTRY, &mut []), Ok(0));
            until("the device to sleep", || {
                setup.device.function().runtime_status() == "suspended"
            });
            thread::sleep(Duration::from_millis(5));
            assert_eq!(setup.device.feature(SET | LOW_POWER_EXIT, &mut []), Ok(0));
        }
        setup.wait_for_accesses(10);
    });
    assert!(setup.witness.count(&json!({"region": 7, "power": 3})) > 0);
    setup.assert_never_when_it_must_not();
}

// ---- Resets -------------------------------------------------------------------------------------

/// Runs a reset that takes the device a while, with threads that write all the time.
fn during(reset: impl Fn(&Device), by: &str) {
    let setup = setup();
    setup.witness.set(&json!({"reset_ms": 250}));
    setup.while_all_write(|| {
        for _ in 0..2 {
            setup.wait_for_accesses(10);
            reset(&setup.device);
        }
        setup.wait_for_accesses(10);
    });
    let begun = setup.witness.first(&json!({"kind": "reset_begin"}));
    assert_eq!(begun["by"], by);
    assert!(setup.entries("reset_begin") >= 2);
    assert_eq!(setup.entries("reset_begin"), setup.entries("reset_end"));
    setup.assert_never_when_it_must_not();
    assert_eq!(setup.device.state(&setup.leases[0]), State::Ok);
}

#[test]
fn nothing_reaches_the_device_during_a_reset_by_ioctl() {
    during(|device| device.reset().unwrap(), "function");
}

#[test]
fn nothing_reaches_the_device_during_a_function_level_reset_through_config_space() {
    during(
        |device| {
            let at = device.capability(0x10).unwrap() + 8;
            let control = u16::from_le_bytes(device.config(at));
            device.set_config(at, &(control | 0x8000).to_le_bytes());
        },
        "function",
    );
}

#[test]
fn nothing_reaches_the_device_during_a_function_level_reset_through_sysfs() {
    witness::set_reset_method(&Function::named("trapped"), "flr");
    during(|device| device.function().reset().unwrap(), "function");
    witness::set_reset_method(&Function::named("trapped"), "default");
}

#[test]
fn nothing_reaches_the_device_during_a_bus_reset_through_sysfs() {
    witness::set_reset_method(&Function::named("trapped"), "bus");
    during(|device| device.function().reset().unwrap(), "bus");
    witness::set_reset_method(&Function::named("trapped"), "default");
}

#[test]
fn nothing_reaches_the_device_during_a_hot_reset() {
    during(|device| device.hot_reset(&[device.group()]).unwrap(), "bus");
}

#[test]
fn a_reset_that_does_not_end_keeps_everything_away_until_it_does() {
    let setup = setup();
    setup.witness.set(&json!({"reset_fails": true}));
    setup.while_all_write(|| {
        setup.wait_for_accesses(10);
        thread::scope(|scope| {
            let resetting = scope.spawn(|| setup.device.function().reset());
            // Importers of the memory are told, without waiting for the device.
            for lease in &setup.leases {
                until("word of the reset", || {
                    matches!(setup.device.state(lease), State::Revoked(reasons) if reasons & REASON_RESET != 0)
                });
            }
            thread::sleep(A_WHILE);
            assert!(!resetting.is_finished());
            for map in &setup.maps {
                assert_eq!(map.read(0), Err(Sigbus));
            }
            // A lease can be revoked for good, meanwhile.
            setup.device.revoke(&setup.leases[1]).unwrap();
            setup.witness.set(&json!({"reset_fails": false}));
            resetting.join().unwrap().unwrap();
        });
        setup.wait_for_accesses(10);
    });
    assert_eq!(setup.maps[1].read(0), Err(Sigbus));
    setup.assert_never_when_it_must_not();
}

// ---- The end ------------------------------------------------------------------------------------

/// Gives up the device while threads write through leases of it.
fn after(give_up: impl Fn(&Function)) {
    let witness = Witness::new("trapped");
    let device = Device::open("trapped");
    let function = device.function().clone();
    let before = stray(witness, &function);
    let maps = [0, MEMATTR_WC].map(|memattr| {
        let fd = device.export(MEMORY, &[(0, 2 * huge_size())]).unwrap();
        device.memattr(&fd, memattr).unwrap();
        Map::aligned(&fd, 2 * huge_size()).unwrap()
    });
    let [first, second] = &maps;
    let (first, second) = (|| scribble(first, 1), || scribble(second, 2));
    meanwhile(&[&first, &second, &first], || {
        until("accesses", || {
            witness.count(&json!({"region": MEMORY})) > 20
        });
        drop(device);
        give_up(&function);
        // Behind all that is still on its way.
        let before = witness.count(&json!({"region": MEMORY}));
        thread::sleep(Duration::from_millis(100));
        assert_eq!(witness.count(&json!({"region": MEMORY})), before);
    });
    assert_saw_none(witness);
    assert_eq!(
        stray(witness, &function),
        before,
        "accesses that the emulator kept"
    );
    for map in &maps {
        assert_eq!(map.read(0), Err(Sigbus));
    }
}

#[test]
fn nothing_reaches_the_device_after_close() {
    after(|_| {});
}

#[test]
fn nothing_reaches_the_device_after_it_was_unbound() {
    after(Function::unbind);
}

#[test]
fn nothing_reaches_the_device_after_it_was_opened_again() {
    after(|function| drop(Device::open_with("trapped", &function.driver().unwrap())));
}

#[test]
fn a_device_that_is_gone_without_a_word_gives_up_its_leases() {
    let setup = setup();
    setup.while_all_write(|| {
        setup.wait_for_accesses(10);
        // Reads as ones from here on, config space too.
        setup.witness.set(&json!({"dead": true}));
        thread::sleep(Duration::from_millis(20));
        assert_eq!(setup.device.read32(MEMORY, 0), u32::MAX);
        setup.device.revoke(&setup.leases[0]).unwrap();
        assert_eq!(setup.maps[0].read(0), Err(Sigbus));
    });
    assert_eq!(setup.device.state(&setup.leases[0]), State::Dead);
    let Setup {
        witness,
        device,
        maps: [_, combining, bar, alias],
        ..
    } = setup;
    // These keep it open.
    drop([bar, alias]);
    thread::scope(|scope| {
        // The kernel resets it, and waits a minute for an answer.
        scope.spawn(|| drop(device));
        // Nobody waits for that to lose what was leased.
        until("the end of the lease", || combining.read(0) == Err(Sigbus));
        witness.set(&json!({"dead": false}));
    });
    let function = Function::named("trapped");
    function.unbind();
    function.bind(BARLEASE);
    let device = Device::open("trapped");
    let fd = device.export(MEMORY, &[(0, page_size())]).unwrap();
    Map::new(&fd, page_size()).unwrap().read(0).unwrap();
}

// ---- All at once --------------------------------------------------------------------------------

/// Runs `loops` at once for some seconds, with threads that write, and with leases that come and
/// go.
fn at_once(setup: &Setup, loops: &[Loop<'_>]) {
    setup.witness.set(&json!({"reset_ms": 20}));
    let device = &setup.device;
    setup.while_all_write(|| {
        setup.wait_for_accesses(10);
        meanwhile(loops, || {
            let end = Instant::now() + Duration::from_secs(4);
            while Instant::now() < end {
                let fd = device.export(MEMORY, &[(0, page_size())]).unwrap();
                let map = Map::new(&fd, page_size()).unwrap();
                let _ = map.write(0, 5);
                device.revoke(&fd).unwrap();
                assert_eq!(map.write(0, 6), Err(Sigbus));
            }
        });
        // Either thread may have been the last: the device is on.
        device.set_power_state(3);
        device.set_power_state(0);
        device.set_memory(true);
        setup.wait_for_accesses(10);
    });
    let revoked = json!({"region": MEMORY, "value": 6});
    setup.witness.assert_none(&revoked);
}

fn toggle_memory(device: &Device) {
    device.set_memory(false);
    device.set_memory(true);
}

fn sleep_and_wake(device: &Device) {
    for state in [3, 1, 2] {
        device.set_power_state(state);
        device.set_power_state(0);
    }
}

#[test]
fn nothing_reaches_the_device_when_resets_and_memory_off_race() {
    let setup = setup();
    let device = &setup.device;
    let toggle = || toggle_memory(device);
    let reset = || whatever(device.reset());
    let sysfs = || whatever(device.function().reset());
    at_once(&setup, &[&toggle, &reset, &sysfs]);
    setup.assert_never_when_it_must_not();
}

#[test]
fn nothing_reaches_the_device_when_resets_memory_off_and_d3hot_race() {
    let setup = setup();
    let device = &setup.device;
    let toggle = || toggle_memory(device);
    let reset = || whatever(device.reset());
    let sleep = || sleep_and_wake(device);
    at_once(&setup, &[&toggle, &reset, &sleep]);
    setup.assert_never_when_it_must_not();
}

#[test]
fn nothing_reaches_the_device_when_resets_through_sysfs_and_d3hot_race() {
    let setup = setup();
    let device = &setup.device;
    let sysfs = || whatever(device.function().reset());
    let sleep = || sleep_and_wake(device);
    at_once(&setup, &[&sysfs, &sleep, &sleep]);
    // The kernel does not keep the one out while it does the other: a function-level reset may find
    // the device in D3hot. The device is in D0 then, but the emulator has seen no write that says
    // so, and keeps accesses that are right. So here only the device itself is asked.
    assert_saw_none(setup.witness);
}
