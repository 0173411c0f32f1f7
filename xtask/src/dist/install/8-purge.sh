step "the module in the place of vfio-pci"
must_have none
must_have igb $nic
# Its policy has the device, too.
systemctl stop barleased.socket barleased.service
barlease device bind --driver vfio-pci $card
[ -e /sys/module/vfio_pci/parameters/msix_export ] || fail "the stock module was loaded"
must_have vfio-pci
leases
barlease device unbind $card
rmmod vfio_pci

step "the stock module is back when it is removed"
apt-get remove -q -y barlease-dkms-vfio-pci >$kept/said 2>&1 || { cat $kept/said; fail "remove"; }
stock=$(cat $kept/stock)
now=$(modinfo -F filename vfio-pci)
[ "$now" = "$stock" ] || fail "vfio-pci is $now, not $stock"
modprobe vfio-pci
[ ! -e /sys/module/vfio_pci/parameters/msix_export ] || fail "the stock module is not back"
rmmod vfio_pci

step "remove"
ours=$(dpkg-query -W -f '${Package}\n' '*barlease*')
# As in docs/install.md.
apt-get --simulate purge '?installed?name(barlease)' >$kept/said
for package in $ours; do said "^Purg $package "; done
# shellcheck disable=SC2086 # names are words
apt-get remove -q -y $ours >$kept/said 2>&1 || { cat $kept/said; fail "remove"; }
no_unit_has_failed
[ -z "$(dkms status)" ] || fail "DKMS still has $(dkms status)"
grep -q '# ours' /etc/barlease/policy.d/50-local.toml || fail "remove has taken the policy"

step "purge"
# shellcheck disable=SC2086
apt-get purge -q -y $ours >$kept/said 2>&1 || { cat $kept/said; fail "purge"; }
# What this test has written itself.
rm -f /etc/apt/sources.list.d/barlease.list /etc/barlease/policy.d/60-card.toml
rmdir -p --ignore-fail-on-non-empty /etc/barlease/policy.d 2>/dev/null || true
files >$kept/after
echo "-- new files that no package has:"
comm -13 $kept/before $kept/after
echo "-- end"
step done
