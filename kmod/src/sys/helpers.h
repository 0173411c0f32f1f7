/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Static inlines and macros of the kernel, as functions that Rust can call, and
 * the few lines that must be C: what walks page tables, lists of fences or
 * bitfields, or holds a spinlock. Each has a word about why.
 */
#ifndef BARLEASE_HELPERS_H
#define BARLEASE_HELPERS_H

#include <linux/atomic.h>
#include <linux/dma-buf.h>
#include <linux/dma-buf-mapping.h>
#include <linux/dma-mapping.h>
#include <linux/mm_types.h>
#include <linux/notifier.h>
#include <linux/pci.h>
#include <linux/pgtable.h>
#include <linux/pm_runtime.h>
#include <linux/ratelimit_types.h>
#include <linux/rwsem.h>
#include <linux/spinlock_types.h>
#include <linux/workqueue.h>
#include <linux/vfio.h>
#include <linux/vfio_pci_core.h>
#include <uapi/linux/dma-buf.h>

enum { BL_DMA_BUF_NAME_LEN = DMA_BUF_NAME_LEN };
/* A cast: no constant to bindgen. */
enum { BL_VFIO_DEVICE_SET_IRQS = VFIO_DEVICE_SET_IRQS };
/* bindgen leaves the macro out where it is made of function-like ones, as on arm64. */
enum { BL_PMD_ORDER = PMD_ORDER };
/* 0 where there are no such entries of device memory, or where nobody has tried them. */
#if defined(CONFIG_X86_64) && defined(CONFIG_ARCH_SUPPORTS_PUD_PFNMAP)
#define BL_HAS_GIGANTIC
enum { BL_GIGANTIC_ORDER = PUD_ORDER };
#else
enum { BL_GIGANTIC_ORDER = 0 };
#endif

/*
 * The layouts that the compiler gives to the core's structures, for Rust to
 * compare with those that bindgen gave them.
 */
enum {
	BL_VFIO_DEVICE_SIZE = sizeof(struct vfio_device),
	BL_VFIO_DEVICE_DEV = offsetof(struct vfio_device, dev),
	BL_VFIO_DEVICE_DEVICE = offsetof(struct vfio_device, device),
	BL_CORE_SIZE = sizeof(struct vfio_pci_core_device),
	BL_CORE_VDEV = offsetof(struct vfio_pci_core_device, vdev),
	BL_CORE_PDEV = offsetof(struct vfio_pci_core_device, pdev),
	BL_CORE_PCI_OPS = offsetof(struct vfio_pci_core_device, pci_ops),
	BL_CORE_BARMAP = offsetof(struct vfio_pci_core_device, barmap),
	BL_CORE_BAR_MMAP_SUPPORTED =
		offsetof(struct vfio_pci_core_device, bar_mmap_supported),
	BL_CORE_VCONFIG = offsetof(struct vfio_pci_core_device, vconfig),
	BL_CORE_NUM_REGIONS = offsetof(struct vfio_pci_core_device, num_regions),
	BL_CORE_MSIX_BAR = offsetof(struct vfio_pci_core_device, msix_bar),
	BL_CORE_MSIX_SIZE = offsetof(struct vfio_pci_core_device, msix_size),
	BL_CORE_MSIX_OFFSET = offsetof(struct vfio_pci_core_device, msix_offset),
	BL_CORE_PM_RUNTIME_ENGAGED =
		offsetof(struct vfio_pci_core_device, pm_runtime_engaged),
	BL_CORE_MEMORY_LOCK = offsetof(struct vfio_pci_core_device, memory_lock),
	BL_VFIO_OPS_SIZE = sizeof(struct vfio_device_ops),
};

struct module *bl_this_module(void);
const char *bl_module_name(void);
void bl_add_ids(struct pci_driver *driver);
void bl_init_rwsem(struct rw_semaphore *sem);
void bl_ratelimit_init(struct ratelimit_state *state);
const char *bl_pci_name(const struct pci_dev *pdev);
bool bl_pci_is_gone(const struct pci_dev *pdev);
bool bl_pci_has_isolated_msi(struct pci_dev *pdev);
void bl_pci_log_reset(const struct pci_dev *pdev, bool done);
unsigned long bl_array_index_nospec(unsigned long index, unsigned long size);
bool bl_pci_no_command_memory(const struct pci_dev *pdev);
void bl_pm_domain_set(struct device *dev, struct dev_pm_domain *domain);
void bl_pm_runtime_get_noresume(struct device *dev);
bool bl_pm_runtime_is_active(struct device *dev);
void bl_pm_runtime_barrier(struct device *dev);
void bl_pm_runtime_put(struct device *dev);
int bl_pm_runtime_resume_and_get(struct device *dev);
int bl_register_pm_notifier(struct notifier_block *block);
void bl_unregister_pm_notifier(struct notifier_block *block);
void bl_pci_wake(struct pci_dev *pdev);
void bl_dma_buf_name(struct dma_buf *dmabuf, char *name);
bool bl_dma_buf_name_new(struct dma_buf *dmabuf, const char *name);
bool bl_resv_trylock(struct dma_resv *resv);
int bl_resv_lock_killable(struct dma_resv *resv);
void bl_dma_fence_put(struct dma_fence *fence);
bool bl_vma_may_share(const struct vm_area_struct *vma);
int bl_vma_no_more_than(struct vm_area_struct *vma, const struct file *file);
void bl_vma_set_io(struct vm_area_struct *vma, bool write_combining);
bool bl_write_combining_is_real(void);
/* The kinds of entry that the table above pages can have for an address. */
enum { BL_NO_TABLE, BL_TABLE, BL_LARGE_ENTRY };
unsigned int bl_table_of(const struct vm_fault *vmf);
vm_fault_t bl_make_table(struct vm_fault *vmf);
vm_fault_t bl_insert_page(struct vm_area_struct *vma, unsigned long address,
			  unsigned long pfn);
vm_fault_t bl_insert_large(struct vm_fault *vmf, unsigned long pfn);
bool bl_has_gigantic_entries(void);
vm_fault_t bl_insert_gigantic(struct vm_fault *vmf, unsigned long pfn);
vm_fault_t bl_insert_run(struct vm_area_struct *vma, unsigned long address,
			 unsigned long pfn, unsigned long pages,
			 bool write_combining);

void bl_count_up(atomic_t *count);
void bl_count_down(atomic_t *count);
bool bl_count_any(const atomic_t *count);
unsigned int bl_count_read(const atomic_t *count);
void bl_count_wait_for_none(atomic_t *count);
bool bl_count_wait(atomic_t *count, unsigned int milliseconds);
long bl_count_wait_killable(atomic_t *count, unsigned int milliseconds);
int bl_sleep_killable(unsigned int milliseconds);

/* An eventfd, or none. */
struct bl_event_slot {
	spinlock_t lock;
	struct eventfd_ctx *ctx;
};

void bl_event_slot_init(struct bl_event_slot *slot);
int bl_event_slot_set(struct bl_event_slot *slot, int fd);
void bl_event_slot_clear(struct bl_event_slot *slot);
void bl_event_slot_signal(struct bl_event_slot *slot);

void bl_delayed_init(struct delayed_work *work, work_func_t function);
void bl_delayed_start(struct delayed_work *work, unsigned int milliseconds);
void bl_delayed_start_now(struct delayed_work *work);
void bl_delayed_cancel(struct delayed_work *work);
struct p2pdma_provider *bl_p2p_provider(struct pci_dev *pdev, int bar);
bool bl_uses_dma_iommu(struct device *dev);
bool bl_iommu_has_pages(struct device *dev);
int bl_p2p_through_host(struct p2pdma_provider *provider, struct device *dev,
			struct device **known);
bool bl_iommu_leads(struct device *dev, dma_addr_t address, phys_addr_t phys);
u64 bl_dma_reach(struct device *dev);
void bl_cond_resched(void);
bool bl_iova_try_alloc(struct device *dev, struct dma_iova_state *state,
		       size_t size);
int bl_iova_link(struct device *dev, struct dma_iova_state *state,
		 phys_addr_t phys, size_t offset, size_t size,
		 enum dma_data_direction direction);
int bl_iova_sync(struct device *dev, struct dma_iova_state *state,
		 size_t offset, size_t size);
void bl_iova_destroy(struct device *dev, struct dma_iova_state *state,
		     size_t offset, size_t linked,
		     enum dma_data_direction direction);
void bl_forget_translations(struct device *dev);
int bl_dma_mapping_error(struct device *dev, dma_addr_t address);
unsigned int bl_sg_length(struct scatterlist *entry);
void bl_sg_fill(struct scatterlist *entry, dma_addr_t address,
		unsigned int length);

/* symbols.rs, for symbols.c */
int bl_rust_get_tph(struct dma_buf *dmabuf, bool extended, u16 *steering_tag,
		    u8 *hint);

/* params.c */
enum { BL_MSIX_EXPORT_AUTO, BL_MSIX_EXPORT_ALWAYS, BL_MSIX_EXPORT_NEVER };
unsigned int bl_msix_export(void);
void bl_latch_params(struct vfio_pci_core_device *core);
bool bl_enable_sriov(void);
bool bl_disable_denylist(void);
bool bl_stock_dma_buf(void);

#endif
