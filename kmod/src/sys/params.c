// SPDX-License-Identifier: GPL-2.0

#include <linux/moduleparam.h>

#include "helpers.h"

static bool allow_msix_export;
module_param(allow_msix_export, bool, 0644);
MODULE_PARM_DESC(allow_msix_export,
		 "Export ranges that overlap the MSI-X table or PBA (default: no)");

static bool enable_sriov;
module_param(enable_sriov, bool, 0644);
MODULE_PARM_DESC(enable_sriov,
		 "Allow to make virtual functions of bound physical ones (default: no)");

static bool disable_denylist;
module_param(disable_denylist, bool, 0444);
MODULE_PARM_DESC(disable_denylist,
		 "Bind functions with known exploitable errata too (default: no)");

static bool stock_dma_buf;
module_param(stock_dma_buf, bool, 0644);
MODULE_PARM_DESC(stock_dma_buf,
		 "Let the kernel's own exporter answer VFIO_DEVICE_FEATURE_DMA_BUF, as iommufd needs it (default: no)");

bool bl_allow_msix_export(void)
{
	return READ_ONCE(allow_msix_export);
}

bool bl_enable_sriov(void)
{
	return READ_ONCE(enable_sriov);
}

bool bl_disable_denylist(void)
{
	return disable_denylist;
}

bool bl_stock_dma_buf(void)
{
	return READ_ONCE(stock_dma_buf);
}
