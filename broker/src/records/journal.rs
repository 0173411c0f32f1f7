//! Records to the journal, by its native protocol: a datagram of fields to a socket.
//!
//! A thread sends them, so that neither a journal that is slow nor a pipe that nobody reads holds
//! a client up. The crates that speak the protocol are bound to a global logger or bring a dozen
//! others; it is one datagram.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;

use barlease_proto::Record;
use barlease_proto::RecordKind;

/// Where the journal listens.
pub(crate) const SOCKET: &str = "/run/systemd/journal/socket";
/// Records that wait to be written. More are lost, and counted.
const WAITING: usize = 1 << 14;

/// The way to the journal.
#[derive(Debug)]
pub(crate) struct Log {
    records: mpsc::SyncSender<Record>,
    lost: Arc<AtomicU64>,
}

impl Log {
    pub(crate) fn start(socket: &Path) -> io::Result<Self> {
        let (records, receiver) = mpsc::sync_channel(WAITING);
        let lost = Arc::new(AtomicU64::new(0));
        let journal = UnixDatagram::unbound().and_then(|datagram| {
            datagram.connect(socket)?;
            Ok(datagram)
        });
        let seen = lost.clone();
        thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || write_all(journal.ok().as_ref(), &receiver, &seen))?;
        Ok(Self { records, lost })
    }

    /// Records that were not written, of all.
    pub(crate) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    pub(crate) fn add(&self, record: Record) {
        if self.records.try_send(record).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn write_all(journal: Option<&UnixDatagram>, records: &mpsc::Receiver<Record>, lost: &AtomicU64) {
    let mut said = 0;
    for record in records {
        let missed = lost.load(Ordering::Relaxed);
        if missed != said {
            say(&format!("{} records were lost", missed - said));
            said = missed;
        }
        let sent = journal.map(|journal| journal.send(&entry(&record)));
        if !matches!(sent, Some(Ok(_))) {
            say(&record.message);
        }
    }
}

fn say(message: &str) {
    // Not by `eprintln`, whose lock the loop would wait for while nobody reads. Nobody is left to
    // tell that standard error is gone.
    let line = format!("barleased: {message}\n");
    let _ = rustix::io::write(rustix::stdio::stderr(), line.as_bytes());
}

/// A record as an entry of the journal.
fn entry(record: &Record) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut add = |name: &str, value: &str| field(&mut bytes, name, value);
    add("MESSAGE", &record.message);
    add("MESSAGE_ID", message_id(record.kind));
    add("PRIORITY", priority(record.kind));
    add("SYSLOG_IDENTIFIER", "barleased");
    add("BARLEASE_KIND", &super::word(&record.kind));
    let number = |number: Option<u64>| number.map(|number| number.to_string());
    let holder = record.holder.as_ref();
    for (name, value) in [
        ("BARLEASE_LEASE", number(record.lease)),
        ("BARLEASE_POOL", record.pool.clone()),
        ("BARLEASE_DEVICE", record.device.clone()),
        ("BARLEASE_BAR", number(record.bar.map(u64::from))),
        ("BARLEASE_SIZE", number(record.size)),
        ("BARLEASE_UID", number(holder.map(|it| it.uid.into()))),
        ("BARLEASE_GID", number(holder.map(|it| it.gid.into()))),
        ("BARLEASE_PID", number(holder.map(|it| it.pid.into()))),
        ("BARLEASE_UNIT", holder.and_then(|it| it.unit.clone())),
        ("BARLEASE_CLAIM", holder.and_then(|it| it.claim.clone())),
        ("BARLEASE_REASON", record.reason.as_ref().map(super::word)),
        ("BARLEASE_DEADLINE", number(record.deadline)),
        ("BARLEASE_ERROR", record.error.clone()),
    ] {
        if let Some(value) = value {
            add(name, &value);
        }
    }
    bytes
}

/// A field. One with a line break in it has its length, so that nobody can add fields of his own
/// by the name of a pool.
fn field(bytes: &mut Vec<u8>, name: &str, value: &str) {
    bytes.extend(name.as_bytes());
    if value.contains('\n') {
        bytes.push(b'\n');
        bytes.extend((value.len() as u64).to_le_bytes());
    } else {
        bytes.push(b'=');
    }
    bytes.extend(value.as_bytes());
    bytes.push(b'\n');
}

/// The number by which `dist/journal/barleased.catalog` explains a kind.
fn message_id(kind: RecordKind) -> &'static str {
    match kind {
        RecordKind::Granted => "90688e772e2645f5bef46037c6261848",
        RecordKind::Refused => "172fcc9e406d4bad88a9d470561b5284",
        RecordKind::Reclaim => "8c00badbac0b490fbe639cc556891378",
        RecordKind::Suspended => "7186bfaf21944a09a8107fe115e557ee",
        RecordKind::Resumed => "126c447a55884d159cb7526d1b9cce43",
        RecordKind::Revoked => "386984eb214b4b63b08fa2e5caea1d21",
        RecordKind::Ended => "91d551d4079b48209677147df6a22ba1",
        RecordKind::RevokeAsked => "1759ee6f7ae74ed8a5104e74f7a60870",
        RecordKind::DrainAsked => "a9f8bdb411b845bdbcedef1f566bc856",
        RecordKind::PolicyLoaded => "dee67dd4a5fa4db1acb684a85be618b6",
        RecordKind::PolicyRefused => "c232d979764a4db9b72be0a89d5619b8",
        RecordKind::DeviceOpened => "87e3196350eb4f38ab3471083590e571",
        RecordKind::DeviceAbsent => "f9e2c9101fb4409e9cc22e575a420183",
        RecordKind::DeviceClosed => "b42b16e1d23e4ae48dda89c3bf0f8149",
    }
}

/// As syslog counts.
fn priority(kind: RecordKind) -> &'static str {
    match kind {
        RecordKind::PolicyRefused | RecordKind::DeviceAbsent => "3",
        RecordKind::Refused => "4",
        RecordKind::Revoked
        | RecordKind::RevokeAsked
        | RecordKind::DrainAsked
        | RecordKind::DeviceOpened
        | RecordKind::DeviceClosed
        | RecordKind::PolicyLoaded => "5",
        RecordKind::Granted
        | RecordKind::Reclaim
        | RecordKind::Suspended
        | RecordKind::Resumed
        | RecordKind::Ended => "6",
    }
}
