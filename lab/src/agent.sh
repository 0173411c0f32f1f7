#!/bin/sh
# A guest with a system of its own runs this once that is up: the command or a shell. As init.sh does for the small guest.
#
# Serial ports: ttyS1 the command's terminal, ttyS2 the control channel (JSON lines).

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/lab/bin HOME=/root
exec 8<>/dev/ttyS1 9<>/dev/ttyS2
if [ -e /lab/command ]; then
    stty -F /dev/ttyS1 raw -echo
else
    stty -F /dev/ttyS1 sane
    # shellcheck disable=SC2046 # words
    [ -s /lab/terminal ] && stty -F /dev/ttyS1 $(cat /lab/terminal)
fi
stty -F /dev/ttyS2 raw -echo
chmod 666 /dev/ttyS1 /dev/ttyS2

# Until all jobs are done; how it went is for the command to ask.
systemctl is-system-running --wait >/dev/null

echo '{"ready":true}' >&9
cd /root || true
if [ -e /lab/command ]; then
    sh /lab/command </dev/null >/dev/ttyS1 2>&1 8>&- 9>&-
    code=$?
else
    [ -e /lab/banner ] && cat /lab/banner >/dev/ttyS1
    PS1='system# ' TERM=${TERM:-linux} setsid -c bash --norc </dev/ttyS1 >/dev/ttyS1 2>&1 8>&- 9>&-
    code=$?
fi
# Setting a port waits until all that was written to it is out.
stty -F /dev/ttyS1 raw
echo "{\"exit\":$code}" >&9
stty -F /dev/ttyS2 raw
systemctl --no-block poweroff
