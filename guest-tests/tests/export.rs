//! Feature 11: what can be exported, what is refused, and what the new fd is.
#![cfg(barlease_guest)]

use std::{
    collections::BTreeSet,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Instant,
};

use barlease_abi::{FEATURE_DMA_BUF, MAX_RANGES};
use barlease_guest_tests::{
    errno::{Answer, E2BIG, EFAULT, EINVAL, ENODEV, EOVERFLOW, EPERM},
    lease::{self, Request, State},
    map::{How, Map, READ},
    observe, page_size,
    pci::{self, Parameter},
    process::Child,
    race,
    vfio::{CONFIG_REGION, Device, GET, ROM_REGION, SET, VGA_REGION},
    wait,
};

/// The frame buffer of the display: 64 MiB.
const FRAME_BUFFER: u32 = 0;
/// The registers of the display: a page.
const REGISTERS: u32 = 2;
const FRAME_BUFFER_LEN: u64 = 64 << 20;

fn display() -> Device {
    Device::open("display")
}

fn refused<T>(answer: Answer<T>) -> barlease_guest_tests::errno::Errno {
    match answer {
        Ok(_) => panic!("not refused"),
        Err(errno) => errno,
    }
}

fn export(ranges: &[(u64, u64)]) -> Answer<OwnedFd> {
    display().export(FRAME_BUFFER, ranges)
}

// ---- PROBE --------------------------------------------------------------------------------------

#[test]
fn probe_says_that_get_is_there_and_set_is_not() {
    let device = display();
    assert_eq!(device.probe(FEATURE_DMA_BUF, 0), Ok(()));
    assert_eq!(device.probe(FEATURE_DMA_BUF, GET), Ok(()));
    assert_eq!(device.probe(FEATURE_DMA_BUF, SET), Err(EINVAL));
    assert_eq!(device.probe(FEATURE_DMA_BUF, GET | SET), Err(EINVAL));
}

#[test]
fn set_is_refused() {
    let mut payload = Request::new(FRAME_BUFFER, &[(0, page_size())]).bytes();
    let answer = display().feature(SET | u32::from(FEATURE_DMA_BUF), &mut payload);
    assert_eq!(answer, Err(EINVAL));
}

#[test]
fn an_operation_is_needed() {
    let mut payload = Request::new(FRAME_BUFFER, &[(0, page_size())]).bytes();
    let answer = display().feature(u32::from(FEATURE_DMA_BUF), &mut payload);
    assert_eq!(answer, Err(EINVAL));
}

#[test]
fn probe_exports_nothing() {
    let device = display();
    device.probe(FEATURE_DMA_BUF, GET).unwrap();
    assert_eq!(observe::buffers(device.function()), []);
}

// ---- Values that are refused --------------------------------------------------------------------

#[test]
fn flags_that_are_not_0_are_einval() {
    let device = display();
    for bit in 0..32 {
        let request = Request::new(FRAME_BUFFER, &[(0, page_size())]).flags(1 << bit);
        assert_eq!(refused(device.request(&request)), EINVAL, "bit {bit}");
    }
}

#[test]
fn no_ranges_are_einval() {
    assert_eq!(refused(export(&[])), EINVAL);
}

#[test]
fn a_zero_length_is_einval() {
    let device = display();
    for ranges in [
        &[(0, 0)][..],
        &[(page_size(), 0)],
        &[(0, page_size()), (page_size(), 0)],
        &[(0, 0), (0, page_size())],
    ] {
        let answer = device.export(FRAME_BUFFER, ranges);
        assert_eq!(refused(answer), EINVAL, "{ranges:?}");
    }
}

#[test]
fn an_offset_or_length_that_is_not_page_aligned_is_einval() {
    let device = display();
    for odd in [
        1,
        8,
        512,
        2048,
        page_size() - 1,
        page_size() + 1,
        page_size() + 512,
    ] {
        for range in [(odd, page_size()), (0, odd), (odd, odd)] {
            let answer = device.export(FRAME_BUFFER, &[range]);
            assert_eq!(refused(answer), EINVAL, "{range:?}");
            let answer = device.export(FRAME_BUFFER, &[(0, page_size()), range]);
            assert_eq!(refused(answer), EINVAL, "{range:?}");
        }
    }
}

#[test]
fn a_range_past_the_end_of_the_bar_is_einval() {
    let device = display();
    let end = FRAME_BUFFER_LEN;
    assert!(
        device
            .export(FRAME_BUFFER, &[(end - page_size(), page_size())])
            .is_ok()
    );
    assert!(device.export(FRAME_BUFFER, &[(0, end)]).is_ok());
    for range in [
        (end, page_size()),
        (end - page_size(), 2 * page_size()),
        (0, end + page_size()),
        (1 << 40, page_size()),
        (0, 1 << 40),
        (0, (1 << 63) - page_size()),
    ] {
        let answer = device.export(FRAME_BUFFER, &[range]);
        assert_eq!(refused(answer), EINVAL, "{range:?}");
        let answer = device.export(FRAME_BUFFER, &[(0, page_size()), range, (0, page_size())]);
        assert_eq!(refused(answer), EINVAL, "{range:?}");
    }
}

#[test]
fn a_sum_that_overflows_is_einval() {
    let device = display();
    let top = 0u64.wrapping_sub(page_size());
    for ranges in [
        &[(0, top), (0, page_size())][..],
        &[(0, top), (0, top)],
        &[(0, 1 << 63), (0, 1 << 63)],
    ] {
        let answer = device.export(FRAME_BUFFER, ranges);
        assert_eq!(refused(answer), EINVAL, "{ranges:?}");
    }
}

#[test]
fn a_sum_with_the_top_bit_is_einval() {
    let device = display();
    for ranges in [
        &[(0, 1 << 63)][..],
        &[(0, (1 << 63) - page_size()), (0, page_size())],
        &[(0, 0u64.wrapping_sub(page_size()))],
    ] {
        let answer = device.export(FRAME_BUFFER, ranges);
        assert_eq!(refused(answer), EINVAL, "{ranges:?}");
    }
}

#[test]
fn an_address_that_overflows_is_eoverflow() {
    let device = display();
    let (start, _) = device.function().bar(FRAME_BUFFER);
    let top = 0u64.wrapping_sub(page_size());
    for offset in [
        top,
        0u64.wrapping_sub(start),
        0u64.wrapping_sub(start) + page_size(),
    ] {
        let answer = device.export(FRAME_BUFFER, &[(offset, page_size())]);
        assert_eq!(refused(answer), EOVERFLOW, "{offset:#x}");
        let answer = device.export(FRAME_BUFFER, &[(0, page_size()), (offset, page_size())]);
        assert_eq!(refused(answer), EOVERFLOW, "{offset:#x}");
    }
    // Two pages before, nothing overflows: it is only past the end.
    let offset = 0u64.wrapping_sub(start) - 2 * page_size();
    let answer = device.export(FRAME_BUFFER, &[(offset, page_size())]);
    assert_eq!(refused(answer), EINVAL);
}

#[test]
fn more_than_65536_ranges_are_e2big() {
    let device = display();
    let ranges = vec![(0, page_size()); MAX_RANGES as usize + 1];
    assert_eq!(refused(device.export(FRAME_BUFFER, &ranges)), E2BIG);
}

#[test]
fn e2big_comes_before_the_length_of_the_array_matters() {
    let device = display();
    for number in [MAX_RANGES + 1, 1 << 28, 1 << 31, u32::MAX] {
        // One range is there; the rest is neither announced nor in memory.
        let request = Request::new(FRAME_BUFFER, &[(0, page_size())]).nr_ranges(number);
        assert_eq!(refused(device.request(&request)), E2BIG, "{number}");
        let bytes = request.bytes();
        let answer = device.feature_at_edge(GET | 11, &bytes, bytes.len() as u32);
        assert_eq!(answer, Err(E2BIG), "{number}");
    }
}

#[test]
fn exactly_65536_ranges_are_a_buffer() {
    let device = display();
    let number = u64::from(MAX_RANGES);
    // The pages of 64 MiB four times, backwards.
    let pages = FRAME_BUFFER_LEN / page_size();
    let offset = |range: u64| (number - 1 - range) % pages * page_size();
    let ranges: Vec<_> = (0..number)
        .map(|range| (offset(range), page_size()))
        .collect();
    let fd = device.export(FRAME_BUFFER, &ranges).unwrap();
    assert_eq!(lease::size(&fd), number * page_size());
    assert_eq!(device.status(&fd).unwrap().nr_ranges, MAX_RANGES);
    let map = Map::new(&fd, number * page_size()).unwrap();
    for range in [
        0,
        1,
        511,
        512,
        16_383,
        16_384,
        40_000,
        number - 2,
        number - 1,
    ] {
        let value = 0xba00_0000 | range as u32;
        map.write(range * page_size(), value).unwrap();
        let seen = device.read32(FRAME_BUFFER, offset(range));
        assert_eq!(seen, value, "range {range}");
    }
}

#[test]
fn a_region_that_is_no_bar_is_enodev() {
    let device = display();
    let (_, regions, _) = device.info().unwrap();
    for region in [
        ROM_REGION,
        CONFIG_REGION,
        VGA_REGION,
        regions,
        regions + 1,
        regions + 16,
        0xffff,
        1 << 31,
        u32::MAX,
    ] {
        let answer = device.export(region, &[(0, page_size())]);
        assert_eq!(refused(answer), ENODEV, "region {region}");
    }
}

#[test]
fn an_absent_bar_is_enodev() {
    let device = display();
    for bar in [1, 3, 4, 5] {
        let answer = device.export(bar, &[(0, page_size())]);
        assert_eq!(refused(answer), ENODEV, "BAR {bar}");
    }
}

#[test]
fn a_bar_smaller_than_a_page_is_enodev() {
    let device = Device::open("memory");
    assert_eq!(device.region_info(0).unwrap().size, 256);
    for len in [page_size(), 2 * page_size()] {
        assert_eq!(refused(device.export(0, &[(0, len)])), ENODEV, "{len}");
    }
}

#[test]
fn an_io_bar_is_enodev() {
    let device = Device::open("testdev");
    assert!(device.region_info(1).unwrap().size > 0);
    assert_eq!(refused(device.export(1, &[(0, page_size())])), ENODEV);
}

#[test]
fn open_flags_other_than_access_mode_and_cloexec_are_einval() {
    let device = display();
    let allowed = libc::O_ACCMODE | libc::O_CLOEXEC;
    for flag in (0..32)
        .map(|bit| 1i32 << bit)
        .filter(|flag| flag & allowed == 0)
    {
        for mode in [libc::O_RDONLY, libc::O_RDWR, libc::O_RDWR | libc::O_CLOEXEC] {
            let request = Request::new(FRAME_BUFFER, &[(0, page_size())]).open_flags(mode | flag);
            let answer = device.request(&request);
            assert_eq!(refused(answer), EINVAL, "{flag:#o}");
        }
    }
}

#[test]
fn an_argsz_too_small_for_the_header_is_einval() {
    let device = display();
    let mut payload = Request::new(FRAME_BUFFER, &[(0, page_size())]).bytes();
    for argsz in [0, 4, 8, 12, 23] {
        let answer = device.feature_sized(GET | 11, &mut payload, argsz);
        assert_eq!(answer, Err(EINVAL), "{argsz}");
    }
}

#[test]
fn an_argsz_too_small_for_the_ranges_is_einval() {
    let device = display();
    let mut payload = Request::new(FRAME_BUFFER, &[(0, page_size()); 3]).bytes();
    for argsz in [24, 24 + 16, 24 + 32, 24 + 48 - 1] {
        let answer = device.feature_sized(GET | 11, &mut payload, argsz);
        assert_eq!(answer, Err(EINVAL), "{argsz}");
    }
}

#[test]
fn an_argsz_that_is_larger_than_needed_is_fine() {
    let device = display();
    let request = Request::new(FRAME_BUFFER, &[(0, page_size()); 3]).nr_ranges(2);
    let fd = device.request(&request).unwrap();
    assert_eq!(lease::size(&fd), 2 * page_size());
}

#[test]
fn unreadable_memory_is_efault() {
    let device = display();
    let request = Request::new(FRAME_BUFFER, &[(0, page_size()); 2]);
    let bytes = request.bytes();
    let announced = bytes.len() as u32;
    // Without the fixed part, in the middle of it, without the ranges, in the middle of one.
    for readable in [0, 8, 16, 24, 32, 40] {
        let answer = device.feature_at_edge(GET | 11, &bytes[..readable], announced);
        assert_eq!(answer, Err(EFAULT), "{readable} bytes");
    }
    assert_eq!(observe::buffers(device.function()), []);
}

#[test]
fn values_of_the_fixed_part_are_looked_at_before_the_ranges() {
    let device = display();
    let spoilt = [
        (
            Request::new(FRAME_BUFFER, &[(0, page_size())]).flags(1),
            EINVAL,
        ),
        (
            Request::new(FRAME_BUFFER, &[(0, page_size())]).open_flags(libc::O_APPEND),
            EINVAL,
        ),
        (
            Request::new(FRAME_BUFFER, &[(0, page_size())]).nr_ranges(0),
            EINVAL,
        ),
    ];
    for (request, errno) in spoilt {
        let answer = device.feature_at_edge(GET | 11, &request.bytes()[..16], 32);
        assert_eq!(answer, Err(errno), "{request:?}");
    }
}

#[test]
fn of_two_things_that_are_wrong_the_first_is_the_answer() {
    let _never = never();
    let device = Device::open("nvme");
    let [(bar, table, _), _] = msix_areas(&device);
    let outside = (1 << 40, page_size());
    let no_bar = |ranges: &[(u64, u64)]| Request::new(ROM_REGION, ranges);
    for (request, errno) in [
        (no_bar(&[outside]).flags(1), EINVAL),
        (no_bar(&[outside]).nr_ranges(MAX_RANGES + 1), E2BIG),
        (no_bar(&[outside]).nr_ranges(2), EINVAL),
        (no_bar(&[outside]), ENODEV),
        (no_bar(&[(1, 0)]), ENODEV),
        // Shape of all ranges, then the place of each, then what they hold.
        (Request::new(bar, &[outside, (0, 0)]), EINVAL),
        (Request::new(bar, &[(table, page_size()), outside]), EINVAL),
        (
            Request::new(
                bar,
                &[
                    (table, page_size()),
                    (0u64.wrapping_sub(page_size()), page_size()),
                ],
            ),
            EOVERFLOW,
        ),
        (Request::new(bar, &[(table, page_size())]), EPERM),
    ] {
        assert_eq!(refused(device.request(&request)), errno, "{request:x?}");
    }
    let announced = Request::new(ROM_REGION, &[outside]).bytes();
    let answer = device.feature_at_edge(GET | 11, &announced[..16], 32);
    assert_eq!(answer, Err(ENODEV));
}

#[test]
fn what_is_refused_leaves_nothing() {
    let device = display();
    let before = open_fds();
    for _ in 0..100 {
        let _ = refused(device.export(FRAME_BUFFER, &[(FRAME_BUFFER_LEN, page_size())]));
        let _ = refused(device.export(1, &[(0, page_size())]));
    }
    assert_eq!(open_fds(), before);
    assert_eq!(observe::buffers(device.function()), []);
}

#[test]
fn a_burst_of_refusals_leaves_few_lines_in_the_log() {
    let device = display();
    let mark = format!("refusals {}", observe::random());
    observe::mark(&mark);
    for _ in 0..1000 {
        let _ = refused(device.export(FRAME_BUFFER, &[(FRAME_BUFFER_LEN, page_size())]));
    }
    let log = observe::kernel_log();
    let (_, since) = log.split_once(&mark).unwrap();
    let lines: Vec<_> = since
        .lines()
        .filter(|line| line.contains("refused"))
        .collect();
    // Other tests have used up the limit, and it is whole again after a while: 10 lines in 5 s is
    // the kernel's default.
    assert!(lines.len() <= 20, "{} lines", lines.len());
    let bdf = &device.function().bdf;
    assert!(lines.iter().all(|line| line.contains(bdf)), "{lines:?}");
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn a_process_that_races_its_own_request_gains_nothing() {
    let device = display();
    device.write32(FRAME_BUFFER, 0, 0x5afe);
    let request = Request::new(FRAME_BUFFER, &[(0, page_size())]).bytes();
    let payload: Vec<_> = [0; 8]
        .iter()
        .chain(&request)
        .copied()
        .collect::<Vec<u8>>()
        .chunks(4)
        .map(|word| AtomicU32::new(u32::from_ne_bytes(word.try_into().unwrap())))
        .collect();
    // The number of ranges, of which one is there; the offset; the length.
    let (number, offset, length) = (&payload[5], &payload[6], &payload[8]);
    let flip = || {
        for (word, good, bad) in [
            (offset, 0, FRAME_BUFFER_LEN as u32),
            (length, page_size() as u32, 1 << 30),
            (number, 1, MAX_RANGES),
        ] {
            for now in [bad, good] {
                word.store(now, Ordering::Relaxed);
                race::stay();
            }
        }
    };
    let [mut exported, mut refused] = [0; 2];
    race::meanwhile(&[&flip], || {
        let begin = Instant::now();
        let mut calls = 0;
        while calls < 4000 || ((exported == 0 || refused == 0) && begin.elapsed() < wait::LONG) {
            calls += 1;
            match device.request_shared(&payload) {
                Ok(fd) => {
                    exported += 1;
                    assert_eq!(lease::size(&fd), page_size());
                    assert_eq!(Map::new(&fd, page_size()).unwrap().read(0), Ok(0x5afe));
                }
                Err(errno) => {
                    refused += 1;
                    assert_eq!(errno, EINVAL);
                }
            }
        }
    });
    assert!(
        exported > 0 && refused > 0,
        "{exported} exported, {refused} refused"
    );
}

// ---- MSI-X --------------------------------------------------------------------------------------

/// BAR, first page and length in bytes of what the register at `offset` of the MSI-X capability
/// points to, `bytes` long.
fn msix_area(device: &Device, offset: u64, bytes: u64) -> (u32, u64, u64) {
    let capability = device.capability(0x11).expect("MSI-X");
    let register = u32::from_le_bytes(device.config(capability + offset));
    let (bar, start) = (register & 7, u64::from(register & !7));
    let first = start / page_size() * page_size();
    (
        bar,
        first,
        (start + bytes).next_multiple_of(page_size()) - first,
    )
}

fn msix_areas(device: &Device) -> [(u32, u64, u64); 2] {
    let capability = device.capability(0x11).expect("MSI-X");
    let control = u16::from_le_bytes(device.config(capability + 2));
    let vectors = u64::from(control & 0x7ff) + 1;
    [
        msix_area(device, 4, vectors * 16),
        msix_area(device, 8, vectors.div_ceil(64) * 8),
    ]
}

/// The machine isolates interrupts, so that by default the table is exported.
fn never() -> Parameter {
    Parameter::set("msix_export", "never").unwrap()
}

fn msix_is_refused(name: &str) {
    let _never = never();
    let device = Device::open(name);
    for (bar, first, len) in msix_areas(&device) {
        let size = device.region_info(bar).unwrap().size;
        for page in (first..first + len).step_by(page_size() as usize) {
            let answer = device.export(bar, &[(page, page_size())]);
            assert_eq!(refused(answer), EPERM, "{name}: BAR {bar}, {page:#x}");
        }
        assert_eq!(refused(device.export(bar, &[(0, size)])), EPERM);
    }
}

#[test]
fn the_msix_table_and_pba_of_nvme_are_eperm() {
    msix_is_refused("nvme");
}

#[test]
fn the_msix_table_and_pba_of_igb_are_eperm() {
    msix_is_refused("igb");
}

#[test]
fn the_msix_table_is_exported_where_interrupts_are_isolated() {
    for name in ["nvme", "igb"] {
        let device = Device::open(name);
        for (bar, first, len) in msix_areas(&device) {
            for policy in [None, Some("auto"), Some("always")] {
                let _parameter =
                    policy.map(|policy| Parameter::set("msix_export", policy).unwrap());
                let fd = device.export(bar, &[(first, len)]).unwrap();
                assert_eq!(device.state(&fd), State::Ok, "{name}");
                Map::new(&fd, len).unwrap().read(0).unwrap();
            }
        }
    }
}

#[test]
fn msix_export_is_one_of_three_words() {
    for word in ["\n", "Always", "yes", "1", "auto,never", "alwaysx"] {
        let refused = Parameter::set("msix_export", word);
        assert_eq!(refused.map(drop), Err(EINVAL), "{word}");
    }
    let value = || pci::module_attribute("parameters/msix_export").unwrap();
    assert_eq!(value(), "auto");
    for word in ["never", "always", "auto"] {
        let _parameter = Parameter::set("msix_export", word).unwrap();
        assert_eq!(value(), word);
    }
    assert_eq!(value(), "auto");
}

#[test]
fn pages_beside_the_msix_table_are_exported() {
    let _never = never();
    for name in ["nvme", "igb"] {
        let device = Device::open(name);
        let areas = msix_areas(&device);
        let mut exported = 0;
        for bar in BTreeSet::from(areas.map(|(bar, ..)| bar)) {
            let size = device.region_info(bar).unwrap().size;
            for page in (0..size).step_by(page_size() as usize) {
                let protected = areas.iter().any(|&(other, first, len)| {
                    other == bar && (first..first + len).contains(&page)
                });
                let answer = device.export(bar, &[(page, page_size())]);
                assert_eq!(answer.is_err(), protected, "{name}: BAR {bar}, {page:#x}");
                exported += u32::from(!protected);
            }
        }
        assert!(exported > 0, "{name}: nothing beside the table");
    }
}

#[test]
fn one_range_over_the_msix_table_is_enough() {
    let _never = never();
    let device = Device::open("nvme");
    let [(bar, table, _), _] = msix_areas(&device);
    let free = (0..table.max(page_size()))
        .step_by(page_size() as usize)
        .next()
        .unwrap();
    assert_ne!(free, table);
    assert!(device.export(bar, &[(free, page_size()); 3]).is_ok());
    let answer = device.export(
        bar,
        &[
            (free, page_size()),
            (table, page_size()),
            (free, page_size()),
        ],
    );
    assert_eq!(refused(answer), EPERM);
    let answer = device.export(
        bar,
        &[
            (free, page_size()),
            (free, page_size()),
            (table, page_size()),
        ],
    );
    assert_eq!(refused(answer), EPERM);
}

#[test]
fn another_bar_than_that_of_the_msix_table_is_exported() {
    let device = Device::open("nvme");
    assert!(msix_areas(&device).iter().all(|&(bar, ..)| bar != 2));
    let fd = device.export(2, &[(0, page_size())]).unwrap();
    assert_eq!(device.state(&fd), State::Ok);
}

// ---- The buffer ---------------------------------------------------------------------------------

/// Checks that a buffer is the concatenation of ranges: what is written through it is read through
/// the device fd, and the other way round.
fn is_concatenation(device: &Device, bar: u32, ranges: &[(u64, u64)]) {
    let len = ranges.iter().map(|(_, len)| len).sum();
    let fd = device.export(bar, ranges).unwrap();
    assert_eq!(lease::size(&fd), len);
    let map = Map::new(&fd, len).unwrap();
    let mut begin = 0;
    for &(offset, length) in ranges {
        for page in (0..length).step_by(page_size() as usize) {
            let (in_map, in_bar) = (begin + page, offset + page);
            let value = 0x1000_0000 | (in_map / page_size()) as u32;
            map.write(in_map, value).unwrap();
            assert_eq!(device.read32(bar, in_bar), value, "{ranges:?} {in_map:#x}");
            let last = page_size() - 4;
            device.write32(bar, in_bar + last, !value);
            assert_eq!(
                map.read(in_map + last),
                Ok(!value),
                "{ranges:?} {in_map:#x}"
            );
        }
        begin += length;
    }
}

#[test]
fn one_range_is_a_window_of_the_bar() {
    let device = display();
    is_concatenation(&device, FRAME_BUFFER, &[(0, page_size())]);
    is_concatenation(&device, FRAME_BUFFER, &[(7 * page_size(), 5 * page_size())]);
    is_concatenation(
        &device,
        FRAME_BUFFER,
        &[(FRAME_BUFFER_LEN - page_size(), page_size())],
    );
}

#[test]
fn ranges_may_be_in_any_order() {
    let ranges = [
        (9 * page_size(), 2 * page_size()),
        (0, page_size()),
        (4 * page_size(), 3 * page_size()),
        (2 * page_size(), page_size()),
    ];
    is_concatenation(&display(), FRAME_BUFFER, &ranges);
}

#[test]
fn ranges_may_touch() {
    let ranges = [
        (4 * page_size(), 2 * page_size()),
        (6 * page_size(), page_size()),
        (3 * page_size(), page_size()),
    ];
    is_concatenation(&display(), FRAME_BUFFER, &ranges);
}

#[test]
fn ranges_may_overlap() {
    let device = display();
    let ranges = [(0, 4 * page_size()), (2 * page_size(), 4 * page_size())];
    let fd = device.export(FRAME_BUFFER, &ranges).unwrap();
    let map = Map::new(&fd, 8 * page_size()).unwrap();
    map.write(2 * page_size(), 0xabcd).unwrap();
    assert_eq!(map.read(4 * page_size()), Ok(0xabcd));
    map.write(5 * page_size(), 0xdcba).unwrap();
    assert_eq!(map.read(3 * page_size()), Ok(0xdcba));
    assert_eq!(device.read32(FRAME_BUFFER, 3 * page_size()), 0xdcba);
}

#[test]
fn ranges_may_repeat() {
    let device = display();
    let fd = device
        .export(FRAME_BUFFER, &[(5 * page_size(), page_size()); 4])
        .unwrap();
    assert_eq!(lease::size(&fd), 4 * page_size());
    let map = Map::new(&fd, 4 * page_size()).unwrap();
    map.write(2 * page_size() + 8, 77).unwrap();
    for copy in 0..4 {
        assert_eq!(map.read(copy * page_size() + 8), Ok(77));
    }
}

#[test]
fn registers_are_exported_like_memory() {
    let device = display();
    let fd = device.export(REGISTERS, &[(0, page_size())]).unwrap();
    let map = Map::new(&fd, page_size()).unwrap();
    // The identity of the display's registers, and its byte order.
    assert_eq!(map.read(0x500).unwrap() & 0xffff, 0xb0c5);
    assert_eq!(map.read(0x604), Ok(device.read32(REGISTERS, 0x604)));
}

#[test]
fn two_buffers_of_one_range_are_two_views_of_it() {
    let device = display();
    let one = device
        .export(FRAME_BUFFER, &[(0, 4 * page_size())])
        .unwrap();
    let other = device
        .export(FRAME_BUFFER, &[(page_size(), 2 * page_size())])
        .unwrap();
    let [one, other] = [
        Map::new(one, 4 * page_size()),
        Map::new(other, 2 * page_size()),
    ];
    let (one, other) = (one.unwrap(), other.unwrap());
    one.write(2 * page_size(), 4711).unwrap();
    assert_eq!(other.read(page_size()), Ok(4711));
}

#[test]
fn many_buffers_come_and_go() {
    let device = display();
    for _ in 0..3 {
        let fds: Vec<_> = (0..500)
            .map(|i| {
                device
                    .export(FRAME_BUFFER, &[(i * page_size(), page_size())])
                    .unwrap()
            })
            .collect();
        assert_eq!(observe::buffers(device.function()).len(), 500);
        drop(fds);
        observe::wait_for_buffers(device.function(), 0);
    }
}

// ---- The fd -------------------------------------------------------------------------------------

#[test]
fn cloexec_is_as_asked_for() {
    let device = display();
    for (flags, descriptor) in [
        (libc::O_RDWR, 0),
        (libc::O_RDWR | libc::O_CLOEXEC, libc::FD_CLOEXEC),
        (libc::O_RDONLY | libc::O_CLOEXEC, libc::FD_CLOEXEC),
    ] {
        let request = Request::new(FRAME_BUFFER, &[(0, page_size())]).open_flags(flags);
        let fd = device.request(&request).unwrap();
        assert_eq!(lease::fd_flags(&fd).1, descriptor, "{flags:#o}");
    }
}

#[test]
fn the_access_mode_is_as_asked_for() {
    let device = display();
    for mode in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
        let request = Request::new(FRAME_BUFFER, &[(0, page_size())]).open_flags(mode);
        let fd = device.request(&request).unwrap();
        let seen = lease::fd_flags(&fd).0 & libc::O_ACCMODE;
        assert_eq!(seen, mode);
    }
}

#[test]
fn lseek_tells_the_size() {
    let device = display();
    for (ranges, size) in [
        (&[(0, page_size())][..], page_size()),
        (&[(0, 3 * page_size()), (0, page_size())], 4 * page_size()),
        (&[(0, FRAME_BUFFER_LEN)], FRAME_BUFFER_LEN),
    ] {
        let fd = device.export(FRAME_BUFFER, ranges).unwrap();
        assert_eq!(lease::size(&fd), size);
    }
}

fn name_in_maps(map: &Map) -> String {
    let line = observe::maps_line(map.address());
    let path = line.split_whitespace().nth(5).unwrap();
    path.strip_prefix("/dmabuf:").unwrap_or(path).to_owned()
}

#[test]
fn proc_maps_shows_device_and_bar() {
    let device = display();
    let bdf = &device.function().bdf;
    for bar in [FRAME_BUFFER, REGISTERS] {
        let fd = device.export(bar, &[(0, page_size())]).unwrap();
        let map = Map::new(&fd, page_size()).unwrap();
        assert_eq!(name_in_maps(&map), format!("barlease:{bdf}/{bar}"));
    }
}

#[test]
fn proc_maps_shows_the_name_that_the_user_set() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    let map = Map::new(&fd, page_size()).unwrap();
    lease::set_name(&fd, "tenant-7").unwrap();
    assert_eq!(name_in_maps(&map), "tenant-7");
    let [line] = &observe::buffers(device.function())[..] else {
        panic!("one buffer");
    };
    assert_eq!(line.get("name"), "tenant-7");
}

#[test]
fn a_name_that_a_user_set_cannot_forge_a_line_of_the_buffers_file() {
    let device = display();
    let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    for name in [
        "two words",
        "tab\there",
        "line\nbreak",
        "back\\slash",
        "",
        "\u{fc}\u{1b}[2J",
    ] {
        lease::set_name(&fd, name).unwrap();
        let lines = observe::buffers(device.function());
        assert_eq!(lines.len(), 1, "{name:?}");
        let shown = lines[0].get("name");
        assert!(
            shown.bytes().all(|byte| byte.is_ascii_graphic()),
            "{shown:?}"
        );
    }
}

#[test]
fn the_buffers_file_has_a_line_a_buffer() {
    let device = display();
    let bdf = device.function().bdf.clone();
    assert_eq!(observe::buffers(device.function()), []);
    let fd = device
        .export(FRAME_BUFFER, &[(0, 3 * page_size()), (0, page_size())])
        .unwrap();
    let maps: Vec<_> = (0..2)
        .map(|_| Map::new(&fd, page_size()).unwrap())
        .collect();
    let [line] = &observe::buffers(device.function())[..] else {
        panic!("one buffer");
    };
    let columns = ["bar", "ranges", "memattr", "state", "attachments", "mmaps"];
    let seen = columns.map(|column| line.get(column));
    assert_eq!(line.get("name"), format!("barlease:{bdf}/0"));
    assert_eq!(seen, ["0", "2", "NC", "OK", "0", "2"]);
    let size = line.get("size").trim_start_matches("0x");
    assert_eq!(u64::from_str_radix(size, 16), Ok(4 * page_size()));
    let _other = device.export(REGISTERS, &[(0, page_size())]).unwrap();
    assert_eq!(observe::buffers(device.function()).len(), 2);
    drop((maps, fd));
    observe::wait_for_buffers(device.function(), 1);
}

#[test]
fn a_read_only_fd_is_mapped_read_only() {
    let device = display();
    device.write32(FRAME_BUFFER, 0, 31);
    let request = Request::new(FRAME_BUFFER, &[(0, page_size())]).open_flags(libc::O_RDONLY);
    let fd = device.request(&request).unwrap();
    let map = How::shared()
        .protection(READ)
        .map(&fd, 0, page_size())
        .unwrap();
    assert_eq!(map.read(0), Ok(31));
}

#[test]
fn fds_appear_and_vanish_while_others_export() {
    let device = display();
    thread::scope(|scope| {
        for worker in 0..4 {
            let device = &device;
            scope.spawn(move || {
                for round in 0..300 {
                    let offset = (worker * 300 + round) * page_size();
                    let fd = device
                        .export(FRAME_BUFFER, &[(offset, page_size())])
                        .unwrap();
                    assert_eq!(lease::size(&fd), page_size());
                    assert_eq!(device.state(&fd), State::Ok);
                }
            });
        }
    });
    observe::wait_for_buffers(device.function(), 0);
}

#[test]
fn an_fd_that_is_closed_before_the_ioctl_returns_is_no_harm() {
    let device = display();
    // In a process of its own: it closes fds by guessing their numbers.
    let child = Child::start(&[device.as_fd()], |_| {
        // The lowest free number is the next that is given.
        let next = lease::duplicate(std::io::stdin()).as_raw_fd();
        let close = || {
            let _ = lease::close_number(next);
        };
        race::meanwhile(&[&close], || {
            let (mut rounds, mut stolen) = (0, 0);
            // On a busy machine the other thread may come late.
            while rounds < 2000 || stolen == 0 {
                rounds += 1;
                let mut payload = Request::new(FRAME_BUFFER, &[(0, page_size())]).bytes();
                assert_eq!(device.feature(GET | 11, &mut payload), Ok(next));
                stolen += u32::from(lease::close_number(next).is_err());
            }
        });
    });
    child.join();
    observe::wait_for_buffers(device.function(), 0);
}
