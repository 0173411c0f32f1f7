//! The daemon on the real kernel: a lease that goes to another process is mapped there, and lost with its connection; an importer
//! that does not let go keeps the range, and nobody else waiting.
#![cfg(barlease_guest)]

use std::{
    fs::{self, File},
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use barlease::pci::Pci;
use barlease_guest_tests::{
    PAGE,
    importer::Importer,
    map::{How, Sigbus},
    pci::{BARLEASE, Function},
    process::{self, Child, End},
    wait::until,
};
use barlease_proto::{Access, Acquire, Client, Error, LeaseInfo, Range, Refusal, State};
use serde_json::Value;

const DIRECTORY: &str = "/tmp/barleased";
const SIGTERM: i32 = 15;

/// A daemon that has BAR2 of the memory device.
fn daemon() -> Child {
    let bdf = Function::named("memory").bdf;
    Pci::system().bind(bdf.parse().unwrap(), BARLEASE).unwrap();
    let policy = Path::new(DIRECTORY).join("policy");
    fs::create_dir_all(&policy).unwrap();
    let text = format!(
        "[device.card]\nmatch = \"{bdf}\"\n\
         [pool.rows]\ndevice = \"card\"\nbar = 2\nunit = \"4K\"\ncontents = \"memory\"\n\
         [[allow]]\npools = [\"rows\"]\nwho = {{ user = \"root\" }}\naccess = \"read-write\"\n\
         lifetime = [\"connection\"]\n"
    );
    fs::write(policy.join("a.toml"), text).unwrap();
    let child = Child::start(&[], |_link| {
        let policy = format!("{DIRECTORY}/policy");
        let args = ["barleased", "--policy", &policy, "--socket", DIRECTORY];
        let code = barleased::run(args, &barleased::device::open);
        assert_eq!(code, std::process::ExitCode::SUCCESS);
    });
    until("the daemon serves", || client().is_ok());
    child
}

fn client() -> Result<Client, Error> {
    Client::connect(format!("{DIRECTORY}/leases.sock"))
}

fn leases() -> Vec<LeaseInfo> {
    client().unwrap().list(None).unwrap()
}

fn rows() -> Acquire {
    let range = Range {
        offset: 0,
        length: 2 * PAGE,
    };
    Acquire::of_ranges("card", 2, vec![range], Access::ReadWrite)
}

#[test]
fn a_lease_goes_to_a_client_and_ends_with_it() {
    let mut daemon = daemon();
    let mut one = client().unwrap();
    let (lease, fd) = one.acquire(&rows()).unwrap();
    let map = How::shared().map(&fd, 0, 2 * PAGE).unwrap();
    map.write(PAGE, 0x1234).unwrap();
    assert_eq!(map.read(PAGE), Ok(0x1234));
    match client().unwrap().acquire(&rows()) {
        Err(Error::Refused(refusal)) => match *refusal {
            Refusal::Busy { held_by, .. } => {
                assert_eq!(held_by[0].lease, lease.lease);
                assert_eq!(held_by[0].holder.pid, std::process::id());
            }
            other => panic!("{other}"),
        },
        other => panic!("{other:?}"),
    }
    drop(one);
    until("it is taken back", || leases().is_empty());
    assert_eq!(map.read(PAGE), Err(Sigbus));
    let mut other = client().unwrap();
    let (_, other) = other.acquire(&rows()).unwrap();
    let again = How::shared().map(&other, 0, 2 * PAGE).unwrap();
    assert_eq!(again.read(PAGE), Ok(0x1234));
    daemon.signal(SIGTERM);
    assert_eq!(daemon.wait(), End::Code(0));
    assert_eq!(again.read(PAGE), Err(Sigbus));
}

#[test]
fn an_importer_that_does_not_let_go_keeps_the_range_only() {
    let daemon = daemon();
    let mut one = client().unwrap();
    let (_, fd) = one.acquire(&rows()).unwrap();
    let importer = Importer::open();
    let attachment = importer.attach(fd.as_fd()).unwrap();
    attachment.map().unwrap();
    attachment.hold(true);
    drop(one);
    until("it is revoked", || leases()[0].state == State::Revoking);
    let mut other = client().unwrap();
    match other.acquire(&rows()) {
        Err(Error::Refused(refusal)) => assert!(
            matches!(&*refusal, Refusal::Busy { held_by, .. } if held_by[0].revoked),
            "{refusal}"
        ),
        other => panic!("{other:?}"),
    }
    let elsewhere = Range {
        offset: 4 * PAGE,
        length: PAGE,
    };
    let elsewhere = Acquire::of_ranges("card", 2, vec![elsewhere], Access::Read);
    let (_, _fd) = other.acquire(&elsewhere).unwrap();
    attachment.hold(false);
    attachment.unmap().unwrap();
    until("its range is free", || leases().len() == 1);
    let (_, _fd) = other.acquire(&rows()).unwrap();
    drop(daemon);
}

/// The command, with its output in a file.
struct Command {
    child: Child,
    output: PathBuf,
}

impl Command {
    fn start(args: &[&str]) -> Self {
        let output = Path::new(DIRECTORY).join(format!("output-{}", args.len()));
        let file = File::create(&output).unwrap();
        let socket = format!("--service={DIRECTORY}/leases.sock");
        let child = Child::start(&[file.as_fd()], |link| {
            process::become_command(link, &file);
            let args = ["barlease"].iter().chain(args).copied();
            let _code = barlease_cli::run(args.chain([socket.as_str()]));
        });
        Self { child, output }
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.output).unwrap()
    }

    /// Its output, when it has come to its end.
    fn end(mut self) -> String {
        assert_eq!(self.child.wait(), End::Code(0));
        self.said()
    }
}

fn listed() -> Vec<Value> {
    let text = Command::start(&["lease", "list", "--json"]).end();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn the_command_acquires_lists_and_draws() {
    let daemon = daemon();
    let holder = Command::start(&["lease", "acquire", "rows", "2M", "--json"]);
    until("it has a lease", || holder.said().ends_with("}\n"));
    let granted: Value = serde_json::from_str(&holder.said()).unwrap();
    assert_eq!(granted["size"], 2 << 20);
    // One of this process, mapped and attached, for which the kernel is asked.
    let mut one = client().unwrap();
    let (_, fd) = one
        .acquire(&Acquire::of_pool("rows", 2 * PAGE, Access::ReadWrite))
        .unwrap();
    let _map = How::shared().map(&fd, 0, 2 * PAGE).unwrap();
    let importer = Importer::open();
    let attachment = importer.attach(fd.as_fd()).unwrap();
    let leases = listed();
    let usage = |lease: &Value| [lease["mappings"].clone(), lease["attachments"].clone()];
    assert_eq!(leases.len(), 2);
    assert_eq!(usage(&leases[0]), [0, 0].map(Value::from));
    // The command is a fork of this process, so it has a copy of the mapping.
    assert_eq!(usage(&leases[1]), [2, 1].map(Value::from));
    assert_eq!(leases[0]["pid"], holder.child.id());
    let picture = Command::start(&["top", "--once"]).end();
    let strip = picture.lines().nth(2).unwrap();
    assert!(strip.starts_with('A') && strip.contains('.'), "{picture}");
    assert!(
        picture.lines().any(|line| line.starts_with('B')),
        "{picture}"
    );
    drop((attachment, importer));
    holder.child.signal(SIGTERM);
    holder.end();
    assert_eq!(listed().len(), 1);
    drop(daemon);
}
