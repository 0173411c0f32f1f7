/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR Apache-2.0 OR MIT */
/*
 * The uAPI of the kernel module barlease_vfio_pci.
 *
 * Everything here is an operation of VFIO_DEVICE_FEATURE (linux/vfio.h) on a
 * VFIO device fd whose device is bound to the driver barlease-vfio-pci. Use
 * PROBE to learn whether a feature is there; the numbers are private until
 * upstream assigns its own. A "buffer" is a dma-buf made by this module.
 *
 * Errors are looked for in this order: what device and platform can do
 * (EOPNOTSUPP, as PROBE answers), values in the payload (EINVAL, ENOENT,
 * E2BIG), the fd in the payload (EBADF no such fd, EINVAL not a buffer, ENODEV
 * a buffer of another device), the state of the buffer (ENODEV, EBADFD).
 * Reserved fields must be 0 (EINVAL).
 */
#ifndef BARLEASE_H
#define BARLEASE_H

#include <linux/types.h>

/* Name of the PCI driver, for driver_override. */
#define BARLEASE_DRIVER_NAME "barlease-vfio-pci"

/* ---- VFIO_DEVICE_FEATURE_DMA_BUF: GET, PROBE ------------------------------ */

/*
 * As in linux/vfio.h, for older headers. The answer is a new dma-buf fd: the
 * concatenation of the ranges, which all lie in one BAR and may be in any
 * order, overlap and repeat.
 *
 * EINVAL: flags not 0, open_flags with other bits than O_ACCMODE and
 * O_CLOEXEC, no range, a length of 0, an offset or a length that is not page
 * aligned, a range past the end of the BAR, a sum that overflows, argsz too
 * small. EOVERFLOW: offset and address of the BAR overflow. E2BIG: more than
 * BARLEASE_MAX_RANGES. ENODEV: no BAR of a page or more. EPERM: a range
 * overlaps the MSI-X table or PBA, and the IOMMU does not isolate MSIs.
 */
#define BARLEASE_FEATURE_DMA_BUF 11

/* struct vfio_region_dma_range */
struct barlease_dma_range {
	__u64 offset;		/* bytes, page aligned */
	__u64 length;		/* bytes, page aligned, not 0 */
};

/* struct vfio_device_feature_dma_buf; nr_ranges times the above follow. */
struct barlease_dma_buf_get {
	__u32 region_index;	/* 0 to 5 */
	__u32 open_flags;	/* O_ACCMODE, O_CLOEXEC */
	__u32 flags;		/* 0 */
	__u32 nr_ranges;
};

/* Most ranges that one buffer may have; more is E2BIG. */
#define BARLEASE_MAX_RANGES 65536

/* ---- States and reasons of a buffer -------------------------------------- */

enum barlease_state {
	/* Accessible. */
	BARLEASE_STATE_OK = 0,
	/* Inaccessible while at least one reason holds. */
	BARLEASE_STATE_REVOKED = 1,
	/* Inaccessible for ever: revoked on request, or its device fd closed. */
	BARLEASE_STATE_DEAD = 2,
};

/* Why a REVOKED buffer is inaccessible: a bit mask. */
#define BARLEASE_REASON_MEMORY_OFF	(1U << 0) /* memory bit of COMMAND clear */
#define BARLEASE_REASON_RESET		(1U << 1) /* device in reset */
#define BARLEASE_REASON_LOW_POWER	(1U << 2) /* D1, D2, D3hot, low-power feature, system sleep */
#define BARLEASE_REASON_ERROR		(1U << 3) /* AER error not yet recovered */
#define BARLEASE_REASON_CONFIG_WRITE	(1U << 4) /* a config write that may turn memory off goes on */

/* ---- BARLEASE_FEATURE_DMA_BUF_REVOKE: SET, PROBE -------------------------- */

#define BARLEASE_FEATURE_DMA_BUF_REVOKE 0xBA00

/*
 * Makes the buffer DEAD at once. When this returns, no CPU mapping and no DMA
 * mapping of it exists and none can be made again: attach, map and mmap answer
 * ENODEV, a touch of an old mapping gives SIGBUS. Other buffers, overlapping
 * ones too, are not affected; the range can be exported again at once.
 * Waits for importers without a time-out. A fatal signal ends the wait: the
 * buffer is DEAD then, and what its importers still have to undo is waited for
 * by the module (BARLEASE_BUFFER_DRAINING).
 *
 * EBADFD: the buffer is DEAD by an earlier REVOKE.
 */
struct barlease_dma_buf_revoke {
	__s32 dmabuf_fd;
};

/* ---- BARLEASE_FEATURE_DMA_BUF_MEMATTR: SET, PROBE ------------------------- */

#define BARLEASE_FEATURE_DMA_BUF_MEMATTR 0xBA01

#define BARLEASE_MEMATTR_NC	0 /* uncached, the default */
#define BARLEASE_MEMATTR_WC	1 /* write-combining */

/*
 * The memory type that later mmaps of the buffer get; existing mappings keep
 * theirs.
 *
 * EOPNOTSUPP: write-combining would not be real here. ENOENT: unknown
 * attribute. ENODEV: DEAD buffer.
 */
struct barlease_dma_buf_memattr {
	__s32 dmabuf_fd;
	__u32 memattr;
};

/* ---- BARLEASE_FEATURE_DMA_BUF_TPH: SET, PROBE ----------------------------- */

#define BARLEASE_FEATURE_DMA_BUF_TPH 0xBA02

#define BARLEASE_TPH_ST		(1U << 0) /* steering_tag is valid */
#define BARLEASE_TPH_ST_EXT	(1U << 1) /* steering_tag_ext is valid */

/*
 * Replaces the buffer's TPH state. The two tags are separate namespaces and
 * are never converted into each other; 0 is a valid tag.
 *
 * EOPNOTSUPP: the device does not say in Device Capabilities 2 that it
 * completes TPH (bits 13:12; the extended tag needs 11b). EINVAL: undefined
 * flag, ph over 3, a non-zero tag whose flag is clear.
 */
struct barlease_dma_buf_tph {
	__s32 dmabuf_fd;
	__u32 flags;
	__u16 steering_tag_ext;
	__u8 steering_tag;
	__u8 ph;
};

/* ---- BARLEASE_FEATURE_ALIAS_REGION: GET, PROBE ---------------------------- */

#define BARLEASE_FEATURE_ALIAS_REGION 0xBA03

#define BARLEASE_ALIAS_WC	(1U << 0) /* mmaps of the alias are write-combining */

/*
 * A further region index that maps the BAR region_index with other mapping
 * flags. The same request gives the same index; aliases end when the device
 * fd is closed.
 *
 * EOPNOTSUPP: write-combining cannot be real here. EINVAL: unknown flag, flags
 * 0, an alias of an alias. ENODEV: not an mmap-able BAR of at least a page.
 * ENOSPC: no index left.
 */
struct barlease_alias_region {
	__u32 mapping_flags;
	__u32 region_index;
	__u32 alias_index;	/* out */
	__u32 reserved;
	__u64 reserved2;
};

/* Capabilities in the chain of VFIO_DEVICE_GET_REGION_INFO, version 1. */
#define BARLEASE_REGION_CAP_ALIAS	0xBA01 /* on an alias: what it is */
#define BARLEASE_REGION_CAP_ALIASABLE	0xBA02 /* on a BAR: what aliases it can have */
#define BARLEASE_REGION_CAP_VERSION	1

/* Both follow a struct vfio_info_cap_header. */
struct barlease_region_cap_alias {
	__u32 region_index;
	__u32 mapping_flags;
};

struct barlease_region_cap_aliasable {
	__u32 supported_mapping_flags;
	__u32 reserved;
};

/* ---- BARLEASE_FEATURE_DMA_BUF_STATUS: GET, PROBE -------------------------- */

#define BARLEASE_FEATURE_DMA_BUF_STATUS 0xBA04

struct barlease_dma_buf_status {
	__s32 dmabuf_fd;	/* in */
	__u32 reserved;		/* in, 0 */
	__u32 state;		/* enum barlease_state */
	__u32 reasons;		/* BARLEASE_REASON_*; 0 when DEAD */
	__u32 memattr;		/* BARLEASE_MEMATTR_* */
	__u32 region_index;
	__u64 size;		/* bytes, the sum of the ranges */
	__u32 nr_ranges;
	__u32 nr_attachments;
};

/* ---- BARLEASE_FEATURE_DMA_BUF_STOCK: GET, PROBE --------------------------- */

/*
 * Payload and answer of VFIO_DEVICE_FEATURE_DMA_BUF, given by the kernel's own
 * exporter: for iommufd, which imports no other. EPERM: a range overlaps the
 * MSI-X table or PBA, and the IOMMU does not isolate MSIs. ENODEV: the device
 * is gone.
 */
#define BARLEASE_FEATURE_DMA_BUF_STOCK 0xBA05

/* ---- BARLEASE_FEATURE_DMA_BUF_LIST: GET, PROBE ---------------------------- */

#define BARLEASE_FEATURE_DMA_BUF_LIST 0xBA06

/* Most records that one call copies. */
#define BARLEASE_MAX_RECORDS 4096

/* flags of a record */
#define BARLEASE_BUFFER_INTERNAL	(1U << 0) /* of BAR mappings through the device fd; no lease */
#define BARLEASE_BUFFER_DRAINING	(1U << 1) /* DEAD; an importer has yet to let go */
#define BARLEASE_BUFFER_NAME_BUSY	(1U << 2) /* the name cannot be read just now: empty */

/*
 * A buffer of this open of the device. Grows at its end only.
 *
 * The id is the inode number of the dma-buf (fstat of its fd, ino: in
 * /proc/PID/fdinfo, the inode in /proc/PID/maps): unique on this host until
 * its next boot. Nothing opens a buffer by its id.
 */
struct barlease_dma_buf_record {
	__u64 id;
	__u64 size;		/* bytes, the sum of the ranges */
	__u32 region_index;
	__u32 nr_ranges;
	__u32 memattr;		/* BARLEASE_MEMATTR_* of the next mmap */
	__u32 state;		/* enum barlease_state */
	__u32 reasons;		/* BARLEASE_REASON_*; 0 when DEAD */
	__u32 flags;		/* BARLEASE_BUFFER_* */
	__u32 nr_attachments;	/* importers attached */
	__u32 nr_mappings;	/* DMA mappings that they have */
	__u32 nr_vmas;		/* mappings of processes */
	__u32 nr_wc_vmas;	/* those of them that are write-combining */
	__u32 access;		/* O_ACCMODE of its open flags */
	__u32 reserved;
	__u8 name[32];		/* filled up with NUL */
};

/*
 * The buffers of this open of the device with an id greater than after, in
 * ascending order of id, internal ones too. Room for nr_records records, each
 * record_size bytes after the one before, follows this structure; of a
 * record_size larger than the kernel's, the rest of each record is zeroed.
 * Buffers that come or go during a walk may or may not be seen; each other one
 * is seen once.
 *
 * EINVAL: record_size below 96, argsz too small for nr_records records.
 */
struct barlease_dma_buf_list {
	__u64 after;		/* in; out: the id to go on from, 0 at the end */
	__u32 nr_records;	/* in, may be 0; out: records copied */
	__u32 record_size;	/* in; out: the kernel's */
};

/* ---- BARLEASE_FEATURE_DMA_BUF_REVOKE_ID: SET, PROBE ----------------------- */

#define BARLEASE_FEATURE_DMA_BUF_REVOKE_ID 0xBA07

/* Do not wait for importers. */
#define BARLEASE_REVOKE_NOWAIT	(1U << 0)

/*
 * As BARLEASE_FEATURE_DMA_BUF_REVOKE, of the buffer with this id.
 *
 * With BARLEASE_REVOKE_NOWAIT the buffer is DEAD, CPU mappings are gone and
 * importers are told when this returns: 0 when nothing is left to wait for,
 * EINPROGRESS when a fence that was there or a mapping is. LIST says so until
 * it is undone, and EVENTS signals then. Importers of a buffer whose
 * reservation lock somebody keeps are told when that is given back, and
 * EINPROGRESS it is, too.
 *
 * EINVAL: unknown flag, reserved not 0, an internal buffer. ENOENT: this open
 * of the device has no buffer with this id. EBADFD: revoked before.
 */
struct barlease_dma_buf_revoke_id {
	__u64 id;
	__u32 flags;
	__u32 reserved;
};

/* ---- BARLEASE_FEATURE_EVENTS: SET, PROBE ---------------------------------- */

#define BARLEASE_FEATURE_EVENTS 0xBA08

/*
 * The eventfd gets 1 added whenever a buffer of this open of the device changes
 * state, stops draining or disappears, and when the memory of the device
 * becomes inaccessible or accessible again. Changes may add up to fewer
 * signals, never to none. There is one eventfd for an open; another SET
 * replaces it.
 *
 * EBADF: no such fd. EINVAL: not an eventfd, reserved not 0.
 */
struct barlease_events {
	__s32 eventfd;		/* -1: none */
	__u32 reserved;
};

#endif /* BARLEASE_H */
