//! Leases as they are asked for.

use std::path::PathBuf;
use std::time::Duration;

use barlease::BarRange;
use barlease::Bdf;
use barlease::MemoryType;
use barlease::Peer;

use crate::args::GrantArgs;
use crate::failure::Failure;
use crate::names;
use crate::number;

/// A lease to grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spec {
    pub(crate) bdf: Bdf,
    pub(crate) bar: u32,
    pub(crate) ranges: Vec<BarRange>,
    pub(crate) read_only: bool,
    pub(crate) memory_type: MemoryType,
    pub(crate) tph: Option<barlease::Tph>,
    pub(crate) name: Option<String>,
    pub(crate) socket: PathBuf,
    pub(crate) users: Vec<u32>,
    pub(crate) groups: Vec<u32>,
    pub(crate) once: bool,
    pub(crate) term: Option<Duration>,
}

impl Spec {
    /// Those that the command line asks for.
    pub(crate) fn all(args: &GrantArgs) -> Result<Vec<Self>, Failure> {
        let base = Self {
            bdf: args.bdf,
            bar: args.bar.unwrap_or_default(),
            ranges: args.range.clone(),
            read_only: args.read_only,
            memory_type: args.memory_type.into(),
            tph: args.tph.tph(),
            name: args.name.clone(),
            socket: args.socket.clone().unwrap_or_default(),
            users: args.user.clone(),
            groups: args.group.clone(),
            once: args.once,
            term: args.term,
        };
        if args.lease.is_empty() {
            return Ok(vec![base]);
        }
        let specs = args.lease.iter().map(|text| base.with(text));
        let specs: Vec<Self> = specs
            .collect::<Result<_, _>>()
            .map_err(|text| Failure::usage(format!("grant: --lease: {text}")))?;
        for (n, spec) in specs.iter().enumerate() {
            if specs
                .iter()
                .take(n)
                .any(|other| other.socket == spec.socket)
            {
                let path = spec.socket.display();
                return Err(Failure::usage(format!(
                    "grant: --lease: {path}: two leases cannot share a socket"
                )));
            }
        }
        Ok(specs)
    }

    /// The same, with what a group of keys and values says. `user`, `group` and `range` may come
    /// several times.
    fn with(&self, text: &str) -> Result<Self, String> {
        let mut spec = self.clone();
        let (mut ranges, mut users, mut groups) = (Vec::new(), Vec::new(), Vec::new());
        for pair in text.split(',') {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            match key {
                "device" => {
                    spec.bdf = value
                        .parse()
                        .map_err(|_| format!("{value:?}: no address"))?
                }
                "bar" => {
                    let bar = value.parse().ok().filter(|bar| *bar < 6);
                    spec.bar = bar.ok_or_else(|| format!("{value:?} is no BAR from 0 to 5"))?;
                }
                "range" => ranges.push(number::range(value)?),
                "user" | "uid" => users.push(names::user(value)?),
                "group" => groups.push(names::group(value)?),
                "socket" => spec.socket = value.into(),
                "name" => spec.name = Some(value.to_owned()),
                "term" => spec.term = Some(names::duration(value)?),
                "memory-type" => {
                    spec.memory_type = match value {
                        "nc" => MemoryType::Nc,
                        "wc" => MemoryType::Wc,
                        _ => return Err(format!("{value:?} is neither nc nor wc")),
                    }
                }
                "read-only" if value.is_empty() => spec.read_only = true,
                "once" if value.is_empty() => spec.once = true,
                _ => return Err(format!("{pair:?} is not understood")),
            }
        }
        for (given, place) in [(users, &mut spec.users), (groups, &mut spec.groups)] {
            if !given.is_empty() {
                *place = given;
            }
        }
        if !ranges.is_empty() {
            spec.ranges = ranges;
        }
        if spec.socket.as_os_str().is_empty() {
            return Err(format!("{text:?} has no socket=PATH"));
        }
        Ok(spec)
    }

    /// Whether users other than this one are to connect.
    pub(crate) fn is_shared(&self) -> bool {
        !self.users.is_empty() || !self.groups.is_empty()
    }

    /// Whether it is for this peer: one that was named, else this user and root.
    pub(crate) fn is_for(&self, peer: &Peer) -> bool {
        if !self.is_shared() {
            return peer.uid == 0 || peer.uid == rustix::process::geteuid().as_raw();
        }
        let is_in = |group: &u32| names::is_member(peer.uid, peer.gid, *group);
        self.users.contains(&peer.uid) || self.groups.iter().any(is_in)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Spec {
        Spec {
            bdf: "00:05.0".parse().unwrap(),
            bar: 2,
            ranges: Vec::new(),
            read_only: false,
            memory_type: MemoryType::Nc,
            tph: None,
            name: None,
            socket: PathBuf::new(),
            users: vec![7],
            groups: Vec::new(),
            once: false,
            term: None,
        }
    }

    #[test]
    fn a_group_says_what_differs() {
        let text = "range=1M+64K,range=0+4K,user=root,user=1001,socket=/run/a,term=1h,read-only";
        let spec = base().with(text).unwrap();
        assert_eq!(spec.bar, 2);
        assert_eq!(spec.ranges.len(), 2);
        assert_eq!(spec.ranges[0].offset, 1 << 20);
        assert_eq!(spec.users, [0, 1001]);
        assert_eq!(spec.socket, PathBuf::from("/run/a"));
        assert_eq!(spec.term, Some(Duration::from_secs(3600)));
        assert!(spec.read_only && !spec.once);
        assert_eq!(base().with("socket=/x").unwrap().users, [7]);
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (text, word) in [
            ("bar=0", "socket"),
            ("socket=/x,bar=6", "BAR"),
            ("socket=/x,colour=red", "colour"),
            ("socket=/x,once=1", "once"),
            ("socket=/x,term=soon", "soon"),
            ("socket=/x,user=no-such-user-here", "no user"),
            ("", "not understood"),
        ] {
            let error = base().with(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
