//! Errors that a device reports (PCIe, 6.2), on request.

use barlease_lab::guest;

use crate::{importer::KernelLog, pci::Function, wait};

/// The only device that reports errors.
pub const DEVICE: &str = "virtio";
/// Another function of it, which reports none. Recovery is for both.
pub const NEIGHBOUR: &str = "neighbour";
/// The BAR with their registers.
pub const BAR: u32 = 4;

/// Not fatal at first (PCIe, 7.8.4.4): completion time-out.
pub const NON_FATAL: &str = "COMP_TIME";
/// Fatal at first: the link's protocol was violated. Recovery resets the link.
pub const FATAL: &str = "DLP";
/// Corrected by the hardware: receiver error.
pub const CORRECTED: &str = "RCVR";

/// Has the device report an error.
///
/// # Panics
///
/// When QEMU refuses.
pub fn inject(error: &str) {
    let reply = guest::monitor(&format!("pcie_aer_inject_error {DEVICE} {error}"));
    let reply = reply.expect("an error to inject");
    assert!(reply.contains("OK id: virtio"), "{reply}");
}

/// Waits for the end of a recovery: `successful` or `failed`.
///
/// Another error that comes before the kernel has cleared the status of this one may be taken for
/// it.
///
/// # Panics
///
/// When there is none.
#[must_use]
pub fn end_of_recovery(log: &mut KernelLog) -> String {
    let mut end = None;
    wait::until("recovery", || {
        let lines = log.lines();
        let mut ends = lines
            .iter()
            .filter_map(|line| line.split_once("device recovery "));
        end = ends.next().map(|(_, end)| end.to_owned());
        end.is_some()
    });
    end.unwrap_or_default()
}

/// Waits until the device has recovered.
///
/// # Panics
///
/// When it has not.
pub fn wait_for_recovery(log: &mut KernelLog) {
    assert_eq!(end_of_recovery(log), "successful");
}

/// Has the device report an error that the hardware has corrected, and waits until the kernel has
/// counted it.
///
/// # Panics
///
/// When it is not counted.
pub fn report_corrected() {
    let function = Function::named(DEVICE);
    let before = function.errors("correctable");
    inject(CORRECTED);
    wait::until("the error", || function.errors("correctable") > before);
}

/// Waits until the kernel has handled all errors that were reported.
///
/// # Panics
///
/// When it does not.
pub fn wait_until_handled() {
    // Errors are handled one after the other, but the port may hand over two at once, of which the
    // corrected one comes first. Errors that are reported after that was handled are handed over
    // after both.
    report_corrected();
    report_corrected();
}
