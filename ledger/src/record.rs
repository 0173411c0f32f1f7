//! The ledger: records that are appended to one file, and never changed.
//!
//! A record stands in the file before what it says is done: the intent before the export, the grant
//! before the answer, the beginning of an end before the revocation. So after a kill between any
//! two instructions the ledger says at least as much as has happened (see `Core::recover`).
//!
//! # The file
//!
//! | offset | bytes | content |
//! |---|---|---|
//! | 0 and 64 | 28 | two [`Header`]s, of which the newer good one counts |
//! | [`DATA`] | | records, from [`Header::start`] on |
//!
//! A header is magic `BLLG`, version, generation, start (4, 4, 8 and 8 bytes) and a checksum of
//! these; a record is its length and the checksum of its payload (4 bytes each) and the payload.
//! All numbers are little-endian, checksums CRC-32, payloads postcard. Variants are added to
//! [`Record`] at its end, fields never: a newer service reads what an older one has left.
//!
//! To compact it, append 8 bytes of 0, which end the records of before, and the records that are
//! still of use; then write the other header with their place as its start; then give the space
//! before it back (the file is sparse). Nothing is lost by a kill in between. Without the zeros a
//! part of the new records would be read after the old ones, and an intent among them would take
//! the buffer from a lease that is granted.

use std::sync::Arc;

use serde::Deserialize;
use serde::Serialize;

use crate::types::Access;
use crate::types::BufferId;
use crate::types::EndReason;
use crate::types::LeaseId;
use crate::types::Lifetime;
use crate::types::MemoryType;
use crate::types::Millis;
use crate::types::Peer;
use crate::types::Ranges;
use crate::types::Time;
use crate::types::Tph;

/// Something that happened, or is about to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Record {
    /// Leases up to this one have been.
    LastLease(LeaseId),
    /// Somebody who has leases.
    Holder(Arc<Holder>),
    /// A lease is about to be exported.
    Intent(Box<Intent>),
    /// It has been exported.
    Granted {
        /// The lease.
        lease: LeaseId,
        /// Its buffer.
        buffer: BufferId,
    },
    /// It lives longer, or shorter.
    Renewed {
        /// The lease.
        lease: LeaseId,
        /// Until then.
        expires: Time,
    },
    /// It is taken back, at the latest then. It will not be forgotten.
    Reclaiming {
        /// The lease.
        lease: LeaseId,
        /// When it is revoked.
        deadline: Time,
        /// Why.
        reason: EndReason,
    },
    /// It is no more, and its ranges are free.
    Ended {
        /// The lease.
        lease: LeaseId,
    },
}

/// A connection, as what it leaves in the ledger.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Holder {
    /// Its number in the ledger, never used again.
    pub id: u64,
    /// Its credentials.
    pub peer: Peer,
    /// The secret with which it comes back after a restart of the service; 0: none.
    pub token: u128,
}

/// All that is known of a lease before it is exported.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Intent {
    /// The lease.
    pub lease: LeaseId,
    /// Number of its holder, whose record came before.
    pub holder: u64,
    /// Name of its pool.
    pub pool: Arc<str>,
    /// Name of its device.
    pub device: Arc<str>,
    /// Its BAR.
    pub bar: u8,
    /// Its ranges.
    pub ranges: Ranges,
    /// Its rights.
    pub access: Access,
    /// Its memory type.
    pub memory_type: MemoryType,
    /// Its steering tags.
    pub tph: Option<Tph>,
    /// The end that it lives to.
    pub lifetime: Lifetime,
    /// When it was granted.
    pub since: Time,
    /// When it expires.
    pub expires: Time,
    /// How long before a reclaim its holder is told.
    pub grace: Millis,
}

/// Where records may begin.
pub const DATA: u64 = 4096;
/// Where the two headers are.
pub const HEADERS: [u64; 2] = [0, 64];
/// Bytes of a header.
pub const HEADER_SIZE: usize = 28;

const MAGIC: [u8; 4] = *b"BLLG";
const VERSION: u32 = 1;
/// A lease has at most 65,536 ranges of at most 20 bytes.
const MAX_PAYLOAD: usize = 2 << 20;

/// Which records count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Counts compactions.
    pub generation: u64,
    /// Offset of the first record.
    pub start: u64,
}

impl Header {
    /// Where in the file it is written: in turns, so that the one before stays.
    #[must_use]
    pub fn place(&self) -> u64 {
        HEADERS[usize::from(self.generation % 2 == 1)]
    }

    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&VERSION.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.generation.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.start.to_le_bytes());
        let sum = crc32fast::hash(&bytes[..24]);
        bytes[24..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// The one that counts, of a file that begins with these bytes; `None` if there is none of this
    /// version.
    #[must_use]
    pub fn find(file: &[u8]) -> Option<Self> {
        let headers = HEADERS.iter().filter_map(|at| {
            let bytes = file.get(*at as usize..)?.first_chunk::<HEADER_SIZE>()?;
            let header = Self {
                generation: u64::from_le_bytes(*bytes[8..].first_chunk()?),
                start: u64::from_le_bytes(*bytes[16..].first_chunk()?),
            };
            (header.encode() == *bytes && header.start >= DATA).then_some(header)
        });
        headers.max_by_key(|header| header.generation)
    }
}

impl Record {
    /// Appends it to bytes that go to the end of the file.
    pub fn encode(&self, bytes: &mut Vec<u8>) {
        let begin = bytes.len();
        bytes.extend([0; 8]);
        // A vector takes everything, and these types can all be written.
        let Ok(mut written) = postcard::to_extend(self, std::mem::take(bytes)) else {
            return;
        };
        let payload = &written[begin + 8..];
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let sum = crc32fast::hash(payload);
        written[begin..begin + 4].copy_from_slice(&length.to_le_bytes());
        written[begin + 4..begin + 8].copy_from_slice(&sum.to_le_bytes());
        *bytes = written;
    }
}

/// The records at the beginning of these bytes, and how many bytes they have.
///
/// The rest is the tail of a record that was being written, and is to be cut off before
/// anything is appended; or bytes that somebody has damaged, and whatever stood behind them is
/// lost: its buffers are then revoked as unknown.
#[must_use]
pub fn decode(bytes: &[u8]) -> (Vec<Record>, usize) {
    let mut records = Vec::new();
    let mut at = 0;
    while let Some((record, length)) = decode_one(&bytes[at..]) {
        records.push(record);
        at += length;
    }
    (records, at)
}

fn decode_one(bytes: &[u8]) -> Option<(Record, usize)> {
    let length = u32::from_le_bytes(*bytes.first_chunk()?) as usize;
    let sum = u32::from_le_bytes(*bytes.get(4..)?.first_chunk()?);
    if length > MAX_PAYLOAD {
        return None;
    }
    let payload = bytes.get(8..8 + length)?;
    if length == 0 || crc32fast::hash(payload) != sum {
        return None;
    }
    let (record, rest) = postcard::take_from_bytes(payload).ok()?;
    rest.is_empty().then_some((record, 8 + length))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::types::Range;

    fn intent(ranges: u64) -> Record {
        let list = (0..ranges).map(|n| Range {
            offset: (u64::MAX >> 1) + n,
            length: u64::MAX,
        });
        Record::Intent(Box::new(Intent {
            lease: LeaseId(7),
            holder: 3,
            pool: "rows".into(),
            device: "card".into(),
            bar: 2,
            ranges: Ranges::from_list(list.collect()).unwrap(),
            access: Access::ReadWrite,
            memory_type: MemoryType::WriteCombining,
            tph: Some(Tph {
                tag: Some(0),
                extended: None,
                hint: 3,
            }),
            lifetime: Lifetime::Cgroup,
            since: Time(1),
            expires: Time::NEVER,
            grace: Millis(5000),
        }))
    }

    fn some() -> Vec<Record> {
        vec![
            Record::LastLease(LeaseId(6)),
            Record::Holder(Arc::new(Holder {
                id: 3,
                peer: Peer {
                    uid: 1001,
                    gid: 100,
                    groups: [7, 8].into(),
                    pid: 42,
                    process: Some(crate::types::ProcessId(99)),
                    cgroup: None,
                    cgroup_path: "/a".into(),
                    unit: "a.service".into(),
                    claim: Some("c".into()),
                },
                token: u128::MAX - 1,
            })),
            intent(1),
            Record::Granted {
                lease: LeaseId(7),
                buffer: BufferId(1 << 60),
            },
            Record::Renewed {
                lease: LeaseId(7),
                expires: Time(5),
            },
            Record::Reclaiming {
                lease: LeaseId(7),
                deadline: Time(9),
                reason: EndReason::Expired,
            },
            Record::Ended { lease: LeaseId(7) },
        ]
    }

    fn encoded(records: &[Record]) -> Vec<u8> {
        let mut bytes = Vec::new();
        records.iter().for_each(|record| record.encode(&mut bytes));
        bytes
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = encoded(&some());
        assert_eq!(decode(&bytes), (some(), bytes.len()));
        let largest = [intent(crate::types::MAX_RANGES as u64)];
        let bytes = encoded(&largest);
        assert_eq!(decode(&bytes), (largest.to_vec(), bytes.len()));
    }

    /// Cut anywhere, and with zeros behind, as a file has that was made longer before it was
    /// written.
    #[test]
    fn a_torn_tail_costs_the_last_record_only() {
        let records = some();
        let bytes = encoded(&records);
        for length in 0..=bytes.len() {
            let whole = (0..=records.len())
                .rev()
                .find(|count| encoded(&records[..*count]).len() <= length)
                .unwrap();
            let expected = (records[..whole].to_vec(), encoded(&records[..whole]).len());
            assert_eq!(decode(&bytes[..length]), expected);
            let mut padded = bytes[..length].to_vec();
            padded.extend([0; 20]);
            assert_eq!(decode(&padded), expected);
        }
    }

    #[test]
    fn the_newer_header_counts_until_it_is_damaged() {
        let old = Header {
            generation: 4,
            start: DATA,
        };
        let new = Header {
            generation: 5,
            start: DATA + 777,
        };
        let mut file = vec![0; DATA as usize];
        assert_eq!(Header::find(&file), None);
        for header in [old, new] {
            let at = header.place() as usize;
            file[at..at + HEADER_SIZE].copy_from_slice(&header.encode());
        }
        assert_eq!(Header::find(&file), Some(new));
        for byte in 0..HEADER_SIZE {
            let mut torn = file.clone();
            torn[new.place() as usize + byte] ^= 1;
            assert_eq!(Header::find(&torn), Some(old), "byte {byte}");
        }
    }

    /// The bytes of version 1: whoever changes them takes every lease away at the next update.
    #[test]
    fn the_format_stays_what_it_is() {
        let sum = crc32fast::hash(&encoded(&some()));
        assert_eq!(sum, FORMAT, "{sum:#x}");
    }

    const FORMAT: u32 = 0x8854_2908;

    proptest! {
        #[test]
        fn a_damaged_byte_never_makes_a_record_of_its_own(
            at in any::<prop::sample::Index>(),
            bit in 0u8..8,
        ) {
            let records = some();
            let mut bytes = encoded(&records);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            let (read, length) = decode(&bytes);
            prop_assert!(length <= at);
            prop_assert_eq!(&read[..], &records[..read.len()]);
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut framed = (bytes.len() as u32).to_le_bytes().to_vec();
            framed.extend(crc32fast::hash(&bytes).to_le_bytes());
            framed.extend(&bytes);
            let (records, length) = decode(&framed);
            prop_assert_eq!(records.len() == 1, length == framed.len() && length > 8);
            let _ = decode(&bytes);
            let _ = Header::find(&bytes);
        }
    }
}
