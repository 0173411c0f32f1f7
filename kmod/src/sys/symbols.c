// SPDX-License-Identifier: GPL-2.0

#include <linux/dma-buf.h>
#include <linux/dma-resv.h>
#include <linux/export.h>

#include "../../include/barlease_kernel.h"
#include "helpers.h"

int barlease_dma_buf_get_tph(struct dma_buf *dmabuf, bool extended,
			     u16 *steering_tag, u8 *ph)
{
	dma_resv_assert_held(dmabuf->resv);
	return bl_rust_get_tph(dmabuf, extended, steering_tag, ph);
}
EXPORT_SYMBOL_GPL(barlease_dma_buf_get_tph);
