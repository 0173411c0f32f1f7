//! A kernel that is ready to boot: its image, and its modules by name with what they depend on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::kernels::debug::Watch;
use crate::packages::arch::Arch;
use crate::packages::cache;
use crate::packages::sysroot::Sysroot;

/// The stock modules that a guest loads, without what they depend on.
pub(crate) const STOCK: &[&str] = &["vfio_iommu_type1", "vfio-pci"];

/// A kernel in the cache.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The name that asks for it: the release of a kernel of Debian's, or such as `debug-7.3`.
    pub name: String,
    /// The answer of `uname -r` on it.
    pub release: String,
    folder: PathBuf,
    origin: Origin,
}

/// Its builder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// Debian. The files that modules are built against are in the sysroot.
    Stock,
    /// Debian, for another architecture. The files that modules are built against are beside it.
    Foreign(Arch),
    /// The lab. The files that modules are built against are beside it.
    Debug(Watch),
}

/// Where the build tree of a kernel that has one is bound in the sysroot.
const BUILD: &str = "/input";

impl Kernel {
    pub(crate) fn at(folder: PathBuf, release: &str) -> Self {
        Self {
            name: release.to_owned(),
            release: release.to_owned(),
            folder,
            origin: Origin::Stock,
        }
    }

    pub(crate) fn foreign(folder: PathBuf, release: &str, arch: Arch) -> Self {
        Self {
            origin: Origin::Foreign(arch),
            ..Self::at(folder, release)
        }
    }

    pub(crate) fn debug(folder: PathBuf, name: &str, release: &str, watch: Watch) -> Self {
        Self {
            name: name.to_owned(),
            release: release.to_owned(),
            folder,
            origin: Origin::Debug(watch),
        }
    }

    /// Its checkers, if it is one of the lab's own making.
    #[must_use]
    pub fn watches(&self) -> Option<Watch> {
        match self.origin {
            Origin::Stock | Origin::Foreign(_) => None,
            Origin::Debug(watch) => Some(watch),
        }
    }

    /// The architecture that it is for.
    #[must_use]
    pub fn arch(&self) -> Arch {
        match self.origin {
            Origin::Foreign(arch) => arch,
            Origin::Debug(watch) => watch.arch(),
            Origin::Stock => Arch::Amd64,
        }
    }

    /// The busybox that runs on it.
    pub(crate) fn busybox(&self, sysroot: &Sysroot) -> PathBuf {
        const BUSYBOX: &str = "usr/bin/busybox";
        if self.arch().is_native() {
            sysroot.path(BUSYBOX)
        } else {
            self.folder.join(BUSYBOX)
        }
    }

    /// How many times longer than on Debian's kernels for the host's architecture anything may
    /// take.
    pub(crate) fn slowness(&self) -> u32 {
        match self.origin {
            Origin::Stock => 1,
            Origin::Foreign(_) => 3,
            Origin::Debug(Watch::Memory | Watch::Races) => 5,
            Origin::Debug(Watch::Nothing(_)) if self.arch().is_native() => 1,
            Origin::Debug(Watch::Nothing(_)) => 3,
        }
    }

    fn tree(&self) -> PathBuf {
        self.folder.join("usr/lib/modules").join(&self.release)
    }

    /// The image that boots, as fast as it can be had.
    ///
    /// The kernel inside Debian's compressed image, where it says how to enter it directly (PVH):
    /// uncompressing it once here takes a moment, uncompressing it in an emulator takes seconds at
    /// each boot. Else the compressed image.
    ///
    /// # Errors
    ///
    /// When the image cannot be read, or the result not be written.
    pub fn image(&self, sysroot: &Sysroot) -> Result<PathBuf> {
        let plain = self.folder.join("vmlinux");
        if plain.exists() {
            return Ok(plain);
        }
        let packed = self.signed_image();
        if self.arch() == Arch::Arm64 {
            // It is not compressed.
            return Ok(packed);
        }
        let image = fs::read(&packed).with_context(|| format!("read {}", packed.display()))?;
        let Some(payload) = boot_image::payload(&image) else {
            return Ok(packed);
        };
        let part = self.folder.join(format!("payload.{}", cache::unique()));
        fs::write(&part, payload).with_context(|| format!("write {}", part.display()))?;
        let kernel = through(sysroot, "usr/bin/zstd", &part);
        cache::remove(&part)?;
        match kernel {
            Ok(kernel) if boot_image::enters_directly(&kernel) => {
                cache::write(&plain, kernel)?;
                Ok(plain)
            }
            _ => Ok(packed),
        }
    }

    /// The image as the distribution has signed it, for firmware with Secure Boot.
    pub(crate) fn signed_image(&self) -> PathBuf {
        self.tree().join("vmlinuz")
    }

    /// The folder that modules are built against, inside the sysroot.
    #[must_use]
    pub fn build_folder(&self) -> String {
        match self.origin {
            Origin::Stock => format!("/usr/lib/modules/{}/build", self.release),
            Origin::Foreign(_) | Origin::Debug(_) => BUILD.to_owned(),
        }
    }

    /// The folders that must be bound into the sysroot for that, and where.
    pub(crate) fn build_bind(&self) -> Option<(PathBuf, &'static str)> {
        match self.origin {
            Origin::Stock => None,
            Origin::Foreign(_) | Origin::Debug(_) => Some((self.folder.join("build"), BUILD)),
        }
    }

    /// The arguments that `make` needs besides that folder.
    pub(crate) fn make_arguments(&self) -> &'static [&'static str] {
        match self.origin {
            Origin::Stock => &[],
            Origin::Foreign(arch) => arch.make_arguments(),
            Origin::Debug(watch) => watch.make_arguments(),
        }
    }

    /// Files of the named modules and all they depend on, uncompressed, in the order to load them.
    /// A driver that is built into the kernel needs no file.
    ///
    /// # Errors
    ///
    /// When the kernel has no module of that name, or a file cannot be unpacked.
    pub fn modules(&self, names: &[&str], sysroot: &Sysroot) -> Result<Vec<PathBuf>> {
        let mut store = Store {
            kernel: self,
            sysroot,
            index: index(&self.tree().join("kernel"))?,
            built_in: built_in(&self.tree().join("modules.builtin"))?,
        };
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            store.visit(&canonical(name), &mut seen, &mut order)?;
        }
        Ok(order)
    }
}

struct Store<'a> {
    kernel: &'a Kernel,
    sysroot: &'a Sysroot,
    index: BTreeMap<String, PathBuf>,
    built_in: BTreeSet<String>,
}

impl Store<'_> {
    fn visit(
        &mut self,
        name: &str,
        seen: &mut BTreeSet<String>,
        order: &mut Vec<PathBuf>,
    ) -> Result<()> {
        if self.built_in.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let file = self.unpacked(name)?;
        let bytes = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
        for dependency in depends(&bytes) {
            self.visit(&dependency, seen, order)?;
        }
        order.push(file);
        Ok(())
    }

    fn unpacked(&self, name: &str) -> Result<PathBuf> {
        let Some(packed) = self.index.get(name) else {
            bail!(
                "the kernel {} has no module called `{name}`",
                self.kernel.release
            );
        };
        let file = self.kernel.folder.join("ko").join(format!("{name}.ko"));
        if file.exists() {
            return Ok(file);
        }
        fs::create_dir_all(self.kernel.folder.join("ko"))?;
        let bytes = match packed.extension().and_then(|extension| extension.to_str()) {
            Some("xz") => through(self.sysroot, "usr/bin/xz", packed)?,
            Some("zst") => through(self.sysroot, "usr/bin/zstd", packed)?,
            _ => fs::read(packed).with_context(|| format!("read {}", packed.display()))?,
        };
        cache::write(&file, bytes)?;
        Ok(file)
    }
}

/// The output of a program of the sysroot for a compressed file.
fn through(sysroot: &Sysroot, program: &str, packed: &Path) -> Result<Vec<u8>> {
    let what = || format!("uncompress {}", packed.display());
    let done = sysroot
        .program(program)
        .arg("-dc")
        .arg(packed)
        .output()
        .with_context(what)?;
    if !done.status.success() {
        bail!("{}: {}", what(), String::from_utf8_lossy(&done.stderr));
    }
    Ok(done.stdout)
}

/// The contents of a compressed image, by the x86 boot protocol (2.08 and later) and the ELF notes
/// of PVH.
mod boot_image {
    /// The compressed kernel, when it is compressed with zstd.
    pub(super) fn payload(image: &[u8]) -> Option<&[u8]> {
        let long =
            |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
        if image.get(0x202..0x206)? != b"HdrS" {
            return None;
        }
        let sectors = match *image.get(0x1f1)? {
            0 => 4,
            sectors => usize::from(sectors),
        };
        let start = (sectors + 1) * 512 + long(0x248)?;
        // The uncompressed size is at its end.
        let payload = image.get(start..start + long(0x24c)?.checked_sub(4)?)?;
        payload.starts_with(b"\x28\xb5\x2f\xfd").then_some(payload)
    }

    /// Whether the kernel has the note that names its PVH entry: owner `Xen`, type 18.
    pub(super) fn enters_directly(kernel: &[u8]) -> bool {
        const TYPE_AND_OWNER: &[u8] = b"\x12\0\0\0Xen\0";
        kernel.starts_with(b"\x7fELF")
            && kernel
                .windows(TYPE_AND_OWNER.len())
                .any(|window| window == TYPE_AND_OWNER)
    }
}

/// Module files by name. The kernel takes `-` and `_` in names for the same.
fn index(folder: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder)
            .with_context(|| format!("read the modules in {}", folder.display()))?;
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if let Some((name, _)) = entry.file_name().to_string_lossy().split_once(".ko") {
                found.insert(canonical(name), entry.path());
            }
        }
    }
    Ok(found)
}

/// The names in the kernel's list of what is built in; none when it has no such list.
fn built_in(list: &Path) -> Result<BTreeSet<String>> {
    if !list.exists() {
        return Ok(BTreeSet::new());
    }
    let text = fs::read_to_string(list).with_context(|| format!("read {}", list.display()))?;
    let name = |line: &str| Some(canonical(Path::new(line).file_stem()?.to_str()?));
    Ok(text.lines().filter_map(name).collect())
}

fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// The names in the `depends=` entry of a module's `.modinfo`.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = &module[at + KEY.len()..];
    let end = value
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(canonical)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_of_an_image_is_where_its_header_says() {
        let mut image = vec![0; 0x800];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248] = 0x10;
        image[0x24c] = 12;
        image[0x410..0x41c].copy_from_slice(b"\x28\xb5\x2f\xfddataSIZE");
        assert_eq!(
            boot_image::payload(&image).unwrap(),
            b"\x28\xb5\x2f\xfddata"
        );
        image[0x410] = 0;
        assert_eq!(boot_image::payload(&image), None);
        assert_eq!(boot_image::payload(b"short"), None);
    }

    #[test]
    fn a_kernel_without_the_note_is_not_entered_directly() {
        assert!(boot_image::enters_directly(
            b"\x7fELF...\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0entry"
        ));
        assert!(!boot_image::enters_directly(
            b"\x7fELF...\x04\0\0\0\x08\0\0\0\x06\0\0\0Xen\0entry"
        ));
        assert!(!boot_image::enters_directly(b"\x12\0\0\0Xen\0"));
    }

    #[test]
    fn dependencies_are_in_modinfo() {
        let module = b"\x7fELF..\0license=GPL v2\0depends=vfio,vfio-pci-core\0intree=Y\0";
        assert_eq!(depends(module), ["vfio", "vfio_pci_core"]);
        assert!(depends(b"\0depends=\0").is_empty());
        assert!(depends(b"nothing").is_empty());
    }

    #[test]
    fn modules_load_after_what_they_depend_on() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("usr/lib/modules/1-test/kernel/drivers");
        fs::create_dir_all(&tree).unwrap();
        let module = |name: &str, needs: &str| {
            fs::write(
                tree.join(format!("{name}.ko")),
                format!("\0depends={needs}\0"),
            )
            .unwrap();
        };
        module("vfio-pci", "vfio-pci-core");
        module("vfio-pci-core", "vfio,irqbypass");
        module("vfio", "");
        module("irqbypass", "");
        module("with-built-in", "vfio,part-of-kernel");
        fs::write(
            folder.path().join("usr/lib/modules/1-test/modules.builtin"),
            "kernel/drivers/part-of-kernel.ko\n",
        )
        .unwrap();
        let kernel = Kernel::at(folder.path().to_owned(), "1-test");
        let files = kernel
            .modules(&["vfio-pci", "vfio"], &Sysroot::at(PathBuf::from("/none")))
            .unwrap();
        let names: Vec<_> = files
            .iter()
            .filter_map(|file| file.file_stem()?.to_str())
            .collect();
        assert_eq!(names, ["vfio", "irqbypass", "vfio_pci_core", "vfio_pci"]);
        let files = kernel
            .modules(
                &["part-of-kernel", "with-built-in"],
                &Sysroot::at(PathBuf::from("/none")),
            )
            .unwrap();
        assert_eq!(files.len(), 2, "{files:?}");
        let error = kernel
            .modules(&["absent"], &Sysroot::at(PathBuf::from("/none")))
            .unwrap_err();
        assert!(error.to_string().contains("no module called `absent`"));
    }
}
