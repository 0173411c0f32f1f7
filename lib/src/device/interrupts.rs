//! Interrupts, and what else VFIO tells through eventfds.

use std::mem::offset_of;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use super::Device;
use super::Handle;
use crate::Bdf;
use crate::Error;
use crate::EventFd;
use crate::Result;
use crate::error::Object;
use crate::sys::ioctl;
use crate::sys::ioctl::Words;

/// Bytes before the data of `struct vfio_irq_set`.
const HEADER: usize = offset_of!(vfio::vfio_irq_set, data);
/// Most vectors that are believed: MSI-X has 2048.
const MOST: u32 = 1 << 16;

/// The kind of an interrupt, or of another event that a device signals by an eventfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InterruptKind {
    /// The interrupt pin. It is level-triggered: VFIO masks it each time it is signalled, and
    /// [`Device::unmask_interrupt`] lets the next one come.
    Intx,
    /// MSI.
    Msi,
    /// MSI-X.
    Msix,
    /// The device has reported an error that is not recovered from.
    Error,
    /// Somebody wants the device back: it is being unbound, or taken out. Its owner should close
    /// it soon; the process that asks waits for that.
    Request,
}

impl InterruptKind {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Intx,
        Self::Msi,
        Self::Msix,
        Self::Error,
        Self::Request,
    ];

    pub(crate) fn index(self) -> u32 {
        match self {
            Self::Intx => vfio::VFIO_PCI_INTX_IRQ_INDEX,
            Self::Msi => vfio::VFIO_PCI_MSI_IRQ_INDEX,
            Self::Msix => vfio::VFIO_PCI_MSIX_IRQ_INDEX,
            Self::Error => vfio::VFIO_PCI_ERR_IRQ_INDEX,
            Self::Request => vfio::VFIO_PCI_REQ_IRQ_INDEX,
        }
    }
}

/// VFIO's description of a kind of interrupt of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct InterruptInfo {
    /// Number of vectors; 0: the device has none of this kind.
    pub vectors: u32,
    /// Whether they can be signalled by eventfd.
    pub eventfd: bool,
    /// Whether [`Device::mask_interrupt`] and [`Device::unmask_interrupt`] are possible.
    pub maskable: bool,
    /// Whether it is masked each time that it is signalled.
    pub automasked: bool,
    /// Whether vectors can be added while others are in use.
    pub resizable: bool,
}

/// An action on vectors, with its data.
#[derive(Clone, Copy)]
struct Set {
    kind: InterruptKind,
    flags: u32,
    start: u32,
    count: u32,
}

impl Handle<'_> {
    fn set_irqs(self, set: Set, data: impl ExactSizeIterator<Item = i32>) -> Result<(), Errno> {
        let mut words = Words::zeroed(HEADER + data.len() * 4);
        let mut put = |at, value| words.put_u32(at, value);
        put(offset_of!(vfio::vfio_irq_set, flags), set.flags);
        put(offset_of!(vfio::vfio_irq_set, index), set.kind.index());
        put(offset_of!(vfio::vfio_irq_set, start), set.start);
        put(offset_of!(vfio::vfio_irq_set, count), set.count);
        for (n, value) in data.enumerate() {
            put(HEADER + n * 4, value as u32);
        }
        ioctl::call_bytes(self.fd, ioctl::DEVICE_SET_IRQS, &mut words).map(drop)
    }

    /// Without data: the action itself.
    fn act(
        self,
        operation: &'static str,
        kind: InterruptKind,
        action: u32,
        vector: u32,
    ) -> Result<()> {
        let set = Set {
            kind,
            flags: vfio::VFIO_IRQ_SET_DATA_NONE | action,
            start: vector,
            count: 1,
        };
        let answer = self.set_irqs(set, std::iter::empty());
        answer.map_err(|errno| self.refused(operation, errno))
    }

    fn refused(self, operation: &'static str, errno: Errno) -> Error {
        match errno {
            // The answer of `vfio_pci_set_irqs_ioctl` where there is no function for the action.
            Errno::NOTTY => Error::unsupported(
                operation,
                self.object(),
                "VFIO does not do this with interrupts of this kind",
            )
            .because(errno),
            errno => Error::from_errno(operation, self.object(), errno),
        }
    }
}

/// The name that `vfio_pci_core` has for the handler of a vector.
fn handler_name(kind: InterruptKind, vector: u32, bdf: Bdf) -> Option<String> {
    match kind {
        InterruptKind::Intx => Some(format!("vfio-intx({bdf})")),
        InterruptKind::Msi => Some(format!("vfio-msi[{vector}]({bdf})")),
        InterruptKind::Msix => Some(format!("vfio-msix[{vector}]({bdf})")),
        InterruptKind::Error | InterruptKind::Request => None,
    }
}

/// The number of the interrupt that has this handler, in the text of `/proc/interrupts`. Several
/// handlers of one interrupt are separated by commas.
fn find_number(interrupts: &str, handler: &str) -> Option<u32> {
    let line = interrupts.lines().find(|line| {
        let mut words = line.split(|c: char| c.is_whitespace() || c == ',');
        words.any(|word| word == handler)
    })?;
    line.split_once(':')?.0.trim().parse().ok()
}

impl Device {
    /// The host's number of an interrupt that is on, as in `/proc/irq`: to say which CPUs serve it
    /// (`smp_affinity_list`). `None`: it is not on, or it is one that only VFIO knows.
    ///
    /// Errors: [`Error::Io`]: `/proc/interrupts` cannot be read.
    pub fn irq_number(&self, kind: InterruptKind, vector: u32) -> Result<Option<u32>> {
        let Some(name) = handler_name(kind, vector, self.bdf()) else {
            return Ok(None);
        };
        let path = "/proc/interrupts";
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::from_io("read", Object::file(path), error))?;
        Ok(find_number(&text, &name))
    }

    /// VFIO's description of interrupts of a kind. A kind that the device does not have has no
    /// vectors.
    ///
    /// Errors: [`Error::Io`].
    pub fn interrupt_info(&self, kind: InterruptKind) -> Result<InterruptInfo> {
        let handle = self.handle();
        let mut info = vfio::vfio_irq_info {
            index: kind.index(),
            ..Default::default()
        };
        match ioctl::call(handle.fd, ioctl::DEVICE_GET_IRQ_INFO, &mut info) {
            // Errors of a device that is not on PCI Express.
            Ok(_) | Err(Errno::INVAL) => {}
            Err(errno) => {
                let object = handle.object();
                return Err(Error::from_errno("get interrupts", object, errno));
            }
        }
        let has = |flag| info.flags & flag != 0;
        Ok(InterruptInfo {
            vectors: info.count,
            eventfd: has(vfio::VFIO_IRQ_INFO_EVENTFD),
            maskable: has(vfio::VFIO_IRQ_INFO_MASKABLE),
            automasked: has(vfio::VFIO_IRQ_INFO_AUTOMASKED),
            resizable: !has(vfio::VFIO_IRQ_INFO_NORESIZE),
        })
    }

    /// Turns on the first `vectors` interrupts of a kind, and answers the eventfd of each.
    ///
    /// One kind of INTx, MSI and MSI-X is on at a time. MSI and MSI-X need
    /// [`Command::MASTER`](crate::config::Command::MASTER).
    ///
    /// Errors: [`Error::Unsupported`]: the device has no such vectors; [`Error::Invalid`]: another
    /// kind is on; [`Error::Io`] (`ENOSPC`: the host has fewer vectors left).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # fn example(device: &barlease::Device) -> barlease::Result<()> {
    /// use barlease::InterruptKind;
    ///
    /// let vectors = device.enable_interrupts(InterruptKind::Msix, 2)?;
    /// let completions = vectors[1].wait()?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn enable_interrupts(&self, kind: InterruptKind, vectors: u32) -> Result<Vec<EventFd>> {
        let available = self.interrupt_info(kind)?.vectors;
        if vectors > available.min(MOST) {
            return Err(Error::unsupported(
                "enable interrupts",
                self.handle().object(),
                format!("the device has {available} vectors of {kind:?}, not {vectors}"),
            ));
        }
        let events: Result<Vec<EventFd>> = (0..vectors).map(|_| EventFd::new()).collect();
        let events = events?;
        let fds: Vec<_> = events.iter().map(|event| Some(event.as_fd())).collect();
        self.set_interrupts(kind, 0, &fds)?;
        Ok(events)
    }

    /// Turns on one interrupt: vector 0 of a kind, as of [`InterruptKind::Intx`] or
    /// [`InterruptKind::Request`].
    ///
    /// Errors: as for [`Device::enable_interrupts`].
    pub fn enable_interrupt(&self, kind: InterruptKind) -> Result<EventFd> {
        let mut events = self.enable_interrupts(kind, 1)?;
        events.pop().ok_or_else(|| {
            Error::unsupported("enable interrupts", self.handle().object(), "no vector")
        })
    }

    /// Has the vectors of a kind from `first` on signal eventfds of your own, as of a virtual
    /// machine's; `None`: this vector signals nothing.
    ///
    /// Errors: as for [`Device::enable_interrupts`]; [`Error::Io`] with `EBADF` or `EINVAL`: no
    /// eventfd.
    pub fn set_interrupts(
        &self,
        kind: InterruptKind,
        first: u32,
        events: &[Option<BorrowedFd<'_>>],
    ) -> Result<()> {
        self.set_eventfds(
            "enable interrupts",
            kind,
            vfio::VFIO_IRQ_SET_ACTION_TRIGGER,
            first,
            events,
        )
    }

    /// Has an eventfd *unmask* an interrupt of the pin each time that it is signalled: what KVM
    /// calls resampling. `None` takes it away.
    ///
    /// Errors: [`Error::Invalid`]: INTx is not on; [`Error::Io`].
    pub fn set_resample(&self, event: Option<BorrowedFd<'_>>) -> Result<()> {
        let action = vfio::VFIO_IRQ_SET_ACTION_UNMASK;
        self.set_eventfds("resample", InterruptKind::Intx, action, 0, &[event])
    }

    fn set_eventfds(
        &self,
        operation: &'static str,
        kind: InterruptKind,
        action: u32,
        first: u32,
        events: &[Option<BorrowedFd<'_>>],
    ) -> Result<()> {
        let handle = self.handle();
        let count = u32::try_from(events.len()).unwrap_or(u32::MAX);
        if count > MOST {
            let reason = "more than 65,536 vectors";
            return Err(Error::invalid(operation, handle.object(), reason));
        }
        let set = Set {
            kind,
            flags: vfio::VFIO_IRQ_SET_DATA_EVENTFD | action,
            start: first,
            count,
        };
        let fds = events
            .iter()
            .map(|event| event.map_or(-1, |event| event.as_raw_fd()));
        handle.set_irqs(set, fds).map_err(|errno| match errno {
            Errno::INVAL => Error::invalid(
                operation,
                handle.object(),
                format!(
                    "vectors {first} to {} of {kind:?}: the device has not that many, another kind \
                     of interrupts is on, or it is off",
                    first.saturating_add(count)
                ),
            )
            .because(errno),
            errno => handle.refused(operation, errno),
        })
    }

    /// Turns all interrupts of a kind off.
    ///
    /// Errors: [`Error::Unsupported`], [`Error::Io`]. Those that are off already are no error.
    pub fn disable_interrupts(&self, kind: InterruptKind) -> Result<()> {
        let handle = self.handle();
        let set = |flags, count| Set {
            kind,
            flags,
            start: 0,
            count,
        };
        let answer = match kind {
            // These two have no "off"; an eventfd of -1 is their way.
            InterruptKind::Error | InterruptKind::Request => handle.set_irqs(
                set(
                    vfio::VFIO_IRQ_SET_DATA_EVENTFD | vfio::VFIO_IRQ_SET_ACTION_TRIGGER,
                    1,
                ),
                [-1].into_iter(),
            ),
            _ => handle.set_irqs(
                set(
                    vfio::VFIO_IRQ_SET_DATA_NONE | vfio::VFIO_IRQ_SET_ACTION_TRIGGER,
                    0,
                ),
                std::iter::empty(),
            ),
        };
        match answer {
            Ok(()) | Err(Errno::INVAL) => Ok(()),
            Err(errno) => Err(handle.refused("disable interrupts", errno)),
        }
    }

    /// Masks a vector. VFIO has this for [`InterruptKind::Intx`] only.
    ///
    /// Errors: [`Error::Unsupported`]; [`Error::Io`] (`EINVAL`: it is not on).
    pub fn mask_interrupt(&self, kind: InterruptKind, vector: u32) -> Result<()> {
        let action = vfio::VFIO_IRQ_SET_ACTION_MASK;
        self.handle().act("mask an interrupt", kind, action, vector)
    }

    /// Unmasks a vector, as after each interrupt of the pin.
    ///
    /// Errors: [`Error::Unsupported`]; [`Error::Io`] (`EINVAL`: it is not on).
    pub fn unmask_interrupt(&self, kind: InterruptKind, vector: u32) -> Result<()> {
        let action = vfio::VFIO_IRQ_SET_ACTION_UNMASK;
        let handle = self.handle();
        handle.act("unmask an interrupt", kind, action, vector)
    }

    /// Signals a vector as if the device had, for tests.
    ///
    /// Errors: [`Error::Unsupported`]; [`Error::Io`] (`EINVAL`: it is not on).
    pub fn trigger_interrupt(&self, kind: InterruptKind, vector: u32) -> Result<()> {
        let action = vfio::VFIO_IRQ_SET_ACTION_TRIGGER;
        let handle = self.handle();
        handle.act("trigger an interrupt", kind, action, vector)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeDevice;

    #[test]
    fn the_number_of_an_interrupt_is_found() {
        let text = "            CPU0       CPU1\n   \
                    9:          0          0  IO-APIC    9-fasteoi   acpi\n  \
                    11:         0          1  IO-APIC   11-fasteoi   ahci, vfio-intx(0000:01:00.0)\n \
                    124:        7          0  PCI-MSIX-0000:01:00.0  1-edge  vfio-msix[1](0000:01:00.0)\n \
                    125:        7          0  PCI-MSIX-0000:01:00.0 11-edge  vfio-msix[11](0000:01:00.0)\n\
                    NMI:        0          0   Non-maskable interrupts\n";
        let bdf = "01:00.0".parse().unwrap();
        let number = |kind, vector| find_number(text, &handler_name(kind, vector, bdf)?);
        assert_eq!(number(InterruptKind::Msix, 1), Some(124));
        assert_eq!(number(InterruptKind::Msix, 11), Some(125));
        assert_eq!(number(InterruptKind::Intx, 0), Some(11));
        assert_eq!(number(InterruptKind::Msi, 1), None);
        assert_eq!(number(InterruptKind::Request, 0), None);
        // Of a fake nothing is in this host's list.
        let fake = FakeDevice::builder().bar(0, 0x1000).msi(1).build().unwrap();
        let device = fake.device().unwrap();
        assert_eq!(device.irq_number(InterruptKind::Msi, 0).unwrap(), None);
    }

    #[test]
    fn vectors_signal_their_eventfds() {
        let fake = FakeDevice::builder()
            .bar(0, 0x8000)
            .msix(3, (0, 0x2000), (0, 0x3000))
            .build()
            .unwrap();
        let device = fake.device().unwrap();
        let msix = InterruptKind::Msix;
        assert_eq!(device.interrupt_info(msix).unwrap().vectors, 3);
        let events = device.enable_interrupts(msix, 3).unwrap();
        assert!(fake.raise(msix, 1));
        device.trigger_interrupt(msix, 2).unwrap();
        let counts: Vec<u64> = events.iter().map(|event| event.take().unwrap()).collect();
        assert_eq!(counts, [0, 1, 1]);
        assert!(matches!(
            device.enable_interrupts(msix, 4),
            Err(Error::Unsupported { .. })
        ));
        // One of them goes elsewhere.
        let own = EventFd::new().unwrap();
        device
            .set_interrupts(msix, 1, &[Some(own.as_fd()), None])
            .unwrap();
        assert!(fake.raise(msix, 1));
        assert!(!fake.raise(msix, 2));
        assert_eq!(own.take().unwrap(), 1);
        device.disable_interrupts(msix).unwrap();
        assert!(!fake.raise(msix, 0));
        device.disable_interrupts(msix).unwrap();
        assert!(matches!(
            device.set_interrupts(msix, 3, &[None]),
            Err(Error::Invalid { .. })
        ));
    }

    #[test]
    fn an_owner_hears_that_its_device_is_wanted() {
        let fake = FakeDevice::builder().build().unwrap();
        let device = fake.device().unwrap();
        let request = device.enable_interrupt(InterruptKind::Request).unwrap();
        assert!(fake.raise(InterruptKind::Request, 0));
        assert_eq!(request.wait().unwrap(), 1);
        device.disable_interrupts(InterruptKind::Request).unwrap();
        assert!(!fake.raise(InterruptKind::Request, 0));
    }
}
