//! PCI functions and their drivers, through sysfs.

use std::{
    fs, io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use barlease_lab::guest;

use crate::errno::{Answer, EBUSY, Errno};

/// Our driver.
pub const BARLEASE: &str = barlease_abi::DRIVER_NAME;
/// The kernel's own.
pub const STOCK: &str = "vfio-pci";

// Of Slot Control (PCIe, 7.5.3.10).
const SLOT_INTERRUPTS: u16 = 1 << 5;
/// Indicator and power.
const SLOT_OFF: u16 = 0b11 << 8 | 1 << 10;
const SLOT_ON: u16 = 0b01 << 8;

/// A PCI function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Its full address.
    pub bdf: String,
}

impl Function {
    /// That of the machine's device `name` (`lab/src/guests/preset.rs`).
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
        assert!(self.try_bind(driver), "{}: {:?}", self.bdf, self.driver());
    }

    /// The same. False when that does not work, as with a device that is being plugged in.
    #[must_use]
    pub fn try_bind(&self, driver: &str) -> bool {
        if self.driver().as_deref() != Some(driver) {
            self.unbind();
            if write(&self.path("driver_override"), driver).is_err() {
                return false;
            }
        }
        // Takes the lock of the device, and so waits for the end of a probe that is going on.
        let bind = format!("/sys/bus/pci/drivers/{driver}/bind");
        match write(Path::new(&bind), &self.bdf) {
            Ok(()) | Err(EBUSY) => self.driver().as_deref() == Some(driver),
            Err(_) => false,
        }
    }

    /// Names the driver that it may be bound to; an empty line allows all.
    ///
    /// # Panics
    ///
    /// When that does not work.
    pub fn set_override(&self, driver: &str) {
        write(&self.path("driver_override"), driver).expect("set driver_override");
    }

    /// Lets the kernel find a driver for it.
    ///
    /// # Panics
    ///
    /// When the kernel refuses to look for one.
    pub fn probe(&self) {
        write(Path::new("/sys/bus/pci/drivers_probe"), &self.bdf).expect("probe");
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
    /// The result of the write.
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

    /// Slot Control of a port, and the file of its config space.
    fn slot_control(&self) -> (fs::File, u64, u16) {
        let register = self.capability(0x10).expect("PCI Express") + 0x18;
        let mut options = fs::OpenOptions::new();
        let file = options.read(true).write(true).open(self.path("config"));
        let file = file.expect("config space");
        let mut bytes = [0; 2];
        file.read_exact_at(&mut bytes, register).expect("read");
        (file, register, u16::from_le_bytes(bytes))
    }

    /// Whether the slot behind this port is turned off, and the kernel is done with that.
    #[must_use]
    pub fn slot_is_off(&self) -> bool {
        let (_, _, control) = self.slot_control();
        control & SLOT_OFF == SLOT_OFF
    }

    /// Whether the slot behind this port is turned on, and the kernel is done with what is in it.
    #[must_use]
    pub fn slot_is_on(&self) -> bool {
        let (_, _, control) = self.slot_control();
        control & SLOT_OFF == SLOT_ON
    }

    /// Pulls the device out of the slot behind this port, without a word to the kernel: it notices
    /// that the card is not there any more.
    ///
    /// # Panics
    ///
    /// When that does not work.
    pub fn pull(&self) {
        let (file, register, control) = self.slot_control();
        let write = |value: u16| {
            let bytes = value.to_le_bytes();
            file.write_all_at(&bytes, register).expect("write");
        };
        // QEMU takes out what is in a slot that is turned off. By the next write it is as if nobody
        // had turned it off.
        write(control & !SLOT_INTERRUPTS | SLOT_OFF);
        write(control);
    }

    /// Offset of a capability in config space.
    #[must_use]
    pub fn capability(&self, id: u8) -> Option<u64> {
        let config = self.config();
        let mut at = usize::from(config[0x34]);
        while at != 0 {
            if config[at] == id {
                return Some(at as u64);
            }
            at = usize::from(config[at + 1]);
        }
        None
    }

    /// Offset of an extended capability in config space.
    #[must_use]
    pub fn extended_capability(&self, id: u16) -> Option<u64> {
        let config = self.config();
        let mut at = 0x100;
        while at != 0 {
            let header = config.get(at..at + 4)?;
            let header = u32::from_le_bytes(header.try_into().ok()?);
            if header == 0 || header == u32::MAX {
                return None;
            }
            if header & 0xffff == u32::from(id) {
                return Some(at as u64);
            }
            at = (header >> 20) as usize & 0xffc;
        }
        None
    }

    /// Whether the kernel knows it.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.path("").exists()
    }

    /// Resets the bus behind it through sysfs.
    ///
    /// # Errors
    ///
    /// The result of the write.
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

    /// Writes to config space without a word to the kernel: what it keeps of it stays as it is.
    ///
    /// # Panics
    ///
    /// When that does not work.
    pub fn set_config(&self, offset: u64, data: &[u8]) {
        let file = fs::File::options().write(true).open(self.path("config"));
        let written = file.and_then(|file| file.write_all_at(data, offset));
        written.expect("a write to config space");
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

    /// How many errors the kernel has counted of a kind: `correctable`, `nonfatal` or `fatal`.
    ///
    /// # Panics
    ///
    /// When sysfs does not say.
    #[must_use]
    pub fn errors(&self, kind: &str) -> u32 {
        let text = fs::read_to_string(self.path(&format!("aer_dev_{kind}"))).expect("AER counts");
        let total = text
            .lines()
            .find_map(|line| line.strip_prefix("TOTAL_ERR_"));
        let number = total.and_then(|line| line.split_whitespace().nth(1));
        number
            .and_then(|number| number.parse().ok())
            .expect("a total")
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

/// A parameter of our module, as a test wants it; what it was before when dropped.
#[derive(Debug)]
pub struct Parameter {
    path: PathBuf,
    before: String,
}

impl Parameter {
    /// Sets it.
    ///
    /// # Errors
    ///
    /// When the module refuses the value.
    ///
    /// # Panics
    ///
    /// When there is no such parameter.
    pub fn set(name: &str, value: &str) -> Answer<Self> {
        let path = Path::new("/sys/module").join(barlease_abi::MODULE_NAME);
        let path = path.join("parameters").join(name);
        let before = fs::read_to_string(&path).expect("a parameter");
        write(&path, value)?;
        Ok(Self { path, before })
    }
}

impl Drop for Parameter {
    fn drop(&mut self) {
        let _ = write(&self.path, &self.before);
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
    assert!(insert(barlease_abi::MODULE_NAME, parameters));
}

/// Loads the module in the file `name` of the guest with these parameters: whether that works.
///
/// # Panics
///
/// When there is no `insmod`.
#[must_use]
pub fn insert(name: &str, parameters: &str) -> bool {
    let mut command = Command::new("insmod");
    command
        .arg(format!("/lib/modules/{name}.ko"))
        .args(parameters.split_whitespace());
    command.status().expect("insmod").success()
}

/// Unloads our module.
///
/// # Errors
///
/// That of `delete_module`.
pub fn unload_module() -> Answer<()> {
    unload(barlease_abi::MODULE_NAME)
}

/// Unloads the module `name`.
///
/// # Errors
///
/// That of `delete_module`.
///
/// # Panics
///
/// When the name has a zero in it.
pub fn unload(name: &str) -> Answer<()> {
    let name = std::ffi::CString::new(name).expect("a name");
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
