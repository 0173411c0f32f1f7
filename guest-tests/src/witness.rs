//! Devices of our own (`lab/device`), asked what has reached them.

use std::{fs, os::unix::fs::FileExt, path::PathBuf};

use barlease_lab::guest;
use serde_json::{Value, json};

use crate::{pci::Function, vfio::COMMAND};

/// Offset in BAR2 of a register that keeps what is written; a write is a mark in the log.
pub const MARK: u64 = 0x08;
/// Offset in BAR2 of a register that signals the vector that is written to it.
pub const SIGNAL: u64 = 0x10;

/// A device of our own.
#[derive(Clone, Copy, Debug)]
pub struct Witness(&'static str);

impl Witness {
    /// The machine's device `name`. Its behaviour is what it was at first, and its log is empty.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        let witness = Self(name);
        witness.set(&json!({"dead": false, "reset_ms": 0, "reset_fails": false, "completer": 3}));
        witness.clear();
        witness
    }

    /// A request to its server, and the reply.
    ///
    /// # Panics
    ///
    /// When it is refused.
    #[must_use]
    pub fn ask(self, request: &Value) -> Value {
        let reply = guest::ask_device(self.0, &request.to_string());
        let reply = reply.unwrap_or_else(|error| panic!("{request}: {error}"));
        serde_json::from_str(&reply).unwrap_or_else(|error| panic!("{reply}: {error}"))
    }

    /// Changes how it behaves.
    pub fn set(self, change: &Value) {
        let _ = self.ask(&json!({"set": change}));
    }

    /// Forgets what has reached it.
    pub fn clear(self) {
        let _ = self.ask(&json!("clear"));
    }

    /// Puts a mark into its log: the number of the entry.
    #[must_use]
    pub fn mark(self, text: &str) -> u64 {
        number(&self.ask(&json!({"mark": text})), "seq")
    }

    /// Asks about the past: of what has been written until now nothing is on its way any more.
    fn look(self, request: &Value) -> Value {
        // The emulator does not wait until a write has arrived. It does for a read, which comes
        // behind all writes.
        let function = Function::named(self.0);
        let config = fs::File::open(sysfs(&function, "config")).expect("config space");
        // COMMAND: other registers the emulator may know by itself.
        config
            .read_exact_at(&mut [0; 2], COMMAND)
            .expect("config space");
        self.ask(request)
    }

    /// How many entries of the log fit.
    #[must_use]
    pub fn count(self, query: &Value) -> u64 {
        let query = limited(query, 0);
        number(&self.look(&json!({"query": query})), "count")
    }

    /// The first entry that fits.
    ///
    /// # Panics
    ///
    /// When none does.
    #[must_use]
    pub fn first(self, query: &Value) -> Value {
        let mut reply = self.look(&json!({"query": limited(query, 1)}));
        match reply["entries"].get_mut(0) {
            Some(entry) => entry.take(),
            None => panic!("no entry fits {query}"),
        }
    }

    /// The number of the write of `value` to the register [`MARK`].
    #[must_use]
    pub fn place_of_mark(self, value: u32) -> u64 {
        let query = json!({"region": 2, "offset": MARK, "op": "write", "value": value});
        number(&self.first(&query), "seq")
    }

    /// Asserts that no entry fits.
    ///
    /// # Panics
    ///
    /// When one does.
    pub fn assert_none(self, query: &Value) {
        let reply = self.look(&json!({"query": query}));
        assert_eq!(reply["count"], 0, "{query}: {:#}", reply["entries"]);
    }

    /// How many accesses to these physical addresses have reached no device since the machine was
    /// started.
    #[must_use]
    pub fn stray(self, start: u64, length: u64) -> u64 {
        number(
            &self.look(&json!({"stray": [start, start + length]})),
            "count",
        )
    }
}

/// The same query for so many entries: the way from the host is slow.
fn limited(query: &Value, entries: u32) -> Value {
    let mut query = query.clone();
    query["limit"] = json!(entries);
    query
}

fn number(object: &Value, member: &str) -> u64 {
    object[member]
        .as_u64()
        .unwrap_or_else(|| panic!("no number `{member}` in {object}"))
}

/// A file of a function in sysfs.
#[must_use]
pub fn sysfs(function: &Function, file: &str) -> PathBuf {
    PathBuf::from(format!("/sys/bus/pci/devices/{}/{file}", function.bdf))
}

/// Chooses how the kernel resets a function, such as `flr` or `bus`.
///
/// # Panics
///
/// When the kernel cannot do that.
pub fn set_reset_method(function: &Function, method: &str) {
    fs::write(sysfs(function, "reset_method"), method).expect("choose how to reset");
}
