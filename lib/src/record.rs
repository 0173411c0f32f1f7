//! The record that travels with a lease that is passed on: at least 64 bytes, little-endian.
//!
//! | offset | bytes | content |
//! |---|---|---|
//! | 0 | 4 | `BRL2` |
//! | 4 | 4 | length of the record: 64 or more, at most 2 MiB |
//! | 8 | 4 | flags: bit 0, the rest is known; bit 1, the lease is writable |
//! | 12 | 4 | PCI domain |
//! | 16 | 2 | bus in the upper byte, device and function in the lower one |
//! | 18 | 2 | BAR |
//! | 20 | 4 | memory type, as in the uAPI |
//! | 24 | 8 | size of the lease |
//! | 32 | 4 | number of ranges |
//! | 36 | 4 | where in the record the ranges begin: 40 or more, a multiple of 8 |
//!
//! A range is two words of 8 bytes, offset and length. The record of a lease of one range has 64
//! bytes, so that a receiver needs one system call for it.
//!
//! The format may grow: a later version may put members between the table and the ranges, and
//! behind the ranges, and give meaning to further bits of the flags. A receiver ignores what it
//! does not know; if it does not know the memory type, nothing is known of the lease. A change that
//! an older receiver must not ignore has another first word.

use barlease_abi as abi;

use crate::BarRange;
use crate::Bdf;
use crate::LeaseInfo;
use crate::MemoryType;

/// The shortest record.
pub(crate) const SHORTEST: usize = 64;
/// The longest one: 65,536 ranges, and room to grow.
pub(crate) const LONGEST: usize = 2 << 20;

const MAGIC: [u8; 4] = *b"BRL2";
const KNOWN: u32 = 1;
const WRITABLE: u32 = 2;
/// Where this version puts the ranges.
const RANGES: usize = 40;
const RANGE: usize = 16;

/// Why bytes are no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bad(pub(crate) &'static str);

/// Makes the record. `None`: it would be too long.
pub(crate) fn encode(info: Option<&LeaseInfo>, memory_type: MemoryType) -> Option<Vec<u8>> {
    let ranges = info.map_or(&[][..], |info| &info.ranges);
    let length = (RANGES + ranges.len().checked_mul(RANGE)?).max(SHORTEST);
    if length > LONGEST {
        return None;
    }
    let mut record = Vec::with_capacity(length);
    record.extend(MAGIC);
    record.extend((length as u32).to_le_bytes());
    if let Some(info) = info {
        let flags = KNOWN | if info.writable { WRITABLE } else { 0 };
        let bdf = info.bdf;
        record.extend(flags.to_le_bytes());
        record.extend(bdf.domain().to_le_bytes());
        record.extend([bdf.device() << 3 | bdf.function(), bdf.bus()]);
        record.extend(u16::try_from(info.bar).unwrap_or(u16::MAX).to_le_bytes());
        record.extend(memory_type.to_abi().to_le_bytes());
        record.extend(info.size.to_le_bytes());
        record.extend((ranges.len() as u32).to_le_bytes());
        record.extend((RANGES as u32).to_le_bytes());
        for range in ranges {
            record.extend(range.offset.to_le_bytes());
            record.extend(range.length.to_le_bytes());
        }
    }
    record.resize(length, 0);
    Some(record)
}

/// The length of a record that begins like this.
pub(crate) fn length(head: &[u8; SHORTEST]) -> Result<usize, Bad> {
    let [m0, m1, m2, m3, l0, l1, l2, l3, ..] = *head;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(Bad("the peer does not speak this version of the protocol"));
    }
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if (SHORTEST..=LONGEST).contains(&length) {
        return Ok(length);
    }
    Err(Bad("the record is too short or too long"))
}

/// The meaning of a record. `None`: nothing is known.
pub(crate) fn decode(record: &[u8]) -> Result<Option<LeaseInfo>, Bad> {
    let head = record.first_chunk().ok_or(Bad("the record is too short"))?;
    if length(head)? != record.len() {
        return Err(Bad("the record has another length than it says"));
    }
    let word =
        |offset: usize| -> Result<u32, Bad> { Ok(u32::from_le_bytes(part(record, offset)?)) };
    let flags = word(8)?;
    let Some(memory_type) = MemoryType::from_abi(word(20)?).filter(|_| flags & KNOWN != 0) else {
        return Ok(None);
    };
    let [function, bus, b0, b1] = part(record, 16)?;
    let bdf = Bdf::new(word(12)?, bus, function >> 3, function & 7);
    let bar = u32::from(u16::from_le_bytes([b0, b1]));
    if bar > 5 {
        return Err(Bad("there is no such BAR"));
    }
    Ok(Some(LeaseInfo {
        bdf: bdf.ok_or(Bad("there is no such PCI address"))?,
        bar,
        ranges: ranges(record, word(32)?, word(36)?)?,
        size: u64::from_le_bytes(part(record, 24)?),
        memory_type,
        writable: flags & WRITABLE != 0,
    }))
}

fn ranges(record: &[u8], count: u32, begin: u32) -> Result<Vec<BarRange>, Bad> {
    const SHORT: Bad = Bad("the record has no room for its ranges");
    if count > abi::MAX_RANGES || (begin as usize) < RANGES || begin % 8 != 0 {
        return Err(SHORT);
    }
    let page = rustix::param::page_size() as u64;
    let list = record.get(begin as usize..).ok_or(SHORT)?;
    let list = list.get(..count as usize * RANGE).ok_or(SHORT)?;
    list.chunks_exact(RANGE)
        .map(|bytes| {
            let range = BarRange {
                offset: u64::from_le_bytes(part(bytes, 0)?),
                length: u64::from_le_bytes(part(bytes, 8)?),
            };
            if range.offset % page != 0 || range.length % page != 0 || range.length == 0 {
                return Err(Bad("a range is not of whole pages"));
            }
            Ok(range)
        })
        .collect()
}

fn part<const N: usize>(bytes: &[u8], offset: usize) -> Result<[u8; N], Bad> {
    bytes
        .get(offset..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .ok_or(Bad("the record is too short"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn info() -> LeaseInfo {
        LeaseInfo {
            bdf: "10000:e1:1f.7".parse().unwrap(),
            bar: 2,
            ranges: vec![BarRange {
                offset: 0x1000,
                length: 0x2000,
            }],
            size: 0x2000,
            memory_type: MemoryType::Wc,
            writable: true,
        }
    }

    fn encoded(info: &LeaseInfo) -> Vec<u8> {
        encode(Some(info), info.memory_type).unwrap()
    }

    #[test]
    fn the_record_of_one_range_has_the_documented_bytes() {
        let record = encoded(&info());
        let mut expected = b"BRL2\x40\0\0\0\x03\0\0\0\0\0\x01\0\xff\xe1\x02\0\x01\0\0\0".to_vec();
        expected.extend(b"\0\x20\0\0\0\0\0\0\x01\0\0\0\x28\0\0\0");
        expected.extend(b"\0\x10\0\0\0\0\0\0\0\x20\0\0\0\0\0\0");
        expected.resize(64, 0);
        assert_eq!(record, expected);
        assert_eq!(decode(&record), Ok(Some(info())));
        let nothing = encode(None, MemoryType::Nc).unwrap();
        assert_eq!(nothing.len(), SHORTEST);
        assert_eq!(decode(&nothing), Ok(None));
    }

    #[test]
    fn a_later_version_may_add_members_and_values() {
        let mut info = info();
        let mut record = encoded(&info);
        // Flags, a member before the ranges, one behind them.
        record[8..12].copy_from_slice(&0xffff_fff3u32.to_le_bytes());
        record.splice(40..40, [0xaa; 24]);
        record[36..40].copy_from_slice(&64u32.to_le_bytes());
        record.extend([0xbb; 100]);
        let length = record.len() as u32;
        record[4..8].copy_from_slice(&length.to_le_bytes());
        assert_eq!(decode(&record), Ok(Some(info.clone())));
        // A memory type of which this version has not heard.
        record[20..24].copy_from_slice(&9u32.to_le_bytes());
        assert_eq!(decode(&record), Ok(None));
        // A lease of whole BARs has no ranges.
        info.ranges.clear();
        assert_eq!(decode(&encoded(&info)), Ok(Some(info)));
    }

    #[test]
    fn nonsense_is_refused() {
        let change = |offset: usize, bytes: &[u8]| {
            let mut record = encoded(&info());
            record[offset..offset + bytes.len()].copy_from_slice(bytes);
            decode(&record).unwrap_err().0
        };
        assert!(change(0, b"BRLS").contains("version"));
        assert!(change(4, &63u32.to_le_bytes()).contains("too short"));
        assert!(change(4, &u32::MAX.to_le_bytes()).contains("too long"));
        assert!(change(4, &65u32.to_le_bytes()).contains("another length"));
        assert!(change(18, &[99, 0]).contains("BAR"));
        assert!(change(32, &u32::MAX.to_le_bytes()).contains("room"));
        assert!(change(32, &3u32.to_le_bytes()).contains("room"));
        assert!(change(36, &0u32.to_le_bytes()).contains("room"));
        assert!(change(36, &u32::MAX.to_le_bytes()).contains("room"));
        assert!(change(40, &1u64.to_le_bytes()).contains("pages"));
        assert!(change(48, &0u64.to_le_bytes()).contains("pages"));
    }

    #[test]
    fn the_longest_description_fits_and_no_longer_one_does() {
        let mut info = info();
        info.ranges = vec![info.ranges[0]; abi::MAX_RANGES as usize];
        assert_eq!(decode(&encoded(&info)), Ok(Some(info.clone())));
        info.ranges = vec![info.ranges[0]; LONGEST / RANGE];
        assert_eq!(encode(Some(&info), MemoryType::Nc), None);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), begin: bool) {
            if begin && bytes.len() >= SHORTEST {
                bytes[..4].copy_from_slice(b"BRL2");
                let length = bytes.len() as u32;
                bytes[4..8].copy_from_slice(&length.to_le_bytes());
                bytes[20..24].fill(0);
            }
            let _ = decode(&bytes);
        }
    }
}
