new=$(cat /srv/barlease/new-version) next=$(cat /srv/barlease/next-release)

step "after a reboot"
must_have barlease-vfio-pci
no_unit_has_failed
leases

step "upgrade of Barlease"
apt-get update -q
install barlease barlease-dkms barleased
must_be_installed barlease "$release"
[ "$(dpkg-query -W -f '${Version}' barlease-dkms)" = "$new" ] || fail "barlease-dkms is not $new"
dkms status -m barlease
[ "$(dkms status -m barlease | wc -l)" = 1 ] || fail "DKMS has more than the new version"
[ "$(echo /usr/src/barlease-[0-9]*)" = "/usr/src/barlease-$new" ] || fail "sources of another version are left"
grep -q '# ours' /etc/barlease/policy.d/50-local.toml || fail "a changed policy was lost"
must_have barlease-vfio-pci
no_unit_has_failed

step "upgrade of the kernel, without its metadata"
install "linux-image-$next" "linux-headers-$next"
said "WARNING: the kernel $next has no module"
said "lacks the Rust metadata of the kernel"
installed barlease "$next" && fail "DKMS has built without metadata"

step "its metadata"
install "barlease-rust-overlay-$next"
must_be_installed barlease "$next"
must_be_installed barlease "$release"
step done
