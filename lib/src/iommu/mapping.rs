//! Mapping memory: addresses that are taken, and what is mapped there.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;

use iommufd_bindings as iommufd;
use rustix::fs::OFlags;
use rustix::fs::SealFlags;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use super::DmaAccess;
use super::Iommu;
use super::IovaRange;
use super::Kind;
use super::failed;
use super::lock;
use crate::Error;
use crate::Lease;
use crate::Mapping;
use crate::Result;
use crate::error::Object;
use crate::lease::is_dma_buf;
use crate::sys::ioctl;
use crate::sys::memory;

impl Iommu {
    /// Maps bytes of a memfd, or of another file that is in memory, for devices; at `iova`, or
    /// where there is room. Both numbers of the range and the address are multiples of
    /// [`Iommu::page_size`].
    ///
    /// Devices write to the file as other processes do that have mapped it.
    ///
    /// Errors: [`Error::Invalid`], [`Error::Busy`] (something is mapped at `iova`),
    /// [`Error::ReadOnly`] (devices may write, and this process may not: the file is open for
    /// reading only, or sealed), [`Error::Unsupported`] (no IOMMU, or a dma-buf: see
    /// [`Iommu::map_lease`]);
    /// [`Error::Io`] (`ENOMEM`: over the limit of locked memory, or no addresses left).
    pub fn map_file(
        &self,
        file: impl AsFd,
        range: std::ops::Range<u64>,
        iova: impl Into<Option<u64>>,
        access: DmaAccess,
    ) -> Result<DmaMapping> {
        let file = file.as_fd();
        if is_dma_buf(file).map_err(|errno| failed("map", errno))? {
            return Err(Error::unsupported(
                "map",
                Object::Iommu,
                "a dma-buf can be taken from its holders, and devices would keep what is mapped \
                 like this: map a lease with `map_lease`",
            ));
        }
        if access != DmaAccess::Read && !is_writable(file)? {
            return Err(Error::ReadOnly {
                operation: "map",
                object: Object::Iommu,
            });
        }
        let length = range.end.saturating_sub(range.start);
        let place = self.place(length, iova.into())?;
        if place.map_file((file, range.start), access)? {
            return Ok(place.mapped(None));
        }
        // Mapped here too, so that it stays as long as devices have it.
        let again = file
            .try_clone_to_owned()
            .map_err(|error| Error::from_io("map", Object::Iommu, error))?;
        let window = Lease::from_fd(again)?.map_range(range)?;
        place.map_window(window, access)
    }

    /// Maps a lease for the devices, so that they do peer-to-peer DMA to the BAR that it is of; at
    /// `iova`, or where there is room.
    ///
    /// This takes an iommufd, Linux 7.0, and a lease that the kernel's own exporter made
    /// ([`ExportBuilder::stock`](crate::ExportBuilder::stock)): iommufd imports no other. A
    /// container would keep its access beyond a revocation, and is refused.
    ///
    /// Errors: [`Error::Unsupported`], [`Error::Busy`], [`Error::Io`].
    pub fn map_lease(
        &self,
        lease: &Lease,
        iova: impl Into<Option<u64>>,
        access: DmaAccess,
    ) -> Result<DmaMapping> {
        let Kind::Iommufd { fd, ioas, .. } = &self.inner.kind else {
            return Err(Error::unsupported(
                "map",
                lease.object(),
                "a container cannot lose access to a lease that is revoked: use an iommufd",
            ));
        };
        let place = self.place(lease.size(), iova.into())?;
        let file = (lease.as_fd(), 0);
        let flags = iommufd_flags(access);
        let answer =
            ioctl::iommu::ioas_map_file(fd.as_fd(), *ioas, flags, file, lease.size(), place.iova);
        answer.map_err(|errno| match errno {
            Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL | Errno::NODEV | Errno::NXIO => {
                Error::unsupported(
                    "map",
                    lease.object(),
                    "iommufd maps leases that were exported with `stock`, since Linux 7.0",
                )
                .because(errno)
            }
            errno => Error::from_errno("map", lease.object(), errno),
        })?;
        Ok(place.mapped(None))
    }

    /// Maps memory of this process for devices; at `iova`, or where there is room. Address, length
    /// and IOVA are multiples of [`Iommu::page_size`].
    ///
    /// Prefer [`DmaBuffer`](crate::DmaBuffer), which is safe.
    ///
    /// Errors: as for [`Iommu::map_file`]; [`Error::Io`] with `EFAULT`: no memory there.
    ///
    /// # Safety
    ///
    /// Until the mapping is dropped, the memory stays mapped and belongs to nobody else, and
    /// devices may read and, as `access` says, write it at any moment: there must be no reference
    /// to it that this would break.
    #[allow(
        unsafe_code,
        reason = "that nobody uses the memory is known to the caller only"
    )]
    pub unsafe fn map_memory(
        &self,
        address: *mut u8,
        length: u64,
        iova: impl Into<Option<u64>>,
        access: DmaAccess,
    ) -> Result<DmaMapping> {
        let place = self.place(length, iova.into())?;
        // SAFETY: the caller lets devices have the memory.
        unsafe { place.map_memory(address, access) }?;
        Ok(place.mapped(None))
    }

    /// Chooses an address, and takes it.
    fn place(&self, length: u64, iova: Option<u64>) -> Result<Place> {
        self.place_within(length, iova, u64::MAX)
    }

    pub(super) fn place_within(&self, length: u64, iova: Option<u64>, limit: u64) -> Result<Place> {
        let limits = self.limits()?;
        let invalid = |reason: String| Err(Error::invalid("map", Object::Iommu, reason));
        if length == 0 || length % limits.page != 0 {
            return invalid(format!(
                "{length:#x} bytes are not one or more pages of {:#x} bytes",
                limits.page
            ));
        }
        let mut iovas = lock(&self.inner.iovas);
        let iova = match iova {
            Some(iova) if iova % limits.page != 0 => {
                return invalid(format!(
                    "the address {iova:#x} is not aligned to pages of {:#x} bytes",
                    limits.page
                ));
            }
            Some(iova) => {
                let last = iova.checked_add(length - 1);
                let allowed = |last: u64| {
                    let mut ranges = limits.ranges.iter();
                    ranges.any(|range| range.first <= iova && last <= range.last)
                };
                if !last.is_some_and(allowed) {
                    return invalid(format!(
                        "{length:#x} bytes at the address {iova:#x} are not allowed: see \
                         `allowed_ranges`"
                    ));
                }
                if !iovas.take_at(iova, length) {
                    return Err(failed("map", Errno::BUSY)
                        .if_busy("something is mapped there: choose another address"));
                }
                iova
            }
            None => {
                let below = limits.ranges.into_iter().filter_map(|range| {
                    let last = range.last.min(limit);
                    (range.first <= last).then_some(IovaRange { last, ..range })
                });
                let below: Vec<IovaRange> = below.collect();
                // So that the IOMMU can use large pages, where there is room for that.
                let huge = memory::huge() as u64;
                let huge = (length >= huge)
                    .then(|| iovas.take(&below, length, huge.max(limits.page)))
                    .flatten();
                huge.or_else(|| iovas.take(&below, length, limits.page))
                    .ok_or_else(|| failed("find an address", Errno::NOMEM))?
            }
        };
        drop(iovas);
        Ok(Place {
            iommu: self.clone(),
            iova,
            length,
            keep: false,
        })
    }
}

/// Whether this process may write to a file through the descriptor. iommufd asks neither for the
/// mode of the descriptor nor for seals, by which others know that nobody writes.
fn is_writable(file: BorrowedFd<'_>) -> Result<bool> {
    let mode = rustix::fs::fcntl_getfl(file).map_err(|errno| failed("map", errno))?;
    // Files that are no memfd have none.
    let seals = rustix::fs::fcntl_get_seals(file).unwrap_or(SealFlags::empty());
    let kept = seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE);
    Ok(mode & OFlags::RWMODE == OFlags::RDWR && !kept)
}

/// Addresses that are taken, and given back unless something is mapped there.
pub(super) struct Place {
    pub(super) iommu: Iommu,
    pub(super) iova: u64,
    pub(super) length: u64,
    pub(super) keep: bool,
}

impl Place {
    /// Maps bytes of a file. False where that is not possible without mapping it here, too.
    pub(super) fn map_file(&self, file: (BorrowedFd<'_>, u64), access: DmaAccess) -> Result<bool> {
        let Kind::Iommufd { fd, ioas, .. } = &self.iommu.inner.kind else {
            return Ok(false);
        };
        let flags = iommufd_flags(access);
        match ioctl::iommu::ioas_map_file(fd.as_fd(), *ioas, flags, file, self.length, self.iova) {
            Ok(()) => Ok(true),
            // Linux before 6.13, and files that are no memfd.
            Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL) => Ok(false),
            Err(errno) => Err(map_failed(errno)),
        }
    }

    /// Maps a window of this process, which is kept.
    pub(super) fn map_window(self, window: Mapping, access: DmaAccess) -> Result<DmaMapping> {
        self.map_shared(&window, access)?;
        Ok(self.mapped(Some(window)))
    }

    /// Maps a window of this process by its address.
    #[allow(unsafe_code, reason = "what is in a window may change at any moment")]
    pub(super) fn map_shared(&self, window: &Mapping, access: DmaAccess) -> Result<()> {
        if window.len() as u64 != self.length {
            let reason = "the file is not that long";
            return Err(Error::invalid("map", Object::Iommu, reason));
        }
        // SAFETY: the window is of a file, mapped shared, to which nobody has references: what is
        // in it changes like what another process writes. Its pages are pinned while devices have
        // them, so they are not used for anything else even when the window goes first.
        unsafe { self.map_memory(window.as_ptr(), access) }
    }

    /// # Safety
    ///
    /// As for [`Iommu::map_memory`]; the memory is `self.length` bytes long.
    #[allow(unsafe_code, reason = "said by the caller")]
    pub(super) unsafe fn map_memory(&self, address: *mut u8, access: DmaAccess) -> Result<()> {
        let (length, iova) = (self.length, self.iova);
        let answer = match &self.iommu.inner.kind {
            Kind::Container { fd, .. } => {
                let read = vfio::VFIO_DMA_MAP_FLAG_READ;
                let flags = access.flags(read, vfio::VFIO_DMA_MAP_FLAG_WRITE);
                // SAFETY: by the caller.
                unsafe { ioctl::iommu::type1_map(fd.as_fd(), flags, address, length, iova) }
            }
            Kind::Iommufd { fd, ioas, .. } => {
                let flags = iommufd_flags(access);
                // SAFETY: by the caller.
                unsafe { ioctl::iommu::ioas_map(fd.as_fd(), *ioas, flags, address, length, iova) }
            }
        };
        answer.map_err(map_failed)
    }

    /// Something is mapped there.
    pub(super) fn mapped(mut self, window: Option<Mapping>) -> DmaMapping {
        self.keep = true;
        DmaMapping {
            iommu: self.iommu.clone(),
            iova: self.iova,
            length: self.length,
            _window: window,
            done: false,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.keep {
            lock(&self.iommu.inner.iovas).give(self.iova);
        }
    }
}

/// Memory that devices reach. Dropping it takes it from them.
#[derive(Debug)]
#[must_use = "dropping it unmaps the memory"]
pub struct DmaMapping {
    iommu: Iommu,
    iova: u64,
    length: u64,
    /// The memory that is mapped, if it is kept here.
    _window: Option<Mapping>,
    done: bool,
}

impl DmaMapping {
    /// Where devices find it.
    #[must_use]
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Never: there are no mappings of 0 bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The address space that it is in.
    #[must_use]
    pub fn iommu(&self) -> &Iommu {
        &self.iommu
    }

    /// Takes it from the devices. When this returns without an error, none reaches it.
    ///
    /// Errors: [`Error::Io`]: then devices may still reach it, and its address is not used again.
    pub fn unmap(mut self) -> Result<()> {
        self.undo()
    }

    fn undo(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.done, true) {
            return Ok(());
        }
        let answer = match &self.iommu.inner.kind {
            Kind::Container { fd, .. } => {
                ioctl::iommu::type1_unmap(fd.as_fd(), self.iova, self.length)
            }
            Kind::Iommufd { fd, ioas, .. } => {
                ioctl::iommu::ioas_unmap(fd.as_fd(), *ioas, self.iova, self.length)
            }
        };
        match answer {
            Ok(_) => {
                lock(&self.iommu.inner.iovas).give(self.iova);
                Ok(())
            }
            // Devices may still reach it: the address stays taken.
            Err(errno) => Err(failed("unmap", errno)),
        }
    }
}

impl Drop for DmaMapping {
    fn drop(&mut self) {
        drop(self.undo());
    }
}

pub(super) fn iommufd_flags(access: DmaAccess) -> u32 {
    access.flags(
        iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE,
        iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE,
    )
}

fn map_failed(errno: Errno) -> Error {
    match errno {
        Errno::EXIST | Errno::ADDRINUSE => failed("map", Errno::BUSY).if_busy(
            "somebody else has mapped something at this address: keep it from being used with \
             `reserve`",
        ),
        errno => failed("map", errno),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::fake::FakeIommu;

    fn memfd(length: u64) -> OwnedFd {
        memory::memfd("dma", length, rustix::fs::MemfdFlags::empty()).unwrap()
    }

    #[test]
    fn memory_is_mapped_where_it_was_asked_for_and_unmapped_when_dropped() {
        let fake = FakeIommu::new().unwrap();
        let iommu = fake.iommu().unwrap();
        let file = memfd(0x4000);
        let at = 0x1_0000_0000;
        let mapping = iommu
            .map_file(&file, 0x1000..0x3000, at, DmaAccess::ReadWrite)
            .unwrap();
        assert_eq!((mapping.iova(), mapping.len()), (at, 0x2000));
        fake.write(at + 8, b"from the device").unwrap();
        let mut back = [0; 15];
        rustix::io::pread(&file, &mut back, 0x1008).unwrap();
        assert_eq!(&back, b"from the device");
        // Taken.
        let again = iommu.map_file(&file, 0..0x1000, at, DmaAccess::Read);
        assert!(matches!(again, Err(Error::Busy { .. })), "{again:?}");
        drop(mapping);
        assert!(fake.write(at, b"x").is_err());
        let read_only = iommu
            .map_file(&file, 0..0x1000, at, DmaAccess::Read)
            .unwrap();
        assert!(fake.write(at, b"x").is_err());
        fake.read(at, &mut back).unwrap();
        read_only.unmap().unwrap();
    }

    #[test]
    fn what_cannot_be_mapped_is_refused_and_its_address_is_free() {
        let fake = FakeIommu::new().unwrap();
        let iommu = fake.iommu().unwrap();
        let file = memfd(0x4000);
        let map = |range, iova: Option<u64>| iommu.map_file(&file, range, iova, DmaAccess::Read);
        for (range, iova) in [
            (0..0, None),
            (0..0x800, None),
            (0..0x1000, Some(0x800)),
            // Where interrupts are.
            (0..0x1000, Some(0xfee0_0000)),
            (0..0x1000, Some(u64::MAX - 0xfff)),
        ] {
            let error = map(range.clone(), iova).unwrap_err();
            assert!(matches!(error, Error::Invalid { .. }), "{range:?} {error}");
        }
        fake.fail_next(Errno::NOMEM.raw_os_error());
        let error = map(0..0x1000, Some(0x5000)).unwrap_err();
        assert_eq!(error.errno(), Some(Errno::NOMEM.raw_os_error()));
        assert!(map(0..0x1000, Some(0x5000)).is_ok());
        assert!(iommu.reserve(0x10_0000, 0x1000));
        assert!(matches!(
            map(0..0x1000, Some(0x10_0000)),
            Err(Error::Busy { .. })
        ));
    }

    #[test]
    fn a_mapping_that_cannot_be_undone_is_never_used_again() {
        let fake = FakeIommu::new().unwrap();
        let iommu = fake.iommu().unwrap();
        let file = memfd(0x1000);
        let map = || iommu.map_file(&file, 0..0x1000, 0x7000, DmaAccess::Read);
        let mapping = map().unwrap();
        fake.fail_next(Errno::BUSY.raw_os_error());
        assert!(mapping.unmap().is_err());
        assert!(matches!(map(), Err(Error::Busy { .. })));
        assert!(!iommu.reserve(0x7000, 0x1000));
    }

    #[test]
    fn devices_do_not_write_where_the_process_may_not() {
        let fake = FakeIommu::new().unwrap();
        let iommu = fake.iommu().unwrap();
        let file = memory::memfd("dma", 0x1000, rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
        let map = |file: &OwnedFd, access| iommu.map_file(file, 0..0x1000, None, access);
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let reader: OwnedFd = std::fs::File::open(path).unwrap().into();
        let refused = |file: &OwnedFd, access| {
            let answer = map(file, access);
            assert!(matches!(answer, Err(Error::ReadOnly { .. })), "{answer:?}");
        };
        map(&file, DmaAccess::ReadWrite).unwrap().unmap().unwrap();
        refused(&reader, DmaAccess::ReadWrite);
        refused(&reader, DmaAccess::Write);
        map(&reader, DmaAccess::Read).unwrap().unmap().unwrap();
        for seal in [SealFlags::FUTURE_WRITE, SealFlags::WRITE] {
            rustix::fs::fcntl_add_seals(&file, seal).unwrap();
            refused(&file, DmaAccess::ReadWrite);
            map(&file, DmaAccess::Read).unwrap().unmap().unwrap();
        }
    }
}
