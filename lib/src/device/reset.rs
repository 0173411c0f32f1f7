//! Resets: of the function, and of all that share its bus or slot.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use super::Device;
use crate::Bdf;
use crate::Error;
use crate::Iommu;
use crate::Result;
use crate::sys::ioctl;
use crate::sys::ioctl::Words;

/// Bytes before the functions of `struct vfio_pci_hot_reset_info`, and of each of them.
const INFO: usize = 12;
const MEMBER: usize = 8;
/// Bytes before the groups of `struct vfio_pci_hot_reset`.
const RESET: usize = offset_of!(vfio::vfio_pci_hot_reset, group_fds);
/// Most functions that a hot reset is believed to concern: a bus has 256.
const MOST: u32 = 4096;

/// A function that a hot reset resets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ResetMember {
    /// The function.
    pub bdf: Bdf,
    /// Its IOMMU group; `None` where the device was opened through its character device.
    pub group: Option<u32>,
    /// Whether whoever asks may reset it: known of devices opened through a character device only.
    pub owned: Option<bool>,
}

impl Device {
    /// Resets it (`VFIO_DEVICE_RESET`). Leases are revoked for the time of it.
    ///
    /// Errors: [`Error::Unsupported`]: it has no way to be reset; [`Error::Io`].
    pub fn reset(&self) -> Result<()> {
        let handle = self.handle();
        ioctl::device_reset(handle.fd).map_err(|errno| match errno {
            Errno::INVAL | Errno::NOTTY => Error::unsupported(
                "reset",
                handle.object(),
                "the device has no reset of its own",
            )
            .because(errno),
            errno => Error::from_errno("reset", handle.object(), errno),
        })
    }

    /// The functions that [`Device::hot_reset`] resets, this one included.
    ///
    /// Errors: [`Error::Unsupported`]: neither its bus nor its slot can be reset; [`Error::Io`].
    pub fn hot_reset_set(&self) -> Result<Vec<ResetMember>> {
        let handle = self.handle();
        let mut count = 16;
        // Functions can be plugged in meanwhile.
        for _ in 0..8 {
            let mut words = Words::zeroed(INFO + count as usize * MEMBER);
            let answer = ioctl::call_bytes(handle.fd, ioctl::DEVICE_HOT_RESET_INFO, &mut words);
            let found = words.u32(offset_of!(vfio::vfio_pci_hot_reset_info, count));
            match answer {
                Ok(_) => return self.members(&words, found.min(count)),
                Err(Errno::NOSPC) if found > count && found <= MOST => count = found,
                Err(Errno::NODEV | Errno::NOTTY) => {
                    return Err(Error::unsupported(
                        "hot reset",
                        handle.object(),
                        "neither its bus nor its slot can be reset",
                    )
                    .because(Errno::NODEV));
                }
                Err(errno) => return Err(Error::from_errno("hot reset", handle.object(), errno)),
            }
        }
        let reason = "the number of functions changes all the time";
        Err(Error::malformed("hot reset", handle.object(), reason))
    }

    fn members(&self, words: &Words, count: u32) -> Result<Vec<ResetMember>> {
        let flags = words.u32(offset_of!(vfio::vfio_pci_hot_reset_info, flags));
        let by_id = flags & vfio::VFIO_PCI_HOT_RESET_FLAG_DEV_ID != 0;
        let owned = flags & vfio::VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED != 0;
        (0..count as usize)
            .map(|n| {
                let at = INFO + n * MEMBER;
                let id = words.u32(at);
                let [low, high, bus, devfn] = words.u32(at + 4).to_ne_bytes();
                let segment = u16::from_ne_bytes([low, high]);
                let bdf = Bdf::new(segment.into(), bus, devfn >> 3, devfn & 0b111);
                let bdf = bdf.ok_or_else(|| {
                    let reason = "a function has no possible address";
                    Error::malformed("hot reset", self.handle().object(), reason)
                })?;
                Ok(ResetMember {
                    bdf,
                    group: (!by_id).then_some(id),
                    // All of them if the flag is set; else each has an id, 0 or -1.
                    owned: by_id.then_some(owned || id as i32 >= 0),
                })
            })
            .collect()
    }

    /// Resets the bus or the slot of the device, and so every function of
    /// [`Device::hot_reset_set`]. Each of these that is bound to a driver must be bound to a vfio
    /// driver and be ours: of a group that this device's [`Iommu`] has, or of one that
    /// another of the devices named here has. Leases of all of them are revoked for the time of it.
    ///
    /// Errors: [`Error::Denied`]: a function is not ours; [`Error::Unsupported`]; [`Error::Io`].
    pub fn hot_reset(&self, others: &[&Self]) -> Result<()> {
        let handle = self.handle();
        // A group that has nothing to do with the reset is one too many.
        let wanted: Vec<u32> = self
            .hot_reset_set()?
            .iter()
            .filter_map(|member| member.group)
            .collect();
        let groups: BTreeMap<u32, Arc<OwnedFd>> = std::iter::once(&self)
            .chain(others)
            .filter_map(|device| device.iommu())
            .flat_map(Iommu::groups)
            .filter(|(number, _)| wanted.contains(number))
            .collect();
        let fds: Vec<i32> = groups.values().map(|group| group.as_raw_fd()).collect();

        let mut words = Words::zeroed(RESET + fds.len() * 4);
        // Without a group the iommufd is the proof.
        words.put_u32(
            offset_of!(vfio::vfio_pci_hot_reset, count),
            u32::try_from(fds.len()).unwrap_or(u32::MAX),
        );
        for (n, fd) in fds.iter().enumerate() {
            words.put_u32(RESET + n * 4, *fd as u32);
        }
        let answer = ioctl::call_bytes(handle.fd, ioctl::DEVICE_HOT_RESET, &mut words);
        answer
            .map(drop)
            .map_err(|errno| match errno {
                Errno::NODEV | Errno::NOTTY => Error::unsupported(
                    "hot reset",
                    handle.object(),
                    "neither its bus nor its slot can be reset",
                )
                .because(errno),
                // A group that is not in the list, or too many of them for the set.
                Errno::INVAL => {
                    Error::from_errno("hot reset", handle.object(), Errno::PERM).because(errno)
                }
                errno => Error::from_errno("hot reset", handle.object(), errno),
            })
            .map_err(|error| {
                error.if_denied(
                    "every function of `hot_reset_set` must be open in this process, or bound to a \
                 vfio driver and in a group of the same Iommu",
                )
            })
    }
}
