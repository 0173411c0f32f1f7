step "in the new kernel"
must_have barlease-vfio-pci
# The rule of udev is in nobody's way while the system starts.
udevadm settle
[ "$(driver $nic)" = barlease-vfio-pci ] || journalctl -b --no-pager -u systemd-udevd
must_have barlease-vfio-pci $nic
no_unit_has_failed
must_be_up barleased.service
service_has_card
insmod $kept/barlease_example_importer.ko
rmmod barlease_example_importer

step "upgrade of command and service"
install barlease barleased
grep -q '# ours' /etc/barlease/policy.d/50-local.toml || fail "a changed policy was lost"
must_have barlease-vfio-pci
no_unit_has_failed
service_has_card

step "the service gives the device up, and the command has it"
barleased drain
leases
systemctl disable --now "barlease-bind@$card.service"
must_have none

step "not bound at the next boot"
barlease device unbind --persist $nic
must_have igb $nic
step done
