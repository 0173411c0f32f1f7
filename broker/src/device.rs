//! A device that the service owns: found, opened, and everything that the core has done with it.
//!
//! There is one implementation, over the library's `Device`. Tests give it a device of the
//! library's feature `fake`, which answers the same ioctls.

use std::os::fd::AsFd;
use std::os::fd::BorrowedFd;
use std::os::fd::OwnedFd;

use barlease::BarRange;
use barlease::Bdf;
use barlease::Error;
use barlease::EventFd;
use barlease::InterruptKind;
use barlease::LeaseId;
use barlease::OpenOptions;
use barlease::RegionKind;
use barlease::Revoked;
use barlease::Tph;
use barlease::config::Command;
use barlease::pci::Pci;
use barlease_ledger::core::Buffer;
use barlease_ledger::core::Errno;
use barlease_ledger::core::Export;
use barlease_ledger::core::Facts;
use barlease_ledger::core::RevokeAnswer;
use barlease_ledger::policy;
use barlease_ledger::policy::Backend;
use barlease_ledger::types::Access;
use barlease_ledger::types::BufferId;
use barlease_ledger::types::MemoryType;
use barlease_ledger::types::Range;
use barlease_proto::Usage;

use crate::find;

/// The errno of what is not an errno of the kernel's.
const EIO: Errno = 5;
const ENOENT: Errno = 2;
/// Bytes that are written at a time, of which a range is a multiple.
const FILL: usize = 4096;

/// An open device.
#[derive(Debug)]
pub struct Device {
    device: barlease::Device,
    /// Signalled when a buffer changes, drains or goes.
    pub events: EventFd,
    /// Signalled when the kernel wants the device back, if it can say so.
    pub request: Option<EventFd>,
}

/// Finds and opens the device that a policy means.
///
/// # Errors
///
/// Text for the administrator.
pub fn open(wanted: &policy::Device) -> Result<barlease::Device, String> {
    let bdf = find::find(&Pci::system(), wanted)?;
    let backend = match wanted.backend {
        Backend::Auto => None,
        Backend::Group => Some(barlease::Backend::Group),
        Backend::Cdev => Some(barlease::Backend::Cdev),
    };
    OpenOptions::new()
        .backend(backend)
        .open(bdf)
        .and_then(|device| {
            device.config()?.update_command(|mut command| {
                command.set(Command::MEMORY, wanted.memory);
                command.set(Command::MASTER, wanted.bus_master);
                command
            })?;
            Ok(device)
        })
        .map_err(|error| error.report().to_string())
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

impl Device {
    /// Takes over an open device, with its events.
    ///
    /// # Errors
    ///
    /// Those of the library: the driver is not Barlease's, or an older one.
    pub fn new(device: barlease::Device) -> barlease::Result<Self> {
        let events = device.leases().events()?;
        let request = match device.enable_interrupt(InterruptKind::Request) {
            Ok(request) => Some(request),
            Err(Error::Unsupported { .. }) => None,
            Err(error) => return Err(error),
        };
        Ok(Self {
            device,
            events,
            request,
        })
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> Bdf {
        self.device.bdf()
    }

    /// Its vendor and device.
    ///
    /// # Errors
    ///
    /// Those of the library.
    pub fn ids(&self) -> barlease::Result<(u16, u16)> {
        let identity = self.device.config()?.identity()?;
        Ok((identity.vendor, identity.device))
    }

    /// Its serial number, if it has one.
    ///
    /// # Errors
    ///
    /// Those of the library.
    pub fn serial_number(&self) -> barlease::Result<Option<u64>> {
        self.device.config()?.serial_number()
    }

    /// Its BARs, and what of them is never leased.
    ///
    /// # Errors
    ///
    /// Those of the library.
    pub fn facts(&self) -> barlease::Result<Facts> {
        let mut facts = Facts::default();
        for region in self.device.regions()? {
            let RegionKind::Bar(bar) = region.kind else {
                continue;
            };
            if let Some(size) = facts.bars.get_mut(usize::from(bar)) {
                *size = region.size;
            }
        }
        if let Some(msix) = self.device.config()?.msix()? {
            for (bar, range) in [msix.table, msix.pending] {
                facts.reserved.push((
                    bar,
                    Range {
                        offset: range.offset,
                        length: range.length,
                    },
                ));
            }
        }
        Ok(facts)
    }

    /// LIST.
    ///
    /// # Errors
    ///
    /// Those of the library.
    pub fn list(&self) -> barlease::Result<Vec<Buffer>> {
        self.device
            .leases()
            .list()
            .map(|record| {
                let record = record?;
                Ok(Buffer {
                    id: BufferId(record.id.get()),
                    bar: u8::try_from(record.bar).unwrap_or(u8::MAX),
                    size: record.size,
                    nr_ranges: record.ranges,
                    dead: record.state == barlease::State::Dead,
                    draining: record.draining,
                    reasons: record.reasons.bits(),
                    internal: record.internal,
                })
            })
            .collect()
    }

    /// How many mappings and attachments each lease has.
    ///
    /// # Errors
    ///
    /// Those of the library.
    pub fn usage(&self) -> barlease::Result<Vec<(BufferId, Usage)>> {
        let leases = self.device.leases();
        let usage = leases.list().map(|record| {
            let record = record?;
            let usage = Usage {
                mappings: record.mappings,
                attachments: record.attachments,
            };
            Ok((BufferId(record.id.get()), usage))
        });
        usage.collect()
    }

    /// Exports a buffer.
    ///
    /// # Errors
    ///
    /// The kernel's errno. Nothing is left of the buffer then.
    pub fn export(&self, export: &Export) -> Result<(BufferId, OwnedFd), Errno> {
        self.try_export(export).map_err(|error| errno(&error))
    }

    fn try_export(&self, export: &Export) -> barlease::Result<(BufferId, OwnedFd)> {
        let leases = self.device.leases();
        let ranges = export.ranges.as_slice().iter().map(|range| BarRange {
            offset: range.offset,
            length: range.length,
        });
        let builder = leases.export(export.bar.into()).ranges(ranges);
        let lease = match export.access {
            Access::Read => builder.read_only(),
            Access::ReadWrite => builder.writable(),
        }
        .export()?;
        if export.memory_type == MemoryType::WriteCombining {
            leases.set_memory_type(&lease, barlease::MemoryType::Wc)?;
        }
        if let Some(tags) = export.tph {
            let mut tph = Tph::new().processing_hint(tags.hint);
            if let Some(tag) = tags.tag {
                tph = tph.steering_tag(tag);
            }
            if let Some(tag) = tags.extended {
                tph = tph.steering_tag_ext(tag);
            }
            leases.set_tph(&lease, tph)?;
        }
        let id = LeaseId::of(&lease)?;
        Ok((BufferId(id.get()), lease.into()))
    }

    /// Revokes a buffer for good, without waiting for importers.
    #[must_use]
    pub fn revoke(&self, buffer: BufferId) -> RevokeAnswer {
        let id = LeaseId::new(buffer.0);
        match self.device.leases().revoke_id_nowait(id) {
            Ok(Revoked::Done) => RevokeAnswer::Done,
            Ok(Revoked::Draining) => RevokeAnswer::InProgress,
            Err(Error::Dead { .. }) => RevokeAnswer::Before,
            Err(error) => match errno(&error) {
                ENOENT => RevokeAnswer::Unknown,
                errno => RevokeAnswer::Failed(errno),
            },
        }
    }

    /// Fills a range with 8 bytes, little-endian, again and again.
    ///
    /// # Errors
    ///
    /// The errno of mapping or writing.
    pub fn scrub(&self, bar: u8, range: Range, pattern: u64) -> Result<(), Errno> {
        let bytes = pattern.to_le_bytes().repeat(FILL / 8);
        let mapping = self
            .device
            .map_region(bar.into(), range.offset..range.end())
            .map_err(|error| errno(&error))?;
        let length = usize::try_from(range.length).map_err(|_| EIO)?;
        for offset in (0..length).step_by(FILL) {
            let piece = &bytes[..FILL.min(length - offset)];
            mapping
                .copy_from(offset, piece)
                .map_err(|error| errno(&error))?;
        }
        Ok(())
    }
}

fn errno(error: &Error) -> Errno {
    error.errno().unwrap_or(EIO)
}
