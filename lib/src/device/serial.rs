//! The serial number in config space.

use super::config::ConfigSpace;
use super::config::ExtendedCapability;
use super::config::walk_extended;
use crate::Result;

impl ConfigSpace<'_> {
    /// The device's serial number, 64 bits that no other device has, if it says one. All functions
    /// of a device have the same.
    ///
    /// Errors: as for [`ConfigSpace::extended_capabilities`].
    pub fn serial_number(&self) -> Result<Option<u64>> {
        let Some(at) = self.extended_capability(ExtendedCapability::SERIAL_NUMBER)? else {
            return Ok(None);
        };
        Ok(Some(join(
            self.read_u32(u64::from(at) + 4)?,
            self.read_u32(u64::from(at) + 8)?,
        )))
    }
}

/// The same from all bytes of config space. A chain that is broken says none.
pub(crate) fn of_bytes(config: &[u8]) -> Option<u64> {
    let read = |at: usize| {
        let bytes = config.get(at..)?.first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    };
    // Past the end are ones, which end the chain.
    let found = walk_extended(|at| Ok(read(at.into()).unwrap_or(u32::MAX))).ok()??;
    let capability = found
        .iter()
        .find(|one| one.id == ExtendedCapability::SERIAL_NUMBER)?;
    let at = usize::from(capability.offset);
    Some(join(read(at + 4)?, read(at + 8)?))
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::FakeDevice;

    /// The last of two capabilities.
    const CHAIN: [(usize, u32); 4] = [
        (0x100, 0x1501_0001),
        (0x150, 0x0001_0003),
        (0x154, 0xff12_3456),
        (0x158, 0x5254_00ff),
    ];

    fn config() -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        for (at, word) in CHAIN {
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn a_serial_number_is_found_behind_other_capabilities() {
        assert_eq!(of_bytes(&config()), Some(0x5254_00ff_ff12_3456));
        let mut fake = FakeDevice::builder();
        for (at, word) in CHAIN {
            fake = fake.config(at as u16, &word.to_le_bytes());
        }
        let fake = fake.build().unwrap();
        let device = fake.device().unwrap();
        let serial = device.config().unwrap().serial_number().unwrap();
        assert_eq!(serial, Some(0x5254_00ff_ff12_3456));
    }

    #[test]
    fn config_space_without_one_or_cut_off_says_none() {
        let fake = FakeDevice::builder().build().unwrap();
        let device = fake.device().unwrap();
        assert_eq!(device.config().unwrap().serial_number().unwrap(), None);
        for length in [0, 64, 256, 0x102, 0x15a] {
            assert_eq!(of_bytes(&config()[..length]), None, "{length:#x}");
        }
        let mut looping = config();
        looping[0x150..0x154].copy_from_slice(&0x1501_0001_u32.to_le_bytes());
        assert_eq!(of_bytes(&looping), None);
    }
}
