# libvirt: finds devices, takes one for a guest by name of the driver, and gives it to a domain.

virsh_() { virsh --quiet --connect qemu:///system "$@"; }
node_name() { local name=pci_$1; echo "${name//[:.]/_}"; }

libvirt_ready() {
    printf 'security_driver = "none"\nnamespaces = []\n' >/etc/libvirt/qemu.conf
    systemctl start libvirtd.service || return
    virsh_ nodedev-dumpxml "$(node_name $MEMORY)" | grep -E '<(vendor|product|iommuGroup|address)'
}

libvirt_detach() {
    virsh_ nodedev-detach "$(node_name $MEMORY)" --driver "$DRIVER" || return
    [ "$(driver_of $MEMORY)" = "$DRIVER" ] || return
    virsh_ nodedev-reset "$(node_name $MEMORY)"
    virsh_ nodedev-reattach "$(node_name $MEMORY)" || return
    [ "$(driver_of $MEMORY)" != "$DRIVER" ]
}

libvirt_domain() {
    cat >/tmp/domain.xml <<END
<domain type='qemu'>
  <name>client</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/><memballoon model='none'/>
    <hostdev mode='subsystem' type='pci' managed='yes'>
      <driver model='$DRIVER'/>
      <source><address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></source>
    </hostdev>
  </devices>
</domain>
END
    virsh_ create --paused /tmp/domain.xml || { tail -5 /var/log/libvirt/qemu/client.log; return 1; }
    echo "driver: $(driver_of $MEMORY)" | sed "s/$DRIVER/DRIVER/"
    virsh_ dumpxml client | grep -c '<hostdev '
    virsh_ destroy client || return
    sed -n "s/$DRIVER/DRIVER/; /vfio/p" /var/log/libvirt/qemu/client.log | grep -v -- -device
    [ "$(driver_of $MEMORY)" != "$DRIVER" ]
}
export -f virsh_ node_name libvirt_ready libvirt_detach libvirt_domain

check "libvirt: nodedev" same libvirt_ready
check "libvirt: detach, reset, reattach" free libvirt_detach
check "libvirt: a domain with the device" same libvirt_domain
