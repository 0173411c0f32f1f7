step "install the command; bind, lease, unbind"
no_unit_has_failed
install barlease
barlease device bind $card
must_have barlease-vfio-pci
leases
barlease device unbind $card
must_have none

step "bound at each boot"
systemctl enable --now "barlease-bind@$card.service"
must_have barlease-vfio-pci

step "bound at each boot, by the command"
must_have igb $nic
barlease device bind --persist $nic
must_have barlease-vfio-pci $nic

step "the service"
install barleased
no_unit_has_failed
must_be_up barleased.socket
must_be_up barleased.service
getent passwd barlease >/dev/null || fail "the service has no user"
cat >/etc/barlease/policy.d/60-card.toml <<END
[device.card]
match = "$card"
[pool.rows]
device = "card"
bar = 2
unit = "4K"
contents = "memory"
[[allow]]
pools = ["rows"]
who = { user = "holder1" }
access = "read-write"
max-ttl = "1h"
lifetime = ["connection"]
END
echo '# ours' >>/etc/barlease/policy.d/50-local.toml
step done
