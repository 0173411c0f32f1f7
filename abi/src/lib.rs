// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! The uAPI of the kernel module `barlease_vfio_pci`, as Rust types and constants.
//!
//! No logic lives here: layouts and numbers only. The C twin is `include/barlease.h`, which also
//! says what each operation refuses; `tests/layout.rs` asserts that the two agree. The module
//! compiles this file as one of its own (`cfg(MODULE)`), the library depends on it as a crate; they
//! share nothing else.

#![cfg_attr(not(MODULE), no_std)]

/// Name of the PCI driver, for `driver_override`.
pub const DRIVER_NAME: &str = "barlease-vfio-pci";

/// Name of the kernel module, as in `/sys/module`.
pub const MODULE_NAME: &str = "barlease_vfio_pci";

/// `VFIO_DEVICE_FEATURE_DMA_BUF` of `linux/vfio.h`: GET, PROBE.
pub const FEATURE_DMA_BUF: u16 = 11;
/// Permanent revocation, payload [`DmaBufRevoke`]: SET, PROBE.
pub const FEATURE_DMA_BUF_REVOKE: u16 = 0xBA00;
/// Memory type of later mmaps, payload [`DmaBufMemattr`]: SET, PROBE.
pub const FEATURE_DMA_BUF_MEMATTR: u16 = 0xBA01;
/// Steering tags, payload [`DmaBufTph`]: SET, PROBE.
pub const FEATURE_DMA_BUF_TPH: u16 = 0xBA02;
/// Region aliases, payload [`AliasRegion`]: GET, PROBE.
pub const FEATURE_ALIAS_REGION: u16 = 0xBA03;
/// State of a buffer, payload [`DmaBufStatus`]: GET, PROBE.
pub const FEATURE_DMA_BUF_STATUS: u16 = 0xBA04;
/// Feature 11 answered by the kernel's own exporter, payload [`DmaBufGet`]: GET, PROBE.
pub const FEATURE_DMA_BUF_STOCK: u16 = 0xBA05;

/// The buffers of this open of the device, payload [`DmaBufList`]: GET, PROBE.
pub const FEATURE_DMA_BUF_LIST: u16 = 0xBA06;
/// Permanent revocation by id, payload [`DmaBufRevokeId`]: SET, PROBE.
pub const FEATURE_DMA_BUF_REVOKE_ID: u16 = 0xBA07;
/// An eventfd for changes of state, payload [`Events`]: SET, PROBE.
pub const FEATURE_EVENTS: u16 = 0xBA08;

/// Most ranges that one buffer may have; more is `E2BIG`.
pub const MAX_RANGES: u32 = 65_536;

/// State: accessible.
pub const STATE_OK: u32 = 0;
/// State: inaccessible while at least one reason holds.
pub const STATE_REVOKED: u32 = 1;
/// State: inaccessible for ever.
pub const STATE_DEAD: u32 = 2;

/// Reason: the memory bit of COMMAND is clear.
pub const REASON_MEMORY_OFF: u32 = 1 << 0;
/// Reason: the device is in reset.
pub const REASON_RESET: u32 = 1 << 1;
/// Reason: D1, D2, D3hot, low-power feature or system sleep.
pub const REASON_LOW_POWER: u32 = 1 << 2;
/// Reason: an AER error that is not yet recovered.
pub const REASON_ERROR: u32 = 1 << 3;
/// Reason: a config-space write that may turn memory off is in progress.
pub const REASON_CONFIG_WRITE: u32 = 1 << 4;

/// [`DmaBufRecord::flags`]: a mapping of a BAR through the device fd, not a lease.
pub const BUFFER_INTERNAL: u32 = 1 << 0;
/// [`DmaBufRecord::flags`]: dead, and a fence or a mapping that an importer had before is still to
/// end.
pub const BUFFER_DRAINING: u32 = 1 << 1;
/// [`DmaBufRecord::flags`]: the name could not be read just now, and is empty.
pub const BUFFER_NAME_BUSY: u32 = 1 << 2;

/// Most records that one call of [`FEATURE_DMA_BUF_LIST`] copies.
pub const MAX_RECORDS: u32 = 4096;

/// [`DmaBufRevokeId::flags`]: do not wait for importers.
pub const REVOKE_NOWAIT: u32 = 1 << 0;

/// Memory type: uncached, the default.
pub const MEMATTR_NC: u32 = 0;
/// Memory type: write-combining.
pub const MEMATTR_WC: u32 = 1;

/// [`DmaBufTph::flags`]: `steering_tag` is valid.
pub const TPH_ST: u32 = 1 << 0;
/// [`DmaBufTph::flags`]: `steering_tag_ext` is valid.
pub const TPH_ST_EXT: u32 = 1 << 1;

/// [`AliasRegion::mapping_flags`]: mmaps of the alias are write-combining.
pub const ALIAS_WC: u32 = 1 << 0;

/// Region capability on an alias, payload [`RegionCapAlias`].
pub const REGION_CAP_ALIAS: u16 = 0xBA01;
/// Region capability on a BAR that can be aliased, payload [`RegionCapAliasable`].
pub const REGION_CAP_ALIASABLE: u16 = 0xBA02;
/// Version of both capabilities.
pub const REGION_CAP_VERSION: u16 = 1;

/// One range of a BAR: `struct vfio_region_dma_range`. Bytes, page aligned.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DmaRange {
    /// Offset in the region.
    pub offset: u64,
    /// Length, not 0.
    pub length: u64,
}

/// Fixed part of `struct vfio_device_feature_dma_buf`; `nr_ranges` times [`DmaRange`] follow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DmaBufGet {
    /// The BAR, 0 to 5.
    pub region_index: u32,
    /// `O_ACCMODE` and `O_CLOEXEC` of the new fd.
    pub open_flags: u32,
    /// Must be 0.
    pub flags: u32,
    /// Number of ranges, 1 to [`MAX_RANGES`].
    pub nr_ranges: u32,
}

/// Payload of [`FEATURE_DMA_BUF_REVOKE`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DmaBufRevoke {
    /// The buffer to revoke for good.
    pub dmabuf_fd: i32,
}

/// Payload of [`FEATURE_DMA_BUF_MEMATTR`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DmaBufMemattr {
    /// The buffer.
    pub dmabuf_fd: i32,
    /// [`MEMATTR_NC`] or [`MEMATTR_WC`].
    pub memattr: u32,
}

/// Payload of [`FEATURE_DMA_BUF_TPH`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DmaBufTph {
    /// The buffer.
    pub dmabuf_fd: i32,
    /// [`TPH_ST`], [`TPH_ST_EXT`]; 0 clears both.
    pub flags: u32,
    /// 16-bit steering tag.
    pub steering_tag_ext: u16,
    /// 8-bit steering tag.
    pub steering_tag: u8,
    /// Processing hint, 0 to 3.
    pub ph: u8,
}

/// Payload of [`FEATURE_ALIAS_REGION`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AliasRegion {
    /// [`ALIAS_WC`].
    pub mapping_flags: u32,
    /// The BAR to alias, 0 to 5.
    pub region_index: u32,
    /// Out: the region index of the alias.
    pub alias_index: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Must be 0.
    pub reserved2: u64,
}

/// Payload of [`REGION_CAP_ALIAS`], behind the capability header.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegionCapAlias {
    /// The BAR that the alias maps.
    pub region_index: u32,
    /// How it maps it.
    pub mapping_flags: u32,
}

/// Payload of [`REGION_CAP_ALIASABLE`], behind the capability header.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegionCapAliasable {
    /// Flags that [`FEATURE_ALIAS_REGION`] takes for this BAR.
    pub supported_mapping_flags: u32,
    /// 0.
    pub reserved: u32,
}

/// Payload of [`FEATURE_DMA_BUF_STATUS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DmaBufStatus {
    /// In: the buffer.
    pub dmabuf_fd: i32,
    /// In: must be 0.
    pub reserved: u32,
    /// Out: `STATE_*`.
    pub state: u32,
    /// Out: mask of `REASON_*`, 0 when dead.
    pub reasons: u32,
    /// Out: `MEMATTR_*`.
    pub memattr: u32,
    /// Out: the BAR.
    pub region_index: u32,
    /// Out: bytes, the sum of the ranges.
    pub size: u64,
    /// Out: number of ranges.
    pub nr_ranges: u32,
    /// Out: number of importers attached.
    pub nr_attachments: u32,
}

/// Fixed part of the payload of [`FEATURE_DMA_BUF_LIST`]; room for `nr_records` records of
/// `record_size` bytes, each of which begins with a [`DmaBufRecord`], follows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DmaBufList {
    /// In: the records of buffers with a greater id are asked for. Out: the id to go on from; 0
    /// when no buffer has a greater one.
    pub after: u64,
    /// In: records that there is room for. Out: records that were copied.
    pub nr_records: u32,
    /// In: bytes from one record to the next, at least the size of [`DmaBufRecord`]. Out: the size
    /// of the kernel's.
    pub record_size: u32,
}

/// A buffer, as [`FEATURE_DMA_BUF_LIST`] says it. Grows at its end only.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DmaBufRecord {
    /// The inode number of the dma-buf: unique on this host until its next boot.
    pub id: u64,
    /// Bytes, the sum of the ranges.
    pub size: u64,
    /// The BAR.
    pub region_index: u32,
    /// Number of ranges.
    pub nr_ranges: u32,
    /// `MEMATTR_*` that the next mapping gets.
    pub memattr: u32,
    /// `STATE_*`.
    pub state: u32,
    /// Mask of `REASON_*`, 0 when dead.
    pub reasons: u32,
    /// Mask of `BUFFER_*`.
    pub flags: u32,
    /// Importers attached.
    pub nr_attachments: u32,
    /// Mappings that importers have.
    pub nr_mappings: u32,
    /// VMAs of processes.
    pub nr_vmas: u32,
    /// Those of them that are write-combining.
    pub nr_wc_vmas: u32,
    /// `O_ACCMODE` of the open flags: what the fd allows.
    pub access: u32,
    /// 0.
    pub reserved: u32,
    /// The name of the dma-buf, filled up with NUL.
    pub name: [u8; 32],
}

/// Payload of [`FEATURE_DMA_BUF_REVOKE_ID`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DmaBufRevokeId {
    /// The buffer to revoke for good.
    pub id: u64,
    /// [`REVOKE_NOWAIT`].
    pub flags: u32,
    /// Must be 0.
    pub reserved: u32,
}

/// Payload of [`FEATURE_EVENTS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// The eventfd, in the place of an earlier one; -1 for none.
    pub eventfd: i32,
    /// Must be 0.
    pub reserved: u32,
}
