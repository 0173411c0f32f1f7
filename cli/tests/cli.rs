//! The command on a machine without the module and without a device to lease.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;

use assert_cmd::Command;
use barlease::Lease;
use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;
use predicates::str::starts_with;

/// An address that no test machine has.
const ABSENT: &str = "fffe:fe:1e.7";

fn barlease(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_barlease"));
    // The tests send files that are no dma-bufs.
    command.args(args).env("BARLEASE_ANY_FILE", "1");
    command
}

fn memory(content: &[u8]) -> (Lease, File) {
    let fd = rustix::fs::memfd_create("lease", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, 8192).unwrap();
    let file = File::from(fd.as_fd().try_clone_to_owned().unwrap());
    std::os::unix::fs::FileExt::write_all_at(&file, content, 0x10).unwrap();
    (Lease::from_fd(fd).unwrap(), file)
}

/// Serves a lease over a socket as often as asked for.
fn serve(lease: Lease, times: usize) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        for _ in 0..times {
            let (peer, _) = listener.accept().unwrap();
            lease.send(&peer).unwrap();
        }
    });
    (dir, path.to_str().unwrap().to_owned())
}

#[test]
fn help_names_objects_commands_and_exit_codes() {
    barlease(&["--help"])
        .assert()
        .success()
        .stdout(
            contains("device")
                .and(contains("lease"))
                .and(contains("doctor")),
        )
        .stdout(contains("3 not supported"));
    barlease(&["lease", "--help"]).assert().success().stdout(
        contains("grant")
            .and(contains("take"))
            .and(contains("dump")),
    );
}

#[test]
fn wrong_usage_is_exit_code_2() {
    let grant = |more: &[&'static str]| {
        let mut args = vec!["lease", "grant", ABSENT, "--bar", "0", "--socket", "x"];
        args.extend(more);
        args
    };
    for args in [
        &["frobnicate"][..],
        &[],
        &["device", "bind"],
        &["device", "show", "nonsense"],
        &["lease", "grant", ABSENT, "--bar", "6", "--socket", "x"],
        &[
            "lease", "grant", ABSENT, "--bar", "0", "--socket", "x", "--range", "4K",
        ],
        &["lease", "write", "x", "0", "1", "--width", "3"],
        &["device", "alias", ABSENT],
        &["device", "alias", ABSENT, "--bar", "6"],
        &grant(&["--steering-tag", "256"]),
        &grant(&["--steering-tag-ext", "0x10000"]),
        &grant(&["--processing-hint", "4"]),
        &grant(&["--memory-type", "wb"]),
    ] {
        barlease(args).assert().code(2);
    }
}

#[test]
fn a_device_that_does_not_exist_is_said_with_a_remedy() {
    for args in [
        &["device", "show", ABSENT][..],
        &["device", "bind", ABSENT],
        &["device", "unbind", ABSENT],
        &["device", "alias", ABSENT, "--bar", "0"],
        &["lease", "show", ABSENT],
        &[
            "lease",
            "grant",
            ABSENT,
            "--bar",
            "0",
            "--socket",
            "/nonexistent/x",
        ],
    ] {
        barlease(args)
            .assert()
            .code(1)
            .stdout("")
            .stderr(starts_with("barlease: "))
            .stderr(contains(ABSENT).and(contains("no such PCI device")))
            .stderr(contains("(`barlease device` lists them)"));
    }
}

#[test]
fn leases_without_the_module_are_not_supported() {
    if barlease::pci::Pci::system().module().is_some() {
        return;
    }
    barlease(&["lease"])
        .assert()
        .code(3)
        .stderr(contains("modprobe barlease_vfio_pci"));
}

#[test]
fn doctor_prints_json() {
    let output = barlease(&["doctor", "-j"]).output().unwrap();
    let checks: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(checks[0]["name"], "kernel");
    assert!(checks.as_array().unwrap().len() >= 5);
}

#[test]
fn a_lease_is_dumped_from_a_socket() {
    let (lease, _) = memory(b"Barlease");
    let (_dir, path) = serve(lease, 3);
    barlease(&["lease", "dump", &path])
        .assert()
        .success()
        .stdout(contains("00000010  42 61 72 6c 65 61 73 65").and(contains("|Barlease")))
        .stdout(contains("00002000\n"));
    barlease(&["lease", "dump", &path, "--range", "0x11+4", "--json"])
        .assert()
        .success()
        .stdout("{\"offset\":17,\"bytes\":\"61726c65\"}\n");
    barlease(&["lease", "dump", &path, "--range", "0+12K"])
        .assert()
        .code(1)
        .stderr(contains("past the end"));
}

#[test]
fn a_number_is_written_in_its_width() {
    let (lease, file) = memory(&[0xff; 16]);
    let (_dir, path) = serve(lease, 3);
    barlease(&["lease", "write", &path, "0x12", "0x1234", "--width", "2"])
        .assert()
        .success();
    let mut bytes = [0; 8];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0x10).unwrap();
    assert_eq!(bytes, [0xff, 0xff, 0x34, 0x12, 0xff, 0xff, 0xff, 0xff]);

    barlease(&["lease", "write", &path, "0x12", "1"])
        .assert()
        .code(1)
        .stderr(contains("not aligned to 4 bytes"));
    barlease(&["lease", "write", &path, "0", "0x100", "--width", "1"])
        .assert()
        .code(1)
        .stderr(contains("does not fit"));
}

#[test]
fn a_taken_lease_is_inherited_by_the_command_and_its_exit_code_is_returned() {
    let (lease, _) = memory(b"inherited");
    let (_dir, path) = serve(lease, 2);
    let script = format!(
        "'{}' lease dump --fd $BARLEASE_FD",
        env!("CARGO_BIN_EXE_barlease")
    );
    barlease(&["lease", "take", &path, "--", "sh", "-c", &script])
        .assert()
        .success()
        .stdout(contains("|inherited"));
    barlease(&["lease", "take", &path, "--", "sh", "-c", "exit 7"])
        .assert()
        .code(7);
}

#[test]
fn anything_but_a_dma_buf_is_refused() {
    let (lease, _) = memory(b"Barlease");
    let (_dir, path) = serve(lease, 1);
    barlease(&["lease", "dump", &path])
        .env_remove("BARLEASE_ANY_FILE")
        .assert()
        .code(1)
        .stderr(contains("not one of a dma-buf"));
}

#[test]
fn a_dump_moves_nobodys_file_offset() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let mut log = File::create(&path).unwrap();
    std::io::Write::write_all(&mut log, b"before\n").unwrap();
    let status = std::process::Command::new(env!("CARGO_BIN_EXE_barlease"))
        .args(["lease", "dump", "fd:1"])
        .stdout(log.try_clone().unwrap())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    // A log cannot be read, as it was opened for writing: but it was looked at.
    assert!(!status.success());
    assert_eq!(std::io::Seek::stream_position(&mut log).unwrap(), 7);
}

#[test]
fn no_socket_and_no_descriptor_are_said() {
    barlease(&["lease", "dump", "/nonexistent/socket"])
        .assert()
        .code(1)
        .stderr(
            contains("barlease: connect: /nonexistent/socket: ")
                .and(contains("nobody grants a lease there")),
        );
    barlease(&["lease", "dump", "--fd", "99"])
        .assert()
        .code(1)
        .stderr(contains("/dev/fd/99"));
}

#[test]
fn errors_are_json_where_json_is_asked_for() {
    let output = barlease(&["device", "show", ABSENT, "--json"])
        .assert()
        .code(1)
        .stderr("")
        .get_output()
        .clone();
    let error: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(error["exit_code"], 1);
    assert!(error["error"].as_str().unwrap().contains(ABSENT), "{error}");
}

#[test]
fn wrong_usage_is_json_too() {
    for args in [
        &["device", "bind", "--json"][..],
        &["-j", "frobnicate"],
        &["device", "bind", "00:05.0", "--driver", "a/b", "-p"],
        &["lease", "grant", ABSENT, "--lease", "bar=0", "-j"],
    ] {
        let said = barlease(args).assert().code(2).stderr("");
        let error: serde_json::Value = serde_json::from_slice(&said.get_output().stdout).unwrap();
        assert_eq!(error["exit_code"], 2, "{args:?}");
        assert!(!error["error"].as_str().unwrap().is_empty(), "{error}");
    }
    // Words after `--` are another program's.
    barlease(&["lease", "take", "--", "x", "-j"])
        .assert()
        .code(2)
        .stdout("")
        .stderr(contains("Usage"));
}

#[test]
fn a_number_is_read_in_its_width() {
    let (lease, _) = memory(&[0x78, 0x56, 0x34, 0x12, 0xff]);
    let (_dir, path) = serve(lease, 4);
    let read =
        |args: &[&str]| barlease(&[&["lease", "read", path.as_str()], args].concat()).assert();
    read(&["0x10"]).success().stdout("0x12345678\n");
    read(&["0x12", "--width", "2"]).success().stdout("0x1234\n");
    read(&["0x10", "--width", "8", "-j"])
        .success()
        .stdout("{\"offset\":16,\"width\":8,\"value\":1095522080376}\n");
    read(&["0x11"]).code(1).stderr(contains("not aligned"));
}

#[test]
fn a_range_is_filled_and_nothing_else() {
    let (lease, file) = memory(&[0xee; 16]);
    let (_dir, path) = serve(lease, 2);
    barlease(&[
        "lease", "fill", &path, "0x1234", "--width", "2", "--range", "0x12+6",
    ])
    .assert()
    .success();
    let mut bytes = [0; 10];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0x10).unwrap();
    assert_eq!(
        bytes,
        [0xee, 0xee, 0x34, 0x12, 0x34, 0x12, 0x34, 0x12, 0xee, 0xee]
    );
    barlease(&["lease", "fill", &path, "1", "--range", "0+6"])
        .assert()
        .code(1)
        .stderr(contains("no multiple of 4 bytes"));
}

#[test]
fn a_dump_of_a_huge_lease_begins_at_once_and_ends_with_its_reader() {
    use std::io::Read;
    let fd = rustix::fs::memfd_create("lease", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, 200 << 30).unwrap();
    // A window is shown when it has a row that differs.
    std::os::unix::fs::FileExt::write_all_at(
        &File::from(fd.as_fd().try_clone_to_owned().unwrap()),
        &(0..1 << 20).map(|n| (n >> 4) as u8).collect::<Vec<u8>>(),
        0,
    )
    .unwrap();
    let (_dir, path) = serve(Lease::from_fd(fd).unwrap(), 1);
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_barlease"))
        .args(["lease", "dump", &path, "--width", "8"])
        .env("BARLEASE_ANY_FILE", "1")
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0; 8];
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"00000000");
    drop(out);
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(141));
    let mut said = String::new();
    child.stderr.unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "");
}

#[test]
fn several_leases_are_understood_before_a_device_is_touched() {
    let grant = |lease: &[&str]| {
        let leases = lease.iter().flat_map(|lease| ["--lease", *lease]);
        let args: Vec<&str> = ["lease", "grant", ABSENT]
            .into_iter()
            .chain(leases)
            .collect();
        barlease(&args).assert()
    };
    grant(&["bar=0"]).code(2).stderr(contains("no socket=PATH"));
    grant(&["socket=/x"]).code(2).stderr(contains("no bar=N"));
    grant(&["bar=0,socket=/x", "bar=2,socket=/x"])
        .code(2)
        .stderr(contains("cannot share a socket"));
    grant(&["bar=0,socket=/x", "bar=2,socket=/y"])
        .code(1)
        .stderr(contains("no such PCI device"));
    barlease(&["lease", "grant", ABSENT]).assert().code(2);
}

#[test]
fn list_is_show_and_commands_may_be_abbreviated() {
    for args in [&["device", "list", ABSENT][..], &["dev", "show", ABSENT]] {
        barlease(args).assert().code(1).stderr(contains(ABSENT));
    }
}

#[test]
fn device_show_has_one_shape_with_and_without_a_device() {
    let show = |args: &[&str]| -> serde_json::Value {
        let args = [&["device", "show", "--json"], args].concat();
        let output = barlease(&args).assert().success().get_output().clone();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    if !std::path::Path::new("/sys/bus/pci/devices").exists() {
        return;
    }
    let all = show(&[]);
    let all = all.as_array().unwrap();
    let Some(first) = all.first() else {
        return;
    };
    assert_eq!(
        show(&[first["bdf"].as_str().unwrap()]),
        serde_json::json!([first])
    );
    assert!(
        first["bars"].is_array() && first["features"].is_null(),
        "{first}"
    );
}

#[test]
fn leases_of_a_file_are_understood_before_a_device_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("leases.toml");
    let path = path.to_str().unwrap();
    let grant = |text: &str| {
        std::fs::write(path, text).unwrap();
        barlease(&["lease", "grant", "--file", path]).assert()
    };
    let lease = format!("[[lease]]\nbar = 0\ndevice = \"{ABSENT}\"\nsocket = \"/nonexistent/a\"\n");
    grant(&lease).code(1).stderr(contains("no such PCI device"));
    grant(&format!("{lease}{lease}"))
        .code(2)
        .stderr(contains("two leases cannot share a socket"));
    grant(&format!("{lease}colour = 1\n"))
        .code(2)
        .stderr(contains(format!(
            "{path}: lease 1: \"colour=1\" is not understood"
        )));
    barlease(&["lease", "grant", "--file", "/nonexistent/leases"])
        .assert()
        .code(1)
        .stderr(contains("grant: /nonexistent/leases: "));
}

#[test]
fn what_fails_before_a_grant_is_in_the_background_is_said_in_the_shell() {
    let detach = |more: &[&str]| {
        let grant = [
            "lease",
            "grant",
            ABSENT,
            "--bar=0",
            "--socket=/x",
            "--detach",
        ];
        barlease(&[&grant[..], more].concat()).assert()
    };
    detach(&[])
        .code(1)
        .stdout("")
        .stderr(contains("no such PCI device"));
    let said = detach(&["--json"]).code(1).stderr("").get_output().clone();
    let said: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
    assert_eq!(said["exit_code"], 1);
}
