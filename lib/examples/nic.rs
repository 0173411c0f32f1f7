//! A look at an Intel network adapter (igb: 82576 and others): its address, its link, and an
//! interrupt that it is asked for.
//!
//! ```console
//! # barlease device bind 0000:03:00.0
//! # cargo run --example nic 0000:03:00.0
//! ```

use std::error::Error;
use std::time::Duration;

use barlease::{Bdf, Device, InterruptKind, config::Command};

barlease::register_value! {
    /// STATUS.
    pub struct Status: u32 {
        /// Whether there is a link.
        link, with_link: 1;
        /// 10, 100 and 1000 Mb/s are 0, 1 and 2.
        speed, with_speed: 6..=7;
    }
}

barlease::register_value! {
    /// MDIC: how registers of the part that drives the cable (the PHY) are accessed.
    struct Phy: u32 {
        data, with_data: 0..=15;
        register, with_register: 16..=20;
        address, with_address: 21..=25;
        write, with_write: 26;
        ready, with_ready: 28;
    }
}

const TIMEOUT: Duration = Duration::from_secs(60);

/// The adapter's answers.
#[derive(Debug)]
pub struct Found {
    /// Its address in the network.
    pub address: [u8; 6],
    /// Its link.
    pub status: Status,
    /// The number of the interrupt on this host: `/proc/irq/N` says which CPUs serve it.
    pub irq: Option<u32>,
}

/// Asks the adapter.
pub fn run(bdf: Bdf) -> Result<Found, Box<dyn Error>> {
    let device = Device::open(bdf)?;
    device.config()?.enable(Command::MASTER)?;
    let registers = device.map_region(0, ..)?;

    // Two registers: the address is little-endian in them.
    let [low, high] = [0x5400, 0x5404].map(|offset| registers.typed_read_only::<u32>(offset));
    let [a, b, c, d] = low?.read().to_le_bytes();
    let [e, f, ..] = high?.read().to_le_bytes();

    // The PHY is to negotiate the link anew: its first register, CONTROL.
    let phy = registers.typed::<Phy>(0x0020)?;
    let control = Phy::default().with_address(1).with_data(0x1200);
    phy.write(control.with_write(true));
    phy.poll(TIMEOUT, Phy::ready)?;
    let status = registers.typed_read_only::<Status>(0x0008)?;
    let status = status.poll(TIMEOUT, Status::link)?;

    // One bit a vector; vector 1 is wanted, and made up.
    let vectors = device.enable_interrupts(InterruptKind::Msix, 2)?;
    registers.write(0x1514, 1u32 << 4)?;
    let wanted = registers.typed::<u32>(0x1524)?;
    let made_up = registers.write_only::<u32>(0x1520)?;
    wanted.write(1 << 1);
    made_up.write(1 << 1);
    let came = vectors[1].wait_timeout(TIMEOUT)?;
    came.ok_or("no interrupt came")?;
    Ok(Found {
        address: [a, b, c, d, e, f],
        status,
        irq: device.irq_number(InterruptKind::Msix, 1)?,
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let bdf = std::env::args().nth(1).ok_or("usage: nic BDF")?.parse()?;
    let found = run(bdf)?;
    println!("{found:02x?}");
    Ok(())
}
