//! Export of a buffer and its close, by the number of its ranges.

use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicU32;

use barlease_guest_tests::PAGE;
use barlease_guest_tests::lease::Request;
use barlease_guest_tests::vfio::Device;

use super::{BAR, Context, MEMORY, MEMORY_SIZE, open};
use crate::report::{Goal, Measure, Unit};
use crate::rounds::Rounds;

pub(super) fn take(context: &Context) -> Vec<Measure> {
    let curve = context.curve(&[1, 4, 16, 64, 256, 1024, 4096, 16384, 65536]);
    let requests: Vec<_> = curve
        .iter()
        .map(|&count| (count, Payload::new(count)))
        .collect();
    let measure = Rounds::new(
        "export",
        "Export of a buffer and its close",
        "stock vfio-pci",
        Unit::Nanoseconds,
    )
    .axis("ranges")
    .run(context.rounds(15), |side, batch| {
        let device = open(MEMORY, side);
        for (count, payload) in &requests {
            let calls = (1000 / count).clamp(1, 100) as u32;
            batch.time("export and close", *count, 7, calls, || {
                drop(payload.export(&device));
            });
        }
    })
    .finish(|_, count| match count {
        Some(1) => Some(Goal::AtMost(1.0)),
        Some(64) => Some(Goal::AtMost(0.8)),
        _ => None,
    });
    vec![measure]
}

/// A request that is made once and used again, so that only the kernel's part is measured.
pub(super) struct Payload(Vec<AtomicU32>);

impl Payload {
    /// Single pages that do not touch, `count` of them; behind the end of the BAR from its
    /// beginning again.
    pub(super) fn new(count: u64) -> Self {
        let pairs = MEMORY_SIZE / PAGE / 2;
        let ranges: Vec<_> = (0..count)
            .map(|number| (number % pairs * 2 * PAGE, PAGE))
            .collect();
        Self::of(&Request::new(BAR, &ranges))
    }

    fn of(request: &Request) -> Self {
        let header = [0; 8];
        let bytes = header.into_iter().chain(request.bytes());
        let bytes: Vec<u8> = bytes.collect();
        let words = bytes.chunks(4).map(|word| {
            let word = word.try_into().expect("whole words");
            AtomicU32::new(u32::from_ne_bytes(word))
        });
        Self(words.collect())
    }

    /// Exports.
    pub(super) fn export(&self, device: &Device) -> OwnedFd {
        device.request_shared(&self.0).expect("an export")
    }
}
