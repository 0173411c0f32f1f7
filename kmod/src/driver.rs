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
    leases::{Leases, Wait},
    list,
    model::{
        access::{Access, Event, Sampled},
        alias::Aliases,
        config,
        tph::{self, Completer, Tph, TphError},
    },
    msix::Protected,
    regions,
    sys::{
        delayed::Delayed,
        dma_buf::DmaBuf,
        errno,
        flag::Flag,
        p2p::Providers,
        params,
        payload::UserPayload,
        vfio_pci::{
            Answer, CONFIG_REGION, Capabilities, Device, Driver, ErrorState, FEATURE_GET,
            FEATURE_LOW_POWER_ENTRY, FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP, FEATURE_LOW_POWER_EXIT,
            FEATURE_MASK, FEATURE_PROBE, FEATURE_SET, Function, MemoryRead, MemorySem, NUM_REGIONS,
            OFFSET_SHIFT, ROM_REGION, RegionInfo, SET_IRQS, UserBuffer,
        },
        vma::{self, NewVma},
    },
};
use core::mem::size_of;
use kernel::{
    new_mutex,
    prelude::*,
    sync::{Arc, Mutex},
};

/// A bound function.
#[pin_data]
pub(crate) struct Barlease {
    leases: Arc<Leases>,
    completer: Completer,
    #[pin]
    aliases: Mutex<Aliases>,
    /// Of the time since the device was opened: what of its BARs is protected, whether the kernel's
    /// own exporter answers feature 11, and whether somebody has asked about aliases.
    #[pin]
    protected: Mutex<Protected>,
    stock_dma_buf: Flag,
    knows_aliases: Flag,
    /// Warns of what drains with nobody waiting for it.
    #[pin]
    left_draining: Delayed<Leases>,
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
                left_draining <- Delayed::new(leases.clone()),
                leases,
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

    fn opening(&self) {
        self.leases.opening();
    }

    fn opened(device: &Device<'_, Self>) {
        let driver = device.driver();
        driver.aliases.lock().clear();
        *driver.protected.lock() = Protected::of(&device.function());
        driver.stock_dma_buf.set(params::stock_dma_buf());
        driver.knows_aliases.set(false);
        // A thread that waits for an importer with the lock held has the device open, or, for a hot
        // reset, the lock of its set, which is held here.
        let lock = device.memory().read();
        driver.leases.open(|access| sample(device, access, &lock));
        drop(lock);
        // If `unbinding` came before this.
        driver.unbinding(&device.function());
    }

    fn closing(device: &Device<'_, Self>) {
        let driver = device.driver();
        driver.leases.close();
        driver.leases.events().clear();
        driver.left_draining.stop();
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
        let further = regions::region_of(*position) >= CONFIG_REGION;
        if further || device.driver().leases.is_shut() {
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
        if info.index() != ROM_REGION {
            return regions::info(device, info, capabilities);
        }
        // Looks whether there is one.
        let info = || regions::info(device, info, capabilities);
        let answer = device.driver().leases.lending(info);
        notice_wake_up(device);
        answer
    }

    fn ioctl(device: &Device<'_, Self>, command: u32, argument: usize) -> Result<isize> {
        let act = || device.core_ioctl(command, argument);
        let answer = if command == SET_IRQS {
            // Interrupts of the function are looked for, and their table is written.
            device.driver().leases.lending(act)
        } else {
            act()
        };
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
            abi::FEATURE_DMA_BUF_LIST => return list::list(device, flags, payload),
            abi::FEATURE_DMA_BUF_REVOKE_ID => return revoke_id(device, flags, payload),
            abi::FEATURE_EVENTS => return events(device, flags, payload),
            _ => {}
        }
        let acts = flags & FEATURE_SET != 0 && flags & FEATURE_PROBE == 0;
        match feature {
            FEATURE_LOW_POWER_ENTRY | FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP if acts => {
                bracketed(device, Event::LowPower, || {
                    device.core_feature(flags, payload)
                })
            }
            FEATURE_LOW_POWER_EXIT if acts => {
                let answer = device.core_feature(flags, payload);
                // Nobody else asks after a change of the owner's. Unless the core refused it, the
                // core had the lock for writing, and waited as long for it.
                ask(*device, &device.memory().read());
                answer
            }
            _ => {
                let answer = device.core_feature(flags, payload);
                notice_wake_up(device);
                answer
            }
        }
    }

    fn mmap(device: &Device<'_, Self>, vma: NewVma<'_>) -> Result {
        regions::mmap(device, vma)
    }

    fn reset_prepare(&self, _function: &Function<'_>) {
        self.leases.begin(Event::Reset, Wait::Yes);
    }

    fn reset_done(&self, function: &Function<'_>, memory: MemorySem<'_>) {
        let lock = memory.try_read();
        self.leases.update(|access| {
            access.end(Event::Reset);
            resample(function, access, lock.as_ref());
        });
    }

    fn error_detected(&self, _function: &Function<'_>, state: ErrorState) {
        // The caller holds `pci_bus_sem`: nothing that it could be made to wait for is waited for.
        match state {
            ErrorState::Recovers => self.leases.begin(Event::Error, Wait::No),
            ErrorState::Failed => self.leases.fail(Wait::No),
        }
        if self.leases.has_untold() {
            self.left_draining.start_now();
        }
    }

    fn error_resume(&self, function: &Function<'_>, memory: MemorySem<'_>) {
        let lock = memory.try_read();
        self.leases.update(|access| {
            access.end_all(Event::Error);
            resample(function, access, lock.as_ref());
        });
    }

    fn power_set(&self, function: &Function<'_>, memory: MemorySem<'_>) {
        // The core has just had the lock for writing in the same place.
        let lock = memory.read();
        self.leases
            .update(|access| resample(function, access, Some(&lock)));
    }

    fn woken(&self, function: &Function<'_>, memory: MemorySem<'_>, low_power: bool) {
        // As above.
        let lock = memory.read();
        self.leases.update(|access| {
            resample(function, access, Some(&lock));
            access.set_sampled(Sampled {
                low_power,
                ..access.sampled()
            });
        });
    }

    fn system_falls_asleep(&self, _function: &Function<'_>) {
        self.leases.begin(Event::Sleep, Wait::Yes);
    }

    fn system_woke_up(&self, function: &Function<'_>, memory: MemorySem<'_>) {
        let lock = memory.try_read();
        self.leases.update(|access| {
            access.end(Event::Sleep);
            resample(function, access, lock.as_ref());
        });
    }
}

/// Whether the hardware's COMMAND lacks the memory bit. A function that sleeps, or is in reset, is
/// not asked: the thread that wakes it or ends the reset asks it.
///
/// With the core's lock held the core has not lent the bit. Without it, the thread that may have
/// lent it is counted; nothing good is believed then, and the lender asks when it is done.
fn is_undecoded(function: &Function<'_>, access: &Access, lock: Option<&MemoryRead<'_>>) -> bool {
    if function.is_sleeping() || !access.may_ask() {
        return access.sampled().undecoded;
    }
    lock.is_none() && access.is_lent() || !function.decodes_memory()
}

/// Samples the hardware again: COMMAND and the power state. The virtual COMMAND and the request for
/// low power do not change here, and close may be freeing the virtual config space. A closed device
/// is sampled by `opened`.
fn resample(function: &Function<'_>, access: &mut Access, lock: Option<&MemoryRead<'_>>) {
    if access.epoch().is_none() {
        return;
    }
    access.set_sampled(Sampled {
        undecoded: is_undecoded(function, access, lock),
        sleeping: function.is_sleeping(),
        ..access.sampled()
    });
}

/// Samples everything.
fn sample(device: &Device<'_, Barlease>, access: &Access, lock: &MemoryRead<'_>) -> Sampled {
    let function = device.function();
    let memory_off = device.memory_is_off();
    Sampled {
        memory_off,
        // Not asked where it makes no difference: it is a read from the bus.
        undecoded: !memory_off && is_undecoded(&function, access, Some(lock)),
        sleeping: function.is_sleeping(),
        low_power: device.is_in_low_power(),
    }
}

/// Lets `act` happen with no memory of the device reachable, then asks the device what is so now.
fn bracketed<R>(device: &Device<'_, Barlease>, event: Event, act: impl FnOnce() -> R) -> R {
    let leases = &device.driver().leases;
    leases.begin(event, Wait::Yes);
    let result = act();
    // Unless the core refused it, `act` had the lock for writing, and waited as long for it.
    let lock = device.memory().read();
    leases.update(|access| {
        let sampled = sample(device, access, &lock);
        access.set_sampled(sampled);
        access.end(event);
    });
    result
}

/// Resets, hot resets and `sriov_configure` set D0, and LOW_POWER_EXIT ends low power, without a
/// callback. So every access through the fd samples again afterwards if the last sample said
/// "asleep". A device that was awake then cannot have slept and been woken since without
/// `runtime_resume`.
pub(crate) fn notice_wake_up(device: &Device<'_, Barlease>) {
    if device.driver().leases().is_asleep() {
        try_to_ask(*device);
    }
}

#[cold]
fn try_to_ask(device: Device<'_, Barlease>) {
    // A thread that has the lock for writing asks when its own operation ends. To wait for it here
    // would tie REVOKE of one lease to the importer of another, which a reset may be waiting for.
    if let Some(lock) = device.memory().try_read() {
        ask(device, &lock);
    }
}

fn ask(device: Device<'_, Barlease>, lock: &MemoryRead<'_>) {
    let leases = device.driver().leases();
    leases.update(|access| {
        let sampled = sample(&device, access, lock);
        access.set_sampled(sampled);
    });
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

/// Writes to config space, to what lies behind it, and to a device whose memory must not be
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
    let len = buffer.len() as u64;
    // The core refuses what goes past the end, before it writes anything.
    let fits = begin.saturating_add(len) <= device.function().config_size();
    let power = config::covers_power_state(device.config_map(), begin, len);
    if !fits || !power && !config::covers_command(begin, len) {
        return device.core_write(buffer, position);
    }
    bracketed(device, Event::ConfigWrite, || {
        let answer = device.core_write(buffer, position);
        if power {
            device.wake_if_unnoticed(&device.memory().write());
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
    let buffer = dmabuf.exported::<Buffer>().ok_or(EINVAL)?;
    revoke_buffer(device, &buffer, Wait::Yes)
}

/// `BARLEASE_FEATURE_DMA_BUF_REVOKE_ID`.
fn revoke_id(device: &Device<'_, Barlease>, flags: u32, payload: UserPayload) -> Result<i32> {
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
    buffer.revoke()?;
    if !buffer.is_draining() {
        return Ok(0);
    }
    let left = match wait {
        Wait::Yes => match buffer.wait_killable() {
            Ok(()) => return Ok(0),
            Err(killed) => killed,
        },
        Wait::No => errno::EINPROGRESS.into(),
    };
    buffer.leave_draining();
    device.driver().left_draining.start();
    Err(left)
}

/// `BARLEASE_FEATURE_EVENTS`.
fn events(device: &Device<'_, Barlease>, flags: u32, payload: UserPayload) -> Result<i32> {
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
