//! `barlease policy` on files: no service, no device.

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;
use serde_json::Value;

const DEVICES: &str = r#"
[device.card]
match = "0000:01:00.0"

[pool.rows]
device = "card"
bar = 2
length = "1M"
unit = "4K"
contents = "memory"

[pool.doorbells]
device = "card"
bar = 0
unit = "4K"
writable = false
"#;

const RULES: &str = r#"
[[allow]]
pools = ["rows"]
who = { user = 1001 }
access = "read-write"
max-bytes = "64K"
queue = "1m"

[[allow]]
pools = ["*"]
who = { unit = "render@*.service" }
access = "read"
lifetime = ["cgroup"]
"#;

fn policy(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_barlease"));
    command
        .arg("policy")
        .args(arguments)
        .env("BARLEASE_SOCKET", "/nonexistent/leases.sock");
    command
}

fn files(texts: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in texts {
        fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

fn name(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn files_of_a_directory_are_one_policy() {
    let folder = files(&[
        ("10-devices.toml", DEVICES),
        ("20-rules.toml", RULES),
        ("notes.txt", "no policy"),
    ]);
    policy(&["check", name(folder.path())])
        .assert()
        .success()
        .stdout("valid: 2 files, 1 devices, 2 pools\n");
}

#[test]
fn each_error_has_file_line_and_key() {
    let wrong = "[pool.extra]\ndevice = \"disk\"\nbar = 2\nunit = \"4K\"\n\n[[allow]]\n\
                 pools = [\"rows\"]\nwho = { user = \"no-such-user-here\" }\naccess = \"read\"\n";
    let unknown = "[device.other]\nmatch = \"0000:02:00.0\"\ncolour = \"red\"\n";
    let folder = files(&[("a.toml", DEVICES), ("b.toml", wrong), ("c.toml", unknown)]);
    policy(&["check", name(folder.path())])
        .assert()
        .code(1)
        .stdout(contains(
            "b.toml:2: pool.extra.device: there is no device disk",
        ))
        .stdout(contains("b.toml:8: ").and(contains("no-such-user-here")))
        .stdout(contains("c.toml:3: device.other.colour: unknown field"));
    let output = policy(&["check", "--json", name(folder.path())])
        .assert()
        .code(1)
        .get_output()
        .clone();
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["valid"], false);
    let lines: Vec<_> = told["errors"].as_array().unwrap().iter().collect();
    assert_eq!(lines.len(), 3, "{told}");
    assert!(
        lines
            .iter()
            .any(|error| error["line"] == 2 && error["key"] == "pool.extra.device")
    );
    policy(&["check", "/nonexistent/x.toml"])
        .assert()
        .code(1)
        .stderr(contains("read: /nonexistent/x.toml"));
}

#[test]
fn the_rule_that_allows_or_refuses_is_named() {
    let folder = files(&[("a.toml", DEVICES), ("b.toml", RULES)]);
    let explain = |arguments: &[&str]| {
        let fixed = ["explain", "--policy", name(folder.path())];
        policy(&[&fixed[..], arguments].concat()).assert()
    };
    explain(&["--as-uid", "1001", "rows", "64K"])
        .success()
        .stdout(contains("granted\nrules for rows:"))
        .stdout(contains("b.toml:4   yes"));
    explain(&["--as-uid", "1001", "rows", "128K"])
        .code(1)
        .stdout(contains("refused: the limit of ").and(contains("0x10000 bytes")));
    explain(&["--as-uid", "1002", "rows", "4K"])
        .code(1)
        .stdout(contains("refused: no rule allows it").and(contains("`user` does not fit")));
    let unit = [
        "--as-uid",
        "1002",
        "--unit",
        "render@1.service",
        "doorbells",
        "4K",
    ];
    explain(&[&unit[..], &["--lifetime", "cgroup"]].concat())
        .code(1)
        .stdout(contains("it allows reading only"));
    let reads = ["--lifetime", "cgroup", "--read-only", "--json"];
    let output = explain(&[&unit[..], &reads].concat())
        .success()
        .get_output()
        .clone();
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&told["granted"], &told["held_by"]),
        (&true.into(), &Value::Null)
    );
    explain(&["--as-uid", "1001", "rows", "100"])
        .code(1)
        .stdout(contains("multiples of 0x1000"));
    explain(&["--as-uid", "1001", "none", "4K"])
        .code(1)
        .stdout(contains("there is no pool none"));
    let ranges = ["--device", "card", "--bar", "2", "--range"];
    explain(&[&["--as-uid", "1001"], &ranges[..], &["1020K+4K"]].concat()).success();
    explain(&[&["--as-uid", "1001"], &ranges[..], &["1M+4K"]].concat())
        .code(1)
        .stdout(contains("no pool has all of the ranges"));
}

#[test]
fn the_schema_knows_the_keys() {
    let output = policy(&["schema"]).assert().success().get_output().clone();
    let schema: Value = serde_json::from_slice(&output.stdout).unwrap();
    let keys = schema["properties"].as_object().unwrap();
    for key in [
        "device",
        "pool",
        "allow",
        "revoke-what-is-no-longer-allowed",
    ] {
        assert!(keys.contains_key(key), "{key}");
    }
}
