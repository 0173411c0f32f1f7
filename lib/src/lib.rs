//! Lease pieces of a PCI device's memory to other processes and other devices, and take them back.
//!
//! A *lease* is a dma-buf of BAR ranges. Its holder can map it or import it for peer-to-peer
//! DMA; its owner can revoke it at any moment, for good. The device itself, with its
//! interrupts, reset, config space and all BARs, stays with its owner. The kernel module
//! `barlease_vfio_pci` does this; the library works with the stock driver too, as far as that goes,
//! and says [`Error::Unsupported`] where it ends.
//!
//! # Opening a device
//!
//! A [`Device`] is opened by its [`Bdf`], once it is bound to a vfio driver (`barlease device bind
//! 0000:00:05.0`, or [`pci::Pci::bind`]). The library uses its character device and iommufd where
//! the kernel has them, else its group and a container.
//!
//! ```no_run
//! use barlease::Device;
//!
//! let device = Device::open("0000:00:05.0".parse()?)?;
//! for region in device.regions()? {
//!     println!("{:8} {:#12x}", region.kind, region.size);
//! }
//! println!("{:?}", device.features()?);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Driving it
//!
//! Registers are mapped, config space is read and written, interrupts are eventfds, and memory for
//! DMA is a [`DmaBuffer`] in the device's [`Iommu`]:
//!
//! ```no_run
//! # fn example(device: &barlease::Device) -> barlease::Result<()> {
//! use barlease::{InterruptKind, config::Command, dma};
//! use std::time::Duration;
//!
//! device.config()?.enable(Command::MASTER)?;
//! let registers = device.map_region(0, ..)?;
//! let status = registers.typed_read_only::<u32>(0x1c)?;
//! let doorbells = registers.array::<u32>(0x1000, 16, 8)?;
//!
//! let queue = device.dma_buffer(4096)?;
//! registers.write(0x28, queue.iova())?;
//! status.poll_until(1, 1, Duration::from_secs(5))?;
//!
//! let vectors = device.enable_interrupts(InterruptKind::Msix, 2)?;
//! queue.write(0, 0x1234_u64)?;
//! dma::write_barrier();
//! doorbells.get_write_only(0)?.write(1);
//! vectors[1].wait()?;
//! # Ok(())
//! # }
//! ```
//!
//! Several devices, or several functions of one IOMMU group, share an [`Iommu`]:
//! [`OpenOptions::iommu`]. A device that another crate or another process opened is taken over by
//! [`Device::from_fd`]; for leases of it a borrowed descriptor is enough: [`Leases`]. Tests of a
//! driver need no hardware: see the feature `fake`, and the examples of the crate for whole
//! drivers.
//!
//! # Granting a lease
//!
//! ```no_run
//! # fn example(device: &barlease::Device) -> barlease::Result<()> {
//! use std::os::unix::net::UnixStream;
//!
//! let lease = device.export(0).range(0..2 << 20).export()?;
//! lease.set_name("left half")?;
//!
//! let holder = UnixStream::connect("/run/holder.sock").unwrap();
//! lease.send(&holder)?;
//!
//! println!("{:?}", device.status(&lease)?);
//! device.revoke(&lease)?;
//! // Nobody can reach the range through this lease any more; it can be leased again.
//! # Ok(())
//! # }
//! ```
//!
//! # Holding a lease
//!
//! The holder needs no device and no privilege. A plain [`Mapping`] costs nothing and dies with
//! SIGBUS when the lease is revoked; a [`GuardedMapping`] answers [`Error::Revoked`], and works
//! again when the lease does. Its registers answer [`Lost`], which is small, and of which `?` makes
//! that.
//!
//! ```no_run
//! # fn example(socket: &std::os::unix::net::UnixStream) -> barlease::Result<()> {
//! use barlease::{Error, Lease};
//!
//! let lease = Lease::receive(socket)?;
//! let mapping = lease.map_guarded()?;
//! for offset in (0..mapping.len()).step_by(4) {
//!     match mapping.write(offset, 0x0000_ff00u32) {
//!         Ok(()) => {}
//!         Err(Error::Revoked { .. }) => break,
//!         Err(error) => return Err(error),
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Device memory is not memory
//!
//! There are no slices and no references to it. A register is read and written by volatile
//! accesses of its width; bounds and alignment are checked when the register is made.
//!
//! ```
//! # // A plain file stands in for a lease: any file that can be mapped will do.
//! # let path = std::env::temp_dir().join(format!("barlease-doc-{}", std::process::id()));
//! # let file = std::fs::File::options().read(true).write(true).create(true).open(&path).unwrap();
//! # std::fs::remove_file(&path).unwrap();
//! # file.set_len(8192).unwrap();
//! # let lease = barlease::Lease::from_fd(file)?;
//! let mapping = lease.map()?;
//! let control = mapping.register::<u32>(0x10)?;
//! control.write(1);
//! assert_eq!(control.read(), 1);
//!
//! mapping.copy_from(0x100, b"some bytes")?;
//! assert!(mapping.register::<u32>(0x11).is_err()); // not aligned
//! assert!(mapping.register::<u32>(0x2000).is_err()); // past the end
//! # Ok::<(), barlease::Error>(())
//! ```
//!
//! # Errors
//!
//! [`Error`] tells apart what a program does differently: [`Unsupported`](Error::Unsupported) (the
//! feature is not there), [`Denied`](Error::Denied) (permission), [`Revoked`](Error::Revoked) (for
//! now), [`Dead`](Error::Dead) (for ever). [`Error::report`] has the cause and the remedy too.

#![cfg(target_os = "linux")]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing
    )
)]

mod bdf;
mod device;
pub mod dma;
pub mod doctor;
mod error;
mod event;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
mod fields;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod iommu;
mod lease;
mod leases;
mod listen;
mod mapping;
mod pass;
pub mod pci;
mod record;
mod registers;
mod sys;
#[cfg(feature = "log")]
mod trace;
mod types;

pub use bdf::Bdf;
pub use bdf::ParseBdfError;
pub use device::Backend;
pub use device::Device;
pub use device::DeviceInfo;
pub use device::DeviceParts;
pub use device::ExportBuilder;
pub use device::FeatureOperation;
pub use device::Features;
pub use device::InterruptInfo;
pub use device::InterruptKind;
pub use device::OpenOptions;
pub use device::ParseVfTokenError;
pub use device::Region;
pub use device::RegionCapability;
pub use device::RegionKind;
pub use device::ResetMember;
pub use device::VfToken;
pub use device::config;
pub use error::Error;
pub use error::GroupMember;
pub use error::Lost;
pub use error::Object;
pub use error::Result;
#[cfg(feature = "tokio")]
pub use event::AsyncEventFd;
pub use event::EventFd;
pub use iommu::DmaAccess;
pub use iommu::DmaBuffer;
pub use iommu::DmaMapping;
pub use iommu::DmaOptions;
pub use iommu::Iommu;
pub use iommu::IovaRange;
pub use lease::FD_VARIABLE;
pub use lease::Lease;
pub use lease::LeaseInfo;
pub use lease::MAX_NAME;
pub use leases::LeaseId;
pub use leases::LeaseRecord;
pub use leases::Leases;
pub use leases::List;
pub use leases::Revoked;
pub use leases::Tph;
pub use listen::ListenFd;
pub use listen::take_listen_fds;
pub use mapping::GuardedMapping;
pub use mapping::GuardedReadOnlyRegister;
pub use mapping::GuardedRegister;
pub use mapping::GuardedWindow;
pub use mapping::MapOptions;
pub use mapping::Mapping;
pub use mapping::ReadOnlyRegister;
pub use mapping::Register;
pub use mapping::ScratchMapping;
pub use mapping::Value;
pub use mapping::Window;
pub use pass::Peer;
pub use pass::Receiver;
pub use pass::Sender;
pub use registers::Bits;
pub use registers::GuardedTypedRegister;
pub use registers::RegisterArray;
pub use registers::RegisterValue;
pub use registers::TypedReadOnlyRegister;
pub use registers::TypedRegister;
pub use registers::WriteOnlyRegister;
pub use types::BarRange;
pub use types::MemoryType;
pub use types::Reasons;
pub use types::State;
pub use types::Status;

/// The examples of the crate's README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
