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
 * With the parameter no_p2p=1 no BAR has a P2P provider, as if the kernel were
 * built without CONFIG_PCI_P2PDMA: for devices that are opened from then on, until
 * the module is unloaded. EOPNOTSUPP where the kernel has no kretprobes.
 *
 * With shares_group=DRIVER the PCI driver of that name lets others have the IOMMU
 * group of the functions that it is bound to from then on: a device behind a switch
 * without ACS is in one group with its neighbours, and VFIO takes none that a driver
 * uses. It must not be bound to any meanwhile.
 */

#include <linux/fs.h>
#include <linux/kprobes.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/uaccess.h>

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

/* What the CPU makes of an entry, by the CPU's own table. */
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

#ifdef CONFIG_KRETPROBES
static int no_provider(struct kretprobe_instance *instance,
		       struct pt_regs *regs)
{
	regs_set_return_value(regs, (unsigned long)NULL);
	return 0;
}

static struct kretprobe provider_probe = {
	.kp.symbol_name = "pcim_p2pdma_provider",
	.handler = no_provider,
};

static int take_providers(void)
{
	return register_kretprobe(&provider_probe);
}

static void give_providers_back(void)
{
	unregister_kretprobe(&provider_probe);
}
#else
static int take_providers(void)
{
	return -EOPNOTSUPP;
}

static void give_providers_back(void)
{
}
#endif

static char *shares_group;
module_param(shares_group, charp, 0444);
MODULE_PARM_DESC(shares_group, "A PCI driver that lets others have its groups");

static int share_groups(void)
{
	struct device_driver *driver = driver_find(shares_group, &pci_bus_type);

	if (!driver)
		return -ENODEV;
	container_of(driver, struct pci_driver, driver)->driver_managed_dma = true;
	return 0;
}

static int __init probe_init(void)
{
	int ret = 0;

	if (shares_group)
		ret = share_groups();
	if (ret)
		return ret;
	if (no_p2p)
		ret = take_providers();
	if (ret)
		return ret;
	ret = misc_register(&probe_device);
	if (ret && no_p2p)
		give_providers_back();
	return ret;
}
module_init(probe_init);

static void __exit probe_exit(void)
{
	misc_deregister(&probe_device);
	if (no_p2p)
		give_providers_back();
}
module_exit(probe_exit);

MODULE_DESCRIPTION("Looks at page-table entries and takes P2P providers away, for tests");
MODULE_LICENSE("GPL");
