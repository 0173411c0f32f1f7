//! `barlease top`: a live view of the service in the terminal.
//!
//! [`data`] asks the service, [`draw`] makes a picture of it, [`screen`] is the terminal. Of the
//! libraries for this, those of today need a newer Rust than the command does, and those for its
//! Rust are not kept up; a picture is lines of text with a style.

mod data;
mod draw;
mod screen;
mod strip;

use std::io;
use std::io::IsTerminal;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use nix::sys::signal::SigSet;
use nix::sys::signal::Signal;
use nix::sys::signalfd::SfdFlags;
use nix::sys::signalfd::SignalFd;
use rustix::event::PollFd;
use rustix::event::PollFlags;

use self::data::Source;
use self::data::View;
use self::draw::Picture;
use self::draw::Ui;
use self::screen::Key;
use self::screen::Screen;
use crate::failure::Failure;
use crate::names;
use crate::output::Output;
use crate::service::args::Service;

/// Columns and lines where no terminal says how many.
const SIZE: (u16, u16) = (80, 24);

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct TopArgs {
    /// Time between two pictures
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = names::duration)]
    interval: Duration,
    /// Print one picture as text, and end
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    service: Service,
}

pub(crate) fn run(args: &TopArgs, output: Output) -> Result<(), Failure> {
    if output.is_json() {
        return Err(Failure::usage(
            "top: it is for people (`barlease lease list --json` and `barlease monitor` are not)",
        ));
    }
    let is_terminal = io::stdout().is_terminal();
    if !args.once && !is_terminal {
        return Err(Failure::usage(
            "top: standard output is no terminal (--once prints one picture)",
        ));
    }
    let mut source = Source::new(args.service.socket.clone());
    // A service that cannot be asked at all fails before the screen is taken.
    let view = source.ask()?;
    let mut ui = Ui::new(!no_color());
    if args.once {
        let (width, _) = if is_terminal { screen::size() } else { SIZE };
        let height = u16::MAX;
        let picture = ui.draw(&view, width, height);
        return Ok(picture.print(&mut io::stdout().lock())?);
    }
    watch(args.interval, source, view, ui)
}

/// The wish of a user, <https://no-color.org>, and of a terminal that can do nothing.
fn no_color() -> bool {
    let asked = std::env::var_os("NO_COLOR").is_some_and(|it| !it.is_empty());
    asked || std::env::var_os("TERM").is_none_or(|term| term == "dumb")
}

fn watch(interval: Duration, source: Source, view: View, mut ui: Ui) -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::new(format!("top: terminal: {error}"));
    // Before there are threads, which inherit the mask.
    let signals = signals().map_err(|errno| failed(errno.into()))?;
    let current = Arc::new(Mutex::new(view));
    let (fresh, news) = UnixStream::pair().map_err(failed)?;
    fresh.set_nonblocking(true).map_err(failed)?;
    let asked = current.clone();
    thread::Builder::new()
        .spawn(move || ask_on(interval, source, &asked, &news))
        .map_err(failed)?;
    let mut screen = Screen::enter(io::stdout()).map_err(failed)?;
    let stdin = io::stdin();
    let reads = stdin.is_terminal();
    loop {
        let view = current.lock().unwrap_or_else(|it| it.into_inner()).clone();
        let (width, height) = screen::size();
        let picture: Picture = ui.draw(&view, width, height);
        screen.show(&picture).map_err(failed)?;
        let mut set = vec![
            PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(fresh.as_fd(), PollFlags::IN),
        ];
        if reads {
            set.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN));
        }
        match rustix::event::poll(&mut set, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        let ready: Vec<bool> = set.iter().map(|fd| !fd.revents().is_empty()).collect();
        while let Ok(Some(signal)) = signals.read_signal() {
            if signal.ssi_signo != Signal::SIGWINCH as u32 {
                return Ok(());
            }
        }
        // One picture for all that is new.
        while matches!(io::Read::read(&mut (&fresh), &mut [0; 64]), Ok(1..)) {}
        if ready.get(2) == Some(&true) {
            let Some(keys) = screen::keys(&stdin).map_err(failed)? else {
                // The terminal is gone.
                return Ok(());
            };
            for key in keys {
                if key == Key::Quit {
                    return Ok(());
                }
                ui.press(key);
            }
        }
    }
}

fn signals() -> nix::Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGWINCH,
    ] {
        set.add(signal);
    }
    set.thread_block()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
}

/// Asks again and again, until nobody wants to know.
fn ask_on(interval: Duration, mut source: Source, view: &Mutex<View>, mut news: &UnixStream) {
    loop {
        thread::sleep(interval);
        let asked = source.ask();
        let mut view = view.lock().unwrap_or_else(|it| it.into_inner());
        match asked {
            Ok(fresh) => *view = fresh,
            // The last view stays, with a note that it is old.
            Err(failure) => view.trouble = Some(failure.to_string()),
        }
        drop(view);
        if news.write_all(&[0]).is_err() {
            return;
        }
    }
}
