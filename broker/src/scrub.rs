//! Clearing beside the loop: a thread for each device, which takes turns between the leases that
//! wait for it, so that a small one does not wait for a large one.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::Sender;
use std::sync::mpsc::TryRecvError;
use std::sync::mpsc::channel;
use std::thread;
use std::thread::JoinHandle;

use barlease_ledger::core::Errno;
use barlease_ledger::types::LeaseId;
use barlease_ledger::types::Range;
use barlease_ledger::types::Ranges;

use crate::device::Device;

/// Bytes that are cleared in a turn: some milliseconds of an uncached BAR.
const TURN: u64 = 256 << 10;
/// `ECANCELED`: nobody wants it any more.
const ECANCELED: Errno = 125;

/// The memory to clear.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) lease: LeaseId,
    pub(crate) bar: u8,
    pub(crate) ranges: Ranges,
    pub(crate) pattern: u64,
}

/// Told with the outcome of each job, on the thread.
pub(crate) type Done = dyn Fn(LeaseId, Result<(), Errno>) + Send;

/// The thread of a device. It ends when this is dropped, which waits for it: after that nobody has
/// the device any more.
#[derive(Debug)]
pub(crate) struct Scrubber {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    is_cancelled: Arc<AtomicBool>,
}

impl Scrubber {
    pub(crate) fn start(device: Arc<Device>, done: Box<Done>) -> std::io::Result<Self> {
        let (sender, receiver) = channel();
        let is_cancelled = Arc::new(AtomicBool::new(false));
        let cancelled = is_cancelled.clone();
        let thread = thread::Builder::new()
            .name("scrub".to_owned())
            .spawn(move || work(&device, &receiver, &cancelled, &*done))?;
        Ok(Self {
            jobs: Some(sender),
            thread: Some(thread),
            is_cancelled,
        })
    }

    /// Adds a job; gives it back if the thread has died.
    pub(crate) fn add(&self, job: Job) -> Result<(), Job> {
        match &self.jobs {
            Some(jobs) => jobs.send(job).map_err(|error| error.0),
            None => Err(job),
        }
    }

    /// Has all jobs fail soon, those to come too: the device is let go.
    pub(crate) fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
    }
}

impl Drop for Scrubber {
    fn drop(&mut self) {
        self.cancel();
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // It has said what it panicked of.
            let _ = thread.join();
        }
    }
}

/// A job, and what is left of it.
struct Begun {
    job: Job,
    left: VecDeque<Range>,
}

fn work(device: &Device, jobs: &Receiver<Job>, cancelled: &AtomicBool, done: &Done) {
    let mut begun: VecDeque<Begun> = VecDeque::new();
    loop {
        let next = match begun.is_empty() {
            true => jobs.recv().map_err(|_| TryRecvError::Disconnected),
            false => jobs.try_recv(),
        };
        match next {
            Ok(job) => begun.push_back(Begun {
                left: job.ranges.as_slice().iter().copied().collect(),
                job,
            }),
            Err(TryRecvError::Disconnected) if begun.is_empty() => return,
            Err(_) => {}
        }
        let Some(mut first) = begun.pop_front() else {
            continue;
        };
        let result = match cancelled.load(Ordering::Relaxed) {
            true => Err(ECANCELED),
            false => turn(device, &mut first),
        };
        match result {
            Ok(()) if !first.left.is_empty() => begun.push_back(first),
            result => done(first.job.lease, result),
        }
    }
}

/// Clears some bytes.
fn turn(device: &Device, begun: &mut Begun) -> Result<(), Errno> {
    let mut room = TURN;
    while room > 0
        && let Some(range) = begun.left.front_mut()
    {
        let part = Range {
            offset: range.offset,
            length: range.length.min(room),
        };
        device.scrub(begun.job.bar, part, begun.job.pattern)?;
        room -= part.length;
        range.offset += part.length;
        range.length -= part.length;
        if range.length == 0 {
            begun.left.pop_front();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use barlease::fake::FakeDevice;

    use super::*;

    const PAGE: u64 = 4096;

    type Told = (u64, Result<(), Errno>);

    fn job(lease: u64, pages: std::ops::Range<u64>) -> Job {
        let range = Range {
            offset: pages.start * PAGE,
            length: (pages.end - pages.start) * PAGE,
        };
        Job {
            lease: LeaseId(lease),
            bar: 2,
            ranges: Ranges::One(range),
            pattern: 0x0102_0304_0506_0708,
        }
    }

    fn scrubber(fake: &FakeDevice) -> (Scrubber, Receiver<Told>) {
        let device = Arc::new(Device::new(fake.device().unwrap()).unwrap());
        let (sender, done) = channel();
        let told = move |lease: LeaseId, result| sender.send((lease.0, result)).unwrap();
        (Scrubber::start(device, Box::new(told)).unwrap(), done)
    }

    #[test]
    fn a_small_lease_is_cleared_before_a_large_one_that_began_earlier() {
        let pages = 64 << 8;
        let fake = FakeDevice::builder()
            .bar(2, (pages + 1) * PAGE)
            .build()
            .unwrap();
        let (scrubber, done) = scrubber(&fake);
        scrubber.add(job(1, 0..pages)).unwrap();
        scrubber.add(job(2, pages..pages + 1)).unwrap();
        let order = [done.recv().unwrap(), done.recv().unwrap()];
        assert_eq!(order, [(2, Ok(())), (1, Ok(()))]);
        drop(scrubber);
        let memory = fake.device().unwrap();
        let memory = memory.map_region(2, ..).unwrap();
        for page in [0, 1, pages - 1, pages] {
            let offset = usize::try_from(page * PAGE).unwrap();
            assert_eq!(memory.read::<u64>(offset).unwrap(), 0x0102_0304_0506_0708);
            assert_eq!(
                memory.read::<u64>(offset + 4088).unwrap(),
                0x0102_0304_0506_0708
            );
        }
    }

    #[test]
    fn what_cannot_be_cleared_fails_and_what_is_cancelled_too() {
        let fake = FakeDevice::builder().bar(2, PAGE).build().unwrap();
        let (scrubber, done) = scrubber(&fake);
        scrubber.add(job(1, 1..2)).unwrap();
        assert!(matches!(done.recv().unwrap(), (1, Err(_))));
        scrubber.add(job(2, 0..1)).unwrap();
        assert_eq!(done.recv().unwrap(), (2, Ok(())));
        scrubber.cancel();
        scrubber.add(job(3, 0..1)).unwrap();
        assert_eq!(done.recv().unwrap(), (3, Err(ECANCELED)));
    }
}
