//! `barlease lease read`, `dump`, `write` and `fill`.

use std::io;
use std::io::BufWriter;
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
/// Bytes that are mapped at a time, so that a lease of any size takes the same memory.
const WINDOW: u64 = 1 << 20;

pub(crate) fn dump(
    source: &Source,
    range: Option<BarRange>,
    width: Width,
    output: Output,
) -> Result<(), Failure> {
    let lease = super::receive(source)?;
    let range = range.unwrap_or(BarRange {
        offset: 0,
        length: lease.size(),
    });
    let mut out = BufWriter::new(io::stdout().lock());
    if output.is_json() {
        // Piece by piece; the same as of a document of an offset and its bytes. A failure before
        // there are any is an error like others, a later one ends the document.
        let begin = format!("{{\"offset\":{},\"bytes\":\"", range.offset);
        let mut begun = false;
        let answer = each_window(&lease, range, width, |bytes| {
            if !begun {
                begun = true;
                out.write_all(begin.as_bytes())?;
            }
            bytes.iter().try_for_each(|byte| write!(out, "{byte:02x}"))
        });
        if let Err(mut failure) = answer {
            if begun {
                writeln!(out, "\",{}}}", failure.keys())?;
            }
            return Err(failure);
        }
        if !begun {
            out.write_all(begin.as_bytes())?;
        }
        writeln!(out, "\"}}")?;
    } else {
        let mut rows = Rows::new(range.offset);
        each_window(&lease, range, width, |bytes| rows.add(&mut out, bytes))?;
        rows.end(&mut out)?;
    }
    Ok(out.flush()?)
}

/// Reads a range in accesses of one width, and hands it over in pieces. An unaligned end is read
/// with the bytes around it.
fn each_window(
    lease: &Lease,
    range: BarRange,
    width: Width,
    mut take: impl FnMut(&[u8]) -> io::Result<()>,
) -> Result<(), Failure> {
    check(lease, range)?;
    let step = width.bytes();
    let unit = step as u64;
    let end = range.offset + range.length;
    let mut at = range.offset;
    let mut bytes = Vec::new();
    while at < end {
        // Windows end at multiples of their size, so all but the last are of whole rows.
        let until = (at / WINDOW * WINDOW + WINDOW).min(end);
        let first = at / unit * unit;
        let last = until.next_multiple_of(unit).min(lease.size());
        let window = BarRange {
            offset: first,
            length: last - first,
        };
        let (mapping, start) = map(lease, window, true)?;
        let length = (last - first) as usize;
        bytes.clear();
        for offset in (start..start + length).step_by(step) {
            let value = read_once(&mapping, offset, width)?;
            bytes.extend(value.to_le_bytes().iter().take(step));
        }
        let (skip, wanted) = ((at - first) as usize, (until - at) as usize);
        take(bytes.get(skip..skip + wanted).unwrap_or_default())?;
        at = until;
    }
    Ok(())
}

/// Devices are little-endian.
fn read_once(mapping: &GuardedMapping, at: usize, width: Width) -> Result<u64, Failure> {
    Ok(match width {
        Width::One => mapping.read::<u8>(at)?.into(),
        Width::Two => u16::from_le(mapping.read(at)?).into(),
        Width::Four => u32::from_le(mapping.read(at)?).into(),
        Width::Eight => u64::from_le(mapping.read(at)?),
    })
}

fn write_once(
    mapping: &GuardedMapping,
    at: usize,
    value: u64,
    width: Width,
) -> Result<(), Failure> {
    match width {
        Width::One => mapping.write(at, value as u8),
        Width::Two => mapping.write(at, (value as u16).to_le()),
        Width::Four => mapping.write(at, (value as u32).to_le()),
        Width::Eight => mapping.write(at, value.to_le()),
    }?;
    Ok(())
}

#[derive(Serialize)]
struct Read {
    offset: u64,
    width: usize,
    value: u64,
}

pub(crate) fn read(
    source: &Source,
    offset: u64,
    width: Width,
    output: Output,
) -> Result<(), Failure> {
    let lease = super::receive(source)?;
    let length = width.bytes() as u64;
    let (mapping, start) = map(&lease, BarRange { offset, length }, true)?;
    let value = read_once(&mapping, start, width)?;
    let width = width.bytes();
    if output.is_json() {
        return Ok(output.document(&Read {
            offset,
            width,
            value,
        })?);
    }
    Ok(writeln!(
        io::stdout(),
        "{value:#0digits$x}",
        digits = 2 + 2 * width
    )?)
}

pub(crate) fn fill(
    source: &Source,
    range: BarRange,
    value: u64,
    width: Width,
) -> Result<(), Failure> {
    fits(value, width)?;
    let unit = width.bytes() as u64;
    if range.offset % unit != 0 || range.length % unit != 0 {
        return Err(Failure::new(format!(
            "fill: lease: {range} is no multiple of {unit} bytes (--width)"
        )));
    }
    let lease = super::receive(source)?;
    check(&lease, range)?;
    let end = range.offset + range.length;
    let mut at = range.offset;
    while at < end {
        let until = (at / WINDOW * WINDOW + WINDOW).min(end);
        let window = BarRange {
            offset: at,
            length: until - at,
        };
        let (mapping, start) = map(&lease, window, false)?;
        for offset in (start..start + window.length as usize).step_by(width.bytes()) {
            write_once(&mapping, offset, value, width)?;
        }
        at = until;
    }
    Ok(())
}

fn fits(value: u64, width: Width) -> Result<(), Failure> {
    let length = width.bytes();
    if value > u64::MAX >> (64 - 8 * length) {
        return Err(Failure::new(format!(
            "write: lease: {value:#x} does not fit in {length} bytes (--width)"
        )));
    }
    Ok(())
}

/// Whether the lease has the range.
fn check(lease: &Lease, range: BarRange) -> Result<(), Failure> {
    let end = range.offset.checked_add(range.length);
    if end.is_some_and(|end| end <= lease.size()) {
        return Ok(());
    }
    Err(Failure::new(format!(
        "map: lease: {range} goes past the end, {:#x}",
        lease.size()
    )))
}

/// Maps the pages that have `range`. Answers where the range begins in the mapping.
fn map(
    lease: &Lease,
    range: BarRange,
    read_only: bool,
) -> Result<(GuardedMapping, usize), Failure> {
    let page = rustix::param::page_size() as u64;
    check(lease, range)?;
    let end = range.offset + range.length;
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
    fits(value, width)?;
    let length = width.bytes() as u64;
    let lease = super::receive(source)?;
    let (mapping, start) = map(&lease, BarRange { offset, length }, false)?;
    write_once(&mapping, start, value, width)
}

/// Rows of 16 bytes; rows that equal the one before are shown as one `*`.
struct Rows {
    address: u64,
    /// The last row that was shown.
    last: Vec<u8>,
    skipping: bool,
    /// Too few bytes for a row.
    rest: Vec<u8>,
}

impl Rows {
    fn new(address: u64) -> Self {
        Self {
            address,
            last: Vec::new(),
            skipping: false,
            rest: Vec::new(),
        }
    }

    fn add(&mut self, out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
        let mut bytes = bytes;
        while !bytes.is_empty() {
            let (some, others) = bytes.split_at(bytes.len().min(ROW - self.rest.len()));
            self.rest.extend(some);
            bytes = others;
            if self.rest.len() == ROW {
                self.row(out)?;
            }
        }
        Ok(())
    }

    fn row(&mut self, out: &mut impl Write) -> io::Result<()> {
        let row = std::mem::take(&mut self.rest);
        let address = self.address;
        self.address += row.len() as u64;
        if row == self.last {
            if !self.skipping {
                writeln!(out, "*")?;
            }
            self.skipping = true;
            return Ok(());
        }
        self.skipping = false;
        let hex: Vec<String> = row.iter().map(|byte| format!("{byte:02x}")).collect();
        let text: String = row
            .iter()
            .map(|byte| match byte {
                0x20..=0x7e => char::from(*byte),
                _ => '.',
            })
            .collect();
        self.last = row;
        writeln!(out, "{address:08x}  {:47}  |{text}|", hex.join(" "))
    }

    fn end(mut self, out: &mut impl Write) -> io::Result<()> {
        if !self.rest.is_empty() {
            self.row(out)?;
        }
        writeln!(out, "{:08x}", self.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rows_are_shown_once() {
        let mut bytes = vec![0; 64];
        bytes.extend(b"Barlease\x00\xff");
        let mut out = Vec::new();
        let mut rows = Rows::new(0x1000);
        // Pieces need not be of whole rows.
        for piece in bytes.chunks(7) {
            rows.add(&mut out, piece).unwrap();
        }
        rows.end(&mut out).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "00001000  00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00  |................|\n\
             *\n\
             00001040  42 61 72 6c 65 61 73 65 00 ff                    |Barlease..|\n\
             0000104a\n"
        );
    }
}
