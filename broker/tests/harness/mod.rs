//! The daemon as a process of its own, on a device of the library's feature `fake`.
//!
//! The program of a test is the daemon, too: it has an ignored test `daemon`, which calls
//! [`serve`].

#![allow(dead_code, reason = "each program of tests needs a part of it")]

use std::fs;
use std::io::Read;
use std::ops::Deref;
use std::ops::DerefMut;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use barlease::fake::FakeDevice;
use barlease_proto::Access;
use barlease_proto::Acquire;
use barlease_proto::Client;
use barlease_proto::Error;
use barlease_proto::Refusal;
use rustix::process::Pid;
use rustix::process::Signal;

pub(crate) const PAGE: u64 = 4096;

/// A card with a pool, all of its BAR 2.
pub(crate) const CARD: &str = r#"
[device.card]
match = "0000:00:01.0"

[pool.rows]
device = "card"
bar = 2
unit = "4K"
contents = "memory"
"#;

/// A policy that lets everybody have rows of the card, with more keys of that rule.
pub(crate) fn policy(rule: &str) -> String {
    let allow = "[[allow]]\npools = [\"rows\"]\nwho = { user = \"*\" }\naccess = \"read-write\"";
    format!("{CARD}\n{allow}\n{rule}\n")
}

/// A process that ends with this. Its standard error is shown if the test fails.
pub(crate) struct Running(pub(crate) Child);

impl Deref for Running {
    type Target = Child;

    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Running {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.kill();
        let _ = self.wait();
        if let (true, Some(mut stderr)) = (thread::panicking(), self.stderr.take()) {
            let mut said = String::new();
            let _ = stderr.read_to_string(&mut said);
            println!("the daemon said: {said}");
        }
    }
}

/// Long enough for anything on a loaded machine: whoever waits for it has failed.
pub(crate) const A_WHILE: Duration = Duration::from_secs(60);
pub(crate) const DIRECTORY: &str = "BARLEASED_TEST_DIRECTORY";
const PAGES: &str = "BARLEASED_TEST_PAGES";

/// Where the daemon of this process, or that of which it is a client, is.
pub(crate) fn directory() -> Option<PathBuf> {
    std::env::var_os(DIRECTORY).map(PathBuf::from)
}

/// Is the daemon, in the process that a test has started as such.
pub(crate) fn serve() {
    let Some(directory) = directory() else {
        return;
    };
    let pages = std::env::var(PAGES).unwrap().parse::<u64>().unwrap();
    let card = FakeDevice::builder().bar(2, pages * PAGE).build().unwrap();
    // Its chain of capabilities does not end.
    let broken = FakeDevice::builder().config(0x34, &[0xf0]);
    let broken = broken.config(0xf0, &[0x09, 0xf0]).build().unwrap();
    let [policy, socket] = ["policy", "socket"].map(|name| directory.join(name));
    let args = [
        "barleased".as_ref(),
        "--policy".as_ref(),
        policy.as_os_str(),
        "--socket".as_ref(),
        socket.as_os_str(),
    ];
    let code = barleased::run(args, &|wanted| {
        assert_eq!(&*wanted.name, "card");
        let card = match directory.join("broken").exists() {
            true => &broken,
            false => &card,
        };
        card.device().map_err(|error| error.to_string())
    });
    std::process::exit(i32::from(code != std::process::ExitCode::SUCCESS));
}

/// A process that runs an ignored test of this program.
pub(crate) fn command(name: &str, directory: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", name, "--ignored", "--nocapture"])
        .env(DIRECTORY, directory)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

pub(crate) fn start(name: &str, directory: &Path) -> Child {
    command(name, directory).spawn().unwrap()
}

pub(crate) struct Daemon {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) child: Running,
    pages: u64,
}

impl Daemon {
    /// With a policy, for a card with a BAR 2 of so many pages.
    pub(crate) fn with(policy: &str, pages: u64) -> Self {
        Self::limited(policy, pages, None)
    }

    /// The same, with so many descriptors at most.
    pub(crate) fn limited(policy: &str, pages: u64, descriptors: Option<u64>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("policy")).unwrap();
        fs::write(directory.path().join("policy/a.toml"), policy).unwrap();
        let mut command = daemon_in(directory.path(), pages);
        if let Some(descriptors) = descriptors {
            let mut limited = Command::new("prlimit");
            limited.arg(format!("--nofile={descriptors}"));
            if rustix::process::geteuid().is_root() {
                // Without capabilities, which lift limits.
                limited.args(["setpriv", "--bounding-set=-all", "--inh-caps=-all"]);
            }
            limited.arg(command.get_program()).args(command.get_args());
            let envs = command.get_envs();
            limited.envs(envs.filter_map(|(name, value)| Some((name, value?))));
            limited.stdout(Stdio::piped()).stderr(Stdio::piped());
            command = limited;
        }
        let child = Running(command.spawn().unwrap());
        let daemon = Self {
            directory,
            child,
            pages,
        };
        daemon.wait_for();
        daemon
    }

    fn wait_for(&self) {
        until("it serves", || UnixStream::connect(self.socket()).is_ok());
    }

    /// Another one in the same place.
    pub(crate) fn second(&self) -> Child {
        daemon_in(self.directory.path(), self.pages)
            .spawn()
            .unwrap()
    }

    /// Starts it again after its end.
    pub(crate) fn again(&mut self) {
        self.child = Running(self.second());
        self.wait_for();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join("socket").join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("leases.sock")
    }

    pub(crate) fn client(&self) -> Client {
        client_at(&self.socket())
    }

    pub(crate) fn raw(&self) -> UnixStream {
        let socket = UnixStream::connect(self.socket()).unwrap();
        socket.set_read_timeout(Some(A_WHILE)).unwrap();
        socket
    }

    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(pid(&self.child.0), signal).unwrap();
    }

    pub(crate) fn end(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    pub(crate) fn leases(&self) -> Vec<u64> {
        let leases = self.client().list(None).unwrap();
        leases.iter().map(|lease| lease.lease).collect()
    }
}

fn daemon_in(directory: &Path, pages: u64) -> Command {
    let mut command = command("daemon", directory);
    command.env(PAGES, pages.to_string());
    command
}

pub(crate) fn client_at(socket: &Path) -> Client {
    let client = Client::connect(socket).unwrap();
    client.set_timeout(Some(A_WHILE)).unwrap();
    client
}

pub(crate) fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

pub(crate) fn until(what: &str, mut so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !so() {
        assert!(began.elapsed() < A_WHILE, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn rows(size: u64) -> Acquire {
    Acquire::of_pool("rows", size, Access::ReadWrite)
}

pub(crate) fn refusal<T: std::fmt::Debug>(result: Result<T, Error>) -> Refusal {
    match result {
        Err(Error::Refused(refusal)) => *refusal,
        other => panic!("not refused: {other:?}"),
    }
}
