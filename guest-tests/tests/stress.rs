//! Everything at once: whoever wins a race, nobody gets at what is not theirs any more.
#![cfg(barlease_guest)]

use std::{
    cell::Cell,
    os::fd::{AsFd, OwnedFd},
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use barlease_guest_tests::{
    errno::{EAGAIN, EBADFD, ENODEV},
    huge_size,
    lease::State,
    map::{How, Map, Sigbus},
    observe, page_size,
    pci::{BARLEASE, Function},
    process::{self, Child, Link},
    race::{self, Window},
    vfio::{Device, Group, LOW_POWER_ENTRY, LOW_POWER_EXIT, SET},
    wait,
};

/// The frame buffer of the display: 64 MiB.
const FRAME_BUFFER: u32 = 0;
/// Length of the lease that is fought over, at the beginning of it.
fn length() -> u64 {
    2 * huge_size()
}

fn pages() -> u64 {
    length() / page_size()
}
/// The pattern that the grantor fills it with.
const PATTERN: u32 = 0x600d_600d;
/// The pattern that holders write.
const MARK: u32 = 0x0bad_0000;

fn display() -> Device {
    Device::open("display")
}

fn for_a_while(milliseconds: u64, mut body: impl FnMut()) {
    let end = Instant::now() + Duration::from_millis(milliseconds);
    while Instant::now() < end {
        body();
    }
}

// ---- Revocation against holders that do not let go ----------------------------------------------

/// Numbers without a pattern that a page fault could follow.
struct Dice(u64);

impl Dice {
    fn page(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % pages()
    }
}

/// The work of one thread of a holder until it gets SIGBUS.
type Attack = fn(&OwnedFd, &Map, &mut Dice) -> Result<(), Sigbus>;

/// Writes to the mapping of its process.
fn writes(_: &OwnedFd, map: &Map, dice: &mut Dice) -> Result<(), Sigbus> {
    for _ in 0..64 {
        let page = dice.page();
        map.write(page * page_size(), MARK | page as u32)?;
    }
    Ok(())
}

/// Maps anew each time, so that each write faults.
fn maps_and_writes(fd: &OwnedFd, _: &Map, dice: &mut Dice) -> Result<(), Sigbus> {
    match How::shared().map(fd, 0, length()) {
        Ok(map) => writes(fd, &map, dice),
        Err(errno) => {
            assert_eq!(errno, ENODEV);
            Err(Sigbus)
        }
    }
}

/// Moves its mapping about.
fn moves_and_writes(fd: &OwnedFd, _: &Map, dice: &mut Dice) -> Result<(), Sigbus> {
    let Ok(mut map) = Map::new(fd, length()) else {
        return Err(Sigbus);
    };
    for _ in 0..4 {
        map.write(dice.page() * page_size(), MARK)?;
        map = match map.moved() {
            Ok(map) | Err((map, _)) => map,
        };
        map.write(dice.page() * page_size(), MARK)?;
    }
    Ok(())
}

/// Splits its mapping and changes its protection.
fn splits_and_writes(fd: &OwnedFd, _: &Map, dice: &mut Dice) -> Result<(), Sigbus> {
    let Ok(mut map) = Map::aligned(fd, length()) else {
        return Err(Sigbus);
    };
    map.write(0, MARK)?;
    map.unmap(dice.page() % 256 * page_size() + page_size(), page_size());
    map.write(length() - page_size(), MARK)?;
    let _ = map.protect(huge_size(), page_size(), libc::PROT_NONE);
    map.write(0, MARK)
}

/// Leaves the writing to children that it forks.
fn forks_and_writes(_: &OwnedFd, map: &Map, dice: &mut Dice) -> Result<(), Sigbus> {
    // So that there are entries to copy.
    writes(
        &OwnedFd::from(std::fs::File::open("/dev/null").unwrap()),
        map,
        dice,
    )?;
    let page = dice.page();
    // Long enough for what the fork copied to be missed by who takes it away.
    let write = |step| {
        map.write((page + step) % pages() * page_size(), MARK)
            .is_ok()
    };
    if process::in_fork(|| (0..5000).all(write)) {
        Ok(())
    } else {
        Err(Sigbus)
    }
}

/// The messages between a holder and the grantor.
mod say {
    pub(crate) const END: u64 = 0;
    pub(crate) const TAKE: u64 = 1;
    pub(crate) const ATTACKING: u64 = 2;
    pub(crate) const GONE: u64 = 3;
    pub(crate) const SEEN_GONE: u64 = 4;
}

/// A holder: one thread an attack, on each buffer that it is sent.
///
/// They go on while it is taken away, and then some more: from the moment on at which the grantor's
/// call has returned, each attempt ends in SIGBUS.
fn hold(link: &Link, skew: u64, attacks: &[Attack]) {
    while link.receive() == say::TAKE {
        let fd = link.receive_fd();
        let map = How::shared()
            .align(huge_size())
            .skew(skew)
            .map(&fd, 0, length())
            .unwrap();
        let begun = AtomicU32::new(0);
        let gone = AtomicBool::new(false);
        thread::scope(|scope| {
            for (number, attack) in attacks.iter().enumerate() {
                let (fd, map, begun, gone) = (&fd, &map, &begun, &gone);
                scope.spawn(move || {
                    let mut dice = Dice(number as u64);
                    attack(fd, map, &mut dice).unwrap();
                    begun.fetch_add(1, Ordering::Relaxed);
                    let mut refused = 0;
                    while refused < 30 {
                        let is_gone = gone.load(Ordering::SeqCst);
                        let answer = attack(fd, map, &mut dice);
                        if is_gone {
                            assert_eq!(answer, Err(Sigbus));
                            refused += 1;
                        }
                    }
                });
            }
            while begun.load(Ordering::Relaxed) < attacks.len() as u32 {
                thread::yield_now();
            }
            link.send(say::ATTACKING);
            link.expect(say::GONE);
            gone.store(true, Ordering::SeqCst);
        });
        link.send(say::SEEN_GONE);
    }
}

/// Gives a buffer to holders, takes it back by `take`, fills the range, and checks that it stays as
/// it was filled.
fn nobody_writes_after(holders: &[Child], rounds: u64, take: impl Fn(Device, &OwnedFd) -> Device) {
    let mut device = display();
    for round in 0..rounds {
        let fd = device.export(FRAME_BUFFER, &[(0, length())]).unwrap();
        for holder in holders {
            holder.link.send(say::TAKE);
            holder.link.send_fd(&fd);
        }
        let all = || holders.iter().map(|holder| &holder.link);
        all().for_each(|link| link.expect(say::ATTACKING));
        thread::sleep(Duration::from_millis(3 + 7 * (round % 3)));

        device = take(device, &fd);
        all().for_each(|link| link.send(say::GONE));
        let own = device.export(FRAME_BUFFER, &[(0, length())]).unwrap();
        let own = Map::aligned(&own, length()).unwrap();
        for page in 0..pages() {
            own.write(page * page_size(), PATTERN).unwrap();
        }
        for_a_while(15, || {
            for page in 0..pages() {
                let seen = own.read(page * page_size());
                assert_eq!(seen, Ok(PATTERN), "round {round}, page {page}");
            }
        });
        all().for_each(|link| link.expect(say::SEEN_GONE));
    }
    for holder in holders {
        holder.link.send(say::END);
    }
}

fn revoke(device: Device, fd: &OwnedFd) -> Device {
    device.revoke(fd).unwrap();
    assert_eq!(device.revoke(fd), Err(EBADFD));
    device
}

#[test]
fn nobody_writes_after_revoke_returns() {
    // Eight threads in three processes.
    let holders = [
        Child::start(&[], |link| {
            hold(link, 0, &[writes, writes, maps_and_writes])
        }),
        Child::start(&[], |link| {
            hold(link, page_size(), &[writes, writes, splits_and_writes])
        }),
        Child::start(&[], |link| {
            hold(link, 0, &[maps_and_writes, moves_and_writes])
        }),
    ];
    nobody_writes_after(&holders, 10, revoke);
    holders.into_iter().for_each(Child::join);
}

#[test]
fn nobody_writes_after_revoke_returns_while_holders_fork() {
    let holders = [
        Child::start(&[], |link| hold(link, 0, &[forks_and_writes, writes])),
        Child::start(&[], |link| {
            hold(link, page_size(), &[forks_and_writes, writes])
        }),
    ];
    nobody_writes_after(&holders, 6, revoke);
    holders.into_iter().for_each(Child::join);
}

#[test]
fn nobody_writes_after_close_returns() {
    let function = Function::named("display");
    function.bind(BARLEASE);
    let holders = [
        Child::start(&[], |link| hold(link, 0, &[writes, maps_and_writes])),
        Child::start(&[], |link| {
            hold(link, page_size(), &[writes, moves_and_writes])
        }),
    ];
    nobody_writes_after(&holders, 6, |device, _| {
        drop(device);
        display()
    });
    holders.into_iter().for_each(Child::join);
}

#[test]
fn a_neighbour_goes_on_undisturbed_while_others_are_revoked() {
    let device = display();
    let neighbour = device
        .export(FRAME_BUFFER, &[(length(), length())])
        .unwrap();
    let map = Map::aligned(&neighbour, length()).unwrap();
    map.touch_all().unwrap();
    let faults = AtomicU32::new(0);
    let touch = || {
        let taken = observe::faults_of(|| map.touch_all().unwrap());
        faults.fetch_add(taken as u32, Ordering::Relaxed);
    };
    touch();
    faults.store(0, Ordering::Relaxed);
    race::meanwhile(&[&touch], || {
        for_a_while(300, || {
            let fd = device.export(FRAME_BUFFER, &[(0, 2 * length())]).unwrap();
            let map = Map::new(&fd, length()).unwrap();
            map.write(0, 1).unwrap();
            device.revoke(&fd).unwrap();
            assert_eq!(map.read(0), Err(Sigbus));
        });
    });
    // The thread's own stack and code may fault once.
    assert!(faults.into_inner() <= 2);
}

/// Pages that lie apart, so that each has a fault of its own.
const APART: u64 = 64;

/// Exports pages that lie apart, lets threads fault them in, takes the buffer away in the middle of
/// it, and looks for entries that are still there. An entry that a fault puts in too late stays for
/// good, so there is no moment to be missed.
fn no_fault_slips_through(milliseconds: u64, take: impl Fn(&Device, &OwnedFd)) {
    let device = display();
    let ranges: Vec<_> = (0..APART)
        .map(|page| (2 * page * page_size(), page_size()))
        .collect();
    let mut rounds = 0;
    let end = Instant::now() + Duration::from_millis(milliseconds);
    while rounds < 20 || Instant::now() < end {
        let fd = device.export(FRAME_BUFFER, &ranges).unwrap();
        let map = Map::new(&fd, APART * page_size()).unwrap();
        let begun = AtomicBool::new(false);
        thread::scope(|scope| {
            for thread in 0..2 {
                let (map, begun) = (&map, &begun);
                scope.spawn(move || {
                    begun.store(true, Ordering::SeqCst);
                    (0..APART).all(|page| map.read((page ^ thread) * page_size()).is_ok())
                });
            }
            while !begun.load(Ordering::SeqCst) {
                std::hint::spin_loop();
            }
            for _ in 0..rounds % 50 * 20 {
                std::hint::spin_loop();
            }
            take(&device, &fd);
            for page in 0..APART {
                let seen = map.read(page * page_size());
                assert_eq!(seen, Err(Sigbus), "round {rounds}, page {page}");
            }
        });
        // Not too late either: what came in while the threads ended.
        for page in 0..APART {
            assert_eq!(
                map.read(page * page_size()),
                Err(Sigbus),
                "round {rounds}, page {page}"
            );
        }
        rounds += 1;
        device.set_memory(true);
    }
}

#[test]
fn no_fault_slips_through_a_revocation() {
    no_fault_slips_through(3000, |device, fd| device.revoke(fd).unwrap());
}

#[test]
fn no_fault_slips_through_when_memory_is_turned_off() {
    no_fault_slips_through(1000, |device, _| device.set_memory(false));
}

// ---- Many at once -------------------------------------------------------------------------------

#[test]
fn many_leases_are_revoked_at_once_and_each_once() {
    let device = display();
    let leases: Vec<_> = (0..200)
        .map(|number| {
            let fd = device
                .export(FRAME_BUFFER, &[(number * page_size(), 4 * page_size())])
                .unwrap();
            let map = Map::new(&fd, 4 * page_size()).unwrap();
            map.touch_all().unwrap();
            (fd, map)
        })
        .collect();
    let first = AtomicU32::new(0);
    thread::scope(|scope| {
        for worker in 0..4 {
            let (device, leases, first) = (&device, &leases, &first);
            scope.spawn(move || {
                // Each revokes all of them, from another side.
                for step in 0..leases.len() {
                    let (fd, map) = &leases[(step + worker * 50) % leases.len()];
                    match device.revoke(fd) {
                        Ok(()) => drop(first.fetch_add(1, Ordering::Relaxed)),
                        Err(errno) => assert_eq!(errno, EBADFD),
                    }
                    assert_eq!(map.read(0), Err(Sigbus));
                    assert_eq!(device.state(fd), State::Dead);
                }
            });
        }
    });
    assert_eq!(first.into_inner(), 200);
}

#[test]
fn exports_and_closes_race_with_everything_that_walks_over_buffers() {
    let device = display();
    let export = || {
        let fd = device
            .export(
                FRAME_BUFFER,
                &[(0, page_size()), (huge_size(), huge_size())],
            )
            .unwrap();
        let map = Map::new(&fd, page_size()).unwrap();
        let _ = map.read(0);
        drop(fd);
        let _ = map.read(0);
    };
    let path = || {
        let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
        let path = barlease_guest_tests::lease::path_descriptor(fd.as_fd());
        drop(fd);
        drop(path);
    };
    let look = || race::whatever(observe::buffers_text(device.function()));
    race::meanwhile(&[&export, &path, &look], || {
        for_a_while(1000, || {
            device.set_memory(false);
            device.set_memory(true);
        });
    });
    observe::wait_for_buffers(device.function(), 0);
}

// ---- Events against holders ---------------------------------------------------------------------

/// Reads what the device has there. A read that comes through while memory is off reaches nothing
/// and gives something else; then it does not matter whether the call had returned.
fn reads_magic(map: &Map, offset: u64) -> bool {
    match map.read(offset) {
        Ok(seen) => {
            assert_eq!(seen, MAGIC, "a touch reached a device that does not answer");
            true
        }
        Err(Sigbus) => false,
    }
}

const MAGIC: u32 = 0x3a61_c000;

#[test]
fn nobody_touches_while_memory_is_off() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, length())]).unwrap();
    let maps = [
        Map::aligned(&fd, length()).unwrap(),
        How::shared()
            .align(huge_size())
            .skew(page_size())
            .map(&fd, 0, length())
            .unwrap(),
        Map::aligned(&device, length()).unwrap(),
    ];
    for page in 0..pages() {
        maps[0].write(page * page_size(), MAGIC).unwrap();
    }
    let window = Window::new();
    let worked = AtomicU32::new(0);
    let touch = |map: &Map| {
        for page in (0..pages()).step_by(37) {
            if window.check(|| reads_magic(map, page * page_size())) {
                worked.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    let [one, two, three] = &maps;
    let anew = || {
        if let Ok(map) = Map::new(&fd, length()) {
            window.check(|| reads_magic(&map, 0));
        }
    };
    race::meanwhile(
        &[&|| touch(one), &|| touch(two), &|| touch(three), &anew],
        || {
            for _ in 0..30 {
                device.set_memory(false);
                window.shut(thread::yield_now);
                device.set_memory(true);
                thread::yield_now();
            }
            wait::until("a touch", || worked.load(Ordering::Relaxed) > 0);
        },
    );
    for map in &maps {
        map.touch_all().unwrap();
    }
    assert_eq!(device.state(&fd), State::Ok);
}

#[test]
fn nobody_touches_in_low_power() {
    let device = Device::open("nvme");
    device.write32(0, 0x50, 1);
    let fd = device.export(2, &[(0, length())]).unwrap();
    let map = Map::aligned(&fd, length()).unwrap();
    map.write(page_size(), MAGIC).unwrap();
    let window = Window::new();
    let touch = || race::whatever(window.check(|| reads_magic(&map, page_size())));
    race::meanwhile(&[&touch, &touch], || {
        for_a_while(800, || {
            device.feature(SET | LOW_POWER_ENTRY, &mut []).unwrap();
            window.shut(|| thread::sleep(Duration::from_millis(3)));
            device.feature(SET | LOW_POWER_EXIT, &mut []).unwrap();
            map.read(0).unwrap();
            device.set_power_state(3);
            window.shut(thread::yield_now);
            device.set_power_state(0);
            map.read(0).unwrap();
        });
    });
}

#[test]
fn resets_race_with_command_writes_revocations_and_exports() {
    let device = Device::open("memory");
    let fd = device.export(2, &[(0, length())]).unwrap();
    let map = Map::new(&fd, length()).unwrap();
    map.write(page_size(), MAGIC).unwrap();
    let touch = || race::whatever(reads_magic(&map, page_size()));
    let command = || {
        // While a reset is on, a write may be refused or lost: what counts is that it does no harm.
        let _ = device.write(7, 4, &[4]);
        let _ = device.write(7, 4, &[6]);
    };
    let sysfs = || race::whatever(device.function().reset());
    let lease = || {
        let fd = device.export(2, &[(0, huge_size())]).unwrap();
        let map = Map::new(&fd, huge_size()).unwrap();
        let _ = map.read(0);
        device.revoke(&fd).unwrap();
        assert_eq!(map.read(0), Err(Sigbus));
    };
    race::meanwhile(&[&touch, &command, &sysfs, &lease], || {
        for_a_while(1200, || race::whatever(device.reset()));
    });
    device.set_memory(true);
    assert_eq!(device.state(&fd), State::Ok);
    map.touch_all().unwrap();
}

#[test]
fn resets_race_with_open_and_close() {
    let function = Function::named("memory");
    function.bind(BARLEASE);
    let sysfs = || race::whatever(function.reset());
    let opened = Cell::new(0);
    race::meanwhile(&[&sysfs], || {
        let open = || {
            let device = match Group::open(&function).device(&function) {
                Ok(device) => device,
                // Opening resets too, and does not wait for its turn.
                Err(errno) => return assert_eq!(errno, EAGAIN),
            };
            let fd = device.export(2, &[(0, length())]).unwrap();
            let map = Map::new(&fd, length()).unwrap();
            let _ = map.read(0);
            drop(device);
            assert_eq!(map.read(0), Err(Sigbus));
            opened.set(opened.get() + 1);
        };
        for_a_while(1500, open);
        wait::until("an open between two resets", || {
            open();
            opened.get() > 0
        });
    });
    let device = Device::open("memory");
    let fd = device.export(2, &[(0, page_size())]).unwrap();
    Map::new(&fd, page_size()).unwrap().read(0).unwrap();
}

#[test]
fn hot_resets_race_with_closes_of_the_other_function() {
    let functions = ["pair0", "pair1"].map(Function::named);
    functions
        .iter()
        .for_each(|function| function.bind(BARLEASE));
    let group = Group::open(&functions[0]);
    let device = group.device(&functions[0]).unwrap();
    let fd = device.export(2, &[(0, page_size())]).unwrap();
    let map = Map::new(&fd, page_size()).unwrap();
    let other = || {
        // Opening takes the same lock as a reset: it may be refused.
        if let Ok(other) = group.device(&functions[1]) {
            let fd = other.export(2, &[(0, page_size())]).unwrap();
            let map = Map::new(&fd, page_size()).unwrap();
            let _ = map.read(0);
        }
    };
    race::meanwhile(&[&other], || {
        for_a_while(1500, || race::whatever(device.hot_reset(&[&group])));
    });
    assert_eq!(device.state(&fd), State::Ok);
    map.read(0).unwrap();
}

#[test]
fn a_toucher_that_never_stops_holds_nobody_up() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, length())]).unwrap();
    let maps: Vec<_> = (0..4).map(|_| Map::new(&fd, length()).unwrap()).collect();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for map in &maps {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let _ = map.touch_all();
                }
            });
        }
        for _ in 0..50 {
            wait::at_once("memory off and on", || {
                device.set_memory(false);
                device.set_memory(true);
            });
        }
        stop.store(true, Ordering::Relaxed);
    });
}
