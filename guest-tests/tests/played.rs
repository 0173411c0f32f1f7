//! The module gets answers that no kernel, device or machine of the lab gives: `kmod/probe` plays
//! them.
#![cfg(barlease_guest)]

use std::os::fd::OwnedFd;

use barlease_guest_tests::{
    calls::Calls,
    errno::{EINVAL, EPERM},
    importer::{self, Attachment, Domain, EDU, Importer, check_that_nothing_is_left},
    lease::{Request, State},
    map::Map,
    page_size,
    pci::{Function, Parameter},
    probe::Played,
    vfio::Device,
};

/// BAR2 of the memory device.
const BAR: u32 = 2;
/// The function by which the kernel maps a run of a BAR: the module calls it to find out a route,
/// and for nothing else.
const STOCK_MAP: &str = "dma_buf_phys_vec_to_sgt";

fn attached(device: &Device, importer: &Importer) -> (OwnedFd, Attachment) {
    let fd = device
        .export(BAR, &[(page_size(), page_size())])
        .expect("an export");
    let attachment = importer.attach(&fd).expect("an attachment");
    (fd, attachment)
}

/// Maps, looks where that leads, and unmaps.
fn leads_there(device: &Device, attachment: &Attachment) {
    let (bar, _) = device.function().bar(BAR);
    attachment.map().unwrap();
    assert_eq!(attachment.translate(0), Some(bar + page_size()));
    attachment.unmap().unwrap();
    assert_eq!(attachment.translate(0), None);
}

// ---- The MSI-X capability -----------------------------------------------------------------------

/// BAR0 of the NVMe controller, where its registers and its MSI-X table are.
const REGISTERS: u32 = 0;

#[test]
fn where_the_msix_table_is_not_told_no_bar_is_exported() {
    let _never = Parameter::set("msix_export", "never").unwrap();
    let Some(played) = Played::new("no_msix_place=1") else {
        return;
    };
    let device = Device::open("nvme");
    for bar in [REGISTERS, BAR] {
        let (_, length) = device.function().bar(bar);
        for at in [0, page_size(), length - page_size()] {
            let request = Request::new(bar, &[(at, page_size())]);
            let answers = [
                device.export(bar, &[(at, page_size())]),
                importer::stock(&device, &request),
            ];
            for answer in answers {
                assert_eq!(answer.map(drop), Err(EPERM), "BAR {bar}, {at:#x}");
            }
        }
    }
    drop(device);
    // It is read at each open.
    drop(played);
    let device = Device::open("nvme");
    assert!(device.export(REGISTERS, &[(0, page_size())]).is_ok());
    assert!(device.export(BAR, &[(0, page_size())]).is_ok());
}

// ---- Routes -------------------------------------------------------------------------------------

#[test]
fn two_devices_that_do_not_reach_each_other_are_refused() {
    let Some(played) = Played::new("too_far=1") else {
        return;
    };
    let device = Device::open("memory");
    let (fd, attachment) = attached(&device, &Importer::open());
    for _ in 0..2 {
        assert_eq!(attachment.map(), Err(EINVAL));
        assert!(!attachment.is_mapped());
    }
    assert_eq!(device.state(&fd), State::Ok);
    // Processes reach it all the same.
    Map::new(&fd, page_size()).unwrap().touch_all().unwrap();
    drop(played);
    // Nobody remembers the refusal.
    leads_there(&device, &attachment);
}

#[test]
fn without_a_bridge_above_both_no_page_is_mapped_to_find_the_route() {
    let Some(probes) = Calls::of(STOCK_MAP) else {
        return;
    };
    let device = Device::open("memory");
    let importer = Importer::open();
    for _ in 0..2 {
        let (_fd, attachment) = attached(&device, &importer);
        leads_there(&device, &attachment);
    }
    assert_eq!(probes.count(), 0);
}

#[test]
fn below_a_bridge_an_attachment_finds_its_route_once_and_leaves_nothing_of_that() {
    let importer = Importer::open();
    // The kernel forgets translations when it likes, as on hardware.
    let _lazy = Domain::set("DMA-FQ");
    let Some(_bridge) = Played::new("below_bridge=1") else {
        return;
    };
    let (Some(probes), Some(flushes)) = (Calls::of(STOCK_MAP), Calls::of("intel_flush_iotlb_all"))
    else {
        return;
    };
    let device = Device::open("memory");
    for number in 1..=3 {
        let (_fd, attachment) = attached(&device, &importer);
        let before = flushes.count();
        attachment.map().unwrap();
        assert!(flushes.count() > before, "the page is still translated");
        attachment.unmap().unwrap();
        leads_there(&device, &attachment);
        assert_eq!(probes.count(), number);
    }
}

#[test]
fn an_iommu_that_maps_no_single_pages_is_refused() {
    let device = Device::open("memory");
    let (fd, attachment) = attached(&device, &Importer::open());
    let edu = format!("coarse_iommu={}", Function::named(EDU).bdf);
    let Some(played) = Played::new(&edu) else {
        return;
    };
    assert_eq!(attachment.map(), Err(EINVAL));
    assert!(!attachment.is_mapped());
    Map::new(&fd, page_size()).unwrap().touch_all().unwrap();
    drop(played);
    leads_there(&device, &attachment);
}

#[test]
fn zz_nothing_is_left_and_both_modules_can_be_unloaded() {
    check_that_nothing_is_left(&["memory", "nvme"]);
}

// ---- The lock of the power state ----------------------------------------------------------------

/// With the lock held for reading, two writers of PMCSR could wake a function against each other,
/// and leave it asleep with the kernel taking it for awake.
#[test]
fn a_function_that_sleeps_unnoticed_is_woken_with_the_lock_held_for_writing() {
    let Some(watched) = Played::new("watch_wake=1") else {
        return;
    };
    let device = Device::open("nvme");
    let pmcsr = device.pmcsr();
    for number in 1..=2 {
        let [control]: [u8; 1] = device.config(pmcsr);
        device.function().set_config(pmcsr, &[control | 3]);
        assert_eq!(device.function().power_state(), "D0");
        device.set_power_state(0);
        assert_eq!(device.power_state(), 0);
        assert_eq!(watched.counted("wakes"), number);
        assert_eq!(watched.counted("wakes_locked"), number);
    }
}
