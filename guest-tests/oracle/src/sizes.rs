//! The sizes of the kernel that this program runs on.

use std::sync::OnceLock;

/// Bytes of a page.
#[must_use]
pub fn page_size() -> u64 {
    static SIZE: OnceLock<u64> = OnceLock::new();
    *SIZE.get_or_init(|| {
        // SAFETY: asks for a number.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        u64::try_from(size).expect("the size of a page")
    })
}

/// Bytes of an entry of one level above pages: what a table maps, which is a page of entries of
/// eight bytes. 2 MiB with pages of 4 KiB, 32 MiB with pages of 16 KiB.
#[must_use]
pub fn huge_size() -> u64 {
    page_size() * (page_size() / 8)
}
