//! A policy file, as it is written.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;

use serde::Deserialize;
use serde::Deserializer;
use serde::de;
use toml::Spanned;

use crate::types::Access;
use crate::types::Lifetime;
use crate::types::MemoryType;
use crate::types::Millis;

/// A drop-in file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub(super) struct File {
    /// Revoke at a reload, with grace, the leases that the new policy does not allow.
    pub(super) revoke_what_is_no_longer_allowed: Option<bool>,
    /// The most that all have together who are no administrators.
    pub(super) tenants: Option<TenantsTable>,
    /// Devices, by name.
    #[serde(default)]
    pub(super) device: BTreeMap<String, DeviceTable>,
    /// Pools, by name.
    #[serde(default)]
    pub(super) pool: BTreeMap<String, PoolTable>,
    /// Rules.
    #[serde(default)]
    pub(super) allow: Vec<AllowTable>,
}

/// The most that all have together who are no administrators. Of several files the smallest counts.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub(super) struct TenantsTable {
    /// How many connections, 16384 without it; less where the daemon has not so many descriptors.
    pub(super) max_connections: Option<NonZeroU32>,
    /// How many leases, 1048576 without it.
    pub(super) max_leases: Option<NonZeroU32>,
    /// How many requests in line, of all pools, 16384 without it.
    pub(super) max_waiting: Option<NonZeroU32>,
    /// How many watches of news, 4096 without it.
    pub(super) max_watches: Option<NonZeroU32>,
}

/// A device that the service owns.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub(super) struct DeviceTable {
    /// `0000:01:00.0`, `slot:NAME` (of `/sys/bus/pci/slots`), `1af4:1110` (vendor and device) or
    /// `serial:52-54-00-ff-ff-12-34-56` (as `lspci -v` says it).
    #[cfg_attr(feature = "schema", schemars(with = "String"))]
    pub(super) r#match: Spanned<String>,
    /// The driver that it must be bound to.
    pub(super) driver: Option<String>,
    /// How it is opened.
    #[serde(default)]
    pub(super) backend: Backend,
    /// Whether its memory is turned on.
    #[serde(default = "yes")]
    pub(super) memory: bool,
    /// Whether it becomes a bus master.
    #[serde(default)]
    pub(super) bus_master: bool,
    /// Its fate when the process ends that has handed it over.
    #[serde(default)]
    pub(super) owner_dies: OwnerDies,
}

/// The fate of an adopted device when the process ends that has handed it over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum OwnerDies {
    /// All its leases are reclaimed, and it is closed.
    #[default]
    Revoke,
    /// It is leased from as before.
    Keep,
}

/// How a device is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Backend {
    /// By what the kernel has.
    #[default]
    Auto,
    /// By group and container.
    Group,
    /// By character device.
    Cdev,
}

/// A part of a BAR that leases are cut from.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub(super) struct PoolTable {
    /// Name of the device.
    #[cfg_attr(feature = "schema", schemars(with = "String"))]
    pub(super) device: Spanned<String>,
    /// The BAR, 0 to 5.
    #[cfg_attr(feature = "schema", schemars(with = "u8"))]
    pub(super) bar: Spanned<u8>,
    /// Where it begins in the BAR.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Size>"))]
    pub(super) at: Option<Spanned<Size>>,
    /// How long it is; else to the end of the BAR.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Size>"))]
    pub(super) length: Option<Spanned<Size>>,
    /// Leases are whole multiples of this.
    #[cfg_attr(feature = "schema", schemars(with = "Size"))]
    pub(super) unit: Spanned<Size>,
    /// Its contents.
    #[serde(default)]
    pub(super) contents: Contents,
    /// Whether a lease must be one range; as a rule that of registers must, that of memory not.
    pub(super) contiguous: Option<bool>,
    /// The memory types that may be asked for; else `nc`.
    pub(super) memory_type: Option<Vec<MemoryType>>,
    /// Whether it may be leased for writing.
    #[serde(default = "yes")]
    pub(super) writable: bool,
    /// The bytes that clear a range before it is leased; for memory that is not shared only.
    #[cfg_attr(feature = "schema", schemars(with = "Option<Scrub>"))]
    pub(super) scrub: Option<Spanned<Scrub>>,
    /// How leases share bytes.
    #[serde(default)]
    pub(super) overlap: Overlap,
}

/// The contents of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Contents {
    /// Registers: nothing but a holder ever writes to them.
    #[default]
    Registers,
    /// Memory.
    Memory,
}

/// How leases share bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Overlap {
    /// One lease.
    #[default]
    Exclusive,
    /// One lease for writing, or any number for reading.
    SharedRead,
    /// Any number.
    Shared,
}

/// A rule. Rules only add.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub(super) struct AllowTable {
    /// Names or patterns of pools.
    #[cfg_attr(feature = "schema", schemars(with = "Vec<String>"))]
    pub(super) pools: Vec<Spanned<String>>,
    /// The peers that it allows: one of each key that is given must fit.
    #[cfg_attr(feature = "schema", schemars(with = "Who"))]
    pub(super) who: Spanned<Who>,
    /// With which rights at most.
    pub(super) access: Access,
    /// How many leases of the pool one may have.
    pub(super) max_leases: Option<NonZeroU32>,
    /// How many bytes of the pool one may have.
    pub(super) max_bytes: Option<Size>,
    /// How long a lease lives at most; it can be renewed.
    pub(super) max_ttl: Option<Span>,
    /// The ends that a lease may live to; else the end of its connection.
    pub(super) lifetime: Option<Vec<Lifetime>>,
    /// How long before a lease is reclaimed its holder is told.
    pub(super) grace: Option<Span>,
    /// Whether one may wait in line, and how long.
    #[serde(default)]
    pub(super) queue: Queue,
    /// Whether steering tags may be set.
    #[serde(default)]
    pub(super) steering_tags: bool,
}

/// The peers that a rule allows.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub(super) struct Who {
    /// Names or numbers of users; `*` is everybody.
    pub(super) user: Option<OneOrMany<NameOrNumber>>,
    /// Names or numbers of groups.
    pub(super) group: Option<OneOrMany<NameOrNumber>>,
    /// Patterns for units of the system's manager.
    pub(super) unit: Option<OneOrMany<String>>,
    /// Patterns for paths of control groups.
    pub(super) cgroup: Option<OneOrMany<String>>,
    /// Patterns for the claim whose socket was connected to.
    pub(super) claim: Option<OneOrMany<String>>,
}

/// One, or a list.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected one, or a list of them")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub(super) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    pub(super) fn as_slice(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

/// A user or a group.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a name or a number")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub(super) enum NameOrNumber {
    Number(u32),
    Name(String),
}

fn yes() -> bool {
    true
}

/// Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size(pub(super) u64);

/// A span of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span(pub(super) Millis);

/// Whether one may wait, and how long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Queue {
    #[default]
    None,
    Fifo(Millis),
}

/// The bytes that clear a range before it is leased.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Scrub {
    /// Nothing.
    #[default]
    None,
    /// These 8 bytes, little-endian, again and again.
    Pattern(u64),
}

fn number(text: &str) -> Option<u64> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    // The standard parser takes a sign.
    if !digits.starts_with(|c: char| c.is_digit(radix)) {
        return None;
    }
    u64::from_str_radix(digits, radix).ok()
}

/// A number with one of these suffixes, times the suffix's factor.
fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let (digits, factor) = units
        .iter()
        .find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, *factor)))?;
    number(digits)?.checked_mul(factor)
}

fn size(text: &str) -> Option<u64> {
    let units = [
        ("K", 1 << 10),
        ("M", 1 << 20),
        ("G", 1 << 30),
        ("T", 1 << 40),
        ("", 1),
    ];
    scaled(text, &units)
}

fn span(text: &str) -> Option<Millis> {
    let units = [
        ("ms", 1),
        ("s", 1000),
        ("min", 60_000),
        ("m", 60_000),
        ("h", 3_600_000),
        ("d", 86_400_000),
    ];
    scaled(text, &units).map(Millis)
}

/// Takes an integer or a text.
struct Written<T>(&'static str, fn(Result<u64, &str>) -> Option<T>);

impl<T> de::Visitor<'_> for Written<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        let unexpected = de::Unexpected::Signed(number);
        u64::try_from(number)
            .ok()
            .and_then(|number| (self.1)(Ok(number)))
            .ok_or_else(|| E::invalid_value(unexpected, &self.0))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        let unexpected = de::Unexpected::Unsigned(number);
        (self.1)(Ok(number)).ok_or_else(|| E::invalid_value(unexpected, &self.0))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.1)(Err(text)).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self.0))
    }
}

macro_rules! written {
    ($($name:ident: $expecting:literal, |$written:ident| $read:expr;)+) => {
        $(
            impl<'de> Deserialize<'de> for $name {
                fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                    fn read($written: Result<u64, &str>) -> Option<$name> {
                        $read
                    }
                    deserializer.deserialize_any(Written($expecting, read))
                }
            }

            #[cfg(feature = "schema")]
            impl schemars::JsonSchema for $name {
                fn schema_name() -> std::borrow::Cow<'static, str> {
                    stringify!($name).into()
                }

                fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                    schemars::json_schema!({
                        "type": ["integer", "string"],
                        "description": $expecting,
                    })
                }
            }
        )+
    };
}

written! {
    Size: "bytes, such as 4096, \"0x1000\", \"4K\", \"2M\" or \"1G\"",
        |written| written.or_else(|text| size(text).ok_or(())).ok().map(Size);
    Span: "a time with its unit, such as \"500ms\", \"30s\", \"5m\", \"1h\" or \"1d\"",
        |written| span(written.err()?).map(Span);
    Queue: "\"none\", or how long one may wait, such as \"30s\"",
        |written| match written.err()? {
            "none" => Some(Queue::None),
            text => span(text).map(Queue::Fifo),
        };
    Scrub: "\"none\", \"zero\", or 8 bytes as a number, such as \"0xdeadbeefdeadbeef\"",
        |written| match written {
            Err("none") => Some(Scrub::None),
            Err("zero") => Some(Scrub::Pattern(0)),
            Err(text) => number(text).map(Scrub::Pattern),
            Ok(number) => Some(Scrub::Pattern(number)),
        };
}
