// SPDX-License-Identifier: GPL-2.0

//! `VFIO_DEVICE_FEATURE_DMA_BUF`: makes a buffer of what a process asks for.

use crate::{
    PAGE_SHIFT, PAGE_SIZE, abi,
    buffer::{Buffer, Contents},
    driver::{Barlease, check_feature},
    model::ranges::{self, Bar, RangeError, Segment},
    refuse,
    sys::{
        items::Items,
        params,
        payload::UserPayload,
        vfio_pci::{BARS, Device, FEATURE_GET},
    },
};
use core::mem::size_of;
use kernel::{alloc::AllocError, bindings, prelude::*};

/// Open flags that a buffer may be made with.
const OPEN_FLAGS: u32 = bindings::O_ACCMODE | bindings::O_CLOEXEC;

/// Answers feature 11. On success the number of the new fd.
pub(crate) fn get(device: &Device<'_, Barlease>, flags: u32, payload: UserPayload) -> Result<i32> {
    if !check_feature(flags, &payload, FEATURE_GET, size_of::<abi::DmaBufGet>())? {
        return Ok(0);
    }
    let leases = device.driver().leases();
    let mut reader = payload.reader();
    let head: abi::DmaBufGet = reader.read()?;
    let bar_index = head.region_index;

    if head.flags != 0 {
        return refuse!(leases, EINVAL, "export: flags {:#x} are not 0", head.flags);
    }
    if head.open_flags & !OPEN_FLAGS != 0 {
        return refuse!(leases, EINVAL, "export: open_flags {:#x}", head.open_flags);
    }
    if head.nr_ranges == 0 {
        return refuse!(leases, EINVAL, "export: no ranges");
    }
    if head.nr_ranges > abi::MAX_RANGES {
        return refuse!(leases, E2BIG, "export: {} ranges", head.nr_ranges);
    }
    let count = head.nr_ranges as usize;
    if payload.len() - size_of::<abi::DmaBufGet>() < count * size_of::<abi::DmaRange>() {
        return refuse!(leases, EINVAL, "export: argsz too small for {count} ranges");
    }
    let bar = match bar(device, bar_index) {
        Ok(bar) => bar,
        Err(error) => {
            return refuse!(
                leases,
                error,
                "export: region {bar_index} is no BAR of a page or more"
            );
        }
    };

    let asked = reader.read_many::<abi::DmaRange>(count)?;
    let (size, segments) = match place(&bar, &asked) {
        Ok(placed) => placed,
        Err(Refused::Memory) => return Err(ENOMEM),
        Err(Refused::Range(reason)) => {
            return refuse!(
                leases,
                errno(reason),
                "export: BAR {bar_index} of {:#x} bytes: {reason:?}",
                bar.length
            );
        }
    };
    check_protected(device.driver(), bar_index, &asked)?;
    drop(asked);
    let contents = Contents {
        bar: bar_index,
        size,
        segments,
    };
    Buffer::export(leases, contents, head.open_flags)?.into_fd(head.open_flags)
}

/// `EPERM` when the ranges overlap what must not be exported.
pub(crate) fn check_protected(driver: &Barlease, bar: u32, ranges: &[abi::DmaRange]) -> Result {
    if params::allow_msix_export() {
        return Ok(());
    }
    match driver.protected().hit(bar, ranges) {
        None => Ok(()),
        Some(hit) => refuse!(
            driver.leases(),
            EPERM,
            "export: BAR {bar}: overlaps {hit} (see allow_msix_export)"
        ),
    }
}

/// The BAR `index`, if it has pages.
fn bar(device: &Device<'_, Barlease>, index: u32) -> Result<Bar> {
    if index >= BARS {
        return Err(ENODEV);
    }
    let bar = device.bar(index)?;
    if bar.length < PAGE_SIZE {
        return Err(ENODEV);
    }
    Ok(bar)
}

enum Refused {
    Memory,
    Range(RangeError),
}

impl From<RangeError> for Refused {
    fn from(error: RangeError) -> Self {
        Self::Range(error)
    }
}

impl From<AllocError> for Refused {
    fn from(_: AllocError) -> Self {
        Self::Memory
    }
}

/// The size of a buffer of these ranges, and where its pages are.
fn place(
    bar: &Bar,
    asked: &[abi::DmaRange],
) -> core::result::Result<(u64, Items<Segment>), Refused> {
    let shapes = asked.iter().map(|range| (range.offset, range.length));
    let size = ranges::total_length(shapes, PAGE_SIZE)?;
    let mut end = 0;
    let segments = Items::of(asked, GFP_KERNEL_ACCOUNT, |range| {
        let address = bar.place(range.offset, range.length)?;
        let segment = Segment::after(end, address, range.length, PAGE_SHIFT);
        end = segment.end;
        Ok::<_, Refused>(segment)
    })?;
    Ok((size, segments))
}

fn errno(reason: RangeError) -> Error {
    match reason {
        RangeError::AddressOverflow => EOVERFLOW,
        RangeError::Empty | RangeError::Unaligned | RangeError::TooLong | RangeError::PastEnd => {
            EINVAL
        }
    }
}
