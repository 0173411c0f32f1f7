#!/bin/sh
# A guest with a system of its own runs this once that is up: the command or a shell. As init.sh
# does for the small guest.

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/lab/bin HOME=/root
# shellcheck source=ports.sh
. /lab/ports.sh

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
say_end "$code"
systemctl --no-block poweroff
