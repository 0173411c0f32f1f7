// SPDX-License-Identifier: GPL-2.0

//! Payloads of `VFIO_DEVICE_FEATURE`, copied once from user memory and back.

use super::items::Items;
use crate::abi;
use core::mem::{MaybeUninit, size_of, size_of_val};
use kernel::{
    prelude::*,
    uaccess::{UserPtr, UserSlice, UserSliceReader},
};

/// A structure of the uAPI.
///
/// # Safety
///
/// Every bit pattern is a valid value, and there is no padding.
pub(crate) unsafe trait Payload: Copy {}

// SAFETY: Integers only, without padding (abi/tests/layout.rs).
unsafe impl Payload for abi::DmaRange {}
// SAFETY: Integers only, without padding (abi/tests/layout.rs).
unsafe impl Payload for abi::DmaBufGet {}
// SAFETY: Integers only, without padding (abi/tests/layout.rs).
unsafe impl Payload for abi::DmaBufRevoke {}
// SAFETY: Integers only, without padding (abi/tests/layout.rs).
unsafe impl Payload for abi::DmaBufStatus {}

// SAFETY: Integers only, without padding (abi/tests/layout.rs).
unsafe impl Payload for abi::DmaBufMemattr {}
// SAFETY: Integers only, without padding (abi/tests/layout.rs).
unsafe impl Payload for abi::DmaBufTph {}
// SAFETY: Integers only, without padding (abi/tests/layout.rs).
unsafe impl Payload for abi::AliasRegion {}
// SAFETY: Integers only, without padding (abi/tests/layout.rs).
unsafe impl Payload for abi::RegionCapAlias {}
// SAFETY: Integers only, without padding (abi/tests/layout.rs).
unsafe impl Payload for abi::RegionCapAliasable {}

/// The bytes of a structure.
pub(crate) fn pod_bytes<T: Payload>(value: &T) -> &[u8] {
    // SAFETY: `value` is valid for `size_of::<T>()` bytes, all of them initialized (`T: Payload`
    // has no padding).
    unsafe { core::slice::from_raw_parts(core::ptr::from_ref(value).cast(), size_of::<T>()) }
}

/// The payload of one call.
#[derive(Clone, Copy)]
pub(crate) struct UserPayload {
    address: UserPtr,
    length: usize,
}

impl UserPayload {
    /// `length` bytes of the current process at `address`, which nobody has checked.
    pub(crate) fn new(address: *mut c_void, length: usize) -> Self {
        Self {
            address: UserPtr::from_ptr(address),
            length,
        }
    }

    /// Its first byte.
    pub(crate) fn address(&self) -> UserPtr {
        self.address
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// Reads from the beginning. Each byte is to be read once: user space may change it.
    pub(crate) fn reader(&self) -> PayloadReader {
        PayloadReader(UserSlice::new(self.address, self.length).reader())
    }

    /// Writes `value` over the beginning. `EFAULT` when the memory is not there.
    pub(crate) fn write<T: Payload>(&self, value: &T) -> Result {
        UserSlice::new(self.address, self.length)
            .writer()
            .write_slice(pod_bytes(value))
    }
}

/// Reads structures of a payload one after the other.
pub(crate) struct PayloadReader(UserSliceReader);

impl PayloadReader {
    /// The next structure. `EFAULT` when the memory is not there or the payload is over.
    pub(crate) fn read<T: Payload>(&mut self) -> Result<T> {
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: `value` is valid for writes of `size_of::<T>()` bytes, and `MaybeUninit<u8>` may
        // be anything.
        let bytes = unsafe {
            core::slice::from_raw_parts_mut(
                value.as_mut_ptr().cast::<MaybeUninit<u8>>(),
                size_of::<T>(),
            )
        };
        self.0.read_raw(bytes)?;
        // SAFETY: `read_raw` initialized all bytes, and every bit pattern is a `T: Payload`.
        Ok(unsafe { value.assume_init() })
    }

    /// The next `count` structures, in one copy. As for `read`.
    pub(crate) fn read_many<T: Payload>(&mut self, count: usize) -> Result<Items<T>> {
        if count == 1 {
            return self.read().map(Items::One);
        }
        let mut values = KVVec::<T>::with_capacity(count, GFP_KERNEL)?;
        let places = values.spare_capacity_mut().get_mut(..count).ok_or(EINVAL)?;
        // SAFETY: The places are valid for writes of their size, and `MaybeUninit<u8>` may be
        // anything.
        let bytes = unsafe {
            core::slice::from_raw_parts_mut(
                places.as_mut_ptr().cast::<MaybeUninit<u8>>(),
                size_of_val(places),
            )
        };
        self.0.read_raw(bytes)?;
        // SAFETY: There is room for `count`; `read_raw` initialized all their bytes, and every bit
        // pattern is a `T: Payload`.
        unsafe { values.inc_len(count) };
        Ok(Items::Many(values))
    }
}
