//! Entries of 1 GiB: they are there where they can be, and are gone in all processes before the
//! kernel cuts, moves or copies a mapping that has one.
//!
//! The kernel oopses or complains where one is left, and such a log fails the run; on the debug
//! kernel it checks more.
#![cfg(barlease_guest)]

use std::{
    fs,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Barrier,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use barlease_abi::MEMATTR_WC;
use barlease_guest_tests::{
    huge_size,
    map::{How, Map, READ, READ_WRITE, Sigbus, read_unprotected_at, shared_words},
    observe, page_size,
    probe::{self, MemoryType},
    process::{self, Child, End},
    race::{Loop, meanwhile, whatever},
    vfio::Device,
};

/// A BAR of 4 GiB.
const BAR: u32 = 2;
const GIB: u64 = 1 << 30;
const LENGTH: u64 = 3 * GIB;

/// `None`, with a word about it, where there are no such entries.
fn big() -> Option<Device> {
    if !observe::has_entries_of_1_gib() {
        eprintln!("this kernel or CPU has no entries of 1 GiB");
        return None;
    }
    let device = Device::open("big");
    for at in marks() {
        device.write32(BAR, at, tag(at));
    }
    Some(device)
}

/// Places that are looked at: the ends and the middle of each GiB, and beside the cuts.
fn marks() -> impl Iterator<Item = u64> + Clone {
    let inside = [
        0,
        4 * page_size(),
        6 * page_size(),
        2 * huge_size() - page_size(),
        2 * huge_size(),
        3 * huge_size(),
        GIB / 2,
        GIB - page_size(),
    ];
    (0..LENGTH)
        .step_by(GIB as usize)
        .flat_map(move |gib| inside.map(|at| gib + at))
}

/// The contents of a place.
fn tag(at: u64) -> u32 {
    0x6b00_0000 + (at / page_size()) as u32
}

/// How memory is mapped.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Lease,
    Bar,
}

impl Kind {
    const ALL: [Self; 2] = [Self::Lease, Self::Bar];

    /// Something that nobody has mapped yet: entries of 1 GiB are possible in it.
    fn fresh(self, device: &Device) -> Target<'_> {
        match self {
            Self::Lease => Target::Lease(device.export(BAR, &[(0, LENGTH)]).unwrap()),
            // That of the last mapping goes with it.
            Self::Bar => Target::Bar(device),
        }
    }
}

enum Target<'a> {
    Lease(OwnedFd),
    Bar(&'a Device),
}

impl Target<'_> {
    fn map(&self, how: How) -> Map {
        match self {
            Self::Lease(fd) => how.map(fd, 0, LENGTH),
            Self::Bar(device) => how.map(device, u64::from(BAR) << 40, LENGTH),
        }
        .unwrap()
    }

    /// With entries of 1 GiB.
    fn touched(&self) -> Map {
        let map = self.map(How::shared().align(GIB));
        touch(&map);
        assert_eq!(sizes(&map), [Some(GIB); 3]);
        map
    }
}

/// Loads a word of each of the places.
fn touch(map: &Map) {
    for at in marks() {
        assert_eq!(map.read(at), Ok(tag(at)), "{at:#x}");
    }
}

/// The entry in the middle of each GiB.
fn sizes(map: &Map) -> [Option<u64>; 3] {
    [0, 1, 2].map(|gib| probe::entry(map, gib * GIB + GIB / 2).map(|entry| entry.size))
}

/// Asserts that those of a mapping that are there are small.
fn are_small(map: &Map, what: &str) {
    for at in marks() {
        let size = probe::entry(map, at).map_or(0, |entry| entry.size);
        assert!(size <= huge_size(), "{what}: {size:#x} at {at:#x}");
    }
}

// ---- Where they are
// ----------------------------------------------------------------------------

#[test]
fn one_fault_brings_in_a_gib() {
    let Some(device) = big() else { return };
    let (start, _) = device.function().bar(BAR);
    for kind in Kind::ALL {
        let target = kind.fresh(&device);
        let map = target.map(How::shared().align(GIB));
        let faults = observe::faults_of(|| {
            for at in (0..LENGTH).step_by(huge_size() as usize) {
                map.read(at).unwrap();
            }
            touch(&map);
        });
        assert_eq!(faults, 3, "{kind:?}");
        for at in marks() {
            let entry = probe::entry(&map, at).expect("an entry");
            assert_eq!(entry.physical, start + at, "{kind:?}");
            assert_eq!(entry.size, GIB, "{kind:?}");
            assert_eq!(entry.memory_type, MemoryType::Uncached, "{kind:?}");
            assert!(entry.writable && entry.special, "{kind:?}");
        }
        map.write(GIB + 8, 77).unwrap();
        assert_eq!(device.read32(BAR, GIB + 8), 77, "{kind:?}");
        device.write32(BAR, GIB + 8, 0);
    }
}

#[test]
fn none_leaves_its_mapping_or_its_range() {
    let Some(device) = big() else { return };
    let size_at = |map: &Map, at| {
        map.read(at).unwrap();
        probe::entry(map, at).map(|entry| entry.size)
    };
    // From the middle of one GiB to the middle of the third.
    let lease = device.export(BAR, &[(GIB / 2, 2 * GIB)]).unwrap();
    let how = How::shared().align(GIB);
    let map = how.skew(GIB / 2).map(&lease, 0, 2 * GIB).unwrap();
    let found = [0, GIB / 2, GIB, 3 * GIB / 2].map(|at| size_at(&map, at));
    let (large, small) = (Some(GIB), Some(huge_size()));
    assert_eq!(found, [small, large, large, small]);
    // BAR and address are not congruent.
    let map = how.map(&lease, 0, 2 * GIB).unwrap();
    assert_eq!(size_at(&map, GIB), small);
    // Two ranges that touch are two.
    let halves = device
        .export(BAR, &[(0, GIB / 2), (GIB / 2, GIB / 2)])
        .unwrap();
    let map = how.map(&halves, 0, GIB).unwrap();
    assert_eq!(size_at(&map, 0), small);
    // A second range, which is where it should be.
    let second = device
        .export(BAR, &[(GIB, page_size()), (2 * GIB, GIB)])
        .unwrap();
    let map = how
        .skew(GIB - page_size())
        .map(&second, 0, GIB + page_size());
    let map = map.unwrap();
    assert_eq!(size_at(&map, 0), Some(page_size()));
    assert_eq!(size_at(&map, page_size()), large);
    assert_eq!(map.read(page_size()), Ok(tag(2 * GIB)));
}

#[test]
fn what_is_write_combining_has_none() {
    let Some(device) = big() else { return };
    let lease = device.export(BAR, &[(0, GIB)]).unwrap();
    device.memattr(&lease, MEMATTR_WC).unwrap();
    let map = How::shared().align(GIB).map(&lease, 0, GIB).unwrap();
    map.read(0).unwrap();
    let entry = probe::entry(&map, 0).expect("an entry");
    assert_eq!(entry.size, page_size());
    assert_eq!(entry.memory_type, MemoryType::WriteCombining);
}

#[test]
fn they_are_taken_away_and_come_back_as_large() {
    let Some(device) = big() else { return };
    for kind in Kind::ALL {
        let target = kind.fresh(&device);
        let map = target.touched();
        for _ in 0..3 {
            device.set_memory(false);
            assert_eq!(sizes(&map), [None; 3], "{kind:?}");
            for at in marks() {
                assert_eq!(map.read(at), Err(Sigbus), "{kind:?}");
            }
            device.set_memory(true);
            touch(&map);
            assert_eq!(sizes(&map), [Some(GIB); 3], "{kind:?}");
        }
    }
}

#[test]
fn protection_changes_all_of_one_and_it_stays() {
    let Some(device) = big() else { return };
    for kind in Kind::ALL {
        let target = kind.fresh(&device);
        let map = target.touched();
        map.protect(0, LENGTH, READ).unwrap();
        assert_eq!(sizes(&map), [Some(GIB); 3], "{kind:?}");
        assert!(!probe::entry(&map, GIB).unwrap().writable, "{kind:?}");
        map.protect(0, LENGTH, READ_WRITE).unwrap();
        assert_eq!(sizes(&map), [Some(GIB); 3], "{kind:?}");
        map.write(GIB, tag(GIB)).unwrap();
        assert_eq!(sizes(&map), [Some(GIB); 3], "{kind:?}");
        // One that allows nothing would be none to the kernel.
        map.protect(0, LENGTH, libc::PROT_NONE).unwrap();
        assert_eq!(sizes(&map), [None; 3], "{kind:?}");
        map.protect(0, LENGTH, READ_WRITE).unwrap();
        touch(&map);
        assert_eq!(sizes(&map), [Some(huge_size()); 3], "{kind:?}");
    }
}

// ---- When they are gone
// ------------------------------------------------------------------------

/// A change of a mapping.
#[derive(Clone, Copy, Debug)]
enum Change {
    Unmap(u64, u64),
    Protect(u64, u64),
    /// All of it, so far behind a multiple of 1 GiB.
    Move(u64),
    MovePart(u64, u64),
}

impl Change {
    /// Cuts at each kind of boundary, and moves.
    fn all() -> Vec<Self> {
        let (page, huge) = (page_size(), huge_size());
        let mut all = vec![
            Self::Move(0),
            Self::Move(huge),
            Self::Move(page),
            Self::MovePart(GIB, GIB),
            Self::MovePart(GIB + 3 * page, huge),
        ];
        for (at, len) in [
            // One page in the middle.
            (GIB + 5 * page, page),
            // The first one of the mapping, and the last one.
            (0, page),
            (LENGTH - page, page),
            // On the boundaries of smaller entries.
            (GIB + huge, huge),
            // On its own.
            (GIB, GIB),
            (2 * GIB, GIB),
            // Across one.
            (GIB + 5 * page, GIB),
        ] {
            all.extend([Self::Unmap(at, len), Self::Protect(at, len)]);
        }
        all
    }

    /// Does it, and returns what is mapped then.
    fn apply(self, mut map: Map) -> Vec<Map> {
        match self {
            Self::Unmap(at, len) => map.unmap(at, len),
            Self::Protect(at, len) => map.protect(at, len, READ).unwrap(),
            Self::Move(skew) => {
                let place = map.place_at(GIB, skew);
                map = map.moved_to(&place).map_err(|(_, errno)| errno).unwrap();
            }
            Self::MovePart(at, len) => {
                let place = map.place_at(GIB, at % GIB);
                return vec![map.part_moved_to(at, len, &place).unwrap(), map];
            }
        }
        vec![map]
    }

    /// Whether a place of the whole is still where it was.
    fn leaves(self, at: u64) -> bool {
        match self {
            Self::Unmap(from, len) | Self::MovePart(from, len) => !(from..from + len).contains(&at),
            Self::Protect(..) | Self::Move(_) => true,
        }
    }
}

#[test]
fn they_are_gone_before_a_mapping_is_cut_or_moved() {
    let Some(device) = big() else { return };
    for kind in Kind::ALL {
        for change in Change::all() {
            let what = format!("{kind:?} {change:?}");
            observe::mark(&what);
            let target = kind.fresh(&device);
            let other = target.touched();
            let maps = change.apply(target.touched());
            let map = maps.last().unwrap();
            // Not in the other mapping either.
            for map in [map, &other] {
                for at in marks().filter(|&at| change.leaves(at)) {
                    let size = probe::entry(map, at).map_or(0, |entry| entry.size);
                    assert!(size <= huge_size(), "{what} {at:#x}");
                    assert_eq!(map.read(at), Ok(tag(at)), "{what} {at:#x}");
                }
            }
            touch(&other);
            assert_eq!(sizes(&other), [Some(huge_size()); 3], "{what}");
            if let (Change::MovePart(from, len), [part, _]) = (change, &maps[..]) {
                for at in marks().filter(|at| (from..from + len).contains(at)) {
                    assert_eq!(part.read(at - from), Ok(tag(at)), "{what} {at:#x}");
                }
            }
            // All of it goes.
            device.set_memory(false);
            for at in marks().filter(|&at| change.leaves(at)) {
                assert_eq!(map.read(at), Err(Sigbus), "{what} {at:#x}");
                assert_eq!(probe::entry(map, at), None, "{what} {at:#x}");
            }
            device.set_memory(true);
            // For good.
            let new = target.map(How::shared().align(GIB));
            touch(&new);
            assert_eq!(sizes(&new), [Some(huge_size()); 3], "{what}");
        }
    }
}

/// Where nothing was cut or copied, they come back in the next mapping of the same lease.
#[test]
fn a_mapping_that_ends_leaves_the_next_one_as_large() {
    let Some(device) = big() else { return };
    for kind in Kind::ALL {
        let target = kind.fresh(&device);
        for _ in 0..3 {
            drop(target.touched());
        }
    }
}

#[test]
fn after_a_move_revocation_reaches_the_new_address_and_nothing_is_left_at_the_old_one() {
    let Some(device) = big() else { return };
    for skew in [0, huge_size(), page_size()] {
        let lease = device.export(BAR, &[(0, LENGTH)]).unwrap();
        let mut child = Child::start(&[lease.as_fd()], |link| {
            let target = Target::Lease(lease.try_clone().unwrap());
            let map = target.touched();
            let old = target.map(How::shared().align(GIB));
            touch(&old);
            let before = old.address();
            let place = old.place_at(GIB, skew);
            let moved = old.moved_to(&place).map_err(|(_, errno)| errno).unwrap();
            touch(&moved);
            are_small(&moved, "moved");
            link.send(0);
            link.expect(1);
            for at in marks() {
                assert_eq!(moved.read(at), Err(Sigbus), "{at:#x}");
                assert_eq!(map.read(at), Err(Sigbus), "{at:#x}");
            }
            link.send(2);
            // Not by a translation that the CPU has kept.
            let _ = read_unprotected_at(before + GIB as usize / 2);
        });
        child.link.expect(0);
        device.revoke(&lease).unwrap();
        child.link.send(1);
        child.link.expect(2);
        assert_eq!(child.wait(), End::Signal(libc::SIGSEGV), "{skew:#x}");
    }
}

#[test]
fn a_child_gets_none_and_its_parent_loses_them() {
    let Some(device) = big() else { return };
    for kind in Kind::ALL {
        let target = kind.fresh(&device);
        let mut map = target.touched();
        let child = Child::start(&[device.as_fd()], |link| {
            are_small(&map, "child");
            touch(&map);
            are_small(&map, "child");
            map.protect(GIB + 5 * page_size(), page_size(), READ)
                .unwrap();
            touch(&map);
            link.send(0);
            link.expect(1);
            for at in marks() {
                assert_eq!(map.read(at), Err(Sigbus), "{at:#x}");
            }
        });
        child.link.expect(0);
        are_small(&map, "parent");
        touch(&map);
        are_small(&map, "parent");
        map.unmap(2 * GIB + 5 * page_size(), page_size());
        device.set_memory(false);
        child.link.send(1);
        child.join();
        device.set_memory(true);
        touch(&map);
    }
}

// ---- Stores that are tracked
// -------------------------------------------------------------------

#[test]
fn stores_are_served_while_they_are_tracked() {
    let Some(device) = big() else { return };
    for kind in Kind::ALL {
        // With an entry that was there before, one that comes later, and one that was made when the
        // mapping was read-only.
        for case in ["before", "later", "read-only"] {
            let mut child = Child::start(&[device.as_fd()], |_| {
                process::end_after(60);
                let target = kind.fresh(&device);
                let map = target.map(How::shared().align(GIB));
                if case != "later" {
                    touch(&map);
                }
                if case == "read-only" {
                    map.protect(0, LENGTH, READ).unwrap();
                }
                fs::write("/proc/self/clear_refs", "4").unwrap();
                if case == "read-only" {
                    touch(&map);
                    map.protect(0, LENGTH, READ_WRITE).unwrap();
                }
                for at in marks() {
                    map.write(at, tag(at)).unwrap();
                    assert_eq!(map.read(at), Ok(tag(at)));
                    assert!(probe::entry(&map, at).unwrap().writable, "{case} {at:#x}");
                }
                let tracks = !observe::kernel_lacks("MEM_SOFT_DIRTY");
                let large = if tracks && case != "before" {
                    huge_size()
                } else {
                    GIB
                };
                assert_eq!(sizes(&map), [Some(large); 3], "{case}");
            });
            assert_eq!(child.wait(), End::Code(0), "{kind:?} {case}");
        }
    }
}

// ---- Races
// -------------------------------------------------------------------------------------

/// Changes race with faults of another thread, and of other mappings of the same lease.
#[test]
fn changes_race_with_faults() {
    let Some(device) = big() else { return };
    let changes = Change::all();
    for round in 0..3 * changes.len() {
        let change = changes[round % changes.len()];
        let what = format!("{change:?}");
        let target = Kind::ALL[round % 2].fresh(&device);
        let other = target.touched();
        let map = target.touched();
        // Its address, for those that go on while it is moved.
        let stays = matches!(change, Change::Unmap(..) | Change::Protect(..));
        let (other, mine) = (&other, &map);
        let touch_other = || touch(other);
        let taken = || {
            for at in marks().filter(|&at| change.leaves(at)) {
                assert_eq!(mine.read(at), Ok(tag(at)));
            }
        };
        let mut loops: Vec<Loop<'_>> = vec![&touch_other];
        if stays {
            loops.push(&taken);
        }
        meanwhile(&loops, || match change {
            Change::Unmap(at, len) => mine.bury(at, len),
            Change::Protect(at, len) => mine.protect(at, len, READ).unwrap(),
            Change::Move(_) | Change::MovePart(..) => {
                let third = target.touched();
                drop(change.apply(third));
            }
        });
        are_small(other, &what);
        touch(other);
        are_small(other, &what);
    }
}

/// Two processes map the same lease, and both cut at once: neither may go on before the entries of
/// its own are gone, whoever of the two takes them away.
#[test]
fn two_processes_cut_at_the_same_time() {
    const ROUNDS: usize = 150;
    let Some(device) = big() else { return };
    let words = shared_words(2);
    let meet = |round: usize| {
        let wanted = 2 * (round as u32 + 1);
        words[0].fetch_add(1, Ordering::SeqCst);
        while words[0].load(Ordering::SeqCst) < wanted {
            std::hint::spin_loop();
        }
    };
    let leases: Vec<_> = (0..ROUNDS)
        .map(|_| device.export(BAR, &[(0, LENGTH)]).unwrap())
        .collect();
    let keep: Vec<_> = leases.iter().map(AsFd::as_fd).collect();
    let cut = |process: u64| {
        for (round, lease) in leases.iter().enumerate() {
            let target = Target::Lease(lease.try_clone().unwrap());
            let mut map = target.touched();
            meet(2 * round);
            // The one or the other is a little earlier.
            for _ in 0..(round as u64 * (1 + process)) % 97 {
                std::hint::spin_loop();
            }
            map.unmap(GIB + 5 * page_size(), page_size());
            touch(&map);
            are_small(&map, "cut");
            meet(2 * round + 1);
        }
    };
    let child = Child::start(&keep, |_| cut(1));
    cut(0);
    child.join();
}

/// Faults race with memory that goes and comes, and with readers of what the kernel says of a
/// process: these look for tables, and have entries of 1 GiB taken away.
#[test]
fn faults_race_with_readers_of_page_tables() {
    let Some(device) = big() else { return };
    let lease = device.export(BAR, &[(0, LENGTH)]).unwrap();
    let map = How::shared().align(GIB).map(&lease, 0, LENGTH).unwrap();
    let worked = AtomicU32::new(0);
    let faults = || {
        for at in marks() {
            match map.read(at) {
                Ok(value) => assert_eq!(value, tag(at)),
                Err(Sigbus) => continue,
            }
            worked.fetch_add(1, Ordering::Relaxed);
        }
    };
    let stores = || marks().for_each(|at| whatever(map.write(at, tag(at))));
    let readers = || {
        for file in ["smaps", "numa_maps"] {
            // A kernel may be without one of them.
            whatever(fs::read(format!("/proc/self/{file}")));
        }
    };
    meanwhile(&[&faults, &stores, &readers], || {
        let mut rounds = 0;
        while rounds < 200 || worked.load(Ordering::Relaxed) < 2000 {
            device.set_memory(false);
            device.set_memory(true);
            thread::yield_now();
            rounds += 1;
        }
    });
    touch(&map);
    assert_eq!(sizes(&map), [Some(GIB); 3]);
}

/// While the process turns huge pages off and on, one thread has the kernel make a table where
/// another one is about to insert an entry of 1 GiB.
#[test]
fn a_table_of_another_thread_is_no_surprise() {
    let Some(device) = big() else { return };
    let lease = device.export(BAR, &[(0, LENGTH)]).unwrap();
    let target = Target::Lease(lease);
    let turn = || [false, true].map(process::allow_huge_pages);
    meanwhile(&[&|| whatever(turn())], || {
        let (mut rounds, mut found) = (0, [0; 2]);
        while rounds < 100 || found.contains(&0) {
            let map = target.map(How::shared().align(GIB));
            let start = Barrier::new(2);
            let stores = || {
                start.wait();
                for at in marks() {
                    map.write(at, tag(at)).unwrap();
                }
            };
            thread::scope(|scope| {
                scope.spawn(stores);
                stores();
            });
            touch(&map);
            for size in sizes(&map) {
                found[usize::from(size == Some(GIB))] += 1;
            }
            rounds += 1;
        }
    });
}
