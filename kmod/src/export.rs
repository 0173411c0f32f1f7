// SPDX-License-Identifier: GPL-2.0

//! `VFIO_DEVICE_FEATURE_DMA_BUF`: makes a buffer of what a process asks for.

use crate::{
    PAGE_SHIFT, PAGE_SIZE, abi,
    bound::Barlease,
    buffer::{Buffer, Contents},
    features::check_feature,
    leases::Leases,
    model::ranges::{Placement, RangeError, Segment},
    refuse,
    sys::{
        bar::Bar,
        items::{self, FEW, Few, Items},
        payload::{PayloadReader, UserPayload},
        vfio_pci::{BARS, Device, FEATURE_GET},
    },
};
use core::mem::{MaybeUninit, size_of};
use kernel::{bindings, prelude::*};

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

    let placed = place(device.driver(), &bar, &mut reader, count);
    let segments = match placed {
        Ok(segments) => segments,
        Err(Refused::Error(error)) => return Err(error),
        Err(Refused::Range(reason)) => {
            return refuse!(
                leases,
                errno(reason),
                "export: BAR {bar_index} of {:#x} bytes: {reason:?}",
                bar.length()
            );
        }
        Err(Refused::Protected(hit)) => return refuse_protected(leases, bar_index, hit),
    };
    let contents = Contents {
        memory: bar,
        segments,
    };
    Buffer::export(leases, contents, head.open_flags)?.into_fd(head.open_flags)
}

/// `EPERM` when the ranges overlap what must not be exported.
pub(crate) fn check_protected(driver: &Barlease, bar: u32, ranges: &[abi::DmaRange]) -> Result {
    let protected = driver.protected(bar);
    match protected.and_then(|protected| protected.hit(bar, ranges)) {
        None => Ok(()),
        Some(hit) => refuse_protected(driver.leases(), bar, hit),
    }
}

fn refuse_protected<T>(leases: &Leases<Buffer>, bar: u32, hit: &str) -> Result<T> {
    refuse!(
        leases,
        EPERM,
        "export: BAR {bar}: overlaps {hit} (see msix_export)"
    )
}

/// The BAR `index`, if it has pages.
fn bar(device: &Device<'_, Barlease>, index: u32) -> Result<Bar> {
    if index >= BARS {
        return Err(ENODEV);
    }
    let bar = device.bar(index)?;
    if bar.length() < PAGE_SIZE {
        return Err(ENODEV);
    }
    Ok(bar)
}

enum Refused {
    Error(Error),
    Range(RangeError),
    Protected(&'static str),
}

impl From<RangeError> for Refused {
    fn from(error: RangeError) -> Self {
        Self::Range(error)
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// Ranges that are read from user memory at a time.
const CHUNK: usize = 32;

/// Reads `count` ranges of a BAR: where the pages of a buffer of them are.
///
/// All of them are read, whatever is wrong with one: that memory is not there comes first, then
/// what is wrong with a range, and then that one overlaps what must not be exported.
#[inline(never)]
fn place(
    driver: &Barlease,
    bar: &Bar,
    reader: &mut PayloadReader,
    count: usize,
) -> core::result::Result<Items<Segment>, Refused> {
    let index = bar.index();
    let protected = driver.protected(index);
    let mut placement = Placement::new(bar.extent(), PAGE_SHIFT);
    let mut hit = None;
    let segments = if count <= FEW {
        let mut places = [const { MaybeUninit::uninit() }; FEW];
        let (places, _) = places.split_at_mut(count);
        let ranges: &[abi::DmaRange] = reader.read_many(places)?;
        hit = protected.and_then(|protected| protected.hit(index, ranges));
        let next = |range: &abi::DmaRange| placement.next(range.offset, range.length);
        Items::Few(Few::of(ranges, next)?.ok_or(EINVAL)?)
    } else {
        let mut segments = KVVec::with_capacity(count, GFP_KERNEL_ACCOUNT).map_err(Error::from)?;
        let mut places = [const { MaybeUninit::uninit() }; CHUNK];
        let mut wrong = Ok(());
        let mut left = count;
        while left != 0 {
            let (chunk, _) = places.split_at_mut(left.min(CHUNK));
            left -= chunk.len();
            let ranges: &[abi::DmaRange] = reader.read_many(chunk)?;
            if wrong.is_ok() {
                wrong = items::append(&mut segments, ranges, |range| {
                    placement.next(range.offset, range.length)
                });
                hit = hit.or_else(|| protected.as_ref()?.hit(index, ranges));
            }
        }
        wrong?;
        Items::Many(segments)
    };
    placement.finish()?;
    match hit {
        Some(hit) => Err(Refused::Protected(hit)),
        None => Ok(segments),
    }
}

fn errno(reason: RangeError) -> Error {
    match reason {
        RangeError::AddressOverflow => EOVERFLOW,
        RangeError::Empty | RangeError::Unaligned | RangeError::TooLong | RangeError::PastEnd => {
            EINVAL
        }
    }
}
