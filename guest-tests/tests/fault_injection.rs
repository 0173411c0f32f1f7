//! Every allocation of every operation fails in turn: the error is the right one, nothing is left
//! behind, and what was there before still works.
//!
//! On kernels without fault injection each test says that it is skipped. How many allocations an
//! operation has is printed.
#![cfg(barlease_guest)]

use std::{
    fs::File,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::Path,
    sync::atomic::AtomicU32,
    thread,
    time::Duration,
};

use barlease_abi::{
    ALIAS_WC, BUFFER_DRAINING, FEATURE_DMA_BUF_STOCK, MEMATTR_WC, REASON_MEMORY_OFF, REVOKE_NOWAIT,
};
use barlease_guest_tests::{
    attributes::no_tags,
    buffers::{List, RECORD, id_of},
    errno::{Answer, EAGAIN, EFAULT, EINVAL, EIO, ENODEV, ENOMEM, Errno},
    faults::{self, Faults, Ledger, Memory, Shortage, Trial},
    huge_size,
    importer::{self, Attachment, Domain, Importer, check_that_nothing_is_left},
    lease::{Request, State},
    map::{How, Map, Sigbus},
    page_size,
    pci::{self, BARLEASE, Function},
    probe,
    process::{self, Child, End},
    race,
    vfio::{Device, Group},
    wait::{self, A_WHILE},
};
use barlease_lab::guest;

/// BAR2 of the memory device: 64 MiB.
const BAR: u32 = 2;
const BAR_LEN: u64 = 64 << 20;
const GIB: u64 = 1 << 30;

/// The contents of the BAR where tests look.
const WORD: u32 = 0x0bad_cafe;

/// A test's needs besides its device.
struct Bench {
    faults: Faults,
    ledger: Ledger,
    memory: Memory,
}

impl Bench {
    /// `None` where the kernel cannot let allocations fail. `warm_up` does once what will be tried,
    /// so that what is allocated once and kept is not taken for a leak.
    fn new(functions: &[&Function], warm_up: impl FnOnce()) -> Option<Self> {
        let faults = Faults::prepare()?;
        warm_up();
        Some(Self {
            faults,
            ledger: Ledger::of(functions),
            memory: Memory::now(),
        })
    }

    fn trial<'a>(&'a self, name: &'a str) -> Trial<'a> {
        Trial::new(name, &self.faults, &self.ledger)
    }

    /// Looks for what was left behind.
    fn finish(self) {
        self.memory.wait_for();
    }
}

/// Ranges of a page each with a page between them, so that no two are one.
fn scattered(number: u64) -> Vec<(u64, u64)> {
    (0..number)
        .map(|at| (2 * at * page_size(), page_size()))
        .collect()
}

/// A request of feature 11 with its header, made ready before an allocation fails.
fn payload(request: &Request) -> Vec<AtomicU32> {
    let bytes = request.bytes();
    let words = bytes.chunks_exact(4).map(|word| {
        let word = word.try_into().expect("four bytes");
        AtomicU32::new(u32::from_ne_bytes(word))
    });
    [AtomicU32::new(0), AtomicU32::new(0)]
        .into_iter()
        .chain(words)
        .collect()
}

/// A touch as an answer: nothing that fails may turn it into a SIGBUS.
fn loaded(map: &Map, offset: u64) -> Answer<u32> {
    map.read(offset).map_err(|Sigbus| EIO)
}

/// Something to lease, with `WORD` in each page that tests look at.
fn memory() -> Device {
    let device = Device::open("memory");
    let bar = Map::new(
        device.export(BAR, &[(0, BAR_LEN)]).expect("an export"),
        BAR_LEN,
    );
    let bar = bar.expect("a mapping");
    for page in (0..2 * huge_size()).step_by(page_size() as usize) {
        bar.write(page, WORD).expect("a BAR");
    }
    device
}

#[test]
fn exporting() {
    let device = memory();
    let one = payload(&Request::new(BAR, &[(0, huge_size())]));
    let some = payload(&Request::new(BAR, &scattered(300)));
    let most = payload(&Request::new(BAR, &[(0, page_size()); 65_536]));
    let warm_up = || drop(device.request_shared(&one));
    let Some(bench) = Bench::new(&[device.function()], warm_up) else {
        return;
    };
    for (name, payload, size) in [
        ("export of 1 range", &one, huge_size()),
        ("export of 300 ranges", &some, 300 * page_size()),
        ("export of 65536 ranges", &most, 65_536 * page_size()),
    ] {
        let points = bench.trial(name).run_on(
            || (),
            |()| device.request_shared(payload),
            |(), fd| {
                assert_eq!(device.state(&fd), State::Ok);
                assert_eq!(device.status(&fd).unwrap().size, size);
            },
        );
        assert!(points.refused > 0, "{points}");
    }
    let points = bench
        .trial("export by the stock exporter")
        .run(|| device.request_shared_of(FEATURE_DMA_BUF_STOCK, &some));
    assert!(points.refused > 0, "{points}");
    bench.finish();
}

#[test]
fn what_is_asked_of_a_lease() {
    let device = memory();
    let Some(bench) = Bench::new(&[device.function()], || ()) else {
        return;
    };
    let lease = || device.export(BAR, &[(0, page_size())]).expect("an export");
    bench.trial("STATUS").never_fails().run_on(
        lease,
        |fd| device.status(&*fd),
        |_, status| {
            assert_eq!(status.size, page_size());
        },
    );
    bench.trial("MEMATTR").never_fails().run_on(
        lease,
        |fd| device.memattr(&*fd, MEMATTR_WC),
        |fd, ()| assert_eq!(device.status(&*fd).unwrap().memattr, MEMATTR_WC),
    );
    bench.trial("REVOKE").never_fails().run_on(
        lease,
        |fd| device.revoke(&*fd),
        |fd, ()| assert_eq!(device.state(&*fd), State::Dead),
    );
    for flags in [0, REVOKE_NOWAIT] {
        bench.trial("REVOKE_ID").never_fails().run_on(
            lease,
            |fd| device.revoke_id_raw(id_of(&*fd), flags, 0),
            |fd, ()| assert_eq!(device.state(&*fd), State::Dead),
        );
    }
    bench.trial("LIST").run_on(
        lease,
        |_| device.list(&List::new(0, 8)),
        |fd, listed| {
            let records = listed.records(RECORD);
            assert!(records.iter().any(|record| record.id == id_of(&*fd)));
        },
    );
    bench.trial("EVENTS").run_on(
        process::eventfd,
        |event| device.events_number(event.as_raw_fd(), 0),
        |event, ()| {
            device.set_memory(false);
            device.set_memory(true);
            assert!(process::is_signalled_within(event, wait::LONG));
        },
    );
    device.events_number(-1, 0).expect("no eventfd");
    bench.trial("ALIAS_REGION").never_fails().run_on(
        || (),
        |()| device.alias(BAR, ALIAS_WC),
        |(), index| assert_eq!(device.alias(BAR, ALIAS_WC), Ok(index)),
    );
    bench.finish();
}

#[test]
fn steering_tags() {
    let device = Device::open("trapped");
    let Some(bench) = Bench::new(&[device.function()], || ()) else {
        return;
    };
    bench.trial("TPH").never_fails().run_on(
        || device.export(0, &[(0, page_size())]).expect("an export"),
        |fd| device.tph(&*fd, no_tags()),
        |_, ()| (),
    );
    bench.finish();
}

#[test]
fn asking_about_regions() {
    // Its BAR has a sparse-mmap capability, and BARs have ours.
    let device = Device::open("nvme");
    let alias = device.alias(2, ALIAS_WC).expect("an alias");
    let Some(bench) = Bench::new(&[device.function()], || drop(device.region_info(alias))) else {
        return;
    };
    for (name, index) in [
        ("REGION_INFO of a BAR", 2),
        ("REGION_INFO of a BAR with the MSI-X table", 0),
        ("REGION_INFO of an alias", alias),
    ] {
        let expected = device.region_info(index).expect("a region");
        let points = bench.trial(name).run_on(
            || (),
            |()| device.region_info(index),
            |(), info| assert_eq!(info, expected),
        );
        assert!(points.refused > 0, "{points}");
    }
    bench.finish();
}

/// With a device without an interrupt pin: for one with, Linux 7.3-rc7 asks ACPI, which uses freed
/// memory after an allocation of its own has failed (`acpi_ns_get_attached_object`), with the stock
/// driver, too.
#[test]
fn opening_and_closing_the_device() {
    let function = Function::named("memory");
    function.bind(BARLEASE);
    let group = Group::open(&function);
    let open = || group.device(&function);
    let Some(bench) = Bench::new(&[&function], || drop(open())) else {
        return;
    };
    // The core opens a device whose BAR it could not map; that BAR can then not be leased (ENODEV).
    let (mut without, mut last) = (0, Ok(()));
    let points = bench.trial("open").run_on(
        || (),
        |()| open(),
        |(), device| {
            let lease = device.export(BAR, &[(0, page_size())]);
            last = lease.map(|fd| assert_eq!(device.state(&fd), State::Ok));
            if last != Ok(()) {
                assert_eq!(last, Err(ENODEV));
                without += 1;
            }
        },
    );
    assert_eq!(last, Ok(()), "no allocation failed");
    assert!(without <= points.all - points.refused);
    assert!(points.refused > 0, "{points}");
    let leases = || {
        let device = open().expect("a device");
        let fd = device.export(BAR, &[(0, page_size())]).expect("an export");
        let map = Map::new(&fd, page_size()).expect("a mapping");
        assert_eq!(map.read(0).map(drop), Ok(()));
        (Some(device), fd, map)
    };
    bench.trial("close").never_fails().run_on(
        leases,
        |(device, ..)| {
            drop(device.take());
            Ok(())
        },
        |(_, _, map), ()| assert_eq!(map.read(0), Err(Sigbus)),
    );
    bench.finish();
}

#[test]
fn mapping_into_a_process() {
    let device = memory();
    let fd = device.export(BAR, &[(0, huge_size())]).expect("an export");
    let alias = u64::from(device.alias(BAR, ALIAS_WC).expect("an alias"));
    let Some(bench) = Bench::new(&[device.function()], || drop(Map::new(&fd, huge_size()))) else {
        return;
    };
    let works = |map: &Map| assert_eq!(map.read(0), Ok(WORD));
    let points = bench.trial("mmap of a lease").run_on(
        || (),
        |()| Map::new(&fd, huge_size()),
        |(), map| works(&map),
    );
    assert!(points.refused > 0, "{points}");
    for (name, region) in [
        ("mmap of a BAR", u64::from(BAR)),
        ("mmap of an alias", alias),
    ] {
        let points = bench.trial(name).run_on(
            || (),
            |()| How::shared().map(&device, region << 40, huge_size()),
            |(), map| works(&map),
        );
        assert!(points.refused > 0, "{points}");
    }
    let lease = || Map::new(&fd, huge_size()).expect("a mapping");
    let bar = || {
        let map = How::shared().map(&device, u64::from(BAR) << 40, huge_size());
        map.expect("a mapping")
    };
    let ways: [(&str, &dyn Fn() -> Map); 2] = [("a lease", &lease), ("a BAR", &bar)];
    for (name, prepare) in ways {
        let trial_name = format!("split of a mapping of {name}");
        let points = bench.trial(&trial_name).run_on(
            prepare,
            |map| map.try_unmap(4 * page_size(), page_size()),
            |map, ()| {
                assert_eq!(map.read(0), Ok(WORD));
                assert_eq!(map.read(5 * page_size()), Ok(WORD));
            },
        );
        assert!(points.refused > 0, "{points}");
        let trial_name = format!("move of a mapping of {name}");
        let points = bench.trial(&trial_name).run_on(
            || {
                let map = prepare();
                (map.place(), Some(map))
            },
            |(place, map)| match map.take().expect("a mapping").moved_to(place) {
                Ok(moved) => Ok(moved),
                Err((back, errno)) => {
                    *map = Some(back);
                    Err(errno)
                }
            },
            |_, moved| works(&moved),
        );
        assert!(points.refused > 0, "{points}");
    }
    let points = bench
        .trial("fork with a mapping of a BAR")
        .errors(&[ENOMEM, EAGAIN])
        .run_on(bar, |_| faults::fork(), |map, ()| works(map));
    assert!(points.refused > 0, "{points}");
    bench.finish();
}

#[test]
fn touching_a_mapping() {
    let device = memory();
    let lease = |write_combining: bool| {
        let fd = device
            .export(BAR, &[(0, 2 * huge_size())])
            .expect("an export");
        if write_combining {
            device.memattr(&fd, MEMATTR_WC).expect("write-combining");
        }
        fd
    };
    let (uncached, write_combining) = (lease(false), lease(true));
    let zero = File::open("/dev/zero").expect("/dev/zero");
    let Some(bench) = Bench::new(&[device.function()], || ()) else {
        return;
    };
    // Alone in its GiB of addresses, a mapping needs page tables of its own on each level.
    let alone = How::shared().align(GIB);
    let crooked = alone.skew(page_size());
    for (name, fd, how, len, entry) in [
        (
            "touch of a page",
            &uncached,
            alone,
            page_size(),
            page_size(),
        ),
        ("touch of 2 MiB", &uncached, alone, huge_size(), huge_size()),
        (
            "touch of a run of pages",
            &uncached,
            crooked,
            huge_size(),
            page_size(),
        ),
        (
            "touch of write-combining pages",
            &write_combining,
            alone,
            huge_size(),
            page_size(),
        ),
    ] {
        let map = || how.map(fd, 0, len).expect("a mapping");
        let points = bench.trial(name).never_fails().run_on(
            map,
            |map| loaded(map, 0),
            |map, value| {
                assert_eq!(value, WORD);
                let size = probe::entry(map, 0).map(|entry| entry.size);
                assert_eq!(size, Some(entry));
                assert_eq!(map.touch_all(), Ok(()));
            },
        );
        assert!(points.all > 0, "{points}");
        // No signal comes of a touch by the kernel: the system call fails, and works the next time.
        let name = format!("{name} by the kernel");
        let points = bench.trial(&name).errors(&[EFAULT]).run_on(
            map,
            |map| map.receive_from(&zero),
            |map, length| {
                assert_eq!(length, 4);
                assert_eq!(map.write(0, WORD), Ok(()));
            },
        );
        assert!(points.refused > 0, "{points}");
    }
    bench.finish();
}

fn attached(importer: &Importer, fd: &OwnedFd) -> Attachment {
    importer.attach(fd).expect("an attachment")
}

fn mapped(importer: &Importer, fd: &OwnedFd) -> Attachment {
    let attachment = attached(importer, fd);
    attachment.map().expect("a mapping");
    attachment
}

/// All that an importer does, on leases of one range and of many.
fn importing(reaches: impl Fn(&Attachment)) {
    let device = memory();
    let importer = Importer::open();
    let one = device.export(BAR, &[(0, huge_size())]).expect("an export");
    let many = device.export(BAR, &scattered(300)).expect("an export");
    let warm_up = || drop([&one, &many].map(|fd| mapped(&importer, fd)));
    let Some(bench) = Bench::new(&[device.function()], warm_up) else {
        return;
    };
    let points = bench.trial("attach").run_on(
        || (),
        |()| importer.attach(&one),
        |(), attachment| {
            attachment.map().expect("a mapping");
            reaches(&attachment);
        },
    );
    assert!(points.refused > 0, "{points}");
    for (name, fd) in [("1 range", &one), ("300 ranges", &many)] {
        let name_of_trial = format!("first map of {name}");
        let points = bench.trial(&name_of_trial).run_on(
            || attached(&importer, fd),
            |attachment| attachment.map(),
            |attachment, ()| reaches(attachment),
        );
        assert!(points.refused > 0, "{points}");
        let name_of_trial = format!("map of {name}");
        let points = bench.trial(&name_of_trial).run_on(
            || {
                let attachment = mapped(&importer, fd);
                attachment.unmap().expect("an unmap");
                attachment
            },
            |attachment| attachment.map(),
            |attachment, ()| reaches(attachment),
        );
        assert!(points.refused > 0, "{points}");
        let name_of_trial = format!("unmap of {name}");
        bench.trial(&name_of_trial).never_fails().run_on(
            || mapped(&importer, fd),
            |attachment| attachment.unmap(),
            |attachment, ()| assert!(!attachment.is_mapped()),
        );
        let name_of_trial = format!("detach from {name}");
        bench.trial(&name_of_trial).never_fails().run_on(
            || Some(mapped(&importer, fd)),
            |attachment| attachment.take().expect("an attachment").detach(),
            |_, ()| assert_eq!(device.status(fd).unwrap().nr_attachments, 0),
        );
    }
    bench.finish();
}

#[test]
fn importing_through_the_iommu() {
    importing(|attachment| {
        let bytes = attachment.read(page_size(), 4);
        assert_eq!(bytes, Ok(WORD.to_ne_bytes().to_vec()));
    });
}

#[test]
fn importing_without_translation() {
    let _domain = Domain::set("identity");
    // edu itself does not reach so far up.
    let _mask = Importer::open().mask(64);
    importing(|attachment| assert!(attachment.is_mapped()));
}

#[test]
fn taking_away() {
    let device = memory();
    let importer = Importer::open();
    let leased = || {
        let fd = device.export(BAR, &scattered(20)).expect("an export");
        let map = Map::new(&fd, 20 * page_size()).expect("a mapping");
        assert_eq!(map.touch_all(), Ok(()));
        let attachment = mapped(&importer, &fd);
        (fd, map, attachment)
    };
    let Some(bench) = Bench::new(&[device.function()], || drop(leased())) else {
        return;
    };
    bench
        .trial("REVOKE with a mapping and an importer")
        .never_fails()
        .run_on(
            leased,
            |(fd, ..)| device.revoke(&*fd),
            |(_, map, attachment), ()| {
                assert_eq!(map.read(0), Err(Sigbus));
                assert!(!attachment.is_mapped());
            },
        );
    // The kernel's own part of a config write may fail; what is leased is accessible or not as
    // COMMAND then says.
    bench.trial("COMMAND: memory off").never_fails().run_on(
        leased,
        |_| {
            device.set_memory(false);
            Ok(())
        },
        |(fd, map, attachment), ()| {
            assert_eq!(device.state(&*fd), State::Revoked(REASON_MEMORY_OFF));
            assert_eq!(map.read(0), Err(Sigbus));
            assert!(!attachment.is_mapped());
            device.set_memory(true);
            assert_eq!(map.read(0), Ok(WORD));
        },
    );
    bench.trial("COMMAND: memory on").never_fails().run_on(
        || {
            let leased = leased();
            device.set_memory(false);
            leased
        },
        |_| {
            device.set_memory(true);
            Ok(())
        },
        |(fd, map, _), ()| {
            assert_eq!(device.state(&*fd), State::Ok);
            assert_eq!(map.read(0), Ok(WORD));
        },
    );
    bench.trial("VFIO_DEVICE_RESET").run_on(
        leased,
        |_| device.reset(),
        |(fd, map, attachment), ()| {
            assert!(!attachment.is_mapped());
            assert_eq!(device.state(&*fd), State::Ok);
            assert_eq!(map.read(0).map(drop), Ok(()));
        },
    );
    bench.finish();
}

/// A file of our driver's to write the address of a function to.
fn driver_file(name: &str) -> File {
    let path = Path::new("/sys/bus/pci/drivers").join(BARLEASE).join(name);
    File::options().write(true).open(path).expect("a driver")
}

fn write(file: &File, text: &str) -> Answer<()> {
    let written = file.write_at(text.as_bytes(), 0);
    written.map(drop).map_err(|error| Errno::of(&error))
}

/// Registering with VFIO afterwards is left out: Linux 7.3-rc7 itself warns when an allocation of
/// that fails (`vfio_group_release`, from `vfio_create_group`), with the stock driver, too. A port
/// is no function that VFIO takes: all that comes before is done and, as after a registration that
/// failed, undone.
#[test]
fn binding_up_to_the_registration() {
    let port = Function::named("big").port();
    let driver = port.driver().expect("a driver of the port");
    Function::named("memory").bind(BARLEASE);
    let bind = driver_file("bind");
    port.unbind();
    port.set_override(BARLEASE);
    let refused = || match write(&bind, &port.bdf) {
        Err(EINVAL) => Ok(()),
        Err(errno) => Err(errno),
        Ok(()) => panic!("a port was bound"),
    };
    let warm_up = || assert_eq!(refused(), Ok(()));
    if let Some(bench) = Bench::new(&[], warm_up) {
        let points = bench.trial("bind").run(refused);
        assert!(points.refused > 0, "{points}");
        bench.finish();
    }
    port.set_override("\n");
    port.probe();
    assert_eq!(port.driver(), Some(driver));
}

#[test]
fn unbinding() {
    let function = Function::named("memory");
    function.bind(BARLEASE);
    let unbind = driver_file("unbind");
    let again = || {
        function.unbind();
        function.bind(BARLEASE);
    };
    let Some(bench) = Bench::new(&[], again) else {
        return;
    };
    bench.trial("unbind").run_on(
        || function.bind(BARLEASE),
        |()| write(&unbind, &function.bdf),
        |(), ()| assert_eq!(function.driver(), None),
    );
    function.bind(BARLEASE);
    bench.finish();
}

/// The allocations of a load that the module itself makes come last; those before are made for any
/// module.
const LAST: u32 = 30;

#[test]
fn loading_the_module() {
    importer::load();
    check_that_nothing_is_left(&[]);
    assert_eq!(pci::unload_module(), Ok(()));
    // Else the driver would be bound to them by the load.
    for device in guest::devices().unwrap() {
        Function::named(&device.name).set_override("\n");
    }
    let module = File::open(format!("/lib/modules/{}.ko", barlease_abi::MODULE_NAME)).unwrap();
    let unload = || assert_eq!(pci::unload_module(), Ok(()));
    let warm_up = || {
        assert_eq!(faults::load(&module), Ok(()));
        unload();
    };
    if let Some(bench) = Bench::new(&[], warm_up) {
        let (answer, count) = bench.faults.count(|| faults::load(&module));
        assert_eq!(answer, Ok(()));
        unload();
        let points = bench
            .trial("load")
            .from(count.saturating_sub(LAST).max(1))
            // From the driver core, for a folder that it could not make (`module_add_driver`).
            .errors(&[ENOMEM, EINVAL])
            .run_on(|| (), |()| faults::load(&module), |(), ()| unload());
        assert!(points.refused > 0, "{points}");
        bench.finish();
    }
    pci::load_module("");
}

/// REVOKE waits for memory to look at an importer's fences with, and a fatal signal ends that, too:
/// the module looks later.
#[test]
fn a_revocation_that_waits_for_memory_can_be_killed() {
    let Some(shortage) = Shortage::prepare() else {
        return;
    };
    let device = Device::open("memory");
    let fd = device.export(BAR, &[(0, page_size())]).unwrap();
    let attachment = Importer::open().attach(&fd).unwrap();
    attachment.map().unwrap();
    // To wait for two of them as one takes memory.
    let fences = [0, 1].map(|_| attachment.add_fence(0, Duration::ZERO).unwrap());
    let mut child = Child::start(&[device.as_fd(), fd.as_fd()], |link| {
        shortage.begin_for_this_process();
        let answer = device.revoke(&fd);
        link.send(u64::from(answer.is_ok()));
    });
    attachment.wait_for_interruption();
    thread::sleep(A_WHILE);
    assert_eq!(device.state(&fd), State::Dead);
    assert_eq!(device.buffer_flags(&fd), BUFFER_DRAINING);
    child.signal(libc::SIGKILL);
    let signal_all = || {
        for fence in fences {
            race::whatever(attachment.signal_number(fence));
        }
    };
    let end = wait::ends_by_itself("the killed process", || child.wait(), signal_all);
    assert_eq!(end, End::Signal(libc::SIGKILL));
    drop(shortage);
    assert_eq!(device.buffer_flags(&fd), BUFFER_DRAINING);
    let events = device.events();
    signal_all();
    // When the module's own work has looked, which it does every 10 s.
    events.until("the end of draining", || device.buffer_flags(&fd) == 0);
}

#[test]
fn z_nothing_is_left() {
    importer::load();
    check_that_nothing_is_left(&["memory", "nvme", "trapped"]);
}
