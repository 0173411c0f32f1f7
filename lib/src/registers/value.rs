//! The contents of registers.

use std::fmt;

use crate::Value;

/// The content of a register: a number, or a type of yours that is made of one.
///
/// The bits are those of the device, which is little-endian as PCI has it; values are in the byte
/// order of the CPU.
///
/// # Examples
///
/// ```
/// use barlease::RegisterValue;
///
/// /// Controller configuration of an NVMe device.
/// #[derive(Clone, Copy, PartialEq)]
/// struct Configuration(u32);
///
/// impl Configuration {
///     const ENABLE: u32 = 1;
///
///     fn with_enable(self, on: bool) -> Self {
///         Self(self.0 & !Self::ENABLE | u32::from(on))
///     }
/// }
///
/// impl RegisterValue for Configuration {
///     type Raw = u32;
///
///     fn from_raw(raw: u32) -> Self {
///         Self(raw)
///     }
///
///     fn into_raw(self) -> u32 {
///         self.0
///     }
/// }
/// # let path = std::env::temp_dir().join(format!("barlease-registers-{}", std::process::id()));
/// # let file = std::fs::File::options().read(true).write(true).create(true).open(&path).unwrap();
/// # std::fs::remove_file(&path).unwrap();
/// # file.set_len(4096).unwrap();
/// # let mapping = barlease::Lease::from_fd(file)?.map()?;
///
/// let configuration = mapping.typed::<Configuration>(0x14)?;
/// configuration.modify(|value| value.with_enable(true));
/// assert!(configuration.read() == Configuration(1));
/// # Ok::<(), barlease::Error>(())
/// ```
pub trait RegisterValue: Copy {
    /// How wide it is.
    type Raw: Bits;

    /// From what was read.
    fn from_raw(raw: Self::Raw) -> Self;

    /// To what is written.
    fn into_raw(self) -> Self::Raw;
}

/// A [`Value`] whose bits can be taken apart: each of them.
pub trait Bits:
    Value + PartialEq + fmt::LowerHex + std::ops::BitAnd<Output = Self> + sealed::Little
{
}

mod sealed {
    /// Between the byte orders of the device and of the CPU: either way it is the same.
    pub trait Little {
        fn little(self) -> Self;
    }
}

macro_rules! bits {
    ($($type:ty),+) => {$(
        impl sealed::Little for $type {
            #[inline(always)]
            fn little(self) -> Self {
                self.to_le()
            }
        }

        impl Bits for $type {}

        impl RegisterValue for $type {
            type Raw = Self;

            #[inline(always)]
            fn from_raw(raw: Self) -> Self {
                raw
            }

            #[inline(always)]
            fn into_raw(self) -> Self {
                self
            }
        }
    )+};
}

bits!(u8, u16, u32);
#[cfg(target_pointer_width = "64")]
bits!(u64);

#[inline(always)]
pub(super) fn decode<T: RegisterValue>(raw: T::Raw) -> T {
    T::from_raw(sealed::Little::little(raw))
}

#[inline(always)]
pub(super) fn encode<T: RegisterValue>(value: T) -> T::Raw {
    sealed::Little::little(value.into_raw())
}
