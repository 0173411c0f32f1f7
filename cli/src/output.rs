//! Tables for people, JSON for programs.

use std::io;
use std::io::Write;

use comfy_table::Table;
use serde::Serialize;

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    Text,
    Json,
    Pretty,
}

impl Output {
    pub(crate) fn new(json: bool, pretty: bool) -> Self {
        match (json, pretty) {
            (_, true) => Self::Pretty,
            (true, false) => Self::Json,
            (false, false) => Self::Text,
        }
    }

    pub(crate) fn is_json(self) -> bool {
        self != Self::Text
    }

    /// Prints one JSON document.
    pub(crate) fn document(self, value: &impl Serialize) -> io::Result<()> {
        let mut out = io::stdout().lock();
        match self {
            Self::Pretty => serde_json::to_writer_pretty(&mut out, value)?,
            Self::Text | Self::Json => serde_json::to_writer(&mut out, value)?,
        }
        writeln!(out)
    }

    /// An event as a line, of JSON if asked for.
    pub(crate) fn line(self, value: &impl Serialize, text: &str) -> String {
        if !self.is_json() {
            return text.to_owned();
        }
        // The command prints no maps with keys that are not text.
        serde_json::to_string(value).unwrap_or_default()
    }
}

/// A table without lines, whose columns are as wide as their content: for people, and for `awk`.
pub(crate) fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_content_arrangement(comfy_table::ContentArrangement::Disabled);
    table.set_header(header);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// Prints a table without trailing blanks.
pub(crate) fn print(table: &Table) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for line in table.lines() {
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// A dash for what is not there.
pub(crate) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}
