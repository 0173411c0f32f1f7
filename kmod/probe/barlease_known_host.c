// SPDX-License-Identifier: GPL-2.0
/*
 * For tests on machines whose host bridge the kernel does not know as one that
 * passes peer-to-peer DMA on, such as QEMU's for arm64, which does: while it is
 * loaded, the first device of each root bus looks to the kernel like one of its
 * list (pci_p2pdma_whitelist[] of drivers/pci/p2pdma.c). Devices must not be
 * driven by what those ids mean; the ones of a machine are not.
 */

#include <linux/module.h>
#include <linux/pci.h>

/* Skylake-E, for which the list asks for nothing else. */
#define KNOWN_VENDOR PCI_VENDOR_ID_INTEL
#define KNOWN_DEVICE 0x2030

#define MOST 4

static struct root {
	struct pci_dev *pdev;
	unsigned short vendor, device;
} roots[MOST];

static void make_known(struct pci_dev *pdev, struct root *root)
{
	*root = (struct root){ pdev, pdev->vendor, pdev->device };
	pdev->vendor = KNOWN_VENDOR;
	pdev->device = KNOWN_DEVICE;
}

static int __init known_host_init(void)
{
	struct pci_bus *bus = NULL;
	size_t count = 0;

	while ((bus = pci_find_next_bus(bus)) && count < MOST) {
		struct pci_dev *pdev = pci_get_slot(bus, PCI_DEVFN(0, 0));

		if (pdev)
			make_known(pdev, &roots[count++]);
	}
	return count ? 0 : -ENODEV;
}
module_init(known_host_init);

static void __exit known_host_exit(void)
{
	for (size_t i = 0; i < MOST && roots[i].pdev; i++) {
		roots[i].pdev->vendor = roots[i].vendor;
		roots[i].pdev->device = roots[i].device;
		pci_dev_put(roots[i].pdev);
	}
}
module_exit(known_host_exit);

MODULE_DESCRIPTION("Makes host bridges known as ones that pass peer-to-peer DMA on, for tests");
MODULE_LICENSE("GPL");
