//! Regions: BARs, ROM, config space, VGA, aliases.

use std::fmt;

use barlease_abi as abi;
use vfio_bindings::bindings::vfio;

use super::caps::RegionCapability;
use crate::MemoryType;

/// The kind of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RegionKind {
    /// A BAR: 0 to 5.
    Bar(u8),
    /// The expansion ROM.
    Rom,
    /// Config space.
    Config,
    /// Legacy VGA ranges.
    Vga,
    /// Another view of a BAR; see [`Device::alias_region`](super::Device::alias_region).
    Alias(u32),
    /// Something of the device's driver.
    Other,
}

impl RegionKind {
    pub(super) fn new(index: u32, capabilities: &[RegionCapability]) -> Self {
        let alias = capabilities.iter().find_map(|capability| match capability {
            RegionCapability::Alias { region, .. } => Some(*region),
            _ => None,
        });
        match (index, alias) {
            (0..=5, _) => Self::Bar(index as u8),
            (vfio::VFIO_PCI_ROM_REGION_INDEX, _) => Self::Rom,
            (vfio::VFIO_PCI_CONFIG_REGION_INDEX, _) => Self::Config,
            (vfio::VFIO_PCI_VGA_REGION_INDEX, _) => Self::Vga,
            (_, Some(bar)) => Self::Alias(bar),
            (_, None) => Self::Other,
        }
    }
}

impl fmt::Display for RegionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bar(number) => f.pad(&format!("bar{number}")),
            Self::Rom => f.pad("rom"),
            Self::Config => f.pad("config"),
            Self::Vga => f.pad("vga"),
            Self::Alias(bar) => f.pad(&format!("alias of bar{bar}")),
            Self::Other => f.pad("other"),
        }
    }
}

impl serde::Serialize for RegionKind {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A region of a device.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Region {
    /// Its index.
    pub index: u32,
    /// Its kind.
    pub kind: RegionKind,
    /// Size in bytes; 0: the device does not have it.
    pub size: u64,
    /// Where it begins in the device's file descriptor.
    pub offset: u64,
    /// Whether it can be read.
    pub readable: bool,
    /// Whether it can be written.
    pub writable: bool,
    /// Whether it, or areas of it, can be mapped.
    pub mappable: bool,
    /// Its capabilities.
    pub capabilities: Vec<RegionCapability>,
}

impl Region {
    pub(super) fn new(info: &vfio::vfio_region_info, capabilities: Vec<RegionCapability>) -> Self {
        let has = |flag| info.flags & flag != 0;
        Self {
            index: info.index,
            kind: RegionKind::new(info.index, &capabilities),
            size: info.size,
            offset: info.offset,
            readable: has(vfio::VFIO_REGION_INFO_FLAG_READ),
            writable: has(vfio::VFIO_REGION_INFO_FLAG_WRITE),
            mappable: has(vfio::VFIO_REGION_INFO_FLAG_MMAP),
            capabilities,
        }
    }

    /// Whether it is a BAR that the device has.
    #[must_use]
    pub fn is_bar(&self) -> bool {
        matches!(self.kind, RegionKind::Bar(_)) && self.size > 0
    }

    /// The memory types that mappings of its bytes can have: that of the region itself, and those
    /// of [aliases](super::Device::alias_region) that it can have. None if it cannot be mapped.
    #[must_use]
    pub fn memory_types(&self) -> Vec<MemoryType> {
        if !self.mappable {
            return Vec::new();
        }
        let of = |flags: &u32| match flags & abi::ALIAS_WC {
            0 => None,
            _ => Some(MemoryType::Wc),
        };
        let mut own = MemoryType::Nc;
        let mut more = None;
        for capability in &self.capabilities {
            match capability {
                RegionCapability::Alias { mapping_flags, .. } => {
                    own = of(mapping_flags).unwrap_or(own);
                }
                RegionCapability::Aliasable {
                    supported_mapping_flags,
                } => more = of(supported_mapping_flags),
                _ => {}
            }
        }
        std::iter::once(own).chain(more).collect()
    }
}

/// VFIO's description of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// Number of regions, aliases not counted.
    pub num_regions: u32,
    /// Number of interrupt indexes.
    pub num_irqs: u32,
    /// Whether [`Device::reset`](super::Device::reset) can reset it.
    pub resettable: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_types_are_those_of_the_region_and_of_its_aliases() {
        let types = |flags, capability: Option<RegionCapability>| {
            let info = vfio::vfio_region_info {
                flags,
                ..Default::default()
            };
            Region::new(&info, capability.into_iter().collect()).memory_types()
        };
        let map = vfio::VFIO_REGION_INFO_FLAG_MMAP;
        let aliasable = |supported_mapping_flags| {
            Some(RegionCapability::Aliasable {
                supported_mapping_flags,
            })
        };
        let alias = RegionCapability::Alias {
            region: 0,
            mapping_flags: abi::ALIAS_WC,
        };
        assert_eq!(types(0, aliasable(abi::ALIAS_WC)), []);
        assert_eq!(types(map, None), [MemoryType::Nc]);
        assert_eq!(types(map, aliasable(0)), [MemoryType::Nc]);
        assert_eq!(
            types(map, aliasable(abi::ALIAS_WC)),
            [MemoryType::Nc, MemoryType::Wc]
        );
        assert_eq!(types(map, Some(alias)), [MemoryType::Wc]);
    }

    #[test]
    fn kinds_follow_the_index_and_the_alias_capability() {
        let alias = [RegionCapability::Alias {
            region: 2,
            mapping_flags: 1,
        }];
        assert_eq!(RegionKind::new(5, &[]), RegionKind::Bar(5));
        assert_eq!(RegionKind::new(6, &[]), RegionKind::Rom);
        assert_eq!(RegionKind::new(7, &[]), RegionKind::Config);
        assert_eq!(RegionKind::new(8, &[]), RegionKind::Vga);
        assert_eq!(RegionKind::new(9, &[]), RegionKind::Other);
        assert_eq!(RegionKind::new(9, &alias), RegionKind::Alias(2));
    }
}
