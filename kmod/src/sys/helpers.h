/* SPDX-License-Identifier: GPL-2.0 */
/* Static inlines and macros of the kernel, as functions that Rust can call. No logic. */
#ifndef BARLEASE_HELPERS_H
#define BARLEASE_HELPERS_H

#include <linux/atomic.h>
#include <linux/dma-buf.h>
#include <linux/dma-buf-mapping.h>
#include <linux/dma-mapping.h>
#include <linux/mm_types.h>
#include <linux/notifier.h>
#include <linux/pci.h>
#include <linux/pm_runtime.h>
#include <linux/ratelimit_types.h>
#include <linux/rwsem.h>
#include <linux/vfio.h>
#include <uapi/linux/dma-buf.h>

enum { BL_DMA_BUF_NAME_LEN = DMA_BUF_NAME_LEN };
/* A cast: no constant to bindgen. */
enum { BL_VFIO_DEVICE_SET_IRQS = VFIO_DEVICE_SET_IRQS };

struct module *bl_this_module(void);
void bl_init_rwsem(struct rw_semaphore *sem);
void bl_ratelimit_init(struct ratelimit_state *state);
const char *bl_pci_name(const struct pci_dev *pdev);
bool bl_pci_is_gone(const struct pci_dev *pdev);
bool bl_pci_no_command_memory(const struct pci_dev *pdev);
int bl_register_pm_notifier(struct notifier_block *block);
void bl_unregister_pm_notifier(struct notifier_block *block);
void bl_pm_domain_set(struct device *dev, struct dev_pm_domain *domain);
void bl_pm_runtime_get_noresume(struct device *dev);
bool bl_pm_runtime_is_active(struct device *dev);
void bl_pm_runtime_barrier(struct device *dev);
void bl_pm_runtime_put(struct device *dev);
void bl_pci_wake(struct pci_dev *pdev);
void bl_dma_buf_name(struct dma_buf *dmabuf, char *name);
bool bl_dma_buf_name_new(struct dma_buf *dmabuf, const char *name);
struct dma_fence *bl_pending_fence(struct dma_resv *resv);
void bl_dma_fence_put(struct dma_fence *fence);
bool bl_vma_may_share(const struct vm_area_struct *vma);
void bl_vma_set_io(struct vm_area_struct *vma, bool write_combining);
bool bl_write_combining_is_real(void);
vm_fault_t bl_insert_run(struct vm_area_struct *vma, unsigned long address,
			 unsigned long pfn, unsigned long pages);

void bl_count_up(atomic_t *count);
void bl_count_down(atomic_t *count);
bool bl_count_any(const atomic_t *count);
bool bl_count_wait(atomic_t *count, unsigned int milliseconds);
struct p2pdma_provider *bl_p2p_provider(struct pci_dev *pdev, int bar);
bool bl_uses_dma_iommu(struct device *dev);
u64 bl_pci_client(struct device *dev);
bool bl_iova_try_alloc(struct device *dev, struct dma_iova_state *state,
		       size_t size);
void bl_iova_free(struct device *dev, struct dma_iova_state *state);
int bl_iova_link(struct device *dev, struct dma_iova_state *state,
		 phys_addr_t phys, size_t offset, size_t size,
		 enum dma_data_direction direction);
int bl_iova_sync(struct device *dev, struct dma_iova_state *state, size_t size);
void bl_iova_destroy(struct device *dev, struct dma_iova_state *state,
		     size_t linked, enum dma_data_direction direction);
void bl_forget_translations(struct device *dev);
int bl_dma_mapping_error(struct device *dev, dma_addr_t address);
void bl_sg_fill(struct scatterlist *entry, dma_addr_t address,
		unsigned int length);

/* symbols.rs, for symbols.c */
int bl_rust_get_tph(struct dma_buf *dmabuf, bool extended, u16 *steering_tag,
		    u8 *hint);

/* params.c */
bool bl_allow_msix_export(void);
bool bl_enable_sriov(void);
bool bl_disable_denylist(void);
bool bl_stock_dma_buf(void);

#endif
