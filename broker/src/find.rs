//! The device that a policy means, among those of the machine.

use std::fmt::Display;

use barlease::Bdf;
use barlease::OpenOptions;
use barlease::pci::Pci;
use barlease::pci::PciDevice;
use barlease_ledger::policy;
use barlease_ledger::policy::Match;
use barlease_ledger::policy::Serial;

use crate::device::Device;

/// Finds the one device that a policy means.
pub(crate) fn find(pci: &Pci, wanted: &policy::Device) -> Result<Bdf, String> {
    let fit = candidates(pci, &wanted.matches)?;
    let is_bound = |one: &&PciDevice| {
        let driver = wanted.driver.as_ref();
        driver.is_none_or(|driver| one.driver.as_ref() == Some(driver))
    };
    let mut bound = fit.iter().filter(is_bound);
    match (bound.next(), bound.next(), fit.first(), &wanted.driver) {
        (Some(one), None, ..) => Ok(one.bdf),
        (Some(one), Some(other), ..) => Err(format!(
            "{} and {} fit: name the address, or a driver that one of them is bound to",
            one.bdf, other.bdf
        )),
        (None, _, Some(first), Some(driver)) => {
            let bound = first.driver.as_deref().unwrap_or("no driver");
            Err(format!(
                "{} is bound to {bound}, not to {driver}",
                first.bdf
            ))
        }
        _ => Err("there is no such device".to_owned()),
    }
}

fn candidates(pci: &Pci, matches: &Match) -> Result<Vec<PciDevice>, String> {
    let report = |error: barlease::Error| error.report().to_string();
    match matches {
        Match::Address(address) => {
            let bdf = address
                .parse()
                .map_err(|error| format!("{address}: {error}"))?;
            Ok(vec![pci.device(bdf).map_err(report)?])
        }
        Match::Ids(vendor, device) => {
            let mut all = pci.devices().map_err(report)?;
            all.retain(|one| (one.vendor, one.device) == (*vendor, *device));
            if all.is_empty() {
                return Err(format!("there is no {vendor:04x}:{device:04x}"));
            }
            Ok(all)
        }
        Match::Slot(slot) => match pci.slot(slot) {
            all if all.is_empty() => Err(format!(
                "there is no slot {slot}, or nothing is in it: see {}/bus/pci/slots",
                pci.root().display()
            )),
            all => Ok(all),
        },
        Match::Serial(serial) => with_serial(pci, *serial),
    }
}

/// Whether an open device is the one that a policy means; `Err` says why it is not, or is not known
/// to be. The device itself is asked, wherever it can say.
pub(crate) fn is(pci: &Pci, wanted: &policy::Device, device: &Device) -> Result<(), String> {
    let bdf = device.address();
    let report = |error: barlease::Error| error.report().to_string();
    let differs = |is: &dyn Display, wanted: &dyn Display| {
        Err(format!("it is {is}, and the policy says {wanted}"))
    };
    match &wanted.matches {
        Match::Address(address) if *address != bdf.to_string() => {
            return differs(&bdf, address);
        }
        Match::Ids(vendor, id) => {
            let (is_vendor, is_id) = device.ids().map_err(report)?;
            if (is_vendor, is_id) != (*vendor, *id) {
                let is = format!("{is_vendor:04x}:{is_id:04x}");
                return differs(&is, &format!("{vendor:04x}:{id:04x}"));
            }
        }
        Match::Serial(serial) => {
            let is = device.serial_number().map_err(report)?.map(Serial);
            if is != Some(*serial) {
                let is = is.map_or("without a serial number".to_owned(), |is| is.to_string());
                return differs(&is, serial);
            }
        }
        Match::Slot(slot) if !pci.slot(slot).iter().any(|one| one.bdf == bdf) => {
            return Err(format!("it is not in slot {slot}"));
        }
        Match::Address(_) | Match::Slot(_) => {}
    }
    let Some(driver) = &wanted.driver else {
        return Ok(());
    };
    let bound = pci.device(bdf).map_err(report)?.driver;
    match bound.as_ref() == Some(driver) {
        true => Ok(()),
        false => differs(&bound.as_deref().unwrap_or("bound to nothing"), driver),
    }
}

/// Devices with a serial number.
fn with_serial(pci: &Pci, wanted: Serial) -> Result<Vec<PciDevice>, String> {
    let mut unread = Vec::new();
    let mut found = pci.devices().map_err(|error| error.report().to_string())?;
    found.retain(|one| match serial_number(pci, one) {
        Ok(serial) => serial == Some(wanted.0),
        Err(error) => {
            unread.push(format!("{}: {}", one.bdf, error.report()));
            false
        }
    });
    match (found.is_empty(), unread.is_empty()) {
        (false, _) => Ok(found),
        (true, true) => Err(format!(
            "there is no device with the serial number {wanted}"
        )),
        (true, false) => Err(format!(
            "no device is known to have the serial number {wanted}; {} could not be asked: {}",
            unread.len(),
            unread.join("; ")
        )),
    }
}

/// The kernel shows the part of config space that has it to administrators only. A process that may
/// open the device reads it through VFIO, which costs nobody anything: a device that is in use
/// cannot be opened.
fn serial_number(pci: &Pci, one: &PciDevice) -> barlease::Result<Option<u64>> {
    match pci.serial_number(one.bdf) {
        Err(barlease::Error::Denied { .. }) if one.is_barlease() => OpenOptions::new()
            .open(one.bdf)
            .and_then(|device| device.config()?.serial_number()),
        // Nothing that is not ours is leased from.
        Err(barlease::Error::Denied { .. }) => Ok(None),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use barlease_ledger::policy::Policy;

    use super::*;

    struct Nobody;

    impl policy::Names for Nobody {
        fn user(&self, _: &str) -> Option<u32> {
            None
        }

        fn group(&self, _: &str) -> Option<u32> {
            None
        }
    }

    /// Adds a device with a serial number, bound to a driver.
    fn device(root: &Path, bdf: &str, serial: u64, driver: &str) {
        let path = root.join("bus/pci/devices").join(bdf);
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("vendor"), "0x1af4\n").unwrap();
        fs::write(path.join("device"), "0x1110\n").unwrap();
        let driver = root.join("bus/pci/drivers").join(driver);
        fs::create_dir_all(&driver).unwrap();
        symlink(driver, path.join("driver")).unwrap();
        let mut config = vec![0; 4096];
        config[0x100] = 3;
        config[0x102] = 1;
        config[0x104..0x10c].copy_from_slice(&serial.to_le_bytes());
        fs::write(path.join("config"), config).unwrap();
    }

    fn wanted(matches: &str, driver: &str) -> policy::Device {
        let text = format!("[device.card]\nmatch = \"{matches}\"\n{driver}\n");
        let policy = Policy::parse(&[("a.toml", &text)], &Nobody).unwrap();
        policy.devices()[0].clone()
    }

    #[test]
    fn devices_are_found_by_slot_and_by_serial_number() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        device(
            root,
            "0000:01:00.0",
            0x5254_00ff_ff00_0001,
            "barlease-vfio-pci",
        );
        device(
            root,
            "0000:02:00.0",
            0x5254_00ff_ff00_0002,
            "barlease-vfio-pci",
        );
        device(root, "0000:02:00.1", 0x5254_00ff_ff00_0002, "nvme");
        for (slot, address) in [
            ("3", "0000:01:00"),
            ("4-1", "0000:02:00"),
            ("5", "0000:03:00"),
        ] {
            let path = root.join("bus/pci/slots").join(slot);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("address"), format!("{address}\n")).unwrap();
        }
        let pci = Pci::at(root);
        let find =
            |matches, driver| find(&pci, &wanted(matches, driver)).map(|bdf| bdf.to_string());
        let first = Ok("0000:01:00.0".to_owned());
        assert_eq!(find("slot:3", ""), first);
        assert_eq!(find("serial:52-54-00-ff-ff-00-00-01", ""), first);
        assert_eq!(find("serial:525400FFFF000001", ""), first);
        // Two functions of a card.
        let driver = "driver = \"barlease-vfio-pci\"";
        for matches in ["slot:4-1", "serial:52-54-00-ff-ff-00-00-02"] {
            let several = find(matches, "").unwrap_err();
            assert!(several.contains("0000:02:00.1 fit"), "{several}");
            assert_eq!(find(matches, driver), Ok("0000:02:00.0".to_owned()));
        }
        let other = find("slot:3", "driver = \"vfio-pci\"").unwrap_err();
        assert!(other.contains("is bound to barlease-vfio-pci"), "{other}");
        for (missing, said) in [
            ("slot:5", "nothing is in it"),
            ("slot:9", "no slot 9"),
            ("serial:52-54-00-ff-ff-00-00-09", "52-54-00-ff-ff-00-00-09"),
            ("8086:1572", "there is no 8086:1572"),
            ("0000:07:00.0", "0000:07:00.0"),
        ] {
            let error = find(missing, "").unwrap_err();
            assert!(error.contains(said), "{missing}: {error}");
        }
    }
}
