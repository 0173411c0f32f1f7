//! The daemon, as a process of its own.

use std::fs;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::process::ChildStdin;
use std::process::Command;
use std::process::ExitCode;
use std::process::Stdio;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use barlease::LeaseId;
use barlease::fake::FakeDevice;
use barlease_proto::Access;
use barlease_proto::Acquire;
use barlease_proto::Client;

const DIRECTORY: &str = "BARLEASE_BENCH_DIRECTORY";
/// Pages of the pool `rows`, and of `cleared` behind it.
pub(crate) const ROWS: u64 = 4096;
pub(crate) const CLEARED: u64 = 16_384;
pub(crate) const PAGE: u64 = 4096;

const POLICY: &str = r#"
[device.card]
match = "0000:00:01.0"

[pool.rows]
device = "card"
bar = 2
length = "16M"
unit = "4K"
contents = "memory"

[pool.cleared]
device = "card"
bar = 2
at = "16M"
length = "64M"
unit = "4K"
contents = "memory"
scrub = "zero"

[[allow]]
pools = ["*"]
who = { user = "*" }
access = "read-write"
lifetime = ["connection"]
"#;

/// How often the fake forgets what is dead, which the kernel does at once.
const FORGET: Duration = Duration::from_millis(5);

/// Is the daemon. A line `ID NUMBER` on its standard input has so many importers hold a lease.
pub(crate) fn run() -> ExitCode {
    let directory = PathBuf::from(std::env::var_os(DIRECTORY).expect("a directory"));
    let card = FakeDevice::builder()
        .bar(2, (ROWS + CLEARED) * PAGE)
        .build()
        .expect("a fake device");
    let card = Arc::new(card);
    let forgetful = card.clone();
    thread::spawn(move || {
        loop {
            thread::sleep(FORGET);
            forgetful.forget_dead();
        }
    });
    let held = card.clone();
    thread::spawn(move || {
        for line in BufReader::new(std::io::stdin())
            .lines()
            .map_while(Result::ok)
        {
            let (id, importers) = line.split_once(' ').expect("two numbers");
            let id = LeaseId::new(id.parse().expect("a number"));
            held.set_importers(id, importers.parse().expect("a number"));
            println!();
        }
    });
    let [policy, socket] = ["policy", "socket"].map(|name| directory.join(name));
    let args = [
        "barleased".as_ref(),
        "--policy".as_ref(),
        policy.as_os_str(),
        "--socket".as_ref(),
        socket.as_os_str(),
    ];
    barleased::run(args, &|_| card.device().map_err(|error| error.to_string()))
}

/// A daemon that ends with this.
pub(crate) struct Daemon {
    directory: tempfile::TempDir,
    child: Child,
    orders: Option<ChildStdin>,
}

impl Daemon {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        fs::create_dir(directory.path().join("policy")).expect("a directory");
        fs::write(directory.path().join("policy/a.toml"), POLICY).expect("a policy");
        let mut child = Command::new(std::env::current_exe().expect("a program"))
            .arg("daemon")
            .env(DIRECTORY, directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let orders = child.stdin.take();
        let daemon = Self {
            directory,
            child,
            orders,
        };
        while UnixStream::connect(daemon.socket()).is_err() {
            thread::sleep(Duration::from_millis(2));
        }
        daemon
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("socket/leases.sock")
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(self.socket()).expect("a connection")
    }

    pub(crate) fn idle(&self) -> UnixStream {
        UnixStream::connect(self.socket()).expect("a connection")
    }

    /// Nanoseconds that its threads have run.
    pub(crate) fn busy(&self) -> f64 {
        let threads = fs::read_dir(format!("/proc/{}/task", self.child.id()));
        let of = |thread: fs::DirEntry| {
            let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
            text.split_whitespace().next()?.parse::<f64>().ok()
        };
        let threads = threads.expect("its threads").filter_map(Result::ok);
        threads.filter_map(of).sum()
    }

    /// Leases that it has granted so far: each has the next number.
    pub(crate) fn granted(&self) -> f64 {
        let rows = Acquire::of_pool("rows", PAGE, Access::ReadWrite);
        let (acquired, _fd) = self.client().acquire(&rows).expect("a lease");
        acquired.lease as f64
    }

    /// Has so many importers hold a lease.
    pub(crate) fn hold(&mut self, id: u64, importers: u32) {
        let orders = self.orders.as_mut().expect("its standard input");
        writeln!(orders, "{id} {importers}").expect("a reader");
        let said = self.child.stdout.as_mut().expect("its standard output");
        let mut line = String::new();
        BufReader::new(said)
            .read_line(&mut line)
            .expect("an answer");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
