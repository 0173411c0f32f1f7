// SPDX-License-Identifier: GPL-2.0

//! QEMU's `edu` device: a DMA engine with 4 KiB of memory of its own.
//!
//! Reference: `docs/specs/edu.rst` of QEMU.

use crate::{
    abi::{Entry, TRANSFER_MAX},
    attachments,
    sys::{self, pci::Function},
};
use kernel::{
    prelude::*,
    time::{Delta, delay::fsleep},
};

/// Registers of BAR0.
const SOURCE: usize = 0x80;
const DESTINATION: usize = 0x88;
const COUNT: usize = 0x90;
const COMMAND: usize = 0x98;

/// COMMAND: begin; cleared by the device at the end.
const START: u64 = 1 << 0;
/// COMMAND: from the device's memory to the bus.
const TO_BUS: u64 = 1 << 1;

/// Where the engine sees the device's memory.
const OWN_MEMORY: u64 = 0x40000;

/// The byte that fills the device's memory before a read that is expected to fail.
const BLANK: u8 = 0xEE;

kernel::sync::global_lock! {
    /// The device, while it is bound.
    // SAFETY: Initialized when the module is, before anything else.
    pub(crate) unsafe(uninit) static EDU: Mutex<Option<Edu>> = None;
}

/// The driver of the device.
pub(crate) struct Driver;

#[allow(unsafe_code)] // The trait asks for a promise about time that types cannot give.
// SAFETY: `unbound` detaches everything and drops what `bound` was given.
unsafe impl sys::pci::Driver for Driver {
    const NAME: &'static CStr = c"barlease_importer";
    const VENDOR: u32 = 0x1234;
    const DEVICE: u32 = 0x11e8;
    // The engine has so many with `-device edu,dma_mask=0xffffffff`.
    const DMA_BITS: u32 = 32;

    fn bound(function: Function) -> Result {
        let mut edu = EDU.lock();
        if edu.is_some() {
            return Err(EBUSY);
        }
        *edu = Some(Edu { function });
        Ok(())
    }

    fn unbound() {
        let mut edu = EDU.lock();
        attachments::detach_all();
        *edu = None;
    }
}

/// A bound device.
pub(crate) struct Edu {
    function: Function,
}

impl Edu {
    /// The device as importers attach it.
    pub(crate) fn function(&self) -> &Function {
        &self.function
    }

    /// Reads from the bus, at most [`TRANSFER_MAX`] bytes. Blocked bytes come as [`BLANK`] if
    /// `blank` is set, and else as the device had them in its memory.
    pub(crate) fn read(
        &mut self,
        pieces: impl Iterator<Item = Entry>,
        bytes: &mut [u8],
        blank: bool,
    ) -> Result {
        let buffer = self.function.buffer_address();
        if blank {
            self.function.buffer().fill(BLANK);
            self.run(buffer, OWN_MEMORY, TRANSFER_MAX as u64, 0)?;
        }
        self.fetch(pieces)?;
        self.run(OWN_MEMORY, buffer, bytes.len() as u64, TO_BUS)?;
        let buffer = self.function.buffer().get(..bytes.len()).ok_or(EINVAL)?;
        bytes.copy_from_slice(buffer);
        Ok(())
    }

    /// Writes to the bus, at most [`TRANSFER_MAX`] bytes.
    pub(crate) fn write(&mut self, pieces: impl Iterator<Item = Entry>, bytes: &[u8]) -> Result {
        let address = self.function.buffer_address();
        let buffer = self.function.buffer();
        let buffer = buffer.get_mut(..bytes.len()).ok_or(EINVAL)?;
        buffer.copy_from_slice(bytes);
        self.run(address, OWN_MEMORY, bytes.len() as u64, 0)?;
        self.put(pieces)
    }

    /// Copies from one place of the bus to another, at most [`TRANSFER_MAX`] bytes.
    pub(crate) fn copy(
        &mut self,
        from: impl Iterator<Item = Entry>,
        to: impl Iterator<Item = Entry>,
    ) -> Result {
        self.fetch(from)?;
        self.put(to)
    }

    /// From the bus to the device's memory.
    fn fetch(&mut self, pieces: impl Iterator<Item = Entry>) -> Result {
        let mut at = OWN_MEMORY;
        for piece in pieces {
            self.run(piece.address, at, piece.length, 0)?;
            at += piece.length;
        }
        Ok(())
    }

    /// From the device's memory to the bus.
    fn put(&mut self, pieces: impl Iterator<Item = Entry>) -> Result {
        let mut at = OWN_MEMORY;
        for piece in pieces {
            self.run(at, piece.address, piece.length, TO_BUS)?;
            at += piece.length;
        }
        Ok(())
    }

    /// Runs the engine, which takes a tenth of a second, to its end.
    fn run(&mut self, source: u64, destination: u64, count: u64, direction: u64) -> Result {
        self.function.write(SOURCE, source);
        self.function.write(DESTINATION, destination);
        self.function.write(COUNT, count);
        self.function.write(COMMAND, START | direction);
        for _ in 0..5_000 {
            if self.function.read(COMMAND) & START == 0 {
                return Ok(());
            }
            fsleep(Delta::from_millis(1));
        }
        Err(ETIMEDOUT)
    }
}
