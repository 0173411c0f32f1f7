//! `barlease-clients CRATE BDF BAR`: uses a device as a program on that crate does, and says what
//! it sees. The output is the same with every driver that answers as stock vfio-pci does.

use std::path::PathBuf;
use std::process::ExitCode;

mod pci_driver_crate;
mod vfio_ioctls_crate;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A page of memory that devices may reach.
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// Where devices see it.
const IOVA: u64 = 0x10_0000;

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let [name, bdf, bar] = words.as_slice() else {
        eprintln!("usage: barlease-clients pci-driver|vfio-ioctls BDF BAR");
        return ExitCode::from(2);
    };
    let path = PathBuf::from(format!("/sys/bus/pci/devices/{bdf}"));
    let result = bar
        .parse()
        .map_err(Into::into)
        .and_then(|bar| match name.as_str() {
            "pci-driver" => pci_driver_crate::run(&path, bar),
            "vfio-ioctls" => vfio_ioctls_crate::run(&path, bar),
            other => Err(format!("no such program: {other}").into()),
        });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("failed: {error}");
            ExitCode::FAILURE
        }
    }
}
