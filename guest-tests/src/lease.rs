//! The features of the contract (`abi/include/barlease.h`).

use std::{
    fs::File,
    io::{Seek, SeekFrom},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::atomic::AtomicU32,
};

use barlease_abi::{
    DmaBufGet, DmaBufStatus, DmaRange, FEATURE_DMA_BUF, FEATURE_DMA_BUF_REVOKE,
    FEATURE_DMA_BUF_STATUS, STATE_DEAD, STATE_OK, STATE_REVOKED,
};

use crate::{
    errno::{Answer, Errno, answer},
    huge_size,
    map::Map,
    vfio::{Device, GET, PROBE, SET},
};

/// A request of feature 11, to be spoilt by a test.
#[derive(Clone, Debug)]
pub struct Request {
    /// The fixed part. `nr_ranges` is that of `ranges` unless changed.
    pub head: DmaBufGet,
    /// The ranges that follow.
    pub ranges: Vec<DmaRange>,
}

impl Request {
    /// A request that is right.
    #[must_use]
    pub fn new(bar: u32, ranges: &[(u64, u64)]) -> Self {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|&(offset, length)| DmaRange { offset, length })
            .collect();
        let head = DmaBufGet {
            region_index: bar,
            open_flags: (libc::O_RDWR | libc::O_CLOEXEC) as u32,
            flags: 0,
            nr_ranges: ranges.len() as u32,
        };
        Self { head, ranges }
    }

    /// With these open flags.
    #[must_use]
    pub fn open_flags(mut self, flags: i32) -> Self {
        self.head.open_flags = flags as u32;
        self
    }

    /// With these flags.
    #[must_use]
    pub fn flags(mut self, flags: u32) -> Self {
        self.head.flags = flags;
        self
    }

    /// With this number of ranges, whatever follows.
    #[must_use]
    pub fn nr_ranges(mut self, number: u32) -> Self {
        self.head.nr_ranges = number;
        self
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let head = &self.head;
        let words = [
            head.region_index,
            head.open_flags,
            head.flags,
            head.nr_ranges,
        ];
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        for range in &self.ranges {
            bytes.extend(range.offset.to_ne_bytes());
            bytes.extend(range.length.to_ne_bytes());
        }
        bytes
    }
}

/// State and reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Accessible.
    Ok,
    /// For these reasons not accessible.
    Revoked(u32),
    /// Never accessible again.
    Dead,
}

impl Device {
    /// Exports ranges of a BAR, as read-write.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn export(&self, bar: u32, ranges: &[(u64, u64)]) -> Answer<OwnedFd> {
        self.request(&Request::new(bar, ranges))
    }

    /// Exports the beginning of a BAR, as long as two huge pages, and maps and touches it.
    ///
    /// # Panics
    ///
    /// When any of that is refused.
    #[must_use]
    pub fn lease_touched(&self, bar: u32) -> (OwnedFd, Map) {
        let fd = self.export(bar, &[(0, 2 * huge_size())]).expect("a lease");
        let map = Map::aligned(&fd, 2 * huge_size()).expect("a mapping");
        map.touch_all().expect("a touch");
        (fd, map)
    }

    /// Feature 11 with this request.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn request(&self, request: &Request) -> Answer<OwnedFd> {
        let fd = self.feature(GET | u32::from(FEATURE_DMA_BUF), &mut request.bytes())?;
        // SAFETY: The fd is new and nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// Feature 11 with a request that another thread changes meanwhile.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn request_shared(&self, payload: &[AtomicU32]) -> Answer<OwnedFd> {
        self.request_shared_of(FEATURE_DMA_BUF, payload)
    }

    /// The same of another feature that makes dma-bufs.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn request_shared_of(&self, feature: u16, payload: &[AtomicU32]) -> Answer<OwnedFd> {
        let fd = self.feature_shared(GET | u32::from(feature), payload)?;
        // SAFETY: The fd is new and nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// `BARLEASE_FEATURE_DMA_BUF_REVOKE`.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn revoke(&self, fd: impl AsFd) -> Answer<()> {
        self.revoke_number(fd.as_fd().as_raw_fd())
    }

    /// The same with any number.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn revoke_number(&self, fd: i32) -> Answer<()> {
        let flags = SET | u32::from(FEATURE_DMA_BUF_REVOKE);
        self.feature(flags, &mut fd.to_ne_bytes()).map(drop)
    }

    /// `BARLEASE_FEATURE_DMA_BUF_STATUS`.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn status(&self, fd: impl AsFd) -> Answer<DmaBufStatus> {
        self.status_number(fd.as_fd().as_raw_fd(), 0)
    }

    /// The same with any number, and anything in the reserved field.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn status_number(&self, fd: i32, reserved: u32) -> Answer<DmaBufStatus> {
        let mut payload = [0; size_of::<DmaBufStatus>()];
        payload[..4].copy_from_slice(&fd.to_ne_bytes());
        payload[4..8].copy_from_slice(&reserved.to_ne_bytes());
        self.feature(GET | u32::from(FEATURE_DMA_BUF_STATUS), &mut payload)?;
        Ok(status(&payload))
    }

    /// State and reasons of a buffer.
    ///
    /// # Panics
    ///
    /// When there is no status.
    #[must_use]
    pub fn state(&self, fd: impl AsFd) -> State {
        let status = self.status(fd).expect("a status");
        match status.state {
            STATE_OK => {
                assert_eq!(status.reasons, 0);
                State::Ok
            }
            STATE_REVOKED => {
                assert_ne!(status.reasons, 0);
                State::Revoked(status.reasons)
            }
            STATE_DEAD => {
                assert_eq!(status.reasons, 0);
                State::Dead
            }
            other => panic!("state {other}"),
        }
    }

    /// Asks whether a feature is there, for these operations.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn probe(&self, feature: u16, operations: u32) -> Answer<()> {
        let flags = PROBE | operations | u32::from(feature);
        self.feature(flags, &mut []).map(drop)
    }
}

/// Reads a status from its bytes.
#[must_use]
pub fn status(bytes: &[u8; 40]) -> DmaBufStatus {
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    DmaBufStatus {
        dmabuf_fd: word(0) as i32,
        reserved: word(4),
        state: word(8),
        reasons: word(12),
        memattr: word(16),
        region_index: word(20),
        size: u64::from(word(24)) | u64::from(word(28)) << 32,
        nr_ranges: word(32),
        nr_attachments: word(36),
    }
}

/// The size of a buffer, as `lseek` says it.
///
/// # Panics
///
/// When it does not.
#[must_use]
pub fn size(fd: impl AsFd) -> u64 {
    let mut file = File::from(duplicate(fd));
    file.seek(SeekFrom::End(0)).expect("the size")
}

/// Sets the name of a dma-buf (`DMA_BUF_SET_NAME_B`).
///
/// # Errors
///
/// That of the ioctl.
///
/// # Panics
///
/// When `name` has a NUL in it.
pub fn set_name(fd: impl AsFd, name: &str) -> Answer<()> {
    const SET_NAME: u64 = 0x4008_6201;
    let name = std::ffi::CString::new(name).expect("no NUL");
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: The argument is a C string.
    answer(unsafe { libc::ioctl(fd, SET_NAME, name.as_ptr()) }).map(drop)
}

/// The fences of a dma-buf that who writes to it waits for, as a sync file
/// (`DMA_BUF_IOCTL_EXPORT_SYNC_FILE`).
///
/// # Errors
///
/// That of the ioctl.
pub fn export_sync_file(fd: impl AsFd) -> Answer<OwnedFd> {
    const EXPORT: u64 = 0xc008_6202;
    let mut argument = [DMA_BUF_SYNC_WRITE as i32, -1];
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: The kernel reads and writes eight bytes.
    answer(unsafe { libc::ioctl(fd, EXPORT, argument.as_mut_ptr()) })?;
    // SAFETY: The fd is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(argument[1]) })
}

/// Adds the fences of a sync file to a dma-buf, for who reads or writes
/// (`DMA_BUF_IOCTL_IMPORT_SYNC_FILE`).
///
/// # Errors
///
/// That of the ioctl.
pub fn import_sync_file(fd: impl AsFd, sync_file: impl AsFd) -> Answer<()> {
    const IMPORT: u64 = 0x4008_6203;
    let argument = [DMA_BUF_SYNC_WRITE as i32, sync_file.as_fd().as_raw_fd()];
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: The kernel reads eight bytes.
    answer(unsafe { libc::ioctl(fd, IMPORT, argument.as_ptr()) }).map(drop)
}

/// Imports a dma-buf by a device of the display manager's (`DRM_IOCTL_PRIME_FD_TO_HANDLE`).
///
/// # Errors
///
/// That of the ioctl.
pub fn import_by_drm(card: impl AsFd, fd: impl AsFd) -> Answer<()> {
    const FD_TO_HANDLE: u64 = 0xc00c_642e;
    let mut argument = [0, 0, fd.as_fd().as_raw_fd()];
    let card = card.as_fd().as_raw_fd();
    // SAFETY: The kernel reads and writes twelve bytes.
    answer(unsafe { libc::ioctl(card, FD_TO_HANDLE, argument.as_mut_ptr()) }).map(drop)
}

/// `DMA_BUF_SYNC_WRITE`.
const DMA_BUF_SYNC_WRITE: u32 = 2;

/// Another fd of the same file.
///
/// # Panics
///
/// When there is no fd left.
#[must_use]
pub fn duplicate(fd: impl AsFd) -> OwnedFd {
    fd.as_fd().try_clone_to_owned().expect("duplicate an fd")
}

/// An `O_PATH` descriptor of the file behind `fd`: it holds the inode, not the file.
///
/// # Panics
///
/// When it cannot be had.
#[must_use]
pub fn path_descriptor(fd: BorrowedFd<'_>) -> OwnedFd {
    use std::os::unix::fs::OpenOptionsExt;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path);
    file.expect("an O_PATH descriptor").into()
}

/// The flags that an fd was opened with (`F_GETFL`), and those of the descriptor (`F_GETFD`).
///
/// # Panics
///
/// When the fd is not open.
#[must_use]
pub fn fd_flags(fd: impl AsFd) -> (i32, i32) {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: Has no argument.
    let file = answer(unsafe { libc::fcntl(fd, libc::F_GETFL) });
    // SAFETY: Has no argument.
    let descriptor = answer(unsafe { libc::fcntl(fd, libc::F_GETFD) });
    let [file, descriptor] = [file, descriptor].map(|flags| flags.expect("an open fd"));
    (file, descriptor)
}

/// An fd with a number that is not open.
#[must_use]
pub fn no_such_fd() -> i32 {
    1_000_000
}

/// The answer of closing an fd by its number, for races: nobody may use the number for something
/// else.
///
/// # Errors
///
/// That of the call.
pub fn close_number(fd: i32) -> Result<(), Errno> {
    // SAFETY: Callers close numbers that they got from the kernel and gave to nobody.
    answer(unsafe { libc::close(fd) }).map(drop)
}
