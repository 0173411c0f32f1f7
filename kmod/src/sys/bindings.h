/* SPDX-License-Identifier: GPL-2.0 */
/* bindgen reads this; Kbuild says which names it takes from here. */
#include <linux/suspend.h>
#include <linux/vfio_pci_core.h>

#include "helpers.h"
