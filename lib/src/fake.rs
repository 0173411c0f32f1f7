//! A device that is none, for tests of drivers: the crate's feature `fake`.
//!
//! [`FakeDevice`] is a device of VFIO's with BARs of plain memory, config space, interrupts and
//! leases; [`FakeIommu`] is an address space in which the test does the DMA of the device. A driver
//! that was written for a [`Device`] runs on them unchanged, on any machine and without privileges.
//! The ioctls are answered in this process, by the descriptor that they are issued on; everything
//! else is memory, and so are registers: what the device does on a write is up to the test.
//!
//! What differs from a real device:
//!
//! - the memory of a lease is a copy of the BAR's from when it was exported, and is not shared with
//!   it;
//! - a lease whose descriptors are all closed stays in the list;
//! - writes to COMMAND have no effect: [`FakeDevice::take_memory`] takes memory away.
//!
//! A device that several processes have, or that outlives the process that has it, is served by
//! [`FakeDevice::serve`] and reached by [`connect`].
//!
//! # Examples
//!
//! ```
//! use barlease::{InterruptKind, fake::FakeDevice};
//!
//! let fake = FakeDevice::builder().bar(0, 0x4000).msi(1).build()?;
//! let device = fake.device()?;
//!
//! // The driver.
//! let registers = device.map_region(0, ..)?;
//! let interrupt = device.enable_interrupt(InterruptKind::Msi)?;
//! registers.write(0x10, 7_u32)?;
//!
//! // The device.
//! let seen = fake.device()?.map_region(0, ..)?;
//! assert_eq!(seen.read::<u32>(0x10)?, 7);
//! assert!(fake.raise(InterruptKind::Msi, 0));
//!
//! assert_eq!(interrupt.wait()?, 1);
//! # Ok::<(), barlease::Error>(())
//! ```

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::IntoRawFd;
use std::os::fd::OwnedFd;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;
use std::sync::Weak;

use barlease_abi as abi;
use iommufd_bindings as iommufd;
use rustix::fs::MemfdFlags;
use rustix::fs::OFlags;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use crate::BarRange;
use crate::Bdf;
use crate::Device;
use crate::Error;
use crate::InterruptKind;
use crate::Iommu;
use crate::LeaseId;
use crate::Leases;
use crate::Reasons;
use crate::Result;
use crate::error::Object;
use crate::sys;

mod remote;

pub use self::remote::connect;

/// Where a region begins in the descriptor, as in VFIO.
const SHIFT: u32 = 40;
const CONFIG: u32 = vfio::VFIO_PCI_CONFIG_REGION_INDEX;
const CONFIG_SIZE: u64 = 4096;
/// Where an alias of BAR n is: region `ALIASES + n`.
const ALIASES: u32 = vfio::VFIO_PCI_NUM_REGIONS;
/// Where capabilities are in config space.
const EXPRESS: usize = 0x40;
const MSIX: usize = 0x80;
const MSI: usize = 0xa0;

/// Everything that was made and is still there, by device and inode number of its descriptor.
static ALL: Mutex<BTreeMap<Key, Weak<Thing>>> = Mutex::new(BTreeMap::new());

type Key = (u64, u64);

#[derive(Debug)]
enum Thing {
    Device(Fake),
    Iommu(FakeSpace),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn key(fd: BorrowedFd<'_>) -> Option<Key> {
    let stat = rustix::fs::fstat(fd).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

fn thing(fd: BorrowedFd<'_>) -> Option<Arc<Thing>> {
    let key = key(fd)?;
    lock(&ALL).get(&key)?.upgrade()
}

fn register(fd: BorrowedFd<'_>, thing: Thing) -> Result<Arc<Thing>> {
    let key = key(fd).ok_or_else(|| failed(Errno::BADF))?;
    let thing = Arc::new(thing);
    let mut all = lock(&ALL);
    all.retain(|_, thing| thing.strong_count() > 0);
    all.insert(key, Arc::downgrade(&thing));
    Ok(thing)
}

fn failed(errno: Errno) -> Error {
    Error::from_errno("make a fake", Object::Process, errno)
}

fn memfd(name: &str, length: u64) -> Result<OwnedFd, Errno> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&fd, length)?;
    Ok(fd)
}

/// Answers an ioctl that the kernel has not; `None` if the descriptor is none of ours.
pub(crate) fn ioctl(
    fd: BorrowedFd<'_>,
    number: u8,
    argument: &mut [u8],
) -> Option<Result<i32, Errno>> {
    let Some(thing) = thing(fd) else {
        return remote::ioctl(fd, number, argument);
    };
    let answer = match &*thing {
        Thing::Device(fake) => fake.ioctl(number, argument),
        Thing::Iommu(space) => space.ioctl(number, argument).map(Answer::Number),
    };
    Some(answer.map(Answer::into_number))
}

/// The answer of an ioctl: a number, or a new file.
#[derive(Debug)]
enum Answer {
    Number(i32),
    File(OwnedFd),
}

impl Answer {
    fn into_number(self) -> i32 {
        match self {
            Self::Number(number) => number,
            Self::File(file) => file.into_raw_fd(),
        }
    }
}

/// The address of a fake.
pub(crate) fn bdf_of(fd: BorrowedFd<'_>) -> Option<Bdf> {
    let Some(thing) = thing(fd) else {
        return remote::bdf_of(fd);
    };
    match &*thing {
        Thing::Device(fake) => Some(fake.bdf),
        Thing::Iommu(_) => None,
    }
}

/// The addresses that a fake allows, and their alignment: instead of an ioctl, whose argument has a
/// pointer.
pub(crate) fn iova_ranges(fd: BorrowedFd<'_>) -> Option<(Vec<(u64, u64)>, u64)> {
    match &*thing(fd)? {
        Thing::Device(_) => None,
        Thing::Iommu(_) => {
            let ranges = vec![(0, 0xfedf_ffff), (0xfef0_0000, u64::MAX - 0x1000)];
            Some((ranges, 4096))
        }
    }
}

/// An argument of an ioctl: fields by their offset. Those past the end read as 0, and are not
/// written.
struct Argument<'a>(&'a mut [u8]);

impl Argument<'_> {
    fn u32(&self, at: usize) -> u32 {
        let bytes = self.0.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u32::from_ne_bytes(*bytes))
    }

    fn u64(&self, at: usize) -> u64 {
        let bytes = self.0.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u64::from_ne_bytes(*bytes))
    }

    fn i32(&self, at: usize) -> i32 {
        self.u32(at) as i32
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.0.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    fn put_u32(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_ne_bytes());
    }

    fn put_u64(&mut self, at: usize, value: u64) {
        self.put(at, &value.to_ne_bytes());
    }
}

/// A duplicate of a descriptor that is known by number.
fn duplicate(fd: RawFd) -> Result<OwnedFd, Errno> {
    sys::inherited::duplicate(fd)
}

// ---- The device ---------------------------------------------------------------------------------

/// How to make a [`FakeDevice`].
#[derive(Clone, Debug)]
#[must_use = "nothing is made before `build` is called"]
pub struct FakeBuilder {
    bdf: Bdf,
    bars: [u64; 6],
    msi: u32,
    msix: u32,
    config: Vec<u8>,
}

impl FakeBuilder {
    fn new() -> Self {
        let mut config = vec![0; CONFIG_SIZE as usize];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(place) = config.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        // Red Hat's, of QEMU's test devices.
        put(0x00, &[0x36, 0x1b, 0xfa, 0xfe]);
        // COMMAND: memory. STATUS: has capabilities.
        put(0x04, &[0x02, 0x00, 0x10, 0x00]);
        // Class: none of the known ones.
        put(0x08, &[0x01, 0x00, 0x00, 0xff]);
        put(0x34, &[EXPRESS as u8]);
        // PCI Express 2, an endpoint, with function-level reset.
        put(EXPRESS, &[0x10, 0x00, 0x02, 0x00]);
        put(EXPRESS + 4, &(1u32 << 28).to_le_bytes());
        Self {
            bdf: Bdf::new(0, 0, 1, 0).unwrap_or_else(|| unreachable!("a possible address")),
            bars: [0; 6],
            msi: 0,
            msix: 0,
            config,
        }
    }

    /// Its address, which no device need have.
    pub fn bdf(mut self, bdf: Bdf) -> Self {
        self.bdf = bdf;
        self
    }

    /// A BAR, 0 to 5, of so many bytes, less than 1 TiB. Another number has no effect.
    pub fn bar(mut self, number: u8, size: u64) -> Self {
        if let Some(bar) = self.bars.get_mut(usize::from(number)) {
            *bar = size.min((1 << SHIFT) - 1);
        }
        self
    }

    /// So many MSI vectors, at most 32.
    pub fn msi(mut self, vectors: u8) -> Self {
        let vectors = vectors.clamp(1, 32);
        self.msi = vectors.into();
        self.capability(MSI, 0x05, &[0, 0]);
        self
    }

    /// So many MSI-X vectors, at most 2048, with table and pending bits at these BARs and offsets.
    pub fn msix(mut self, vectors: u16, table: (u8, u32), pending: (u8, u32)) -> Self {
        let vectors = vectors.clamp(1, 2048);
        self.msix = vectors.into();
        self.capability(MSIX, 0x11, &(vectors - 1).to_le_bytes());
        let place =
            |(bar, offset): (u8, u32)| (offset & !0b111 | u32::from(bar & 0b111)).to_le_bytes();
        self.put(MSIX + 4, &place(table));
        self.put(MSIX + 8, &place(pending));
        self
    }

    /// Bytes of config space.
    pub fn config(mut self, offset: u16, bytes: &[u8]) -> Self {
        self.put(offset.into(), bytes);
        self
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.config.get_mut(at..at.saturating_add(bytes.len())) {
            place.copy_from_slice(bytes);
        }
    }

    /// Puts a capability in the front of the chain.
    fn capability(&mut self, at: usize, id: u8, rest: &[u8]) {
        let first = self.config.get(0x34).copied().unwrap_or(0);
        self.put(at, &[id, if usize::from(first) == at { 0 } else { first }]);
        self.put(at + 2, rest);
        self.put(0x34, &[at as u8]);
    }

    /// Makes it.
    ///
    /// Errors: [`Error::Io`].
    pub fn build(self) -> Result<FakeDevice> {
        let length = (u64::from(ALIASES) + 6) << SHIFT;
        let memory = memfd("barlease-fake", length).map_err(failed)?;
        rustix::io::pwrite(&memory, &self.config, u64::from(CONFIG) << SHIFT).map_err(failed)?;
        let fake = Fake {
            bdf: self.bdf,
            bars: self.bars,
            vectors: [1, self.msi, self.msix, 1, 1],
            memory: memory
                .try_clone()
                .map_err(|e| Error::from_io("make a fake", Object::Process, e))?,
            state: Mutex::default(),
        };
        let thing = register(memory.as_fd(), Thing::Device(fake))?;
        Ok(FakeDevice { thing, memory })
    }
}

/// A device that is none: see the [module](self). Clones of its descriptor end with it.
#[derive(Debug)]
pub struct FakeDevice {
    thing: Arc<Thing>,
    memory: OwnedFd,
}

impl FakeDevice {
    /// Makes one with these BARs and interrupts.
    pub fn builder() -> FakeBuilder {
        FakeBuilder::new()
    }

    fn fake(&self) -> &Fake {
        match &*self.thing {
            Thing::Device(fake) => fake,
            Thing::Iommu(_) => unreachable!("made as a device"),
        }
    }

    /// Its address.
    #[must_use]
    pub fn bdf(&self) -> Bdf {
        self.fake().bdf
    }

    /// A descriptor of it, as if it were one of VFIO's.
    ///
    /// Errors: [`Error::Io`].
    pub fn fd(&self) -> Result<OwnedFd> {
        let fd = self.memory.try_clone();
        fd.map_err(|error| Error::from_io("duplicate", Object::Process, error))
    }

    /// The device that a driver is to be tested with.
    ///
    /// Errors: [`Error::Io`].
    pub fn device(&self) -> Result<Device> {
        Device::from_fd(self.fd()?)
    }

    /// Its leases.
    #[must_use]
    pub fn leases(&self) -> Leases<'_> {
        Leases::of(self.memory.as_fd(), self.bdf())
    }

    /// Signals an interrupt, and answers whether anybody listens.
    pub fn raise(&self, kind: InterruptKind, vector: u32) -> bool {
        let state = lock(&self.fake().state);
        let event = state.events.get(&(kind.index(), vector));
        event.is_some_and(|event| crate::event::signal(event.as_fd()).is_ok())
    }

    /// The ranges of its BAR that a lease has: LIST does not say them.
    #[must_use]
    pub fn ranges_of(&self, id: LeaseId) -> Vec<BarRange> {
        let state = lock(&self.fake().state);
        let buffer = state.buffers.get(&id.get());
        buffer.map_or_else(Vec::new, |buffer| buffer.places.clone())
    }

    /// Has the kernel forget leases: those that are dead without an importer, as those whose last
    /// descriptor is closed. Others stay.
    pub fn forget_dead(&self) {
        let mut state = lock(&self.fake().state);
        let stays = |buffer: &Buffer| !buffer.dead || buffer.importers > 0;
        state.buffers.retain(|_, buffer| stays(buffer));
    }

    /// How often it was reset.
    #[must_use]
    pub fn resets(&self) -> u32 {
        lock(&self.fake().state).resets
    }

    /// How many ioctls it has answered.
    #[must_use]
    pub fn ioctls(&self) -> u32 {
        lock(&self.fake().state).ioctls
    }

    /// Takes the memory of all leases away for a time: touches of their mappings raise SIGBUS.
    pub fn take_memory(&self, reasons: Reasons) {
        let mut state = lock(&self.fake().state);
        state.reasons = reasons.bits();
        for buffer in state.buffers.values_mut() {
            buffer.take();
        }
        state.tell();
    }

    /// Gives it back.
    pub fn give_memory(&self) {
        let mut state = lock(&self.fake().state);
        state.reasons = 0;
        for buffer in state.buffers.values_mut().filter(|buffer| !buffer.dead) {
            buffer.give();
        }
        state.tell();
    }

    /// Has so many importers hold a lease: one of which it is known that it was revoked drains
    /// until there is none.
    pub fn set_importers(&self, id: LeaseId, importers: u32) {
        let mut state = lock(&self.fake().state);
        if let Some(buffer) = state.buffers.get_mut(&id.get()) {
            buffer.importers = importers;
        }
        state.tell();
    }

    /// Has every page of the list begin from the beginning, as no driver should.
    #[cfg(test)]
    pub(crate) fn repeat_list(&self) {
        lock(&self.fake().state).repeat = true;
    }
}

#[derive(Debug)]
struct Fake {
    bdf: Bdf,
    bars: [u64; 6],
    /// By interrupt index.
    vectors: [u32; 5],
    memory: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By interrupt index and vector.
    events: BTreeMap<(u32, u32), OwnedFd>,
    /// By id.
    buffers: BTreeMap<u64, Buffer>,
    changes: Option<OwnedFd>,
    reasons: u32,
    /// BARs that have an alias, and whether somebody has asked about aliases.
    aliases: [bool; 6],
    asked: bool,
    resets: u32,
    ioctls: u32,
    repeat: bool,
}

impl State {
    /// Signals the eventfd for changes.
    fn tell(&self) {
        if let Some(event) = &self.changes {
            let _ = crate::event::signal(event.as_fd());
        }
    }
}

#[derive(Debug)]
struct Buffer {
    fd: OwnedFd,
    bar: u32,
    ranges: u32,
    places: Vec<BarRange>,
    size: u64,
    access: u32,
    memattr: u32,
    dead: bool,
    importers: u32,
    /// What was in it, while its memory is taken.
    saved: Option<Vec<u8>>,
}

impl Buffer {
    fn take(&mut self) {
        if self.saved.is_some() {
            return;
        }
        let mut bytes = vec![0; usize::try_from(self.size).unwrap_or(0)];
        let _ = rustix::io::pread(&self.fd, &mut bytes, 0);
        let _ = rustix::fs::ftruncate(&self.fd, 0);
        self.saved = Some(bytes);
    }

    fn give(&mut self) {
        if let Some(bytes) = self.saved.take() {
            let _ = rustix::fs::ftruncate(&self.fd, self.size);
            let _ = rustix::io::pwrite(&self.fd, &bytes, 0);
        }
    }

    fn revoke(&mut self) -> Result<(), Errno> {
        if self.dead {
            return Err(Errno::BADFD);
        }
        self.take();
        self.dead = true;
        Ok(())
    }

    fn state(&self) -> u32 {
        match (self.dead, &self.saved) {
            (true, _) => abi::STATE_DEAD,
            (false, Some(_)) => abi::STATE_REVOKED,
            (false, None) => abi::STATE_OK,
        }
    }
}

impl Fake {
    fn ioctl(&self, number: u8, bytes: &mut [u8]) -> Result<Answer, Errno> {
        let mut state = lock(&self.state);
        state.ioctls += 1;
        let mut argument = Argument(bytes);
        // Numbers of linux/vfio.h, less 100.
        let number = match number.wrapping_sub(vfio::VFIO_BASE as u8) {
            7 => self.info(&mut argument),
            8 => self.region(&state, &mut argument),
            9 => self.irq_info(&mut argument),
            10 => self.set_irqs(&mut state, &argument),
            11 => {
                state.resets += 1;
                Ok(0)
            }
            17 => return self.feature(&mut state, &mut argument),
            // Of a character device: bind, attach.
            18 | 19 => Ok(0),
            _ => Err(Errno::NOTTY),
        };
        number.map(Answer::Number)
    }

    fn info(&self, argument: &mut Argument<'_>) -> Result<i32, Errno> {
        let flags = vfio::VFIO_DEVICE_FLAGS_PCI | vfio::VFIO_DEVICE_FLAGS_RESET;
        argument.put_u32(offset_of!(vfio::vfio_device_info, flags), flags);
        argument.put_u32(
            offset_of!(vfio::vfio_device_info, num_regions),
            vfio::VFIO_PCI_NUM_REGIONS,
        );
        argument.put_u32(
            offset_of!(vfio::vfio_device_info, num_irqs),
            vfio::VFIO_PCI_NUM_IRQS,
        );
        Ok(0)
    }

    /// Size of a region, and the BAR that it is an alias of.
    fn size_of(&self, state: &State, index: u32) -> Option<(u64, Option<u32>)> {
        let bar = |index: u32| self.bars.get(index as usize).copied();
        match index {
            CONFIG => Some((CONFIG_SIZE, None)),
            0..ALIASES => Some((bar(index).unwrap_or(0), None)),
            _ => {
                let of = index - ALIASES;
                let there = state.aliases.get(of as usize).copied().unwrap_or(false);
                there.then(|| (bar(of).unwrap_or(0), Some(of)))
            }
        }
    }

    fn region(&self, state: &State, argument: &mut Argument<'_>) -> Result<i32, Errno> {
        type Info = vfio::vfio_region_info;
        const CAPABILITY: usize = 8 + size_of::<abi::RegionCapAlias>();
        let index = argument.u32(offset_of!(Info, index));
        let (size, alias_of) = self.size_of(state, index).ok_or(Errno::INVAL)?;
        let mut flags = vfio::VFIO_REGION_INFO_FLAG_READ | vfio::VFIO_REGION_INFO_FLAG_WRITE;
        let is_bar = size > 0 && index != CONFIG;
        if is_bar {
            flags |= vfio::VFIO_REGION_INFO_FLAG_MMAP;
        }
        let capability = match alias_of {
            Some(bar) => Some((abi::REGION_CAP_ALIAS, bar, abi::ALIAS_WC)),
            None if is_bar && state.asked => Some((abi::REGION_CAP_ALIASABLE, abi::ALIAS_WC, 0)),
            None => None,
        };
        argument.put_u64(offset_of!(Info, size), size);
        argument.put_u64(offset_of!(Info, offset), u64::from(index) << SHIFT);
        let begin = size_of::<Info>();
        if let Some((id, first, second)) = capability {
            flags |= vfio::VFIO_REGION_INFO_FLAG_CAPS;
            let room = argument.u32(0) as usize >= begin + CAPABILITY;
            argument.put_u32(0, (begin + CAPABILITY) as u32);
            let at = if room { begin } else { 0 };
            argument.put_u32(offset_of!(Info, cap_offset), at as u32);
            if room {
                argument.put(at, &id.to_ne_bytes());
                argument.put(at + 2, &abi::REGION_CAP_VERSION.to_ne_bytes());
                argument.put_u32(at + 4, 0);
                argument.put_u32(at + 8, first);
                argument.put_u32(at + 12, second);
            }
        }
        argument.put_u32(offset_of!(Info, flags), flags);
        Ok(0)
    }

    fn irq_info(&self, argument: &mut Argument<'_>) -> Result<i32, Errno> {
        type Info = vfio::vfio_irq_info;
        let index = argument.u32(offset_of!(Info, index));
        let count = self.vectors.get(index as usize).ok_or(Errno::INVAL)?;
        let flags = match index {
            vfio::VFIO_PCI_INTX_IRQ_INDEX => {
                vfio::VFIO_IRQ_INFO_MASKABLE | vfio::VFIO_IRQ_INFO_AUTOMASKED
            }
            vfio::VFIO_PCI_MSIX_IRQ_INDEX => 0,
            _ => vfio::VFIO_IRQ_INFO_NORESIZE,
        };
        argument.put_u32(offset_of!(Info, flags), flags | vfio::VFIO_IRQ_INFO_EVENTFD);
        argument.put_u32(offset_of!(Info, count), *count);
        Ok(0)
    }

    fn set_irqs(&self, state: &mut State, argument: &Argument<'_>) -> Result<i32, Errno> {
        type Set = vfio::vfio_irq_set;
        let flags = argument.u32(offset_of!(Set, flags));
        let index = argument.u32(offset_of!(Set, index));
        let start = argument.u32(offset_of!(Set, start));
        let count = argument.u32(offset_of!(Set, count));
        let has = *self.vectors.get(index as usize).ok_or(Errno::INVAL)?;
        let end = start.checked_add(count).filter(|end| *end <= has);
        let end = end.ok_or(Errno::INVAL)?;
        let trigger = flags & vfio::VFIO_IRQ_SET_ACTION_TRIGGER != 0;
        if !trigger && index != vfio::VFIO_PCI_INTX_IRQ_INDEX {
            return Err(Errno::NOTTY);
        }
        let data = flags & vfio::VFIO_IRQ_SET_DATA_EVENTFD != 0;
        if !trigger {
            // Masks and resamplers of an interrupt that nothing here raises by itself.
            return match state.events.contains_key(&(index, start)) {
                true => Ok(0),
                false => Err(Errno::INVAL),
            };
        }
        if !data && count == 0 {
            state.events.retain(|(its, _), _| *its != index);
            return Ok(0);
        }
        for vector in start..end {
            let key = (index, vector);
            if !data {
                let event = state.events.get(&key).ok_or(Errno::INVAL)?;
                crate::event::signal(event.as_fd())?;
                continue;
            }
            let at = offset_of!(Set, data) + (vector - start) as usize * 4;
            match argument.i32(at) {
                -1 => drop(state.events.remove(&key)),
                fd => drop(state.events.insert(key, duplicate(fd)?)),
            }
        }
        Ok(0)
    }

    fn feature(&self, state: &mut State, argument: &mut Argument<'_>) -> Result<Answer, Errno> {
        let flags = argument.u32(4);
        let index = (flags & vfio::VFIO_DEVICE_FEATURE_MASK) as u16;
        let operation = match index {
            abi::FEATURE_DMA_BUF
            | abi::FEATURE_DMA_BUF_STOCK
            | abi::FEATURE_ALIAS_REGION
            | abi::FEATURE_DMA_BUF_STATUS
            | abi::FEATURE_DMA_BUF_LIST => vfio::VFIO_DEVICE_FEATURE_GET,
            abi::FEATURE_DMA_BUF_REVOKE
            | abi::FEATURE_DMA_BUF_MEMATTR
            | abi::FEATURE_DMA_BUF_TPH
            | abi::FEATURE_DMA_BUF_REVOKE_ID
            | abi::FEATURE_EVENTS => vfio::VFIO_DEVICE_FEATURE_SET,
            _ => return Err(Errno::NOTTY),
        };
        if index == abi::FEATURE_ALIAS_REGION {
            state.asked = true;
        }
        if flags & operation == 0 {
            return Err(Errno::INVAL);
        }
        if flags & vfio::VFIO_DEVICE_FEATURE_PROBE != 0 {
            return Ok(Answer::Number(0));
        }
        // Behind the header.
        let mut payload = Argument(argument.0.get_mut(8..).unwrap_or(&mut []));
        let number = match index {
            abi::FEATURE_DMA_BUF | abi::FEATURE_DMA_BUF_STOCK => {
                return self.export(state, &payload).map(Answer::File);
            }
            abi::FEATURE_ALIAS_REGION => self.alias(state, &mut payload),
            abi::FEATURE_DMA_BUF_STATUS => {
                let reasons = state.reasons;
                let buffer = named(state, &payload)?;
                status(buffer, reasons, &mut payload);
                Ok(0)
            }
            abi::FEATURE_DMA_BUF_LIST => list(state, &mut payload),
            abi::FEATURE_DMA_BUF_REVOKE => {
                named(state, &payload)?.revoke()?;
                state.tell();
                Ok(0)
            }
            abi::FEATURE_DMA_BUF_REVOKE_ID => revoke_id(state, &payload),
            abi::FEATURE_DMA_BUF_MEMATTR => {
                let memattr = payload.u32(offset_of!(abi::DmaBufMemattr, memattr));
                if memattr > abi::MEMATTR_WC {
                    return Err(Errno::NOENT);
                }
                let buffer = named(state, &payload)?;
                if buffer.dead {
                    return Err(Errno::NODEV);
                }
                buffer.memattr = memattr;
                Ok(0)
            }
            abi::FEATURE_DMA_BUF_TPH => {
                if payload.0.get(11).is_some_and(|hint| *hint > 3) {
                    return Err(Errno::INVAL);
                }
                named(state, &payload).map(|_| 0)
            }
            _ => set_changes(state, &payload),
        };
        number.map(Answer::Number)
    }

    fn export(&self, state: &mut State, payload: &Argument<'_>) -> Result<OwnedFd, Errno> {
        type Get = abi::DmaBufGet;
        let bar = payload.u32(offset_of!(Get, region_index));
        let flags = payload.u32(offset_of!(Get, open_flags));
        let count = payload.u32(offset_of!(Get, nr_ranges));
        let size = match self.bars.get(bar as usize) {
            Some(size) if *size >= 4096 => *size,
            _ => return Err(Errno::NODEV),
        };
        if count > abi::MAX_RANGES {
            return Err(Errno::TOOBIG);
        }
        let mut contents = Vec::new();
        let mut places = Vec::new();
        for n in 0..count as usize {
            let at = size_of::<Get>() + n * size_of::<abi::DmaRange>();
            let offset = payload.u64(at + offset_of!(abi::DmaRange, offset));
            let length = payload.u64(at + offset_of!(abi::DmaRange, length));
            let end = offset.checked_add(length).filter(|end| *end <= size);
            if length == 0 || (offset | length) % 4096 != 0 || end.is_none() {
                return Err(Errno::INVAL);
            }
            let mut bytes = vec![0; usize::try_from(length).map_err(|_| Errno::NOMEM)?];
            rustix::io::pread(&self.memory, &mut bytes, (u64::from(bar) << SHIFT) + offset)?;
            contents.extend(bytes);
            places.push(BarRange { offset, length });
        }
        if contents.is_empty() {
            return Err(Errno::INVAL);
        }
        let length = contents.len() as u64;
        let fd = memfd("barlease-fake-lease", length)?;
        rustix::io::pwrite(&fd, &contents, 0)?;
        let access = flags & OFlags::RWMODE.bits();
        let given = if access == OFlags::RDONLY.bits() {
            // Another open file of the same inode.
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
            rustix::fs::open(
                path,
                OFlags::RDONLY | OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            )?
        } else {
            rustix::io::fcntl_dupfd_cloexec(&fd, 3)?
        };
        let (_, id) = key(fd.as_fd()).ok_or(Errno::BADF)?;
        let mut buffer = Buffer {
            fd,
            bar,
            ranges: count,
            places,
            size: length,
            access,
            memattr: abi::MEMATTR_NC,
            dead: false,
            importers: 0,
            saved: None,
        };
        if state.reasons != 0 {
            buffer.take();
        }
        state.buffers.insert(id, buffer);
        Ok(given)
    }

    fn alias(&self, state: &mut State, payload: &mut Argument<'_>) -> Result<i32, Errno> {
        type Alias = abi::AliasRegion;
        let bar = payload.u32(offset_of!(Alias, region_index));
        if bar >= ALIASES || payload.u32(offset_of!(Alias, mapping_flags)) != abi::ALIAS_WC {
            return Err(Errno::INVAL);
        }
        let size = self.bars.get(bar as usize).copied().unwrap_or(0);
        let alias = state.aliases.get_mut(bar as usize);
        match alias {
            Some(alias) if size >= 4096 => *alias = true,
            _ => return Err(Errno::NODEV),
        }
        payload.put_u32(offset_of!(Alias, alias_index), ALIASES + bar);
        Ok(0)
    }
}

/// The buffer that a payload names by its descriptor, which is in its first field.
fn named<'a>(state: &'a mut State, payload: &Argument<'_>) -> Result<&'a mut Buffer, Errno> {
    let fd = duplicate(payload.i32(0))?;
    let (_, id) = key(fd.as_fd()).ok_or(Errno::BADF)?;
    state.buffers.get_mut(&id).ok_or(Errno::INVAL)
}

fn status(buffer: &Buffer, reasons: u32, payload: &mut Argument<'_>) {
    type Status = abi::DmaBufStatus;
    let mut put = |at, value| payload.put_u32(at, value);
    put(offset_of!(Status, state), buffer.state());
    put(
        offset_of!(Status, reasons),
        if buffer.dead { 0 } else { reasons },
    );
    put(offset_of!(Status, memattr), buffer.memattr);
    put(offset_of!(Status, region_index), buffer.bar);
    put(offset_of!(Status, nr_ranges), buffer.ranges);
    put(offset_of!(Status, nr_attachments), buffer.importers);
    payload.put_u64(offset_of!(Status, size), buffer.size);
}

fn list(state: &State, payload: &mut Argument<'_>) -> Result<i32, Errno> {
    type List = abi::DmaBufList;
    type Record = abi::DmaBufRecord;
    let after = payload.u64(offset_of!(List, after));
    let room = payload
        .u32(offset_of!(List, nr_records))
        .min(abi::MAX_RECORDS) as usize;
    let step = payload.u32(offset_of!(List, record_size)) as usize;
    if step < size_of::<Record>() || payload.0.len() < size_of::<List>() + room * step {
        return Err(Errno::INVAL);
    }
    let after = if state.repeat { 0 } else { after };
    let mut rest = state.buffers.range(after.saturating_add(1)..);
    let mut last = after;
    let mut count = 0;
    for (id, buffer) in rest.by_ref().take(room) {
        let at = size_of::<List>() + count * step;
        payload.put(at, &vec![0; step]);
        let flags = match buffer.dead && buffer.importers > 0 {
            true => abi::BUFFER_DRAINING,
            false => 0,
        };
        let mut put = |field, value| payload.put_u32(at + field, value);
        put(offset_of!(Record, region_index), buffer.bar);
        put(offset_of!(Record, nr_ranges), buffer.ranges);
        put(offset_of!(Record, memattr), buffer.memattr);
        put(offset_of!(Record, state), buffer.state());
        put(
            offset_of!(Record, reasons),
            if buffer.dead { 0 } else { state.reasons },
        );
        put(offset_of!(Record, flags), flags);
        put(offset_of!(Record, nr_attachments), buffer.importers);
        put(offset_of!(Record, nr_mappings), buffer.importers);
        put(offset_of!(Record, access), buffer.access);
        payload.put_u64(at + offset_of!(Record, id), *id);
        payload.put_u64(at + offset_of!(Record, size), buffer.size);
        last = *id;
        count += 1;
    }
    let more = rest.next().is_some() || state.repeat;
    payload.put_u64(offset_of!(List, after), if more { last } else { 0 });
    payload.put_u32(offset_of!(List, nr_records), count as u32);
    payload.put_u32(offset_of!(List, record_size), size_of::<Record>() as u32);
    Ok(0)
}

fn revoke_id(state: &mut State, payload: &Argument<'_>) -> Result<i32, Errno> {
    let id = payload.u64(offset_of!(abi::DmaBufRevokeId, id));
    let flags = payload.u32(offset_of!(abi::DmaBufRevokeId, flags));
    if flags & !abi::REVOKE_NOWAIT != 0 {
        return Err(Errno::INVAL);
    }
    let buffer = state.buffers.get_mut(&id).ok_or(Errno::NOENT)?;
    buffer.revoke()?;
    let draining = buffer.importers > 0 && flags & abi::REVOKE_NOWAIT != 0;
    state.tell();
    if draining {
        return Err(Errno::INPROGRESS);
    }
    Ok(0)
}

fn set_changes(state: &mut State, payload: &Argument<'_>) -> Result<i32, Errno> {
    state.changes = match payload.i32(offset_of!(abi::Events, eventfd)) {
        -1 => None,
        fd => {
            let fd = duplicate(fd)?;
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
            let target = rustix::fs::readlink(path, Vec::new())?;
            if target.as_bytes() != b"anon_inode:[eventfd]" {
                return Err(Errno::INVAL);
            }
            Some(fd)
        }
    };
    Ok(0)
}

// ---- The address space --------------------------------------------------------------------------

/// An address space for DMA without an IOMMU: the test does the DMA.
///
/// # Examples
///
/// ```
/// use barlease::{DmaBuffer, fake::FakeIommu};
///
/// let fake = FakeIommu::new()?;
/// let buffer = DmaBuffer::new(&fake.iommu()?, 4096)?;
/// fake.write(buffer.iova(), b"completed")?;
/// assert_eq!(buffer.read::<u8>(0)?, b'c');
/// # Ok::<(), barlease::Error>(())
/// ```
#[derive(Debug)]
pub struct FakeIommu {
    thing: Arc<Thing>,
    fd: OwnedFd,
}

#[derive(Debug, Default)]
struct FakeSpace {
    state: Mutex<Space>,
}

#[derive(Debug, Default)]
struct Space {
    /// By first address.
    mapped: BTreeMap<u64, Mapped>,
    /// What the next `map` or `unmap` fails with.
    fails: Option<Errno>,
}

#[derive(Debug)]
struct Mapped {
    length: u64,
    file: OwnedFd,
    start: u64,
    readable: bool,
    writable: bool,
}

impl FakeIommu {
    /// Makes one. It allows all addresses but the highest page, and those of interrupts on x86.
    ///
    /// Errors: [`Error::Io`].
    pub fn new() -> Result<Self> {
        let fd = memfd("barlease-fake-iommu", 0).map_err(failed)?;
        let thing = register(fd.as_fd(), Thing::Iommu(FakeSpace::default()))?;
        Ok(Self { thing, fd })
    }

    fn space(&self) -> MutexGuard<'_, Space> {
        match &*self.thing {
            Thing::Iommu(space) => lock(&space.state),
            Thing::Device(_) => unreachable!("made as an address space"),
        }
    }

    /// The address space that a driver is to be tested with.
    ///
    /// Errors: [`Error::Io`].
    pub fn iommu(&self) -> Result<Iommu> {
        let fd = self.fd.try_clone();
        let fd = fd.map_err(|error| Error::from_io("duplicate", Object::Process, error))?;
        Iommu::from_iommufd(fd, None)
    }

    /// Reads what the device would read at an address.
    ///
    /// Errors: [`Error::Io`] with `EFAULT`: nothing is mapped there, or not for reading.
    pub fn read(&self, iova: u64, buffer: &mut [u8]) -> Result<()> {
        let space = self.space();
        let (mapped, position) = space.find(iova, buffer.len(), |mapped| mapped.readable)?;
        let answer = rustix::io::pread(&mapped.file, buffer, position);
        answer.map(drop).map_err(dma_failed)
    }

    /// Writes what the device would write at an address.
    ///
    /// Errors: [`Error::Io`] with `EFAULT`: nothing is mapped there, or not for writing.
    pub fn write(&self, iova: u64, bytes: &[u8]) -> Result<()> {
        let space = self.space();
        let (mapped, position) = space.find(iova, bytes.len(), |mapped| mapped.writable)?;
        let answer = rustix::io::pwrite(&mapped.file, bytes, position);
        answer.map(drop).map_err(dma_failed)
    }

    /// Has the next map or unmap fail with this error number.
    pub fn fail_next(&self, errno: i32) {
        self.space().fails = Some(Errno::from_raw_os_error(errno));
    }
}

fn dma_failed(errno: Errno) -> Error {
    Error::from_errno("DMA", Object::Iommu, errno)
}

impl Space {
    fn find(
        &self,
        iova: u64,
        length: usize,
        allowed: impl Fn(&Mapped) -> bool,
    ) -> Result<(&Mapped, u64)> {
        let (first, mapped) = self
            .mapped
            .range(..=iova)
            .next_back()
            .ok_or_else(|| dma_failed(Errno::FAULT))?;
        let within = iova - first;
        let end = within.checked_add(length as u64);
        if !allowed(mapped) || end.is_none_or(|end| end > mapped.length) {
            return Err(dma_failed(Errno::FAULT));
        }
        Ok((mapped, mapped.start + within))
    }
}

impl FakeSpace {
    fn ioctl(&self, number: u8, bytes: &mut [u8]) -> Result<i32, Errno> {
        let mut space = lock(&self.state);
        let mut argument = Argument(bytes);
        match u32::from(number) {
            iommufd::IOMMUFD_CMD_DESTROY => Ok(0),
            iommufd::IOMMUFD_CMD_IOAS_ALLOC => {
                argument.put_u32(offset_of!(iommufd::iommu_ioas_alloc, out_ioas_id), 1);
                Ok(0)
            }
            iommufd::IOMMUFD_CMD_IOAS_MAP_FILE => {
                space.fails.take().map_or(Ok(()), Err)?;
                map_file(&mut space, &argument)
            }
            iommufd::IOMMUFD_CMD_IOAS_UNMAP => {
                space.fails.take().map_or(Ok(()), Err)?;
                let iova = argument.u64(offset_of!(iommufd::iommu_ioas_unmap, iova));
                let mapped = space.mapped.remove(&iova).ok_or(Errno::NOENT)?;
                argument.put_u64(offset_of!(iommufd::iommu_ioas_unmap, length), mapped.length);
                Ok(0)
            }
            _ => Err(Errno::NOTTY),
        }
    }
}

fn map_file(space: &mut Space, argument: &Argument<'_>) -> Result<i32, Errno> {
    type Map = iommufd::iommu_ioas_map_file;
    let flags = argument.u32(offset_of!(Map, flags));
    let iova = argument.u64(offset_of!(Map, iova));
    let length = argument.u64(offset_of!(Map, length));
    let end = iova.checked_add(length).ok_or(Errno::OVERFLOW)?;
    let clash = space
        .mapped
        .range(..end)
        .next_back()
        .is_some_and(|(first, mapped)| first + mapped.length > iova);
    if clash {
        return Err(Errno::EXIST);
    }
    let mapped = Mapped {
        length,
        file: duplicate(argument.i32(offset_of!(Map, fd)))?,
        start: argument.u64(offset_of!(Map, start)),
        readable: flags & iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE != 0,
        writable: flags & iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE != 0,
    };
    space.mapped.insert(iova, mapped);
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryType;
    use crate::RegionKind;
    use crate::State as LeaseState;

    #[test]
    fn a_fake_is_reset_and_has_aliases() {
        let fake = FakeDevice::builder().bar(2, 0x2000).build().unwrap();
        let device = fake.device().unwrap();
        device.reset().unwrap();
        assert_eq!(fake.resets(), 1);
        // What maps a region asks nobody about aliases.
        device.map_region(2, ..).unwrap();
        let plain = device.handle().region(2).unwrap();
        assert!(plain.capabilities.is_empty());
        assert_eq!(
            device.region(2).unwrap().memory_types(),
            [MemoryType::Nc, MemoryType::Wc]
        );
        let index = device.alias_region(2, MemoryType::Wc).unwrap();
        let alias = device.region(index).unwrap();
        assert_eq!((alias.kind, alias.size), (RegionKind::Alias(2), 0x2000));
        assert_eq!(
            device.region(2).unwrap().memory_types(),
            [MemoryType::Nc, MemoryType::Wc]
        );
        assert!(device.alias_region(0, MemoryType::Wc).is_err());
        assert!(device.region(99).is_err());
    }

    #[test]
    fn a_lease_of_a_fake_is_lost_and_comes_back() {
        let fake = FakeDevice::builder().bar(0, 0x2000).build().unwrap();
        let device = fake.device().unwrap();
        device.write_region(0, 0x1000, &[7; 4]).unwrap();
        let lease = device.export(0).range(0x1000..0x2000).export().unwrap();
        let mapping = lease.map_guarded().unwrap();
        assert_eq!(mapping.read::<u32>(0).unwrap(), 0x0707_0707);
        fake.take_memory(Reasons::RESET);
        assert_eq!(device.status(&lease).unwrap().state, LeaseState::Revoked);
        assert!(mapping.read::<u32>(0).is_err());
        fake.give_memory();
        assert_eq!(device.status(&lease).unwrap().state, LeaseState::Ok);
        device.revoke(&lease).unwrap();
        assert_eq!(device.status(&lease).unwrap().state, LeaseState::Dead);
    }
}
