//! Block copies between memory and device memory.
//!
//! Device memory is accessed in naturally aligned units of the widest size: up to seven bytes in
//! smaller units at either end, 8 bytes at a time between (4 on a 32-bit CPU). Write-combining
//! memory turns the stores into bursts. Guarded copies ([`Guarded`]) stop at the first unit that is
//! lost.

use super::raw::Cell;
use super::raw::Span;
use super::raw::SpanError;
use super::raw::Value;

#[cfg(target_pointer_width = "64")]
type Widest = u64;
#[cfg(not(target_pointer_width = "64"))]
type Widest = u32;

const WIDEST: usize = size_of::<Widest>();

/// How units are accessed.
pub(crate) trait Access {
    /// One load.
    fn load<T: Value>(cell: Cell<'_, T>) -> Option<T>;
    /// One store, and whether it was made.
    fn store<T: Value>(cell: Cell<'_, T>, value: T) -> bool;
}

/// Bare accesses, which are never lost.
#[derive(Debug)]
pub(crate) struct Plain;

impl Access for Plain {
    #[inline(always)]
    fn load<T: Value>(cell: Cell<'_, T>) -> Option<T> {
        Some(cell.load())
    }

    #[inline(always)]
    fn store<T: Value>(cell: Cell<'_, T>, value: T) -> bool {
        cell.store(value);
        true
    }
}

/// Accesses that can be lost.
#[derive(Debug)]
pub(crate) struct Guarded;

impl Access for Guarded {
    #[inline(always)]
    fn load<T: Value>(cell: Cell<'_, T>) -> Option<T> {
        cell.load_guarded()
    }

    #[inline(always)]
    fn store<T: Value>(cell: Cell<'_, T>, value: T) -> bool {
        cell.store_guarded(value)
    }
}

/// Why a copy ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BlockError {
    /// It goes past the end; nothing was accessed.
    Span(SpanError),
    /// The unit at this offset was lost.
    Lost(usize),
}

impl From<SpanError> for BlockError {
    fn from(error: SpanError) -> Self {
        Self::Span(error)
    }
}

#[inline(always)]
fn load<A: Access, T: Value>(span: Span<'_>, offset: usize) -> Result<T, BlockError> {
    A::load(span.cell(offset)?).ok_or(BlockError::Lost(offset))
}

#[inline(always)]
fn store<A: Access, T: Value>(span: Span<'_>, offset: usize, value: T) -> Result<(), BlockError> {
    if A::store(span.cell(offset)?, value) {
        return Ok(());
    }
    Err(BlockError::Lost(offset))
}

/// Bytes before the next location that is aligned to the widest unit.
fn head(span: Span<'_>) -> usize {
    span.as_ptr().addr().wrapping_neg() % WIDEST
}

/// Copies `source` to the start of `target`.
pub(crate) fn write<A: Access>(target: Span<'_>, source: &[u8]) -> Result<(), BlockError> {
    let target = target.part(0, source.len())?;
    let (edge, source) = source
        .split_at_checked(head(target))
        .unwrap_or((source, &[]));
    write_bytes::<A>(target, 0, edge)?;

    let mut offset = edge.len();
    let mut rest = source;
    while let Some((unit, tail)) = rest.split_first_chunk::<WIDEST>() {
        store::<A, Widest>(target, offset, Widest::from_ne_bytes(*unit))?;
        offset += WIDEST;
        rest = tail;
    }
    write_bytes::<A>(target, offset, rest)
}

/// Copies the start of `source` to `target`.
pub(crate) fn read<A: Access>(source: Span<'_>, target: &mut [u8]) -> Result<(), BlockError> {
    let source = source.part(0, target.len())?;
    let edge = head(source).min(target.len());
    let Some((first, target)) = target.split_at_mut_checked(edge) else {
        return Err(SpanError::OutOfBounds.into());
    };
    read_bytes::<A>(source, 0, first)?;

    let mut offset = edge;
    let mut units = target.chunks_exact_mut(WIDEST);
    for unit in &mut units {
        unit.copy_from_slice(&load::<A, Widest>(source, offset)?.to_ne_bytes());
        offset += WIDEST;
    }
    read_bytes::<A>(source, offset, units.into_remainder())
}

/// Stores `value` in every byte of `target`.
pub(crate) fn fill<A: Access>(target: Span<'_>, value: u8) -> Result<(), BlockError> {
    let edge = head(target).min(target.length());
    for offset in 0..edge {
        store::<A, u8>(target, offset, value)?;
    }
    let mut offset = edge;
    while target.length() - offset >= WIDEST {
        store::<A, Widest>(target, offset, Widest::from_ne_bytes([value; WIDEST]))?;
        offset += WIDEST;
    }
    for offset in offset..target.length() {
        store::<A, u8>(target, offset, value)?;
    }
    Ok(())
}

/// Width of the unit to use at an address with so many bytes left: 1, 2 or 4.
fn unit(address: usize, left: usize) -> usize {
    [4, 2]
        .into_iter()
        .find(|width| address % width == 0 && left >= *width)
        .unwrap_or(1)
}

/// As few stores as alignment allows, for the edges.
fn write_bytes<A: Access>(
    target: Span<'_>,
    mut offset: usize,
    mut source: &[u8],
) -> Result<(), BlockError> {
    while let Some(byte) = source.first() {
        let width = unit(target.as_ptr().addr().wrapping_add(offset), source.len());
        match (width, source.first_chunk::<4>(), source.first_chunk::<2>()) {
            (4, Some(bytes), _) => store::<A, _>(target, offset, u32::from_ne_bytes(*bytes))?,
            (2, _, Some(bytes)) => store::<A, _>(target, offset, u16::from_ne_bytes(*bytes))?,
            _ => store::<A, _>(target, offset, *byte)?,
        }
        offset += width;
        source = source.get(width..).unwrap_or(&[]);
    }
    Ok(())
}

/// As few loads as alignment allows, for the edges.
fn read_bytes<A: Access>(
    source: Span<'_>,
    mut offset: usize,
    target: &mut [u8],
) -> Result<(), BlockError> {
    let mut rest = target;
    while !rest.is_empty() {
        let width = unit(source.as_ptr().addr().wrapping_add(offset), rest.len());
        let Some((now, tail)) = rest.split_at_mut_checked(width) else {
            return Err(SpanError::OutOfBounds.into());
        };
        match width {
            4 => now.copy_from_slice(&load::<A, u32>(source, offset)?.to_ne_bytes()),
            2 => now.copy_from_slice(&load::<A, u16>(source, offset)?.to_ne_bytes()),
            _ => now.fill(load::<A, u8>(source, offset)?),
        }
        offset += width;
        rest = tail;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memory::Area;
    use crate::sys::memory::Request;
    use proptest::prelude::*;
    use std::os::fd::AsFd;

    fn area() -> Area {
        let fd = rustix::fs::memfd_create("block", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        let request = Request {
            offset: 0,
            length: 4096,
            writable: true,
            residue: None,
        };
        Area::map(fd.as_fd(), request).unwrap()
    }

    fn copies<A: Access>(offset: usize, data: &[u8], value: u8) -> Result<(), TestCaseError> {
        let area = area();
        let span = Span::new(&area);
        fill::<A>(span.part(0, 512).unwrap(), 0xa5).unwrap();
        let part = span.part(offset, data.len()).unwrap();

        write::<A>(part, data).unwrap();
        let mut all = vec![0; 512];
        read::<A>(span, &mut all).unwrap();
        let mut expected = vec![0xa5; 512];
        expected[offset..offset + data.len()].copy_from_slice(data);
        prop_assert_eq!(&all, &expected);

        let mut back = vec![0; data.len()];
        read::<A>(part, &mut back).unwrap();
        prop_assert_eq!(&back, &data);

        fill::<A>(part, value).unwrap();
        read::<A>(span, &mut all).unwrap();
        expected[offset..offset + data.len()].fill(value);
        prop_assert_eq!(&all, &expected);
        Ok(())
    }

    proptest! {
        #[test]
        fn copies_touch_exactly_their_bytes(
            offset in 0usize..64,
            data in proptest::collection::vec(any::<u8>(), 0..200),
            value: u8,
        ) {
            copies::<Plain>(offset, &data, value)?;
            copies::<Guarded>(offset, &data, value)?;
        }
    }

    #[test]
    fn a_copy_past_the_end_is_refused_before_anything_is_written() {
        let area = area();
        let span = Span::new(&area);
        let refused = Err(SpanError::OutOfBounds.into());
        assert_eq!(write::<Plain>(span, &[1; 4097]), refused);
        assert_eq!(write::<Guarded>(span, &[1; 4097]), refused);
        assert_eq!(span.cell::<u8>(0).unwrap().load(), 0);
    }
}
