# Common to all clients: bash, as root, in a Debian system with systemd.
#
# $WAY is stock, ours or in-place; $DRIVER the driver that devices are bound to.
#
# What is said between `@begin NAME same|free` and `@end NAME CODE` is a check. The words of one that
# is `same` must be those of the stock driver's run, too.

export PATH=$PATH:/lab/bin

check() {
    local name=$1 kind=$2
    shift 2
    echo "@begin $name $kind"
    timeout "${LIMIT:-240}" bash -c '. /lab/clients/common.sh; "$@"' check "$@" </dev/null 2>&1
    echo "@end $name $?"
}

driver_of() {
    local link
    link=$(readlink "/sys/bus/pci/devices/$1/driver") || return
    echo "${link##*/}"
}

# Binds a device to the driver of this run.
bind() {
    local device=/sys/bus/pci/devices/$1
    echo "$DRIVER" >"$device/driver_override"
    [ ! -e "$device/driver" ] || echo "$1" >"$device/driver/unbind"
    echo "$1" >/sys/bus/pci/drivers_probe
    [ "$(driver_of "$1")" = "$DRIVER" ]
}

# Gives it to nobody.
release() {
    local device=/sys/bus/pci/devices/$1
    [ ! -e "$device/driver" ] || echo "$1" >"$device/driver/unbind"
    echo >"$device/driver_override"
}

MEMORY=0000:01:00.0 NVME=0000:00:05.0 EDU=0000:00:06.0 IGB=0000:03:00.0
