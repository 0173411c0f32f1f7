//! `barlease lease dump` and `barlease lease write`.

use std::io;
use std::io::Write;

use barlease::BarRange;
use barlease::GuardedMapping;
use barlease::Lease;
use barlease::MapOptions;
use serde::Serialize;

use crate::args::Source;
use crate::args::Width;
use crate::failure::Failure;
use crate::output::Output;

const ROW: usize = 16;

#[derive(Serialize)]
struct Dump {
    offset: u64,
    bytes: String,
}

pub(crate) fn dump(
    source: &Source,
    range: Option<BarRange>,
    output: Output,
) -> Result<(), Failure> {
    let lease = super::receive(source)?;
    let range = range.unwrap_or(BarRange {
        offset: 0,
        length: lease.size(),
    });
    let (mapping, start) = map(&lease, range, true)?;
    let length = usize::try_from(range.length)
        .map_err(|_| Failure::new("dump: lease: larger than the address space"))?;
    let mut bytes = vec![0; length];
    mapping.copy_to(start, &mut bytes)?;

    if output.is_json() {
        return Ok(output.document(&Dump {
            offset: range.offset,
            bytes: bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
        })?);
    }
    Ok(print(&mut io::stdout().lock(), range.offset, &bytes)?)
}

/// Maps the pages that have `range`. Answers where the range begins in the mapping.
fn map(
    lease: &Lease,
    range: BarRange,
    read_only: bool,
) -> Result<(GuardedMapping, usize), Failure> {
    let page = rustix::param::page_size() as u64;
    let end = range
        .offset
        .checked_add(range.length)
        .filter(|end| *end <= lease.size())
        .ok_or_else(|| {
            Failure::new(format!(
                "map: lease: {range} goes past the end, {:#x}",
                lease.size()
            ))
        })?;
    let first = range.offset / page * page;
    let last = end
        .checked_next_multiple_of(page)
        .unwrap_or(end)
        .min(lease.size());
    let mut options = MapOptions::new().range(first..last);
    if read_only {
        options = options.read_only();
    }
    let start = usize::try_from(range.offset - first).unwrap_or(usize::MAX);
    Ok((options.map_guarded(lease)?, start))
}

pub(crate) fn write(source: &Source, offset: u64, value: u64, width: Width) -> Result<(), Failure> {
    let (length, limit) = match width {
        Width::One => (1, u64::from(u8::MAX)),
        Width::Two => (2, u64::from(u16::MAX)),
        Width::Four => (4, u64::from(u32::MAX)),
        Width::Eight => (8, u64::MAX),
    };
    if value > limit {
        return Err(Failure::new(format!(
            "write: lease: {value:#x} does not fit in {length} bytes (--width)"
        )));
    }
    let lease = super::receive(source)?;
    let (mapping, start) = map(&lease, BarRange { offset, length }, false)?;
    // Devices are little-endian.
    match width {
        Width::One => mapping.write(start, value as u8),
        Width::Two => mapping.write(start, (value as u16).to_le()),
        Width::Four => mapping.write(start, (value as u32).to_le()),
        Width::Eight => mapping.write(start, value.to_le()),
    }?;
    Ok(())
}

/// Rows of 16 bytes; rows that equal the one before are shown as one `*`.
fn print(out: &mut impl Write, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let mut last: Option<&[u8]> = None;
    let mut skipping = false;
    for (n, row) in bytes.chunks(ROW).enumerate() {
        if last == Some(row) {
            if !skipping {
                writeln!(out, "*")?;
            }
            skipping = true;
            continue;
        }
        skipping = false;
        last = Some(row);
        let hex: Vec<String> = row.iter().map(|byte| format!("{byte:02x}")).collect();
        let text: String = row
            .iter()
            .map(|byte| match byte {
                0x20..=0x7e => char::from(*byte),
                _ => '.',
            })
            .collect();
        let address = offset + (n * ROW) as u64;
        writeln!(out, "{address:08x}  {:47}  |{text}|", hex.join(" "))?;
    }
    writeln!(out, "{:08x}", offset + bytes.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rows_are_shown_once() {
        let mut bytes = vec![0; 64];
        bytes.extend(b"Barlease\x00\xff");
        let mut out = Vec::new();
        print(&mut out, 0x1000, &bytes).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "00001000  00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00  |................|\n\
             *\n\
             00001040  42 61 72 6c 65 61 73 65 00 ff                    |Barlease..|\n\
             0000104a\n"
        );
    }
}
