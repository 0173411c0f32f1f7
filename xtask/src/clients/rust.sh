# vfio-ioctls and pci-driver, by the programs in clients/.

rust_client() {
    bind "$2" && /lab/clients/barlease-clients "$1" "$2" 2
    local code=$?
    release "$2"
    return $code
}
export -f rust_client

for crate in vfio-ioctls pci-driver; do
    check "$crate: shared memory" same rust_client $crate $MEMORY
    check "$crate: NVMe" same rust_client $crate $NVME
done
