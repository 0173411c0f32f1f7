// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! Fault batches against single pages, one after the other.

mod common;

use barlease_model::{
    batch::{Batch, batch_for},
    ranges::{Mapping, Misfit, Segment, entry_for},
};
use common::{PAGE, SHIFT, segments};
use proptest::{collection::vec, prelude::*};

/// The run around `address`, grown page by page for as long as the next one is in the window, in
/// the mapping and in the same range.
fn oracle(
    ranges: &[(u64, u64)],
    mapping: &Mapping,
    address: u64,
    order: u32,
) -> Result<Batch, Misfit> {
    let mut all = Vec::new();
    for (index, &(first, pages)) in ranges.iter().enumerate() {
        all.extend((0..pages).map(|page| (index, first + page)));
    }
    let place = |at: u64| {
        (mapping.start..mapping.end).contains(&at).then_some(())?;
        let page = mapping.page_offset + (at - mapping.start) / PAGE;
        all.get(page as usize).copied()
    };
    let here = place(address).ok_or(Misfit::Outside)?;
    let window = |at: u64| at >> (SHIFT + order);
    let belongs = |at: u64| {
        window(at) == window(address) && place(at).is_some_and(|(range, _)| range == here.0)
    };
    let mut first = address;
    while first >= PAGE && belongs(first - PAGE) {
        first -= PAGE;
    }
    let mut last = address;
    while belongs(last + PAGE) {
        last += PAGE;
    }
    Ok(Batch {
        address: first,
        page: here.1 - (address - first) / PAGE,
        pages: (last - first) / PAGE + 1,
    })
}

#[test]
fn a_batch_is_the_window_where_nothing_ends() {
    let segments = segments(&[(0x1001, 2048)]);
    let mapping = Mapping {
        start: 512 * PAGE,
        end: 2560 * PAGE,
        page_offset: 0,
    };
    let batch = batch_for(&segments, &mapping, 1500 * PAGE, 9, SHIFT).unwrap();
    assert_eq!(batch.address, 1024 * PAGE);
    assert_eq!(batch.pages, 512);
    assert_eq!(batch.page, 0x1001 + 512);
}

#[test]
fn a_batch_never_spans_two_ranges_even_if_they_touch() {
    let segments = segments(&[(100, 3), (103, 4)]);
    let mapping = Mapping {
        start: 0,
        end: 7 * PAGE,
        page_offset: 0,
    };
    let batch = |page: u64| batch_for(&segments, &mapping, page * PAGE, 9, SHIFT).unwrap();
    for page in 0..3 {
        let expected = Batch {
            address: 0,
            page: 100,
            pages: 3,
        };
        assert_eq!(batch(page), expected);
    }
    for page in 3..7 {
        let expected = Batch {
            address: 3 * PAGE,
            page: 103,
            pages: 4,
        };
        assert_eq!(batch(page), expected);
    }
}

fn extreme() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0u32..64, 0u64..3).prop_map(|(bit, less)| (1u64 << bit).wrapping_sub(less)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn batch_for_is_the_oracles(
        ranges in vec((0u64..64, 1u64..24), 1..12),
        start in 0u64..64,
        length in 1u64..96,
        page_offset in 0u64..64,
        at in 0u64..192,
        order in 0u32..6,
    ) {
        let mapping = Mapping {
            start: start * PAGE,
            end: (start + length) * PAGE,
            page_offset,
        };
        prop_assert_eq!(
            batch_for(&segments(&ranges), &mapping, at * PAGE, order, SHIFT),
            oracle(&ranges, &mapping, at * PAGE, order)
        );
    }

    #[test]
    fn each_page_of_a_batch_is_the_page_of_a_single_fault(
        ranges in vec((0u64..1 << 40, 1u64..2000), 1..6),
        start in 0u64..2000,
        length in 1u64..3000,
        page_offset in 0u64..3000,
        at in 0u64..5000,
    ) {
        let segments = segments(&ranges);
        let mapping = Mapping {
            start: start * PAGE,
            end: (start + length) * PAGE,
            page_offset,
        };
        if let Ok(batch) = batch_for(&segments, &mapping, at * PAGE, 9, SHIFT) {
            prop_assert!((1..=512).contains(&batch.pages));
            for page in 0..batch.pages {
                let address = batch.address + page * PAGE;
                let single = entry_for(&segments, &mapping, address, 0, SHIFT, 0);
                prop_assert_eq!(single, Ok(batch.page + page));
            }
        }
    }

    #[test]
    fn no_input_panics(
        raw in vec((extreme(), extreme()), 0..6),
        numbers in proptest::array::uniform4(extreme()),
        order in prop_oneof![any::<u32>(), 0u32..64],
    ) {
        let segments: Vec<_> = raw.iter().map(|&(end, page)| Segment { end, page }).collect();
        let [start, end, page_offset, address] = numbers;
        let mapping = Mapping { start, end, page_offset };
        let _ = batch_for(&segments, &mapping, address, order, SHIFT);
    }
}
