//! The things that errors are about.

use std::fmt;
use std::path::Path;

use crate::Bdf;

/// The thing that an operation was about.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Object {
    /// A PCI function.
    Device(Bdf),
    /// A VFIO region of a device.
    #[non_exhaustive]
    Region {
        /// The device.
        bdf: Bdf,
        /// Region index: 0 to 5 are BARs.
        index: u32,
    },
    /// A lease, with its origin as far as it is known.
    #[non_exhaustive]
    Lease {
        /// The device.
        bdf: Option<Bdf>,
        /// The BAR.
        bar: Option<u32>,
    },
    /// A mapping of a lease or a BAR, or a part of one.
    #[non_exhaustive]
    Mapping {
        /// Where it begins in the lease or BAR, in bytes.
        offset: u64,
        /// Length in bytes.
        length: u64,
    },
    /// A file, device node or sysfs attribute.
    File(Box<Path>),
    /// The connection over which a lease is passed.
    Socket,
    /// An environment variable.
    Variable(Box<str>),
    /// This process: its signal handlers, limits and the like.
    Process,
    /// An eventfd.
    Event,
    /// A VFIO container, or an iommufd with its I/O address space.
    Iommu,
    /// A lease that is known by its id only.
    LeaseId(crate::LeaseId),
}

impl Object {
    /// A file.
    pub(crate) fn file(path: impl AsRef<Path>) -> Self {
        Self::File(path.as_ref().into())
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(bdf) => write!(f, "{bdf}"),
            Self::Region { bdf, index } => write!(f, "{bdf} region {index}"),
            Self::Lease {
                bdf: Some(bdf),
                bar: Some(bar),
            } => write!(f, "lease of {bdf} BAR {bar}"),
            Self::Lease { .. } => f.write_str("lease"),
            Self::Mapping { offset, length } => {
                write!(f, "{length:#x} mapped bytes at offset {offset:#x}")
            }
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Socket => f.write_str("socket"),
            Self::Variable(name) => write!(f, "${name}"),
            Self::Process => f.write_str("this process"),
            Self::Event => f.write_str("eventfd"),
            Self::Iommu => f.write_str("IOMMU"),
            Self::LeaseId(id) => write!(f, "lease {id}"),
        }
    }
}
