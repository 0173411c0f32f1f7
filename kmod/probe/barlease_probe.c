// SPDX-License-Identifier: GPL-2.0
/*
 * For tests: reads page-table entries back, to see what the CPU really does with
 * a mapping of device memory; and plays a kernel without peer-to-peer DMA.
 *
 * A read of struct probe_entry from /dev/barlease_probe at the position A says
 * what the page-table entry of the calling process at its address A is. Reading
 * does not fault anything in. EFAULT: no mapping there, ENOENT: no entry, or
 * one of ordinary memory; EINVAL: less than a whole structure was asked for.
 *
 * And it plays what no machine of the lab has, by other answers of functions of
 * the kernel until the module is unloaded. Parameters, 0 or 1:
 *
 * no_p2p: no BAR has a P2P provider, as if the kernel were built without
 *   CONFIG_PCI_P2PDMA; for devices that are opened from then on.
 * too_far: no device reaches another one's memory.
 * below_bridge: any two devices have a PCI bridge above both of them.
 * no_msix_place: MSI-X capabilities read as all ones where the place of the
 *   table is.
 *
 * coarse_iommu=BDF: the IOMMU of that device has no entries for pages.
 *
 * watch_wake: watches the module wake a function that sleeps unnoticed. wakes is
 *   how often it did, wakes_locked how often with the core's memory_lock held for
 *   writing.
 *
 * EOPNOTSUPP where the kernel has no kretprobes.
 */

#include <linux/fs.h>
#include <linux/iommu.h>
#include <linux/kprobes.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/uaccess.h>
#include <linux/vfio_pci_core.h>

#if defined(CONFIG_X86)
#include <asm/msr.h>
#elif defined(CONFIG_ARM64)
#include <asm/sysreg.h>
#endif

/* guest-tests/src/probe.rs has the same. */
struct probe_entry {
	__u64 pfn;
	__u64 pgprot;
	/* Bytes that the entry maps. */
	__u64 size;
	/* Of enum probe_memory, or another one: by its number there, plus 256. */
	__u32 memory_type;
	/* Bit 0: can be written to. Bit 1: special. */
	__u32 flags;
};

/* The memory type of an entry, by the CPU's own table. */
enum probe_memory {
	/* x86: UC, which no range register overrides. */
	PROBE_STRONG_UNCACHED,
	/* x86: WC. arm64: Normal, non-cacheable. */
	PROBE_WRITE_COMBINING,
	/* x86: WB. arm64: Normal, write-back. */
	PROBE_WRITE_BACK,
	/* x86: UC-. arm64: Device-nGnRnE. */
	PROBE_UNCACHED,
	PROBE_OTHER = 256,
};

#if defined(CONFIG_X86)
static u32 memory_type(u64 prot, bool large)
{
	u64 pat;
	u32 index = 0, type;

	rdmsrq(MSR_IA32_CR_PAT, pat);
	if (prot & _PAGE_PWT)
		index |= 1;
	if (prot & _PAGE_PCD)
		index |= 2;
	if (prot & (large ? _PAGE_PAT_LARGE : _PAGE_PAT))
		index |= 4;
	type = (pat >> (8 * index)) & 7;
	switch (type) {
	case 0:
		return PROBE_STRONG_UNCACHED;
	case 1:
		return PROBE_WRITE_COMBINING;
	case 6:
		return PROBE_WRITE_BACK;
	case 7:
		return PROBE_UNCACHED;
	default:
		return PROBE_OTHER + type;
	}
}
#elif defined(CONFIG_ARM64)
static u32 memory_type(u64 prot, bool large)
{
	u32 index = (prot & PTE_ATTRINDX_MASK) >> 2;
	u32 type = (read_sysreg(mair_el1) >> (8 * index)) & 0xff;

	switch (type) {
	case MAIR_ATTR_DEVICE_nGnRnE:
		return PROBE_UNCACHED;
	case MAIR_ATTR_NORMAL_NC:
		return PROBE_WRITE_COMBINING;
	case MAIR_ATTR_NORMAL:
		return PROBE_WRITE_BACK;
	default:
		return PROBE_OTHER + type;
	}
}
#else
#error "How does this architecture say the memory type of an entry?"
#endif

static int look(unsigned long address, struct probe_entry *entry)
{
	struct follow_pfnmap_args args = { .address = address };
	struct mm_struct *mm = current->mm;
	int ret = -EFAULT;

	mmap_read_lock(mm);
	args.vma = find_vma_intersection(mm, address, address + 1);
	if (!args.vma)
		goto unlock;
	ret = -ENOENT;
	if (follow_pfnmap_start(&args))
		goto unlock;
	entry->pfn = args.pfn;
	entry->pgprot = pgprot_val(args.pgprot);
	entry->size = ~args.addr_mask + 1;
	entry->memory_type = memory_type(entry->pgprot,
					 entry->size != PAGE_SIZE);
	entry->flags = args.writable | args.special << 1;
	follow_pfnmap_end(&args);
	ret = 0;
unlock:
	mmap_read_unlock(mm);
	return ret;
}

static ssize_t probe_read(struct file *file, char __user *buffer, size_t size,
			  loff_t *position)
{
	struct probe_entry entry = {};
	int ret;

	if (size < sizeof(entry))
		return -EINVAL;
	ret = look(*position, &entry);
	if (ret)
		return ret;
	if (copy_to_user(buffer, &entry, sizeof(entry)))
		return -EFAULT;
	return sizeof(entry);
}

static const struct file_operations probe_fops = {
	.owner = THIS_MODULE,
	.read = probe_read,
};

static struct miscdevice probe_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "barlease_probe",
	.fops = &probe_fops,
	.mode = 0444,
};

static bool no_p2p;
module_param(no_p2p, bool, 0444);
MODULE_PARM_DESC(no_p2p, "No BAR has a P2P provider");

static bool too_far;
module_param(too_far, bool, 0444);
MODULE_PARM_DESC(too_far, "No device reaches another one's memory");

static bool below_bridge;
module_param(below_bridge, bool, 0444);
MODULE_PARM_DESC(below_bridge, "Any two devices are below one bridge");

static bool no_msix_place;
module_param(no_msix_place, bool, 0444);
MODULE_PARM_DESC(no_msix_place, "The place of MSI-X tables reads as all ones");

static char *coarse_iommu;
module_param(coarse_iommu, charp, 0444);
MODULE_PARM_DESC(coarse_iommu, "The IOMMU of this device has no entries for pages");

static bool watch_wake;
module_param(watch_wake, bool, 0444);
MODULE_PARM_DESC(watch_wake, "Watch functions be woken that sleep unnoticed");

static unsigned int wakes, wakes_locked;
module_param(wakes, uint, 0444);
MODULE_PARM_DESC(wakes, "How often one was woken");
module_param(wakes_locked, uint, 0444);
MODULE_PARM_DESC(wakes_locked, "How often with memory_lock held for writing");

#ifdef CONFIG_KRETPROBES
/* bl_pci_wake(pdev); the core's structure is the data of a function that is bound. */
static int a_wake(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	struct pci_dev *pdev = (void *)regs_get_kernel_argument(regs, 0);
	struct vfio_pci_core_device *core = pci_get_drvdata(pdev);

	wakes++;
	if (down_read_trylock(&core->memory_lock))
		up_read(&core->memory_lock);
	else
		wakes_locked++;
	return 1;
}

static int never(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	return 0;
}

static int no_provider(struct kretprobe_instance *instance,
		       struct pt_regs *regs)
{
	regs_set_return_value(regs, (unsigned long)NULL);
	return 0;
}

static int no_distance(struct kretprobe_instance *instance,
		       struct pt_regs *regs)
{
	regs_set_return_value(regs, -1);
	return 0;
}

/* The answer of bl_p2p_through_host() where it depends on a bridge. */
static int a_bridge(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	regs_set_return_value(regs, 0);
	return 0;
}

/* pci_read_config_dword(pdev, where, value) */
static int is_msix_place(struct kretprobe_instance *instance,
			 struct pt_regs *regs)
{
	struct pci_dev *pdev = (void *)regs_get_kernel_argument(regs, 0);
	int where = regs_get_kernel_argument(regs, 1);
	u32 **value = (void *)instance->data;

	if (!pdev->msix_cap || where != pdev->msix_cap + PCI_MSIX_TABLE)
		return 1;
	*value = (void *)regs_get_kernel_argument(regs, 2);
	return 0;
}

static int all_ones(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	u32 **value = (void *)instance->data;

	**value = ~0;
	return 0;
}

static struct fake {
	bool *wanted;
	struct kretprobe probe;
} fakes[] = {
	{ &no_p2p, { .kp.symbol_name = "pcim_p2pdma_provider",
		     .handler = no_provider } },
	{ &too_far, { .kp.symbol_name = "pci_p2pdma_distance_many",
		      .handler = no_distance } },
	{ &below_bridge, { .kp.symbol_name = "bl_p2p_through_host",
			   .handler = a_bridge } },
	{ &no_msix_place, { .kp.symbol_name = "pci_read_config_dword",
			    .entry_handler = is_msix_place,
			    .handler = all_ones,
			    .data_size = sizeof(u32 *) } },
	{ &watch_wake, { .kp.symbol_name = "bl_pci_wake",
			 .entry_handler = a_wake,
			 .handler = never } },
};

static void end_fakes_before(size_t count)
{
	while (count--)
		if (*fakes[count].wanted)
			unregister_kretprobe(&fakes[count].probe);
}

static void end_fakes(void)
{
	end_fakes_before(ARRAY_SIZE(fakes));
}

static int begin_fakes(void)
{
	int ret;

	for (size_t i = 0; i < ARRAY_SIZE(fakes); i++) {
		ret = *fakes[i].wanted ? register_kretprobe(&fakes[i].probe) : 0;
		if (ret) {
			end_fakes_before(i);
			return ret;
		}
	}
	return 0;
}
#else
static void end_fakes(void)
{
}

static int begin_fakes(void)
{
	return no_p2p || too_far || below_bridge || no_msix_place || watch_wake ? -EOPNOTSUPP : 0;
}
#endif

static struct pci_dev *coarse;
static unsigned long page_sizes;

static int make_coarse(void)
{
	unsigned int segment, bus, slot, function;
	struct iommu_domain *domain;

	if (!coarse_iommu)
		return 0;
	if (sscanf(coarse_iommu, "%x:%x:%x.%x", &segment, &bus, &slot, &function) != 4)
		return -EINVAL;
	coarse = pci_get_domain_bus_and_slot(segment, bus,
					     PCI_DEVFN(slot, function));
	domain = coarse ? iommu_get_domain_for_dev(&coarse->dev) : NULL;
	if (!domain) {
		pci_dev_put(coarse);
		return -ENODEV;
	}
	page_sizes = domain->pgsize_bitmap;
	domain->pgsize_bitmap &= ~PAGE_SIZE;
	return 0;
}

static void make_fine(void)
{
	struct iommu_domain *domain;

	if (!coarse_iommu)
		return;
	domain = iommu_get_domain_for_dev(&coarse->dev);
	if (domain)
		domain->pgsize_bitmap = page_sizes;
	pci_dev_put(coarse);
}

static int __init probe_init(void)
{
	int ret = begin_fakes();

	if (ret)
		return ret;
	ret = make_coarse();
	if (ret)
		goto end;
	ret = misc_register(&probe_device);
	if (!ret)
		return 0;
	make_fine();
end:
	end_fakes();
	return ret;
}
module_init(probe_init);

static void __exit probe_exit(void)
{
	misc_deregister(&probe_device);
	make_fine();
	end_fakes();
}
module_exit(probe_exit);

MODULE_DESCRIPTION("Looks at page-table entries and plays other kernels and machines, for tests");
MODULE_LICENSE("GPL");
