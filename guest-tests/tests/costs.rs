//! The costs of leases, in things that can be counted: the same on every machine, however busy it
//! is.
#![cfg(barlease_guest)]

use barlease_guest_tests::{
    HUGE, PAGE,
    allocations::{Kept, Trace},
    map::How,
    observe,
    pci::{BARLEASE, STOCK},
    vfio::Device,
};

/// BAR2 of the memory device.
const BAR: u32 = 2;

/// The faults that the first touch of every page of a mapping of a BAR or a lease takes.
fn faults(driver: &str, skew: u64) -> i64 {
    let device = Device::open_with("memory", driver);
    let how = How::shared().align(HUGE).skew(skew);
    let size = 8 * HUGE;
    let map = if driver == STOCK {
        how.map(&device, u64::from(BAR) << 40, size)
    } else {
        let lease = device.export(BAR, &[(0, size)]).unwrap();
        how.map(&lease, 0, size)
    };
    let map = map.unwrap();
    observe::faults_of(|| map.touch_all().unwrap())
}

#[test]
fn an_aligned_mapping_takes_no_more_faults_than_with_stock() {
    let [ours, stock] = [BARLEASE, STOCK].map(|driver| faults(driver, 0));
    assert!(ours <= stock, "{ours} and {stock}");
}

#[test]
fn a_skewed_mapping_takes_a_fault_for_256_of_stocks() {
    let [ours, stock] = [BARLEASE, STOCK].map(|driver| faults(driver, PAGE));
    assert_eq!(stock, (8 * HUGE / PAGE) as i64);
    assert!(ours * 256 <= stock, "{ours} and {stock}");
}

/// The least that one of five buffers of so many ranges keeps: a softirq may allocate in between.
/// `None` on a kernel that cannot say.
fn kept(driver: &str, ranges: u64) -> Option<Kept> {
    let device = Device::open_with("memory", driver);
    let ranges: Vec<_> = (0..ranges).map(|range| (range * 2 * PAGE, PAGE)).collect();
    let trace = Trace::new()?;
    let kept = (0..5).map(|_| trace.of(|| device.export(BAR, &ranges).unwrap()).1);
    kept.min()
}

#[test]
fn a_lease_keeps_at_most_half_as_much_memory_again_as_a_stock_buffer() {
    for ranges in [1, 64] {
        let [Some(ours), Some(stock)] = [BARLEASE, STOCK].map(|driver| kept(driver, ranges)) else {
            eprintln!("this kernel has no trace of allocations");
            return;
        };
        assert!(stock.bytes > 0);
        // Where locks are watched each is several times as large, and most of what both sides keep.
        if !observe::locks_are_watched() {
            assert!(2 * ours.bytes <= 3 * stock.bytes, "{ours:?} and {stock:?}");
        }
        assert!(
            ours.allocations <= stock.allocations + 2,
            "{ours:?} and {stock:?}"
        );
    }
}
