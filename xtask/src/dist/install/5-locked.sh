step "Secure Boot, and nobody has enrolled DKMS's key"
grep -q '\[integrity\]' /sys/kernel/security/lockdown || fail "the kernel is not locked down"
if modprobe barlease_vfio_pci 2>$kept/said; then fail "a module was taken that nobody vouches for"; fi
said "Key was rejected"
if barlease device bind $card >$kept/said 2>&1; then fail "$card was bound"; fi
said "barlease doctor"
if barlease doctor $card >$kept/said; then fail "the doctor finds nothing"; fi
said "mokutil --import /var/lib/dkms/mok.pub"
must_have none
echo "-- key"
base64 /var/lib/dkms/mok.pub
echo "-- end"
step done
