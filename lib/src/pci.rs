//! PCI devices in sysfs, and binding them to drivers.
//!
//! Binding goes through `driver_override`, which concerns one device only and survives nothing but
//! the running system.

mod bars;

use std::fs;
use std::io;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;
use std::time::Instant;

use barlease_abi as abi;
use rustix::io::Errno;
use serde::Serialize;

use crate::Bdf;
use crate::Error;
use crate::GroupMember;
use crate::Result;
use crate::device::serial;
use crate::error::Object;

pub use bars::Bar;

/// How long to wait for a driver that probes asynchronously.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// The PCI devices of a system.
///
/// # Examples
///
/// ```no_run
/// use barlease::pci::Pci;
///
/// for device in Pci::system().devices()? {
///     println!("{} {:04x}:{:04x}", device.bdf, device.vendor, device.device);
/// }
/// # Ok::<(), barlease::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Pci {
    root: PathBuf,
}

/// A PCI function, as sysfs describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PciDevice {
    /// Its address.
    pub bdf: Bdf,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Class, subclass and programming interface: 24 bits.
    pub class: u32,
    /// The driver that it is bound to.
    pub driver: Option<String>,
    /// The only driver that may bind to it, if that is set.
    pub driver_override: Option<String>,
    /// Number of its IOMMU group.
    pub iommu_group: Option<u32>,
    /// NUMA node.
    pub numa_node: Option<u32>,
    /// Name of its VFIO device (`vfio0`), if its driver is a vfio driver.
    pub vfio: Option<String>,
    /// Whether its driver is Barlease's.
    #[serde(skip)]
    barlease: bool,
}

/// The parameter by which our module is known under the name of the stock one
/// (`make -C kmod NAME=vfio-pci`).
const OWN_PARAMETER: &str = "parameters/msix_export";

impl PciDevice {
    /// Whether its driver is a vfio driver.
    #[must_use]
    pub fn is_vfio(&self) -> bool {
        // Kernels before 6.1 have no `vfio-dev`. A variant driver is named after what it is one of.
        let is_its_name = |driver: &str| {
            let driver = driver.replace('_', "-");
            driver == "vfio-pci" || driver.ends_with("-vfio-pci")
        };
        self.vfio.is_some() || self.driver.as_deref().is_some_and(is_its_name)
    }

    /// Whether its driver is Barlease's, also when that has taken the place of stock vfio-pci.
    #[must_use]
    pub fn is_barlease(&self) -> bool {
        self.barlease
    }
}

/// Barlease's kernel module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Module {
    /// Its version, if it says one.
    pub version: Option<String>,
}

impl Pci {
    /// This system's.
    #[must_use]
    pub fn system() -> Self {
        Self::at("/sys")
    }

    /// Those of a sysfs that is mounted elsewhere.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Root of the sysfs.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn device_path(&self, bdf: Bdf) -> PathBuf {
        self.root.join("bus/pci/devices").join(bdf.to_string())
    }

    fn driver_path(&self, driver: &str) -> PathBuf {
        self.root.join("bus/pci/drivers").join(driver)
    }

    /// All devices, by address.
    ///
    /// Errors: [`Error::Io`].
    pub fn devices(&self) -> Result<Vec<PciDevice>> {
        let path = self.root.join("bus/pci/devices");
        let entries = fs::read_dir(&path)
            .map_err(|error| Error::from_io("list", Object::file(&path), error))?;
        let mut bdfs: Vec<Bdf> = entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        bdfs.sort_unstable();
        // A device can go away while the list is made.
        Ok(bdfs
            .into_iter()
            .filter_map(|bdf| self.device(bdf).ok())
            .collect())
    }

    /// One device.
    ///
    /// Errors: [`Error::NoDevice`].
    pub fn device(&self, bdf: Bdf) -> Result<PciDevice> {
        let path = self.device_path(bdf);
        if !path.is_dir() {
            return Err(Error::NoDevice { bdf });
        }
        // One whose ids cannot be read is going away.
        let id = |file: &str| {
            let id = hex(&path.join(file)).and_then(|id| u16::try_from(id).ok());
            id.ok_or(Error::NoDevice { bdf })
        };
        let driver = link_name(&path.join("driver"));
        Ok(PciDevice {
            bdf,
            vendor: id("vendor")?,
            device: id("device")?,
            class: hex(&path.join("class")).unwrap_or_default(),
            barlease: driver.as_deref() == Some(abi::DRIVER_NAME)
                || path.join("driver/module").join(OWN_PARAMETER).exists(),
            driver,
            driver_override: self.driver_override(bdf),
            iommu_group: link_name(&path.join("iommu_group")).and_then(|name| name.parse().ok()),
            numa_node: text(&path.join("numa_node")).and_then(|text| text.parse().ok()),
            vfio: first_entry(&path.join("vfio-dev")),
        })
    }

    /// The devices in a slot of the machine, by its name, such as `3`; those are functions of one
    /// card. Empty: there is no such slot, or nothing is in it.
    #[must_use]
    pub fn slot(&self, name: &str) -> Vec<PciDevice> {
        // A name, not a path: it becomes a part of one.
        if name.is_empty() || name.starts_with('.') || name.contains('/') {
            return Vec::new();
        }
        let path = self.root.join("bus/pci/slots").join(name).join("address");
        // Domain, bus and device: a slot has all functions.
        let Some(address) = text(&path) else {
            return Vec::new();
        };
        (0..8)
            .filter_map(|function| {
                self.device(format!("{address}.{function}").parse().ok()?)
                    .ok()
            })
            .collect()
    }

    /// The serial number of a device, if it says one.
    ///
    /// Errors: [`Error::NoDevice`]; [`Error::Denied`]: the kernel shows no more than the beginning
    /// of config space without `CAP_SYS_ADMIN`; [`Error::Io`].
    pub fn serial_number(&self, bdf: Bdf) -> Result<Option<u64>> {
        let path = self.existing(bdf)?.join("config");
        let failed = |error| Error::from_io("read", Object::file(&path), error);
        let length = fs::metadata(&path).map_err(failed)?.len();
        let bytes = fs::read(&path).map_err(failed)?;
        if (bytes.len() as u64) < length {
            return Err(failed(Errno::PERM.into()).if_denied("be root, or have CAP_SYS_ADMIN"));
        }
        Ok(serial::of_bytes(&bytes))
    }

    /// The devices of an IOMMU group.
    #[must_use]
    pub fn group(&self, group: u32) -> Vec<PciDevice> {
        let path = self
            .root
            .join(format!("kernel/iommu_groups/{group}/devices"));
        let Ok(entries) = fs::read_dir(path) else {
            return Vec::new();
        };
        let mut devices: Vec<PciDevice> = entries
            .filter_map(|entry| {
                let bdf = entry.ok()?.file_name().to_str()?.parse().ok()?;
                self.device(bdf).ok()
            })
            .collect();
        devices.sort_unstable_by_key(|device| device.bdf);
        devices
    }

    /// The devices of an IOMMU group that keep it from being viable: those with a driver that uses
    /// DMA on behalf of the host.
    #[must_use]
    pub fn group_obstacles(&self, group: u32) -> Vec<GroupMember> {
        self.group(group)
            .into_iter()
            .filter(|device| !device.is_vfio())
            .filter(|device| {
                // The kernel lets these stay.
                !matches!(
                    device.driver.as_deref(),
                    None | Some("pci-stub" | "pcieport")
                )
            })
            .map(|device| GroupMember {
                bdf: device.bdf,
                driver: device.driver,
            })
            .collect()
    }

    /// Whether there are IOMMU groups, that is, whether an IOMMU is in use.
    #[must_use]
    pub fn has_iommu(&self) -> bool {
        first_entry(&self.root.join("kernel/iommu_groups")).is_some()
    }

    /// Barlease's kernel module, if it is loaded, also in the place of stock vfio-pci.
    #[must_use]
    pub fn module(&self) -> Option<Module> {
        let modules = self.root.join("module");
        let own = modules.join(abi::MODULE_NAME);
        let as_stock = modules.join("vfio_pci");
        let path = if own.is_dir() {
            own
        } else if as_stock.join(OWN_PARAMETER).exists() {
            as_stock
        } else {
            return None;
        };
        Some(Module {
            version: text(&path.join("version")),
        })
    }

    /// Whether its driver has enabled it, which vfio drivers do while it is open. `None`: unknown.
    pub(crate) fn is_enabled(&self, bdf: Bdf) -> Option<bool> {
        let count = text(&self.device_path(bdf).join("enable"))?;
        Some(count != "0")
    }

    /// How the kernel resets a device, in the order in which it tries: `flr`, `pm`, `bus` and so
    /// on. Empty: not at all, or the kernel is older than 5.15.
    ///
    /// Errors: [`Error::NoDevice`].
    pub fn reset_methods(&self, bdf: Bdf) -> Result<Vec<String>> {
        let path = self.existing(bdf)?.join("reset_method");
        let names = text(&path).unwrap_or_default();
        Ok(names.split_whitespace().map(str::to_owned).collect())
    }

    /// Sets how the kernel resets a device, and with which it begins. None at all: never; see
    /// [`Pci::set_default_reset_methods`] for the opposite.
    ///
    /// Errors: [`Error::NoDevice`]; [`Error::Denied`]; [`Error::Io`] (`EINVAL`: the device has no
    /// such method).
    pub fn set_reset_methods(&self, bdf: Bdf, methods: &[&str]) -> Result<()> {
        let path = self.existing(bdf)?.join("reset_method");
        // An empty line takes all methods away.
        write(&path, &format!("{}\n", methods.join(" ")))
    }

    /// Lets the kernel reset a device as it does by default.
    ///
    /// Errors: as for [`Pci::set_reset_methods`].
    pub fn set_default_reset_methods(&self, bdf: Bdf) -> Result<()> {
        write(&self.existing(bdf)?.join("reset_method"), "default\n")
    }

    /// Has the kernel reset a device that nobody has open, whatever it is bound to.
    ///
    /// Errors: [`Error::NoDevice`]; [`Error::Unsupported`]: it has no way to be reset;
    /// [`Error::Denied`]; [`Error::Io`].
    pub fn reset(&self, bdf: Bdf) -> Result<()> {
        let none = || {
            Error::unsupported(
                "reset",
                Object::Device(bdf),
                "the kernel knows no way to reset it, or is not to use any: see `reset_methods`",
            )
        };
        let path = self.existing(bdf)?.join("reset");
        if !path.exists() {
            return Err(none());
        }
        write(&path, "1").map_err(|error| match error.errno().map(Errno::from_raw_os_error) {
            Some(Errno::NOTTY) => none().because(Errno::NOTTY),
            _ => error,
        })
    }

    fn existing(&self, bdf: Bdf) -> Result<PathBuf> {
        let path = self.device_path(bdf);
        match path.is_dir() {
            true => Ok(path),
            false => Err(Error::NoDevice { bdf }),
        }
    }

    fn driver_override(&self, bdf: Bdf) -> Option<String> {
        text(&self.device_path(bdf).join("driver_override")).filter(|text| text != "(null)")
    }

    /// Binds a device to a driver, taking it from the one that it is bound to. Does nothing if it
    /// is bound to that driver already. If the driver does not take it, the device goes back to
    /// the one before.
    ///
    /// Errors: [`Error::NoDevice`]; [`Error::Invalid`]: the driver is not loaded, or did not take
    /// the device; [`Error::Denied`]; [`Error::Io`].
    pub fn bind(&self, bdf: Bdf, driver: &str) -> Result<()> {
        let before = self.device(bdf)?;
        // A name, not a path: it becomes a part of one.
        if driver.is_empty() || driver.starts_with('.') || driver.contains('/') {
            return Err(invalid(
                "bind",
                bdf,
                format!("{driver:?} is no name of a driver"),
            ));
        }
        if !self.driver_path(driver).is_dir() {
            let remedy = if driver == abi::DRIVER_NAME {
                format!("load it with `modprobe {}`", abi::MODULE_NAME)
            } else {
                "load its module".to_owned()
            };
            return Err(invalid(
                "bind",
                bdf,
                format!("the driver {driver} is not loaded: {remedy}"),
            ));
        }
        if before.driver.as_deref() == Some(driver) {
            return Ok(());
        }

        let answer = self.switch(bdf, &before, driver);
        if answer.is_err() {
            // As good as possible: there is an error to report already.
            drop(self.put_back(&before));
        }
        answer
    }

    fn switch(&self, bdf: Bdf, before: &PciDevice, driver: &str) -> Result<()> {
        self.set_override(bdf, Some(driver))?;
        self.release("bind", bdf, before.driver.as_deref())?;
        self.probe(bdf)?;
        if self.wait_for(bdf, |now| now == Some(driver)) {
            return Ok(());
        }
        Err(invalid(
            "bind",
            bdf,
            format!("the driver {driver} did not take the device: see dmesg"),
        ))
    }

    /// Puts a device back to what it was: its driver, and the only driver that may bind to it.
    /// `before` is what [`Pci::device`] said then.
    ///
    /// Errors: [`Error::NoDevice`]; [`Error::Invalid`]: the driver did not take it back;
    /// [`Error::Denied`]; [`Error::Io`].
    pub fn put_back(&self, before: &PciDevice) -> Result<()> {
        let bdf = before.bdf;
        let now = self.device(bdf)?;
        if now.driver == before.driver {
            return self.set_override(bdf, before.driver_override.as_deref());
        }
        // The kernel might choose another one than it had.
        self.set_override(bdf, before.driver.as_deref())?;
        self.release("put back", bdf, now.driver.as_deref())?;
        let taken = match before.driver.as_deref() {
            Some(driver) => {
                self.probe(bdf)?;
                self.wait_for(bdf, |now| now == Some(driver))
            }
            None => true,
        };
        self.set_override(bdf, before.driver_override.as_deref())?;
        if taken {
            return Ok(());
        }
        let driver = before.driver.as_deref().unwrap_or_default();
        Err(invalid(
            "put back",
            bdf,
            format!("the driver {driver} did not take the device back: see dmesg"),
        ))
    }

    /// Takes a device from its vfio driver and gives it back to the driver that the kernel would
    /// choose.
    ///
    /// Errors: [`Error::NoDevice`]; [`Error::Invalid`]: it is bound to a driver that is no vfio
    /// driver; [`Error::Denied`]; [`Error::Io`].
    pub fn unbind(&self, bdf: Bdf) -> Result<()> {
        let before = self.device(bdf)?;
        if let (Some(driver), false) = (&before.driver, before.is_vfio()) {
            return Err(invalid(
                "unbind",
                bdf,
                format!("bound to {driver}, which is not a vfio driver"),
            ));
        }
        self.set_override(bdf, None)?;
        self.release("unbind", bdf, before.driver.as_deref())?;
        self.probe(bdf)
    }

    fn set_override(&self, bdf: Bdf, driver: Option<&str>) -> Result<()> {
        let path = self.device_path(bdf).join("driver_override");
        write(&path, &format!("{}\n", driver.unwrap_or_default()))
    }

    /// Waits for the driver to let go: vfio drivers wait for their users.
    fn release(&self, operation: &'static str, bdf: Bdf, driver: Option<&str>) -> Result<()> {
        let Some(driver) = driver else {
            return Ok(());
        };
        write(&self.driver_path(driver).join("unbind"), &bdf.to_string())?;
        if self.wait_for(bdf, |now| now.is_none()) {
            return Ok(());
        }
        Err(invalid(
            operation,
            bdf,
            format!("the driver {driver} did not let go of the device"),
        ))
    }

    fn probe(&self, bdf: Bdf) -> Result<()> {
        let path = self.root.join("bus/pci/drivers_probe");
        match write(&path, &bdf.to_string()) {
            // Without a driver that wants the device: fine, `wait_for` tells.
            Err(Error::Io { source, .. })
                if source.raw_os_error() == Some(Errno::NODEV.raw_os_error())
                    || source.kind() == io::ErrorKind::InvalidInput =>
            {
                Ok(())
            }
            answer => answer,
        }
    }

    fn wait_for(&self, bdf: Bdf, wanted: impl Fn(Option<&str>) -> bool) -> bool {
        let deadline = Instant::now() + PROBE_TIMEOUT;
        loop {
            let now = link_name(&self.device_path(bdf).join("driver"));
            if wanted(now.as_deref()) {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn invalid(operation: &'static str, bdf: Bdf, reason: String) -> Error {
    Error::invalid(operation, Object::Device(bdf), reason)
}

fn write(path: &Path, text: &str) -> Result<()> {
    #[cfg(feature = "log")]
    crate::trace::write(path, text);
    fs::OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(path)
        .and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()))
        .map_err(|error| {
            Error::from_io("write", Object::file(path), error).if_denied("run as root")
        })
}

fn text(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

fn hex(path: &Path) -> Option<u32> {
    u32::from_str_radix(text(path)?.strip_prefix("0x")?, 16).ok()
}

/// Last component of what a symbolic link points to.
fn link_name(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

fn first_entry(path: &Path) -> Option<String> {
    let mut names: Vec<String> = fs::read_dir(path)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort_unstable();
    names.into_iter().next()
}
