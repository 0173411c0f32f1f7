//! The command `barlease` on the real kernel: binding, granting, revoking, memory types, aliases
//! and steering tags. Run on the machine `device`, whose own device takes tags.
#![cfg(barlease_guest)]

mod bind;
mod errors;
mod grant;

use std::{
    fs::{self, File},
    os::{
        fd::AsFd,
        unix::{fs::FileExt, net::UnixStream},
    },
    path::PathBuf,
    process::ExitCode,
};

use barlease::{
    Bdf, Lease,
    doctor::{Check, Doctor, Verdict},
};
use barlease_abi::{ALIAS_WC, MEMATTR_NC, MEMATTR_WC};
use barlease_guest_tests::{
    huge_size,
    map::{How, READ},
    page_size,
    pci::Function,
    process::{self, Child},
    vfio::Device,
    wait::until,
    witness::Witness,
};
use serde_json::{Value, json};

/// Our own device: BAR0 is memory.
const DEVICE: &str = "trapped";
const BAR: u32 = 0;

/// The command, with its output in a file.
struct Command {
    child: Child,
    output: PathBuf,
}

impl Command {
    fn start(args: &[&str]) -> Self {
        let output = PathBuf::from(format!("/tmp/output-{}", args.join("-").replace('/', "_")));
        let file = File::create(&output).unwrap();
        let child = Child::start(&[file.as_fd()], |link| {
            process::become_command(link, &file);
            let _code = barlease_cli::run(["barlease"].iter().chain(args));
        });
        Self { child, output }
    }

    /// One that must end with this exit code, run by this user, and what it says.
    fn ends_with(code: u8, user: Option<u32>, args: &[&str]) -> String {
        let path = PathBuf::from("/tmp/output-of-a-failure");
        let output = File::create(&path).unwrap();
        Child::start(&[output.as_fd()], |link| {
            process::become_command(link, &output);
            process::say_errors_to(&output);
            if let Some(user) = user {
                process::become_user(user);
            }
            let ended = barlease_cli::run(["barlease"].iter().chain(args));
            assert_eq!(ended, ExitCode::from(code), "{args:?}");
        })
        .join();
        fs::read_to_string(path).unwrap()
    }

    /// Its output, when it has come to its end.
    fn end(self) -> String {
        self.child.join();
        fs::read_to_string(self.output).unwrap()
    }

    /// Documents or events that it has printed until now.
    fn json(text: &str) -> Vec<Value> {
        let parse =
            |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
        text.lines().map(parse).collect()
    }
}

/// `barlease lease show`, in a process that was started before there was a mapping: it would have a
/// copy of each.
struct Show {
    child: Child,
    output: File,
}

impl Show {
    fn new(bdf: &str) -> Self {
        let path = "/tmp/show";
        fs::write(path, "").unwrap();
        // Each writes at the end.
        let output = File::options().read(true).append(true).open(path).unwrap();
        let child = Child::start(&[output.as_fd()], |link| {
            process::become_command(link, &output);
            loop {
                link.expect(0);
                let _code = barlease_cli::run(["barlease", "lease", "show", bdf, "--json"]);
                link.send(1);
            }
        });
        Self { child, output }
    }

    /// Some columns of the first line.
    fn first<const N: usize>(&self, columns: [&str; N]) -> [Value; N] {
        self.output.set_len(0).unwrap();
        self.child.link.send(0);
        self.child.link.expect(1);
        let mut text = [0; 4096];
        let length = self.output.read_at(&mut text, 0).unwrap();
        let lines: Value = serde_json::from_slice(&text[..length]).unwrap();
        columns.map(|column| lines[0][column].clone())
    }
}

/// The doctor's lines about the mappings of a device.
fn mappings(function: &Function) -> Check {
    let bdf: Bdf = function.bdf.parse().unwrap();
    let checks = Doctor::new().examine(Some(bdf));
    let mappings = checks.into_iter().find(|check| check.name == "mappings");
    mappings.unwrap()
}

#[test]
fn lease_show_and_the_doctor_tell_which_type_mappings_have() {
    let function = &Function::named(DEVICE);
    let show = Show::new(&function.bdf);
    let device = Device::open(DEVICE);
    assert_eq!(
        mappings(function).found,
        "0 uncached, 0 write-combining",
        "before"
    );
    let fd = device.export(BAR, &[(0, huge_size())]).unwrap();
    let map = || How::shared().map(&fd, 0, 2 * page_size()).unwrap();
    let uncached = map();
    device.memattr(&fd, MEMATTR_WC).unwrap();
    let combining = [map(), map()];
    let shown = || show.first(["memattr", "mmaps", "wc_mmaps"]);
    assert_eq!(shown(), [json!("wc"), json!(3), json!(2)]);
    // It was there before the lease became write-combining.
    let check = mappings(function);
    assert_eq!(check.verdict, Verdict::Warn, "{check:?}");
    assert!(
        check.found.starts_with("1 uncached, 2 write-combining;"),
        "{check:?}"
    );
    assert!(check.remedy.is_some());
    drop(uncached);
    assert_eq!(mappings(function).verdict, Verdict::Ok);
    device.memattr(&fd, MEMATTR_NC).unwrap();
    assert_eq!(shown(), [json!("nc"), json!(2), json!(2)]);
    // Splits and children have the type of what they were split from.
    let [mut first, second] = combining;
    first.unmap(page_size(), page_size());
    second.protect(page_size(), page_size(), READ).unwrap();
    assert_eq!(shown(), [json!("nc"), json!(3), json!(3)]);
    assert_eq!(mappings(function).found, "0 uncached, 3 write-combining");
    drop((first, second));
    let alias = device.alias(BAR, ALIAS_WC).unwrap();
    let offset = |region: u32| u64::from(region) << 40;
    let map = |region| How::shared().map(device.as_fd(), offset(region), page_size());
    let (_bar, _alias) = (map(BAR).unwrap(), map(alias).unwrap());
    assert_eq!(mappings(function).found, "1 uncached, 1 write-combining");
}

#[test]
fn an_alias_is_shown_as_a_program_finds_it() {
    let function = Function::named("memory");
    function.bind(barlease_abi::DRIVER_NAME);
    let text = Command::start(&["device", "alias", &function.bdf, "--bar=2", "--json"]).end();
    let shown = Command::json(&text).remove(0);
    let device = Device::open("memory");
    let alias = device.alias(2, ALIAS_WC).unwrap();
    let info = device.region_info(alias).unwrap();
    assert_eq!(shown["index"], alias);
    assert_eq!(shown["offset"], info.offset);
    assert_eq!(shown["size"], info.size);
    assert_eq!(shown["kind"], "alias of bar2");
    drop(device);

    let text = Command::start(&["device", "alias", &function.bdf, "--bar=2"]).end();
    let offset = format!("{:#x}", info.offset);
    let row: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[1], offset);
    assert_eq!(row.last(), Some(&"wc"));

    let text = Command::start(&["device", "show", &function.bdf, "--features"]).end();
    let bar = text.lines().find(|line| line.starts_with("bar2")).unwrap();
    assert!(bar.ends_with("nc,wc"), "{text}");
    let json = |args: &[&str]| Command::json(&Command::start(args).end()).remove(0);
    let shown = json(&["device", "show", &function.bdf, "--json"]);
    assert_eq!(shown[0]["bars"][1]["bar"], 2, "{shown}");
    assert!(shown[0]["features"].is_null());
    let all = json(&["device", "--json"]);
    assert!(all.as_array().unwrap().contains(&shown[0]), "{all}");
    let opened = json(&["device", "show", &function.bdf, "--json", "--features"]);
    assert!(opened[0]["features"].is_object(), "{opened}");
    // Of 256 bytes.
    let bar = text.lines().find(|line| line.starts_with("bar0")).unwrap();
    assert!(bar.ends_with("  nc") || bar.ends_with("  -"), "{text}");
}

#[test]
fn the_doctor_says_that_write_combining_is_real() {
    let checks = Doctor::new().examine(None);
    let check = checks.iter().find(|check| check.name == "write-combining");
    assert_eq!(check.unwrap().verdict, Verdict::Ok, "{checks:?}");
}

/// The error of a command that fails, as JSON.
fn failure(args: &[&str]) -> String {
    let said = Command::json(&Command::start(args).end()).remove(0);
    assert_eq!(said["exit_code"], 1, "{said}");
    said["error"].as_str().unwrap().to_owned()
}

#[test]
fn a_device_that_nobody_has_open_is_reset() {
    let function = Function::named("trapped");
    let witness = Witness::new("trapped");
    function.bind(barlease_abi::DRIVER_NAME);
    let before = witness.count(&json!({"kind": "reset_end"}));
    assert_eq!(
        Command::start(&["device", "reset", &function.bdf]).end(),
        ""
    );
    assert_ne!(witness.count(&json!({"kind": "reset_end"})), before);
}

/// The lease that is granted at a socket, as soon as it is.
fn take(socket: &str) -> Lease {
    let mut stream = UnixStream::connect(socket);
    // The socket is there a moment before anybody listens.
    until("a listener", || {
        stream = UnixStream::connect(socket);
        stream.is_ok()
    });
    Lease::receive(stream.unwrap()).unwrap()
}

/// The page of the documentation that says what the keys are.
const DOCUMENTED: &str = include_str!("../../../docs/json.md");

/// That each key of it, and of what is in it, is documented.
fn check_documented(value: &Value) {
    match value {
        Value::Array(list) => list.iter().for_each(check_documented),
        Value::Object(map) => {
            for (key, value) in map {
                assert!(DOCUMENTED.contains(&format!("`{key}`")), "{key}: {value}");
                check_documented(value);
            }
        }
        _ => {}
    }
}

/// Each BAR as the open device tells it, and the processes that have it open, with nothing opened.
#[test]
fn device_show_tells_openers_and_what_can_be_leased() {
    for name in ["trapped", "nvme", "memory"] {
        let function = Function::named(name);
        function.bind(barlease_abi::DRIVER_NAME);
        let show = || {
            let text = Command::start(&["device", "show", &function.bdf, "--json"]).end();
            Command::json(&text).remove(0)[0].clone()
        };
        let shown = show();
        assert_eq!(shown["open"], false, "{shown}");
        assert_eq!(shown["openers"], json!([]));
        let group = &shown["iommu_group"];
        let kind = fs::read_to_string(format!("/sys/kernel/iommu_groups/{group}/type"));
        assert_eq!(shown["iommu_group_type"], kind.unwrap().trim());
        let device = barlease::Device::open(function.bdf.parse().unwrap()).unwrap();
        let mut tables = 0;
        for bar in shown["bars"].as_array().unwrap() {
            let number = u32::try_from(bar["bar"].as_u64().unwrap()).unwrap();
            let free = device.exportable_ranges(number).unwrap();
            assert_eq!(bar["exportable"], json!(free), "{name}: {bar}");
            assert_eq!(bar["size"], device.region(number).unwrap().size);
            tables += usize::from(!bar["msix_table"].is_null());
        }
        let msix = device.config().unwrap().msix().unwrap();
        assert_eq!(tables, usize::from(msix.is_some()), "{name}");
        let open = show();
        assert_eq!(open["open"], true);
        assert_eq!(open["openers"][0]["pid"], std::process::id(), "{open}");
        let exe = std::env::current_exe().unwrap();
        assert_eq!(open["openers"][0]["exe"], json!(exe), "{open}");
        check_documented(&open);
        let text = Command::start(&["device", "show", &function.bdf]).end();
        assert!(text.contains(exe.to_str().unwrap()), "{text}");
        // Somebody else sees that it is open, and neither by whom nor all of config space.
        let bdf = function.bdf.as_str();
        let text = Command::ends_with(0, Some(4321), &["device", "show", bdf, "--json"]);
        let seen = &Command::json(&text)[0][0];
        assert_eq!(seen["open"], true, "{seen}");
        assert_eq!(seen["openers"], json!([]));
        assert!(seen["bars"][0]["exportable"].is_null(), "{seen}");
    }
}

/// As the importer of the lab does: it is edu that reads and writes.
#[test]
fn the_doctor_says_that_another_device_reaches_leases() {
    let [memory, edu] = ["memory", "edu"].map(Function::named);
    let args = ["doctor", "--json", &memory.bdf, "--peer", &edu.bdf];
    let checks = Command::json(&Command::start(&args).end()).remove(0);
    check_documented(&checks);
    let its = |name: &str| {
        let mut list = checks.as_array().unwrap().iter();
        list.find(|it| it["name"] == name).unwrap().clone()
    };
    assert_eq!(its("p2p-route")["verdict"], "ok", "{checks}");
    assert_eq!(its("p2p-translation")["verdict"], "ok", "{checks}");
    assert_eq!(its("next-kernel")["verdict"], "ok", "{checks}");
}
