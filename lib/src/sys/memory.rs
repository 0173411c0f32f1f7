//! Areas of the address space.
//!
//! Nothing here makes a reference to mapped memory. An address range that is in use is replaced in
//! one step only (`MAP_FIXED` over it, or `mremap` onto it), so that no other thread's mapping can
//! slip in between and be overwritten.

use std::ffi::c_void;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use rustix::io::Errno;
use rustix::mm::MapFlags;
use rustix::mm::MremapFlags;
use rustix::mm::ProtFlags;

/// Size of a huge page-table entry: 2 MiB, one level above a 4 KiB page.
pub(crate) const HUGE: usize = 2 << 20;

/// What of a file to map, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    /// Offset in the file, page aligned.
    pub(crate) offset: u64,
    /// Length in bytes, page aligned, not 0.
    pub(crate) length: usize,
    /// Map for writing too.
    pub(crate) writable: bool,
    /// Where to place the mapping: an address that equals this modulo 2 MiB.
    pub(crate) residue: Option<usize>,
}

impl Request {
    fn protection(self) -> ProtFlags {
        if self.writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        }
    }
}

/// A part of the address space that is ours until it is dropped.
///
/// # Invariants
///
/// `[start, start + length)` was mapped by this module and is unmapped by nobody else, unless
/// `abandoned` is set: then it is not ours any more and must not be touched or unmapped.
#[derive(Debug)]
pub(crate) struct Area {
    start: NonNull<u8>,
    length: usize,
    abandoned: AtomicBool,
}

// SAFETY: an area is an address and a length; using them is up to modules that prove it themselves.
unsafe impl Send for Area {}
// SAFETY: as above; `abandoned` is atomic.
unsafe impl Sync for Area {}

impl Area {
    /// Maps a file, shared.
    pub(crate) fn map(fd: BorrowedFd<'_>, request: Request) -> Result<Self, Errno> {
        // Another thread may take the address between its choice and its use: then choose again.
        for _ in 0..8 {
            let Some(address) = request
                .residue
                .and_then(|r| free_address(request.length, r))
            else {
                break;
            };
            match map_at(fd, request, address, MapFlags::FIXED_NOREPLACE) {
                Err(Errno::EXIST) => {}
                Ok(area) if area.address() != address => break,
                answer => return answer,
            }
        }
        map_at(fd, request, 0, MapFlags::empty())
    }

    /// First address.
    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// First address as a number.
    pub(crate) fn address(&self) -> usize {
        self.start.as_ptr().addr()
    }

    /// Length in bytes.
    pub(crate) fn length(&self) -> usize {
        self.length
    }

    /// Puts a new mapping of a file in the place of whatever this area holds, in one step.
    ///
    /// On an error the area still holds what it held, or, if `is_abandoned` answers true
    /// thereafter, nothing.
    pub(crate) fn replace(&self, fd: BorrowedFd<'_>, request: Request) -> Result<(), Errno> {
        if self.is_abandoned() || request.length != self.length {
            return Err(Errno::FAULT);
        }
        // Mapped elsewhere first: a driver may refuse, and a refused MAP_FIXED leaves a hole.
        let fresh = map_at(fd, request, 0, MapFlags::empty())?;
        let fresh = std::mem::ManuallyDrop::new(fresh);
        // SAFETY: source and target are areas of ours of the same length and do not overlap, as both
        // are mapped; no reference to either exists anywhere, by the rule of this module.
        let moved = unsafe {
            rustix::mm::mremap_fixed(
                fresh.start.as_ptr().cast(),
                self.length,
                self.length,
                MremapFlags::MAYMOVE,
                self.start.as_ptr().cast(),
            )
        };
        match moved {
            Ok(_) => Ok(()),
            Err(errno) => {
                // The kernel may have unmapped the target before it failed, for want of memory.
                drop(std::mem::ManuallyDrop::into_inner(fresh));
                if !self.is_mapped() {
                    self.abandoned.store(true, Ordering::Release);
                }
                Err(errno)
            }
        }
    }

    /// Whether the address range was lost for good to a failure in [`Area::replace`].
    pub(crate) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// Whether something is mapped at every address of the area.
    fn is_mapped(&self) -> bool {
        // SAFETY: MADV_NORMAL on a range changes a hint for read-ahead at most; ENOMEM tells that
        // part of the range is not mapped.
        let answer = unsafe {
            rustix::mm::madvise(
                self.start.as_ptr().cast(),
                self.length,
                rustix::mm::Advice::Normal,
            )
        };
        answer != Err(Errno::NOMEM)
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        if self.is_abandoned() {
            return;
        }
        // Fails only for arguments that cannot occur, or when the kernel is out of memory for
        // splitting a mapping, in which case the range stays mapped: a leak, not a hazard.
        // SAFETY: the range is ours by the invariant, and no reference to it exists.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.length) };
    }
}

fn map_at(
    fd: BorrowedFd<'_>,
    request: Request,
    address: usize,
    flags: MapFlags,
) -> Result<Area, Errno> {
    // SAFETY: without MAP_FIXED (NOREPLACE refuses an occupied range) the new mapping takes no
    // memory that is in use.
    let start = unsafe {
        rustix::mm::mmap(
            std::ptr::without_provenance_mut(address),
            request.length,
            request.protection(),
            MapFlags::SHARED | flags,
            fd,
            request.offset,
        )
    }?;
    area(start, request.length)
}

// INVARIANT: every caller just mapped the range.
fn area(start: *mut c_void, length: usize) -> Result<Area, Errno> {
    let start = NonNull::new(start.cast::<u8>()).ok_or(Errno::FAULT)?;
    Ok(Area {
        start,
        length,
        abandoned: AtomicBool::new(false),
    })
}

/// An address that is free now and equals `residue` modulo 2 MiB, with `length` bytes behind it.
fn free_address(length: usize, residue: usize) -> Option<usize> {
    let span = length.checked_add(HUGE)?;
    // SAFETY: an anonymous mapping at an address of the kernel's choice takes no memory in use.
    let start = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            span,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }
    .ok()?;
    let reserved = area(start, span).ok()?;
    let first = reserved.address();
    let forward = (residue % HUGE).wrapping_sub(first) % HUGE;
    first.checked_add(forward)
}

/// Puts anonymous, private, zeroed memory over `[start, start + length)`, in one step, and tells
/// whether that succeeded.
///
/// For the SIGBUS handler: one system call, no allocation, no lock.
///
/// # Safety
///
/// The whole range belongs to an [`Area`] that is alive and not abandoned.
pub(crate) unsafe fn put_scratch(start: usize, length: usize) -> bool {
    // SAFETY: the range is an area's, so that no memory of anybody else is replaced, and no
    // reference to it exists.
    let answer = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::without_provenance_mut(start),
            length,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
        )
    };
    answer.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn file(length: u64) -> rustix::fd::OwnedFd {
        let fd = rustix::fs::memfd_create("area", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, length).unwrap();
        fd
    }

    #[test]
    fn an_area_is_placed_at_the_residue_asked_for() {
        let fd = file(8 << 20);
        for residue in [0, 4096, HUGE - 4096, HUGE + 8192] {
            let request = Request {
                offset: 0,
                length: 4 << 20,
                writable: true,
                residue: Some(residue),
            };
            let area = Area::map(fd.as_fd(), request).unwrap();
            assert_eq!(area.address() % HUGE, residue % HUGE);
        }
    }

    #[test]
    fn a_refused_replacement_leaves_the_area_as_it_was() {
        let fd = file(8192);
        let request = Request {
            offset: 0,
            length: 8192,
            writable: true,
            residue: None,
        };
        let area = Area::map(fd.as_fd(), request).unwrap();
        let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(area.replace(socket.as_fd(), request), Err(Errno::NODEV));
        assert!(area.is_mapped());
        assert!(!area.is_abandoned());
        area.replace(fd.as_fd(), request).unwrap();
        assert!(area.is_mapped());
    }
}
