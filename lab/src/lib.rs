//! The lab: builds tool chain, kernels and guest images, and boots guests.
//!
//! The lab tests what users run: Debian's own unmodified kernels, with modules built by the
//! compiler that built these kernels. Beside them are debug kernels, built here, that watch
//! themselves. All of it comes as Debian packages and is unpacked into a cache folder; nothing is
//! installed on the machine, and nothing needs root.
//!
//! | module | what |
//! |---|---|
//! | [`prepare`](prepare::prepare) | makes what is missing: tool chain, kernel, Rust overlay |
//! | [`plan`] | which packages and which kernel, and why |
//! | [`flavour`] | Debian's kernels for real time, for clouds, and for 64-bit ARM |
//! | [`arch`] | all that differs in guests of another architecture |
//! | [`programs`] | programs for guests of another architecture |
//! | [`sysroot`] | unpacked packages, and programs run from them |
//! | [`kernel`] | an image and its modules |
//! | [`debug`] | the kernels of the debug lane, and how they are built |
//! | [`kmod`] | builds the module of a checkout |
//! | [`machine`] | what devices a guest has |
//! | [`vm`] | boots a guest, runs a command in it, judges the result |
//! | [`system`] | a guest whose root is a Debian system, with systemd |
//! | [`series`] | several commands in one guest |
//! | [`emulator`] | KVM or not |
//! | [`selftests`] | the kernel's own tests of VFIO and IOMMUFD |
//! | [`splat`] | what must not be in a kernel's log |
//! | [`cache`], [`report`], [`version`] | folders and locks; progress; Debian's version order |
//! | [`guest`] | the other side: what a program inside a guest can ask of the host |
//!
//! # Why not virtme-ng
//!
//! [virtme-ng](https://github.com/arighi/virtme-ng) boots a kernel on the machine's own root file
//! system. It was weighed against a small initramfs of our own, which was chosen because
//!
//! - virtme-ng shares that file system by 9p or virtiofs, which Debian's kernels have as modules
//!   only; to boot an unmodified one it needs an initramfs with them, made by tools of the machine;
//! - a guest must not depend on what else is installed on the developer's machine. Ours has
//!   busybox, one script, and what is being tested, and is the same everywhere;
//! - a kernel with everything in memory is up in about two seconds in plain software emulation;
//! - it needs no Python, no root, and no daemon beside the emulator;
//! - output, control and kernel log have a serial port each, so kernel messages cannot tear a
//!   verdict.
//!
//! The lab does without files that are shared while a guest runs. A comfortable userland there is
//! where it is needed: [`system`].

pub mod guest;

#[cfg(feature = "host")]
mod apt;
#[cfg(feature = "host")]
pub mod arch;
#[cfg(feature = "host")]
pub mod cache;
#[cfg(feature = "host")]
mod command;
#[cfg(feature = "host")]
pub mod debug;
#[cfg(feature = "host")]
pub mod emulator;
#[cfg(feature = "host")]
mod extra;
#[cfg(feature = "host")]
pub mod flavour;
#[cfg(feature = "host")]
mod foreign;
#[cfg(feature = "host")]
mod initramfs;
#[cfg(feature = "host")]
pub mod kernel;
#[cfg(feature = "host")]
pub mod kmod;
#[cfg(feature = "host")]
pub mod litmus;
#[cfg(feature = "host")]
pub mod machine;
#[cfg(feature = "host")]
mod monitor;
#[cfg(feature = "host")]
mod overlay;
#[cfg(feature = "host")]
pub mod plan;
#[cfg(feature = "host")]
pub mod prepare;
#[cfg(feature = "host")]
pub mod programs;
#[cfg(feature = "host")]
pub mod report;
#[cfg(feature = "host")]
pub mod secure_boot;
#[cfg(feature = "host")]
pub mod selftests;
#[cfg(feature = "host")]
pub mod series;
#[cfg(feature = "host")]
mod served;
#[cfg(feature = "host")]
mod source;
#[cfg(feature = "host")]
pub mod splat;
#[cfg(feature = "host")]
pub mod sysroot;
#[cfg(feature = "host")]
pub mod system;
#[cfg(feature = "host")]
mod terminal;
#[cfg(feature = "host")]
pub mod version;
#[cfg(feature = "host")]
pub mod vm;
