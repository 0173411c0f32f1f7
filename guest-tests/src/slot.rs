//! A slot that a device can be pulled out of, and another one put in.

use std::{
    fs,
    path::{Path, PathBuf},
};

use barlease_lab::guest;

use crate::{
    errno::ENODEV,
    importer::KernelLog,
    pci::{self, BARLEASE, Function},
    wait,
};

/// The device that comes and goes, alone in its slot. It has a function-level reset: a reset of the
/// slot, as the core does it at open, takes the kernel's own locks in another order than a removal
/// does.
pub const DEVICE: &str = "card";

/// Where a kernel that proves the order of locks is told whether to.
const PROVE_LOCKING: &str = "/proc/sys/kernel/prove_locking";

/// A time in which the order of locks is not proved; it ends when this is dropped.
///
/// The kernel's hot-plug driver takes two locks in both orders: `pciehp_ist` has `reset_lock` when
/// it comes to `pci_lock_rescan_remove`, and `pciehp_unconfigure_device` and
/// `pciehp_configure_device` take `reset_lock` again under that, after they have let it go for the
/// time in which drivers are unbound or bound. A kernel that has reported one inversion looks for
/// no other. One of the two orders alone is no inversion: a removal can be proved up to the moment
/// at which drivers are unbound, and that is when the last user of the device has let go.
///
/// Another pair is `pci_bus_sem` and the `memory_lock` of vfio-pci: recovery from an error wakes
/// functions that sleep (`vfio_pci_core_runtime_resume`) while it walks their bus
/// (`pcie_do_recovery`), and a reset of the bus looks at what is on it
/// (`pci_bridge_wait_for_secondary_bus`) with the memory locks held (`vfio_pci_dev_set_hot_reset`).
#[derive(Debug)]
pub struct Unproved(());

impl Unproved {
    /// From now on.
    ///
    /// # Panics
    ///
    /// When the kernel does not allow it.
    #[must_use]
    pub fn new() -> Self {
        if Path::new(PROVE_LOCKING).exists() {
            fs::write(PROVE_LOCKING, "0").expect("no proof of locking");
        }
        Self(())
    }
}

impl Default for Unproved {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Unproved {
    fn drop(&mut self) {
        let _ = fs::write(PROVE_LOCKING, "1");
    }
}

/// The slot of the [device](DEVICE).
#[derive(Debug)]
pub struct Slot {
    /// The device that is in it, if any.
    pub function: Function,
    port: Function,
    /// Turns the slot on and off.
    power: PathBuf,
    /// QEMU's name of the port.
    name: &'static str,
}

impl Slot {
    /// With the device in it.
    ///
    /// # Panics
    ///
    /// When there is none.
    #[must_use]
    pub fn new() -> Self {
        let function = Function::named(DEVICE);
        let port = function.port();
        // The machine `random` has more ports.
        let name = if guest::device("mapped").is_ok() {
            "rp8"
        } else {
            "rp6"
        };
        let (address, _) = function.bdf.rsplit_once('.').expect("an address");
        let slots = fs::read_dir("/sys/bus/pci/slots").expect("slots");
        let mut slots = slots.map(|slot| slot.expect("a slot").path());
        let is_its = |slot: &PathBuf| {
            let of = fs::read_to_string(slot.join("address")).unwrap_or_default();
            of.trim() == address
        };
        let slot = slots.find(is_its).expect("its slot");
        Self {
            function,
            port,
            power: slot.join("power"),
            name,
        }
    }

    /// Pulls out what is in it, without a word to the kernel.
    ///
    /// # Panics
    ///
    /// When that does not work.
    pub fn pull(&self) {
        self.port.pull();
    }

    /// Waits until the kernel has given the device up and turned the slot off, which throws out
    /// what is in it.
    ///
    /// # Panics
    ///
    /// When it does not.
    pub fn wait_until_empty(&self) {
        wait::until("removal", || !self.function.exists());
        wait::until("the end of removal", || self.port.slot_is_off());
        wait::until("the slot's thread", || self.has_come_to_rest());
    }

    /// Lets the kernel look into the slot, which is empty, and waits until it is done with that,
    /// and with whatever came before. A card that is put in before that is found at the end of the
    /// removal; the press of the button that comes with it, handled after that, asks for it back.
    fn has_come_to_rest(&self) -> bool {
        let mut log = KernelLog::from_now();
        let answer = pci::write(&self.power, "1");
        assert_eq!(answer, Err(ENODEV), "the slot is not empty");
        // So it says, and does not wait, where the removal is not quite over.
        let lines = log.lines();
        !lines.iter().any(|line| line.contains("Already enabled"))
    }

    /// Puts another device in, and binds it.
    ///
    /// # Panics
    ///
    /// When that does not work.
    pub fn plug(&self) {
        let bus = self.name;
        let arguments = format!(
            r#""driver":"virtio-rng-pci","id":"{DEVICE}","rng":"virtio-source","bus":"{bus}","addr":"00.0""#
        );
        let command = format!(r#"{{"execute":"device_add","arguments":{{{arguments}}}}}"#);
        // QEMU frees the name a little after the device is gone.
        wait::until("a plug", || guest::qmp(&command).is_ok());
        // The kernel knows a device some time before drivers may have it.
        wait::until("a new device", || {
            self.function.exists() && self.function.try_bind(BARLEASE)
        });
        wait::until("the end of plugging in", || self.port.slot_is_on());
    }
}

impl Default for Slot {
    fn default() -> Self {
        Self::new()
    }
}

/// Asks for the device back, as the button at its slot does.
///
/// # Errors
///
/// The answer of QEMU.
pub fn ask_back() -> std::io::Result<()> {
    let command = format!(r#"{{"execute":"device_del","arguments":{{"id":"{DEVICE}"}}}}"#);
    guest::qmp(&command).map(drop)
}
