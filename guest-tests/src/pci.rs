//! PCI functions and their drivers, through sysfs.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use barlease_lab::guest;

use crate::errno::{Answer, Errno};

/// Our driver.
pub const BARLEASE: &str = barlease_abi::DRIVER_NAME;
/// The kernel's own.
pub const STOCK: &str = "vfio-pci";

/// A PCI function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Its full address.
    pub bdf: String,
}

impl Function {
    /// That of the machine's device `name` (`lab/src/machine.rs`).
    ///
    /// # Panics
    ///
    /// When the machine has none.
    #[must_use]
    pub fn named(name: &str) -> Self {
        let device = guest::device(name).expect("a guest with that device");
        Self { bdf: device.bdf }
    }

    fn path(&self, file: &str) -> PathBuf {
        Path::new("/sys/bus/pci/devices").join(&self.bdf).join(file)
    }

    /// The driver that it is bound to.
    #[must_use]
    pub fn driver(&self) -> Option<String> {
        let link = fs::read_link(self.path("driver")).ok()?;
        Some(link.file_name()?.to_string_lossy().into_owned())
    }

    /// Binds it to `driver` if it is not.
    ///
    /// # Panics
    ///
    /// When that does not work.
    pub fn bind(&self, driver: &str) {
        if self.driver().as_deref() == Some(driver) {
            return;
        }
        self.unbind();
        write(&self.path("driver_override"), driver).expect("set driver_override");
        write(Path::new("/sys/bus/pci/drivers_probe"), &self.bdf).expect("probe");
        assert_eq!(self.driver().as_deref(), Some(driver), "{}", self.bdf);
    }

    /// Unbinds it from whatever it is bound to. Waits for as long as its device is open.
    ///
    /// # Panics
    ///
    /// When that does not work.
    pub fn unbind(&self) {
        if self.driver().is_some() {
            write(&self.path("driver/unbind"), &self.bdf).expect("unbind");
        }
    }

    /// Resets it through sysfs.
    ///
    /// # Errors
    ///
    /// What the write gives.
    pub fn reset(&self) -> Answer<()> {
        write(&self.path("reset"), "1")
    }

    /// Takes it from the bus, as if it were pulled out. [`rescan`] finds it again.
    ///
    /// # Panics
    ///
    /// When that does not work.
    pub fn remove(&self) {
        write(&self.path("remove"), "1").expect("remove");
        assert!(!self.path("").exists());
    }

    /// The port that it is behind.
    ///
    /// # Panics
    ///
    /// When it is on a root bus.
    #[must_use]
    pub fn port(&self) -> Self {
        let path = fs::canonicalize(self.path("")).expect("a function");
        let port = path.parent().and_then(Path::file_name).expect("a parent");
        let bdf = port.to_string_lossy().into_owned();
        assert!(!bdf.starts_with("pci"), "{} is behind no port", self.bdf);
        Self { bdf }
    }

    /// Resets the bus behind it through sysfs.
    ///
    /// # Errors
    ///
    /// What the write gives.
    pub fn reset_subordinate(&self) -> Answer<()> {
        write(&self.path("reset_subordinate"), "1")
    }

    /// Whether the kernel knows how to reset it.
    #[must_use]
    pub fn can_reset(&self) -> bool {
        self.path("reset").exists()
    }

    /// The number of its IOMMU group.
    ///
    /// # Panics
    ///
    /// When it has none.
    #[must_use]
    pub fn group(&self) -> String {
        let link = fs::read_link(self.path("iommu_group")).expect("an IOMMU group");
        link.file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned()
    }

    /// Physical address and length of a BAR; a length of 0 when it is absent.
    ///
    /// # Panics
    ///
    /// When sysfs does not say.
    #[must_use]
    pub fn bar(&self, index: u32) -> (u64, u64) {
        let text = fs::read_to_string(self.path("resource")).expect("resource");
        let line = text.lines().nth(index as usize).expect("a line a BAR");
        let number = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16);
        let numbers: Result<Vec<_>, _> = line.split(' ').map(number).collect();
        let numbers = numbers.expect("numbers");
        match numbers[1] {
            0 => (0, 0),
            end => (numbers[0], end - numbers[0] + 1),
        }
    }

    /// Config space as the host sees it.
    ///
    /// # Panics
    ///
    /// When sysfs does not say.
    #[must_use]
    pub fn config(&self) -> Vec<u8> {
        fs::read(self.path("config")).expect("config space")
    }

    /// Its power state, such as `D0` or `D3hot`.
    ///
    /// # Panics
    ///
    /// When sysfs does not say.
    #[must_use]
    pub fn power_state(&self) -> String {
        let text = fs::read_to_string(self.path("power_state")).expect("power_state");
        text.trim().to_owned()
    }

    /// Lets it sleep (`auto`) or keeps it awake (`on`).
    ///
    /// # Panics
    ///
    /// When that does not work.
    pub fn set_power_control(&self, control: &str) {
        write(&self.path("power/control"), control).expect("power/control");
    }

    /// Its runtime power-management status, such as `active` or `suspended`.
    ///
    /// # Panics
    ///
    /// When sysfs does not say.
    #[must_use]
    pub fn runtime_status(&self) -> String {
        let text = fs::read_to_string(self.path("power/runtime_status")).expect("runtime_status");
        text.trim().to_owned()
    }
}

/// Writes to a file of sysfs or the like.
///
/// # Errors
///
/// That of opening or writing.
pub fn write(path: &Path, text: &str) -> Answer<()> {
    fs::write(path, text).map_err(|error| Errno::of(&error))
}

/// Looks for functions that are not known.
///
/// # Panics
///
/// When that does not work.
pub fn rescan() {
    write(Path::new("/sys/bus/pci/rescan"), "1").expect("rescan");
}

/// Loads our module with these parameters.
///
/// # Panics
///
/// When that does not work.
pub fn load_module(parameters: &str) {
    let file = format!("/lib/modules/{}.ko", barlease_abi::MODULE_NAME);
    let mut command = Command::new("insmod");
    command.arg(file).args(parameters.split_whitespace());
    assert!(command.status().expect("insmod").success());
}

/// Unloads our module.
///
/// # Errors
///
/// That of `delete_module`.
pub fn unload_module() -> Answer<()> {
    let name = std::ffi::CString::new(barlease_abi::MODULE_NAME).expect("a name");
    // SAFETY: The name is a C string; what the kernel does with the module is its own.
    let result = unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) };
    crate::errno::answer(result).map(drop)
}

/// Whether our module is loaded.
#[must_use]
pub fn is_module_loaded() -> bool {
    Path::new("/sys/module")
        .join(barlease_abi::MODULE_NAME)
        .exists()
}

/// A parameter or attribute of our module.
///
/// # Errors
///
/// That of reading it.
pub fn module_attribute(name: &str) -> io::Result<String> {
    let path = Path::new("/sys/module").join(barlease_abi::MODULE_NAME);
    Ok(fs::read_to_string(path.join(name))?.trim().to_owned())
}
