//! Numbers as people write them.

use barlease::BarRange;

/// Decimal or `0x` hexadecimal.
pub(crate) fn integer(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let parsed = match digits {
        Some(digits) if !digits.starts_with('+') => u64::from_str_radix(digits, 16),
        None if !text.starts_with('+') => text.parse(),
        _ => return Err(format!("{text:?} is not a number")),
    };
    parsed.map_err(|_| format!("{text:?} is not a number from 0 to {:#x}", u64::MAX))
}

/// An integer of fewer bits.
pub(crate) fn integer_of<T: TryFrom<u64>>(text: &str) -> Result<T, String> {
    let limit = u64::MAX >> (64 - 8 * size_of::<T>());
    T::try_from(integer(text)?)
        .map_err(|_| format!("{text:?} is not a number from 0 to {limit:#x}"))
}

/// Bytes: an integer, or one with K, M or G behind it (powers of 1024).
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let units = [
        ("K", 10),
        ("k", 10),
        ("M", 20),
        ("m", 20),
        ("G", 30),
        ("g", 30),
    ];
    let (number, shift) = units
        .iter()
        .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)))
        .unwrap_or((text, 0));
    integer(number)?
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text:?} is too large"))
}

/// `OFFSET+LENGTH`.
pub(crate) fn range(text: &str) -> Result<BarRange, String> {
    let (offset, length) = text
        .split_once('+')
        .ok_or_else(|| format!("{text:?} is not OFFSET+LENGTH, such as 0x1000+4K"))?;
    let range = BarRange {
        offset: size(offset)?,
        length: size(length)?,
    };
    if range.length == 0 {
        return Err("the length is 0".to_owned());
    }
    if range.offset.checked_add(range.length).is_none() {
        return Err(format!("{text:?} goes past the end of the address space"));
    }
    Ok(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_decimal_or_hexadecimal_with_a_unit() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("0x1000", 4096),
            ("4K", 4096),
            ("2M", 2 << 20),
            ("2m", 2 << 20),
            ("1G", 1 << 30),
            ("0x10K", 16 << 10),
            ("0xffffffffffffffff", u64::MAX),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "K",
            "0x",
            "-1",
            "+1",
            "0x+1",
            "1.5M",
            "4KB",
            "4 K",
            "ffff",
            "99999999999G",
            "0x10000000000000000",
        ] {
            assert!(size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_integer_must_fit() {
        assert_eq!(integer_of::<u8>("0xff"), Ok(255));
        assert_eq!(integer_of::<u16>("256"), Ok(256));
        let error = integer_of::<u8>("256").unwrap_err();
        assert!(error.ends_with("from 0 to 0xff"), "{error}");
    }

    #[test]
    fn ranges_are_offset_and_length() {
        let expected = BarRange {
            offset: 0x1000,
            length: 2 << 20,
        };
        assert_eq!(range("0x1000+2M"), Ok(expected));
        for text in [
            "",
            "4K",
            "+",
            "4K+",
            "+4K",
            "0+0",
            "0x1000-0x2000",
            "0xffffffffffffffff+1",
            "1+2+3",
        ] {
            assert!(range(text).is_err(), "{text}");
        }
    }
}
