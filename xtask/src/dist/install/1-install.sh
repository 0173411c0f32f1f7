step "what is there before"
# The lab boots kernels by itself.
sed -i 's/^update_initramfs=.*/update_initramfs=no/' /etc/initramfs-tools/update-initramfs.conf
files >$kept/before
take_repository
echo "deb [trusted=yes] file:/srv/barlease ./" >/etc/apt/sources.list.d/barlease.list
apt-get update -q -o Acquire::Languages=none

step "the module, without the kernel's metadata"
install barlease-dkms
said "lacks the Rust metadata of the kernel"
installed barlease "$release" && fail "DKMS has built without metadata"

step "the metadata: its package has DKMS build"
install "barlease-rust-overlay-$release"
must_be_installed barlease "$release"
modinfo -k "$release" -F filename barlease_vfio_pci | grep "/$release/updates/dkms/"
modinfo -k "$release" -F signer barlease_vfio_pci | grep -i dkms || fail "DKMS has not signed"
step done
