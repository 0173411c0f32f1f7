//! Guarded mappings against a file that shrinks, which raises SIGBUS as a revoked lease does.

#![allow(unsafe_code, reason = "handlers of somebody else are installed here")]

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;
use std::time::Instant;

use barlease::Error;
use barlease::GuardedMapping;
use barlease::GuardedRegister;
use barlease::Lease;
use barlease::MapOptions;

const SIZE: u64 = 16 * 4096;

/// A stand-in for a lease, and the owner's handle to it.
struct Fake {
    lease: Lease,
    owner: File,
}

impl Fake {
    fn new() -> Self {
        let fd = rustix::fs::memfd_create("lease", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, SIZE).unwrap();
        Self {
            owner: File::from(fd.as_fd().try_clone_to_owned().unwrap()),
            lease: Lease::from_fd(fd).unwrap(),
        }
    }

    fn revoke(&self) {
        self.owner.set_len(0).unwrap();
    }

    fn give_back(&self) {
        self.owner.set_len(SIZE).unwrap();
    }

    fn map(&self) -> GuardedMapping {
        self.lease.map_guarded().unwrap()
    }

    fn content(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(&self.owner, &mut bytes, offset).unwrap();
        u64::from_ne_bytes(bytes)
    }
}

fn is_revoked<T>(answer: Result<T, Error>) -> bool {
    matches!(answer, Err(Error::Revoked { .. }))
}

#[test]
fn every_access_to_a_revoked_lease_is_an_error() {
    let fake = Fake::new();
    let mapping = fake.map();
    let register = mapping.register::<u32>(4096).unwrap();
    register.write(7).unwrap();
    assert_eq!(register.read().unwrap(), 7);

    fake.revoke();
    assert_eq!(register.write(8).unwrap_err().offset(), 4096);
    assert_eq!(register.read().unwrap_err().offset(), 4096);
    assert!(is_revoked(mapping.read::<u8>(0)));
    assert!(is_revoked(mapping.read::<u16>(2)));
    assert!(is_revoked(mapping.read::<u64>(8)));
    assert!(is_revoked(mapping.write(1, 1u8)));
    assert!(is_revoked(mapping.write(2, 1u16)));
    assert!(is_revoked(mapping.write(8, 1u64)));
    assert!(is_revoked(mapping.copy_from(3, &[1; 9000])));
    assert!(is_revoked(mapping.copy_to(3, &mut [0; 9000])));
    assert!(is_revoked(mapping.fill(0..100, 1)));
}

#[test]
fn a_lease_that_is_back_works_at_once() {
    let fake = Fake::new();
    let mapping = fake.map();
    let register = mapping.register::<u64>(8).unwrap();
    for round in 1..100 {
        register.write(round).unwrap();
        assert_eq!(fake.content(8), round);
        fake.revoke();
        assert!(register.write(0xdead).is_err());
        assert!(register.read().is_err());
        fake.give_back();
        assert_eq!(register.read(), Ok(0));
    }
}

/// A file that is shorter than its mapping: the lost access is found to the byte.
#[test]
fn a_block_says_where_it_was_lost() {
    let fake = Fake::new();
    let mapping = fake.map();
    fake.owner.set_len(8192).unwrap();
    type Access = fn(&GuardedMapping) -> Result<(), Error>;
    let accesses: [Access; 3] = [
        |mapping| mapping.copy_from(4096, &[7; 8192]),
        |mapping| mapping.copy_to(4096, &mut [0; 8192]),
        |mapping| mapping.fill(4096.., 7),
    ];
    for access in accesses {
        let Err(Error::Revoked {
            object: barlease::Object::Mapping { offset, length, .. },
            done,
            ..
        }) = access(&mapping)
        else {
            panic!("not revoked");
        };
        assert_eq!((offset, done), (8192, 4096));
        assert!(length == 4096 || length == SIZE - 8192, "{length:#x}");
    }
    assert_eq!(fake.content(8184), u64::from_ne_bytes([7; 8]));

    // A single access, through a window.
    let lost = mapping.window(4096..).unwrap().register::<u16>(4098);
    let lost = lost.unwrap().write(7).unwrap_err();
    assert_eq!((lost.offset(), lost.width()), (8194, 2));
    let typed = mapping.window(4096..).unwrap().typed::<u64>(4096).unwrap();
    let error = typed
        .poll_until(1, 1, std::time::Duration::MAX)
        .unwrap_err();
    let text = error.to_string();
    assert!(text.contains("0x8 mapped bytes at offset 0x2000"), "{text}");
}

#[test]
fn a_read_only_mapping_is_guarded_and_refuses_writes() {
    let fake = Fake::new();
    let mapping = MapOptions::new()
        .range(4096..8192)
        .read_only()
        .map_guarded(&fake.lease)
        .unwrap();
    assert!(matches!(mapping.write(0, 1u8), Err(Error::ReadOnly { .. })));
    assert!(matches!(
        mapping.register::<u8>(0),
        Err(Error::ReadOnly { .. })
    ));
    assert_eq!(mapping.read::<u8>(4095).unwrap(), 0);
    assert!(matches!(
        mapping.read::<u8>(4096),
        Err(Error::OutOfBounds { .. })
    ));
    fake.revoke();
    assert!(is_revoked(mapping.read::<u8>(0)));
    fake.give_back();
    mapping.read::<u8>(0).unwrap();
}

#[test]
fn ranges_of_all_kinds_are_understood() {
    let fake = Fake::new();
    let mapping = fake.map();
    mapping.fill(.., 1).unwrap();
    mapping.fill(8..=15, 2).unwrap();
    assert_eq!(fake.content(0), 0x0101_0101_0101_0101);
    assert_eq!(fake.content(8), 0x0202_0202_0202_0202);
    assert_eq!(fake.content(16), 0x0101_0101_0101_0101);
    assert_eq!(mapping.window(4096..).unwrap().len() as u64, SIZE - 4096);
    assert_eq!(mapping.window(..=0).unwrap().len(), 1);
    assert!(mapping.window(..=usize::MAX).is_err());
    #[expect(clippy::reversed_empty_ranges, reason = "that is the test")]
    let backwards = mapping.window(2..1);
    assert!(matches!(backwards, Err(Error::Invalid { .. })));
    assert_eq!(fake.lease.map_range(4096..).unwrap().offset(), 4096);
    assert_eq!(fake.lease.map_range(..=4095).unwrap().len(), 4096);
}

#[test]
fn losing_one_mapping_leaves_the_others_alone() {
    let fakes: Vec<Fake> = (0..300).map(|_| Fake::new()).collect();
    let mappings: Vec<GuardedMapping> = fakes.iter().map(Fake::map).collect();
    for fake in fakes.iter().step_by(3) {
        fake.revoke();
    }
    for (n, mapping) in mappings.iter().enumerate() {
        assert_eq!(is_revoked(mapping.write(0, n as u64)), n % 3 == 0, "{n}");
    }
    for (n, fake) in fakes.iter().enumerate().filter(|(n, _)| n % 3 != 0) {
        assert_eq!(fake.content(0), n as u64);
    }
}

/// Eight threads write while the owner revokes and gives back. Every write that was reported as
/// done must have been made through the lease: each thread counts up in its own word, which starts
/// at zero whenever the file was emptied, so a write that was acknowledged but not made would show
/// as a word that is behind.
#[test]
fn no_acknowledged_write_is_lost_among_eight_threads() {
    let fake = Fake::new();
    let mapping = fake.map();
    let stop = AtomicBool::new(false);
    // Odd while the owner changes the file: a word checked across a change says nothing.
    let change = AtomicUsize::new(0);
    let lost = AtomicUsize::new(0);
    let done = AtomicUsize::new(0);

    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let (fake, mapping, stop, change) = (&fake, &mapping, &stop, &change);
            let (lost, done) = (&lost, &done);
            scope.spawn(move || {
                let offset = thread * 4096 * 2;
                let register = mapping.register::<u64>(offset as usize).unwrap();
                let mut value = thread << 56;
                while !stop.load(Ordering::Relaxed) {
                    value += 1;
                    let before = change.load(Ordering::SeqCst);
                    match register.write(value) {
                        Ok(()) => {
                            if before % 2 == 0 {
                                let mut bytes = [0; 8];
                                let read = std::os::unix::fs::FileExt::read_at(
                                    &fake.owner,
                                    &mut bytes,
                                    offset,
                                );
                                if change.load(Ordering::SeqCst) == before {
                                    assert_eq!(read.unwrap(), 8);
                                    assert_eq!(u64::from_ne_bytes(bytes), value);
                                    done.fetch_add(1, Ordering::Relaxed);
                                }
                            }
                        }
                        Err(_) => {
                            lost.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
        let begin = Instant::now();
        let enough = || [&lost, &done].map(|seen| seen.load(Ordering::Relaxed) > 100) == [true; 2];
        while begin.elapsed() < Duration::from_secs(2)
            || (!enough() && begin.elapsed() < Duration::from_secs(60))
        {
            change.fetch_add(1, Ordering::SeqCst);
            fake.revoke();
            std::thread::sleep(Duration::from_micros(300));
            fake.give_back();
            change.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(1));
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(lost.load(Ordering::Relaxed) > 100);
    assert!(done.load(Ordering::Relaxed) > 100);
}

#[test]
fn mappings_come_and_go_while_others_fault() {
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for round in 0..300u64 {
                    let fake = Fake::new();
                    let mapping = fake.map();
                    mapping.write(0, round).unwrap();
                    fake.revoke();
                    assert!(is_revoked(mapping.write(0, round)));
                    if round % 2 == 0 {
                        fake.give_back();
                        mapping.write(0, round).unwrap();
                        assert_eq!(fake.content(0), round);
                    }
                }
            });
        }
    });
}

/// Four stores through the guard, of which write-combining memory makes one burst.
///
/// The name is that by which the test finds the function in its own program.
// SAFETY: no other function has the name.
#[unsafe(no_mangle)]
#[inline(never)]
extern "Rust" fn barlease_test_four_stores(registers: &[GuardedRegister<'_, u64>; 4]) -> bool {
    let [first, second, third, fourth] = registers;
    matches!(first.write(1), Ok(()))
        && matches!(second.write(2), Ok(()))
        && matches!(third.write(3), Ok(()))
        && matches!(fourth.write(4), Ok(()))
}

/// Nothing that drains the write-combining buffers stands between two guarded stores: no fence, no
/// serialising or locked instruction, no call to where one could be.
#[test]
fn guarded_stores_have_nothing_between_them_that_keeps_them_from_combining() {
    let fake = Fake::new();
    let mapping = fake.map();
    let registers = [0, 8, 16, 24].map(|offset| mapping.register(offset).unwrap());
    assert!(barlease_test_four_stores(&registers));
    assert_eq!(fake.content(24), 4);

    let listing = Command::new("objdump")
        .args(["-d", "--no-show-raw-insn", "-M", NOTATION])
        .arg("--disassemble=barlease_test_four_stores")
        .arg(std::env::current_exe().unwrap())
        .output()
        .expect("objdump, of the package binutils");
    let listing = String::from_utf8(listing.stdout).unwrap();
    let instructions: Vec<&str> = listing
        .lines()
        .filter_map(|line| line.split_once(":\t"))
        .map(|(_, instruction)| instruction.trim())
        .collect();
    // A guarded store is followed by the step of its flag.
    let stores: Vec<usize> = (1..instructions.len())
        .filter(|n| is_guarded_store(instructions[n - 1], instructions[*n]))
        .map(|n| n - 1)
        .collect();
    assert_eq!(stores.len(), 4, "{listing}");
    for instruction in &instructions[stores[0]..=stores[3]] {
        let name = instruction.split_whitespace().next().unwrap();
        // The way of an access that was lost.
        if matches!(name, "call" | "bl") && instruction.contains("4lost") {
            continue;
        }
        assert!(!SERIALISING.contains(&name), "{instruction} in {listing}");
    }
}

#[cfg(target_arch = "x86_64")]
const NOTATION: &str = "intel";
#[cfg(target_arch = "aarch64")]
const NOTATION: &str = "no-aliases";

#[cfg(target_arch = "x86_64")]
fn is_guarded_store(store: &str, step: &str) -> bool {
    store.starts_with("mov    QWORD PTR [r") && step.starts_with("xor ")
}

#[cfg(target_arch = "aarch64")]
fn is_guarded_store(store: &str, step: &str) -> bool {
    store.starts_with("str") && step.ends_with("wzr, wzr")
}

const SERIALISING: [&str; 14] = [
    "mfence",
    "sfence",
    "lfence",
    "lock",
    "xchg",
    "cpuid",
    "serialize",
    "iret",
    "rsm",
    "call",
    "dmb",
    "dsb",
    "isb",
    "bl",
];

/// Runs one of the functions below, each of which needs a process of its own.
fn child(name: &str) -> std::process::ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "in_a_process_of_its_own",
            "--nocapture",
            "--test-threads=1",
        ])
        .env("BARLEASE_CHILD", name)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap()
}

#[test]
fn in_a_process_of_its_own() {
    match std::env::var("BARLEASE_CHILD").as_deref() {
        Ok("plain") => plain_mapping(),
        Ok("foreign") => foreign_fault(),
        Ok("sent") => sent_signal(),
        Ok("chained") => chained_handler(),
        Ok("ignored") => ignored_signal(),
        Ok(name) => panic!("unknown child {name}"),
        Err(_) => {}
    }
}

/// A plain mapping while a guarded one exists.
fn plain_mapping() {
    let guarded = Fake::new();
    let _guard = guarded.map();
    let fake = Fake::new();
    let mapping = fake.lease.map().unwrap();
    fake.revoke();
    let _ = mapping.read::<u8>(0);
}

/// A fault of a mapping that was guarded once and is not any more.
fn foreign_fault() {
    let fake = Fake::new();
    let mapping = fake.map();
    fake.revoke();
    assert!(is_revoked(mapping.read::<u8>(0)));
    drop(mapping);
    let plain = fake.lease.map().unwrap();
    plain.write(0, 1u8).unwrap();
}

/// A SIGBUS that somebody sent, which has no address.
fn sent_signal() {
    let fake = Fake::new();
    let _mapping = fake.map();
    // The handler of Rust's runtime, which was there before, meets the first one by going back to
    // the default action.
    for _ in 0..2 {
        // SAFETY: `raise` takes no pointer.
        unsafe { libc::raise(libc::SIGBUS) };
    }
}

static FOREIGN: AtomicUsize = AtomicUsize::new(0);

extern "C" fn foreign_handler(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    FOREIGN.fetch_add(1, Ordering::SeqCst);
    // SAFETY: the kernel passes a valid pointer.
    let info = unsafe { &*info };
    if info.si_code != libc::BUS_ADRERR {
        return;
    }
    // SAFETY: a fault has an address.
    let address = unsafe { info.si_addr() } as usize & !4095;
    // Heals the fault, so that the access can finish.
    // SAFETY: the page is that of the plain mapping in `chained_handler`.
    unsafe {
        libc::mmap(
            address as *mut libc::c_void,
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
            -1,
            0,
        )
    };
}

/// A handler that was there before gets what is not ours, with all its arguments; ours it does not.
fn chained_handler() {
    // SAFETY: all zeroes is a valid action.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_flags = libc::SA_SIGINFO;
    action.sa_sigaction = foreign_handler as *const () as usize;
    // SAFETY: the action is complete; the old one is not asked for.
    unsafe { libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) };

    let guarded = Fake::new();
    let mapping = guarded.map();
    let fake = Fake::new();
    let plain = fake.lease.map().unwrap();
    guarded.revoke();
    fake.revoke();

    assert!(is_revoked(mapping.write(0, 1u8)));
    assert_eq!(FOREIGN.load(Ordering::SeqCst), 0);
    plain.write(0, 1u8).unwrap();
    assert_eq!(FOREIGN.load(Ordering::SeqCst), 1);
    plain.write(4096, 1u8).unwrap();
    assert_eq!(FOREIGN.load(Ordering::SeqCst), 2);

    // Sent, with the address of a guarded mapping where a fault has its address.
    let innocent = Fake::new();
    let mapping = innocent.map();
    send_with_address(mapping.as_ptr().addr());
    assert_eq!(FOREIGN.load(Ordering::SeqCst), 3);
    mapping.write(0, 5u64).unwrap();
    assert_eq!(innocent.content(0), 5);
    std::process::exit(42);
}

/// Sends this thread a SIGBUS as `sigqueue` does.
fn send_with_address(address: usize) {
    #[repr(C)]
    struct Info {
        signal: i32,
        errno: i32,
        code: i32,
        _padding: i32,
        address: usize,
        rest: [usize; 13],
    }
    const { assert!(size_of::<Info>() == size_of::<libc::siginfo_t>()) };
    let info = Info {
        signal: libc::SIGBUS,
        errno: 0,
        code: libc::SI_QUEUE,
        _padding: 0,
        address,
        rest: [0; 13],
    };
    // SAFETY: `gettid` has no arguments.
    let thread = unsafe { libc::gettid() };
    // SAFETY: the kernel reads a `siginfo_t` through the pointer.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            std::process::id(),
            thread,
            libc::SIGBUS,
            &info,
        )
    };
    assert_eq!(answer, 0);
}

/// A process that ignores SIGBUS survives one that is sent, and dies of a fault.
fn ignored_signal() {
    // SAFETY: SIG_IGN is a valid disposition.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_IGN) };
    let guarded = Fake::new();
    let mapping = guarded.map();
    // SAFETY: `raise` takes no pointer.
    unsafe { libc::raise(libc::SIGBUS) };
    guarded.revoke();
    assert!(is_revoked(mapping.write(0, 1u8)));
    plain_mapping();
}

#[test]
fn a_sigbus_that_is_not_ours_kills_as_it_would_have() {
    for name in ["plain", "foreign", "sent", "ignored"] {
        let status = child(name);
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{name}: {status}");
    }
}

#[test]
fn a_handler_of_somebody_else_is_called_for_what_is_not_ours() {
    assert_eq!(child("chained").code(), Some(42));
}
