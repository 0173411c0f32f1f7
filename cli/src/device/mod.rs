//! `barlease device`.

mod bind;
mod in_use;
mod interrupt;
mod persist;
mod show;

use std::process::ExitCode;

use barlease::Bdf;
use barlease::Device;
use barlease::MemoryType;
use barlease::OpenOptions;
use barlease::Region;
use barlease::VfToken;
use barlease::pci::Pci;

use crate::args::DeviceCommand;
use crate::failure::Failure;
use crate::output::Output;
use crate::output::print;
use crate::output::table;

pub(crate) fn run(command: DeviceCommand, output: Output) -> Result<ExitCode, Failure> {
    let pci = Pci::system();
    match command {
        DeviceCommand::Show { bdf: None, .. } => show::list(&pci, output)?,
        DeviceCommand::Show {
            bdf: Some(bdf),
            features,
            vf_token,
        } => show::one(&pci, bdf, features.then_some(vf_token), output)?,
        DeviceCommand::Bind(args) => bind::bind(&pci, &args, output)?,
        DeviceCommand::Alias { bdf, bar, vf_token } => alias(bdf, bar, vf_token, output)?,
        DeviceCommand::Reset { bdf, force } => reset(&pci, bdf, force)?,
        DeviceCommand::Unbind(args) => bind::unbind(&pci, &args, output)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Through sysfs, which asks nobody that has the device open.
fn reset(pci: &Pci, bdf: Bdf, force: bool) -> Result<(), Failure> {
    let device = pci.device(bdf)?;
    let mut uses = in_use::Host::default().uses(bdf);
    // Not the other drivers: they have each device on, in use or not.
    let enabled = pci.root().join(format!("bus/pci/devices/{bdf}/enable"));
    let enabled = std::fs::read_to_string(enabled).unwrap_or_default();
    if device.is_vfio() && !matches!(enabled.trim(), "" | "0") {
        uses.push(format!("it is open (`barlease lease holders {bdf}`)"));
    }
    if !force && !uses.is_empty() {
        return Err(Failure::new(format!(
            "reset: {bdf}: in use: {} (stop that, or --force)",
            uses.join(", ")
        )));
    }
    Ok(pci.reset(bdf)?)
}

fn alias(bdf: Bdf, bar: u32, token: Option<VfToken>, output: Output) -> Result<(), Failure> {
    let device = open(bdf, token)?;
    let region = device.region(device.alias_region(bar, MemoryType::Wc)?)?;
    if output.is_json() {
        return Ok(output.document(&region)?);
    }
    let mut table = table([
        "INDEX",
        "OFFSET",
        "REGION",
        "SIZE",
        "ACCESS",
        "MEMORY_TYPES",
    ]);
    table.add_row([
        region.index.to_string(),
        format!("{:#x}", region.offset),
        region.kind.to_string(),
        format!("{:#x}", region.size),
        access(&region),
        memory_types(&region),
    ]);
    Ok(print(&table)?)
}

fn open(bdf: Bdf, token: Option<VfToken>) -> barlease::Result<Device> {
    let options = OpenOptions::new();
    match token {
        Some(token) => options.vf_token(token),
        None => options,
    }
    .open(bdf)
}

fn access(region: &Region) -> String {
    let names = [
        (region.readable, "read"),
        (region.writable, "write"),
        (region.mappable, "mmap"),
    ];
    let names: Vec<&str> = names
        .into_iter()
        .filter_map(|(has, name)| has.then_some(name))
        .collect();
    names.join(",")
}

/// How its mappings are cached, or those of an alias of it can be.
fn memory_types(region: &Region) -> String {
    let names: Vec<_> = region
        .memory_types()
        .iter()
        .map(ToString::to_string)
        .collect();
    if names.is_empty() {
        return "-".to_owned();
    }
    names.join(",")
}
