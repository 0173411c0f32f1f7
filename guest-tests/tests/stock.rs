//! Everything that is not ours is the core's, untouched: the same device with stock vfio-pci and
//! with our driver.
#![cfg(barlease_guest)]

use std::{
    fs::File,
    io::Read,
    os::fd::{AsRawFd, OwnedFd},
    sync::OnceLock,
};

use barlease_abi::{
    FEATURE_ALIAS_REGION, FEATURE_DMA_BUF_LIST, FEATURE_DMA_BUF_MEMATTR, FEATURE_DMA_BUF_REVOKE,
    FEATURE_DMA_BUF_REVOKE_ID, FEATURE_DMA_BUF_STATUS, FEATURE_DMA_BUF_STOCK, FEATURE_DMA_BUF_TPH,
    FEATURE_EVENTS,
};
use barlease_guest_tests::{
    errno::{Answer, EINVAL, ENOTTY, EOPNOTSUPP, Errno},
    map::{How, Map, READ},
    observe, page_size,
    pci::{BARLEASE, STOCK},
    process,
    vfio::{
        CONFIG_REGION, Device, GET, IRQ_ACTION_TRIGGER, IRQ_DATA_EVENTFD, IRQ_DATA_NONE, MSIX_IRQ,
        PROBE, SET,
    },
};

/// Every device of the machine.
const DEVICES: [&str; 8] = [
    "display", "memory", "pair0", "nvme", "edu", "testdev", "igb", "big",
];

/// The answers that `look` sees of a device, with stock vfio-pci and with our driver.
fn both<T>(name: &str, look: impl Fn(&Device) -> T) -> [T; 2] {
    [STOCK, BARLEASE].map(|driver| {
        let device = Device::open_with(name, driver);
        look(&device)
    })
}

/// The answers that are to be the same, of one device with one driver: a line each.
struct Portrait {
    information: Vec<String>,
    config_space: Vec<String>,
    other_regions: Vec<String>,
    features: Vec<String>,
    mmap: Vec<String>,
    config_writes: Vec<String>,
}

impl Portrait {
    fn of(device: &Device) -> Self {
        // Calls that change the device come last.
        Self {
            information: information(device),
            config_space: config_space(device),
            other_regions: other_regions(device),
            features: features(device),
            mmap: mmap(device),
            config_writes: config_writes(device),
        }
    }
}

/// Checks a part of the portraits of every device, which are taken once: opening takes its time.
fn is_the_same(part: impl Fn(&Portrait) -> &Vec<String>) {
    static PORTRAITS: OnceLock<Vec<(&str, [Portrait; 2])>> = OnceLock::new();
    let take = || DEVICES.map(|name| (name, both(name, Portrait::of))).into();
    for (name, [stock, ours]) in PORTRAITS.get_or_init(take) {
        let (stock, ours) = (part(stock), part(ours));
        assert!(!stock.is_empty());
        assert_eq!(ours.len(), stock.len());
        for (ours, stock) in ours.iter().zip(stock) {
            assert_eq!(ours, stock, "{name}");
        }
    }
}

fn information(device: &Device) -> Vec<String> {
    let (flags, regions, irqs) = device.info().unwrap();
    let mut seen = vec![format!("device: {flags:#x} {regions} {irqs}")];
    for index in 0..regions + 2 {
        let info = device.region_info(index);
        seen.push(format!("region {index}: {info:x?}"));
    }
    for index in 0..irqs + 2 {
        let info = device.irq_info(index);
        seen.push(format!("interrupts {index}: {info:x?}"));
    }
    seen.push(format!("reset set: {:?}", device.hot_reset_info()));
    seen
}

#[test]
fn information_is_the_same() {
    is_the_same(|portrait| &portrait.information);
}

fn config_space(device: &Device) -> Vec<String> {
    let size = device.function().config().len();
    let mut seen = Vec::new();
    let whole = (0..size).step_by(16).map(|offset| (offset as u64, 16));
    let pieces = [
        (0, 1),
        (1, 1),
        (2, 2),
        (3, 5),
        (0x0e, 1),
        (0x33, 9),
        (250, 12),
    ];
    let beyond = [(size as u64 - 2, 4), (size as u64, 1)];
    for (offset, len) in whole.chain(pieces).chain(beyond) {
        let mut bytes = vec![0; len];
        let read = device.read(CONFIG_REGION, offset, &mut bytes);
        seen.push(format!("{offset:#x}+{len}: {read:?} {bytes:02x?}"));
    }
    seen
}

#[test]
fn config_space_is_the_same() {
    is_the_same(|portrait| &portrait.config_space);
}

fn config_writes(device: &Device) -> Vec<String> {
    let size = device.function().config().len() as u64;
    let mut seen = Vec::new();
    // Of any size and alignment, over registers of every kind, the value that is there and others.
    for (offset, bytes) in [
        (0x04, &[0x07, 0x04][..]),
        (0x04, &[0x06]),
        (0x03, &[0xff, 0x06, 0x01]),
        (0x05, &[0x00]),
        (0x0c, &[0x10, 0x20]),
        (0x10, &[0xff; 8]),
        (0x3c, &[0x0b, 0x01]),
        (0x00, &[0xff; 4]),
        (0x02, &[0xff, 0xff, 0x06, 0x00, 0xff, 0xff]),
        (0x34, &[0x00]),
        (0x00, &[]),
        (size - 2, &[0; 4]),
        (size, &[0]),
        (1 << 20, &[0]),
    ] {
        let written = device.write(CONFIG_REGION, offset, bytes);
        let header: [u8; 64] = device.config(0);
        seen.push(format!("{offset:#x} {bytes:x?}: {written:?} {header:02x?}"));
    }
    seen
}

#[test]
fn config_writes_do_the_same() {
    is_the_same(|portrait| &portrait.config_writes);
}

#[test]
fn bars_are_read_and_written_the_same() {
    for (name, bar) in [("display", 0), ("memory", 2), ("testdev", 2), ("big", 2)] {
        let [stock, ours] = both(name, |device| {
            let size = device.region_info(bar).unwrap().size;
            let mut seen = Vec::new();
            for (offset, len) in [(0, 1), (1, 2), (4, 4), (8, 8), (3, 13), (size - 4, 4)] {
                let bytes: Vec<_> = (0..len).map(|i| (offset as u8) ^ i).collect();
                let written = device.write(bar, offset, &bytes);
                let mut back = vec![0; bytes.len()];
                let read = device.read(bar, offset, &mut back);
                assert_eq!(back, bytes, "{name}: {offset:#x}");
                seen.push((written, read));
            }
            seen.push((
                device.write(bar, size - 2, &[0; 4]),
                device.read(bar, size, &mut [0; 4]),
            ));
            seen
        });
        assert_eq!(ours, stock, "{name}");
    }
}

fn other_regions(device: &Device) -> Vec<String> {
    let read = |region| {
        let mut bytes = [0; 4];
        let read = device.read(region, 0, &mut bytes);
        format!("region {region}: {read:?} {bytes:x?}")
    };
    [1, 3, 6, 8, 9, 10, 200].map(read).into()
}

#[test]
fn what_is_no_memory_is_read_the_same() {
    is_the_same(|portrait| &portrait.other_regions);
}

// ---- mmap of the device fd ----------------------------------------------------------------------

fn mmap(device: &Device) -> Vec<String> {
    let mut seen = Vec::new();
    for region in 0..11 {
        let size = device.region_info(region).map_or(0, |info| info.size);
        let region = region_offset(region);
        for (offset, len) in [
            (0, page_size()),
            (0, size),
            (0, size + page_size()),
            (page_size(), page_size()),
            (
                size.saturating_sub(page_size()) & !(page_size() - 1),
                page_size(),
            ),
            (size, page_size()),
            (0, 100),
            (1 << 39, page_size()),
        ] {
            for how in [
                How::shared(),
                How::shared().protection(READ),
                How::shared().private(),
                How::shared().private().protection(READ),
            ] {
                let answer = how.map(device, region + offset, len).map(drop);
                seen.push(format!(
                    "{region:x} {offset:#x}+{len:#x} {how:?}: {answer:?}"
                ));
            }
        }
    }
    seen
}

#[test]
fn what_may_be_mapped_is_the_same() {
    is_the_same(|portrait| &portrait.mmap);
}

fn region_offset(region: u32) -> u64 {
    u64::from(region) << 40
}

#[test]
fn a_bar_smaller_than_a_page_is_mapped_as_with_stock() {
    let [stock, ours] = both("memory", |device| {
        assert_eq!(device.region_info(0).unwrap().size, 256);
        // The mask of ivshmem's doorbell interrupts keeps what is written to it.
        let map = How::shared().map(device, 0, page_size())?;
        map.write(0, 0).unwrap();
        Ok::<_, Errno>((map.read(8).unwrap(), map.read(0).unwrap()))
    });
    assert_eq!(ours, stock);
    assert!(ours.is_ok(), "{ours:?}");
}

#[test]
fn a_bar_smaller_than_a_page_is_taken_away_and_given_back() {
    let device = Device::open("memory");
    let map = How::shared().map(&device, 0, page_size()).unwrap();
    map.read(0).unwrap();
    device.set_memory(false);
    assert!(map.read(0).is_err());
    device.set_memory(true);
    map.read(0).unwrap();
    device.function().reset().unwrap();
    assert_eq!(observe::faults_of(|| map.touch_all().unwrap()), 1);
}

/// Protection, offset, path.
fn line(map: &Map) -> [String; 3] {
    let line = observe::maps_line(map.address());
    let words: Vec<_> = line.split_whitespace().collect();
    [words[1], words[2], words[5]].map(str::to_owned)
}

#[test]
fn proc_maps_shows_offset_and_name_of_a_mapped_bar() {
    let [stock, ours] = both("display", |device| {
        let maps = [
            How::shared().map(device, 0, 4 * page_size()),
            How::shared().map(device, 3 * page_size(), page_size()),
            How::shared().map(device, region_offset(2), page_size()),
        ];
        maps.map(|map| line(&map.unwrap()))
    });
    let bdf = Device::open("display").function().bdf.clone();
    for ((stock, ours), bar) in stock.iter().zip(&ours).zip([0, 0, 2]) {
        assert_eq!(ours[..2], stock[..2]);
        assert!(
            ours[2].ends_with(&format!("barlease:{bdf}/{bar}")),
            "{ours:?}"
        );
    }
}

#[test]
fn a_bar_mapping_loses_no_page_to_partial_munmap() {
    let device = Device::open("display");
    let mut map = How::shared()
        .map(&device, 8 * page_size(), 8 * page_size())
        .unwrap();
    for page in 0..16 {
        device.write32(0, page * page_size(), 1000 + page as u32);
    }
    map.unmap(3 * page_size(), 2 * page_size());
    for page in [0, 1, 2, 5, 6, 7] {
        assert_eq!(map.read(page * page_size()), Ok(1008 + page as u32));
    }
    let map = map_and_move(&device);
    assert_eq!(map.read(page_size()), Ok(1003));
}

fn map_and_move(device: &Device) -> Map {
    let map = How::shared()
        .map(device, 2 * page_size(), 4 * page_size())
        .unwrap();
    map.moved().unwrap()
}

// ---- Interrupts ---------------------------------------------------------------------------------

fn count(event: &OwnedFd) -> Option<u64> {
    let mut bytes = [0; 8];
    let read = File::from(event.try_clone().unwrap()).read(&mut bytes);
    read.ok().map(|_| u64::from_ne_bytes(bytes))
}

fn interrupts(device: &Device) -> Vec<Answer<()>> {
    let (_, number) = device.irq_info(MSIX_IRQ).unwrap();
    let events: Vec<_> = (0..number.min(3)).map(|_| process::eventfd()).collect();
    let fds: Vec<_> = events.iter().map(AsRawFd::as_raw_fd).collect();
    let eventfd = IRQ_DATA_EVENTFD | IRQ_ACTION_TRIGGER;
    let none = IRQ_DATA_NONE | IRQ_ACTION_TRIGGER;
    let used = fds.len() as u32;
    let mut answers = vec![
        device.set_irqs(MSIX_IRQ, eventfd, used, &fds),
        // Makes the first two fire, for tests as this one.
        device.set_irqs(MSIX_IRQ, none, 2, &[]),
        device.set_irqs(
            MSIX_IRQ,
            eventfd,
            number + 1,
            &vec![-1; number as usize + 1],
        ),
        device.set_irqs(17, eventfd, 1, &fds[..1]),
    ];
    let fired: Vec<_> = events.iter().map(count).collect();
    assert_eq!(fired, [Some(1), Some(1), None]);
    answers.push(device.set_irqs(MSIX_IRQ, none, 0, &[]));
    answers.push(device.set_irqs(MSIX_IRQ, none, 1, &[]));
    answers
}

#[test]
fn interrupts_are_set_and_unset_as_with_stock() {
    for name in ["nvme", "igb"] {
        let [stock, ours] = both(name, interrupts);
        assert_eq!(ours, stock, "{name}");
        assert_eq!(ours[0], Ok(()));
        assert_eq!(ours[4], Ok(()));
    }
}

#[test]
fn interrupts_survive_that_memory_is_off() {
    let device = Device::open("nvme");
    let event = process::eventfd();
    let eventfd = IRQ_DATA_EVENTFD | IRQ_ACTION_TRIGGER;
    device.set_memory(false);
    device
        .set_irqs(MSIX_IRQ, eventfd, 1, &[event.as_raw_fd()])
        .unwrap();
    let none = IRQ_DATA_NONE | IRQ_ACTION_TRIGGER;
    device.set_irqs(MSIX_IRQ, none, 1, &[]).unwrap();
    assert_eq!(count(&event), Some(1));
    device.set_irqs(MSIX_IRQ, none, 0, &[]).unwrap();
    assert_eq!(device.command() & 2, 0);
}

// ---- Features -----------------------------------------------------------------------------------

fn features(device: &Device) -> Vec<String> {
    let probe = |feature| {
        let answers = [0, GET, SET].map(|operation| {
            let flags = PROBE | operation | feature;
            device.feature(flags, &mut [])
        });
        format!("feature {feature}: {answers:?}")
    };
    (0..16).map(probe).collect()
}

#[test]
fn features_of_the_kernel_are_probed_the_same() {
    is_the_same(|portrait| &portrait.features);
}

#[test]
fn an_unknown_feature_is_enotty() {
    let device = Device::open("display");
    for feature in [0x7fff, 0xb9ff, 0xba09, 0xba10, 0xbaff, 0xbb00, 0xffff] {
        for operation in [PROBE, PROBE | GET, PROBE | SET, GET, SET] {
            let answer = device.feature(operation | feature, &mut [0; 64]);
            assert_eq!(answer, Err(ENOTTY), "{feature:#x} {operation:#x}");
        }
    }
}

#[test]
fn stock_vfio_pci_has_none_of_the_private_features() {
    let device = Device::open_with("display", STOCK);
    for feature in [
        FEATURE_DMA_BUF_REVOKE,
        FEATURE_DMA_BUF_MEMATTR,
        FEATURE_DMA_BUF_TPH,
        FEATURE_ALIAS_REGION,
        FEATURE_DMA_BUF_STATUS,
        FEATURE_DMA_BUF_STOCK,
        FEATURE_DMA_BUF_LIST,
        FEATURE_DMA_BUF_REVOKE_ID,
        FEATURE_EVENTS,
    ] {
        assert_eq!(device.probe(feature, 0), Err(ENOTTY), "{feature:#x}");
    }
    let function = device.function().clone();
    drop(device);
    function.bind(BARLEASE);
}

#[test]
fn probe_is_truthful() {
    let device = Device::open("display");
    for (feature, operation) in [
        (FEATURE_DMA_BUF_REVOKE, SET),
        (FEATURE_DMA_BUF_MEMATTR, SET),
        (FEATURE_DMA_BUF_TPH, SET),
        (FEATURE_ALIAS_REGION, GET),
        (FEATURE_DMA_BUF_STATUS, GET),
        (FEATURE_DMA_BUF_STOCK, GET),
    ] {
        let probed = device.probe(feature, operation);
        assert_eq!(device.probe(feature, 0), probed, "{feature:#x}");
        // An empty payload is refused for itself only where there is something to refuse it.
        let done = device.feature(operation | u32::from(feature), &mut []);
        match probed {
            Ok(()) => {
                assert_eq!(done, Err(EINVAL), "{feature:#x}");
                let other = GET | SET;
                assert_eq!(device.probe(feature, other), Err(EINVAL), "{feature:#x}");
            }
            Err(errno) => {
                assert!(
                    [ENOTTY, EOPNOTSUPP].contains(&errno),
                    "{feature:#x}: {errno:?}"
                );
                assert_eq!(done, Err(errno), "{feature:#x}");
            }
        }
    }
}

#[test]
fn no_device_here_completes_tph() {
    for name in DEVICES {
        let device = Device::open(name);
        let probed = device.probe(FEATURE_DMA_BUF_TPH, SET);
        assert_eq!(probed, Err(EOPNOTSUPP), "{name}");
    }
}
