//! The same cause has the same exit code, whatever the command; and is JSON where JSON is asked
//! for.

use std::{fs::File, os::fd::AsFd, process::ExitCode};

use barlease_guest_tests::{
    pci::{Function, STOCK},
    process::{self, Child},
    vfio::Device,
};
use serde_json::json;

use super::{Command, take};

const FAILURE: u8 = 1;
const USAGE: u8 = 2;
const UNSUPPORTED: u8 = 3;
const STRANGER: u32 = 4321;
/// A lease that is inherited has this number.
const LEASE: i32 = 77;

/// Of each, what it says has this word.
fn check(cause: &str, code: u8, user: Option<u32>, word: &str, commands: &[&[&str]]) {
    for args in commands {
        let args = [&["--json"], *args].concat();
        let text = Command::ends_with(code, user, &args);
        let said = Command::json(&text);
        let [said] = &said[..] else {
            panic!("{cause}: {args:?}: {text}");
        };
        let error = said["error"]
            .as_str()
            .unwrap_or_else(|| panic!("{cause}: {args:?}: {text}"));
        assert_eq!(said["exit_code"], code, "{cause}: {args:?}: {text}");
        assert!(error.contains(word), "{cause}: {args:?}: {error}");
    }
}

#[test]
fn a_cause_has_one_exit_code() {
    let memory = Function::named("memory");
    let bdf = memory.bdf.as_str();
    let port = Function::named("trapped").port();
    let absent = "fffe:fe:1e.7";
    check(
        "no device",
        FAILURE,
        None,
        "no such PCI device",
        &[
            &["device", "show", absent],
            &["device", "show", absent, "--features"],
            &["device", "bind", absent],
            &["device", "unbind", absent],
            &["device", "reset", absent],
            &["device", "alias", absent, "--bar=0"],
            &["lease", "show", absent],
            &["lease", "grant", absent, "--bar=2", "--socket=/tmp/refused"],
        ],
    );

    memory.bind(barlease_abi::DRIVER_NAME);
    let owner = Command::start(&[
        "lease",
        "grant",
        bdf,
        "--json",
        "--bar=2",
        "--range=0+4K",
        "--socket=/tmp/denied",
    ]);
    let lease = take("/tmp/denied");
    let opens: &[&[&str]] = &[
        &["device", "show", bdf, "--features"],
        &["device", "alias", bdf, "--bar=2"],
        &["lease", "grant", bdf, "--bar=2", "--socket=/tmp/refused"],
    ];
    check("busy", FAILURE, None, "", opens);
    check(
        "busy",
        FAILURE,
        None,
        "in use",
        &[&["device", "reset", bdf]],
    );
    check(
        "no permission",
        FAILURE,
        Some(STRANGER),
        "ermission denied",
        opens,
    );
    check(
        "no permission",
        FAILURE,
        Some(STRANGER),
        "ermission denied",
        &[
            &["device", "bind", bdf, "--driver", STOCK],
            &["device", "unbind", bdf],
            &["device", "reset", bdf, "--force"],
            &["lease", "show"],
            &["lease", "revoke", "/tmp/denied"],
            &["lease", "take", "/tmp/denied", "--", "true"],
            &["lease", "dump", "/tmp/denied"],
            &["lease", "read", "/tmp/denied", "0"],
            &["lease", "write", "/tmp/denied", "0", "1"],
            &["lease", "fill", "/tmp/denied", "1", "--range=0+4"],
        ],
    );

    Command::start(&["lease", "revoke", "/tmp/denied"]).end();
    owner.end();
    for args in [
        &["lease", "dump", "fd:77"][..],
        &["lease", "read", "fd:77", "0"],
        &["lease", "write", "fd:77", "0", "1"],
        &["lease", "fill", "fd:77", "1", "--range=0+4"],
    ] {
        let path = "/tmp/output-dead";
        let output = File::create(path).unwrap();
        Child::start(&[output.as_fd(), lease.as_fd()], |link| {
            process::become_command(link, &output);
            process::inherit(&lease, LEASE);
            let args = [&["barlease", "--json"], args].concat();
            assert_eq!(barlease_cli::run(args), ExitCode::from(FAILURE));
        })
        .join();
        let said = Command::json(&std::fs::read_to_string(path).unwrap()).remove(0);
        assert_eq!(said["exit_code"], FAILURE);
        assert!(
            said["error"].as_str().unwrap().contains("for good"),
            "{args:?}: {said}"
        );
    }

    memory.unbind();
    check("wrong driver", UNSUPPORTED, None, "", opens);
    check(
        "wrong driver",
        UNSUPPORTED,
        None,
        "driver",
        &[
            &["device", "unbind", &port.bdf],
            &["device", "bind", bdf, "--driver", "no-such-driver"],
        ],
    );
    memory.bind(STOCK);
    let alias = ["device", "alias", bdf, "--bar=2"];
    check(
        "stock driver",
        UNSUPPORTED,
        None,
        "not supported",
        &[&alias],
    );
    memory.unbind();
    memory.bind(barlease_abi::DRIVER_NAME);

    check(
        "wrong usage",
        USAGE,
        None,
        "",
        &[
            &["device", "show", "nonsense"],
            &["device", "bind"],
            &["device", "bind", bdf, "--driver=../x"],
            &["device", "unbind"],
            &["device", "reset"],
            &["device", "alias", bdf, "--bar=6"],
            &["lease", "show", "nonsense"],
            &["lease", "grant", bdf, "--lease=colour=red"],
            &["lease", "revoke"],
            &["lease", "holders", "a", "b"],
            &["lease", "take", "/tmp/x"],
            &["lease", "dump", "/tmp/x", "--range=4K"],
            &["lease", "read", "/tmp/x", "-1"],
            &["lease", "fill", "/tmp/x", "1"],
            &["lease", "write", "/tmp/x", "0", "1", "--width=3"],
            &["doctor", "nonsense"],
        ],
    );

    // It says what is wrong as one of its checks.
    let text = Command::ends_with(FAILURE, None, &["--json", "doctor", absent]);
    let checks = &Command::json(&text)[0];
    let device = checks.as_array().unwrap().last().unwrap();
    assert_eq!(
        (&device["name"], &device["verdict"]),
        (&json!("device"), &json!("fail"))
    );
    drop(Device::open("memory"));
}
