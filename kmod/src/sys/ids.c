// SPDX-License-Identifier: GPL-2.0

/* The parameter `ids`: devices that the module binds without being asked for each. */

#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/moduleparam.h>
#include <linux/pci.h>
#include <linux/string.h>

#include "helpers.h"

/* As long as that of stock vfio-pci, so that each list that it takes is taken here. */
static char ids[1024];
module_param_string(ids, ids, sizeof(ids), 0);
MODULE_PARM_DESC(ids,
		 "Devices to bind, as for vfio-pci: vendor:device[:subvendor[:subdevice[:class[:mask]]]], in hexadecimal, separated by commas");

#ifdef BL_AS_STOCK
/* libvirt and others look for this alias when a device has no variant driver of its own. */
MODULE_ALIAS("vfio_pci:v*d*sv*sd*bc*sc*i*");
#endif

enum { VENDOR, DEVICE, SUBVENDOR, SUBDEVICE, CLASS, MASK, FIELDS };

/*
 * The driver is registered. An entry that is wrong is named in the log, and
 * does not keep out the others.
 */
void bl_add_ids(struct pci_driver *driver)
{
	char *rest = ids, *entry;

	while ((entry = strsep(&rest, ",")) != NULL) {
		u32 id[FIELDS] = { [SUBVENDOR] = PCI_ANY_ID, [SUBDEVICE] = PCI_ANY_ID };
		int found, err;

		if (!*entry)
			continue;
		found = sscanf(entry, "%x:%x:%x:%x:%x:%x", &id[VENDOR], &id[DEVICE],
			       &id[SUBVENDOR], &id[SUBDEVICE], &id[CLASS], &id[MASK]);
		err = found > DEVICE ? pci_add_dynid(driver, id[VENDOR], id[DEVICE], id[SUBVENDOR],
						     id[SUBDEVICE], id[CLASS], id[MASK], 0) :
				       -EINVAL;
		if (err)
			pr_warn("ids: \"%s\" is not taken: %pe\n", entry, ERR_PTR(err));
	}
}
