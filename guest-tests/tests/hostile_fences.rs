//! Fences that a holder makes to keep others waiting, and who waits for them all the same.
#![cfg(barlease_guest)]

use std::{
    fs,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use barlease_abi::{BUFFER_DRAINING, STATE_DEAD};
use barlease_guest_tests::{
    buffers::id_of,
    errno::{Answer, EBADFD},
    importer::{
        Attachment, EDU, Importer, KernelLog,
        abi::{FENCE_DEADLOCK, FENCE_TIME_ERROR},
        check_that_nothing_is_left,
    },
    lease::{self, Request, State},
    map::{Map, Sigbus},
    page_size,
    pci::Function,
    process::{self, Child, End},
    race,
    vfio::Device,
    wait::{self, A_WHILE, ends_by_itself, waits_for},
};

/// BAR2 of the memory device, and of the one that fences are taken from.
const BAR: u32 = 2;
fn two() -> [(u64, u64); 2] {
    [
        (8 * page_size(), page_size()),
        (4 * page_size(), page_size()),
    ]
}

/// A fence that signals only when it is told to.
const NEVER: Duration = Duration::ZERO;

fn open() -> Device {
    Device::open("memory")
}

/// Where a holder gets its fences: a lease of another device, which no event of the first one
/// concerns.
struct Source {
    // First, so that the close of the device waits for no fence of it when a test fails.
    attachment: Attachment,
    fd: OwnedFd,
    _device: Device,
    /// The fence that was handed out last.
    last: Mutex<Option<u32>>,
}

impl Source {
    fn new() -> Self {
        let device = Device::open("pair0");
        let fd = device.export(BAR, &[(0, page_size())]).unwrap();
        let attachment = Importer::open().attach(&fd).unwrap();
        Self {
            _device: device,
            fd,
            attachment,
            last: Mutex::new(None),
        }
    }

    /// Adds one more fence to each of these, and signals the one before: there always is one that
    /// is not signalled.
    fn add_to(&self, targets: &[&OwnedFd]) {
        let mut last = self.last.lock().unwrap();
        let attachment = &self.attachment;
        let next = attachment.add_fence(1, NEVER).expect("a fence");
        let file = lease::export_sync_file(&self.fd).expect("a sync file");
        for target in targets {
            lease::import_sync_file(target, &file).expect("to add a fence");
        }
        // A thread that looks at one after the other must find one, however slowly it does.
        thread::sleep(Duration::from_millis(5));
        if let Some(last) = last.replace(next) {
            attachment.signal_number(last).expect("a fence");
        }
    }

    fn signal(&self) {
        if let Some(last) = self.last.lock().unwrap().take() {
            self.attachment.signal_number(last).expect("a fence");
        }
    }

    /// Runs `act` while fences are added to `targets` without end.
    fn keeps_adding<R: Send>(
        &self,
        what: &str,
        targets: &[&OwnedFd],
        act: impl FnOnce() -> R + Send,
    ) -> R {
        println!("{what}");
        self.add_to(targets);
        let over = AtomicBool::new(false);
        let add = || {
            if !over.load(Ordering::SeqCst) {
                self.add_to(targets);
            }
        };
        let stop = || {
            over.store(true, Ordering::SeqCst);
            self.signal();
        };
        let result = race::meanwhile(&[&add], || ends_by_itself(what, act, stop));
        self.signal();
        result
    }
}

/// A lease with an importer that is attached, and has no mapping.
fn attached(device: &Device, request: &Request) -> (OwnedFd, Attachment) {
    let fd = device.request(request).expect("an export");
    let attachment = Importer::open().attach(&fd).expect("an attachment");
    (fd, attachment)
}

fn read_write() -> Request {
    Request::new(BAR, &two())
}

fn read_only() -> Request {
    read_write().open_flags(libc::O_RDONLY)
}

// ---- Fences without end -------------------------------------------------------------------------

#[test]
fn fences_without_end_do_not_keep_revoke_from_its_end() {
    let (device, source) = (open(), Source::new());
    for request in [read_write(), read_only()] {
        let (fd, attachment) = attached(&device, &request);
        attachment.map().unwrap();
        let answer = source.keeps_adding("REVOKE", &[&fd], || device.revoke(&fd));
        assert_eq!(answer, Ok(()));
        assert!(!attachment.is_mapped());
    }
    let fd = device.request(&read_only()).unwrap();
    let answer = source.keeps_adding("REVOKE without importers", &[&fd], || device.revoke(&fd));
    assert_eq!(answer, Ok(()));
}

#[test]
fn fences_without_end_do_not_keep_events_from_their_end() {
    let (device, source) = (open(), Source::new());
    let (fd, attachment) = attached(&device, &read_only());
    let (second, _second_attachment) = attached(&device, &read_write());
    let plain = device.export(BAR, &two()).unwrap();
    let targets = [&fd, &second, &plain];
    for round in 0..2 {
        if round == 0 {
            attachment.map().unwrap();
        }
        source.keeps_adding("memory off", &targets, || device.set_memory(false));
        assert!(!attachment.is_mapped());
        source.keeps_adding("memory on", &targets, || device.set_memory(true));
        let reset = source.keeps_adding("a reset by ioctl", &targets, || device.reset());
        assert_eq!(reset, Ok(()));
        let reset = || device.function().reset();
        let reset = source.keeps_adding("a reset through sysfs", &targets, reset);
        assert_eq!(reset, Ok(()));
    }
    assert_eq!(device.state(&fd), State::Ok);
    source.keeps_adding("close", &targets, || drop(device));
}

#[test]
fn fences_without_end_on_a_dead_buffer_keep_nobody_waiting() {
    let (device, source) = (open(), Source::new());
    let (fd, attachment) = attached(&device, &read_only());
    attachment.map().unwrap();
    device.revoke(&fd).unwrap();
    let targets = [&fd];
    source.keeps_adding("memory off", &targets, || device.set_memory(false));
    source.keeps_adding("memory on", &targets, || device.set_memory(true));
    let reset = source.keeps_adding("a reset", &targets, || device.reset());
    assert_eq!(reset, Ok(()));
    source.keeps_adding("close", &targets, || drop(device));
}

#[test]
fn fences_of_a_process_that_has_only_an_fd_do_not_keep_others_waiting() {
    let (device, source) = (open(), Source::new());
    let fd = device.request(&read_only()).unwrap();
    let (_imported, attachment) = attached(&device, &read_write());
    drop(attachment);
    let targets = [&fd];
    source.keeps_adding("memory off", &targets, || device.set_memory(false));
    source.keeps_adding("memory on", &targets, || device.set_memory(true));
    let answer = source.keeps_adding("REVOKE", &targets, || device.revoke(&fd));
    assert_eq!(answer, Ok(()));
}

// ---- One look -----------------------------------------------------------------------------------

#[test]
fn revoke_waits_for_the_fences_that_were_there_and_for_no_later_one() {
    let device = open();
    let (fd, attachment) = attached(&device, &read_write());
    attachment.map().unwrap();
    let before: Vec<_> = (0..3)
        .map(|_| attachment.add_fence(0, NEVER).unwrap())
        .collect();
    let (later, answer) = (Mutex::new(None), Mutex::new(None));
    thread::scope(|scope| {
        let revoke = scope.spawn(|| *answer.lock().unwrap() = Some(device.revoke(&fd)));
        attachment.wait_for_interruption();
        thread::sleep(A_WHILE);
        *later.lock().unwrap() = Some(attachment.add_fence(0, NEVER).unwrap());
        for fence in before {
            let early = revoke.is_finished();
            attachment.signal_number(fence).unwrap();
            assert!(!early, "it did not wait for all");
        }
        ends_by_itself(
            "REVOKE",
            || wait::until("the end of REVOKE", || revoke.is_finished()),
            || {
                let later = later.lock().unwrap().take();
                attachment.signal_number(later.unwrap()).unwrap();
            },
        );
    });
    assert_eq!(answer.into_inner().unwrap(), Some(Ok(())));
}

#[test]
fn an_event_looks_once_at_the_fences_of_each_of_many_leases() {
    let device = open();
    let leases: Vec<_> = (0..8).map(|_| attached(&device, &read_write())).collect();
    let mut fences = Vec::new();
    for (_, attachment) in &leases {
        attachment.map().unwrap();
        fences.push(attachment.add_fence(0, NEVER).unwrap());
    }
    thread::scope(|scope| {
        let event = scope.spawn(|| device.set_memory(false));
        for (_, attachment) in &leases {
            attachment.wait_for_interruption();
        }
        thread::sleep(A_WHILE);
        // The last first, and at each of them one that comes later and stays.
        for ((_, attachment), fence) in leases.iter().zip(fences).rev() {
            let early = event.is_finished();
            attachment.add_fence(0, NEVER).unwrap();
            attachment.signal_number(fence).unwrap();
            assert!(!early, "it did not wait for all");
        }
        ends_by_itself(
            "memory off",
            || wait::until("the end of the event", || event.is_finished()),
            || {
                leases
                    .iter()
                    .for_each(|(_, attachment)| signal_all(attachment))
            },
        );
    });
    leases
        .iter()
        .for_each(|(_, attachment)| signal_all(attachment));
    device.set_memory(true);
}

/// Signals the further fences that an attachment may have.
fn signal_all(attachment: &Attachment) {
    for number in 1..=8 {
        let _ = attachment.signal_number(number);
    }
}

#[test]
fn a_fence_that_a_timer_signals_is_waited_for() {
    let device = open();
    let (fd, attachment) = attached(&device, &read_write());
    let time = Duration::from_millis(1500);
    let begin = Instant::now();
    attachment.add_fence(0, time).unwrap();
    ends_by_itself("REVOKE", || device.revoke(&fd).unwrap(), || ());
    assert!(begin.elapsed() >= time, "it did not wait");
}

// ---- Fences whose wait fails --------------------------------------------------------------------

/// Ticks of processor time that a thread has used, user and system.
fn ticks(thread: &str) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{thread}/stat")).expect("stat");
    let (_, after_name) = stat.rsplit_once(')').expect("a name");
    let fields: Vec<_> = after_name.split_whitespace().collect();
    let number = |at: usize| fields[at].parse::<u64>().expect("a number");
    number(11) + number(12)
}

/// Waits for a fence of this kind with `act`, and looks on meanwhile: how many ticks it cost of how
/// many that there were, and whether there was a warning that names `fd`'s buffer.
fn waited_for(flags: u32, act: impl FnOnce(&Device, &OwnedFd) + Send) {
    // Of a clock of 100 Hz, which is what /proc counts in.
    const TICK: Duration = Duration::from_millis(10);
    let device = open();
    let (fd, attachment) = attached(&device, &read_write());
    lease::set_name(&fd, "fails-to-wait").unwrap();
    let fence = attachment.add_fence(flags, NEVER).unwrap();
    let mut log = KernelLog::from_now();
    let thread = Mutex::new(None);
    let act = || {
        let name = fs::read_link("/proc/thread-self").expect("this thread");
        *thread.lock().unwrap() = Some(name.to_string_lossy().into_owned());
        act(&device, &fd);
    };
    waits_for(
        act,
        || {
            wait::until("an end of access", || device.state(&fd) != State::Ok);
            let thread = thread.lock().unwrap().clone().expect("a thread");
            let (before, begin) = (ticks(&thread), Instant::now());
            let mut warned = false;
            wait::until("a warning", || {
                let lines = log.lines();
                warned |= lines.iter().any(|line| line.contains("fails-to-wait"));
                warned && begin.elapsed() > Duration::from_secs(3)
            });
            let used = ticks(&thread) - before;
            let all = begin.elapsed().as_millis() / TICK.as_millis();
            assert!(u128::from(used) < all / 4, "it used {used} ticks of {all}");
        },
        || attachment.signal_number(fence).unwrap(),
    );
    device.set_memory(true);
}

#[test]
fn a_fence_whose_wait_fails_when_the_time_is_over_is_waited_for_and_warned_of() {
    waited_for(FENCE_TIME_ERROR, |device, fd| device.revoke(fd).unwrap());
}

#[test]
fn a_fence_whose_wait_fails_at_once_is_waited_for_asleep() {
    waited_for(FENCE_DEADLOCK, |device, fd| device.revoke(fd).unwrap());
}

#[test]
fn an_event_waits_asleep_for_a_fence_whose_wait_fails_at_once() {
    waited_for(FENCE_DEADLOCK, |device, _| device.set_memory(false));
}

// ---- The log ------------------------------------------------------------------------------------

/// Lines of the log with this word, from a while after the first one on.
fn lines_with(log: &mut KernelLog, word: &str) -> Vec<String> {
    let mut lines = Vec::new();
    wait::until("a warning", || {
        lines.extend(log.lines());
        lines.iter().any(|line| line.contains(word))
    });
    thread::sleep(Duration::from_secs(2));
    lines.extend(log.lines());
    lines.retain(|line| line.contains(word));
    lines
}

#[test]
fn many_importers_of_a_lease_that_is_waited_for_make_few_lines() {
    let device = open();
    let (fd, first) = attached(&device, &read_write());
    lease::set_name(&fd, "of-many").unwrap();
    let importer = Importer::open();
    let others: Vec<_> = (0..200).map(|_| importer.attach(&fd).unwrap()).collect();
    let fence = first.add_fence(0, NEVER).unwrap();
    let mut log = KernelLog::from_now();
    waits_for(
        || device.revoke(&fd).unwrap(),
        || {
            let lines = lines_with(&mut log, "of-many");
            assert!(lines.len() <= 4, "{} lines: {:?}", lines.len(), lines[0]);
            let edu = Function::named(EDU).bdf;
            let names: usize = lines.iter().map(|line| line.matches(&edu).count()).sum();
            assert!((1..=16).contains(&names), "{names} names: {lines:?}");
            let bdf = &device.function().bdf;
            assert!(lines.iter().all(|line| line.contains(bdf)), "{lines:?}");
        },
        || first.signal_number(fence).unwrap(),
    );
    drop(others);
}

#[test]
fn many_leases_that_are_waited_for_make_few_lines() {
    const LEASES: usize = 60;
    let device = open();
    let leases: Vec<_> = (0..LEASES)
        .map(|_| attached(&device, &read_write()))
        .collect();
    let mut fences = Vec::new();
    for (number, (fd, attachment)) in leases.iter().enumerate() {
        lease::set_name(fd, &format!("one-of-many {number}")).unwrap();
        fences.push(attachment.add_fence(0, NEVER).unwrap());
    }
    let mut log = KernelLog::from_now();
    waits_for(
        || device.set_memory(false),
        || {
            let lines = lines_with(&mut log, "one-of-many");
            assert!(lines.len() <= LEASES / 2, "{} lines", lines.len());
        },
        || {
            for ((_, attachment), fence) in leases.iter().zip(fences) {
                attachment.signal_number(fence).unwrap();
            }
        },
    );
    device.set_memory(true);
}

// ---- Signals ------------------------------------------------------------------------------------

/// A lease that an importer has mapped that does not let go, with a name, and a mapping of ours.
fn held(device: &Device) -> (OwnedFd, Attachment, Map) {
    let (fd, attachment) = attached(device, &read_write());
    lease::set_name(&fd, "held-fast").unwrap();
    attachment.hold(true);
    attachment.map().unwrap();
    let map = Map::new(&fd, 2 * page_size()).unwrap();
    map.touch_all().unwrap();
    (fd, attachment, map)
}

/// A process that handles some signals, revokes a lease, and waits for its importer.
fn revoking(
    device: &Device,
    fd: &OwnedFd,
    slow: &Attachment,
    by_id: bool,
    handles: &[i32],
) -> Child {
    let id = id_of(fd);
    let child = Child::start(&[device.as_fd(), fd.as_fd()], |link| {
        handles.iter().for_each(|&signal| process::handle(signal));
        link.send(1);
        let answer = if by_id {
            device.revoke_id(id)
        } else {
            device.revoke(fd)
        };
        assert_eq!(answer, Ok(()));
        link.send(process::handled().into());
    });
    child.link.expect(1);
    slow.wait_for_interruption();
    child
}

/// Ends a process that waits by a signal.
fn is_killed(mut child: Child, signal: i32, let_go: impl FnOnce() -> Answer<()>) {
    child.signal(signal);
    let let_go = || race::whatever(let_go());
    let end = ends_by_itself("the killed process", || child.wait(), let_go);
    assert_eq!(end, End::Signal(signal));
}

/// A fatal signal ends REVOKE, and nothing else of it.
fn is_ended_by(signal: i32, by_id: bool) {
    let device = open();
    let (fd, slow, map) = held(&device);
    let id = id_of(&fd);
    let child = revoking(&device, &fd, &slow, by_id, &[]);
    is_killed(child, signal, || slow.unmap());
    assert_eq!(device.state(&fd), State::Dead);
    assert_eq!(map.read(0), Err(Sigbus));
    assert!(slow.is_mapped(), "the importer has not let go yet");
    let record = device.record(&fd);
    assert_eq!((record.state, record.nr_mappings), (STATE_DEAD, 1));
    assert_eq!(record.flags, BUFFER_DRAINING);
    assert_eq!(device.revoke_id(id), Err(EBADFD));
    let events = device.events();
    events.settle();
    slow.unmap().unwrap();
    events.until("the end of draining", || device.buffer_flags(&fd) == 0);
    assert_eq!(device.record(&fd).nr_mappings, 0);
    drop((slow, map, fd));
    events.until("the end of the buffer", || device.find_record(id).is_none());
}

#[test]
fn sigkill_ends_revoke_and_the_buffer_goes_on_draining() {
    is_ended_by(libc::SIGKILL, false);
}

#[test]
fn sigkill_ends_a_revoke_by_id() {
    is_ended_by(libc::SIGKILL, true);
}

#[test]
fn a_signal_that_ends_a_process_ends_revoke() {
    is_ended_by(libc::SIGTERM, false);
}

#[test]
fn a_killed_revoke_that_waits_for_a_fence_leaves_a_draining_buffer() {
    let device = open();
    let (fd, attachment) = attached(&device, &read_write());
    attachment.map().unwrap();
    let fence = attachment.add_fence(0, NEVER).unwrap();
    let child = revoking(&device, &fd, &attachment, false, &[]);
    is_killed(child, libc::SIGKILL, || attachment.signal_number(fence));
    let record = device.record(&fd);
    assert_eq!((record.flags, record.nr_mappings), (BUFFER_DRAINING, 0));
    // One that is added later neither drains nor keeps the buffer draining.
    let later = attachment.add_fence(0, NEVER).unwrap();
    let events = device.events();
    events.settle();
    attachment.signal_number(fence).unwrap();
    events.until("the end of draining", || device.buffer_flags(&fd) == 0);
    attachment.signal_number(later).unwrap();
}

/// A process can have an importer keep that lock for long, as by a mapping of many ranges.
#[test]
fn sigkill_ends_a_revoke_that_waits_for_a_reservation_lock() {
    let device = open();
    let (fd, slow, map) = held(&device);
    let id = id_of(&fd);
    slow.occupied(|| {
        let child = Child::start(&[device.as_fd(), fd.as_fd()], |link| {
            link.send(1);
            link.send(u64::from(device.revoke(&fd).is_ok()));
        });
        child.link.expect(1);
        wait::until("REVOKE", || {
            device
                .find_record(id)
                .is_some_and(|record| record.state == STATE_DEAD)
        });
        thread::sleep(Duration::from_millis(100));
        is_killed(child, libc::SIGKILL, || Ok(()));
        assert_eq!(map.read(0), Err(Sigbus));
        let record = device.find_record(id).unwrap();
        assert_ne!(record.flags & BUFFER_DRAINING, 0);
    });
    // The module's own work tells the importer when that can be done.
    slow.wait_for_interruption();
    slow.unmap().unwrap();
    wait::until("the end of draining", || device.buffer_flags(&fd) == 0);
}

#[test]
fn the_module_warns_of_what_a_killed_revoke_left() {
    let device = open();
    let (fd, slow, _map) = held(&device);
    let child = revoking(&device, &fd, &slow, false, &[]);
    is_killed(child, libc::SIGKILL, || slow.unmap());
    let bdfs = ["memory", EDU].map(|name| Function::named(name).bdf);
    // The second of them is of the module alone, however far the first was when the process was
    // killed.
    for _ in 0..2 {
        let mut log = KernelLog::from_now();
        let lines = lines_with(&mut log, "held-fast");
        assert!(bdfs.iter().all(|bdf| lines[0].contains(bdf)), "{lines:?}");
        assert!(lines.len() <= 4, "{lines:?}");
    }
    slow.unmap().unwrap();
    wait::until("the end of draining", || device.buffer_flags(&fd) == 0);
    let mut log = KernelLog::from_now();
    thread::sleep(Duration::from_secs(12));
    let lines = log.lines();
    assert!(
        !lines.iter().any(|line| line.contains("held-fast")),
        "{lines:?}"
    );
}

#[test]
fn signals_that_a_process_handles_do_not_end_revoke() {
    let device = open();
    let (fd, slow, _map) = held(&device);
    let handles = [libc::SIGTERM, libc::SIGUSR1];
    let child = revoking(&device, &fd, &slow, false, &handles);
    let handled = waits_for(
        || child.link.receive(),
        || {
            for signal in handles {
                child.signal(signal);
                thread::sleep(A_WHILE);
            }
            for signal in [libc::SIGSTOP, libc::SIGCONT] {
                child.signal(signal);
            }
            assert!(slow.is_mapped());
        },
        || slow.unmap().unwrap(),
    );
    assert_eq!(handled, 2);
    child.join();
}

#[test]
fn what_drains_is_waited_for_by_events() {
    let device = open();
    let (fd, slow, _map) = held(&device);
    let child = revoking(&device, &fd, &slow, false, &[]);
    is_killed(child, libc::SIGKILL, || slow.unmap());
    waits_for(
        || device.set_memory(false),
        || assert_eq!(device.state(&fd), State::Dead),
        || slow.unmap().unwrap(),
    );
    device.set_memory(true);
}

#[test]
fn what_drains_is_waited_for_by_the_close_of_the_device() {
    let device = open();
    let (fd, slow, _map) = held(&device);
    let child = revoking(&device, &fd, &slow, false, &[]);
    is_killed(child, libc::SIGKILL, || slow.unmap());
    waits_for(|| drop(device), || (), || slow.unmap().unwrap());
    drop(fd);
}

#[test]
fn zz_nothing_is_left_and_both_modules_can_be_unloaded() {
    check_that_nothing_is_left(&["memory", "pair0"]);
}
