// SPDX-License-Identifier: GPL-2.0

//! The private features that are about one buffer, and EVENTS.

use crate::{
    abi,
    bound::Barlease,
    buffer::Buffer,
    model::tph::{self, Completer, Tph, TphError},
    sys::{
        dma_buf::DmaBuf,
        errno,
        patience::{Pauses, UntilKilled},
        payload::UserPayload,
        vfio_pci::{Device, FEATURE_GET, FEATURE_PROBE, FEATURE_SET},
        vma,
    },
    taking::Wait,
};
use core::mem::size_of;
use kernel::prelude::*;

/// How often REVOKE_ID with NOWAIT asks again for a lock that somebody has for a moment.
const NOWAIT_PAUSES: u32 = 2;

/// `BARLEASE_FEATURE_DMA_BUF_REVOKE`.
pub(crate) fn revoke(
    device: &Device<'_, Barlease>,
    flags: u32,
    payload: UserPayload,
) -> Result<i32> {
    if !check_feature(flags, &payload, FEATURE_SET, size_of::<abi::DmaBufRevoke>())? {
        return Ok(0);
    }
    let request: abi::DmaBufRevoke = payload.reader().read()?;
    let dmabuf = buffer_at(device, request.dmabuf_fd)?;
    let buffer = dmabuf.exported::<Buffer>().ok_or(EINVAL)?;
    revoke_buffer(device, &buffer, Wait::Yes)
}

/// `BARLEASE_FEATURE_DMA_BUF_REVOKE_ID`.
pub(crate) fn revoke_id(
    device: &Device<'_, Barlease>,
    flags: u32,
    payload: UserPayload,
) -> Result<i32> {
    let size = size_of::<abi::DmaBufRevokeId>();
    if !check_feature(flags, &payload, FEATURE_SET, size)? {
        return Ok(0);
    }
    let request: abi::DmaBufRevokeId = payload.reader().read()?;
    if request.flags & !abi::REVOKE_NOWAIT != 0 || request.reserved != 0 {
        return Err(EINVAL);
    }
    let leases = device.driver().leases();
    let buffer = leases.find(request.id).ok_or(ENOENT)?;
    if !buffer.is_of(leases) {
        return Err(ENOENT);
    }
    if buffer.is_internal() {
        return Err(EINVAL);
    }
    let wait = if request.flags & abi::REVOKE_NOWAIT == 0 {
        Wait::Yes
    } else {
        Wait::No
    };
    revoke_buffer(device, &buffer, wait)
}

fn revoke_buffer(device: &Device<'_, Barlease>, buffer: &Buffer, wait: Wait) -> Result<i32> {
    buffer.kill()?;
    // An importer may keep a lock that it takes to tell importers.
    let told = match wait {
        Wait::Yes => buffer.tell_and_watch(&mut UntilKilled),
        Wait::No => buffer.tell_and_watch(&mut Pauses(NOWAIT_PAUSES)),
    };
    let left = match (told, wait) {
        (Ok(()), _) if !buffer.is_draining() => return Ok(0),
        (_, Wait::No) => errno::EINPROGRESS.into(),
        (Err(killed), Wait::Yes) => killed,
        (Ok(()), Wait::Yes) => match buffer.wait_killable() {
            Ok(()) => return Ok(0),
            Err(killed) => killed,
        },
    };
    buffer.leave_draining();
    if buffer.is_told() {
        device.driver().left_draining().start();
    } else {
        device.driver().left_draining().start_now();
    }
    Err(left)
}

/// `BARLEASE_FEATURE_EVENTS`.
pub(crate) fn events(
    device: &Device<'_, Barlease>,
    flags: u32,
    payload: UserPayload,
) -> Result<i32> {
    if !check_feature(flags, &payload, FEATURE_SET, size_of::<abi::Events>())? {
        return Ok(0);
    }
    let request: abi::Events = payload.reader().read()?;
    if request.reserved != 0 {
        return Err(EINVAL);
    }
    let events = device.driver().leases().events();
    match request.eventfd {
        -1 => events.clear(),
        fd => events.set(fd)?,
    }
    Ok(0)
}

/// `BARLEASE_FEATURE_DMA_BUF_MEMATTR`.
pub(crate) fn memattr(
    device: &Device<'_, Barlease>,
    flags: u32,
    payload: UserPayload,
) -> Result<i32> {
    if !check_feature(
        flags,
        &payload,
        FEATURE_SET,
        size_of::<abi::DmaBufMemattr>(),
    )? {
        return Ok(0);
    }
    let request: abi::DmaBufMemattr = payload.reader().read()?;
    match request.memattr {
        abi::MEMATTR_WC if !vma::write_combining_is_real() => Err(errno::EOPNOTSUPP.into()),
        abi::MEMATTR_NC | abi::MEMATTR_WC => Ok(()),
        _ => Err(ENOENT),
    }?;
    let dmabuf = buffer_at(device, request.dmabuf_fd)?;
    dmabuf
        .exported::<Buffer>()
        .ok_or(EINVAL)?
        .set_memattr(request.memattr)?;
    Ok(0)
}

/// `BARLEASE_FEATURE_DMA_BUF_TPH`.
pub(crate) fn tph(device: &Device<'_, Barlease>, flags: u32, payload: UserPayload) -> Result<i32> {
    let completer = device.driver().completer();
    if completer == Completer::None {
        return Err(errno::EOPNOTSUPP.into());
    }
    if !check_feature(flags, &payload, FEATURE_SET, size_of::<abi::DmaBufTph>())? {
        return Ok(0);
    }
    let request: abi::DmaBufTph = payload.reader().read()?;
    let tph = Tph::new(
        tph::Request {
            flags: request.flags,
            tag: request.steering_tag,
            extended_tag: request.steering_tag_ext,
            hint: request.ph,
        },
        completer,
    )
    .map_err(|error| match error {
        TphError::Unsupported => errno::EOPNOTSUPP.into(),
        TphError::Invalid => EINVAL,
    })?;
    let dmabuf = buffer_at(device, request.dmabuf_fd)?;
    dmabuf.exported::<Buffer>().ok_or(EINVAL)?.alive()?;
    dmabuf
        .with_resv::<Buffer, _>(|guarded| guarded.tph = tph)
        .ok_or(EINVAL)?;
    Ok(0)
}

/// `BARLEASE_FEATURE_DMA_BUF_STATUS`.
pub(crate) fn status(
    device: &Device<'_, Barlease>,
    flags: u32,
    payload: UserPayload,
) -> Result<i32> {
    if !check_feature(flags, &payload, FEATURE_GET, size_of::<abi::DmaBufStatus>())? {
        return Ok(0);
    }
    let request: abi::DmaBufStatus = payload.reader().read()?;
    if request.reserved != 0 {
        return Err(EINVAL);
    }
    let dmabuf = buffer_at(device, request.dmabuf_fd)?;
    let status = dmabuf.exported::<Buffer>().ok_or(EINVAL)?.status();
    payload.write(&abi::DmaBufStatus {
        dmabuf_fd: request.dmabuf_fd,
        ..status
    })?;
    Ok(0)
}

/// The dma-buf behind `fd`, which is one of this device. `EBADF` no such fd, `EINVAL` something
/// else, `ENODEV` of another device or of an earlier open of this one.
fn buffer_at(device: &Device<'_, Barlease>, fd: i32) -> Result<DmaBuf> {
    let dmabuf = DmaBuf::get(fd)?;
    let buffer = dmabuf.exported::<Buffer>().ok_or(EINVAL)?;
    if !buffer.is_of(device.driver().leases()) {
        return Err(ENODEV);
    }
    Ok(dmabuf)
}

/// Checks the arguments of a feature as `vfio_check_feature` does: whether to go on and do it.
pub(crate) fn check_feature(
    flags: u32,
    payload: &UserPayload,
    supported: u32,
    size: usize,
) -> Result<bool> {
    let asked = flags & (FEATURE_GET | FEATURE_SET);
    if asked & !supported != 0 {
        return Err(EINVAL);
    }
    if flags & FEATURE_PROBE != 0 {
        return Ok(false);
    }
    if asked == 0 || payload.len() < size {
        return Err(EINVAL);
    }
    Ok(true)
}
