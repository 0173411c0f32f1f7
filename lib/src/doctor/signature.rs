//! Whether the kernel takes the module as it is signed, or not signed.

use std::fs;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::path::Path;
use std::path::PathBuf;

use barlease_abi as abi;

use super::Check;
use super::Doctor;
use super::fail;
use super::kernels::Origin;
use super::ok;
use super::skip;
use super::warn;
use crate::pci::Pci;

const NAME: &str = "signature";
/// The text that the kernel's build puts at the end of a module that is signed.
const MARK: &[u8] = b"~Module signature appended~\n";
/// The variable of the firmware; four bytes of attributes come first.
const SECURE_BOOT: &str = "firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";

impl Doctor {
    pub(super) fn signature(&self, pci: &Pci) -> Check {
        let secure = fs::read(self.sysfs.join(SECURE_BOOT));
        let secure = secure.is_ok_and(|bytes| bytes.get(4) == Some(&1));
        let boot = if secure {
            "Secure Boot is on"
        } else {
            "Secure Boot is off"
        };
        if pci.module().is_some() {
            return ok(NAME, format!("{boot}; the module was accepted"));
        }
        if !self.demands_signatures() {
            return ok(NAME, format!("{boot}; the kernel demands none"));
        }
        let origin = self.origin();
        let by_dkms = !matches!(origin, Origin::Make | Origin::Nothing);
        let remedy = match origin {
            Origin::Make | Origin::Nothing => {
                "/lib/modules/$(uname -r)/build/scripts/sign-file sha256 mok.key mok.der FILE, with a \
                 key that is enrolled: mokutil --import mok.der, and reboot"
                    .to_owned()
            }
            // It signs what it builds, where openssl is.
            Origin::Package(sources) | Origin::Dkms(sources) => format!(
                "with openssl installed: dkms install --force {sources}; then mokutil --import \
                 /var/lib/dkms/mok.pub, and reboot"
            ),
        };
        match self.module_file().map(|path| (is_signed(&path), path)) {
            None => skip(NAME, format!("{boot}; signatures are demanded")),
            Some((Some(true) | None, _)) if by_dkms && self.knows_dkms_key() == Some(false) => {
                fail(
                    NAME,
                    format!("{boot}; the kernel does not know the key that DKMS signs with"),
                    "mokutil --import /var/lib/dkms/mok.pub, and reboot",
                )
            }
            Some((Some(true) | None, _)) if by_dkms && self.knows_dkms_key() == Some(true) => ok(
                NAME,
                format!("{boot}; the kernel knows the key that DKMS signs with"),
            ),
            Some((Some(true), _)) => ok(
                NAME,
                format!("{boot}; signed: the key must be enrolled (mokutil --list-enrolled)"),
            ),
            Some((Some(false), path)) => fail(
                NAME,
                format!("{boot}; the kernel refuses {}: not signed", path.display()),
                &remedy,
            ),
            Some((None, path)) => warn(
                NAME,
                format!(
                    "{boot}; signatures are demanded, and it cannot be told whether {} has one",
                    path.display()
                ),
                "modinfo -F signer barlease_vfio_pci",
            ),
        }
    }

    /// As the kernel does for its parameter, its configuration, and while it is locked down.
    fn demands_signatures(&self) -> bool {
        let text = |path: &str| fs::read_to_string(self.sysfs.join(path)).unwrap_or_default();
        let lockdown = text("kernel/security/lockdown");
        text("module/module/parameters/sig_enforce").starts_with('Y')
            || lockdown.contains("[integrity]")
            || lockdown.contains("[confidentiality]")
    }

    /// Whether the kernel has the certificate of DKMS's key. `None`: DKMS has none yet, or the
    /// kernel's keys cannot be seen, as by others than root.
    fn knows_dkms_key(&self) -> Option<bool> {
        let certificate = fs::read(self.root.join("var/lib/dkms/mok.pub")).ok()?;
        let keys = fs::read_to_string(self.root.join("proc/keys")).ok()?;
        let mut known = keys.lines().filter_map(identifier).peekable();
        known.peek()?;
        Some(known.any(|id| certificate.windows(id.len()).any(|part| part == id)))
    }

    /// The file of the module, from the list that depmod has made.
    fn module_file(&self) -> Option<PathBuf> {
        let list = fs::read_to_string(self.modules.join("modules.dep")).ok()?;
        let name = format!("/{}.ko", abi::MODULE_NAME);
        let line = list.lines().find(|line| {
            line.split(':')
                .next()
                .is_some_and(|path| path.contains(&name))
        })?;
        Some(self.modules.join(line.split(':').next()?))
    }
}

/// The identifier of the key in a line of `/proc/keys`, which its certificate contains, too.
fn identifier(line: &str) -> Option<Vec<u8>> {
    let (before, _) = line.split_once(": X509.")?;
    let (_, digits) = before.rsplit_once(' ')?;
    let byte = |at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok();
    let bytes: Option<Vec<u8>> = (0..digits.len()).step_by(2).map(byte).collect();
    bytes.filter(|bytes| bytes.len() >= 8)
}

/// `None`: it is compressed, or cannot be read.
fn is_signed(path: &Path) -> Option<bool> {
    if path.extension()? != "ko" {
        return None;
    }
    let mut file = fs::File::open(path).ok()?;
    let mut end = [0; MARK.len()];
    let back = i64::try_from(MARK.len()).ok()?;
    if file.seek(SeekFrom::End(-back)).is_err() {
        return Some(false);
    }
    file.read_exact(&mut end).ok()?;
    Some(end == MARK)
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn a_module_without_a_signature_fails_where_one_is_demanded() {
        let root = tempfile::tempdir().unwrap();
        let doctor = Doctor::at(root.path());
        let sys = root.path().join("sys");
        let put = |path: PathBuf, bytes: &[u8]| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        };
        let check = || doctor.signature(&Pci::at(&sys));
        assert_eq!(check().found, "Secure Boot is off; the kernel demands none");
        put(sys.join(SECURE_BOOT), &[6, 0, 0, 0, 1]);
        put(
            sys.join("kernel/security/lockdown"),
            b"none [integrity] confidentiality\n",
        );
        assert_eq!(check().verdict, Verdict::Skip);
        let list = doctor.modules.join("modules.dep");
        put(
            list.clone(),
            b"extra/barlease_vfio_pci.ko: kernel/vfio.ko\n",
        );
        let module = doctor.modules.join("extra/barlease_vfio_pci.ko");
        put(module.clone(), b"\x7fELF");
        assert_eq!(check().verdict, Verdict::Fail);
        put(module.clone(), &[0; 100]);
        let check_fails = check();
        assert_eq!(check_fails.verdict, Verdict::Fail);
        assert!(check_fails.found.starts_with("Secure Boot is on; "));
        put(module, &[&[0; 100], MARK].concat());
        assert_eq!(check().verdict, Verdict::Ok);
        put(list, b"updates/barlease_vfio_pci.ko.xz:\n");
        assert_eq!(check().verdict, Verdict::Warn);

        // DKMS's key, which the kernel does not know, and knows.
        put(root.path().join("usr/src/barlease-0.1/dkms.conf"), b"");
        let id = [0x49, 0x1e, 0x65, 0x10, 0x27, 0x74, 0x22, 0x18];
        let certificate = [b"before".as_slice(), &id, b"after"].concat();
        put(root.path().join("var/lib/dkms/mok.pub"), &certificate);
        assert_eq!(check().verdict, Verdict::Warn, "no keys can be seen");
        let keys = root.path().join("proc/keys");
        let key = "0ce4 I------ 1 perm 1f01 0 0 asymmetri A name: ";
        let other = format!("{key}6ccece7e4c6c0d1f: X509.rsa 4c6c0d1f []\n");
        put(keys.clone(), other.as_bytes());
        assert_eq!(check().verdict, Verdict::Fail);
        let both = format!("{other}{key}491e651027742218: X509.rsa 27742218 []\n");
        put(keys, both.as_bytes());
        assert_eq!(check().verdict, Verdict::Ok);
        put(sys.join("module/barlease_vfio_pci/version"), b"1\n");
        assert!(check().found.ends_with("the module was accepted"));
    }
}
