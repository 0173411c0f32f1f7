// SPDX-License-Identifier: GPL-2.0

#include <linux/dma-fence.h>
#include <linux/dma-resv.h>
#include <linux/eventfd.h>
#include <linux/fs.h>
#include <linux/iommu.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/nospec.h>
#include <linux/pci-p2pdma.h>
#include <linux/pgtable.h>
#include <linux/pm_domain.h>
#include <linux/ratelimit.h>
#include <linux/scatterlist.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/suspend.h>
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

const char *bl_module_name(void)
{
	return KBUILD_MODNAME;
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
 * Whether the function, and all of its group, can raise their own MSIs only:
 * what vfio asks before it gives a group to user space. Not under a spinlock.
 */
bool bl_pci_has_isolated_msi(struct pci_dev *pdev)
{
	struct iommu_group *group = iommu_group_get(&pdev->dev);
	bool isolated;

	if (!group)
		return false;
	isolated = iommu_group_has_isolated_msi(group);
	iommu_group_put(group);
	return isolated;
}

/*
 * The lines that the PCI core writes about a function whose driver has no reset
 * handlers, as stock vfio-pci has none.
 */
void bl_pci_log_reset(const struct pci_dev *pdev, bool done)
{
	dev_warn_ratelimited(&pdev->dev, "%s\n",
			     done ? "reset done" : "resetting");
}

unsigned long bl_array_index_nospec(unsigned long index, unsigned long size)
{
	return array_index_nospec(index, size);
}

/*
 * Set at enumeration, but the bits beside it change at any time, under locks
 * of their own: what a read of the whole finds there does not matter.
 */
bool bl_pci_no_command_memory(const struct pci_dev *pdev)
{
	return data_race(pdev->no_command_memory != 0);
}

/* Static inlines without CONFIG_PM_SLEEP. */
int bl_register_pm_notifier(struct notifier_block *block)
{
	return register_pm_notifier(block);
}

void bl_unregister_pm_notifier(struct notifier_block *block)
{
	unregister_pm_notifier(block);
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
#ifdef CONFIG_PM
	unsigned long flags;
	bool active;

	spin_lock_irqsave(&dev->power.lock, flags);
	active = dev->power.runtime_status == RPM_ACTIVE;
	spin_unlock_irqrestore(&dev->power.lock, flags);
	return active;
#else
	return true;
#endif
}

void bl_pm_runtime_barrier(struct device *dev)
{
	pm_runtime_barrier(dev);
}

void bl_pm_runtime_put(struct device *dev)
{
	pm_runtime_put(dev);
}

int bl_pm_runtime_resume_and_get(struct device *dev)
{
	return pm_runtime_resume_and_get(dev);
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

/*
 * Only before it has a name. The last byte of the name is taken for NUL. The
 * dma-buf is on the kernel's list of all of them already, whose readers take
 * the lock.
 */
bool bl_dma_buf_name_new(struct dma_buf *dmabuf, const char *name)
{
	char *copy = kmalloc(DMA_BUF_NAME_LEN, GFP_KERNEL_ACCOUNT);

	if (!copy)
		return false;
	memcpy(copy, name, DMA_BUF_NAME_LEN - 1);
	copy[DMA_BUF_NAME_LEN - 1] = '\0';
	/* The dma-buf frees it. A list of all dma-bufs reads names under the lock. */
	spin_lock(&dmabuf->name_lock);
	dmabuf->name = copy;
	spin_unlock(&dmabuf->name_lock);
	return true;
}

bool bl_resv_trylock(struct dma_resv *resv)
{
	return dma_resv_trylock(resv);
}

/*
 * -EINTR when a fatal signal comes. Other signals end an interruptible wait,
 * too, and there is no killable one: while one of them is pending, the lock is
 * asked for again and again.
 */
int bl_resv_lock_killable(struct dma_resv *resv)
{
	while (dma_resv_lock_interruptible(resv, NULL)) {
		if (bl_sleep_killable(1))
			return -EINTR;
	}
	return 0;
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
 * Lets the mapping allow no more than the file does: an importer may map the
 * dma-buf through a file of its own (dma_buf_mmap()).
 */
int bl_vma_no_more_than(struct vm_area_struct *vma, const struct file *file)
{
	if (file->f_mode & FMODE_WRITE)
		return 0;
	if (vma->vm_flags & VM_WRITE)
		return -EACCES;
	vm_flags_clear(vma, VM_MAYWRITE);
	return 0;
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
#ifdef CONFIG_ARCH_SUPPORTS_PMD_PFNMAP
	return vmf_insert_pfn_pmd(vmf, pfn, vmf->vma->vm_flags & VM_WRITE);
#else
	/* Such as a real-time kernel, which has no entries above a page. */
	return VM_FAULT_FALLBACK;
#endif
}

/* The kernel does not ask the CPU before it has an entry of that size be inserted. */
bool bl_has_gigantic_entries(void)
{
#ifdef BL_HAS_GIGANTIC
	return boot_cpu_has(X86_FEATURE_GBPAGES);
#else
	return false;
#endif
}

/*
 * The entry gets the VMA's own protection. Where that lacks the right to write
 * for the sake of soft-dirty bits (see bl_prot()) smaller entries serve: to add
 * it, vmf_insert_pfn_pud() would have to be told that this is for a store, and
 * it then warns where a table is, which another thread may just have made.
 *
 * Not where there is an entry already: a store has met one that was made when
 * the VMA was read-only, so the kernel is to take it away; or another thread
 * was faster.
 */
vm_fault_t bl_insert_gigantic(struct vm_fault *vmf, unsigned long pfn)
{
#ifdef BL_HAS_GIGANTIC
	struct vm_area_struct *vma = vmf->vma;

	if (!pud_none(pudp_get(vmf->pud)))
		return VM_FAULT_FALLBACK;
	if ((vma->vm_flags & VM_WRITE) &&
	    !pud_write(pfn_pud(pfn, vma->vm_page_prot)))
		return VM_FAULT_FALLBACK;
	return vmf_insert_pfn_pud(vmf, pfn, false);
#else
	return VM_FAULT_FALLBACK;
#endif
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

void bl_count_wait_for_none(atomic_t *count)
{
	wait_var_event(count, !atomic_read_acquire(count));
}

unsigned int bl_count_read(const atomic_t *count)
{
	return atomic_read(count);
}

/* Above 0: there is none any more; 0: the time is over; below: a fatal signal. */
long bl_count_wait_killable(atomic_t *count, unsigned int milliseconds)
{
	if (!atomic_read_acquire(count))
		return 1;
	return ___wait_var_event(count,
				 ___wait_cond_timeout(!atomic_read_acquire(count)),
				 TASK_KILLABLE, 0, msecs_to_jiffies(milliseconds),
				 __ret = schedule_timeout(__ret));
}

int bl_sleep_killable(unsigned int milliseconds)
{
	schedule_timeout_killable(msecs_to_jiffies(milliseconds));
	return fatal_signal_pending(current) ? -EINTR : 0;
}

void bl_event_slot_init(struct bl_event_slot *slot)
{
	spin_lock_init(&slot->lock);
	slot->ctx = NULL;
}

static void bl_event_slot_swap(struct bl_event_slot *slot, struct eventfd_ctx *ctx)
{
	unsigned long flags;

	spin_lock_irqsave(&slot->lock, flags);
	ctx = xchg(&slot->ctx, ctx);
	spin_unlock_irqrestore(&slot->lock, flags);
	if (ctx)
		eventfd_ctx_put(ctx);
	/* A thread that asks for the state after this misses no change: see bl_event_slot_signal(). */
	smp_mb();
}

int bl_event_slot_set(struct bl_event_slot *slot, int fd)
{
	struct eventfd_ctx *ctx = eventfd_ctx_fdget(fd);

	if (IS_ERR(ctx))
		return PTR_ERR(ctx);
	bl_event_slot_swap(slot, ctx);
	return 0;
}

void bl_event_slot_clear(struct bl_event_slot *slot)
{
	bl_event_slot_swap(slot, NULL);
}

/*
 * After a change that is ordered before the caller's look at the slot: by a
 * lock that a thread takes to ask for the state, or by a full barrier.
 */
void bl_event_slot_signal(struct bl_event_slot *slot)
{
	unsigned long flags;

	spin_lock_irqsave(&slot->lock, flags);
	if (slot->ctx)
		eventfd_signal(slot->ctx);
	spin_unlock_irqrestore(&slot->lock, flags);
}

void bl_delayed_init(struct delayed_work *work, work_func_t function)
{
	INIT_DELAYED_WORK(work, function);
}

void bl_delayed_start(struct delayed_work *work, unsigned int milliseconds)
{
	queue_delayed_work(system_dfl_wq, work, msecs_to_jiffies(milliseconds));
}

void bl_delayed_start_now(struct delayed_work *work)
{
	mod_delayed_work(system_dfl_wq, work, 0);
}

void bl_delayed_cancel(struct delayed_work *work)
{
	cancel_delayed_work_sync(work);
}

struct p2pdma_provider *bl_p2p_provider(struct pci_dev *pdev, int bar)
{
	return pcim_p2pdma_provider(pdev, bar);
}

/*
 * How a device reaches the memory of a provider, as far as the topology says.
 * Addresses of the bus lead there by a bridge that is above both (or of a
 * function to itself). Where there is none, the way is a host bridge or there
 * is no way: 1, or -EINVAL. Where there is one: 0, it depends on its ACS.
 *
 * Whether host bridges lead from one to the other is a property of these two,
 * for as long as they are there. *known is NULL, or a host bridge that was
 * found to lead to the provider, with a reference: so no other one can have
 * its address.
 */
int bl_p2p_through_host(struct p2pdma_provider *provider, struct device *dev,
			struct device **known)
{
	struct pci_dev *owner = to_pci_dev(provider->owner), *up, *other;
	struct device *host;

	if (!dev_is_pci(dev))
		return -EINVAL;
	for (up = owner; up; up = pci_upstream_bridge(up)) {
		other = to_pci_dev(dev);
		for (; other; other = pci_upstream_bridge(other))
			if (up == other)
				return 0;
	}
	host = &pci_find_host_bridge(to_pci_dev(dev)->bus)->dev;
	if (READ_ONCE(*known) == host)
		return 1;
	if (pci_p2pdma_distance(owner, dev, false) < 0)
		return -EINVAL;
	get_device(host);
	if (cmpxchg(known, NULL, host))
		put_device(host);
	return 1;
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
