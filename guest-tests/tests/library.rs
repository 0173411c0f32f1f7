//! The library on the real kernel: what a program sees that uses it as its documentation says.
#![cfg(barlease_guest)]

use std::{
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use barlease::{
    Backend, BarRange, Bdf, Device, Error, Lease, MapOptions, Mapping, MemoryType, Reasons,
    RegionKind, State, Tph, pci::Pci,
};
use barlease_guest_tests::{
    huge_size, observe, page_size,
    pci::{BARLEASE, Function, STOCK},
    probe,
    process::{self, Child, End},
    race,
    vfio::set_memory,
};

const FRAME_BUFFER: u32 = 0;

fn bdf(name: &str) -> Bdf {
    observe::mark_test();
    Function::named(name).bdf.parse().unwrap()
}

fn open(name: &str) -> Device {
    let bdf = bdf(name);
    Pci::system().bind(bdf, BARLEASE).unwrap();
    Device::open(bdf).unwrap()
}

fn display() -> Device {
    open("display")
}

fn lease(device: &Device) -> Lease {
    device
        .export(FRAME_BUFFER)
        .range(0..2 * huge_size())
        .export()
        .unwrap()
}

/// The device's value at an offset of the frame buffer.
fn seen(device: &Device, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    device
        .read_region(FRAME_BUFFER, offset, &mut bytes)
        .unwrap();
    u32::from_ne_bytes(bytes)
}

macro_rules! assert_error {
    ($result:expr, $variant:ident) => {
        match $result {
            Err(Error::$variant { .. }) => {}
            other => panic!("not {}: {other:?}", stringify!($variant)),
        }
    };
}

// ---- Devices ------------------------------------------------------------------------------------

#[test]
fn a_device_is_bound_and_unbound() {
    let pci = Pci::system();
    let bdf = bdf("display");
    pci.unbind(bdf).unwrap();
    assert_eq!(pci.device(bdf).unwrap().driver, None);
    assert_error!(Device::open(bdf), NotBound);
    pci.bind(bdf, BARLEASE).unwrap();
    assert!(pci.device(bdf).unwrap().is_barlease());
    pci.bind(bdf, BARLEASE).unwrap();
    Device::open(bdf).unwrap();
    // From one driver to another, and back to none.
    pci.bind(bdf, STOCK).unwrap();
    assert!(pci.device(bdf).unwrap().is_vfio());
    assert!(!pci.device(bdf).unwrap().is_barlease());
    pci.unbind(bdf).unwrap();
    assert_eq!(pci.device(bdf).unwrap().driver_override, None);
}

#[test]
fn every_device_of_the_machine_is_listed() {
    let listed = Pci::system().devices().unwrap();
    for device in barlease_lab::guest::devices().unwrap() {
        let bdf: Bdf = device.bdf.parse().unwrap();
        let found = listed.iter().find(|listed| listed.bdf == bdf);
        assert!(found.unwrap().iommu_group.is_some(), "{bdf}");
    }
}

#[test]
fn errors_of_opening_say_what_is_in_the_way() {
    assert_error!(Device::open("0000:7f:1f.7".parse().unwrap()), NoDevice);
    let device = display();
    assert_error!(Device::open(device.bdf()), Busy);
}

#[test]
fn a_device_is_opened_by_what_the_kernel_has() {
    let device = display();
    let expected = if Path::new("/dev/iommu").exists() {
        Backend::Cdev
    } else {
        Backend::Group
    };
    assert_eq!(device.backend(), Some(expected));
    assert_eq!(device.driver(), Some(BARLEASE));
    // Dropped, it can be opened again at once.
    let bdf = device.bdf();
    drop(device);
    Device::open(bdf).unwrap();
}

#[test]
fn each_backend_is_used_when_it_is_asked_for() {
    let bdf = display().bdf();
    let open = |backend| barlease::OpenOptions::new().backend(backend).open(bdf);
    let links = |device: &Device| {
        // A descriptor of the device says by what it was opened.
        let held = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let paths = held.filter_map(|fd| std::fs::read_link(fd.path()).ok());
        let held: Vec<String> = paths.map(|path| path.display().to_string()).collect();
        assert_eq!(device.bdf(), bdf);
        held
    };
    let group = open(Backend::Group).unwrap();
    assert_eq!(group.backend(), Some(Backend::Group));
    let held = links(&group);
    assert!(held.iter().any(|path| path == "/dev/vfio/vfio"), "{held:?}");
    assert!(!held.iter().any(|path| path == "/dev/iommu"), "{held:?}");
    let dma = barlease::DmaBuffer::new(group.require_iommu().unwrap(), 4096).unwrap();
    dma.write(0, 1_u32).unwrap();
    drop((dma, group));
    if !Path::new("/dev/iommu").exists() {
        assert_error!(open(Backend::Cdev), Unsupported);
        return;
    }
    let cdev = open(Backend::Cdev).unwrap();
    assert_eq!(cdev.backend(), Some(Backend::Cdev));
    let held = links(&cdev);
    assert!(held.iter().any(|path| path == "/dev/iommu"), "{held:?}");
    assert!(
        !held.iter().any(|path| path == "/dev/vfio/vfio"),
        "{held:?}"
    );
    let dma = barlease::DmaBuffer::new(cdev.require_iommu().unwrap(), 4096).unwrap();
    dma.write(0, 1_u32).unwrap();
}

#[test]
fn regions_are_those_of_the_device() {
    let device = open("memory");
    let regions = device.regions().unwrap();
    let bars: Vec<_> = regions
        .iter()
        .filter(|region| region.is_bar() && region.size > 0)
        .map(|region| (region.index, region.size))
        .collect();
    assert_eq!(bars, [(0, 256), (2, 64 << 20)]);
    assert!(
        regions
            .iter()
            .any(|region| region.kind == RegionKind::Config)
    );
}

#[test]
fn features_are_those_of_the_driver() {
    let features = display().features().unwrap();
    assert!(features.dma_buf && features.revoke && features.status);
    // No device here completes TPH.
    assert!(!features.tph);
    let bdf = bdf("display");
    Pci::system().bind(bdf, STOCK).unwrap();
    let stock = Device::open(bdf).unwrap();
    let features = stock.features().unwrap();
    assert!(features.dma_buf);
    assert!(!features.revoke && !features.status && !features.memory_type);
}

#[test]
fn what_stock_vfio_pci_cannot_do_is_unsupported() {
    let bdf = bdf("display");
    Pci::system().bind(bdf, STOCK).unwrap();
    let device = Device::open(bdf).unwrap();
    let lease = lease(&device);
    assert_error!(device.revoke(&lease), Unsupported);
    assert_error!(device.status(&lease), Unsupported);
    assert_error!(device.set_memory_type(&lease, MemoryType::Wc), Unsupported);
    assert_error!(device.set_tph(&lease, Tph::default()), Unsupported);
    let alias = device.alias_region(FRAME_BUFFER, MemoryType::Wc);
    assert_error!(alias, Unsupported);
    assert_error!(lease.map(), Unsupported);
    let text = device.revoke(&lease).unwrap_err().report().to_string();
    assert!(text.contains(BARLEASE), "{text}");
}

// ---- Leases -------------------------------------------------------------------------------------

#[test]
fn a_lease_is_mapped_where_large_entries_are_possible() {
    let device = display();
    let lease = lease(&device);
    let mapping = lease.map().unwrap();
    assert_eq!(mapping.len() as u64, 2 * huge_size());
    assert_eq!(mapping.as_ptr().addr() as u64 % huge_size(), 0);
    let guarded = lease.map_guarded().unwrap();
    assert_eq!(guarded.as_ptr().addr() as u64 % huge_size(), 0);
}

#[test]
fn a_lease_of_a_gib_is_mapped_where_an_entry_of_that_size_is_possible() {
    const GIB: u64 = 1 << 30;
    if !observe::has_entries_of_1_gib() {
        return;
    }
    let device = open("big");
    let lease = device.export(2).range(huge_size()..3 * GIB).export();
    let mapping = lease.unwrap().map().unwrap();
    assert_eq!(mapping.as_ptr().addr() as u64 % GIB, huge_size());
    let whole = GIB - huge_size()..2 * GIB - huge_size();
    let faults = observe::faults_of(|| {
        for at in whole.clone().step_by(huge_size() as usize) {
            mapping.read::<u32>(at as usize).unwrap();
        }
    });
    assert_eq!(faults, 1);
}

#[test]
fn values_of_each_width_reach_the_device() {
    let device = display();
    let mapping = lease(&device).map().unwrap();
    mapping.write(0, 0x1122_3344_5566_7788u64).unwrap();
    assert_eq!(seen(&device, 0), 0x5566_7788);
    mapping.write(4, 0xaabbu16).unwrap();
    mapping.write(6, 0xccu8).unwrap();
    assert_eq!(seen(&device, 4), 0x11cc_aabb);
    assert_eq!(mapping.register::<u32>(4).unwrap().read(), 0x11cc_aabb);
    let text = b"a longer text than one access";
    mapping.copy_from(3, text).unwrap();
    let mut back = [0; 29];
    mapping.copy_to(3, &mut back).unwrap();
    assert_eq!(&back, text);
    mapping.fill(8..20, 0x5a).unwrap();
    assert_eq!(seen(&device, 12), 0x5a5a_5a5a);
    assert_error!(mapping.write(2, 1u32), Misaligned);
    assert_error!(mapping.read::<u32>(2 * huge_size() as usize), OutOfBounds);
}

#[test]
fn a_lease_of_several_ranges_is_their_concatenation() {
    let device = display();
    let lease = device
        .export(FRAME_BUFFER)
        .range(8 * page_size()..9 * page_size())
        .ranges([BarRange {
            offset: 0,
            length: 2 * page_size(),
        }])
        .export()
        .unwrap();
    assert_eq!(lease.size(), 3 * page_size());
    let mapping = lease.map_range(page_size()..3 * page_size()).unwrap();
    mapping.write(page_size() as usize, 0x1234u32).unwrap();
    assert_eq!(seen(&device, page_size()), 0x1234);
    let status = device.status(&lease).unwrap();
    assert_eq!(
        (status.ranges, status.size, status.bar),
        (2, 3 * page_size(), 0)
    );
}

#[test]
fn a_read_only_lease_is_mapped_for_reading() {
    let device = display();
    let lease = device
        .export(FRAME_BUFFER)
        .range(0..page_size())
        .read_only()
        .export()
        .unwrap();
    assert!(!lease.is_writable());
    device
        .write_region(FRAME_BUFFER, 0, &7u32.to_ne_bytes())
        .unwrap();
    for mapping in [
        lease.map().unwrap(),
        MapOptions::new().read_only().map(&lease).unwrap(),
    ] {
        assert_eq!(mapping.read::<u32>(0).unwrap(), 7);
        assert_error!(mapping.write(0, 1u32), ReadOnly);
    }
    assert_error!(lease.map_guarded().unwrap().write(0, 1u32), ReadOnly);
}

#[test]
fn errors_of_exporting_say_what_is_wrong() {
    let device = display();
    let export = |range| device.export(FRAME_BUFFER).range(range).export();
    assert_eq!(export(0..0).unwrap_err().errno(), Some(libc::EINVAL));
    let end = 64 << 20;
    assert_eq!(
        export(end..end + page_size()).unwrap_err().errno(),
        Some(libc::EINVAL)
    );
    let absent = device.export(1).range(0..page_size()).export();
    assert_eq!(absent.unwrap_err().errno(), Some(libc::ENODEV));
    let nvme = open("nvme");
    // All of it has the MSI-X table in it, which is left out by who does not ask for it.
    let all = nvme.export(0).range(..).export().unwrap();
    assert_eq!(all.size(), nvme.region(0).unwrap().size);
    let free = nvme.exportable_ranges(0).unwrap();
    assert!(free.iter().map(|range| range.length).sum::<u64>() < all.size());
    let lease = nvme.export(0).export().unwrap();
    assert_eq!(lease.info().unwrap().ranges, free);
}

#[test]
fn a_lease_shows_its_name() {
    let device = display();
    let lease = lease(&device);
    lease.set_name("left half").unwrap();
    let text = observe::buffers_text(&Function::named("display"));
    assert!(text.contains("left\\x20half"), "{text}");
    assert_error!(lease.set_name(&"x".repeat(32)), Invalid);
}

// ---- Memory types, aliases, steering tags -------------------------------------------------------

/// How the CPU treats the ends of a mapping.
fn types(mapping: &Mapping) -> [Option<probe::MemoryType>; 2] {
    let ends = [0, mapping.len() - page_size() as usize];
    ends.map(|at| {
        mapping.write(at, 1u32).unwrap();
        let entry = probe::entry_at(mapping.as_ptr().addr() + at);
        entry.map(|entry| entry.memory_type)
    })
}

const UNCACHED: [Option<probe::MemoryType>; 2] = [Some(probe::MemoryType::Uncached); 2];
const COMBINING: [Option<probe::MemoryType>; 2] = [Some(probe::MemoryType::WriteCombining); 2];

#[test]
fn mappings_of_a_lease_are_of_the_memory_type_that_was_set_before() {
    let device = display();
    let lease = lease(&device);
    let before = lease.map().unwrap();
    device.set_memory_type(&lease, MemoryType::Wc).unwrap();
    assert_eq!(device.status(&lease).unwrap().memory_type, MemoryType::Wc);
    assert_eq!(lease.info().unwrap().memory_type, MemoryType::Wc);
    let after = lease.map().unwrap();
    assert_eq!((types(&before), types(&after)), (UNCACHED, COMBINING));
    let guarded = lease.map_guarded().unwrap();
    guarded.write(0, 1u32).unwrap();
    let entry = probe::entry_at(guarded.as_ptr().addr()).unwrap();
    assert_eq!(entry.memory_type, probe::MemoryType::WriteCombining);
    // Also when its pages come back.
    set_memory(&device, false);
    assert_error!(guarded.write(0, 1u32), Revoked);
    set_memory(&device, true);
    guarded.write(0, 1u32).unwrap();
    let entry = probe::entry_at(guarded.as_ptr().addr()).unwrap();
    assert_eq!(entry.memory_type, probe::MemoryType::WriteCombining);
    device.set_memory_type(&lease, MemoryType::Nc).unwrap();
    assert_eq!(types(&lease.map().unwrap()), UNCACHED);
    device.revoke(&lease).unwrap();
    assert_error!(device.set_memory_type(&lease, MemoryType::Wc), Dead);
}

#[test]
fn an_alias_is_a_region_that_is_mapped_write_combining() {
    let device = display();
    let bar = device.region(FRAME_BUFFER).unwrap();
    assert_eq!(bar.memory_types(), [MemoryType::Nc, MemoryType::Wc]);
    let index = device.alias_region(FRAME_BUFFER, MemoryType::Wc).unwrap();
    assert_eq!(
        device.alias_region(FRAME_BUFFER, MemoryType::Wc).unwrap(),
        index
    );
    let alias = device.region(index).unwrap();
    assert_eq!(alias.kind, RegionKind::Alias(FRAME_BUFFER));
    assert_eq!(alias.memory_types(), [MemoryType::Wc]);
    assert_eq!((alias.size, alias.mappable), (bar.size, true));
    let [uncached, combining] =
        [FRAME_BUFFER, index].map(|region| device.map_region(region, 0..huge_size()).unwrap());
    assert_eq!((types(&uncached), types(&combining)), (UNCACHED, COMBINING));
    combining.write(page_size() as usize, 0xa11a5u32).unwrap();
    assert_eq!(seen(&device, page_size()), 0xa11a5);
    // An alias of an alias, and one that is no other type than the BAR's own.
    let refused = [
        device.alias_region(index, MemoryType::Wc),
        device.alias_region(FRAME_BUFFER, MemoryType::Nc),
    ];
    for answer in refused {
        assert_eq!(answer.unwrap_err().errno(), Some(libc::EINVAL));
    }
}

#[test]
fn steering_tags_of_a_device_that_completes_none_are_unsupported() {
    let device = display();
    let lease = lease(&device);
    let tph = Tph::new().steering_tag(1);
    assert_error!(device.set_tph(&lease, tph), Unsupported);
    let too_large = tph.processing_hint(4);
    assert_error!(device.set_tph(&lease, too_large), Invalid);
}

// ---- Revocation ---------------------------------------------------------------------------------

#[test]
fn a_guarded_access_after_revocation_is_an_error() {
    let device = display();
    let lease = lease(&device);
    let mapping = lease.map_guarded().unwrap();
    mapping.write(page_size() as usize, 0x600du32).unwrap();
    assert_eq!(seen(&device, page_size()), 0x600d);
    device.revoke(&lease).unwrap();
    assert_eq!(device.status(&lease).unwrap().state, State::Dead);
    assert_error!(mapping.read::<u32>(0), Revoked);
    assert_error!(mapping.write(0, 1u8), Revoked);
    assert_error!(mapping.copy_from(0, &[1; 100]), Revoked);
    assert_error!(mapping.copy_to(0, &mut [0; 100]), Revoked);
    assert_error!(mapping.fill(0..100, 1), Revoked);
    assert_error!(lease.check(), Dead);
    assert_error!(lease.map(), Dead);
    assert_error!(device.revoke(&lease), Dead);
    // Somebody else has the range at once.
    let other = self::lease(&device).map_guarded().unwrap();
    assert_eq!(other.read::<u32>(page_size() as usize).unwrap(), 0x600d);
}

#[test]
fn a_guarded_mapping_works_at_once_when_memory_is_back() {
    let device = display();
    let lease = lease(&device);
    let mapping = lease.map_guarded().unwrap();
    let register = mapping.register::<u32>(8).unwrap();
    register.write(5).unwrap();
    for _ in 0..3 {
        set_memory(&device, false);
        let status = device.status(&lease).unwrap();
        assert_eq!(
            (status.state, status.reasons),
            (State::Revoked, Reasons::MEMORY_OFF)
        );
        assert!(register.read().is_err());
        assert!(register.write(6).is_err());
        lease.check().unwrap();
        set_memory(&device, true);
        assert_eq!(register.read(), Ok(5));
    }
}

#[test]
#[expect(unsafe_code, reason = "an access by address, as code in C makes it")]
fn a_scratch_mapping_is_lost_and_recovers_until_the_lease_is_dead() {
    let device = display();
    let lease = lease(&device);
    let mapping = MapOptions::new().map_scratch(&lease).unwrap();
    let poke = |value: u32| {
        mapping.section(|address| {
            // SAFETY: the mapping has 4 bytes, aligned to pages.
            unsafe { address.cast::<u32>().write_volatile(value) };
        })
    };
    for round in 0..3 {
        poke(round).unwrap();
        assert_eq!(seen(&device, 0), round);
        set_memory(&device, false);
        assert!(!mapping.is_lost());
        assert_error!(poke(7), Revoked);
        assert!(mapping.is_lost());
        mapping.recover().unwrap();
        assert_error!(poke(7), Revoked);
        set_memory(&device, true);
        assert_error!(poke(7), Revoked);
        mapping.recover().unwrap();
        assert_eq!(seen(&device, 0), round);
    }
    device.revoke(&lease).unwrap();
    assert_error!(poke(7), Revoked);
    assert_error!(mapping.recover(), Dead);
    assert!(mapping.is_lost());
}

#[test]
fn a_guarded_mapping_that_nobody_touched_meanwhile_notices_nothing() {
    let device = display();
    let mapping = lease(&device).map_guarded().unwrap();
    mapping.write(0, 3u32).unwrap();
    set_memory(&device, false);
    set_memory(&device, true);
    assert_eq!(mapping.read::<u32>(0).unwrap(), 3);
}

#[test]
fn a_plain_access_after_revocation_ends_the_process() {
    let device = display();
    let lease = lease(&device);
    let mapping = lease.map().unwrap();
    device.revoke(&lease).unwrap();
    let mut child = Child::start(&[], |_| {
        let _ = mapping.read::<u32>(0);
    });
    assert_eq!(child.wait(), End::Signal(libc::SIGBUS));
}

#[test]
fn the_guard_does_not_save_who_it_does_not_know() {
    let device = display();
    let lease = lease(&device);
    let plain = lease.map().unwrap();
    let guarded = lease.map_guarded().unwrap();
    device.revoke(&lease).unwrap();
    assert_error!(guarded.read::<u32>(0), Revoked);
    let mut child = Child::start(&[], |_| {
        let _ = plain.read::<u32>(0);
    });
    assert_eq!(child.wait(), End::Signal(libc::SIGBUS));
}

#[test]
fn threads_that_draw_while_they_are_revoked_all_get_an_error() {
    let device = display();
    for _ in 0..10 {
        let lease = lease(&device);
        let mapping = lease.map_guarded().unwrap();
        let running = AtomicU32::new(0);
        thread::scope(|scope| {
            for thread in 0..4usize {
                let (mapping, running) = (&mapping, &running);
                scope.spawn(move || {
                    let mut begun = false;
                    let error = (0..).find_map(|step: usize| {
                        let at = (step * 4096 + thread * 64) % mapping.len();
                        let answer = match step % 3 {
                            0 => mapping.write(at, step as u32),
                            1 => mapping.read::<u32>(at).map(drop),
                            _ => mapping.fill(at..at + 64, 9),
                        };
                        if !std::mem::replace(&mut begun, true) {
                            running.fetch_add(1, Ordering::Relaxed);
                        }
                        answer.err()
                    });
                    assert!(matches!(error, Some(Error::Revoked { .. })), "{error:?}");
                });
            }
            while running.load(Ordering::Relaxed) < 4 {
                thread::yield_now();
            }
            device.revoke(&lease).unwrap();
        });
    }
}

#[test]
fn threads_that_draw_while_memory_comes_and_goes() {
    let device = display();
    let lease = lease(&device);
    let mapping = lease.map_guarded().unwrap();
    let lost = AtomicU32::new(0);
    let draw = || {
        if mapping.write(page_size() as usize, 1u32).is_err() {
            lost.fetch_add(1, Ordering::Relaxed);
        }
    };
    let mut rounds = 0;
    race::meanwhile(&[&draw, &draw, &draw], || {
        // On a busy machine the others may come late.
        while rounds < 100 || lost.load(Ordering::Relaxed) == 0 {
            rounds += 1;
            set_memory(&device, false);
            thread::yield_now();
            set_memory(&device, true);
        }
    });
    mapping.write(0, 1u32).unwrap();
}

#[test]
fn a_lease_of_another_device_or_of_no_device_is_told_apart() {
    let device = display();
    let other = open("testdev");
    let lease = lease(&device);
    assert_error!(other.revoke(&lease), WrongDevice);
    assert_error!(other.status(&lease), WrongDevice);
    let file = Lease::from_fd(std::fs::File::open("/lab/devices").unwrap()).unwrap();
    assert_error!(device.revoke(&file), NotALease);
    // Of an earlier open.
    let bdf = device.bdf();
    drop(device);
    let device = Device::open(bdf).unwrap();
    assert_error!(device.revoke(&lease), WrongDevice);
    assert_error!(lease.map(), Dead);
}

// ---- Another process ----------------------------------------------------------------------------

#[test]
fn an_unprivileged_holder_draws_until_it_is_revoked_and_lives_on() {
    let device = display();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let holder = Child::start(&[theirs.as_fd()], |link| {
        process::become_user(1001);
        let lease = Lease::receive(&theirs).unwrap();
        let info = lease.info().unwrap();
        assert_eq!((info.bar, info.size), (FRAME_BUFFER, 2 * huge_size()));
        assert_eq!(
            info.ranges,
            [BarRange {
                offset: 0,
                length: 2 * huge_size()
            }]
        );
        let mapping = lease.map_guarded().unwrap();
        mapping.write(0, 0xd4a3u32).unwrap();
        link.send(0);
        let error = loop {
            if let Err(error) = mapping.fill(0..mapping.len(), 0x11) {
                break error;
            }
        };
        assert!(matches!(error, Error::Revoked { .. }), "{error:?}");
        assert_error!(lease.map(), Dead);
        link.send(1);
        // It lives on, with another.
        let mapping = Lease::receive(&theirs).unwrap().map().unwrap();
        mapping.write(4, 0xa9a1u32).unwrap();
        link.send(2);
    });
    let lease = lease(&device);
    lease.send(&ours).unwrap();
    holder.link.expect(0);
    device.revoke(&lease).unwrap();
    holder.link.expect(1);
    self::lease(&device).send(&ours).unwrap();
    holder.link.expect(2);
    assert_eq!(seen(&device, 4), 0xa9a1);
    holder.join();
}

#[test]
fn the_owners_death_is_an_error_to_a_guarded_holder() {
    Pci::system().bind(bdf("display"), BARLEASE).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut owner = Child::start(&[theirs.as_fd()], |link| {
        let device = Device::open(bdf("display")).unwrap();
        lease(&device).send(&theirs).unwrap();
        link.expect(0);
        std::process::abort();
    });
    let lease = Lease::receive(&ours).unwrap();
    let mapping = lease.map_guarded().unwrap();
    mapping.write(0, 1u32).unwrap();
    owner.link.send(0);
    assert_eq!(owner.wait(), End::Signal(libc::SIGABRT));
    assert_error!(mapping.write(0, 1u32), Revoked);
    assert_error!(lease.check(), Dead);
}

#[test]
fn a_region_is_mapped_guarded_too() {
    let device = open("memory");
    let mapping = device.map_region_guarded(2, 0..huge_size()).unwrap();
    mapping.write(8, 8u32).unwrap();
    let lost = AtomicU32::new(0);
    let read = || {
        if mapping.read::<u32>(8).is_err() {
            lost.fetch_add(1, Ordering::Relaxed);
        }
    };
    race::meanwhile(&[&read], || {
        // On a busy machine a reset may be over before the other thread's turn comes.
        while lost.load(Ordering::Relaxed) == 0 {
            device.reset().unwrap();
        }
    });
    assert_eq!(mapping.read::<u32>(8).unwrap(), 8);
}
