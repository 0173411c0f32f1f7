//! The capability chain of a region's information.

use barlease_abi as abi;
use vfio_bindings::bindings::vfio;

use crate::BarRange;

/// A capability of a region.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RegionCapability {
    /// Only these areas can be mapped.
    SparseMmap(Vec<BarRange>),
    /// The MSI-X table can be mapped too.
    MsixMappable,
    /// The region is an alias of a BAR.
    #[non_exhaustive]
    Alias {
        /// The BAR.
        region: u32,
        /// How the alias maps it (`ALIAS_*` of the uAPI).
        mapping_flags: u32,
    },
    /// The region can have aliases.
    #[non_exhaustive]
    Aliasable {
        /// Flags that an alias can have (`ALIAS_*` of the uAPI).
        supported_mapping_flags: u32,
    },
    /// The type of a region of the device's driver, as the kernel's header has it
    /// (`VFIO_REGION_TYPE_*`).
    #[non_exhaustive]
    Type {
        /// Its type.
        kind: u32,
        /// Which one of that type.
        subtype: u32,
    },
    /// One that this library does not know.
    #[non_exhaustive]
    Other {
        /// Its id.
        id: u16,
        /// Its version.
        version: u16,
        /// Its bytes, up to where the next one begins.
        payload: Vec<u8>,
    },
}

/// The chain is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadChain;

const HEADER: usize = size_of::<vfio::vfio_info_cap_header>();
/// Bytes of an area that can be mapped.
const AREA: usize = 16;

/// Parses the chain that begins at byte `first` of the answer; 0 means that there is none.
///
/// Each capability must lie behind the one before, and ends where the next one begins. So a chain
/// has no loop, and all of it together is not longer than the answer.
pub(super) fn parse(answer: &[u8], first: u32) -> Result<Vec<RegionCapability>, BadChain> {
    let mut found = Vec::new();
    let mut last = size_of::<vfio::vfio_region_info>();
    let mut next = first as usize;
    while next != 0 {
        if next < last {
            return Err(BadChain);
        }
        let capability = answer.get(next..).ok_or(BadChain)?;
        let id = u16_at(capability, 0).ok_or(BadChain)?;
        let version = u16_at(capability, 2).ok_or(BadChain)?;
        let follows = u32_at(capability, 4).ok_or(BadChain)?;
        let payload = capability.get(HEADER..).ok_or(BadChain)?;
        // Those that follow each other do not overlap, so all payloads together are no longer than
        // the answer.
        let end = (follows as usize).checked_sub(next + HEADER);
        let payload = end.and_then(|end| payload.get(..end)).unwrap_or(payload);
        let capability = parse_one(id, version, payload).ok_or(BadChain)?;
        found.push(capability);
        last = next + HEADER;
        next = follows as usize;
    }
    Ok(found)
}

fn parse_one(id: u16, version: u16, payload: &[u8]) -> Option<RegionCapability> {
    let capability = match (u32::from(id), version) {
        (vfio::VFIO_REGION_INFO_CAP_SPARSE_MMAP, 1) => {
            RegionCapability::SparseMmap(areas(payload)?)
        }
        (vfio::VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, 1) => RegionCapability::MsixMappable,
        (vfio::VFIO_REGION_INFO_CAP_TYPE, 1) => RegionCapability::Type {
            kind: u32_at(payload, 0)?,
            subtype: u32_at(payload, 4)?,
        },
        _ => match (id, version) {
            (abi::REGION_CAP_ALIAS, abi::REGION_CAP_VERSION) => RegionCapability::Alias {
                region: u32_at(payload, 0)?,
                mapping_flags: u32_at(payload, 4)?,
            },
            (abi::REGION_CAP_ALIASABLE, abi::REGION_CAP_VERSION) => RegionCapability::Aliasable {
                supported_mapping_flags: u32_at(payload, 0)?,
            },
            (id, version) => RegionCapability::Other {
                id,
                version,
                payload: payload.to_vec(),
            },
        },
    };
    Some(capability)
}

/// `nr_areas`, a reserved word, and the areas.
fn areas(payload: &[u8]) -> Option<Vec<BarRange>> {
    let count = u32_at(payload, 0)? as usize;
    let list = payload.get(8..)?.get(..count.checked_mul(AREA)?)?;
    list.chunks_exact(AREA)
        .map(|area| {
            Some(BarRange {
                offset: u64_at(area, 0)?,
                length: u64_at(area, 8)?,
            })
        })
        .collect()
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn capability(id: u16, next: u32, payload: &[u32]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(id.to_ne_bytes());
        bytes.extend(1u16.to_ne_bytes());
        bytes.extend(next.to_ne_bytes());
        bytes.extend(payload.iter().flat_map(|word| word.to_ne_bytes()));
        bytes
    }

    /// An answer with capabilities behind the structure, chained in order.
    fn answer(list: &[(u16, Vec<u32>)]) -> Vec<u8> {
        let mut bytes = vec![0; 32];
        for (n, (id, payload)) in list.iter().enumerate() {
            let end = (bytes.len() + 8 + payload.len() * 4) as u32;
            let next = if n + 1 == list.len() { 0 } else { end };
            bytes.extend(capability(*id, next, payload));
        }
        bytes
    }

    #[test]
    fn every_kind_is_parsed() {
        let bytes = answer(&[
            (1, vec![2, 0, 0, 0, 0x1000, 0, 0x3000, 0, 0x1000, 0]),
            (3, vec![]),
            (2, vec![0x8000_8086, 1]),
            (abi::REGION_CAP_ALIAS, vec![2, 1]),
            (abi::REGION_CAP_ALIASABLE, vec![1, 0]),
            (77, vec![5, 6]),
        ]);
        let range = |offset, length| BarRange { offset, length };
        assert_eq!(
            parse(&bytes, 32).unwrap(),
            [
                RegionCapability::SparseMmap(vec![range(0, 0x1000), range(0x3000, 0x1000)]),
                RegionCapability::MsixMappable,
                RegionCapability::Type {
                    kind: 0x8000_8086,
                    subtype: 1
                },
                RegionCapability::Alias {
                    region: 2,
                    mapping_flags: 1
                },
                RegionCapability::Aliasable {
                    supported_mapping_flags: 1
                },
                RegionCapability::Other {
                    id: 77,
                    version: 1,
                    payload: [5u32, 6].map(u32::to_ne_bytes).concat(),
                },
            ]
        );
        assert_eq!(parse(&bytes, 0), Ok(vec![]));
    }

    #[test]
    fn chains_that_loop_or_leave_the_answer_are_refused() {
        let looping = {
            let mut bytes = vec![0; 32];
            bytes.extend(capability(3, 32, &[]));
            bytes
        };
        assert_eq!(parse(&looping, 32), Err(BadChain));
        let backwards = {
            let mut bytes = vec![0; 32];
            bytes.extend(capability(3, 8, &[]));
            bytes
        };
        assert_eq!(parse(&backwards, 32), Err(BadChain));
        // Into the structure itself, at the end, far away.
        for first in [4, 40, u32::MAX] {
            assert_eq!(parse(&answer(&[(3, vec![])]), first), Err(BadChain));
        }
        // Capabilities that claim the areas of others.
        let mut shared = vec![0; 32];
        for n in 1..5u32 {
            let next = if n == 4 { 0 } else { 32 + n * 16 };
            shared.extend(capability(1, next, &[8 - n, 0]));
        }
        shared.extend([0; 128]);
        assert_eq!(parse(&shared, 32), Err(BadChain));
        // More areas than there is room for.
        let areas = answer(&[(1, vec![u32::MAX, 0, 0, 0, 0, 0])]);
        assert_eq!(parse(&areas, 32), Err(BadChain));
    }

    proptest! {
        #[test]
        fn no_answer_panics_or_hangs(bytes in proptest::collection::vec(any::<u8>(), 0..300), first in 0u32..320) {
            if let Ok(list) = parse(&bytes, first) {
                prop_assert!(list.len() <= bytes.len() / HEADER);
            }
        }

        #[test]
        fn any_chain_that_is_written_is_read(ids in proptest::collection::vec(100u16..200, 0..20)) {
            let list: Vec<_> = ids.iter().map(|id| (*id, vec![0; usize::from(id % 3)])).collect();
            let first = if list.is_empty() { 0 } else { 32 };
            let expected: Vec<_> = ids
                .iter()
                .map(|id| RegionCapability::Other {
                    id: *id,
                    version: 1,
                    payload: vec![0; usize::from(id % 3) * 4],
                })
                .collect();
            prop_assert_eq!(parse(&answer(&list), first).unwrap(), expected);
        }
    }
}
