//! The module `barlease_probe` (`kmod/probe`): what page-table entries really are, and kernels and
//! machines that the lab has not.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
    sync::{Mutex, PoisonError},
};

use crate::{
    errno::{Answer, ENOENT, Errno},
    map::Map,
};

const DEVICE: &str = "/dev/barlease_probe";
const MODULE: &str = "/lib/modules/barlease_probe.ko";

/// While there is one, the module plays what no machine of the lab has.
#[derive(Debug)]
pub struct Played(());

impl Played {
    /// Loads the module with such parameters; `kmod/probe` says what there is. `None` where the
    /// kernel has nothing to do that with.
    ///
    /// # Panics
    ///
    /// When it has, and that does not work.
    #[must_use]
    pub fn new(parameters: &str) -> Option<Self> {
        if !Path::new("/sys/kernel/debug/kprobes").exists() {
            return None;
        }
        let mut insmod = Command::new("insmod");
        let status = insmod.args([MODULE, parameters]).status();
        assert!(status.expect("insmod").success(), "{parameters}");
        Some(Self(()))
    }
}

impl Played {
    /// The number that the module has counted under this name.
    ///
    /// # Panics
    ///
    /// When it counts no such thing.
    #[must_use]
    pub fn counted(&self, name: &str) -> u32 {
        let path = format!("/sys/module/barlease_probe/parameters/{name}");
        let text = fs::read_to_string(path).expect("a parameter");
        text.trim().parse().expect("a number")
    }
}

impl Drop for Played {
    fn drop(&mut self) {
        let status = Command::new("rmmod").arg("barlease_probe").status();
        assert!(status.expect("rmmod").success());
    }
}

/// How the CPU treats memory behind an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryType {
    /// x86: UC, which no range register overrides.
    StrongUncached,
    /// That of an uncached mapping. x86: UC-. arm64: Device-nGnRnE.
    Uncached,
    /// x86: WC. arm64: Normal, non-cacheable.
    WriteCombining,
    /// Of ordinary memory.
    WriteBack,
    /// Another one, by its number in the CPU's table (x86: PAT, arm64: MAIR).
    Other(u32),
}

/// A page-table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Physical address of the page at the address that was asked for.
    pub physical: u64,
    /// Bytes that the entry maps.
    pub size: u64,
    /// The memory type that the CPU makes of it.
    pub memory_type: MemoryType,
    /// Whether it can be written to.
    pub writable: bool,
    /// Whether it is marked as one of no ordinary memory.
    pub special: bool,
}

fn device() -> File {
    static LOADING: Mutex<()> = Mutex::new(());
    let _one = LOADING.lock().unwrap_or_else(PoisonError::into_inner);
    if !Path::new(DEVICE).exists() {
        let status = Command::new("insmod").arg(MODULE).status();
        assert!(status.expect("insmod").success());
    }
    File::open(DEVICE).expect("the probe")
}

/// The entry at an address of this process; `None` when there is none yet, or one of ordinary
/// memory.
///
/// # Panics
///
/// When nothing is mapped there.
#[must_use]
pub fn entry_at(address: usize) -> Option<Entry> {
    match read(address) {
        Ok(entry) => Some(entry),
        Err(ENOENT) => None,
        Err(errno) => panic!("probe {address:#x}: {errno:?}"),
    }
}

/// The entry at an offset of a mapping.
#[must_use]
pub fn entry(map: &Map, offset: u64) -> Option<Entry> {
    entry_at(map.address() + offset as usize)
}

/// The memory type at an offset of a mapping, where there is an entry.
#[must_use]
pub fn memory_type(map: &Map, offset: u64) -> Option<MemoryType> {
    entry(map, offset).map(|entry| entry.memory_type)
}

fn read(address: usize) -> Answer<Entry> {
    // As struct probe_entry of kmod/probe.
    let mut bytes = [0; 32];
    let read = device().read_at(&mut bytes, address as u64);
    let length = read.map_err(|error| Errno::of(&error))?;
    assert_eq!(length, bytes.len());
    let long = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let (memory_type, flags) = (long(24) as u32, (long(24) >> 32) as u32);
    Ok(Entry {
        physical: long(0) * crate::page_size(),
        size: long(16),
        memory_type: match memory_type {
            0 => MemoryType::StrongUncached,
            1 => MemoryType::WriteCombining,
            2 => MemoryType::WriteBack,
            3 => MemoryType::Uncached,
            other => MemoryType::Other(other - 256),
        },
        writable: flags & 1 != 0,
        special: flags & 2 != 0,
    })
}
