step "Secure Boot, and DKMS's key is enrolled"
grep -q '\[integrity\]' /sys/kernel/security/lockdown || fail "the kernel is not locked down"
# Its policy has the device, too.
systemctl stop barleased.socket barleased.service
barlease device bind $card
must_have barlease-vfio-pci
barlease doctor $card
# From debugfs, most of which a locked kernel keeps shut.
barlease lease show
leases
barlease device unbind $card
no_unit_has_failed
step done
