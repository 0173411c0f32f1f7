//! The second act: the daemon owns the adapter, and tenants ask it for rows.

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use barlease::{Bdf, Lease};
use barlease_proto::{Access, Acquire, Client, Lifetime};

use crate::adapter::{HEIGHT, MODE, PITCH};
use crate::owner::{Holder, PATIENCE, screenshot};
use crate::picture::Picture;
use crate::transcript::{Transcript, human};

/// Says that this program, started again, is the daemon: its child is started with words of its own.
pub(crate) const DAEMON: &str = "BARLEASE_DEMO_DAEMON";
const DIRECTORY: &str = "/run/barleased";
/// Rows that a tenant asks for. The last of them wants twice as many.
const ROWS: usize = HEIGHT / 3;

/// The daemon's socket.
pub(crate) fn socket() -> PathBuf {
    Path::new(DIRECTORY).join("leases.sock")
}

/// Is the daemon.
pub(crate) fn daemon() -> ExitCode {
    barleased::run(std::env::args_os(), &barleased::device::open)
}

pub(crate) fn run(bdf: Bdf, transcript: &Transcript) -> Result<()> {
    transcript.part("5. A daemon owns the adapter; tenants of other users ask it for rows");
    let daemon = Daemon::start(bdf)?;
    transcript.say("barleased", "opens the adapter and serves, by a policy");
    let mut console = daemon.client()?;
    set_mode(&mut console)?;
    transcript.say("console (uid 0)", "leases the registers, sets 1024x768");
    let mut painter = tenant("painter (uid 1001)", 1001, Picture::Sunset, ROWS)?;
    painter.expect("holds", transcript)?;
    let mut weaver = tenant("weaver (uid 1002)", 1002, Picture::Bands, ROWS)?;
    weaver.expect("holds", transcript)?;
    for holder in [&mut painter, &mut weaver] {
        holder.expect("ready", transcript)?;
        holder.draw(10)?;
    }
    killed(&daemon, &mut painter, &mut weaver, transcript)?;

    transcript.part("7. A tenant asks for too much, and a tenant is killed");
    let mut newcomer = tenant("newcomer (uid 1003)", 1003, Picture::Rings, 2 * ROWS)?;
    let (_, refusal) = newcomer.expect_at("refused")?;
    transcript.say(newcomer.who, &format!("wants {} rows: {refusal}", 2 * ROWS));
    transcript.say(newcomer.who, "waits in line");
    screenshot(transcript, "4-tenants")?;
    weaver.draw(5)?;
    let killed = Instant::now();
    painter.kill()?;
    let (holds, _) = newcomer.expect_at("holds")?;
    transcript.say(
        newcomer.who,
        &format!(
            "has the painter's rows and those that were free {} after the painter was killed",
            human(holds - killed)
        ),
    );
    newcomer.expect("ready", transcript)?;
    newcomer.draw(10)?;
    weaver.draw(5)?;
    transcript.say(
        weaver.who,
        &format!("never stopped: {} frames", weaver.frames),
    );
    screenshot(transcript, "5-after")?;
    newcomer.stop(transcript)?;
    weaver.stop(transcript)?;
    daemon.end()
}

/// The daemon is killed while they draw.
fn killed(
    daemon: &Daemon,
    painter: &mut Holder,
    weaver: &mut Holder,
    transcript: &Transcript,
) -> Result<()> {
    transcript.part("6. The daemon is killed while they draw");
    let before = daemon.child()?;
    let leases = ids(&mut daemon.client()?)?;
    let start = Instant::now();
    kill(before, rustix::process::Signal::KILL)?;
    for holder in [&mut *painter, &mut *weaver] {
        holder.draw(10)?;
    }
    let after = until("it serves again", || {
        let after = daemon.child().ok().filter(|after| *after != before)?;
        daemon.client().ok()?.list(None).ok()?;
        Some(after)
    })?;
    transcript.say(
        "barleased",
        &format!(
            "process {before} is killed with -9; {after} has its devices and its ledger, and answers {} later",
            human(start.elapsed())
        ),
    );
    ensure!(ids(&mut daemon.client()?)? == leases, "leases came or went");
    for holder in [painter, weaver] {
        holder.draw(5)?;
        transcript.say(
            holder.who,
            &format!("has not noticed: {} frames so far", holder.frames),
        );
    }
    Ok(())
}

fn ids(client: &mut Client) -> Result<Vec<u64>> {
    let leases = client.list(None).context("list the leases")?;
    Ok(leases.iter().map(|lease| lease.lease).collect())
}

/// Sets a mode, with the registers that a lease has.
fn set_mode(console: &mut Client) -> Result<()> {
    let acquire = Acquire {
        lifetime: Some(Lifetime::Holders),
        ..Acquire::of_pool("registers", 4096, Access::ReadWrite)
    };
    let (_, fd) = console.acquire(&acquire).context("lease the registers")?;
    let registers = Lease::from_fd(fd)?.map()?;
    for (offset, value) in MODE {
        registers.write(usize::try_from(offset)?, value)?;
    }
    Ok(())
}

fn tenant(who: &'static str, uid: u32, picture: Picture, rows: usize) -> Result<Holder> {
    let rows = rows.to_string();
    Holder::spawn(who, uid, &["tenant", picture.name(), who, &rows])
}

/// The keeper of the daemon.
struct Daemon {
    keeper: Child,
}

impl Daemon {
    fn start(bdf: Bdf) -> Result<Self> {
        let policy = Path::new(DIRECTORY).join("policy");
        fs::create_dir_all(&policy)?;
        let bytes = HEIGHT * PITCH;
        let text = format!(
            "[device.display]\nmatch = \"{bdf}\"\n\n\
             [pool.rows]\ndevice = \"display\"\nbar = 0\nlength = {bytes}\nunit = {PITCH}\n\
             contents = \"memory\"\n\n\
             [pool.registers]\ndevice = \"display\"\nbar = 2\nunit = 4096\n\n\
             [[allow]]\npools = [\"rows\"]\nwho = {{ user = [1001, 1002, 1003] }}\n\
             access = \"read-write\"\nlifetime = [\"process\"]\nqueue = \"1m\"\n\n\
             [[allow]]\npools = [\"registers\"]\nwho = {{ user = 0 }}\n\
             access = \"read-write\"\nlifetime = [\"holders\"]\n"
        );
        fs::write(policy.join("demo.toml"), text)?;
        let words: [OsString; 5] = [
            "--keep".into(),
            "--policy".into(),
            policy.into(),
            "--socket".into(),
            DIRECTORY.into(),
        ];
        let keeper = Command::new("/proc/self/exe")
            .arg0("barleased")
            .args(words)
            .env(DAEMON, "1")
            .spawn()
            .context("start the daemon")?;
        let daemon = Self { keeper };
        until("the daemon serves", || daemon.client().ok())?;
        Ok(daemon)
    }

    fn client(&self) -> Result<Client> {
        let client = Client::connect(socket())?;
        client.set_timeout(Some(PATIENCE))?;
        Ok(client)
    }

    /// The process that serves.
    fn child(&self) -> Result<u32> {
        let keeper = self.keeper.id();
        let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children"))?;
        Ok(children.trim().parse()?)
    }

    fn end(mut self) -> Result<()> {
        kill(self.keeper.id(), rustix::process::Signal::TERM)?;
        let status = self.keeper.wait()?;
        ensure!(status.success(), "the daemon ended with {status}");
        Ok(())
    }
}

fn kill(process: u32, signal: rustix::process::Signal) -> Result<()> {
    let process = rustix::process::Pid::from_raw(i32::try_from(process)?).context("a process")?;
    Ok(rustix::process::kill_process(process, signal)?)
}

fn until<R>(what: &str, mut so: impl FnMut() -> Option<R>) -> Result<R> {
    let start = Instant::now();
    loop {
        if let Some(found) = so() {
            return Ok(found);
        }
        ensure!(start.elapsed() < PATIENCE, "never: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}
