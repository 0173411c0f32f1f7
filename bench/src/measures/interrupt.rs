//! Interrupts: of a device, and those that the owner makes fire.
//!
//! The device is QEMU's `edu`, which raises its MSI when it is told to.

use std::os::fd::{AsRawFd, OwnedFd};

use barlease_guest_tests::map::How;
use barlease_guest_tests::page_size;
use barlease_guest_tests::process::eventfd;
use barlease_guest_tests::vfio::{
    COMMAND_MASTER, Device, IRQ_ACTION_TRIGGER, IRQ_DATA_EVENTFD, IRQ_DATA_NONE, MSI_IRQ,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Context, open};
use crate::report::{Goal, Measure, Unit};
use crate::rounds::Rounds;

/// The device whose interrupts are measured.
const DEVICE: &str = "interrupts";
/// Registers of edu in BAR 0: raise an interrupt, acknowledge it.
const RAISE: u64 = 0x60;
const ACKNOWLEDGE: u64 = 0x64;

pub(super) fn take(context: &Context) -> Vec<Measure> {
    let measure = Rounds::new(
        "interrupt",
        "Interrupts",
        "stock vfio-pci",
        Unit::Nanoseconds,
    )
    .run(context.rounds(21), |side, batch| {
        let device = open(DEVICE, side);
        device.set_command(device.command() | COMMAND_MASTER);
        let registers = How::shared()
            .map(&device, 0, page_size())
            .expect("registers");
        let event = eventfd();
        arm(&device, &event);
        batch.time("raised by the device", None, 9, 10, || {
            registers.write(RAISE, 1).expect("a register");
            while !has_come(&event) {
                // Emulators lose one once in a long while.
                registers.write(ACKNOWLEDGE, 1).expect("a register");
                registers.write(RAISE, 1).expect("a register");
            }
            registers.write(ACKNOWLEDGE, 1).expect("a register");
        });
        let trigger = IRQ_DATA_NONE | IRQ_ACTION_TRIGGER;
        batch.time("fired by the owner", None, 9, 20, || {
            device
                .set_irqs(MSI_IRQ, trigger, 1, &[])
                .expect("a trigger");
            assert!(has_come(&event));
        });
        batch.time("set up and torn down", None, 9, 2, || {
            device
                .set_irqs(MSI_IRQ, trigger, 0, &[])
                .expect("torn down");
            arm(&device, &event);
        });
    })
    .finish(|_, _| Some(Goal::AtMost(1.02)));
    vec![measure]
}

fn arm(device: &Device, event: &OwnedFd) {
    let flags = IRQ_DATA_EVENTFD | IRQ_ACTION_TRIGGER;
    let armed = device.set_irqs(MSI_IRQ, flags, 1, &[event.as_raw_fd()]);
    armed.expect("an interrupt");
}

/// Waits for the event and takes it back; false when none has come for a second.
fn has_come(event: &OwnedFd) -> bool {
    let second = Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    };
    let ready = poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&second));
    ready.expect("poll") > 0 && rustix::io::read(event, &mut [0; 8]).is_ok()
}
