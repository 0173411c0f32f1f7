//! Drivers of the kernel's own that use leases: KVM by memory slots over mappings, and vgem, which
//! imports dma-bufs and cannot let go of them.
#![cfg(all(barlease_guest, target_arch = "x86_64"))]

use std::{
    fs::{self, File},
    os::fd::{AsFd, OwnedFd},
    thread,
    time::Duration,
};

use barlease_guest_tests::{
    errno::EOPNOTSUPP,
    importer::check_that_nothing_is_left,
    lease::{self, State},
    map::{How, Map, READ},
    observe, page_size,
    vfio::Device,
    virtual_machine::{End, SLOTS, VirtualMachine},
    wait,
};

/// The frame buffer of the display: 64 MiB.
const FRAME_BUFFER: u32 = 0;

const VALUE: u32 = 0x1ea5_e000;

/// The owner's own view of the BAR.
fn whole(device: &Device) -> Map {
    let bar = device.region_info(FRAME_BUFFER).unwrap().offset;
    How::shared().map(device, bar, 16 * page_size()).unwrap()
}

fn mapped(fd: impl AsFd) -> Map {
    let len = lease::size(&fd);
    Map::new(fd, len).unwrap()
}

/// A virtual machine, where there can be one: the kernel that watches itself is built without KVM.
fn machine() -> Option<VirtualMachine> {
    if !VirtualMachine::works() {
        assert!(observe::locks_are_watched(), "there is no /dev/kvm");
        return None;
    }
    Some(VirtualMachine::new())
}

/// A lease of one page, mapped, as the first slot of a machine.
fn scene(machine: &VirtualMachine) -> (Device, OwnedFd, Map) {
    let device = Device::open("display");
    let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    let map = mapped(&fd);
    machine.back(1, SLOTS, &map);
    (device, fd, map)
}

// ---- KVM ----------------------------------------------------------------------------------------

#[test]
fn a_virtual_processor_reaches_the_ranges_of_a_lease_and_no_others() {
    let Some(mut machine) = machine() else { return };
    let device = Device::open("display");
    let owner = whole(&device);
    let page = page_size();
    let fd = device
        .export(FRAME_BUFFER, &[(4 * page, page), (page, page)])
        .unwrap();
    let map = mapped(&fd);
    machine.back(1, SLOTS, &map);
    for at in 0..8 {
        owner.write(at * page, 0).unwrap();
    }
    assert_eq!(machine.store(SLOTS, VALUE), End::Done(VALUE));
    assert_eq!(machine.store(SLOTS + page, VALUE + 1), End::Done(VALUE + 1));
    let seen: Vec<_> = (0..8).map(|at| owner.read(at * page).unwrap()).collect();
    assert_eq!(seen, [0, VALUE + 1, 0, 0, VALUE, 0, 0, 0]);
    owner.write(page, VALUE + 2).unwrap();
    assert_eq!(machine.load(SLOTS + page), End::Done(VALUE + 2));
    assert_eq!(machine.load(SLOTS + 2 * page), End::Emulate);
}

#[test]
fn a_virtual_processor_waits_for_nothing_while_memory_is_off_and_goes_on_when_it_is_on() {
    let Some(mut machine) = machine() else { return };
    let (device, _fd, map) = scene(&machine);
    map.write(0, VALUE).unwrap();
    assert_eq!(machine.load(SLOTS), End::Done(VALUE));
    device.set_memory(false);
    assert_eq!(machine.load(SLOTS), End::Fault);
    assert_eq!(machine.store(SLOTS, 1), End::Fault);
    device.set_memory(true);
    assert_eq!(machine.load(SLOTS), End::Done(VALUE));
}

#[test]
fn no_store_of_a_virtual_processor_arrives_once_revoke_has_returned() {
    let Some(mut machine) = machine() else { return };
    let (device, fd, map) = scene(&machine);
    let owner = whole(&device);
    owner.write(0, 0).unwrap();
    thread::scope(|scope| {
        let counting = scope.spawn(|| {
            let end = machine.count(SLOTS);
            (machine, end)
        });
        wait::until("the virtual processor counts", || {
            owner.read(0).unwrap() > 100
        });
        device.revoke(&fd).unwrap();
        let last = owner.read(0).unwrap();
        let (mut machine, end) = counting.join().unwrap();
        assert_eq!(end, End::Fault);
        thread::sleep(Duration::from_millis(50));
        assert_eq!(owner.read(0), Ok(last));
        assert_eq!(machine.store(SLOTS, 1), End::Fault, "a dead lease");
        // So does a VMM then: the access is its own to answer.
        machine.delete(1, &map);
        assert_eq!(machine.store(SLOTS, 1), End::Emulate);
        assert_eq!(owner.read(0), Ok(last));
    });
    assert_eq!(device.state(&fd), State::Dead);
}

#[test]
fn a_virtual_processor_cannot_store_to_a_read_only_mapping() {
    let Some(mut machine) = machine() else { return };
    let device = Device::open("display");
    let owner = whole(&device);
    let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    let map = How::shared()
        .protection(READ)
        .map(&fd, 0, page_size())
        .unwrap();
    owner.write(0, VALUE).unwrap();
    machine.back(1, SLOTS, &map);
    assert_eq!(machine.store(SLOTS, 1), End::Fault, "nothing is mapped yet");
    assert_eq!(machine.load(SLOTS), End::Done(VALUE));
    assert_eq!(machine.store(SLOTS, 1), End::Emulate, "a read-only entry");
    let mut machine = VirtualMachine::new();
    machine.back_read_only(1, SLOTS, &map);
    assert_eq!(machine.store(SLOTS, 1), End::Emulate);
    assert_eq!(machine.load(SLOTS), End::Done(VALUE));
    assert_eq!(owner.read(0), Ok(VALUE));
}

// ---- vgem ---------------------------------------------------------------------------------------

/// A display driver that imports any dma-buf, maps it for CPUs only, and lets go of it when its
/// user does: so it must get nothing that can be revoked.
#[test]
fn an_importer_of_the_kernel_s_that_cannot_let_go_is_refused() {
    let Some(card) = vgem() else {
        // Not all kernels have it.
        return;
    };
    let device = Device::open("display");
    let fd = device.export(FRAME_BUFFER, &[(0, page_size())]).unwrap();
    assert_eq!(lease::import_by_drm(&card, &fd), Err(EOPNOTSUPP));
    assert_eq!(device.status(&fd).unwrap().nr_attachments, 0);
    device.revoke(&fd).unwrap();
}

/// The device of vgem, if the kernel has that.
fn vgem() -> Option<File> {
    let folder = fs::read_dir("/sys/class/drm").ok()?;
    let cards = folder.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut cards = cards.filter(|name| name.starts_with("card"));
    let name = cards.next()?;
    let open = File::options()
        .read(true)
        .write(true)
        .open(format!("/dev/dri/{name}"));
    Some(open.expect("open vgem's device"))
}

#[test]
fn zz_nothing_is_left_and_both_modules_can_be_unloaded() {
    check_that_nothing_is_left(&["display"]);
}
