step "in the new kernel"
must_have barlease-vfio-pci
no_unit_has_failed
leases

step "a driver that imports, built with barlease-dev"
install barlease-dev
cp -r /usr/share/doc/barlease-dev/examples /tmp/example
make -C /tmp/example >$kept/said 2>&1 || { cat $kept/said; fail "the example does not build"; }
insmod /tmp/example/barlease_example_importer.ko
rmmod barlease_example_importer

step "a program in C, built with libbarlease-dev"
install libbarlease-dev
gcc -Wall -Werror -o /tmp/lease /usr/share/doc/libbarlease-dev/examples/lease.c -lbarlease
ldd /tmp/lease | grep libbarlease.so.0
nm -D /tmp/lease | grep -q 'barlease_map@BARLEASE_0.1'

step "in the place of vfio-pci"
barlease device unbind $card
stock=$(modinfo -F filename vfio-pci)
install barlease-dkms-vfio-pci barlease-dkms-
must_be_installed barlease-vfio-pci "$release"
installed barlease "$release" && fail "both names are installed"
modinfo -F filename vfio-pci | grep "/$release/updates/dkms/"
rmmod barlease_vfio_pci
modprobe vfio-pci
[ -e /sys/module/vfio_pci/parameters/msix_export ] || fail "modprobe has loaded the stock module"
barlease device bind --driver vfio-pci $card
must_have vfio-pci
leases
barlease device unbind $card
rmmod vfio_pci
apt-get remove -q -y barlease-dkms-vfio-pci >$kept/said 2>&1 || { cat $kept/said; fail "remove"; }
[ "$(modinfo -F filename vfio-pci)" = "$stock" ] || fail "vfio-pci is $(modinfo -F filename vfio-pci), not $stock"
modprobe vfio-pci
[ ! -e /sys/module/vfio_pci/parameters/msix_export ] || fail "the stock module is not back"
rmmod vfio_pci

step "remove, purge"
ours=$(dpkg-query -W -f '${Package}\n' '*barlease*')
apt-get remove -q -y $ours >$kept/said 2>&1 || { cat $kept/said; fail "remove"; }
no_unit_has_failed
[ -z "$(dkms status)" ] || fail "DKMS still has $(dkms status)"
[ -e /etc/barlease/policy.d/50-local.toml ] || fail "remove has taken the policy, which only purge may"
apt-get purge -q -y $ours barlease-dkms >$kept/said 2>&1 || { cat $kept/said; fail "purge"; }
rm -rf /etc/apt/sources.list.d/barlease.list /etc/barlease/policy.d/60-card.toml
rmdir --ignore-fail-on-non-empty -p /etc/barlease/policy.d 2>/dev/null || true
files >$kept/after
echo "-- new files that no package has:"
comm -13 $kept/before $kept/after
echo "-- end"
step done
