//! `barlease device`.

mod bind;
mod in_use;

use std::io::Write;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

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

/// How long to wait in silence.
const PATIENCE: Duration = Duration::from_secs(3);

pub(crate) fn run(command: DeviceCommand, output: Output) -> Result<ExitCode, Failure> {
    let pci = Pci::system();
    match command {
        DeviceCommand::Show { bdf: None } => list(&pci, output)?,
        DeviceCommand::Show { bdf: Some(bdf) } => show(&pci, bdf, output)?,
        DeviceCommand::Bind { bdf, driver, force } => bind::bind(&pci, &bdf, &driver, force)?,
        DeviceCommand::Alias { bdf, bar } => alias(bdf, bar, output)?,
        DeviceCommand::Unbind { bdf } => {
            for bdf in bdf {
                patiently(bdf, || pci.unbind(bdf))?;
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Says what it is waiting for: a vfio driver lets go only when nobody has the device open.
fn patiently(bdf: Bdf, work: impl FnOnce() -> barlease::Result<()>) -> barlease::Result<()> {
    let (done, wait) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if wait.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                eprintln!(
                    "barlease: bind: {bdf}: waiting for its driver to let go (who has it open?)"
                );
            }
        });
        let answer = work();
        drop(done);
        answer
    })
}

fn list(pci: &Pci, output: Output) -> Result<(), Failure> {
    let devices = pci.devices()?;
    if output.is_json() {
        return Ok(output.document(&devices)?);
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

/// What only the open device says.
#[derive(Serialize)]
struct Opened {
    backend: Option<barlease::Backend>,
    regions: Vec<Region>,
    features: Features,
}

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    device: PciDevice,
    #[serde(flatten)]
    opened: Option<Opened>,
    /// Why it could not be opened.
    not_opened: Option<String>,
}

fn show(pci: &Pci, bdf: Bdf, output: Output) -> Result<(), Failure> {
    let device = pci.device(bdf)?;
    let (opened, not_opened) = match open(bdf) {
        Ok(opened) => (Some(opened), None),
        Err(error) => (None, Some(error.report().to_string())),
    };
    if output.is_json() {
        return Ok(output.document(&Shown {
            device,
            opened,
            not_opened,
        })?);
    }

    print_devices(&[device])?;
    if let Some(reason) = not_opened {
        eprintln!("barlease: regions and features are not shown: {reason}");
    }
    let Some(opened) = opened else {
        return Ok(());
    };
    let mut out = std::io::stdout();
    writeln!(out)?;
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
