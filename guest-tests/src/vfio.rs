//! VFIO groups and devices, by raw ioctls (`linux/vfio.h`).

use std::{
    ffi::CString,
    fs::{File, OpenOptions},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use crate::{
    errno::{Answer, Errno, answer},
    observe,
    pci::{BARLEASE, Function},
};

const fn ioctl_number(number: u64) -> u64 {
    (b';' as u64) << 8 | (100 + number)
}

const SET_IOMMU: u64 = ioctl_number(2);
const GROUP_SET_CONTAINER: u64 = ioctl_number(4);
const GROUP_GET_DEVICE_FD: u64 = ioctl_number(6);
const GET_INFO: u64 = ioctl_number(7);
const GET_REGION_INFO: u64 = ioctl_number(8);
const GET_IRQ_INFO: u64 = ioctl_number(9);
const SET_IRQS: u64 = ioctl_number(10);
const RESET: u64 = ioctl_number(11);
const GET_HOT_RESET_INFO: u64 = ioctl_number(12);
const HOT_RESET: u64 = ioctl_number(13);
/// Of a container.
const MAP_DMA: u64 = ioctl_number(13);
/// Of a container.
const UNMAP_DMA: u64 = ioctl_number(14);
const FEATURE: u64 = ioctl_number(17);

const TYPE1V2_IOMMU: usize = 3;

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

/// Index of the MSI interrupts.
pub const MSI_IRQ: u32 = 1;
/// Index of the MSI-X interrupts.
pub const MSIX_IRQ: u32 = 2;
/// Index of the "interrupt" that tells of an error of the device.
pub const ERR_IRQ: u32 = 3;
/// Index of the "interrupt" that asks for the device back.
pub const REQUEST_IRQ: u32 = 4;
/// `vfio_irq_set`: no data.
pub const IRQ_DATA_NONE: u32 = 1 << 0;
/// `vfio_irq_set`: an eventfd an interrupt.
pub const IRQ_DATA_EVENTFD: u32 = 1 << 2;
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

/// `vfio_iommu_type1_dma_map`: the device may read.
pub const DMA_READ: u32 = 1 << 0;
/// `vfio_iommu_type1_dma_map`: the device may write.
pub const DMA_WRITE: u32 = 1 << 1;

/// A group with its container, which several may share.
#[derive(Debug)]
pub struct Group {
    file: File,
    container: Arc<File>,
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
        let container = read_write("/dev/vfio/vfio");
        let group = Self::attach(function, Arc::new(container));
        // SAFETY: The argument is a number.
        let set = unsafe { libc::ioctl(group.container.as_raw_fd(), SET_IOMMU, TYPE1V2_IOMMU) };
        answer(set).expect("set the IOMMU");
        group
    }

    /// The container.
    #[must_use]
    pub fn container(&self) -> BorrowedFd<'_> {
        self.container.as_fd()
    }

    /// Opens the group of another function, in the same container.
    ///
    /// # Panics
    ///
    /// When that does not work.
    #[must_use]
    pub fn beside(&self, function: &Function) -> Arc<Self> {
        Self::attach(function, Arc::clone(&self.container))
    }

    fn attach(function: &Function, container: Arc<File>) -> Arc<Self> {
        let file = read_write(&format!("/dev/vfio/{}", function.group()));
        let fd = container.as_raw_fd();
        // SAFETY: The argument is a pointer to a valid fd.
        let set = unsafe { libc::ioctl(file.as_raw_fd(), GROUP_SET_CONTAINER, &fd) };
        answer(set).expect("set the container");
        Arc::new(Self { file, container })
    }

    /// `VFIO_IOMMU_MAP_DMA` of memory of this process, from an address on.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn map_dma(&self, flags: u32, address: usize, iova: u64, len: u64) -> Answer<()> {
        let [address, iova, len] = [address as u64, iova, len].map(words);
        let mut map = [
            32, flags, address[0], address[1], iova[0], iova[1], len[0], len[1],
        ];
        ioctl_on(self.container.as_fd(), MAP_DMA, &mut map).map(drop)
    }

    /// `VFIO_IOMMU_UNMAP_DMA`: how many bytes were mapped there.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn unmap_dma(&self, iova: u64, len: u64) -> Answer<u64> {
        let [iova, len] = [iova, len].map(words);
        let mut unmap = [24, 0, iova[0], iova[1], len[0], len[1]];
        ioctl_on(self.container.as_fd(), UNMAP_DMA, &mut unmap)?;
        Ok(u64::from(unmap[4]) | u64::from(unmap[5]) << 32)
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
        Ok(Device {
            // SAFETY: The fd is new and nobody else's.
            file: File::from(unsafe { OwnedFd::from_raw_fd(fd) }),
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
    file: File,
    group: Arc<Group>,
    function: Function,
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
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
        Group::open(&function)
            .device(&function)
            .expect("open the device")
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

    /// Has the first interrupt of an index signal an eventfd.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn trigger(&self, index: u32, event: impl AsFd) -> Answer<()> {
        let flags = IRQ_DATA_EVENTFD | IRQ_ACTION_TRIGGER;
        self.set_irqs(index, flags, 1, &[event.as_fd().as_raw_fd()])
    }

    /// `VFIO_DEVICE_RESET`.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn reset(&self) -> Answer<()> {
        // SAFETY: The ioctl has no argument.
        answer(unsafe { libc::ioctl(self.file.as_raw_fd(), RESET) }).map(drop)
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
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), FEATURE, argument.as_mut_ptr()) };
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
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), FEATURE, address) };
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
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), FEATURE, address) };
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
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), FEATURE, address) };
        answer(result)
    }

    /// The ioctl with this number of VFIO, and any argument: it is as long as all that the kernel
    /// writes for any of them.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn raw_ioctl(&self, number: u64, argument: &mut [u8; 4096]) -> Answer<i32> {
        let fd = self.file.as_raw_fd();
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
        let fd = self.file.as_raw_fd();
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
        let fd = self.file.as_raw_fd();
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
        let read = self.file.read_at(bytes, at);
        read.map_err(|error| Errno::of(&error))
    }

    /// Writes to a region.
    ///
    /// # Errors
    ///
    /// That of the call.
    pub fn write(&self, region: u32, offset: u64, bytes: &[u8]) -> Answer<usize> {
        let at = u64::from(region) << 40 | offset;
        let written = self.file.write_at(bytes, at);
        written.map_err(|error| Errno::of(&error))
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
        let fd = self.file.as_raw_fd();
        // SAFETY: By the caller.
        answer(unsafe { libc::pwrite(fd, bytes.cast(), len, at as libc::off_t) })
    }

    /// COMMAND.
    #[must_use]
    pub fn command(&self) -> u16 {
        u16::from_le_bytes(self.config(COMMAND))
    }

    /// Writes COMMAND.
    pub fn set_command(&self, command: u16) {
        self.set_config(COMMAND, &command.to_le_bytes());
    }

    /// Turns memory decoding on or off.
    pub fn set_memory(&self, on: bool) {
        let command = self.command() & !COMMAND_MEMORY;
        self.set_command(if on {
            command | COMMAND_MEMORY
        } else {
            command
        });
    }

    /// The offset of a capability in config space.
    #[must_use]
    pub fn capability(&self, id: u8) -> Option<u64> {
        let [first] = self.config(0x34);
        let mut at = u64::from(first & !3);
        for _ in 0..48 {
            if at == 0 {
                return None;
            }
            let [this, next] = self.config(at);
            if this == id {
                return Some(at);
            }
            at = u64::from(next & !3);
        }
        None
    }

    /// The offset of PMCSR.
    ///
    /// # Panics
    ///
    /// When it has no power-management capability.
    #[must_use]
    pub fn pmcsr(&self) -> u64 {
        self.capability(0x01).expect("a PM capability") + 4
    }

    /// Asks for a power state, 0 to 3.
    pub fn set_power_state(&self, state: u16) {
        let [low, high]: [u8; 2] = self.config(self.pmcsr());
        let control = u16::from_le_bytes([low, high]) & !3 | state;
        self.set_config(self.pmcsr(), &control.to_le_bytes());
    }

    /// Its power state, 0 to 3.
    #[must_use]
    pub fn power_state(&self) -> u8 {
        let [low] = self.config(self.pmcsr());
        low & 3
    }
}

fn read_write(path: &str) -> File {
    let open = OpenOptions::new().read(true).write(true).open(path);
    open.unwrap_or_else(|error| panic!("open {path}: {error}"))
}

/// Two words of a structure, the lower first.
fn words(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
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
