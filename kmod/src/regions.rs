// SPDX-License-Identifier: GPL-2.0

//! Regions of the device fd: mmap of BARs, and aliases.
//!
//! A BAR that is mapped through the device fd is an internal buffer, so that what takes leases away
//! takes it too. The core still decides what may be mapped.
//!
//! An alias is a further region index behind the core's own. The core never hears of it: its array
//! of regions may not change while the device is open.

use crate::{
    PAGE_SHIFT, PAGE_SIZE, abi,
    bound::Barlease,
    buffer::{Buffer, Contents},
    door::{self, Way, region_of},
    features::check_feature,
    model::{
        alias::{Alias, MAX_ALIASES},
        ranges::Segment,
    },
    refuse,
    sys::{
        errno,
        items::{Few, Items},
        nospec,
        payload::{UserPayload, pod_bytes},
        vfio_pci::{
            Answer, BARS, Capabilities, Device, FEATURE_GET, NUM_REGIONS, OFFSET_SHIFT, RegionInfo,
            UserBuffer,
        },
        vma::{self, MemoryType, NewVma},
    },
};
use core::mem::size_of;
use kernel::prelude::*;

/// Bits of a page offset of the device fd that are the offset in a region.
const PAGE_OFFSET_BITS: u32 = OFFSET_SHIFT - PAGE_SHIFT;

/// The mapping flags that an alias of a BAR may have here.
fn supported_flags() -> u32 {
    if vma::write_combining_is_real() {
        abi::ALIAS_WC
    } else {
        0
    }
}

/// The region index of alias number 0.
fn first_alias(device: &Device<'_, Barlease>) -> u32 {
    NUM_REGIONS + device.extra_regions()
}

/// The alias with this region index.
fn alias_at(device: &Device<'_, Barlease>, index: u64) -> Option<Alias> {
    let index = u32::try_from(index).ok()?;
    let number = index.checked_sub(first_alias(device))?;
    // CAST: A `u32` fits into a `usize`, and the number of an alias into a `u32`.
    let number = nospec::checked(number as usize, MAX_ALIASES)? as u32;
    device.driver().aliases().lock().get(number)
}

/// Whether a BAR can be aliased.
fn is_aliasable(device: &Device<'_, Barlease>, bar: u32) -> bool {
    device.is_mappable(bar) && device.bar(bar).is_ok_and(|bar| bar.length() >= PAGE_SIZE)
}

/// `BARLEASE_FEATURE_ALIAS_REGION`.
pub(crate) fn alias(
    device: &Device<'_, Barlease>,
    flags: u32,
    payload: UserPayload,
) -> Result<i32> {
    let supported = supported_flags();
    if supported == 0 {
        return Err(errno::EOPNOTSUPP.into());
    }
    device.driver().knows_aliases().set(true);
    if !check_feature(flags, &payload, FEATURE_GET, size_of::<abi::AliasRegion>())? {
        return Ok(0);
    }
    let leases = device.driver().leases();
    let request: abi::AliasRegion = payload.reader().read()?;
    let (bar, flags) = (request.region_index, request.mapping_flags);
    if flags == 0 || flags & !supported != 0 {
        return refuse!(leases, EINVAL, "alias: mapping_flags {flags:#x}");
    }
    if request.reserved != 0 || request.reserved2 != 0 {
        return refuse!(leases, EINVAL, "alias: reserved fields are not 0");
    }
    if alias_at(device, u64::from(bar)).is_some() {
        return refuse!(leases, EINVAL, "alias: region {bar} is an alias");
    }
    if !is_aliasable(device, bar) {
        return refuse!(
            leases,
            ENODEV,
            "alias: region {bar} is no BAR of a page that can be mapped"
        );
    }
    let number = device.driver().aliases().lock().add(Alias { bar, flags });
    payload.write(&abi::AliasRegion {
        alias_index: first_alias(device) + number.ok_or(ENOSPC)?,
        ..request
    })?;
    Ok(0)
}

/// `VFIO_DEVICE_GET_REGION_INFO`: what the core says of a BAR, and what can be said of aliases.
pub(crate) fn info(
    device: &Device<'_, Barlease>,
    info: &mut RegionInfo<'_>,
    capabilities: &mut Capabilities<'_>,
) -> Result {
    let index = info.index();
    let Some(alias) = alias_at(device, u64::from(index)) else {
        device.core_region_info(info, capabilities)?;
        // A program that has not asked gets the core's answer: there are some that a further
        // capability leads astray.
        let asked = device.driver().knows_aliases().get();
        let supported = supported_flags();
        if asked && supported != 0 && is_aliasable(device, index) {
            let payload = abi::RegionCapAliasable {
                supported_mapping_flags: supported,
                reserved: 0,
            };
            let id = abi::REGION_CAP_ALIASABLE;
            capabilities.add(id, abi::REGION_CAP_VERSION, pod_bytes(&payload))?;
        }
        return Ok(());
    };
    info.set_index(alias.bar);
    let result = device.core_region_info(info, capabilities);
    info.set_index(index);
    result?;
    info.set_offset(u64::from(index) << OFFSET_SHIFT);
    let payload = abi::RegionCapAlias {
        region_index: alias.bar,
        mapping_flags: alias.flags,
    };
    capabilities.add(
        abi::REGION_CAP_ALIAS,
        abi::REGION_CAP_VERSION,
        pod_bytes(&payload),
    )
}

/// A read or a write at a position in the device fd, which is one in the BAR if it is in an alias.
#[inline(never)]
pub(crate) fn access(
    device: Device<'_, Barlease>,
    buffer: UserBuffer,
    position: &mut i64,
    way: Way,
) -> Answer {
    let region = region_of(*position);
    let Some(alias) = alias_at(&device, region) else {
        return door::access(&device, buffer, position, way);
    };
    let shift = (region - u64::from(alias.bar)) << OFFSET_SHIFT;
    let mut in_bar = *position - shift as i64;
    let answer = door::access(&device, buffer, &mut in_bar, way);
    // The core moves it when it succeeds.
    *position = in_bar + shift as i64;
    answer
}

/// mmap of the device fd.
pub(crate) fn mmap(device: &Device<'_, Barlease>, vma: NewVma<'_>) -> Result {
    let offset = vma.page_offset();
    let index = offset >> PAGE_OFFSET_BITS;
    let page = offset & ((1 << PAGE_OFFSET_BITS) - 1);
    let (bar, memory_type) = match alias_at(device, index) {
        Some(alias) => (u64::from(alias.bar), MemoryType::WriteCombining),
        None => (index, MemoryType::Uncached),
    };
    vma.with_page_offset(bar << PAGE_OFFSET_BITS | page, || device.core_mmap(&vma))?;
    if bar >= u64::from(BARS) {
        return Ok(());
    }
    // The core accepted it: the BAR is there, starts at a page, and holds the span. One that is
    // smaller than a page has the page for itself.
    let number = bar as u32;
    let memory = device.bar(number)?;
    let size = memory.length().next_multiple_of(PAGE_SIZE);
    let whole = Segment {
        end: size >> PAGE_SHIFT,
        page: 0,
    };
    let contents = Contents {
        memory,
        segments: Items::Few(Few::one(whole)),
    };
    let leases = device.driver().leases();
    Buffer::map_bar(leases, contents, memory_type, offset - page, vma)
}
