//! VFIO groups and devices.
//!
//! The acts of a driver go through the library. By raw ioctls (`linux/vfio.h`) go requests whose
//! errno tests look at, that are wrong on purpose, or that are compared with the stock driver byte
//! by byte.

use std::{
    ffi::CString,
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use barlease::{DmaAccess, DmaMapping, InterruptKind, Iommu, OpenOptions, config};

use crate::{
    errno::{Answer, Errno, answer, answered},
    observe,
    pci::{BARLEASE, Function},
};

/// Turns memory decoding on or off of a device that the library has opened.
///
/// # Panics
///
/// When config space cannot be read or written.
pub fn set_memory(device: &barlease::Device, on: bool) {
    let config = device.config().expect("config space");
    config
        .update_command(|mut command| {
            command.set(config::Command::MEMORY, on);
            command
        })
        .expect("write COMMAND");
}

const fn ioctl_number(number: u64) -> u64 {
    (b';' as u64) << 8 | (100 + number)
}

const GROUP_GET_DEVICE_FD: u64 = ioctl_number(6);
const GET_INFO: u64 = ioctl_number(7);
const GET_REGION_INFO: u64 = ioctl_number(8);
const GET_IRQ_INFO: u64 = ioctl_number(9);
const SET_IRQS: u64 = ioctl_number(10);
const GET_HOT_RESET_INFO: u64 = ioctl_number(12);
const HOT_RESET: u64 = ioctl_number(13);
const FEATURE: u64 = ioctl_number(17);

/// `VFIO_DEVICE_FEATURE`: read.
pub const GET: u32 = 1 << 16;
/// `VFIO_DEVICE_FEATURE`: write.
pub const SET: u32 = 1 << 17;
/// `VFIO_DEVICE_FEATURE`: only ask.
pub const PROBE: u32 = 1 << 18;

/// Feature: the token without which the virtual functions of a physical function are not opened.
pub const VF_TOKEN: u32 = 0;
/// Feature: enter low power.
pub const LOW_POWER_ENTRY: u32 = 3;
/// Feature: enter low power until something wakes the device.
pub const LOW_POWER_ENTRY_WITH_WAKEUP: u32 = 4;
/// Feature: leave low power.
pub const LOW_POWER_EXIT: u32 = 5;

/// Region index of config space.
pub const CONFIG_REGION: u32 = 7;
/// Region index of the option ROM.
pub const ROM_REGION: u32 = 6;
/// Region index of VGA memory.
pub const VGA_REGION: u32 = 8;

/// Index of the interrupt pin.
pub const INTX_IRQ: u32 = 0;
/// Index of the MSI interrupts.
pub const MSI_IRQ: u32 = 1;
/// Index of the MSI-X interrupts.
pub const MSIX_IRQ: u32 = 2;
/// `vfio_irq_set`: no data.
pub const IRQ_DATA_NONE: u32 = 1 << 0;
/// `vfio_irq_set`: an eventfd an interrupt.
pub const IRQ_DATA_EVENTFD: u32 = 1 << 2;
/// They are not to come any more.
pub const IRQ_ACTION_MASK: u32 = 1 << 3;
/// `vfio_irq_set`: make it do the action.
pub const IRQ_ACTION_TRIGGER: u32 = 1 << 5;

/// COMMAND in config space.
pub const COMMAND: u64 = 0x04;
/// The memory bit of COMMAND.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// The bus-master bit of COMMAND.
pub const COMMAND_MASTER: u16 = 1 << 2;
/// The bit of COMMAND that disables INTx.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;

/// An ioctl of a device or group on a structure whose first field is its size.
fn ioctl_on(fd: BorrowedFd<'_>, number: u64, argument: &mut [u32]) -> Answer<i32> {
    assert!(argument[0] as usize <= size_of_val(argument));
    // SAFETY: The kernel writes at most `argsz` bytes, which `argument` has, and any number in it
    // is valid.
    answer(unsafe { libc::ioctl(fd.as_raw_fd(), number, argument.as_mut_ptr()) })
}

/// A group with its container, which several may share.
#[derive(Debug)]
pub struct Group {
    file: OwnedFd,
    iommu: Iommu,
}

impl Group {
    /// Opens the group of a function.
    ///
    /// # Panics
    ///
    /// When that does not work: the group is open elsewhere, or not viable.
    #[must_use]
    pub fn open(function: &Function) -> Arc<Self> {
        observe::mark_test();
        Self::attach(function, Iommu::container().expect("a container"))
    }

    /// The container.
    #[must_use]
    pub fn iommu(&self) -> &Iommu {
        &self.iommu
    }

    /// Opens the group of another function, in the same container.
    ///
    /// # Panics
    ///
    /// When that does not work.
    #[must_use]
    pub fn beside(&self, function: &Function) -> Arc<Self> {
        Self::attach(function, self.iommu.clone())
    }

    fn attach(function: &Function, iommu: Iommu) -> Arc<Self> {
        let number = function.group();
        let path = format!("/dev/vfio/{number}");
        let file = File::options().read(true).write(true).open(&path);
        let file = file.unwrap_or_else(|error| panic!("open {path}: {error}"));
        let again = file.try_clone().expect("another descriptor");
        let number = number.parse().expect("the number of a group");
        iommu
            .add_group(number, again)
            .expect("add the group to the container");
        Arc::new(Self {
            file: file.into(),
            iommu,
        })
    }

    /// Maps memory of this process for DMA, from an address on.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn map_dma(
        &self,
        access: DmaAccess,
        address: usize,
        iova: u64,
        len: u64,
    ) -> Answer<DmaMapping> {
        let address = std::ptr::with_exposed_provenance_mut(address);
        // SAFETY: The tests map BARs and leases, to which there are no references.
        answered(unsafe { self.iommu.map_memory(address, len, iova, access) })
    }

    /// Opens a device of the group.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn device(self: &Arc<Self>, function: &Function) -> Answer<Device> {
        self.device_called(function, &function.bdf)
    }

    /// Opens a virtual function with the token that its physical function was given.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn device_with_token(self: &Arc<Self>, function: &Function, token: &str) -> Answer<Device> {
        self.device_called(function, &format!("{} vf_token={token}", function.bdf))
    }

    fn device_called(self: &Arc<Self>, function: &Function, name: &str) -> Answer<Device> {
        let name = CString::new(name).expect("a name");
        let fd = self.file.as_raw_fd();
        // SAFETY: The argument is a C string.
        let fd = answer(unsafe { libc::ioctl(fd, GROUP_GET_DEVICE_FD, name.as_ptr()) })?;
        // SAFETY: The fd is new and nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let bdf = function.bdf.parse().expect("an address");
        let device = answered(barlease::Device::from_fd_of(fd, bdf))?;
        Ok(Device {
            device: device.with_iommu(&self.iommu),
            group: Arc::clone(self),
            function: function.clone(),
        })
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// An open device. Closed when dropped, unless something else holds it open.
#[derive(Debug)]
pub struct Device {
    device: barlease::Device,
    group: Arc<Group>,
    function: Function,
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

/// The answer of `VFIO_DEVICE_GET_REGION_INFO`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// `VFIO_REGION_INFO_FLAG_*`.
    pub flags: u32,
    /// Bytes.
    pub size: u64,
    /// Where it is in the device fd.
    pub offset: u64,
    /// Capabilities: id, version, payload.
    pub capabilities: Vec<(u16, u16, Vec<u8>)>,
}

/// A function of a reset set: group, segment, bus, devfn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResetMember {
    /// Number of its group.
    pub group: u32,
    /// Bus and function.
    pub bus: u8,
    /// Device and function number.
    pub devfn: u8,
}

impl Device {
    /// Binds the machine's device `name` to our driver if it is not, and opens it.
    ///
    /// # Panics
    ///
    /// When that does not work.
    #[must_use]
    pub fn open(name: &str) -> Self {
        Self::open_with(name, BARLEASE)
    }

    /// Binds the machine's device `name` to `driver` if it is not, and opens it.
    ///
    /// # Panics
    ///
    /// When that does not work.
    #[must_use]
    pub fn open_with(name: &str, driver: &str) -> Self {
        let function = Function::named(name);
        function.bind(driver);
        let group = Group::open(&function);
        let bdf = function.bdf.parse().expect("an address");
        let options = OpenOptions::new().iommu(&group.iommu);
        Self {
            device: options.open(bdf).expect("open the device"),
            group,
            function,
        }
    }

    /// Its function.
    #[must_use]
    pub fn function(&self) -> &Function {
        &self.function
    }

    /// Its group.
    #[must_use]
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// Flags, number of regions and number of interrupt indexes.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn info(&self) -> Answer<(u32, u32, u32)> {
        let mut info = [20, 0, 0, 0, 0];
        ioctl_on(self.as_fd(), GET_INFO, &mut info)?;
        Ok((info[1], info[2], info[3]))
    }

    /// The description of region `index`.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn region_info(&self, index: u32) -> Answer<RegionInfo> {
        const HEADER: usize = 32;
        let mut info = [0; 256];
        info[0] = HEADER as u32;
        info[2] = index;
        ioctl_on(self.as_fd(), GET_REGION_INFO, &mut info)?;
        if info[0] as usize > HEADER {
            let size = info[0];
            info = [0; 256];
            info[0] = size;
            info[2] = index;
            ioctl_on(self.as_fd(), GET_REGION_INFO, &mut info)?;
        }
        let bytes: Vec<u8> = info.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let long = |at: usize| u64::from(info[at]) | u64::from(info[at + 1]) << 32;
        Ok(RegionInfo {
            flags: info[1],
            size: long(4),
            offset: long(6),
            capabilities: capabilities(&bytes[..info[0] as usize], info[3] as usize),
        })
    }

    /// Flags and number of the interrupts of an index.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn irq_info(&self, index: u32) -> Answer<(u32, u32)> {
        let mut info = [16, 0, index, 0];
        ioctl_on(self.as_fd(), GET_IRQ_INFO, &mut info)?;
        Ok((info[1], info[3]))
    }

    /// `VFIO_DEVICE_SET_IRQS` from interrupt 0 on.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn set_irqs(&self, index: u32, flags: u32, count: u32, data: &[i32]) -> Answer<()> {
        let mut set = vec![20 + size_of_val(data) as u32, flags, index, 0, count];
        set.extend(data.iter().map(|word| *word as u32));
        ioctl_on(self.as_fd(), SET_IRQS, &mut set).map(drop)
    }

    /// Has the first interrupt of a kind signal an eventfd.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn trigger(&self, kind: InterruptKind, event: impl AsFd) -> Answer<()> {
        answered(self.device.set_interrupts(kind, 0, &[Some(event.as_fd())]))
    }

    /// `VFIO_DEVICE_RESET`.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn reset(&self) -> Answer<()> {
        answered(self.device.reset())
    }

    /// The functions that a hot reset of this one resets.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn hot_reset_info(&self) -> Answer<Vec<ResetMember>> {
        let mut info = [0; 64];
        info[0] = size_of_val(&info) as u32;
        ioctl_on(self.as_fd(), GET_HOT_RESET_INFO, &mut info)?;
        let members = info[3..].chunks(2).take(info[2] as usize);
        Ok(members
            .map(|member| {
                let [_, _, bus, devfn] = member[1].to_ne_bytes();
                ResetMember {
                    group: member[0],
                    bus,
                    devfn,
                }
            })
            .collect())
    }

    /// `VFIO_DEVICE_PCI_HOT_RESET`, with the groups as proof of ownership.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn hot_reset(&self, groups: &[&Group]) -> Answer<()> {
        let count = groups.len() as u32;
        let mut reset = vec![12 + 4 * count, 0, count];
        reset.extend(groups.iter().map(|group| group.file.as_raw_fd() as u32));
        ioctl_on(self.as_fd(), HOT_RESET, &mut reset).map(drop)
    }

    /// `VFIO_DEVICE_FEATURE` with this payload, which may be written to.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn feature(&self, flags: u32, payload: &mut [u8]) -> Answer<i32> {
        let argsz = 8 + payload.len() as u32;
        self.feature_sized(flags, payload, argsz)
    }

    /// The same, with an `argsz` of at most what is there.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn feature_sized(&self, flags: u32, payload: &mut [u8], argsz: u32) -> Answer<i32> {
        let mut argument = vec![0u8; 8];
        argument[..4].copy_from_slice(&argsz.to_ne_bytes());
        argument[4..].copy_from_slice(&flags.to_ne_bytes());
        argument.extend_from_slice(payload);
        assert!(argsz as usize <= argument.len());
        // SAFETY: The kernel writes at most `argsz` bytes, which `argument` has.
        let result =
            unsafe { libc::ioctl(self.as_fd().as_raw_fd(), FEATURE, argument.as_mut_ptr()) };
        payload.copy_from_slice(&argument[8..]);
        answer(result)
    }

    /// The same with `announced` bytes of payload of which only `readable` are in memory.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    ///
    /// # Panics
    ///
    /// When there is no memory left, or `readable` is over a page.
    pub fn feature_at_edge(&self, flags: u32, readable: &[u8], announced: u32) -> Answer<i32> {
        let edge = crate::map::Edge::new();
        let mut argument = vec![0u8; 8];
        argument[..4].copy_from_slice(&(8 + announced).to_ne_bytes());
        argument[4..].copy_from_slice(&flags.to_ne_bytes());
        argument.extend_from_slice(readable);
        let address = edge.put(&argument);
        // SAFETY: The kernel finds the argument and then no memory: it cannot write elsewhere.
        let result = unsafe { libc::ioctl(self.as_fd().as_raw_fd(), FEATURE, address) };
        answer(result)
    }

    /// The same with memory that another thread changes meanwhile. It begins with two words for the
    /// header, which are filled in here.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    ///
    /// # Panics
    ///
    /// When there are no words behind them.
    pub fn feature_shared(&self, flags: u32, payload: &[AtomicU32]) -> Answer<i32> {
        let [argsz, its_flags, rest @ ..] = payload else {
            panic!("no place for the header");
        };
        argsz.store(size_of_val(payload) as u32, Ordering::Relaxed);
        its_flags.store(flags, Ordering::Relaxed);
        assert!(!rest.is_empty());
        let address = payload.as_ptr();
        // SAFETY: The kernel reads and writes at most `argsz` bytes of memory that is there and may
        // change.
        let result = unsafe { libc::ioctl(self.as_fd().as_raw_fd(), FEATURE, address) };
        answer(result)
    }

    /// The same with a payload that can be read and not written.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn feature_read_only(&self, flags: u32, payload: &[u8]) -> Answer<i32> {
        let edge = crate::map::Edge::new();
        let mut argument = vec![0u8; 8];
        argument[..4].copy_from_slice(&(8 + payload.len() as u32).to_ne_bytes());
        argument[4..].copy_from_slice(&flags.to_ne_bytes());
        argument.extend_from_slice(payload);
        let address = edge.put(&argument);
        edge.make_read_only();
        // SAFETY: The kernel finds the argument and cannot write.
        let result = unsafe { libc::ioctl(self.as_fd().as_raw_fd(), FEATURE, address) };
        answer(result)
    }

    /// The ioctl with this number of VFIO, and any argument: it is as long as all that the kernel
    /// writes for any of them.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn raw_ioctl(&self, number: u64, argument: &mut [u8; 4096]) -> Answer<i32> {
        let fd = self.as_fd().as_raw_fd();
        // SAFETY: Of these structures the kernel writes what it knows, whatever `argsz` says: less
        // than a page. Nothing in them is an address.
        answer(unsafe { libc::ioctl(fd, ioctl_number(number), argument.as_mut_ptr()) })
    }

    /// Reads from a region to memory that is not there.
    ///
    /// # Errors
    ///
    /// That of the call.
    pub fn read_to_nowhere(&self, region: u32, offset: u64, len: usize) -> Answer<isize> {
        let edge = crate::map::Edge::new();
        let nowhere = edge.put(&[]);
        let at = u64::from(region) << 40 | offset;
        let fd = self.as_fd().as_raw_fd();
        // SAFETY: The kernel finds no memory.
        answer(unsafe { libc::pread(fd, nowhere.cast(), len, at as libc::off_t) })
    }

    /// Writes to a region from memory of which `readable` bytes are there, and what follows is not.
    ///
    /// # Errors
    ///
    /// That of the call.
    pub fn write_from_edge(
        &self,
        region: u32,
        offset: u64,
        readable: usize,
        len: usize,
    ) -> Answer<isize> {
        let edge = crate::map::Edge::new();
        let bytes = edge.put(&vec![0; readable]);
        let at = u64::from(region) << 40 | offset;
        let fd = self.as_fd().as_raw_fd();
        // SAFETY: The kernel reads what is there, and then finds no memory.
        answer(unsafe { libc::pwrite(fd, bytes.cast(), len, at as libc::off_t) })
    }

    /// Reads from a region.
    ///
    /// # Errors
    ///
    /// That of the call.
    pub fn read(&self, region: u32, offset: u64, bytes: &mut [u8]) -> Answer<usize> {
        let at = u64::from(region) << 40 | offset;
        let read = rustix::io::pread(self, bytes, at);
        read.map_err(|errno| Errno(errno.raw_os_error()))
    }

    /// Writes to a region.
    ///
    /// # Errors
    ///
    /// That of the call.
    pub fn write(&self, region: u32, offset: u64, bytes: &[u8]) -> Answer<usize> {
        let at = u64::from(region) << 40 | offset;
        let written = rustix::io::pwrite(self, bytes, at);
        written.map_err(|errno| Errno(errno.raw_os_error()))
    }

    /// Reads four bytes of a region.
    ///
    /// # Panics
    ///
    /// When that does not work.
    #[must_use]
    pub fn read32(&self, region: u32, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        let read = self.read(region, offset, &mut bytes);
        assert_eq!(read, Ok(4), "region {region}, offset {offset:#x}");
        u32::from_ne_bytes(bytes)
    }

    /// Writes four bytes of a region.
    ///
    /// # Panics
    ///
    /// When that does not work.
    pub fn write32(&self, region: u32, offset: u64, value: u32) {
        let written = self.write(region, offset, &value.to_ne_bytes());
        assert_eq!(written, Ok(4), "region {region}, offset {offset:#x}");
    }

    /// Reads config space.
    ///
    /// # Panics
    ///
    /// When that does not work.
    #[must_use]
    pub fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let read = self.read(CONFIG_REGION, offset, &mut bytes);
        assert_eq!(read, Ok(N), "config space {offset:#x}");
        bytes
    }

    /// Writes config space.
    ///
    /// # Panics
    ///
    /// When that does not work.
    pub fn set_config(&self, offset: u64, bytes: &[u8]) {
        let written = self.write(CONFIG_REGION, offset, bytes);
        assert_eq!(written, Ok(bytes.len()), "config space {offset:#x}");
    }

    /// Writes config space from memory that another thread changes meanwhile.
    ///
    /// # Panics
    ///
    /// When that does not work, or `len` is over 8.
    pub fn write_config_shared(&self, offset: u64, bytes: &AtomicU64, len: usize) {
        assert!(len <= size_of_val(bytes));
        // SAFETY: The kernel reads `len` bytes of memory that is there and may change.
        let written = unsafe { self.pwrite_config(offset, bytes.as_ptr().cast(), len) };
        assert_eq!(written, Ok(len as isize), "config space {offset:#x}");
    }

    /// Writes config space from memory that is not there.
    ///
    /// # Errors
    ///
    /// That of the call.
    pub fn write_config_from_nowhere(&self, offset: u64, len: usize) -> Answer<isize> {
        let edge = crate::map::Edge::new();
        let nowhere = edge.put(&[]);
        // SAFETY: The kernel finds no memory.
        unsafe { self.pwrite_config(offset, nowhere, len) }
    }

    /// # Safety
    ///
    /// The kernel must be allowed to read `len` bytes at `bytes`, if they are there.
    unsafe fn pwrite_config(&self, offset: u64, bytes: *const u8, len: usize) -> Answer<isize> {
        let at = u64::from(CONFIG_REGION) << 40 | offset;
        let fd = self.as_fd().as_raw_fd();
        // SAFETY: By the caller.
        answer(unsafe { libc::pwrite(fd, bytes.cast(), len, at as libc::off_t) })
    }

    fn config_space(&self) -> config::ConfigSpace<'_> {
        self.device.config().expect("config space")
    }

    /// COMMAND.
    ///
    /// # Panics
    ///
    /// When config space cannot be read.
    #[must_use]
    pub fn command(&self) -> u16 {
        self.config_space().command().expect("COMMAND").bits()
    }

    /// Writes COMMAND.
    ///
    /// # Panics
    ///
    /// When config space cannot be written.
    pub fn set_command(&self, command: u16) {
        let command = config::Command::from_bits_retain(command);
        self.config_space()
            .set_command(command)
            .expect("write COMMAND");
    }

    /// Turns memory decoding on or off, by a write in any case.
    pub fn set_memory(&self, on: bool) {
        let command = self.command() & !COMMAND_MEMORY;
        self.set_command(if on {
            command | COMMAND_MEMORY
        } else {
            command
        });
    }

    /// The offset of a capability in config space.
    ///
    /// # Panics
    ///
    /// When config space cannot be read.
    #[must_use]
    pub fn capability(&self, id: u8) -> Option<u64> {
        let found = self.config_space().capability(id).expect("the chain");
        found.map(u64::from)
    }

    /// The offset of PMCSR.
    ///
    /// # Panics
    ///
    /// When it has no power-management capability.
    #[must_use]
    pub fn pmcsr(&self) -> u64 {
        self.capability(config::Capability::POWER_MANAGEMENT)
            .expect("a PM capability")
            + 4
    }

    /// Asks for a power state, 0 to 3.
    ///
    /// # Panics
    ///
    /// When config space cannot be written.
    pub fn set_power_state(&self, state: u16) {
        let (config, at) = (self.config_space(), self.pmcsr());
        let control = config.read_u16(at).expect("PMCSR") & !3 | state;
        config.write_u16(at, control).expect("write PMCSR");
    }

    /// Its power state, 0 to 3.
    ///
    /// # Panics
    ///
    /// When it has no power-management capability.
    #[must_use]
    pub fn power_state(&self) -> u8 {
        let power = self.config_space().power_management().expect("the chain");
        power.expect("a PM capability").state
    }
}

/// The capability chain of a region's info.
fn capabilities(info: &[u8], first: usize) -> Vec<(u16, u16, Vec<u8>)> {
    let word = |at: usize| u16::from_ne_bytes([info[at], info[at + 1]]);
    let mut at = first;
    let mut starts = Vec::new();
    while at != 0 {
        starts.push(at);
        at = usize::from(word(at + 4)) | usize::from(word(at + 6)) << 16;
    }
    starts
        .iter()
        .map(|&start| {
            // A capability ends where another begins, or at the end.
            let after = starts.iter().copied().filter(|&other| other > start);
            let end = after.min().unwrap_or(info.len());
            (word(start), word(start + 2), info[start + 8..end].to_vec())
        })
        .collect()
}
