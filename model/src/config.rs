// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! Which part of a config-space write may take memory away.
//!
//! Decided by position only. The value is never looked at: the core copies it from user memory
//! after us, and a process that races itself would show it another one
//! (`drivers/vfio/pci/vfio_pci_config.c`, `vfio_pci_config_rw_single`).
//!
//! A write is cut at dwords. The core cuts it further, into naturally aligned pieces of at most 4
//! bytes that never cross a dword, so a cut at a dword changes nothing of what it does.

/// Offset of COMMAND (PCI Local Bus 3.0, 6.2.2); the memory bit is in its low byte.
const COMMAND: u64 = 0x04;
/// Offset of PMCSR in the power-management capability; the power state is in its low byte (PCI Bus
/// Power Management Interface 1.2, 3.2.4).
const PMCSR: u64 = 4;

/// Bytes of a dword.
const DWORD: u64 = 4;

/// A part of a write to config space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Offset in config space.
    pub pos: u64,
    /// Bytes.
    pub len: u64,
    /// Whether it may take memory away.
    pub sensitive: bool,
}

/// The bytes of a function's config space that decide whether its memory can be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sensitive {
    /// Offset of PMCSR; that of COMMAND where there is none.
    pmcsr: u64,
}

impl Sensitive {
    /// Those of a function whose power-management capability, if it has one, is at this offset, dword
    /// aligned.
    pub const fn new(pm_capability: Option<u8>) -> Self {
        Self {
            pmcsr: match pm_capability {
                Some(offset) => offset as u64 + PMCSR,
                None => COMMAND,
            },
        }
    }

    /// Whether a write of `len` bytes at `pos` may take memory away. A position may be that of a
    /// write elsewhere, below or above, with a difference modulo 2^64 from the beginning of config
    /// space: of such a write this may say that it does, if it is no further away than its length.
    #[inline]
    pub const fn touches(&self, pos: u64, len: u64) -> bool {
        COMMAND.wrapping_sub(pos) < len || self.pmcsr.wrapping_sub(pos) < len
    }

    /// Whether a piece has the power state in it.
    pub const fn has_power_state(&self, piece: Piece) -> bool {
        self.pmcsr != COMMAND && self.pmcsr.wrapping_sub(piece.pos) < piece.len
    }

    /// The first piece of a write of `[pos, end)`; `None` when nothing is left.
    ///
    /// A sensitive piece is at most a dword; what lies before, between and after is as long as can
    /// be. The pieces of a write, one after the other, are the write.
    pub fn next_piece(&self, pos: u64, end: u64) -> Option<Piece> {
        if pos >= end {
            return None;
        }
        let dword = pos & !(DWORD - 1);
        let dword_end = dword.saturating_add(DWORD).min(end);
        if self.touches(pos, dword_end - pos) {
            return Some(Piece {
                pos,
                len: dword_end - pos,
                sensitive: true,
            });
        }
        let stop = [COMMAND, self.pmcsr]
            .into_iter()
            .filter(|&byte| byte > pos && byte < end)
            .min()
            .map_or(end, |byte| byte & !(DWORD - 1));
        Some(Piece {
            pos,
            len: stop - pos,
            sensitive: false,
        })
    }
}
