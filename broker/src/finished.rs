//! Results of work that was done beside the loop, on their way back there.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::Sender;
use std::sync::mpsc::channel;

use barlease::EventFd;
use barlease_ledger::core::Errno;
use barlease_ledger::types::LeaseId;

/// Something that was done.
#[derive(Debug)]
pub(crate) enum Done {
    /// A device was closed.
    Closed(Arc<str>),
    /// The ranges of a lease were cleared, or were not.
    Scrubbed(LeaseId, Result<(), Errno>),
}

/// Where threads say it.
#[derive(Clone, Debug)]
pub(crate) struct Finished {
    sender: Sender<Done>,
    event: Arc<EventFd>,
}

impl Finished {
    pub(crate) fn tell(&self, done: Done) {
        // The receiver is gone only when the service has ended.
        let _ = self.sender.send(done);
        let _ = self.event.signal();
    }
}

/// Where the loop hears it.
#[derive(Debug)]
pub(crate) struct Inbox {
    receiver: Receiver<Done>,
    event: Arc<EventFd>,
}

impl Inbox {
    pub(crate) fn new() -> io::Result<(Self, Finished)> {
        let (sender, receiver) = channel();
        let event = Arc::new(EventFd::new().map_err(io::Error::other)?);
        let finished = Finished {
            sender,
            event: event.clone(),
        };
        Ok((Self { receiver, event }, finished))
    }

    /// All that was said so far.
    pub(crate) fn take(&self) -> Vec<Done> {
        let _ = self.event.take();
        self.receiver.try_iter().collect()
    }
}

impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
