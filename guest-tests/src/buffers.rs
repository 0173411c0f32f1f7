//! The features of the contract that go by the id of a buffer: LIST, REVOKE_ID, EVENTS.

use std::{
    fs,
    io::{Read, Write},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use barlease_abi::{
    BUFFER_NAME_BUSY, DmaBufList, DmaBufRecord, FEATURE_DMA_BUF_LIST, FEATURE_DMA_BUF_REVOKE_ID,
    FEATURE_EVENTS, REVOKE_NOWAIT,
};

use crate::{
    errno::Answer,
    lease::duplicate,
    process,
    vfio::{Device, GET, SET},
    wait::{self, A_WHILE, LONG},
};

/// Bytes of a record of the contract's second edition.
pub const RECORD: u32 = size_of::<DmaBufRecord>() as u32;
/// Bytes of the fixed part of LIST's payload.
pub const HEAD: usize = size_of::<DmaBufList>();

/// A request of LIST, to be spoilt by a test.
#[derive(Clone, Copy, Debug)]
pub struct List {
    /// The fixed part.
    pub head: DmaBufList,
    /// Records that there is room for, whatever is announced.
    pub room: u32,
}

/// The answer of LIST.
#[derive(Clone, Debug)]
pub struct Listed {
    /// The fixed part.
    pub head: DmaBufList,
    /// All that there was room for, filled in or not.
    pub bytes: Vec<u8>,
}

impl List {
    /// A request for so many records of buffers with an id over `after`.
    #[must_use]
    pub fn new(after: u64, nr_records: u32) -> Self {
        Self {
            head: DmaBufList {
                after,
                nr_records,
                record_size: RECORD,
            },
            room: nr_records,
        }
    }

    /// With this size of a record.
    #[must_use]
    pub fn record_size(mut self, bytes: u32) -> Self {
        self.head.record_size = bytes;
        self
    }

    /// With room for so many records.
    #[must_use]
    pub fn room(mut self, records: u32) -> Self {
        self.room = records;
        self
    }

    /// Its bytes: all that is room for records is `fill`.
    #[must_use]
    pub fn bytes(&self, fill: u8) -> Vec<u8> {
        let mut bytes = head_bytes(&self.head).to_vec();
        let room = self.room as usize * self.head.record_size as usize;
        bytes.resize(HEAD + room, fill);
        bytes
    }
}

/// The bytes of the fixed part.
#[must_use]
pub fn head_bytes(head: &DmaBufList) -> [u8; HEAD] {
    let mut bytes = [0; HEAD];
    bytes[..8].copy_from_slice(&head.after.to_ne_bytes());
    bytes[8..12].copy_from_slice(&head.nr_records.to_ne_bytes());
    bytes[12..].copy_from_slice(&head.record_size.to_ne_bytes());
    bytes
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn head_of(bytes: &[u8]) -> DmaBufList {
    DmaBufList {
        after: long(bytes, 0),
        nr_records: word(bytes, 8),
        record_size: word(bytes, 12),
    }
}

/// A record, from its bytes.
///
/// # Panics
///
/// When there are too few.
#[must_use]
pub fn record(bytes: &[u8]) -> DmaBufRecord {
    DmaBufRecord {
        id: long(bytes, 0),
        size: long(bytes, 8),
        region_index: word(bytes, 16),
        nr_ranges: word(bytes, 20),
        memattr: word(bytes, 24),
        state: word(bytes, 28),
        reasons: word(bytes, 32),
        flags: word(bytes, 36),
        nr_attachments: word(bytes, 40),
        nr_mappings: word(bytes, 44),
        nr_vmas: word(bytes, 48),
        nr_wc_vmas: word(bytes, 52),
        access: word(bytes, 56),
        reserved: word(bytes, 60),
        name: bytes[64..96].try_into().expect("32 bytes"),
    }
}

/// The name in a record.
#[must_use]
pub fn name(record: &DmaBufRecord) -> String {
    let bytes = record.name.split(|&byte| byte == 0).next();
    String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
}

impl Listed {
    /// The records that were copied, as many bytes apart as was asked for.
    #[must_use]
    pub fn records(&self, apart: u32) -> Vec<DmaBufRecord> {
        let all = self.bytes.chunks_exact(apart as usize).map(record);
        all.take(self.head.nr_records as usize).collect()
    }
}

impl Device {
    /// `BARLEASE_FEATURE_DMA_BUF_LIST`.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn list(&self, list: &List) -> Answer<Listed> {
        let mut payload = list.bytes(0xa5);
        self.feature(GET | u32::from(FEATURE_DMA_BUF_LIST), &mut payload)?;
        Ok(Listed {
            head: head_of(&payload),
            bytes: payload.split_off(HEAD),
        })
    }

    /// A walk over all buffers, so many a call.
    ///
    /// # Panics
    ///
    /// When it does not work, does not come to an end, or is not in ascending order.
    #[must_use]
    pub fn records_by(&self, at_a_time: u32) -> Vec<DmaBufRecord> {
        let mut all: Vec<DmaBufRecord> = Vec::new();
        let mut after = 0;
        loop {
            let listed = self.list(&List::new(after, at_a_time)).expect("LIST");
            assert_eq!(listed.head.record_size, RECORD);
            assert!(listed.head.nr_records <= at_a_time);
            let records = listed.records(RECORD);
            let ids = all
                .last()
                .into_iter()
                .chain(&records)
                .map(|record| record.id);
            assert!(ids.clone().is_sorted_by(|one, next| one < next), "order");
            assert!(records.iter().all(|record| record.id > after));
            all.extend(records);
            if listed.head.after == 0 {
                return all;
            }
            let last = all.last().map_or(0, |record| record.id);
            assert!(listed.head.after >= last, "it would begin again");
            assert!(listed.head.after > after, "no progress");
            after = listed.head.after;
        }
    }

    /// All buffers.
    ///
    /// # Panics
    ///
    /// When LIST does not work.
    #[must_use]
    pub fn records(&self) -> Vec<DmaBufRecord> {
        self.records_by(64)
    }

    /// The record of a buffer, if there is one.
    ///
    /// # Panics
    ///
    /// When LIST does not work.
    #[must_use]
    pub fn find_record(&self, id: u64) -> Option<DmaBufRecord> {
        let listed = self.list(&List::new(id - 1, 1)).expect("LIST");
        let found = listed.records(RECORD).into_iter().next();
        found.filter(|record| record.id == id)
    }

    /// The record of a buffer.
    ///
    /// # Panics
    ///
    /// When there is none.
    #[must_use]
    pub fn record(&self, fd: impl AsFd) -> DmaBufRecord {
        self.find_record(id_of(fd)).expect("a record")
    }

    /// The flags of the buffer of `fd` in LIST, without [`BUFFER_NAME_BUSY`]: another thread, as
    /// the module's own, may be at the dma-buf at any moment.
    ///
    /// # Panics
    ///
    /// As [`Self::record`].
    #[must_use]
    pub fn buffer_flags(&self, fd: impl AsFd) -> u32 {
        self.record(fd).flags & !BUFFER_NAME_BUSY
    }

    /// `BARLEASE_FEATURE_DMA_BUF_REVOKE_ID` with anything in the payload.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn revoke_id_raw(&self, id: u64, flags: u32, reserved: u32) -> Answer<()> {
        let mut payload = [0; 16];
        payload[..8].copy_from_slice(&id.to_ne_bytes());
        payload[8..12].copy_from_slice(&flags.to_ne_bytes());
        payload[12..].copy_from_slice(&reserved.to_ne_bytes());
        self.feature(SET | u32::from(FEATURE_DMA_BUF_REVOKE_ID), &mut payload)
            .map(drop)
    }

    /// REVOKE by id.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn revoke_id(&self, id: u64) -> Answer<()> {
        self.revoke_id_raw(id, 0, 0)
    }

    /// The same without waiting for importers.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn revoke_nowait(&self, id: u64) -> Answer<()> {
        self.revoke_id_raw(id, REVOKE_NOWAIT, 0)
    }

    /// `BARLEASE_FEATURE_EVENTS` with any number, and anything in the reserved field.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn events_number(&self, fd: i32, reserved: u32) -> Answer<()> {
        let mut payload = [0; 8];
        payload[..4].copy_from_slice(&fd.to_ne_bytes());
        payload[4..].copy_from_slice(&reserved.to_ne_bytes());
        self.feature(SET | u32::from(FEATURE_EVENTS), &mut payload)
            .map(drop)
    }

    /// A new eventfd for what happens from now on.
    ///
    /// # Panics
    ///
    /// When that is refused.
    #[must_use]
    pub fn events(&self) -> Events {
        let fd = process::eventfd();
        self.events_number(fd.as_raw_fd(), 0).expect("EVENTS");
        Events(fd)
    }
}

/// An eventfd that was given to EVENTS.
#[derive(Debug)]
pub struct Events(pub OwnedFd);

impl Events {
    /// The count that was added since the last look, if any.
    #[must_use]
    pub fn taken(&self) -> u64 {
        let mut bytes = [0; 8];
        match fs::File::from(duplicate(&self.0)).read_exact(&mut bytes) {
            Ok(()) => u64::from_ne_bytes(bytes),
            Err(_) => 0,
        }
    }

    /// Adds one to it, as an event does.
    ///
    /// # Panics
    ///
    /// When it is full.
    pub fn add(&self) {
        let mut file = fs::File::from(duplicate(&self.0));
        file.write_all(&1u64.to_ne_bytes()).expect("an eventfd");
    }

    /// Forgets what was signalled, until nothing comes any more.
    pub fn settle(&self) {
        while process::is_signalled_within(&self.0, A_WHILE) {
            let _ = self.taken();
        }
    }

    /// Waits for a signal, and takes it.
    ///
    /// # Panics
    ///
    /// When none comes for [`LONG`].
    pub fn expect(&self, what: &str) {
        assert!(
            process::is_signalled_within(&self.0, LONG),
            "no event for {what}"
        );
        assert!(self.taken() > 0);
    }

    /// Looks whether none comes for [a while](A_WHILE).
    ///
    /// # Panics
    ///
    /// When one does.
    pub fn expect_none(&self, what: &str) {
        assert!(
            !process::is_signalled_within(&self.0, A_WHILE),
            "an event for {what}"
        );
    }

    /// Waits for a signal after which that is so. Looks only after a signal, as a program does that
    /// polls nothing.
    ///
    /// # Panics
    ///
    /// When there is none for [`LONG`].
    pub fn until(&self, what: &str, mut so: impl FnMut() -> bool) {
        loop {
            self.expect(what);
            if so() {
                return;
            }
        }
    }
}

/// The id of a buffer: the inode number of its dma-buf.
///
/// # Panics
///
/// When it cannot be had.
#[must_use]
pub fn id_of(fd: impl AsFd) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let file = fs::File::from(duplicate(fd));
    file.metadata().expect("fstat").ino()
}

/// Waits until a buffer has disappeared from LIST.
///
/// # Panics
///
/// When it does not.
pub fn wait_until_gone(device: &Device, id: u64) {
    wait::until("a buffer to go", || device.find_record(id).is_none());
}
