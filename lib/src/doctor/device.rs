//! Whether the memory of a device can be reached.

use std::fs;

use super::Check;
use super::Doctor;
use super::ok;
use super::skip;
use super::warn;
use crate::Bdf;
use crate::pci::Pci;

impl Doctor {
    pub(super) fn memory(&self, pci: &Pci, bdf: Bdf) -> Vec<Check> {
        let open = pci.is_enabled(bdf) == Some(true);
        vec![
            self.decoding(bdf, open),
            self.power(bdf, open),
            self.bars(pci, bdf),
        ]
    }

    /// Bit 1 of the command register.
    fn decoding(&self, bdf: Bdf, open: bool) -> Check {
        const NAME: &str = "memory-decoding";
        let config = fs::read(self.device_file(bdf, "config")).unwrap_or_default();
        match config.get(4) {
            None => skip(NAME, "the config space cannot be read"),
            // A device that does not answer reads as this.
            Some(0xff) => warn(
                NAME,
                "the device does not answer",
                "it may have no power, or have failed: see dmesg, and remove and rescan it",
            ),
            Some(command) if command & 2 != 0 => ok(NAME, "on"),
            Some(_) if open => warn(
                NAME,
                "off, and the device is in use: nothing of its memory can be reached",
                "the program that has it open must set bit 1 of the command register",
            ),
            Some(_) => ok(NAME, "off until the device is opened"),
        }
    }

    fn power(&self, bdf: Bdf, open: bool) -> Check {
        const NAME: &str = "power";
        let state = fs::read_to_string(self.device_file(bdf, "power_state"));
        match state.as_deref().map(str::trim) {
            Err(_) | Ok("" | "unknown" | "error") => skip(NAME, "its state is not known"),
            Ok("D0") => ok(NAME, "D0"),
            Ok(state) if open => warn(
                NAME,
                format!("{state}, and the device is in use: nothing of its memory can be reached"),
                "the program that has it open must bring it back to D0",
            ),
            Ok(state) => ok(NAME, format!("{state} until the device is opened")),
        }
    }

    /// The claimer of a part of a BAR that is not the device's driver. For root: others see no
    /// addresses, but names and their order.
    fn claimed(&self, pci: &Pci, bdf: Bdf) -> Option<String> {
        let text = fs::read_to_string(&self.iomem).ok()?;
        let device = pci.device(bdf).ok();
        // A host's driver may claim under any name.
        if device
            .as_ref()
            .is_some_and(|it| it.driver.is_some() && !it.is_vfio())
        {
            return None;
        }
        let entry = |line: &str| {
            let depth = line.len() - line.trim_start().len();
            let (_, name) = line.split_once(" : ")?;
            Some((depth, name.trim().to_owned()))
        };
        let mut its = None;
        for (depth, name) in text.lines().filter_map(entry) {
            if its.is_some_and(|top| depth <= top) {
                its = None;
            }
            match its {
                None if name == bdf.to_string() => its = Some(depth),
                // That of VFIO, whatever the variant.
                Some(_) if !name.starts_with("vfio") => {
                    return Some(name);
                }
                _ => {}
            }
        }
        None
    }

    /// BARs that neither the firmware nor the kernel found a place for.
    fn bars(&self, pci: &Pci, bdf: Bdf) -> Check {
        const NAME: &str = "bars";
        let known = self.device_file(bdf, "resource").exists();
        let Some(bars) = pci.bars(bdf).ok().filter(|_| known) else {
            return skip(NAME, "they cannot be read");
        };
        let lost: Vec<String> = bars
            .iter()
            .filter(|bar| bar.address.is_none())
            .map(|bar| format!("BAR {} ({:#x} bytes)", bar.bar, bar.size))
            .collect();
        if let Some(claim) = self.claimed(pci, bdf) {
            return warn(
                NAME,
                format!("a part of them is claimed by {claim}"),
                "stop that: a console of the firmware's (efifb, simplefb) with \
                 initcall_blacklist=sysfb_init on the kernel's command line",
            );
        }
        match (bars.len(), lost.len()) {
            (0, _) => warn(
                NAME,
                "no memory",
                "there is nothing to lease: is it the right device?",
            ),
            (count, 0) => ok(NAME, format!("{count} of memory, all with an address")),
            _ => warn(
                NAME,
                format!("without an address: {}", lost.join(", ")),
                "turn on Above 4G Decoding in the firmware, or boot with pci=realloc",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn memory_that_cannot_be_reached_is_told_with_the_reason() {
        let root = tempfile::tempdir().unwrap();
        let bdf: Bdf = "00:05.0".parse().unwrap();
        let doctor = Doctor::at(root.path());
        let folder = root.path().join("sys/bus/pci/devices/0000:00:05.0");
        fs::create_dir_all(&folder).unwrap();
        let pci = Pci::at(root.path().join("sys"));
        let put = |file: &str, bytes: &[u8]| fs::write(folder.join(file), bytes).unwrap();
        let verdicts = || {
            let checks = doctor.memory(&pci, bdf);
            checks.iter().map(|it| it.verdict).collect::<Vec<_>>()
        };
        assert_eq!(verdicts(), [Verdict::Skip; 3]);

        put("config", &[0, 0, 0, 0, 6, 0]);
        put("power_state", b"D0\n");
        put(
            "resource",
            b"0x00000000fe000000 0x00000000fe000fff 0x0000000000040200\n",
        );
        put("enable", b"1\n");
        assert_eq!(verdicts(), [Verdict::Ok; 3]);

        put("config", &[0, 0, 0, 0, 4, 0]);
        put("power_state", b"D3hot\n");
        put(
            "resource",
            b"0x00000000fe000000 0x00000000fe000fff 0x0000000000040200\n\
              0x0000000000000000 0x0000000003ffffff 0x000000002014220c\n",
        );
        assert_eq!(verdicts(), [Verdict::Warn; 3]);
        let found = doctor.bars(&pci, bdf).found;
        assert_eq!(found, "without an address: BAR 1 (0x4000000 bytes)");

        let iomem = root.path().join("proc/iomem");
        fs::create_dir_all(iomem.parent().unwrap()).unwrap();
        let tree = |child: &str| {
            format!(
                "fe000000-fe0fffff : PCI Bus 0000:00\n  fe000000-fe000fff : {bdf}\n    {child}\n"
            )
        };
        let claimed = || doctor.bars(&pci, bdf).found;
        fs::write(&iomem, tree("fe000000-fe0000ff : efifb")).unwrap();
        assert_eq!(claimed(), "a part of them is claimed by efifb");
        let neighbour =
            "fe000000-fe000fff : vfio-pci\n  fe001000-fe001fff : 0000:00:06.0\n    x : nvme";
        fs::write(&iomem, tree(neighbour)).unwrap();
        assert!(claimed().starts_with("without an address"), "{}", claimed());

        // As it must be while nobody uses it.
        put("enable", b"0\n");
        assert_eq!(verdicts(), [Verdict::Ok, Verdict::Ok, Verdict::Warn]);
        put("config", &[0xff; 64]);
        assert_eq!(verdicts()[0], Verdict::Warn);
    }
}
