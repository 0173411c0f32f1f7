//! The guest tests share this: raw calls of the contract, and the means to look at their effects.
//!
//! Nothing here goes through the library `barlease`: a contract test sees what the kernel answers,
//! not what the library makes of it. All `unsafe` of the tests is here.
//!
//! - [`pci`]: functions, drivers, resets, through sysfs;
//! - [`vfio`]: groups, devices and their ioctls;
//! - [`lease`]: the features of the contract;
//! - [`buffers`]: those that go by the id of a buffer;
//! - [`attributes`]: those that change how memory is reached;
//! - [`map`]: mappings, and touching them without dying of it;
//! - [`process`]: child processes;
//! - [`cgroup`]: memory control groups;
//! - [`race`]: threads that do one thing again and again;
//! - [`wait`]: waiting for what must come, or must not yet;
//! - [`probe`]: page-table entries, read back;
//! - [`witness`]: devices that tell what has reached them;
//! - [`aer`]: errors that a device reports;
//! - [`terminal`]: a terminal with a shell that controls jobs;
//! - `virtual_machine`: a machine of KVM's with memory of ours;
//! - [`slot`]: a slot that a device can be pulled out of;
//! - [`observe`]: debugfs, `/proc/PID/maps`, page faults;
//! - [`importer`]: a device that does DMA to leases;
//! - [`allocations`]: what the kernel allocates for this process;
//! - [`calls`]: how often a function of the kernel is called;
//! - [`random`]: steps drawn from a seed, and judged;
//! - [`faults`]: allocations that fail on request, and what must not be left behind;
//! - [`errno`]: error numbers with their names.

// Tests look at bare system calls and at memory that a kernel takes away: what is not safe about
// them is in these modules, so that no test needs `unsafe`.
pub mod aer;
#[expect(unsafe_code, reason = "gettid")]
pub mod allocations;
#[expect(unsafe_code, reason = "an ioctl, fds by number")]
pub mod attributes;
pub mod buffers;
pub mod calls;
pub mod cgroup;
pub mod errno;
#[expect(unsafe_code, reason = "finit_module, fork, sched_setaffinity")]
pub mod faults;
pub mod holder;
#[expect(unsafe_code, reason = "ioctls, delete_module")]
pub mod importer;
#[expect(unsafe_code, reason = "ioctls and fds by number")]
pub mod lease;
#[expect(unsafe_code, reason = "mmap, touches, the SIGBUS handler")]
pub mod map;
#[expect(unsafe_code, reason = "getrusage")]
pub mod observe;
pub mod parity;
#[expect(unsafe_code, reason = "delete_module")]
pub mod pci;
pub mod probe;
#[expect(unsafe_code, reason = "fork, SCM_RIGHTS")]
pub mod process;
pub mod race;
pub mod random;
pub mod slot;
#[expect(unsafe_code, reason = "terminals, process groups")]
pub mod terminal;
#[expect(unsafe_code, reason = "ioctls")]
pub mod vfio;
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "memory of a virtual machine")]
pub mod virtual_machine;
pub mod wait;
pub mod witness;

pub use barlease_oracle::{huge_size, page_size};
