//! The file of the ledger, in memory of the kernel.
//!
//! Its format is that of [`barlease_ledger::record`]. Every change is in the file when the call
//! returns: a killed daemon leaves all of it to its successor, which gets the descriptor.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use barlease_ledger::record::DATA;
use barlease_ledger::record::Header;
use barlease_ledger::record::Record;
use barlease_ledger::record::decode;
use rustix::fs::FallocateFlags;
use rustix::fs::MemfdFlags;

/// Bytes that no record begins with: a length of 0.
const GAP: usize = 8;
/// Bytes that are kept for records between writes.
const KEPT: usize = 64 << 10;

/// The ledger's file.
#[derive(Debug)]
pub struct Store {
    file: File,
    header: Header,
    /// Where the next record goes.
    end: u64,
    bytes: Vec<u8>,
}

impl Store {
    /// An empty ledger.
    ///
    /// # Errors
    ///
    /// Those of `memfd_create` and of writing.
    pub fn create() -> io::Result<Self> {
        let fd = rustix::fs::memfd_create("barleased-ledger", MemfdFlags::CLOEXEC)?;
        let store = Self {
            file: fd.into(),
            header: Header {
                generation: 0,
                start: DATA,
            },
            end: DATA,
            bytes: Vec::new(),
        };
        store.file.set_len(DATA)?;
        store.write_header()?;
        Ok(store)
    }

    /// Goes on with the file that an earlier daemon left, and says what is in it. A record that was
    /// being written is cut off.
    ///
    /// # Errors
    ///
    /// `InvalidData`: it is no ledger of this version, and is not changed; else those of the file.
    pub fn open(fd: OwnedFd) -> io::Result<(Self, Vec<Record>)> {
        let file = File::from(fd);
        let mut head = vec![0; DATA as usize];
        let no_ledger = || io::Error::new(io::ErrorKind::InvalidData, "no ledger of this version");
        file.read_exact_at(&mut head, 0).map_err(|error| {
            if error.kind() == io::ErrorKind::UnexpectedEof {
                return no_ledger();
            }
            error
        })?;
        let header = Header::find(&head).ok_or_else(no_ledger)?;
        let length = file.metadata()?.len();
        let rest = length.checked_sub(header.start).ok_or_else(no_ledger)?;
        let mut bytes = vec![0; usize::try_from(rest).map_err(io::Error::other)?];
        file.read_exact_at(&mut bytes, header.start)?;
        let (records, good) = decode(&bytes);
        let end = header.start + good as u64;
        file.set_len(end)?;
        let store = Self {
            file,
            header,
            end,
            bytes: Vec::new(),
        };
        Ok((store, records))
    }

    /// Appends a record.
    ///
    /// # Errors
    ///
    /// Those of writing. A record that was written in part is cut off.
    pub fn append(&mut self, record: &Record) -> io::Result<()> {
        self.add(record);
        self.flush()
    }

    /// Appends a record at the next [`Store::flush`], with all others that were added since the
    /// last one.
    pub fn add(&mut self, record: &Record) {
        record.encode(&mut self.bytes);
    }

    /// Writes what was added.
    ///
    /// # Errors
    ///
    /// Those of writing. A record that was written in part is cut off.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.bytes.is_empty() {
            return Ok(());
        }
        let written = self.file.write_all_at(&self.bytes, self.end);
        let length = self.bytes.len() as u64;
        self.bytes.clear();
        self.bytes.shrink_to(KEPT);
        if let Err(error) = written {
            self.file.set_len(self.end)?;
            return Err(error);
        }
        self.end += length;
        Ok(())
    }

    /// Puts records in the place of all that are there. After a kill in between, either all of the
    /// old ones count or all of the new ones.
    ///
    /// # Errors
    ///
    /// Those of writing: then the old ones still count.
    pub fn compact(&mut self, records: &[Record]) -> io::Result<()> {
        self.flush()?;
        let (old, end) = (self.header, self.end);
        let written = self.append_apart(records).and_then(|start| {
            self.header = Header {
                generation: old.generation + 1,
                start,
            };
            self.write_header()
        });
        if let Err(error) = written {
            self.header = old;
            self.end = end;
            self.file.set_len(end)?;
            return Err(error);
        }
        if end > DATA {
            // The headers stay.
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.file, punch, DATA, end - DATA)?;
        }
        Ok(())
    }

    /// Appends records that do not count until a header says so, and tells where they begin. A gap
    /// of zeros, which are no record, ends the old ones: a part of the new ones read after them
    /// would take the buffers from leases that have theirs.
    fn append_apart(&mut self, records: &[Record]) -> io::Result<u64> {
        self.file.write_all_at(&[0; GAP], self.end)?;
        self.end += GAP as u64;
        let start = self.end;
        self.append_all(records)?;
        Ok(start)
    }

    fn append_all(&mut self, records: &[Record]) -> io::Result<()> {
        for record in records {
            self.add(record);
        }
        self.flush()
    }

    fn write_header(&self) -> io::Result<()> {
        self.file
            .write_all_at(&self.header.encode(), self.header.place())
    }
}

impl AsFd for Store {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use barlease_ledger::types::LeaseId;

    use super::*;

    fn ended(lease: u64) -> Record {
        Record::Ended {
            lease: LeaseId(lease),
        }
    }

    fn fd(store: &Store) -> OwnedFd {
        store.as_fd().try_clone_to_owned().unwrap()
    }

    #[test]
    fn a_successor_reads_what_was_appended_and_goes_on() {
        let mut store = Store::create().unwrap();
        store.append(&ended(1)).unwrap();
        let (mut next, records) = Store::open(fd(&store)).unwrap();
        assert_eq!(records, [ended(1)]);
        next.append(&ended(2)).unwrap();
        let (_, records) = Store::open(fd(&next)).unwrap();
        assert_eq!(records, [ended(1), ended(2)]);
    }

    #[test]
    fn a_torn_record_is_cut_off_before_another_is_appended() {
        let mut store = Store::create().unwrap();
        store.append(&ended(1)).unwrap();
        let whole = store.end;
        store.append(&ended(2)).unwrap();
        store.file.set_len(store.end - 1).unwrap();
        let (mut next, records) = Store::open(fd(&store)).unwrap();
        assert_eq!((records, next.end), (vec![ended(1)], whole));
        next.append(&ended(3)).unwrap();
        let (_, records) = Store::open(fd(&next)).unwrap();
        assert_eq!(records, [ended(1), ended(3)]);
    }

    #[test]
    fn compacting_replaces_all_records_and_gives_memory_back() {
        let mut store = Store::create().unwrap();
        for lease in 0..20_000 {
            store.append(&ended(lease)).unwrap();
        }
        let before = rustix::fs::fstat(&store).unwrap().st_blocks;
        store.compact(&[ended(7)]).unwrap();
        store.append(&ended(8)).unwrap();
        let after = rustix::fs::fstat(&store).unwrap().st_blocks;
        assert!(after < before / 4, "{before} {after}");
        let (mut next, records) = Store::open(fd(&store)).unwrap();
        assert_eq!(records, [ended(7), ended(8)]);
        next.compact(&[]).unwrap();
        assert_eq!(Store::open(fd(&next)).unwrap().1, []);
    }

    #[test]
    fn a_kill_before_the_new_header_leaves_the_old_records_alone() {
        let mut store = Store::create().unwrap();
        store.append(&ended(1)).unwrap();
        store.append_apart(&[ended(2)]).unwrap();
        let (mut next, records) = Store::open(fd(&store)).unwrap();
        assert_eq!(records, [ended(1)]);
        next.append(&ended(3)).unwrap();
        let (_, records) = Store::open(fd(&next)).unwrap();
        assert_eq!(records, [ended(1), ended(3)]);
    }

    #[test]
    fn an_empty_ledger_is_compacted() {
        let mut store = Store::create().unwrap();
        store.compact(&[ended(1)]).unwrap();
        assert_eq!(Store::open(fd(&store)).unwrap().1, [ended(1)]);
    }

    #[test]
    fn what_is_no_ledger_is_refused_and_not_changed() {
        for length in [0, 10, DATA * 2] {
            let fd = rustix::fs::memfd_create("other", MemfdFlags::CLOEXEC).unwrap();
            let file = File::from(fd);
            file.set_len(length).unwrap();
            let error = Store::open(file.try_clone().unwrap().into()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            assert_eq!(file.metadata().unwrap().len(), length);
        }
    }
}
