// SPDX-License-Identifier: GPL-2.0

//! Answers the requests of one open file.

use crate::{
    abi,
    attachments::{self, Owner},
    edu::EDU,
    sys::{
        dma_buf::{self, Attachment, DmaBuf, Kind},
        fence::Wait,
        module::ModuleReference,
        user,
    },
};
use kernel::{
    fs::File,
    miscdevice::{MiscDevice, MiscDeviceOptions, MiscDeviceRegistration},
    mm::virt::VmaNew,
    prelude::*,
};

/// The misc device.
pub(crate) type Registration = MiscDeviceRegistration<Opened>;

/// Makes the misc device.
pub(crate) fn register() -> impl PinInit<Registration, Error> {
    MiscDeviceRegistration::register(MiscDeviceOptions {
        name: c"barlease_importer",
    })
}

/// An open file.
pub(crate) struct Opened {
    owner: Owner,
    // Not all supported kernels keep the module of a misc device while it is open.
    _module: ModuleReference,
}

#[vtable]
impl MiscDevice for Opened {
    type Ptr = KBox<Self>;

    fn open(_file: &File, _misc: &MiscDeviceRegistration<Self>) -> Result<KBox<Self>> {
        let opened = Self {
            owner: attachments::new_owner(),
            _module: ModuleReference::new()?,
        };
        Ok(KBox::new(opened, GFP_KERNEL)?)
    }

    fn mmap(this: &Self, _file: &File, vma: &VmaNew) -> Result {
        let number = u32::try_from(dma_buf::page_offset(vma))?;
        attachments::get(this.owner, number)?.mmap(vma)
    }

    fn ioctl(this: &Self, _file: &File, command: u32, argument: usize) -> Result<isize> {
        let owner = this.owner;
        match command {
            abi::ATTACH => user::exchange(argument, |attach| this.attach(attach)),
            abi::DETACH => user::exchange(argument, |target: &mut abi::Target| {
                attachments::detach(owner, target.id)
            }),
            abi::PIN => this.on(argument, |attachment, _| attachment.lock().pin()),
            abi::UNPIN => this.on(argument, |attachment, _| attachment.lock().unpin()),
            abi::MAP => this.on(argument, |attachment, direction| {
                attachment.lock().map(direction)
            }),
            abi::UNMAP => this.on(argument, |attachment, _| attachment.lock().unmap()),
            abi::HOLD => this.on(argument, |attachment, hold| {
                attachment.set_hold(hold != 0);
                Ok(())
            }),
            abi::FENCE => this.on(argument, |attachment, _| attachment.lock().add_fence()),
            abi::SIGNAL => this.on(argument, |attachment, number| {
                attachment.lock().signal_fence(number)
            }),
            abi::ADD_FENCE => user::exchange(argument, |fence| this.add_fence(fence)),
            abi::OCCUPY => this.on(argument, |attachment, _| {
                attachment.occupy();
                Ok(())
            }),
            abi::VACATE => this.on(argument, |attachment, _| attachment.vacate()),
            abi::OCCUPIED => this.on(argument, |attachment, _| attachment.is_occupied()),
            abi::MASK => user::exchange(argument, |target: &mut abi::Target| {
                let edu = EDU.lock();
                let edu = edu.as_ref().ok_or(ENODEV)?;
                edu.function().set_dma_mask(target.value)
            }),
            abi::STATUS => user::exchange(argument, |status| this.status(status)),
            abi::ENTRIES => user::exchange(argument, |entries| this.entries(entries)),
            abi::TRANSFER => user::exchange(argument, |transfer| this.transfer(transfer)),
            abi::COPY => user::exchange(argument, |copy| this.copy(copy)),
            abi::TRANSLATE => user::exchange(argument, |translate| this.translate(translate)),
            abi::TPH => user::exchange(argument, |tph: &mut abi::Tph| {
                let dmabuf = DmaBuf::get(tph.fd)?;
                let (tag, ph) = dmabuf.steering_tag(tph.extended != 0)?;
                tph.steering_tag = tag.into();
                tph.ph = ph.into();
                Ok(())
            }),
            _ => Err(ENOTTY),
        }
    }
}

impl Opened {
    /// Answers a request on an attachment.
    fn on(&self, argument: usize, f: impl FnOnce(&Attachment, u32) -> Result) -> Result<isize> {
        user::exchange(argument, |target: &mut abi::Target| {
            f(&*attachments::get(self.owner, target.id)?, target.value)
        })
    }

    fn attach(&self, request: &mut abi::Attach) -> Result {
        let both = abi::ATTACH_P2P | abi::ATTACH_INVALIDATE;
        let kind = match request.flags {
            abi::ATTACH_STATIC => Kind::Static,
            flags if flags & !both == 0 => Kind::Dynamic {
                peer_to_peer: flags & abi::ATTACH_P2P != 0,
                invalidate: flags & abi::ATTACH_INVALIDATE != 0,
            },
            _ => return Err(EINVAL),
        };
        let dmabuf = DmaBuf::get(request.fd)?;
        let edu = EDU.lock();
        let function = edu.as_ref().ok_or(ENODEV)?.function();
        let attachment = Attachment::new(dmabuf, function, kind)?;
        request.id = attachments::add(self.owner, attachment)?;
        Ok(())
    }

    fn add_fence(&self, fence: &mut abi::AddFence) -> Result {
        let wait = match fence.flags & !abi::FENCE_SHOWS {
            0 => Wait::Usual,
            abi::FENCE_TIME_ERROR => Wait::TimeError,
            abi::FENCE_DEADLOCK => Wait::Deadlock,
            _ => return Err(EINVAL),
        };
        let shows = fence.flags & abi::FENCE_SHOWS != 0;
        let attachment = attachments::get(self.owner, fence.id)?;
        let mut locked = attachment.lock();
        fence.number = locked.add_further_fence(wait, shows, fence.milliseconds)?;
        Ok(())
    }

    fn status(&self, status: &mut abi::Status) -> Result {
        let attachment = attachments::get(self.owner, status.id)?;
        let (invalidations, interruptions) = attachment.invalidations();
        *status = abi::Status {
            id: status.id,
            mapped: attachment.lock().is_mapped().into(),
            invalidations,
            interruptions,
        };
        Ok(())
    }

    fn entries(&self, request: &mut abi::Entries) -> Result {
        let attachment = attachments::get(self.owner, request.id)?;
        // User memory is not touched with the reservation lock held.
        let mut copy = KVVec::new();
        copy.extend_from_slice(attachment.lock().entries(), GFP_KERNEL)?;
        let room = copy.len().min(request.count as usize);
        request.count = copy.len() as u32;
        user::write_entries(request.entries, &copy[..room])
    }

    fn transfer(&self, request: &mut abi::Transfer) -> Result {
        if request.flags & !(abi::TRANSFER_WRITE | abi::TRANSFER_STALE) != 0 {
            return Err(EINVAL);
        }
        let length = usize::try_from(request.length)?;
        if length == 0 || length > abi::TRANSFER_MAX {
            return Err(EINVAL);
        }
        let attachment = attachments::get(self.owner, request.id)?;
        let is_write = request.flags & abi::TRANSFER_WRITE != 0;
        let mut bytes = KVVec::from_elem(0, length, GFP_KERNEL)?;
        if is_write {
            user::read_bytes(request.bytes, &mut bytes)?;
        }
        run_transfer(&attachment, request, &mut bytes)?;
        if !is_write {
            user::write_bytes(request.bytes, &bytes)?;
        }
        Ok(())
    }

    fn copy(&self, request: &mut abi::Move) -> Result {
        if request.length == 0 || request.length > abi::TRANSFER_MAX as u64 {
            return Err(EINVAL);
        }
        let attachment = attachments::get(self.owner, request.id)?;
        let mut edu = EDU.lock();
        let edu = edu.as_mut().ok_or(ENODEV)?;
        let locked = attachment.lock();
        if !locked.is_mapped() {
            return Err(ENXIO);
        }
        let from = locked.pieces(request.from, request.length)?;
        let to = locked.pieces(request.to, request.length)?;
        edu.copy(from.iter().copied(), to.iter().copied())
    }

    fn translate(&self, request: &mut abi::Translate) -> Result {
        let attachment = attachments::get(self.owner, request.id)?;
        let edu = EDU.lock();
        let edu = edu.as_ref().ok_or(ENODEV)?;
        let address = attachment.lock().address(request.offset)?;
        request.physical = edu.function().translate(address)?;
        Ok(())
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        attachments::detach_of(self.owner);
    }
}

/// Moves the bytes. The caller touches no user memory meanwhile: the reservation lock is held.
fn run_transfer(attachment: &Attachment, request: &abi::Transfer, bytes: &mut [u8]) -> Result {
    let is_stale = request.flags & abi::TRANSFER_STALE != 0;
    let mut edu = EDU.lock();
    let edu = edu.as_mut().ok_or(ENODEV)?;
    let locked = attachment.lock();
    if !is_stale && !locked.is_mapped() {
        return Err(ENXIO);
    }
    let pieces = locked.pieces(request.offset, request.length)?;
    // A transfer by a stale mapping must not make the exporter wait.
    let _locked = (!is_stale).then_some(locked);
    let pieces = pieces.iter().copied();
    if request.flags & abi::TRANSFER_WRITE != 0 {
        edu.write(pieces, bytes)
    } else {
        edu.read(pieces, bytes, is_stale)
    }
}
