//! The loop on a device that is made up.

use std::path::Path;
use std::time::Duration;
use std::time::Instant;

use barlease::InterruptKind;
use barlease::Receiver;
use barlease::fake::FakeDevice;

use super::spec::Terms;
use super::*;

fn spec(socket: &Path, bdf: Bdf) -> Spec {
    Spec {
        bdf,
        bar: 0,
        socket: socket.to_owned(),
        terms: Terms::default(),
    }
}

/// Serves leases of one device in a thread. `change` makes the specs from a first one.
fn serve(fake: &FakeDevice, specs: Vec<Spec>) -> std::thread::JoinHandle<Result<(), String>> {
    let device = fake.device().unwrap();
    let sockets: Vec<PathBuf> = specs.iter().map(|spec| spec.socket.clone()).collect();
    let thread = std::thread::spawn(move || {
        let inputs = Inputs {
            signals: None,
            stdin: false,
        };
        let mut device = Some(device);
        let mut server = Server::new(Output::Text, inputs).unwrap();
        for spec in specs {
            server
                .grant(spec, &mut |_| Ok(device.take().expect("opened once")))
                .unwrap();
        }
        server.serve().map_err(|failure| format!("{failure:?}"))
    });
    let begin = Instant::now();
    while !sockets
        .iter()
        .all(|socket| UnixStream::connect(socket).is_ok())
    {
        assert!(begin.elapsed() < Duration::from_secs(5) && !thread.is_finished());
        std::thread::sleep(Duration::from_millis(5));
    }
    thread
}

fn take(socket: &Path) -> barlease::Result<barlease::Lease> {
    let stream = UnixStream::connect(socket).unwrap();
    Receiver::new()
        .any_file()
        .receive_within(&stream, Duration::from_secs(5))
}

#[test]
fn leases_of_one_device_are_served_and_end_when_the_kernel_asks_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let fake = FakeDevice::builder().bar(0, 1 << 20).build().unwrap();
    let [a, b] = ["a", "b"].map(|name| dir.path().join(name));
    let thread = serve(&fake, vec![spec(&a, fake.bdf()), spec(&b, fake.bdf())]);
    let leases = [take(&a).unwrap(), take(&b).unwrap()];
    assert_eq!(leases.map(|lease| lease.size()), [1 << 20; 2]);
    assert!(fake.raise(InterruptKind::Request, 0));
    thread.join().unwrap().unwrap();
    assert!(!a.exists() && !b.exists());
    let live = fake
        .leases()
        .list()
        .filter(|record| record.as_ref().unwrap().state != barlease::State::Dead);
    assert_eq!(live.count(), 0);
}

#[test]
fn a_term_ends_its_lease_only() {
    let dir = tempfile::tempdir().unwrap();
    let fake = FakeDevice::builder().bar(0, 1 << 20).build().unwrap();
    let [short, long] = ["short", "long"].map(|name| dir.path().join(name));
    let mut first = spec(&short, fake.bdf());
    first.terms.term = Some(Duration::from_millis(500));
    let thread = serve(&fake, vec![first, spec(&long, fake.bdf())]);
    let begin = Instant::now();
    while short.exists() {
        assert!(begin.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(10));
    }
    take(&long).unwrap();
    assert!(fake.raise(InterruptKind::Request, 0));
    thread.join().unwrap().unwrap();
}

#[test]
fn a_holder_that_does_not_read_holds_nobody_up() {
    let dir = tempfile::tempdir().unwrap();
    let fake = FakeDevice::builder().bar(0, 1 << 30).build().unwrap();
    let socket = dir.path().join("socket");
    let mut many = spec(&socket, fake.bdf());
    // Its description does not fit into a socket.
    many.terms.ranges = (0..65_536)
        .map(|n| barlease::BarRange {
            offset: n * 0x2000,
            length: 0x1000,
        })
        .collect();
    let thread = serve(&fake, vec![many]);
    let silent: Vec<UnixStream> = (0..8)
        .map(|_| UnixStream::connect(&socket).unwrap())
        .collect();
    let begin = Instant::now();
    assert_eq!(take(&socket).unwrap().size(), 65_536 << 12);
    assert!(fake.raise(InterruptKind::Request, 0));
    thread.join().unwrap().unwrap();
    // One silent holder alone would have had five seconds.
    assert!(
        begin.elapsed() < Duration::from_secs(4),
        "{:?}",
        begin.elapsed()
    );
    drop(silent);
}

#[test]
fn an_importer_that_does_not_let_go_is_waited_for_and_nobody_else_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let fake = FakeDevice::builder().bar(0, 1 << 20).build().unwrap();
    let socket = dir.path().join("socket");
    let thread = serve(&fake, vec![spec(&socket, fake.bdf())]);
    let lease = fake.leases().list().next().unwrap().unwrap();
    fake.set_importers(lease.id, 1);
    assert!(fake.raise(InterruptKind::Request, 0));
    std::thread::sleep(Duration::from_millis(200));
    assert!(!socket.exists(), "nobody else gets it");
    assert!(!thread.is_finished(), "an importer has it");
    fake.set_importers(lease.id, 0);
    thread.join().unwrap().unwrap();
}

/// Asks for the end of a lease, and gives all that is answered.
fn ask(socket: &Path, line: &str) -> Vec<control::Answer> {
    use std::io::{BufRead, Write};
    let mut stream = UnixStream::connect(control::path(socket)).unwrap();
    stream.write_all(line.as_bytes()).unwrap();
    let parse = |line: io::Result<String>| serde_json::from_str(&line.unwrap()).unwrap();
    io::BufReader::new(stream).lines().map(parse).collect()
}

#[test]
fn a_lease_is_revoked_from_elsewhere_and_alone() {
    use control::Answer;
    let dir = tempfile::tempdir().unwrap();
    let fake = FakeDevice::builder().bar(0, 1 << 20).build().unwrap();
    let [a, b] = ["a", "b"].map(|name| dir.path().join(name));
    let mut first = spec(&a, fake.bdf());
    // Its socket for holders is gone after the first of them, the other one is not.
    first.terms.once = true;
    let thread = serve(&fake, vec![first, spec(&b, fake.bdf())]);
    let mode = fs::metadata(control::path(&b)).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    for wrong in ["die\n", "revoke all\n"] {
        assert!(matches!(ask(&a, wrong)[..], [Answer::Failed { .. }]));
    }
    assert!(matches!(ask(&a, "revoke\n")[..], [Answer::Revoked { .. }]));
    assert!(!control::path(&a).exists());
    take(&b).unwrap();

    let lease = fake.leases().list().map(Result::unwrap);
    let lease = lease
        .filter(|it| it.state != barlease::State::Dead)
        .last()
        .unwrap();
    fake.set_importers(lease.id, 1);
    let asks = std::thread::spawn({
        let b = b.clone();
        move || ask(&b, "revoke\n")
    });
    let begin = Instant::now();
    while b.exists() {
        assert!(begin.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!asks.is_finished());
    fake.set_importers(lease.id, 0);
    let told = asks.join().unwrap();
    assert!(
        matches!(told[..], [Answer::Draining, Answer::Revoked { .. }]),
        "{told:?}"
    );
    thread.join().unwrap().unwrap();
}
