//! A driver for QEMU's `edu`: registers, an interrupt, DMA.
//!
//! ```console
//! # qemu-system-x86_64 -device edu ...
//! # barlease device bind 0000:00:06.0
//! # cargo run --example edu 0000:00:06.0 10
//! ```

use std::error::Error;
use std::time::Duration;

use barlease::{Bdf, Device, DmaOptions, InterruptKind, config::Command, dma};

barlease::register_value! {
    /// STATUS: what the device does, and what it is to do.
    struct Status: u32 {
        /// Raise an interrupt when the factorial is there.
        interrupt, with_interrupt: 7;
    }
}

/// Computes the factorial of a number, and has it copied through the device's own memory.
pub fn run(bdf: Bdf, number: u32) -> Result<u32, Box<dyn Error>> {
    let device = Device::open(bdf)?;
    // It may send interrupts and do DMA.
    device.config()?.enable(Command::MASTER)?;
    let registers = device.map_region(0, ..0x1000)?;

    // Each of these is checked here, once: the accesses below check nothing.
    let factorial = registers.typed::<u32>(0x08)?;
    let status = registers.typed::<Status>(0x20)?;
    let raised = registers.typed_read_only::<u32>(0x24)?;
    let acknowledge = registers.write_only::<u32>(0x64)?;

    let interrupt = device.enable_interrupt(InterruptKind::Msi)?;
    status.modify(|status| status.with_interrupt(true));
    factorial.write(number);
    let timeout = Duration::from_secs(60);
    interrupt
        .wait_timeout(timeout)?
        .ok_or("no interrupt came")?;
    acknowledge.write(raised.read());
    let result = factorial.read();

    // The device has 28 address lines for DMA (QEMU's `dma_mask` changes that), and a buffer of
    // 4 KiB at 0x40000.
    let options = DmaOptions::new().below(1 << 28);
    let buffer = options.allocate(device.require_iommu()?, 4096)?;
    buffer.write(0, result)?;
    const ITS_BUFFER: u64 = 0x4_0000;
    const START: u64 = 1;
    const TO_MEMORY: u64 = 2;
    let [source, target, count, command] =
        [0x80, 0x88, 0x90, 0x98].map(|offset| registers.typed::<u64>(offset));
    let (source, target, count, command) = (source?, target?, count?, command?);
    for (from, to, direction) in [
        (buffer.iova(), ITS_BUFFER, 0),
        (ITS_BUFFER, buffer.iova() + 8, TO_MEMORY),
    ] {
        source.write(from);
        target.write(to);
        count.write(4);
        // Our writes to memory are there before the device is told to read it.
        dma::write_barrier();
        command.write(START | direction);
        command.poll_until(START, 0, timeout)?;
        dma::read_barrier();
    }
    Ok(buffer.read(8)?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let bdf = arguments.next().ok_or("usage: edu BDF NUMBER")?.parse()?;
    let number = arguments.next().ok_or("usage: edu BDF NUMBER")?.parse()?;
    println!("{}", run(bdf, number)?);
    Ok(())
}
