//! The policy: drop-in files, read as one.
//!
//! Nothing is allowed but by a rule, and rules only add: a request is granted if one rule allows
//! it. Where several do, each of their limits holds, so the smallest counts, while of what they
//! give (grace, time in line) the largest does. A limit bounds what one [`Subject`] has of one
//! pool.

mod decide;
mod file;
mod pattern;

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;
use std::ops;
use std::sync::Arc;

use self::decide::Index;
pub use self::decide::Limit;
pub use self::decide::Limits;
pub use self::decide::Named;
pub use self::decide::Outcome;
pub use self::decide::Question;
pub use self::decide::Terms;
pub use self::file::Backend;
pub use self::file::Contents;
use self::file::File;
use self::file::NameOrNumber;
use self::file::OneOrMany;
pub use self::file::Overlap;
pub use self::file::OwnerDies;
use self::file::PoolTable;
use self::file::Queue;
pub use self::file::Scrub;
use self::file::TenantsTable;
use self::pattern::Pattern;
use crate::allocator::MAX_UNITS;
use crate::types::Access;
use crate::types::Lifetime;
use crate::types::MemoryType;
use crate::types::Millis;

/// The owner of the leases that a limit counts: a claim, for a rule that names claims; a unit, for
/// one that names units or control groups; else a user.
///
/// Processes cannot choose any of them. Where no unit is known the control group takes its place,
/// and that a process can divide if it was delegated to it: there name users or claims.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    /// A user.
    User(u32),
    /// A unit, or a control group.
    Unit(Arc<str>),
    /// A claim.
    Claim(Arc<str>),
}

/// The names of users and groups of this host.
pub trait Names {
    /// Number of a user.
    fn user(&self, name: &str) -> Option<u32>;
    /// Number of a group.
    fn group(&self, name: &str) -> Option<u32>;
}

/// A host without names: policies that have numbers only.
#[derive(Clone, Copy, Debug)]
pub struct NoNames;

impl Names for NoNames {
    fn user(&self, _: &str) -> Option<u32> {
        None
    }

    fn group(&self, _: &str) -> Option<u32> {
        None
    }
}

/// Where something was written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The file.
    pub file: Arc<str>,
    /// The line, from 1.
    pub line: u32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// A fault of a policy file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {}{message}", Key(key))]
pub struct PolicyError {
    /// Where.
    pub place: Place,
    /// The key, or the table; empty if neither can be told.
    pub key: String,
    /// The fault.
    pub message: String,
}

struct Key<'a>(&'a str);

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            "" => Ok(()),
            key => write!(f, "{key}: "),
        }
    }
}

/// How a device is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Match {
    /// By address, `DDDD:BB:DD.F`.
    Address(String),
    /// By the name of its slot.
    Slot(String),
    /// By vendor and device.
    Ids(u16, u16),
    /// By serial number.
    Serial(Serial),
}

/// The serial number of a PCI Express device, written as `lspci` does: `52-54-00-ff-ff-12-34-56`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serial(pub u64);

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0.to_be_bytes().map(|byte| format!("{byte:02x}"));
        f.write_str(&bytes.join("-"))
    }
}

/// A device that the service owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its name in the policy.
    pub name: Arc<str>,
    /// How it is found.
    pub matches: Match,
    /// The driver that it must be bound to.
    pub driver: Option<String>,
    /// How it is opened.
    pub backend: Backend,
    /// Whether its memory is turned on.
    pub memory: bool,
    /// Whether it becomes a bus master.
    pub bus_master: bool,
    /// Its fate when the process ends that has handed it over.
    pub owner_dies: OwnerDies,
}

/// A part of a BAR that leases are cut from. Pools of a BAR do not overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Its name.
    pub name: Arc<str>,
    /// Name of its device.
    pub device: Arc<str>,
    /// The BAR, 0 to 5.
    pub bar: u8,
    /// Where it begins: a multiple of 4 KiB.
    pub at: u64,
    /// Its length, a multiple of `unit` and not 0; else to the end of the BAR.
    pub length: Option<u64>,
    /// Bytes of a unit: a multiple of 4 KiB, not 0.
    pub unit: u64,
    /// Whether a lease of it is one range.
    pub contiguous: bool,
    /// Memory types that may be asked for.
    pub memory_types: Vec<MemoryType>,
    /// Whether it may be leased for writing.
    pub writable: bool,
    /// The bytes that clear a range before it is leased; not of registers, nor of shared bytes.
    pub scrub: Scrub,
    /// How leases share bytes.
    pub overlap: Overlap,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Who {
    users: Option<Vec<u32>>,
    groups: Option<Vec<u32>>,
    units: Option<Vec<Pattern>>,
    cgroups: Option<Vec<Pattern>>,
    claims: Option<Vec<Pattern>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    place: Place,
    pools: Vec<Pattern>,
    who: Who,
    access: Access,
    max_leases: Option<u32>,
    max_bytes: Option<u64>,
    max_ttl: Option<Millis>,
    lifetimes: Vec<Lifetime>,
    grace: Millis,
    wait: Millis,
    steering_tags: bool,
}

/// The most that all tenants have together, who are all but administrators: a user with many
/// subordinate users is many tenants to a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Totals {
    /// Connections.
    pub connections: u32,
    /// Leases: with so many, nobody but administrators gets one.
    pub leases: u32,
    /// Requests in line, of all pools.
    pub waiting: u32,
    /// Watches of news.
    pub watches: u32,
}

impl Default for Totals {
    fn default() -> Self {
        Self {
            connections: 16_384,
            leases: 1 << 20,
            waiting: 16_384,
            watches: 4096,
        }
    }
}

impl Totals {
    /// The smallest that is written of each; the default where none is.
    fn of<'a>(tables: impl Iterator<Item = &'a TenantsTable> + Clone) -> Self {
        let least = |of: fn(&TenantsTable) -> Option<NonZeroU32>, default: u32| {
            let written = tables.clone().filter_map(of).min();
            written.map_or(default, NonZeroU32::get)
        };
        let default = Self::default();
        Self {
            connections: least(|table| table.max_connections, default.connections),
            leases: least(|table| table.max_leases, default.leases),
            waiting: least(|table| table.max_waiting, default.waiting),
            watches: least(|table| table.max_watches, default.watches),
        }
    }
}

/// A policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    devices: Vec<Device>,
    pools: Vec<Pool>,
    rules: Vec<Rule>,
    /// By pool.
    indexes: Vec<Index>,
    revoke: bool,
    totals: Totals,
}

/// For the checker of every order: the policy of a world does not change.
#[cfg(test)]
impl std::hash::Hash for Policy {
    fn hash<H: std::hash::Hasher>(&self, _: &mut H) {}
}

/// The unit of everything: pages of the smallest size.
const PAGE: u64 = 4096;

impl Policy {
    /// Reads drop-in files, each a name for messages and its text.
    ///
    /// Errors: all that is wrong with any of the files.
    pub fn parse(files: &[(&str, &str)], names: &dyn Names) -> Result<Self, Vec<PolicyError>> {
        let mut reader = Reader::default();
        let mut read = Vec::new();
        for (name, text) in files {
            let source = Source {
                name: (*name).into(),
                text,
            };
            match toml::from_str::<File>(text) {
                Ok(file) => read.push((source, file)),
                Err(error) => {
                    let span = error.span().unwrap_or_default();
                    // The parser's message may have several lines.
                    let message = error.message().trim().replace('\n', ", ");
                    reader.errors.push(source.error(span, message));
                }
            }
        }
        // Pools may be of devices of other files, rules for pools of others.
        for (source, file) in &read {
            reader.policy.revoke |= file.revoke_what_is_no_longer_allowed.unwrap_or(false);
            reader.devices(source, file);
        }
        for (source, file) in &read {
            reader.pools(source, file);
        }
        for (source, file) in &read {
            reader.rules(source, file, names);
        }
        if !reader.errors.is_empty() {
            return Err(reader.errors);
        }
        let mut policy = reader.policy;
        policy.totals = Totals::of(read.iter().filter_map(|(_, file)| file.tenants.as_ref()));
        policy.indexes = policy
            .pools
            .iter()
            .map(|pool| Index::new(&policy.rules, &pool.name))
            .collect();
        Ok(policy)
    }

    /// The devices.
    #[must_use]
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// The pools. A pool is meant by its place here.
    #[must_use]
    pub fn pools(&self) -> &[Pool] {
        &self.pools
    }

    /// The place of the pool of that name.
    #[must_use]
    pub fn pool_named(&self, name: &str) -> Option<usize> {
        self.pools.iter().position(|pool| &*pool.name == name)
    }

    /// Whether leases that this policy does not allow are revoked when it comes into force.
    #[must_use]
    pub fn revokes(&self) -> bool {
        self.revoke
    }

    /// The most that all tenants have together.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Where the rule of that number was written.
    #[must_use]
    pub fn place_of(&self, rule: u32) -> Option<&Place> {
        self.rules.get(rule as usize).map(|rule| &rule.place)
    }
}

/// The JSON schema of a policy file.
#[cfg(feature = "schema")]
#[must_use]
pub fn schema() -> schemars::Schema {
    schemars::schema_for!(File)
}

/// A file that is being read.
struct Source<'a> {
    name: Arc<str>,
    text: &'a str,
}

impl Source<'_> {
    fn place(&self, offset: usize) -> Place {
        let before = self.text.get(..offset).unwrap_or(self.text);
        let line = 1 + before.bytes().filter(|byte| *byte == b'\n').count();
        Place {
            file: self.name.clone(),
            line: u32::try_from(line).unwrap_or(u32::MAX),
        }
    }

    fn error(&self, span: ops::Range<usize>, message: impl Into<String>) -> PolicyError {
        PolicyError {
            place: self.place(span.start),
            key: self.key(span.start),
            message: message.into(),
        }
    }

    /// The key of the line of that offset, below the table that it stands in.
    fn key(&self, offset: usize) -> String {
        let upto = self.text.get(..offset).unwrap_or(self.text);
        let begin = upto.rfind('\n').map_or(0, |at| at + 1);
        let line = self.text[begin..].lines().next().unwrap_or_default().trim();
        let table = |line: &str| {
            let inner = line.trim().strip_prefix('[')?.split('#').next()?.trim();
            Some(inner.trim_matches(['[', ']']).trim().to_owned())
        };
        if let Some(table) = table(line) {
            return table;
        }
        let above = self.text[..begin].lines().rev().find_map(table);
        // A line of a list that goes over several has no key of its own.
        let key = line.split_once('=').map(|(key, _)| key.trim().to_owned());
        let parts: Vec<String> = above.into_iter().chain(key).collect();
        parts.join(".")
    }
}

#[derive(Default)]
struct Reader {
    policy: Policy,
    errors: Vec<PolicyError>,
    /// Where each pool was written, in the order of the pools.
    places: Vec<Place>,
    /// Claims of names, for a message when a name comes twice.
    named: BTreeMap<(&'static str, String), Place>,
}

impl Reader {
    fn name(&mut self, source: &Source<'_>, kind: &'static str, name: &str, at: usize) -> bool {
        if name.is_empty() || name.contains(['*', '?', '/']) {
            let message = format!("{name:?} is no name: it is empty, or has one of * ? /");
            self.errors.push(source.error(at..at, message));
            return false;
        }
        let before = self.named.insert((kind, name.to_owned()), source.place(at));
        if let Some(before) = before {
            let message = format!("the {kind} {name} is in {before}, too");
            self.errors.push(source.error(at..at, message));
            return false;
        }
        true
    }

    fn devices(&mut self, source: &Source<'_>, file: &File) {
        for (name, table) in &file.device {
            let span = table.r#match.span();
            if !self.name(source, "device", name, span.start) {
                continue;
            }
            let Some(matches) = parse_match(table.r#match.get_ref()) else {
                let message = "not an address such as 0000:01:00.0, slot:NAME, VENDOR:DEVICE in \
                               hexadecimal, or serial:52-54-00-ff-ff-12-34-56";
                self.errors.push(source.error(span, message));
                continue;
            };
            self.policy.devices.push(Device {
                name: name.as_str().into(),
                matches,
                driver: table.driver.clone(),
                backend: table.backend,
                memory: table.memory,
                bus_master: table.bus_master,
                owner_dies: table.owner_dies,
            });
        }
    }

    fn pools(&mut self, source: &Source<'_>, file: &File) {
        for (name, table) in &file.pool {
            let span = table.device.span();
            if !self.name(source, "pool", name, span.start) {
                continue;
            }
            match self.pool(name, table) {
                Ok(pool) => {
                    self.policy.pools.push(pool);
                    self.places.push(source.place(span.start));
                }
                Err((span, message)) => self.errors.push(source.error(span, message)),
            }
        }
    }

    fn pool(&self, name: &str, table: &PoolTable) -> Result<Pool, (ops::Range<usize>, String)> {
        let device = table.device.get_ref();
        let Some(device) = self
            .policy
            .devices
            .iter()
            .find(|known| *known.name == **device)
        else {
            return Err((table.device.span(), format!("there is no device {device}")));
        };
        if *table.bar.get_ref() > 5 {
            return Err((table.bar.span(), "a BAR is 0 to 5".to_owned()));
        }
        let unit = table.unit.get_ref().0;
        if unit == 0 || unit % PAGE != 0 {
            let message = "a unit is a multiple of 4 KiB, and not 0".to_owned();
            return Err((table.unit.span(), message));
        }
        let at = table.at.as_ref().map_or(0, |at| at.get_ref().0);
        if let Some(written) = &table.at {
            if at % PAGE != 0 {
                return Err((written.span(), "not a multiple of 4 KiB".to_owned()));
            }
        }
        let length = table.length.as_ref().map(|length| length.get_ref().0);
        if let (Some(written), Some(length)) = (&table.length, length) {
            if length == 0 || length % unit != 0 || at.checked_add(length).is_none() {
                let message =
                    format!("not a multiple of the unit, {unit:#x}, that fits behind `at`");
                return Err((written.span(), message));
            }
            if length / unit > MAX_UNITS {
                let message = format!("more than {MAX_UNITS} units: take larger ones");
                return Err((written.span(), message));
            }
        }
        let scrub = table
            .scrub
            .as_ref()
            .map_or(Scrub::None, |scrub| *scrub.get_ref());
        if let (Some(written), Scrub::Pattern(_)) = (&table.scrub, scrub) {
            if table.contents != Contents::Memory {
                let message = "registers are never written to: say contents = \"memory\" if it is";
                return Err((written.span(), message.to_owned()));
            }
            if table.overlap != Overlap::Exclusive {
                let message = "what others may have at the same time is not written to";
                return Err((written.span(), message.to_owned()));
            }
        }
        let range = |at: u64, length: Option<u64>| {
            at..length.map_or(u64::MAX, |length| at.saturating_add(length))
        };
        let ours = range(at, length);
        for (other, place) in self.policy.pools.iter().zip(&self.places) {
            let theirs = range(other.at, other.length);
            let same = other.device == device.name && other.bar == *table.bar.get_ref();
            if same && ours.start < theirs.end && theirs.start < ours.end {
                let message = format!("overlaps the pool {} ({place})", other.name);
                return Err((table.device.span(), message));
            }
        }
        Ok(Pool {
            name: name.into(),
            device: device.name.clone(),
            bar: *table.bar.get_ref(),
            at,
            length,
            unit,
            contiguous: table
                .contiguous
                .unwrap_or(table.contents == Contents::Registers),
            memory_types: table
                .memory_type
                .clone()
                .unwrap_or_else(|| vec![MemoryType::Uncached]),
            writable: table.writable,
            scrub,
            overlap: table.overlap,
        })
    }

    fn rules(&mut self, source: &Source<'_>, file: &File, names: &dyn Names) {
        for table in &file.allow {
            let at = table.who.span();
            let pools: Vec<Pattern> = table
                .pools
                .iter()
                .map(|pool| Pattern::new(pool.get_ref()))
                .collect();
            for (pattern, written) in pools.iter().zip(&table.pools) {
                if !self
                    .policy
                    .pools
                    .iter()
                    .any(|pool| pattern.matches(&pool.name))
                {
                    let message = format!("there is no pool {}", pattern.text());
                    self.errors.push(source.error(written.span(), message));
                }
            }
            let who = match read_who(table.who.get_ref(), names) {
                Ok(who) => who,
                Err(message) => {
                    self.errors.push(source.error(at, message));
                    continue;
                }
            };
            self.policy.rules.push(Rule {
                place: source.place(at.start),
                pools,
                who,
                access: table.access,
                max_leases: table.max_leases.map(Into::into),
                max_bytes: table.max_bytes.map(|size| size.0),
                max_ttl: table.max_ttl.map(|span| span.0),
                lifetimes: table
                    .lifetime
                    .clone()
                    .unwrap_or_else(|| vec![Lifetime::Connection]),
                grace: table.grace.map_or(Millis(0), |span| span.0),
                wait: match table.queue {
                    Queue::None => Millis(0),
                    Queue::Fifo(span) => span,
                },
                steering_tags: table.steering_tags,
            });
        }
    }
}

fn parse_match(text: &str) -> Option<Match> {
    let hex = |text: &str, digits: usize| {
        let fits = text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        fits.then(|| u32::from_str_radix(text, 16).ok()).flatten()
    };
    if let Some(slot) = text.strip_prefix("slot:") {
        return (!slot.is_empty()).then(|| Match::Slot(slot.to_owned()));
    }
    if let Some(serial) = text.strip_prefix("serial:") {
        let digits = match serial.split('-').collect::<Vec<_>>()[..] {
            [digits] => digits.to_owned(),
            ref bytes if bytes.iter().all(|byte| byte.len() == 2) => bytes.concat(),
            _ => return None,
        };
        let (high, low) = digits.split_at_checked(8)?;
        let serial = u64::from(hex(high, 8)?) << 32 | u64::from(hex(low, 8)?);
        return Some(Match::Serial(Serial(serial)));
    }
    if let [vendor, device] = text.split(':').collect::<Vec<_>>()[..] {
        let (vendor, device) = (hex(vendor, 4)?, hex(device, 4)?);
        return Some(Match::Ids(vendor as u16, device as u16));
    }
    let [domain, bus, rest] = text.split(':').collect::<Vec<_>>()[..] else {
        return None;
    };
    let (device, function) = rest.split_once('.')?;
    // Host bridges of volume managers have domains of more digits.
    let domain = (4..=8)
        .contains(&domain.len())
        .then(|| hex(domain, domain.len()))?;
    let fits =
        domain.is_some() && hex(bus, 2).is_some() && hex(device, 2)? < 32 && hex(function, 1)? < 8;
    fits.then(|| Match::Address(text.to_ascii_lowercase()))
}

fn read_who(who: &file::Who, names: &dyn Names) -> Result<Who, String> {
    let patterns = |list: &Option<OneOrMany<String>>| {
        let list = list.as_ref()?;
        Some(
            list.as_slice()
                .iter()
                .map(|text| Pattern::new(text))
                .collect::<Vec<_>>(),
        )
    };
    let numbers = |list: &[NameOrNumber], kind, find: &dyn Fn(&str) -> Option<u32>| {
        let find = |one: &NameOrNumber| match one {
            NameOrNumber::Number(number) => Ok(*number),
            NameOrNumber::Name(name) => {
                find(name).ok_or_else(|| format!("there is no {kind} {name:?} on this host"))
            }
        };
        list.iter().map(find).collect::<Result<Vec<_>, _>>()
    };
    let everybody = |list: &[NameOrNumber]| {
        list.iter()
            .any(|one| matches!(one, NameOrNumber::Name(name) if name == "*"))
    };
    let users = match &who.user {
        Some(list) if !everybody(list.as_slice()) => {
            Some(numbers(list.as_slice(), "user", &|name| names.user(name))?)
        }
        _ => None,
    };
    let groups = match &who.group {
        Some(list) => Some(numbers(list.as_slice(), "group", &|name| {
            names.group(name)
        })?),
        None => None,
    };
    let read = Who {
        users,
        groups,
        units: patterns(&who.unit),
        cgroups: patterns(&who.cgroup),
        claims: patterns(&who.claim),
    };
    let nobody = who.user.is_none()
        && who.group.is_none()
        && who.unit.is_none()
        && who.cgroup.is_none()
        && who.claim.is_none();
    if nobody {
        return Err("whom? user = \"*\" is everybody".to_owned());
    }
    Ok(read)
}

#[cfg(test)]
mod tests;
