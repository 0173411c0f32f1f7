//! A driver for NVMe that reads a block, and leases the page of its doorbells to another process,
//! which rings for it.
//!
//! ```console
//! # barlease device bind 0000:00:05.0
//! # cargo run --example nvme 0000:00:05.0
//! ```

use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use barlease::{Bdf, Device, DmaBuffer, Lease, config::Command, dma};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const TIMEOUT: Duration = Duration::from_secs(60);
/// Where the doorbells are; entries of each queue.
const DOORBELLS: usize = 0x1000;
const ENTRIES: u16 = 16;

/// A pair of queues, and how far we are.
struct Queue {
    submissions: DmaBuffer,
    completions: DmaBuffer,
    turn: u16,
}

impl Queue {
    fn new(device: &Device) -> Result<Self> {
        let page = || DmaBuffer::new(device.require_iommu()?, 4096);
        Ok(Self {
            submissions: page()?,
            completions: page()?,
            turn: 0,
        })
    }

    /// Submits a command, has `ring` tell the device, and waits for the completion. Queues do not
    /// go round here: less than `ENTRIES` commands are submitted to each.
    fn run(
        &mut self,
        [operation, namespace, dword10, dword11]: [u32; 4],
        data: &DmaBuffer,
        ring: impl FnOnce(u16) -> Result<()>,
    ) -> Result<()> {
        let turn = usize::from(self.turn);
        let entry = self.submissions.window(turn * 64..turn * 64 + 64)?;
        entry.write(0, operation | u32::from(self.turn) << 16)?;
        entry.write(4, namespace)?;
        entry.write(24, data.iova())?;
        entry.write(40, dword10)?;
        entry.write(44, dword11)?;
        let status = self.completions.typed_read_only::<u16>(turn * 16 + 14)?;
        self.turn += 1;
        dma::write_barrier();
        ring(self.turn)?;
        // The lowest bit tells that the entry is new.
        let status = status.poll_until(1, 1, TIMEOUT)? >> 1;
        dma::read_barrier();
        if status != 0 {
            return Err(format!("command {operation:#x} failed: {status:#x}").into());
        }
        Ok(())
    }
}

/// What was read.
pub struct Found {
    /// What the controller calls itself.
    pub model: String,
    /// The first block of the first namespace.
    pub block: Vec<u8>,
}

/// Drives the controller. `holder` is the socket of whoever is to ring.
pub fn run(bdf: Bdf, mut holder: &UnixStream) -> Result<Found> {
    let device = Device::open(bdf)?;
    device
        .config()?
        .update_command(|command| command | Command::MEMORY | Command::MASTER)?;
    let registers = device.map_region(0, ..0x2000)?;
    let stride = 4 << (registers.read::<u64>(0)? >> 32 & 0xf);
    let doorbells = registers.array::<u32>(DOORBELLS, 4, stride)?;

    // Off; the admin queues; on, with entries of 64 and 16 bytes.
    let configuration = registers.typed::<u32>(0x14)?;
    let status = registers.typed_read_only::<u32>(0x1c)?;
    configuration.write(0);
    status.poll_until(1, 0, TIMEOUT)?;
    let mut admin = Queue::new(&device)?;
    let last = u32::from(ENTRIES - 1);
    registers.write(0x24, last << 16 | last)?;
    registers.write(0x28, admin.submissions.iova())?;
    registers.write(0x30, admin.completions.iova())?;
    configuration.write(4 << 20 | 6 << 16 | 1);
    status.poll_until(1, 1, TIMEOUT)?;

    let data = DmaBuffer::new(device.require_iommu()?, 4096)?;
    let ring = |tail: u16| {
        doorbells.get_write_only(0)?.write(tail.into());
        Ok(())
    };
    // Identify the controller.
    admin.run([0x06, 0, 1, 0], &data, ring)?;
    let mut model = [0; 40];
    data.copy_to(24, &mut model)?;

    // A queue of completions and one of submissions, both number 1, in one piece of memory each.
    let mut io = Queue::new(&device)?;
    admin.run([0x05, 0, last << 16 | 1, 1], &io.completions, ring)?;
    admin.run(
        [0x01, 0, last << 16 | 1, 1 << 16 | 1],
        &io.submissions,
        ring,
    )?;

    // The holder gets the page with the doorbells, and not one byte more.
    let page = DOORBELLS as u64;
    let lease = device.export(0).range(page..page + 0x1000).export()?;
    lease.send(holder)?;
    let doorbell = (2 * stride) as u32;
    // Read one block of the first namespace: it is rung for by the holder.
    io.run([0x02, 1, 0, 0], &data, |tail| {
        let mut message = doorbell.to_le_bytes().to_vec();
        message.extend(u32::from(tail).to_le_bytes());
        Ok(holder.write_all(&message)?)
    })?;
    device.revoke(&lease)?;
    let mut block = vec![0; 512];
    data.copy_to(0, &mut block)?;
    configuration.write(0);
    status.poll_until(1, 0, TIMEOUT)?;
    let model = String::from_utf8_lossy(&model).trim().to_owned();
    Ok(Found { model, block })
}

/// Takes the lease, and rings each time that it is told to. It needs no device and no privilege.
pub fn hold(mut socket: &UnixStream) -> Result<()> {
    let doorbells = Lease::receive(socket)?.map_guarded()?;
    let mut message = [0; 8];
    while socket.read_exact(&mut message).is_ok() {
        let [o, p, q, r, value @ ..] = message;
        let offset = u32::from_le_bytes([o, p, q, r]);
        doorbells.write(offset as usize, u32::from_ne_bytes(value))?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let usage = "usage: nvme BDF";
    let argument = std::env::args().nth(1).ok_or(usage)?;
    // The holder is this program again, with the socket as its standard input.
    if argument == "--hold" {
        let stdin = std::os::fd::AsFd::as_fd(&std::io::stdin()).try_clone_to_owned()?;
        return hold(&stdin.into());
    }
    let (ours, theirs) = UnixStream::pair()?;
    let mut child = std::process::Command::new(std::env::current_exe()?)
        .arg("--hold")
        .stdin(std::os::fd::OwnedFd::from(theirs))
        .spawn()?;
    let found = run(argument.parse()?, &ours)?;
    drop(ours);
    child.wait()?;
    println!("{}: {:02x?}...", found.model, &found.block[..16]);
    Ok(())
}
