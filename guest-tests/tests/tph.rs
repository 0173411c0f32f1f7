//! Steering tags: which devices take them, what is refused, and what importers see. Run on the
//! machine `device`, whose own device completes what it is told to.
#![cfg(barlease_guest)]

use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    sync::atomic::{AtomicU32, Ordering},
};

use barlease_abi::{DmaBufTph, FEATURE_DMA_BUF_TPH, TPH_ST, TPH_ST_EXT};
use barlease_guest_tests::{
    attributes::no_tags,
    errno::{Answer, EBADF, EINVAL, ENODEV, EOPNOTSUPP},
    importer::Importer,
    lease::{Request, no_such_fd},
    map::Map,
    page_size,
    pci::{BARLEASE, Function},
    race::{meanwhile, whatever},
    vfio::{Device, GET, SET},
    witness::Witness,
};
use serde_json::json;

/// Bits 13:12 of Device Capabilities 2.
const NONE: u8 = 0;
const PLAIN: u8 = 1;
const RESERVED: u8 = 2;
const EXTENDED: u8 = 3;

/// Our own device, which says that it completes what `completer` has, newly bound.
fn device(completer: u8) -> Device {
    let witness = Witness::new("trapped");
    witness.set(&json!({"completer": completer}));
    let function = Function::named("trapped");
    // The driver looks when it is bound.
    function.unbind();
    function.bind(BARLEASE);
    Device::open("trapped")
}

fn buffer(device: &Device) -> OwnedFd {
    device.export(0, &[(0, page_size())]).unwrap()
}

fn plain(tag: u8, ph: u8) -> DmaBufTph {
    DmaBufTph {
        flags: TPH_ST,
        steering_tag: tag,
        ph,
        ..no_tags()
    }
}

fn extended(tag: u16, ph: u8) -> DmaBufTph {
    DmaBufTph {
        flags: TPH_ST_EXT,
        steering_tag_ext: tag,
        ph,
        ..no_tags()
    }
}

fn both(tag: u8, tag_ext: u16, ph: u8) -> DmaBufTph {
    DmaBufTph {
        flags: TPH_ST | TPH_ST_EXT,
        steering_tag: tag,
        steering_tag_ext: tag_ext,
        ph,
        ..no_tags()
    }
}

/// The tags that an importer sees in the two namespaces.
fn seen(importer: &Importer, fd: impl AsFd) -> [Answer<(u32, u32)>; 2] {
    [false, true].map(|extended| importer.steering_tag(fd.as_fd(), extended))
}

const UNSET: Answer<(u32, u32)> = Err(EOPNOTSUPP);

// ---- Which devices take them --------------------------------------------------------------------

#[test]
fn devices_that_do_not_complete_them_are_refused() {
    // No device that QEMU emulates does.
    for (name, bar) in [
        ("display", 0),
        ("memory", 2),
        ("pair0", 2),
        ("nvme", 0),
        ("igb", 0),
        ("testdev", 2),
        ("big", 2),
        ("edu", 0),
    ] {
        let device = Device::open(name);
        let fd = device.export(bar, &[(0, page_size())]).unwrap();
        for operations in [0, SET, GET, GET | SET] {
            let answer = device.probe(FEATURE_DMA_BUF_TPH, operations);
            assert_eq!(answer, Err(EOPNOTSUPP), "{name} {operations:#x}");
        }
        for tags in [no_tags(), plain(1, 0), extended(1, 0), both(1, 1, 3)] {
            assert_eq!(device.tph(&fd, tags), Err(EOPNOTSUPP), "{name}");
        }
        // Before anything else is looked at.
        assert_eq!(device.tph_raw(plain(1, 9)), Err(EOPNOTSUPP), "{name}");
    }
}

#[test]
fn a_completer_of_neither_is_refused() {
    for completer in [NONE, RESERVED] {
        let device = device(completer);
        let fd = buffer(&device);
        assert_eq!(device.probe(FEATURE_DMA_BUF_TPH, SET), Err(EOPNOTSUPP));
        for tags in [no_tags(), plain(1, 0), extended(1, 0), plain(1, 9)] {
            assert_eq!(device.tph(&fd, tags), Err(EOPNOTSUPP), "{completer}");
        }
        assert_eq!(device.tph_raw(plain(1, 0)), Err(EOPNOTSUPP), "{completer}");
    }
}

#[test]
fn a_completer_of_8_bits_takes_8_bits() {
    let device = device(PLAIN);
    let fd = buffer(&device);
    assert_eq!(device.probe(FEATURE_DMA_BUF_TPH, SET), Ok(()));
    for tag in [0, 1, 255] {
        for ph in 0..4 {
            assert_eq!(device.tph(&fd, plain(tag, ph)), Ok(()), "{tag} {ph}");
        }
    }
    assert_eq!(device.tph(&fd, no_tags()), Ok(()));
    for tags in [extended(1, 0), extended(0, 0), both(1, 1, 0)] {
        assert_eq!(device.tph(&fd, tags), Err(EOPNOTSUPP), "{tags:?}");
    }
    // An error of the platform comes before an error of the fd.
    assert_eq!(device.tph_raw(extended(1, 0)), Err(EOPNOTSUPP));
}

#[test]
fn a_completer_of_16_bits_takes_both() {
    let device = device(EXTENDED);
    let fd = buffer(&device);
    for tags in [
        plain(255, 3),
        extended(0, 0),
        extended(u16::MAX, 3),
        both(0, 0, 0),
        both(255, u16::MAX, 1),
        no_tags(),
    ] {
        assert_eq!(device.tph(&fd, tags), Ok(()), "{tags:?}");
    }
}

#[test]
fn what_a_device_completes_is_asked_when_it_is_bound() {
    let first = device(PLAIN);
    let fd = buffer(&first);
    assert_eq!(first.tph(&fd, extended(1, 0)), Err(EOPNOTSUPP));
    drop((fd, first));
    let second = device(EXTENDED);
    let fd = buffer(&second);
    assert_eq!(second.tph(&fd, extended(1, 0)), Ok(()));
}

// ---- Refusals -----------------------------------------------------------------------------------

#[test]
fn probe_says_that_they_can_be_set() {
    let device = device(EXTENDED);
    assert_eq!(device.probe(FEATURE_DMA_BUF_TPH, 0), Ok(()));
    assert_eq!(device.probe(FEATURE_DMA_BUF_TPH, GET), Err(EINVAL));
    let get = GET | u32::from(FEATURE_DMA_BUF_TPH);
    assert_eq!(device.feature(get, &mut [0; 12]), Err(EINVAL));
    let set = SET | u32::from(FEATURE_DMA_BUF_TPH);
    for length in [0, 4, 11] {
        assert_eq!(
            device.feature(set, &mut vec![0; length]),
            Err(EINVAL),
            "{length}"
        );
    }
}

#[test]
fn values_without_meaning_are_einval_whatever_the_fd() {
    let device = device(EXTENDED);
    let fd = buffer(&device);
    let wrong = [
        DmaBufTph {
            flags: 4,
            ..no_tags()
        },
        DmaBufTph {
            flags: TPH_ST | 1 << 31,
            ..no_tags()
        },
        DmaBufTph {
            flags: u32::MAX,
            ..no_tags()
        },
        plain(1, 4),
        plain(1, 255),
        extended(1, 4),
        DmaBufTph { ph: 4, ..no_tags() },
        // A tag without its flag.
        DmaBufTph {
            steering_tag: 1,
            ..no_tags()
        },
        DmaBufTph {
            steering_tag_ext: 1,
            ..no_tags()
        },
        DmaBufTph {
            steering_tag_ext: 256,
            ..plain(1, 0)
        },
        DmaBufTph {
            steering_tag: 7,
            ..extended(1, 0)
        },
    ];
    for tags in wrong {
        assert_eq!(device.tph(&fd, tags), Err(EINVAL), "{tags:?}");
        let nowhere = DmaBufTph {
            dmabuf_fd: no_such_fd(),
            ..tags
        };
        assert_eq!(device.tph_raw(nowhere), Err(EINVAL), "{tags:?}");
    }
}

#[test]
fn an_fd_that_is_no_buffer_of_this_device_is_refused() {
    let device = device(EXTENDED);
    let nowhere = DmaBufTph {
        dmabuf_fd: no_such_fd(),
        ..plain(1, 0)
    };
    assert_eq!(device.tph_raw(nowhere), Err(EBADF));
    assert_eq!(device.tph_raw(plain(1, 0)), Err(EBADF));
    assert_eq!(
        device.tph(File::open("/dev/zero").unwrap(), plain(1, 0)),
        Err(EINVAL)
    );
    assert_eq!(device.tph(device.as_fd(), plain(1, 0)), Err(EINVAL));
    let stock = device
        .stock_export(&Request::new(0, &[(0, page_size())]))
        .unwrap();
    assert_eq!(device.tph(&stock, plain(1, 0)), Err(EINVAL));
    let other = Device::open("mapped");
    let foreign = other.export(0, &[(0, page_size())]).unwrap();
    assert_eq!(device.tph(&foreign, plain(1, 0)), Err(ENODEV));
    assert_eq!(other.tph(&foreign, plain(1, 0)), Ok(()));
}

#[test]
fn a_dead_buffer_is_enodev_and_a_revoked_one_takes_tags() {
    let device = device(EXTENDED);
    let fd = buffer(&device);
    device.set_memory(false);
    assert_eq!(device.tph(&fd, plain(1, 0)), Ok(()));
    device.set_memory(true);
    device.revoke(&fd).unwrap();
    assert_eq!(device.tph(&fd, plain(1, 0)), Err(ENODEV));
    assert_eq!(device.tph(&fd, no_tags()), Err(ENODEV));
    assert_eq!(device.tph(&fd, plain(1, 9)), Err(EINVAL));
}

#[test]
fn a_buffer_of_an_earlier_open_is_enodev() {
    let fd = buffer(&device(EXTENDED));
    let device = Device::open("trapped");
    assert_eq!(device.tph(&fd, plain(1, 0)), Err(ENODEV));
}

// ---- The tags that importers see ----------------------------------------------------------------

#[test]
fn the_namespaces_are_apart_and_a_tag_of_0_is_one() {
    let device = device(EXTENDED);
    let importer = Importer::open();
    let fd = buffer(&device);
    assert_eq!(seen(&importer, &fd), [UNSET, UNSET]);
    for (tags, expected) in [
        (plain(7, 2), [Ok((7, 2)), UNSET]),
        (plain(0, 0), [Ok((0, 0)), UNSET]),
        (extended(7, 1), [UNSET, Ok((7, 1))]),
        (extended(0, 3), [UNSET, Ok((0, 3))]),
        (extended(0x1234, 0), [UNSET, Ok((0x1234, 0))]),
        (both(255, 256, 3), [Ok((255, 3)), Ok((256, 3))]),
        (both(0, 0, 0), [Ok((0, 0)), Ok((0, 0))]),
    ] {
        device.tph(&fd, tags).unwrap();
        assert_eq!(seen(&importer, &fd), expected, "{tags:?}");
    }
}

#[test]
fn each_set_replaces_all_and_what_is_refused_replaces_nothing() {
    let device = device(EXTENDED);
    let importer = Importer::open();
    let fd = buffer(&device);
    device.tph(&fd, both(1, 2, 3)).unwrap();
    device.tph(&fd, plain(4, 1)).unwrap();
    assert_eq!(seen(&importer, &fd), [Ok((4, 1)), UNSET]);
    for refused in [plain(9, 4), extended(9, 9), both(9, 9, 4)] {
        assert_eq!(device.tph(&fd, refused), Err(EINVAL));
        assert_eq!(seen(&importer, &fd), [Ok((4, 1)), UNSET]);
    }
    device.tph(&fd, no_tags()).unwrap();
    assert_eq!(seen(&importer, &fd), [UNSET, UNSET]);
    device.tph(&fd, extended(5, 0)).unwrap();
    assert_eq!(seen(&importer, &fd), [UNSET, Ok((5, 0))]);
}

#[test]
fn other_buffers_have_tags_of_their_own() {
    let device = device(EXTENDED);
    let importer = Importer::open();
    let (first, second) = (buffer(&device), buffer(&device));
    device.tph(&first, plain(1, 1)).unwrap();
    assert_eq!(seen(&importer, &second), [UNSET, UNSET]);
    device.tph(&second, extended(2, 2)).unwrap();
    assert_eq!(seen(&importer, &first), [Ok((1, 1)), UNSET]);
    assert_eq!(seen(&importer, &second), [UNSET, Ok((2, 2))]);
}

#[test]
fn a_dma_buf_of_another_exporter_has_no_tags() {
    let device = device(EXTENDED);
    let importer = Importer::open();
    let stock = device
        .stock_export(&Request::new(0, &[(0, page_size())]))
        .unwrap();
    assert_eq!(seen(&importer, &stock), [UNSET, UNSET]);
}

#[test]
fn tags_are_there_after_memory_was_taken_away_and_given_back() {
    let device = device(EXTENDED);
    let importer = Importer::open();
    let fd = buffer(&device);
    device.tph(&fd, both(3, 4, 1)).unwrap();
    let expected = [Ok((3, 1)), Ok((4, 1))];
    let attachment = importer.attach(&fd).unwrap();
    device.set_memory(false);
    assert_eq!(seen(&importer, &fd), expected);
    device.set_memory(true);
    assert_eq!(seen(&importer, &fd), expected);
    device.reset().unwrap();
    assert_eq!(seen(&importer, &fd), expected);
    device.tph(&fd, plain(8, 0)).unwrap();
    assert_eq!(seen(&importer, &fd), [Ok((8, 0)), UNSET]);
    drop(attachment);
}

/// As an importer does it: asks when it maps, and again when it maps after an invalidation.
#[test]
fn an_importer_that_is_mapped_finds_the_tags_again_after_an_invalidation() {
    let device = device(EXTENDED);
    let importer = Importer::open();
    let fd = buffer(&device);
    let attachment = importer.attach(&fd).unwrap();
    let events: [(&str, &dyn Fn()); 5] = [
        ("memory off", &|| device.set_memory(false)),
        ("D3hot", &|| device.set_power_state(3)),
        ("reset", &|| device.reset().unwrap()),
        ("reset by sysfs", &|| device.function().reset().unwrap()),
        ("command", &|| device.set_command(device.command())),
    ];
    for (n, (event, happens)) in (1..).zip(events) {
        let tags = both(n, 0x100 + u16::from(n), 2);
        device.tph(&fd, tags).unwrap();
        attachment.map().unwrap();
        let expected = [Ok((u32::from(n), 2)), Ok((0x100 + u32::from(n), 2))];
        assert_eq!(seen(&importer, &fd), expected, "{event}");
        // New tags alone take nothing away.
        assert!(attachment.is_mapped());
        happens();
        let status = attachment.status();
        assert_eq!(
            (status.mapped, status.interruptions),
            (0, n.into()),
            "{event}"
        );
        assert_eq!(seen(&importer, &fd), expected, "{event}");
        // They can be changed while nobody may map.
        device.tph(&fd, extended(9, 1)).unwrap();
        assert_eq!(seen(&importer, &fd), [UNSET, Ok((9, 1))], "{event}");
        device.set_power_state(0);
        device.set_memory(true);
        attachment.map().unwrap();
        assert_eq!(seen(&importer, &fd), [UNSET, Ok((9, 1))], "{event}");
        attachment.write(0, &[n; 16]).unwrap();
        attachment.unmap().unwrap();
    }
}

#[test]
fn an_importer_that_asks_while_tags_are_set_and_memory_goes_gets_what_was_set_at_once() {
    let device = device(EXTENDED);
    let importer = Importer::open();
    let fd = buffer(&device);
    let attachment = importer.attach(&fd).unwrap();
    device.tph(&fd, both(1, 1, 1)).unwrap();
    let asked = AtomicU32::new(0);
    let asks = || {
        whatever(attachment.map());
        for seen in seen(&importer, &fd) {
            let (tag, hint) = seen.unwrap();
            assert!(tag == hint && (1..=3).contains(&tag), "{tag} {hint}");
        }
        asked.fetch_add(1, Ordering::Relaxed);
    };
    let comes_and_goes = || {
        device.set_memory(false);
        device.set_memory(true);
    };
    meanwhile(&[&asks, &comes_and_goes], || {
        let mut sets = 0;
        let interrupted = || attachment.status().interruptions > 0;
        while sets < 300 || asked.load(Ordering::Relaxed) < 100 || !interrupted() {
            let n = (sets % 3 + 1) as u8;
            device.tph(&fd, both(n, n.into(), n)).unwrap();
            sets += 1;
        }
    });
}

#[test]
fn tags_do_not_change_what_a_process_sees() {
    let device = device(EXTENDED);
    let fd = buffer(&device);
    let map = Map::new(&fd, page_size()).unwrap();
    map.write(0, 11).unwrap();
    device.tph(&fd, both(1, 2, 3)).unwrap();
    assert_eq!(map.read(0), Ok(11));
}
