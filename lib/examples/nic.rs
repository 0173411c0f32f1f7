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
    /// Causes of interrupts: which there are, which are wanted, which to make up.
    pub struct Causes: u32 {
        /// The link came or went.
        link, with_link: 2;
        /// There is a cause that is wanted.
        asserted, with_asserted: 31;
    }
}

/// What the adapter says.
#[derive(Debug)]
pub struct Found {
    /// Its address in the network.
    pub address: [u8; 6],
    /// Its link.
    pub status: Status,
    /// Why it has interrupted.
    pub causes: Causes,
    /// The number of the interrupt on this host: `/proc/irq/N` says which CPUs serve it.
    pub irq: Option<u32>,
}

/// Asks the adapter.
pub fn run(bdf: Bdf) -> Result<Found, Box<dyn Error>> {
    let device = Device::open(bdf)?;
    device.config()?.enable(Command::MASTER)?;
    let registers = device.map_region(0, ..)?;

    let status = registers.typed_read_only::<Status>(0x0008)?;
    // Two registers: the address is little-endian in them.
    let [low, high] = [0x5400, 0x5404].map(|offset| registers.typed_read_only::<u32>(offset));
    let [a, b, c, d] = low?.read().to_le_bytes();
    let [e, f, ..] = high?.read().to_le_bytes();

    // It asks for an interrupt as if the link had changed. Reading the causes clears them.
    let interrupt = device.enable_interrupt(InterruptKind::Msi)?;
    let causes = registers.typed_read_only::<Causes>(0x1500)?;
    let made_up = registers.write_only::<Causes>(0x1504)?;
    let wanted = registers.typed::<Causes>(0x1508)?;
    let link = Causes::default().with_link(true);
    wanted.write(link);
    made_up.write(link);
    interrupt
        .wait_timeout(Duration::from_secs(60))?
        .ok_or("no interrupt came")?;
    Ok(Found {
        address: [a, b, c, d, e, f],
        status: status.read(),
        causes: causes.read(),
        irq: device.irq_number(InterruptKind::Msi, 0)?,
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let bdf = std::env::args().nth(1).ok_or("usage: nic BDF")?.parse()?;
    let found = run(bdf)?;
    println!("{found:02x?}");
    Ok(())
}
