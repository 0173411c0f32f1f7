// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! Ranges against oracles that do the same the long way: page by page, and in 128 bits.

mod common;

use barlease_model::ranges::{
    Bar, Mapping, Misfit, Place, Placement, RangeError, Run, Segment, begin_of, entry_for, find,
    holds, overlaps, runs,
};
use common::{PAGE, SHIFT, segments};
use proptest::{collection::vec, prelude::*};

const PMD_ORDER: u32 = 9;

// ---- Placement ----------------------------------------------------------------------------------

fn place(bar: Bar, ranges: &[(u64, u64)]) -> Result<(u64, Vec<Segment>), RangeError> {
    let mut placement = Placement::new(bar, SHIFT);
    let mut segments = Vec::new();
    for &(offset, length) in ranges {
        segments.push(placement.next(offset, length)?);
    }
    Ok((placement.finish()?, segments))
}

/// A BAR that is everywhere.
const EVERYWHERE: Bar = Bar {
    start: 0,
    length: u64::MAX,
};

fn total(ranges: &[(u64, u64)]) -> Result<u64, RangeError> {
    place(EVERYWHERE, ranges).map(|(total, _)| total)
}

#[test]
fn the_length_of_a_buffer_is_the_sum_of_its_ranges() {
    assert_eq!(total(&[(0, PAGE)]), Ok(PAGE));
    assert_eq!(total(&[(7 * PAGE, PAGE), (0, 3 * PAGE)]), Ok(4 * PAGE));
    // Overlapping and repeated ranges count each time.
    assert_eq!(total(&[(0, PAGE), (0, PAGE), (0, 2 * PAGE)]), Ok(4 * PAGE));
}

#[test]
fn a_zero_length_is_empty() {
    assert_eq!(total(&[(0, 0)]), Err(RangeError::Empty));
    assert_eq!(total(&[(0, PAGE), (PAGE, 0)]), Err(RangeError::Empty));
    // Also where the offset is wrong too.
    assert_eq!(total(&[(1, 0)]), Err(RangeError::Empty));
}

#[test]
fn offset_and_length_are_page_aligned() {
    for odd in [1, 2, 512, PAGE - 1, PAGE + 1, 3 * PAGE / 2] {
        assert_eq!(total(&[(odd, PAGE)]), Err(RangeError::Unaligned), "{odd}");
        assert_eq!(total(&[(0, odd)]), Err(RangeError::Unaligned), "{odd}");
    }
    let large_pages = Placement::new(EVERYWHERE, SHIFT + 2).next(PAGE, PAGE);
    assert_eq!(large_pages, Err(RangeError::Unaligned));
}

#[test]
fn the_sum_neither_overflows_nor_reaches_the_top_bit() {
    let half = 1 << 63;
    assert_eq!(total(&[(0, half - PAGE)]), Ok(half - PAGE));
    assert_eq!(total(&[(0, half)]), Err(RangeError::TooLong));
    assert_eq!(
        total(&[(0, half - PAGE), (0, PAGE)]),
        Err(RangeError::TooLong)
    );
    assert_eq!(total(&[(0, half), (0, half)]), Err(RangeError::TooLong));
    assert_eq!(
        total(&[(0, 0u64.wrapping_sub(PAGE)), (0, 2 * PAGE)]),
        Err(RangeError::TooLong)
    );
}

#[test]
fn the_first_range_that_is_wrong_is_the_answer() {
    assert_eq!(total(&[(0, 0), (1, PAGE)]), Err(RangeError::Empty));
    assert_eq!(total(&[(1, PAGE), (0, 0)]), Err(RangeError::Unaligned));
}

#[test]
fn what_is_wrong_with_a_shape_comes_before_what_is_wrong_with_a_place() {
    let bar = Bar {
        start: 0x8000_0000,
        length: 4 * PAGE,
    };
    let (past, top) = ((4 * PAGE, PAGE), (0u64.wrapping_sub(PAGE), PAGE));
    let wrong = |ranges: &[_]| place(bar, ranges).unwrap_err();
    assert_eq!(wrong(&[past, (0, 0)]), RangeError::Empty);
    assert_eq!(wrong(&[top, (0, PAGE), (1, PAGE)]), RangeError::Unaligned);
    let (half, rest) = ((0, 1 << 63), (0, 1 << 62));
    assert_eq!(wrong(&[past, half]), RangeError::TooLong);
    assert_eq!(wrong(&[past, half, half]), RangeError::TooLong);
    // Of those that are out of place the first.
    assert_eq!(wrong(&[past, top]), RangeError::PastEnd);
    assert_eq!(wrong(&[(0, PAGE), top, past]), RangeError::AddressOverflow);
    assert_eq!(wrong(&[(0, PAGE), rest]), RangeError::PastEnd);
}

#[test]
fn ranges_become_segments_one_after_the_other() {
    let bar = Bar {
        start: 0x8000_0000,
        length: 4 * PAGE,
    };
    let segment = |end, page| Segment { end, page };
    assert_eq!(
        place(bar, &[(3 * PAGE, PAGE), (0, 2 * PAGE), (0, 4 * PAGE)]),
        Ok((7 * PAGE, vec![segment(1, 3), segment(3, 0), segment(7, 0)]))
    );
}

/// All shapes first, then all places.
fn placement_oracle(bar: Bar, ranges: &[(u64, u64)]) -> Result<(u64, Vec<Segment>), RangeError> {
    let total = total_oracle(ranges)?;
    let mut end = 0;
    let mut segments = Vec::new();
    for &(offset, length) in ranges {
        place_oracle(bar, offset, length)?;
        end += length / PAGE;
        let page = offset / PAGE;
        segments.push(Segment { end, page });
    }
    Ok((total, segments))
}

fn total_oracle(ranges: &[(u64, u64)]) -> Result<u64, RangeError> {
    let mut sum: u128 = 0;
    for &(offset, length) in ranges {
        if length == 0 {
            return Err(RangeError::Empty);
        }
        if offset % PAGE != 0 || length % PAGE != 0 {
            return Err(RangeError::Unaligned);
        }
        sum += u128::from(length);
    }
    if sum >= 1 << 63 {
        return Err(RangeError::TooLong);
    }
    Ok(sum as u64)
}

// ---- overlaps -----------------------------------------------------------------------------------

#[test]
fn overlap_is_a_shared_byte() {
    for a in 0..8 {
        for a_len in 0..8 {
            for b in 0..8 {
                for b_len in 0..8 {
                    let shared = (a..a + a_len).any(|byte| (b..b + b_len).contains(&byte));
                    assert_eq!(
                        overlaps(a, a_len, b, b_len),
                        shared,
                        "{a}+{a_len} {b}+{b_len}"
                    );
                }
            }
        }
    }
}

#[test]
fn overlap_at_the_end_of_the_address_space_saturates() {
    assert!(overlaps(u64::MAX - 1, 1, 0, u64::MAX));
    assert!(overlaps(u64::MAX - 8, 16, u64::MAX - 4, 1));
    assert!(!overlaps(u64::MAX - 8, 16, 0, 8));
}

// ---- Bar::place ---------------------------------------------------------------------------------

#[test]
fn a_range_is_placed_at_the_address_of_the_bar() {
    let bar = Bar {
        start: 0x8000_0000,
        length: 16 * PAGE,
    };
    assert_eq!(bar.place(0, 16 * PAGE), Ok(0x8000_0000));
    assert_eq!(bar.place(15 * PAGE, PAGE), Ok(0x8000_f000));
    assert_eq!(bar.place(15 * PAGE, 2 * PAGE), Err(RangeError::PastEnd));
    assert_eq!(bar.place(16 * PAGE, PAGE), Err(RangeError::PastEnd));
    assert_eq!(bar.place(0, 17 * PAGE), Err(RangeError::PastEnd));
}

#[test]
fn an_address_that_overflows_is_not_past_the_end() {
    let bar = Bar {
        start: 0x8000_0000,
        length: 16 * PAGE,
    };
    let top = 0u64.wrapping_sub(PAGE);
    assert_eq!(bar.place(top, PAGE), Err(RangeError::AddressOverflow));
    // The sum of offset and address fits, the address after the last byte does not: so does stock.
    let last = top - bar.start;
    assert_eq!(bar.place(last, PAGE), Err(RangeError::AddressOverflow));
    assert_eq!(bar.place(last - PAGE, PAGE), Err(RangeError::PastEnd));
}

#[test]
fn a_bar_may_end_at_the_end_of_the_address_space() {
    let bar = Bar {
        start: 0u64.wrapping_sub(4 * PAGE),
        length: 4 * PAGE,
    };
    assert_eq!(bar.place(0, 3 * PAGE), Ok(bar.start));
    assert_eq!(bar.place(2 * PAGE, PAGE), Ok(bar.start + 2 * PAGE));
    // The address after the last byte of the last page is none; stock refuses it in the same way.
    assert_eq!(bar.place(3 * PAGE, PAGE), Err(RangeError::AddressOverflow));
    assert_eq!(bar.place(4 * PAGE, PAGE), Err(RangeError::AddressOverflow));
}

fn place_oracle(bar: Bar, offset: u64, length: u64) -> Result<u64, RangeError> {
    let address = u128::from(bar.start) + u128::from(offset);
    if address + u128::from(length) >= 1 << 64 {
        return Err(RangeError::AddressOverflow);
    }
    if u128::from(offset) + u128::from(length) > u128::from(bar.length) {
        return Err(RangeError::PastEnd);
    }
    Ok(address as u64)
}

// ---- find ---------------------------------------------------------------------------------------

/// Every page of the buffer, one after the other.
fn pages(ranges: &[(u64, u64)]) -> Vec<Place> {
    let mut all = Vec::new();
    for (segment, &(first, pages)) in ranges.iter().enumerate() {
        all.extend((0..pages).map(|page| Place {
            segment,
            page: first + page,
            run: pages - page,
        }));
    }
    all
}

#[test]
fn a_page_is_found_in_the_range_that_holds_it() {
    let ranges = [(100, 3), (50, 1), (100, 2), (103, 4)];
    let segments = segments(&ranges);
    for (page, place) in pages(&ranges).into_iter().enumerate() {
        assert_eq!(find(&segments, page as u64), Some(place), "{page}");
    }
    for past in [10, 11, 1000, u64::MAX] {
        assert_eq!(find(&segments, past), None, "{past}");
    }
    assert_eq!(find(&[], 0), None);
}

#[test]
fn a_segment_begins_where_the_one_before_ends() {
    let segments = segments(&[(1, 5), (1, 7), (9, 1)]);
    let begins: Vec<_> = (0..3).map(|index| begin_of(&segments, index)).collect();
    assert_eq!(begins, [0, 5, 12]);
}

#[test]
fn the_most_segments_that_a_buffer_may_have_are_searched() {
    let ranges: Vec<_> = (0..u64::from(barlease_abi::MAX_RANGES))
        .map(|i| ((i * 7919) % 100_003, 1 + i % 3))
        .collect();
    let segments = segments(&ranges);
    let pages = pages(&ranges);
    for page in (0..pages.len()).step_by(13).chain([pages.len() - 1]) {
        assert_eq!(find(&segments, page as u64), Some(pages[page]), "{page}");
    }
    assert_eq!(find(&segments, pages.len() as u64), None);
}

// ---- runs ---------------------------------------------------------------------------------------

/// Every page of the BAR, in order.
fn bar_pages(runs: impl Iterator<Item = Run>) -> Vec<u64> {
    runs.flat_map(|run| run.page..run.page + run.pages)
        .collect()
}

#[test]
fn ranges_that_touch_are_one_run() {
    let segments = segments(&[
        (10, 2),
        (12, 3),
        (15, 1),
        (20, 1),
        (19, 1),
        (20, 2),
        (20, 2),
    ]);
    let runs: Vec<_> = runs(&segments).map(|run| (run.page, run.pages)).collect();
    assert_eq!(runs, [(10, 6), (20, 1), (19, 3), (20, 2)]);
}

#[test]
fn no_segments_are_no_runs() {
    assert_eq!(runs(&[]).count(), 0);
}

// ---- entry_for ----------------------------------------------------------------------------------

/// The same, from the list of all pages: an entry fits when each of its pages is mapped, is the
/// next page of the same range, and it is aligned on both sides.
fn entry_oracle(
    ranges: &[(u64, u64)],
    mapping: &Mapping,
    address: u64,
    order: u32,
    first_frame: u64,
) -> Result<u64, Misfit> {
    let all = pages(ranges);
    let size = PAGE << order;
    if !(mapping.start..mapping.end).contains(&address) {
        return Err(Misfit::Outside);
    }
    let first = address - address % size;
    let addresses: Vec<_> = (0..1 << order).map(|page| first + page * PAGE).collect();
    if !addresses
        .iter()
        .all(|at| (mapping.start..mapping.end).contains(at))
    {
        return Err(Misfit::Order);
    }
    let page_of = |at: u64| (mapping.page_offset + (at - mapping.start) / PAGE) as usize;
    let head = all.get(page_of(first)).ok_or(Misfit::Outside)?;
    let fits = addresses.iter().zip(0..).all(|(&at, i)| {
        all.get(page_of(at))
            .is_some_and(|place| place.segment == head.segment && place.page == head.page + i)
    });
    if fits && (first_frame + head.page) % (1 << order) == 0 {
        Ok(head.page)
    } else {
        Err(Misfit::Order)
    }
}

#[test]
fn a_huge_entry_needs_both_addresses_aligned() {
    let huge = 1 << PMD_ORDER;
    let aligned = segments(&[(4 * huge, 2 * huge)]);
    let skewed = segments(&[(4 * huge + 1, 2 * huge)]);
    let mapping = Mapping {
        start: 64 * huge * PAGE,
        end: 66 * huge * PAGE,
        page_offset: 0,
    };
    let at = mapping.start + 17 * PAGE;
    let entry = |segments: &[Segment], mapping: &Mapping| {
        entry_for(segments, mapping, at, PMD_ORDER, SHIFT, 0)
    };
    assert_eq!(entry(&aligned, &mapping), Ok(4 * huge));
    assert_eq!(entry(&skewed, &mapping), Err(Misfit::Order));
    let shifted = Mapping {
        start: mapping.start + PAGE,
        end: mapping.end + PAGE,
        ..mapping
    };
    assert_eq!(entry(&aligned, &shifted), Err(Misfit::Order));
}

/// The BAR of a device may begin anywhere: it is the frame that counts, not the page of the BAR.
#[test]
fn a_huge_entry_needs_an_aligned_frame_wherever_the_bar_begins() {
    let huge = 1 << PMD_ORDER;
    let mapping = Mapping {
        start: 64 * huge * PAGE,
        end: 65 * huge * PAGE,
        page_offset: 0,
    };
    let entry = |page, first_frame| {
        let segments = segments(&[(page, huge)]);
        entry_for(
            &segments,
            &mapping,
            mapping.start,
            PMD_ORDER,
            SHIFT,
            first_frame,
        )
    };
    assert_eq!(entry(0, 8 * huge), Ok(0));
    assert_eq!(entry(0, 8 * huge + 16), Err(Misfit::Order));
    assert_eq!(entry(huge - 16, 8 * huge + 16), Ok(huge - 16));
    assert_eq!(entry(huge, 8 * huge + 16), Err(Misfit::Order));
}

#[test]
fn a_huge_entry_never_spans_two_ranges_even_if_they_touch() {
    let huge = 1 << PMD_ORDER;
    let touching = segments(&[(4 * huge, huge / 2), (4 * huge + huge / 2, huge / 2)]);
    let mapping = Mapping {
        start: 0,
        end: huge * PAGE,
        page_offset: 0,
    };
    let entry = |order| entry_for(&touching, &mapping, 0, order, SHIFT, 0);
    assert_eq!(entry(PMD_ORDER), Err(Misfit::Order));
    assert_eq!(entry(PMD_ORDER - 1), Ok(4 * huge));
}

#[test]
fn an_entry_never_leaves_the_mapping() {
    let huge = 1 << PMD_ORDER;
    let segments = segments(&[(4 * huge, 4 * huge)]);
    for (start, end) in [(1, huge), (0, huge - 1), (huge / 2, 2 * huge - 1)] {
        let mapping = Mapping {
            start: start * PAGE,
            end: end * PAGE,
            page_offset: start,
        };
        for page in start..end {
            let huge = entry_for(&segments, &mapping, page * PAGE, PMD_ORDER, SHIFT, 0);
            assert_eq!(huge, Err(Misfit::Order), "{start}..{end} {page}");
            let small = entry_for(&segments, &mapping, page * PAGE, 0, SHIFT, 0);
            assert_eq!(small, Ok(4 * 512 + page));
        }
    }
}

#[test]
fn what_is_outside_stays_outside_at_any_order() {
    let segments = segments(&[(0, 4)]);
    let mapping = Mapping {
        start: 16 * PAGE,
        end: 20 * PAGE,
        page_offset: 2,
    };
    let entry = |page: u64, order| entry_for(&segments, &mapping, page * PAGE, order, SHIFT, 0);
    assert_eq!(entry(15, 0), Err(Misfit::Outside));
    assert_eq!(entry(20, 0), Err(Misfit::Outside));
    assert_eq!(entry(17, 0), Ok(3));
    // In the mapping, behind the end of the buffer.
    assert_eq!(entry(18, 0), Err(Misfit::Outside));
    assert_eq!(entry(18, 1), Err(Misfit::Outside));
    assert_eq!(entry(16, 2), Err(Misfit::Order));
}

#[test]
fn no_page_offset_leads_back_into_the_buffer() {
    let segments = segments(&[(0, 4)]);
    let mapping = Mapping {
        start: 0,
        end: 8 * PAGE,
        page_offset: u64::MAX - 2,
    };
    for page in 0..8 {
        let entry = entry_for(&segments, &mapping, page * PAGE, 0, SHIFT, 0);
        assert_eq!(entry, Err(Misfit::Outside), "{page}");
    }
}

// ---- Any input ----------------------------------------------------------------------------------

/// Any number, near the powers of two more often than not.
fn extreme() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0u32..64, 0u64..3).prop_map(|(bit, less)| (1u64 << bit).wrapping_sub(less)),
        (0u32..52, 0u64..3).prop_map(|(bit, less)| (1u64 << bit).wrapping_sub(less) << SHIFT),
    ]
}

prop_compose! {
    /// Ranges of up to 24 pages from frames below 64: they overlap, touch and repeat, and orders up
    /// to 4 fit often enough.
    fn some_ranges()(ranges in vec((0u64..64, 1u64..24), 1..12)) -> Vec<(u64, u64)> {
        ranges
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_placement_is_the_oracles(
        start in extreme(),
        length in extreme(),
        ranges in vec((extreme(), extreme()), 0..6),
    ) {
        let bar = Bar { start, length };
        prop_assert_eq!(place(bar, &ranges), placement_oracle(bar, &ranges));
    }

    #[test]
    fn a_placement_of_aligned_ranges_is_the_oracles(
        start in 0u64..1 << 52,
        length in 0u64..1 << 20,
        ranges in vec((0u64..1 << 20, 1u64..1 << 20), 1..6),
        huge in vec((0u64..1 << 52, 1u64..1 << 52), 0..3),
    ) {
        let bar = Bar { start: start << SHIFT, length: length << SHIFT };
        let ranges = ranges.iter().chain(&huge);
        let ranges: Vec<_> = ranges.map(|(o, l)| (o << SHIFT, l << SHIFT)).collect();
        prop_assert_eq!(place(bar, &ranges), placement_oracle(bar, &ranges));
    }

    #[test]
    fn place_is_the_oracles(
        start in extreme(),
        length in extreme(),
        offset in extreme(),
        range in extreme(),
    ) {
        let bar = Bar { start, length };
        prop_assert_eq!(bar.place(offset, range), place_oracle(bar, offset, range));
    }

    #[test]
    fn what_is_placed_lies_in_the_bar(
        start in 0u64..1 << 50,
        length in 0u64..1 << 30,
        offset in 0u64..1 << 31,
        range in 1u64..1 << 31,
    ) {
        let bar = Bar { start, length };
        match bar.place(offset, range) {
            Ok(at) => prop_assert!(at >= start && at + range <= start + length),
            Err(error) => {
                prop_assert_eq!(error, RangeError::PastEnd);
                prop_assert!(offset + range > length);
            }
        }
    }

    #[test]
    fn a_bar_holds_pages_as_the_oracle_says(
        pages in prop_oneof![extreme(), 0u64..8],
        page in prop_oneof![extreme(), 0u64..8],
        count in prop_oneof![extreme(), 0u64..8],
    ) {
        let end = u128::from(page) + u128::from(count);
        prop_assert_eq!(holds(pages, page, count), count != 0 && end <= u128::from(pages));
    }

    #[test]
    fn overlap_is_symmetric(a in extreme(), a_len in extreme(), b in extreme(), b_len in extreme()) {
        prop_assert_eq!(overlaps(a, a_len, b, b_len), overlaps(b, b_len, a, a_len));
    }

    #[test]
    fn find_is_the_oracles(ranges in some_ranges(), page in 0u64..300) {
        let expected = pages(&ranges).get(page as usize).copied();
        prop_assert_eq!(find(&segments(&ranges), page), expected);
    }

    #[test]
    fn runs_are_all_pages_in_order_and_as_few_as_can_be(ranges in some_ranges()) {
        let segments = segments(&ranges);
        let all: Vec<_> = runs(&segments).collect();
        let expected: Vec<_> = pages(&ranges).iter().map(|place| place.page).collect();
        prop_assert_eq!(bar_pages(all.iter().copied()), expected);
        for pair in all.windows(2) {
            prop_assert_ne!(pair[0].page + pair[0].pages, pair[1].page);
        }
    }

    #[test]
    fn entry_for_is_the_oracles(
        ranges in some_ranges(),
        start in 0u64..64,
        length in 1u64..96,
        page_offset in 0u64..64,
        at in 0u64..192,
        order in 0u32..5,
        first_frame in 0u64..64,
    ) {
        let mapping = Mapping {
            start: start * PAGE,
            end: (start + length) * PAGE,
            page_offset,
        };
        let address = at * PAGE;
        prop_assert_eq!(
            entry_for(&segments(&ranges), &mapping, address, order, SHIFT, first_frame),
            entry_oracle(&ranges, &mapping, address, order, first_frame)
        );
    }

    #[test]
    fn entries_of_one_mapping_agree(
        ranges in some_ranges(),
        start in 0u64..64,
        page_offset in 0u64..32,
        order in 1u32..5,
    ) {
        // Where a large entry fits, small ones at each of its pages give the same frames.
        let segments = segments(&ranges);
        let mapping = Mapping { start: start * PAGE, end: (start + 96) * PAGE, page_offset };
        for page in start..start + 96 {
            if let Ok(first) = entry_for(&segments, &mapping, page * PAGE, order, SHIFT, 0) {
                let small = entry_for(&segments, &mapping, page * PAGE, 0, SHIFT, 0);
                prop_assert_eq!(small, Ok(first + page % (1 << order)));
            }
        }
    }

    #[test]
    fn no_input_panics(
        raw in vec((extreme(), extreme()), 0..6),
        numbers in proptest::array::uniform7(extreme()),
        order in prop_oneof![any::<u32>(), u32::MAX - 64..=u32::MAX],
        index in any::<usize>(),
    ) {
        let [start, end, page_offset, address, page, first_frame, length] = numbers;
        // Neither sorted nor made by us.
        let segments: Vec<_> = raw.iter().map(|&(end, page)| Segment { end, page }).collect();
        let mapping = Mapping { start, end, page_offset };
        let _ = find(&segments, page);
        let _ = begin_of(&segments, index);
        let _ = runs(&segments).count();
        let _ = entry_for(&segments, &mapping, address, order, SHIFT, first_frame);
        let _ = entry_for(&segments, &mapping, address, order % 24, SHIFT, first_frame);
        let mut placement = Placement::new(Bar { start, length }, order);
        for &(offset, length) in &raw {
            let _ = placement.next(offset, length);
        }
        let _ = placement.finish();
    }
}
