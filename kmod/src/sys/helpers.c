// SPDX-License-Identifier: GPL-2.0

#include <linux/dma-fence.h>
#include <linux/dma-resv.h>
#include <linux/iommu.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pci-p2pdma.h>
#include <linux/pgtable.h>
#include <linux/pm_domain.h>
#include <linux/ratelimit.h>
#include <linux/scatterlist.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/wait_bit.h>
/* Wants struct scatterlist. */
#include <linux/iommu-dma.h>

#ifdef CONFIG_X86
#include <asm/memtype.h>
#endif

#include "helpers.h"

struct module *bl_this_module(void)
{
	return THIS_MODULE;
}

void bl_init_rwsem(struct rw_semaphore *sem)
{
	init_rwsem(sem);
}

void bl_ratelimit_init(struct ratelimit_state *state)
{
	ratelimit_default_init(state);
	/* The first lines of a burst say what is wrong; how many were left out helps nobody. */
	ratelimit_set_flags(state, RATELIMIT_MSG_ON_RELEASE);
}

const char *bl_pci_name(const struct pci_dev *pdev)
{
	return pci_name(pdev);
}

/* As pci_dev_is_disconnected(), which is the PCI core's own. */
bool bl_pci_is_gone(const struct pci_dev *pdev)
{
	return READ_ONCE(pdev->error_state) == pci_channel_io_perm_failure;
}

/*
 * Set at enumeration, but the bits beside it change at any time, under locks
 * of their own: what a read of the whole finds there does not matter.
 */
bool bl_pci_no_command_memory(const struct pci_dev *pdev)
{
	return data_race(pdev->no_command_memory != 0);
}

void bl_pm_domain_set(struct device *dev, struct dev_pm_domain *domain)
{
	dev_pm_domain_set(dev, domain);
}

void bl_pm_runtime_get_noresume(struct device *dev)
{
	pm_runtime_get_noresume(dev);
}

/* With the lock: rpm_suspend() looks at the usage count and changes the status under it. */
bool bl_pm_runtime_is_active(struct device *dev)
{
	unsigned long flags;
	bool active;

	spin_lock_irqsave(&dev->power.lock, flags);
	active = dev->power.runtime_status == RPM_ACTIVE;
	spin_unlock_irqrestore(&dev->power.lock, flags);
	return active;
}

void bl_pm_runtime_barrier(struct device *dev)
{
	pm_runtime_barrier(dev);
}

void bl_pm_runtime_put(struct device *dev)
{
	pm_runtime_put(dev);
}

/*
 * Wakes a function that sleeps although the kernel takes it for awake, by way
 * of a state that it does not take it for.
 */
void bl_pci_wake(struct pci_dev *pdev)
{
	pci_set_power_state(pdev, PCI_D3hot);
	pci_set_power_state(pdev, PCI_D0);
}

/* The name, cut or filled up with NUL to DMA_BUF_NAME_LEN bytes. */
void bl_dma_buf_name(struct dma_buf *dmabuf, char *name)
{
	spin_lock(&dmabuf->name_lock);
	strscpy_pad(name, dmabuf->name ?: "", DMA_BUF_NAME_LEN);
	spin_unlock(&dmabuf->name_lock);
}

/* Only before anybody else can know of it. The last byte of the name is taken for NUL. */
bool bl_dma_buf_name_new(struct dma_buf *dmabuf, const char *name)
{
	char *copy = kmalloc(DMA_BUF_NAME_LEN, GFP_KERNEL);

	if (!copy)
		return false;
	memcpy(copy, name, DMA_BUF_NAME_LEN - 1);
	copy[DMA_BUF_NAME_LEN - 1] = '\0';
	/* The dma-buf frees it. */
	dmabuf->name = copy;
	return true;
}

/* A reference to a fence that has not signalled, or NULL. */
struct dma_fence *bl_pending_fence(struct dma_resv *resv)
{
	struct dma_resv_iter cursor;
	struct dma_fence *fence;

	dma_resv_iter_begin(&cursor, resv, DMA_RESV_USAGE_BOOKKEEP);
	dma_resv_for_each_fence_unlocked(&cursor, fence) {
		dma_fence_get(fence);
		break;
	}
	dma_resv_iter_end(&cursor);
	return fence;
}

void bl_dma_fence_put(struct dma_fence *fence)
{
	dma_fence_put(fence);
}

bool bl_vma_may_share(const struct vm_area_struct *vma)
{
	return vma->vm_flags & VM_MAYSHARE;
}

/*
 * The protection of an entry, as vfio_pci_core_mmap() has it. The VMA's own is
 * not used: it may have got a memory type from the core, and types add up to
 * another one. And while soft-dirty bits are tracked (clear_refs) it asks for a
 * fault at the first write, to note that. There is nothing to note of device
 * memory, and an entry that is read-only for this reason alone is one that KVM
 * takes for read-only memory.
 */
static pgprot_t bl_prot(const struct vm_area_struct *vma, bool write_combining)
{
	pgprot_t prot = vm_get_page_prot(vma->vm_flags);

	prot = write_combining ? pgprot_writecombine(prot) : pgprot_noncached(prot);
	return pgprot_decrypted(prot);
}

/* The flags and the protection that vfio_pci_core_mmap() gives to a mapping of a BAR. */
void bl_vma_set_io(struct vm_area_struct *vma, bool write_combining)
{
	vma->vm_page_prot = bl_prot(vma, write_combining);
	vm_flags_set(vma, VM_ALLOW_ANY_UNCACHED | VM_IO | VM_PFNMAP |
			  VM_DONTEXPAND | VM_DONTDUMP);
}

bool bl_write_combining_is_real(void)
{
	pgprot_t prot = vm_get_page_prot(VM_READ | VM_WRITE | VM_SHARED);

#ifdef CONFIG_X86
	if (!pat_enabled())
		return false;
#endif
	return pgprot_val(pgprot_writecombine(prot)) !=
	       pgprot_val(pgprot_noncached(prot));
}

unsigned int bl_table_of(const struct vm_fault *vmf)
{
	pmd_t pmd = pmdp_get_lockless(vmf->pmd);

	if (pmd_none(pmd))
		return BL_NO_TABLE;
	return pmd_leaf(pmd) ? BL_LARGE_ENTRY : BL_TABLE;
}

static vm_fault_t bl_answer(int err)
{
	switch (err) {
	case 0:
		return VM_FAULT_NOPAGE;
	case -ENOMEM:
		return VM_FAULT_OOM;
	default:
		return VM_FAULT_SIGBUS;
	}
}

vm_fault_t bl_make_table(struct vm_fault *vmf)
{
	return bl_answer(apply_to_page_range(vmf->vma->vm_mm, vmf->address,
					     PAGE_SIZE, NULL, NULL));
}

vm_fault_t bl_insert_page(struct vm_area_struct *vma, unsigned long address,
			  unsigned long pfn)
{
	return vmf_insert_pfn_prot(vma, address, pfn, bl_prot(vma, false));
}

/*
 * Takes the VMA's own protection, and makes of it what bl_prot() says where the
 * VMA can be written to: also of an entry that is there already and read-only.
 */
vm_fault_t bl_insert_large(struct vm_fault *vmf, unsigned long pfn)
{
	return vmf_insert_pfn_pmd(vmf, pfn, vmf->vma->vm_flags & VM_WRITE);
}

struct bl_run {
	struct vm_area_struct *vma;
	unsigned long pfn;
	pgprot_t prot;
};

static int bl_insert_one(pte_t *pte, unsigned long address, void *data)
{
	struct bl_run *run = data;

	if (pte_none(ptep_get(pte)))
		set_pte_at(run->vma->vm_mm, address, pte,
			   pte_mkspecial(pfn_pte(run->pfn, run->prot)));
	run->pfn++;
	return 0;
}

vm_fault_t bl_insert_run(struct vm_area_struct *vma, unsigned long address,
			 unsigned long pfn, unsigned long pages,
			 bool write_combining)
{
	struct bl_run run = {
		.vma = vma,
		.pfn = pfn,
		.prot = bl_prot(vma, write_combining),
	};

	return bl_answer(apply_to_page_range(vma->vm_mm, address,
					     pages << PAGE_SHIFT,
					     bl_insert_one, &run));
}

void bl_count_up(atomic_t *count)
{
	atomic_inc(count);
}

void bl_count_down(atomic_t *count)
{
	atomic_dec_and_wake_up(count);
}

bool bl_count_any(const atomic_t *count)
{
	return atomic_read_acquire(count);
}

bool bl_count_wait(atomic_t *count, unsigned int milliseconds)
{
	return wait_var_event_timeout(count, !atomic_read_acquire(count),
				      msecs_to_jiffies(milliseconds));
}

struct p2pdma_provider *bl_p2p_provider(struct pci_dev *pdev, int bar)
{
	return pcim_p2pdma_provider(pdev, bar);
}

bool bl_uses_dma_iommu(struct device *dev)
{
	return use_dma_iommu(dev);
}

/* Whether the IOMMU of a device that uses one can map a page, and not only more than that. */
bool bl_iommu_has_pages(struct device *dev)
{
	struct iommu_domain *domain = iommu_get_domain_for_dev(dev);

	return domain && domain->pgsize_bitmap &&
	       1UL << __ffs(domain->pgsize_bitmap) <= PAGE_SIZE;
}

/* Whether the IOMMU leads an address of a device to this physical one. */
bool bl_iommu_leads(struct device *dev, dma_addr_t address, phys_addr_t phys)
{
	struct iommu_domain *domain = iommu_get_domain_for_dev(dev);

	return domain && iommu_iova_to_phys(domain, address) == phys;
}

/* The last address that a device can name, as dma_capable() has it; 0: none. */
u64 bl_dma_reach(struct device *dev)
{
	if (!dev->dma_mask)
		return 0;
	return min_not_zero(*dev->dma_mask, dev->bus_dma_limit);
}

void bl_cond_resched(void)
{
	cond_resched();
}

bool bl_iova_try_alloc(struct device *dev, struct dma_iova_state *state,
		       size_t size)
{
	return dma_iova_try_alloc(dev, state, 0, size);
}

void bl_iova_free(struct device *dev, struct dma_iova_state *state)
{
	dma_iova_free(dev, state);
}

int bl_iova_link(struct device *dev, struct dma_iova_state *state,
		 phys_addr_t phys, size_t offset, size_t size,
		 enum dma_data_direction direction)
{
	return dma_iova_link(dev, state, phys, offset, size, direction,
			     DMA_ATTR_MMIO);
}

int bl_iova_sync(struct device *dev, struct dma_iova_state *state,
		 size_t offset, size_t size)
{
	return dma_iova_sync(dev, state, offset, size);
}

/*
 * Not dma_iova_destroy(): in Linux 7.2 it leaves it to a lazy IOMMU when to
 * forget the translations. The device must be blocked when this returns.
 */
void bl_iova_destroy(struct device *dev, struct dma_iova_state *state,
		     size_t offset, size_t linked,
		     enum dma_data_direction direction)
{
	if (linked)
		dma_iova_unlink(dev, state, offset, linked, direction,
				DMA_ATTR_MMIO);
	dma_iova_free(dev, state);
}

/* After dma_unmap_phys(), which leaves it to a lazy IOMMU, too. */
void bl_forget_translations(struct device *dev)
{
	struct iommu_domain *domain;

	if (!use_dma_iommu(dev))
		return;
	domain = iommu_get_domain_for_dev(dev);
	if (domain)
		iommu_flush_iotlb_all(domain);
}

int bl_dma_mapping_error(struct device *dev, dma_addr_t address)
{
	return dma_mapping_error(dev, address);
}

unsigned int bl_sg_length(struct scatterlist *entry)
{
	return sg_dma_len(entry);
}

/* Importers get no pages: the DMA address is all there is. */
void bl_sg_fill(struct scatterlist *entry, dma_addr_t address,
		unsigned int length)
{
	sg_set_page(entry, NULL, 0, 0);
	sg_dma_address(entry) = address;
	sg_dma_len(entry) = length;
}

MODULE_VERSION("0.1.0");
