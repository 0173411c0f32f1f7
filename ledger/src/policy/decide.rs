//! The decision, among many rules.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::Pattern;
use super::Place;
use super::Policy;
use super::Rule;
use super::Subject;
use super::Who;
use crate::types::Access;
use crate::types::Lifetime;
use crate::types::Millis;
use crate::types::Peer;

/// May this peer have a lease of that kind of that pool?
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// The peer that asks.
    pub peer: &'a Peer,
    /// Place of the pool in the policy.
    pub pool: usize,
    /// Rights.
    pub access: Access,
    /// The end that it lives to.
    pub lifetime: Lifetime,
    /// Whether steering tags are to be set.
    pub steering_tags: bool,
}

/// A limit, and the number of the rule that it is of.
pub type Limit<T> = Option<(T, u32)>;

/// The smallest limits of the rules that count for one kind of subject.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Leases.
    pub leases: Limit<u32>,
    /// Bytes.
    pub bytes: Limit<u64>,
}

/// Whom a rule names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Named {
    /// Users or groups.
    Users,
    /// Units or control groups.
    Units,
    /// Claims.
    Claims,
}

/// The sum of the rules that allow something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The first of the rules, by its number.
    pub rule: u32,
    /// Whom the rules name: the narrowest of them.
    pub names: Named,
    /// For what the user has.
    pub user: Limits,
    /// For what the unit has.
    pub unit: Limits,
    /// For what the claim has.
    pub claim: Limits,
    /// How long it may live.
    pub max_ttl: Option<Millis>,
    /// How long before its end the holder is told.
    pub grace: Millis,
    /// How long one may wait in line.
    pub wait: Millis,
}

/// A rule's answer to a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It allows it.
    Allows,
    /// It is for others: this key of `who` does not fit.
    Others(&'static str),
    /// It allows reading only.
    Access,
    /// It does not allow this lifetime.
    Lifetime,
    /// It does not allow steering tags.
    SteeringTags,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allows => f.write_str("it allows it"),
            Self::Others(key) => write!(f, "it is for others: `{key}` does not fit"),
            Self::Access => f.write_str("it allows reading only"),
            Self::Lifetime => f.write_str("it does not allow this lifetime"),
            Self::SteeringTags => f.write_str("it does not allow steering tags"),
        }
    }
}

/// Makes the smaller of the two.
fn lower<T: Ord + Copy>(limit: &mut Limit<T>, other: Option<T>, rule: u32) {
    if let Some(other) = other {
        if limit.is_none_or(|(limit, _)| other < limit) {
            *limit = Some((other, rule));
        }
    }
}

impl Policy {
    /// The terms, if a rule allows it.
    #[must_use]
    pub fn decide(&self, question: &Question<'_>) -> Option<Terms> {
        let mut terms: Option<Terms> = None;
        self.indexes
            .get(question.pool)?
            .candidates(question.peer, |number| {
                let Some(rule) = self.rules.get(number as usize) else {
                    return;
                };
                if rule.answer(question) == Outcome::Allows {
                    rule.add_to(&mut terms, number);
                }
            });
        terms
    }

    /// The answer of each rule for the pool, in their order.
    #[must_use]
    pub fn explain(&self, question: &Question<'_>) -> Vec<(&Place, Outcome)> {
        let Some(pool) = self.pools.get(question.pool) else {
            return Vec::new();
        };
        self.rules
            .iter()
            .filter(|rule| rule.is_for(&pool.name))
            .map(|rule| (&rule.place, rule.answer(question)))
            .collect()
    }
}

impl Rule {
    fn is_for(&self, pool: &str) -> bool {
        self.pools.iter().any(|pattern| pattern.matches(pool))
    }

    pub(super) fn answer(&self, question: &Question<'_>) -> Outcome {
        if let Some(key) = self.who.differs(question.peer) {
            return Outcome::Others(key);
        }
        if question.access > self.access {
            return Outcome::Access;
        }
        if !self.lifetimes.contains(&question.lifetime) {
            return Outcome::Lifetime;
        }
        if question.steering_tags && !self.steering_tags {
            return Outcome::SteeringTags;
        }
        Outcome::Allows
    }

    pub(super) fn add_to(&self, terms: &mut Option<Terms>, number: u32) {
        let named = self.who.names();
        let terms = match terms {
            Some(terms) => {
                terms.rule = terms.rule.min(number);
                terms.names = terms.names.max(named);
                terms.grace = terms.grace.max(self.grace);
                terms.wait = terms.wait.max(self.wait);
                terms
            }
            None => terms.insert(Terms {
                rule: number,
                names: named,
                user: Limits::default(),
                unit: Limits::default(),
                claim: Limits::default(),
                max_ttl: None,
                grace: self.grace,
                wait: self.wait,
            }),
        };
        terms.max_ttl = match (terms.max_ttl, self.max_ttl) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
        let limits = match named {
            Named::Claims => &mut terms.claim,
            Named::Units => &mut terms.unit,
            Named::Users => &mut terms.user,
        };
        lower(&mut limits.leases, self.max_leases, number);
        lower(&mut limits.bytes, self.max_bytes, number);
    }
}

impl Terms {
    /// The subject whose share of a line the peer takes: the one that the rules name.
    pub(crate) fn share(&self, peer: &Peer) -> Subject {
        let unit = peer.subjects().find(|it| matches!(it, Subject::Unit(_)));
        match (self.names, unit) {
            (Named::Units, Some(unit)) => unit,
            _ => peer.tenant(),
        }
    }
}

impl Who {
    fn names(&self) -> Named {
        if self.claims.is_some() {
            Named::Claims
        } else if self.units.is_some() || self.cgroups.is_some() {
            Named::Units
        } else {
            Named::Users
        }
    }

    /// The first key that the peer does not fit.
    fn differs(&self, peer: &Peer) -> Option<&'static str> {
        let any = |patterns: &Option<Vec<Pattern>>, name: Option<&str>| {
            patterns.as_ref().is_none_or(|patterns| {
                name.is_some_and(|name| patterns.iter().any(|pattern| pattern.matches(name)))
            })
        };
        // A container chooses the user and the groups that it speaks as: they are not those of the
        // host that a rule means.
        let is_foreign = peer.claim.is_some() && self.claims.is_none();
        let unit = (!peer.unit.is_empty()).then_some(&*peer.unit);
        let cgroup = (!peer.cgroup_path.is_empty()).then_some(&*peer.cgroup_path);
        if self
            .users
            .as_ref()
            .is_some_and(|users| is_foreign || !users.contains(&peer.uid))
        {
            return Some("user");
        }
        let in_group = |gid: &u32| *gid == peer.gid || peer.groups.contains(gid);
        if self
            .groups
            .as_ref()
            .is_some_and(|groups| is_foreign || !groups.iter().any(in_group))
        {
            return Some("group");
        }
        if !any(&self.units, unit) {
            return Some("unit");
        }
        if !any(&self.cgroups, cgroup) {
            return Some("cgroup");
        }
        if !any(&self.claims, peer.claim.as_deref()) {
            return Some("claim");
        }
        None
    }
}

impl Peer {
    /// As whom it has leases: [`Peer::is_as`] is true of peers of which this is the same.
    pub(crate) fn owner(&self) -> Subject {
        match &self.claim {
            Some(claim) => Subject::Claim(Arc::clone(claim)),
            None => Subject::User(self.uid),
        }
    }

    /// As whom it counts for what it takes of the service itself, such as connections: a claim, or
    /// the user of the login session that it is in, or its user. A user with subordinate users, as
    /// containers without root have them, would count as many otherwise; out of its session's slice
    /// it cannot move them.
    #[must_use]
    pub fn tenant(&self) -> Subject {
        let session = || {
            let slice = self.cgroup_path.strip_prefix("/user.slice/user-")?;
            let (uid, _) = slice.split_once(".slice")?;
            Some(Subject::User(uid.parse().ok()?))
        };
        match self.owner() {
            Subject::User(_) => session().unwrap_or(Subject::User(self.uid)),
            claim => claim,
        }
    }

    /// As whom it counts: one that speaks for a claim as that alone, whatever user it chooses to
    /// be.
    pub(crate) fn subjects(&self) -> impl Iterator<Item = Subject> + '_ {
        if let Some(claim) = &self.claim {
            return [Some(Subject::Claim(Arc::clone(claim))), None]
                .into_iter()
                .flatten();
        }
        let unit = match &*self.unit {
            "" => &self.cgroup_path,
            _ => &self.unit,
        };
        let unit = (!unit.is_empty()).then(|| Subject::Unit(Arc::clone(unit)));
        [Some(Subject::User(self.uid)), unit].into_iter().flatten()
    }
}

/// The rules for a pool, by what a peer must have for them.
///
/// Each rule stands under one key of its `who`, the one that fits the fewest: users, claims, units,
/// control groups, groups. Rules that are found that way are then looked at whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Index {
    users: BTreeMap<u32, Vec<u32>>,
    claims: Prefixes,
    units: Prefixes,
    cgroups: Prefixes,
    groups: BTreeMap<u32, Vec<u32>>,
    everybody: Vec<u32>,
}

impl Index {
    pub(super) fn new(rules: &[Rule], pool: &str) -> Self {
        let mut index = Self::default();
        for (number, rule) in (0..).zip(rules) {
            if rule.is_for(pool) {
                index.add(&rule.who, number);
            }
        }
        index
    }

    fn add(&mut self, who: &Who, number: u32) {
        let by_number = |map: &mut BTreeMap<u32, Vec<u32>>, keys: &[u32]| {
            for key in keys {
                push(map.entry(*key).or_default(), number);
            }
        };
        if let Some(users) = &who.users {
            by_number(&mut self.users, users);
        } else if let Some(patterns) = &who.claims {
            self.claims.add(patterns, number);
        } else if let Some(patterns) = &who.units {
            self.units.add(patterns, number);
        } else if let Some(patterns) = &who.cgroups {
            self.cgroups.add(patterns, number);
        } else if let Some(groups) = &who.groups {
            by_number(&mut self.groups, groups);
        } else {
            self.everybody.push(number);
        }
    }

    /// The rules that may be for the peer, some perhaps twice, and all that are.
    fn candidates(&self, peer: &Peer, mut found: impl FnMut(u32)) {
        let mut all = |rules: &[u32]| rules.iter().for_each(|rule| found(*rule));
        all(self.users.get(&peer.uid).map_or(&[], Vec::as_slice));
        self.claims
            .find(peer.claim.as_deref().unwrap_or_default(), &mut all);
        self.units.find(&peer.unit, &mut all);
        self.cgroups.find(&peer.cgroup_path, &mut all);
        if !self.groups.is_empty() {
            for gid in peer.groups.iter().chain([&peer.gid]) {
                all(self.groups.get(gid).map_or(&[], Vec::as_slice));
            }
        }
        all(&self.everybody);
    }
}

/// A rule that names one thing twice stands there once.
fn push(rules: &mut Vec<u32>, number: u32) {
    if rules.last() != Some(&number) {
        rules.push(number);
    }
}

/// Rules by how the names that they are for begin, or, where the pattern does not say, end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Prefixes {
    begin: BTreeMap<Box<str>, Vec<u32>>,
    end: BTreeMap<Box<str>, Vec<u32>>,
    /// Bytes of the longest key of each.
    longest: (usize, usize),
}

impl Prefixes {
    fn add(&mut self, patterns: &[Pattern], number: u32) {
        for pattern in patterns {
            let (map, longest, key) = match pattern.prefix() {
                "" => (&mut self.end, &mut self.longest.1, pattern.suffix()),
                prefix => (&mut self.begin, &mut self.longest.0, prefix),
            };
            *longest = key.len().max(*longest);
            push(map.entry(key.into()).or_default(), number);
        }
    }

    fn find(&self, name: &str, all: &mut impl FnMut(&[u32])) {
        if name.is_empty() {
            return;
        }
        if !self.begin.is_empty() {
            for length in 1..=name.len().min(self.longest.0) {
                if let Some(rules) = name.get(..length).and_then(|key| self.begin.get(key)) {
                    all(rules);
                }
            }
        }
        if !self.end.is_empty() {
            for length in 0..=name.len().min(self.longest.1) {
                let key = name.get(name.len() - length..);
                if let Some(rules) = key.and_then(|key| self.end.get(key)) {
                    all(rules);
                }
            }
        }
    }
}
