step "the module in the place of vfio-pci"
modinfo -k "$release" -F filename vfio-pci >$kept/stock
install barlease-dkms-vfio-pci barlease-dkms-
must_be_installed barlease-vfio-pci "$release"
installed barlease "$release" && fail "both names are installed"
modinfo -k "$release" -F filename vfio-pci | grep "/$release/updates/dkms/"
step done
