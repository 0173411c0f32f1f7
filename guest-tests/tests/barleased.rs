//! The daemon on the real kernel: a lease that goes to another process is mapped there, and lost
//! with its connection; an importer that does not let go keeps the range, and nobody else waiting.
#![cfg(barlease_guest)]

use std::{
    fs::{self, File},
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use barlease::pci::Pci;
use barlease_guest_tests::{
    importer::Importer,
    map::{How, Sigbus},
    page_size,
    pci::{BARLEASE, Function},
    process::{self, Child, End, become_user},
    wait::{at_once, until},
};
use barlease_proto::{
    Access, Acquire, Client, Devices, Error, Event, LeaseInfo, Range, Reason, Refusal, Reload,
    State,
};
use serde_json::Value;

const DIRECTORY: &str = "/tmp/barleased";
const SIGTERM: i32 = 15;

/// A daemon that has BAR2 of the memory device.
fn daemon() -> Child {
    let bdf = Function::named("memory").bdf;
    daemon_of(&bdf)
}

/// The same, with another way to find the device.
fn daemon_of(matches: &str) -> Child {
    let bdf = Function::named("memory").bdf;
    Pci::system().bind(bdf.parse().unwrap(), BARLEASE).unwrap();
    let policy = Path::new(DIRECTORY).join("policy");
    fs::create_dir_all(&policy).unwrap();
    let text = format!(
        "[device.card]\nmatch = \"{matches}\"\n\
         [pool.rows]\ndevice = \"card\"\nbar = 2\nunit = \"4K\"\ncontents = \"memory\"\n\
         [[allow]]\npools = [\"rows\"]\nwho = {{ user = \"root\" }}\naccess = \"read-write\"\n\
         lifetime = [\"connection\"]\ngrace = \"1s\"\n"
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
        length: 2 * page_size(),
    };
    Acquire::of_ranges("card", 2, vec![range], Access::ReadWrite)
}

#[test]
fn a_lease_goes_to_a_client_and_ends_with_it() {
    let mut daemon = daemon();
    let mut one = client().unwrap();
    let (lease, fd) = one.acquire(&rows()).unwrap();
    let map = How::shared().map(&fd, 0, 2 * page_size()).unwrap();
    map.write(page_size(), 0x1234).unwrap();
    assert_eq!(map.read(page_size()), Ok(0x1234));
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
    assert_eq!(map.read(page_size()), Err(Sigbus));
    let mut other = client().unwrap();
    let (_, other) = other.acquire(&rows()).unwrap();
    let again = How::shared().map(&other, 0, 2 * page_size()).unwrap();
    assert_eq!(again.read(page_size()), Ok(0x1234));
    daemon.signal(SIGTERM);
    assert_eq!(daemon.wait(), End::Code(0));
    assert_eq!(again.read(page_size()), Err(Sigbus));
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
        offset: 4 * page_size(),
        length: page_size(),
    };
    let elsewhere = Acquire::of_ranges("card", 2, vec![elsewhere], Access::Read);
    let (_, _fd) = other.acquire(&elsewhere).unwrap();
    attachment.hold(false);
    attachment.unmap().unwrap();
    until("its range is free", || leases().len() == 1);
    let (_, _fd) = other.acquire(&rows()).unwrap();
    drop(daemon);
}

#[test]
fn an_unbind_is_over_when_the_leases_are() {
    let _daemon = daemon();
    let mut one = client().unwrap();
    let (lease, fd) = one.acquire(&rows()).unwrap();
    let map = How::shared().map(&fd, 0, 2 * page_size()).unwrap();
    let mut watch = client().unwrap().watch(true).unwrap();
    // The watch has begun when the next call is answered.
    assert_eq!(leases().len(), 1);
    at_once("the unbind", || Function::named("memory").unbind());
    let told: Vec<_> = watch.by_ref().take(3).map(Result::unwrap).collect();
    assert!(
        told.iter().all(|notice| notice.lease == lease.lease),
        "{told:?}"
    );
    let kinds: Vec<_> = told
        .iter()
        .map(|notice| (notice.event, notice.reason))
        .collect();
    let why = Some(Reason::DeviceGoing);
    // The holder had its time first.
    assert_eq!(
        kinds,
        [Event::Reclaim, Event::Revoked, Event::Ended].map(|kind| (kind, why))
    );
    assert_eq!(map.read(0), Err(Sigbus));
    let state = || {
        client().unwrap().call(&Devices {}).unwrap().devices[0]
            .state
            .clone()
    };
    assert_eq!(state(), "absent");
    // It is bound again, and the daemon told.
    let bdf = Function::named("memory").bdf;
    Pci::system().bind(bdf.parse().unwrap(), BARLEASE).unwrap();
    client().unwrap().call(&Reload {}).unwrap();
    assert_eq!(state(), "open");
    let (_, _fd) = one.acquire(&rows()).unwrap();
}

#[test]
fn a_device_is_found_by_its_slot() {
    let bdf = Function::named("memory").bdf;
    let slots = fs::read_dir("/sys/bus/pci/slots").unwrap();
    let slots: Vec<_> = slots.map(|slot| slot.unwrap().path()).collect();
    if slots.is_empty() {
        // Without ACPI's slots: the debug kernel.
        eprintln!("this kernel names no slots");
        return;
    }
    let is_its = |slot: &&std::path::PathBuf| {
        let address = fs::read_to_string(slot.join("address")).unwrap();
        bdf.starts_with(address.trim())
    };
    let slot = slots.iter().find(is_its).expect("it is in a slot");
    let name = slot.file_name().unwrap().to_str().unwrap();
    let _daemon = daemon_of(&format!("slot:{name}"));
    let (_, _fd) = client().unwrap().acquire(&rows()).unwrap();
}

#[test]
fn a_user_has_256_connections() {
    let _daemon = daemon();
    let child = Child::start(&[], |_link| {
        become_user(1001);
        let mut all: Vec<_> = (0..256).map(|_| client().unwrap()).collect();
        for one in &mut all {
            one.list(None).unwrap();
        }
        assert!(client().unwrap().list(None).is_err());
        all.pop();
        until("there is room for one", || {
            client().unwrap().list(None).is_ok()
        });
    });
    child.join();
    // Everybody else has theirs.
    assert_eq!(leases().len(), 0);
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
        .acquire(&Acquire::of_pool(
            "rows",
            2 * page_size(),
            Access::ReadWrite,
        ))
        .unwrap();
    let _map = How::shared().map(&fd, 0, 2 * page_size()).unwrap();
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
