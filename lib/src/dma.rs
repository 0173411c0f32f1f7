//! Order of accesses to memory that is shared with a device, and to the device's registers.
//!
//! Accesses of a [`Mapping`](crate::Mapping) or a [`DmaBuffer`](crate::DmaBuffer) are volatile: the
//! compiler leaves them as they are, one after the other. The processor may let others see them in
//! another order, unless one of these is between them. Plain memory of Rust's must not be shared
//! with a device.

use crate::sys::barrier;

/// Between filling a descriptor in memory and ringing the doorbell: a device that sees a later
/// store sees the earlier ones too. Stores to write-combining memory are sent off.
///
/// # Examples
///
/// ```no_run
/// # use barlease::{DmaBuffer, Register, Result};
/// # fn example(ring: &DmaBuffer, doorbell: Register<'_, u32>) -> Result<()> {
/// ring.write(0, 0x1234_u64)?;
/// barlease::dma::write_barrier();
/// doorbell.write(1);
/// # Ok(())
/// # }
/// ```
#[inline(always)]
pub fn write_barrier() {
    barrier::write();
}

/// Between reading that a device is done and reading what it has written: later loads see what the
/// device wrote before.
#[inline(always)]
pub fn read_barrier() {
    barrier::read();
}

/// Between a store and a later load that must not come first, as of "enable the interrupt" and
/// "look whether there is work".
#[inline(always)]
pub fn full_barrier() {
    barrier::full();
}
