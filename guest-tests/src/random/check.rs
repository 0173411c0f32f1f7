//! Looks at what is there after a step.

use std::{fs::File, io::Read};

use barlease_oracle::{LowPower, MAIN, Op, Oracle, Outcome, PAGE, Protection, State};

use super::machine::Machine;
use crate::{
    HUGE,
    probe::{self, MemoryType},
};

/// How many mappings are looked at after a step.
const MAPPINGS: usize = 6;
/// How many pages of a mapping that was taken away are looked at.
const TAKEN: usize = 24;

impl Machine {
    /// Looks at buffers, mappings and importers.
    ///
    /// # Panics
    ///
    /// When one of them is not as the oracle says.
    pub fn check(&mut self, oracle: &mut Oracle, op: &Op) {
        // First what no access through a device fd is needed for: that would wake a device.
        let mut mappings: Vec<_> = oracle.mappings.keys().copied().collect();
        for _ in 0..MAPPINGS.min(mappings.len()) {
            let number = mappings.swap_remove(self.rng.usize(..mappings.len()));
            self.check_mapping(oracle, number, op);
        }
        self.check_attachments(oracle, op);
        self.check_wake_ups(oracle, op);
        self.check_states(oracle, op);
    }

    /// Looks whether a step has taken these mappings away, though it may have given them back: what
    /// was touched before has no entry any more.
    ///
    /// # Panics
    ///
    /// When something has.
    pub fn check_taken(&self, oracle: &Oracle, taken: &[usize], op: &Op) {
        for number in taken {
            let Some(mapping) = oracle.mappings.get(number) else {
                continue;
            };
            if mapping.process != MAIN {
                continue;
            }
            let map = &self.main.maps[&(*number as u64)];
            let pages = mapping.pages.iter().enumerate();
            let there = pages.filter(|(_, page)| page.is_some()).take(TAKEN);
            for (page, _) in there {
                let at = page as u64 * PAGE;
                let entry = probe::entry(map, at);
                assert_eq!(entry, None, "{op:?} left mapping {number} at {at:#x}");
            }
        }
    }

    fn check_mapping(&mut self, oracle: &mut Oracle, number: usize, op: &Op) {
        let mapping = &oracle.mappings[&number];
        let pages = mapping.pages.iter().enumerate();
        let can_load = |page: &Option<Protection>| {
            matches!(page, Some(Protection::Read | Protection::ReadWrite))
        };
        let pages: Vec<_> = pages.filter(|(_, page)| can_load(page)).collect();
        if pages.is_empty() {
            return;
        }
        let (page, _) = pages[self.rng.usize(..pages.len())];
        let at = page as u64 * PAGE;
        let process = mapping.process;
        if process == MAIN {
            self.check_entry(oracle, number, at, op);
        }
        let seen = self.read(process, number, at);
        let expected = Op::Read {
            mapping: number,
            at,
        };
        if let Err(objection) = oracle.step(&expected, &seen) {
            panic!("after {op:?}, mapping {number} at {at:#x} of process {process}: {objection}");
        }
        if process == MAIN {
            self.check_entry(oracle, number, at, op);
        }
    }

    /// Looks at the page-table entry.
    fn check_entry(&self, oracle: &Oracle, number: usize, at: u64, op: &Op) {
        let map = &self.main.maps[&(number as u64)];
        let entry = probe::entry(map, at);
        if !oracle.is_accessible(number) {
            assert_eq!(entry, None, "after {op:?}, mapping {number} at {at:#x}");
            return;
        }
        let Some(entry) = entry else {
            return;
        };
        let device = oracle.device_of(number);
        let physical = self.devices[device].start + oracle.place(number, at);
        assert_eq!(
            entry.physical, physical,
            "after {op:?}, mapping {number} at {at:#x}"
        );
        let memory_type = if oracle.mappings[&number].combining {
            MemoryType::WriteCombining
        } else {
            MemoryType::Uncached
        };
        assert_eq!(
            entry.memory_type, memory_type,
            "mapping {number}: {entry:?}"
        );
        assert!([PAGE, HUGE].contains(&entry.size), "{entry:?}");
        let is_writable = {
            let page = oracle.mappings[&number].pages[(at / PAGE) as usize];
            page == Some(Protection::ReadWrite)
        };
        assert!(
            is_writable || !entry.writable,
            "mapping {number}: {entry:?}"
        );
    }

    fn check_attachments(&mut self, oracle: &Oracle, op: &Op) {
        for (&number, expected) in &oracle.attachments {
            let (attachment, was_mapped) = &self.attachments[&number];
            let mapped = attachment.is_mapped();
            assert_eq!(
                mapped, expected.mapped,
                "after {op:?}, attachment {number} has a mapping"
            );
            if !was_mapped {
                continue;
            }
            let buffer = &oracle.buffers[&expected.buffer];
            let page = self.rng.u64(..buffer.size() / PAGE);
            let place = buffer.place(page * PAGE).expect("in the buffer");
            let led = attachment.translate(page * PAGE);
            if mapped {
                let physical = self.devices[buffer.device].start + place;
                assert_eq!(
                    led,
                    Some(physical),
                    "after {op:?}, attachment {number}, page {page}"
                );
            } else if let Some(led) = led {
                // All attachments are the same device's: its address may be another one's now.
                assert!(
                    self.is_mapped_by_any(oracle, led),
                    "after {op:?}, attachment {number}: the IOMMU leads page {page} to {led:#x}"
                );
            }
        }
    }

    /// Whether some importer has a mapping of a physical address.
    fn is_mapped_by_any(&self, oracle: &Oracle, physical: u64) -> bool {
        let mapped = oracle.attachments.values().filter(|a| a.mapped);
        let mut ranges = mapped.flat_map(|attachment| {
            let buffer = &oracle.buffers[&attachment.buffer];
            let start = self.devices[buffer.device].start;
            let ranges = buffer.ranges.iter();
            ranges.map(move |(offset, length)| start + offset..start + offset + length)
        });
        ranges.any(|range| range.contains(&physical))
    }

    fn check_wake_ups(&mut self, oracle: &Oracle, op: &Op) {
        for (device, expected) in self.devices.iter_mut().zip(&oracle.devices) {
            let mut events = Vec::new();
            for event in device.events.drain(..) {
                let mut event = File::from(event);
                let mut bytes = [0; 8];
                if event.read(&mut bytes).is_ok() {
                    device.wake_ups += u64::from_ne_bytes(bytes);
                }
                events.push(event.into());
            }
            // Only the last one can still come.
            device.events = events.split_off(events.len().saturating_sub(1));
            assert_eq!(
                device.wake_ups, expected.wake_ups,
                "after {op:?}, wake-ups of {}",
                expected.spec.name
            );
        }
    }

    fn check_states(&mut self, oracle: &mut Oracle, op: &Op) {
        let buffers: Vec<_> = oracle.buffers.keys().copied().collect();
        for number in buffers {
            let buffer = &oracle.buffers[&number];
            let device = buffer.device;
            let this = &oracle.devices[device];
            if !this.fd
                || this.low == LowPower::UntilWakeUp
                || !buffer.holders.contains(&MAIN)
                || !oracle.is_current(buffer)
            {
                continue;
            }
            let ask = Op::Status {
                device,
                buffer: number,
            };
            let seen = self.status(device, number);
            if let Err(objection) = oracle.step(&ask, &seen) {
                panic!("after {op:?}, buffer {number}: {objection}");
            }
            if let Outcome::Status(seen) = seen {
                assert!(seen.state != State::Revoked(0));
            }
        }
        for device in 0..oracle.devices.len() {
            let this = &oracle.devices[device];
            if !this.fd || this.low == LowPower::UntilWakeUp {
                continue;
            }
            let at_a_time = self.rng.u32(1..=8);
            let seen = self.list(device, at_a_time, oracle);
            let ask = Op::List { device, at_a_time };
            if let Err(objection) = oracle.step(&ask, &seen) {
                let name = oracle.devices[device].spec.name;
                panic!("after {op:?}, the list of {name}: {objection}");
            }
        }
    }
}
