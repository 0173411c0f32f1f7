# shellcheck shell=sh
# The guest's serial ports, for the shell that reads this: /dev/lab-payload, descriptor 8, is the
# command's terminal, and /dev/lab-control, descriptor 9, the control channel (JSON lines). Kept
# open, so that the settings stay.
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

# Says that the command has ended with this code.
say_end() {
    # Setting a port waits until all that was written to it is out.
    stty -F /dev/lab-payload raw
    echo "{\"exit\":$1}" >&9
    stty -F /dev/lab-control raw
}
