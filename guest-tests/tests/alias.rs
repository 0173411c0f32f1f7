//! Aliases of regions: who gets one, what it says of itself, that it is the BAR, and how long it
//! lives.
#![cfg(barlease_guest)]

use std::{os::fd::AsFd, sync::Mutex, thread};

use barlease_abi::{
    ALIAS_WC, AliasRegion, FEATURE_ALIAS_REGION, REGION_CAP_ALIAS, REGION_CAP_ALIASABLE,
    REGION_CAP_VERSION,
};
use barlease_guest_tests::{
    errno::{EINVAL, ENODEV},
    huge_size,
    lease::State,
    map::{How, Map, READ, Sigbus},
    observe, page_size,
    pci::STOCK,
    probe::{self, MemoryType},
    race::meanwhile,
    vfio::{
        CONFIG_REGION, Device, GET, LOW_POWER_ENTRY, LOW_POWER_EXIT, ROM_REGION, RegionInfo, SET,
        VGA_REGION,
    },
};

/// The frame buffer of the display: 64 MiB.
const FRAME_BUFFER: u32 = 0;
const FRAME_BUFFER_LEN: u64 = 64 << 20;

/// `VFIO_REGION_INFO_FLAG_CAPS`.
const HAS_CAPABILITIES: u32 = 1 << 3;
/// `VFIO_REGION_INFO_FLAG_MMAP`.
const CAN_BE_MAPPED: u32 = 1 << 2;
/// `VFIO_REGION_INFO_CAP_MSIX_MAPPABLE`.
const MSIX_MAPPABLE: u16 = 3;
/// Bytes of `vfio_region_info` without capabilities.
const HEADER: u32 = 32;

fn display() -> Device {
    Device::open("display")
}

fn request(region: u32, flags: u32) -> AliasRegion {
    AliasRegion {
        mapping_flags: flags,
        region_index: region,
        alias_index: 0,
        reserved: 0,
        reserved2: 0,
    }
}

/// The payload of a capability, if it is there; it must be there once.
fn capability(info: &RegionInfo, id: u16) -> Option<Vec<u8>> {
    let mut found = info.capabilities.iter().filter(|(this, _, _)| *this == id);
    let payload = found.next().map(|(_, version, payload)| {
        assert_eq!(*version, 1);
        payload.clone()
    });
    assert!(found.next().is_none(), "{info:?}");
    payload
}

fn words(payload: &[u8]) -> Vec<u32> {
    let word = |bytes: &[u8]| u32::from_ne_bytes(bytes.try_into().unwrap());
    payload.chunks_exact(4).map(word).collect()
}

// ---- Devices and drivers that get one -----------------------------------------------------------

#[test]
fn probe_says_that_it_can_be_had() {
    let device = display();
    assert_eq!(device.probe(FEATURE_ALIAS_REGION, GET), Ok(()));
    assert_eq!(device.probe(FEATURE_ALIAS_REGION, 0), Ok(()));
    assert_eq!(device.probe(FEATURE_ALIAS_REGION, SET), Err(EINVAL));
    let set = SET | u32::from(FEATURE_ALIAS_REGION);
    assert_eq!(device.feature(set, &mut [0; 24]), Err(EINVAL));
    let get = GET | u32::from(FEATURE_ALIAS_REGION);
    for length in [0, 8, 23] {
        assert_eq!(
            device.feature(get, &mut vec![0; length]),
            Err(EINVAL),
            "{length}"
        );
    }
}

#[test]
fn the_same_request_has_the_same_index() {
    let device = display();
    let (_, regions, _) = device.info().unwrap();
    let first = device.alias(FRAME_BUFFER, ALIAS_WC).unwrap();
    assert!(first >= regions, "{first}");
    for _ in 0..40 {
        assert_eq!(device.alias(FRAME_BUFFER, ALIAS_WC), Ok(first));
    }
    let other = device.alias(2, ALIAS_WC).unwrap();
    assert_ne!(other, first);
    assert_eq!(device.alias(FRAME_BUFFER, ALIAS_WC), Ok(first));
    assert_eq!(device.alias(2, ALIAS_WC), Ok(other));
}

#[test]
fn threads_that_ask_at_once_get_the_same_index() {
    let device = display();
    let indexes = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let index = device.alias(FRAME_BUFFER, ALIAS_WC).unwrap();
                indexes.lock().unwrap().push(index);
            });
        }
    });
    let indexes = indexes.into_inner().unwrap();
    assert!(
        indexes.iter().all(|index| *index == indexes[0]),
        "{indexes:?}"
    );
}

#[test]
fn every_bar_that_can_be_mapped_has_one_at_once() {
    // With one flag there are fewer BARs than indexes: none is ever short.
    for name in ["display", "memory", "nvme", "igb", "testdev", "edu"] {
        let device = Device::open(name);
        let mut indexes = Vec::new();
        for bar in 0..6 {
            let info = device.region_info(bar).unwrap();
            let answer = device.alias(bar, ALIAS_WC);
            if info.flags & CAN_BE_MAPPED != 0 && info.size >= page_size() {
                indexes.push(answer.unwrap());
            } else {
                assert_eq!(answer, Err(ENODEV), "{name} BAR {bar}: {info:?}");
            }
        }
        assert!(!indexes.is_empty(), "{name}");
        let count = indexes.len();
        indexes.sort_unstable();
        indexes.dedup();
        assert_eq!(indexes.len(), count, "{name}");
    }
}

#[test]
fn unknown_flags_none_and_reserved_fields_are_einval() {
    let device = display();
    for flags in [0, 2, 3, ALIAS_WC | 1 << 31, u32::MAX] {
        assert_eq!(device.alias(FRAME_BUFFER, flags), Err(EINVAL), "{flags:#x}");
    }
    let reserved = [
        AliasRegion {
            reserved: 1,
            ..request(FRAME_BUFFER, ALIAS_WC)
        },
        AliasRegion {
            reserved2: 1,
            ..request(FRAME_BUFFER, ALIAS_WC)
        },
        AliasRegion {
            reserved2: 1 << 63,
            ..request(FRAME_BUFFER, ALIAS_WC)
        },
    ];
    for request in reserved {
        assert_eq!(device.alias_raw(request), Err(EINVAL), "{request:?}");
    }
    // The index is an answer: what was in it does not matter.
    let request = AliasRegion {
        alias_index: 77,
        ..request(FRAME_BUFFER, ALIAS_WC)
    };
    assert_ne!(device.alias_raw(request), Ok(77));
}

#[test]
fn the_payload_is_looked_at_before_the_region() {
    let device = display();
    assert_eq!(device.alias(ROM_REGION, 2), Err(EINVAL));
    assert_eq!(device.alias(1000, 0), Err(EINVAL));
}

#[test]
fn an_alias_of_an_alias_is_einval() {
    let device = display();
    let (_, regions, _) = device.info().unwrap();
    // Before it is one it is nothing.
    assert_eq!(device.alias(regions, ALIAS_WC), Err(ENODEV));
    let alias = device.alias(FRAME_BUFFER, ALIAS_WC).unwrap();
    assert_eq!(device.alias(alias, ALIAS_WC), Err(EINVAL));
    assert_eq!(device.alias(alias + 1, ALIAS_WC), Err(ENODEV));
}

#[test]
fn what_is_no_bar_of_a_page_that_can_be_mapped_is_enodev() {
    let device = display();
    for region in [
        1,
        3,
        4,
        5,
        ROM_REGION,
        CONFIG_REGION,
        VGA_REGION,
        9,
        15,
        16,
        25,
        1000,
        u32::MAX,
    ] {
        assert_eq!(device.alias(region, ALIAS_WC), Err(ENODEV), "{region}");
    }
    // 256 bytes.
    let device = Device::open("memory");
    assert!(device.region_info(0).unwrap().size < page_size());
    assert_eq!(device.alias(0, ALIAS_WC), Err(ENODEV));
}

// ---- Its description ----------------------------------------------------------------------------

#[test]
fn an_alias_says_what_its_bar_says_and_what_it_is() {
    for name in ["display", "memory", "nvme", "igb", "testdev", "edu"] {
        let device = Device::open(name);
        device.probe(FEATURE_ALIAS_REGION, GET).unwrap();
        for bar in 0..6 {
            let before = device.region_info(bar).unwrap();
            let Ok(index) = device.alias(bar, ALIAS_WC) else {
                assert_eq!(capability(&before, REGION_CAP_ALIASABLE), None);
                continue;
            };
            let alias = device.region_info(index).unwrap();
            assert_eq!(device.region_info(bar).unwrap(), before, "{name} BAR {bar}");
            assert_eq!(alias.size, before.size);
            assert_eq!(alias.flags, before.flags);
            assert_eq!(alias.offset, u64::from(index) << 40);
            let is = capability(&alias, REGION_CAP_ALIAS).unwrap();
            assert_eq!(words(&is), [bar, ALIAS_WC]);
            assert_eq!(capability(&alias, REGION_CAP_ALIASABLE), None);
            let could = capability(&before, REGION_CAP_ALIASABLE).unwrap();
            assert_eq!(words(&could), [ALIAS_WC, 0]);
            assert_eq!(capability(&before, REGION_CAP_ALIAS), None);
            // All else of the BAR is repeated.
            let rest = |info: &RegionInfo, own| -> Vec<_> {
                let others = info.capabilities.iter().filter(|(id, _, _)| *id != own);
                others.cloned().collect()
            };
            assert_eq!(
                rest(&alias, REGION_CAP_ALIAS),
                rest(&before, REGION_CAP_ALIASABLE),
                "{name} BAR {bar}"
            );
        }
    }
}

#[test]
fn the_bar_with_the_msix_table_says_so_on_its_alias() {
    for (name, bar) in [("nvme", 0), ("igb", 3)] {
        let device = Device::open(name);
        let index = device.alias(bar, ALIAS_WC).unwrap();
        for region in [bar, index] {
            let info = device.region_info(region).unwrap();
            assert!(
                capability(&info, MSIX_MAPPABLE).is_some(),
                "{name} {info:?}"
            );
            assert_eq!(info.capabilities.len(), 2, "{name} {info:?}");
        }
    }
}

#[test]
fn a_bar_says_one_capability_more_to_who_has_asked() {
    for name in ["display", "nvme", "igb"] {
        let regions =
            |device: &Device| -> Vec<_> { (0..9).map(|index| device.region_info(index)).collect() };
        let stock = regions(&Device::open_with(name, STOCK));
        let asked: [&dyn Fn(&Device); 3] = [
            &|device| device.probe(FEATURE_ALIAS_REGION, GET).unwrap(),
            &|device| device.probe(FEATURE_ALIAS_REGION, 0).unwrap(),
            &|device| assert_eq!(device.alias(99, ALIAS_WC), Err(ENODEV)),
        ];
        for ask in asked {
            let device = Device::open(name);
            // A program that has not asked sees what stock says.
            assert_eq!(regions(&device), stock, "{name}");
            ask(&device);
            let mut aliasable = 0;
            for (index, (ours, stock)) in regions(&device).into_iter().zip(&stock).enumerate() {
                let without = ours.map(|mut info| {
                    if capability(&info, REGION_CAP_ALIASABLE).is_some() {
                        aliasable += 1;
                        info.capabilities
                            .retain(|(id, _, _)| *id != REGION_CAP_ALIASABLE);
                        if info.capabilities.is_empty() {
                            info.flags &= !HAS_CAPABILITIES;
                        }
                    }
                    info
                });
                assert_eq!(without, *stock, "{name} {index}");
            }
            assert!(aliasable > 0, "{name}");
        }
        // The next open has not been asked.
        assert_eq!(regions(&Device::open(name)), stock, "{name}");
    }
}

#[test]
fn capabilities_are_negotiated_by_size() {
    for (name, bar) in [("display", 0), ("nvme", 0), ("igb", 3)] {
        let device = Device::open(name);
        let alias = device.alias(bar, ALIAS_WC).unwrap();
        for region in [bar, alias] {
            let short = device.region_info_sized(region, HEADER).unwrap();
            let full = short[0];
            assert!(full > HEADER, "{name} {region}: {full}");
            assert_eq!(short[1] & HAS_CAPABILITIES, HAS_CAPABILITIES);
            assert_eq!(short[3], 0, "cap_offset");
            assert_eq!(short[8], 0xeeee_eeee, "nothing is written past argsz");
            // A little too small is too small.
            let part = device.region_info_sized(region, full - 8).unwrap();
            assert_eq!((part[0], part[3]), (full, 0));
            assert_eq!(part[8], 0);
            // Enough, or more than that, is enough.
            for argsz in [full, full + 64] {
                let all = device.region_info_sized(region, argsz).unwrap();
                assert_eq!(all[0], argsz);
                assert_eq!(all[3], HEADER, "cap_offset");
                assert_eq!(all[1..3], short[1..3]);
                assert_eq!(all[4..8], short[4..8]);
                assert_eq!(chain(&all).iter().map(|(_, end)| *end).max(), Some(full));
                for wanted in [REGION_CAP_ALIAS, REGION_CAP_ALIASABLE] {
                    let there = chain(&all).iter().any(|(id, _)| *id == wanted);
                    assert_eq!(there, (wanted == REGION_CAP_ALIAS) == (region == alias));
                }
            }
            for argsz in [0, 8, HEADER - 1] {
                assert_eq!(
                    device.region_info_sized(region, argsz),
                    Err(EINVAL),
                    "{argsz}"
                );
            }
        }
    }
}

/// Ids of the capabilities, and where each ends.
fn chain(info: &[u32; 64]) -> Vec<(u16, u32)> {
    let mut at = info[3];
    let mut found = Vec::new();
    while at != 0 {
        assert!(at >= HEADER && at % 8 == 0 && found.len() < 8);
        let word = info[at as usize / 4];
        let (id, version) = (word as u16, (word >> 16) as u16);
        assert_eq!(version, REGION_CAP_VERSION);
        // Header of 8 bytes, and 8 behind it.
        let payload = if id == MSIX_MAPPABLE { 0 } else { 8 };
        found.push((id, at + 8 + payload));
        at = info[at as usize / 4 + 1];
    }
    found
}

#[test]
fn the_number_of_regions_does_not_count_aliases() {
    let device = display();
    let before = device.info().unwrap();
    device.alias(FRAME_BUFFER, ALIAS_WC).unwrap();
    device.alias(2, ALIAS_WC).unwrap();
    assert_eq!(device.info().unwrap(), before);
}

#[test]
fn an_index_that_is_no_alias_is_what_it_is_with_stock() {
    let answers = |device: &Device| -> Vec<_> {
        let mut bytes = [0; 4];
        (9..30)
            .flat_map(|index| {
                let mut answers = vec![
                    device.region_info(index).map(drop),
                    device.read(index, 0, &mut bytes).map(drop),
                    device.write(index, 0, &bytes).map(drop),
                ];
                let offset = u64::from(index) << 40;
                answers.push(
                    How::shared()
                        .map(device.as_fd(), offset, page_size())
                        .map(drop),
                );
                answers
            })
            .collect()
    };
    let ours = answers(&display());
    let stock = answers(&Device::open_with("display", STOCK));
    assert_eq!(ours, stock);
    assert!(stock.iter().all(Result::is_err), "{stock:?}");
}

// ---- It is the BAR ------------------------------------------------------------------------------

#[test]
fn reads_and_writes_are_those_of_the_bar() {
    let device = display();
    let alias = device.alias(FRAME_BUFFER, ALIAS_WC).unwrap();
    device.write32(alias, 3 * page_size(), 0x1234_5678);
    assert_eq!(device.read32(FRAME_BUFFER, 3 * page_size()), 0x1234_5678);
    device.write32(FRAME_BUFFER, 3 * page_size() + 4, 0x8765_4321);
    assert_eq!(device.read32(alias, 3 * page_size() + 4), 0x8765_4321);
    for offset in [
        0,
        1,
        7,
        page_size() - 3,
        FRAME_BUFFER_LEN - 8,
        FRAME_BUFFER_LEN - 1,
        FRAME_BUFFER_LEN,
        FRAME_BUFFER_LEN + 1,
        1 << 39,
        (1 << 40) - 1,
    ] {
        for length in [0, 1, 3, 8, 100] {
            let (mut a, mut b) = (vec![1; length], vec![1; length]);
            let (of_alias, of_bar) = (
                device.read(alias, offset, &mut a),
                device.read(FRAME_BUFFER, offset, &mut b),
            );
            assert_eq!((of_alias, a), (of_bar, b), "{offset:#x} {length}");
            let bytes = vec![0x5a; length];
            assert_eq!(
                device.write(alias, offset, &bytes),
                device.write(FRAME_BUFFER, offset, &bytes),
                "{offset:#x} {length}"
            );
        }
    }
}

#[test]
fn reads_fail_as_those_of_the_bar_while_memory_is_off() {
    let device = display();
    let alias = device.alias(FRAME_BUFFER, ALIAS_WC).unwrap();
    device.set_memory(false);
    let mut bytes = [0; 4];
    let of_bar = device.read(FRAME_BUFFER, 0, &mut bytes);
    assert!(of_bar.is_err());
    assert_eq!(device.read(alias, 0, &mut bytes), of_bar);
    assert_eq!(
        device.write(alias, 0, &bytes),
        device.write(FRAME_BUFFER, 0, &bytes)
    );
    device.set_memory(true);
    assert_eq!(device.read(alias, 0, &mut bytes), Ok(4));
}

/// A program that knows VFIO and nothing of us: it asks for a region, and maps it.
fn map_region(device: &Device, index: u32) -> Map {
    let info = device.region_info(index).unwrap();
    assert_ne!(info.flags & CAN_BE_MAPPED, 0);
    let how = How::shared().align(huge_size());
    how.map(device.as_fd(), info.offset, info.size).unwrap()
}

#[test]
fn a_program_that_only_maps_regions_gets_write_combining_by_the_index_of_the_alias() {
    let device = display();
    let alias = device.alias(FRAME_BUFFER, ALIAS_WC).unwrap();
    let combining = map_region(&device, alias);
    let uncached = map_region(&device, FRAME_BUFFER);
    for round in 0..2 {
        for at in [
            0,
            5 * page_size(),
            huge_size(),
            FRAME_BUFFER_LEN - page_size(),
        ] {
            combining.write(at, round + at as u32).unwrap();
            assert_eq!(uncached.read(at), Ok(round + at as u32));
            let types = [&combining, &uncached].map(|map| probe::memory_type(map, at).unwrap());
            assert_eq!(types, [MemoryType::WriteCombining, MemoryType::Uncached]);
            let physical =
                [&combining, &uncached].map(|map| probe::entry(map, at).unwrap().physical);
            assert_eq!(physical[0], physical[1]);
        }
        device.set_memory(false);
        device.set_memory(true);
    }
}

#[test]
fn parts_of_it_are_mapped_from_any_page() {
    let device = display();
    let alias = device.alias(FRAME_BUFFER, ALIAS_WC).unwrap();
    let (start, _) = device.function().bar(FRAME_BUFFER);
    for (offset, len) in [
        (page_size(), page_size()),
        (3 * page_size(), 2 * huge_size()),
        (FRAME_BUFFER_LEN - page_size(), page_size()),
        (huge_size(), huge_size()),
    ] {
        let at = u64::from(alias) << 40 | offset;
        let map = How::shared()
            .align(huge_size())
            .map(device.as_fd(), at, len)
            .unwrap();
        for page in [0, len - page_size()] {
            map.write(page, 9).unwrap();
            let entry = probe::entry(&map, page).unwrap();
            assert_eq!(entry.physical, start + offset + page);
            assert_eq!(entry.memory_type, MemoryType::WriteCombining);
        }
    }
}

#[test]
fn what_cannot_be_mapped_of_the_bar_cannot_be_mapped_of_the_alias() {
    let device = display();
    let alias = device.alias(FRAME_BUFFER, ALIAS_WC).unwrap();
    for (how, offset, len) in [
        (How::shared().private(), 0, page_size()),
        (How::shared(), FRAME_BUFFER_LEN, page_size()),
        (
            How::shared(),
            FRAME_BUFFER_LEN - page_size(),
            2 * page_size(),
        ),
        (How::shared(), 0, FRAME_BUFFER_LEN + page_size()),
        (How::shared(), (1 << 40) - page_size(), page_size()),
        (
            How::shared().protection(READ),
            FRAME_BUFFER_LEN,
            page_size(),
        ),
    ] {
        let answer = |region: u32| {
            let at = u64::from(region) << 40 | offset;
            how.map(device.as_fd(), at, len).map(drop)
        };
        assert_eq!(answer(alias), answer(FRAME_BUFFER), "{offset:#x} {len:#x}");
        assert_eq!(answer(alias), Err(EINVAL), "{offset:#x} {len:#x}");
    }
    let how = How::shared().protection(READ);
    let at = u64::from(alias) << 40;
    how.map(device.as_fd(), at, page_size())
        .unwrap()
        .read(0)
        .unwrap();
}

#[test]
fn an_alias_cannot_be_leased() {
    let device = display();
    let alias = device.alias(FRAME_BUFFER, ALIAS_WC).unwrap();
    assert_eq!(
        device.export(alias, &[(0, page_size())]).unwrap_err(),
        ENODEV
    );
}

// ---- It is taken away ---------------------------------------------------------------------------

fn assert_taken_and_given(device: &Device, map: &Map, take: impl Fn(), give: impl Fn()) {
    map.read(0).unwrap();
    take();
    assert_eq!(probe::entry(map, 0), None);
    assert_eq!(map.read(0), Err(Sigbus));
    give();
    map.read(0).unwrap();
    let found = probe::memory_type(map, 0);
    assert_eq!(found, Some(MemoryType::WriteCombining));
    assert_eq!(observe::buffers(device.function()).len(), 1);
}

#[test]
fn every_event_takes_a_mapping_of_an_alias_and_gives_it_back() {
    let device = Device::open("igb");
    let alias = device.alias(0, ALIAS_WC).unwrap();
    let map = map_region(&device, alias);
    assert_taken_and_given(
        &device,
        &map,
        || device.set_memory(false),
        || device.set_memory(true),
    );
    assert_taken_and_given(
        &device,
        &map,
        || device.set_power_state(3),
        || device.set_power_state(0),
    );
    assert_taken_and_given(
        &device,
        &map,
        || assert_eq!(device.feature(SET | LOW_POWER_ENTRY, &mut []), Ok(0)),
        || assert_eq!(device.feature(SET | LOW_POWER_EXIT, &mut []), Ok(0)),
    );
}

#[test]
fn every_reset_takes_a_mapping_of_an_alias() {
    let device = Device::open("igb");
    let alias = device.alias(0, ALIAS_WC).unwrap();
    let map = map_region(&device, alias);
    let resets: [&dyn Fn(); 3] = [
        &|| device.reset().unwrap(),
        &|| device.function().reset().unwrap(),
        &|| device.hot_reset(&[device.group()]).unwrap(),
    ];
    for reset in resets {
        map.read(0).unwrap();
        reset();
        assert_eq!(probe::entry(&map, 0), None);
        map.read(0).unwrap();
        assert_eq!(
            probe::memory_type(&map, 0),
            Some(MemoryType::WriteCombining)
        );
    }
}

#[test]
fn threads_that_touch_bar_and_alias_while_memory_comes_and_goes_see_the_type_of_each() {
    let device = display();
    let alias = device.alias(FRAME_BUFFER, ALIAS_WC).unwrap();
    let maps = [
        (map_region(&device, alias), MemoryType::WriteCombining),
        (map_region(&device, FRAME_BUFFER), MemoryType::Uncached),
    ];
    let touch = |(map, wanted): &(Map, MemoryType)| {
        for at in (0..2 * huge_size()).step_by(97 * page_size() as usize) {
            let _ = map.write(at, 1);
            if let Some(found) = probe::memory_type(map, at) {
                assert_eq!(found, *wanted, "{at:#x}");
            }
        }
    };
    let combine = || touch(&maps[0]);
    let leave = || touch(&maps[1]);
    meanwhile(&[&combine, &combine, &leave], || {
        for _ in 0..100 {
            device.set_memory(false);
            for (map, _) in &maps {
                assert_eq!(probe::entry(map, 0), None);
            }
            device.set_memory(true);
        }
    });
}

#[test]
fn revoking_leases_leaves_a_mapping_of_an_alias() {
    let device = display();
    let alias = device.alias(FRAME_BUFFER, ALIAS_WC).unwrap();
    let map = map_region(&device, alias);
    map.write(0, 5).unwrap();
    let lease = device.export(FRAME_BUFFER, &[(0, huge_size())]).unwrap();
    device.revoke(&lease).unwrap();
    assert!(probe::entry(&map, 0).is_some());
    assert_eq!(map.read(0), Ok(5));
    assert_eq!(device.state(&lease), State::Dead);
}

// ---- How long it lives --------------------------------------------------------------------------

#[test]
fn aliases_end_with_the_device_fd() {
    let index = {
        let device = display();
        let index = device.alias(FRAME_BUFFER, ALIAS_WC).unwrap();
        map_region(&device, index).read(0).unwrap();
        index
    };
    let device = display();
    let mut bytes = [0; 4];
    assert_eq!(device.region_info(index).map(drop), Err(EINVAL));
    assert_eq!(device.read(index, 0, &mut bytes), Err(EINVAL));
    assert_eq!(device.write(index, 0, &bytes), Err(EINVAL));
    let answer = How::shared().map(device.as_fd(), u64::from(index) << 40, page_size());
    assert_eq!(answer.map(drop), Err(EINVAL));
    // A free index is used again, by whoever asks first.
    assert_eq!(device.alias(2, ALIAS_WC), Ok(index));
    let info = device.region_info(index).unwrap();
    assert_eq!(info.size, device.region_info(2).unwrap().size);
}

#[test]
fn a_mapping_of_an_alias_keeps_the_device_open_and_the_alias_with_it() {
    let device = display();
    let function = device.function().clone();
    let group = device.group().clone();
    let alias = device.alias(FRAME_BUFFER, ALIAS_WC).unwrap();
    let map = map_region(&device, alias);
    drop(device);
    map.write(0, 3).unwrap();
    let device = group.device(&function).unwrap();
    assert_eq!(device.alias(FRAME_BUFFER, ALIAS_WC), Ok(alias));
    device.set_memory(false);
    assert_eq!(map.read(0), Err(Sigbus));
    device.set_memory(true);
    assert_eq!(map.read(0), Ok(3));
    drop(device);
    drop(map);
    observe::wait_for_buffers(&function, 0);
    let device = group.device(&function).unwrap();
    assert_eq!(device.region_info(alias).map(drop), Err(EINVAL));
}
