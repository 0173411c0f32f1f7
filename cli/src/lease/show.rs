//! `barlease lease show`.

use std::fs;
use std::io;
use std::path::Path;

use barlease::Bdf;
use barlease::pci::Pci;

use crate::buffers;
use crate::buffers::Buffer;
use crate::failure::Failure;
use crate::output::Output;
use crate::output::print;
use crate::output::table;

const ROOT: &str = "/sys/kernel/debug/barlease";
const COLUMNS: [&str; 10] = [
    "name",
    "bar",
    "ranges",
    "size",
    "memattr",
    "state",
    "reasons",
    "attachments",
    "mmaps",
    "wc_mmaps",
];

pub(crate) fn run(bdf: Option<Bdf>, output: Output) -> Result<(), Failure> {
    let bdfs = match bdf {
        Some(bdf) => vec![bdf],
        None => all()?,
    };
    let mut found = Vec::new();
    for bdf in bdfs {
        for mut buffer in read(bdf)? {
            buffer.shift_insert(0, "bdf".to_owned(), bdf.to_string().into());
            found.push(buffer);
        }
    }
    if output.is_json() {
        return Ok(output.document(&found)?);
    }
    print_text(&found)
}

fn print_text(found: &[Buffer]) -> Result<(), Failure> {
    let [
        name,
        bar,
        ranges,
        size,
        memattr,
        state,
        reasons,
        attachments,
        mmaps,
        wc_mmaps,
    ] = COLUMNS.map(str::to_uppercase);
    let mut table = table([
        "BDF",
        &name,
        &bar,
        &ranges,
        &size,
        &memattr,
        &state,
        &reasons,
        &attachments,
        &mmaps,
        &wc_mmaps,
    ]);
    for buffer in found {
        let cells = std::iter::once("bdf").chain(COLUMNS);
        table.add_row(cells.map(|column| buffers::cell(column, buffer.get(column))));
    }
    Ok(print(&table)?)
}

/// The devices that the module drives.
fn all() -> Result<Vec<Bdf>, Failure> {
    let entries = fs::read_dir(ROOT).map_err(|error| explain(Path::new(ROOT), &error))?;
    let mut bdfs: Vec<Bdf> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    bdfs.sort_unstable();
    Ok(bdfs)
}

fn read(bdf: Bdf) -> Result<Vec<Buffer>, Failure> {
    let path = Path::new(ROOT).join(bdf.to_string()).join("buffers");
    match fs::read_to_string(&path) {
        Ok(text) => Ok(buffers::parse(&text)),
        Err(error) => {
            // A device that does not exist, or is not ours, is the better answer.
            let device = Pci::system().device(bdf)?;
            if !device.is_barlease() {
                return Err(Failure::unsupported(format!(
                    "show: {bdf}: bound to {} (`barlease device bind {bdf}`)",
                    device.driver.as_deref().unwrap_or("no driver")
                )));
            }
            Err(explain(&path, &error))
        }
    }
}

fn explain(path: &Path, error: &io::Error) -> Failure {
    if error.kind() == io::ErrorKind::NotFound && Pci::system().module().is_none() {
        return Failure::unsupported(
            "show: leases: the module is not loaded (modprobe barlease_vfio_pci)",
        );
    }
    if error.kind() == io::ErrorKind::NotFound {
        return Failure::new(format!(
            "show: {}: {error} (mount -t debugfs debugfs /sys/kernel/debug)",
            path.display()
        ));
    }
    Failure::file("show", path, error)
}
