/* SPDX-License-Identifier: GPL-2.0 */
/* What bindgen reads; see Kbuild for what it takes from here. */
#include <linux/suspend.h>
#include <linux/vfio_pci_core.h>

#include "helpers.h"
