//! Types of registers that are made of bits and fields.

/// Makes a type of the bits and fields of a register: a [`RegisterValue`](crate::RegisterValue).
///
/// Each line has the name of what reads a field, the name of what sets it, and its bits: one, which
/// is a `bool`, or an inclusive range, which is a number as wide as the register. A setter answers
/// the changed value, and leaves all other bits as they are, also those without a name. Bits of a
/// number that do not fit its field are dropped.
///
/// # Examples
///
/// ```
/// barlease::register_value! {
///     /// Controller configuration of an NVMe device.
///     pub struct Configuration: u32 {
///         /// Whether it is on.
///         enabled, with_enabled: 0;
///         /// Size of an entry of a submission queue, as a power of 2.
///         submission_entry, with_submission_entry: 16..=19;
///     }
/// }
///
/// # let path = std::env::temp_dir().join(format!("barlease-fields-{}", std::process::id()));
/// # let file = std::fs::File::options().read(true).write(true).create(true).open(&path).unwrap();
/// # std::fs::remove_file(&path).unwrap();
/// # file.set_len(4096).unwrap();
/// # let mapping = barlease::Lease::from_fd(file)?.map()?;
/// let register = mapping.typed::<Configuration>(0x14)?;
/// register.modify(|value| value.with_enabled(true).with_submission_entry(6));
/// assert_eq!(register.read().submission_entry(), 6);
/// assert_eq!(register.read().bits(), 6 << 16 | 1);
///
/// // Of a register whose bits are cleared by writing them, this clears one.
/// register.write(Configuration::default().with_enabled(true));
/// # Ok::<(), barlease::Error>(())
/// ```
#[macro_export]
macro_rules! register_value {
    (
        $(#[$attribute:meta])*
        $visible:vis struct $name:ident: $raw:ty {
            $(
                $(#[$field:meta])*
                $get:ident, $set:ident: $low:literal $(..= $high:literal)?;
            )*
        }
    ) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        $visible struct $name($raw);

        #[allow(dead_code, reason = "a driver needs some of a register's fields")]
        impl $name {
            /// Of all bits.
            $visible const fn from_bits(bits: $raw) -> Self {
                Self(bits)
            }

            /// All bits.
            $visible const fn bits(self) -> $raw {
                self.0
            }

            $($crate::register_value!(
                @field $(#[$field])* ($visible) $get $set $raw, $low $(, $high)?
            );)*
        }

        impl $crate::RegisterValue for $name {
            type Raw = $raw;

            #[inline(always)]
            fn from_raw(raw: $raw) -> Self {
                Self(raw)
            }

            #[inline(always)]
            fn into_raw(self) -> $raw {
                self.0
            }
        }
    };
    (@field $(#[$field:meta])* ($visible:vis) $get:ident $set:ident $raw:ty, $bit:literal) => {
        $(#[$field])*
        #[inline(always)]
        $visible const fn $get(self) -> bool {
            self.0 & (1 << $bit) != 0
        }

        $(#[$field])*
        #[inline(always)]
        #[must_use = "it changes no register, and not the value that it is called on"]
        $visible const fn $set(self, on: bool) -> Self {
            const BIT: $raw = 1 << $bit;
            Self(if on { self.0 | BIT } else { self.0 & !BIT })
        }
    };
    (@field $(#[$field:meta])* ($visible:vis) $get:ident $set:ident $raw:ty, $low:literal,
     $high:literal) => {
        $(#[$field])*
        #[inline(always)]
        $visible const fn $get(self) -> $raw {
            self.0 << (<$raw>::BITS - 1 - $high) >> (<$raw>::BITS - 1 - $high + $low)
        }

        $(#[$field])*
        #[inline(always)]
        #[must_use = "it changes no register, and not the value that it is called on"]
        $visible const fn $set(self, value: $raw) -> Self {
            const MASK: $raw = <$raw>::MAX >> (<$raw>::BITS - 1 - ($high - $low)) << $low;
            Self(self.0 & !MASK | value << $low & MASK)
        }
    };
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    crate::register_value! {
        struct Narrow: u8 {
            low, with_low: 0;
            middle, with_middle: 1..=6;
            high, with_high: 7;
        }
    }

    crate::register_value! {
        struct Wide: u64 {
            all, with_all: 0..=63;
            one, with_one: 63;
            top, with_top: 60..=63;
        }
    }

    #[test]
    fn fields_at_the_ends_are_whole() {
        let wide = Wide::from_bits(0).with_all(u64::MAX);
        assert_eq!((wide.bits(), wide.all()), (u64::MAX, u64::MAX));
        let wide = wide.with_top(0);
        assert_eq!(
            (wide.top(), wide.one(), wide.bits()),
            (0, false, u64::MAX >> 4)
        );
        assert_eq!(Wide::default().with_one(true).bits(), 1 << 63);
    }

    proptest! {
        #[test]
        fn a_setter_changes_its_field_and_nothing_else(bits: u8, value: u8, on: bool) {
            let before = Narrow::from_bits(bits);
            let after = before.with_middle(value);
            prop_assert_eq!(after.middle(), value & 0x3f);
            prop_assert_eq!((after.low(), after.high()), (before.low(), before.high()));
            let after = before.with_high(on).with_low(!on);
            prop_assert_eq!((after.low(), after.high()), (!on, on));
            prop_assert_eq!(after.middle(), before.middle());
        }
    }
}
