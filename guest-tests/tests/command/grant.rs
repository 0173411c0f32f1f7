//! Granting leases and revoking them.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::AsFd,
        unix::{fs::FileTypeExt, net::UnixStream},
    },
    path::Path,
};

use barlease::{Lease, MemoryType};
use barlease_guest_tests::{
    huge_size,
    importer::Importer,
    map::{How, Sigbus},
    page_size,
    pci::{self, Function},
    probe,
    process::{self, Child},
    terminal::{self, Terminal},
    vfio::Device,
    wait::until,
    witness::{Witness, sysfs},
};
use serde_json::{Value, json};

use super::{Command, DEVICE, Show, failure, take};

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
    let map = How::shared().map(&lease, 0, huge_size()).unwrap();
    map.touch_all().unwrap();
    for at in [0, huge_size() - page_size()] {
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
        How::shared().map(&lease, 0, page_size()).unwrap()
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

/// The shell has its prompt again; the leases are there, and end one by one.
#[test]
fn a_grant_of_a_file_goes_to_the_background_and_is_revoked_from_there() {
    let function = Function::named("memory");
    function.bind(barlease_abi::DRIVER_NAME);
    let file = "/tmp/leases.toml";
    let text = format!(
        "device = \"{}\"\nbar = 2\nuser = 0\n\
         [[lease]]\nrange = \"0+64K\"\nsocket = \"/tmp/background-a\"\n\
         [[lease]]\nrange = [\"64K+4K\", \"1M+4K\"]\nsocket = \"/tmp/background-b\"\n",
        function.bdf
    );
    fs::write(file, text).unwrap();
    let grant = ["lease", "grant", "--json", "--file", file, "--detach"];
    let events = Command::json(&Command::start(&grant).end());
    let names: Vec<_> = events.iter().map(|event| event["event"].clone()).collect();
    assert_eq!(names, ["granted", "granted", "detached"]);
    let pid = u32::try_from(events[2]["pid"].as_u64().unwrap()).unwrap();
    // A session of its own: the end of the shell's sends it no SIGHUP.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_name = stat.rsplit_once(") ").unwrap().1;
    assert_eq!(
        after_name.split(' ').nth(3),
        Some(pid.to_string().as_str()),
        "{stat}"
    );
    // Its output was a file, and is still.
    for (fd, target) in [(0, "/dev/null"), (1, "/tmp/output-")] {
        let link = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
        assert!(link.to_str().unwrap().starts_with(target), "{link:?}");
    }

    let sockets = ["/tmp/background-a", "/tmp/background-b"];
    let maps = sockets.map(|socket| How::shared().map(take(socket), 0, page_size()).unwrap());
    let text = Command::start(&["lease", "holders", "--json", &function.bdf]).end();
    let held = Command::json(&text).remove(0);
    assert_eq!(held[0]["pid"], pid, "{held}");
    let revoke = |socket: &str| Command::start(&["lease", "revoke", socket]).end();
    assert!(revoke(sockets[0]).starts_with("revoked lease"));
    assert_eq!(maps[0].read(0), Err(Sigbus));
    maps[1].read(0).unwrap();
    revoke(sockets[1]);
    assert_eq!(maps[1].read(0), Err(Sigbus));
    until("its end", || !fs::exists(format!("/proc/{pid}")).unwrap());
    assert!(sockets.iter().all(|socket| !fs::exists(socket).unwrap()));

    // A second device of the file is missing: nothing stays.
    let missing = "/tmp/missing.toml";
    let more = "[[lease]]\ndevice = \"00:1f.7\"\nsocket = \"/tmp/background-c\"\n";
    fs::write(missing, fs::read_to_string(file).unwrap() + more).unwrap();
    let grant = ["lease", "grant", "--json", "--file", missing, "--detach"];
    let said = Command::json(&Command::start(&grant).end());
    assert_eq!(said.last().unwrap()["exit_code"], 1, "{said:?}");
    assert!(!fs::exists(sockets[0]).unwrap());
    drop(Device::open("memory"));
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
    // A user who asks for none gets it.
    let device = Device::open("display");
    device.export(0, &[(0, page_size())]).unwrap();
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
    let map = How::shared().map(take(socket), 0, page_size()).unwrap();
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
    let map = How::shared().map(take(socket), 0, page_size()).unwrap();
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
    let map = How::shared().map(&lease, 0, page_size()).unwrap();
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

/// An importer that does not let go is somebody else's to wait for.
#[test]
fn a_revocation_need_not_wait_for_an_importer() {
    let function = Function::named("memory");
    function.bind(barlease_abi::DRIVER_NAME);
    let socket = "/tmp/no-wait";
    let grant = Command::start(&[
        "lease",
        "grant",
        &function.bdf,
        "--json",
        "--bar=2",
        "--socket",
        socket,
    ]);
    let lease = take(socket);
    let map = How::shared().map(&lease, 0, page_size()).unwrap();
    let importer = Importer::open();
    let attachment = importer.attach(&lease).unwrap();
    attachment.fence().unwrap();
    let revoke = ["lease", "revoke", "--no-wait", "--json", socket];
    let told = Command::json(&Command::start(&revoke).end());
    assert_eq!(told[0]["event"], "draining", "{told:?}");
    assert_eq!(map.read(0), Err(Sigbus));
    attachment.signal().unwrap();
    let events = Command::json(&grant.end());
    assert_eq!(events.last().unwrap()["event"], "revoked", "{events:?}");
}

/// Functions of one IOMMU group share what only one process can open.
#[test]
fn two_functions_of_a_group_are_leased_by_one_command() {
    let pair = ["pair0", "pair1"].map(Function::named);
    assert_eq!(pair[0].group(), pair[1].group());
    let sockets = ["/tmp/pair0", "/tmp/pair1"];
    let leases: Vec<String> = (0..2)
        .map(|n| format!("--lease=device={},socket={}", pair[n].bdf, sockets[n]))
        .collect();
    for function in &pair {
        function.bind(barlease_abi::DRIVER_NAME);
    }
    let grant = [
        "lease", "grant", "--json", "--bar=2", &leases[0], &leases[1],
    ];
    let command = Command::start(&grant);
    let maps = sockets.map(|socket| How::shared().map(take(socket), 0, page_size()).unwrap());
    // Somebody else is told that it is in use, and by whom to ask.
    let other = [
        "lease",
        "grant",
        "--json",
        &pair[1].bdf,
        "--bar=2",
        "--socket=/tmp/third",
    ];
    let said = failure(&other);
    assert!(said.contains("lease holders"), "{said}");
    command.child.link.send_line("revoke");
    command.end();
    for map in maps {
        assert_eq!(map.read(0), Err(Sigbus));
    }
}

/// Each owner needs the token that the physical function's owner has set.
#[test]
fn a_virtual_function_is_opened_with_its_token() {
    const TOKEN: &str = "14d63f20-8445-11ea-8900-1f9ce7d5650d";
    let physical = Function::named("igb");
    physical.bind(barlease_abi::DRIVER_NAME);
    let parameter = Path::new("/sys/module/barlease_vfio_pci/parameters/enable_sriov");
    pci::write(parameter, "1").unwrap();
    let owner = Command::start(&[
        "lease",
        "grant",
        "--json",
        &physical.bdf,
        "--bar=0",
        "--vf-token",
        TOKEN,
        "--socket=/tmp/physical",
    ]);
    drop(take("/tmp/physical"));
    let number = sysfs(&physical, "sriov_numvfs");
    pci::write(&number, "1").unwrap();
    let link = fs::read_link(sysfs(&physical, "virtfn0")).unwrap();
    let bdf = link.file_name().unwrap().to_str().unwrap();
    let function = Function {
        bdf: bdf.to_owned(),
    };
    assert_ne!(function.group(), physical.group());
    function.bind(barlease_abi::DRIVER_NAME);
    let said = failure(&["device", "show", "--json", "--features", bdf]);
    assert!(said.contains("token"), "{said}");
    let show = [
        "device",
        "show",
        "--json",
        "--features",
        "--vf-token",
        TOKEN,
        bdf,
    ];
    let shown = Command::json(&Command::ends_with(0, None, &show));
    assert_eq!(shown[0][0]["features"]["revoke"], true, "{shown:?}");
    let lease = format!("--lease=vf-token={TOKEN},socket=/tmp/virtual");
    let holder = Command::start(&["lease", "grant", "--json", bdf, "--bar=0", &lease]);
    let map = How::shared()
        .map(take("/tmp/virtual"), 0, page_size())
        .unwrap();
    map.read(0).unwrap();
    // The writer waits for the owner, which answers.
    pci::write(&number, "0").unwrap();
    assert_eq!(map.read(0), Err(Sigbus));
    let events = Command::json(&holder.end());
    assert_eq!(events.last().unwrap()["event"], "closed", "{events:?}");
    owner.child.link.send_line("revoke");
    owner.end();
    pci::write(parameter, "0").unwrap();
}
