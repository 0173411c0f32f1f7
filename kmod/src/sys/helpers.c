// SPDX-License-Identifier: GPL-2.0

#include <linux/err.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pgtable.h>
#include <linux/ratelimit.h>

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

bool bl_iomapped(const void __iomem *address)
{
	return !IS_ERR_OR_NULL((const void __force *)address);
}

/* The name, cut or filled up with NUL to DMA_BUF_NAME_LEN bytes. */
void bl_dma_buf_name(struct dma_buf *dmabuf, char *name)
{
	spin_lock(&dmabuf->name_lock);
	strscpy_pad(name, dmabuf->name ?: "", DMA_BUF_NAME_LEN);
	spin_unlock(&dmabuf->name_lock);
}

bool bl_vma_may_share(const struct vm_area_struct *vma)
{
	return vma->vm_flags & VM_MAYSHARE;
}

/* The flags and the protection that vfio_pci_core_mmap() gives to a mapping of a BAR. */
void bl_vma_set_io(struct vm_area_struct *vma)
{
	vma->vm_page_prot = pgprot_decrypted(pgprot_noncached(vma->vm_page_prot));
	vm_flags_set(vma, VM_ALLOW_ANY_UNCACHED | VM_IO | VM_PFNMAP |
			  VM_DONTEXPAND | VM_DONTDUMP);
}

MODULE_VERSION("0.1.0");
