//! Errors, with their remedies.

mod lost;
mod object;
mod report;

use std::borrow::Cow;
use std::io;

use rustix::io::Errno;

use crate::Bdf;

pub use lost::Lost;
pub use object::Object;

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A device that keeps an IOMMU group from being viable.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct GroupMember {
    /// The device.
    pub bdf: Bdf,
    /// The driver that it is bound to, which is not a vfio driver.
    pub driver: Option<String>,
}

/// An error. The text says what was attempted on which object; the cause that the kernel gave is
/// the [source](std::error::Error::source), which the text does not repeat.
///
/// [`Error::report`] prints all of it on one line, with the remedy. A `main` that ends with a
/// `Result` prints the fields and no remedy, so a program prints the report itself:
///
/// ```no_run
/// # fn run() -> barlease::Result<()> { Ok(()) }
/// fn main() -> std::process::ExitCode {
///     match run() {
///         Ok(()) => std::process::ExitCode::SUCCESS,
///         Err(error) => {
///             eprintln!("{}", error.report());
///             std::process::ExitCode::FAILURE
///         }
///     }
/// }
/// ```
///
/// ```console
/// $ my-driver
/// open: 0000:00:06.0: bound to no driver (run `barlease device bind 0000:00:06.0`)
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such PCI function.
    #[non_exhaustive]
    #[error("open: {bdf}: no such PCI device")]
    NoDevice {
        /// The address that was asked for.
        bdf: Bdf,
    },

    /// The device is not bound to a vfio driver.
    #[non_exhaustive]
    #[error("open: {bdf}: {}", not_bound(driver.as_deref()))]
    NotBound {
        /// The device.
        bdf: Bdf,
        /// The driver that it is bound to.
        driver: Option<String>,
    },

    /// The device is in no IOMMU group, so VFIO cannot isolate it.
    #[non_exhaustive]
    #[error("open: {bdf}: the device is in no IOMMU group")]
    NoIommuGroup {
        /// The device.
        bdf: Bdf,
    },

    /// Other devices of the IOMMU group are bound to host drivers.
    #[non_exhaustive]
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
    #[non_exhaustive]
    #[error("{operation}: {object}")]
    Denied {
        /// The operation that failed.
        operation: &'static str,
        /// Its object.
        object: Object,
        /// How to get permission, where known.
        remedy: Option<Cow<'static, str>>,
        /// The kernel's answer.
        source: io::Error,
    },

    /// Somebody else uses it (`EBUSY`).
    #[non_exhaustive]
    #[error("{operation}: {object}")]
    Busy {
        /// The operation that failed.
        operation: &'static str,
        /// Its object.
        object: Object,
        /// How to get hold of it, where known.
        remedy: Option<Cow<'static, str>>,
        /// The kernel's answer.
        source: io::Error,
    },

    /// The driver, kernel, device or platform does not have this feature.
    #[non_exhaustive]
    #[error("{operation}: {object}: not supported")]
    Unsupported {
        /// The operation that failed.
        operation: &'static str,
        /// Its object.
        object: Object,
        /// The remedy.
        remedy: Cow<'static, str>,
        /// The kernel's answer, if it was asked.
        source: Option<io::Error>,
    },

    /// The lease is inaccessible for now, or for good: a later attempt may succeed.
    ///
    /// Of an access to a [`GuardedMapping`](crate::GuardedMapping) `object` is what was not read or
    /// written, and `done` how much of a block was before. Of a section of a
    /// [`ScratchMapping`](crate::ScratchMapping) nothing is known: what was read must not be used,
    /// and what was written may or may not have reached the device.
    #[non_exhaustive]
    #[error("{operation}: {object}: revoked")]
    Revoked {
        /// The operation that failed.
        operation: &'static str,
        /// Its object. Of an access: the bytes that were not read or written, as far as that is known.
        object: Object,
        /// How many bytes of a block were read or written before.
        done: u64,
        /// The kernel's answer, if it was asked.
        source: Option<io::Error>,
    },

    /// The lease is inaccessible for ever: revoked by its owner, or its owner closed the device.
    #[non_exhaustive]
    #[error("{operation}: {object}: revoked for good")]
    Dead {
        /// The operation that failed.
        operation: &'static str,
        /// Its object.
        object: Object,
        /// The kernel's answer, if it was asked.
        source: Option<io::Error>,
    },

    /// The lease is not one of this device since it was opened.
    #[non_exhaustive]
    #[error(
        "{operation}: {object}: the lease is of another device, or of an earlier open of this one"
    )]
    WrongDevice {
        /// The operation that failed.
        operation: &'static str,
        /// Its object.
        object: Object,
        /// The kernel's answer, if it was asked.
        source: Option<io::Error>,
    },

    /// The file descriptor is not a dma-buf that the barlease module exported.
    #[non_exhaustive]
    #[error("{operation}: {object}: not a lease made by the barlease module")]
    NotALease {
        /// The operation that failed.
        operation: &'static str,
        /// Its object.
        object: Object,
        /// The kernel's answer, if it was asked.
        source: Option<io::Error>,
    },

    /// An access that goes past the end.
    #[non_exhaustive]
    #[error("{object}: {length:#x} bytes at offset {offset:#x} are out of bounds")]
    OutOfBounds {
        /// The object of the access.
        object: Object,
        /// Offset of the access in bytes.
        offset: u64,
        /// Length of the access in bytes.
        length: u64,
    },

    /// An access whose address is not aligned as its width asks for.
    #[non_exhaustive]
    #[error("{object}: offset {offset:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// The object of the access.
        object: Object,
        /// Offset of the access in bytes.
        offset: u64,
        /// Alignment that is needed, in bytes.
        align: u64,
    },

    /// A write through something that may only be read.
    #[non_exhaustive]
    #[error("{operation}: {object}: read-only")]
    ReadOnly {
        /// The operation that failed.
        operation: &'static str,
        /// Its object.
        object: Object,
    },

    /// An argument that cannot be right.
    #[non_exhaustive]
    #[error("{operation}: {object}: {reason}")]
    Invalid {
        /// The operation that failed.
        operation: &'static str,
        /// Its object.
        object: Object,
        /// The fault.
        reason: Cow<'static, str>,
        /// The kernel's answer, if it was asked.
        source: Option<io::Error>,
    },

    /// The peer or the kernel sent something that is not understood.
    #[non_exhaustive]
    #[error("{operation}: {object}: {reason}")]
    Malformed {
        /// The operation that failed.
        operation: &'static str,
        /// Its object.
        object: Object,
        /// Its fault.
        reason: Cow<'static, str>,
        /// The cause, if there is one.
        source: Option<io::Error>,
    },

    /// Any other failure.
    #[non_exhaustive]
    #[error("{operation}: {object}")]
    Io {
        /// The operation that failed.
        operation: &'static str,
        /// Its object.
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
                remedy: None,
                source,
            },
            _ => Self::Io {
                operation,
                object,
                source,
            },
        }
    }

    /// An argument that cannot be right.
    pub(crate) fn invalid(
        operation: &'static str,
        object: Object,
        reason: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::Invalid {
            operation,
            object,
            reason: reason.into(),
            source: None,
        }
    }

    /// An answer or a message that is not understood.
    pub(crate) fn malformed(
        operation: &'static str,
        object: Object,
        reason: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::Malformed {
            operation,
            object,
            reason: reason.into(),
            source: None,
        }
    }

    /// A feature that is not there. The cause, if the kernel said so, goes in with
    /// [`Error::because`].
    pub(crate) fn unsupported(
        operation: &'static str,
        object: Object,
        remedy: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::Unsupported {
            operation,
            object,
            remedy: remedy.into(),
            source: None,
        }
    }

    /// A lease that is revoked for good.
    pub(crate) fn dead(operation: &'static str, object: Object) -> Self {
        Self::Dead {
            operation,
            object,
            source: None,
        }
    }

    /// A lease of another device.
    pub(crate) fn wrong_device(operation: &'static str, object: Object) -> Self {
        Self::WrongDevice {
            operation,
            object,
            source: None,
        }
    }

    /// Something that is no lease of ours.
    pub(crate) fn not_a_lease(operation: &'static str, object: Object) -> Self {
        Self::NotALease {
            operation,
            object,
            source: None,
        }
    }

    /// Says how to get permission, if that is what is missing.
    pub(crate) fn if_denied(mut self, text: impl Into<Cow<'static, str>>) -> Self {
        if let Self::Denied { remedy, .. } = &mut self {
            *remedy = Some(text.into());
        }
        self
    }

    /// Says what to do about it if somebody else uses it.
    pub(crate) fn if_busy(mut self, text: impl Into<Cow<'static, str>>) -> Self {
        if let Self::Busy { remedy, .. } = &mut self {
            *remedy = Some(text.into());
        }
        self
    }

    /// Adds the errno that the kernel answered.
    pub(crate) fn because(self, errno: Errno) -> Self {
        self.because_of(errno.into())
    }

    /// Adds the cause.
    pub(crate) fn because_of(mut self, cause: io::Error) -> Self {
        match &mut self {
            Self::Unsupported { source, .. }
            | Self::Revoked { source, .. }
            | Self::Dead { source, .. }
            | Self::WrongDevice { source, .. }
            | Self::NotALease { source, .. }
            | Self::Invalid { source, .. }
            | Self::Malformed { source, .. } => *source = Some(cause),
            Self::Denied { source, .. } | Self::Busy { source, .. } | Self::Io { source, .. } => {
                *source = cause;
            }
            Self::NoDevice { .. }
            | Self::NotBound { .. }
            | Self::NoIommuGroup { .. }
            | Self::GroupNotViable { .. }
            | Self::OutOfBounds { .. }
            | Self::Misaligned { .. }
            | Self::ReadOnly { .. } => {}
        }
        self
    }

    /// The errno that the kernel answered, if it is the cause.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        std::error::Error::source(self)?
            .downcast_ref::<io::Error>()?
            .raw_os_error()
    }

    /// Whether a time-out that the caller set is over: of `poll_until`, `send_within` and the like.
    #[must_use]
    pub fn is_timed_out(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::TimedOut)
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
            report.contains("(one process at a time can have it open: `barlease lease holders` "),
            "{report}"
        );
    }

    #[test]
    fn what_is_busy_is_not_told_to_get_permission() {
        let remedy = |errno| {
            let error = Error::from_errno("open", Object::file("/dev/x"), errno);
            let error = error.if_denied("run as root").if_busy("wait");
            error.remedy().map(Cow::into_owned)
        };
        assert_eq!(remedy(Errno::BUSY).as_deref(), Some("wait"));
        assert_eq!(remedy(Errno::ACCESS).as_deref(), Some("run as root"));
        assert_eq!(remedy(Errno::NOENT), None);
        let busy = Error::from_errno("open", Object::file("/dev/x"), Errno::BUSY);
        let busy = busy.if_denied("run as root");
        assert!(busy.remedy().unwrap().starts_with("`fuser"), "{busy:?}");
    }

    #[test]
    fn every_kind_that_the_kernel_can_cause_keeps_the_errno() {
        let object = || Object::Socket;
        for error in [
            Error::from_errno("x", object(), Errno::NODEV),
            Error::from_errno("x", object(), Errno::PERM),
            Error::dead("x", object()).because(Errno::NODEV),
            Error::wrong_device("x", object()).because(Errno::NODEV),
            Error::not_a_lease("x", object()).because(Errno::INVAL),
            Error::unsupported("x", object(), "y").because(Errno::NOTTY),
            Error::invalid("x", object(), "y").because(Errno::INVAL),
            Error::malformed("x", object(), "y").because(Errno::MSGSIZE),
        ] {
            assert!(error.errno().is_some(), "{error:?}");
        }
        assert_eq!(Error::dead("x", object()).errno(), None);
    }

    #[test]
    fn what_an_access_answers_is_small() {
        // Two registers.
        assert!(size_of::<crate::Result<u64, Lost>>() <= 16);
        assert!(size_of::<crate::Result<(), Lost>>() <= 16);
        assert!(size_of::<Error>() <= 80, "{}", size_of::<Error>());
    }

    #[test]
    fn a_lost_access_is_a_revocation() {
        let error = Error::from(Lost::of::<u16>(0x40));
        assert!(matches!(error, Error::Revoked { done: 0, .. }));
        assert!(
            error
                .to_string()
                .contains("0x2 mapped bytes at offset 0x40"),
            "{error}"
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
