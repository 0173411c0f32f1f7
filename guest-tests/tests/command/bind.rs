//! Binding and unbinding: all or none.

use std::{
    fs::{self, File},
    os::fd::AsFd,
    path::Path,
    process::ExitCode,
};

use barlease_guest_tests::{
    pci::{self, Function, STOCK},
    process::{self, Child},
    vfio::Device,
    wait::until,
    witness::sysfs,
};
use serde_json::json;

use super::{Command, failure};

const BARLEASE: &str = barlease_abi::DRIVER_NAME;
const RULES: &str = "/etc/udev/rules.d";

#[test]
fn bind_refuses_a_device_with_virtual_functions_unless_forced() {
    let function = Function::named("igb");
    function.bind(STOCK);
    let parameter = Path::new("/sys/module/vfio_pci/parameters/enable_sriov");
    pci::write(parameter, "1").unwrap();
    let number = sysfs(&function, "sriov_numvfs");
    // The driver lets its functions be made while the device is open.
    let device = Device::open_with("igb", STOCK);
    pci::write(&number, "1").unwrap();
    drop(device);
    let said = failure(&["device", "bind", "--json", &function.bdf]);
    assert!(
        said.contains("bind: ") && said.contains("it has 1 virtual functions"),
        "{said}"
    );
    assert!(said.contains("--force"), "{said}");
    assert_eq!(function.driver().as_deref(), Some(STOCK));
    assert_eq!(fs::read_to_string(&number).unwrap().trim(), "1");

    let forced = Command::start(&["device", "bind", "--force", &function.bdf]);
    assert_eq!(forced.end(), "");
    assert_eq!(function.driver().as_deref(), Some(BARLEASE));
    assert_eq!(fs::read_to_string(&number).unwrap().trim(), "0");
    pci::write(parameter, "0").unwrap();
}

/// A port is no device that a vfio driver takes: all before it go back.
#[test]
fn bind_takes_all_devices_or_none() {
    let [first, second] = ["memory", "trapped"].map(Function::named);
    let port = second.port();
    let its = port.driver();
    first.bind(STOCK);
    second.unbind();
    second.set_override("");
    let both = [
        "device",
        "bind",
        "--json",
        "--force",
        &first.bdf,
        &second.bdf,
        &port.bdf,
    ];
    let said = failure(&both);
    assert!(said.contains(&port.bdf), "{said}");
    assert_eq!(first.driver().as_deref(), Some(STOCK));
    assert_eq!(second.driver(), None);
    assert_eq!(port.driver(), its);

    let said = failure(&["device", "bind", "--json", &first.bdf, &port.bdf]);
    assert!(said.contains("it is a bridge"), "{said}");
    let unbind = ["device", "unbind", "--json", &port.bdf];
    let said = Command::ends_with(3, None, &unbind);
    assert!(said.contains("unbind: "), "{said}");
    assert_eq!(first.driver().as_deref(), Some(STOCK));

    let bound = Command::start(&["device", "bind", &first.bdf, &second.bdf]);
    assert_eq!(bound.end(), "");
    for function in [&first, &second] {
        assert_eq!(function.driver().as_deref(), Some(BARLEASE));
    }
}

#[test]
fn bind_takes_the_whole_group() {
    let pair = ["pair0", "pair1"].map(Function::named);
    assert_eq!(pair[0].group(), pair[1].group());
    for function in &pair {
        function.unbind();
        function.set_override("");
    }
    let text = Command::start(&["device", "bind", "--group", "--json", &pair[0].bdf]).end();
    let told = Command::json(&text).remove(0);
    let row = |function: &Function| {
        let bdf = &function.bdf;
        json!({"bdf": bdf, "before": null, "driver": BARLEASE, "persistent": false})
    };
    assert_eq!(told, json!([row(&pair[0]), row(&pair[1])]));
    assert!(
        pair.iter()
            .all(|it| it.driver().as_deref() == Some(BARLEASE))
    );
    let unbind = ["device", "unbind", "--group", &pair[1].bdf];
    assert_eq!(Command::start(&unbind).end(), "");
    assert!(pair.iter().all(|it| it.driver().is_none()));
}

#[test]
fn a_binding_is_kept_and_given_up() {
    let function = Function::named("memory");
    let port = Function::named("trapped").port();
    function.unbind();
    function.set_override("");
    let bdf = function.bdf.as_str();
    fs::create_dir_all(RULES).unwrap();
    let path = format!("{RULES}/70-barlease-{bdf}.rules");
    // A command that fails leaves nothing behind.
    failure(&[
        "device",
        "bind",
        "--persist",
        "--force",
        "--json",
        bdf,
        &port.bdf,
    ]);
    assert!(!fs::exists(&path).unwrap());

    let bind = Command::start(&["device", "bind", "--persist", "--json", bdf]).end();
    assert_eq!(Command::json(&bind)[0][0]["persistent"], true, "{bind}");
    let rule = fs::read_to_string(&path).unwrap();
    for part in [
        &format!("KERNEL==\"{bdf}\""),
        "ATTR{vendor}==\"0x1af4\"",
        "ATTR{device}==\"0x1110\"",
        "ATTR{driver_override}=\"barlease-vfio-pci\"",
    ] {
        assert!(rule.contains(part), "{rule}");
    }
    let run = rule.split("RUN+=\"").nth(1).unwrap().split('"').next();
    // As udev does at the next boot, when the device is new and a driver may have taken it.
    function.unbind();
    function.bind(STOCK);
    let words: Vec<&str> = run.unwrap().split(' ').skip(1).collect();
    assert_eq!(Command::start(&words).end(), "");
    assert_eq!(function.driver().as_deref(), Some(BARLEASE));

    assert_eq!(Command::start(&["device", "unbind", bdf]).end(), "");
    assert!(fs::exists(&path).unwrap());
    let unbind = ["device", "unbind", "--persist", bdf];
    assert_eq!(Command::start(&unbind).end(), "");
    assert!(!fs::exists(&path).unwrap());
    function.bind(BARLEASE);
}

/// A signal while the second device waits for its user: both are as before.
#[test]
fn a_bind_that_is_interrupted_undoes_what_it_did() {
    let [first, second] = ["trapped", "memory"].map(Function::named);
    first.unbind();
    first.set_override("");
    second.bind(STOCK);
    let open = Device::open_with("memory", STOCK);
    let path = "/tmp/output-interrupted";
    let output = File::create(path).unwrap();
    let child = Child::start(&[output.as_fd()], |link| {
        process::become_command(link, &output);
        let bind = ["barlease", "-j", "device", "bind", &first.bdf, &second.bdf];
        assert_eq!(barlease_cli::run(bind), ExitCode::from(128 + 15));
    });
    until("the first is bound", || {
        first.driver().as_deref() == Some(BARLEASE)
    });
    std::thread::sleep(std::time::Duration::from_millis(300));
    child.signal(15);
    std::thread::sleep(std::time::Duration::from_millis(300));
    drop(open);
    child.join();
    let said = Command::json(&fs::read_to_string(path).unwrap()).remove(0);
    assert_eq!(said["exit_code"], 128 + 15);
    let back =
        |bdf: &str, driver: Option<&str>| json!({"bdf": bdf, "driver": driver, "error": null});
    let list = json!([back(&second.bdf, Some(STOCK)), back(&first.bdf, None)]);
    assert_eq!(said["undone"], list, "{said}");
    assert_eq!(first.driver(), None);
    assert_eq!(second.driver().as_deref(), Some(STOCK));
    for function in [&first, &second] {
        function.bind(BARLEASE);
    }
}

#[test]
fn verbose_says_what_is_written() {
    let function = Function::named("memory");
    function.bind(STOCK);
    let bdf = function.bdf.as_str();
    let text = Command::ends_with(0, None, &["device", "bind", "-v", bdf]);
    for line in [
        format!("write \"{BARLEASE}\" to /sys/bus/pci/devices/{bdf}/driver_override"),
        format!("write \"{bdf}\" to /sys/bus/pci/drivers/{STOCK}/unbind"),
        format!("write \"{bdf}\" to /sys/bus/pci/drivers_probe"),
    ] {
        assert!(text.contains(&format!("barlease: {line}\n")), "{text}");
    }
    let show = ["device", "show", bdf, "--features", "-vv"];
    let text = Command::ends_with(0, None, &show);
    assert!(text.contains("ioctl VFIO_DEVICE_GET_REGION_INFO"), "{text}");
}
