# driverctl: binds a device, says so, and gives it back; also over the next udev event.

driverctl_once() {
    driverctl --nosave set-override $MEMORY "$DRIVER" || return
    driverctl list-overrides | sed "s/$DRIVER/DRIVER/"
    [ "$(driver_of $MEMORY)" = "$DRIVER" ] || return
    driverctl --nosave unset-override $MEMORY || return
    [ -z "$(driver_of $MEMORY)" ]
}

driverctl_kept() {
    driverctl set-override $MEMORY "$DRIVER" || return
    sed "s/$DRIVER/DRIVER/" /etc/driverctl.d/$MEMORY
    echo $MEMORY >/sys/bus/pci/devices/$MEMORY/driver/unbind
    # As udev does at the next boot.
    driverctl load-override $MEMORY || return
    [ "$(driver_of $MEMORY)" = "$DRIVER" ] || return
    driverctl unset-override $MEMORY
    [ -z "$(driver_of $MEMORY)" ] && [ ! -e /etc/driverctl.d/$MEMORY ]
}
export -f driverctl_once driverctl_kept

check "driverctl: once" same driverctl_once
check "driverctl: kept" same driverctl_kept
