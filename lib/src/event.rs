//! Eventfds: how the kernel tells of interrupts and of changes of leases.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::time::Duration;
use std::time::Instant;

use rustix::event::EventfdFlags;
use rustix::event::PollFd;
use rustix::event::PollFlags;
use rustix::event::Timespec;
use rustix::io::Errno;

use crate::Error;
use crate::Result;
use crate::error::Object;

/// An eventfd that the kernel, or somebody else, signals.
///
/// It counts: many signals between two looks are one answer with their number. It is not blocking
/// and close-on-exec, and any loop can wait for it by its [`AsFd`]. Closing it does no harm to what
/// signals it.
///
/// # Examples
///
/// ```
/// use barlease::EventFd;
/// use std::time::Duration;
///
/// let event = EventFd::new()?;
/// assert_eq!(event.take()?, 0);
/// event.signal()?;
/// event.signal()?;
/// assert_eq!(event.wait()?, 2);
/// assert_eq!(event.wait_timeout(Duration::from_millis(1))?, None);
/// # Ok::<(), barlease::Error>(())
/// ```
#[derive(Debug)]
pub struct EventFd {
    fd: OwnedFd,
}

fn failed(operation: &'static str, errno: Errno) -> Error {
    Error::from_errno(operation, Object::Event, errno)
}

impl EventFd {
    /// A new one, that nobody has signalled.
    ///
    /// Errors: [`Error::Io`] (`EMFILE`, `ENFILE`, `ENOMEM`).
    pub fn new() -> Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let fd = rustix::event::eventfd(0, flags).map_err(|errno| failed("make", errno))?;
        Ok(Self { fd })
    }

    /// Takes over an eventfd that was made elsewhere, and makes it not blocking, for all that share
    /// it.
    ///
    /// Errors: [`Error::Io`].
    pub fn from_fd(fd: impl Into<OwnedFd>) -> Result<Self> {
        let fd = fd.into();
        rustix::io::ioctl_fionbio(&fd, true).map_err(|errno| failed("adopt", errno))?;
        Ok(Self { fd })
    }

    /// How often it was signalled since it was last looked at: 0 if not at all. Does not wait.
    ///
    /// Errors: [`Error::Io`].
    pub fn take(&self) -> Result<u64> {
        let mut count = [0; 8];
        loop {
            match rustix::io::read(&self.fd, &mut count) {
                Ok(8) => return Ok(u64::from_ne_bytes(count)),
                Ok(_) => return Err(failed("read", Errno::INVAL)),
                Err(Errno::AGAIN) => return Ok(0),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failed("read", errno)),
            }
        }
    }

    /// Waits until it is signalled, and answers how often it was.
    ///
    /// Errors: [`Error::Io`].
    pub fn wait(&self) -> Result<u64> {
        loop {
            poll(&mut [self.to_poll()], None)?;
            match self.take()? {
                // Another thread was quicker.
                0 => {}
                count => return Ok(count),
            }
        }
    }

    /// Waits until it is signalled, for `timeout` at most: `None` if it was not.
    ///
    /// Errors: [`Error::Io`].
    pub fn wait_timeout(&self, timeout: Duration) -> Result<Option<u64>> {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            poll(&mut [self.to_poll()], left)?;
            let count = self.take()?;
            if count != 0 {
                return Ok(Some(count));
            }
            if left == Some(Duration::ZERO) {
                return Ok(None);
            }
        }
    }

    /// Waits until one of `events` is signalled, for `timeout` at most if there is one, and answers
    /// its place in the list, the first where there are several. It is left as it is:
    /// [`EventFd::take`] says how often, and another thread may be quicker.
    ///
    /// Errors: [`Error::Invalid`]: the list is empty; [`Error::Io`].
    ///
    /// # Examples
    ///
    /// A driver that works until somebody wants its device back:
    ///
    /// ```no_run
    /// # fn example(device: &barlease::Device) -> barlease::Result<()> {
    /// use barlease::{EventFd, InterruptKind};
    ///
    /// let request = device.enable_interrupt(InterruptKind::Request)?;
    /// let completion = device.enable_interrupt(InterruptKind::Msi)?;
    /// while EventFd::wait_any(&[&request, &completion], None)? == Some(1) {
    ///     println!("{} completions", completion.take()?);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn wait_any(events: &[&Self], timeout: Option<Duration>) -> Result<Option<usize>> {
        if events.is_empty() {
            let reason = "no event that could come is in the list";
            return Err(Error::invalid("wait", Object::Event, reason));
        }
        let mut fds: Vec<_> = events.iter().map(|event| event.to_poll()).collect();
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let signalled = poll(&mut fds, left)?;
            if signalled.is_some() || left == Some(Duration::ZERO) {
                return Ok(signalled);
            }
        }
    }

    fn to_poll(&self) -> PollFd<'_> {
        PollFd::new(&self.fd, PollFlags::IN)
    }

    /// Signals it, as for a test or to wake a thread that waits for it.
    ///
    /// Errors: [`Error::Io`].
    pub fn signal(&self) -> Result<()> {
        signal(self.fd.as_fd()).map_err(|errno| failed("signal", errno))
    }

    /// Another descriptor of the same eventfd.
    ///
    /// Errors: [`Error::Io`].
    pub fn try_clone(&self) -> Result<Self> {
        let fd = self.fd.try_clone();
        let fd = fd.map_err(|error| Error::from_io("duplicate", Object::Event, error))?;
        Ok(Self { fd })
    }

    /// For `async` functions, in a runtime of tokio's that has I/O enabled.
    ///
    /// Errors: [`Error::Io`].
    ///
    /// # Panics
    ///
    /// Outside of such a runtime.
    #[cfg(feature = "tokio")]
    #[allow(unsafe_code, reason = "tokio wants to know that the descriptor stays")]
    pub fn into_async(self) -> Result<AsyncEventFd> {
        use tokio::io::Interest;
        use tokio::io::unix::AsyncFd;
        // SAFETY: the descriptor is owned by `self`, which the `AsyncFd` owns and gives nobody a
        // mutable reference to: it stays open and the same until that is gone.
        let event = unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) };
        event
            .map(|event| AsyncEventFd { event })
            .map_err(|error| Error::from_io("register", Object::Event, error.into_parts().1))
    }
}

/// The first that is signalled. `None`: the time is up, or a signal handler ran.
fn poll(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> Result<Option<usize>> {
    let timeout = timeout.and_then(|left| Timespec::try_from(left).ok());
    match rustix::event::poll(fds, timeout.as_ref()) {
        Ok(_) => Ok(fds.iter().position(|fd| !fd.revents().is_empty())),
        Err(Errno::INTR) => Ok(None),
        Err(errno) => Err(failed("wait", errno)),
    }
}

/// Adds 1. One that is full is signalled already.
pub(crate) fn signal(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    match rustix::io::write(fd, &1u64.to_ne_bytes()) {
        Ok(_) | Err(Errno::AGAIN) => Ok(()),
        Err(errno) => Err(errno),
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl std::os::fd::AsRawFd for EventFd {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}

impl From<EventFd> for OwnedFd {
    fn from(event: EventFd) -> Self {
        event.fd
    }
}

/// An [`EventFd`] that tasks wait for: see [`EventFd::into_async`].
#[cfg(feature = "tokio")]
#[derive(Debug)]
pub struct AsyncEventFd {
    event: tokio::io::unix::AsyncFd<EventFd>,
}

#[cfg(feature = "tokio")]
impl AsyncEventFd {
    /// Waits until it is signalled, and answers how often it was. A future that is dropped before
    /// it is ready has taken nothing.
    ///
    /// Errors: [`Error::Io`].
    pub async fn wait(&self) -> Result<u64> {
        loop {
            let ready = self.event.readable().await;
            let mut ready = ready.map_err(|error| Error::from_io("wait", Object::Event, error))?;
            match self.event.get_ref().take()? {
                0 => ready.clear_ready(),
                count => return Ok(count),
            }
        }
    }

    /// The eventfd.
    #[must_use]
    pub fn into_inner(self) -> EventFd {
        self.event.into_inner()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_waiting_thread_is_woken() {
        let event = EventFd::new().unwrap();
        let other = event.try_clone().unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| event.wait().unwrap());
            other.signal().unwrap();
            assert_eq!(waiting.join().unwrap(), 1);
        });
        assert_eq!(event.take().unwrap(), 0);
    }

    #[test]
    fn a_blocking_eventfd_that_is_adopted_does_not_block() {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let event = EventFd::from_fd(fd).unwrap();
        assert_eq!(event.take().unwrap(), 0);
    }

    #[test]
    fn the_first_of_several_that_is_signalled_is_told() {
        let [first, second, third] = [(); 3].map(|()| EventFd::new().unwrap());
        let events = [&first, &second, &third];
        let soon = Some(Duration::from_millis(1));
        assert_eq!(EventFd::wait_any(&events, soon).unwrap(), None);
        third.signal().unwrap();
        assert_eq!(EventFd::wait_any(&events, None).unwrap(), Some(2));
        second.signal().unwrap();
        assert_eq!(EventFd::wait_any(&events, soon).unwrap(), Some(1));
        assert_eq!((second.take().unwrap(), third.take().unwrap()), (1, 1));
        assert_eq!(EventFd::wait_any(&events, soon).unwrap(), None);
        assert!(matches!(
            EventFd::wait_any(&[], None),
            Err(Error::Invalid { .. })
        ));
    }

    #[cfg(feature = "tokio")]
    #[test]
    fn a_task_is_woken() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .unwrap();
        runtime.block_on(async {
            let event = EventFd::new().unwrap();
            let other = event.try_clone().unwrap();
            let event = event.into_async().unwrap();
            let waker = std::thread::spawn(move || other.signal().unwrap());
            assert_eq!(event.wait().await.unwrap(), 1);
            waker.join().unwrap();
        });
    }
}
