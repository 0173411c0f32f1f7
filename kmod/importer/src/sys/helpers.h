/* SPDX-License-Identifier: GPL-2.0 */
/* Static inlines and macros of the kernel, as functions that Rust can call. No logic. */
#ifndef BARLEASE_IMPORTER_HELPERS_H
#define BARLEASE_IMPORTER_HELPERS_H

#include <linux/types.h>

struct dma_fence;

bool bli_module_get(void);
void bli_module_put(void);
void bli_dma_fence_put(struct dma_fence *fence);

#endif
