//! `barlease top` on a pseudo-terminal.

use std::num::NonZero;
use std::process::Child;
use std::process::Stdio;
use std::time::Instant;

use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::fs::Mode;
use rustix::fs::OFlags;
use rustix::process::Pid;
use rustix::process::Signal;
use rustix::pty;
use rustix::pty::OpenptFlags;
use rustix::termios::Termios;
use rustix::termios::Winsize;

use super::A_WHILE;
use super::Daemon;

fn at_least_one(number: u16) -> NonZero<u16> {
    NonZero::new(number).unwrap()
}

/// A command on a terminal of its own.
struct Terminal {
    child: Child,
    master: std::os::fd::OwnedFd,
    slave: std::os::fd::OwnedFd,
    screen: vt100::Parser,
    seen: Vec<u8>,
}

impl Terminal {
    fn start(daemon: &Daemon, environment: &[(&str, &str)]) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = pty::openpt(flags).unwrap();
        pty::unlockpt(&master).unwrap();
        let name = pty::ptsname(&master, Vec::new()).unwrap();
        let slave = rustix::fs::open(
            name,
            OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .unwrap();
        let other = || Stdio::from(slave.try_clone().unwrap());
        let arguments = ["top", "--interval", "1s"];
        let mut command = daemon.command(&arguments);
        command
            .env_remove("NO_COLOR")
            .env("TERM", "xterm-256color")
            .envs(environment.iter().copied())
            .stdin(other())
            .stdout(other());
        let mut terminal = Self {
            child: command.spawn().unwrap(),
            master,
            slave,
            screen: vt100::Parser::new(at_least_one(24), at_least_one(80), 0),
            seen: Vec::new(),
        };
        terminal.resize(24, 80);
        terminal
    }

    fn resize(&mut self, rows: u16, columns: u16) {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(&self.slave, size).unwrap();
        self.screen
            .screen_mut()
            .set_size(at_least_one(rows), at_least_one(columns));
        // It is nobody's controlling terminal, so the kernel tells nobody.
        rustix::process::kill_process(Pid::from_child(&self.child), Signal::WINCH).unwrap();
    }

    /// Reads until the screen is so.
    fn shows(&mut self, what: &str, so: impl Fn(&str) -> bool) -> String {
        let began = Instant::now();
        loop {
            let text = self.screen.screen().contents();
            if so(&text) {
                return text;
            }
            assert!(began.elapsed() < A_WHILE, "never {what}: {text}");
            self.read();
        }
    }

    /// Takes what comes, for a while; `false`: nobody writes any more.
    fn read(&mut self) -> bool {
        let mut set = [PollFd::new(&self.master, PollFlags::IN)];
        let wait = Timespec {
            tv_sec: 0,
            tv_nsec: 50_000_000,
        };
        if rustix::event::poll(&mut set, Some(&wait)).unwrap() == 0 {
            return self.child.try_wait().unwrap().is_none();
        }
        let mut bytes = [0; 4096];
        let read = rustix::io::read(&self.master, &mut bytes).unwrap();
        self.screen.process(&bytes[..read]);
        self.seen.extend(&bytes[..read]);
        true
    }

    /// Its end, with the terminal as it was before.
    fn ends(&mut self, before: &Termios) {
        while self.read() {}
        assert!(self.child.wait().unwrap().success());
        let screen = self.screen.screen();
        assert!(!screen.alternate_screen() && !screen.hide_cursor());
        let after = rustix::termios::tcgetattr(&self.slave).unwrap();
        assert_eq!(after.local_modes, before.local_modes);
        assert_eq!(after.output_modes, before.output_modes);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It has ended, unless the test fails.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn top_draws_bars_and_gives_the_terminal_back() {
    let daemon = Daemon::start();
    let mut holder = daemon.spawn(&["lease", "acquire", "rows", "32K"]);
    assert!(holder.line().starts_with("granted"));
    let mut terminal = Terminal::start(&daemon, &[]);
    let before = rustix::termios::tcgetattr(&terminal.slave).unwrap();
    let strip = |width: usize| {
        format!(
            "{}{}{}",
            "A".repeat(width / 4),
            ".".repeat(width / 4),
            "-".repeat(width / 2)
        )
    };
    terminal.shows("a strip of 80 columns", |text| text.contains(&strip(80)));
    let screen = terminal.screen.screen();
    assert!(screen.alternate_screen() && screen.hide_cursor());
    let row = screen
        .rows(0, 80)
        .position(|row| row.starts_with("AAAA"))
        .unwrap();
    let cell = screen.cell(u16::try_from(row).unwrap(), 0).unwrap();
    assert_ne!(cell.bgcolor(), vt100::Color::Default);
    assert!(screen.contents().contains("1 leases  0 waiting"));
    // Somebody comes while it looks.
    let mut other = daemon.spawn(&["lease", "acquire", "rows", "64K", "--wait", "1m"]);
    terminal.shows("who waits", |text| {
        text.contains("1 waiting") && text.contains("\n> ")
    });
    terminal.resize(12, 40);
    terminal.shows("a strip of 40 columns", |text| text.contains(&strip(40)));
    rustix::io::write(&terminal.master, b"s").unwrap();
    terminal.shows("the key", |text| {
        text.lines().last().unwrap().contains("left/right")
    });
    holder.signal(Signal::TERM);
    assert!(other.line().starts_with("granted lease 2"));
    terminal.shows("the new holder", |text| text.contains(&"A".repeat(20)));
    rustix::io::write(&terminal.master, b"q").unwrap();
    terminal.ends(&before);
    other.signal(Signal::TERM);
}

#[test]
fn top_gives_the_terminal_back_however_it_ends() {
    let daemon = Daemon::start();
    let interrupt = |terminal: &Terminal| {
        rustix::io::write(&terminal.master, b"\x03").unwrap();
    };
    let end = |terminal: &Terminal| {
        rustix::process::kill_process(Pid::from_child(&terminal.child), Signal::TERM).unwrap();
    };
    for way in [&interrupt as &dyn Fn(&Terminal), &end] {
        let mut terminal = Terminal::start(&daemon, &[("NO_COLOR", "1")]);
        let before = rustix::termios::tcgetattr(&terminal.slave).unwrap();
        terminal.shows("a picture", |text| text.contains("q quit"));
        let coloured = |seen: &[u8]| {
            seen.windows(5)
                .any(|it| it == b"\x1b[48;" || it == b"\x1b[38;")
        };
        assert!(!coloured(&terminal.seen));
        way(&terminal);
        terminal.ends(&before);
    }
}

#[test]
fn top_without_a_terminal_prints_one_picture_or_says_so() {
    let daemon = Daemon::start();
    let text = daemon.text(&["top", "--once"]);
    assert!(text.contains("card BAR 2 128K: rows 0%"), "{text}");
    assert!(!text.contains('\x1b'));
    let (code, said) = daemon.failure(&["top"]);
    assert_eq!((code, said.contains("no terminal")), (2, true), "{said}");
    let (code, said) = daemon.failure(&["top", "--service", "/nonexistent/x"]);
    assert_eq!(code, 2, "{said}");
    let (code, said) = daemon.failure(&["top", "--once", "--service", "/nonexistent/x"]);
    assert_eq!((code, said.contains("connect: ")), (1, true), "{said}");
}
