//! Accesses on CPUs for which [`fixup`](../fixup.rs) has no instructions: bare ones. There are no
//! guarded mappings there; see [`super::guarded::arm`].

macro_rules! accesses {
    ($($type:ty),+) => {$(
        impl super::raw::sealed::Sealed for $type {
            #[inline(always)]
            unsafe fn load_guarded(place: *const Self) -> Option<Self> {
                // SAFETY: the caller says that the place can be read.
                Some(unsafe { place.read_volatile() })
            }

            #[inline(always)]
            unsafe fn store_guarded(place: *mut Self, value: Self) -> bool {
                // SAFETY: the caller says that the place can be written.
                unsafe { place.write_volatile(value) };
                true
            }
        }
    )+};
}

accesses!(u8, u16, u32);
#[cfg(target_pointer_width = "64")]
accesses!(u64);

/// There is no table.
pub(super) fn find(_: usize) -> Option<usize> {
    None
}
