// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! The table of aliases against a list.

use barlease_model::alias::{Alias, Aliases, MAX_ALIASES};
use proptest::{collection::vec, prelude::*};

#[test]
fn the_same_request_has_the_same_index() {
    let mut aliases = Aliases::default();
    let wc = |bar| Alias { bar, flags: 1 };
    assert_eq!(aliases.add(wc(2)), Some(0));
    assert_eq!(aliases.add(wc(0)), Some(1));
    assert_eq!(aliases.add(wc(2)), Some(0));
    assert_eq!(aliases.add(Alias { bar: 2, flags: 2 }), Some(2));
}

#[test]
fn a_full_table_takes_what_it_knows() {
    assert_eq!(MAX_ALIASES, 16);
    let mut aliases = Aliases::default();
    for flags in 1..=MAX_ALIASES as u32 {
        assert_eq!(aliases.add(Alias { bar: 0, flags }), Some(flags - 1));
    }
    assert_eq!(aliases.add(Alias { bar: 1, flags: 1 }), None);
    assert_eq!(aliases.add(Alias { bar: 0, flags: 5 }), Some(4));
    aliases.clear();
    assert_eq!(aliases, Aliases::default());
    assert_eq!(aliases.add(Alias { bar: 1, flags: 1 }), Some(0));
}

proptest! {
    #[test]
    fn the_table_is_a_list_without_repetitions(
        requests in vec((0u32..6, 1u32..6), 0..60),
        number in any::<u32>(),
    ) {
        let mut aliases = Aliases::default();
        let mut list: Vec<Alias> = Vec::new();
        for (bar, flags) in requests {
            let alias = Alias { bar, flags };
            if !list.contains(&alias) && list.len() < MAX_ALIASES {
                list.push(alias);
            }
            let expected = list.iter().position(|known| *known == alias);
            prop_assert_eq!(aliases.add(alias), expected.map(|index| index as u32));
        }
        for index in (0..20).chain([number]) {
            prop_assert_eq!(aliases.get(index), list.get(index as usize).copied());
        }
    }
}
