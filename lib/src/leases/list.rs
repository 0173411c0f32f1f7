//! The list of leases.

use std::collections::VecDeque;
use std::mem::offset_of;

use barlease_abi as abi;
use vfio_bindings::bindings::vfio;

use super::GET;
use super::LeaseId;
use super::memory_type;
use super::state;
use crate::Error;
use crate::MemoryType;
use crate::Reasons;
use crate::Result;
use crate::State;
use crate::device::Handle;
use crate::error::Object;
use crate::sys::ioctl;
use crate::sys::ioctl::Words;

/// Bytes of `struct vfio_device_feature`, of the fixed part of its payload, and of a record.
const HEADER: usize = 8;
const FIXED: usize = size_of::<abi::DmaBufList>();
const RECORD: usize = size_of::<abi::DmaBufRecord>();
/// Records that one call asks for.
const PAGE: usize = 128;

/// A lease as [`Leases::list`](crate::Leases::list) shows it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct LeaseRecord {
    /// Its id.
    pub id: LeaseId,
    /// The name that somebody gave it, else the one that the module did; `None` when it could not
    /// be read just now.
    pub name: Option<String>,
    /// The BAR.
    pub bar: u32,
    /// Bytes: the sum of the ranges.
    pub size: u64,
    /// Number of ranges.
    pub ranges: u32,
    /// Whether its descriptor can be mapped for writing.
    pub writable: bool,
    /// Memory type of mmaps made from now on.
    pub memory_type: MemoryType,
    /// Whether it is accessible.
    pub state: State,
    /// Why not, while revoked for a time.
    pub reasons: Reasons,
    /// No lease, but mappings of the BAR through the descriptor of the device.
    pub internal: bool,
    /// Revoked for good, and an importer is still to let go of it.
    pub draining: bool,
    /// Importers attached.
    pub attachments: u32,
    /// Mappings for DMA that importers have.
    pub dma_mappings: u32,
    /// Mappings in processes.
    pub mappings: u32,
    /// Those of them that are write-combining.
    pub wc_mappings: u32,
}

/// The leases of a device, page by page: see [`Leases::list`](crate::Leases::list).
#[derive(Debug)]
pub struct List<'fd> {
    handle: Handle<'fd>,
    /// The id of the last record that was fetched.
    after: u64,
    page: VecDeque<LeaseRecord>,
    /// Whether `page` is the last one.
    last: bool,
}

impl<'fd> List<'fd> {
    pub(super) fn new(handle: Handle<'fd>) -> Self {
        Self {
            handle,
            after: 0,
            page: VecDeque::new(),
            last: false,
        }
    }

    fn object(&self) -> Object {
        self.handle.object()
    }

    fn fetch(&mut self) -> Result<()> {
        const AT: usize = HEADER;
        let mut words = Words::zeroed(HEADER + FIXED + PAGE * RECORD);
        words.put_u32(
            offset_of!(vfio::vfio_device_feature, flags),
            u32::from(abi::FEATURE_DMA_BUF_LIST) | GET,
        );
        words.put_u64(AT + offset_of!(abi::DmaBufList, after), self.after);
        words.put_u32(AT + offset_of!(abi::DmaBufList, nr_records), PAGE as u32);
        words.put_u32(AT + offset_of!(abi::DmaBufList, record_size), RECORD as u32);
        ioctl::call_bytes(self.handle.fd, ioctl::DEVICE_FEATURE, &mut words)
            .map_err(|errno| self.handle.unsupported_or("list", self.object(), errno))?;

        let handle = self.handle;
        let (page, next) = page(&words, self.after, || handle.object())?;
        self.page = page;
        self.after = next.unwrap_or_default();
        self.last = next.is_none();
        Ok(())
    }
}

/// The records of an answer that begins behind the id `after`, and the id that the next page begins
/// behind.
fn page(
    words: &Words,
    after: u64,
    object: impl Fn() -> Object,
) -> Result<(VecDeque<LeaseRecord>, Option<u64>)> {
    let malformed = |reason: &'static str| Error::malformed("list", object(), reason);
    let count = words.u32(HEADER + offset_of!(abi::DmaBufList, nr_records)) as usize;
    let next = words.u64(HEADER + offset_of!(abi::DmaBufList, after));
    if count > PAGE {
        return Err(malformed("there are more records than were asked for"));
    }
    let mut page = VecDeque::with_capacity(count);
    let mut last = after;
    for n in 0..count {
        let record = record(words, HEADER + FIXED + n * RECORD, &object)?;
        if record.id.get() <= last {
            return Err(malformed("the ids do not ascend"));
        }
        last = record.id.get();
        page.push_back(record);
    }
    // Ends after an empty page as well, so that no answer makes the list go on for ever.
    if next == 0 || count == 0 {
        return Ok((page, None));
    }
    if next < last {
        return Err(malformed("the list goes back"));
    }
    Ok((page, Some(next)))
}

/// For [`crate::fuzzing`]: the ids of an answer, if it is one, and where the next page begins.
#[cfg(feature = "fuzzing")]
pub(crate) fn parse_list(answer: &[u8], after: u64) -> Option<(Vec<u64>, Option<u64>)> {
    let mut words = Words::zeroed(HEADER + FIXED + PAGE * RECORD);
    let places = (0..HEADER + FIXED + PAGE * RECORD).step_by(4);
    for (place, word) in places.zip(answer.chunks_exact(4)) {
        let word = word.try_into().unwrap_or_default();
        words.put_u32(place, u32::from_ne_bytes(word));
    }
    let (page, next) = page(&words, after, || Object::Process).ok()?;
    Some((page.iter().map(|record| record.id.get()).collect(), next))
}

impl Iterator for List<'_> {
    type Item = Result<LeaseRecord>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.page.is_empty() && !self.last {
            if let Err(error) = self.fetch() {
                self.last = true;
                return Some(Err(error));
            }
        }
        self.page.pop_front().map(Ok)
    }
}

impl std::iter::FusedIterator for List<'_> {}

/// The record at a byte offset of the answer.
fn record(words: &Words, at: usize, object: impl Fn() -> Object) -> Result<LeaseRecord> {
    let field = |offset| words.u32(at + offset);
    let flags = field(offset_of!(abi::DmaBufRecord, flags));
    let name: Vec<u8> = (0..32)
        .step_by(4)
        .flat_map(|n| field(offset_of!(abi::DmaBufRecord, name) + n).to_ne_bytes())
        .take_while(|byte| *byte != 0)
        .collect();
    Ok(LeaseRecord {
        id: LeaseId::new(words.u64(at + offset_of!(abi::DmaBufRecord, id))),
        name: (!name.is_empty()).then(|| String::from_utf8_lossy(&name).into_owned()),
        bar: field(offset_of!(abi::DmaBufRecord, region_index)),
        size: words.u64(at + offset_of!(abi::DmaBufRecord, size)),
        ranges: field(offset_of!(abi::DmaBufRecord, nr_ranges)),
        writable: field(offset_of!(abi::DmaBufRecord, access))
            == rustix::fs::OFlags::RDWR.bits() & rustix::fs::OFlags::RWMODE.bits(),
        memory_type: memory_type(
            "list",
            &object,
            field(offset_of!(abi::DmaBufRecord, memattr)),
        )?,
        state: state("list", &object, field(offset_of!(abi::DmaBufRecord, state)))?,
        reasons: Reasons::from_bits(field(offset_of!(abi::DmaBufRecord, reasons))),
        internal: flags & abi::BUFFER_INTERNAL != 0,
        draining: flags & abi::BUFFER_DRAINING != 0,
        attachments: field(offset_of!(abi::DmaBufRecord, nr_attachments)),
        dma_mappings: field(offset_of!(abi::DmaBufRecord, nr_mappings)),
        mappings: field(offset_of!(abi::DmaBufRecord, nr_vmas)),
        wc_mappings: field(offset_of!(abi::DmaBufRecord, nr_wc_vmas)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Lease;
    use crate::fake::FakeDevice;

    fn fake() -> FakeDevice {
        FakeDevice::builder().bar(0, 64 << 10).build().unwrap()
    }

    #[test]
    fn a_long_list_is_walked_page_by_page() {
        let fake = fake();
        let leases = fake.leases();
        assert_eq!(leases.list().count(), 0);
        let many: Vec<Lease> = (0..PAGE * 2 + 3)
            .map(|_| leases.export(0).range(0..0x1000).export().unwrap())
            .collect();
        let before = fake.ioctls();
        let listed: Vec<LeaseId> = leases.list().map(|record| record.unwrap().id).collect();
        assert_eq!(fake.ioctls() - before, 3);
        let mut expected: Vec<LeaseId> = many.iter().map(|l| LeaseId::of(l).unwrap()).collect();
        expected.sort_unstable();
        assert_eq!(listed, expected);
    }

    #[test]
    fn a_record_says_what_the_lease_is() {
        let fake = fake();
        let leases = fake.leases();
        let lease = leases
            .export(0)
            .range(0..0x1000)
            .range(0x3000..0x5000)
            .read_only()
            .export()
            .unwrap();
        leases.set_memory_type(&lease, MemoryType::Wc).unwrap();
        let record = leases.list().next().unwrap().unwrap();
        assert_eq!(record.id, LeaseId::of(&lease).unwrap());
        assert_eq!((record.bar, record.size, record.ranges), (0, 0x3000, 2));
        assert_eq!(
            (record.state, record.memory_type),
            (State::Ok, MemoryType::Wc)
        );
        assert!(!record.writable && !record.internal && !record.draining);
        fake.take_memory(Reasons::RESET);
        let record = leases.list().next().unwrap().unwrap();
        assert_eq!(
            (record.state, record.reasons),
            (State::Revoked, Reasons::RESET)
        );
    }

    #[test]
    fn a_list_that_goes_back_is_refused() {
        let fake = fake();
        let leases = fake.leases();
        let _lease = leases.export(0).range(0..0x1000).export().unwrap();
        fake.repeat_list();
        let last = leases.list().last().unwrap();
        assert!(matches!(last, Err(Error::Malformed { .. })), "{last:?}");
    }
}
