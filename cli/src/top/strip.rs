//! A BAR as a strip: a cell for so many bytes of it, with the holder that has most of them.

use barlease_proto::PoolInfo;
use barlease_proto::Range;

/// The bytes of a cell, by who has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cell {
    /// Of no pool.
    Outside,
    Free,
    /// Of the holder with this number, which has more of it than others; not most of it if `few`.
    Held {
        holder: usize,
        few: bool,
    },
    /// Revoked, and an importer has still to let go.
    Revoked,
}

/// The owner of a range: a holder by its number, or nobody any more.
pub(super) type Owner = Option<usize>;

/// The cells of a BAR of `size` bytes.
pub(super) fn cells(
    size: u64,
    width: usize,
    pools: &[&PoolInfo],
    leased: &[(Owner, &Range)],
) -> Vec<Cell> {
    let width = width.max(1);
    let start = |cell: usize| (u128::from(size) * cell as u128 / width as u128) as u64;
    let mut pooled = vec![0_u64; width];
    let each = |offset: u64, length: u64, add: &mut dyn FnMut(usize, u64)| {
        let end = offset.saturating_add(length).min(size);
        if offset >= end {
            return;
        }
        let mut cell = (u128::from(offset) * width as u128 / u128::from(size)) as usize;
        // Cells begin at whole bytes, so the quotient may be one too few.
        while cell + 1 < width && start(cell + 1) <= offset {
            cell += 1;
        }
        while cell < width && start(cell) < end {
            let bytes = end.min(start(cell + 1)) - offset.max(start(cell));
            if bytes != 0 {
                add(cell, bytes);
            }
            cell += 1;
        }
    };
    for pool in pools {
        each(pool.at, pool.length, &mut |cell, bytes| {
            if let Some(sum) = pooled.get_mut(cell) {
                *sum += bytes;
            }
        });
    }
    let mut owners: Vec<Vec<(Owner, u64)>> = vec![Vec::new(); width];
    for (owner, range) in leased {
        each(range.offset, range.length, &mut |cell, bytes| {
            let Some(cell) = owners.get_mut(cell) else {
                return;
            };
            match cell.iter_mut().find(|(known, _)| known == owner) {
                Some((_, sum)) => *sum += bytes,
                None => cell.push((*owner, bytes)),
            }
        });
    }
    let of = |(owners, pooled): (&Vec<(Owner, u64)>, &u64)| {
        let all: u64 = owners.iter().map(|(_, bytes)| bytes).sum();
        let few = all.saturating_mul(2) < *pooled;
        match owners.iter().max_by_key(|(_, bytes)| *bytes) {
            Some((Some(holder), _)) => Cell::Held {
                holder: *holder,
                few,
            },
            Some((None, _)) => Cell::Revoked,
            None if *pooled != 0 => Cell::Free,
            None => Cell::Outside,
        }
    };
    owners.iter().zip(&pooled).map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(at: u64, length: u64) -> PoolInfo {
        PoolInfo {
            name: "rows".into(),
            bar: 2,
            at,
            length,
            unit: 1,
            size: length,
            free: length,
            waiting: 0,
        }
    }

    fn shown(cells: &[Cell]) -> String {
        let letter = |cell: &Cell| match cell {
            Cell::Outside => '-',
            Cell::Free => '.',
            Cell::Revoked => '!',
            Cell::Held { holder, few: false } => char::from(b'A' + *holder as u8),
            Cell::Held { holder, few: true } => char::from(b'a' + *holder as u8),
        };
        cells.iter().map(letter).collect()
    }

    #[test]
    fn a_cell_is_of_whom_has_most_of_it() {
        let range = |offset, length| Range { offset, length };
        let pool = pool(20, 80);
        let strip = |leased: &[(Owner, &Range)]| shown(&cells(100, 10, &[&pool], leased));
        assert_eq!(strip(&[]), "--........");
        let (one, other) = (range(20, 20), range(40, 3));
        assert_eq!(strip(&[(Some(0), &one), (Some(1), &other)]), "--AAb.....");
        let (some, more) = (range(50, 4), range(54, 6));
        assert_eq!(strip(&[(Some(0), &some), (Some(1), &more)]), "--...B....");
        assert_eq!(strip(&[(None, &range(90, 10))]), "--.......!");
        // An impossible range is no panic.
        assert_eq!(strip(&[(Some(0), &range(99, u64::MAX))]), "--.......a");
        assert_eq!(strip(&[(Some(0), &range(200, 1))]), "--........");
    }

    #[test]
    fn any_size_fits_any_width() {
        for size in [1, 3, 7, 4096, u64::MAX] {
            for width in [1, 2, 79, 200] {
                let pool = pool(0, size);
                let all = Range {
                    offset: 0,
                    length: size,
                };
                let strip = cells(size, width, &[&pool], &[(Some(0), &all)]);
                assert_eq!(strip.len(), width);
                let held = strip.iter().filter(|cell| **cell != Cell::Outside);
                assert_eq!(held.count() as u64, size.min(width as u64));
            }
        }
    }
}
