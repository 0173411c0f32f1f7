// SPDX-License-Identifier: GPL-2.0

//! Takes the memory of a function away: from processes and from importers, of all of its buffers.
//!
//! How, and in which order of locks, is said in [`leases`](crate::leases).

use crate::{
    buffer::Buffer,
    leases::{Leases, PATIENCE_MS},
    model::access::{Access, Event},
    sys::{
        delayed::Later,
        fence::{Fence, FenceWatch},
        patience::{Endless, Pauses, until_there_is_memory},
    },
};
use kernel::{prelude::*, sync::Arc};

/// Whether the importers that are told to let go are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// They are: nothing reaches the memory after that.
    Yes,
    /// They are told, and let go when they do. The caller holds what others need.
    No,
}

impl Leases<Buffer> {
    /// The device is being closed, or is gone: all its buffers are dead when this returns.
    ///
    /// As for an event, in phases. But since what is dead stays dead, each buffer keeps what its
    /// importers still do: the owner of a device that was pulled out can ask about it.
    pub(crate) fn close(&self) {
        let first = self.shut_for_good();
        self.zap();
        let has_importers = self.is_attached();
        if has_importers {
            let untold = |buffer: &Buffer| buffer.is_attached() && !buffer.is_told();
            self.for_each(untold, |buffer| {
                let Ok(()) = buffer.tell_and_watch(&mut Endless);
            });
        }
        if first {
            self.has_ended();
        }
        if has_importers {
            // An importer may have detached meanwhile, and still be at work.
            let at_work = |buffer: &Buffer| buffer.is_waited_for() || buffer.is_left_by_close();
            self.for_each(at_work, |buffer| buffer.wait());
        }
    }

    /// `event` begins: nothing of this device can be reached when this returns, but for what
    /// importers have mapped that are not waited for.
    pub(crate) fn begin(&self, event: Event, wait: Wait) {
        self.shut(|access| access.begin(event), wait);
    }

    /// Recovery from an error has failed. As for `begin`.
    pub(crate) fn fail(&self, wait: Wait) {
        self.shut(Access::fail, wait);
    }

    /// Makes a change after which nothing may be reached, and takes away what is there.
    fn shut(&self, change: impl FnOnce(&mut Access), wait: Wait) {
        self.shut_door(change);
        self.drain(wait);
    }

    /// Takes away what each buffer has, where its state says that nothing new can come.
    ///
    /// In phases, so that it takes as long as the slowest importer and not the sum, and CPU access
    /// waits for no importer.
    fn drain(&self, wait: Wait) {
        self.zap();
        if self.is_attached() {
            self.drain_importers(wait);
        }
    }

    /// Takes each buffer out of the page tables of all processes.
    fn zap(&self) {
        if self.is_mapped() {
            self.for_each(Buffer::is_mapped, |buffer| buffer.zap());
        }
    }

    /// Tells the importers of every buffer, and then waits for the fences that were there and for
    /// the mappings that have to go.
    ///
    /// A fence that somebody adds later is not waited for, so nobody can make this last for ever.
    /// The importers of a buffer that was revoked have been told, and its fences were looked at
    /// then: the rest of those is waited for, and nothing that a holder adds to a dead lease.
    #[inline(never)]
    fn drain_importers(&self, wait: Wait) {
        let mut fences = KVVec::new();
        let mut at_work = false;
        self.for_each(Buffer::is_attached, |buffer| {
            if !buffer.is_told() {
                if wait == Wait::Yes {
                    let Ok(fence) = buffer.tell_and_look(&mut Endless);
                    if let Some(fence) = fence {
                        watch(buffer, fence, &mut fences);
                    }
                } else if !buffer.try_tell() {
                    self.untold().set(true);
                }
            }
            // Those that let go when they are told are most. None begins anything after that.
            at_work |= buffer.is_in_use();
        });
        if wait == Wait::No {
            return;
        }
        for watched in &fences {
            watched.wait();
        }
        if at_work {
            self.for_each(Buffer::is_waited_for, |buffer| buffer.wait());
        }
    }

    /// Tells the importers that an event could not tell, unless the memory may be touched again: whether all were.
    fn tell_untold(&self) -> bool {
        if !self.untold().get() {
            return true;
        }
        self.untold().set(false);
        let mut all = true;
        self.for_each(Buffer::is_attached, |buffer| {
            // One whose importer keeps a lock must not keep those of others from being told.
            if !buffer.is_reachable() && !buffer.try_tell() {
                all = false;
            }
        });
        if !all {
            self.untold().set(true);
        }
        all
    }

    /// Tells the importers of buffers that were revoked by a thread that has left that to others,
    /// if there is memory for it, and no importer keeps a lock: whether all were.
    fn tell_left(&self) -> bool {
        let mut all = true;
        self.for_each(Buffer::is_left_untold, |buffer| {
            all &= buffer.tell_and_watch(&mut Pauses(0)).is_ok();
        });
        all
    }

    /// Warns of the revoked buffers that nobody waits for and that an importer still uses: whether
    /// there are any.
    pub(crate) fn warn_of_draining(&self) -> bool {
        let mut any = false;
        self.for_each(Buffer::is_left_draining, |buffer| {
            any = true;
            buffer.complain();
        });
        any
    }
}

/// The fences that a buffer had when an event began.
#[pin_data]
struct Watched {
    #[pin]
    watch: FenceWatch,
    buffer: Arc<Buffer>,
}

impl Watched {
    fn wait(&self) {
        while !self.watch.pending().wait(PATIENCE_MS) {
            self.buffer.complain();
        }
    }
}

/// Adds `fence`, that of `buffer`, to those that are waited for.
///
/// Taking away must not fail: where memory is short, this waits for some.
#[cold]
fn watch(buffer: &Arc<Buffer>, fence: Fence, fences: &mut KVVec<Pin<KBox<Watched>>>) {
    let Ok(watched) = until_there_is_memory(&mut Endless, |_| {
        let room = fences.reserve(1, GFP_KERNEL).map_err(Error::from);
        Ok(room.and_then(|()| {
            KBox::pin_init(
                pin_init!(Watched {
                    watch <- FenceWatch::new(None),
                    buffer: buffer.clone(),
                }),
                GFP_KERNEL,
            )
        }))
    });
    watched.watch.arm(fence);
    // There is room.
    let _ = fences.push_within_capacity(watched);
}

/// How long to wait before importers are told that could not be told.
const AGAIN_MS: u32 = 100;

impl Later for Leases<Buffer> {
    const MILLISECONDS: u32 = PATIENCE_MS;

    fn run(&self) -> Option<u32> {
        let all_told = self.tell_untold() & self.tell_left();
        // A warning comes as rarely when this is done more often.
        let runs = self.look_again();
        if all_told || runs % (PATIENCE_MS / AGAIN_MS) == 0 {
            let any = self.warn_of_draining();
            if all_told {
                return any.then_some(PATIENCE_MS);
            }
        }
        Some(AGAIN_MS)
    }
}
