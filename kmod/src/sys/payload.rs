// SPDX-License-Identifier: GPL-2.0

//! Payloads of `VFIO_DEVICE_FEATURE`, copied once from user memory and back.

use crate::abi;
use core::mem::{MaybeUninit, size_of, size_of_val};
use kernel::{
    prelude::*,
    transmute::FromBytes,
    uaccess::{UserPtr, UserSlice, UserSliceReader, UserSliceWriter},
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
unsafe impl Payload for abi::DmaBufList {}
// SAFETY: Integers only, without padding (abi/tests/layout.rs).
unsafe impl Payload for abi::DmaBufRecord {}
// SAFETY: Integers only, without padding (abi/tests/layout.rs).
unsafe impl Payload for abi::DmaBufRevokeId {}
// SAFETY: Integers only, without padding (abi/tests/layout.rs).
unsafe impl Payload for abi::Events {}
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

impl UserPayload {
    /// Writes from the byte `offset` on, which must not be past the end.
    pub(crate) fn writer_from(&self, offset: usize) -> PayloadWriter {
        let offset = offset.min(self.length);
        let address = self.address.wrapping_byte_add(offset);
        PayloadWriter(UserSlice::new(address, self.length - offset).writer())
    }
}

/// Writes structures of a payload one after the other.
pub(crate) struct PayloadWriter(UserSliceWriter);

impl PayloadWriter {
    /// The next structure. `EFAULT` when the memory is not there or the payload is over.
    pub(crate) fn write<T: Payload>(&mut self, value: &T) -> Result {
        self.0.write_slice(pod_bytes(value))
    }

    /// So many zeroes. As for `write`.
    pub(crate) fn fill(&mut self, mut bytes: usize) -> Result {
        const ZEROES: [u8; 256] = [0; 256];
        while let Some(piece) = ZEROES
            .get(..bytes.min(ZEROES.len()))
            .filter(|p| !p.is_empty())
        {
            self.0.write_slice(piece)?;
            bytes -= piece.len();
        }
        Ok(())
    }
}

/// Reads structures of a payload one after the other.
pub(crate) struct PayloadReader(UserSliceReader);

impl PayloadReader {
    /// The next structure. `EFAULT` when the memory is not there or the payload is over.
    #[inline]
    pub(crate) fn read<T: Payload>(&mut self) -> Result<T> {
        Ok(self.0.read::<Pod<T>>()?.0)
    }

    /// The next `places.len()` structures, in one copy. As for `read`.
    pub(crate) fn read_many<'a, T: Payload>(
        &mut self,
        places: &'a mut [MaybeUninit<T>],
    ) -> Result<&'a [T]> {
        // SAFETY: The places are valid for writes of their size, and `MaybeUninit<u8>` may be
        // anything.
        let bytes = unsafe {
            core::slice::from_raw_parts_mut(
                places.as_mut_ptr().cast::<MaybeUninit<u8>>(),
                size_of_val(places),
            )
        };
        self.0.read_raw(bytes)?;
        // SAFETY: `read_raw` initialized all bytes, and every bit pattern is a `T: Payload`.
        Ok(unsafe { core::slice::from_raw_parts(places.as_ptr().cast(), places.len()) })
    }
}

/// Gives any [`Payload`] the kernel crate's `FromBytes`, which the orphan rule does not let us
/// implement for `T`.
#[repr(transparent)]
struct Pod<T>(T);

// SAFETY: By the trait, every bit pattern is a `T: Payload`, which has no interior mutability.
unsafe impl<T: Payload> FromBytes for Pod<T> {}
