// SPDX-License-Identifier: GPL-2.0

#include <linux/dma-fence.h>
#include <linux/module.h>

#include "helpers.h"

bool bli_module_get(void)
{
	return try_module_get(THIS_MODULE);
}

void bli_module_put(void)
{
	module_put(THIS_MODULE);
}

void bli_dma_fence_put(struct dma_fence *fence)
{
	dma_fence_put(fence);
}
