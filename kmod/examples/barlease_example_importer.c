// SPDX-License-Identifier: GPL-2.0
/*
 * The least that an importer of leases is: a driver that attaches its device to
 * a dma-buf, maps it, and lets go when it is told to.
 *
 * A process writes the number of a dma-buf's descriptor to
 * /dev/barlease_example, and reads the addresses at which the device reaches
 * the lease. Comments say where a real driver has work to do on its device.
 *
 * Lock order: `lock`, then the reservation lock of the dma-buf. The exporter
 * holds the reservation lock when it calls import_invalidate(), which therefore
 * takes nothing that is held anywhere around the reservation lock.
 */
#include <linux/dma-buf.h>
#include <linux/dma-mapping.h>
#include <linux/dma-resv.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/scatterlist.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include <barlease_kernel.h>

/* One device with one lease at a time. */
static DEFINE_MUTEX(lock);
/* The device; NULL when none is bound. Under `lock`. */
static struct pci_dev *function;

static struct import {
	/* Change under `lock`, while there is no attachment. */
	struct dma_buf *dmabuf;
	struct dma_buf_attachment *attachment; /* NULL: nothing is imported */

	/* Under the reservation lock of `dmabuf`. */
	struct sg_table *table; /* NULL: not mapped */
	bool tagged;
	u16 tag;
	u8 hint;
} import;

/* With the reservation lock held. */
static void import_unmap(struct import *import)
{
	dma_resv_assert_held(import->dmabuf->resv);
	if (!import->table)
		return;
	/*
	 * A real driver stops what its device does with these addresses, and
	 * waits until that has ended. (Or it leaves a fence in the reservation
	 * object that says when it has, and unmaps later: whoever takes the
	 * memory away waits for both.)
	 */
	dma_buf_unmap_attachment(import->attachment, import->table, DMA_BIDIRECTIONAL);
	import->table = NULL;
}

/* The memory is being taken away. The exporter holds the reservation lock. */
static void import_invalidate(struct dma_buf_attachment *attachment)
{
	import_unmap(attachment->importer_priv);
}

static const struct dma_buf_attach_ops import_ops = {
	/* Bus addresses of a BAR have no struct page: never look for one. */
	.allow_peer2peer = true,
	.invalidate_mappings = import_invalidate,
};

/* With the reservation lock held. -ENODEV: the lease is revoked just now, or dead. */
static int import_map(struct import *import)
{
	struct sg_table *table;

	dma_resv_assert_held(import->dmabuf->resv);
	if (import->table)
		return 0;
	table = dma_buf_map_attachment(import->attachment, DMA_BIDIRECTIONAL);
	if (IS_ERR(table))
		return PTR_ERR(table);
	import->table = table;
	/* Valid until the next invalidation: asked for with every mapping. */
	import->tagged = !barlease_dma_buf_get_tph(import->dmabuf, false, &import->tag,
						   &import->hint);
	return 0;
}

/* With `lock` held. */
static void import_end(struct import *import)
{
	if (!import->attachment)
		return;
	dma_resv_lock(import->dmabuf->resv, NULL);
	import_unmap(import);
	dma_resv_unlock(import->dmabuf->resv);
	/* Takes the reservation lock itself. */
	dma_buf_detach(import->dmabuf, import->attachment);
	import->attachment = NULL;
	dma_buf_put(import->dmabuf);
	import->dmabuf = NULL;
}

/* With `lock` held. */
static int import_begin(struct import *import, int fd)
{
	struct dma_buf_attachment *attachment;
	struct dma_buf *dmabuf;

	if (!function)
		return -ENODEV;
	import_end(import);
	dmabuf = dma_buf_get(fd);
	if (IS_ERR(dmabuf))
		return PTR_ERR(dmabuf);
	/* -EOPNOTSUPP: no peer-to-peer DMA here; -ENODEV: the lease is revoked. */
	attachment = dma_buf_dynamic_attach(dmabuf, &function->dev, &import_ops, import);
	if (IS_ERR(attachment)) {
		dma_buf_put(dmabuf);
		return PTR_ERR(attachment);
	}
	import->dmabuf = dmabuf;
	import->attachment = attachment;
	return 0;
}

static ssize_t example_write(struct file *file, const char __user *text, size_t length,
			     loff_t *offset)
{
	int fd, ret;

	ret = kstrtoint_from_user(text, length, 10, &fd);
	if (ret)
		return ret;
	mutex_lock(&lock);
	ret = import_begin(&import, fd);
	mutex_unlock(&lock);
	return ret ?: length;
}

/* The ranges that are imported, as text. With the reservation lock held, and mapped. */
static int describe(const struct import *import, char *text, int size)
{
	struct scatterlist *entry;
	int length = 0, i;

	/* The DMA addresses and lengths, nents of them; nothing else of an entry is set. */
	for_each_sgtable_dma_sg(import->table, entry, i) {
		dma_addr_t address = sg_dma_address(entry);

		length += scnprintf(text + length, size - length, "%pad %#x\n", &address,
				    sg_dma_len(entry));
	}
	if (import->tagged)
		length += scnprintf(text + length, size - length, "tag %#x hint %u\n",
				    import->tag, import->hint);
	return length;
}

static ssize_t example_read(struct file *file, char __user *text, size_t length, loff_t *offset)
{
	char *answer = kmalloc(PAGE_SIZE, GFP_KERNEL);
	ssize_t ret = -ENXIO;

	if (!answer)
		return -ENOMEM;
	mutex_lock(&lock);
	if (import.attachment) {
		dma_resv_lock(import.dmabuf->resv, NULL);
		/*
		 * Nobody tells an importer that memory is back: it maps again
		 * when it has use for it, and may get -ENODEV again.
		 */
		ret = import_map(&import);
		if (!ret)
			ret = describe(&import, answer, PAGE_SIZE);
		dma_resv_unlock(import.dmabuf->resv);
	}
	mutex_unlock(&lock);
	if (ret > 0)
		ret = simple_read_from_buffer(text, length, offset, answer, ret);
	kfree(answer);
	return ret;
}

/* The imports of a process end with it. */
static int example_release(struct inode *inode, struct file *file)
{
	mutex_lock(&lock);
	import_end(&import);
	mutex_unlock(&lock);
	return 0;
}

static const struct file_operations example_file = {
	.owner = THIS_MODULE,
	.write = example_write,
	.read = example_read,
	.release = example_release,
};

static struct miscdevice example_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "barlease_example",
	.fops = &example_file,
};

static int example_probe(struct pci_dev *pdev, const struct pci_device_id *id)
{
	int ret = pcim_enable_device(pdev);

	if (ret)
		return ret;
	/* An address beyond this is refused by map, or translated by an IOMMU. */
	ret = dma_set_mask_and_coherent(&pdev->dev, DMA_BIT_MASK(28));
	if (ret)
		return ret;
	/* Peer-to-peer entries are not cut: say how long one may be. */
	dma_set_max_seg_size(&pdev->dev, UINT_MAX);
	pci_set_master(pdev);
	mutex_lock(&lock);
	if (function)
		ret = -EBUSY;
	else
		function = pdev;
	mutex_unlock(&lock);
	return ret;
}

static void example_remove(struct pci_dev *pdev)
{
	/* Before the device goes: an attachment names it. */
	mutex_lock(&lock);
	import_end(&import);
	function = NULL;
	mutex_unlock(&lock);
}

/* QEMU's edu. */
static const struct pci_device_id example_ids[] = {
	{ PCI_DEVICE(0x1234, 0x11e8) },
	{ }
};
MODULE_DEVICE_TABLE(pci, example_ids);

static struct pci_driver example_driver = {
	.name = "barlease_example",
	.id_table = example_ids,
	.probe = example_probe,
	.remove = example_remove,
};

static int __init example_init(void)
{
	int ret = pci_register_driver(&example_driver);

	if (ret)
		return ret;
	ret = misc_register(&example_device);
	if (ret)
		pci_unregister_driver(&example_driver);
	return ret;
}
module_init(example_init);

static void __exit example_exit(void)
{
	misc_deregister(&example_device);
	pci_unregister_driver(&example_driver);
}
module_exit(example_exit);

MODULE_AUTHOR("The Barlease authors");
MODULE_DESCRIPTION("Importer of dma-bufs, as an example");
MODULE_LICENSE("GPL");
MODULE_IMPORT_NS("DMA_BUF");
