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

/* VFIO_DEVICE_FEATURE_DMA_BUF of linux/vfio.h, for older headers. */
#define BARLEASE_FEATURE_DMA_BUF 11

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
#define BARLEASE_REASON_CONFIG_WRITE	(1U << 4) /* a config write that may turn memory off is in progress */

/* ---- BARLEASE_FEATURE_DMA_BUF_REVOKE: SET, PROBE -------------------------- */

#define BARLEASE_FEATURE_DMA_BUF_REVOKE 0xBA00

/*
 * Makes the buffer DEAD at once. When this returns, no CPU mapping and no DMA
 * mapping of it exists and none can be made again: attach, map and mmap answer
 * ENODEV, a touch of an old mapping gives SIGBUS. Other buffers, overlapping
 * ones too, are not affected; the range can be exported again at once.
 * Waits for importers without a time-out.
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
 * MSI-X table or PBA.
 */
#define BARLEASE_FEATURE_DMA_BUF_STOCK 0xBA05

#endif /* BARLEASE_H */
