//! Areas of the address space.
//!
//! Nothing here makes a reference to mapped memory. An address range that is in use is replaced in
//! one step only (`MAP_FIXED` over it, or `mremap` onto it), so that no other thread's mapping can
//! slip in between and be overwritten.

use std::ffi::c_void;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use rustix::io::Errno;
use rustix::mm::MapFlags;
use rustix::mm::MremapFlags;
use rustix::mm::ProtFlags;

/// Size of a huge page-table entry, one level above a page: a page of entries of 8 bytes. That is
/// 2 MiB with pages of 4 KiB, and 32 MiB with pages of 16 KiB, which arm64 can have. Large pages of
/// most IOMMUs are of the same size.
pub(crate) fn huge() -> usize {
    huge_of(rustix::param::page_size())
}

/// Size of an entry of two levels above a page, where the kernel has such entries for devices: 1
/// GiB on x86-64.
pub(crate) fn gigantic() -> Option<usize> {
    cfg!(target_arch = "x86_64").then(|| huge() * 512)
}

const fn huge_of(page: usize) -> usize {
    page * (page / 8)
}

/// A file in memory of zeroes that has no pages yet. `EFBIG`: it would exceed the limit of the
/// process for files (`ulimit -f`), of which the kernel tells by a signal that ends the process.
pub(crate) fn memfd(
    name: &str,
    length: u64,
    flags: rustix::fs::MemfdFlags,
) -> Result<rustix::fd::OwnedFd, Errno> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize);
    if limit.current.is_some_and(|limit| length > limit) {
        return Err(Errno::FBIG);
    }
    let flags = flags | rustix::fs::MemfdFlags::CLOEXEC;
    let file = rustix::fs::memfd_create(name, flags)?;
    rustix::fs::ftruncate(&file, length)?;
    Ok(file)
}

/// The part of a file to map, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    /// Offset in the file, page aligned.
    pub(crate) offset: u64,
    /// Length in bytes, page aligned, not 0.
    pub(crate) length: usize,
    /// Map for writing too.
    pub(crate) writable: bool,
    /// Where to place the mapping.
    pub(crate) residue: Option<Residue>,
}

/// The addresses that equal a value modulo the size of an entry: [`huge`] or [`gigantic`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Residue {
    /// The value, less than the modulus.
    pub(crate) value: usize,
    /// The modulus, a power of two.
    pub(crate) modulus: usize,
}

impl Request {
    /// All of a file of this length, to be read and written.
    fn scratch(length: usize) -> Self {
        Self {
            offset: 0,
            length,
            writable: true,
            residue: None,
        }
    }

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
            let Some(address) = request.residue.and_then(|residue| {
                // Where the process has no so much room, smaller entries do.
                let smaller = Residue {
                    modulus: huge(),
                    ..residue
                };
                free_address(request.length, residue)
                    .or_else(|| free_address(request.length, smaller))
            }) else {
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

    /// Memory to put in the place of an area of this length with [`put_scratch`]: shared, from a
    /// file that has no pages yet, and inaccessible until then. So it is not populated where the
    /// process locks its memory, and counts against the limits now, when an error can be answered.
    pub(crate) fn reserve(length: usize) -> Result<Self, Errno> {
        let length = length.next_multiple_of(rustix::param::page_size());
        let request = Request::scratch(length);
        let file = scratch_file(length)?;
        map_with(
            file.as_fd(),
            request,
            0,
            MapFlags::empty(),
            ProtFlags::empty(),
        )
    }

    /// Puts a new mapping of a file in the place of the scratch memory that this area holds, in one
    /// step.
    ///
    /// On an error the area still holds scratch memory, or, if `is_abandoned` answers true
    /// thereafter, it is not known what.
    pub(crate) fn replace(&self, fd: BorrowedFd<'_>, request: Request) -> Result<(), Errno> {
        if self.is_abandoned() || request.length != self.length {
            return Err(Errno::FAULT);
        }
        // Mapped elsewhere first: a driver may refuse, and a refused MAP_FIXED leaves a hole.
        let fresh = map_at(fd, request, 0, MapFlags::empty())?;
        // SAFETY: both are areas of ours, and mapped at the same time.
        match unsafe { move_onto(fresh.address(), self.address(), self.length) } {
            Ok(()) => {
                // It is this area's from now on.
                std::mem::forget(fresh);
                Ok(())
            }
            Err(errno) => {
                // The kernel may have unmapped the target before it failed, for want of memory; by
                // now somebody else may have mapped something there.
                if !self.refill() {
                    self.abandoned.store(true, Ordering::Release);
                }
                Err(errno)
            }
        }
    }

    /// Puts scratch memory where this area is, if nothing is mapped there.
    fn refill(&self) -> bool {
        let scratch = scratch_file(self.length).and_then(|file| {
            let request = Request::scratch(self.length);
            let flags = MapFlags::FIXED_NOREPLACE;
            map_at(file.as_fd(), request, self.address(), flags)
        });
        match scratch {
            Ok(scratch) if scratch.address() == self.address() => {
                // It is this area's from now on.
                std::mem::forget(scratch);
                true
            }
            _ => false,
        }
    }

    /// Whether the address range was lost for good to a failure in [`Area::replace`].
    pub(crate) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// Takes charge of an area by address.
    ///
    /// # Safety
    ///
    /// `[start, start + length)` was an `Area` that was forgotten, and nobody else has it.
    pub(crate) unsafe fn from_raw(start: usize, length: usize) -> Option<Self> {
        let start = std::ptr::with_exposed_provenance_mut::<u8>(start);
        Some(Self {
            start: NonNull::new(start)?,
            length,
            abandoned: AtomicBool::new(false),
        })
    }

    /// Gives up charge of it, as a number, for [`Area::from_raw`].
    pub(crate) fn into_raw(self) -> usize {
        let area = std::mem::ManuallyDrop::new(self);
        area.start.as_ptr().expose_provenance()
    }
}

/// A file of zeroes that has no pages yet.
fn scratch_file(length: usize) -> Result<rustix::fd::OwnedFd, Errno> {
    let length = length.next_multiple_of(rustix::param::page_size());
    let flags = rustix::fs::MemfdFlags::empty();
    memfd("barlease scratch", length as u64, flags)
}

/// Moves the mapping of `length` bytes at `from` onto that at `to`, in one step.
///
/// # Safety
///
/// Both ranges are areas of ours, and do not overlap.
unsafe fn move_onto(from: usize, to: usize, length: usize) -> Result<(), Errno> {
    // SAFETY: the ranges are ours, says the caller, and no reference to either exists anywhere, by
    // the rule of this module.
    let moved = unsafe {
        rustix::mm::mremap_fixed(
            std::ptr::without_provenance_mut(from),
            length,
            length,
            MremapFlags::MAYMOVE,
            std::ptr::without_provenance_mut(to),
        )
    };
    moved.map(drop)
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
    map_with(fd, request, address, flags, request.protection())
}

fn map_with(
    fd: BorrowedFd<'_>,
    request: Request,
    address: usize,
    flags: MapFlags,
    protection: ProtFlags,
) -> Result<Area, Errno> {
    // SAFETY: without MAP_FIXED (NOREPLACE refuses an occupied range) the new mapping takes no
    // memory that is in use.
    let start = unsafe {
        rustix::mm::mmap(
            std::ptr::without_provenance_mut(address),
            request.length,
            protection,
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

/// An address of `residue` that is free now, with `length` bytes behind it.
fn free_address(length: usize, Residue { value, modulus }: Residue) -> Option<usize> {
    let span = length.checked_add(modulus)?;
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
    let forward = (value % modulus).wrapping_sub(first) % modulus;
    first.checked_add(forward)
}

/// Puts the [`Area::reserve`] at `reserve` over `[start, start + length)`, accessible, in one step,
/// and tells whether that succeeded.
///
/// For the SIGBUS handler: two system calls, neither of which allocates pages or counts anew
/// against a limit; no lock.
///
/// # Safety
///
/// Both ranges belong to areas that are alive and not abandoned, and nobody uses the reserve.
pub(crate) unsafe fn put_scratch(reserve: usize, start: usize, length: usize) -> bool {
    // SAFETY: the range is the reserve's, which nobody uses yet, says the caller.
    let accessible = unsafe {
        rustix::mm::mprotect(
            std::ptr::without_provenance_mut(reserve),
            length,
            rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::WRITE,
        )
    };
    if accessible.is_err() {
        return false;
    }
    // SAFETY: the caller says so.
    unsafe { move_onto(reserve, start, length) }.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(length: u64) -> rustix::fd::OwnedFd {
        memfd("area", length, rustix::fs::MemfdFlags::empty()).unwrap()
    }

    #[test]
    fn a_huge_entry_is_as_large_as_the_page_makes_it() {
        assert_eq!(huge_of(4 << 10), 2 << 20);
        assert_eq!(huge_of(16 << 10), 32 << 20);
        assert_eq!(huge_of(64 << 10), 512 << 20);
    }

    #[test]
    fn an_area_that_was_unmapped_is_scratch_memory_from_its_beginning_to_its_end() {
        let fd = file(16384);
        // Not from the beginning of the file.
        let request = Request {
            offset: 8192,
            length: 8192,
            writable: false,
            residue: None,
        };
        let area = Area::map(fd.as_fd(), request).unwrap();
        assert!(!area.refill(), "over what is there");
        // SAFETY: the range is the area's, and nobody refers to it.
        unsafe { rustix::mm::munmap(area.start().as_ptr().cast(), area.length()) }.unwrap();
        assert!(area.refill());
        for at in [0, 8191] {
            let place = area.start().as_ptr().wrapping_add(at);
            // SAFETY: mapped, by what was asserted.
            unsafe { place.write_volatile(7) };
            // SAFETY: as above.
            assert_eq!(unsafe { place.read_volatile() }, 7);
        }
    }

    #[test]
    fn an_area_is_placed_at_the_residue_asked_for() {
        let huge = huge();
        let fd = file(4 * huge as u64);
        for modulus in [huge, 512 * huge] {
            for value in [0, 4096, modulus - 4096, modulus - huge + 8192] {
                let request = Request {
                    offset: 0,
                    length: 2 * huge,
                    writable: true,
                    residue: Some(Residue { value, modulus }),
                };
                let area = Area::map(fd.as_fd(), request).unwrap();
                assert_eq!(area.address() % modulus, value);
            }
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
        assert!(!area.is_abandoned());
        area.replace(fd.as_fd(), request).unwrap();
    }

    #[test]
    fn a_reserve_takes_the_place_of_an_area() {
        let fd = file(8192);
        rustix::io::write(&fd, b"lease").unwrap();
        let request = Request {
            offset: 0,
            length: 8192,
            writable: true,
            residue: None,
        };
        let area = Area::map(fd.as_fd(), request).unwrap();
        let first = || {
            // SAFETY: mapped, readable.
            unsafe { area.start().as_ptr().read_volatile() }
        };
        assert_eq!(first(), b'l');
        let reserve = Area::reserve(8192).unwrap().into_raw();
        // SAFETY: both are areas; the reserve is given away.
        assert!(unsafe { put_scratch(reserve, area.address(), 8192) });
        assert_eq!(first(), 0);
        area.replace(fd.as_fd(), request).unwrap();
        assert_eq!(first(), b'l');
    }
}
