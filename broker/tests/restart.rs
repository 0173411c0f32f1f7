//! Restarts without loss: the daemon is the child of `--keep`'s parent, in processes of their own,
//! and its device is a fake that this process serves to them, as the kernel does.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::path::PathBuf;
use std::process::Command;
use std::process::ExitCode;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use barlease::Lease;
use barlease::State;
use barlease::fake;
use barlease::fake::FakeDevice;
use barlease_proto as proto;
use barlease_proto::Access;
use barlease_proto::Acquire;
use barlease_proto::Client;
use barlease_proto::Error;
use barlease_proto::Lifetime;
use barlease_proto::Reason;
use barlease_proto::Refusal;
use barleased::Surroundings;
use barleased::keep::Keeper;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::process::Pid;
use rustix::process::Signal;

use harness::A_WHILE;
use harness::CARD;
use harness::DIRECTORY;
use harness::PAGE;
use harness::Running;
use harness::directory;
use harness::policy;
use harness::refusal;
use harness::until;

mod harness;
mod kills;

/// Units of the pool.
const UNITS: u64 = 8;
const RULE: &str = r#"
max-bytes = "24K"
max-leases = 6
lifetime = ["connection", "process", "holders", "claim"]
queue = "30s"
"#;

/// In which clients come back.
const RESUME: Duration = Duration::from_millis(500);
/// Where the daemon is killed: before an action of that number, once; or at random.
const DIE: &str = "BARLEASED_TEST_DIE";
/// Milliseconds between a child and the next, and until one is taken for hung.
const PAUSE: &str = "BARLEASED_TEST_PAUSE";
const WATCHDOG: &str = "BARLEASED_TEST_WATCHDOG";
/// Milliseconds in which clients come back.
const COME_BACK: &str = "BARLEASED_TEST_RESUME";
/// Whether the keeper loses the policy that it is given.
const FORGET: &str = "BARLEASED_TEST_FORGET";

fn milliseconds(name: &str) -> Option<Duration> {
    let text = std::env::var(name).ok()?;
    Some(Duration::from_millis(text.parse().unwrap()))
}

/// Not a test: the parent that the tests start.
#[test]
#[ignore = "the keeper of the other tests"]
fn keeper() {
    let Some(directory) = directory() else {
        return;
    };
    let make = || Ok(this("daemon", &directory));
    let mut keeper = Keeper::new(&directory.join("socket"), Box::new(make)).unwrap();
    let pause = milliseconds(PAUSE).unwrap_or(keeper.pause.0);
    keeper.pause = (pause, pause);
    keeper.forgets = std::env::var_os(FORGET).map(|_| "policy-".to_owned());
    keeper.watchdog = milliseconds(WATCHDOG).unwrap_or(keeper.watchdog);
    let code = keeper.run().unwrap();
    std::process::exit(i32::from(code != ExitCode::SUCCESS));
}

/// Not a test: the daemon.
#[test]
#[ignore = "the daemon of the other tests"]
fn daemon() {
    let Some(directory) = directory() else {
        return;
    };
    fake::connect(directory.join("kernel")).unwrap();
    fs::write(directory.join("pid.new"), std::process::id().to_string()).unwrap();
    fs::rename(directory.join("pid.new"), directory.join("pid")).unwrap();
    let [policy, socket] = ["policy", "socket"].map(|name| directory.join(name));
    let resume = milliseconds(COME_BACK).unwrap_or(RESUME);
    let resume = resume.as_secs_f64().to_string();
    let args = [
        "barleased".as_ref(),
        "--kept".as_ref(),
        "--resume".as_ref(),
        resume.as_ref(),
        "--policy".as_ref(),
        policy.as_os_str(),
        "--socket".as_ref(),
        socket.as_os_str(),
    ];
    let open = |_: &barlease_ledger::policy::Device| {
        if directory.join("absent").exists() {
            return Err("there is none".to_owned());
        }
        let path = fs::read_link(directory.join("card")).unwrap();
        let fd = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
        barlease::Device::from_fd(fd).map_err(|error| error.to_string())
    };
    let surroundings = Surroundings {
        before_action: kills::before_action(&directory),
        ..Surroundings::new(&open)
    };
    let code = barleased::run_in(args, surroundings);
    std::process::exit(i32::from(code != ExitCode::SUCCESS));
}

/// Not a test: a process that has a lease for as long as it lives.
#[test]
#[ignore = "a client of the other tests"]
fn holder() {
    let Some(directory) = directory() else {
        return;
    };
    let mut client = Client::connect(directory.join("socket/leases.sock")).unwrap();
    let (_, _fd) = client.acquire(&rows(1, Lifetime::Process)).unwrap();
    drop(client);
    fs::write(directory.join(format!("has.{}", std::process::id())), "").unwrap();
    thread::sleep(A_WHILE);
}

/// This program, as something else.
fn this(name: &str, directory: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", name, "--ignored", "--nocapture"])
        .env(DIRECTORY, directory)
        .stdout(Stdio::null());
    command
}

struct World {
    card: FakeDevice,
    directory: tempfile::TempDir,
    /// The daemon ends with it.
    keeper: Running,
}

impl World {
    fn start() -> Self {
        Self::start_with(&[])
    }

    fn start_with(environment: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        fs::create_dir(path.join("policy")).unwrap();
        fs::write(path.join("policy/a.toml"), policy(RULE)).unwrap();
        let card = FakeDevice::builder().bar(2, UNITS * PAGE);
        let card = card.msi(1).build().unwrap();
        card.serve(path.join("kernel")).unwrap();
        let fd = card.fd().unwrap();
        let place = format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
        // It stays open as long as this process lives.
        std::mem::forget(fd);
        std::os::unix::fs::symlink(place, path.join("card")).unwrap();
        let keeper = this("keeper", path)
            .envs(environment.iter().copied())
            .stderr(fs::File::create(path.join("said")).unwrap())
            .spawn()
            .unwrap();
        let keeper = Running(keeper);
        let world = Self {
            card,
            directory,
            keeper,
        };
        until("it serves", || world.try_client().is_ok());
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn try_client(&self) -> Result<Client, Error> {
        let mut client = Client::connect(self.path("socket/leases.sock"))?;
        client.set_timeout(Some(A_WHILE))?;
        client.call(&proto::Devices {})?;
        Ok(client)
    }

    fn client(&self) -> Client {
        let mut client = None;
        until("it serves", || {
            client = self.try_client().ok();
            client.is_some()
        });
        client.unwrap()
    }

    fn daemon(&self) -> Pid {
        let text = fs::read_to_string(self.path("pid")).unwrap();
        Pid::from_raw(text.parse().unwrap()).unwrap()
    }

    /// Kills the daemon, and gives back a client of the next one.
    fn kill(&self) -> Client {
        let before = self.daemon();
        rustix::process::kill_process(before, Signal::KILL).unwrap();
        until("another daemon", || self.daemon() != before);
        self.client()
    }

    /// The number of leases that the kernel has alive.
    fn alive(&self) -> usize {
        let records = self.card.leases().list();
        records
            .filter(|record| record.as_ref().unwrap().state == State::Ok)
            .count()
    }

    fn said(&self) -> String {
        fs::read_to_string(self.path("said")).unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if thread::panicking() {
            println!("the daemons said: {}", self.said());
        }
    }
}

fn rows(units: u64, lifetime: Lifetime) -> Acquire {
    Acquire {
        lifetime: Some(lifetime),
        ..Acquire::of_pool("rows", units * PAGE, Access::ReadWrite)
    }
}

fn ids(client: &mut Client) -> Vec<u64> {
    let leases = client.list(None).unwrap();
    leases.iter().map(|lease| lease.lease).collect()
}

#[test]
fn a_lease_lives_on_while_the_daemon_is_killed() {
    let world = World::start();
    let mut client = world.client();
    let (one, fd) = client.acquire(&rows(2, Lifetime::Process)).unwrap();
    let (other, _fd) = client.acquire(&rows(1, Lifetime::Holders)).unwrap();
    let lease = Lease::from_fd(fd).unwrap();
    let mapping = lease.map().unwrap();
    mapping.write(PAGE as usize, 7_u32).unwrap();
    let before = client.list(None).unwrap();
    let mut client = world.kill();
    assert_eq!(mapping.read::<u32>(PAGE as usize).unwrap(), 7);
    assert_eq!(client.list(None).unwrap(), before);
    // Its range is not given to others, and its number neither.
    let (third, _fd) = client.acquire(&rows(3, Lifetime::Holders)).unwrap();
    assert!(third.lease > other.lease);
    let taken = |acquired: &proto::Acquired| acquired.ranges.clone();
    assert!(
        !taken(&third)
            .iter()
            .any(|range| taken(&one).contains(range))
    );
    client.release(one.lease).unwrap();
    let device = world.card.device().unwrap();
    assert_eq!(device.status(&lease).unwrap().state, State::Dead);
    let mut client = world.kill();
    assert_eq!(ids(&mut client), [other.lease, third.lease]);
    assert_eq!(world.alive(), 2);
}

#[test]
fn a_client_comes_back_for_the_leases_of_its_connection() {
    let world = World::start();
    let (mut one, mut other) = (world.client(), world.client());
    let (lease, _fd) = one.acquire(&rows(1, Lifetime::Connection)).unwrap();
    let (lost, _fd) = other.acquire(&rows(1, Lifetime::Connection)).unwrap();
    let token = one.token().unwrap();
    assert_ne!(token, other.token().unwrap());
    let mut client = world.kill();
    let mut watch = world.client().watch(true).unwrap();
    world.client();
    let nothing = refusal(client.resume("17"));
    assert_eq!(nothing, Refusal::NothingToResume {});
    assert_eq!(client.resume(token.as_str()).unwrap(), [lease.lease]);
    assert_eq!(refusal(client.resume(token.as_str())), nothing);
    let notice = watch.next().unwrap().unwrap();
    assert_eq!(
        (notice.lease, notice.reason),
        (lost.lease, Some(Reason::NotResumed))
    );
    until("the other one is gone", || world.alive() == 1);
    // By the same secret again.
    let mut client = world.kill();
    assert_eq!(client.resume(token.as_str()).unwrap(), [lease.lease]);
    thread::sleep(RESUME * 2);
    assert_eq!(ids(&mut client), [lease.lease]);
    drop(client);
    until("it ends with its connection", || world.alive() == 0);
}

#[test]
fn times_and_processes_are_watched_again() {
    let world = World::start();
    let mut client = world.client();
    let brief = Acquire {
        ttl: Some(6000),
        ..rows(1, Lifetime::Holders)
    };
    let (brief, _fd) = client.acquire(&brief).unwrap();
    let holder = |world: &World| this("holder", world.directory.path()).spawn().unwrap();
    let (mut first, mut second) = (holder(&world), holder(&world));
    for holder in [&first, &second] {
        let has = world.path(&format!("has.{}", holder.id()));
        until("it has its lease", || has.exists());
    }
    let mut client = world.kill();
    assert_eq!(ids(&mut client).len(), 3);
    let mut watch = world.client().watch(true).unwrap();
    // Its answer is that of the watch, too.
    world.client();
    first.kill().unwrap();
    first.wait().unwrap();
    let notice = watch.next().unwrap().unwrap();
    assert_eq!(notice.reason, Some(Reason::HolderGone));
    let expired = watch.map(Result::unwrap);
    let expired = expired.skip_while(|notice| notice.lease != brief.lease);
    assert_eq!(
        expired.map(|notice| notice.reason).next(),
        Some(Some(Reason::Expired))
    );
    until("one is left", || world.alive() == 1);
    // One that ends while no daemon is there, so that the next one finds no process.
    let stopped = Pid::from_child(&world.keeper.0);
    rustix::process::kill_process(stopped, Signal::STOP).unwrap();
    rustix::process::kill_process(world.daemon(), Signal::KILL).unwrap();
    second.kill().unwrap();
    second.wait().unwrap();
    assert_eq!(world.alive(), 1);
    rustix::process::kill_process(stopped, Signal::CONT).unwrap();
    until("none is left", || world.alive() == 0);
    assert!(ids(&mut world.client()).is_empty());
}

/// Before each action of one Acquire, and of what comes before it.
#[test]
fn a_kill_before_any_action_of_a_grant_loses_nothing() {
    for action in 0..16 {
        let world = World::start_with(&[(DIE, &action.to_string())]);
        let got = world.client().acquire(&rows(2, Lifetime::Holders));
        let listed = world.client().list(None).unwrap();
        match got {
            Ok((lease, _)) => {
                assert_eq!(listed.len(), 1, "{action}");
                assert_eq!(listed[0].lease, lease.lease);
            }
            // A client without an answer has no lease; the daemon may have one to give to nobody.
            Err(Error::Refused(refusal)) => panic!("{action}: {refusal}"),
            Err(_) => assert!(world.path("died").exists(), "{action}"),
        }
        let granted = listed
            .iter()
            .filter(|lease| lease.state == proto::State::Granted);
        assert_eq!(granted.count(), world.alive(), "{action}");
        // It may be the end of the lease that it dies of.
        until("nothing is left", || {
            let mut client = world.client();
            let left = client.list(None).unwrap_or_default();
            let ended = left.iter().all(|lease| client.release(lease.lease).is_ok());
            ended && ids(&mut world.client()).is_empty()
        });
        assert_eq!(world.alive(), 0, "{action}");
        let devices = world.client().call(&proto::Devices {}).unwrap().devices;
        assert_eq!(devices[0].pools[0].free, UNITS * PAGE, "{action}");
        if action == 0 {
            assert!(world.path("died").exists());
        }
    }
}

#[test]
fn the_keeper_hands_signals_on_and_ends_as_its_child_does() {
    let mut world = World::start();
    let (_, _fd) = world.client().acquire(&rows(1, Lifetime::Holders)).unwrap();
    let keeper = Pid::from_child(&world.keeper.0);
    // A policy without rules.
    fs::write(world.path("policy/a.toml"), CARD).unwrap();
    rustix::process::kill_process(keeper, Signal::HUP).unwrap();
    until("the new policy is in force", || {
        let asked = world.client().acquire(&rows(1, Lifetime::Holders));
        matches!(asked, Err(Error::Refused(_)))
    });
    rustix::process::kill_process(keeper, Signal::TERM).unwrap();
    assert!(world.keeper.wait().unwrap().success());
    assert_eq!(world.alive(), 0);
    assert!(!world.path("socket/leases.sock").exists());
    assert!(!world.path("socket/keep.sock").exists());
}

#[test]
fn a_daemon_ends_with_its_keeper() {
    let mut world = World::start();
    let daemon = world.daemon();
    world.keeper.kill().unwrap();
    assert_eq!(world.keeper.wait().unwrap().signal(), Some(9));
    until("it ends", || {
        rustix::process::test_kill_process(daemon).is_err()
    });
}

#[test]
fn a_daemon_that_hangs_is_started_again() {
    let world = World::start_with(&[(WATCHDOG, "1000")]);
    let (lease, _fd) = world.client().acquire(&rows(1, Lifetime::Holders)).unwrap();
    let before = world.daemon();
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(world.daemon(), before);
    rustix::process::kill_process(before, Signal::STOP).unwrap();
    until("another daemon", || world.daemon() != before);
    assert_eq!(ids(&mut world.client()), [lease.lease]);
    assert!(world.said().contains("hangs"));
}

#[test]
fn a_daemon_that_cannot_start_is_not_started_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    fs::create_dir(path.join("policy")).unwrap();
    fs::write(path.join("policy/a.toml"), "[device]\nx = 1\n").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_barleased"))
        .args(["--keep", "--policy"])
        .arg(path.join("policy"))
        .arg("--socket")
        .arg(path.join("socket"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("a.toml") && !said.contains("again"), "{said}");
}

#[test]
fn leases_are_not_said_to_be_kept_where_nothing_keeps_them() {
    let directory = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_barleased"))
        .args(["--at-stop", "keep", "--policy"])
        .arg(directory.path())
        .arg("--socket")
        .arg(directory.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && said.contains("--at-stop keep"),
        "{said}"
    );
}

/// The faults of the policy's files, as the daemon says.
fn policy_errors(client: &mut Client) -> Option<Vec<String>> {
    client.call(&proto::Devices {}).unwrap().policy_errors
}

#[test]
fn a_broken_policy_at_a_restart_leaves_the_last_good_one_in_force() {
    let world = World::start();
    let (lease, _fd) = world.client().acquire(&rows(1, Lifetime::Holders)).unwrap();
    // It is the last one that counts, and a reload that is refused changes nothing.
    let more = policy(&RULE.replace("max-leases = 6", "max-leases = 2"));
    fs::write(world.path("policy/a.toml"), more).unwrap();
    world.client().call(&proto::Reload {}).unwrap();
    fs::write(world.path("policy/a.toml"), "[pool.rows]\ndevice = 7\n").unwrap();
    refusal(world.client().call(&proto::Reload {}));
    for _ in 0..2 {
        let mut client = world.kill();
        assert_eq!(ids(&mut client), [lease.lease]);
        let errors = policy_errors(&mut client).unwrap();
        assert!(errors[0].contains("a.toml"), "{errors:?}");
        assert!(world.said().contains("a.toml"));
        let (next, _fd) = client.acquire(&rows(1, Lifetime::Holders)).unwrap();
        let third = refusal(client.acquire(&rows(1, Lifetime::Holders)));
        assert!(matches!(third, Refusal::LimitReached { .. }), "{third}");
        client.release(next.lease).unwrap();
    }
    fs::write(world.path("policy/a.toml"), policy(RULE)).unwrap();
    let mut client = world.client();
    client.call(&proto::Reload {}).unwrap();
    assert_eq!(policy_errors(&mut client), None);
    for _ in 0..3 {
        client.acquire(&rows(1, Lifetime::Holders)).unwrap();
    }
}

#[test]
fn without_any_policy_leases_live_on_and_nothing_is_allowed() {
    // As an older daemon leaves them: its policy is not kept.
    let world = World::start_with(&[(FORGET, "1")]);
    let (lease, fd) = world.client().acquire(&rows(1, Lifetime::Holders)).unwrap();
    fs::write(world.path("policy/a.toml"), "[pool.rows]\ndevice = 7\n").unwrap();
    let mut client = world.kill();
    assert_eq!(ids(&mut client), [lease.lease]);
    assert_eq!(world.alive(), 1);
    let refused = refusal(client.acquire(&rows(1, Lifetime::Holders)));
    assert!(matches!(refused, Refusal::NoSuchPool { .. }), "{refused}");
    assert!(policy_errors(&mut client).is_some());
    // It is still its holder's to give back.
    drop(fd);
    client.release(lease.lease).unwrap();
    assert_eq!(world.alive(), 0);
    fs::write(world.path("policy/a.toml"), policy(RULE)).unwrap();
    client.call(&proto::Reload {}).unwrap();
    client.acquire(&rows(6, Lifetime::Holders)).unwrap();
}

#[test]
fn a_device_is_handed_over_and_let_go_with_its_owner() {
    let world = World::start();
    let mut client = world.client();
    let open = refusal(client.adopt("card", world.card.fd().unwrap()));
    assert!(open.to_string().contains("open already"), "{open}");
    let unknown = refusal(client.adopt("disk", world.card.fd().unwrap()));
    assert!(matches!(unknown, Refusal::NoSuchDevice { .. }), "{unknown}");
    let drain = proto::Drain {
        device: None,
        grace: None,
    };
    client.call(&drain).unwrap();
    let file = fs::File::open("/dev/null").unwrap();
    let nothing = refusal(client.adopt("card", file));
    assert!(matches!(nothing, Refusal::Invalid { .. }), "{nothing}");
    // A lease of the owner's own, from before.
    let device = world.card.device().unwrap();
    let _own = device.export(2).range(0..PAGE).export().unwrap();
    client.adopt("card", world.card.fd().unwrap()).unwrap();
    until("it is revoked", || world.alive() == 0);
    let (_, _fd) = client.acquire(&rows(6, Lifetime::Holders)).unwrap();
    // It is still the one that was handed over after a restart.
    let mut client = world.kill();
    assert_eq!(ids(&mut client).len(), 1);
    drop(client);
    let mut owner = this("owner", world.directory.path()).spawn().unwrap();
    let state = |world: &World| {
        world.client().call(&proto::Devices {}).unwrap().devices[0]
            .state
            .clone()
    };
    world.client().call(&drain).unwrap();
    until("the owner hands it over", || state(&world) == "open");
    let mut client = world.kill();
    let (_, _fd) = client.acquire(&rows(1, Lifetime::Holders)).unwrap();
    owner.kill().unwrap();
    owner.wait().unwrap();
    until("it is closed", || state(&world) == "absent");
    assert_eq!(world.alive(), 0);
}

#[test]
fn a_device_that_stays_with_the_daemon_outlives_its_owner() {
    let world = World::start();
    let keeps = policy(RULE).replace("[pool.rows]", "owner-dies = \"keep\"\n\n[pool.rows]");
    fs::write(world.path("policy/a.toml"), keeps).unwrap();
    let mut client = world.client();
    client.call(&proto::Reload {}).unwrap();
    let drain = proto::Drain {
        device: None,
        grace: None,
    };
    client.call(&drain).unwrap();
    let mut owner = this("owner", world.directory.path()).spawn().unwrap();
    let state = || {
        world.client().call(&proto::Devices {}).unwrap().devices[0]
            .state
            .clone()
    };
    until("the owner hands it over", || state() == "open");
    let (lease, _fd) = client.acquire(&rows(1, Lifetime::Holders)).unwrap();
    owner.kill().unwrap();
    owner.wait().unwrap();
    // By now it has done all that it would do about the end of a process.
    for _ in 0..20 {
        assert_eq!(ids(&mut client), [lease.lease]);
    }
    // Nor after a restart.
    let mut client = world.kill();
    assert_eq!((ids(&mut client), world.alive()), (vec![lease.lease], 1));
    client.acquire(&rows(1, Lifetime::Holders)).unwrap();
}

#[test]
fn another_device_than_the_policy_means_is_not_taken_over() {
    let world = World::start();
    let mut client = world.client();
    let drain = proto::Drain {
        device: None,
        grace: None,
    };
    client.call(&drain).unwrap();
    let adopt = |client: &mut Client, wanted: &str| {
        // Nothing of the machine is that device, so it is not opened.
        let text = policy(RULE).replace("0000:00:01.0", wanted);
        fs::write(world.path("policy/a.toml"), text).unwrap();
        fs::write(world.path("absent"), "").unwrap();
        client.call(&proto::Reload {}).unwrap();
        let adopted = client.adopt("card", world.card.fd().unwrap());
        adopted.map_err(|error| error.to_string())
    };
    for (wanted, why) in [
        ("0000:00:02.0", "0000:00:02.0"),
        ("1234:5678", "1234:5678"),
        ("serial:52-54-00-ff-ff-00-00-01", "without a serial number"),
        ("slot:none", "slot none"),
    ] {
        let error = adopt(&mut client, wanted).unwrap_err();
        assert!(
            error.contains("another one") && error.contains(why),
            "{error}"
        );
    }
    let device = world.card.device().unwrap();
    let ids = device.config().unwrap().identity().unwrap();
    let right = format!("{:04x}:{:04x}", ids.vendor, ids.device);
    adopt(&mut client, &right).unwrap();
}

/// Not a test: a process that hands the device over when the daemon has none.
#[test]
#[ignore = "the owner of the other tests"]
fn owner() {
    let Some(directory) = directory() else {
        return;
    };
    let path = fs::read_link(directory.join("card")).unwrap();
    let fd = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let mut client = Client::connect(directory.join("socket/leases.sock")).unwrap();
    until("it is taken", || client.adopt("card", &fd).is_ok());
    thread::sleep(A_WHILE);
}

#[test]
fn a_claim_lives_on_and_one_whose_directory_is_gone_has_ended() {
    let world = World::start();
    let open = |claim: &str| {
        let claim = claim.to_owned();
        let opened = world.client().call(&proto::OpenClaim { claim }).unwrap();
        Path::new(&opened.directory).join("sock")
    };
    let (one, other) = (open("one"), open("other"));
    let connect = |socket: &Path| Client::connect(socket).unwrap();
    let lasting = rows(1, Lifetime::Claim);
    let (kept, _fd) = connect(&one).acquire(&lasting).unwrap();
    let (_, _fd) = connect(&other).acquire(&lasting).unwrap();
    fs::remove_dir_all(other.parent().unwrap()).unwrap();
    let mut client = world.kill();
    until("the other has ended", || ids(&mut client) == [kept.lease]);
    assert_eq!(world.alive(), 1);
    // The same directory has a socket that answers.
    assert_eq!(ids(&mut connect(&one)), [kept.lease]);
}
