//! Leases as they are asked for: by options, by groups of `--lease`, and by a file.

use std::fs;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use barlease::BarRange;
use barlease::Bdf;
use barlease::MemoryType;
use barlease::Peer;
use barlease::Tph;
use barlease::VfToken;
use toml::Table;
use toml::Value;

use crate::args::GrantArgs;
use crate::failure::Failure;
use crate::names;
use crate::number;

/// A lease to grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spec {
    pub(crate) bdf: Bdf,
    pub(crate) bar: u32,
    pub(crate) socket: PathBuf,
    pub(crate) terms: Terms,
}

/// Properties of a lease that have defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Terms {
    pub(crate) ranges: Vec<BarRange>,
    pub(crate) read_only: bool,
    pub(crate) memory_type: MemoryType,
    pub(crate) tph: Option<Tph>,
    /// To open the device.
    pub(crate) vf_token: Option<VfToken>,
    pub(crate) name: Option<String>,
    pub(crate) users: Vec<u32>,
    pub(crate) groups: Vec<u32>,
    pub(crate) once: bool,
    pub(crate) term: Option<Duration>,
}

/// A lease of which something may be missing yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Draft {
    bdf: Option<Bdf>,
    bar: Option<u32>,
    socket: Option<PathBuf>,
    terms: Terms,
}

impl Spec {
    /// Those that the command line asks for.
    pub(crate) fn all(args: &GrantArgs) -> Result<Vec<Self>, Failure> {
        let base = Draft {
            bdf: args.bdf,
            bar: args.bar,
            socket: args.socket.clone(),
            terms: Terms {
                ranges: args.range.clone(),
                read_only: args.read_only,
                memory_type: args.memory_type.into(),
                tph: args.tph.tph(),
                vf_token: args.vf_token,
                name: args.name.clone(),
                users: args.user.clone(),
                groups: args.group.clone(),
                once: args.once,
                term: args.term,
            },
        };
        let mut specs = Vec::new();
        if let Some(path) = &args.file {
            let text =
                fs::read_to_string(path).map_err(|error| Failure::file("grant", path, &error))?;
            specs.extend(base.file(&text).map_err(|reason| wrong(path, &reason))?);
        }
        for text in &args.lease {
            let spec = base.with(words(text)).and_then(|it| it.finish(text));
            specs.push(spec.map_err(|reason| Failure::usage(format!("grant: --lease: {reason}")))?);
        }
        if args.file.is_none() && args.lease.is_empty() {
            let spec = base.finish("the command line");
            specs.push(spec.map_err(|reason| Failure::usage(format!("grant: {reason}")))?);
        }
        for (n, spec) in specs.iter().enumerate() {
            let mut before = specs.iter().take(n);
            if before.any(|other| other.socket == spec.socket) {
                let path = spec.socket.display();
                return Err(Failure::usage(format!(
                    "grant: {path}: two leases cannot share a socket"
                )));
            }
        }
        Ok(specs)
    }

    /// Whether users other than this one are to connect.
    pub(crate) fn is_shared(&self) -> bool {
        !self.terms.users.is_empty() || !self.terms.groups.is_empty()
    }

    /// Whether it is for this peer: one that was named, else this user and root.
    pub(crate) fn is_for(&self, peer: &Peer) -> bool {
        if !self.is_shared() {
            return peer.uid == 0 || peer.uid == rustix::process::geteuid().as_raw();
        }
        let is_in = |group: &u32| names::is_member(peer.uid, peer.gid, *group);
        self.terms.users.contains(&peer.uid) || self.terms.groups.iter().any(is_in)
    }
}

fn wrong(path: &Path, reason: &str) -> Failure {
    Failure::usage(format!("grant: {}: {reason}", path.display()))
}

impl Draft {
    /// The leases of a file: keys before the first `[[lease]]` are for all of them.
    fn file(&self, text: &str) -> Result<Vec<Spec>, String> {
        let mut table: Table = toml::from_str(text).map_err(|error| error.to_string())?;
        let leases = match table.remove("lease") {
            Some(Value::Array(leases)) if !leases.is_empty() => leases,
            _ => return Err("no [[lease]]".to_owned()),
        };
        let base = self.with(pairs(&table)?)?;
        let lease = |(n, lease): (usize, &Value)| {
            let object = format!("lease {}", n + 1);
            let table = lease.as_table().ok_or("no table: write [[lease]]")?;
            pairs(table)
                .and_then(|pairs| base.with(pairs))
                .and_then(|draft| draft.finish("it"))
                .map_err(|reason| format!("{object}: {reason}"))
        };
        leases.iter().enumerate().map(lease).collect()
    }

    /// The same, with what keys and values say. `user`, `group` and `range` may come several times.
    fn with(&self, words: Vec<(String, String)>) -> Result<Self, String> {
        let mut draft = self.clone();
        let terms = &mut draft.terms;
        let (mut ranges, mut users, mut groups) = (Vec::new(), Vec::new(), Vec::new());
        for (key, value) in words {
            match key.as_str() {
                "device" => {
                    let bdf = value.parse();
                    draft.bdf = Some(bdf.map_err(|_| format!("{value:?}: no address"))?);
                }
                "bar" => {
                    let bar = value.parse().ok().filter(|bar| *bar < 6);
                    let bar = bar.ok_or_else(|| format!("{value:?} is no BAR from 0 to 5"))?;
                    draft.bar = Some(bar);
                }
                "range" => ranges.push(number::range(&value)?),
                "user" | "uid" => users.push(names::user(&value)?),
                "group" => groups.push(names::group(&value)?),
                "socket" if !value.is_empty() => draft.socket = Some(value.into()),
                "name" => terms.name = Some(value),
                "term" => terms.term = Some(names::duration(&value)?),
                "memory-type" => {
                    terms.memory_type = match value.as_str() {
                        "nc" => MemoryType::Nc,
                        "wc" => MemoryType::Wc,
                        _ => return Err(format!("{value:?} is neither nc nor wc")),
                    }
                }
                "vf-token" => {
                    let token = value.parse();
                    terms.vf_token = Some(token.map_err(|error| format!("vf-token: {error}"))?);
                }
                "steering-tag" => tph(terms).steering_tag = Some(number::integer_of(&value)?),
                "steering-tag-ext" => {
                    tph(terms).steering_tag_ext = Some(number::integer_of(&value)?);
                }
                "processing-hint" => {
                    let hint = number::integer_of(&value).ok().filter(|hint| *hint < 4);
                    let hint = hint.ok_or_else(|| format!("{value:?} is no hint from 0 to 3"))?;
                    tph(terms).processing_hint = hint;
                }
                "read-only" => terms.read_only = switch(&key, &value)?,
                "once" => terms.once = switch(&key, &value)?,
                _ if value.is_empty() => return Err(format!("{key:?} is not understood")),
                _ => return Err(format!("\"{key}={value}\" is not understood")),
            }
        }
        for (given, place) in [(users, &mut terms.users), (groups, &mut terms.groups)] {
            if !given.is_empty() {
                *place = given;
            }
        }
        if !ranges.is_empty() {
            terms.ranges = ranges;
        }
        Ok(draft)
    }

    /// `origin`: where it is written.
    fn finish(self, origin: &str) -> Result<Spec, String> {
        let missing = |key: &str| format!("{origin} has no {key}");
        Ok(Spec {
            bdf: self.bdf.ok_or_else(|| missing("device"))?,
            bar: self.bar.ok_or_else(|| missing("bar=N"))?,
            socket: self.socket.ok_or_else(|| missing("socket=PATH"))?,
            terms: self.terms,
        })
    }
}

fn tph(terms: &mut Terms) -> &mut Tph {
    terms.tph.get_or_insert_with(Tph::new)
}

/// A word that says yes by being there.
fn switch(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "" | "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(format!("{key}: {value:?} is neither true nor false")),
    }
}

/// Those of a group: `key=value,key`.
fn words(text: &str) -> Vec<(String, String)> {
    let pair = |word: &str| {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        (key.to_owned(), value.to_owned())
    };
    text.split(',').map(pair).collect()
}

/// Those of a table of a file; each element of a list is one.
fn pairs(table: &Table) -> Result<Vec<(String, String)>, String> {
    let mut pairs = Vec::new();
    for (key, value) in table {
        let values = match value {
            Value::Array(values) => values.as_slice(),
            value => std::slice::from_ref(value),
        };
        for value in values {
            let text = match value {
                Value::String(text) => text.clone(),
                Value::Integer(number) => number.to_string(),
                Value::Boolean(yes) => yes.to_string(),
                _ => return Err(format!("{key}: neither text nor a number, true or false")),
            };
            pairs.push((key.clone(), text));
        }
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Draft {
        Draft {
            bdf: "00:05.0".parse().ok(),
            bar: Some(2),
            terms: Terms {
                users: vec![7],
                ..Terms::default()
            },
            ..Draft::default()
        }
    }

    fn group(text: &str) -> Result<Spec, String> {
        base().with(words(text))?.finish(text)
    }

    #[test]
    fn a_group_says_what_differs() {
        let text = "range=1M+64K,range=0+4K,user=root,user=1001,socket=/run/a,term=1h,read-only";
        let spec = group(text).unwrap();
        assert_eq!(spec.bar, 2);
        assert_eq!(spec.terms.ranges.len(), 2);
        assert_eq!(spec.terms.ranges[0].offset, 1 << 20);
        assert_eq!(spec.terms.users, [0, 1001]);
        assert_eq!(spec.socket, PathBuf::from("/run/a"));
        assert_eq!(spec.terms.term, Some(Duration::from_secs(3600)));
        assert!(spec.terms.read_only && !spec.terms.once);
        assert_eq!(group("socket=/x").unwrap().terms.users, [7]);
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
            ("socket=/x,processing-hint=4", "hint"),
            ("socket=/x,vf-token=1234", "not a UUID"),
            ("", "not understood"),
        ] {
            let error = group(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
        let nothing = Draft::default().with(words("socket=/x")).unwrap();
        assert!(nothing.finish("it").unwrap_err().contains("device"));
    }

    #[test]
    fn a_file_has_the_words_of_the_command_line() {
        let text = r#"
            term = "2h"
            read-only = true
            user = "root"
            [[lease]]
            range = ["0+1M", "2M+4K"]
            user = ["root", 1001]
            socket = "/run/a"
            [[lease]]
            device = "00:06.0"
            bar = 0
            socket = "/run/b"
            read-only = false
            once = true
            memory-type = "wc"
            steering-tag = 18
        "#;
        let specs = base().file(text).unwrap();
        let [first, second] = &specs[..] else {
            panic!("{specs:?}");
        };
        assert_eq!(first.terms.ranges.len(), 2);
        assert_eq!(first.terms.users, [0, 1001]);
        assert!(first.terms.read_only && !first.terms.once);
        assert_eq!((first.bar, second.bar), (2, 0));
        assert_eq!(second.bdf.to_string(), "0000:00:06.0");
        assert!(!second.terms.read_only && second.terms.once);
        assert_eq!(second.terms.users, [0]);
        assert_eq!(second.terms.term, first.terms.term);
        assert_eq!(second.terms.memory_type, MemoryType::Wc);
        assert_eq!(second.terms.tph.unwrap().steering_tag, Some(18));
    }

    #[test]
    fn a_file_that_is_wrong_says_where() {
        for (text, word) in [
            ("", "[[lease]]"),
            ("lease = []", "[[lease]]"),
            (
                "[[lease]]\nsocket = \"/x\"\n[[lease]]\n",
                "lease 2: it has no socket",
            ),
            (
                "[[lease]]\nsocket = \"/x\"\ncolour = \"red\"",
                "lease 1: \"colour=red\"",
            ),
            ("[[lease]]\nsocket = { a = 1 }", "lease 1: socket: neither"),
            ("[[lease]]\nbar = ", "line 2"),
            ("colour = 1\n[[lease]]\nsocket = \"/x\"", "colour"),
        ] {
            let error = base().file(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
