//! The address of a PCI function.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde::Deserializer;
use serde::Serialize;
use serde::Serializer;
use serde::de;

/// Address of a PCI function: domain, bus, device, function.
///
/// Parsed from the full form `0000:00:05.0` and the short form `00:05.0` (domain 0), always printed
/// in full.
///
/// # Examples
///
/// ```
/// use barlease::Bdf;
///
/// let bdf: Bdf = "00:05.0".parse()?;
/// assert_eq!(bdf.to_string(), "0000:00:05.0");
/// # Ok::<(), barlease::ParseBdfError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// The text is not the address of a PCI function.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a PCI address: expected DDDD:BB:DD.F or BB:DD.F in hexadecimal, such as 0000:00:05.0"
)]
pub struct ParseBdfError(String);

impl Bdf {
    /// Makes an address. `None` if `device` is over 31 or `function` over 7.
    #[must_use]
    pub fn new(domain: u32, bus: u8, device: u8, function: u8) -> Option<Self> {
        (device < 32 && function < 8).then_some(Self {
            domain,
            bus,
            device,
            function,
        })
    }

    /// PCI domain (segment). Above 0xffff behind some controllers (VMD).
    #[must_use]
    pub fn domain(self) -> u32 {
        self.domain
    }

    /// Bus, 0 to 255.
    #[must_use]
    pub fn bus(self) -> u8 {
        self.bus
    }

    /// Device, 0 to 31.
    #[must_use]
    pub fn device(self) -> u8 {
        self.device
    }

    /// Function, 0 to 7.
    #[must_use]
    pub fn function(self) -> u8 {
        self.function
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            domain,
            bus,
            device,
            function,
        } = self;
        // `pad` so that a width given by the caller is honoured in tables.
        f.pad(&format!("{domain:04x}:{bus:02x}:{device:02x}.{function:x}"))
    }
}

impl FromStr for Bdf {
    type Err = ParseBdfError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).ok_or_else(|| ParseBdfError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Bdf> {
    let (slot, function) = text.rsplit_once('.')?;
    let (rest, device) = slot.rsplit_once(':')?;
    let (domain, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
    Bdf::new(
        hex(domain, 8)?,
        u8::try_from(hex(bus, 2)?).ok()?,
        u8::try_from(hex(device, 2)?).ok()?,
        u8::try_from(hex(function, 1)?).ok()?,
    )
}

/// Hexadecimal digits only: `from_str_radix` alone would take a sign.
fn hex(text: &str, max_digits: usize) -> Option<u32> {
    let fits = (1..=max_digits).contains(&text.len());
    let digits = text.bytes().all(|byte| byte.is_ascii_hexdigit());
    (fits && digits)
        .then(|| u32::from_str_radix(text, 16).ok())
        .flatten()
}

impl Serialize for Bdf {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Bdf {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(Text)
    }
}

/// Parses in place: a `Cow` would be a copy.
struct Text;

impl de::Visitor<'_> for Text {
    type Value = Bdf;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the address of a PCI function, such as 0000:00:05.0")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Bdf, E> {
        text.parse().map_err(E::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn both_forms_are_parsed_and_the_full_one_is_printed() {
        for (text, printed) in [
            ("00:05.0", "0000:00:05.0"),
            ("0000:00:05.0", "0000:00:05.0"),
            ("0001:AB:1f.7", "0001:ab:1f.7"),
            ("10000:01:00.0", "10000:01:00.0"),
        ] {
            assert_eq!(text.parse::<Bdf>().unwrap().to_string(), printed);
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for text in [
            "",
            "0",
            "05.0",
            ":05.0",
            "00:05",
            "00:05.8",
            "00:20.0",
            "100:00.0",
            "00:05.0 ",
            "0:0:0:0.0",
            "00:+5.0",
            "00:05.",
            "123456789:00:00.0",
            "../00:05.0",
            "00:05.00",
        ] {
            assert!(text.parse::<Bdf>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn serde_uses_the_text() {
        let bdf: Bdf = "00:05.0".parse().unwrap();
        let json = serde_json::to_string(&bdf).unwrap();
        assert_eq!(json, "\"0000:00:05.0\"");
        assert_eq!(serde_json::from_str::<Bdf>(&json).unwrap(), bdf);
    }

    proptest! {
        #[test]
        fn printing_and_parsing_are_inverse(domain: u32, bus: u8, device in 0u8..32, function in 0u8..8) {
            let bdf = Bdf::new(domain, bus, device, function).unwrap();
            prop_assert_eq!(bdf.to_string().parse::<Bdf>().unwrap(), bdf);
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<Bdf>();
        }
    }
}
