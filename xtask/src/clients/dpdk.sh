# DPDK: its tool binds a network adapter, and testpmd sends with it.
#
# Without huge pages each page is a mapping of the IOMMU, and a container has at most 65,535: so no
# more than 128 MiB.

dpdk_bind() {
    dpdk-devbind.py --bind="$DRIVER" $IGB || return
    dpdk-devbind.py --status-dev net 2>/dev/null >/tmp/devbind.said
    release $IGB
    grep $IGB /tmp/devbind.said
    sed -n '/DPDK-compatible/,/^$/p' /tmp/devbind.said | grep -q $IGB
}

dpdk_send() {
    bind $IGB || return
    (sleep 60; echo) | timeout 200 dpdk-testpmd --no-huge -m 128 --no-telemetry --iova-mode=va \
        -l 0,1 -a $IGB -- --total-num-mbufs=4096 --forward-mode=txonly --auto-start --interactive \
        --cmdline-file=/lab/clients/testpmd >/tmp/testpmd.said 2>&1
    local code=$?
    grep -E 'Port 0|TX-packets|EAL: .*(vfio|VFIO)|No probed' /tmp/testpmd.said | tail -20
    release $IGB
    [ $code = 0 ] && grep -q 'TX-packets: [1-9]' /tmp/testpmd.said
}
export -f dpdk_bind dpdk_send

check "DPDK: dpdk-devbind.py" free dpdk_bind
check "DPDK: testpmd sends" free dpdk_send
