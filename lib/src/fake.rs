//! A device that is none, for tests of drivers: the crate's feature `fake`.
//!
//! [`FakeDevice`] is a device of VFIO's with BARs of plain memory, config space, interrupts and
//! leases; [`FakeIommu`] is an address space in which the test does the DMA of the device. A driver
//! that was written for a [`Device`] runs on them unchanged, on any machine and without privileges.
//! The ioctls are answered in this process, by the descriptor that they are issued on; everything
//! else is memory, and so are registers: what the device does on a write is up to the test.
//!
//! Differences from a real device:
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

use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use crate::BarRange;
use crate::Bdf;
use crate::Device;
use crate::Error;
use crate::InterruptKind;
use crate::LeaseId;
use crate::Leases;
use crate::Reasons;
use crate::Result;
use crate::error::Object;
use crate::sys;

mod answers;
mod remote;
mod space;

use self::answers::Buffer;
use self::answers::Fake;
pub use self::remote::connect;
pub use self::space::FakeIommu;
use self::space::FakeSpace;

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
    sys::memory::memfd(name, length, MemfdFlags::empty())
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

    /// Its id in every iommufd.
    #[cfg(test)]
    pub(crate) fn iommufd_id(&self) -> u32 {
        self.fake().iommufd_id()
    }

    /// The page table that it is attached to, or that of its address space `pasid`.
    #[cfg(test)]
    pub(crate) fn page_table(&self, pasid: Option<u32>) -> Option<u32> {
        lock(&self.fake().state).page_tables.get(&pasid).copied()
    }

    /// Has every page of the list begin from the beginning, as no driver should.
    #[cfg(test)]
    pub(crate) fn repeat_list(&self) {
        lock(&self.fake().state).repeat = true;
    }
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
        // A mapping of a region asks nobody about aliases.
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
