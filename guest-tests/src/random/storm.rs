//! Everything at once.

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use barlease_oracle::{Oracle, PAGE, Shot};

use super::{
    circumstances, decoded_by_the_emulator,
    machine::{self, Machine},
};
use crate::{
    aer,
    errno::{EAGAIN, EBUSY, EINVAL, EIO, ENODEV, Errno},
    importer::Importer,
    lease::State,
    map::{Map, Sigbus},
    observe,
    pci::Function,
    vfio::{COMMAND, CONFIG_REGION, Device, LOW_POWER_ENTRY, LOW_POWER_EXIT, SET},
};

/// The answers that a reset or a change of power may give while others are at it.
fn allowed(answer: Result<(), Errno>) {
    if let Err(errno) = answer {
        assert!(
            [EAGAIN, EBUSY, EINVAL, EIO].contains(&errno),
            "a reset in a storm: {errno:?}"
        );
    }
}

impl Machine {
    /// Lets threads use a device in every way at once, `rounds` times each. It ends with memory on
    /// and awake.
    ///
    /// # Panics
    ///
    /// When something is accessible that was revoked, or a touch reaches something else than the
    /// memory.
    pub(super) fn storm(&self, number: usize, rounds: u32, oracle: &Oracle, shots: &[Shot]) {
        let this = &self.devices[number];
        let spec = &this.spec;
        let device = this.open();
        let over = AtomicBool::new(false);
        // A reset in D3hot leaves a function in D0, but QEMU goes on to keep its memory from
        // everybody as in D3hot. The kernel wakes a function before a reset, but a write to PMCSR
        // that began before that may put it to sleep again, even one through the device fd
        // (`Device::wake_if_unnoticed` of the module).
        let power_state = Mutex::new(());
        let alone = || power_state.lock().unwrap_or_else(PoisonError::into_inner);
        let command = || {
            // While a reset is on, a write may be refused or lost.
            let _ = device.write(CONFIG_REGION, COMMAND, &[4]);
            let _ = device.write(CONFIG_REGION, COMMAND, &[6]);
        };
        let reset = || {
            let _alone = alone();
            if spec.resets {
                allowed(device.reset());
                allowed(device.function().reset());
            }
            if spec.function_reset {
                machine::function_reset(device);
            }
            if spec.bus_reset {
                allowed(device.hot_reset(&[device.group()]));
                allowed(device.function().port().reset_subordinate());
            }
        };
        // See `Unproved`: what sleeps, and errors that wake it, do not go together where the order
        // of locks is proved.
        let proved = observe::locks_are_watched();
        let reports = |member: &usize| self.devices[*member].spec.reports;
        let open = |member: &usize| oracle.devices[*member].open;
        let reports = spec.set.iter().any(reports) && (!proved || spec.set.iter().all(open));
        let power = || {
            if !(proved && reports) {
                allowed(device.feature(SET | LOW_POWER_ENTRY, &mut []).map(drop));
                allowed(device.feature(SET | LOW_POWER_EXIT, &mut []).map(drop));
            }
            if spec.d3hot {
                let _alone = alone();
                let pmcsr = device.pmcsr();
                let _ = device.write(CONFIG_REGION, pmcsr, &[3]);
                let _ = device.write(CONFIG_REGION, pmcsr, &[0]);
            }
        };
        let lease = || lease_and_revoke(device, spec.bar);
        let import = || {
            let ranges = [(0, PAGE), (3 * PAGE, PAGE)];
            let fd = device
                .export(spec.bar, &ranges)
                .expect("an export in a storm");
            import(device, &fd);
        };
        let look = || {
            let _ = observe::buffers_text(device.function());
            // Another fd of the same open.
            drop(device.group().device(device.function()));
        };
        let touch = || self.touch(oracle, shots);
        let error = || {
            if reports {
                // While a reset is on, it may be lost.
                aer::inject(aer::NON_FATAL);
            }
        };
        thread::scope(|scope| {
            // Also when one of them panics.
            let _ends = Ends(&over);
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    touch();
                }
            });
            let work: [&(dyn Fn() + Sync); 7] =
                [&command, &reset, &power, &lease, &import, &look, &error];
            let workers = work.map(|work| scope.spawn(move || (0..rounds).for_each(|_| work())));
            let results = workers.map(thread::ScopedJoinHandle::join);
            over.store(true, Ordering::Relaxed);
            for result in results {
                if let Err(panic) = result {
                    std::panic::resume_unwind(panic);
                }
            }
        });
        if reports {
            aer::wait_until_handled();
        }
        if spec.d3hot {
            device.set_power_state(0);
        }
        device.set_memory(true);
    }

    /// Lets threads use a device in every way at once while it is pulled out, and then so many
    /// times each.
    ///
    /// # Panics
    ///
    /// When something is accessible that was revoked, or anything is once its user was asked to
    /// close it.
    pub(super) fn pull_in_storm(
        &self,
        number: usize,
        rounds: u32,
        oracle: &Oracle,
        shots: &[Shot],
    ) {
        let this = &self.devices[number];
        let bar = this.spec.bar;
        let device = this.open();
        let of_it = |shot: &&Shot| oracle.device_of(shot.mapping) == number;
        let pulled = AtomicBool::new(false);
        let command = || {
            for command in [4, 6] {
                let _ = device.write(CONFIG_REGION, COMMAND, &[command]);
            }
        };
        // Not through sysfs: who has the device's lock waits for us to close it.
        let reset = || {
            let _ = device.reset();
        };
        let lease = || {
            let is_gone = pulled.load(Ordering::SeqCst);
            match device.export(bar, &[(PAGE, 2 * PAGE), (0, PAGE)]) {
                Ok(fd) => {
                    assert!(!is_gone, "an export of what was pulled out");
                    revoke_mapped(device, &fd);
                }
                Err(errno) => assert_eq!(errno, ENODEV, "an export while it is pulled out"),
            }
        };
        let import = || {
            if let Ok(fd) = device.export(bar, &[(0, PAGE), (3 * PAGE, PAGE)]) {
                import(device, &fd);
            }
        };
        let look = || {
            let _ = observe::buffers_text(device.function());
        };
        let touch = || {
            let is_gone = pulled.load(Ordering::SeqCst);
            for shot in shots.iter().filter(of_it) {
                let touch = self.main.maps[&(shot.mapping as u64)].read(shot.at);
                assert!(!is_gone || touch == Err(Sigbus), "pulled out, {shot:?}");
            }
            self.touch(oracle, shots);
        };
        let work: [&(dyn Fn() + Sync); 6] = [&command, &reset, &lease, &import, &look, &touch];
        thread::scope(|scope| {
            // Also when this panics.
            let _ends = Ends(&pulled);
            for work in work {
                let pulled = &pulled;
                scope.spawn(move || {
                    while !pulled.load(Ordering::SeqCst) {
                        work();
                    }
                    (0..rounds).for_each(|_| work());
                });
            }
            self.pull(number);
        });
    }

    fn touch(&self, oracle: &Oracle, shots: &[Shot]) {
        for shot in shots {
            let of = oracle.device_of(shot.mapping);
            let map = &self.main.maps[&(shot.mapping as u64)];
            if let (Ok(seen), Some(word)) = (map.read(shot.at), shot.word) {
                let function = Function::named(self.devices[of].spec.name);
                assert_eq!(
                    seen,
                    word,
                    "device {of}, {shot:?}; again: {:?}; {}; {}",
                    map.read(shot.at),
                    circumstances(&function),
                    decoded_by_the_emulator()
                );
            }
        }
        thread::yield_now();
    }
}

struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A lease that no one else knows of: whatever happens to the device, REVOKE is the end of it.
fn lease_and_revoke(device: &Device, bar: u32) {
    let ranges = [(PAGE, 2 * PAGE), (0, PAGE)];
    let fd = device.export(bar, &ranges).expect("an export in a storm");
    let map = Map::new(&fd, 3 * PAGE).expect("an mmap in a storm");
    revoke_mapping(device, &fd, &map);
}

/// The same while the device may go away.
fn revoke_mapped(device: &Device, fd: &OwnedFd) {
    match Map::new(fd, 3 * PAGE) {
        Ok(map) => revoke_mapping(device, fd, &map),
        Err(errno) => assert_eq!(errno, ENODEV, "an mmap while it is pulled out"),
    }
}

fn revoke_mapping(device: &Device, fd: &OwnedFd, map: &Map) {
    let _ = map.read(0);
    let _ = map.read(2 * PAGE);
    device.revoke(fd).expect("a revocation in a storm");
    for page in 0..3 {
        assert_eq!(map.read(page * PAGE), Err(Sigbus), "page {page}");
    }
    assert_eq!(device.state(fd), State::Dead);
}

fn import(device: &Device, fd: &OwnedFd) {
    let attachment = match Importer::open().attach(fd.as_fd()) {
        Ok(attachment) => attachment,
        Err(errno) => return assert_eq!(errno, ENODEV, "an attach in a storm"),
    };
    for _ in 0..2 {
        match attachment.map() {
            Ok(()) => drop(attachment.unmap()),
            Err(errno) => assert_eq!(errno, ENODEV, "a DMA mapping in a storm"),
        }
    }
    if attachment.map().is_ok() {
        device.revoke(fd).expect("a revocation in a storm");
        assert!(!attachment.is_mapped());
        assert_eq!(attachment.translate(0), None);
    }
}
