// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! Which write to config space may take memory away.
//!
//! The position decides, never the value: the core copies the value from user memory after us, and
//! a process that races itself would show it another one (`vfio_pci_config_rw_single` in
//! `drivers/vfio/pci/vfio_pci_config.c`).

/// Offset of COMMAND (PCI Local Bus 3.0, 6.2.2); the memory bit is in its low byte.
const COMMAND: u64 = 0x04;
/// Id of the power-management capability, and its length.
const PM: u8 = 0x01;
const PM_LENGTH: usize = 8;
/// Offset of PMCSR in it; the power state is in the low byte (PCI Bus Power Management Interface
/// 1.2, 3.2.4).
const PMCSR: usize = 4;

/// Bytes of config space that have capabilities of this kind.
pub const LENGTH: usize = 256;

/// Longest write that [`may_cover`] looks at.
const SHORT: u64 = 4;

/// A map for [`may_cover`]: a bit for each dword, set where a write to it and the next one covers a
/// byte that matters, as `covers` says of a position and a length.
pub fn nearby(covers: impl Fn(u64, u64) -> bool) -> u64 {
    (0..u64::BITS).fold(0, |bits, dword| {
        let near = covers(u64::from(dword) * SHORT, 2 * SHORT);
        bits | u64::from(near) << dword
    })
}

/// Whether a write of `len` bytes at `pos` has to be looked at closer: a first look, of few
/// instructions. False only where the write covers none of the bytes that `nearby` was made for.
#[inline]
pub const fn may_cover(nearby: u64, pos: u64, len: u64) -> bool {
    if len > SHORT {
        return true;
    }
    pos < LENGTH as u64 && nearby >> (pos / SHORT) & 1 != 0
}

/// Whether a write of `len` bytes at `pos` covers the low byte of COMMAND.
pub const fn covers_command(pos: u64, len: u64) -> bool {
    pos <= COMMAND && COMMAND - pos < len
}

/// Whether a write of `len` bytes at `pos` covers the power state of any power-management
/// capability. `map` has the id of the capability that each byte of config space belongs to: the
/// core's `pci_config_map`, so what the core takes for such a capability is one here.
pub fn covers_power_state(map: &[u8], pos: u64, len: u64) -> bool {
    let map = map.get(..LENGTH).unwrap_or(map);
    let index = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(map.len());
    let (begin, end) = (index(pos), index(pos.saturating_add(len)));
    // Most writes are of a few bytes that belong to no such capability.
    (begin..end).any(|at| map.get(at) == Some(&PM) && offset_in_capability(map, at) == PMCSR)
}

/// Where in its power-management capability the byte `at` is: two may lie side by side.
fn offset_in_capability(map: &[u8], at: usize) -> usize {
    let before = map.get(..at).unwrap_or_default();
    let same = before.iter().rev().take_while(|&&id| id == PM).count();
    same % PM_LENGTH
}
