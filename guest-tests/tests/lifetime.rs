//! The ends of things and their order: fds, mappings, the open device, the binding, the module.
#![cfg(barlease_guest)]

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    thread,
    time::Duration,
};

use barlease::InterruptKind;
use barlease_abi::FEATURE_DMA_BUF;
use barlease_guest_tests::{
    errno::{EAGAIN, EBADF, ENODEV, EPERM, Errno},
    huge_size,
    lease::{self, State},
    map::{How, Map, Sigbus},
    observe, page_size,
    pci::{self, BARLEASE, Function, Parameter, STOCK},
    process::{self, Child, End},
    vfio::{Device, GET, Group, INTX_IRQ, IRQ_ACTION_MASK, IRQ_ACTION_TRIGGER, IRQ_DATA_NONE},
    wait::{A_WHILE, until},
};

/// The frame buffer of the display: 64 MiB.
const FRAME_BUFFER: u32 = 0;

fn display() -> Device {
    Device::open("display")
}

fn is_dead(fd: &OwnedFd, map: &Map) {
    assert_eq!(map.read(0), Err(Sigbus));
    assert_eq!(map.write(huge_size() + page_size(), 1), Err(Sigbus));
    assert_eq!(Map::new(fd, page_size()).map(drop), Err(ENODEV));
}

fn mmaps(function: &Function) -> Vec<String> {
    let lines = observe::buffers(function);
    lines
        .iter()
        .map(|line| line.get("state").to_owned())
        .collect()
}

// ---- The device fd ------------------------------------------------------------------------------

#[test]
fn close_of_the_device_fd_is_the_end_of_its_buffers() {
    let device = display();
    let (fd, map) = device.lease_touched(FRAME_BUFFER);
    drop(device);
    is_dead(&fd, &map);
}

#[test]
fn a_buffer_of_an_earlier_open_is_enodev_to_a_new_one() {
    let device = display();
    let (fd, map) = device.lease_touched(FRAME_BUFFER);
    drop(device);
    let device = display();
    assert_eq!(device.status(&fd).map(drop), Err(ENODEV));
    assert_eq!(device.revoke(&fd), Err(ENODEV));
    is_dead(&fd, &map);
    // The new one has its own, of the same range.
    let (new, new_map) = device.lease_touched(FRAME_BUFFER);
    assert_eq!(device.state(&new), State::Ok);
    new_map.write(0, 1).unwrap();
    is_dead(&fd, &map);
    assert_eq!(mmaps(device.function()), ["DEAD", "OK"]);
    drop((fd, map));
    observe::wait_for_buffers(device.function(), 1);
}

#[test]
fn a_buffer_that_was_revoked_or_had_memory_off_is_dead_after_close() {
    let device = display();
    let (revoked, revoked_map) = device.lease_touched(FRAME_BUFFER);
    let (other, other_map) = device.lease_touched(FRAME_BUFFER);
    device.revoke(&revoked).unwrap();
    device.set_memory(false);
    drop(device);
    is_dead(&revoked, &revoked_map);
    is_dead(&other, &other_map);
    let device = display();
    is_dead(&other, &other_map);
    device.set_memory(true);
    is_dead(&other, &other_map);
}

#[test]
fn a_duplicate_of_the_device_fd_keeps_it_open() {
    let device = display();
    let duplicate = lease::duplicate(&device);
    let (_fd, map) = device.lease_touched(FRAME_BUFFER);
    drop(device);
    map.write(0, 1).unwrap();
    drop(duplicate);
    assert_eq!(map.read(0), Err(Sigbus));
}

#[test]
fn a_mapping_through_the_device_fd_keeps_it_open() {
    let device = display();
    let function = device.function().clone();
    let (_fd, map) = device.lease_touched(FRAME_BUFFER);
    let mut bar = How::shared().map(&device, 0, 4 * page_size()).unwrap();
    drop(device);
    bar.write(page_size(), 8).unwrap();
    assert_eq!(map.read(page_size()), Ok(8));
    // As long as a part of it is left, in whatever process.
    bar.unmap(0, 2 * page_size());
    let child = Child::start(&[], |link| {
        link.expect(0);
        bar.write(2 * page_size(), 9).unwrap();
        link.send(1);
        link.expect(2);
    });
    drop(bar);
    child.link.send(0);
    child.link.expect(1);
    assert_eq!(map.read(2 * page_size()), Ok(9));
    assert_eq!(mmaps(&function), ["OK", "OK"]);
    child.link.send(2);
    child.join();
    assert_eq!(map.read(page_size()), Err(Sigbus));
}

#[test]
fn the_owners_death_is_the_end_of_its_buffers() {
    let function = Function::named("display");
    function.bind(BARLEASE);
    let mut owner = Child::start(&[], |link| {
        let device = display();
        let (fd, _map) = device.lease_touched(FRAME_BUFFER);
        link.send_fd(&fd);
        link.expect(0);
        // Without a word.
        std::process::abort();
    });
    let fd = owner.link.receive_fd();
    let map = Map::new(&fd, 2 * huge_size()).unwrap();
    map.touch_all().unwrap();
    owner.link.send(0);
    assert_eq!(owner.wait(), End::Signal(libc::SIGABRT));
    is_dead(&fd, &map);
}

#[test]
fn a_holders_death_is_no_matter_to_others() {
    let device = display();
    let (fd, map) = device.lease_touched(FRAME_BUFFER);
    let mut holder = Child::start(&[], |link| {
        map.touch_all().unwrap();
        link.send(0);
        link.expect(1);
        std::process::abort();
    });
    holder.link.expect(0);
    holder.link.send(1);
    assert_eq!(holder.wait(), End::Signal(libc::SIGABRT));
    assert_eq!(device.state(&fd), State::Ok);
    map.touch_all().unwrap();
}

#[test]
fn an_open_and_close_without_leases_is_no_harm() {
    for _ in 0..10 {
        drop(display());
    }
}

// ---- O_PATH -------------------------------------------------------------------------------------

/// A dma-buf whose file is gone and whose inode is not: an `O_PATH` descriptor holds it.
fn path_of_closed(fd: OwnedFd) -> OwnedFd {
    let path = lease::path_descriptor(fd.as_fd());
    drop(fd);
    // The file is given up at once, what it was is freed a little later.
    thread::sleep(Duration::from_millis(100));
    path
}

#[test]
fn an_o_path_descriptor_outlives_the_buffer_and_the_device() {
    let device = display();
    let function = device.function().clone();
    let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    let path = path_of_closed(fd);
    // A walk over all buffers finds it or not, but comes to no harm.
    let _ = observe::buffers_text(&function);
    device.set_memory(false);
    device.set_memory(true);
    drop(device);
    let _ = observe::buffers_text(&function);
    let device = display();
    let _ = observe::buffers_text(&function);
    drop(device);
    drop(path);
    observe::wait_for_buffers(&function, 0);
}

#[test]
fn an_o_path_descriptor_of_a_mapped_buffer() {
    let device = display();
    let (fd, map) = device.lease_touched(FRAME_BUFFER);
    let path = path_of_closed(fd);
    device.set_memory(false);
    assert_eq!(map.read(0), Err(Sigbus));
    device.set_memory(true);
    map.touch_all().unwrap();
    drop(device);
    assert_eq!(map.read(0), Err(Sigbus));
    drop(path);
}

/// An `O_PATH` descriptor of the file that is mapped.
fn path_of_mapping(map: &Map) -> OwnedFd {
    let (start, end) = (map.address(), map.address() + map.len() as usize);
    let path = format!("/proc/self/map_files/{start:x}-{end:x}");
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_PATH);
    options.open(path).expect("an O_PATH descriptor").into()
}

#[test]
fn an_o_path_descriptor_of_a_bar_mapping_does_not_keep_the_device_open() {
    let device = display();
    let function = device.function().clone();
    let (_fd, map) = device.lease_touched(FRAME_BUFFER);
    let bar = How::shared().map(&device, 0, 4 * page_size()).unwrap();
    let path = path_of_mapping(&bar);
    drop(device);
    map.touch_all().unwrap();
    drop(bar);
    assert_eq!(map.read(0), Err(Sigbus), "the device is still open");
    function.unbind();
    drop(path);
    function.bind(BARLEASE);
}

#[test]
fn mappings_of_a_bar_have_a_file_in_common() {
    const NUMBER: usize = 1000;
    let device = display();
    let one = How::shared().map(&device, 0, page_size()).unwrap();
    let files = || {
        let text = fs::read_to_string("/proc/sys/fs/file-nr").expect("file-nr");
        let number = text.split_whitespace().next().expect("a number");
        number.parse::<usize>().expect("a number")
    };
    let before = files();
    let place = |number: usize| (number as u64 % 64) * page_size();
    let maps: Vec<_> = (0..NUMBER)
        .map(|number| {
            How::shared()
                .map(&device, place(number), page_size())
                .unwrap()
        })
        .collect();
    let more = files().saturating_sub(before);
    assert!(more < NUMBER / 10, "{more} files more");
    maps.iter().for_each(|map| map.touch_all().unwrap());
    drop((one, maps));
    observe::wait_for_buffers(device.function(), 0);
}

#[test]
fn an_o_path_descriptor_is_no_buffer() {
    let device = display();
    let (fd, map) = device.lease_touched(FRAME_BUFFER);
    let path = lease::path_descriptor(fd.as_fd());
    assert_eq!(device.revoke(&path), Err(EBADF));
    assert_eq!(device.status(&path).map(drop), Err(EBADF));
    map.touch_all().unwrap();
}

#[test]
fn many_o_path_descriptors_while_everything_closes() {
    for round in 0..20 {
        let device = display();
        let paths: Vec<_> = (0..10)
            .map(|page| {
                let fd = device
                    .export(FRAME_BUFFER, &[(page * page_size(), page_size())])
                    .unwrap();
                let path = lease::path_descriptor(fd.as_fd());
                drop(fd);
                path
            })
            .collect();
        if round % 2 == 0 {
            drop(device);
            drop(paths);
        } else {
            drop(paths);
            drop(device);
        }
    }
}

// ---- The binding --------------------------------------------------------------------------------

#[test]
fn fds_and_mappings_outlive_the_binding() {
    let device = display();
    let function = device.function().clone();
    let (fd, map) = device.lease_touched(FRAME_BUFFER);
    drop(device);
    function.unbind();
    is_dead(&fd, &map);
    assert_eq!(lease::size(&fd), 2 * huge_size());
    assert!(observe::maps_line(map.address()).contains("barlease:"));
    // Bound to another driver, and to ours again.
    function.bind(STOCK);
    is_dead(&fd, &map);
    let stock = Group::open(&function).device(&function).unwrap();
    is_dead(&fd, &map);
    drop(stock);
    function.bind(BARLEASE);
    is_dead(&fd, &map);
    let device = display();
    assert_eq!(device.status(&fd).map(drop), Err(ENODEV));
    assert_eq!(device.revoke(&fd), Err(ENODEV));
    // The table of this binding never had them.
    assert_eq!(observe::buffers(&function), []);
    drop(fd);
    drop(map);
    let (_fd, map) = device.lease_touched(FRAME_BUFFER);
    map.write(0, 1).unwrap();
}

#[test]
fn an_o_path_descriptor_outlives_the_binding() {
    let device = display();
    let function = device.function().clone();
    let path = path_of_closed(device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap());
    drop(device);
    function.unbind();
    function.bind(BARLEASE);
    drop(path);
}

#[test]
fn unbind_waits_until_the_device_is_closed() {
    let device = display();
    let function = device.function().clone();
    let (fd, map) = device.lease_touched(FRAME_BUFFER);
    thread::scope(|scope| {
        let unbinding = scope.spawn(|| function.unbind());
        thread::sleep(Duration::from_millis(100));
        assert!(!unbinding.is_finished());
        map.write(0, 1).unwrap();
        drop(device);
    });
    assert_eq!(function.driver(), None);
    is_dead(&fd, &map);
    function.bind(BARLEASE);
}

#[test]
fn fds_and_mappings_outlive_the_device() {
    let function = Function::named("testdev");
    let device = Device::open("testdev");
    let fd = device.export(2, &[(0, 2 * huge_size())]).unwrap();
    let map = Map::new(&fd, 2 * huge_size()).unwrap();
    map.touch_all().unwrap();
    drop(device);
    function.remove();
    is_dead(&fd, &map);
    assert_eq!(lease::size(&fd), 2 * huge_size());
    pci::rescan();
    function.bind(BARLEASE);
    is_dead(&fd, &map);
    let device = Device::open("testdev");
    assert_eq!(device.revoke(&fd), Err(ENODEV));
    device.export(2, &[(0, page_size())]).unwrap();
}

// ---- The module ---------------------------------------------------------------------------------

/// Takes every function from our driver; what `f` does with the module ends with all as it was.
fn with_module_idle(f: impl FnOnce()) {
    let names = [
        "display", "memory", "pair0", "pair1", "nvme", "edu", "testdev", "igb", "big",
    ];
    for name in names {
        Function::named(name).unbind();
    }
    f();
    assert!(pci::is_module_loaded());
}

#[test]
fn the_module_stays_while_a_dma_buf_lives() {
    with_module_idle(|| {
        let device = display();
        let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
        assert_eq!(pci::unload_module(), Err(EAGAIN));
        drop(device);
        Function::named("display").unbind();
        assert_eq!(pci::unload_module(), Err(EAGAIN));
        drop(fd);
        pci::unload_module().unwrap();
        pci::load_module("");
    });
}

#[test]
fn the_module_stays_while_a_mapping_lives() {
    with_module_idle(|| {
        let device = display();
        let (fd, map) = device.lease_touched(FRAME_BUFFER);
        drop((fd, device));
        Function::named("display").unbind();
        assert_eq!(pci::unload_module(), Err(EAGAIN));
        assert_eq!(map.read(0), Err(Sigbus));
        drop(map);
        pci::unload_module().unwrap();
        pci::load_module("");
    });
}

#[test]
fn the_module_stays_while_an_o_path_descriptor_lives() {
    with_module_idle(|| {
        let device = display();
        let path = path_of_closed(device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap());
        drop(device);
        Function::named("display").unbind();
        assert_eq!(pci::unload_module(), Err(EAGAIN));
        drop(path);
        pci::unload_module().unwrap();
        pci::load_module("");
    });
}

#[test]
fn the_module_goes_while_functions_are_bound() {
    let function = Function::named("display");
    function.bind(BARLEASE);
    drop(display().lease_touched(FRAME_BUFFER));
    // The last close may be given up a little after the call.
    pci::unload_module().unwrap();
    assert_eq!(function.driver(), None);
    pci::load_module("");
    display().lease_touched(FRAME_BUFFER).1.touch_all().unwrap();
}

#[test]
fn the_module_stays_while_a_device_is_open() {
    let device = display();
    assert_eq!(pci::unload_module(), Err(EAGAIN));
    device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
}

#[test]
fn the_module_tells_its_version() {
    let version = pci::module_attribute("version").unwrap();
    assert!(!version.is_empty());
    assert_eq!(version, env!("CARGO_PKG_VERSION"));
}

/// The page of the MSI-X table, and its BAR.
fn msix_table(device: &Device) -> (u32, u64) {
    let capability = device.capability(0x11).expect("MSI-X");
    let register = u32::from_le_bytes(device.config(capability + 4));
    (
        register & 7,
        u64::from(register & !7) / page_size() * page_size(),
    )
}

fn export_of_msix_table() -> Result<OwnedFd, Errno> {
    let device = Device::open("nvme");
    let (bar, page) = msix_table(&device);
    device.export(bar, &[(page, page_size())])
}

/// Whether the kernel masks the interrupt pin of a function by the function's own bit, in COMMAND,
/// and not by the line that it may have in common with others: what `nointxmask` decides.
fn masks_in_the_function() -> bool {
    const DISABLES_PIN: u8 = 1 << 2;
    let device = Device::open("nvme");
    let event = process::eventfd();
    device.trigger(InterruptKind::Intx, &event).unwrap();
    let is_set = || device.function().config()[5] & DISABLES_PIN != 0;
    assert!(!is_set());
    let mask = IRQ_DATA_NONE | IRQ_ACTION_MASK;
    device.set_irqs(INTX_IRQ, mask, 1, &[]).unwrap();
    let masked = is_set();
    let off = IRQ_DATA_NONE | IRQ_ACTION_TRIGGER;
    device.set_irqs(INTX_IRQ, off, 0, &[]).unwrap();
    masked
}

#[test]
fn parameters_are_given_when_the_module_is_loaded() {
    let parameter = |name: &str| pci::module_attribute(&format!("parameters/{name}")).unwrap();
    assert_eq!(parameter("msix_export"), "auto");
    with_module_idle(|| {
        pci::unload_module().unwrap();
        pci::load_module("msix_export=never nointxmask=1 disable_idle_d3=1");
        assert_eq!(parameter("msix_export"), "never");
        assert_eq!(export_of_msix_table().unwrap_err(), EPERM);
        // A function that is bound keeps what it was bound with: it does not sleep while it is
        // idle.
        let function = Function::named("nvme");
        for value in ["N", "Y"] {
            let _parameter = Parameter::set("disable_idle_d3", value).unwrap();
            thread::sleep(A_WHILE);
            assert_eq!(function.runtime_status(), "active");
        }
        assert_eq!(parameter("nointxmask"), "Y");
        for value in ["N", "Y"] {
            let _parameter = Parameter::set("nointxmask", value).unwrap();
            assert!(!masks_in_the_function(), "nointxmask is {value} now");
        }
        function.unbind();
        pci::unload_module().unwrap();
        pci::load_module("");
    });
    assert!(export_of_msix_table().is_ok());
    assert!(masks_in_the_function());
    until("an idle device to sleep", || {
        Function::named("nvme").runtime_status() == "suspended"
    });
}

#[test]
fn debugfs_has_a_folder_a_bound_function() {
    let function = Function::named("display");
    function.bind(BARLEASE);
    assert_eq!(observe::buffers(&function), []);
    function.unbind();
    let folder = format!("/sys/kernel/debug/barlease/{}", function.bdf);
    assert!(!std::path::Path::new(&folder).exists());
    function.bind(BARLEASE);
    assert_eq!(observe::buffers(&function), []);
}

#[test]
fn a_function_bound_to_stock_vfio_pci_is_stocks() {
    let function = Function::named("display");
    function.bind(STOCK);
    let device = Group::open(&function).device(&function).unwrap();
    // Its buffers are not ours: they cannot be mapped.
    let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    assert!(Map::new(&fd, page_size()).is_err());
    let features = [0xba00, 0xba04].map(|feature| device.probe(feature, 0));
    assert!(features.iter().all(Result::is_err));
    assert_eq!(device.probe(FEATURE_DMA_BUF, GET), Ok(()));
    drop((fd, device));
    function.bind(BARLEASE);
}
