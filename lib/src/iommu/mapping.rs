//! Addresses that are taken, and what is mapped there.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;

use iommufd_bindings as iommufd;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use super::DmaAccess;
use super::Iommu;
use super::Kind;
use super::failed;
use super::lock;
use crate::Error;
use crate::Mapping;
use crate::Result;
use crate::error::Object;
use crate::sys::ioctl;

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
        match ioctl::ioas_map_file(fd.as_fd(), *ioas, flags, file, self.length, self.iova) {
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
                unsafe { ioctl::type1_map(fd.as_fd(), flags, address, length, iova) }
            }
            Kind::Iommufd { fd, ioas, .. } => {
                let flags = iommufd_flags(access);
                // SAFETY: by the caller.
                unsafe { ioctl::ioas_map(fd.as_fd(), *ioas, flags, address, length, iova) }
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
    /// What is mapped, if it is kept here.
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
            Kind::Container { fd, .. } => ioctl::type1_unmap(fd.as_fd(), self.iova, self.length),
            Kind::Iommufd { fd, ioas, .. } => {
                ioctl::ioas_unmap(fd.as_fd(), *ioas, self.iova, self.length)
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
