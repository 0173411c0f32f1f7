//! The lab runs this in a guest with systemd as process 1: `barleased` from its units, on the real
//! kernel and device, and what happens to it. The rows are those of docs/service.md.
//!
//! `lab_service BDF FILES [containers|run WORD...]`: the device, which our module is loaded for,
//! and the folder of `dist/systemd` with the program. It changes the system that it runs on. What
//! happens to a service; or containers; or it is there, and a command is run.

mod containers;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::thread;
use std::thread::JoinHandle;
use std::time::Duration;
use std::time::Instant;

use barlease::GuardedMapping;
use barlease::Lease;
use barlease_proto::Access;
use barlease_proto::Acquire;
use barlease_proto::Acquired;
use barlease_proto::Client;
use barlease_proto::Devices;
use barlease_proto::Error;
use barlease_proto::Lifetime;
use barlease_proto::Refusal;

const SOCKET: &str = "/run/barleased/leases.sock";
const POLICY: &str = "/etc/barlease/policy.d/a.toml";
const DROP_IN: &str = "/etc/systemd/system/barleased.service.d/lab.conf";
const UNIT: &str = "barleased.service";
const PAGE: u64 = 4096;
/// Not for ever, and long enough for an emulated machine.
const WATCHDOG: &str = "[Service]\nWatchdogSec=10s\n";
/// Under emulation everything takes its time.
const A_WHILE: Duration = Duration::from_secs(120);
/// The most that `systemd-analyze security` may say.
const EXPOSURE: f64 = 2.5;

fn main() {
    let mut args = std::env::args().skip(1);
    let bdf = args.next().expect("the address of a device");
    let files = args.next().expect("the folder of units");
    let lab = Lab { bdf };
    lab.install(Path::new(&files));
    lab.starts_and_is_hardened();
    match args.next().as_deref() {
        None => lab.happens(),
        Some("containers") => lab.containers(),
        Some("run") => {
            let words: Vec<String> = args.collect();
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            println!("{}", run(&words));
            return;
        }
        Some(other) => panic!("{other}?"),
    }
    println!("all of it works");
}

/// Runs a command, which must succeed, and gives back what it says.
fn run(words: &[&str]) -> String {
    let (success, said) = attempt(words);
    assert!(success, "{words:?}: {said}");
    said
}

fn attempt(words: &[&str]) -> (bool, String) {
    let output = Command::new(words[0]).args(&words[1..]).output();
    let output = output.unwrap_or_else(|error| panic!("{words:?}: {error}"));
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    (output.status.success(), said)
}

fn until(what: &str, mut so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !so() {
        if began.elapsed() > A_WHILE {
            println!("{}", attempt(&["systemctl", "status", UNIT]).1);
            println!("{}", journal());
            panic!("never: {what}");
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn property(name: &str) -> String {
    run(&["systemctl", "show", "--value", "--property", name, UNIT])
}

fn pid() -> u32 {
    property("MainPID").parse().unwrap()
}

fn is(state: &str) -> bool {
    property("ActiveState") == state
}

fn journal() -> String {
    run(&["journalctl", "--boot", "--output=cat", "--unit", UNIT])
}

/// The journal has it soon: a thread of the daemon's writes there, and nobody waits for that.
fn logged(text: &str) {
    until(text, || journal().contains(text));
}

/// A client, as soon as the daemon answers.
fn client() -> Client {
    let mut found = None;
    until("it serves", || {
        found = try_client().ok();
        found.is_some()
    });
    found.unwrap()
}

fn try_client() -> Result<Client, Error> {
    let mut client = Client::connect(SOCKET)?;
    client.set_timeout(Some(Duration::from_secs(5)))?;
    client.call(&Devices {})?;
    Ok(client)
}

fn state() -> String {
    client().call(&Devices {}).unwrap().devices[0].state.clone()
}

fn ids() -> Vec<u64> {
    let leases = client().list(None).unwrap();
    leases.iter().map(|lease| lease.lease).collect()
}

fn rows() -> Acquire {
    Acquire {
        lifetime: Some(Lifetime::Process),
        ..Acquire::of_pool("rows", 2 * PAGE, Access::ReadWrite)
    }
}

/// Somebody who writes to a lease all the time.
struct Tenant {
    acquired: Acquired,
    mapping: Arc<GuardedMapping>,
    ends: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    writer: Option<JoinHandle<()>>,
}

impl Tenant {
    fn new() -> Self {
        let (acquired, fd) = client().acquire(&rows()).unwrap();
        let mapping = Arc::new(Lease::from_fd(fd).unwrap().map_guarded().unwrap());
        let ends = Arc::new(AtomicBool::new(false));
        let writes = Arc::new(AtomicU64::new(0));
        let (map, end, count) = (mapping.clone(), ends.clone(), writes.clone());
        let writer = thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                let value = count.load(Ordering::Relaxed) + 1;
                if map.write(PAGE as usize, value).is_err() {
                    break;
                }
                count.store(value, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(1));
            }
        });
        Self {
            acquired,
            mapping,
            ends,
            writes,
            writer: Some(writer),
        }
    }

    /// Its writes go on, and arrive.
    fn goes_on(&self) {
        let before = self.writes.load(Ordering::Relaxed);
        until("its writes go on", || {
            self.writes.load(Ordering::Relaxed) > before + 2
        });
        assert!(self.mapping.read::<u64>(PAGE as usize).unwrap() > before);
    }

    fn is_lost(&self) -> bool {
        self.mapping.read::<u64>(PAGE as usize).is_err()
    }

    /// It is known to the daemon, and given back.
    fn gives_back(self) {
        self.goes_on();
        assert_eq!(ids(), [self.acquired.lease]);
        client().release(self.acquired.lease).unwrap();
        assert!(self.is_lost());
        assert!(ids().is_empty());
    }
}

impl Drop for Tenant {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

fn signal(pid: u32, signal: &str) {
    run(&["kill", &format!("-{signal}"), &pid.to_string()]);
}

/// Another daemon than that one.
fn another(before: u32) {
    until("another daemon", || {
        is("active") && ![0, before].contains(&pid())
    });
}

struct Lab {
    bdf: String,
}

impl Lab {
    fn policy(&self) {
        let text = format!(
            "[device.card]\nmatch = \"{}\"\n\
             [pool.rows]\ndevice = \"card\"\nbar = 2\nunit = \"4K\"\ncontents = \"memory\"\n\
             [[allow]]\npools = [\"rows\"]\nwho = {{ user = \"root\" }}\naccess = \"read-write\"\n\
             lifetime = [\"connection\", \"process\", \"holders\"]\nmax-bytes = \"64K\"\n",
            self.bdf
        );
        fs::write(POLICY, text).unwrap();
    }

    fn drop_in(&self, text: &str) {
        fs::write(DROP_IN, text).unwrap();
        run(&["systemctl", "daemon-reload"]);
    }

    /// The rows of docs/service.md.
    fn happens(&self) {
        self.any_language();
        self.metrics();
        self.killed();
        self.stopped_and_started();
        self.killed_at_random();
        self.hangs();
        self.crashes_and_crashes();
        self.broken_policy_at_reload();
        self.broken_policy_at_restart();
        self.started_twice();
        self.manager_executes_itself();
        self.drained();
        self.unbound();
        self.store_full_or_none();
        self.stock_driver();
        self.without_module();
    }

    fn install(&self, files: &Path) {
        let units = "/usr/lib/systemd/system";
        for (file, folder, name) in [
            ("barleased", "/usr/sbin", "barleased"),
            ("barleased.service", units, "barleased.service"),
            ("barleased.socket", units, "barleased.socket"),
            (
                "barleased-metrics.socket",
                units,
                "barleased-metrics.socket",
            ),
            ("barleased-report.socket", units, "barleased-report.socket"),
            (
                "barleased.sysusers",
                "/usr/lib/sysusers.d",
                "barleased.conf",
            ),
            (
                "barleased.tmpfiles",
                "/usr/lib/tmpfiles.d",
                "barleased.conf",
            ),
            (
                "72-barleased.rules",
                "/usr/lib/udev/rules.d",
                "72-barleased.rules",
            ),
        ] {
            let place = Path::new(folder).join(name);
            fs::copy(files.join(file), place).unwrap_or_else(|error| panic!("{file}: {error}"));
        }
        fs::create_dir_all("/etc/barlease/policy.d").unwrap();
        fs::create_dir_all(Path::new(DROP_IN).parent().unwrap()).unwrap();
        let example = fs::read_to_string(files.join("policy-example.toml")).unwrap();
        fs::write(POLICY, example).unwrap();
        run(&["systemd-sysusers"]);
        run(&[
            "systemd-tmpfiles",
            "--create",
            "/usr/lib/tmpfiles.d/barleased.conf",
        ]);
        run(&["udevadm", "control", "--reload"]);
        self.drop_in(WATCHDOG);
        run(&["barlease", "device", "bind", &self.bdf]);
        run(&["udevadm", "settle"]);
        run(&["systemctl", "enable", "--now", "barleased.socket"]);
    }

    fn starts_and_is_hardened(&self) {
        println!("the socket starts it, with the example's policy");
        client();
        self.policy();
        run(&["systemctl", "reload", UNIT]);
        let status = property("StatusText");
        assert_eq!(status, "1 device, leases outlive a restart");
        until("the store has ledger, policy and device", || {
            property("NFileDescriptorStore") == "3"
        });
        let said = run(&["systemd-analyze", "security", "--no-pager", UNIT]);
        let line = said.lines().last().unwrap();
        println!("{line}");
        let exposure = line.split_whitespace().find_map(|word| word.parse().ok());
        assert!(
            exposure.is_some_and(|exposure: f64| exposure <= EXPOSURE),
            "{said}"
        );
        let owner = run(&["stat", "--format=%U %a", "/run/barleased"]);
        assert_eq!(owner, "barlease 755");
    }

    fn killed(&self) {
        println!("killed while a tenant writes");
        let tenant = Tenant::new();
        let before = pid();
        signal(before, "KILL");
        tenant.goes_on();
        another(before);
        let leases = client().list(None).unwrap();
        assert_eq!(leases[0].state, barlease_proto::State::Granted);
        tenant.gives_back();
    }

    fn stopped_and_started(&self) {
        println!("stopped and started, as by an update of the package");
        let tenant = Tenant::new();
        run(&["systemctl", "stop", UNIT, "barleased.socket"]);
        assert!(is("inactive"));
        tenant.goes_on();
        // The first client starts it.
        run(&["systemctl", "start", "barleased.socket"]);
        tenant.gives_back();
    }

    fn killed_at_random(&self) {
        println!("killed at random");
        let tenant = Tenant::new();
        self.drop_in(&format!("{WATCHDOG}[Unit]\nStartLimitBurst=1000\n"));
        for kill in 0_u64..10 {
            let before = pid();
            let busy = thread::spawn(|| {
                // They may fail: the daemon is killed under them.
                for _ in 0..20 {
                    if let Ok(mut client) = Client::connect(SOCKET) {
                        let _ = client.set_timeout(Some(Duration::from_secs(1)));
                        let _ = client.acquire(&Acquire {
                            lifetime: Some(Lifetime::Connection),
                            ..rows()
                        });
                    }
                }
            });
            thread::sleep(Duration::from_millis(kill * 37 % 150));
            signal(before, "KILL");
            another(before);
            busy.join().unwrap();
        }
        // Those of the connections that nobody comes back for.
        until("the others end", || ids() == [tenant.acquired.lease]);
        let pool = &client().call(&Devices {}).unwrap().devices[0].pools[0];
        assert_eq!(pool.free, pool.size - 2 * PAGE);
        tenant.gives_back();
    }

    fn hangs(&self) {
        println!("a daemon that hangs");
        let tenant = Tenant::new();
        let before = pid();
        signal(before, "STOP");
        another(before);
        assert!(property("NRestarts") != "0");
        tenant.gives_back();
    }

    fn crashes_and_crashes(&self) {
        println!("one that cannot start again");
        let tenant = Tenant::new();
        self.drop_in(
            "[Unit]\nStartLimitBurst=3\n[Service]\nRestartSteps=0\nRestartMaxDelaySec=infinity\n\
             ExecStart=\nExecStart=/bin/false\n",
        );
        signal(pid(), "KILL");
        until("it is given up", || is("failed"));
        tenant.goes_on();
        self.drop_in("");
        run(&["systemctl", "reset-failed", UNIT, "barleased.socket"]);
        run(&["systemctl", "start", "barleased.socket", UNIT]);
        tenant.gives_back();
    }

    fn broken_policy_at_reload(&self) {
        println!("a broken policy at a reload");
        fs::write(POLICY, "[pool.rows]\ndevice = 7\n").unwrap();
        let (reloaded, _) = attempt(&["systemctl", "reload", UNIT]);
        assert!(!reloaded && is("active"));
        assert!(property("StatusText").contains("an older one is in force"));
        logged("a.toml:2");
        Tenant::new().gives_back();
        self.policy();
        run(&["systemctl", "reload", UNIT]);
    }

    fn broken_policy_at_restart(&self) {
        println!("a broken policy at a restart");
        let tenant = Tenant::new();
        fs::write(POLICY, "[pool.rows]\ndevice = 7\n").unwrap();
        let before = pid();
        signal(before, "KILL");
        another(before);
        assert!(property("StatusText").contains("an older one is in force"));
        tenant.gives_back();
        Tenant::new().gives_back();
        self.policy();
        run(&["systemctl", "reload", UNIT]);
        assert!(!property("StatusText").contains("an older one"));
    }

    fn started_twice(&self) {
        println!("started twice");
        let tenant = Tenant::new();
        let (started, said) = attempt(&["/usr/sbin/barleased"]);
        assert!(
            !started && said.contains("another barleased serves there"),
            "{said}"
        );
        tenant.gives_back();
    }

    fn manager_executes_itself(&self) {
        println!("systemd executes itself anew");
        let tenant = Tenant::new();
        run(&["systemctl", "daemon-reexec"]);
        let before = pid();
        signal(before, "KILL");
        another(before);
        tenant.gives_back();
    }

    /// A program that knows nothing of us, which systemd's own client gives a lease to.
    fn any_language(&self) {
        println!("varlinkctl gives a lease to a program");
        fs::write("/tmp/holder.py", include_str!("../holder.py")).unwrap();
        let call = r#"{"pool":"rows","size":65536,"access":"read_write","lifetime":"process"}"#;
        let method = "io.barlease.Leases.Acquire";
        let said = run(&[
            "varlinkctl",
            "--exec",
            "call",
            SOCKET,
            method,
            call,
            "--",
            "python3",
            "/tmp/holder.py",
        ]);
        assert!(said.contains("of card: hello"), "{said}");
        until("the lease has ended with the program", || ids().is_empty());
    }

    /// A scrape over a port, and a report, while leases live on.
    fn metrics(&self) {
        println!("metrics, by a port and by systemd-report");
        let tenant = Tenant::new();
        let folder = "/etc/systemd/system/barleased-metrics.socket.d";
        fs::create_dir_all(folder).unwrap();
        let port = "[Socket]\nListenStream=\nListenStream=127.0.0.1:9464\n";
        fs::write(format!("{folder}/lab.conf"), port).unwrap();
        run(&["systemctl", "daemon-reload"]);
        let sockets = ["barleased-metrics.socket", "barleased-report.socket"];
        run(&[&["systemctl", "restart", UNIT], &sockets[..]].concat());
        let scrape = "import urllib.request as http\n\
                      print(http.urlopen('http://127.0.0.1:9464/metrics').read().decode())";
        let said = run(&["python3", "-c", scrape]);
        let one = "barlease_leases{pool=\"rows\",state=\"granted\"} 1";
        assert!(said.contains(one), "{said}");
        let report = "PATH=$PATH:/usr/lib/systemd exec systemd-report metrics io.barlease";
        let said = run(&["sh", "-c", report]);
        assert!(said.contains("io.barlease.Leases.leases"), "{said}");
        run(&[&["systemctl", "stop"], &sockets[..]].concat());
        tenant.gives_back();
    }

    fn drained(&self) {
        println!("drained");
        let tenant = Tenant::new();
        run(&["/usr/sbin/barleased", "drain"]);
        assert!(tenant.is_lost());
        assert_eq!(state(), "absent");
        until("the store has ledger and policy only", || {
            property("NFileDescriptorStore") == "2"
        });
        run(&["systemctl", "reload", UNIT]);
        assert_eq!(state(), "open");
    }

    fn unbound(&self) {
        println!("unbound while it is leased");
        let tenant = Tenant::new();
        let began = Instant::now();
        let driver = format!("/sys/bus/pci/devices/{}/driver", self.bdf);
        fs::write(format!("{driver}/unbind"), &self.bdf).unwrap();
        println!("unbound after {:?}", began.elapsed());
        assert!(tenant.is_lost());
        assert_eq!(state(), "absent");
        run(&["barlease", "device", "bind", &self.bdf]);
        until("udev has it opened again", || state() == "open");
        Tenant::new().gives_back();
    }

    fn refused(&self, why: &str) {
        run(&["systemctl", "reload", UNIT]);
        assert_eq!(state(), "absent");
        match client().acquire(&rows()) {
            Err(Error::Refused(refusal)) => {
                assert!(
                    matches!(*refusal, Refusal::NoSuchDevice { .. }),
                    "{refusal}"
                );
            }
            other => panic!("{other:?}"),
        }
        until("the journal says why", || {
            let said = journal();
            let mut lines = said.lines();
            let last = lines.rfind(|line| line.contains("is not leased from"));
            last.is_some_and(|line| line.contains(why))
        });
    }

    fn stock_driver(&self) {
        println!("on stock vfio-pci");
        let device = format!("/sys/bus/pci/devices/{}", self.bdf);
        fs::write(format!("{device}/driver/unbind"), &self.bdf).unwrap();
        fs::write(format!("{device}/driver_override"), "vfio-pci").unwrap();
        fs::write("/sys/bus/pci/drivers_probe", &self.bdf).unwrap();
        run(&["udevadm", "settle"]);
        self.refused("not supported");
        fs::write(format!("{device}/driver/unbind"), &self.bdf).unwrap();
    }

    fn without_module(&self) {
        println!("without the module");
        run(&["rmmod", "barlease_vfio_pci"]);
        self.refused("no driver");
    }

    fn store_full_or_none(&self) {
        println!("a store that is full, and none");
        let again = |max: u32| {
            run(&["systemctl", "stop", UNIT]);
            run(&["systemctl", "clean", "--what=fdstore", UNIT]);
            self.drop_in(&format!("[Service]\nFileDescriptorStoreMax={max}\n"));
            run(&["systemctl", "start", UNIT]);
        };
        again(1);
        assert_eq!(state(), "absent");
        logged("the store for descriptors is full with 1");
        again(0);
        assert_eq!(state(), "open");
        assert!(property("StatusText").contains("not restartable"));
        let tenant = Tenant::new();
        run(&["systemctl", "stop", UNIT]);
        assert!(tenant.is_lost());
        self.drop_in("");
        run(&["systemctl", "start", UNIT]);
        assert_eq!(state(), "open");
    }
}
