# QEMU gives a device to a machine of its own. Nothing runs in that: its accesses come one by one
# over qtest, so no processor is emulated inside of an emulated one.

# Asks for one access, and prints the answer.
ask() {
    local answer
    echo "$*" >&"${QEMU[1]}"
    while read -r -t 120 answer <&"${QEMU[0]}"; do
        case $answer in
        OK*) echo "${answer#OK}"; return ;;
        FAIL* | ERR*) echo "$answer"; return 1 ;;
        esac
    done
    return 1
}

config_read() { ask "outl 0xcf8 $((0x80002800 | $1))" >/dev/null && ask "inl 0xcfc"; }
config_write() { ask "outl 0xcf8 $((0x80002800 | $1))" >/dev/null && ask "outl 0xcfc $2" >/dev/null; }

# A device whose BAR2 is memory, at 0xc0000000 there.
qemu_device() {
    local bdf=$1 code=0
    bind "$bdf" || return
    coproc QEMU {
        exec qemu-system-x86_64 -nodefaults -no-user-config -display none -machine q35 -m 128 \
            -accel qtest -qtest stdio -qtest-log /dev/null \
            -device "vfio-pci,host=$bdf,bus=pcie.0,addr=05" 2>/tmp/qemu.said
    }
    local pid=$QEMU_PID
    {
        echo "function:$(config_read 0)"
        config_write 0x18 0xc0000000 && config_write 0x1c 0 && config_write 4 6
        echo "BAR2:$(config_read 0x18)"
        ask "writel 0xc0000040 0x5a5a1234" >/dev/null
        local word
        word=$(ask "readl 0xc0000040")
        echo "read back:$word"
        [ $((word)) = $((0x5a5a1234)) ] || code=1
        # Off and on again.
        config_write 4 0 && config_write 4 6
        echo "after memory was off:$(ask "readl 0xc0000040")"
        echo "dma-bufs: $(grep -c 'vfio\|barlease' /sys/kernel/debug/dma_buf/bufinfo)"
    } || code=1
    kill "$pid"
    wait "$pid" 2>/dev/null
    sed "s/$DRIVER/DRIVER/g; s/^/qemu: /" /tmp/qemu.said
    release "$bdf"
    return $code
}
export -f ask config_read config_write qemu_device

check "QEMU: shared memory" same qemu_device $MEMORY
check "QEMU: NVMe" same qemu_device $NVME
