//! The table of buffers that the module keeps in debugfs.
//!
//! A header line names the columns; then there is a line for each buffer, with columns separated by
//! blanks. Columns are found by name, so that a module that adds or moves some is understood.

use barlease::Reasons;
use serde_json::Map;
use serde_json::Value;

use crate::number;

/// A buffer: values by column, in the order of the header.
pub(crate) type Buffer = Map<String, Value>;

/// Parses the file. Lines with fewer columns than the header lack the last ones; more are dropped.
pub(crate) fn parse(text: &str) -> Vec<Buffer> {
    let mut lines = text.lines();
    let Some(header) = lines.next() else {
        return Vec::new();
    };
    let columns: Vec<&str> = header.split_whitespace().collect();
    lines
        .filter(|line| !line.trim().is_empty())
        .map(|line| {
            columns
                .iter()
                .zip(line.split_whitespace())
                .map(|(column, cell)| ((*column).to_owned(), value(column, cell)))
                .collect()
        })
        .collect()
}

/// Numbers as numbers, reasons by name, states and memory types in lower case as everywhere else.
fn value(column: &str, cell: &str) -> Value {
    match (column, number::integer(cell)) {
        ("reasons", Ok(bits)) => {
            let reasons = Reasons::from_bits(u32::try_from(bits).unwrap_or(u32::MAX));
            reasons.names().into()
        }
        // A name that looks like a number is a name.
        ("name", _) | (_, Err(_)) => match column {
            "state" | "memattr" => cell.to_lowercase().into(),
            _ => cell.into(),
        },
        (_, Ok(number)) => number.into(),
    }
}

/// A value as a cell of a table. Sizes are hexadecimal.
pub(crate) fn cell(column: &str, value: Option<&Value>) -> String {
    match (column, value) {
        (_, None) => "-".to_owned(),
        ("size", Some(Value::Number(size))) => match size.as_u64() {
            Some(size) => format!("{size:#x}"),
            None => size.to_string(),
        },
        (_, Some(Value::String(text))) => text.clone(),
        (_, Some(Value::Array(list))) if list.is_empty() => "-".to_owned(),
        (_, Some(Value::Array(list))) => {
            let texts: Vec<&str> = list.iter().filter_map(Value::as_str).collect();
            texts.join(",")
        }
        (_, Some(other)) => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
name bar ranges size memattr state reasons attachments mmaps
left\\x20half 0 1 0x200000 NC OK 0x0 0 2
7 2 3 0x3000 WC REVOKED 0x5 1 0
";

    #[test]
    fn columns_are_found_by_name() {
        let buffers = parse(TEXT);
        assert_eq!(buffers.len(), 2);
        assert_eq!(buffers[0]["name"], "left\\x20half");
        assert_eq!(buffers[0]["size"], 0x20_0000);
        assert_eq!(buffers[0]["state"], "ok");
        assert_eq!(buffers[1]["name"], "7");
        assert_eq!(cell("reasons", buffers[0].get("reasons")), "-");
        assert_eq!(
            cell("reasons", buffers[1].get("reasons")),
            "memory-off,low-power"
        );
        assert_eq!(cell("size", buffers[1].get("size")), "0x3000");
        assert_eq!(cell("nothing", buffers[1].get("nothing")), "-");
    }

    #[test]
    fn columns_may_move_be_added_or_missing() {
        let buffers = parse("size name new\n0x1000 a b c\n\n8192 b\n");
        assert_eq!(buffers.len(), 2);
        assert_eq!(buffers[0]["new"], "b");
        assert_eq!(buffers[1]["size"], 8192);
        assert!(buffers[1].get("new").is_none());
    }

    #[test]
    fn an_empty_file_has_no_buffers() {
        assert!(parse("").is_empty());
        assert!(parse("name bar\n").is_empty());
    }
}
