//! `barlease device`.

mod bind;
mod in_use;
mod interrupt;
mod persist;

use std::io::Write;
use std::process::ExitCode;

use barlease::Bdf;
use barlease::Device;
use barlease::Features;
use barlease::MemoryType;
use barlease::Region;
use barlease::pci::Pci;
use barlease::pci::PciDevice;
use serde::Serialize;

use crate::args::DeviceCommand;
use crate::failure::Failure;
use crate::output::Output;
use crate::output::or_dash;
use crate::output::print;
use crate::output::table;

pub(crate) fn run(command: DeviceCommand, output: Output) -> Result<ExitCode, Failure> {
    let pci = Pci::system();
    match command {
        DeviceCommand::Show { bdf: None, .. } => list(&pci, output)?,
        DeviceCommand::Show {
            bdf: Some(bdf),
            features,
        } => show(&pci, bdf, features, output)?,
        DeviceCommand::Bind(args) => bind::bind(&pci, &args, output)?,
        DeviceCommand::Alias { bdf, bar } => alias(bdf, bar, output)?,
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

fn list(pci: &Pci, output: Output) -> Result<(), Failure> {
    let devices = pci.devices()?;
    if output.is_json() {
        let shown = devices.into_iter().map(|device| Shown::new(pci, device));
        return Ok(output.document(&shown.collect::<Vec<_>>())?);
    }
    print_devices(&devices)
}

fn print_devices(devices: &[PciDevice]) -> Result<(), Failure> {
    let mut table = table(["BDF", "ID", "CLASS", "DRIVER", "GROUP"]);
    for device in devices {
        table.add_row([
            device.bdf.to_string(),
            format!("{:04x}:{:04x}", device.vendor, device.device),
            format!("{:06x}", device.class),
            or_dash(device.driver.as_ref()),
            or_dash(device.iommu_group),
        ]);
    }
    Ok(print(&table)?)
}

/// Properties that only the open device tells.
struct Opened {
    backend: Option<barlease::Backend>,
    regions: Vec<Region>,
    features: Features,
}

/// A device in JSON, of which `device show` prints a list, be it asked for one or for all. It always
/// has the same keys; what was not asked for is null.
#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    device: PciDevice,
    bars: Vec<Bar>,
    backend: Option<barlease::Backend>,
    regions: Option<Vec<Region>>,
    features: Option<Features>,
}

impl Shown {
    /// Without what only the open device says.
    fn new(pci: &Pci, device: PciDevice) -> Self {
        let path = pci
            .root()
            .join(format!("bus/pci/devices/{}/resource", device.bdf));
        Self {
            device,
            bars: bars(&std::fs::read_to_string(path).unwrap_or_default()),
            backend: None,
            regions: None,
            features: None,
        }
    }
}

/// A BAR as sysfs tells it.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Bar {
    bar: usize,
    address: u64,
    size: u64,
    prefetchable: bool,
}

/// The BARs in a `resource` file: begin, end and flags of each, in hexadecimal.
fn bars(resource: &str) -> Vec<Bar> {
    /// IORESOURCE_MEM and IORESOURCE_PREFETCH.
    const MEMORY: u64 = 0x200;
    const PREFETCH: u64 = 0x2000;
    let number = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let parse = |(bar, line): (usize, &str)| {
        let mut numbers = line.split_whitespace().map(number);
        let mut next = || numbers.next().flatten();
        let (begin, end, flags) = (next()?, next()?, next()?);
        (flags & MEMORY != 0 && end > begin).then(|| Bar {
            bar,
            address: begin,
            size: end - begin + 1,
            prefetchable: flags & PREFETCH != 0,
        })
    };
    resource
        .lines()
        .take(6)
        .enumerate()
        .filter_map(parse)
        .collect()
}

/// Reads sysfs, and opens the device, which resets it, only for its features.
fn show(pci: &Pci, bdf: Bdf, features: bool, output: Output) -> Result<(), Failure> {
    let mut shown = Shown::new(pci, pci.device(bdf)?);
    let opened = if features { Some(open(bdf)?) } else { None };
    if output.is_json() {
        if let Some(opened) = opened {
            shown.backend = opened.backend;
            shown.regions = Some(opened.regions);
            shown.features = Some(opened.features);
        }
        return Ok(output.document(&[shown])?);
    }

    print_devices(&[shown.device])?;
    let mut out = std::io::stdout();
    writeln!(out)?;
    let Some(opened) = opened else {
        let mut table = table(["BAR", "SIZE", "ADDRESS", "PREFETCHABLE"]);
        for bar in shown.bars {
            table.add_row([
                bar.bar.to_string(),
                format!("{:#x}", bar.size),
                format!("{:#x}", bar.address),
                if bar.prefetchable { "yes" } else { "no" }.to_owned(),
            ]);
        }
        return Ok(print(&table)?);
    };
    let mut regions = table(["REGION", "SIZE", "ACCESS", "MEMORY_TYPES"]);
    for region in opened.regions.iter().filter(|region| region.size > 0) {
        regions.add_row([
            region.kind.to_string(),
            format!("{:#x}", region.size),
            access(region),
            memory_types(region),
        ]);
    }
    print(&regions)?;
    writeln!(out)?;
    let mut features = table(["FEATURE", "SUPPORTED"]);
    for (name, supported) in opened.features.iter() {
        features.add_row([name, if supported { "yes" } else { "no" }]);
    }
    Ok(print(&features)?)
}

fn alias(bdf: Bdf, bar: u32, output: Output) -> Result<(), Failure> {
    let device = Device::open(bdf)?;
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

fn open(bdf: Bdf) -> barlease::Result<Opened> {
    let device = Device::open(bdf)?;
    Ok(Opened {
        backend: device.backend(),
        regions: device.regions()?,
        features: device.features()?,
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_the_memory_among_the_first_six_resources() {
        let text = "0x00000000fe000000 0x00000000fe0000ff 0x0000000000040200\n\
                    0x000000000000c000 0x000000000000c01f 0x0000000000040101\n\
                    0x0000380000000000 0x0000380003ffffff 0x000000000014220c\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
                    0x00000000fd000000 0x00000000fd00ffff 0x0000000000046200\n";
        let found = bars(text);
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!((found[0].bar, found[0].size), (0, 0x100));
        let prefetchable = Bar {
            bar: 2,
            address: 0x3800_0000_0000,
            size: 64 << 20,
            prefetchable: true,
        };
        assert_eq!(found[1], prefetchable);
    }
}
