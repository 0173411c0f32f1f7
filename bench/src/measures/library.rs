//! Register access through the library, against bare volatile access. Runs on the host: there are
//! no devices in it.

#![expect(unsafe_code, reason = "bare volatile access is what is compared with")]

use std::fs::File;
use std::hint::black_box;

use barlease::Lease;
use rustix::fs::{MemfdFlags, memfd_create};

use super::Context;
use crate::report::{Goal, Measure, Unit};
use crate::rounds::{Batch, Rounds, Side};

const PAGE: u64 = 4096;
const SAMPLES: u32 = 15;
const CALLS: u32 = 100_000;

/// Takes it; a memfd stands in for a lease.
pub(super) fn take(context: &Context) -> Vec<Measure> {
    let memory = memfd_create("bench", MemfdFlags::CLOEXEC).expect("a memfd");
    let file = File::from(memory.try_clone().expect("an fd"));
    file.set_len(PAGE).expect("its size");
    let lease = Lease::from_fd(memory).expect("a stand-in for a lease");
    let plain = lease.map().expect("a mapping");
    let guarded = lease.map_guarded().expect("a mapping");
    let plain_register = plain.register::<u32>(64).expect("a register");
    let guarded_register = guarded.register::<u32>(64).expect("a register");
    let page = [7u8; PAGE as usize];
    let words = plain.as_ptr().cast::<u64>();
    let bare = plain.as_ptr().wrapping_add(64).cast::<u32>();
    let measure = Rounds::new(
        "library",
        "Register access through the library",
        "a bare volatile access",
        Unit::Native,
    )
    .run(context.rounds(41), |side, batch| match side {
        Side::Ours => {
            time(batch, "plain read", || drop_value(plain_register.read()));
            time(batch, "plain write", || plain_register.write(black_box(7)));
            time(batch, "guarded read", || {
                drop_value(guarded_register.read().expect("not revoked"));
            });
            time(batch, "guarded write", || {
                guarded_register.write(black_box(7)).expect("not revoked");
            });
            batch.time("guarded block", None, SAMPLES, CALLS / 100, || {
                guarded.copy_from(0, black_box(&page)).expect("not revoked");
            });
        }
        Side::Theirs => {
            for curve in ["plain read", "guarded read"] {
                time(batch, curve, || {
                    // SAFETY: Four aligned bytes of a mapping that is there; no reference leads to
                    // it.
                    drop_value(unsafe { bare.read_volatile() });
                });
            }
            batch.time("guarded block", None, SAMPLES, CALLS / 100, || {
                for (word, bytes) in black_box(&page).chunks_exact(8).enumerate() {
                    let value = u64::from_ne_bytes(bytes.try_into().expect("eight"));
                    // SAFETY: As below.
                    unsafe { words.wrapping_add(word).write_volatile(value) };
                }
            });
            for curve in ["plain write", "guarded write"] {
                time(batch, curve, || {
                    // SAFETY: As above; the memory may be written to.
                    unsafe { bare.write_volatile(black_box(7)) };
                });
            }
        }
    })
    .finish(|curve, _| match curve {
        "guarded read" => Some(Goal::AtMost(1.05)),
        "guarded write" => Some(Goal::AtMost(1.10)),
        "guarded block" => None,
        // 1.00 to two digits.
        _ => Some(Goal::AtMost(1.005)),
    });
    vec![measure]
}

fn drop_value(value: u32) {
    black_box(value);
}

#[inline(never)]
fn time(batch: &mut Batch, curve: &str, access: impl FnMut()) {
    batch.time(curve, None, SAMPLES, CALLS, access);
}
