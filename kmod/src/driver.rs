// SPDX-License-Identifier: GPL-2.0

//! The driver: which operation of a device does what to its leases.
//!
//! All other operations are the core's, untouched.

use crate::{
    abi,
    bound::Barlease,
    door::{self, Way},
    export, features, list,
    model::{
        access::{Event, Sampled},
        config,
    },
    regions,
    sampling::{ask, bracketed, notice_wake_up, resample, sample},
    sys::{
        p2p::Providers,
        params,
        payload::UserPayload,
        vfio_pci::{
            Answer, CONFIG_REGION, Capabilities, Device, Driver, ErrorState,
            FEATURE_LOW_POWER_ENTRY, FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP, FEATURE_LOW_POWER_EXIT,
            FEATURE_MASK, FEATURE_PROBE, FEATURE_SET, Function, MemorySem, NUM_REGIONS,
            OFFSET_SHIFT, ROM_REGION, RegionInfo, SET_IRQS, UserBuffer,
        },
        vma::NewVma,
    },
    taking::Wait,
};
use kernel::{prelude::*, sync::Arc};

impl Driver for Barlease {
    const NAME: &'static CStr = if cfg!(BARLEASE_AS_STOCK) {
        c"vfio-pci"
    } else {
        c"barlease-vfio-pci"
    };

    fn accepts(function: &Function<'_>) -> bool {
        crate::denylist::accepts(function)
    }

    fn sriov() -> bool {
        params::enable_sriov()
    }

    fn bind(function: &Function<'_>, providers: Arc<Providers>) -> Result<Arc<Self>> {
        Self::new(function, providers)
    }

    fn unbinding(&self, function: &Function<'_>) {
        // The core asks the user to close the device and waits for it. A device that was pulled out
        // is not left reachable for so long: its addresses may be given to another one.
        if function.is_gone() {
            self.leases().close();
        }
    }

    fn opening(&self) {
        self.leases().opening();
    }

    fn opened(device: &Device<'_, Self>) {
        let driver = device.driver();
        driver.opened(device);
        // A thread that waits for an importer with the lock held has the device open, or, for a hot
        // reset, the lock of its set, which is held here.
        let lock = device.memory().read();
        driver
            .leases()
            .open(|access| sample(device, access, Some(&lock)));
        drop(lock);
        // If `unbinding` came before this.
        driver.unbinding(&device.function());
    }

    fn closing(device: &Device<'_, Self>) {
        let driver = device.driver();
        driver.leases().close();
        driver.leases().events().clear();
        driver.left_draining().stop();
    }

    #[inline]
    fn read(device: &Device<'_, Self>, buffer: UserBuffer, position: &mut i64) -> Answer {
        let further = door::region_of(*position) >= u64::from(NUM_REGIONS);
        if further || device.driver().leases().is_shut() {
            return read_further(*device, buffer, position);
        }
        device.core_read(buffer, position)
    }

    #[inline]
    fn write(device: &Device<'_, Self>, buffer: UserBuffer, position: &mut i64) -> Answer {
        let region = door::region_of(*position);
        let driver = device.driver();
        let closer = match region {
            CONFIG_REGION => {
                let begin = *position as u64 - CONFIG_START;
                driver.may_take_away(begin, buffer.len() as u64)
            }
            _ => region > CONFIG_REGION,
        };
        if closer || driver.leases().is_shut() {
            return write_further(*device, buffer, position);
        }
        device.core_write(buffer, position)
    }

    fn may_export(&self, bar: u32, ranges: &[abi::DmaRange]) -> Result {
        // A device that was pulled out is still open, and no longer anybody's.
        self.leases().epoch()?;
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
        let answer = device.driver().leases().lending(info);
        notice_wake_up(device);
        answer
    }

    fn ioctl(device: &Device<'_, Self>, command: u32, argument: usize) -> Result<isize> {
        let act = || device.core_ioctl(command, argument);
        let answer = if command == SET_IRQS {
            // Interrupts of the function are looked for, and their table is written.
            device.driver().leases().lending(act)
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
            abi::FEATURE_DMA_BUF if !device.driver().stock_dma_buf() => {
                return export::get(device, flags, payload);
            }
            abi::FEATURE_DMA_BUF_STOCK => {
                let stock = (flags & !FEATURE_MASK) | u32::from(abi::FEATURE_DMA_BUF);
                return device.core_feature(stock, payload);
            }
            abi::FEATURE_DMA_BUF_REVOKE => return features::revoke(device, flags, payload),
            abi::FEATURE_DMA_BUF_MEMATTR => return features::memattr(device, flags, payload),
            abi::FEATURE_DMA_BUF_TPH => return features::tph(device, flags, payload),
            abi::FEATURE_ALIAS_REGION => return regions::alias(device, flags, payload),
            abi::FEATURE_DMA_BUF_STATUS => return features::status(device, flags, payload),
            abi::FEATURE_DMA_BUF_LIST => return list::list(device, flags, payload),
            abi::FEATURE_DMA_BUF_REVOKE_ID => return features::revoke_id(device, flags, payload),
            abi::FEATURE_EVENTS => return features::events(device, flags, payload),
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
        self.leases().begin(Event::Reset, Wait::Yes);
    }

    fn reset_done(&self, function: &Function<'_>, memory: MemorySem<'_>) {
        let lock = memory.try_read();
        self.leases().update(|access| {
            access.end(Event::Reset);
            resample(function, access, lock.as_ref());
        });
    }

    fn error_detected(&self, _function: &Function<'_>, state: ErrorState) {
        // The caller holds `pci_bus_sem`: nothing that it could be made to wait for is waited for.
        match state {
            ErrorState::Recovers => self.leases().begin(Event::Error, Wait::No),
            ErrorState::Failed => self.leases().fail(Wait::No),
        }
        if self.leases().untold().get() {
            self.left_draining().start_now();
        }
    }

    fn error_resume(&self, function: &Function<'_>, memory: MemorySem<'_>) {
        let lock = memory.try_read();
        self.leases().update(|access| {
            access.end_all(Event::Error);
            resample(function, access, lock.as_ref());
        });
    }

    fn power_set(&self, function: &Function<'_>, memory: MemorySem<'_>) {
        // The core has just had the lock for writing in the same place.
        let lock = memory.read();
        self.leases()
            .update(|access| resample(function, access, Some(&lock)));
    }

    fn woken(&self, function: &Function<'_>, memory: MemorySem<'_>, low_power: bool) {
        // As above.
        let lock = memory.read();
        self.leases().update(|access| {
            resample(function, access, Some(&lock));
            access.set_sampled(Sampled {
                low_power,
                ..access.sampled()
            });
        });
    }

    fn system_falls_asleep(&self, _function: &Function<'_>) {
        self.leases().begin(Event::Sleep, Wait::Yes);
    }

    fn system_woke_up(&self, function: &Function<'_>, memory: MemorySem<'_>) {
        let lock = memory.try_read();
        self.leases().update(|access| {
            access.end(Event::Sleep);
            resample(function, access, lock.as_ref());
        });
    }
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

/// Writes to config space that may take memory away, to what lies behind it, and to a device whose
/// memory must not be touched.
#[inline(never)]
fn write_further(device: Device<'_, Barlease>, buffer: UserBuffer, position: &mut i64) -> Answer {
    let answer = if door::region_of(*position) == CONFIG_REGION {
        write_config(&device, buffer, position)
    } else {
        regions::access(device, buffer, position, Way::Write)
    };
    notice_wake_up(&device);
    answer
}

/// A write to config space, bracketed where it covers bytes by which memory can be taken away.
fn write_config(device: &Device<'_, Barlease>, buffer: UserBuffer, position: &mut i64) -> Answer {
    let begin = *position as u64 - CONFIG_START;
    let len = buffer.len() as u64;
    let power = device.driver().may_set_power(begin, len)
        && config::covers_power_state(device.config_map(), begin, len);
    let takes_away = power || config::covers_command(begin, len);
    // The core refuses one that goes past the end, before it writes anything.
    if !takes_away || begin.saturating_add(len) > device.function().config_size() {
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
