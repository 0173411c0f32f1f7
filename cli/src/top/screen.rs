//! The terminal: taken, drawn on, and given back however the program ends.

use std::io;
use std::io::Write;
use std::os::fd::AsFd;
use std::panic;

use crossterm::cursor;
use crossterm::queue;
use crossterm::style::Attribute;
use crossterm::style::Color;
use crossterm::style::Print;
use crossterm::style::SetAttribute;
use crossterm::style::SetBackgroundColor;
use crossterm::style::SetForegroundColor;
use crossterm::terminal;
use crossterm::terminal::ClearType;

use super::SIZE;
use super::draw::Picture;
use super::draw::Style;

/// Backgrounds of holders. Black is written on all of them.
const COLORS: [Color; 6] = [
    Color::Green,
    Color::Cyan,
    Color::Yellow,
    Color::Magenta,
    Color::Blue,
    Color::White,
];

/// Something that a user wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    Quit,
    Up,
    Down,
    PageUp,
    PageDown,
    /// The column before, or behind, is sorted by.
    Left,
    Right,
}

/// Columns and lines.
pub(super) fn size() -> (u16, u16) {
    match terminal::size() {
        Ok((width, height)) if width != 0 && height != 0 => (width, height),
        _ => SIZE,
    }
}

/// The keys that were pressed; `None`: there is no terminal any more.
pub(super) fn keys(terminal: impl AsFd) -> io::Result<Option<Vec<Key>>> {
    let mut bytes = [0; 256];
    match rustix::io::read(terminal, &mut bytes) {
        Ok(0) | Err(rustix::io::Errno::IO) => Ok(None),
        Ok(read) => Ok(Some(parse(bytes.get(..read).unwrap_or_default()))),
        Err(rustix::io::Errno::INTR) => Ok(Some(Vec::new())),
        Err(errno) => Err(errno.into()),
    }
}

/// Keys by the bytes that a terminal sends for them. Others are passed over.
fn parse(mut bytes: &[u8]) -> Vec<Key> {
    const KEYS: [(&[u8], Key); 18] = [
        (b"\x1b[A", Key::Up),
        (b"\x1bOA", Key::Up),
        (b"k", Key::Up),
        (b"\x1b[B", Key::Down),
        (b"\x1bOB", Key::Down),
        (b"j", Key::Down),
        (b"\x1b[C", Key::Right),
        (b"\x1bOC", Key::Right),
        (b"s", Key::Right),
        (b"\x1b[D", Key::Left),
        (b"\x1bOD", Key::Left),
        (b"\x1b[5~", Key::PageUp),
        (b"\x1b[6~", Key::PageDown),
        (b" ", Key::PageDown),
        (b"q", Key::Quit),
        (b"Q", Key::Quit),
        // Ctrl-C and Ctrl-D, which are no signals in raw mode.
        (b"\x03", Key::Quit),
        (b"\x04", Key::Quit),
    ];
    let mut keys = Vec::new();
    while !bytes.is_empty() {
        match KEYS.iter().find(|(sent, _)| bytes.starts_with(sent)) {
            Some((sent, key)) => {
                keys.push(*key);
                bytes = bytes.get(sent.len()..).unwrap_or_default();
            }
            None => bytes = bytes.get(unknown(bytes)..).unwrap_or_default(),
        }
    }
    keys
}

/// Length of something that is no key of ours: a sequence ends with a letter or `~`.
fn unknown(bytes: &[u8]) -> usize {
    match bytes {
        [0x1b, b'[', rest @ ..] => {
            let end = rest.iter().position(|byte| (0x40..=0x7e).contains(byte));
            end.map_or(bytes.len(), |end| end + 3)
        }
        _ => 1,
    }
}

/// The terminal, while it is ours.
pub(super) struct Screen<W: Write> {
    out: W,
}

impl<W: Write> Screen<W> {
    pub(super) fn enter(out: W) -> io::Result<Self> {
        terminal::enable_raw_mode()?;
        // A message of a panic is to be read afterwards.
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            // It may be gone.
            let _ = leave(&mut io::stdout());
            before(info);
        }));
        let mut screen = Self { out };
        queue!(screen.out, terminal::EnterAlternateScreen, cursor::Hide)?;
        screen.out.flush()?;
        Ok(screen)
    }

    pub(super) fn show(&mut self, picture: &Picture) -> io::Result<()> {
        let out = &mut self.out;
        queue!(out, terminal::BeginSynchronizedUpdate)?;
        for (number, line) in (0..).zip(&picture.lines) {
            queue!(out, cursor::MoveTo(0, number))?;
            for (style, text) in line {
                begin(out, *style, picture.colour)?;
                queue!(out, Print(text))?;
                if *style != Style::Plain {
                    queue!(out, SetAttribute(Attribute::Reset))?;
                }
            }
            queue!(out, terminal::Clear(ClearType::UntilNewLine))?;
        }
        queue!(
            out,
            terminal::Clear(ClearType::FromCursorDown),
            terminal::EndSynchronizedUpdate
        )?;
        out.flush()
    }
}

fn begin(out: &mut impl Write, style: Style, colour: bool) -> io::Result<()> {
    match style {
        Style::Plain => Ok(()),
        Style::Bold => queue!(out, SetAttribute(Attribute::Bold)),
        Style::Head => queue!(out, SetAttribute(Attribute::Reverse)),
        Style::Alarm if colour => queue!(
            out,
            SetForegroundColor(Color::Black),
            SetBackgroundColor(Color::Red)
        ),
        Style::Alarm => queue!(out, SetAttribute(Attribute::Reverse)),
        Style::Holder(number) if colour => queue!(
            out,
            SetForegroundColor(Color::Black),
            SetBackgroundColor(COLORS[number % COLORS.len()])
        ),
        Style::Holder(_) => Ok(()),
    }
}

/// Gives the terminal back as it was.
fn leave(out: &mut impl Write) -> io::Result<()> {
    queue!(
        out,
        terminal::EndSynchronizedUpdate,
        SetAttribute(Attribute::Reset),
        cursor::Show,
        terminal::LeaveAlternateScreen
    )?;
    out.flush()?;
    terminal::disable_raw_mode()
}

impl<W: Write> Drop for Screen<W> {
    fn drop(&mut self) {
        // It may be gone.
        let _ = leave(&mut self.out);
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::process::Stdio;

    use rustix::fs::Mode;
    use rustix::fs::OFlags;
    use rustix::pty;
    use rustix::pty::OpenptFlags;

    use super::*;

    #[test]
    fn keys_are_known_and_others_passed_over() {
        assert_eq!(parse(b"q"), [Key::Quit]);
        assert_eq!(parse(b"\x03"), [Key::Quit]);
        assert_eq!(parse(b"\x1b[A\x1bOBj"), [Key::Up, Key::Down, Key::Down]);
        // F5, Ctrl-right, an unfinished sequence, and other letters.
        assert_eq!(parse(b"\x1b[15~x\x1b[1;5Cs\x1b["), [Key::Right]);
        assert_eq!(parse(b"\xc3\xa4\x1b"), []);
    }

    /// Not a test: the process of the next one.
    #[test]
    #[ignore = "panics on a terminal"]
    fn panics() {
        let _screen = Screen::enter(io::stdout()).unwrap();
        panic!("on purpose");
    }

    #[test]
    fn a_panic_gives_the_terminal_back_and_is_read_afterwards() {
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
        let modes = || rustix::termios::tcgetattr(&slave).unwrap().local_modes;
        let before = modes();
        let child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "top::screen::tests::panics",
                "--ignored",
                "--nocapture",
            ])
            .stdin(slave.try_clone().unwrap())
            .stdout(slave.try_clone().unwrap())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("on purpose"), "{said}");
        assert_eq!(modes(), before);
        let mut bytes = [0; 4096];
        let read = rustix::io::read(&master, &mut bytes).unwrap();
        let drawn = String::from_utf8_lossy(&bytes[..read]);
        let (_, after) = drawn.split_once("\x1b[?1049h").unwrap();
        assert!(
            after.contains("\x1b[?25h") && after.contains("\x1b[?1049l"),
            "{drawn:?}"
        );
    }

    #[test]
    fn a_picture_is_drawn_line_by_line_and_colours_are_left_out_on_request() {
        let picture = |colour| Picture {
            lines: vec![
                vec![(Style::Head, "head".into())],
                vec![(Style::Holder(1), "B".into()), (Style::Plain, " x".into())],
            ],
            colour,
        };
        let drawn = |colour| {
            // Not given back: it was not taken.
            let mut screen = std::mem::ManuallyDrop::new(Screen { out: Vec::new() });
            screen.show(&picture(colour)).unwrap();
            String::from_utf8(screen.out.clone()).unwrap()
        };
        let plain = drawn(false);
        assert!(
            plain.contains("\x1b[1;1H\x1b[7mhead\x1b[0m\x1b[K"),
            "{plain:?}"
        );
        assert!(plain.contains("\x1b[2;1HB\x1b[0m x\x1b[K"), "{plain:?}");
        assert!(
            drawn(true).contains("\x1b[48;5;14mB\x1b[0m"),
            "{:?}",
            drawn(true)
        );
    }
}
