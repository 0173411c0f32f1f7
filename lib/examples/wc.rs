//! The same BAR uncached and write-combining at once, by an alias of its region.
//!
//! ```console
//! # barlease device bind 0000:00:02.0
//! # cargo run --release --example wc 0000:00:02.0 0
//! ```

use std::error::Error;
use std::time::{Duration, Instant};

use barlease::{Bdf, Device, Mapping, MemoryType, dma};

/// Bytes that are filled.
const LENGTH: u64 = 2 << 20;

/// The times it takes to fill the beginning of the BAR, uncached and write-combining.
pub struct Times {
    /// Through the BAR itself.
    pub uncached: Duration,
    /// Through the alias.
    pub combining: Duration,
}

/// Fills the beginning of a BAR of plain memory, such as a frame buffer, through both views.
pub fn run(bdf: Bdf, bar: u32) -> Result<Times, Box<dyn Error>> {
    let device = Device::open(bdf)?;
    let types = device.region(bar)?.memory_types();
    println!("BAR {bar} can be mapped as {types:?}");

    // A region of its own: what is mapped of it is write-combining, the BAR stays uncached.
    let alias = device.alias_region(bar, MemoryType::Wc)?;
    let uncached = device.map_region(bar, ..LENGTH)?;
    let combining = device.map_region(alias, ..LENGTH)?;
    let times = Times {
        uncached: fill(&uncached, 0x11)?,
        combining: fill(&combining, 0x22)?,
    };

    // Both show the same memory. For registers take the uncached one: what is stored to the other
    // may come late, together, and in another order.
    let mut seen = vec![0; LENGTH as usize];
    uncached.copy_to(0, &mut seen)?;
    if seen.iter().any(|byte| *byte != 0x22) {
        return Err("the views differ: the BAR is no plain memory".into());
    }
    Ok(times)
}

fn fill(mapping: &Mapping, value: u8) -> Result<Duration, Box<dyn Error>> {
    // The first touch of a page is a fault.
    mapping.fill(0..mapping.len(), 0)?;
    let begin = Instant::now();
    mapping.fill(0..mapping.len(), value)?;
    // The processor sends off what is still in its buffers.
    dma::write_barrier();
    Ok(begin.elapsed())
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let bdf = arguments.next().ok_or("usage: wc BDF BAR")?.parse()?;
    let bar = arguments.next().ok_or("usage: wc BDF BAR")?.parse()?;
    let times = run(bdf, bar)?;
    println!("uncached        {:?}", times.uncached);
    println!("write-combining {:?}", times.combining);
    Ok(())
}
