//! Mappings for code that accesses a lease by its address.

use std::os::fd::AsFd;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

use super::Mapping;
use super::guarded::arm;
use super::options::Source;
use super::slots::Claim;
use crate::Error;
use crate::Result;
use crate::error::Object;
use crate::sys::memory::Area;
use crate::sys::memory::Request;

/// A mapping of a lease for code that must have its address, such as a library in C, and that is
/// not to end the process when the lease is lost.
///
/// When an access faults because the lease is revoked, the SIGBUS handler puts memory of zeroes in
/// the place of the mapping, so that the access can finish, and marks the mapping as lost.
/// [`ScratchMapping::section`] tells whether that happened. The address range stays reserved.
/// [`ScratchMapping::recover`] maps the lease again.
///
/// Use a [`GuardedMapping`](crate::GuardedMapping) where that will do: it has none of what follows.
///
/// - A section ends in a full fence, and code goes on in scratch memory until its section ends.
///   Scratch memory takes pages as they are touched, up to the length of the mapping.
/// - The mapping keeps a duplicate of the lease's descriptor, and reserves as much address space
///   again. Where the process locks its memory (`mlockall`) that counts against its limit.
/// - A child of `fork` that goes on without `exec` must not use it: a thread that the child does
///   not have may have been busy with it.
/// - All that [`GuardedMapping`](crate::GuardedMapping#what-the-guard-needs) needs.
///
/// # Examples
///
/// ```no_run
/// # unsafe extern "C" fn draw(frame: *mut u8, length: usize) {}
/// # fn example(lease: &barlease::Lease) -> barlease::Result<()> {
/// use barlease::Error;
///
/// let frame = barlease::MapOptions::new().map_scratch(lease)?;
/// let length = frame.len();
/// // SAFETY: the function writes `length` bytes from the address on, and nothing else.
/// match frame.section(|address| unsafe { draw(address, length) }) {
///     Err(Error::Revoked { .. }) => frame.recover()?,
///     answer => answer?,
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct ScratchMapping {
    // Dropped in this order: the handler forgets the range before it is unmapped.
    claim: Claim,
    plain: Mapping,
    again: OwnedFd,
    request: Request,
    object: Object,
    explain: fn(&'static str, Object, Errno) -> Error,
}

impl ScratchMapping {
    pub(super) fn new(request: Request, source: &Source<'_>) -> Result<Self> {
        arm(source)?;
        let failed = |errno| (source.explain)("map", source.object.clone(), errno);
        let again = source
            .fd
            .try_clone_to_owned()
            .map_err(|error| Error::from_io("map", source.object.clone(), error))?;
        let area = Area::map(source.fd, request).map_err(failed)?;
        let reserve = Area::reserve(area.length())
            .map_err(|errno| Error::from_errno("map scratch memory", Object::Process, errno))?;
        // The kernel maps whole pages, and a fault may be anywhere in them.
        let length = area.length().next_multiple_of(rustix::param::page_size());
        // SAFETY: the claim is dropped before the area, and gives up before the area is abandoned;
        // the reserve is given away.
        let claim = unsafe { Claim::new(area.address(), length, reserve.into_raw()) };
        Ok(Self {
            claim,
            plain: Mapping::new(area, request.offset - source.file_offset, request.writable),
            again,
            request,
            object: source.object.clone(),
            explain: source.explain,
        })
    }

    extent!();

    /// Address of the first byte; see [`Mapping::as_ptr`](crate::Mapping::as_ptr). It stays the
    /// same.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.plain.as_ptr()
    }

    /// Calls `access` with the address of the first byte, and tells whether all its accesses went
    /// to the lease.
    ///
    /// Errors: [`Error::Revoked`]: what was read must not be used, and what was written may or may
    /// not have reached the device. If the mapping was lost before, `access` is not called.
    pub fn section<R>(&self, access: impl FnOnce(*mut u8) -> R) -> Result<R> {
        let answer = self.claim.state().section(|| access(self.as_ptr()));
        answer.ok_or_else(|| Error::Revoked {
            operation: "access",
            object: Object::Mapping {
                offset: self.offset(),
                length: self.len() as u64,
            },
            done: 0,
            source: None,
        })
    }

    /// Whether an access found the lease revoked, and [`ScratchMapping::recover`] has not mapped it
    /// again. Touches nothing: a lease can be revoked without any access having noticed yet.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        !self.claim.state().is_live()
    }

    /// Maps the lease again, at the same address, after it was lost. Does nothing if it is not
    /// lost. Not for signal handlers.
    ///
    /// `Ok` says that the lease is mapped; if it is still revoked the next access is lost again.
    ///
    /// Errors: [`Error::Dead`] if the lease is revoked for good, [`Error::Io`]; the mapping stays
    /// lost. If the kernel is out of memory ([`ScratchMapping::is_abandoned`]) it may lose the
    /// address range.
    pub fn recover(&self) -> Result<()> {
        self.claim.recover(|| {
            let failed = |errno| (self.explain)("recover", self.object.clone(), errno);
            let reserve = Area::reserve(self.len())
                .map_err(|errno| Error::from_errno("recover", self.object.clone(), errno))?;
            let area = &self.plain.area;
            let answer = area.replace(self.again.as_fd(), self.request);
            if area.is_abandoned() {
                self.claim.give_up();
            }
            answer.map_err(failed)?;
            Ok(reserve.into_raw())
        })
    }

    /// Whether [`ScratchMapping::recover`] lost the address range. Then it is not known what is
    /// mapped there; nothing may be accessed through the address any more, and a fault is not
    /// handled. The range is not unmapped when the mapping is dropped.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.plain.area.is_abandoned()
    }
}

impl Drop for ScratchMapping {
    fn drop(&mut self) {
        // First of all, so that no handler is about to use what is taken now.
        self.claim.give_up();
        if let Some(reserve) = self.claim.take_reserve() {
            // SAFETY: it was given away as an `Area::reserve` of this length, and no handler has
            // taken it.
            drop(unsafe { Area::from_raw(reserve, self.len()) });
        }
    }
}
