#!/bin/sh
# A guest with a system of its own runs this once that is up: the command or a shell. As init.sh does for the small guest.
#
# Serial ports: lab-payload the command's terminal, lab-control the control channel (JSON lines).

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/lab/bin HOME=/root
exec 8<>/dev/lab-payload 9<>/dev/lab-control
if [ -e /lab/command ]; then
    stty -F /dev/lab-payload raw -echo
else
    stty -F /dev/lab-payload sane
    # shellcheck disable=SC2046 # words
    [ -s /lab/terminal ] && stty -F /dev/lab-payload $(cat /lab/terminal)
fi
stty -F /dev/lab-control raw -echo
chmod 666 /dev/lab-payload /dev/lab-control

# Until all jobs are done; how it went is for the command to ask.
systemctl is-system-running --wait >/dev/null

echo '{"ready":true}' >&9
cd /root || true
if [ -e /lab/command ]; then
    sh /lab/command </dev/null >/dev/lab-payload 2>&1 8>&- 9>&-
    code=$?
else
    [ -e /lab/banner ] && cat /lab/banner >/dev/lab-payload
    PS1='system# ' TERM=${TERM:-linux} setsid -c bash --norc </dev/lab-payload >/dev/lab-payload 2>&1 8>&- 9>&-
    code=$?
fi
# Setting a port waits until all that was written to it is out.
stty -F /dev/lab-payload raw
echo "{\"exit\":$code}" >&9
stty -F /dev/lab-control raw
systemctl --no-block poweroff
