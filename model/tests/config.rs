// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! Classification of config writes, for every write to a config space of 256 bytes.

use barlease_model::config::{LENGTH, covers_command, covers_power_state, may_cover, nearby};
use proptest::prelude::*;

const COMMAND: u64 = 0x04;
const SIZE: u64 = 256;
/// The core's numbers for the header, for bytes of no capability, and for another capability.
const HEADER: u8 = 0x00;
const NONE: u8 = 0xff;
const EXPRESS: u8 = 0x10;

/// Places of power-management capabilities: none, right behind the header, the usual one, the last
/// that fits, two, two side by side, and one that is not aligned.
const PLACES: [&[usize]; 8] = [
    &[],
    &[0x40],
    &[0x50],
    &[0xf8],
    &[0x40, 0xc8],
    &[0x40, 0x48],
    &[0x40, 0x48, 0x50],
    &[0x62],
];

/// The core's map of such a config space, with another capability wherever there is room.
fn map(places: &[usize]) -> Vec<u8> {
    let mut map = vec![HEADER; 0x40];
    map.extend((0x40..SIZE).map(|at| if at % 32 < 16 { NONE } else { EXPRESS }));
    for &place in places {
        map[place..place + 8].fill(0x01);
    }
    map
}

fn every_write() -> impl Iterator<Item = (u64, u64)> {
    (0..SIZE).flat_map(|pos| (0..=SIZE - pos).map(move |len| (pos, len)))
}

#[test]
fn a_write_with_the_low_byte_of_command_covers_command() {
    for (pos, len) in every_write() {
        let holds = (pos..pos + len).contains(&COMMAND);
        assert_eq!(covers_command(pos, len), holds, "{pos} {len}");
    }
}

#[test]
fn a_write_with_the_low_byte_of_any_pmcsr_covers_the_power_state() {
    for places in PLACES {
        let map = map(places);
        for (pos, len) in every_write() {
            let mut states = places.iter().map(|&place| place as u64 + 4);
            let holds = states.any(|at| (pos..pos + len).contains(&at));
            let found = covers_power_state(&map, pos, len);
            assert_eq!(found, holds, "{places:x?} {pos:#x} {len}");
        }
    }
}

#[test]
fn the_first_look_passes_over_no_write_that_takes_away_and_few_others() {
    for places in PLACES {
        let map = map(places);
        let covers = |pos, len| covers_command(pos, len) || covers_power_state(&map, pos, len);
        let nearby = nearby(covers);
        let mut needless = 0;
        for (pos, len) in every_write() {
            let takes_away = covers(pos, len);
            let found = may_cover(nearby, pos, len);
            assert!(found || !takes_away, "{places:x?} {pos:#x} {len}");
            needless += usize::from(found && !takes_away && len <= 4);
        }
        // Seven bytes around each that matters, for each of five lengths.
        let matter = 1 + places.len();
        assert!(needless <= matter * 5 * 7, "{places:x?}: {needless}");
    }
    for pos in [SIZE, SIZE + 3, 1 << 32, u64::MAX] {
        assert!(!may_cover(u64::MAX, pos, 4), "{pos:#x}");
    }
}

/// As in the map of a function with extended capabilities, where the same id means something else.
#[test]
fn extended_capabilities_have_no_power_state() {
    let mut map = map(&[0x40]);
    map.resize(4096, 0x01);
    for pos in LENGTH as u64..4096 {
        assert!(!covers_power_state(&map, pos, 4096 - pos), "{pos:#x}");
    }
    assert!(covers_power_state(&map, 0, 4096));
}

proptest! {
    #[test]
    fn no_input_panics(
        map in proptest::collection::vec(prop_oneof![Just(0x01), any::<u8>()], 0..300),
        pos in prop_oneof![any::<u64>(), 0u64..5000, (u64::MAX - 5000)..=u64::MAX],
        len in prop_oneof![any::<u64>(), 0u64..5000, (u64::MAX - 5000)..=u64::MAX],
    ) {
        covers_power_state(&map, pos, len);
        let holds = (pos..pos.saturating_add(len)).contains(&COMMAND);
        prop_assert_eq!(covers_command(pos, len), holds);
    }
}
