// SPDX-License-Identifier: GPL-2.0

//! vfio-pci variant drivers.
//!
//! A variant driver gets the VFIO operations of a PCI function and passes to `vfio_pci_core_*`
//! what it does not change. The device structure is the core's with the driver's data behind it.
//!
//! C header: [`include/linux/vfio_pci_core.h`](srctree/include/linux/vfio_pci_core.h)

use super::{
    bar::Bar,
    bindings, nospec,
    p2p::Providers,
    payload::UserPayload,
    sleep::{Notifier, SystemSleep},
    vma::NewVma,
    wake::{self, Awake, Domain},
};
use crate::{abi::DmaRange, model::config};
use core::{
    cell::UnsafeCell,
    marker::PhantomData,
    mem::{MaybeUninit, offset_of, size_of},
    ops::Range,
};
use kernel::{
    error::{from_err_ptr, from_result, to_result},
    prelude::*,
    str::as_char_ptr_in_const_context,
    sync::Arc,
    types::{NotThreadSafe, Opaque},
    uaccess::{UserPtr, UserSlice},
};

/// Number of standard BARs.
pub(crate) const BARS: u32 = bindings::PCI_STD_NUM_BARS;
/// Region index of config space.
pub(crate) const CONFIG_REGION: u64 = bindings::VFIO_PCI_CONFIG_REGION_INDEX as u64;
/// Region index of the option ROM.
pub(crate) const ROM_REGION: u32 = bindings::VFIO_PCI_ROM_REGION_INDEX;
/// `VFIO_DEVICE_SET_IRQS`.
pub(crate) const SET_IRQS: u32 = bindings::BL_VFIO_DEVICE_SET_IRQS;
/// Shift from a file offset of the device fd to a region index.
pub(crate) const OFFSET_SHIFT: u32 = bindings::VFIO_PCI_OFFSET_SHIFT;

/// Number of region indexes that mean the same for every PCI device.
pub(crate) const NUM_REGIONS: u32 = bindings::VFIO_PCI_NUM_REGIONS;

/// `VFIO_DEVICE_FEATURE`: which bits of the flags are the feature.
pub(crate) const FEATURE_MASK: u32 = bindings::VFIO_DEVICE_FEATURE_MASK;
/// `VFIO_DEVICE_FEATURE`: read.
pub(crate) const FEATURE_GET: u32 = bindings::VFIO_DEVICE_FEATURE_GET;
/// `VFIO_DEVICE_FEATURE`: write.
pub(crate) const FEATURE_SET: u32 = bindings::VFIO_DEVICE_FEATURE_SET;
/// `VFIO_DEVICE_FEATURE`: only ask whether it is there.
pub(crate) const FEATURE_PROBE: u32 = bindings::VFIO_DEVICE_FEATURE_PROBE;
/// Enter low power.
pub(crate) const FEATURE_LOW_POWER_ENTRY: u32 = bindings::VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY;
/// Enter low power, and leave it at the next wake-up.
pub(crate) const FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP: u32 =
    bindings::VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP;
/// Leave low power.
pub(crate) const FEATURE_LOW_POWER_EXIT: u32 = bindings::VFIO_DEVICE_FEATURE_LOW_POWER_EXIT;

/// A driver: the data of one bound function, and the operations on it.
///
/// One value lives from bind to unbind of a function.
pub(crate) trait Driver: Send + Sync + Sized + 'static {
    /// Name of the PCI driver.
    const NAME: &'static CStr;

    /// Whether the driver takes this function at all.
    fn accepts(function: &Function<'_>) -> bool;

    /// Whether virtual functions may be made.
    fn sriov() -> bool;

    /// A function is being bound; it is not open.
    fn bind(function: &Function<'_>, providers: Arc<Providers>) -> Result<Arc<Self>>;

    /// The function is about to be unbound. It may be open, and then stays so until its user closes
    /// it. Called again every 10 seconds meanwhile.
    fn unbinding(&self, function: &Function<'_>);

    /// The first fd of the device is about to be opened, and the function to be enabled and reset.
    fn opening(&self);

    /// The first fd of the device was opened.
    fn opened(device: &Device<'_, Self>);

    /// The last fd of the device is going, and the function is about to be disabled.
    fn closing(device: &Device<'_, Self>);

    /// A read from the device fd.
    fn read(device: &Device<'_, Self>, buffer: UserBuffer, position: &mut i64) -> Answer;

    /// A write to the device fd.
    fn write(device: &Device<'_, Self>, buffer: UserBuffer, position: &mut i64) -> Answer;

    /// Whether the stock exporter may export these ranges, offset and length in bytes, of a BAR.
    fn may_export(&self, bar: u32, ranges: &[DmaRange]) -> Result;

    /// `VFIO_DEVICE_GET_REGION_INFO`.
    fn region_info(
        device: &Device<'_, Self>,
        info: &mut RegionInfo<'_>,
        capabilities: &mut Capabilities<'_>,
    ) -> Result;

    /// An ioctl other than `VFIO_DEVICE_FEATURE` and `VFIO_DEVICE_GET_REGION_INFO`.
    fn ioctl(device: &Device<'_, Self>, command: u32, argument: usize) -> Result<isize>;

    /// `VFIO_DEVICE_FEATURE`.
    fn feature(device: &Device<'_, Self>, flags: u32, payload: UserPayload) -> Result<i32>;

    /// The device fd is mapped.
    fn mmap(device: &Device<'_, Self>, vma: NewVma<'_>) -> Result;

    /// The function is about to be reset, whoever wants it and whether it is open or not. The
    /// core's `memory_lock` may be held by this thread: it must not be taken.
    fn reset_prepare(&self, function: &Function<'_>);

    /// The reset is over, or failed. As for `reset_prepare`.
    fn reset_done(&self, function: &Function<'_>, memory: MemorySem<'_>);

    /// An error of the function, or of another one behind the same port, was reported. Recovery
    /// begins, or has failed. `pci_bus_sem` is held, which every hot-plug takes.
    fn error_detected(&self, function: &Function<'_>, state: ErrorState);

    /// Recovery from an error succeeded. `pci_bus_sem` is held: `memory_lock` must not be waited
    /// for.
    fn error_resume(&self, function: &Function<'_>, memory: MemorySem<'_>);

    /// `vfio_pci_core_sriov_configure` was called, which may have set the function to D0. The
    /// core's `memory_lock` is not held.
    fn power_set(&self, function: &Function<'_>, memory: MemorySem<'_>);

    /// Run-time power management has woken the function, whoever wanted it and whether it is open
    /// or not. `low_power` is `pm_runtime_engaged` after that: true if the user entered low power
    /// without a wake-up eventfd. The core's `memory_lock` is not held.
    fn woken(&self, function: &Function<'_>, memory: MemorySem<'_>, low_power: bool);

    /// The system is about to sleep, hibernate, or restore an image. The function may be open or
    /// not.
    fn system_falls_asleep(&self, function: &Function<'_>);

    /// The system is awake again, or did not fall asleep after all; so is the function. Once for
    /// each `system_falls_asleep`, and perhaps once more after the function was bound.
    fn system_woke_up(&self, function: &Function<'_>, memory: MemorySem<'_>);
}

/// The kernel's statement about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorState {
    /// `pci_channel_io_normal`, `pci_channel_io_frozen`: it tries to recover from it.
    Recovers,
    /// `pci_channel_io_perm_failure`: it has failed to.
    Failed,
}

/// Memory of the current process to read from or write to. Nobody has checked it.
#[derive(Clone, Copy)]
pub(crate) struct UserBuffer {
    address: *mut u8,
    len: usize,
}

impl UserBuffer {
    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// `len` bytes from `offset` on.
    pub(crate) fn part(&self, offset: usize, len: usize) -> Self {
        Self {
            address: self.address.wrapping_add(offset),
            len,
        }
    }

    /// Whether `len` bytes from `offset` on, 8 at most, can be read by the process.
    pub(crate) fn is_readable(&self, offset: usize, len: usize) -> bool {
        let address = UserPtr::from_ptr(self.address.wrapping_add(offset).cast());
        let mut bytes = [0; 8];
        let place = bytes.get_mut(..len);
        place.is_some_and(|place| {
            let mut reader = UserSlice::new(address, len).reader();
            reader.read_slice(place).is_ok()
        })
    }
}

/// The answer to a read or a write: bytes, or a negative errno.
///
/// The core's is passed on without a look at it: an access of four bytes to a BAR is little more
/// than its system call.
#[repr(transparent)]
#[must_use]
pub(crate) struct Answer(isize);

impl Answer {
    /// Bytes, or the error.
    pub(crate) fn into_result(self) -> Result<usize> {
        count_or_error(self.0)
    }
}

impl From<Result<usize>> for Answer {
    fn from(result: Result<usize>) -> Self {
        Self(match result {
            Ok(count) => count as isize,
            Err(error) => error.to_errno() as isize,
        })
    }
}

/// The answer to `VFIO_DEVICE_GET_REGION_INFO` in the making.
pub(crate) struct RegionInfo<'a>(&'a mut bindings::vfio_region_info);

impl RegionInfo<'_> {
    /// The region that is asked about.
    pub(crate) fn index(&self) -> u32 {
        self.0.index
    }

    /// Asks about another one.
    pub(crate) fn set_index(&mut self, index: u32) {
        self.0.index = index;
    }

    /// Says where in the device fd the region is.
    pub(crate) fn set_offset(&mut self, offset: u64) {
        self.0.offset = offset;
    }
}

/// The chain of capabilities of an answer.
pub(crate) struct Capabilities<'a>(&'a mut bindings::vfio_info_cap);

impl Capabilities<'_> {
    /// Adds one at the end. `payload` follows the header, at most [`Self::MAX_PAYLOAD`] bytes.
    pub(crate) fn add(&mut self, id: u16, version: u16, payload: &[u8]) -> Result {
        #[repr(C)]
        struct Capability {
            header: bindings::vfio_info_cap_header,
            payload: [u8; Capabilities::MAX_PAYLOAD],
        }
        let mut capability = Capability {
            header: bindings::vfio_info_cap_header {
                id,
                version,
                next: 0,
            },
            payload: [0; Self::MAX_PAYLOAD],
        };
        let place = capability.payload.get_mut(..payload.len()).ok_or(EINVAL)?;
        place.copy_from_slice(payload);
        let size = size_of::<bindings::vfio_info_cap_header>() + payload.len();
        // SAFETY: The header and what follows it are valid for `size` bytes, which are copied.
        to_result(unsafe {
            bindings::vfio_info_add_capability(self.0, (&raw mut capability).cast(), size)
        })
    }

    /// Most bytes that a capability may have behind its header.
    const MAX_PAYLOAD: usize = 8;
}

/// A PCI function that is bound to the driver.
pub(crate) struct Function<'a> {
    pdev: *mut bindings::pci_dev,
    _call: PhantomData<&'a ()>,
}

impl Function<'_> {
    /// Its name, as `0000:00:05.0`.
    pub(crate) fn name(&self) -> &CStr {
        // SAFETY: `pdev` is valid while the function is bound.
        let name = unsafe { bindings::bl_pci_name(self.pdev) };
        // SAFETY: The name is a C string that lives as long as the device.
        unsafe { CStr::from_char_ptr(name) }
    }

    /// Vendor and device, as its config space names them.
    pub(crate) fn id(&self) -> (u32, u32) {
        // SAFETY: `pdev` is valid; both were read at enumeration and do not change.
        let (vendor, device) = unsafe { ((*self.pdev).vendor, (*self.pdev).device) };
        (u32::from(vendor), u32::from(device))
    }

    /// Whether it can raise no MSIs but its own, and neither can the other functions of its group.
    pub(crate) fn has_isolated_msi(&self) -> bool {
        // SAFETY: `pdev` is valid; operations of a device may sleep.
        unsafe { bindings::bl_pci_has_isolated_msi(self.pdev) }
    }

    /// Whether the kernel takes it for one in D1 or deeper.
    pub(crate) fn is_sleeping(&self) -> bool {
        // SAFETY: `pdev` is valid; the state may change at any time, so it is read once.
        let state = unsafe { (&raw const (*self.pdev).current_state).read_volatile() };
        state >= 1
    }

    /// Whether it sleeps although the kernel takes it for awake.
    fn sleeps_unnoticed(&self) -> bool {
        let Some(capability) = self.pm_capability() else {
            return false;
        };
        let control = || self.config_word(u32::from(capability) + bindings::PCI_PM_CTRL);
        !self.is_sleeping()
            && control().is_some_and(|control| control & bindings::PCI_PM_CTRL_STATE_MASK != 0)
    }

    /// A word of its config space, read from the bus; `None` when it does not answer.
    fn config_word(&self, register: u32) -> Option<u32> {
        let mut word = 0;
        // SAFETY: `pdev` is valid and so is the place for the value.
        let result =
            unsafe { bindings::pci_read_config_word(self.pdev, register as c_int, &mut word) };
        (result == 0 && word != u16::MAX).then_some(u32::from(word))
    }

    /// Whether the memory bit of its COMMAND means something.
    fn has_memory_bit(&self) -> bool {
        // SAFETY: `pdev` is valid.
        !unsafe { bindings::bl_pci_no_command_memory(self.pdev) }
    }

    /// Whether the hardware's COMMAND has the memory bit, whatever the user reads: a read from the
    /// bus. After a reset without a restore it has not (`vfio_basic_config_write` knows such
    /// "backdoor resets"). A function that does not answer has not either.
    ///
    /// The core may have lent the bit, unless its `memory_lock` is held.
    pub(crate) fn decodes_memory(&self) -> bool {
        if !self.has_memory_bit() {
            return true;
        }
        self.config_word(bindings::PCI_COMMAND)
            .is_some_and(|command| command & bindings::PCI_COMMAND_MEMORY != 0)
    }

    /// Whether it is there no more: somebody pulled it out, or an error ended it.
    pub(crate) fn is_gone(&self) -> bool {
        // SAFETY: `pdev` is valid.
        unsafe { bindings::bl_pci_is_gone(self.pdev) }
    }

    /// Bytes of config space.
    pub(crate) fn config_size(&self) -> u64 {
        // SAFETY: `pdev` is valid; the size was found at enumeration.
        let size = unsafe { (*self.pdev).cfg_size };
        size as u64
    }

    /// Offset of the power-management capability.
    pub(crate) fn pm_capability(&self) -> Option<u8> {
        // SAFETY: `pdev` is valid; the capability was found at enumeration.
        let offset = unsafe { (*self.pdev).pm_cap };
        (offset != 0).then_some(offset)
    }

    /// Offset of the MSI-X capability.
    pub(crate) fn msix_capability(&self) -> Option<u8> {
        // SAFETY: `pdev` is valid; the capability was found at enumeration.
        let offset = unsafe { (*self.pdev).msix_cap };
        (offset != 0).then_some(offset)
    }

    /// Device Capabilities 2 of the PCIe capability; 0 where there is none.
    pub(crate) fn device_capabilities2(&self) -> u32 {
        let mut value = 0;
        let register = bindings::PCI_EXP_DEVCAP2 as c_int;
        // SAFETY: `pdev` is valid and so is the place for the value.
        match unsafe { bindings::pcie_capability_read_dword(self.pdev, register, &mut value) } {
            0 => value,
            _ => 0,
        }
    }

    /// A dword of config space.
    pub(crate) fn config_dword(&self, offset: i32) -> Result<u32> {
        let mut value = 0;
        // SAFETY: `pdev` is valid and so is the place for the value.
        to_result(unsafe { bindings::pci_read_config_dword(self.pdev, offset, &mut value) })?;
        Ok(value)
    }
}

/// The core's device structure, and ours behind it.
#[repr(C)]
struct Layout<D> {
    core: Opaque<bindings::vfio_pci_core_device>,
    /// Initialized by `init`, dropped by `release`.
    driver: UnsafeCell<MaybeUninit<Bound<D>>>,
    /// Of the function while it is bound.
    domain: Domain,
    /// As `domain`.
    sleep: Notifier,
    /// While the function is being reset.
    awake: Awake,
}

impl<D> Layout<D> {
    /// The core's `memory_lock`.
    ///
    /// The device is initialized: there are no shared references to it before.
    fn memory(&self) -> MemorySem<'_> {
        // SAFETY: As above.
        unsafe { MemorySem::of(self.core.get()) }
    }
}

struct Bound<D> {
    driver: Arc<D>,
    providers: Arc<Providers>,
    /// [`Function::has_memory_bit`].
    has_memory_bit: bool,
}

/// An open device, for the time of one operation.
pub(crate) struct Device<'a, D> {
    layout: &'a Layout<D>,
}

impl<D> Clone for Device<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D> Copy for Device<'_, D> {}

/// The core's `memory_lock` of a device.
///
/// The core changes COMMAND and the power state with it held for writing, and lends the memory bit.
///
/// # Invariants
///
/// `sem` is initialized, and valid until `'a` ends.
#[derive(Clone, Copy)]
pub(crate) struct MemorySem<'a> {
    sem: *mut bindings::rw_semaphore,
    _device: PhantomData<&'a ()>,
}

impl<'a> MemorySem<'a> {
    /// # Safety
    ///
    /// `core` must be initialized by `vfio_pci_core_init_dev`, and valid until `'a` ends.
    unsafe fn of(core: *mut bindings::vfio_pci_core_device) -> Self {
        // INVARIANT: The core initialized the semaphore.
        Self {
            // SAFETY: Computes an address inside of the device, which is valid by the caller.
            sem: unsafe { &raw mut (*core).memory_lock },
            _device: PhantomData,
        }
    }

    /// Waits for the thread that changes something, and locks for reading.
    pub(crate) fn read(self) -> MemoryRead<'a> {
        // SAFETY: By the type invariant.
        unsafe { bindings::down_read(self.sem) };
        // INVARIANT: Just locked.
        MemoryRead(self, NotThreadSafe)
    }

    /// Locks for reading, unless somebody holds it for writing or waits to.
    pub(crate) fn try_read(self) -> Option<MemoryRead<'a>> {
        // SAFETY: By the type invariant.
        let locked = unsafe { bindings::down_read_trylock(self.sem) } != 0;
        // INVARIANT: Just locked.
        locked.then(|| MemoryRead(self, NotThreadSafe))
    }

    /// Waits for everybody else, and locks for writing.
    pub(crate) fn write(self) -> MemoryWrite<'a> {
        // SAFETY: By the type invariant.
        unsafe { bindings::down_write(self.sem) };
        // INVARIANT: Just locked.
        MemoryWrite(self, NotThreadSafe)
    }
}

/// The core's `memory_lock`, held for reading: the core changes nothing, and has lent nothing.
///
/// # Invariants
///
/// This thread holds the lock for reading.
pub(crate) struct MemoryRead<'a>(MemorySem<'a>, NotThreadSafe);

impl Drop for MemoryRead<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this thread holds the lock.
        unsafe { bindings::up_read(self.0.sem) };
    }
}

/// The core's `memory_lock`, held for writing: as the core holds it when it changes something.
///
/// # Invariants
///
/// This thread holds the lock for writing.
pub(crate) struct MemoryWrite<'a>(MemorySem<'a>, NotThreadSafe);

impl Drop for MemoryWrite<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant this thread holds the lock.
        unsafe { bindings::up_write(self.0.sem) };
    }
}

/// Keeps a device from falling asleep until it is dropped.
///
/// # Invariants
///
/// `dev` is valid, and one of its usage counts is ours.
pub(crate) struct KeptAwake<'a> {
    dev: *mut bindings::device,
    _device: PhantomData<&'a ()>,
}

impl Drop for KeptAwake<'_> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant there is a count to give back.
        unsafe { bindings::bl_pm_runtime_put(self.dev) };
    }
}

impl<'a, D: Driver> Device<'a, D> {
    /// # Safety
    ///
    /// `vdev` must be that of a device of `D` that is open until `'a` ends.
    unsafe fn from_raw(vdev: *mut bindings::vfio_device) -> Self {
        // SAFETY: The core's structure is the first member of the layout and the vfio device is the
        // first of that (asserted below), so the pointers are the same.
        let layout = unsafe { &*vdev.cast::<Layout<D>>() };
        Self { layout }
    }

    fn core(&self) -> *mut bindings::vfio_pci_core_device {
        self.layout.core.get()
    }

    fn vdev(&self) -> *mut bindings::vfio_device {
        self.core().cast()
    }

    /// The driver's data.
    pub(crate) fn driver(&self) -> &'a Arc<D> {
        &self.bound().driver
    }

    fn bound(&self) -> &'a Bound<D> {
        // SAFETY: Written by `init` before the device could be opened, and not again before
        // `release`.
        unsafe { (*self.layout.driver.get()).assume_init_ref() }
    }

    /// Its function.
    pub(crate) fn function(&self) -> Function<'a> {
        Function {
            // SAFETY: Set before the device was registered and never changed.
            pdev: unsafe { (*self.core()).pdev },
            _call: PhantomData,
        }
    }

    /// The core's `memory_lock`.
    pub(crate) fn memory(&self) -> MemorySem<'a> {
        // SAFETY: The device is open, so it was initialized.
        unsafe { MemorySem::of(self.core()) }
    }

    /// Wakes the device if it sleeps although the kernel takes it for awake.
    ///
    /// `vfio_default_config_write` reads, modifies and writes PMCSR without `memory_lock`; only
    /// then `vfio_pm_config_write` takes it. If a reset comes between the read and the write, stale
    /// PowerState bits put the device back into D3hot while `pdev->current_state` says D0.
    pub(crate) fn wake_if_unnoticed(&self, _lock: &MemoryWrite<'_>) {
        let function = self.function();
        if function.sleeps_unnoticed() {
            // SAFETY: `pdev` is valid, and the lock is held that guards its power state.
            unsafe { bindings::bl_pci_wake(function.pdev) };
        }
    }

    /// Whether the virtual COMMAND, which the user reads and writes, lacks the memory bit, and the
    /// bit means something.
    pub(crate) fn memory_is_off(&self) -> bool {
        // SAFETY: The virtual config space is there while the device is open.
        let vconfig = unsafe { (*self.core()).vconfig };
        // SAFETY: As above; it is at least as long as a config header. COMMAND may change at any
        // time, so it is read once; its memory bit is in the low byte.
        let command = unsafe { vconfig.add(bindings::PCI_COMMAND as usize).read_volatile() };
        self.bound().has_memory_bit && u32::from(command) & bindings::PCI_COMMAND_MEMORY == 0
    }

    /// Whether the user asked for low power and has not asked to leave it.
    pub(crate) fn is_in_low_power(&self) -> bool {
        // SAFETY: Computes an address inside of the device, which is valid.
        let engaged = unsafe { &raw const (*self.core()).pm_runtime_engaged };
        // SAFETY: As above; the flag may change at any time, so it is read once.
        unsafe { engaged.read_volatile() }
    }

    /// The core's map of config space: which capability each byte belongs to.
    pub(crate) fn config_map(&self) -> &'a [u8] {
        // SAFETY: The map is there while the device is open.
        let map = unsafe { (*self.core()).pci_config_map };
        // SAFETY: It has a byte for each of config space, of which there are at least so many. The
        // core fills it in before the device is open, and does not change it while it is.
        unsafe { core::slice::from_raw_parts(map, config::LENGTH) }
    }

    /// A memory BAR that the core claimed and mapped; `ENODEV` otherwise. (It maps I/O BARs too: to
    /// port numbers, which are no addresses of memory.)
    pub(crate) fn bar(&self, number: u32) -> Result<Bar> {
        // CAST: A `u32` fits into a `usize`.
        let index = nospec::checked(number as usize, BARS as usize).ok_or(ENODEV)?;
        // SAFETY: Computes an address inside of the device.
        let map = unsafe { &raw const (*self.core()).barmap };
        // SAFETY: The device is valid; the map does not change while it is open.
        let address = *unsafe { &*map }.get(index).ok_or(ENODEV)?;
        // `IS_ERR_OR_NULL`.
        let last = usize::MAX - bindings::MAX_ERRNO as usize;
        if !(1..=last).contains(&address.addr()) {
            return Err(ENODEV);
        }
        let pdev = self.function().pdev;
        // SAFETY: `pdev` is valid; its resources were assigned before the driver was bound.
        let resources = unsafe { &raw const (*pdev).resource };
        // SAFETY: As above; the standard BARs, of which `index` is one, are the first of them.
        let resource = unsafe { &(*resources)[index] };
        if resource.flags & bindings::IORESOURCE_MEM as c_ulong == 0 {
            return Err(ENODEV);
        }
        // `pci_resource_len`; one that is mapped is not empty.
        let length = resource.end - resource.start + 1;
        let alone = self.is_mappable(number);
        // SAFETY: The core maps only what it has claimed. One smaller than a page it lets be mapped
        // only if it has claimed the rest of the page, too (`vfio_pci_probe_mmaps`).
        // CAST: Below the number of BARs; and masked, as `number` is not.
        Ok(unsafe { Bar::new(index as u32, resource.start, length, alone) })
    }

    /// Whether the core lets a BAR be mapped; not whether it is one.
    pub(crate) fn is_mappable(&self, index: u32) -> bool {
        // SAFETY: The device is valid; the flags do not change while it is open.
        let mappable = unsafe { (*self.core()).bar_mmap_supported };
        // CAST: A `u32` fits into a `usize`.
        nospec::checked(index as usize, mappable.len()).is_some_and(|index| mappable[index])
    }

    /// The bytes of a BAR in which the core lets a read or a write reach nothing: the MSI-X table.
    pub(crate) fn hole(&self, index: u32) -> Range<u64> {
        let core = self.core();
        // SAFETY: The device is valid; the core found the table when it was opened.
        let (bar, start, size) =
            unsafe { ((*core).msix_bar, (*core).msix_offset, (*core).msix_size) };
        if u32::from(bar) != index {
            return 0..0;
        }
        u64::from(start)..u64::from(start) + u64::from(size)
    }

    /// Wakes the device, if run-time power management has it asleep, and keeps it awake.
    ///
    /// The core does so for each read and write. Its `memory_lock` must not be held.
    pub(crate) fn wake(&self) -> Result<KeptAwake<'a>> {
        // SAFETY: Computes an address inside of the function, which is valid.
        let dev = unsafe { &raw mut (*self.function().pdev).dev };
        // SAFETY: `dev` is valid while the device is open.
        to_result(unsafe { bindings::bl_pm_runtime_resume_and_get(dev) })?;
        // INVARIANT: The count was just raised.
        Ok(KeptAwake {
            dev,
            _device: PhantomData,
        })
    }

    /// Number of the core's device-specific regions, whose indexes follow [`NUM_REGIONS`].
    pub(crate) fn extra_regions(&self) -> u32 {
        // SAFETY: The device is valid; nobody adds regions while it is open.
        unsafe { (*self.core()).num_regions as u32 }
    }

    /// `vfio_pci_ioctl_get_region_info`.
    pub(crate) fn core_region_info(
        &self,
        info: &mut RegionInfo<'_>,
        capabilities: &mut Capabilities<'_>,
    ) -> Result {
        // SAFETY: The device is open, and the answer is valid.
        to_result(unsafe {
            bindings::vfio_pci_ioctl_get_region_info(self.vdev(), info.0, capabilities.0)
        })
    }

    /// `vfio_pci_core_read`.
    pub(crate) fn core_read(&self, buffer: UserBuffer, position: &mut i64) -> Answer {
        // SAFETY: The device is open; the core checks the user memory.
        Answer(unsafe {
            bindings::vfio_pci_core_read(self.vdev(), buffer.address, buffer.len, position)
        })
    }

    /// `vfio_pci_core_write`.
    pub(crate) fn core_write(&self, buffer: UserBuffer, position: &mut i64) -> Answer {
        // SAFETY: The device is open; the core checks the user memory.
        Answer(unsafe {
            bindings::vfio_pci_core_write(self.vdev(), buffer.address, buffer.len, position)
        })
    }

    /// `vfio_pci_core_ioctl`.
    pub(crate) fn core_ioctl(&self, command: u32, argument: usize) -> Result<isize> {
        // SAFETY: The device is open; the core checks the argument.
        let answer = unsafe { bindings::vfio_pci_core_ioctl(self.vdev(), command, argument) };
        count_or_error(answer).map(|answer| answer as isize)
    }

    /// `vfio_pci_core_ioctl_feature`.
    pub(crate) fn core_feature(&self, flags: u32, payload: UserPayload) -> Result<i32> {
        let address = payload.address().as_mut_ptr();
        // SAFETY: The device is open; the core checks the user memory.
        let answer = unsafe {
            bindings::vfio_pci_core_ioctl_feature(self.vdev(), flags, address, payload.len())
        };
        to_result(answer)?;
        Ok(answer)
    }

    /// `vfio_pci_core_mmap`.
    pub(crate) fn core_mmap(&self, vma: &NewVma<'_>) -> Result {
        // SAFETY: The device is open and this is its mmap operation.
        to_result(unsafe { bindings::vfio_pci_core_mmap(self.vdev(), vma.as_ptr()) })
    }
}

// The structures that bindgen made are those of the C compiler (`helpers.h`).
const _: () = {
    use bindings::{vfio_device, vfio_device_ops, vfio_pci_core_device};
    macro_rules! same {
        ($($left:expr => $right:ident),* $(,)?) => {
            // CAST: Sizes and offsets of structures of some kilobytes.
            $(assert!($left == bindings::$right as usize);)*
        };
    }
    same!(
        size_of::<vfio_device>() => BL_VFIO_DEVICE_SIZE,
        offset_of!(vfio_device, dev) => BL_VFIO_DEVICE_DEV,
        offset_of!(vfio_device, device) => BL_VFIO_DEVICE_DEVICE,
        size_of::<vfio_device_ops>() => BL_VFIO_OPS_SIZE,
        size_of::<vfio_pci_core_device>() => BL_CORE_SIZE,
        offset_of!(vfio_pci_core_device, vdev) => BL_CORE_VDEV,
        offset_of!(vfio_pci_core_device, pdev) => BL_CORE_PDEV,
        offset_of!(vfio_pci_core_device, pci_ops) => BL_CORE_PCI_OPS,
        offset_of!(vfio_pci_core_device, barmap) => BL_CORE_BARMAP,
        offset_of!(vfio_pci_core_device, bar_mmap_supported) => BL_CORE_BAR_MMAP_SUPPORTED,
        offset_of!(vfio_pci_core_device, vconfig) => BL_CORE_VCONFIG,
        offset_of!(vfio_pci_core_device, num_regions) => BL_CORE_NUM_REGIONS,
        offset_of!(vfio_pci_core_device, msix_bar) => BL_CORE_MSIX_BAR,
        offset_of!(vfio_pci_core_device, msix_size) => BL_CORE_MSIX_SIZE,
        offset_of!(vfio_pci_core_device, msix_offset) => BL_CORE_MSIX_OFFSET,
        offset_of!(vfio_pci_core_device, pm_runtime_engaged) => BL_CORE_PM_RUNTIME_ENGAGED,
        offset_of!(vfio_pci_core_device, memory_lock) => BL_CORE_MEMORY_LOCK,
    );
    assert!(offset_of!(vfio_pci_core_device, vdev) == 0);
};

/// A non-negative answer, or the error that a negative one is.
fn count_or_error(answer: isize) -> Result<usize> {
    match usize::try_from(answer) {
        Ok(count) => Ok(count),
        Err(_) => Err(Error::from_errno(answer as c_int)),
    }
}

/// The tables of operations of a driver.
struct Vtable<D>(PhantomData<D>);

impl<D: Driver> Vtable<D> {
    const LAYOUT: () = assert!(offset_of!(Layout<D>, core) == 0);

    const DEVICE: &'static bindings::vfio_device_ops = &bindings::vfio_device_ops {
        name: as_char_ptr_in_const_context(D::NAME).cast_mut(),
        init: Some(Self::init),
        release: Some(Self::release),
        open_device: Some(Self::open_device),
        close_device: Some(Self::close_device),
        ioctl: Some(Self::ioctl),
        get_region_info_caps: Some(Self::get_region_info_caps),
        device_feature: Some(Self::device_feature),
        read: Some(Self::read),
        write: Some(Self::write),
        mmap: Some(Self::mmap),
        request: Some(Self::request),
        match_: Some(bindings::vfio_pci_core_match),
        match_token_uuid: Some(bindings::vfio_pci_core_match_token_uuid),
        #[cfg(CONFIG_IOMMUFD)]
        bind_iommufd: Some(bindings::vfio_iommufd_physical_bind),
        #[cfg(CONFIG_IOMMUFD)]
        unbind_iommufd: Some(bindings::vfio_iommufd_physical_unbind),
        #[cfg(CONFIG_IOMMUFD)]
        attach_ioas: Some(bindings::vfio_iommufd_physical_attach_ioas),
        #[cfg(CONFIG_IOMMUFD)]
        detach_ioas: Some(bindings::vfio_iommufd_physical_detach_ioas),
        #[cfg(CONFIG_IOMMUFD)]
        pasid_attach_ioas: Some(bindings::vfio_iommufd_physical_pasid_attach_ioas),
        #[cfg(CONFIG_IOMMUFD)]
        pasid_detach_ioas: Some(bindings::vfio_iommufd_physical_pasid_detach_ioas),
        ..pin_init::zeroed()
    };

    const PCI: &'static bindings::vfio_pci_device_ops = &bindings::vfio_pci_device_ops {
        get_dmabuf_phys: Some(Self::get_dmabuf_phys),
    };

    const ERRORS: &'static bindings::pci_error_handlers = &bindings::pci_error_handlers {
        error_detected: Some(Self::error_detected),
        reset_prepare: Some(Self::reset_prepare),
        reset_done: Some(Self::reset_done),
        resume: Some(Self::error_resume),
        ..pin_init::zeroed()
    };

    /// Any function, but only when asked for by name (`PCI_DRIVER_OVERRIDE_DEVICE_VFIO`).
    const IDS: &'static [bindings::pci_device_id; 2] = &[
        bindings::pci_device_id {
            vendor: bindings::PCI_ANY_ID as u32,
            device: bindings::PCI_ANY_ID as u32,
            subvendor: bindings::PCI_ANY_ID as u32,
            subdevice: bindings::PCI_ANY_ID as u32,
            override_only: bindings::PCI_ID_F_VFIO_DRIVER_OVERRIDE,
            ..pin_init::zeroed()
        },
        pin_init::zeroed(),
    ];

    /// # Safety
    ///
    /// To be called by the vfio core only, as `vfio_device_ops.init` of a device of `D`.
    unsafe extern "C" fn init(vdev: *mut bindings::vfio_device) -> c_int {
        let layout = vdev.cast::<Layout<D>>();
        from_result(|| {
            let function = Function {
                // SAFETY: The vfio core set the device, which is that of a PCI function that is
                // being bound.
                pdev: unsafe { to_pci_dev((*vdev).dev) },
                _call: PhantomData,
            };
            let providers = Providers::new()?;
            let driver = D::bind(&function, providers.clone())?;
            // SAFETY: `vdev` was zeroed, is the core's, and nobody else knows it yet.
            unsafe { bindings::bl_latch_params(vdev.cast()) };
            // SAFETY: `vdev` was zeroed and is being initialized.
            to_result(unsafe { bindings::vfio_pci_core_init_dev(vdev) })?;
            // SAFETY: Computes an address inside of the allocation.
            let slot = unsafe { (*layout).driver.get() };
            let bound = Bound {
                driver,
                providers,
                has_memory_bit: function.has_memory_bit(),
            };
            // SAFETY: Nobody else knows the device yet.
            unsafe { (*slot).write(bound) };
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// To be called by the vfio core only, as `vfio_device_ops.release` of a device of `D`.
    unsafe extern "C" fn release(vdev: *mut bindings::vfio_device) {
        // SAFETY: Computes an address inside of the device.
        let slot = unsafe { (*vdev.cast::<Layout<D>>()).driver.get() };
        // SAFETY: `init` succeeded, or there were no release; this is the last operation.
        unsafe { (*slot).assume_init_drop() };
        // SAFETY: As above.
        unsafe { bindings::vfio_pci_core_release_dev(vdev) };
    }

    /// # Safety
    ///
    /// To be called by the vfio core only, as `vfio_device_ops.open_device` of a device of `D`.
    unsafe extern "C" fn open_device(vdev: *mut bindings::vfio_device) -> c_int {
        let core = vdev.cast::<bindings::vfio_pci_core_device>();
        // SAFETY: Computes an address inside of the device.
        let slot = unsafe { (*vdev.cast::<Layout<D>>()).driver.get() };
        // SAFETY: Written by `init`, and not again before `release`.
        let bound = unsafe { (*slot).assume_init_ref() };
        bound.driver.opening();
        // SAFETY: The device is being opened.
        let result = unsafe { bindings::vfio_pci_core_enable(core) };
        if result != 0 {
            return result;
        }
        // SAFETY: The device was enabled.
        unsafe { bindings::vfio_pci_core_finish_enable(core) };
        // SAFETY: The device is open during the call.
        let device = unsafe { Device::<D>::from_raw(vdev) };
        // SAFETY: The function is bound until after the device is closed.
        unsafe { device.bound().providers.fill(device.function().pdev) };
        D::opened(&device);
        0
    }

    /// # Safety
    ///
    /// To be called by the vfio core only, as `vfio_device_ops.close_device` of a device of `D`.
    unsafe extern "C" fn close_device(vdev: *mut bindings::vfio_device) {
        // SAFETY: The device is open until the core closes it below.
        let device = unsafe { Device::<D>::from_raw(vdev) };
        D::closing(&device);
        device.bound().providers.clear();
        // SAFETY: The device is open.
        unsafe { bindings::vfio_pci_core_close_device(vdev) };
    }

    /// # Safety
    ///
    /// To be called by the vfio core only, as `vfio_device_ops.ioctl` of a device of `D`.
    unsafe extern "C" fn ioctl(
        vdev: *mut bindings::vfio_device,
        command: c_uint,
        argument: c_ulong,
    ) -> c_long {
        // SAFETY: The device is open during the call.
        from_result(|| D::ioctl(&unsafe { Device::from_raw(vdev) }, command, argument))
    }

    /// Asks the driver here, and not when the ioctl comes in: these ranges are the ones that the
    /// core copied from user memory, and will export.
    ///
    /// # Safety
    ///
    /// To be called by the vfio-pci core only, as `vfio_pci_device_ops.get_dmabuf_phys` of a device
    /// of `D`.
    unsafe extern "C" fn get_dmabuf_phys(
        core: *mut bindings::vfio_pci_core_device,
        provider: *mut *mut bindings::p2pdma_provider,
        index: c_uint,
        vector: *mut bindings::phys_vec,
        ranges: *mut bindings::vfio_region_dma_range,
        count: usize,
    ) -> c_int {
        // SAFETY: The core made an array of so many ranges; `DmaRange` is the same structure
        // (abi/tests/layout.rs).
        let asked = unsafe { core::slice::from_raw_parts(ranges.cast::<DmaRange>(), count) };
        // SAFETY: The device is open during the call.
        let device = unsafe { Device::<D>::from_raw(core.cast()) };
        if let Err(error) = device.driver().may_export(index, asked) {
            return error.to_errno();
        }
        #[cfg(CONFIG_VFIO_PCI_DMABUF)]
        // SAFETY: Same requirements.
        return unsafe {
            bindings::vfio_pci_core_get_dmabuf_phys(core, provider, index, vector, ranges, count)
        };
        // Nobody calls this where the core has no exporter. It is the answer of the inline function
        // that the core's header has there, which bindgen leaves out.
        #[cfg(not(CONFIG_VFIO_PCI_DMABUF))]
        {
            let _ = (provider, vector);
            Error::from(super::errno::EOPNOTSUPP).to_errno()
        }
    }

    /// # Safety
    ///
    /// To be called by the vfio core only, as `vfio_device_ops.get_region_info_caps` of a device of
    /// `D`.
    unsafe extern "C" fn get_region_info_caps(
        vdev: *mut bindings::vfio_device,
        info: *mut bindings::vfio_region_info,
        capabilities: *mut bindings::vfio_info_cap,
    ) -> c_int {
        // SAFETY: The answer is the caller's local variable.
        let mut info = RegionInfo(unsafe { &mut *info });
        // SAFETY: As above.
        let mut capabilities = Capabilities(unsafe { &mut *capabilities });
        // SAFETY: The device is open during the call.
        let device = unsafe { Device::from_raw(vdev) };
        from_result(|| D::region_info(&device, &mut info, &mut capabilities).map(|()| 0))
    }

    /// # Safety
    ///
    /// To be called by the vfio core only, as `vfio_device_ops.device_feature` of a device of `D`.
    unsafe extern "C" fn device_feature(
        vdev: *mut bindings::vfio_device,
        flags: u32,
        argument: *mut c_void,
        size: usize,
    ) -> c_int {
        let payload = UserPayload::new(argument, size);
        // SAFETY: The device is open during the call.
        from_result(|| D::feature(&unsafe { Device::from_raw(vdev) }, flags, payload))
    }

    /// # Safety
    ///
    /// To be called by the vfio core only, as `vfio_device_ops.read` of a device of `D`.
    unsafe extern "C" fn read(
        vdev: *mut bindings::vfio_device,
        address: *mut u8,
        len: usize,
        position: *mut bindings::loff_t,
    ) -> isize {
        let buffer = UserBuffer { address, len };
        // SAFETY: The position is the caller's local variable.
        let position = unsafe { &mut *position };
        // SAFETY: The device is open during the call.
        let device = unsafe { Device::from_raw(vdev) };
        D::read(&device, buffer, position).0
    }

    /// # Safety
    ///
    /// To be called by the vfio core only, as `vfio_device_ops.write` of a device of `D`.
    unsafe extern "C" fn write(
        vdev: *mut bindings::vfio_device,
        address: *const u8,
        len: usize,
        position: *mut bindings::loff_t,
    ) -> isize {
        let address = address.cast_mut();
        let buffer = UserBuffer { address, len };
        // SAFETY: The position is the caller's local variable.
        let position = unsafe { &mut *position };
        // SAFETY: The device is open during the call.
        let device = unsafe { Device::from_raw(vdev) };
        D::write(&device, buffer, position).0
    }

    /// # Safety
    ///
    /// To be called by the vfio core only, as `vfio_device_ops.mmap` of a device of `D`.
    unsafe extern "C" fn mmap(
        vdev: *mut bindings::vfio_device,
        vma: *mut bindings::vm_area_struct,
    ) -> c_int {
        // SAFETY: `vma` is the argument of the mmap operation that is running.
        let vma = unsafe { NewVma::from_raw(vma) };
        // SAFETY: The device is open during the call.
        from_result(|| D::mmap(&unsafe { Device::from_raw(vdev) }, vma).map(|()| 0))
    }

    /// # Safety
    ///
    /// To be called by the vfio core only, as `vfio_device_ops.request` of a device of `D`.
    unsafe extern "C" fn request(vdev: *mut bindings::vfio_device, count: c_uint) {
        // SAFETY: Same requirements.
        unsafe { bindings::vfio_pci_core_request(vdev, count) };
        // SAFETY: The core's structure is valid; the function was set when it was initialized.
        let pdev = unsafe { (*vdev.cast::<bindings::vfio_pci_core_device>()).pdev };
        // SAFETY: The vfio core asks while it unregisters the device, which `remove` waits for.
        unsafe { Self::with_driver(pdev, D::unbinding) };
    }

    /// Runs `f` with the driver's data of a bound function.
    ///
    /// # Safety
    ///
    /// The function must be bound during the call, which is so in an error handler, in `remove` and
    /// in `sriov_configure` (the device lock is held), in an operation of its PM domain, and in its
    /// notifier.
    unsafe fn with_driver(pdev: *mut bindings::pci_dev, f: impl FnOnce(&D, &Function<'_>)) {
        // SAFETY: Same requirements.
        unsafe { Self::with_layout(pdev, |_, driver, function| f(driver, function)) };
    }

    /// Runs `f` with the device structure and the driver's data of a bound function.
    ///
    /// # Safety
    ///
    /// As for `with_driver`.
    unsafe fn with_layout(
        pdev: *mut bindings::pci_dev,
        f: impl FnOnce(&Layout<D>, &D, &Function<'_>),
    ) {
        // SAFETY: `pdev` is valid by the caller.
        let layout = unsafe { bindings::dev_get_drvdata(&raw mut (*pdev).dev) };
        if layout.is_null() {
            return;
        }
        // SAFETY: Our `probe` set the data of a bound function to its layout, which lives until
        // after `remove`.
        let layout = unsafe { &*layout.cast::<Layout<D>>() };
        // SAFETY: `probe` stores initialized devices only.
        let bound = unsafe { (*layout.driver.get()).assume_init_ref() };
        let function = Function {
            pdev,
            _call: PhantomData,
        };
        f(layout, &bound.driver, &function);
    }

    /// # Safety
    ///
    /// To be called by the PM core only, as `dev_pm_ops.runtime_resume` of the domain of a function
    /// that is bound to the driver.
    unsafe extern "C" fn runtime_resume(dev: *mut bindings::device) -> c_int {
        // SAFETY: The bus's operation is what this one stands in for. It calls the core's.
        let result = unsafe { wake::bus_runtime_resume(dev) };
        // SAFETY: Domains are given to PCI functions only.
        let pdev = unsafe { to_pci_dev(dev) };
        let woken = |layout: &Layout<D>, driver: &D, function: &Function<'_>| {
            // SAFETY: Computes an address inside of the device.
            let engaged = unsafe { &raw const (*layout.core.get()).pm_runtime_engaged };
            // SAFETY: It may change at any time, so it is read once. The thread that changes it
            // asks again.
            let engaged = unsafe { engaged.read_volatile() };
            driver.woken(function, layout.memory(), engaged);
        };
        // SAFETY: The function has its domain only while it is bound.
        unsafe { Self::with_layout(pdev, woken) };
        result
    }

    /// # Safety
    ///
    /// To be called by the PM core only, with the block of `Layout::sleep` of a bound function.
    unsafe extern "C" fn system_sleep(
        block: *mut bindings::notifier_block,
        event: c_ulong,
        _data: *mut c_void,
    ) -> c_int {
        let notifier = Notifier::from_block(block);
        // SAFETY: By the caller.
        let layout = unsafe { kernel::container_of!(notifier, Layout<D>, sleep) };
        // SAFETY: Computes an address inside of the layout, which lives as long as the notifier is
        // registered.
        let core = unsafe { &raw const (*layout).core }.cast::<bindings::vfio_pci_core_device>();
        // SAFETY: As above; set when the device was initialized, and not changed.
        let pdev = unsafe { (*core).pdev };
        let tell = |layout: &Layout<D>, driver: &D, function: &Function<'_>| match SystemSleep::of(
            event,
        ) {
            Some(SystemSleep::Begins) => driver.system_falls_asleep(function),
            Some(SystemSleep::Ends) => driver.system_woke_up(function, layout.memory()),
            None => {}
        };
        // SAFETY: The notifier is registered only while the function is bound.
        unsafe { Self::with_layout(pdev, tell) };
        bindings::NOTIFY_DONE as c_int
    }

    /// # Safety
    ///
    /// To be called by the PCI core only, as `pci_error_handlers.reset_prepare` of a function that
    /// is bound to the driver.
    unsafe extern "C" fn reset_prepare(pdev: *mut bindings::pci_dev) {
        // SAFETY: `pdev` is valid.
        unsafe { bindings::bl_pci_log_reset(pdev, false) };
        let prepare = |layout: &Layout<D>, driver: &D, function: &Function<'_>| {
            driver.reset_prepare(function);
            // SAFETY: Computes an address inside of the function.
            let dev = unsafe { &raw mut (*pdev).dev };
            // SAFETY: The PCI core holds the device's lock. If the memory lock is held, which the
            // core's run-time operations take, it is by an operation of the core that keeps the
            // function awake meanwhile: an ioctl, a write to config space, a hot reset.
            unsafe { layout.awake.hold(dev) };
        };
        // SAFETY: This is an error handler.
        unsafe { Self::with_layout(pdev, prepare) };
    }

    /// # Safety
    ///
    /// To be called by the PCI core only, as `pci_error_handlers.reset_done` of a function that is
    /// bound to the driver.
    unsafe extern "C" fn reset_done(pdev: *mut bindings::pci_dev) {
        // SAFETY: `pdev` is valid.
        unsafe { bindings::bl_pci_log_reset(pdev, true) };
        let done = |layout: &Layout<D>, driver: &D, function: &Function<'_>| {
            driver.reset_done(function, layout.memory());
            // SAFETY: Computes an address inside of the function.
            let dev = unsafe { &raw mut (*pdev).dev };
            // SAFETY: The PCI core still holds the device's lock.
            unsafe { layout.awake.release(dev) };
        };
        // SAFETY: This is an error handler.
        unsafe { Self::with_layout(pdev, done) };
    }

    /// # Safety
    ///
    /// To be called by the PCI core only, as `pci_error_handlers.error_detected` of a function that
    /// is bound to the driver.
    unsafe extern "C" fn error_detected(
        pdev: *mut bindings::pci_dev,
        state: bindings::pci_channel_state_t,
    ) -> bindings::pci_ers_result_t {
        let detected = |driver: &D, function: &Function<'_>| {
            let state = match state {
                bindings::pci_channel_io_perm_failure => ErrorState::Failed,
                _ => ErrorState::Recovers,
            };
            driver.error_detected(function, state);
        };
        // SAFETY: This is an error handler.
        unsafe { Self::with_driver(pdev, detected) };
        // SAFETY: This is the error handler that the core's stands in for.
        unsafe { bindings::vfio_pci_core_aer_err_detected(pdev, state) }
    }

    /// # Safety
    ///
    /// To be called by the PCI core only, as `pci_error_handlers.resume` of a function that is
    /// bound to the driver.
    unsafe extern "C" fn error_resume(pdev: *mut bindings::pci_dev) {
        let resume = |layout: &Layout<D>, driver: &D, function: &Function<'_>| {
            driver.error_resume(function, layout.memory());
        };
        // SAFETY: This is an error handler.
        unsafe { Self::with_layout(pdev, resume) };
    }

    /// # Safety
    ///
    /// To be called by the PCI core only, as `pci_driver.probe` of the driver.
    unsafe extern "C" fn probe(
        pdev: *mut bindings::pci_dev,
        _id: *const bindings::pci_device_id,
    ) -> c_int {
        let () = Self::LAYOUT;
        let function = Function {
            pdev,
            _call: PhantomData,
        };
        if !D::accepts(&function) {
            return EINVAL.to_errno();
        }
        // SAFETY: Computes an address inside of the function.
        let dev = unsafe { &raw mut (*pdev).dev };
        // SAFETY: The operations are static and the size is that of our structure.
        let vdev =
            unsafe { bindings::_vfio_alloc_device(size_of::<Layout<D>>(), dev, Self::DEVICE) };
        let vdev = match from_err_ptr(vdev) {
            Ok(vdev) => vdev,
            Err(error) => return error.to_errno(),
        };
        let core = vdev.cast::<bindings::vfio_pci_core_device>();
        // SAFETY: The core wants its own structure as the function's data.
        unsafe { bindings::dev_set_drvdata(dev, core.cast()) };
        // SAFETY: The device was just made and is ours.
        unsafe { (*core).pci_ops = Self::PCI };
        // SAFETY: The device was just made, zeroed, and is ours; it is there until `put_device`.
        let domain = unsafe { &(*vdev.cast::<Layout<D>>()).domain };
        // SAFETY: The function is being probed; the domain lives until it is cleared, below or in
        // `remove`.
        unsafe { domain.set(dev, Self::runtime_resume) };
        // SAFETY: As for `domain`.
        let sleep = unsafe { &(*vdev.cast::<Layout<D>>()).sleep };
        // SAFETY: The notifier stays where it is until it is unregistered, below or in `remove`,
        // and is not registered yet. `system_sleep` may be called from here on: the layout is
        // filled in.
        let mut result = unsafe { sleep.register(Self::system_sleep) };
        if result == 0 {
            // SAFETY: The device is initialized.
            result = unsafe { bindings::vfio_pci_core_register_device(core) };
            if result != 0 {
                // SAFETY: Just registered.
                unsafe { sleep.unregister() };
            }
        }
        if result != 0 {
            // SAFETY: The function is still being probed.
            unsafe { domain.clear(dev) };
            // SAFETY: As above.
            unsafe { bindings::dev_set_drvdata(dev, core::ptr::null_mut()) };
            // SAFETY: Gives back the reference of `_vfio_alloc_device`.
            unsafe { bindings::put_device(&raw mut (*vdev).device) };
        }
        result
    }

    /// # Safety
    ///
    /// To be called by the PCI core only, as `pci_driver.remove` of the driver.
    unsafe extern "C" fn remove(pdev: *mut bindings::pci_dev) {
        // SAFETY: Computes an address inside of the function.
        let dev = unsafe { &raw mut (*pdev).dev };
        // SAFETY: `dev` is valid.
        let data = unsafe { bindings::dev_get_drvdata(dev) };
        let core = data.cast::<bindings::vfio_pci_core_device>();
        // SAFETY: The function is bound until this returns.
        unsafe { Self::with_driver(pdev, D::unbinding) };
        // SAFETY: `probe` registered it.
        unsafe { bindings::vfio_pci_core_unregister_device(core) };
        // SAFETY: The device is there until `put_device` below.
        let sleep = unsafe { &(*data.cast::<Layout<D>>()).sleep };
        // SAFETY: `probe` registered it.
        unsafe { sleep.unregister() };
        // SAFETY: As above.
        let domain = unsafe { &(*data.cast::<Layout<D>>()).domain };
        // SAFETY: The function is being removed, and `pci_device_remove` keeps it awake meanwhile.
        unsafe { domain.clear(dev) };
        // SAFETY: Gives back the reference of `_vfio_alloc_device`.
        unsafe { bindings::put_device(&raw mut (*core).vdev.device) };
    }

    /// # Safety
    ///
    /// To be called by the PCI core only, as `pci_driver.sriov_configure` of the driver.
    unsafe extern "C" fn sriov_configure(pdev: *mut bindings::pci_dev, count: c_int) -> c_int {
        if !D::sriov() {
            return ENOENT.to_errno();
        }
        // SAFETY: `pdev` is valid.
        let core = unsafe { bindings::dev_get_drvdata(&raw mut (*pdev).dev) };
        // SAFETY: The function is bound and the device lock is held.
        let result = unsafe { bindings::vfio_pci_core_sriov_configure(core.cast(), count) };
        let set = |layout: &Layout<D>, driver: &D, function: &Function<'_>| {
            driver.power_set(function, layout.memory());
        };
        // SAFETY: As above.
        unsafe { Self::with_layout(pdev, set) };
        result
    }
}

/// # Safety
///
/// `dev` must be that of a PCI function.
unsafe fn to_pci_dev(dev: *mut bindings::device) -> *mut bindings::pci_dev {
    // SAFETY: By the caller, `dev` is a member of a `pci_dev`.
    unsafe { kernel::container_of!(dev, bindings::pci_dev, dev) }
}

/// A registered PCI driver; unregistered when dropped.
///
/// # Invariants
///
/// `driver` is registered.
#[pin_data(PinnedDrop)]
pub(crate) struct Registration<D: Driver> {
    #[pin]
    driver: Opaque<bindings::pci_driver>,
    _driver: PhantomData<D>,
}

// SAFETY: The driver core reads and writes the `pci_driver` under locks of its own; of ours only
// `drop` touches it, which has it alone. Unregistering may be done from any thread.
unsafe impl<D: Driver> Send for Registration<D> {}
// SAFETY: Nothing can be done with a shared registration: it has no method that takes `&self`.
unsafe impl<D: Driver> Sync for Registration<D> {}

impl<D: Driver> Registration<D> {
    /// Registers the driver.
    pub(crate) fn new(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            driver <- Opaque::try_ffi_init(|slot: *mut bindings::pci_driver| {
                let driver = bindings::pci_driver {
                    name: D::NAME.as_char_ptr(),
                    id_table: Vtable::<D>::IDS.as_ptr(),
                    probe: Some(Vtable::<D>::probe),
                    remove: Some(Vtable::<D>::remove),
                    sriov_configure: Some(Vtable::<D>::sriov_configure),
                    err_handler: Vtable::<D>::ERRORS,
                    driver_managed_dma: true,
                    ..pin_init::zeroed()
                };
                // SAFETY: `slot` is valid for writes.
                unsafe { slot.write(driver) };
                // SAFETY: Always allowed; the name is a C string that lives as long as the module.
                let name = unsafe { bindings::bl_module_name() };
                // SAFETY: The driver is filled in, stays where it is, and is unregistered when this
                // is dropped.
                to_result(unsafe {
                    bindings::__pci_register_driver(slot, module.as_ptr(), name)
                })?;
                // SAFETY: The driver was just registered.
                unsafe { bindings::bl_add_ids(slot) };
                Ok::<_, Error>(())
            }),
            _driver: PhantomData,
        })
    }
}

#[pinned_drop]
impl<D: Driver> PinnedDrop for Registration<D> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant the driver is registered.
        unsafe { bindings::pci_unregister_driver(self.driver.get()) };
    }
}
