//! The SIGBUS handler among other handlers, masks, limits and schedulers. Each case runs in a
//! process of its own.

#![allow(
    unsafe_code,
    reason = "handlers, masks, limits and schedulers are set here"
)]

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::process::ExitStatus;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicI32;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use barlease::Error;
use barlease::GuardedMapping;
use barlease::Lease;
use barlease::MapOptions;
use barlease::ScratchMapping;

const SIZE: u64 = 16 * 4096;
/// A child that came to its end.
const DONE: i32 = 42;

/// A stand-in for a lease, and the owner's handle to it.
struct Fake {
    lease: Lease,
    owner: File,
    size: u64,
}

impl Fake {
    fn new(size: u64) -> Self {
        let fd = rustix::fs::memfd_create("lease", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, size).unwrap();
        Self {
            owner: File::from(fd.as_fd().try_clone_to_owned().unwrap()),
            lease: Lease::from_fd(fd).unwrap(),
            size,
        }
    }

    fn revoke(&self) {
        self.owner.set_len(0).unwrap();
    }

    fn give_back(&self) {
        self.owner.set_len(self.size).unwrap();
    }

    fn guarded(&self) -> GuardedMapping {
        self.lease.map_guarded().unwrap()
    }

    fn scratch(&self) -> ScratchMapping {
        MapOptions::new().map_scratch(&self.lease).unwrap()
    }
}

/// Writes 4 bytes at the start, as C would.
fn poke(mapping: &ScratchMapping, value: u32) -> Result<(), Error> {
    // SAFETY: the mapping has 4 bytes, aligned to pages.
    mapping.section(|address| unsafe { address.cast::<u32>().write_volatile(value) })
}

fn is_revoked<T>(answer: Result<T, Error>) -> bool {
    matches!(answer, Err(Error::Revoked { .. }))
}

/// Revokes the lease and sees that an access says so.
fn survives(fake: &Fake, mapping: &GuardedMapping) {
    mapping.write(0, 1u32).unwrap();
    fake.revoke();
    assert!(is_revoked(mapping.write(0, 2u32)));
    assert!(is_revoked(mapping.read::<u32>(0)));
    fake.give_back();
    mapping.write(0, 3u32).unwrap();
}

type Case = fn();

const CASES: &[(&str, Case)] = &[
    ("sent", sent_then_revoked),
    ("sent twice", sent_twice),
    ("later", later_handler),
    ("later and chained", later_handler_that_chains),
    ("again and again", handlers_again_and_again),
    ("default", default_action_set_later),
    ("copy", another_copy_of_the_crate),
    ("blocked", blocked),
    ("blocked and touched", blocked_and_touched),
    ("in a handler", in_a_handler),
    ("real time", real_time),
    ("thread's end", access_at_the_end_of_a_thread),
    ("fork", access_in_a_forked_child),
    ("fill", fill_of_a_revoked_gibibyte),
    ("locked", locked_memory),
    ("no limit left", no_limit_left),
    ("no files", limit_for_files),
    ("no maps left", no_maps_left),
    ("stack", alternate_stack),
    ("mask", mask_of_the_previous_handler),
    ("unwind", handler_that_unwinds),
    ("scratch", scratch_memory),
    ("scratch and dead", plain_fault_beside_scratch),
];

#[test]
fn in_a_process_of_its_own() {
    let Ok(name) = std::env::var("BARLEASE_CHILD") else {
        return;
    };
    let (_, case) = CASES.iter().find(|(known, _)| *known == name).unwrap();
    case();
    std::process::exit(DONE);
}

fn child(name: &str) -> ExitStatus {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "in_a_process_of_its_own",
            "--nocapture",
            "--test-threads=1",
        ])
        .env("BARLEASE_CHILD", name)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if begin.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("{name}: hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn finishes(name: &str) {
    let status = child(name);
    assert_eq!(status.code(), Some(DONE), "{name}: {status}");
}

fn dies(name: &str) {
    let status = child(name);
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{name}: {status}");
}

fn send() {
    // SAFETY: `raise` takes no pointer.
    unsafe { libc::raise(libc::SIGBUS) };
}

/// Installs a handler, and answers the action before.
fn install(handler: usize, flags: i32) -> libc::sigaction {
    // SAFETY: all zeroes is a valid action.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_flags = flags;
    action.sa_sigaction = handler;
    // SAFETY: as above.
    let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: both are live and complete.
    let answer = unsafe { libc::sigaction(libc::SIGBUS, &action, &mut old) };
    assert_eq!(answer, 0);
    old
}

fn all_signals() -> libc::sigset_t {
    // SAFETY: all zeroes is the empty set.
    let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is live.
    unsafe { libc::sigfillset(&mut all) };
    all
}

fn set_mask(how: i32, set: &libc::sigset_t) {
    // SAFETY: the set is live; the old one is not asked for.
    unsafe { libc::pthread_sigmask(how, set, std::ptr::null_mut()) };
}

/// A line of /proc/self/status in bytes.
fn status(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let line = line.unwrap().trim_start_matches(':').trim();
    line.trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

// A SIGBUS that somebody sends.

#[test]
fn a_signal_that_somebody_sends_disarms_nothing() {
    finishes("sent");
}

/// The standard library's handler answers the first one by setting the default action.
fn sent_then_revoked() {
    let fake = Fake::new(SIZE);
    let mapping = fake.guarded();
    let scratch = fake.scratch();
    survives(&fake, &mapping);
    send();
    assert!(mapping.is_armed());
    survives(&fake, &mapping);
    let other = Fake::new(SIZE);
    survives(&other, &other.guarded());
    fake.revoke();
    assert!(is_revoked(poke(&scratch, 1)));
}

#[test]
fn the_second_one_kills_as_it_would_have() {
    dies("sent twice");
}

fn sent_twice() {
    let fake = Fake::new(SIZE);
    let _mapping = fake.guarded();
    send();
    send();
}

// Handlers that are installed later.

static CALLS: AtomicUsize = AtomicUsize::new(0);
static OLD: AtomicUsize = AtomicUsize::new(0);

/// Heals a fault of a plain mapping, so that the access can finish.
extern "C" fn healing(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    CALLS.fetch_add(1, Ordering::SeqCst);
    // SAFETY: the kernel passes a valid pointer.
    let info = unsafe { &*info };
    if info.si_code != libc::BUS_ADRERR {
        return;
    }
    // SAFETY: a fault has an address.
    let page = unsafe { info.si_addr() }.map_addr(|address| address & !4095);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: the page is one of a plain mapping of the tests.
    unsafe { libc::mmap(page, 4096, protection, flags, -1, 0) };
}

type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

/// Passes everything on to the handler in `OLD`.
extern "C" fn chaining(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    CALLS.fetch_add(1, Ordering::SeqCst);
    let old = OLD.load(Ordering::SeqCst);
    // SAFETY: `OLD` is the address of a handler with SA_SIGINFO.
    let old = unsafe { std::mem::transmute::<usize, Handler>(old) };
    old(signal, info, context);
}

#[test]
fn a_handler_that_is_installed_later_is_noticed_and_chained() {
    finishes("later");
}

fn later_handler() {
    let fake = Fake::new(SIZE);
    let first = fake.guarded();
    assert!(first.is_armed());
    install(healing as *const () as usize, libc::SA_SIGINFO);
    assert!(!first.is_armed());

    let second = fake.guarded();
    assert!(first.is_armed());
    survives(&fake, &first);
    survives(&fake, &second);
    assert_eq!(CALLS.load(Ordering::SeqCst), 0);

    // It still gets faults that are not ours.
    let plain = fake.lease.map().unwrap();
    fake.revoke();
    plain.write(0, 1u8).unwrap();
    assert_eq!(CALLS.load(Ordering::SeqCst), 1);
    send();
    assert_eq!(CALLS.load(Ordering::SeqCst), 2);
}

#[test]
fn two_handlers_that_pass_on_to_each_other_come_to_an_end() {
    finishes("later and chained");
}

/// healing <- ours <- chaining <- ours again.
fn later_handler_that_chains() {
    install(healing as *const () as usize, libc::SA_SIGINFO);
    let fake = Fake::new(SIZE);
    let _first = fake.guarded();
    let old = install(chaining as *const () as usize, libc::SA_SIGINFO);
    OLD.store(old.sa_sigaction, Ordering::SeqCst);
    let second = fake.guarded();
    survives(&fake, &second);
    assert_eq!(CALLS.load(Ordering::SeqCst), 0);
    send();
    assert_eq!(CALLS.load(Ordering::SeqCst), 2);
}

#[test]
fn handlers_that_come_again_and_again_are_an_error_at_last() {
    finishes("again and again");
}

fn handlers_again_and_again() {
    let fake = Fake::new(SIZE);
    let mut made = 0;
    let error = loop {
        install(healing as *const () as usize, libc::SA_SIGINFO);
        match fake.lease.map_guarded() {
            Ok(mapping) => survives(&fake, &mapping),
            Err(error) => break error,
        }
        made += 1;
        assert!(made < 100);
    };
    assert!(made > 10, "{made}");
    assert!(matches!(error, Error::Busy { .. }), "{error:?}");
    assert!(error.remedy().unwrap().contains("once"));
}

#[test]
fn a_default_action_that_is_set_later_is_found_by_the_next_mapping() {
    finishes("default");
}

fn default_action_set_later() {
    let fake = Fake::new(SIZE);
    // More often than there are entry points.
    for _ in 0..100 {
        let mapping = fake.guarded();
        survives(&fake, &mapping);
        install(libc::SIG_DFL, 0);
        assert!(!mapping.is_armed());
    }
}

#[test]
fn another_copy_of_the_crate_is_left_in_place() {
    finishes("copy");
}

/// It is known by its mask, and passes on. Two copies that took turns in putting themselves on top
/// would come to an end of their entry points.
fn another_copy_of_the_crate() {
    let fake = Fake::new(SIZE);
    let first = fake.guarded();
    // SAFETY: all zeroes is a valid action.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_flags = libc::SA_SIGINFO;
    action.sa_sigaction = chaining as *const () as usize;
    action.sa_mask = all_signals();
    for signal in [41, 43, 47, 53, 59] {
        // SAFETY: the set is live.
        unsafe { libc::sigdelset(&mut action.sa_mask, signal) };
    }
    // SAFETY: all zeroes is a valid action.
    let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: both are live and complete.
    unsafe { libc::sigaction(libc::SIGBUS, &action, &mut old) };
    OLD.store(old.sa_sigaction, Ordering::SeqCst);
    for _ in 0..100 {
        let mapping = fake.guarded();
        assert!(first.is_armed());
        survives(&fake, &mapping);
    }
    assert_eq!(CALLS.load(Ordering::SeqCst), 200);
    // The handler at the bottom sets the default action: ours is there again, for the next fault.
    send();
    assert!(first.is_armed());
    survives(&fake, &first);
    assert_eq!(CALLS.load(Ordering::SeqCst), 201);
}

// Masks.

#[test]
fn a_thread_that_blocks_the_signal_is_told() {
    finishes("blocked");
}

fn blocked() {
    let fake = Fake::new(SIZE);
    let mapping = fake.guarded();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            set_mask(libc::SIG_BLOCK, &all_signals());
            assert!(!mapping.is_armed());
            // SAFETY: all zeroes is the empty set.
            let mut bus: libc::sigset_t = unsafe { std::mem::zeroed() };
            // SAFETY: the set is live.
            unsafe { libc::sigaddset(&mut bus, libc::SIGBUS) };
            set_mask(libc::SIG_UNBLOCK, &bus);
            assert!(mapping.is_armed());
            survives(&fake, &mapping);
        });
    });
    assert!(mapping.is_armed());
}

/// As the documentation says.
#[test]
fn a_thread_that_blocks_the_signal_dies() {
    dies("blocked and touched");
}

fn blocked_and_touched() {
    let fake = Fake::new(SIZE);
    let mapping = fake.guarded();
    set_mask(libc::SIG_BLOCK, &all_signals());
    fake.revoke();
    let _ = mapping.write(0, 1u8);
}

static IN_HANDLER: AtomicU64 = AtomicU64::new(0);
static MAPPING: std::sync::OnceLock<GuardedMapping> = std::sync::OnceLock::new();

extern "C" fn access_in_a_handler(_: i32) {
    let mapping = MAPPING.get().unwrap();
    let lost = mapping.register::<u64>(0).unwrap().write(1).is_err();
    IN_HANDLER.store(1 + u64::from(lost), Ordering::SeqCst);
}

#[test]
fn a_signal_handler_may_access_a_guarded_mapping() {
    finishes("in a handler");
}

fn in_a_handler() {
    let fake = Fake::new(SIZE);
    MAPPING.set(fake.guarded()).unwrap();
    let handler: extern "C" fn(i32) = access_in_a_handler;
    // SAFETY: the handler is a function of that type.
    unsafe { libc::signal(libc::SIGUSR1, handler as usize) };
    for (revoked, expected) in [(false, 1), (true, 2)] {
        if revoked {
            fake.revoke();
        }
        // SAFETY: `raise` takes no pointer.
        unsafe { libc::raise(libc::SIGUSR1) };
        assert_eq!(IN_HANDLER.load(Ordering::SeqCst), expected);
    }
}

// Schedulers.

#[test]
fn a_real_time_thread_does_not_starve_whom_it_waits_for() {
    finishes("real time");
}

/// Whether a thread of this process could run now, but for want of a CPU.
fn is_runnable(thread: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat"));
    stat.is_ok_and(|stat| {
        stat.rsplit(") ")
            .next()
            .is_some_and(|rest| rest.starts_with('R'))
    })
}

/// A SCHED_FIFO thread and an ordinary one on one CPU lose and recover one scratch mapping.
///
/// While the ordinary one runs, the other one sleeps; or it has waited without sleeping until the
/// kernel took the CPU from it for a while (`sched_rt_runtime_us`). Then it is found runnable again
/// and again. Once or twice it may be found so when it is just being woken.
fn real_time() {
    const STARVED: u32 = 100;
    const ROUNDS: u32 = 5_000;
    // SAFETY: all zeroes is the empty set.
    let mut cpus: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is live.
    unsafe { libc::sched_getaffinity(0, size_of_val(&cpus), &mut cpus) };
    // SAFETY: as above.
    let cpu = (0..1024).find(|cpu| unsafe { libc::CPU_ISSET(*cpu, &cpus) });
    // SAFETY: as above.
    unsafe { libc::CPU_ZERO(&mut cpus) };
    // SAFETY: as above.
    unsafe { libc::CPU_SET(cpu.unwrap(), &mut cpus) };
    // SAFETY: as above.
    let pinned = unsafe { libc::sched_setaffinity(0, size_of_val(&cpus), &cpus) };
    assert_eq!(pinned, 0);

    let fake = Fake::new(SIZE);
    let mapping = fake.scratch();
    let guarded = fake.guarded();
    let stop = AtomicBool::new(false);
    let thread = AtomicI32::new(0);
    std::thread::scope(|scope| {
        let ordinary = scope.spawn(|| {
            let (mut longest, mut found) = (0, 0);
            while !stop.load(Ordering::Relaxed) && longest < STARVED {
                fake.revoke();
                let _ = poke(&mapping, 1);
                let _ = mapping.recover();
                fake.give_back();
                let thread = thread.load(Ordering::Relaxed);
                found = match thread != 0 && is_runnable(thread) {
                    true => found + 1,
                    false => 0,
                };
                longest = longest.max(found);
            }
            stop.store(true, Ordering::Relaxed);
            longest
        });
        scope.spawn(|| {
            let priority = libc::sched_param { sched_priority: 1 };
            // SAFETY: the parameter is live.
            let set = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &priority) };
            if set == 0 {
                // SAFETY: no pointer.
                let id = unsafe { libc::syscall(libc::SYS_gettid) };
                thread.store(id as i32, Ordering::Relaxed);
            } else {
                eprintln!("no right to SCHED_FIFO: only ordinary threads were tried");
            }
            for _ in 0..ROUNDS {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let _ = poke(&mapping, 2);
                let _ = mapping.recover();
                let _ = guarded.write(8, 1u32);
                std::thread::sleep(Duration::from_micros(50));
            }
            stop.store(true, Ordering::Relaxed);
        });
        let longest = ordinary.join().unwrap();
        assert!(longest < STARVED, "it did not sleep");
    });
}

#[test]
fn a_thread_that_ends_may_access_a_guarded_mapping() {
    finishes("thread's end");
}

/// Accesses the mapping when the thread ends, whose alternate stack may be gone then.
struct AtTheEnd(std::sync::Arc<GuardedMapping>);

impl Drop for AtTheEnd {
    fn drop(&mut self) {
        assert!(is_revoked(self.0.write(0, 1u32)));
        LOST.fetch_add(1, Ordering::Relaxed);
    }
}

static LOST: AtomicU64 = AtomicU64::new(0);

fn access_at_the_end_of_a_thread() {
    thread_local! {
        static LAST: std::cell::RefCell<Option<AtTheEnd>> = const { std::cell::RefCell::new(None) };
    }
    let fake = Fake::new(SIZE);
    let mapping = std::sync::Arc::new(fake.guarded());
    fake.revoke();
    for round in 1..=10 {
        let its = AtTheEnd(std::sync::Arc::clone(&mapping));
        std::thread::spawn(|| LAST.set(Some(its))).join().unwrap();
        assert_eq!(LOST.load(Ordering::Relaxed), round);
    }
}

#[test]
fn a_forked_child_may_access_a_guarded_mapping() {
    finishes("fork");
}

fn access_in_a_forked_child() {
    let fake = Fake::new(SIZE);
    let mapping = fake.guarded();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Others are in the middle of losses when the process forks.
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let _ = mapping.write(0, 1u32);
            }
        });
        for _ in 0..20 {
            fake.revoke();
            // SAFETY: the child makes accesses and exits.
            let child = unsafe { libc::fork() };
            if child == 0 {
                let lost = matches!(mapping.register::<u32>(8).map(|it| it.read()), Ok(Err(_)));
                // SAFETY: no pointer.
                unsafe { libc::_exit(i32::from(!lost)) };
            }
            let mut status = 0;
            // SAFETY: the status is live.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            assert_eq!(status, 0);
            fake.give_back();
        }
        stop.store(true, Ordering::Relaxed);
    });
}

// Memory.

const GIB: u64 = 1 << 30;

#[test]
fn a_block_of_a_revoked_lease_ends_at_once() {
    finishes("fill");
}

fn fill_of_a_revoked_gibibyte() {
    let fake = Fake::new(GIB);
    let mapping = fake.guarded();
    fake.revoke();
    let (before, begin) = (status("VmRSS"), Instant::now());
    for _ in 0..100 {
        assert!(is_revoked(mapping.fill(.., 1)));
        assert!(is_revoked(mapping.copy_from(0, &[0; 8192])));
    }
    assert!(begin.elapsed() < Duration::from_millis(500));
    assert!(status("VmRSS") < before + (1 << 20));
}

#[test]
fn a_loss_populates_nothing_where_memory_is_locked() {
    finishes("locked");
}

fn locked_memory() {
    let fake = Fake::new(GIB);
    let guarded = fake.guarded();
    let scratch = fake.scratch();
    let limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: the limit is live.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) };
    // SAFETY: no pointer.
    if unsafe { libc::mlockall(libc::MCL_FUTURE) } != 0 {
        eprintln!("no right to lock memory: not tried");
        return;
    }
    // A file that is mapped now is populated, but not the reserve of the mapping.
    let small = Fake::new(32 << 20);
    let before = status("VmRSS");
    let late = small.scratch();
    assert!(status("VmRSS") < before + (48 << 20));
    fake.revoke();
    small.revoke();
    let (before, begin) = (status("VmRSS"), Instant::now());
    assert!(is_revoked(guarded.write(0, 1u8)));
    assert!(is_revoked(poke(&scratch, 1)));
    assert!(is_revoked(poke(&late, 1)));
    assert!(begin.elapsed() < Duration::from_millis(200));
    assert!(status("VmRSS") < before + (1 << 20));
}

#[test]
fn a_loss_needs_nothing_of_the_limit_for_locked_memory() {
    finishes("no limit left");
}

/// As an ordinary user whose limit is used up.
fn no_limit_left() {
    let fake = Fake::new(64 << 20);
    let guarded = fake.guarded();
    let scratch = fake.scratch();
    // SAFETY: no pointer. It fails for those who are no root, which is as well.
    unsafe { libc::setuid(65534) };
    // SAFETY: no pointer.
    unsafe { libc::mlockall(libc::MCL_FUTURE) };
    let limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the limit is live.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) };
    fake.revoke();
    assert!(is_revoked(guarded.write(0, 1u8)));
    assert!(is_revoked(poke(&scratch, 1)));
    // A new one needs some, and says so.
    fake.give_back();
    assert!(fake.lease.map_guarded().is_err());
}

/// The kernel tells of a file that would be too large by SIGXFSZ, which ends the process.
#[test]
fn a_limit_for_files_is_an_error_and_no_signal() {
    finishes("no files");
}

fn limit_for_files() {
    let fake = Fake::new(SIZE);
    let limit = libc::rlimit {
        rlim_cur: 4096,
        rlim_max: 4096,
    };
    // SAFETY: the limit is live.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) }, 0);
    let error = MapOptions::new().map_scratch(&fake.lease).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EFBIG), "{error}");
    let small = Fake::new(4096);
    survives(&small, &small.guarded());
}

#[test]
fn a_recovery_without_memory_leaves_no_trap_behind() {
    finishes("no maps left");
}

/// So many mappings that one more can be made but none can be moved.
fn no_maps_left() {
    let text = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let limit: usize = text.trim().parse().unwrap();
    let fake = Fake::new(SIZE);
    let lost = fake.scratch();
    let guarded = fake.guarded();
    fake.revoke();
    assert!(is_revoked(poke(&lost, 1)));

    // Every other page of a large area gets another protection.
    let pages = 2 * limit + 100;
    let protection = libc::PROT_NONE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: at an address of the kernel's choice.
    let area = unsafe { libc::mmap(std::ptr::null_mut(), pages * 4096, protection, flags, -1, 0) };
    assert_ne!(area, libc::MAP_FAILED);
    let mut split = 0;
    // SAFETY: the pages are those of the area, which nobody uses.
    while unsafe { libc::mprotect(area.wrapping_byte_add(split * 4096), 4096, libc::PROT_READ) }
        == 0
    {
        split += 2;
    }
    assert!(split > limit / 2, "{split}");

    // Room for some number of mappings, from none on.
    let mut failed = 0;
    for _ in 0..16 {
        match lost.recover() {
            Ok(()) => break,
            Err(_) => failed += 1,
        }
        if lost.is_abandoned() {
            break;
        }
        split -= 2;
        let page = area.wrapping_byte_add(split * 4096);
        // SAFETY: as above.
        unsafe { libc::mprotect(page, 4096, libc::PROT_NONE) };
    }
    assert!(failed > 0);
    // Accesses by the library need no mapping.
    assert!(is_revoked(guarded.write(0, 1u8)));
    if lost.is_abandoned() {
        assert!(lost.is_lost());
        assert!(lost.recover().is_err());
        assert!(lost.is_lost());
    }
    println!("abandoned: {}", lost.is_abandoned());
    drop(lost);
    // SAFETY: nobody uses the area.
    unsafe { libc::munmap(area, pages * 4096) };
    fake.give_back();
    let again = fake.scratch();
    poke(&again, 7).unwrap();
    fake.revoke();
    assert!(is_revoked(poke(&again, 7)));
    fake.give_back();
    again.recover().unwrap();
    poke(&again, 8).unwrap();
}

// The previous handler stores here what it is given.

/// 1: on the alternate stack; 2: not.
static STACK: AtomicUsize = AtomicUsize::new(0);
static MASK: AtomicU64 = AtomicU64::new(0);

extern "C" fn looking(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: all zeroes is a valid value.
    let mut stack: libc::stack_t = unsafe { std::mem::zeroed() };
    // SAFETY: only the present one is asked for.
    unsafe { libc::sigaltstack(std::ptr::null(), &mut stack) };
    let there = stack.ss_flags & libc::SS_ONSTACK != 0;
    STACK.store(if there { 1 } else { 2 }, Ordering::SeqCst);
    // SAFETY: all zeroes is the empty set.
    let mut mask: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: only the present one is asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &mut mask) };
    let bits = (1..=64).filter(|signal| {
        // SAFETY: the set is live.
        unsafe { libc::sigismember(&mask, *signal) == 1 }
    });
    MASK.store(bits.fold(0, |all, n| all | 1 << (n - 1)), Ordering::SeqCst);
}

#[test]
fn a_previous_handler_runs_on_the_stack_that_it_asked_for() {
    finishes("stack");
}

fn alternate_stack() {
    let fake = Fake::new(SIZE);
    for (flags, expected) in [(libc::SA_ONSTACK, 1), (0, 2)] {
        install(looking as *const () as usize, libc::SA_SIGINFO | flags);
        let _mapping = fake.guarded();
        send();
        assert_eq!(STACK.load(Ordering::SeqCst), expected);
    }
}

#[test]
fn a_previous_handler_runs_with_the_mask_that_it_asked_for() {
    finishes("mask");
}

fn mask_of_the_previous_handler() {
    let bit = |signal: i32| 1u64 << (signal - 1);
    // SAFETY: all zeroes is a valid action.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_flags = libc::SA_SIGINFO;
    action.sa_sigaction = looking as *const () as usize;
    // SAFETY: the set is live.
    unsafe { libc::sigaddset(&mut action.sa_mask, libc::SIGUSR2) };
    // SAFETY: the action is complete.
    unsafe { libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) };
    // SAFETY: all zeroes is the empty set.
    let mut blocked: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is live.
    unsafe { libc::sigaddset(&mut blocked, libc::SIGWINCH) };
    set_mask(libc::SIG_SETMASK, &blocked);
    send();
    let without = MASK.load(Ordering::SeqCst);
    let expected = bit(libc::SIGUSR2) | bit(libc::SIGWINCH) | bit(libc::SIGBUS);
    assert_eq!(without, expected);

    let fake = Fake::new(SIZE);
    let mapping = fake.guarded();
    send();
    assert_eq!(MASK.load(Ordering::SeqCst), without);
    assert!(mapping.is_armed());
    survives(&fake, &mapping);
}

extern "C-unwind" fn unwinding(_: i32) {
    std::panic::resume_unwind(Box::new(7u8));
}

#[test]
fn a_previous_handler_may_unwind() {
    finishes("unwind");
}

fn handler_that_unwinds() {
    let handler: extern "C-unwind" fn(i32) = unwinding;
    install(handler as usize, libc::SA_NODEFER);
    let fake = Fake::new(SIZE);
    let _mapping = fake.guarded();
    unsafe extern "C-unwind" {
        fn raise(signal: i32) -> i32;
    }
    // SAFETY: `raise` takes no pointer.
    let answer = std::panic::catch_unwind(|| unsafe { raise(libc::SIGBUS) });
    assert_eq!(*answer.unwrap_err().downcast::<u8>().unwrap(), 7);
}

// Scratch memory.

#[test]
fn a_scratch_mapping_is_lost_and_recovered() {
    finishes("scratch");
}

fn scratch_memory() {
    let fake = Fake::new(SIZE);
    let mapping = fake.scratch();
    let address = mapping.as_ptr();
    for round in 1..100 {
        poke(&mapping, round).unwrap();
        fake.revoke();
        assert!(!mapping.is_lost());
        assert!(is_revoked(poke(&mapping, 0xdead)));
        assert!(mapping.is_lost());
        // Lost until it is recovered, and not called.
        fake.give_back();
        assert!(is_revoked(mapping.section(|_| panic!("called"))));
        mapping.recover().unwrap();
        // SAFETY: the mapping has 4 bytes.
        let value = mapping.section(|address| unsafe { address.cast::<u32>().read_volatile() });
        assert_eq!(value.unwrap(), 0);
        assert_eq!(mapping.as_ptr(), address);
    }
    // Two of one lease are lost one by one.
    let second = fake.scratch();
    fake.revoke();
    assert!(is_revoked(poke(&mapping, 1)));
    assert!(!second.is_lost());

    // Eight threads, two of which recover.
    let stop = AtomicBool::new(false);
    let (lost, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for thread in 0..8usize {
            let (mapping, stop, lost, done) = (&mapping, &stop, &lost, &done);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let answer = mapping.section(|address| {
                        let word = address.cast::<u64>().wrapping_add(thread);
                        // SAFETY: each thread has a word of its own in the mapping.
                        unsafe { word.write_volatile(u64::MAX) };
                        // SAFETY: as above.
                        unsafe { word.read_volatile() }
                    });
                    match answer {
                        Ok(value) => {
                            assert!(value == u64::MAX || value == 0);
                            done.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(_) => {
                            lost.fetch_add(1, Ordering::Relaxed);
                            if thread < 2 {
                                mapping.recover().unwrap();
                            }
                        }
                    }
                }
            });
        }
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(1) {
            fake.revoke();
            std::thread::sleep(Duration::from_micros(300));
            fake.give_back();
            std::thread::sleep(Duration::from_millis(1));
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(lost.load(Ordering::Relaxed) > 0);
    assert!(done.load(Ordering::Relaxed) > 0);
}

#[test]
fn a_plain_mapping_beside_a_scratch_mapping_dies() {
    dies("scratch and dead");
}

fn plain_fault_beside_scratch() {
    let fake = Fake::new(SIZE);
    let scratch = fake.scratch();
    fake.revoke();
    assert!(is_revoked(poke(&scratch, 1)));
    drop(scratch);
    fake.give_back();
    let plain = fake.lease.map().unwrap();
    fake.revoke();
    let _ = plain.write(0, 1u8);
}
