//! `barlease lease holders`: what /proc shows of leases and of open devices.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use barlease::Bdf;
use serde::Serialize;

use crate::failure::Failure;
use crate::output::Output;
use crate::output::or_dash;
use crate::output::print;
use crate::output::table;
use crate::process::Process;

/// The driver's name as an exporter of dma-bufs.
const EXPORTER: &str = "barlease";
const DEBUGFS: &str = "/sys/kernel/debug/dma_buf/bufinfo";

/// A thing of interest that a process has.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Object {
    Lease { id: u64, name: Option<String> },
    Device { bdf: Bdf },
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Holder {
    #[serde(flatten)]
    process: Process,
    #[serde(flatten)]
    object: Object,
    fds: usize,
    maps: usize,
}

/// `wanted`: a device, or a lease by its id or name.
pub(crate) fn run(wanted: Option<&str>, output: Output) -> Result<(), Failure> {
    let known = fs::read_to_string(DEBUGFS).unwrap_or_default();
    let mut found = holders(Path::new("/proc"), ids(&known))
        .map_err(|error| Failure::file("holders", Path::new("/proc"), &error))?;
    if let Some(wanted) = wanted {
        found.retain(|holder| is(&holder.object, wanted));
    }
    if output.is_json() {
        return Ok(output.document(&found)?);
    }
    let mut table = table([
        "PID", "UID", "COMMAND", "UNIT", "KIND", "WHAT", "NAME", "FDS", "MAPS",
    ]);
    for holder in &found {
        let (kind, what, name) = match &holder.object {
            Object::Lease { id, name } => ("lease", id.to_string(), or_dash(name.as_ref())),
            Object::Device { bdf } => ("device", bdf.to_string(), "-".to_owned()),
        };
        table.add_row([
            holder.process.pid.to_string(),
            holder.process.uid.to_string(),
            holder.process.command.clone(),
            or_dash(holder.process.unit.as_ref()),
            kind.to_owned(),
            what,
            name,
            holder.fds.to_string(),
            holder.maps.to_string(),
        ]);
    }
    Ok(print(&table)?)
}

fn is(object: &Object, wanted: &str) -> bool {
    match object {
        Object::Lease { id, name } => name.as_deref() == Some(wanted) || wanted.parse() == Ok(*id),
        Object::Device { bdf } => wanted.parse() == Ok(*bdf),
    }
}

/// The processes that have devices open, with each device.
pub(crate) fn openers(proc: &Path) -> Vec<(Bdf, Process)> {
    // Leases are of no interest here.
    let holders = holders(proc, BTreeSet::new()).unwrap_or_default();
    let device = |holder: Holder| match holder.object {
        Object::Device { bdf } => Some((bdf, holder.process)),
        Object::Lease { .. } => None,
    };
    holders.into_iter().filter_map(device).collect()
}

/// The leases in the kernel's list of all dma-bufs: size, flags, mode, count, exporter, inode,
/// name. It is for root. With it, leases are known of which nobody has a descriptor any more.
fn ids(list: &str) -> BTreeSet<u64> {
    let id = |line: &str| {
        let mut cells = line.split_whitespace().skip(4);
        (cells.next() == Some(EXPORTER)).then(|| cells.next()?.parse().ok())?
    };
    list.lines().filter_map(id).collect()
}

/// Processes that go away, and those that may not be looked into, are left out.
fn holders(proc: &Path, mut known: BTreeSet<u64>) -> std::io::Result<Vec<Holder>> {
    let mut pids: Vec<u32> = fs::read_dir(proc)?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    let open: Vec<(u32, Vec<Object>)> = pids
        .into_iter()
        .map(|pid| (pid, opened(&proc.join(pid.to_string()))))
        .collect();
    let objects = open.iter().flat_map(|(_, objects)| objects);
    known.extend(objects.filter_map(|object| match object {
        Object::Lease { id, .. } => Some(*id),
        Object::Device { .. } => None,
    }));
    let mut found = Vec::new();
    for (pid, objects) in open {
        let folder = proc.join(pid.to_string());
        let maps = fs::read_to_string(folder.join("maps")).unwrap_or_default();
        let mapped = maps.lines().filter_map(mapping);
        let mapped = mapped.filter(|(id, _)| known.contains(id));
        // By id: the name of a lease can change in between.
        let mut counts: BTreeMap<Object, (usize, usize)> = BTreeMap::new();
        for object in objects {
            counts.entry(object).or_default().0 += 1;
        }
        for (id, name) in mapped {
            let its =
                |object: &&Object| matches!(object, Object::Lease { id: its, .. } if *its == id);
            let object = counts.keys().find(its).cloned();
            let object = object.unwrap_or(Object::Lease { id, name });
            counts.entry(object).or_default().1 += 1;
        }
        if counts.is_empty() {
            continue;
        }
        let process = Process::of(proc, pid);
        found.extend(counts.into_iter().map(|(object, (fds, maps))| Holder {
            process: process.clone(),
            object,
            fds,
            maps,
        }));
    }
    Ok(found)
}

/// The objects of a process's descriptors, of those that are of interest here.
fn opened(folder: &Path) -> Vec<Object> {
    let entries = fs::read_dir(folder.join("fdinfo")).into_iter().flatten();
    let texts = entries.filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok());
    texts.filter_map(|text| described(&text)).collect()
}

/// The object that a file in `fdinfo` describes.
fn described(text: &str) -> Option<Object> {
    let field = |key: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(key));
        value.map(str::trim).filter(|value| !value.is_empty())
    };
    if let Some(path) = field("vfio-device-syspath:") {
        let bdf = path.rsplit('/').next()?.parse().ok()?;
        return Some(Object::Device { bdf });
    }
    if field("exp_name:") != Some(EXPORTER) {
        return None;
    }
    Some(Object::Lease {
        id: field("ino:")?.parse().ok()?,
        name: field("name:").map(str::to_owned),
    })
}

/// Inode and name of a dma-buf in a line of `maps`: addresses, flags, offset, device, inode, path.
fn mapping(line: &str) -> Option<(u64, Option<String>)> {
    let (before, name) = line.split_once("/dmabuf:")?;
    let id = before.split_whitespace().nth(4)?.parse().ok()?;
    let name = name.trim().trim_end_matches("(deleted)").trim();
    Some((id, (!name.is_empty()).then(|| name.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(proc: &Path, pid: u32, comm: &str, fdinfo: &[&str], maps: &str) {
        let folder = proc.join(pid.to_string());
        fs::create_dir_all(folder.join("fdinfo")).unwrap();
        fs::write(folder.join("comm"), format!("{comm}\n")).unwrap();
        fs::write(folder.join("maps"), maps).unwrap();
        for (n, text) in fdinfo.iter().enumerate() {
            fs::write(folder.join(format!("fdinfo/{n}")), text).unwrap();
        }
    }

    #[test]
    fn descriptors_and_mappings_are_counted_by_process_and_lease() {
        let root = tempfile::tempdir().unwrap();
        let proc = root.path();
        let lease =
            "pos:\t0\nino:\t71\nsize:\t4096\ncount:\t3\nexp_name:\tbarlease\nname:\ttenant\n";
        let other = "pos:\t0\nino:\t72\nexp_name:\tdrm\n";
        let device = "pos:\t0\nvfio-device-syspath: /sys/devices/pci0000:00/0000:00:05.0\n";
        let map = |ino: u32| format!("7f00-7f01 rw-s 0000 00:0c {ino}   /dmabuf:tenant\n");
        process(proc, 10, "owner", &[lease, lease, device, other], "");
        // Only mapped; and one that is of another driver.
        process(proc, 11, "holder", &[], &(map(71) + &map(71) + &map(72)));
        process(proc, 12, "none", &["pos:\t0\n"], "");
        // Known from the kernel's list alone.
        process(proc, 13, "late", &[], &map(73));
        let known = ids("size flags mode count exp_name ino name\n\
                         00004096 00000002 00080007 00000001 barlease 00000073 x\n\
                         00004096 00000002 00080007 00000001 drm 00000072 x\n");
        let found = holders(proc, known).unwrap();
        let name = Some("tenant".to_owned());
        let of = |id| Object::Lease {
            id,
            name: name.clone(),
        };
        let bdf = "00:05.0".parse().unwrap();
        let told: Vec<_> = found
            .iter()
            .map(|it| {
                (
                    it.process.pid,
                    it.process.command.as_str(),
                    it.object.clone(),
                    it.fds,
                    it.maps,
                )
            })
            .collect();
        assert_eq!(
            told,
            [
                (10, "owner", of(71), 2, 0),
                (10, "owner", Object::Device { bdf }, 1, 0),
                (11, "holder", of(71), 0, 2),
                (13, "late", of(73), 0, 1),
            ]
        );
        assert!(is(&of(71), "tenant") && is(&of(71), "71") && !is(&of(71), "7"));
        assert!(is(&Object::Device { bdf }, "0000:00:05.0"));
    }
}
