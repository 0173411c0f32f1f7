//! QEMU's `bochs-display`: a frame buffer in BAR 0, registers in BAR 2
//! (QEMU, `docs/specs/standard-vga.rst`).

use anyhow::{Context, Result, ensure};
use barlease::{Bdf, Device, Mapping};

/// The BAR with the frame buffer.
pub(crate) const FRAME_BUFFER: u32 = 0;
/// The BAR with the registers.
const REGISTERS: u32 = 2;

/// Pixels of a row. A row of 32-bit pixels is one page, so any rows can be leased.
pub(crate) const WIDTH: usize = 1024;
/// Rows.
pub(crate) const HEIGHT: usize = 768;
/// Bytes of a row.
pub(crate) const PITCH: usize = WIDTH * 4;

/// The registers of the Bochs VBE interface, 16 bits each.
const DISPI: u64 = 0x500;
const ID: u64 = 0;
const XRES: u64 = 1;
const YRES: u64 = 2;
const BPP: u64 = 3;
const ENABLE: u64 = 4;
/// Enabled, with a linear frame buffer.
const ENABLED_LINEAR: u16 = 0x41;
/// The writes that set the mode: offsets in the BAR of registers, and values, in this order.
pub(crate) const MODE: [(u64, u16); 5] = [
    (DISPI + 2 * ENABLE, 0),
    (DISPI + 2 * XRES, WIDTH as u16),
    (DISPI + 2 * YRES, HEIGHT as u16),
    (DISPI + 2 * BPP, 32),
    (DISPI + 2 * ENABLE, ENABLED_LINEAR),
];

/// The display adapter, which only its owner has.
#[derive(Debug)]
pub(crate) struct Adapter {
    pub(crate) device: Device,
    pub(crate) screen: Mapping,
}

impl Adapter {
    /// Opens the device and sets a mode.
    pub(crate) fn open(bdf: Bdf) -> Result<Self> {
        let device = Device::open(bdf).context("open the display adapter")?;
        let id = read(&device, ID)?;
        ensure!(
            id & 0xfff0 == 0xb0c0,
            "{bdf} is no Bochs display: it identifies itself as {id:#x}"
        );
        for (offset, value) in MODE {
            device.write_region(REGISTERS, offset, &value.to_ne_bytes())?;
        }
        let screen = device.map_region(FRAME_BUFFER, 0..(HEIGHT * PITCH) as u64)?;
        Ok(Self { device, screen })
    }

    /// How many bytes of rows differ from `value`.
    pub(crate) fn changed(&self, rows: std::ops::Range<usize>, value: u8) -> Result<usize> {
        let mut row = vec![0; PITCH];
        let mut changed = 0;
        for y in rows {
            self.screen.copy_to(y * PITCH, &mut row)?;
            changed += row.iter().filter(|&&byte| byte != value).count();
        }
        Ok(changed)
    }
}

fn read(device: &Device, register: u64) -> Result<u16> {
    let mut value = [0; 2];
    device.read_region(REGISTERS, DISPI + 2 * register, &mut value)?;
    Ok(u16::from_ne_bytes(value))
}
