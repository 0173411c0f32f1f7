step "what is there before"
# The lab boots kernels by itself.
sed -i 's/^update_initramfs=.*/update_initramfs=no/' /etc/initramfs-tools/update-initramfs.conf
files >$kept/before
echo "deb [trusted=yes] file:/srv/barlease ./" >/etc/apt/sources.list.d/barlease.list
apt-get update -q

step "command and module, without the kernel's metadata"
install barlease barlease-dkms
said "lacks the Rust metadata of the kernel"
installed barlease "$release" && fail "DKMS has built without metadata"

step "the metadata: its package has DKMS build"
install "barlease-rust-overlay-$release"
must_be_installed barlease "$release"
modinfo -F filename barlease_vfio_pci | grep "/$release/updates/dkms/"
modinfo -F signer barlease_vfio_pci | grep -i dkms || fail "DKMS has not signed"

step "bind, lease, unbind"
barlease device bind $card
must_have barlease-vfio-pci
leases
barlease device unbind $card
must_have none

step "bound at each boot, and the service"
systemctl enable --now "barlease-bind@$card.service"
must_have barlease-vfio-pci
install barleased
no_unit_has_failed
cat >/etc/barlease/policy.d/60-card.toml <<END
[device.card]
match = "$card"
[pool.rows]
device = "card"
bar = 2
unit = "4K"
contents = "memory"
[[allow]]
pools = ["rows"]
who = { user = "holder1" }
access = "read-write"
max-ttl = "1h"
lifetime = ["connection"]
END
echo '# ours' >>/etc/barlease/policy.d/50-local.toml
step done
