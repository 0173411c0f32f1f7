//! The owner: holds the device, grants leases and takes them back.

use std::io::{BufRead, BufReader};
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use barlease::{Bdf, Lease, pci::Pci};
use barlease_lab::guest;
use embedded_graphics::pixelcolor::Rgb888;

use crate::adapter::{Adapter, FRAME_BUFFER, HEIGHT, PITCH};
use crate::picture::{Frame, Picture};
use crate::service;
use crate::transcript::{Transcript, human, timed};

/// The rows of the first lease.
const TOP: Range<usize> = 0..448;
/// The rows of the owner's own line.
const STATUS: Range<usize> = 448..480;
/// The rows of the second lease: three ranges, with a gap between each.
const BANDS: [Range<usize>; 3] = [496..560, 592..656, 688..752];

/// The colour that the owner fills revoked rows with.
const BLANK: u8 = 0x38;
/// How long it then watches that they stay so.
const WATCH: Duration = Duration::from_millis(300);
/// How long a holder may take for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A process that has a lease.
pub(crate) struct Holder {
    pub(crate) who: &'static str,
    child: Child,
    /// Keeps it drawing; dropped to end it.
    socket: UnixStream,
    messages: Receiver<(Instant, String)>,
    pub(crate) frames: usize,
}

pub(crate) fn run() -> Result<()> {
    let transcript = Transcript::start();
    let display = guest::device("display").context("find the display adapter")?;
    let bdf: Bdf = display.bdf.parse()?;
    first_act(bdf, &transcript)?;
    service::run(bdf, &transcript)
}

fn first_act(bdf: Bdf, transcript: &Transcript) -> Result<()> {
    transcript.part("1. An owner holds the device, and leases rows of its frame buffer");
    let (bound, time) = timed(|| Pci::system().bind(bdf, "barlease-vfio-pci"));
    bound?;
    transcript.say(
        "owner (uid 0)",
        &format!("binds {bdf} to barlease-vfio-pci ({})", human(time)),
    );
    let adapter = Adapter::open(bdf)?;
    adapter.screen.fill(0..HEIGHT * PITCH, 0)?;
    status(&adapter, "owner (uid 0): holds the VFIO device fd")?;
    transcript.say(
        "owner (uid 0)",
        "opens it, sets 1024x768, clears the screen",
    );

    let (first, time) = timed(|| lease(&adapter, &[TOP]));
    let first = first?;
    transcript.say(
        "owner (uid 0)",
        &format!(
            "leases rows 0-447: 1 range of BAR 0, {} KiB ({})",
            first.size() >> 10,
            human(time)
        ),
    );
    let (second, time) = timed(|| lease(&adapter, &BANDS));
    let second = second?;
    transcript.say(
        "owner (uid 0)",
        &format!(
            "leases three bands: 3 ranges in one lease, {} KiB ({})",
            second.size() >> 10,
            human(time)
        ),
    );
    let mut painter = Holder::start("painter (uid 1001)", 1001, Picture::Sunset, &first)?;
    let mut weaver = Holder::start("weaver (uid 1002)", 1002, Picture::Bands, &second)?;
    for holder in [&mut painter, &mut weaver] {
        holder.expect("holds", transcript)?;
    }
    for holder in [&mut painter, &mut weaver] {
        holder.expect("ready", transcript)?;
    }
    for holder in [&mut painter, &mut weaver] {
        holder.draw(20)?;
        transcript.say(
            holder.who,
            &format!("has drawn {} frames through its own mapping", holder.frames),
        );
    }
    screenshot(transcript, "1-before")?;

    transcript.part("2. The owner revokes the first lease while its holder is drawing");
    painter.draw(5)?;
    let revoked = Instant::now();
    let (result, time) = timed(|| adapter.device.revoke(&first));
    result?;
    transcript.say(
        "owner (uid 0)",
        &format!("revokes it: the ioctl returns after {}", human(time)),
    );
    adapter
        .screen
        .fill(TOP.start * PITCH..TOP.end * PITCH, BLANK)?;
    status(&adapter, "owner (uid 0): lease of rows 0-447 REVOKED")?;
    let (noticed, loss) = painter.expect_at("lost")?;
    transcript.say(
        painter.who,
        &format!(
            "finds out {} after the call began, {loss}",
            human(noticed - revoked)
        ),
    );
    painter.expect("again", transcript)?;
    thread::sleep(WATCH);
    let changed = adapter.changed(TOP, BLANK)?;
    ensure!(
        changed == 0,
        "{changed} bytes of the revoked rows were written after the revocation"
    );
    transcript.say(
        "owner (uid 0)",
        &format!(
            "filled the rows and watched them for {}: 0 bytes changed",
            human(WATCH)
        ),
    );
    painter.end(transcript)?;
    write(
        &adapter,
        TOP.start + 200,
        "revoked: these rows are the owner's again",
    )?;
    let before = weaver.frames;
    weaver.draw(20)?;
    transcript.say(
        weaver.who,
        &format!(
            "never stopped: {} frames before, {} now",
            before, weaver.frames
        ),
    );
    screenshot(transcript, "2-revoked")?;

    transcript.part("3. The same rows are leased again, to somebody else");
    let (third, time) = timed(|| lease(&adapter, &[TOP]));
    let third = third?;
    status(&adapter, "owner (uid 0): rows 0-447 leased again")?;
    transcript.say(
        "owner (uid 0)",
        &format!("leases rows 0-447 again ({})", human(time)),
    );
    let mut newcomer = Holder::start("newcomer (uid 1003)", 1003, Picture::Rings, &third)?;
    newcomer.expect("holds", transcript)?;
    newcomer.expect("ready", transcript)?;
    newcomer.draw(20)?;
    transcript.say(
        newcomer.who,
        &format!("has drawn {} frames", newcomer.frames),
    );
    screenshot(transcript, "3-after")?;

    transcript.part("4. Everything comes back");
    for (holder, lease) in [(newcomer, &third), (weaver, &second)] {
        adapter.device.revoke(lease)?;
        holder.end(transcript)?;
    }
    let buffers = std::fs::read_to_string(format!("/sys/kernel/debug/barlease/{bdf}/buffers"))?;
    println!("\n/sys/kernel/debug/barlease/{bdf}/buffers");
    print!("{buffers}");
    Ok(())
}

/// Leases rows, as one lease.
fn lease(adapter: &Adapter, rows: &[Range<usize>]) -> Result<Lease> {
    let mut export = adapter.device.export(FRAME_BUFFER).writable();
    for rows in rows {
        let offset = (rows.start * PITCH) as u64;
        export = export.range(offset..offset + (rows.len() * PITCH) as u64);
    }
    Ok(export.export()?)
}

/// Writes the owner's line, through the owner's own mapping of the BAR.
fn status(adapter: &Adapter, text: &str) -> Result<()> {
    write(adapter, STATUS.start, text)
}

fn write(adapter: &Adapter, top: usize, text: &str) -> Result<()> {
    let mut frame = Frame::new(STATUS.len());
    frame.caption(20, 22, text, Rgb888::new(255, 214, 120));
    for row in 0..frame.height() {
        adapter
            .screen
            .copy_from((top + row) * PITCH, frame.row(row))?;
    }
    Ok(())
}

pub(crate) fn screenshot(transcript: &Transcript, name: &str) -> Result<()> {
    let path = guest::screenshot(name).context("take a picture of the display")?;
    transcript.say("(display)", &path);
    Ok(())
}

impl Holder {
    /// Starts this program as another user, and sends it the lease.
    fn start(who: &'static str, uid: u32, picture: Picture, lease: &Lease) -> Result<Self> {
        let holder = Self::spawn(who, uid, &["holder", picture.name(), who])?;
        lease
            .send(&holder.socket)
            .with_context(|| format!("send a lease to {who}"))?;
        Ok(holder)
    }

    /// Starts this program as another user.
    pub(crate) fn spawn(who: &'static str, uid: u32, words: &[&str]) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let child = Command::new("/proc/self/exe")
            .args(words)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .uid(uid)
            .gid(uid)
            .spawn()
            .with_context(|| format!("start {who}"))?;
        let (sender, messages) = mpsc::channel();
        let reader = BufReader::new(ours.try_clone()?);
        thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                if sender.send((Instant::now(), line)).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            who,
            child,
            socket: ours,
            messages,
            frames: 0,
        })
    }

    /// The next message that is not about a frame.
    pub(crate) fn expect(&mut self, word: &str, transcript: &Transcript) -> Result<()> {
        let (_, rest) = self.expect_at(word)?;
        match word {
            "holds" => {
                let kib = rest.parse::<usize>().unwrap_or(0) >> 10;
                transcript.say(
                    self.who,
                    &format!("receives its lease over a socket and maps {kib} KiB"),
                );
            }
            "again" => transcript.say(
                self.who,
                &format!("is alive; mapping the lease again {rest}"),
            ),
            _ => {}
        }
        Ok(())
    }

    pub(crate) fn expect_at(&mut self, word: &str) -> Result<(Instant, String)> {
        loop {
            let (time, line) = self.next()?;
            match line.split_once(' ').unwrap_or((&line, "")) {
                (first, rest) if first == word => return Ok((time, rest.to_owned())),
                ("frame", _) => {}
                _ => bail!("{} says `{line}` and not `{word}`", self.who),
            }
        }
    }

    /// Waits until it has drawn so many frames from now on.
    pub(crate) fn draw(&mut self, frames: usize) -> Result<()> {
        self.frames += self.messages.try_iter().count();
        let enough = self.frames + frames;
        while self.frames < enough {
            let (_, line) = self.next()?;
            ensure!(
                line.starts_with("frame"),
                "{} says `{line}` and does not draw",
                self.who
            );
        }
        Ok(())
    }

    fn next(&mut self) -> Result<(Instant, String)> {
        let message = self
            .messages
            .recv_timeout(PATIENCE)
            .with_context(|| format!("{} says nothing any more", self.who))?;
        if message.1.starts_with("frame") {
            self.frames += 1;
        }
        Ok(message)
    }

    /// Kills it.
    pub(crate) fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Tells one that has its lease that enough is seen.
    pub(crate) fn stop(self, transcript: &Transcript) -> Result<()> {
        // The thread that reads has a descriptor of its own.
        self.socket.shutdown(Shutdown::Both)?;
        self.end(transcript)
    }

    /// Lets it end, and sees that it ended well.
    pub(crate) fn end(mut self, transcript: &Transcript) -> Result<()> {
        drop(self.socket);
        let status = self.child.wait()?;
        ensure!(status.success(), "{} ended with {status}", self.who);
        transcript.say(self.who, "ends by itself, exit code 0");
        Ok(())
    }
}
