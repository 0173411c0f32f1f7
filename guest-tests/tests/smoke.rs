//! The guest itself is what the other tests rely on.
#![cfg(barlease_guest)]

use std::fs;
use std::path::Path;
use std::process::Command;

use barlease_lab::guest;

#[test]
fn every_device_of_the_preset_is_where_it_is_said_to_be() {
    let devices = guest::devices().unwrap();
    assert!(!devices.is_empty());
    for device in devices {
        let path = Path::new("/sys/bus/pci/devices").join(&device.bdf);
        assert!(path.exists(), "{} is not at {}", device.name, device.bdf);
    }
}

#[test]
fn every_device_is_behind_the_iommu() {
    for device in guest::devices().unwrap() {
        let group = Path::new("/sys/bus/pci/devices")
            .join(&device.bdf)
            .join("iommu_group");
        assert!(
            group.exists(),
            "{} ({}) has no IOMMU group",
            device.name,
            device.bdf
        );
    }
}

#[test]
fn functions_of_a_pair_are_reset_together() {
    let group = |name: &str| {
        let bdf = guest::device(name).unwrap().bdf;
        fs::read_link(format!("/sys/bus/pci/devices/{bdf}/iommu_group")).unwrap()
    };
    assert_eq!(group("pair0"), group("pair1"));
    assert_ne!(group("pair0"), group("memory"));
}

#[test]
fn the_big_bar_is_4_gib() {
    let bdf = guest::device("big").unwrap().bdf;
    let size = fs::metadata(format!("/sys/bus/pci/devices/{bdf}/resource2"))
        .unwrap()
        .len();
    assert_eq!(size, 4 << 30);
}

#[test]
fn users_of_the_demo_exist() {
    for (user, uid) in [
        ("owner", "1000"),
        ("holder1", "1001"),
        ("holder2", "1002"),
        ("holder3", "1003"),
    ] {
        let output = Command::new("su")
            .args([user, "-c", "id -u"])
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), uid);
    }
}

#[test]
fn a_screenshot_lands_on_the_host() {
    let path = guest::screenshot("smoke").unwrap();
    assert!(path.ends_with("smoke.png"), "{path}");
    let error = guest::screenshot("../smoke").unwrap_err().to_string();
    assert!(error.contains("letters, digits"), "{error}");
}

#[test]
fn the_host_passes_commands_on_to_the_emulator() {
    let reply = guest::qmp(r#"{"execute":"query-status"}"#).unwrap();
    assert!(reply.contains("\"running\":true"), "{reply}");
    let error = guest::qmp(r#"{"execute":"no-such-command"}"#)
        .unwrap_err()
        .to_string();
    assert!(error.contains("no-such-command"), "{error}");
}

#[test]
fn requests_of_several_threads_do_not_mix() {
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    let reply = guest::qmp(r#"{"execute":"query-name"}"#).unwrap();
                    assert!(reply.starts_with("{\"return\""), "{reply}");
                }
            });
        }
    });
}

#[test]
fn a_mark_is_in_the_kernels_log() {
    guest::mark("here is the mark").unwrap();
    let log = Command::new("dmesg").output().unwrap();
    assert!(String::from_utf8_lossy(&log.stdout).contains("barlease-lab: here is the mark"));
}
