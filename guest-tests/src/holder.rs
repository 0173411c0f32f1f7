//! A holder that makes its page faults slow.

use std::{fs::File, os::fd::AsFd, os::fd::OwnedFd, sync::atomic::Ordering};

use crate::{
    HUGE, PAGE,
    cgroup::Cgroup,
    errno::EFAULT,
    map::{How, Map, shared_words},
    process::{self, Child},
};

/// How such a holder maps a lease.
#[derive(Clone, Copy, Debug)]
pub struct Slow {
    /// Whether large entries are left on for the process.
    pub huge_pages: bool,
    /// Bytes by which its mapping is off the alignment of a large entry, a multiple of a page.
    pub skew: u64,
    /// Whether its control group is then limited to less than it has, so that the kernel has it
    /// sleep for up to 2 s where it allocates.
    pub tight: bool,
}

/// Has a process in the control group `group` map the lease `fd` of `len` bytes again and again, at
/// a place that takes many page tables, and touch all of it; runs `body` meanwhile. How often the
/// process came to the end.
///
/// # Panics
///
/// When the process fails.
pub fn meanwhile<R>(
    group: &Cgroup,
    fd: &OwnedFd,
    len: u64,
    slow: Slow,
    body: impl FnOnce() -> R,
) -> (R, u32) {
    let zeros = File::open("/dev/zero").expect("/dev/zero");
    let words = shared_words(2);
    let [stop, rounds] = [&words[0], &words[1]];
    let holder = Child::start(&[fd.as_fd(), zeros.as_fd()], |link| {
        if !slow.huge_pages {
            process::turn_off_huge_pages();
        }
        group.enter();
        // More than the limit that comes, and not to be reclaimed: there is no swap.
        let ballast = Map::anonymous(48 << 20);
        for at in (0..ballast.len()).step_by(PAGE as usize) {
            ballast.write(at, 1).expect("memory");
        }
        link.send(1);
        link.expect(2);
        while stop.load(Ordering::Relaxed) == 0 {
            let how = How::shared().align(HUGE).skew(slow.skew);
            let map = how.map(fd, 0, len).expect("a mapping");
            let all = (0..len / HUGE).map(|index| index * HUGE + PAGE);
            match map.receive_zeros_at(&zeros, all) {
                // Ended early where memory was taken away.
                Ok(_) | Err(EFAULT) => {}
                Err(error) => panic!("readv: {error:?}"),
            }
            rounds.fetch_add(1, Ordering::Relaxed);
        }
    });
    holder.link.expect(1);
    if slow.tight {
        group.set("memory.high", "1M");
    }
    holder.link.send(2);
    let result = body();
    stop.store(1, Ordering::Relaxed);
    holder.join();
    (result, rounds.load(Ordering::Relaxed))
}
