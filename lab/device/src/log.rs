//! The log: what reached the device, in order, and the state that it was in.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// The state of the device at the time of an entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct State {
    /// Memory decoding is on.
    pub memory: bool,
    /// The power state: 0 to 2, or 3 for D3hot.
    pub power: u8,
    /// In reset.
    pub reset: bool,
    /// Playing dead.
    pub dead: bool,
}

/// Reading or writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Op {
    /// A read.
    Read,
    /// A write.
    Write,
}

/// The event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum What {
    /// An access to a region, config space (region 7) included.
    Access {
        /// Its index.
        region: u32,
        /// Bytes from its beginning.
        offset: u64,
        /// Bytes.
        size: usize,
        /// Reading or writing.
        op: Op,
        /// The first 8 bytes of what was read or written, little-endian.
        value: u64,
    },
    /// A reset began.
    ResetBegin {
        /// `function` or `bus`.
        by: &'static str,
    },
    /// A reset ended. Written when that is first noticed; its time is right.
    ResetEnd,
    /// A mark of whoever controls the device.
    Mark {
        /// Its text.
        text: String,
    },
}

/// A line of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Counts from 1 and never repeats, not even after a clear.
    pub seq: u64,
    /// CLOCK_MONOTONIC of the host, in nanoseconds.
    pub ns: u64,
    /// The event.
    #[serde(flatten)]
    pub what: What,
    /// The state in which that found the device.
    pub state: State,
}

/// Which entries are asked for. A field that is absent does not matter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Query {
    /// Only entries after that one.
    pub after: Option<u64>,
    /// Only entries before that one.
    pub before: Option<u64>,
    /// `access`, `reset_begin`, `reset_end` or `mark`.
    pub kind: Option<String>,
    /// Only accesses to that region.
    pub region: Option<u32>,
    /// Only accesses at that offset.
    pub offset: Option<u64>,
    /// Only such accesses.
    pub op: Option<Op>,
    /// Only accesses with that value.
    pub value: Option<u64>,
    /// Only in reset, or only outside.
    pub reset: Option<bool>,
    /// Only with memory decoding on, or only off.
    pub memory: Option<bool>,
    /// Only in that power state.
    pub power: Option<u8>,
    /// How many of them to show; all are counted.
    pub limit: Option<usize>,
}

impl Query {
    fn fits(&self, entry: &Entry) -> bool {
        let access = match &entry.what {
            What::Access {
                region,
                offset,
                op,
                value,
                ..
            } => {
                is(self.region, *region)
                    && is(self.offset, *offset)
                    && is(self.op, *op)
                    && is(self.value, *value)
            }
            _ => {
                self.region.is_none()
                    && self.offset.is_none()
                    && self.op.is_none()
                    && self.value.is_none()
            }
        };
        access
            && self.after.is_none_or(|seq| entry.seq > seq)
            && self.before.is_none_or(|seq| entry.seq < seq)
            && self
                .kind
                .as_ref()
                .is_none_or(|kind| kind == entry.what.kind())
            && is(self.reset, entry.state.reset)
            && is(self.memory, entry.state.memory)
            && is(self.power, entry.state.power)
    }
}

fn is<T: PartialEq>(wanted: Option<T>, value: T) -> bool {
    wanted.is_none_or(|wanted| wanted == value)
}

impl What {
    fn kind(&self) -> &'static str {
        match self {
            Self::Access { .. } => "access",
            Self::ResetBegin { .. } => "reset_begin",
            Self::ResetEnd => "reset_end",
            Self::Mark { .. } => "mark",
        }
    }
}

/// The log, in memory and, if asked for, in a file.
#[derive(Debug, Default)]
pub struct Log {
    entries: Vec<Entry>,
    last: u64,
    file: Option<BufWriter<File>>,
}

impl Log {
    /// An empty log; `file` gets it as JSON lines, and is not cleared with it.
    ///
    /// # Errors
    ///
    /// When the file cannot be made.
    pub fn new(file: Option<&Path>) -> Result<Self> {
        let make = |path: &Path| {
            File::create(path).with_context(|| format!("make the device's log {}", path.display()))
        };
        Ok(Self {
            file: file.map(make).transpose()?.map(BufWriter::new),
            ..Self::default()
        })
    }

    /// Adds an entry and gives its number.
    pub fn add(&mut self, ns: u64, what: What, state: State) -> u64 {
        self.last += 1;
        let entry = Entry {
            seq: self.last,
            ns,
            what,
            state,
        };
        if let Some(file) = &mut self.file {
            // A log that cannot be written is missed when it is read.
            let _ = serde_json::to_writer(&mut *file, &entry);
            let _ = file.write_all(b"\n");
        }
        self.entries.push(entry);
        self.last
    }

    /// Forgets all entries.
    pub fn clear(&mut self) {
        self.entries.clear();
    }

    /// The number of the last entry, 0 when there was none.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.last
    }

    /// How many entries fit, and the first of them.
    #[must_use]
    pub fn query(&self, query: &Query) -> (usize, Vec<&Entry>) {
        let limit = query.limit.unwrap_or(8);
        let mut count = 0;
        let mut first = Vec::new();
        for entry in self.entries.iter().filter(|entry| query.fits(entry)) {
            count += 1;
            if first.len() < limit {
                first.push(entry);
            }
        }
        (count, first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access(region: u32, offset: u64, op: Op, value: u64) -> What {
        What::Access {
            region,
            offset,
            size: 4,
            op,
            value,
        }
    }

    fn log() -> Log {
        let mut log = Log::default();
        let on = State {
            memory: true,
            ..State::default()
        };
        log.add(10, access(7, 4, Op::Write, 2), State::default());
        log.add(20, access(0, 64, Op::Write, 5), on);
        log.add(
            30,
            What::Mark {
                text: "x".to_owned(),
            },
            on,
        );
        log.add(40, access(0, 64, Op::Read, 5), on);
        log
    }

    fn count(query: &str) -> usize {
        log().query(&serde_json::from_str(query).unwrap()).0
    }

    #[test]
    fn entries_are_found_by_what_they_are() {
        assert_eq!(count("{}"), 4);
        assert_eq!(count(r#"{"region":0}"#), 2);
        assert_eq!(count(r#"{"region":0,"op":"write"}"#), 1);
        assert_eq!(count(r#"{"region":0,"value":5,"offset":64}"#), 2);
        assert_eq!(count(r#"{"kind":"mark"}"#), 1);
        assert_eq!(count(r#"{"memory":false}"#), 1);
        assert_eq!(count(r#"{"reset":true}"#), 0);
    }

    #[test]
    fn entries_are_found_by_their_place() {
        assert_eq!(count(r#"{"after":2}"#), 2);
        assert_eq!(count(r#"{"before":2}"#), 1);
        assert_eq!(count(r#"{"after":3,"region":0}"#), 1);
    }

    #[test]
    fn all_are_counted_and_some_are_shown() {
        let log = log();
        let query = Query {
            limit: Some(1),
            ..Query::default()
        };
        let (count, shown) = log.query(&query);
        assert_eq!((count, shown.len()), (4, 1));
    }

    #[test]
    fn numbers_go_on_after_a_clear() {
        let mut log = log();
        log.clear();
        assert_eq!(log.query(&Query::default()).0, 0);
        assert_eq!(log.add(50, What::ResetEnd, State::default()), 5);
    }

    #[test]
    fn a_line_says_all_there_is() {
        let log = log();
        let (_, entries) = log.query(&Query {
            region: Some(7),
            ..Query::default()
        });
        assert_eq!(
            serde_json::to_string(entries[0]).unwrap(),
            r#"{"seq":1,"ns":10,"kind":"access","region":7,"offset":4,"size":4,"op":"write","value":2,"state":{"memory":false,"power":0,"reset":false,"dead":false}}"#
        );
    }

    #[test]
    fn a_query_with_a_slip_is_refused() {
        assert!(serde_json::from_str::<Query>(r#"{"regoin":0}"#).is_err());
    }
}
