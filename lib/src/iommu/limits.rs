//! The addresses that an IOMMU allows, from the capabilities in the kernel's answer.

use std::mem::offset_of;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use super::IovaRange;
use super::failed;
use crate::Error;
use crate::Result;
use crate::error::Object;
use crate::sys::ioctl;
use crate::sys::ioctl::Words;

/// Longest answer about an IOMMU that is believed.
const MAX_INFO: u32 = 1 << 20;

/// The limits that the kernel sets to an address space.
pub(super) struct Limits {
    pub(super) ranges: Vec<IovaRange>,
    pub(super) page: u64,
    pub(super) available: Option<u32>,
}

pub(super) fn type1_limits(container: BorrowedFd<'_>) -> Result<Limits> {
    let explain = |errno| match errno {
        Errno::INVAL => Error::unsupported(
            "ask for allowed addresses",
            Object::Iommu,
            "a container has an IOMMU as long as a group is in it: open a device first",
        )
        .because(errno),
        errno => failed("ask for allowed addresses", errno),
    };
    let malformed =
        |reason: &'static str| Error::malformed("ask for allowed addresses", Object::Iommu, reason);
    let mut info = vfio::vfio_iommu_type1_info::default();
    ioctl::call(container, ioctl::iommu::TYPE1_GET_INFO, &mut info).map_err(explain)?;
    let mut length = info.argsz;
    for _ in 0..8 {
        if length > MAX_INFO {
            return Err(malformed("the answer is too long"));
        }
        let mut words = Words::zeroed((length as usize).max(size_of_val(&info)));
        ioctl::call_bytes(container, ioctl::iommu::TYPE1_GET_INFO, &mut words).map_err(explain)?;
        let needed = words.u32(offset_of!(vfio::vfio_iommu_type1_info, argsz));
        if needed as usize > words.len() {
            length = needed;
            continue;
        }
        let flags = words.u32(offset_of!(vfio::vfio_iommu_type1_info, flags));
        let sizes = words.u64(offset_of!(vfio::vfio_iommu_type1_info, iova_pgsizes));
        let page = match flags & vfio::VFIO_IOMMU_INFO_PGSIZES {
            0 => 0,
            _ => 1u64.checked_shl(sizes.trailing_zeros()).unwrap_or(0),
        };
        let first = match flags & vfio::VFIO_IOMMU_INFO_CAPS {
            0 => 0,
            _ => words.u32(offset_of!(vfio::vfio_iommu_type1_info, cap_offset)),
        };
        let (ranges, available) = type1_capabilities(&words, first as usize)
            .ok_or_else(|| malformed("the capability chain is broken"))?;
        return Ok(Limits {
            ranges,
            page: page.max(rustix::param::page_size() as u64),
            available,
        });
    }
    Err(malformed("the answer grows each time that it is asked for"))
}

/// The allowed ranges in the capabilities of an answer, everything where it does not say; and how
/// many mappings are left.
fn type1_capabilities(words: &Words, first: usize) -> Option<(Vec<IovaRange>, Option<u32>)> {
    const HEADER: usize = size_of::<vfio::vfio_info_cap_header>();
    const ARRAY: usize = HEADER + 8;
    let mut last = size_of::<vfio::vfio_iommu_type1_info>();
    let mut at = first;
    let mut allowed = None;
    let mut available = None;
    while at != 0 {
        // Each lies behind the one before, so that the chain ends.
        if at < last || at % 8 != 0 || at.checked_add(HEADER)? > words.len() {
            return None;
        }
        let [low, high, ..] = words.u32(at).to_ne_bytes();
        let id = u16::from_ne_bytes([low, high]);
        if u32::from(id) == vfio::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL {
            let value = at + HEADER;
            available = (value + 4 <= words.len()).then(|| words.u32(value));
        }
        if u32::from(id) == vfio::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE && allowed.is_none() {
            let count = words.u32(at + HEADER) as usize;
            let start = at.checked_add(ARRAY)?;
            if start.checked_add(count.checked_mul(16)?)? > words.len() {
                return None;
            }
            let ranges = (0..count).map(|n| IovaRange {
                first: words.u64(start + n * 16),
                last: words.u64(start + n * 16 + 8),
            });
            allowed = Some(ranges.collect());
        }
        last = at + HEADER;
        at = words.u32(at + 4) as usize;
    }
    let all = IovaRange {
        first: 0,
        last: u64::MAX,
    };
    Some((allowed.unwrap_or_else(|| vec![all]), available))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn answer(capabilities: &[(u16, &[u64])]) -> Words {
        let mut words = Words::zeroed(4096);
        let mut at = 24;
        for (n, (id, payload)) in capabilities.iter().enumerate() {
            let next = at + 8 + payload.len() * 8;
            let follows = if n + 1 == capabilities.len() { 0 } else { next };
            words.put_u64(at, u64::from(*id) | 1 << 16 | (follows as u64) << 32);
            for (m, value) in payload.iter().enumerate() {
                words.put_u64(at + 8 + m * 8, *value);
            }
            at = next;
        }
        words
    }

    fn range(first: u64, last: u64) -> IovaRange {
        IovaRange { first, last }
    }

    #[test]
    fn allowed_ranges_are_found_in_the_chain() {
        let words = answer(&[
            (2, &[0, 0]),
            (1, &[2, 0, 0xfedf_ffff, 0xfef0_0000, u64::MAX]),
        ]);
        let expected = [range(0, 0xfedf_ffff), range(0xfef0_0000, u64::MAX)];
        let ranges = |first| Some(type1_capabilities(&words, first)?.0);
        assert_eq!(ranges(24).unwrap(), expected);
        assert_eq!(ranges(0).unwrap(), [range(0, u64::MAX)]);
        // Into the structure, past the end, more ranges than there is room for.
        assert_eq!(ranges(8), None);
        assert_eq!(ranges(4096), None);
        let long = answer(&[(1, &[255])]);
        assert_eq!(type1_capabilities(&long, 24), None);
    }

    #[test]
    fn how_many_mappings_are_left_is_found_in_the_chain() {
        let available = |words: &Words| type1_capabilities(words, 24).unwrap().1;
        for words in [
            answer(&[(1, &[1, 0, 0xffff]), (3, &[65535])]),
            answer(&[(3, &[65535]), (1, &[1, 0, 0xffff])]),
        ] {
            assert_eq!(available(&words), Some(65535));
            let (ranges, _) = type1_capabilities(&words, 24).unwrap();
            assert_eq!(ranges, [range(0, 0xffff)]);
        }
        assert_eq!(available(&answer(&[(2, &[0, 0])])), None);
    }

    proptest! {
        #[test]
        fn no_chain_panics_or_hangs(
            values in proptest::collection::vec(any::<u64>(), 1..40),
            first in 0usize..400,
        ) {
            let mut words = Words::zeroed(values.len() * 8);
            for (n, value) in values.iter().enumerate() {
                words.put_u64(n * 8, value & 0x0000_01ff_0000_0001);
            }
            if let Some((ranges, _)) = type1_capabilities(&words, first) {
                prop_assert!(ranges.len() <= values.len());
            }
        }
    }
}
