//! A driver for NVMe that reads a block, and leases the page of its doorbells to another process,
//! which rings for it.
//!
//! ```console
//! # barlease device bind 0000:00:05.0
//! # cargo run --example nvme 0000:00:05.0 /run/bell &
//! # cargo run --example nvme hold /run/bell
//! ```

use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use barlease::{Bdf, Device, DmaBuffer, Lease, config::Command, dma};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const TIMEOUT: Duration = Duration::from_secs(60);
/// Where the doorbells are, and the number of the last entry of each queue.
const DOORBELLS: usize = 0x1000;
const LAST: u32 = 15;

/// A page of submissions and one of completions, and how far we are. They do not go round here.
struct Queue(DmaBuffer, u32);

impl Queue {
    /// Submits a command, has `ring` tell the device, and waits for the completion.
    fn run(
        &mut self,
        [operation, namespace, dword10, dword11]: [u32; 4],
        data: u64,
        ring: impl FnOnce(u32) -> Result<()>,
    ) -> Result<()> {
        let Self(memory, turn) = self;
        let entry = memory.window(*turn as usize * 64..)?;
        entry.write(0, operation | *turn << 16)?;
        entry.write(4, namespace)?;
        entry.write(24, data)?;
        entry.write(40, dword10)?;
        entry.write(44, dword11)?;
        // The lowest bit tells that a completion is new.
        let status = memory.typed_read_only::<u16>(4096 + *turn as usize * 16 + 14)?;
        *turn += 1;
        dma::write_barrier();
        ring(*turn)?;
        let status = status.poll_until(1, 1, TIMEOUT)? >> 1;
        dma::read_barrier();
        match status {
            0 => Ok(()),
            _ => Err(format!("command {operation:#x} failed: {status:#x}").into()),
        }
    }
}

/// Drives the controller: what it calls itself, and its first block. `holder` is to ring.
pub fn run(bdf: Bdf, mut holder: &UnixStream) -> Result<(String, [u8; 512])> {
    let device = Device::open(bdf)?;
    device.config()?.enable(Command::MASTER)?;
    let registers = device.map_region(0, ..0x2000)?;
    let stride = 4 << (registers.read::<u64>(0)? >> 32 & 0xf);
    let doorbells = registers.array::<u32>(DOORBELLS, 4, stride)?;

    // Opening has reset it. The admin queues; on, with entries of 64 and 16 bytes.
    let mut admin = Queue(device.dma_buffer(8192)?, 0);
    registers.write(0x24, LAST << 16 | LAST)?;
    registers.write(0x28, admin.0.iova())?;
    registers.write(0x30, admin.0.iova() + 4096)?;
    registers.write(0x14, 4u32 << 20 | 6 << 16 | 1)?;
    let status = registers.typed_read_only::<u32>(0x1c)?;
    status.poll_until(1, 1, TIMEOUT)?;

    // Identify the controller.
    let buffer = device.dma_buffer(4096)?;
    let data = buffer.iova();
    let ring = |tail| {
        doorbells.get_write_only(0)?.write(tail);
        Ok(())
    };
    admin.run([0x06, 0, 1, 0], data, ring)?;
    let mut model = [0; 40];
    buffer.copy_to(24, &mut model)?;

    // A queue of completions and one of submissions, both number 1.
    let mut io = Queue(device.dma_buffer(8192)?, 0);
    let queue = LAST << 16 | 1;
    admin.run([0x05, 0, queue, 1], io.0.iova() + 4096, ring)?;
    admin.run([0x01, 0, queue, 1 << 16 | 1], io.0.iova(), ring)?;

    // The holder gets the page with the doorbells, and not one byte more.
    let page = DOORBELLS as u64;
    let lease = device.export(0).range(page..page + 0x1000).export()?;
    lease.send(holder)?;
    // Read one block of the first namespace: it is rung for by the holder.
    let offset = (2 * stride) as u64;
    let ring = |tail| Ok(holder.write_all(&(offset << 32 | u64::from(tail)).to_le_bytes())?);
    io.run([0x02, 1, 0, 0], data, ring)?;
    device.revoke(&lease)?;
    let mut block = [0; 512];
    buffer.copy_to(0, &mut block)?;
    Ok((String::from_utf8_lossy(&model).trim().to_owned(), block))
}

/// Takes the lease, and rings each time that it is told to. It needs no device and no privilege.
pub fn hold(mut socket: &UnixStream) -> Result<()> {
    let doorbells = Lease::receive(socket)?.map_guarded()?;
    let mut message = [0; 8];
    while socket.read_exact(&mut message).is_ok() {
        let message = u64::from_le_bytes(message);
        doorbells.write((message >> 32) as usize, message as u32)?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(what), Some(socket)) = (arguments.next(), arguments.next()) else {
        return Err("usage: nvme BDF SOCKET, or nvme hold SOCKET".into());
    };
    if what == "hold" {
        return hold(&UnixStream::connect(socket)?);
    }
    let (model, block) = run(what.parse()?, &UnixListener::bind(socket)?.accept()?.0)?;
    println!("{model}: {:02x?}...", &block[..16]);
    Ok(())
}
