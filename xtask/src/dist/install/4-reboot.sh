step "in the new kernel"
must_have barlease-vfio-pci
no_unit_has_failed
leases
insmod $kept/barlease_example_importer.ko
rmmod barlease_example_importer

step "upgrade of command and service"
install barlease barleased
grep -q '# ours' /etc/barlease/policy.d/50-local.toml || fail "a changed policy was lost"
must_have barlease-vfio-pci
no_unit_has_failed
leases
systemctl disable "barlease-bind@$card.service"
step done
