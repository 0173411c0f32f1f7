//! The lab: builds tool chain, kernels and guest images, and boots guests.
//!
//! The lab tests what users run: Debian's own unmodified kernels, with modules built by the
//! compiler that built these kernels. Beside them are debug kernels, built here, that watch
//! themselves. All of it comes as Debian packages and is unpacked into a cache folder; nothing is
//! installed on the host, and nothing needs root.
//!
//! The code is in three rooms, and each knows only those before it (`xtask/tests/imports.rs` holds
//! them to that). Their public modules are here by their own names.
//!
//! | room | module | what |
//! |---|---|---|
//! | packages | [`plan`] | which packages and which kernel, and why |
//! | | [`sysroot`] | unpacked packages, and programs run from them |
//! | | [`arch`] | all that differs in guests of another architecture |
//! | | [`cache`], [`report`], [`version`] | folders and locks; progress; Debian's version order |
//! | kernels | [`prepare`](prepare::prepare) | makes what is missing: tool chain, kernel, Rust overlay |
//! | | [`kernel`] | an image and its modules |
//! | | [`flavour`] | Debian's kernels for real time, for clouds, and for 64-bit ARM |
//! | | [`debug`] | kernels of the lab's own making, and how they are built |
//! | | [`without`] | which of these lack something that all of Debian's have |
//! | | [`kmod`] | builds the module of a checkout |
//! | | [`selftests`] | the kernel's own tests of VFIO and IOMMUFD |
//! | | [`litmus`] | tests of the order of memory, judged by the kernel's own model |
//! | guests | [`machine`] | what devices a guest has |
//! | | [`preset`] | the machines of tests, demo and benchmarks |
//! | | [`run`] | boots a guest, runs a command in it, judges the result |
//! | | [`series`] | several commands in one guest |
//! | | [`emulator`] | KVM or not |
//! | | [`splat`] | what must not be in a kernel's log |
//! | | [`system`] | a guest whose root is a Debian system, with systemd |
//! | | [`programs`] | programs for guests of another architecture |
//! | | [`guest`] | the other side: what a program inside a guest can ask of the host |
//!
//! # Why not virtme-ng
//!
//! [virtme-ng](https://github.com/arighi/virtme-ng) boots a kernel on the host's own root file
//! system. It was weighed against a small initramfs of our own, which was chosen because
//!
//! - virtme-ng shares that file system by 9p or virtiofs, which Debian's kernels have as modules
//!   only; to boot an unmodified one it needs an initramfs with them, made by tools of the host;
//! - a guest must not depend on what else is installed on the developer's host. Ours has
//!   busybox, one script, and what is being tested, and is the same everywhere;
//! - a kernel with everything in memory is up in about two seconds in plain software emulation;
//! - it needs no Python, no root, and no daemon beside the emulator;
//! - output, control and kernel log have a serial port each, so kernel messages cannot tear a
//!   verdict.
//!
//! The lab does without files that are shared while a guest runs. A comfortable userland there is
//! where it is needed: [`system`].

mod guests;
#[cfg(feature = "host")]
mod kernels;
#[cfg(feature = "host")]
mod packages;

pub use guests::guest;
#[cfg(feature = "host")]
pub use guests::{emulator, machine, preset, programs, run, secure_boot, series, splat, system};
#[cfg(feature = "host")]
pub use kernels::{debug, flavour, kernel, kmod, litmus, prepare, selftests, without};
#[cfg(feature = "host")]
pub use packages::{arch, cache, plan, report, sysroot, version};
