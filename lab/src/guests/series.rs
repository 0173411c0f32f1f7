//! Several commands in one guest, one after the other: a boot takes longer than many a command.
//!
//! Each has its own part of the output, its own exit code, the run's whole time limit, and a mark
//! in the kernel's log. The first that fails is the last: the next would find what it has left.
//! Between two, the guest is made as it was after its boot ([`TIDY`]); where that is not possible,
//! the series is over, too.

use crate::guests::initramfs::quoted;

/// A command of a series.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its name in the log and in what is heard of it: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// The program to run.
    pub words: Vec<String>,
}

/// The output of a part that has begun.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Its name.
    pub name: String,
    /// Its output.
    pub output: String,
    /// Its exit code, 128 + n when a signal ended it, [`UNTIDY`]; `None` when it has not ended.
    pub code: Option<i32>,
}

/// The exit code of a part that did not fail, but after which the guest cannot be made as it was.
pub const UNTIDY: i32 = 125;

/// The beginning of a line that is the lab's and not the part's.
const SIGN: char = '\u{1}';

/// Where the kernel's log has a part begin; its name follows.
pub(crate) const BEGINS: &str = "barlease-lab: begins ";

/// Puts back what commands change: drivers of devices, and modules with their parameters. Nobody
/// puts back BARs: a device that was taken from the bus may have got others, and one that was reset
/// while it was being opened may have lost them (`vfio_pci_core_enable` saves the config space
/// without the lock that a reset through sysfs takes).
const TIDY: &str = r#"
# Few processes: on a debug kernel each of them takes a while.
loaded=" $(echo $(cut -d ' ' -f 1 /proc/modules)) "
bars() {
    # Vendor and device with the BARs, of functions that are no bridges.
    head -q -c 40 /sys/bus/pci/devices/*/config | od -An -v -tx1 -w40 | awk '
        $15 == "00" || $15 == "80" {
            for (byte = 5; byte <= 16; byte++) $byte = ""
            print
        }'
}
bars=$(bars)
unload() {
    # The last reference to a file may be dropped a little after its process has ended.
    tries=100
    until rmmod "$1" 2>/lab/refusal; do
        tries=$((tries - 1))
        if [ $tries = 0 ]; then
            echo "a module cannot be unloaded: $(cat /lab/refusal)"
            return 1
        fi
        sleep 0.1
    done
}
tidy() {
    cd /root
    for device in /sys/bus/pci/devices/*; do
        read -r wanted <"$device/driver_override"
        case $wanted in '' | '(null)') continue ;; esac
        echo >"$device/driver_override"
        [ -e "$device/driver" ] && echo "${device##*/}" >"$device/driver/unbind"
        echo "${device##*/}" >/sys/bus/pci/drivers_probe
    done
    for module in $(cut -d ' ' -f 1 /proc/modules); do
        case $loaded in *" $module "*) continue ;; esac
        unload "$module" || return
    done
    if [ -n "$ours" ]; then
        if [ -e "/sys/module/$ours" ]; then
            unload "$ours" || return
        fi
        insmod "$file" $parameters || return
    fi
    if [ "$(bars)" != "$bars" ]; then
        echo "the BARs of a device are not what they were: what comes next needs another guest"
        over=1
    fi
}
over=
"#;

/// The script that runs them. `module` is loaded anew between two: file and parameters.
pub(crate) fn script(
    parts: &[Part],
    module: Option<(&str, &str)>,
    patience: Option<u64>,
) -> String {
    let (file, parameters) = module.unwrap_or_default();
    let ours = file.rsplit('/').next().unwrap_or_default();
    let ours = ours.strip_suffix(".ko").unwrap_or(ours).replace('-', "_");
    let mut script = format!(
        "ours={}\nfile={}\nparameters={}\n{TIDY}",
        quoted(&ours),
        quoted(file),
        quoted(parameters)
    );
    for (place, part) in parts.iter().enumerate() {
        let name = &part.name;
        let words: Vec<_> = part.words.iter().map(|word| quoted(word)).collect();
        let words = words.join(" ");
        // A `sleep` that the signal meets before it runs goes on: a reader of the output must not
        // wait for it.
        let watch = patience.map_or_else(String::new, |seconds| {
            format!(
                "(\n\
                 trap 'kill $!; exit' TERM\n\
                 sleep {seconds} >/dev/null 2>&1 & wait $!\n\
                 echo 'barlease-lab: time is nearly up; blocked tasks:' >/dev/kmsg\n\
                 echo w >/proc/sysrq-trigger\n\
                 ) & watch=$!\n"
            )
        });
        let unwatch = patience.map_or("", |_| "kill $watch\n");
        let tidy = if place + 1 < parts.len() {
            format!("[ $code != 0 ] || tidy || code={UNTIDY}\n")
        } else {
            String::new()
        };
        script.push_str(&format!(
            "echo '{{\"part\":\"{name}\"}}' >/dev/lab-control\n\
             printf '\\n\\001begins {name}\\n'\n\
             echo '{BEGINS}{name}' >/dev/kmsg\n\
             {watch}\
             cd /root\n\
             {words}\n\
             code=$?\n\
             {tidy}\
             {unwatch}\
             printf '\\n\\001ends %s\\n' $code\n\
             [ $code = 0 ] && [ -z \"$over\" ] || exit $code\n"
        ));
    }
    script
}

/// Takes apart what a guest says that runs a series.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listener {
    /// The output before the first part began: nothing, unless the guest was not ready for it.
    pub before: String,
    /// The parts that have begun, in order.
    pub parts: Vec<Heard>,
    /// An empty line, which is the lab's when one with a sign follows.
    empty: bool,
}

impl Listener {
    /// Takes a line without its end. Gives the part that ends with it.
    pub fn line(&mut self, line: &str) -> Option<&Heard> {
        let said = line.strip_prefix(SIGN);
        if let Some(name) = said.and_then(|said| said.strip_prefix("begins ")) {
            self.empty = false;
            self.parts.push(Heard {
                name: name.to_owned(),
                ..Heard::default()
            });
            return None;
        }
        if let Some(code) = said.and_then(|said| said.strip_prefix("ends ")) {
            self.empty = false;
            let part = self.parts.last_mut()?;
            part.code = code.parse().ok();
            return Some(part);
        }
        let output = match self.parts.last_mut() {
            Some(part) => &mut part.output,
            None => &mut self.before,
        };
        if std::mem::replace(&mut self.empty, line.is_empty()) {
            output.push('\n');
        }
        if !line.is_empty() {
            output.push_str(line);
            output.push('\n');
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn part(name: &str, command: &str) -> Part {
        Part {
            name: name.to_owned(),
            words: ["sh", "-c", command].map(str::to_owned).into(),
        }
    }

    /// Runs a script here, with files of a guest in a folder.
    fn heard(parts: &[Part]) -> (Listener, i32) {
        let folder = tempfile::tempdir().unwrap();
        let mut script = script(parts, None, Some(1000));
        for place in [
            "/dev/kmsg",
            "/dev/lab-control",
            "/lab/",
            "/root",
            "/sys/bus/pci",
        ] {
            let here = folder
                .path()
                .join(place.trim_matches('/').replace('/', "-"));
            let here = here.display().to_string();
            script = if place.ends_with('/') {
                script.replace(place, &format!("{here}-"))
            } else {
                script.replace(place, &here)
            };
        }
        std::fs::create_dir(folder.path().join("root")).unwrap();
        let device = folder.path().join("sys-bus-pci/devices/0");
        std::fs::create_dir_all(&device).unwrap();
        std::fs::write(device.join("config"), [0; 64]).unwrap();
        std::fs::write(device.join("driver_override"), "(null)\n").unwrap();
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        let mut listener = Listener::default();
        for line in String::from_utf8(output.stdout).unwrap().lines() {
            listener.line(line);
        }
        (listener, output.status.code().unwrap())
    }

    fn said(name: &str, output: &str, code: Option<i32>) -> Heard {
        Heard {
            name: name.to_owned(),
            output: output.to_owned(),
            code,
        }
    }

    #[test]
    fn each_part_has_its_own_output_and_code() {
        let parts = [
            part("a", "echo one; echo; echo two"),
            part("b", "printf 'no end of line'"),
            part("c", "echo it fails; exit 3"),
            part("d", "echo never"),
        ];
        let (listener, code) = heard(&parts);
        assert_eq!(code, 3);
        assert_eq!(
            listener.parts,
            [
                said("a", "one\n\ntwo\n", Some(0)),
                said("b", "no end of line\n", Some(0)),
                said("c", "it fails\n", Some(3)),
            ]
        );
        assert_eq!(listener.before, "");
    }

    #[test]
    fn a_part_that_changes_what_nobody_puts_back_is_the_last() {
        // Writes a byte of the config space.
        let poke = |name, offset: u32| {
            let to = "/sys/bus/pci/devices/0/config";
            let how = format!("bs=1 seek={offset} count=1 conv=notrunc status=none");
            part(name, &format!("echo x | dd of={to} {how}"))
        };
        // COMMAND, and a BAR.
        let parts = [poke("a", 4), poke("b", 0x10), part("c", "echo never")];
        let (listener, code) = heard(&parts);
        assert_eq!(code, 0);
        let [a, b] = &listener.parts[..] else {
            panic!("{listener:?}")
        };
        assert_eq!((a.code, b.code), (Some(0), Some(0)));
        assert_eq!(a.output, "");
        assert!(b.output.contains("BARs"), "{b:?}");
    }

    #[test]
    fn a_part_that_a_signal_ends_is_the_last() {
        let (listener, code) = heard(&[part("a", "kill -9 $$"), part("b", "echo never")]);
        assert_eq!(code, 137);
        assert_eq!(listener.parts, [said("a", "", Some(137))]);
    }

    #[test]
    fn what_a_guest_said_that_died_is_kept() {
        let mut listener = Listener::default();
        for line in ["could not load", "", "\u{1}begins a", "half", "", ""] {
            assert_eq!(listener.line(line), None);
        }
        assert_eq!(listener.before, "could not load\n");
        assert_eq!(listener.parts, [said("a", "half\n\n", None)]);
    }

    #[test]
    fn a_module_is_known_by_the_name_of_its_file() {
        let module = Some(("/lib/modules/vfio-x.ko", "a=1 b=2"));
        let script = script(&[part("a", "true")], module, None);
        assert!(
            script.contains("ours='vfio_x'\nfile='/lib/modules/vfio-x.ko'\nparameters='a=1 b=2'\n")
        );
    }
}
