//! Mappings of every kind after they were split, moved or inherited: each part of them is what the
//! whole was, and is taken away and given back with it. Run on the machine `device`, whose own
//! device can do all that takes memory away.
#![cfg(barlease_guest)]

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::atomic::{AtomicU32, Ordering},
};

use barlease_abi::{ALIAS_WC, MEMATTR_WC};
use barlease_guest_tests::{
    errno::ENODEV,
    huge_size,
    map::{How, Map, READ, Sigbus},
    observe, page_size,
    probe::{self, MemoryType},
    process::Child,
    race::{Window, meanwhile},
    vfio::{Device, LOW_POWER_ENTRY, LOW_POWER_EXIT, SET},
    wait::until,
};

/// Our own device: BAR0 is memory.
const DEVICE: &str = "mapped";
const BAR: u32 = 0;
fn length() -> u64 {
    2 * huge_size()
}
/// The page that is cut out, in the middle of a 2 MiB entry.
fn cut() -> u64 {
    huge_size() / 2
}
/// Pages that are looked at: the ends, both sides of the cut, both sides of the border of two
/// entries.
fn pages() -> [u64; 6] {
    [
        0,
        cut() - page_size(),
        cut() + page_size(),
        huge_size() - page_size(),
        huge_size(),
        length() - page_size(),
    ]
}

/// A kind of mapping.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Of a lease.
    Lease,
    /// Of a lease, where no entry above a page can be.
    SkewedLease,
    /// Of a lease that is write-combining.
    CombiningLease,
    /// Of a BAR, through the device fd.
    Bar,
    /// Of a BAR, where no entry above a page can be.
    SkewedBar,
    /// Of an alias of a BAR.
    Alias,
}

use Kind::{Alias, Bar, CombiningLease, Lease, SkewedBar, SkewedLease};

impl Kind {
    const ALL: [Self; 6] = [Lease, SkewedLease, CombiningLease, Bar, SkewedBar, Alias];
    const OF_THE_DEVICE_FD: [Self; 3] = [Bar, SkewedBar, Alias];

    fn map(self, device: &Device) -> Map {
        let how = How::shared().align(huge_size());
        let how = match self {
            SkewedLease | SkewedBar => how.skew(page_size()),
            _ => how,
        };
        let region = match self {
            Lease | SkewedLease | CombiningLease => {
                return how.map(self.lease(device), 0, length()).unwrap();
            }
            Bar | SkewedBar => BAR,
            Alias => device.alias(BAR, ALIAS_WC).unwrap(),
        };
        let offset = u64::from(region) << 40;
        how.map(device.as_fd(), offset, length()).unwrap()
    }

    fn lease(self, device: &Device) -> OwnedFd {
        let fd = device.export(BAR, &[(0, length())]).unwrap();
        if matches!(self, CombiningLease) {
            device.memattr(&fd, MEMATTR_WC).unwrap();
        }
        fd
    }

    fn memory_type(self) -> MemoryType {
        match self {
            CombiningLease | Alias => MemoryType::WriteCombining,
            _ => MemoryType::Uncached,
        }
    }
}

/// An operation on a mapping.
#[derive(Clone, Copy, Debug)]
enum Split {
    Unmap,
    Protect,
    Move,
    /// All of it, one after the other.
    All,
}

impl Split {
    const ALL: [Self; 4] = [Self::Unmap, Self::Protect, Self::Move, Self::All];

    fn apply(self, mut map: Map) -> Map {
        if matches!(self, Self::Move | Self::All) {
            // Before it is split: mremap moves one VMA at a time.
            map = map.moved().map_err(|(_, errno)| errno).unwrap();
        }
        if matches!(self, Self::Unmap | Self::All) {
            map.unmap(cut(), page_size());
        }
        if matches!(self, Self::Protect | Self::All) {
            map.protect(huge_size(), page_size(), READ).unwrap();
        }
        map
    }
}

/// A mapping with what was done to it.
struct Part {
    kind: Kind,
    split: Split,
    map: Map,
}

impl Part {
    /// Asserts that each page is there, is the right one, and of the right type.
    fn is_there(&self) {
        for page in pages() {
            let what = format!("{:?} {:?} {page:#x}", self.kind, self.split);
            assert_eq!(self.map.read(page), Ok(tag(page)), "{what}");
            let found = probe::memory_type(&self.map, page);
            assert_eq!(found, Some(self.kind.memory_type()), "{what}");
        }
        if matches!(self.split, Split::Unmap | Split::Move) {
            self.map.write(huge_size(), tag(huge_size())).unwrap();
        }
    }

    /// Asserts that no page is.
    fn is_gone(&self) {
        for page in pages() {
            let what = format!("{:?} {:?} {page:#x}", self.kind, self.split);
            assert_eq!(probe::entry(&self.map, page), None, "{what}");
            assert_eq!(self.map.read(page), Err(Sigbus), "{what}");
        }
    }

    /// Asserts that nothing is left of it in page tables.
    fn has_no_entry(&self) {
        for page in pages() {
            assert_eq!(probe::entry(&self.map, page), None, "{:?}", self.kind);
        }
    }
}

/// The contents of a page.
fn tag(page: u64) -> u32 {
    0x7a60_0000 + (page / page_size()) as u32
}

/// Puts its tag into each page that is looked at.
fn fill(device: &Device) {
    for page in pages() {
        device.write32(BAR, page, tag(page));
    }
}

/// One of each kind with each split. Touched before, so that it has entries to be split, or not.
fn parts(device: &Device, touched: bool) -> Vec<Part> {
    let all = Kind::ALL
        .into_iter()
        .flat_map(|kind| Split::ALL.map(|split| (kind, split)));
    all.map(|(kind, split)| {
        let map = kind.map(device);
        if touched {
            map.touch_all().unwrap();
        }
        let map = split.apply(map);
        Part { kind, split, map }
    })
    .collect()
}

type Event<'a> = Box<dyn Fn() + 'a>;

/// Events that take memory away, and what undoes them.
fn lasting(device: &Device) -> [(Event<'_>, Event<'_>); 3] {
    [
        (
            Box::new(|| device.set_memory(false)),
            Box::new(|| device.set_memory(true)),
        ),
        (
            Box::new(|| device.set_power_state(3)),
            Box::new(|| device.set_power_state(0)),
        ),
        (
            Box::new(|| assert_eq!(device.feature(SET | LOW_POWER_ENTRY, &mut []), Ok(0))),
            Box::new(|| assert_eq!(device.feature(SET | LOW_POWER_EXIT, &mut []), Ok(0))),
        ),
    ]
}

/// Events that are over when they return.
fn passing(device: &Device) -> [Event<'_>; 4] {
    [
        Box::new(|| device.set_command(device.command())),
        Box::new(|| device.reset().unwrap()),
        Box::new(|| device.function().reset().unwrap()),
        Box::new(|| device.hot_reset(&[device.group()]).unwrap()),
    ]
}

#[test]
fn parts_of_every_kind_of_mapping_are_taken_away_and_given_back_by_every_event() {
    let device = Device::open(DEVICE);
    for touched in [false, true] {
        let parts = parts(&device, touched);
        fill(&device);
        parts.iter().for_each(Part::is_there);
        for (take, give) in lasting(&device) {
            take();
            parts.iter().for_each(Part::is_gone);
            give();
            fill(&device);
            parts.iter().for_each(Part::is_there);
        }
        for event in passing(&device) {
            event();
            parts.iter().for_each(Part::has_no_entry);
            fill(&device);
            parts.iter().for_each(Part::is_there);
        }
    }
}

#[test]
fn parts_of_every_kind_of_mapping_are_taken_away_by_system_sleep_and_given_back() {
    let device = Device::open(DEVICE);
    let parts = parts(&device, true);
    fill(&device);
    parts.iter().for_each(Part::is_there);
    if !observe::pretend_to_sleep() {
        return;
    }
    parts.iter().for_each(Part::has_no_entry);
    parts.iter().for_each(Part::is_there);
}

#[test]
fn a_child_has_what_its_parent_has_and_loses_it_with_it() {
    let device = Device::open(DEVICE);
    let parts = parts(&device, true);
    fill(&device);
    let child = Child::start(&[], |link| {
        loop {
            match link.receive() {
                0 => parts.iter().for_each(Part::is_there),
                1 => parts.iter().for_each(Part::is_gone),
                2 => parts.iter().for_each(Part::has_no_entry),
                _ => break,
            }
            link.send(9);
        }
    });
    let ask = |what| {
        child.link.send(what);
        child.link.expect(9);
    };
    ask(0);
    for (take, give) in lasting(&device) {
        take();
        ask(1);
        parts.iter().for_each(Part::is_gone);
        give();
        fill(&device);
        ask(0);
    }
    for event in passing(&device) {
        event();
        ask(2);
        fill(&device);
        ask(0);
    }
    // Without those of its parent.
    drop(parts);
    device.set_memory(false);
    ask(1);
    device.set_memory(true);
    ask(0);
    child.link.send(3);
    child.join();
}

#[test]
fn revocation_reaches_every_part_and_child_of_a_lease_and_nothing_else() {
    let device = Device::open(DEVICE);
    fill(&device);
    let others: Vec<_> = Kind::OF_THE_DEVICE_FD
        .into_iter()
        .map(|kind| Part {
            kind,
            split: Split::All,
            map: Split::All.apply(kind.map(&device)),
        })
        .collect();
    for kind in [Lease, SkewedLease, CombiningLease] {
        let fd = kind.lease(&device);
        let parts = Split::ALL.map(|split| {
            let map = Map::aligned(&fd, length()).unwrap();
            map.touch_all().unwrap();
            Part {
                kind,
                split,
                map: split.apply(map),
            }
        });
        let child = Child::start(&[], |link| {
            parts.iter().for_each(Part::is_there);
            link.send(0);
            link.expect(1);
            parts.iter().for_each(Part::is_gone);
        });
        child.link.expect(0);
        others.iter().for_each(Part::is_there);
        device.revoke(&fd).unwrap();
        parts.iter().for_each(Part::is_gone);
        child.link.send(1);
        child.join();
        // Their entries are still there, from before.
        for other in &others {
            for page in pages() {
                assert!(probe::entry(&other.map, page).is_some(), "{:?}", other.kind);
            }
            other.is_there();
        }
    }
}

#[test]
fn any_part_of_a_mapping_of_the_device_fd_keeps_the_device_open() {
    for kind in Kind::OF_THE_DEVICE_FD {
        for split in Split::ALL {
            let device = Device::open(DEVICE);
            let function = device.function().clone();
            let fd = device.export(BAR, &[(0, page_size())]).unwrap();
            let lease = Map::new(&fd, page_size()).unwrap();
            let mut map = split.apply(kind.map(&device));
            drop(device);
            lease.touch_all().unwrap();
            // All but the last page.
            map.unmap(0, length() - page_size());
            lease.touch_all().unwrap();
            map.write(length() - page_size(), 3).unwrap();
            assert_eq!(
                map.read(length() - page_size()),
                Ok(3),
                "{kind:?} {split:?}"
            );
            drop(map);
            assert_eq!(lease.read(0), Err(Sigbus), "{kind:?} {split:?}");
            assert_eq!(Map::new(&fd, page_size()).map(drop), Err(ENODEV));
            drop((lease, fd));
            observe::wait_for_buffers(&function, 0);
        }
    }
}

/// The two come in any order: when memory is off, no part of a mapping can be touched.
#[test]
fn splits_race_with_memory_that_comes_and_goes() {
    let device = Device::open(DEVICE);
    fill(&device);
    let window = Window::new();
    let tries = AtomicU32::new(0);
    let split = |kind: Kind, worked: &AtomicU32| {
        let map = kind.map(&device);
        let touch = |map: &Map| {
            // An entry that is there stays there until it is taken away.
            for page in [pages(); 4].concat() {
                let read = || match map.read(page) {
                    Ok(value) => {
                        // Not what the bus answers for a device that does not.
                        assert_eq!(value, tag(page));
                        true
                    }
                    Err(Sigbus) => false,
                };
                if window.check(read) {
                    worked.fetch_add(1, Ordering::Relaxed);
                }
                tries.fetch_add(1, Ordering::Relaxed);
            }
        };
        touch(&map);
        for split in Split::ALL {
            let map = split.apply(kind.map(&device));
            touch(&map);
        }
        let map = Split::All.apply(map);
        touch(&map);
    };
    let worked = [const { AtomicU32::new(0) }; 6];
    let loops: Vec<_> = Kind::ALL
        .into_iter()
        .zip(&worked)
        .map(|(kind, worked)| move || split(kind, worked))
        .collect();
    let loops: Vec<_> = loops.iter().map(|it| it as &(dyn Fn() + Sync)).collect();
    meanwhile(&loops, || {
        let mut rounds = 0;
        // On a busy machine the others may come late.
        while rounds < 100 || worked.iter().any(|it| it.load(Ordering::Relaxed) < 20) {
            device.set_memory(false);
            window.shut(|| {
                let before = tries.load(Ordering::Relaxed);
                until("tries", || tries.load(Ordering::Relaxed) > before + 40);
            });
            device.set_memory(true);
            std::thread::yield_now();
            rounds += 1;
        }
    });
    until("the mappings to go", || {
        observe::buffers(device.function()).is_empty()
    });
}
