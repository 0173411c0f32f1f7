//! The structures of the header.

use std::ffi::{c_char, c_int};

use barlease::{LeaseRecord, MemoryType, State, Status, Tph};

use super::error::{EINVAL, EPROTO, Failure};

pub(super) const LEASE_OK: u32 = 0;
pub(super) const LEASE_REVOKED: u32 = 1;
pub(super) const LEASE_DEAD: u32 = 2;

pub(super) const UNCACHED: u32 = 0;
pub(super) const WRITE_COMBINING: u32 = 1;

pub(super) const RECORD_INTERNAL: u32 = 1;
pub(super) const RECORD_DRAINING: u32 = 2;
pub(super) const RECORD_WRITABLE: u32 = 4;

pub(super) const EXPORT_READ_ONLY: u32 = 1;
pub(super) const REVOKE_DO_NOT_WAIT: u32 = 1;
pub(super) const RECEIVE_ANY_FILE: u32 = 1;
pub(super) const MAP_GUARDED: u32 = 1;
pub(super) const MAP_READ_ONLY: u32 = 2;
pub(super) const MAP_SCRATCH: u32 = 4;

/// `struct barlease_range`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct CRange {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// `struct barlease_status`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct CStatus {
    pub(super) state: u32,
    pub(super) reasons: u32,
    pub(super) memory_type: u32,
    pub(super) bar: u32,
    pub(super) size: u64,
    pub(super) ranges: u32,
    pub(super) attachments: u32,
}

/// `struct barlease_record`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct CRecord {
    pub(super) id: u64,
    pub(super) size: u64,
    pub(super) bar: u32,
    pub(super) ranges: u32,
    pub(super) state: u32,
    pub(super) reasons: u32,
    pub(super) memory_type: u32,
    pub(super) flags: u32,
    pub(super) attachments: u32,
    pub(super) dma_mappings: u32,
    pub(super) mappings: u32,
    pub(super) wc_mappings: u32,
    pub(super) name: [c_char; 32],
}

/// Refuses flags that do not exist.
pub(super) fn check_flags(flags: u32, known: u32) -> Result<(), Failure> {
    if flags & !known == 0 {
        return Ok(());
    }
    let unknown = flags & !known;
    Err(Failure::new(
        EINVAL,
        format!("there is no flag {unknown:#x}"),
    ))
}

pub(super) fn memory_type(number: u32) -> Result<MemoryType, Failure> {
    match number {
        UNCACHED => Ok(MemoryType::Nc),
        WRITE_COMBINING => Ok(MemoryType::Wc),
        _ => Err(Failure::new(
            EINVAL,
            format!("there is no memory type {number}"),
        )),
    }
}

/// Steering tags; -1 is no tag.
pub(super) fn steering_tags(tag: c_int, extended_tag: c_int, hint: u32) -> Result<Tph, Failure> {
    let invalid = |what, value: i64| Failure::new(EINVAL, format!("there is no {what} {value}"));
    let mut tags = Tph::new();
    if tag != -1 {
        let tag = u8::try_from(tag).map_err(|_| invalid("8-bit tag", tag.into()))?;
        tags = tags.steering_tag(tag);
    }
    if extended_tag != -1 {
        let tag =
            u16::try_from(extended_tag).map_err(|_| invalid("16-bit tag", extended_tag.into()))?;
        tags = tags.steering_tag_ext(tag);
    }
    // The library refuses what is over 3.
    let hint = u8::try_from(hint).map_err(|_| invalid("processing hint", hint.into()))?;
    Ok(tags.processing_hint(hint))
}

fn number_of_type(memory_type: MemoryType) -> Result<u32, Failure> {
    match memory_type {
        MemoryType::Nc => Ok(UNCACHED),
        MemoryType::Wc => Ok(WRITE_COMBINING),
        other => Err(unknown(&other)),
    }
}

fn number_of_state(state: State) -> Result<u32, Failure> {
    match state {
        State::Ok => Ok(LEASE_OK),
        State::Revoked => Ok(LEASE_REVOKED),
        State::Dead => Ok(LEASE_DEAD),
        other => Err(unknown(&other)),
    }
}

fn unknown(value: &dyn std::fmt::Debug) -> Failure {
    let text = format!("{value:?} is not known to this version of the C interface");
    Failure::new(EPROTO, text)
}

impl TryFrom<Status> for CStatus {
    type Error = Failure;

    fn try_from(status: Status) -> Result<Self, Failure> {
        Ok(Self {
            state: number_of_state(status.state)?,
            reasons: status.reasons.bits(),
            memory_type: number_of_type(status.memory_type)?,
            bar: status.bar,
            size: status.size,
            ranges: status.ranges,
            attachments: status.attachments,
        })
    }
}

impl CStatus {
    /// As bytes, in the order of the header.
    pub(super) fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(size_of::<Self>());
        for word in [self.state, self.reasons, self.memory_type, self.bar] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(self.size.to_ne_bytes());
        bytes.extend(self.ranges.to_ne_bytes());
        bytes.extend(self.attachments.to_ne_bytes());
        bytes
    }
}

impl TryFrom<LeaseRecord> for CRecord {
    type Error = Failure;

    fn try_from(record: LeaseRecord) -> Result<Self, Failure> {
        let flag = |set, flag| if set { flag } else { 0 };
        let mut name = [0; 32];
        let text = record.name.unwrap_or_default();
        // The last byte stays NUL.
        for (place, byte) in name.iter_mut().take(31).zip(text.bytes()) {
            *place = c_char::from_ne_bytes([byte]);
        }
        Ok(Self {
            id: record.id.get(),
            size: record.size,
            bar: record.bar,
            ranges: record.ranges,
            state: number_of_state(record.state)?,
            reasons: record.reasons.bits(),
            memory_type: number_of_type(record.memory_type)?,
            flags: flag(record.internal, RECORD_INTERNAL)
                | flag(record.draining, RECORD_DRAINING)
                | flag(record.writable, RECORD_WRITABLE),
            attachments: record.attachments,
            dma_mappings: record.dma_mappings,
            mappings: record.mappings,
            wc_mappings: record.wc_mappings,
            name,
        })
    }
}
