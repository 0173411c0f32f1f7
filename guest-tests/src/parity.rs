//! To a program that uses nothing of ours every answer is stock's: each ioctl of a device, read,
//! write and mmap, with right and wrong arguments, of the same device bound to stock vfio-pci and
//! then to ours. All bytes that come back, sizes and error numbers are compared.
//!
//! `ALLOWED` has the differences that may be, each with its reason.

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use crate::{
    PAGE,
    errno::Answer,
    lease::Request,
    map::{How, READ},
    process,
    vfio::{CONFIG_REGION, Device, GET, LOW_POWER_EXIT, PROBE, SET},
};

const GET_INFO: u64 = 7;
const GET_REGION_INFO: u64 = 8;
const GET_IRQ_INFO: u64 = 9;
const SET_IRQS: u64 = 10;
const RESET: u64 = 11;
const GET_HOT_RESET_INFO: u64 = 12;
const HOT_RESET: u64 = 13;
const IOEVENTFD: u64 = 16;
const FEATURE: u64 = 17;

/// Answers that may differ: how the question begins, and why. All are of the uAPI (`docs/uapi.md`).
const ALLOWED: [(&str, &str); 3] = [
    (
        "feature 11 with unknown open_flags",
        "EINVAL; stock hands any flag to the file",
    ),
    (
        "feature 11 with argsz too small",
        "EINVAL, before the region is looked at; stock reads ranges from behind the argument",
    ),
    (
        "feature 11 of a part of a page",
        "ENODEV for the BAR, whatever the ranges; stock has EINVAL for each of them",
    ),
];

/// One answer: what was asked, and what came of it.
pub type Line = (String, String);

/// The questions to a device.
struct Asker<'a> {
    device: &'a Device,
    lines: Vec<Line>,
}

impl Asker<'_> {
    fn note(&mut self, question: String, answer: String) {
        self.lines.push((question, answer));
    }

    /// An ioctl on words, with something recognisable behind them.
    fn ioctl(&mut self, name: &str, number: u64, words: &[u32]) -> Answer<i32> {
        let mut argument = [0xee; 4096];
        for (place, word) in argument.chunks_mut(4).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        let before = argument;
        let answer = self.device.raw_ioctl(number, &mut argument);
        let mut seen = format!("{answer:?}");
        let changed = argument
            .iter()
            .zip(&before)
            .rposition(|(now, was)| now != was);
        for byte in &argument[..changed.map_or(0, |last| last + 1)] {
            write!(seen, " {byte:02x}").unwrap();
        }
        self.note(format!("{name} {words:x?}"), seen);
        answer
    }

    fn information(&mut self) {
        for argsz in [0, 8, 15, 16, 19, 20, 23, 24, 64, 4096, u32::MAX] {
            let _ = self.ioctl("device info", GET_INFO, &[argsz, 0, 0, 0, 0]);
        }
        for index in (0..=12).chain([15, 16, 255, 1 << 31, u32::MAX]) {
            for argsz in [0, 16, 31, 32, 39, 40, 48, 56, 64, 72, 128, 4096, u32::MAX] {
                let words = [argsz, 0, index, 0, 0, 0, 0, 0];
                let _ = self.ioctl("region info", GET_REGION_INFO, &words);
            }
        }
        for index in (0..=7).chain([u32::MAX]) {
            for argsz in [0, 8, 15, 16, 20, 4096, u32::MAX] {
                let _ = self.ioctl("irq info", GET_IRQ_INFO, &[argsz, 0, index, 0]);
            }
        }
        for argsz in [0, 8, 11, 12, 15, 16, 20, 24, 28, 64, 4096] {
            let _ = self.ioctl("reset set", GET_HOT_RESET_INFO, &[argsz, 0, 0]);
        }
    }

    fn interrupts(&mut self, event: &OwnedFd) {
        let fd = event.as_raw_fd() as u32;
        for index in [0, 1, 2, 3, 4, 5, u32::MAX] {
            for flags in [
                0, 0x20, 0x21, 0x22, 0x24, 0x25, 0x09, 0x0a, 0x11, 0x12, 0x39, 0x80,
            ] {
                for (start, count) in [(0, 0), (0, 1), (1, 1), (0, 9999), (9999, 1), (u32::MAX, 2)]
                {
                    for data in [fd, u32::MAX, 9999] {
                        for argsz in [0, 19, 20, 21, 24] {
                            let words = [argsz, flags, index, start, count, data];
                            let _ = self.ioctl_with_fd(fd, &words);
                        }
                    }
                }
            }
            let _ = self.ioctl("interrupts off", SET_IRQS, &[20, 0x21, index, 0, 0]);
        }
    }

    /// The same, and the number of the fd, which may be another one, does not show.
    fn ioctl_with_fd(&mut self, fd: u32, words: &[u32]) -> Answer<i32> {
        let answer = self.ioctl("set interrupts", SET_IRQS, words);
        let (question, _) = self.lines.last_mut().expect("the line of it");
        if words[5] == fd {
            *question = format!("set interrupts {:x?} eventfd", &words[..5]);
        }
        answer
    }

    fn features(&mut self) {
        for feature in (0..=20).chain([0x7fff, 0xffff]) {
            for operation in [
                0,
                GET,
                SET,
                GET | SET,
                PROBE,
                PROBE | GET,
                PROBE | SET,
                PROBE | GET | SET,
                1 << 19,
                1 << 31 | GET,
            ] {
                for argsz in [0, 4, 7, 8, 9, 12, 16, 20, 24, 32, 40, 64, 4096] {
                    let name = format!(
                        "feature {feature} {}{}{}",
                        if operation & PROBE == 0 { "" } else { "PROBE " },
                        if operation & GET == 0 { "" } else { "GET " },
                        if operation & SET == 0 { "" } else { "SET " },
                    );
                    let words = [argsz, operation | feature, 0, 0, 0, 0, 0, 0, 0, 0];
                    let _ = self.ioctl(&name, FEATURE, &words);
                    // It may have entered low power.
                    let _ = self.device.feature(SET | LOW_POWER_EXIT, &mut []);
                }
            }
        }
    }

    /// The answer of feature 11 to a request: the fd is a dma-buf either way.
    fn dma_bufs(&mut self, when: &str) {
        let flags = [
            0,
            libc::O_RDWR,
            libc::O_CLOEXEC,
            libc::O_WRONLY | libc::O_CLOEXEC,
        ];
        let wrong = [libc::O_APPEND, libc::O_NONBLOCK, 1 << 30, 3, -1];
        let ranges: [&[(u64, u64)]; 12] = [
            &[(0, PAGE)],
            &[(PAGE, PAGE)],
            &[(0, PAGE), (PAGE, PAGE)],
            &[(0, PAGE), (0, PAGE)],
            &[(0, 0)],
            &[(1, PAGE)],
            &[(0, 1)],
            &[(0, 1 << 40)],
            &[(1 << 40, PAGE)],
            &[(u64::MAX - PAGE + 1, PAGE)],
            &[(0, u64::MAX - PAGE + 1)],
            &[(0, PAGE), (0, 0)],
        ];
        let known = libc::O_ACCMODE | libc::O_CLOEXEC;
        for region in (0..=10).chain([u32::MAX]) {
            let size = self.device.region_info(region).map_or(0, |info| info.size);
            for (at, ranges) in ranges.iter().enumerate() {
                for open_flags in flags.into_iter().chain(wrong) {
                    for (flags, number) in [(0, None), (1, None), (0, Some(0)), (0, Some(3))] {
                        let mut request = Request::new(region, ranges);
                        request = request.open_flags(open_flags).flags(flags);
                        if let Some(number) = number {
                            request = request.nr_ranges(number);
                        }
                        let short = number.is_some_and(|number| number as usize > ranges.len());
                        let kind = if open_flags & !known != 0 {
                            "feature 11 with unknown open_flags"
                        } else if short {
                            "feature 11 with argsz too small"
                        } else if region < 6 && (1..PAGE).contains(&size) {
                            "feature 11 of a part of a page"
                        } else {
                            "feature 11 with a request"
                        };
                        let answer = self.device.request(&request).map(drop);
                        self.note(
                            format!(
                                "{kind}, {when}: region {region}, ranges {at}: {:x?}",
                                request.head
                            ),
                            format!("{answer:?}"),
                        );
                    }
                }
            }
        }
    }

    fn others(&mut self) {
        for (argsz, flags, count) in [
            (0, 0, 0),
            (11, 0, 0),
            (12, 0, 0),
            (12, 1, 0),
            (12, 0, 1),
            (16, 0, 1),
            (16, 0, 1000),
            (16, 0, u32::MAX),
        ] {
            let words = [argsz, flags, count, u32::MAX];
            let _ = self.ioctl("hot reset", HOT_RESET, &words);
        }
        for (argsz, flags) in [
            (0, 4),
            (31, 4),
            (32, 0),
            (32, 3),
            (32, 4),
            (32, 16),
            (40, 4),
        ] {
            for region in [0u32, 2, 6, 7, 9] {
                for (low, fd) in [(0, u32::MAX), (0, 9999), (1, u32::MAX), (u32::MAX, 9999)] {
                    let words = [argsz, flags, low, region << 8, 0, 0, fd, 0];
                    let _ = self.ioctl("ioeventfd", IOEVENTFD, &words);
                }
            }
        }
        for number in (0..6).chain([14, 15]).chain(18..48) {
            let _ = self.ioctl(&format!("ioctl {number}"), number, &[0; 16]);
            let _ = self.ioctl(&format!("ioctl {number}"), number, &[64; 16]);
        }
        let _ = self.ioctl("reset", RESET, &[0]);
    }

    fn config_space(&mut self) {
        let size = self.device.function().config().len() as u64;
        for offset in (0..size + 8).step_by(4) {
            self.read(CONFIG_REGION, offset, 4);
        }
        for offset in [0, 1, 2, 3, 5, 0x10, 0x3d, size - 1, size, 1 << 39] {
            for len in [0, 1, 2, 3, 5, 8, 17] {
                self.read(CONFIG_REGION, offset, len);
                let nowhere = self.device.read_to_nowhere(CONFIG_REGION, offset, len);
                self.note(
                    format!("config {offset:#x}+{len} to nowhere"),
                    format!("{nowhere:?}"),
                );
            }
        }
    }

    fn read(&mut self, region: u32, offset: u64, len: usize) {
        let mut bytes = vec![0xee; len];
        let read = self.device.read(region, offset, &mut bytes);
        self.note(
            format!("read {region} {offset:#x}+{len}"),
            format!("{read:?} {bytes:02x?}"),
        );
    }

    /// Accesses of which the bytes do not matter: registers change by themselves.
    fn accesses(&mut self, when: &str) {
        for region in 0..12 {
            if region == CONFIG_REGION {
                continue;
            }
            let size = self.device.region_info(region).map_or(0, |info| info.size);
            // The MSI-X tables of the machine's devices are in here.
            let middle = [0x1ff0, 0x2000, 0x2008, 0x2010, 0x2ffc, 0x3000, 0x3ff8].into_iter();
            let ends = [
                0,
                1,
                4,
                size.saturating_sub(4),
                size.saturating_sub(1),
                size,
                size + 1,
                1 << 39,
                (1 << 40) - 1,
            ];
            for offset in middle.chain(ends) {
                for len in [0, 1, 2, 4, 7, 8, 40, 4104] {
                    let mut bytes = vec![0xee; len];
                    let at = format!("{when}: region {region} {offset:#x}+{len}");
                    let read = self.device.read(region, offset, &mut bytes);
                    self.note(format!("{at} read"), format!("{read:?}"));
                    let read = self.device.read_to_nowhere(region, offset, len);
                    self.note(format!("{at} read to nowhere"), format!("{read:?}"));
                    for readable in [0, 3, 4, 8] {
                        // Of memory only: what is written to a register may have it do something.
                        if readable < len && (readable == 0 || when == "memory off") {
                            let written =
                                self.device.write_from_edge(region, offset, readable, len);
                            self.note(
                                format!("{at} write, {readable} readable"),
                                format!("{written:?}"),
                            );
                        }
                    }
                    if when == "memory off" {
                        let written = self.device.write(region, offset, &bytes);
                        self.note(format!("{at} write"), format!("{written:?}"));
                    }
                }
            }
        }
    }

    fn mmap(&mut self) {
        for region in (0..=12).chain([100, 1 << 23]) {
            let size = self.device.region_info(region).map_or(0, |info| info.size);
            let start = u64::from(region) << 40;
            for (offset, len) in [
                (0, PAGE),
                (0, size),
                (0, size + PAGE),
                (PAGE, PAGE),
                (PAGE / 2, PAGE),
                (size.saturating_sub(PAGE) & !(PAGE - 1), PAGE),
                (size, PAGE),
                (0, 100),
                (0, 0),
                (1 << 39, PAGE),
                ((1 << 40) - PAGE, 2 * PAGE),
            ] {
                for how in [
                    How::shared(),
                    How::shared().protection(READ),
                    How::shared().protection(0),
                    How::shared().protection(READ | 4),
                    How::shared().private(),
                    How::shared().private().protection(READ),
                ] {
                    let map = how.map(self.device.as_fd(), start.wrapping_add(offset), len);
                    self.note(
                        format!("mmap {region} {offset:#x}+{len:#x} {how:?}"),
                        format!("{:?}", map.map(drop)),
                    );
                }
            }
        }
    }
}

/// All answers of a device with a driver.
#[must_use]
pub fn answers(name: &str, driver: &str) -> Vec<Line> {
    let device = Device::open_with(name, driver);
    let event = process::eventfd();
    let mut asker = Asker {
        device: &device,
        lines: Vec::new(),
    };
    asker.information();
    asker.config_space();
    asker.mmap();
    asker.accesses("memory on");
    asker.dma_bufs("memory on");
    device.set_memory(false);
    asker.accesses("memory off");
    asker.dma_bufs("memory off");
    device.set_memory(true);
    asker.interrupts(&event);
    asker.features();
    // After what changes the device it is still the same.
    asker.information();
    asker.others();
    asker.config_space();
    asker.lines
}

/// Whether an answer may differ.
fn may_differ(question: &str) -> bool {
    ALLOWED.iter().any(|(what, _)| question.starts_with(what))
}

/// Compares the answers of a device with stock's.
///
/// # Panics
///
/// When one differs that may not.
pub fn compare(name: &str, stock: &[Line], ours: &[Line]) {
    assert_eq!(ours.len(), stock.len(), "{name}: as many questions");
    assert!(stock.len() > 3000, "{name}: {} answers", stock.len());
    let mut allowed = 0;
    let mut different = Vec::new();
    let mut kinds = BTreeSet::new();
    for ((question, ours), (asked, stock)) in ours.iter().zip(stock) {
        assert_eq!(question, asked, "{name}");
        if ours != stock {
            if may_differ(question) {
                allowed += 1;
            } else {
                let example = format!("{question}\n  stock: {stock}\n  ours:  {ours}");
                // One of each kind is enough to read.
                let kind = question.split(['{', '[', '+']).next().unwrap_or(question);
                if kinds.insert((kind.to_owned(), stock, ours)) {
                    different.push(example);
                }
            }
        }
    }
    eprintln!("{name}: {} answers, {allowed} differ and may", stock.len());
    assert!(
        different.is_empty(),
        "{name}: answers of {} kinds differ, such as\n{}",
        different.len(),
        different[..different.len().min(30)].join("\n")
    );
}
