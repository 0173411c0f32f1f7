// SPDX-License-Identifier: GPL-2.0

//! A PCI driver of one kind of function.
//!
//! C header: [`include/linux/pci.h`](srctree/include/linux/pci.h)

use core::{marker::PhantomData, ptr::NonNull};
use kernel::{
    bindings,
    error::{from_result, to_result},
    prelude::*,
    types::Opaque,
};

/// Bytes of the buffer of a function.
const BUFFER: usize = kernel::page::PAGE_SIZE;

/// A driver of one kind of function.
///
/// # Safety
///
/// When `unbound` returns, the function that `bound` was given must be dropped, and nothing that
/// was attached with it may be left.
pub(crate) unsafe trait Driver: 'static {
    /// Its name on the bus.
    const NAME: &'static CStr;
    /// Vendor of the functions.
    const VENDOR: u32;
    /// Device number of the functions.
    const DEVICE: u32;
    /// Bits of an address that the functions can send.
    const DMA_BITS: u32;

    /// A function was bound.
    fn bound(function: Function) -> Result;

    /// It is being unbound.
    fn unbound();
}

/// A bound function: enabled, with its BAR0 mapped and a buffer that it reaches.
///
/// # Invariants
///
/// The function is bound to a [`Driver`] of this module, enabled, and reaches its buffer, of
/// [`BUFFER`] bytes, at `buffer_address`; `registers` is the mapping of the first [`BUFFER`] bytes
/// of BAR0.
pub(crate) struct Function {
    pdev: NonNull<bindings::pci_dev>,
    registers: NonNull<c_void>,
    buffer: NonNull<u8>,
    buffer_address: u64,
}

// SAFETY: A function may be used from any thread.
unsafe impl Send for Function {}

impl Function {
    /// # Safety
    ///
    /// `pdev` must be valid and being bound, and stay bound as long as the result lives.
    unsafe fn new(pdev: NonNull<bindings::pci_dev>, dma_bits: u32) -> Result<Self> {
        let raw = pdev.as_ptr();
        // SAFETY: `pdev` is valid by the caller.
        to_result(unsafe { bindings::pci_enable_device_mem(raw) })?;
        let disable = kernel::types::ScopeGuard::new(move || {
            // SAFETY: As above; it was enabled.
            unsafe { bindings::pci_disable_device(raw) };
        });
        // SAFETY: As above.
        unsafe { bindings::pci_set_master(raw) };
        // SAFETY: As above.
        let device = unsafe { &raw mut (*raw).dev };
        let mask = mask(dma_bits);
        // SAFETY: As above; nothing is mapped yet.
        to_result(unsafe { bindings::dma_set_mask(device, mask) })?;
        // SAFETY: As above.
        to_result(unsafe { bindings::dma_set_coherent_mask(device, mask) })?;
        // SAFETY: As above.
        let registers = unsafe { bindings::pci_iomap(raw, 0, BUFFER as c_ulong) };
        let registers = NonNull::new(registers).ok_or(ENOMEM)?;
        let unmap = kernel::types::ScopeGuard::new(move || {
            // SAFETY: It was just mapped.
            unsafe { bindings::pci_iounmap(raw, registers.as_ptr()) };
        });
        let mut buffer_address = 0;
        // SAFETY: The device is valid and has its masks.
        let buffer = unsafe {
            bindings::dma_alloc_attrs(device, BUFFER, &mut buffer_address, bindings::GFP_KERNEL, 0)
        };
        let buffer = NonNull::new(buffer.cast()).ok_or(ENOMEM)?;
        unmap.dismiss();
        disable.dismiss();
        // INVARIANT: All of it was just done, and undone in the end by `drop`.
        Ok(Self {
            pdev,
            registers,
            buffer,
            buffer_address,
        })
    }

    /// Its device.
    pub(super) fn device(&self) -> *mut bindings::device {
        // SAFETY: By the type invariant `pdev` is valid.
        unsafe { &raw mut (*self.pdev.as_ptr()).dev }
    }

    /// The buffer that it reaches at `buffer_address`.
    pub(crate) fn buffer(&mut self) -> &mut [u8] {
        // SAFETY: By the type invariant it has so many bytes, and it was allocated zeroed. The
        // device changes it only while its engine runs, which needs `&mut self` too.
        unsafe { core::slice::from_raw_parts_mut(self.buffer.as_ptr(), BUFFER) }
    }

    /// Where it reaches the buffer.
    pub(crate) fn buffer_address(&self) -> u64 {
        self.buffer_address
    }

    /// Reads a register of eight bytes.
    pub(crate) fn read(&self, offset: usize) -> u64 {
        // SAFETY: By the type invariant so many bytes are mapped.
        unsafe { bindings::readq(self.register(offset)) }
    }

    /// Writes a register of eight bytes.
    pub(crate) fn write(&mut self, offset: usize, value: u64) {
        // SAFETY: By the type invariant so many bytes are mapped.
        unsafe { bindings::writeq(value, self.register(offset)) };
    }

    fn register(&self, offset: usize) -> *mut c_void {
        assert!(offset <= BUFFER - 8);
        self.registers.as_ptr().wrapping_byte_add(offset)
    }

    /// Says how many bits its addresses have.
    pub(crate) fn set_dma_mask(&self, bits: u32) -> Result {
        if !(1..=64).contains(&bits) {
            return Err(EINVAL);
        }
        // SAFETY: By the type invariant the device is valid. Mappings that are made at the same
        // time have the old mask or the new one: it is one number.
        to_result(unsafe { bindings::dma_set_mask(self.device(), mask(bits)) })
    }

    /// Where `address` leads; 0 when nowhere. `EOPNOTSUPP` without an IOMMU.
    pub(crate) fn translate(&self, address: u64) -> Result<u64> {
        // SAFETY: By the type invariant the device is valid.
        let domain = unsafe { bindings::iommu_get_domain_for_dev(self.device()) };
        if domain.is_null() {
            return Err(Error::from_errno(-(bindings::EOPNOTSUPP as i32)));
        }
        // SAFETY: The domain of a bound device is valid.
        Ok(unsafe { bindings::iommu_iova_to_phys(domain, address) })
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        let (pdev, buffer) = (self.pdev.as_ptr(), self.buffer.as_ptr().cast());
        // SAFETY: By the type invariant it was allocated so; the engine does not run.
        unsafe { bindings::dma_free_attrs(self.device(), BUFFER, buffer, self.buffer_address, 0) };
        // SAFETY: By the type invariant it is mapped.
        unsafe { bindings::pci_iounmap(pdev, self.registers.as_ptr()) };
        // SAFETY: By the type invariant it is enabled.
        unsafe { bindings::pci_disable_device(pdev) };
    }
}

fn mask(bits: u32) -> u64 {
    u64::MAX >> (64 - bits)
}

/// A registered driver; unregistered when dropped.
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

// SAFETY: Registering and unregistering may be done from any thread.
unsafe impl<D: Driver> Send for Registration<D> {}
// SAFETY: A shared registration gives access to nothing.
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
                    ..pin_init::zeroed()
                };
                // SAFETY: `slot` is valid for writes.
                unsafe { slot.write(driver) };
                let name = D::NAME.as_char_ptr();
                // SAFETY: The driver is filled in, stays where it is, and is unregistered when this
                // is dropped.
                to_result(unsafe { bindings::__pci_register_driver(slot, module.as_ptr(), name) })
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

struct Vtable<D>(PhantomData<D>);

impl<D: Driver> Vtable<D> {
    const IDS: &'static [bindings::pci_device_id; 2] = &[
        bindings::pci_device_id {
            vendor: D::VENDOR,
            device: D::DEVICE,
            subvendor: bindings::PCI_ANY_ID as u32,
            subdevice: bindings::PCI_ANY_ID as u32,
            ..pin_init::zeroed()
        },
        // The end.
        pin_init::zeroed(),
    ];

    /// # Safety
    ///
    /// To be called by the PCI core only, as `pci_driver.probe`.
    unsafe extern "C" fn probe(
        pdev: *mut bindings::pci_dev,
        _id: *const bindings::pci_device_id,
    ) -> c_int {
        from_result(|| {
            let pdev = NonNull::new(pdev).ok_or(ENODEV)?;
            // SAFETY: The function is being bound. `D: Driver` drops it in `unbound`, before it is
            // bound no more.
            D::bound(unsafe { Function::new(pdev, D::DMA_BITS) }?)?;
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// To be called by the PCI core only, as `pci_driver.remove`.
    unsafe extern "C" fn remove(_pdev: *mut bindings::pci_dev) {
        D::unbound();
    }
}
