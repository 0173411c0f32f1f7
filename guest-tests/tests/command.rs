//! The command `barlease` on the real kernel: binding, granting, revoking, memory types, aliases
//! and steering tags. Run on the machine `device`, whose own device takes tags.
#![cfg(barlease_guest)]

use std::{
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::AsFd,
        unix::{
            fs::{FileExt, FileTypeExt},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
};

use barlease::{
    Bdf, Lease, MemoryType,
    doctor::{Check, Doctor, Verdict},
};
use barlease_abi::{ALIAS_WC, MEMATTR_NC, MEMATTR_WC};
use barlease_guest_tests::{
    HUGE, PAGE,
    importer::Importer,
    map::{How, READ, Sigbus},
    pci::{self, Function, STOCK},
    probe,
    process::{self, Child},
    terminal::{self, Terminal},
    vfio::Device,
    wait::until,
    witness::{Witness, sysfs},
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

    /// Its output, when it has come to its end.
    fn end(self) -> String {
        self.child.join();
        fs::read_to_string(self.output).unwrap()
    }

    /// Documents or events that it has printed until now.
    fn json(text: &str) -> Vec<Value> {
        let parse = |line| serde_json::from_str(line).unwrap();
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
    let fd = device.export(BAR, &[(0, HUGE)]).unwrap();
    let map = || How::shared().map(&fd, 0, 2 * PAGE).unwrap();
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
    first.unmap(PAGE, PAGE);
    second.protect(PAGE, PAGE, READ).unwrap();
    assert_eq!(shown(), [json!("nc"), json!(3), json!(3)]);
    assert_eq!(mappings(function).found, "0 uncached, 3 write-combining");
    drop((first, second));
    let alias = device.alias(BAR, ALIAS_WC).unwrap();
    let offset = |region: u32| u64::from(region) << 40;
    let map = |region| How::shared().map(device.as_fd(), offset(region), PAGE);
    let (_bar, _alias) = (map(BAR).unwrap(), map(alias).unwrap());
    assert_eq!(mappings(function).found, "1 uncached, 1 write-combining");
}

#[test]
fn a_lease_is_granted_write_combining_and_with_steering_tags() {
    let function = Function::named(DEVICE);
    let _completer = Witness::new(DEVICE);
    function.unbind();
    function.bind(barlease_abi::DRIVER_NAME);
    let show = Show::new(&function.bdf);
    let socket = "/tmp/granted";
    let command = Command::start(&[
        "lease",
        "grant",
        &function.bdf,
        "--json",
        "--bar=0",
        "--range=0x1000+2M",
        "--memory-type=wc",
        "--steering-tag=0x12",
        "--steering-tag-ext=0x345",
        "--processing-hint=2",
        "--socket",
        socket,
    ]);
    let is_socket = || fs::metadata(socket).is_ok_and(|it| it.file_type().is_socket());
    until("a socket", is_socket);
    let lease = loop {
        // It is there a moment before anybody listens.
        if let Ok(stream) = UnixStream::connect(socket) {
            break Lease::receive(&stream).unwrap();
        }
    };
    assert_eq!(lease.info().unwrap().memory_type, MemoryType::Wc);
    let map = How::shared().map(&lease, 0, HUGE).unwrap();
    map.touch_all().unwrap();
    for at in [0, HUGE - PAGE] {
        assert_eq!(
            probe::memory_type(&map, at),
            Some(probe::MemoryType::WriteCombining)
        );
    }
    let importer = Importer::open();
    assert_eq!(importer.steering_tag(&lease, false), Ok((0x12, 2)));
    assert_eq!(importer.steering_tag(&lease, true), Ok((0x345, 2)));
    assert_eq!(show.first(["mmaps", "wc_mmaps"]), [1, 1]);

    command.child.link.send_line("status");
    command.child.link.send_line("revoke");
    let events = Command::json(&command.end());
    let names: Vec<_> = events.iter().map(|event| &event["event"]).collect();
    assert_eq!(names, ["granted", "served", "status", "revoked"]);
    assert_eq!(events[0]["memory_type"], "wc");
    assert_eq!(events[2]["memory_type"], "wc");
    assert_eq!(map.read(0), Err(Sigbus));
}

/// Two tenants of one card by one command, until somebody wants the card.
#[test]
fn unbinding_ends_a_grant_of_two_leases_at_once() {
    let function = Function::named("memory");
    function.bind(barlease_abi::DRIVER_NAME);
    let sockets = ["/tmp/first", "/tmp/second"];
    let lease = |at: &str, socket: &str| format!("--lease=range={at}+64K,user=0,socket={socket}");
    let command = Command::start(&[
        "lease",
        "grant",
        &function.bdf,
        "--json",
        "--bar=2",
        &lease("0", sockets[0]),
        &lease("64K", sockets[1]),
    ]);
    until("sockets", || {
        sockets.iter().all(|it| fs::exists(it).unwrap())
    });
    let maps = sockets.map(|socket| {
        let mut stream = UnixStream::connect(socket);
        until("a listener", || {
            stream = UnixStream::connect(socket);
            stream.is_ok()
        });
        let lease = Lease::receive(stream.unwrap()).unwrap();
        How::shared().map(&lease, 0, PAGE).unwrap()
    });
    for map in &maps {
        map.read(0).unwrap();
    }
    let begin = std::time::Instant::now();
    function.unbind();
    assert!(begin.elapsed().as_secs() < 5, "{:?}", begin.elapsed());
    let events = Command::json(&command.end());
    let names: Vec<_> = events.iter().map(|event| event["event"].clone()).collect();
    assert!(names.contains(&json!("requested")), "{names:?}");
    assert_eq!(
        names.iter().filter(|it| **it == json!("revoked")).count(),
        2
    );
    assert_eq!(names.last(), Some(&json!("closed")));
    for map in maps {
        assert_eq!(map.read(0), Err(Sigbus));
    }
    function.bind(barlease_abi::DRIVER_NAME);
}

#[test]
fn tags_that_a_device_does_not_complete_end_the_grant() {
    let function = Function::named("display");
    function.bind(barlease_abi::DRIVER_NAME);
    let socket = "/tmp/refused";
    let command = Command::start(&[
        "lease",
        "grant",
        &function.bdf,
        "--bar=0",
        "--steering-tag=1",
        "--socket",
        socket,
    ]);
    assert_eq!(command.end(), "");
    assert!(!fs::exists(socket).unwrap());
    // A client that asks for none gets it.
    let device = Device::open("display");
    device.export(0, &[(0, PAGE)]).unwrap();
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
    assert_eq!(
        function.driver().as_deref(),
        Some(barlease_abi::DRIVER_NAME)
    );
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
    let said = failure(&["device", "unbind", "--json", &port.bdf]);
    assert!(said.starts_with("unbind: "), "{said}");
    assert_eq!(first.driver().as_deref(), Some(STOCK));

    let bound = Command::start(&["device", "bind", &first.bdf, &second.bdf]);
    assert_eq!(bound.end(), "");
    for function in [&first, &second] {
        assert_eq!(
            function.driver().as_deref(),
            Some(barlease_abi::DRIVER_NAME)
        );
    }
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

/// State of a process: `T` is stopped.
fn state(pid: u64) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_name = stat.rsplit_once(") ").unwrap().1;
    after_name.chars().next().unwrap()
}

#[test]
fn a_grant_in_the_background_of_a_shell_goes_on_and_reads_in_the_foreground() {
    let function = Function::named("memory");
    function.bind(barlease_abi::DRIVER_NAME);
    let mut terminal = Terminal::new();
    let program = terminal.program.try_clone().unwrap();
    let socket = "/tmp/background";
    let path = "/tmp/output-background";
    let output = File::create(path).unwrap();
    let bdf = &function.bdf;
    let shell = Child::start(&[program.as_fd(), output.as_fd()], |link| {
        terminal::become_shell(&program);
        let job = Child::start(&[program.as_fd(), output.as_fd()], |_| {
            terminal::become_job(&program, &output);
            let grant = [
                "barlease", "lease", "grant", bdf, "--bar=2", "--socket", socket,
            ];
            let _code = barlease_cli::run(grant);
        });
        link.send(u64::try_from(job.id()).unwrap());
        link.expect(1);
        terminal::foreground(&program, job.id());
        job.join();
    });
    let job = shell.link.receive();
    let map = How::shared().map(take(socket), 0, PAGE).unwrap();
    // The shell does not read it. Serving again means that the loop came round with the line
    // waiting.
    terminal.keyboard.write_all(b"revoke\n").unwrap();
    for _ in 0..2 {
        std::thread::sleep(std::time::Duration::from_millis(1500));
        assert_ne!(state(job), 'T');
        drop(take(socket));
    }
    map.read(0).unwrap();
    shell.link.send(1);
    shell.join();
    assert_eq!(map.read(0), Err(Sigbus));
    let said = fs::read_to_string(path).unwrap();
    assert!(said.contains("revoked lease"), "{said}");
}

#[test]
fn a_grant_goes_on_when_nobody_reads_what_it_says() {
    let function = Function::named("memory");
    function.bind(barlease_abi::DRIVER_NAME);
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let socket = "/tmp/unread";
    let bdf = &function.bdf;
    let mut child = Child::start(&[writer.as_fd()], |link| {
        process::become_command(link, &writer);
        let grant = [
            "barlease", "lease", "grant", bdf, "--bar=2", "--socket", socket,
        ];
        let code = barlease_cli::run(grant);
        assert_eq!(code, std::process::ExitCode::SUCCESS);
    });
    let map = How::shared().map(take(socket), 0, PAGE).unwrap();
    drop(take(socket));
    map.read(0).unwrap();
    child.link.send_line("revoke");
    assert_eq!(child.wait(), process::End::Code(0));
    assert_eq!(map.read(0), Err(Sigbus));
}

#[test]
fn a_lease_is_revoked_from_another_shell_and_its_holders_are_listed() {
    let function = Function::named("memory");
    function.bind(barlease_abi::DRIVER_NAME);
    let socket = "/tmp/elsewhere";
    let name = "--name=elsewhere";
    let grant = [
        "lease",
        "grant",
        &function.bdf,
        "--json",
        "--bar=2",
        name,
        "--once",
        "--socket",
        socket,
    ];
    let grant = Command::start(&grant);
    let lease = take(socket);
    let map = How::shared().map(&lease, 0, PAGE).unwrap();
    let id = barlease::LeaseId::of(&lease).unwrap();
    drop(lease);
    map.read(0).unwrap();

    let list = |what: &str| {
        let text = Command::start(&["lease", "holders", "--json", what]).end();
        let list = Command::json(&text).remove(0);
        list.as_array().unwrap().clone()
    };
    let holds = |list: &[Value], pid: u32, column: &str| {
        let its = list.iter().find(|it| it["pid"] == pid);
        its.map(|it| it[column].clone())
    };
    let owner = u32::try_from(grant.child.id()).unwrap();
    let held = list("elsewhere");
    assert!(held.iter().all(|it| json!(id) == it["id"]), "{held:?}");
    assert_eq!(holds(&held, owner, "fds"), Some(json!(1)), "{held:?}");
    assert_eq!(
        holds(&held, std::process::id(), "maps"),
        Some(json!(1)),
        "{held:?}"
    );
    let open = list(&function.bdf);
    assert_eq!(
        holds(&open, owner, "kind"),
        Some(json!("device")),
        "{open:?}"
    );
    let said = failure(&["device", "reset", "--json", &function.bdf]);
    assert!(
        said.contains("reset: ") && said.contains("it is open"),
        "{said}"
    );

    // Somebody else may not.
    let path = "/tmp/output-stranger";
    let output = File::create(path).unwrap();
    Child::start(&[output.as_fd()], |link| {
        process::become_command(link, &output);
        process::become_user(4321);
        let _code = barlease_cli::run(["barlease", "lease", "revoke", "--json", socket]);
    })
    .join();
    let said = fs::read_to_string(path).unwrap();
    assert!(
        said.contains("for the user that granted it and root only"),
        "{said}"
    );
    map.read(0).unwrap();

    let told = Command::json(&Command::start(&["lease", "revoke", "--json", socket]).end());
    assert_eq!(told[0]["event"], "revoked", "{told:?}");
    assert_eq!(map.read(0), Err(Sigbus));
    let events = Command::json(&grant.end());
    assert_eq!(events.last().unwrap()["event"], "revoked", "{events:?}");
    let said = failure(&["lease", "revoke", "--json", socket]);
    assert!(said.contains("nobody grants a lease there"), "{said}");
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
