# SPDX-License-Identifier: GPL-2.0
#
# For the Kbuild file of a module that uses what Barlease's module exports:
#
#     include /usr/share/barlease-dev/barlease.mk
#
# Adds the folder of barlease_kernel.h, and the Module.symvers of what DKMS has built for the kernel
# that the module is built for. In its dkms.conf, BUILD_DEPENDS[0]="barlease" has that built first.

ccflags-y += -I/usr/include/barlease

barlease-symvers := $(lastword $(sort $(wildcard $(foreach name,barlease barlease-vfio-pci, \
	/var/lib/dkms/$(name)/*/$(KERNELRELEASE)/*/module/Module.symvers))))
ifeq ($(barlease-symvers),)
$(error DKMS has built no barlease for $(KERNELRELEASE): dkms status barlease)
endif
KBUILD_EXTRA_SYMBOLS += $(barlease-symvers)
