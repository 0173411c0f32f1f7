//! The needs of a driver, from the library and on the real kernel: interrupts, DMA, config space,
//! resets, functions that share an address space, devices that somebody else opened; and the leases
//! of any device descriptor.
#![cfg(barlease_guest)]

use std::{
    fs,
    os::fd::{AsFd, AsRawFd},
    path::Path,
    thread,
    time::Duration,
};

use barlease::{
    Backend, Bdf, Device, DmaAccess, DmaBuffer, DmaOptions, Error, EventFd, InterruptKind, Iommu,
    LeaseId, Leases, Mapping, OpenOptions, Reasons, Revoked, State, VfToken,
    config::{Capability, Command},
    pci::Pci,
};
use barlease_guest_tests::{
    observe, page_size,
    pci::{self, BARLEASE, Function},
    vfio,
};

/// Far away.
const LONG: Duration = Duration::from_secs(60);
/// For what must not come.
const SHORT: Duration = Duration::from_millis(200);

macro_rules! assert_error {
    ($result:expr, $variant:ident) => {
        match $result {
            Err(Error::$variant { .. }) => {}
            other => panic!("not {}: {other:?}", stringify!($variant)),
        }
    };
}

/// Bound to our driver.
fn bdf(name: &str) -> Bdf {
    observe::mark_test();
    let bdf = Function::named(name).bdf.parse().unwrap();
    Pci::system().bind(bdf, BARLEASE).unwrap();
    bdf
}

fn open(name: &str) -> Device {
    Device::open(bdf(name)).unwrap()
}

/// edu, which computes, raises interrupts, and copies between memory and a buffer of its own.
struct Edu {
    device: Device,
    registers: Mapping,
}

impl Edu {
    const FACTORIAL: usize = 0x08;
    const STATUS: usize = 0x20;
    const RAISED: usize = 0x24;
    const RAISE: usize = 0x60;
    const ACKNOWLEDGE: usize = 0x64;
    const SOURCE: usize = 0x80;
    const TARGET: usize = 0x88;
    const COUNT: usize = 0x90;
    const COMMAND: usize = 0x98;
    /// Its buffer.
    const BUFFER: u64 = 0x4_0000;

    fn new(device: Device) -> Self {
        let config = device.config().unwrap();
        config
            .update_command(|command| command | Command::MEMORY | Command::MASTER)
            .unwrap();
        let registers = device.map_region(0, ..0x1000).unwrap();
        Self { device, registers }
    }

    fn write(&self, register: usize, value: u32) {
        self.registers.typed(register).unwrap().write(value);
    }

    fn read(&self, register: usize) -> u32 {
        self.registers.typed(register).unwrap().read()
    }

    fn copy(&self, from: u64, to: u64, count: u64, command: u64) {
        for (register, value) in [
            (Self::SOURCE, from),
            (Self::TARGET, to),
            (Self::COUNT, count),
            (Self::COMMAND, command | 1),
        ] {
            self.registers.typed::<u64>(register).unwrap().write(value);
        }
        let command = self.registers.typed::<u64>(Self::COMMAND).unwrap();
        command.poll_until(1, 0, LONG).unwrap();
    }

    /// Takes what is at one address to another, by way of its buffer.
    fn transfer(&self, from: u64, to: u64, count: u64) {
        self.copy(from, Self::BUFFER, count, 0);
        self.copy(Self::BUFFER, to, count, 2);
    }
}

// ---- Interrupts and DMA -------------------------------------------------------------------------

#[test]
fn an_interrupt_of_the_pin_is_masked_until_it_is_unmasked() {
    let edu = Edu::new(open("edu"));
    let kind = InterruptKind::Intx;
    let info = edu.device.interrupt_info(kind).unwrap();
    assert!(
        info.vectors == 1 && info.maskable && info.automasked,
        "{info:?}"
    );
    let interrupt = edu.device.enable_interrupt(kind).unwrap();
    edu.write(Edu::RAISE, 1);
    assert_eq!(interrupt.wait_timeout(LONG).unwrap(), Some(1));
    // It is still raised, and masked.
    assert_eq!(interrupt.wait_timeout(SHORT).unwrap(), None);
    edu.device.unmask_interrupt(kind, 0).unwrap();
    assert_eq!(interrupt.wait_timeout(LONG).unwrap(), Some(1));
    edu.write(Edu::ACKNOWLEDGE, 1);
    // A resampler unmasks it as well.
    let resample = EventFd::new().unwrap();
    edu.device.set_resample(Some(resample.as_fd())).unwrap();
    resample.signal().unwrap();
    edu.write(Edu::RAISE, 2);
    assert_eq!(interrupt.wait_timeout(LONG).unwrap(), Some(1));
    assert_eq!(edu.read(Edu::RAISED), 2);
    edu.write(Edu::ACKNOWLEDGE, 2);
    edu.device.disable_interrupts(kind).unwrap();
    edu.device.disable_interrupts(kind).unwrap();
}

#[test]
fn a_message_tells_that_the_device_is_done() {
    let edu = Edu::new(open("edu"));
    let kind = InterruptKind::Msi;
    let interrupt = edu.device.enable_interrupt(kind).unwrap();
    edu.write(Edu::STATUS, 0x80);
    edu.write(Edu::FACTORIAL, 10);
    assert!(interrupt.wait_timeout(LONG).unwrap().is_some());
    assert_eq!(edu.read(Edu::FACTORIAL), 3_628_800);
    edu.write(Edu::ACKNOWLEDGE, edu.read(Edu::RAISED));
    edu.device.trigger_interrupt(kind, 0).unwrap();
    assert!(interrupt.wait_timeout(LONG).unwrap().is_some());
    assert_error!(edu.device.mask_interrupt(kind, 0), Unsupported);
    assert_error!(edu.device.enable_interrupts(kind, 2), Unsupported);
    // One kind at a time.
    assert_error!(edu.device.enable_interrupt(InterruptKind::Intx), Invalid);
}

#[test]
fn memory_for_dma_is_shared_with_the_device() {
    let edu = Edu::new(open("edu"));
    let iommu = edu.device.require_iommu().unwrap();
    let ranges = iommu.allowed_ranges().unwrap();
    // Where interrupts are on x86 is no memory.
    let interrupts = 0xfee0_0000;
    let allowed = |at: u64| {
        ranges
            .iter()
            .any(|range| range.first <= at && at <= range.last)
    };
    assert!(!allowed(interrupts) && allowed(0x10_0000), "{ranges:x?}");
    let options = DmaOptions::new().below(1 << 32);
    let [from, to] = [(); 2].map(|()| options.allocate(iommu, page_size()).unwrap());
    from.copy_from(0, b"by way of the device").unwrap();
    edu.transfer(from.iova(), to.iova() + 0x80, 20);
    let mut back = [0; 20];
    to.copy_to(0x80, &mut back).unwrap();
    assert_eq!(&back, b"by way of the device");
    // Of a file, at an address of our own.
    let file = to.as_fd().try_clone_to_owned().unwrap();
    let at = 0x4000_0000;
    let mapping = iommu
        .map_file(&file, 0..page_size(), at, DmaAccess::ReadWrite)
        .unwrap();
    edu.transfer(from.iova(), at + 0x200, 8);
    assert_eq!(
        to.read::<u64>(0x200).unwrap(),
        u64::from_ne_bytes(*b"by way o")
    );
    assert_error!(
        iommu.map_file(&file, 0..page_size(), at, DmaAccess::Read),
        Busy
    );
    mapping.unmap().unwrap();
    iommu
        .map_file(&file, 0..page_size(), at, DmaAccess::Read)
        .unwrap()
        .unmap()
        .unwrap();
    assert_error!(
        iommu.map_file(&file, 0..page_size(), interrupts, DmaAccess::Read),
        Invalid
    );
    // Devices keep what is mapped of a file, and a lease can be revoked, so neither an iommufd nor
    // a container gets one as a file; a container, which keeps everything, gets none at all.
    let display = open("display");
    let lease = display.export(0).range(..page_size()).export().unwrap();
    assert_error!(
        iommu.map_file(&lease, 0..page_size(), None, DmaAccess::Read),
        Unsupported
    );
    if iommu.ioas().is_none() {
        assert_error!(iommu.map_lease(&lease, None, DmaAccess::Read), Unsupported);
    }
}

#[test]
fn functions_of_one_group_share_an_address_space() {
    let functions = ["virtio", "neighbour"].map(bdf);
    let group = |bdf| Pci::system().device(bdf).unwrap().iommu_group;
    assert_eq!(group(functions[0]), group(functions[1]));
    let first = Device::open(functions[0]).unwrap();
    assert!(matches!(
        Device::open(functions[1]),
        Err(Error::Busy { .. } | Error::Denied { .. })
    ));
    let iommu = first.require_iommu().unwrap().clone();
    let second = OpenOptions::new().iommu(&iommu).open(functions[1]).unwrap();
    // Another group, too.
    let edu = Edu::new(OpenOptions::new().iommu(&iommu).open(bdf("edu")).unwrap());
    let buffer = DmaOptions::new()
        .below(1 << 32)
        .allocate(&iommu, page_size())
        .unwrap();
    buffer.write(0, 7u32).unwrap();
    edu.transfer(buffer.iova(), buffer.iova() + 64, 4);
    assert_eq!(buffer.read::<u32>(64).unwrap(), 7);
    // It stays mapped while the device is closed and opened again.
    drop((first, second, edu));
    let edu = Edu::new(OpenOptions::new().iommu(&iommu).open(bdf("edu")).unwrap());
    buffer.write(0, 8u32).unwrap();
    edu.transfer(buffer.iova(), buffer.iova() + 64, 4);
    assert_eq!(buffer.read::<u32>(64).unwrap(), 8);
    drop((edu, buffer, iommu));
    Device::open(functions[1]).unwrap();
}

#[test]
fn an_owner_is_asked_for_its_device() {
    let bdf = bdf("edu");
    let device = Device::open(bdf).unwrap();
    let request = device.enable_interrupt(InterruptKind::Request).unwrap();
    thread::scope(|scope| {
        let unbinding = scope.spawn(|| Pci::system().unbind(bdf));
        assert!(request.wait_timeout(LONG).unwrap().is_some());
        drop(device);
        unbinding.join().unwrap().unwrap();
    });
    assert_eq!(Pci::system().device(bdf).unwrap().driver, None);
}

#[test]
fn a_container_tells_its_groups_and_how_many_mappings_it_takes() {
    let bdf = bdf("edu");
    let options = OpenOptions::new().backend(Backend::Group);
    let device = options.open(bdf).unwrap();
    let iommu = device.require_iommu().unwrap();
    let left = || iommu.available_mappings().unwrap().unwrap();
    let before = left();
    let buffer = DmaBuffer::new(iommu, page_size()).unwrap();
    assert_eq!(left(), before - 1);
    drop(buffer);
    assert_eq!(left(), before);

    let number = Pci::system().device(bdf).unwrap().iommu_group.unwrap();
    let groups: Vec<_> = iommu.groups().into_iter().map(|group| group.0).collect();
    assert_eq!(groups, [number]);
    assert_eq!(device.iommufd_id(), None);
    assert_error!(device.attach_page_table(1), Invalid);
}

#[test]
fn a_device_of_an_iommufd_does_dma_where_it_is_attached() {
    let bdf = bdf("edu");
    if !Path::new("/dev/iommu").exists() {
        assert!(Iommu::iommufd().is_err());
        return;
    }
    let iommu = Iommu::iommufd().unwrap();
    assert_eq!(iommu.available_mappings().unwrap(), None);
    let options = OpenOptions::new().iommu(&iommu).unattached();
    let edu = Edu::new(options.open(bdf).unwrap());
    assert!(edu.device.iommufd_id().is_some());
    let buffer = DmaOptions::new()
        .below(1 << 32)
        .allocate(&iommu, page_size());
    let buffer = buffer.unwrap();
    // Whether what the device does reaches the buffer.
    let reaches = |value: u32| {
        buffer.write(0, value).unwrap();
        buffer.write(64, 0u32).unwrap();
        edu.transfer(buffer.iova(), buffer.iova() + 64, 4);
        buffer.read::<u32>(64).unwrap() == value
    };
    let attach = |iommu: &Iommu| {
        let id = iommu.ioas().unwrap();
        edu.device.attach_page_table(id).unwrap();
    };
    assert!(!reaches(1));
    attach(&iommu);
    assert!(reaches(2));
    let fd = iommu.as_fd().try_clone_to_owned().unwrap();
    let other = Iommu::from_iommufd(fd, None).unwrap();
    attach(&other);
    assert!(!reaches(3));
    attach(&iommu);
    assert!(reaches(4));
    edu.device.detach_page_table().unwrap();
    assert!(!reaches(5));

    assert_error!(edu.device.attach_page_table(0x7777), Invalid);
    // It has no address spaces of processes.
    let answer = edu.device.attach_pasid(1, iommu.ioas().unwrap());
    assert!(answer.is_err(), "{answer:?}");
}

// ---- Config space, resets -----------------------------------------------------------------------

#[test]
fn capabilities_are_those_that_the_host_sees() {
    for name in ["edu", "nvme", "igb", "virtio"] {
        let device = open(name);
        let function = Function::named(name);
        let host = function.config();
        let config = device.config().unwrap();
        let identity = config.identity().unwrap();
        assert_eq!(identity.vendor.to_le_bytes(), host[..2]);
        let capabilities = config.capabilities().unwrap();
        for id in [Capability::MSI, Capability::MSIX, Capability::EXPRESS] {
            let found = capabilities.iter().find(|one| one.id == id);
            let expected = function.capability(id);
            assert_eq!(
                found.map(|one| u64::from(one.offset)),
                expected,
                "{name} {id:#x}"
            );
        }
        for one in config.extended_capabilities().unwrap() {
            assert!(one.offset >= 0x100, "{name}");
        }
        let express = config.express().unwrap();
        if name == "igb" {
            let express = express.unwrap();
            assert!(express.function_level_reset && express.max_payload >= 128);
            let errors = barlease::config::ExtendedCapability::ERROR_REPORTING;
            assert!(config.extended_capability(errors).unwrap().is_some());
        }
    }
}

#[test]
fn what_is_said_to_be_exportable_is_exported_and_nothing_else_is_missing() {
    for name in ["nvme", "igb", "virtio"] {
        let device = open(name);
        let msix = device.config().unwrap().msix().unwrap().unwrap();
        let (bar, table) = msix.table;
        let size = device.region(bar.into()).unwrap().size;
        let ranges = device.exportable_ranges(bar.into()).unwrap();
        for page in (0..size / page_size()).map(|number| number * page_size()) {
            let free = ranges
                .iter()
                .any(|range| range.offset <= page && page < range.offset + range.length);
            let touched = [msix.table, msix.pending].iter().any(|(its, range)| {
                *its == bar
                    && range.offset < page + page_size()
                    && page < range.offset + range.length
            });
            assert_eq!(free, !touched, "{name} {page:#x}");
        }
        if !ranges.is_empty() {
            let lease = device.export(bar.into()).export().unwrap();
            assert_eq!(lease.info().unwrap().ranges, ranges);
        }
        let page = table.offset & !(page_size() - 1);
        let export = device
            .export(bar.into())
            .range(page..page + page_size())
            .export();
        match pci::module_attribute("parameters/msix_export").as_deref() {
            Ok("auto" | "always") => drop(export),
            _ => assert_error!(export, Denied),
        }
    }
}

#[test]
fn a_hot_reset_takes_leases_away_from_every_function_of_its_set() {
    let functions = ["virtio", "neighbour"].map(bdf);
    let iommu = Iommu::new().unwrap();
    let open = |bdf| OpenOptions::new().iommu(&iommu).open(bdf).unwrap();
    let [first, second] = functions.map(open);
    let set = first.hot_reset_set().unwrap();
    let mut members: Vec<Bdf> = set.iter().map(|member| member.bdf).collect();
    members.sort_unstable();
    assert_eq!(members, functions);
    let leases = second.leases();
    let config = second.config().unwrap();
    config
        .update_command(|command| command | Command::MEMORY)
        .unwrap();
    let lease = leases.export(4).range(..page_size()).export().unwrap();
    assert_eq!(leases.status(&lease).unwrap().state, State::Ok);
    let changes = leases.events().unwrap();
    first.hot_reset(&[]).unwrap();
    assert!(changes.wait_timeout(LONG).unwrap().is_some());
    assert_eq!(leases.status(&lease).unwrap().state, State::Ok);
    second.hot_reset(&[&first]).unwrap();
    assert!(changes.wait_timeout(LONG).unwrap().is_some());
    assert_error!(
        Edu::new(self::open("edu")).device.hot_reset_set(),
        Unsupported
    );
}

#[test]
fn reset_methods_are_chosen() {
    let pci = Pci::system();
    let bdf = bdf("igb");
    let before = pci.reset_methods(bdf).unwrap();
    assert!(before.iter().any(|name| name == "flr"), "{before:?}");
    pci.set_reset_methods(bdf, &["flr"]).unwrap();
    assert_eq!(pci.reset_methods(bdf).unwrap(), ["flr"]);
    pci.reset(bdf).unwrap();
    pci.set_reset_methods(bdf, &[]).unwrap();
    assert!(pci.reset_methods(bdf).unwrap().is_empty());
    assert_error!(pci.reset(bdf), Unsupported);
    pci.set_default_reset_methods(bdf).unwrap();
    assert_eq!(pci.reset_methods(bdf).unwrap(), before);
    let device = Device::open(bdf).unwrap();
    device.reset().unwrap();
}

// ---- Devices that somebody else opened ----------------------------------------------------------

#[test]
fn a_descriptor_is_all_that_leases_need() {
    // As a program opens it that knows nothing of this library.
    let theirs = vfio::Device::open("display");
    let leases = Leases::new(theirs.as_fd()).unwrap();
    assert_eq!(leases.bdf().to_string(), theirs.function().bdf);
    let lease = leases.export(0).range(0..2 * page_size()).export().unwrap();
    lease.set_name("of another crate").unwrap();
    let mapping = lease.map_guarded().unwrap();
    mapping.write(0, 0x600du32).unwrap();
    assert_eq!(theirs.read32(0, 0), 0x600d);
    assert_eq!(leases.status(&lease).unwrap().state, State::Ok);
    let adopted = Device::from_inherited(theirs.as_fd().as_raw_fd()).unwrap();
    assert_eq!(adopted.bdf(), leases.bdf());
    assert_eq!(adopted.backend(), None);
    let parts = adopted.into_parts();
    assert_eq!(parts.bdf, leases.bdf());
    leases.revoke(&lease).unwrap();
    assert_error!(mapping.read::<u32>(0), Revoked);
}

#[test]
fn a_container_with_devices_in_it_is_taken_over() {
    let theirs = vfio::Device::open("edu");
    let container = theirs.group().iommu().as_fd().try_clone_to_owned().unwrap();
    let iommu = Iommu::from_container(container).unwrap();
    let group = theirs.group().as_fd().try_clone_to_owned().unwrap();
    let number = theirs.function().group().parse().unwrap();
    iommu.add_group(number, group).unwrap();
    let device = Device::from_inherited(theirs.as_fd().as_raw_fd()).unwrap();
    let edu = Edu::new(device.with_iommu(&iommu));
    let buffer = DmaOptions::new()
        .below(1 << 32)
        .allocate(&iommu, page_size())
        .unwrap();
    buffer.write(0, 9u32).unwrap();
    edu.transfer(buffer.iova(), buffer.iova() + 64, 4);
    assert_eq!(buffer.read::<u32>(64).unwrap(), 9);
    // The kernel tells the ranges that they have mapped, and the caller that names them keeps them
    // free.
    assert!(!iommu.reserve(buffer.iova(), page_size()));
    let [other, _] = ["virtio", "neighbour"].map(bdf);
    let device = OpenOptions::new().iommu(&iommu).open(other).unwrap();
    assert_eq!(device.bdf(), other);
}

#[test]
fn a_virtual_function_is_opened_with_the_token_of_its_physical_one() {
    let physical = open("igb");
    let token: VfToken = "3f8a1c52-90d7-4b6e-8e21-5ac4d07b9f16".parse().unwrap();
    physical.set_vf_token(token).unwrap();
    let attribute = |name: &str| format!("/sys/bus/pci/devices/{}/{name}", physical.bdf());
    let parameter = format!(
        "/sys/module/{}/parameters/enable_sriov",
        barlease_abi::MODULE_NAME
    );
    fs::write(&parameter, "1").unwrap();
    fs::write(attribute("sriov_numvfs"), "1").unwrap();
    let link = fs::read_link(attribute("virtfn0")).unwrap();
    let name = link.file_name().unwrap().to_string_lossy().into_owned();
    let function: Bdf = name.parse().unwrap();
    Pci::system().bind(function, BARLEASE).unwrap();

    let error = Device::open(function).unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error:?}");
    let remedy = error.remedy().unwrap().into_owned();
    assert!(remedy.contains("vf_token"), "{remedy}");
    let wrong = VfToken::from_bytes([1; 16]);
    assert_error!(OpenOptions::new().vf_token(wrong).open(function), Denied);
    let device = OpenOptions::new().vf_token(token).open(function).unwrap();
    let lease = device.export(0).range(..page_size()).export().unwrap();
    assert_eq!(device.status(&lease).unwrap().state, State::Ok);
    drop(device);
    fs::write(attribute("sriov_numvfs"), "0").unwrap();
    fs::write(&parameter, "0").unwrap();
}

// ---- LIST, REVOKE_ID, EVENTS --------------------------------------------------------------------

#[test]
fn all_leases_are_listed_and_revoked_by_their_ids() {
    let device = open("display");
    let leases = device.leases();
    let features = leases.features().unwrap();
    assert!(features.list && features.revoke_id && features.events);
    assert_eq!(
        leases
            .list()
            .filter(|one| !one.as_ref().unwrap().internal)
            .count(),
        0
    );
    // More than a page of the list has.
    let mut made: Vec<_> = (0..300)
        .map(|n| {
            leases
                .export(0)
                .range(n * page_size()..(n + 1) * page_size())
                .export()
                .unwrap()
        })
        .collect();
    let named = leases
        .export(0)
        .range(..2 * page_size())
        .read_only()
        .export()
        .unwrap();
    named.set_name("the last").unwrap();
    let mapping = named.map().unwrap();
    made.push(named);
    let records: Vec<_> = leases.list().map(Result::unwrap).collect();
    let ids: Vec<LeaseId> = records.iter().map(|record| record.id).collect();
    let expected: Vec<LeaseId> = made
        .iter()
        .map(|lease| LeaseId::of(lease).unwrap())
        .collect();
    let mut sorted = expected.clone();
    sorted.sort_unstable();
    assert_eq!(ids, sorted);
    let last = records
        .iter()
        .find(|record| record.name.as_deref() == Some("the last"))
        .unwrap();
    assert_eq!((last.size, last.ranges, last.bar), (2 * page_size(), 1, 0));
    assert!(
        !last.writable && last.state == State::Ok && last.mappings == 1,
        "{last:?}"
    );
    drop(mapping);

    leases.revoke_id(expected[0]).unwrap();
    assert_error!(leases.revoke_id(expected[0]), Dead);
    assert_eq!(device.status(&made[0]).unwrap().state, State::Dead);
    assert_eq!(leases.revoke_id_nowait(expected[1]).unwrap(), Revoked::Done);
    assert_error!(leases.revoke(&made[1]), Dead);
    let unknown = leases.revoke_id(LeaseId::new(u64::MAX)).unwrap_err();
    assert_eq!(unknown.errno(), Some(libc::ENOENT));
    drop(made);
    assert_eq!(leases.list().count(), 0);
}

#[test]
fn changes_of_leases_are_signalled() {
    let device = open("display");
    let leases = device.leases();
    let event = leases.events().unwrap();
    let lease = leases.export(0).range(..page_size()).export().unwrap();
    let set_memory = |on| vfio::set_memory(&device, on);
    let _ = event.take().unwrap();
    set_memory(false);
    assert!(event.wait_timeout(LONG).unwrap().is_some());
    let status = leases.status(&lease).unwrap();
    assert_eq!(
        (status.state, status.reasons),
        (State::Revoked, Reasons::MEMORY_OFF)
    );
    set_memory(true);
    assert!(event.wait_timeout(LONG).unwrap().is_some());
    leases.revoke(&lease).unwrap();
    assert!(event.wait_timeout(LONG).unwrap().is_some());
    drop(lease);
    assert!(event.wait_timeout(LONG).unwrap().is_some());
    leases.set_events(None).unwrap();
    set_memory(false);
    set_memory(true);
    assert_eq!(event.wait_timeout(SHORT).unwrap(), None);
}

#[test]
fn a_buffer_that_is_dropped_is_out_of_reach() {
    let device = open("edu");
    let iommu = device.require_iommu().unwrap();
    let buffer = DmaBuffer::new(iommu, 3 * page_size()).unwrap();
    let at = buffer.iova();
    drop(buffer);
    // Its address is free again, and nothing of it is left mapped: the kernel refuses an overlap.
    let again = DmaOptions::new()
        .iova(at)
        .allocate(iommu, 3 * page_size())
        .unwrap();
    assert_eq!(again.iova(), at);
    assert_eq!(again.read::<u64>(0).unwrap(), 0);
}
