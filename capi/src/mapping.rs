//! A mapping of either kind.

use barlease::{Error, GuardedMapping, Lease, MapOptions, Mapping, Value};

use super::error::{EINVAL, ERANGE, Failure};
use super::types::{MAP_GUARDED, MAP_READ_ONLY, check_flags};

/// A mapping, plain or guarded.
#[derive(Debug)]
pub(super) enum Either {
    Plain(Mapping),
    Guarded(GuardedMapping),
}

impl Either {
    pub(super) fn new(
        lease: &Lease,
        offset: u64,
        length: u64,
        flags: u32,
    ) -> Result<Self, Failure> {
        check_flags(flags, MAP_GUARDED | MAP_READ_ONLY)?;
        let end = match length {
            0 => lease.size(),
            length => offset
                .checked_add(length)
                .ok_or_else(|| Failure::new(EINVAL, "map: offset and length overflow"))?,
        };
        let mut options = MapOptions::new().range(offset..end);
        if flags & MAP_READ_ONLY != 0 {
            options = options.read_only();
        }
        Ok(if flags & MAP_GUARDED != 0 {
            Self::Guarded(options.map_guarded(lease)?)
        } else {
            Self::Plain(options.map(lease)?)
        })
    }

    pub(super) fn length(&self) -> usize {
        match self {
            Self::Plain(mapping) => mapping.len(),
            Self::Guarded(mapping) => mapping.len(),
        }
    }

    pub(super) fn address(&self) -> *mut u8 {
        match self {
            Self::Plain(mapping) => mapping.as_ptr(),
            Self::Guarded(mapping) => mapping.as_ptr(),
        }
    }

    pub(super) fn out_of_bounds(&self, offset: usize, length: usize) -> Failure {
        let have = self.length();
        Failure::new(
            ERANGE,
            format!(
                "{have:#x} mapped bytes: {length:#x} bytes at offset {offset:#x} are out of bounds"
            ),
        )
    }

    pub(super) fn read<T: Value>(&self, offset: usize) -> Result<T, Error> {
        match self {
            Self::Plain(mapping) => mapping.read(offset),
            Self::Guarded(mapping) => mapping.read(offset),
        }
    }

    pub(super) fn write<T: Value>(&self, offset: usize, value: T) -> Result<(), Error> {
        match self {
            Self::Plain(mapping) => mapping.write(offset, value),
            Self::Guarded(mapping) => mapping.write(offset, value),
        }
    }

    pub(super) fn read_block(&self, offset: usize, target: &mut [u8]) -> Result<(), Error> {
        match self {
            Self::Plain(mapping) => mapping.copy_to(offset, target),
            Self::Guarded(mapping) => mapping.copy_to(offset, target),
        }
    }

    pub(super) fn write_block(&self, offset: usize, source: &[u8]) -> Result<(), Error> {
        match self {
            Self::Plain(mapping) => mapping.copy_from(offset, source),
            Self::Guarded(mapping) => mapping.copy_from(offset, source),
        }
    }
}
