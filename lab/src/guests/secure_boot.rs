//! Guests with Secure Boot: UEFI firmware with the keys of a PC, then Debian's own shim and GRUB, and
//! the kernel with its own signature, as on a host. The kernel is locked down, and loads modules
//! that are signed with a key which it knows, or which the owner of the machine has enrolled.
//!
//! A person enrols a key at the console (`mokutil --import`, then a reboot); here it is written into
//! the firmware's variables beforehand.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::guests::emulator::comma_safe;
use crate::kernels::prepare::{self, Prepared};
use crate::packages::apt::Apt;
use crate::packages::arch::Arch;
use crate::packages::command;
use crate::packages::extra::Extra;
use crate::packages::sysroot::Sysroot;

const CODE: &str = "usr/share/OVMF/OVMF_CODE_4M.secboot.fd";
/// Variables with the keys that PCs have.
const VARIABLES: &str = "usr/share/OVMF/OVMF_VARS_4M.ms.fd";
const SHIM: &str = "usr/lib/shim/shimx64.efi.signed";
const GRUB: &str = "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed";

/// An owner of keys, as a GUID; shim does not look at it.
const OWNER: &str = "605dab50-e046-4300-abb6-3dd810dd8b23";

/// Firmware and boot loaders, in the tool chain.
#[derive(Clone, Debug)]
pub struct Firmware {
    sysroot: Sysroot,
    /// Certificates that the owner of the machine has enrolled.
    enrolled: Vec<PathBuf>,
}

impl Firmware {
    /// Takes it from the cache, or brings it there.
    ///
    /// # Errors
    ///
    /// When the packages cannot be had.
    pub fn prepare(prepared: &Prepared) -> Result<Self> {
        let cache = &prepared.cache;
        let plan = prepare::plan(cache).context("read the plan from the cache")?;
        let packages = Extra {
            plan: &plan,
            sysroot: &prepared.sysroot,
            names: &[
                "ovmf-generic",
                "shim-signed",
                "grub-efi-amd64-signed",
                "python3-virt-firmware",
            ],
            note: "secure-boot.json",
            what: "UEFI firmware and boot loaders",
            purpose: "to boot with Secure Boot",
        };
        if packages.added().is_none() {
            let _turn = cache.lock("prepare", "preparing Secure Boot")?;
            packages.add(&Apt::set_up(cache, Arch::Amd64)?.0)?;
        }
        Ok(Self {
            sysroot: prepared.sysroot.clone(),
            enrolled: Vec::new(),
        })
    }

    /// With a certificate (DER) that the owner of the machine has enrolled.
    #[must_use]
    pub fn enrol(mut self, certificate: impl Into<PathBuf>) -> Self {
        self.enrolled.push(certificate.into());
        self
    }

    /// QEMU's arguments for it. The boot partition and the firmware's variables are in that folder.
    pub(crate) fn lay_out(
        &self,
        folder: &Path,
        kernel: &Path,
        initramfs: &Path,
        command_line: &str,
    ) -> Result<Vec<OsString>> {
        let partition = folder.join("esp");
        let (boot, debian) = (partition.join("EFI/BOOT"), partition.join("EFI/debian"));
        for place in [&boot, &debian] {
            fs::create_dir_all(place).with_context(|| format!("make {}", place.display()))?;
        }
        let loaders = [self.sysroot.path(SHIM), self.sysroot.path(GRUB)];
        let [shim, grub] = loaders.each_ref().map(PathBuf::as_path);
        for (from, to) in [
            (shim, boot.join("BOOTX64.EFI")),
            (grub, boot.join("grubx64.efi")),
            (kernel, partition.join("vmlinuz")),
            (initramfs, partition.join("initrd")),
        ] {
            fs::copy(from, &to).with_context(|| format!("write {}", to.display()))?;
        }
        let menu = format!("linux /vmlinuz {command_line}\ninitrd /initrd\nboot\n");
        fs::write(debian.join("grub.cfg"), menu).context("write GRUB's menu")?;
        let variables = self.variables(folder)?;
        let flash = |unit: u32, access: &str, file: &Path| {
            let file = comma_safe(file);
            format!("if=pflash,format=raw,unit={unit},readonly={access},file={file}")
        };
        let partition = comma_safe(&partition);
        let arguments = [
            "-global",
            "driver=cfi.pflash01,property=secure,value=on",
            "-drive",
            &flash(0, "on", &self.sysroot.path(CODE)),
            "-drive",
            &flash(1, "off", &variables),
            "-drive",
            &format!("if=none,id=esp,format=raw,readonly=on,file=fat:{partition}"),
            "-device",
            "virtio-blk-pci,drive=esp,bus=pcie.0,addr=1d,bootindex=0,romfile=",
        ];
        Ok(arguments.map(OsString::from).into())
    }

    /// The firmware's variables, with the keys that were enrolled.
    fn variables(&self, folder: &Path) -> Result<PathBuf> {
        let made = folder.join("variables.fd");
        let mut write = self.sysroot.enter(&[(folder, "/work")])?;
        let from = format!("/{VARIABLES}");
        write.args([
            "virt-fw-vars",
            "--input",
            &from,
            "--output",
            "/work/variables.fd",
        ]);
        for (number, certificate) in self.enrolled.iter().enumerate() {
            let name = format!("enrolled-{number}.der");
            fs::copy(certificate, folder.join(&name))
                .with_context(|| format!("copy {}", certificate.display()))?;
            write.args(["--add-mok", OWNER, &format!("/work/{name}")]);
        }
        command::run(&mut write, "write the firmware's variables")?;
        Ok(made)
    }
}
