//! The ways out of metrics: a file for node_exporter, HTTP on a socket, and `io.systemd.Metrics` on
//! another.
//!
//! Threads wait for disks and scrapers, and ask the loop for the text. A scraper that is slow keeps
//! others waiting who scrape, for some seconds, and nobody else.

use std::fs;
use std::fs::File;
use std::fs::Permissions;
use std::io;
use std::io::Read;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;
use std::time::Instant;

use barlease::EventFd;
use prometheus::TextEncoder;
use prometheus::proto::MetricFamily;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::SocketFlags;

use super::report;

/// Time between two versions of the file: node_exporter is scraped as seldom.
const INTERVAL: Duration = Duration::from_secs(15);
/// How long a scraper may take, in all.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// Longest request.
pub(super) const MAX_REQUEST: usize = 8 << 10;

/// Where somebody waits for the numbers.
pub(crate) type Wish = mpsc::SyncSender<Vec<MetricFamily>>;

/// The ways out that are wanted.
#[derive(Debug, Default)]
pub(crate) struct Ways {
    /// A file that is written again and again.
    pub(crate) file: Option<PathBuf>,
    /// A socket to make, for HTTP.
    pub(crate) socket: Option<PathBuf>,
    /// Sockets that the manager has made, for HTTP: of any kind.
    pub(crate) http: Vec<OwnedFd>,
    /// And for systemd-report.
    pub(crate) report: Vec<OwnedFd>,
}

/// The loop's end: the event says that there are wishes.
#[derive(Debug)]
pub(crate) struct Door {
    pub(crate) event: EventFd,
    pub(crate) wishes: mpsc::Receiver<Wish>,
}

/// The other end.
#[derive(Debug)]
struct Asker {
    event: EventFd,
    wishes: mpsc::Sender<Wish>,
}

impl Asker {
    /// The numbers of now; none if the loop has ended.
    fn families(&self) -> Option<Vec<MetricFamily>> {
        let (wish, families) = mpsc::sync_channel(1);
        self.wishes.send(wish).ok()?;
        self.event.signal().ok()?;
        families.recv_timeout(PATIENCE).ok()
    }

    /// The same as text for Prometheus.
    fn text(&self) -> Option<String> {
        // Writing to a string does not fail, and names were checked.
        let text = TextEncoder::new().encode_to_string(&self.families()?);
        Some(text.unwrap_or_default())
    }
}

impl Door {
    /// Begins to write the file, and to listen.
    pub(crate) fn open(ways: Ways) -> io::Result<Self> {
        let event = EventFd::new().map_err(io::Error::other)?;
        let (sender, wishes) = mpsc::channel();
        let asker = || {
            let event = event.try_clone().map_err(io::Error::other)?;
            let wishes = sender.clone();
            io::Result::Ok(Asker { event, wishes })
        };
        let thread = || thread::Builder::new().name("metrics".to_owned());
        if let Some(file) = ways.file {
            let asker = asker()?;
            thread().spawn(move || write_on(&file, &asker))?;
        }
        let mut http = ways.http;
        if let Some(path) = ways.socket {
            http.push(bind(&path)?.into());
        }
        for listener in http {
            let asker = asker()?;
            thread().spawn(move || serve(&listener, |client| answer(client, &asker)))?;
        }
        for listener in ways.report {
            let asker = asker()?;
            let families = move || asker.families();
            thread().spawn(move || serve(&listener, |client| report::answer(client, &families)))?;
        }
        Ok(Self { event, wishes })
    }
}

/// Binds a socket, in the place of one that nobody listens at.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let said =
        |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let is_socket = fs::symlink_metadata(path).is_ok_and(|it| it.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err() {
        fs::remove_file(path).map_err(said)?;
    }
    let listener = UnixListener::bind(path).map_err(said)?;
    // For its group: names of pools and numbers are in it.
    fs::set_permissions(path, Permissions::from_mode(0o660)).map_err(said)?;
    Ok(listener)
}

/// Writes the file again and again, each time all of it at once.
fn write_on(file: &Path, asker: &Asker) {
    let mut told = false;
    while let Some(text) = asker.text() {
        let written = write(file, &text);
        if let (Err(error), false) = (&written, told) {
            eprintln!("barleased: the metrics' file {}: {error}", file.display());
        }
        told = written.is_err();
        thread::sleep(INTERVAL);
    }
}

fn write(file: &Path, text: &str) -> io::Result<()> {
    // The collector reads names that end with `.prom` only.
    let part = file.with_extension("prom.part");
    match fs::remove_file(&part) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // A new file: somebody else may have put a link there.
    let mut new = File::create_new(&part)?;
    new.write_all(text.as_bytes())?;
    new.set_permissions(Permissions::from_mode(0o644))?;
    fs::rename(&part, file)
}

/// Takes one client after the other. The socket may be one of systemd's, which does not block, and
/// need not be a unix socket: what is done with a client's is done with any stream.
fn serve(listener: &OwnedFd, answer: impl Fn(UnixStream) -> io::Result<()>) {
    loop {
        let mut poll = [PollFd::new(listener, PollFlags::IN)];
        // An error is one of accept's, too.
        let _ = rustix::event::poll(&mut poll, None);
        match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
            // One that goes away is its own business.
            Ok(client) => drop(answer(client.into())),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            // No descriptors are left: some will be.
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn answer(mut client: UnixStream, asker: &Asker) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    client.set_write_timeout(Some(PATIENCE))?;
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || request.len() > MAX_REQUEST {
            return Ok(());
        }
        client.set_read_timeout(Some(left))?;
        let mut bytes = [0; 1024];
        match client.read(&mut bytes)? {
            0 => return Ok(()),
            read => request.extend(bytes.get(..read).unwrap_or_default()),
        }
    }
    let line = request.split(|byte| *byte == b'\r').next();
    let line = String::from_utf8_lossy(line.unwrap_or_default()).into_owned();
    let mut words = line.split(' ');
    let (method, path) = (words.next(), words.next().unwrap_or_default());
    let path = path.split('?').next();
    let (status, kind, body) = match (method, path, asker.text()) {
        (_, _, None) => (
            "503 Service Unavailable",
            "text/plain",
            "it ends\n".to_owned(),
        ),
        (Some("GET"), Some("/metrics"), Some(text)) => ("200 OK", prometheus::TEXT_FORMAT, text),
        (Some("GET"), _, _) => ("404 Not Found", "text/plain", "GET /metrics\n".to_owned()),
        _ => (
            "405 Method Not Allowed",
            "text/plain",
            "GET /metrics\n".to_owned(),
        ),
    };
    write!(
        client,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_file_is_written_through_no_link_that_somebody_has_put_there() {
        let place = tempfile::tempdir().unwrap();
        let victim = place.path().join("victim");
        fs::write(&victim, "as it was").unwrap();
        let file = place.path().join("barleased.prom");
        for name in ["barleased.prom", "barleased.prom.part"] {
            let link = place.path().join(name);
            let _ = fs::remove_file(&link);
            symlink(&victim, &link).unwrap();
            write(&file, "new\n").unwrap();
            assert_eq!(fs::read_to_string(&victim).unwrap(), "as it was", "{name}");
            assert_eq!(fs::read_to_string(&file).unwrap(), "new\n", "{name}");
            assert!(fs::symlink_metadata(&file).unwrap().is_file());
        }
    }
}
