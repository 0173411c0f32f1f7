//! A lease: a dma-buf of BAR ranges.

use std::ffi::CString;
use std::fs::File;
use std::ops::RangeBounds;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering;

use rustix::fs::OFlags;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::BarRange;
use crate::Bdf;
use crate::Error;
use crate::GuardedMapping;
use crate::MapOptions;
use crate::Mapping;
use crate::MemoryType;
use crate::Result;
use crate::error::Object;
use crate::mapping::Source;
use crate::sys;

/// Longest name that [`Lease::set_name`] takes, in bytes.
pub const MAX_NAME: usize = 31;

/// Environment variable that names the descriptor of a lease passed to a child process.
pub const FD_VARIABLE: &str = "BARLEASE_FD";

/// The device and the ranges of a lease, as its owner said.
///
/// It travels with a lease that is [sent](Lease::send). A holder has nothing but the owner's word
/// for it, except for `size` and `writable`, which are those of the file descriptor.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct LeaseInfo {
    /// The device.
    pub bdf: Bdf,
    /// The BAR, 0 to 5.
    pub bar: u32,
    /// The ranges; the lease is their concatenation.
    pub ranges: Vec<BarRange>,
    /// Bytes: the sum of the ranges.
    pub size: u64,
    /// Memory type when the lease was made or sent.
    pub memory_type: MemoryType,
    /// Whether it can be mapped for writing.
    pub writable: bool,
}

impl LeaseInfo {
    /// Sum of the ranges. `None` if it overflows.
    pub(crate) fn sum(ranges: &[BarRange]) -> Option<u64> {
        ranges
            .iter()
            .try_fold(0u64, |sum, range| sum.checked_add(range.length))
    }
}

/// A lease: a dma-buf file descriptor that stands for ranges of a BAR.
///
/// The owner of the device [exports](crate::Device::export) it and can
/// [revoke](crate::Device::revoke) it. Its holder, who needs no device, can map it, import it for
/// peer-to-peer DMA or pass it on. Dropping it closes the descriptor; mappings stay, and the
/// owner's other copies do too.
///
/// Any other file that can be mapped will do as well, which is of use for tests.
#[derive(Debug)]
pub struct Lease {
    fd: OwnedFd,
    size: u64,
    writable: bool,
    info: Option<LeaseInfo>,
    /// Of `info`, as it can change later.
    memory_type: AtomicU32,
    is_dma_buf: bool,
}

/// Whether the descriptor is one of a dma-buf.
pub(crate) fn is_dma_buf(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    // `DMA_BUF_MAGIC` of linux/magic.h. The type of the field differs between CPUs.
    Ok(i128::from(rustix::fs::fstatfs(fd)?.f_type) == 0x444d_4142)
}

impl Lease {
    /// Takes over a descriptor that was received by other means than [`Lease::receive`].
    ///
    /// The offset of the open file stays where it is.
    ///
    /// Errors: [`Error::Invalid`] if it has no size, [`Error::Io`].
    pub fn from_fd(fd: impl Into<OwnedFd>) -> Result<Self> {
        Self::with_info(fd.into(), None)
    }

    /// Duplicates descriptor number `fd`, which a parent process left open.
    ///
    /// Errors: [`Error::Io`] with `EBADF` if there is none; as [`Lease::from_fd`].
    pub fn from_inherited(fd: RawFd) -> Result<Self> {
        let owned = sys::inherited::duplicate(fd).map_err(|errno| {
            Error::from_errno("inherit", Object::file(format!("/dev/fd/{fd}")), errno)
        })?;
        Self::from_fd(owned)
    }

    /// Takes the lease whose descriptor the environment variable [`FD_VARIABLE`] names, as
    /// `barlease lease take` leaves it to its child.
    ///
    /// Errors: [`Error::Invalid`] if the variable is not set to a number; as
    /// [`Lease::from_inherited`].
    pub fn from_env() -> Result<Self> {
        let number = std::env::var(FD_VARIABLE).ok().and_then(|v| v.parse().ok());
        let fd: RawFd = number.ok_or_else(|| {
            Error::invalid(
                "inherit",
                Object::Variable(FD_VARIABLE.into()),
                "not set to the number of a file descriptor",
            )
        })?;
        Self::from_inherited(fd)
    }

    pub(crate) fn with_info(fd: OwnedFd, info: Option<LeaseInfo>) -> Result<Self> {
        let object = || Self::object_of(info.as_ref());
        let failed = |errno| Error::from_errno("take", object(), errno);
        // Nothing here moves the offset of the open file: the descriptor may be a log of somebody.
        let is_dma_buf = is_dma_buf(fd.as_fd()).map_err(failed)?;
        let size = if is_dma_buf {
            // A dma-buf has no size in its inode, nor an offset: seeking to its end is how it is
            // asked for.
            rustix::fs::seek(&fd, SeekFrom::End(0)).map_err(failed)?
        } else {
            let stat = rustix::fs::fstat(&fd).map_err(failed)?;
            u64::try_from(stat.st_size).unwrap_or(0)
        };
        let mode = rustix::fs::fcntl_getfl(&fd).map_err(failed)? & OFlags::RWMODE;
        if size == 0 {
            return Err(Error::invalid("take", object(), "the file has no size"));
        }
        let memory_type = info
            .as_ref()
            .map_or(MemoryType::Nc, |info| info.memory_type);
        Ok(Self {
            fd,
            size,
            writable: mode == OFlags::RDWR,
            info,
            memory_type: AtomicU32::new(memory_type.to_abi()),
            is_dma_buf,
        })
    }

    /// A lease that the kernel has just made as `info` says.
    pub(crate) fn made(fd: OwnedFd, info: LeaseInfo) -> Self {
        Self {
            fd,
            size: info.size,
            writable: info.writable,
            memory_type: AtomicU32::new(info.memory_type.to_abi()),
            info: Some(info),
            is_dma_buf: true,
        }
    }

    fn object_of(info: Option<&LeaseInfo>) -> Object {
        Object::Lease {
            bdf: info.map(|info| info.bdf),
            bar: info.map(|info| info.bar),
        }
    }

    /// For errors.
    pub(crate) fn object(&self) -> Object {
        Self::object_of(self.info.as_ref())
    }

    /// Size in bytes: the sum of its ranges.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether it can be mapped for writing.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Its device and ranges, if it was exported here or received with that information.
    #[must_use]
    pub fn info(&self) -> Option<LeaseInfo> {
        let mut info = self.info.clone()?;
        info.memory_type = self.memory_type();
        Some(info)
    }

    /// Whether it is a dma-buf, and not a file that stands in for one in a test.
    #[must_use]
    pub fn is_dma_buf(&self) -> bool {
        self.is_dma_buf
    }

    /// Memory type, as far as is known.
    pub(crate) fn memory_type(&self) -> MemoryType {
        MemoryType::from_abi(self.memory_type.load(Ordering::Relaxed)).unwrap_or_default()
    }

    /// Whether it is revoked for good: then [`Error::Dead`]. `Ok` says that it can be mapped; it
    /// may be revoked for a time all the same. For holders, whose accesses answer
    /// [`Error::Revoked`] in both cases.
    ///
    /// Errors: [`Error::Dead`]; as for [`MapOptions::map`].
    pub fn check(&self) -> Result<()> {
        let page = rustix::param::page_size() as u64;
        let range = 0..page.min(self.size);
        MapOptions::new().range(range).any_address().map(self)?;
        Ok(())
    }

    /// As [`Lease::info`], but for the memory type, which is that of the beginning.
    pub(crate) fn described(&self) -> Option<&LeaseInfo> {
        self.info.as_ref()
    }

    /// Remembers it for [`Lease::info`].
    pub(crate) fn note_memory_type(&self, memory_type: MemoryType) {
        self.memory_type
            .store(memory_type.to_abi(), Ordering::Relaxed);
    }

    /// Another descriptor of the same lease.
    ///
    /// Errors: [`Error::Io`], when there are too many.
    pub fn try_clone(&self) -> Result<Self> {
        let fd = self
            .fd
            .try_clone()
            .map_err(|error| Error::from_io("duplicate", self.object(), error))?;
        Ok(Self {
            fd,
            size: self.size,
            writable: self.writable,
            info: self.info.clone(),
            memory_type: AtomicU32::new(self.memory_type.load(Ordering::Relaxed)),
            is_dma_buf: self.is_dma_buf,
        })
    }

    /// Names it, for `/proc/PID/maps` and debugfs. At most [`MAX_NAME`] bytes, no NUL.
    ///
    /// Errors: [`Error::Invalid`], [`Error::NotALease`]: not a dma-buf, [`Error::Io`].
    pub fn set_name(&self, name: &str) -> Result<()> {
        let invalid = |reason: String| Error::invalid("name", self.object(), reason);
        if name.len() > MAX_NAME {
            return Err(invalid(format!(
                "the name has {} bytes, at most {MAX_NAME} are possible",
                name.len()
            )));
        }
        let name =
            CString::new(name).map_err(|_| invalid("the name has a NUL in it".to_owned()))?;
        if !self.is_dma_buf {
            return Err(Error::not_a_lease("name", self.object()).because(Errno::NOTTY));
        }
        sys::ioctl::set_name(self.fd.as_fd(), &name)
            .map_err(|errno| Error::from_errno("name", self.object(), errno))
    }

    /// Maps all of it; see [`MapOptions::map`].
    pub fn map(&self) -> Result<Mapping> {
        MapOptions::new().map(self)
    }

    /// Maps the bytes of `range`; see [`MapOptions::map`].
    pub fn map_range(&self, range: impl RangeBounds<u64>) -> Result<Mapping> {
        MapOptions::new().range(range).map(self)
    }

    /// Maps all of it, guarded; see [`MapOptions::map_guarded`].
    pub fn map_guarded(&self) -> Result<GuardedMapping> {
        MapOptions::new().map_guarded(self)
    }

    /// Maps the bytes of `range`, guarded; see [`MapOptions::map_guarded`].
    pub fn map_guarded_range(&self, range: impl RangeBounds<u64>) -> Result<GuardedMapping> {
        MapOptions::new().range(range).map_guarded(self)
    }

    pub(crate) fn source(&self) -> Result<Source<'_>> {
        Ok(Source {
            fd: self.fd.as_fd(),
            file_offset: 0,
            size: self.size,
            writable: self.writable,
            object: self.object(),
            ranges: self.described().map_or(&[], |info| &info.ranges),
            explain: explain_map,
        })
    }
}

/// Errnos of an mmap of a dma-buf, after we checked the arguments.
fn explain_map(operation: &'static str, object: Object, errno: Errno) -> Error {
    match errno {
        Errno::NODEV => Error::dead(operation, object).because(errno),
        Errno::INVAL | Errno::OPNOTSUPP => Error::unsupported(
            operation,
            object,
            "its exporter cannot map it like this: stock vfio-pci has no mmap of a dma-buf, \
             and write-combining must be real on this platform",
        )
        .because(errno),
        errno => Error::from_errno(operation, object, errno),
    }
}

impl AsFd for Lease {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Lease> for OwnedFd {
    fn from(lease: Lease) -> Self {
        lease.fd
    }
}

impl From<Lease> for File {
    fn from(lease: Lease) -> Self {
        Self::from(lease.fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    fn file(length: u64) -> OwnedFd {
        let fd = rustix::fs::memfd_create("lease", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, length).unwrap();
        fd
    }

    #[test]
    fn size_and_mode_are_those_of_the_descriptor() {
        let lease = Lease::from_fd(file(8192)).unwrap();
        assert_eq!(lease.size(), 8192);
        assert!(lease.is_writable());
        assert_eq!(lease.map().unwrap().len(), 8192);
    }

    #[test]
    fn a_file_without_size_is_refused() {
        assert!(matches!(
            Lease::from_fd(file(0)),
            Err(Error::Invalid { .. })
        ));
    }

    #[test]
    fn an_inherited_descriptor_is_duplicated_close_on_exec() {
        let fd = file(4096);
        let lease = Lease::from_inherited(fd.as_raw_fd()).unwrap();
        assert_ne!(lease.as_fd().as_raw_fd(), fd.as_raw_fd());
        let flags = rustix::io::fcntl_getfd(&lease).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        for bad in [-1, 1_000_000] {
            assert!(matches!(Lease::from_inherited(bad), Err(Error::Io { .. })));
        }
    }

    #[test]
    fn ranges_that_cannot_be_mapped_are_refused() {
        let lease = Lease::from_fd(file(8192)).unwrap();
        for range in [0..0, 4096..4096, 1..4096, 0..1, 0..12288, 8192..12288] {
            let text = format!("{range:?}");
            assert!(
                matches!(lease.map_range(range), Err(Error::Invalid { .. })),
                "{text}"
            );
        }
        assert_eq!(lease.map_range(4096..8192).unwrap().offset(), 4096);
    }

    #[test]
    fn a_name_that_is_too_long_is_refused_and_a_file_has_none() {
        let lease = Lease::from_fd(file(4096)).unwrap();
        for name in ["x".repeat(32), "a\0b".to_owned()] {
            assert!(matches!(lease.set_name(&name), Err(Error::Invalid { .. })));
        }
        let error = lease.set_name("x").unwrap_err();
        assert!(matches!(error, Error::NotALease { .. }));
        assert_eq!(error.errno(), Some(Errno::NOTTY.raw_os_error()));
    }

    #[test]
    fn the_offset_of_the_file_stays_where_it_is() {
        let fd = file(8192);
        rustix::io::write(&fd, b"a line of a log").unwrap();
        let other = fd.try_clone().unwrap();
        let lease = Lease::from_fd(fd).unwrap();
        assert_eq!(lease.size(), 8192);
        assert!(!lease.is_dma_buf());
        assert_eq!(rustix::fs::tell(other), Ok(15));
    }

    #[test]
    fn a_file_that_can_be_mapped_is_not_dead() {
        let lease = Lease::from_fd(file(100)).unwrap();
        lease.check().unwrap();
    }
}
