# What all parts of the test of an installation begin with. See ../install.rs.
#
# Parts that need a running kernel or systemd run in a guest; the others may run in a chroot of its
# disk, where `uname -r` says what the guest's does. A new repository is in /mnt, and then on the disk.

set -eu
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
card=0000:01:00.0
# A network adapter, which has a driver of its own.
nic=0000:03:00.0
release=$(uname -r)
kept=/var/lib/verify
mkdir -p $kept

begun=$(cut -d. -f1 /proc/uptime)

step() { echo "== $(($(cut -d. -f1 /proc/uptime) - begun)) s: $*"; }

fail() {
    echo "FAILED: $*"
    exit 1
}

# Installs packages, keeps what was said in $kept/said, and shows what matters of it.
install() {
    apt-get install -q -y --no-install-recommends -o Dpkg::Use-Pty=0 \
        -o Dpkg::Options::=--force-confdef "$@" >$kept/said 2>&1 || { cat $kept/said; fail "apt-get install $*"; }
    grep -E '^(Setting up|Removing|barlease:|Building|Autoinstall)' $kept/said || true
}

said() { grep -q "$1" $kept/said || { cat $kept/said; fail "nobody said: $1"; }; }

# Whether DKMS has installed NAME for RELEASE.
installed() { dkms status -m "$1" -k "$2" | grep -q ': installed'; }

must_be_installed() {
    installed "$1" "$2" && return
    dkms status
    cat /var/lib/dkms/"$1"/*/build/make.log /var/lib/dkms/"$1"/*/"$2"/*/log/make.log || true
    fail "DKMS has not installed $1 for $2"
}

driver() { basename "$(readlink "/sys/bus/pci/devices/$1/driver" || echo none)"; }

# The driver of a device: must_have DRIVER [DEVICE].
must_have() {
    set -- "$1" "${2:-$card}"
    [ "$(driver "$2")" = "$1" ] || fail "$2 has the driver $(driver "$2"), not $1"
}

# A lease to another user, and its end from another shell.
leases() {
    barlease lease grant $card --bar 2 --range 4K+8K --uid 1001 --socket /run/lease </dev/null &
    grant=$!
    until [ -S /run/lease ]; do sleep 0.1; done
    runuser -u holder1 -- barlease lease write /run/lease 0 0x6c656173
    runuser -u holder1 -- barlease lease dump /run/lease --range 0+4 | grep '73 61 65 6c'
    barlease lease revoke /run/lease
    wait $grant || fail "the grant ended with $?"
}

# All files of the disk that no package has.
files() {
    find / -xdev \( -path /proc -o -path /srv -o -path $kept -o -path /tmp -o -path /root \) \
        -prune -o -print |
        sort >$kept/all
    cat /var/lib/dpkg/info/*.list | sort -u >$kept/owned
    # Packages name files below /lib, /bin and /sbin, which are links.
    sed -E 's,^/(bin|sbin|lib|lib64)/,/usr/\1/,' $kept/owned | sort -u >$kept/owned.usr
    comm -23 $kept/all $kept/owned.usr
}

# What a service says, when it is not up.
must_be_up() {
    systemctl is-active "$1" >/dev/null && return
    systemctl status --no-pager "$@" || true
    journalctl -b --no-pager -u "$1" | tail -30 || true
    fail "$1 is not active"
}

# Whether the service has opened the device of its policy, and would lease from it. A device that is
# bound when the service runs already is opened soon after.
service_has_card() {
    leases=unix:/run/barleased/leases.sock
    varlinkctl call $leases io.barlease.Leases.Devices '{}' >$kept/said
    said $card
    tries=0
    until would_grant || [ $tries = 60 ]; do
        sleep 1
        tries=$((tries + 1))
    done
    said '"granted" *: *true'
}

would_grant() {
    runuser -u holder1 -- varlinkctl call $leases io.barlease.Leases.Explain \
        '{"pool":"rows","size":4096,"access":"read_write"}' >$kept/said
    grep -q '"granted" *: *true' $kept/said
}

no_unit_has_failed() {
    [ -z "$(systemctl --failed --no-legend --plain)" ] && return
    systemctl --failed --no-pager
    fail "a unit has failed"
}

# The packages that are in /mnt become those of the repository.
take_repository() {
    [ -e /mnt/Packages ] || return 0
    rm -rf /srv/barlease
    cp -r /mnt /srv/barlease
}
