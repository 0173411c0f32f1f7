// SPDX-License-Identifier: GPL-2.0

#include <linux/moduleparam.h>
#include <linux/string.h>
#include <linux/sysfs.h>
#include <linux/vfio_pci_core.h>

#include "helpers.h"

static const char *const bl_msix_export_names[] = {
	[BL_MSIX_EXPORT_AUTO] = "auto",
	[BL_MSIX_EXPORT_ALWAYS] = "always",
	[BL_MSIX_EXPORT_NEVER] = "never",
};
static unsigned int msix_export = BL_MSIX_EXPORT_AUTO;

/* A trailing newline is left out of the comparison, as sysfs_match_string() does. */
static int msix_export_set(const char *value, const struct kernel_param *param)
{
	int policy = sysfs_match_string(bl_msix_export_names, value);

	if (policy < 0)
		return policy;
	WRITE_ONCE(msix_export, policy);
	return 0;
}

static int msix_export_get(char *buffer, const struct kernel_param *param)
{
	return sysfs_emit(buffer, "%s\n", bl_msix_export_names[bl_msix_export()]);
}

static const struct kernel_param_ops msix_export_ops = {
	.set = msix_export_set,
	.get = msix_export_get,
};
module_param_cb(msix_export, &msix_export_ops, NULL, 0644);
MODULE_PARM_DESC(msix_export,
		 "Export ranges that overlap the MSI-X table or PBA: auto (default, where the IOMMU isolates the device's MSIs), always, never");

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

/*
 * The choices that stock vfio-pci leaves to an administrator. Kernels
 * before 7.2 keep these in the core, for all its drivers together, and stock
 * vfio-pci sets them.
 */
#ifdef BL_CORE_HAS_DEVICE_PARAMS
static bool nointxmask;
module_param(nointxmask, bool, 0644);
MODULE_PARM_DESC(nointxmask, "As vfio-pci's: do not mask INTx by COMMAND (default: no)");

#ifdef CONFIG_VFIO_PCI_VGA
static bool disable_vga;
module_param(disable_vga, bool, 0444);
MODULE_PARM_DESC(disable_vga, "As vfio-pci's: no access to VGA resources (default: no)");
#endif

static bool disable_idle_d3;
module_param(disable_idle_d3, bool, 0644);
MODULE_PARM_DESC(disable_idle_d3,
		 "As vfio-pci's: do not put unused devices into D3 (default: no)");
#endif

void bl_latch_params(struct vfio_pci_core_device *core)
{
#ifdef BL_CORE_HAS_DEVICE_PARAMS
	core->nointxmask = READ_ONCE(nointxmask);
	core->disable_idle_d3 = READ_ONCE(disable_idle_d3);
#ifdef CONFIG_VFIO_PCI_VGA
	core->disable_vga = disable_vga;
#endif
#endif
}

unsigned int bl_msix_export(void)
{
	return READ_ONCE(msix_export);
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
