//! A mapping of each kind.

use barlease::{GuardedMapping, Lease, MapOptions, Mapping, ScratchMapping, Value};

use super::error::{EINVAL, EOPNOTSUPP, ERANGE, Failure};
use super::types::{MAP_GUARDED, MAP_READ_ONLY, MAP_SCRATCH, check_flags};

/// A mapping.
#[derive(Debug)]
pub(super) enum Any {
    Plain(Mapping),
    Guarded(GuardedMapping),
    Scratch(ScratchMapping),
}

/// A scratch mapping is accessed by its address.
fn by_address() -> Failure {
    Failure::new(
        EOPNOTSUPP,
        "access: a scratch mapping is accessed by its address, in barlease_section()",
    )
}

impl Any {
    pub(super) fn new(
        lease: &Lease,
        offset: u64,
        length: u64,
        flags: u32,
    ) -> Result<Self, Failure> {
        check_flags(flags, MAP_GUARDED | MAP_READ_ONLY | MAP_SCRATCH)?;
        if flags & MAP_GUARDED != 0 && flags & MAP_SCRATCH != 0 {
            let text = "map: a mapping is guarded or scratch, not both";
            return Err(Failure::new(EINVAL, text));
        }
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
        } else if flags & MAP_SCRATCH != 0 {
            Self::Scratch(options.map_scratch(lease)?)
        } else {
            Self::Plain(options.map(lease)?)
        })
    }

    pub(super) fn length(&self) -> usize {
        match self {
            Self::Plain(mapping) => mapping.len(),
            Self::Guarded(mapping) => mapping.len(),
            Self::Scratch(mapping) => mapping.len(),
        }
    }

    pub(super) fn address(&self) -> *mut u8 {
        match self {
            Self::Plain(mapping) => mapping.as_ptr(),
            Self::Guarded(mapping) => mapping.as_ptr(),
            Self::Scratch(mapping) => mapping.as_ptr(),
        }
    }

    /// It, if it is a scratch mapping.
    pub(super) fn scratch(&self) -> Result<&ScratchMapping, Failure> {
        match self {
            Self::Scratch(mapping) => Ok(mapping),
            _ => Err(Failure::new(
                EINVAL,
                "access: the mapping was not made with BARLEASE_MAP_SCRATCH",
            )),
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

    pub(super) fn read<T: Value>(&self, offset: usize) -> Result<T, Failure> {
        Ok(match self {
            Self::Plain(mapping) => mapping.read(offset),
            Self::Guarded(mapping) => mapping.read(offset),
            Self::Scratch(_) => return Err(by_address()),
        }?)
    }

    pub(super) fn write<T: Value>(&self, offset: usize, value: T) -> Result<(), Failure> {
        Ok(match self {
            Self::Plain(mapping) => mapping.write(offset, value),
            Self::Guarded(mapping) => mapping.write(offset, value),
            Self::Scratch(_) => return Err(by_address()),
        }?)
    }

    pub(super) fn read_block(&self, offset: usize, target: &mut [u8]) -> Result<(), Failure> {
        Ok(match self {
            Self::Plain(mapping) => mapping.copy_to(offset, target),
            Self::Guarded(mapping) => mapping.copy_to(offset, target),
            Self::Scratch(_) => return Err(by_address()),
        }?)
    }

    pub(super) fn write_block(&self, offset: usize, source: &[u8]) -> Result<(), Failure> {
        Ok(match self {
            Self::Plain(mapping) => mapping.copy_from(offset, source),
            Self::Guarded(mapping) => mapping.copy_from(offset, source),
            Self::Scratch(_) => return Err(by_address()),
        }?)
    }
}
