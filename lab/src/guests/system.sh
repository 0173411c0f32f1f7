#!/bin/sh
# Makes a Debian system of unpacked packages: runs in a chroot of their tree, as root.
#
# system.sh PACKAGE...: files in /input, in the order in which apt would install them.
#
# The differences to a Debian that was just installed are below "Ours": no disk has to be checked, nobody logs in, nothing
# is fetched by a timer. The rest of systemd is as it comes.

set -eu
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true

# Nothing is started here.
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d

mkdir -p /var/lib/dpkg/info /var/lib/dpkg/updates
: >/var/lib/dpkg/status
: >/var/lib/dpkg/available
[ -e /usr/bin/awk ] || ln -s mawk /usr/bin/awk
[ -e /etc/passwd ] || printf 'root:x:0:0:root:/root:/bin/bash\n' >/etc/passwd
[ -e /etc/group ] || printf 'root:x:0:\n' >/etc/group

install() {
    dpkg --force-unsafe-io --force-depends --force-confnew "$@"
}

# Everything is unpacked already, so scripts find what they call; this tells dpkg, and sets owners.
first=
for package; do
    case $package in
    base-passwd_* | base-files_*) first="$first /input/$package" ;;
    esac
done
# shellcheck disable=SC2086 # words
install --unpack $first
rm -f /etc/passwd /etc/group
dpkg --force-depends --configure base-passwd
dpkg --force-depends --configure base-files
cd /input
install --unpack "$@"
dpkg --force-unsafe-io --configure --pending
dpkg --audit
rm -f /usr/sbin/policy-rc.d

# Ours.
echo barlease-system >/etc/hostname
printf '127.0.0.1 localhost barlease-system\n' >/etc/hosts
printf '/dev/vda / ext4 noatime 0 0\n' >/etc/fstab
: >/etc/machine-id
: >/etc/resolv.conf
ln -s run/lab /lab
for user in owner:1000 holder1:1001 holder2:1002 holder3:1003; do
    useradd --create-home --shell /bin/bash --uid "${user#*:}" "${user%:*}"
done
mkdir -p /etc/systemd/system/multi-user.target.wants /etc/systemd/journald.conf.d
for unit in serial-getty@ttyS0.service getty@tty1.service apt-daily.timer apt-daily-upgrade.timer \
    dpkg-db-backup.timer e2scrub_all.timer fstrim.timer man-db.timer systemd-hwdb-update.service \
    systemd-journal-catalog-update.service systemd-update-done.service ldconfig.service \
    systemd-random-seed.service systemd-timesyncd.service e2scrub_reap.service; do
    ln -sf /dev/null "/etc/systemd/system/$unit"
done
printf '[Journal]\nStorage=volatile\n' >/etc/systemd/journald.conf.d/lab.conf
cat >/etc/systemd/system/barlease-lab.service <<'END'
[Unit]
Description=What the lab has this guest run
ConditionPathExists=/run/lab/agent

[Service]
ExecStart=/bin/sh /run/lab/agent
StandardInput=null
LimitMEMLOCK=infinity
# Else a service that it starts and leaves behind would end with it.
KillMode=process
END
ln -s ../barlease-lab.service /etc/systemd/system/multi-user.target.wants/
rm -rf /var/cache/apt/archives/*.deb
