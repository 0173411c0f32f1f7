//! `barlease device show`: facts of sysfs and /proc. It opens the device, which resets it, only for
//! its features.

use std::io::Write;
use std::path::Path;

use barlease::BarRange;
use barlease::Bdf;
use barlease::Features;
use barlease::Region;
use barlease::VfToken;
use barlease::pci::Bar;
use barlease::pci::Pci;
use barlease::pci::PciDevice;
use serde::Serialize;

use super::access;
use super::memory_types;
use super::persist;
use crate::failure::Failure;
use crate::lease::holders::openers;
use crate::output::Output;
use crate::output::or_dash;
use crate::output::print;
use crate::output::table;
use crate::process::Process;

/// Properties that only the open device tells.
struct Opened {
    backend: Option<barlease::Backend>,
    regions: Vec<Region>,
    features: Features,
}

/// A device in JSON, of which `device show` prints a list, be it asked for one or for all. It
/// always has the same keys; a fact that was not asked for, or is not known, is null.
/// `docs/json.md` describes it.
#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    device: PciDevice,
    /// How the kernel translates the DMA of the group for the host: `DMA`, `DMA-FQ`, `identity`...
    iommu_group_type: Option<String>,
    /// The other functions of the group.
    iommu_group_others: Vec<Other>,
    /// Whether it is bound at each boot.
    persistent: bool,
    /// Whether a process has it open. Known of devices with a vfio driver.
    open: Option<bool>,
    /// Those processes, as far as this user may see them.
    openers: Vec<Process>,
    bars: Vec<Bar>,
    backend: Option<barlease::Backend>,
    regions: Option<Vec<Region>>,
    features: Option<Features>,
}

#[derive(Serialize)]
struct Other {
    bdf: Bdf,
    driver: Option<String>,
}

impl Shown {
    /// Without the facts that only the open device has.
    fn new(pci: &Pci, device: PciDevice, openers: &[(Bdf, Process)]) -> Self {
        let bdf = device.bdf;
        let text = |path: String| {
            let text = std::fs::read_to_string(pci.root().join(path)).ok()?;
            Some(text.trim().to_owned()).filter(|text| !text.is_empty())
        };
        let group = device.iommu_group;
        let others = group.map(|group| pci.group(group)).unwrap_or_default();
        let others = others.into_iter().filter(|other| other.bdf != bdf);
        let enabled = text(format!("bus/pci/devices/{bdf}/enable")).map(|count| count != "0");
        let its = openers.iter().filter(|(its, _)| *its == bdf);
        Self {
            iommu_group_type: group
                .and_then(|group| text(format!("kernel/iommu_groups/{group}/type"))),
            iommu_group_others: others
                .map(|other| Other {
                    bdf: other.bdf,
                    driver: other.driver,
                })
                .collect(),
            persistent: persist::is_kept(bdf),
            open: enabled.filter(|_| device.is_vfio()),
            openers: its.map(|(_, process)| process.clone()).collect(),
            bars: pci.bars(bdf).unwrap_or_default(),
            backend: None,
            regions: None,
            features: None,
            device,
        }
    }
}

pub(super) fn list(pci: &Pci, output: Output) -> Result<(), Failure> {
    let devices = pci.devices()?;
    if output.is_json() {
        let openers = openers(Path::new("/proc"));
        let shown = devices
            .into_iter()
            .map(|device| Shown::new(pci, device, &openers));
        return Ok(output.document(&shown.collect::<Vec<_>>())?);
    }
    print_devices(devices.iter())
}

/// `features`: to be asked for, with the token of a virtual function.
pub(super) fn one(
    pci: &Pci,
    bdf: Bdf,
    features: Option<Option<VfToken>>,
    output: Output,
) -> Result<(), Failure> {
    // Before this process is one of those that have it open.
    let openers = openers(Path::new("/proc"));
    let mut shown = Shown::new(pci, pci.device(bdf)?, &openers);
    let opened = features.map(|token| open(bdf, token)).transpose()?;
    if output.is_json() {
        if let Some(opened) = opened {
            shown.backend = opened.backend;
            shown.regions = Some(opened.regions);
            shown.features = Some(opened.features);
        }
        return Ok(output.document(&[shown])?);
    }

    print_devices([&shown.device])?;
    let mut out = std::io::stdout();
    writeln!(out)?;
    print_details(&shown)?;
    if !shown.bars.is_empty() {
        writeln!(out)?;
        print_bars(&shown.bars)?;
    }
    if !shown.openers.is_empty() {
        writeln!(out)?;
        print_openers(&shown.openers)?;
    }
    match opened {
        Some(opened) => print_opened(&opened),
        None => Ok(()),
    }
}

fn print_devices<'a>(devices: impl IntoIterator<Item = &'a PciDevice>) -> Result<(), Failure> {
    let mut table = table(["BDF", "ID", "CLASS", "DRIVER", "GROUP", "NUMA"]);
    for device in devices {
        table.add_row([
            device.bdf.to_string(),
            format!("{:04x}:{:04x}", device.vendor, device.device),
            format!("{:06x}", device.class),
            or_dash(device.driver.as_ref()),
            or_dash(device.iommu_group),
            or_dash(device.numa_node),
        ]);
    }
    Ok(print(&table)?)
}

fn print_details(shown: &Shown) -> Result<(), Failure> {
    let others: Vec<String> = shown
        .iommu_group_others
        .iter()
        .map(|other| format!("{} ({})", other.bdf, or_dash(other.driver.as_ref())))
        .collect();
    let open = match (shown.open, shown.openers.len()) {
        (None, 0) => "-",
        (Some(false), 0) => "no",
        (Some(true), 0) => "yes, by a process that only root sees",
        _ => "yes",
    };
    let mut table = table(["PROPERTY", "VALUE"]);
    let joined = (!others.is_empty()).then(|| others.join(", "));
    for (name, value) in [
        ("group type", or_dash(shown.iommu_group_type.as_ref())),
        ("rest of group", or_dash(joined)),
        ("override", or_dash(shown.device.driver_override.as_ref())),
        (
            "at boot",
            if shown.persistent { "bound" } else { "-" }.to_owned(),
        ),
        ("open", open.to_owned()),
    ] {
        table.add_row([name.to_owned(), value]);
    }
    Ok(print(&table)?)
}

fn print_bars(bars: &[Bar]) -> Result<(), Failure> {
    let mut table = table(["BAR", "SIZE", "ADDRESS", "PREFETCH", "MSIX", "EXPORTABLE"]);
    let ranges = |ranges: &[BarRange]| {
        let texts: Vec<String> = ranges.iter().map(ToString::to_string).collect();
        or_dash((!texts.is_empty()).then(|| texts.join(",")))
    };
    for bar in bars {
        let msix: Vec<BarRange> = bar.msix_table.into_iter().chain(bar.msix_pending).collect();
        let exportable = bar.exportable.as_ref();
        table.add_row([
            bar.bar.to_string(),
            format!("{:#x}", bar.size),
            bar.address.map_or("-".to_owned(), |it| format!("{it:#x}")),
            if bar.prefetchable { "yes" } else { "no" }.to_owned(),
            exportable.map_or("root sees it".to_owned(), |_| ranges(&msix)),
            exportable.map_or("root sees it".to_owned(), |it| ranges(it)),
        ]);
    }
    Ok(print(&table)?)
}

fn print_openers(openers: &[Process]) -> Result<(), Failure> {
    let mut table = table(["PID", "UID", "COMMAND", "EXE", "UNIT", "CONTAINER"]);
    for process in openers {
        table.add_row([
            process.pid.to_string(),
            process.uid.to_string(),
            process.command.clone(),
            or_dash(process.exe.as_ref()),
            or_dash(process.unit.as_ref()),
            or_dash(process.container.as_ref()),
        ]);
    }
    Ok(print(&table)?)
}

fn print_opened(opened: &Opened) -> Result<(), Failure> {
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

fn open(bdf: Bdf, token: Option<VfToken>) -> barlease::Result<Opened> {
    let device = super::open(bdf, token)?;
    Ok(Opened {
        backend: device.backend(),
        regions: device.regions()?,
        features: device.features()?,
    })
}
