//! Block copies between memory and device memory.
//!
//! Device memory is accessed in naturally aligned units of the widest size: up to seven bytes in
//! smaller units at either end, 8 bytes at a time between (4 on a 32-bit CPU). Write-combining
//! memory turns the stores into bursts.

use super::raw::Span;
use super::raw::SpanError;

#[cfg(target_pointer_width = "64")]
type Widest = u64;
#[cfg(not(target_pointer_width = "64"))]
type Widest = u32;

const WIDEST: usize = size_of::<Widest>();

/// Bytes before the next location that is aligned to the widest unit.
fn head(span: Span<'_>) -> usize {
    span.as_ptr().addr().wrapping_neg() % WIDEST
}

/// Copies `source` to the start of `target`.
pub(crate) fn write(target: Span<'_>, source: &[u8]) -> Result<(), SpanError> {
    let target = target.part(0, source.len())?;
    let (edge, source) = source
        .split_at_checked(head(target))
        .unwrap_or((source, &[]));
    write_bytes(target, 0, edge)?;

    let mut offset = edge.len();
    let mut rest = source;
    while let Some((unit, tail)) = rest.split_first_chunk::<WIDEST>() {
        target
            .cell::<Widest>(offset)?
            .store(Widest::from_ne_bytes(*unit));
        offset += WIDEST;
        rest = tail;
    }
    write_bytes(target, offset, rest)
}

/// Copies the start of `source` to `target`.
pub(crate) fn read(source: Span<'_>, target: &mut [u8]) -> Result<(), SpanError> {
    let source = source.part(0, target.len())?;
    let edge = head(source).min(target.len());
    let Some((first, target)) = target.split_at_mut_checked(edge) else {
        return Err(SpanError::OutOfBounds);
    };
    read_bytes(source, 0, first)?;

    let mut offset = edge;
    let mut units = target.chunks_exact_mut(WIDEST);
    for unit in &mut units {
        unit.copy_from_slice(&source.cell::<Widest>(offset)?.load().to_ne_bytes());
        offset += WIDEST;
    }
    read_bytes(source, offset, units.into_remainder())
}

/// Stores `value` in every byte of `target`.
pub(crate) fn fill(target: Span<'_>, value: u8) -> Result<(), SpanError> {
    let edge = head(target).min(target.length());
    for offset in 0..edge {
        target.cell::<u8>(offset)?.store(value);
    }
    let mut offset = edge;
    while target.length() - offset >= WIDEST {
        target
            .cell::<Widest>(offset)?
            .store(Widest::from_ne_bytes([value; WIDEST]));
        offset += WIDEST;
    }
    for offset in offset..target.length() {
        target.cell::<u8>(offset)?.store(value);
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
fn write_bytes(target: Span<'_>, mut offset: usize, mut source: &[u8]) -> Result<(), SpanError> {
    while let Some(byte) = source.first() {
        let width = unit(target.as_ptr().addr().wrapping_add(offset), source.len());
        match (width, source.first_chunk::<4>(), source.first_chunk::<2>()) {
            (4, Some(bytes), _) => target.cell(offset)?.store(u32::from_ne_bytes(*bytes)),
            (2, _, Some(bytes)) => target.cell(offset)?.store(u16::from_ne_bytes(*bytes)),
            _ => target.cell(offset)?.store(*byte),
        }
        offset += width;
        source = source.get(width..).unwrap_or(&[]);
    }
    Ok(())
}

/// As few loads as alignment allows, for the edges.
fn read_bytes(source: Span<'_>, mut offset: usize, target: &mut [u8]) -> Result<(), SpanError> {
    let mut rest = target;
    while !rest.is_empty() {
        let width = unit(source.as_ptr().addr().wrapping_add(offset), rest.len());
        let Some((now, tail)) = rest.split_at_mut_checked(width) else {
            return Err(SpanError::OutOfBounds);
        };
        match width {
            4 => now.copy_from_slice(&source.cell::<u32>(offset)?.load().to_ne_bytes()),
            2 => now.copy_from_slice(&source.cell::<u16>(offset)?.load().to_ne_bytes()),
            _ => now.fill(source.cell::<u8>(offset)?.load()),
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

    proptest! {
        #[test]
        fn copies_touch_exactly_their_bytes(
            offset in 0usize..64,
            data in proptest::collection::vec(any::<u8>(), 0..200),
            value: u8,
        ) {
            let area = area();
            let span = Span::new(&area);
            fill(span.part(0, 512).unwrap(), 0xa5).unwrap();
            let part = span.part(offset, data.len()).unwrap();

            write(part, &data).unwrap();
            let mut all = vec![0; 512];
            read(span, &mut all).unwrap();
            let mut expected = vec![0xa5; 512];
            expected[offset..offset + data.len()].copy_from_slice(&data);
            prop_assert_eq!(&all, &expected);

            let mut back = vec![0; data.len()];
            read(part, &mut back).unwrap();
            prop_assert_eq!(&back, &data);

            fill(part, value).unwrap();
            read(span, &mut all).unwrap();
            expected[offset..offset + data.len()].fill(value);
            prop_assert_eq!(&all, &expected);
        }
    }

    #[test]
    fn a_copy_past_the_end_is_refused_before_anything_is_written() {
        let area = area();
        let span = Span::new(&area);
        assert_eq!(write(span, &[1; 4097]), Err(SpanError::OutOfBounds));
        assert_eq!(span.cell::<u8>(0).unwrap().load(), 0);
    }
}
