// SPDX-License-Identifier: GPL-2.0

//! The requests that a test makes of `/dev/barlease_importer`: the module and the tests share this file.
//!
//! Each request is one ioctl on one structure, which goes in and comes back. Attachments belong to
//! the open file that made them and go with it. Errors of all requests on an attachment: `ENOENT`
//! there is none of that number, `ENODEV` it was detached because edu was unbound, `EFAULT`.
//!
//! The page of that number in the file is the dma-buf of an attachment, for `mmap`.

/// The misc device.
pub const DEVICE: &str = "/dev/barlease_importer";
/// The driver, and the module.
pub const DRIVER: &str = "barlease_importer";

/// [`Attach::flags`]: peer-to-peer DMA (`allow_peer2peer`).
pub const ATTACH_P2P: u32 = 1 << 0;
/// [`Attach::flags`]: can be told to undo its mapping (`invalidate_mappings`).
pub const ATTACH_INVALIDATE: u32 = 1 << 1;
/// [`Attach::flags`], alone: by `dma_buf_attach()`, which is for importers of the old kind.
pub const ATTACH_STATIC: u32 = 1 << 2;

/// [`Target::value`] of [`MAP`]: edu reads and writes.
pub const BIDIRECTIONAL: u32 = 0;
/// [`Target::value`] of [`MAP`]: edu reads.
pub const TO_DEVICE: u32 = 1;
/// [`Target::value`] of [`MAP`]: edu writes.
pub const FROM_DEVICE: u32 = 2;

/// [`Transfer::flags`]: from the caller's bytes to the dma-buf; else from the dma-buf to them.
pub const TRANSFER_WRITE: u32 = 1 << 0;
/// [`Transfer::flags`]: by the addresses of the last mapping, whether it still is there or not.
pub const TRANSFER_STALE: u32 = 1 << 1;

/// Most bytes of one [`Transfer`]: edu's own memory.
pub const TRANSFER_MAX: usize = 4096;

/// Attaches edu to a dma-buf. `EINVAL` undefined flags, `ENODEV` edu is not bound; else what
/// `dma_buf_get()` and the attach give.
pub const ATTACH: u32 = request::<Attach>(0);
/// Undoes the mapping if there is one, signals the fence if there is one, and detaches.
pub const DETACH: u32 = request::<Target>(1);
/// `dma_buf_pin()`.
pub const PIN: u32 = request::<Target>(2);
/// `dma_buf_unpin()`.
pub const UNPIN: u32 = request::<Target>(3);
/// Maps, in the direction `value`. `EBUSY` it is mapped; else what the exporter gives.
pub const MAP: u32 = request::<Target>(4);
/// Undoes the mapping. `ENXIO` there is none.
pub const UNMAP: u32 = request::<Target>(5);
/// From now on an invalidation undoes the mapping at once (`value` 0, as at first), or leaves it to
/// [`UNMAP`] (`value` 1): a slow importer.
pub const HOLD: u32 = request::<Target>(6);
/// Adds a fence to the dma-buf that says that edu still uses it. `EBUSY` there is one.
pub const FENCE: u32 = request::<Target>(7);
/// Signals the fence of number `value`: 0 for that of [`FENCE`]. `ENXIO` there is none.
pub const SIGNAL: u32 = request::<Target>(8);
/// How the attachment is.
pub const STATUS: u32 = request::<Status>(9);
/// The entries of the last mapping's scatter table.
pub const ENTRIES: u32 = request::<Entries>(10);
/// Moves bytes by edu's DMA engine: about 0.2 s. The reservation lock is held, so that no
/// invalidation comes between, unless it is stale. `ENXIO` there is no mapping, `EINVAL` bytes
/// outside of it, or lengths and flags out of range.
pub const TRANSFER: u32 = request::<Transfer>(11);
/// Asks the IOMMU where an offset of the last mapping leads.
pub const TRANSLATE: u32 = request::<Translate>(12);
/// `barlease_dma_buf_get_tph()` of any dma-buf, with its reservation lock held.
pub const TPH: u32 = request::<Tph>(13);
/// Sets edu's DMA mask to `value` bits; at first it has 32, which is what its engine reaches.
pub const MASK: u32 = request::<Target>(14);

/// Adds a further fence, of which there may be any number. `EINVAL` undefined flags.
pub const ADD_FENCE: u32 = request::<AddFence>(15);
/// Takes the reservation lock of the dma-buf and keeps it until [`VACATE`], or a signal.
pub const OCCUPY: u32 = request::<Target>(16);
/// Has [`OCCUPY`] return. `ENXIO` there is none.
pub const VACATE: u32 = request::<Target>(17);
/// `ENXIO` unless an [`OCCUPY`] has the lock.
pub const OCCUPIED: u32 = request::<Target>(18);

/// Lets edu copy within a mapped dma-buf: no memory but that of the two devices is touched. `EINVAL`
/// not both ranges are in it, `ENXIO` there is no mapping.
pub const COPY: u32 = request::<Move>(19);

/// [`AddFence::flags`]: `DMA_BUF_IOCTL_EXPORT_SYNC_FILE` finds it (`DMA_RESV_USAGE_READ`).
pub const FENCE_SHOWS: u32 = 1 << 0;
/// [`AddFence::flags`]: a wait for it that takes too long ends with `ETIME`.
pub const FENCE_TIME_ERROR: u32 = 1 << 1;
/// [`AddFence::flags`]: a wait for it ends with `EDEADLK` at once, until it has signalled.
pub const FENCE_DEADLOCK: u32 = 1 << 2;

/// Argument of [`ADD_FENCE`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct AddFence {
    /// In: the number of the attachment.
    pub id: u32,
    /// In: `FENCE_*`.
    pub flags: u32,
    /// In: signals after so long; 0: when it is told to, or the attachment goes.
    pub milliseconds: u32,
    /// Out: its number, for [`SIGNAL`].
    pub number: u32,
}

/// Argument of [`ATTACH`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Attach {
    /// In: the dma-buf.
    pub fd: i32,
    /// In: `ATTACH_*`.
    pub flags: u32,
    /// Out: the number of the attachment.
    pub id: u32,
}

/// Argument of requests on an attachment.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Target {
    /// In: the number of the attachment.
    pub id: u32,
    /// In: depends on the request.
    pub value: u32,
}

/// Argument of [`STATUS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// In: the number of the attachment.
    pub id: u32,
    /// Out: 1 while it is mapped.
    pub mapped: u32,
    /// Out: invalidations that came.
    pub invalidations: u32,
    /// Out: those of them that came while it was mapped.
    pub interruptions: u32,
}

/// Argument of [`ENTRIES`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Entries {
    /// In: the number of the attachment.
    pub id: u32,
    /// In: how many there is room for; out: how many there are.
    pub count: u32,
    /// In: address of an array of [`Entry`].
    pub entries: u64,
}

/// Contiguous addresses of edu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// DMA address.
    pub address: u64,
    /// Bytes.
    pub length: u64,
}

/// Argument of [`TRANSFER`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Transfer {
    /// In: the number of the attachment.
    pub id: u32,
    /// In: `TRANSFER_*`.
    pub flags: u32,
    /// In: offset in the dma-buf, in bytes.
    pub offset: u64,
    /// In: address of the caller's bytes.
    pub bytes: u64,
    /// In: how many, 1 to [`TRANSFER_MAX`].
    pub length: u64,
}

/// Argument of [`COPY`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Move {
    /// In: the number of the attachment.
    pub id: u32,
    /// 0.
    pub reserved: u32,
    /// In: offset in the dma-buf, in bytes.
    pub from: u64,
    /// In: offset in the dma-buf, in bytes.
    pub to: u64,
    /// In: how many bytes, 1 to [`TRANSFER_MAX`].
    pub length: u64,
}

/// Argument of [`TRANSLATE`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Translate {
    /// In: the number of the attachment.
    pub id: u32,
    /// 0.
    pub reserved: u32,
    /// In: offset in the dma-buf, in bytes.
    pub offset: u64,
    /// Out: physical address; 0 when the IOMMU blocks it.
    pub physical: u64,
}

/// Argument of [`TPH`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Tph {
    /// In: the dma-buf.
    pub fd: i32,
    /// In: 1 for the namespace of 16-bit tags.
    pub extended: u32,
    /// Out: the steering tag.
    pub steering_tag: u32,
    /// Out: the processing hint.
    pub ph: u32,
}

/// `_IOWR(0xBA, number, T)`.
const fn request<T>(number: u32) -> u32 {
    3 << 30 | (size_of::<T>() as u32) << 16 | 0xBA << 8 | number
}
