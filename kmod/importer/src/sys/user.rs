// SPDX-License-Identifier: GPL-2.0

//! Copies from and to user memory.

use crate::abi;
use core::mem::size_of;
use kernel::{
    prelude::*,
    transmute::{AsBytes, FromBytes},
    uaccess::{UserPtr, UserSlice},
};

macro_rules! plain {
    ($($name:ident)+) => {
        $(
            // SAFETY: Integers only: every bit pattern is a valid value.
            unsafe impl FromBytes for abi::$name {}
            // SAFETY: Integers only, without padding: each follows the one before at a multiple of
            // its size, and the sizes add up to multiples of the largest.
            unsafe impl AsBytes for abi::$name {}
        )+
    };
}

plain!(Attach Target AddFence Status Entries Entry Transfer Move Translate Tph);

/// Reads a structure at `address`, lets `f` change it, and writes it back.
pub(crate) fn exchange<T: FromBytes + AsBytes>(
    address: usize,
    f: impl FnOnce(&mut T) -> Result,
) -> Result<isize> {
    let slice = || UserSlice::new(UserPtr::from_addr(address), size_of::<T>());
    let mut value: T = slice().reader().read()?;
    f(&mut value)?;
    slice().writer().write(&value)?;
    Ok(0)
}

/// Reads `bytes` from `address`.
pub(crate) fn read_bytes(address: u64, bytes: &mut [u8]) -> Result {
    slice(address, bytes.len())?.reader().read_slice(bytes)
}

/// Writes `bytes` to `address`.
pub(crate) fn write_bytes(address: u64, bytes: &[u8]) -> Result {
    slice(address, bytes.len())?.writer().write_slice(bytes)
}

/// Writes `entries` to `address`.
pub(crate) fn write_entries(address: u64, entries: &[abi::Entry]) -> Result {
    let mut writer = slice(address, size_of_val(entries))?.writer();
    entries.iter().try_for_each(|entry| writer.write(entry))
}

fn slice(address: u64, length: usize) -> Result<UserSlice> {
    let address = usize::try_from(address)?;
    Ok(UserSlice::new(UserPtr::from_addr(address), length))
}
