/* SPDX-License-Identifier: GPL-2.0 */
/* The functions that barlease_vfio_pci exports to other kernel modules. */
#ifndef BARLEASE_KERNEL_H
#define BARLEASE_KERNEL_H

#include <linux/types.h>

struct dma_buf;

/**
 * barlease_dma_buf_get_tph - the steering tag that an importer is to send
 * @dmabuf: any dma-buf; its reservation lock must be held
 * @extended: the namespace: 16-bit tags, or 8-bit ones
 * @steering_tag: out: the tag; 0 is a valid one
 * @ph: out: the processing hint, 0 to 3
 *
 * The answer is valid until the next invalidation of the importer's mappings.
 *
 * Return: 0, or -EOPNOTSUPP when no tag of that namespace is set or the dma-buf
 * is not one of this module.
 */
int barlease_dma_buf_get_tph(struct dma_buf *dmabuf, bool extended,
			     u16 *steering_tag, u8 *ph);

#endif
