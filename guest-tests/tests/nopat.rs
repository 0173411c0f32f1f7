//! Where write-combining cannot be real it is refused, and where interrupts are not isolated the
//! MSI-X table is. A CPU without entries of 1 GiB gets none. Run on the machine `nopat`.
#![cfg(barlease_guest)]

use std::fs;

use barlease::doctor::{Doctor, Verdict};
use barlease_abi::{
    ALIAS_WC, FEATURE_ALIAS_REGION, FEATURE_DMA_BUF_MEMATTR, MEMATTR_NC, MEMATTR_WC,
    REGION_CAP_ALIASABLE,
};
use barlease_guest_tests::{
    errno::{EBADF, EOPNOTSUPP, EPERM},
    huge_size,
    lease::{Request, no_such_fd},
    map::How,
    observe, page_size,
    pci::Parameter,
    probe::{self, MemoryType},
    vfio::{Device, GET, SET},
};

/// Without isolated interrupts VFIO gives devices to user space only when it is told to.
fn open(name: &str) -> Device {
    let parameter = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
    fs::write(parameter, "Y").unwrap();
    Device::open(name)
}

#[test]
fn the_kernel_was_told_so() {
    let line = fs::read_to_string("/proc/cmdline").unwrap();
    assert!(
        line.split_whitespace().any(|word| word == "nopat"),
        "{line}"
    );
}

#[test]
fn write_combining_is_refused_before_the_fd_is_looked_at() {
    let device = open("display");
    let fd = device.export(0, &[(0, page_size())]).unwrap();
    assert_eq!(device.memattr(&fd, MEMATTR_WC), Err(EOPNOTSUPP));
    assert_eq!(
        device.memattr_number(no_such_fd(), MEMATTR_WC),
        Err(EOPNOTSUPP)
    );
    assert_eq!(device.memattr_number(no_such_fd(), MEMATTR_NC), Err(EBADF));
    assert_eq!(device.memattr(&fd, MEMATTR_NC), Ok(()));
    assert_eq!(device.status(&fd).unwrap().memattr, MEMATTR_NC);
    // The feature itself is there: the other attribute can be set.
    assert_eq!(device.probe(FEATURE_DMA_BUF_MEMATTR, SET), Ok(()));
}

#[test]
fn aliases_are_refused_and_probe_says_so() {
    let device = open("display");
    assert_eq!(device.probe(FEATURE_ALIAS_REGION, GET), Err(EOPNOTSUPP));
    for (region, flags) in [(0, ALIAS_WC), (0, 0), (99, ALIAS_WC), (0, 2)] {
        assert_eq!(
            device.alias(region, flags),
            Err(EOPNOTSUPP),
            "{region} {flags}"
        );
    }
}

#[test]
fn no_bar_says_that_it_can_be_aliased() {
    let device = open("display");
    let asked = device.probe(FEATURE_ALIAS_REGION, GET);
    assert_eq!(asked, Err(EOPNOTSUPP));
    for bar in 0..6 {
        let info = device.region_info(bar).unwrap();
        let mut ids = info.capabilities.iter().map(|(id, ..)| *id);
        assert!(ids.all(|id| id != REGION_CAP_ALIASABLE), "{info:?}");
    }
}

#[test]
fn the_doctor_says_so() {
    let checks = Doctor::new().examine(None);
    let check = checks.iter().find(|check| check.name == "write-combining");
    assert_eq!(check.unwrap().verdict, Verdict::Warn, "{checks:?}");
}

#[test]
fn mappings_are_uncached() {
    let device = open("display");
    let fd = device.export(0, &[(0, huge_size())]).unwrap();
    for skew in [0, page_size()] {
        let map = How::shared()
            .align(huge_size())
            .skew(skew)
            .map(&fd, 0, huge_size())
            .unwrap();
        map.touch_all().unwrap();
        assert_eq!(probe::memory_type(&map, 0), Some(MemoryType::Uncached));
    }
}

/// The kernel does not look whether the CPU has them before it inserts one.
#[test]
fn a_cpu_without_entries_of_1_gib_gets_smaller_ones() {
    const GIB: u64 = 1 << 30;
    assert!(!observe::has_entries_of_1_gib());
    let device = open("big");
    let fd = device.export(2, &[(0, GIB)]).unwrap();
    let map = How::shared().align(GIB).map(&fd, 0, GIB).unwrap();
    map.read(0).unwrap();
    assert_eq!(probe::entry(&map, 0).unwrap().size, huge_size());
}

#[test]
fn the_msix_table_is_exported_only_where_the_parameter_says_always() {
    let device = open("nvme");
    let register = device.capability(0x11).unwrap() + 4;
    let table = u32::from_le_bytes(device.config(register));
    let (bar, page) = (table & 7, u64::from(table & !7) / page_size() * page_size());
    let request = Request::new(bar, &[(page, page_size())]);
    let both = || {
        let exporters = [device.request(&request), device.stock_export(&request)];
        exporters.map(|answer| answer.map(drop))
    };
    assert_eq!(both(), [Err(EPERM); 2]);
    for (policy, answer) in [
        ("always", Ok(())),
        ("never", Err(EPERM)),
        ("auto", Err(EPERM)),
    ] {
        let _parameter = Parameter::set("msix_export", policy).unwrap();
        assert_eq!(both(), [answer; 2], "{policy}");
    }
    // The memory beside it is exported.
    device.export(2, &[(0, page_size())]).unwrap();
}
