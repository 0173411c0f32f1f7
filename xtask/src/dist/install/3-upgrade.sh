take_repository
new=$(cat /srv/barlease/new-version) next=$(cat /srv/barlease/next-release)
apt-get update -q -o Acquire::Languages=none

step "upgrade of the module"
install barlease-dkms
must_be_installed barlease "$release"
[ "$(dpkg-query -W -f '${Version}' barlease-dkms)" = "$new" ] || fail "barlease-dkms is not $new"
dkms status -m barlease
[ "$(dkms status -m barlease | wc -l)" = 1 ] || fail "DKMS has more than the new version"
[ "$(echo /usr/src/barlease-[0-9]*)" = "/usr/src/barlease-$new" ] || fail "other sources are left"

step "upgrade of the kernel, without its metadata"
install "linux-image-$next" "linux-headers-$next"
said "WARNING: the kernel $next has no module"
said "lacks the Rust metadata of the kernel"
installed barlease "$next" && fail "DKMS has built without metadata"

step "its metadata"
install "barlease-rust-overlay-$next"
must_be_installed barlease "$next"
must_be_installed barlease "$release"

step "a driver that imports, built with barlease-dev"
install barlease-dev
cp -r /usr/share/doc/barlease-dev/examples /tmp/example
make -C /tmp/example KDIR="/lib/modules/$next/build" >$kept/said 2>&1 ||
    { cat $kept/said; fail "the example does not build"; }
cp /tmp/example/barlease_example_importer.ko $kept/

step "a program in C, built with libbarlease-dev"
install libbarlease-dev
gcc -Wall -Werror -o $kept/lease /usr/share/doc/libbarlease-dev/examples/lease.c -lbarlease
ldd $kept/lease | grep libbarlease.so.0
nm -D $kept/lease | grep -q 'barlease_map@BARLEASE_0.1'
step done
