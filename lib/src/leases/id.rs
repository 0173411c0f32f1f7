//! Ids of leases.

use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;

use crate::Error;
use crate::Lease;
use crate::Result;

/// The number that identifies a lease on this host until its next boot: the inode number of its
/// dma-buf, which `/proc/PID/maps` and `/proc/PID/fdinfo` show too. It gives no access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(transparent)]
pub struct LeaseId(u64);

impl LeaseId {
    /// The id with this number.
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The id of a lease that this process has.
    ///
    /// Errors: [`Error::Io`].
    pub fn of(lease: &Lease) -> Result<Self> {
        let stat = rustix::fs::fstat(lease)
            .map_err(|errno| Error::from_errno("identify", lease.object(), errno))?;
        Ok(Self(stat.st_ino))
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for LeaseId {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        text.parse().map(Self)
    }
}
