//! What can go wrong, and what to do about it.

use std::fmt;
use std::io;
use std::path::Path;
use std::path::PathBuf;

use rustix::io::Errno;

use crate::Bdf;

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The thing that an operation was about.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Object {
    /// A PCI function.
    Device(Bdf),
    /// A VFIO region of a device.
    Region {
        /// The device.
        bdf: Bdf,
        /// Region index: 0 to 5 are BARs.
        index: u32,
    },
    /// A lease, with its origin as far as it is known.
    Lease {
        /// The device.
        bdf: Option<Bdf>,
        /// The BAR.
        region: Option<u32>,
    },
    /// A mapping of a lease or a BAR.
    Mapping {
        /// Where the mapping begins in the lease or BAR, in bytes.
        offset: u64,
        /// Length in bytes.
        length: u64,
    },
    /// A file, device node or sysfs attribute.
    File(PathBuf),
    /// The connection over which a lease is passed.
    Socket,
    /// An environment variable.
    Variable(String),
}

impl Object {
    /// A file.
    pub(crate) fn file(path: impl AsRef<Path>) -> Self {
        Self::File(path.as_ref().to_owned())
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(bdf) => write!(f, "{bdf}"),
            Self::Region { bdf, index } => write!(f, "{bdf} region {index}"),
            Self::Lease {
                bdf: Some(bdf),
                region: Some(region),
            } => write!(f, "lease of {bdf} BAR {region}"),
            Self::Lease { .. } => f.write_str("lease"),
            Self::Mapping { offset, length } => {
                write!(f, "mapping of {length:#x} bytes at offset {offset:#x}")
            }
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Socket => f.write_str("socket"),
            Self::Variable(name) => write!(f, "${name}"),
        }
    }
}

/// A device that keeps an IOMMU group from being viable.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct GroupMember {
    /// The device.
    pub bdf: Bdf,
    /// The driver that it is bound to, which is not a vfio driver.
    pub driver: Option<String>,
}

/// An error. The text says what was attempted on which object; the cause that the kernel gave is
/// the [source](std::error::Error::source), which the text does not repeat.
///
/// [`Error::report`] prints all of it on one line, with the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such PCI function.
    #[error("open: {bdf}: no such PCI device")]
    NoDevice {
        /// The address that was asked for.
        bdf: Bdf,
    },

    /// The device is not bound to a vfio driver.
    #[error("open: {bdf}: {}", not_bound(driver.as_deref()))]
    NotBound {
        /// The device.
        bdf: Bdf,
        /// The driver that it is bound to.
        driver: Option<String>,
    },

    /// The device is in no IOMMU group, so VFIO cannot isolate it.
    #[error("open: {bdf}: the device is in no IOMMU group")]
    NoIommuGroup {
        /// The device.
        bdf: Bdf,
    },

    /// Other devices of the IOMMU group are bound to host drivers.
    #[error(
        "open: {bdf}: IOMMU group {group} is not viable because of {}",
        members(others)
    )]
    GroupNotViable {
        /// The device.
        bdf: Bdf,
        /// Number of the group.
        group: u32,
        /// The devices that are in the way.
        others: Vec<GroupMember>,
    },

    /// Permission is missing (`EACCES`, `EPERM`).
    #[error("{operation}: {object}")]
    Denied {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        object: Object,
        /// How to get permission, where known.
        remedy: Option<String>,
        /// The kernel's answer.
        source: io::Error,
    },

    /// Somebody else uses it (`EBUSY`).
    #[error("{operation}: {object}")]
    Busy {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        object: Object,
        /// The kernel's answer.
        source: io::Error,
    },

    /// The driver, kernel, device or platform does not have this feature.
    #[error("{operation}: {object}: not supported")]
    Unsupported {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        object: Object,
        /// What would make it work.
        remedy: String,
    },

    /// The lease is inaccessible for now: [`GuardedMapping::recover`](crate::GuardedMapping::recover)
    /// or a later attempt may succeed. Of an access to a mapping: it was lost; a read value must
    /// not be used, a written value may or may not have reached the device.
    #[error("{operation}: {object}: revoked")]
    Revoked {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        object: Object,
    },

    /// The lease is inaccessible for ever: revoked by its owner, or its owner closed the device.
    #[error("{operation}: {object}: revoked for good")]
    Dead {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        object: Object,
    },

    /// The lease is not one of this device since it was opened.
    #[error(
        "{operation}: {object}: the lease is of another device, or of an earlier open of this one"
    )]
    WrongDevice {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        object: Object,
    },

    /// The file descriptor is not a dma-buf that the barlease module exported.
    #[error("{operation}: {object}: not a lease made by the barlease module")]
    NotALease {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        object: Object,
    },

    /// An access that goes past the end.
    #[error("{object}: {length:#x} bytes at offset {offset:#x} are out of bounds")]
    OutOfBounds {
        /// What was accessed.
        object: Object,
        /// Offset of the access in bytes.
        offset: u64,
        /// Length of the access in bytes.
        length: u64,
    },

    /// An access whose address is not aligned as its width asks for.
    #[error("{object}: offset {offset:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// What was accessed.
        object: Object,
        /// Offset of the access in bytes.
        offset: u64,
        /// Alignment that is needed, in bytes.
        align: u64,
    },

    /// A write through something that may only be read.
    #[error("{operation}: {object}: read-only")]
    ReadOnly {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        object: Object,
    },

    /// An argument that cannot be right.
    #[error("{operation}: {object}: {reason}")]
    Invalid {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        object: Object,
        /// What is wrong.
        reason: String,
    },

    /// The peer or the kernel sent something that is not understood.
    #[error("{operation}: {object}: {reason}")]
    Malformed {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        object: Object,
        /// What is wrong with it.
        reason: String,
    },

    /// Any other failure.
    #[error("{operation}: {object}")]
    Io {
        /// What was attempted.
        operation: &'static str,
        /// On what.
        object: Object,
        /// The cause.
        source: io::Error,
    },
}

fn not_bound(driver: Option<&str>) -> String {
    match driver {
        Some(driver) => format!("bound to {driver}, which is not a vfio driver"),
        None => "bound to no driver".to_owned(),
    }
}

fn members(others: &[GroupMember]) -> String {
    let texts: Vec<String> = others
        .iter()
        .map(|other| match &other.driver {
            Some(driver) => format!("{} (bound to {driver})", other.bdf),
            None => other.bdf.to_string(),
        })
        .collect();
    if texts.is_empty() {
        return "another device".to_owned();
    }
    texts.join(", ")
}

impl Error {
    /// Sorts an errno into `Denied`, `Busy` or `Io`.
    pub(crate) fn from_errno(operation: &'static str, object: Object, errno: Errno) -> Self {
        Self::from_io(operation, object, errno.into())
    }

    /// As [`Error::from_errno`].
    pub(crate) fn from_io(operation: &'static str, object: Object, source: io::Error) -> Self {
        match source.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::ACCESS | Errno::PERM) => Self::Denied {
                operation,
                object,
                remedy: None,
                source,
            },
            Some(Errno::BUSY) => Self::Busy {
                operation,
                object,
                source,
            },
            _ => Self::Io {
                operation,
                object,
                source,
            },
        }
    }

    /// Says how to get permission, if that is what is missing.
    pub(crate) fn with_remedy(mut self, text: impl Into<String>) -> Self {
        if let Self::Denied { remedy, .. } = &mut self {
            *remedy = Some(text.into());
        }
        self
    }

    /// The errno that the kernel answered, if it is the cause.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Denied { source, .. } | Self::Busy { source, .. } | Self::Io { source, .. } => {
                source.raw_os_error()
            }
            _ => None,
        }
    }

    /// What to do about it, where known.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::NoDevice { .. } => Some("`barlease device` lists them".to_owned()),
            Self::NotBound { bdf, .. } => Some(format!("run `barlease device bind {bdf}`")),
            Self::NoIommuGroup { .. } => Some(
                "turn the IOMMU on, in the firmware and with intel_iommu=on or amd_iommu=on"
                    .to_owned(),
            ),
            Self::GroupNotViable { others, .. } => {
                let list: Vec<String> = others.iter().map(|o| o.bdf.to_string()).collect();
                Some(format!(
                    "bind every device of the group to a vfio driver: `barlease device bind {}`",
                    list.join(" ")
                ))
            }
            Self::Denied { remedy, .. } => remedy.clone(),
            Self::Busy { .. } => Some("another process has it open".to_owned()),
            Self::Unsupported { remedy, .. } => Some(remedy.clone()),
            Self::Dead { .. } => Some("ask the owner for a new lease".to_owned()),
            _ => None,
        }
    }

    /// The operation, the object, the whole chain of causes and the remedy, on one line.
    pub fn report(&self) -> impl fmt::Display + '_ {
        Report(self)
    }
}

struct Report<'a>(&'a Error);

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = std::error::Error::source(self.0);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        match self.0.remedy() {
            Some(remedy) => write!(f, " ({remedy})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_does_not_repeat_the_source_and_the_report_has_all() {
        let error = Error::from_errno("open", Object::file("/dev/vfio/1"), Errno::BUSY);
        assert_eq!(error.to_string(), "open: /dev/vfio/1");
        let report = error.report().to_string();
        assert!(report.starts_with("open: /dev/vfio/1: "), "{report}");
        assert_eq!(report.matches("busy").count(), 1, "{report}");
        assert!(
            report.ends_with("(another process has it open)"),
            "{report}"
        );
    }

    #[test]
    fn a_group_that_is_not_viable_names_the_others() {
        let error = Error::GroupNotViable {
            bdf: "00:05.0".parse().unwrap(),
            group: 3,
            others: vec![GroupMember {
                bdf: "00:05.1".parse().unwrap(),
                driver: Some("nvme".to_owned()),
            }],
        };
        assert_eq!(
            error.to_string(),
            "open: 0000:00:05.0: IOMMU group 3 is not viable because of 0000:00:05.1 (bound to nvme)"
        );
    }
}
