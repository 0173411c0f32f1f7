#!/bin/busybox sh
# The guest's first process: mounts, loads, runs one command, says how it ended and powers off.
#
# The work to do is in /lab, written by the host (lab/src/guests/initramfs.rs):
#   devices   lines "BDF NAME TEXT", for programs in the guest
#   modules   files to load, in this order
#   driver    the driver to bind all endpoints to, if any
#   command   a shell script to run; without it, an interactive shell
#   patience  seconds after which blocked tasks are listed in the log
#   agent     with a system on a disk: what that runs once it is up; command and banner are for it then
#   terminal  rows and columns of the host's terminal, for that shell
#   ports     names of the serial ports besides the kernel's console: the command's terminal, the control channel (JSON lines).
#             /dev/lab-payload and /dev/lab-control are links to them

export PATH=/bin:/lab/bin HOME=/root
/bin/busybox mount -t devtmpfs devtmpfs /dev
echo 'barlease-lab: init started' >/dev/kmsg
/bin/busybox --install -s /bin
read -r payload control </lab/ports
ln -s "$payload" /dev/lab-payload
ln -s "$control" /dev/lab-control

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t debugfs debugfs /sys/kernel/debug
mkdir -p /dev/pts /dev/shm /run /tmp
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=1777 tmpfs /run
ip link set lo up
ulimit -l unlimited

# Kept open, so that the settings of the ports stay.
exec 8<>/dev/lab-payload 9<>/dev/lab-control
if [ -e /lab/command ]; then
    stty -F /dev/lab-payload raw -echo
else
    stty -F /dev/lab-payload sane
    [ -s /lab/terminal ] && stty -F /dev/lab-payload $(cat /lab/terminal)
fi
stty -F /dev/lab-control raw -echo
chmod 666 /dev/lab-payload /dev/lab-control

finish() {
    # Setting a port waits until all that was written to it is out.
    stty -F /dev/lab-payload raw
    echo "{\"exit\":$1}" >&9
    stty -F /dev/lab-control raw
    sync
    poweroff -f
}

bind_all() {
    for device in /sys/bus/pci/devices/*; do
        bdf=${device##*/}
        read -r class <"$device/class"
        case "$class $bdf" in
        0x06*) continue ;;          # bridges
        0x07*) continue ;;          # a serial port
        *' '0000:00:1f.*) continue ;; # the chipset's own
        *' '0000:00:1e.0) [ -e /lab/agent ] && continue ;; # the system's disk
        esac
        echo "$1" >"$device/driver_override"
        [ -e "$device/driver" ] && echo "$bdf" >"$device/driver/unbind"
        echo "$bdf" >/sys/bus/pci/drivers_probe
        bound=$(readlink "$device/driver")
        name=$(grep "^$bdf " /lab/devices)
        if [ "${bound##*/}" = "$1" ]; then
            echo "  ${name:-$bdf}" >&8
        else
            echo "  ${name:-$bdf}: NOT bound to $1, see the kernel's log" >&8
        fi
    done
}

if [ -s /lab/patience ]; then
    read -r seconds </lab/patience
    (
        sleep "$seconds"
        echo 'barlease-lab: time is nearly up; blocked tasks:' >/dev/kmsg
        echo w >/proc/sysrq-trigger
    ) 8>&- 9>&- &
fi

while read -r module parameters; do
    # shellcheck disable=SC2086 # parameters are words
    if ! insmod "/lib/modules/${module#-}" $parameters; then
        # It is wanted where it works.
        [ "$module" = "${module#-}" ] || continue
        echo "could not load $module: see the kernel's log" >&8
        finish 125
    fi
done </lab/modules

if [ -s /lab/driver ]; then
    read -r driver </lab/driver
    echo "bound to $driver:" >&8
    bind_all "$driver"
fi

# The system on the disk goes on, with what is in /lab and the files that were put into the guest.
if [ -e /lab/agent ]; then
    root=/system
    mkdir -p $root
    waits=0
    until [ -e /dev/vda ]; do
        [ "$waits" -lt 100 ] || { echo 'there is no disk with a system' >&8; finish 125; }
        waits=$((waits + 1))
        sleep 0.1
    done
    mount -t ext4 -o noatime /dev/vda $root || { echo 'the disk cannot be mounted' >&8; finish 125; }
    mount -t tmpfs -o mode=755 tmpfs $root/run
    cp -a /lab $root/run/lab
    while read -r number place; do
        mkdir -p "$root/${place%/*}"
        cp "/files/$number" "$root/$place" || { echo "cannot put $place onto the disk" >&8; finish 125; }
    done </files/places
    umount -l /sys/kernel/debug /dev/pts /dev/shm /tmp /run
    for place in dev proc sys; do mount --move /$place $root/$place; done
    # Ports are set again by the agent.
    exec 8>&- 9>&-
    exec switch_root $root /sbin/init
fi

if [ -e /lab/command ]; then
    echo '{"ready":true}' >&9
    sh /lab/command </dev/null >/dev/lab-payload 2>&1 8>&- 9>&-
    finish $?
fi

[ -e /lab/banner ] && cat /lab/banner >/dev/lab-payload
echo '{"ready":true}' >&9
cd /root || true
PS1='guest# ' setsid -c sh </dev/lab-payload >/dev/lab-payload 2>&1 8>&- 9>&-
finish $?
