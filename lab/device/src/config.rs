//! Config space: what is in it, what can be written, what a write brings about.

use crate::{Msix, Options, VECTORS, registers};

/// Bytes of config space.
pub const SIZE: usize = 4096;

/// Vendor: the one that QEMU's own test devices have.
pub const VENDOR: u16 = 0x1234;
/// Device.
pub const DEVICE: u16 = 0xba5e;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const BAR2: usize = 0x18;
const CAPABILITIES: usize = 0x34;

/// Power management.
const PM: usize = 0x40;
const PMCSR: usize = PM + 4;
/// Of the power-management capabilities: there is D1, and D2.
const D1_D2: u16 = 1 << 9 | 1 << 10;
/// PCI Express.
const EXPRESS: usize = 0x50;
const DEVICE_CONTROL: usize = EXPRESS + 0x08;
const DEVICE_CAPABILITIES_2: usize = EXPRESS + 0x24;
const MSIX: usize = 0x90;
/// The other power-management capability.
const SECOND_PM: usize = 0xa8;
/// The first extended capability.
const REQUESTER: usize = 0x100;

const MEMORY: u8 = 1 << 1;
/// Memory, bus master, parity, SERR, INTx disable.
const COMMAND_BITS: u16 = 0x0546;
const HAS_CAPABILITIES: u16 = 1 << 4;
/// Memory, 64 bits, prefetchable.
const BAR_64_PREFETCHABLE: u32 = 0b1100;
/// Of PMCSR: a way from D3hot to D0 is no reset.
const NO_SOFT_RESET: u16 = 1 << 3;
/// Of Device Capabilities: role-based errors, function-level reset.
const DEVICE_CAPABILITIES: u32 = 1 << 15 | 1 << 28;
/// The high byte of Device Control: start a function-level reset.
const START_RESET: u8 = 1 << 7;
/// Of Device Capabilities 2: completion time-outs, which can be turned off.
const TIMEOUTS: u32 = 0x12;

/// The effect of a write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effect {
    /// A function-level reset was asked for.
    pub reset: bool,
}

/// The config space of the device.
#[derive(Clone, Debug)]
pub struct Config {
    bytes: Vec<u8>,
    /// Bits that a write changes.
    writable: Vec<u8>,
    /// Its value after a reset.
    initial: Vec<u8>,
}

impl Config {
    /// That of a device with these options.
    #[must_use]
    pub fn new(options: &Options) -> Self {
        let mut config = Self {
            bytes: vec![0; SIZE],
            writable: vec![0; SIZE],
            initial: Vec::new(),
        };
        config.header(options);
        config.power_management(options);
        config.express(options);
        config.msix(options);
        config.requester(options);
        config.initial.clone_from(&config.bytes);
        config
    }

    fn header(&mut self, options: &Options) {
        self.put16(0x00, VENDOR, 0);
        self.put16(0x02, DEVICE, 0);
        self.put16(COMMAND, 0, COMMAND_BITS);
        self.put16(STATUS, HAS_CAPABILITIES, 0);
        // Revision 1 of no known class.
        self.put32(0x08, 0xff00_0001, 0);
        let size = u64::from(options.memory_mib) << 20;
        let mask = !(size - 1);
        self.put32(BAR0, BAR_64_PREFETCHABLE, mask as u32);
        self.put32(BAR0 + 4, 0, (mask >> 32) as u32);
        self.put32(BAR2, 0, !(registers::LENGTH - 1) as u32);
        self.put16(0x2c, VENDOR, 0);
        self.put16(0x2e, DEVICE, 0);
        self.put8(CAPABILITIES, PM as u8, 0);
    }

    fn power_management(&mut self, options: &Options) {
        self.put16(PM, u16::from_le_bytes([0x01, EXPRESS as u8]), 0);
        // Version 3.
        let states = if options.d1_d2 { D1_D2 } else { 0 };
        self.put16(PM + 2, 3 | states, 0);
        self.put16(PMCSR, NO_SOFT_RESET, 0b11);
        if options.second_pm {
            self.put16(SECOND_PM, 0x0001, 0);
            self.put16(SECOND_PM + 2, 3 | states, 0);
            self.put16(SECOND_PM + 4, NO_SOFT_RESET, 0);
        }
    }

    fn express(&mut self, options: &Options) {
        let next = match options.msix {
            Msix::None => last(options),
            _ => MSIX,
        };
        self.put16(EXPRESS, u16::from_le_bytes([0x10, next as u8]), 0);
        // Version 2, an endpoint.
        self.put16(EXPRESS + 0x02, 2, 0);
        self.put32(EXPRESS + 0x04, DEVICE_CAPABILITIES, 0);
        self.put16(DEVICE_CONTROL, 0x2810, 0x7fff);
        // One lane of the slowest speed, which is up.
        self.put32(EXPRESS + 0x0c, 0x11, 0);
        self.put16(EXPRESS + 0x10, 0, 0x01fb);
        self.put16(EXPRESS + 0x12, 0x11, 0);
        let completer = u32::from(options.completer & 3) << 12;
        self.put32(DEVICE_CAPABILITIES_2, TIMEOUTS | completer, 0);
        self.put16(EXPRESS + 0x28, 0, 0x001f);
    }

    fn msix(&mut self, options: &Options) {
        let (bar, table, pending) = match options.msix {
            Msix::None => return,
            Msix::Memory => {
                let end = u64::from(options.memory_mib) << 20;
                (0, end - 0x2000, end - 0x1000)
            }
            Msix::Registers => (2, registers::MSIX_TABLE, registers::MSIX_PENDING),
        };
        self.put16(MSIX, u16::from_le_bytes([0x11, last(options) as u8]), 0);
        self.put16(MSIX + 2, VECTORS - 1, 0xc000);
        self.put32(MSIX + 4, table as u32 | bar, 0);
        self.put32(MSIX + 8, pending as u32 | bar, 0);
    }

    fn requester(&mut self, options: &Options) {
        if !options.requester {
            return;
        }
        // Version 1; no other behind it.
        self.put32(REQUESTER, 0x0001_0017, 0);
        // Without tags, a tag a vector, tags of the device; also of 16 bits; no table of them.
        self.put32(REQUESTER + 4, 0x0000_0107, 0);
        self.put32(REQUESTER + 8, 0, 0x0000_0307);
    }

    fn put8(&mut self, at: usize, value: u8, writable: u8) {
        self.bytes[at] = value;
        self.writable[at] = writable;
    }

    fn put16(&mut self, at: usize, value: u16, writable: u16) {
        for (i, (value, writable)) in value
            .to_le_bytes()
            .into_iter()
            .zip(writable.to_le_bytes())
            .enumerate()
        {
            self.put8(at + i, value, writable);
        }
    }

    fn put32(&mut self, at: usize, value: u32, writable: u32) {
        self.put16(at, value as u16, writable as u16);
        self.put16(at + 2, (value >> 16) as u16, (writable >> 16) as u16);
    }

    /// Reads; what is past the end is 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = place(offset, i).map_or(0, |at| self.bytes[at]);
        }
    }

    /// Writes what can be written.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let mut effect = Effect::default();
        for (i, &byte) in data.iter().enumerate() {
            let Some(at) = place(offset, i) else { break };
            if at == PMCSR && matches!(byte & 0b11, 1 | 2) && !self.has_d1_and_d2() {
                // A state that the device does not have: it stays where it is.
                continue;
            }
            effect.reset |= at == DEVICE_CONTROL + 1 && byte & START_RESET != 0;
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | byte & mask;
        }
        effect
    }

    /// Makes it what it is after a reset.
    pub fn reset(&mut self) {
        self.bytes.clone_from(&self.initial);
    }

    /// Changes which steering tags the device completes (see [`Options::completer`]).
    pub fn set_completer(&mut self, completer: u8) {
        let byte = (TIMEOUTS as u8, (completer & 3) << 4);
        for bytes in [&mut self.bytes, &mut self.initial] {
            [
                bytes[DEVICE_CAPABILITIES_2],
                bytes[DEVICE_CAPABILITIES_2 + 1],
            ] = byte.into();
        }
    }

    /// Whether memory decoding is on.
    #[must_use]
    pub fn decodes_memory(&self) -> bool {
        self.bytes[COMMAND] & MEMORY != 0
    }

    fn has_d1_and_d2(&self) -> bool {
        self.bytes[PM + 3] & (D1_D2 >> 8) as u8 != 0
    }

    /// The power state: 0 to 2, or 3 for D3hot.
    #[must_use]
    pub fn power_state(&self) -> u8 {
        self.bytes[PMCSR] & 0b11
    }
}

/// The last capability, if it has that.
fn last(options: &Options) -> usize {
    if options.second_pm { SECOND_PM } else { 0 }
}

/// The place of byte `i` from `offset` on, if there is one.
fn place(offset: u64, i: usize) -> Option<usize> {
    let at = usize::try_from(offset).ok()?.checked_add(i)?;
    (at < SIZE).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const N: usize>(config: &Config, at: usize) -> [u8; N] {
        let mut data = [0xee; N];
        config.read(at as u64, &mut data);
        data
    }

    fn read32(config: &Config, at: usize) -> u32 {
        u32::from_le_bytes(read(config, at))
    }

    fn default() -> Config {
        Config::new(&Options::default())
    }

    /// Ids and places of the capabilities, in the order of the chain.
    fn chain(config: &Config) -> Vec<(u8, usize)> {
        let mut found = Vec::new();
        let [mut at] = read(config, CAPABILITIES);
        while at != 0 {
            let [id, next] = read(config, usize::from(at));
            found.push((id, usize::from(at)));
            at = next;
            assert!(found.len() < 10);
        }
        found
    }

    #[test]
    fn capabilities_are_chained() {
        assert_eq!(
            chain(&default()),
            [(0x01, PM), (0x10, EXPRESS), (0x11, MSIX)]
        );
        let without = Config::new(&Options {
            msix: Msix::None,
            requester: false,
            ..Options::default()
        });
        assert_eq!(chain(&without), [(0x01, PM), (0x10, EXPRESS)]);
        for (msix, expected) in [
            (
                Msix::Registers,
                &[(0x01, PM), (0x10, EXPRESS), (0x11, MSIX), (0x01, SECOND_PM)][..],
            ),
            (
                Msix::None,
                &[(0x01, PM), (0x10, EXPRESS), (0x01, SECOND_PM)],
            ),
        ] {
            let second = Config::new(&Options {
                msix,
                second_pm: true,
                ..Options::default()
            });
            assert_eq!(chain(&second), expected);
        }
        assert_eq!(read32(&without, REQUESTER), 0);
        assert_eq!(read32(&default(), REQUESTER), 0x0001_0017);
    }

    #[test]
    fn bars_tell_their_size_and_type() {
        let mut config = default();
        config.write(BAR0 as u64, &[0xff; 12]);
        assert_eq!(read32(&config, BAR0), 0xff00_000c);
        assert_eq!(read32(&config, BAR0 + 4), 0xffff_ffff);
        assert_eq!(read32(&config, BAR2), 0xffff_c000);
        let big = Options {
            memory_mib: 8192,
            ..Options::default()
        };
        let mut config = Config::new(&big);
        config.write(BAR0 as u64, &[0xff; 8]);
        assert_eq!(read32(&config, BAR0), 0x0000_000c);
        assert_eq!(read32(&config, BAR0 + 4), 0xffff_fffe);
    }

    #[test]
    fn what_is_fixed_is_not_written() {
        let mut config = default();
        let before = config.bytes.clone();
        config.write(0, &[0xff; 4]);
        config.write(STATUS as u64, &[0xff; 10]);
        config.write(DEVICE_CAPABILITIES_2 as u64, &[0; 4]);
        assert_eq!(config.bytes, before);
        config.write(COMMAND as u64, &[0xff; 2]);
        assert_eq!(u16::from_le_bytes(read(&config, COMMAND)), COMMAND_BITS);
    }

    #[test]
    fn decoding_follows_command() {
        let mut config = default();
        assert!(!config.decodes_memory());
        config.write(COMMAND as u64, &[MEMORY]);
        assert!(config.decodes_memory());
        // The high byte alone changes nothing in the low one.
        config.write(COMMAND as u64 + 1, &[0x04]);
        assert!(config.decodes_memory());
        config.write(COMMAND as u64, &0x0400_u16.to_le_bytes());
        assert!(!config.decodes_memory());
    }

    #[test]
    fn power_states_are_d0_and_d3hot() {
        let mut config = default();
        for (asked, is) in [(3, 3), (1, 3), (2, 3), (0, 0), (1, 0), (2, 0), (3, 3)] {
            config.write(PMCSR as u64, &[asked]);
            assert_eq!(config.power_state(), is, "{asked}");
        }
        assert_eq!(
            u16::from_le_bytes(read(&config, PMCSR)) & NO_SOFT_RESET,
            NO_SOFT_RESET
        );
    }

    #[test]
    fn d1_and_d2_are_there_when_asked_for() {
        let mut config = Config::new(&Options {
            d1_d2: true,
            ..Options::default()
        });
        assert_eq!(u16::from_le_bytes(read(&config, PM + 2)), 0x0603);
        for state in [1, 2, 3, 0, 2, 0] {
            config.write(PMCSR as u64, &[state]);
            assert_eq!(config.power_state(), state);
        }
    }

    #[test]
    fn bit_15_of_device_control_asks_for_a_reset() {
        let at = DEVICE_CONTROL as u64;
        let mut config = default();
        assert!(config.write(at, &0x8000_u16.to_le_bytes()).reset);
        assert!(config.write(at + 1, &[0x80]).reset);
        assert!(config.write(at - 2, &0x8000_0000_u32.to_le_bytes()).reset);
        assert!(!config.write(at - 4, &0x8000_0000_u32.to_le_bytes()).reset);
        assert!(!config.write(at, &0x7fff_u16.to_le_bytes()).reset);
        assert!(!config.write(at, &[0x80]).reset);
        // It reads as 0.
        assert_eq!(
            u16::from_le_bytes(read(&config, DEVICE_CONTROL)) & 0x8000,
            0
        );
    }

    #[test]
    fn a_reset_leaves_nothing_that_was_written() {
        let mut config = default();
        let before = config.bytes.clone();
        config.write(COMMAND as u64, &[0xff; 2]);
        config.write(BAR0 as u64, &[0xff; 12]);
        config.write(PMCSR as u64, &[3]);
        assert_ne!(config.bytes, before);
        config.reset();
        assert_eq!(config.bytes, before);
    }

    #[test]
    fn the_completer_is_in_device_capabilities_2() {
        for completer in 0..4 {
            let mut config = Config::new(&Options {
                completer,
                ..Options::default()
            });
            let expected = 0x12 | u32::from(completer) << 12;
            assert_eq!(read32(&config, DEVICE_CAPABILITIES_2), expected);
            config.set_completer(completer ^ 3);
            config.reset();
            let expected = 0x12 | u32::from(completer ^ 3) << 12;
            assert_eq!(read32(&config, DEVICE_CAPABILITIES_2), expected);
        }
    }

    #[test]
    fn the_msix_table_is_where_it_is_asked_for() {
        let config = default();
        assert_eq!(read32(&config, MSIX + 4), 0x2002);
        assert_eq!(read32(&config, MSIX + 8), 0x3002);
        let config = Config::new(&Options {
            msix: Msix::Memory,
            ..Options::default()
        });
        assert_eq!(read32(&config, MSIX + 4), 0x00ff_e000);
        assert_eq!(read32(&config, MSIX + 8), 0x00ff_f000);
        assert_eq!(u16::from_le_bytes(read(&config, MSIX + 2)), VECTORS - 1);
    }

    #[test]
    fn what_is_past_the_end_is_zero_and_stays_so() {
        let mut config = default();
        config.write(SIZE as u64 - 2, &[0xff; 4]);
        config.write(u64::MAX - 1, &[0xff; 1]);
        assert_eq!(read(&config, SIZE - 2), [0; 4]);
        let mut data = [0xee; 2];
        config.read(u64::MAX - 1, &mut data);
        assert_eq!(data, [0; 2]);
    }
}
