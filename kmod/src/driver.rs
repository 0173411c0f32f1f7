// SPDX-License-Identifier: GPL-2.0

//! The driver: which operation of a device does what to its leases.
//!
//! What is not here is the core's, untouched.

use crate::{
    abi,
    buffer::Buffer,
    debugfs::BuffersFile,
    door::Way,
    export,
    leases::Leases,
    model::{
        access::{Access, Event, Levels},
        alias::Aliases,
        config::{Piece, Sensitive},
        tph::{self, Completer, Tph, TphError},
    },
    msix::Protected,
    regions,
    sys::{
        dma_buf::DmaBuf,
        errno,
        flag::Flag,
        p2p::Providers,
        params,
        payload::UserPayload,
        sleep::SleepNotifier,
        vfio_pci::{
            Answer, CONFIG_REGION, Capabilities, Device, Driver, FEATURE_GET,
            FEATURE_LOW_POWER_ENTRY, FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP, FEATURE_MASK,
            FEATURE_PROBE, FEATURE_SET, Function, NUM_REGIONS, OFFSET_SHIFT, RegionInfo,
            UserBuffer,
        },
        vma::{self, NewVma},
    },
};
use core::{mem::size_of, ops::Range};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{Arc, Mutex},
};

/// A bound function.
#[pin_data]
pub(crate) struct Barlease {
    leases: Arc<Leases>,
    sensitive: Sensitive,
    completer: Completer,
    #[pin]
    aliases: Mutex<Aliases>,
    /// Of the time since the device was opened: what of its BARs is protected, whether the kernel's own
    /// exporter answers feature 11, and whether somebody has asked about aliases.
    #[pin]
    protected: Mutex<Protected>,
    stock_dma_buf: Flag,
    knows_aliases: Flag,
    #[pin]
    _sleep: SleepNotifier<Leases>,
    _buffers_file: Pin<KBox<BuffersFile>>,
}

impl Barlease {
    /// What it has leased.
    pub(crate) fn leases(&self) -> &Arc<Leases> {
        &self.leases
    }

    /// Further region indexes of its BARs.
    pub(crate) fn aliases(&self) -> &Mutex<Aliases> {
        &self.aliases
    }

    /// What it does not lease, since it was opened.
    pub(crate) fn protected(&self) -> Protected {
        *self.protected.lock()
    }

    /// Whether somebody has asked about aliases since it was opened. The word is set by the first
    /// question.
    pub(crate) fn knows_aliases(&self) -> &Flag {
        &self.knows_aliases
    }
}

impl Driver for Barlease {
    const NAME: &'static CStr = c"barlease-vfio-pci";

    fn accepts(function: &Function<'_>) -> bool {
        crate::denylist::accepts(function)
    }

    fn sriov() -> bool {
        params::enable_sriov()
    }

    fn bind(function: &Function<'_>, providers: Arc<Providers>) -> Result<Arc<Self>> {
        let leases = Leases::new(function.name(), providers)?;
        let buffers_file = BuffersFile::new(&leases)?;
        Arc::pin_init(
            try_pin_init!(Self {
                _sleep <- SleepNotifier::new(leases.clone()),
                leases,
                sensitive: Sensitive::new(function.pm_capability()),
                completer: Completer::from_device_capabilities2(function.device_capabilities2()),
                aliases <- new_mutex!(Aliases::default(), "barlease::aliases"),
                protected <- new_mutex!(Protected::nothing(), "barlease::protected"),
                stock_dma_buf: Flag::new(),
                knows_aliases: Flag::new(),
                _buffers_file: buffers_file,
            }),
            GFP_KERNEL,
        )
    }

    fn unbinding(&self, function: &Function<'_>) {
        // The core asks the user to close the device and waits for it. What was pulled out is not
        // left reachable for so long: its addresses may be given to something else.
        if function.is_gone() {
            self.leases.close();
        }
    }

    fn opened(device: &Device<'_, Self>) {
        let driver = device.driver();
        driver.aliases.lock().clear();
        *driver.protected.lock() = Protected::of(&device.function());
        driver.stock_dma_buf.set(params::stock_dma_buf());
        driver.knows_aliases.set(false);
        driver.leases.open(device.levels());
        // If `unbinding` came before this.
        driver.unbinding(&device.function());
    }

    fn closing(device: &Device<'_, Self>) {
        device.driver().leases.close();
    }

    #[inline]
    fn read(device: &Device<'_, Self>, buffer: UserBuffer, position: &mut i64) -> Answer {
        let further = regions::region_of(*position) >= u64::from(NUM_REGIONS);
        if further || device.driver().leases.is_shut() {
            return read_further(*device, buffer, position);
        }
        device.core_read(buffer, position)
    }

    #[inline]
    fn write(device: &Device<'_, Self>, buffer: UserBuffer, position: &mut i64) -> Answer {
        let driver = device.driver();
        let region = regions::region_of(*position);
        // Its low half says of each offset in config space what there is, and of others too much.
        let offset = u64::from(*position as u32);
        let further = region > CONFIG_REGION
            || region == CONFIG_REGION && driver.sensitive.touches(offset, buffer.len() as u64);
        if further || driver.leases.is_shut() {
            return write_further(*device, buffer, position);
        }
        device.core_write(buffer, position)
    }

    fn may_export(&self, bar: u32, ranges: &[abi::DmaRange]) -> Result {
        // A device that was pulled out is still open, and no longer anybody's.
        self.leases.epoch()?;
        export::check_protected(self, bar, ranges)
    }

    fn region_info(
        device: &Device<'_, Self>,
        info: &mut RegionInfo<'_>,
        capabilities: &mut Capabilities<'_>,
    ) -> Result {
        regions::info(device, info, capabilities)
    }

    fn ioctl(device: &Device<'_, Self>, command: u32, argument: usize) -> Result<isize> {
        let answer = device.core_ioctl(command, argument);
        // A reset leaves the device in D0, whatever it was in.
        notice_wake_up(device);
        answer
    }

    fn feature(device: &Device<'_, Self>, flags: u32, payload: UserPayload) -> Result<i32> {
        notice_wake_up(device);
        let feature = flags & FEATURE_MASK;
        match feature as u16 {
            abi::FEATURE_DMA_BUF if !device.driver().stock_dma_buf.get() => {
                return export::get(device, flags, payload);
            }
            abi::FEATURE_DMA_BUF_STOCK => {
                let stock = (flags & !FEATURE_MASK) | u32::from(abi::FEATURE_DMA_BUF);
                return device.core_feature(stock, payload);
            }
            abi::FEATURE_DMA_BUF_REVOKE => return revoke(device, flags, payload),
            abi::FEATURE_DMA_BUF_MEMATTR => return memattr(device, flags, payload),
            abi::FEATURE_DMA_BUF_TPH => return tph(device, flags, payload),
            abi::FEATURE_ALIAS_REGION => return regions::alias(device, flags, payload),
            abi::FEATURE_DMA_BUF_STATUS => return status(device, flags, payload),
            _ => {}
        }
        let enters = matches!(
            feature,
            FEATURE_LOW_POWER_ENTRY | FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP
        );
        if enters && flags & FEATURE_SET != 0 && flags & FEATURE_PROBE == 0 {
            return bracketed(device, Event::LowPower, || {
                device.core_feature(flags, payload)
            });
        }
        let answer = device.core_feature(flags, payload);
        notice_wake_up(device);
        answer
    }

    fn mmap(device: &Device<'_, Self>, vma: NewVma<'_>) -> Result {
        regions::mmap(device, vma)
    }

    fn reset_prepare(&self, _function: &Function<'_>) {
        self.leases.begin(Event::Reset);
    }

    fn reset_done(&self, function: &Function<'_>) {
        self.leases.update(|access| {
            note_state_of(function, access);
            access.end(Event::Reset);
        });
    }

    fn error_detected(&self, _function: &Function<'_>) {
        self.leases.begin(Event::Error);
    }

    fn error_resume(&self, function: &Function<'_>) {
        self.leases.update(|access| {
            note_state_of(function, access);
            access.end_all(Event::Error);
        });
    }

    fn power_set(&self, function: &Function<'_>) {
        self.leases.update(|access| note_state_of(function, access));
    }

    fn woken(&self, function: &Function<'_>, low_power: bool) {
        self.leases.update(|access| {
            note_state_of(function, access);
            access.set_levels(Levels {
                low_power,
                ..access.levels()
            });
        });
    }
}

/// Takes note of what resets and wake-ups change. What the user reads and asked for they do not change,
/// and it cannot be asked for here: the device may be being closed. One that is not open is asked when it
/// is opened.
fn note_state_of(function: &Function<'_>, access: &mut Access) {
    if access.epoch().is_none() {
        return;
    }
    access.set_levels(Levels {
        undecoded: !function.decodes_memory(),
        sleeping: function.is_sleeping(),
        ..access.levels()
    });
}

/// Lets `act` happen with no memory of the device reachable, then asks the device what is so now.
fn bracketed<R>(device: &Device<'_, Barlease>, event: Event, act: impl FnOnce() -> R) -> R {
    let leases = &device.driver().leases;
    leases.begin(event);
    let result = act();
    leases.update(|access| {
        access.set_levels(device.levels());
        access.end(event);
    });
    result
}

/// Some operations of the core set D0, and one ends low power of a device that is awake. No event tells
/// us, so whoever had an access asks, after it, if the device slept before it. (One that falls asleep
/// and is woken meanwhile is woken by run-time power management, which does tell us.)
pub(crate) fn notice_wake_up(device: &Device<'_, Barlease>) {
    if device.driver().leases().is_asleep() {
        ask(*device);
    }
}

#[cold]
fn ask(device: Device<'_, Barlease>) {
    let leases = device.driver().leases();
    leases.update(|access| access.set_levels(device.levels()));
}

/// Where config space begins in the device fd.
const CONFIG_START: u64 = CONFIG_REGION << OFFSET_SHIFT;

/// Reads behind the regions that every device has, and of a device that must not be touched.
#[inline(never)]
fn read_further(device: Device<'_, Barlease>, buffer: UserBuffer, position: &mut i64) -> Answer {
    let answer = regions::access(device, buffer, position, Way::Read);
    notice_wake_up(&device);
    answer
}

/// Writes to config space that may take memory away, behind it, and to a device that must not be
/// touched.
#[inline(never)]
fn write_further(device: Device<'_, Barlease>, buffer: UserBuffer, position: &mut i64) -> Answer {
    let answer = if regions::region_of(*position) == CONFIG_REGION {
        write_config(&device, buffer, position)
    } else {
        regions::access(device, buffer, position, Way::Write)
    };
    notice_wake_up(&device);
    answer
}

fn write_config(device: &Device<'_, Barlease>, buffer: UserBuffer, position: &mut i64) -> Answer {
    let begin = *position as u64 - CONFIG_START;
    let end = begin.saturating_add(buffer.len() as u64);
    // The core refuses what goes past the end before it writes anything; cut, its first parts would
    // pass.
    if end > device.function().config_size() {
        return device.core_write(buffer, position);
    }
    match device.driver().sensitive.next_piece(begin, end) {
        Some(piece) if piece.len == end - begin => write_piece(device, piece, buffer, position),
        _ => write_in_pieces(device, buffer, position, begin..end).into(),
    }
}

/// A write with each part that may take memory away in brackets.
#[inline(never)]
fn write_in_pieces(
    device: &Device<'_, Barlease>,
    buffer: UserBuffer,
    position: &mut i64,
    range: Range<u64>,
) -> Result<usize> {
    let mut next = range.start;
    while let Some(piece) = device.driver().sensitive.next_piece(next, range.end) {
        let part = buffer.part((piece.pos - range.start) as usize, piece.len as usize);
        let mut at = (CONFIG_START + piece.pos) as i64;
        write_piece(device, piece, part, &mut at).into_result()?;
        next = piece.pos + piece.len;
    }
    *position += buffer.len() as i64;
    Ok(buffer.len())
}

fn write_piece(
    device: &Device<'_, Barlease>,
    piece: Piece,
    part: UserBuffer,
    position: &mut i64,
) -> Answer {
    if !piece.sensitive {
        return device.core_write(part, position);
    }
    bracketed(device, Event::ConfigWrite, || {
        let answer = device.core_write(part, position);
        if device.driver().sensitive.has_power_state(piece) {
            device.wake_if_unnoticed(&device.memory_lock());
        }
        answer
    })
}

/// `BARLEASE_FEATURE_DMA_BUF_REVOKE`.
fn revoke(device: &Device<'_, Barlease>, flags: u32, payload: UserPayload) -> Result<i32> {
    if !check_feature(flags, &payload, FEATURE_SET, size_of::<abi::DmaBufRevoke>())? {
        return Ok(0);
    }
    let request: abi::DmaBufRevoke = payload.reader().read()?;
    let dmabuf = buffer_at(device, request.dmabuf_fd)?;
    dmabuf.exported::<Buffer>().ok_or(EINVAL)?.revoke()?;
    Ok(0)
}

/// `BARLEASE_FEATURE_DMA_BUF_MEMATTR`.
fn memattr(device: &Device<'_, Barlease>, flags: u32, payload: UserPayload) -> Result<i32> {
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
fn tph(device: &Device<'_, Barlease>, flags: u32, payload: UserPayload) -> Result<i32> {
    let completer = device.driver().completer;
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
fn status(device: &Device<'_, Barlease>, flags: u32, payload: UserPayload) -> Result<i32> {
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
