//! BARs as sysfs shows them, without touching the device.

use std::fs;

use serde::Serialize;

use super::Pci;
use crate::BarRange;
use crate::Bdf;
use crate::Result;
use crate::device::config::Msix;

// Flags of resources (`include/linux/ioport.h`).
const MEMORY: u64 = 0x200;
const PREFETCH: u64 = 0x2000;
const UNSET: u64 = 0x2000_0000;

/// A BAR of memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Bar {
    /// Its number, from 0 to 5.
    pub bar: u8,
    /// Where it is in the machine's memory. `None`: neither the firmware nor the kernel found a
    /// place.
    pub address: Option<u64>,
    /// Bytes.
    pub size: u64,
    /// Whether reading it has no effects.
    pub prefetchable: bool,
    /// Where the MSI-X table is, if it is in this BAR.
    pub msix_table: Option<BarRange>,
    /// Where the pending bits of MSI-X are, if they are in this BAR.
    pub msix_pending: Option<BarRange>,
    /// The ranges that can be leased without the module's parameter `msix_export`. `None`: config
    /// space cannot be read, as by others than root.
    pub exportable: Option<Vec<BarRange>>,
}

impl Pci {
    /// The BARs of memory that a device has, by number.
    ///
    /// Errors: [`Error::NoDevice`](crate::Error::NoDevice).
    pub fn bars(&self, bdf: Bdf) -> Result<Vec<Bar>> {
        let folder = self.existing(bdf)?;
        let text = fs::read_to_string(folder.join("resource")).unwrap_or_default();
        let config = fs::read(folder.join("config")).unwrap_or_default();
        let known = Msix::of_bytes(&config);
        let msix = known.as_ref().and_then(Option::as_ref);
        let lines = text.lines().take(6).zip(0..);
        let bar = |(line, number): (&str, u8)| {
            let (address, size, flags) = resource(line)?;
            let here = |place: Option<(u8, BarRange)>| {
                let place = place.filter(|(its, _)| *its == number);
                place.map(|(_, range)| range)
            };
            Some(Bar {
                bar: number,
                address,
                size,
                prefetchable: flags & PREFETCH != 0,
                msix_table: here(msix.map(|it| it.table)),
                msix_pending: here(msix.map(|it| it.pending)),
                exportable: known
                    .is_some()
                    .then(|| Msix::leaves(msix, number.into(), size)),
            })
        };
        Ok(lines.filter_map(bar).collect())
    }
}

/// Address, size and flags of a BAR of memory, from a line of `resource`: begin, end and flags.
fn resource(line: &str) -> Option<(Option<u64>, u64, u64)> {
    let number = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let mut numbers = line.split_whitespace().map(number);
    let (begin, end, flags) = (numbers.next()??, numbers.next()??, numbers.next()??);
    let size = end.checked_sub(begin)?.checked_add(1)?;
    let placed = begin != 0 && flags & UNSET == 0;
    (flags & MEMORY != 0 && end > begin).then_some((placed.then_some(begin), size, flags))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_told_with_what_of_them_can_be_leased() {
        let root = tempfile::tempdir().unwrap();
        let bdf: Bdf = "00:05.0".parse().unwrap();
        let folder = root.path().join("bus/pci/devices/0000:00:05.0");
        let pci = Pci::at(root.path());
        assert!(pci.bars(bdf).is_err());
        fs::create_dir_all(&folder).unwrap();
        fs::write(
            folder.join("resource"),
            "0x00000000fe000000 0x00000000fe003fff 0x0000000000040200\n\
             0x000000000000c000 0x000000000000c01f 0x0000000000040101\n\
             0x0000000000000000 0x0000000003ffffff 0x000000002014220c\n\
             0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
             0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
             0x0000000000000000 0x0000000000000000 0x0000000000000000\n\
             0x00000000fd000000 0x00000000fd00ffff 0x0000000000046200\n",
        )
        .unwrap();
        let bars = pci.bars(bdf).unwrap();
        let numbers: Vec<_> = bars.iter().map(|bar| (bar.bar, bar.address)).collect();
        assert_eq!(numbers, [(0, Some(0xfe00_0000)), (2, None)]);
        assert_eq!(bars[1].size, 64 << 20);
        assert!(bars[1].prefetchable && !bars[0].prefetchable);
        assert_eq!(bars[0].exportable, None);

        // Status with a list; MSI-X at 0x40 with 65 vectors: its table at BAR 0 + 0x1000, its
        // pending bits at BAR 0 + 0x3000.
        let mut config = vec![0; 256];
        config[6] = 1 << 4;
        config[0x34] = 0x40;
        config[0x40..0x4c].copy_from_slice(&[0x11, 0, 64, 0, 0, 0x10, 0, 0, 0, 0x30, 0, 0]);
        fs::write(folder.join("config"), &config).unwrap();
        let bars = pci.bars(bdf).unwrap();
        let range = |offset, length| BarRange { offset, length };
        assert_eq!(bars[0].msix_table, Some(range(0x1000, 65 * 16)));
        assert_eq!(bars[0].msix_pending, Some(range(0x3000, 16)));
        let free = vec![range(0, 0x1000), range(0x2000, 0x1000)];
        assert_eq!(bars[0].exportable, Some(free));
        assert_eq!(bars[1].exportable, Some(vec![range(0, 64 << 20)]));
        assert_eq!(bars[1].msix_table, None);
        // The part that anybody may read, and the answer of a device that is gone.
        for config in [&config[..64], &[0xff; 256]] {
            fs::write(folder.join("config"), config).unwrap();
            assert_eq!(pci.bars(bdf).unwrap()[0].exportable, None);
        }
    }
}
