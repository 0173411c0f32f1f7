//! Touches while a step is made, and for a while after it.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU32, Ordering},
};

use barlease_oracle::{During, Shot};

use crate::map::{Map, Sigbus};

/// The step is being made.
pub const DURING: u32 = 0;
/// It is done.
pub const AFTER: u32 = 1;
/// Something has gone wrong elsewhere.
pub const OFF: u32 = 2;

/// How often everything is touched after the step.
const ROUNDS_AFTER: u32 = 4;

/// Touches until the step is done, and then some more: how often.
///
/// # Panics
///
/// When a touch gives what it must not.
pub fn shoot(maps: &BTreeMap<u64, Map>, shots: &[Shot], phase: &AtomicU32) -> u64 {
    let mut count = 0;
    let mut after = 0;
    while after < ROUNDS_AFTER {
        let mut all_after = true;
        for shot in shots {
            let now = phase.load(Ordering::SeqCst);
            let touch = maps[&(shot.mapping as u64)].read(shot.at);
            count += 1;
            match now {
                OFF => return count,
                AFTER => assert_eq!(touch.is_ok(), shot.after, "after the step: {shot:?}"),
                _ => {
                    all_after = false;
                    // Where it was when the touch was over does not matter: the step had begun, and
                    // what must not be while it is made must not be after it either, if these two
                    // agree.
                    match shot.during {
                        During::Either => {}
                        During::Works => assert_eq!(touch.map(drop), Ok(()), "{shot:?}"),
                        During::Sigbus => assert_eq!(touch, Err(Sigbus), "{shot:?}"),
                    }
                }
            }
            if let (Ok(seen), Some(word)) = (touch, shot.word) {
                assert_eq!(seen, word, "a touch reached something else: {shot:?}");
            }
        }
        after += u32::from(all_after);
    }
    count
}

/// Shots as numbers.
#[must_use]
pub fn encode(shots: &[Shot]) -> Vec<u64> {
    shots
        .iter()
        .flat_map(|shot| {
            let during = match shot.during {
                During::Either => 0,
                During::Works => 1,
                During::Sigbus => 2,
            };
            let word = shot.word.map_or(u64::MAX, u64::from);
            [
                shot.mapping as u64,
                shot.at,
                during,
                shot.after.into(),
                word,
            ]
        })
        .collect()
}

/// The shots that numbers are.
///
/// # Panics
///
/// When they are none.
#[must_use]
pub fn decode(words: &[u64]) -> Vec<Shot> {
    words
        .chunks(5)
        .map(|shot| Shot {
            mapping: shot[0] as usize,
            at: shot[1],
            during: match shot[2] {
                0 => During::Either,
                1 => During::Works,
                2 => During::Sigbus,
                other => panic!("during {other}"),
            },
            after: shot[3] != 0,
            word: u32::try_from(shot[4]).ok(),
        })
        .collect()
}
