// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! Classification of config writes, for every write to a config space of 256 bytes.

use barlease_model::config::{Piece, Sensitive};
use proptest::prelude::*;

const COMMAND: u64 = 0x04;
const SIZE: u64 = 256;

/// Places of the power-management capability: none, right behind the header, the usual one, odd
/// ones, the last that fits. One is beside COMMAND, where no device has it.
const PM_CAPABILITIES: [Option<u8>; 8] = [
    None,
    Some(0x40),
    Some(0x50),
    Some(0x80),
    Some(0xc4),
    Some(0xdc),
    Some(0xf8),
    Some(0x04),
];

fn sensitive_bytes(pm_capability: Option<u8>) -> Vec<u64> {
    let pmcsr = pm_capability.map(|offset| u64::from(offset) + 4);
    [Some(COMMAND), pmcsr].into_iter().flatten().collect()
}

fn pieces(sensitive: &Sensitive, pos: u64, end: u64) -> Vec<Piece> {
    let mut all: Vec<Piece> = Vec::new();
    let mut next = pos;
    while let Some(piece) = sensitive.next_piece(next, end) {
        all.push(piece);
        next = piece.pos + piece.len;
        assert!(all.len() < 16, "{pos}..{end}: no end: {all:?}");
    }
    all
}

/// How the core cuts a write (`vfio_config_do_rw`, `drivers/vfio/pci/vfio_pci_config.c`), as
/// (offset, length). It also cuts where a capability ends inside of a dword, which is a matter of the
/// offset alone.
fn core_chunks(mut pos: u64, mut count: u64, edges: &[u64]) -> Vec<(u64, u64)> {
    let mut chunks = Vec::new();
    while count > 0 {
        let dword_end = (pos / 4 + 1) * 4;
        let capability_end = edges
            .iter()
            .copied()
            .find(|&edge| edge > pos && edge < dword_end);
        let left = count.min(capability_end.unwrap_or(dword_end) - pos);
        let length = if left >= 4 && pos % 4 == 0 {
            4
        } else if left >= 2 && pos % 2 == 0 {
            2
        } else {
            1
        };
        chunks.push((pos, length));
        pos += length;
        count -= length;
    }
    chunks
}

fn every_write() -> impl Iterator<Item = (u64, u64)> {
    (0..SIZE).flat_map(|pos| (pos..=SIZE).map(move |end| (pos, end)))
}

#[test]
fn the_pieces_of_a_write_are_the_write() {
    for pm_capability in PM_CAPABILITIES {
        let sensitive = Sensitive::new(pm_capability);
        for (pos, end) in every_write() {
            let mut next = pos;
            for piece in pieces(&sensitive, pos, end) {
                assert_eq!(piece.pos, next, "{pm_capability:?} {pos}..{end}");
                assert_ne!(piece.len, 0);
                next += piece.len;
            }
            assert_eq!(next, end, "{pm_capability:?} {pos}..{end}");
        }
    }
}

#[test]
fn exactly_the_pieces_with_a_sensitive_byte_are_sensitive() {
    for pm_capability in PM_CAPABILITIES {
        let sensitive = Sensitive::new(pm_capability);
        let bytes = sensitive_bytes(pm_capability);
        for (pos, end) in every_write() {
            for piece in pieces(&sensitive, pos, end) {
                let span = piece.pos..piece.pos + piece.len;
                let holds = bytes.iter().any(|byte| span.contains(byte));
                assert_eq!(
                    piece.sensitive, holds,
                    "{pm_capability:?} {pos}..{end} {piece:?}"
                );
            }
        }
    }
}

#[test]
fn a_write_touches_what_has_a_sensitive_byte_in_it() {
    for pm_capability in PM_CAPABILITIES {
        let sensitive = Sensitive::new(pm_capability);
        let bytes = sensitive_bytes(pm_capability);
        for (pos, end) in every_write() {
            let holds = bytes.iter().any(|byte| (pos..end).contains(byte));
            let found = sensitive.touches(pos, end - pos);
            assert_eq!(found, holds, "{pm_capability:?} {pos}..{end}");
        }
    }
}

#[test]
fn a_write_to_another_region_touches_nothing_unless_it_reaches_over() {
    for pm_capability in PM_CAPABILITIES {
        let sensitive = Sensitive::new(pm_capability);
        let bytes = sensitive_bytes(pm_capability);
        for pos in [SIZE, 1 << 40, 2 << 40, 1 << 63] {
            assert!(!sensitive.touches(pos, 1 << 20), "{pos:#x}");
        }
        for below in [1, 4, SIZE, 1 << 40, 7 << 40] {
            let pos = 0u64.wrapping_sub(below);
            for len in [1, 4, 5, 8, SIZE, below, below + 4, below + 5, below + SIZE] {
                let reaches = bytes.iter().any(|byte| below + byte < len);
                let found = sensitive.touches(pos, len);
                assert_eq!(found, reaches, "{pm_capability:?} -{below:#x} {len:#x}");
            }
        }
    }
}

#[test]
fn the_power_state_is_in_the_piece_with_its_byte() {
    for pm_capability in PM_CAPABILITIES {
        let sensitive = Sensitive::new(pm_capability);
        let pmcsr = pm_capability.map(|offset| u64::from(offset) + 4);
        for (pos, end) in every_write() {
            for piece in pieces(&sensitive, pos, end) {
                let holds =
                    pmcsr.is_some_and(|byte| (piece.pos..piece.pos + piece.len).contains(&byte));
                assert_eq!(
                    sensitive.has_power_state(piece),
                    holds,
                    "{pm_capability:?} {pos}..{end} {piece:?}"
                );
            }
        }
    }
}

#[test]
fn a_sensitive_piece_is_at_most_a_dword() {
    for pm_capability in PM_CAPABILITIES {
        let sensitive = Sensitive::new(pm_capability);
        for (pos, end) in every_write() {
            for piece in pieces(&sensitive, pos, end)
                .iter()
                .filter(|piece| piece.sensitive)
            {
                let last = piece.pos + piece.len - 1;
                assert_eq!(
                    piece.pos / 4,
                    last / 4,
                    "{pm_capability:?} {pos}..{end} {piece:?}"
                );
            }
        }
    }
}

#[test]
fn a_write_is_cut_at_dwords_only() {
    for pm_capability in PM_CAPABILITIES {
        let sensitive = Sensitive::new(pm_capability);
        for (pos, end) in every_write() {
            for piece in pieces(&sensitive, pos, end).iter().skip(1) {
                assert_eq!(piece.pos % 4, 0, "{pm_capability:?} {pos}..{end} {piece:?}");
            }
        }
    }
}

#[test]
fn a_write_is_cut_no_more_than_needed() {
    for pm_capability in PM_CAPABILITIES {
        let sensitive = Sensitive::new(pm_capability);
        for (pos, end) in every_write() {
            for pair in pieces(&sensitive, pos, end).windows(2) {
                assert!(
                    pair[0].sensitive || pair[1].sensitive,
                    "{pm_capability:?} {pos}..{end} {pair:?}"
                );
            }
        }
    }
}

#[test]
fn what_the_core_does_is_the_same_as_without_cutting() {
    for pm_capability in PM_CAPABILITIES {
        let sensitive = Sensitive::new(pm_capability);
        // Capabilities that end inside of a dword, as MSI's may.
        for edges in [&[][..], &[0x06, 0x42, 0x46, 0x51, 0x86, 0xe1]] {
            for (pos, end) in every_write() {
                let cut: Vec<_> = pieces(&sensitive, pos, end)
                    .iter()
                    .flat_map(|piece| core_chunks(piece.pos, piece.len, edges))
                    .collect();
                let whole = core_chunks(pos, end - pos, edges);
                assert_eq!(cut, whole, "{pm_capability:?} {pos}..{end}");
            }
        }
    }
}

#[test]
fn a_chunk_of_the_core_that_holds_a_sensitive_byte_is_in_a_sensitive_piece() {
    for pm_capability in PM_CAPABILITIES {
        let sensitive = Sensitive::new(pm_capability);
        let bytes = sensitive_bytes(pm_capability);
        for (pos, end) in every_write() {
            for piece in pieces(&sensitive, pos, end)
                .iter()
                .filter(|piece| !piece.sensitive)
            {
                for (at, length) in core_chunks(piece.pos, piece.len, &[]) {
                    assert!(!bytes.iter().any(|byte| (at..at + length).contains(byte)));
                }
            }
        }
    }
}

#[test]
fn the_upper_byte_of_command_is_not_sensitive() {
    let sensitive = Sensitive::new(None);
    let upper = sensitive.next_piece(0x05, 0x06);
    assert_eq!(
        upper,
        Some(Piece {
            pos: 0x05,
            len: 1,
            sensitive: false
        })
    );
    let lower = sensitive.next_piece(0x04, 0x05);
    assert_eq!(
        lower,
        Some(Piece {
            pos: 0x04,
            len: 1,
            sensitive: true
        })
    );
}

#[test]
fn without_a_power_management_capability_only_command_is_sensitive() {
    let sensitive = Sensitive::new(None);
    let all: Vec<_> = pieces(&sensitive, 0, SIZE)
        .iter()
        .map(|piece| (piece.pos, piece.len, piece.sensitive))
        .collect();
    assert_eq!(all, [(0, 4, false), (4, 4, true), (8, 248, false)]);
}

#[test]
fn an_empty_write_has_no_pieces() {
    let sensitive = Sensitive::new(Some(0x40));
    for pos in [0, 4, 5, 0x44, 255, 4096, u64::MAX] {
        assert_eq!(sensitive.next_piece(pos, pos), None);
        assert_eq!(sensitive.next_piece(pos, 0), None);
    }
}

proptest! {
    #[test]
    fn no_input_panics(
        pm_capability in any::<Option<u8>>(),
        pos in prop_oneof![any::<u64>(), 0u64..5000, (u64::MAX - 5000)..=u64::MAX],
        end in prop_oneof![any::<u64>(), 0u64..5000, (u64::MAX - 5000)..=u64::MAX],
    ) {
        // An offset that is not dword aligned too.
        let sensitive = Sensitive::new(pm_capability);
        let all = pieces(&sensitive, pos, end);
        let sum: u64 = all.iter().map(|piece| piece.len).sum();
        prop_assert_eq!(sum, end.saturating_sub(pos));
        prop_assert!(all.iter().skip(1).all(|piece| piece.pos % 4 == 0));
        let bytes = sensitive_bytes(pm_capability);
        for piece in all {
            let holds = bytes.iter().any(|&byte| piece.pos <= byte && byte - piece.pos < piece.len);
            prop_assert_eq!(piece.sensitive, holds);
        }
    }
}
