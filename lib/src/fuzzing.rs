//! Parsers of what comes from the kernel or a socket, for the targets in `fuzz/`. Not an interface.

use crate::record;

/// Decodes a record, and panics unless what it says is the same when it is encoded and decoded
/// again. Tells whether it is one.
pub fn record(bytes: &[u8]) -> bool {
    let Ok(said) = record::decode(bytes) else {
        return false;
    };
    let memory_type = said.as_ref().map(|info| info.memory_type);
    let again = record::encode(said.as_ref(), memory_type.unwrap_or_default());
    let again = again.map(|bytes| record::decode(&bytes));
    assert_eq!(again, Some(Ok(said)));
    true
}

/// Parses the capability chain of a region's information. Number of capabilities, if it is one.
pub fn capabilities(answer: &[u8], first: u32) -> Option<usize> {
    crate::device::parse_capabilities(answer, first)
}

/// Parses the answer to LIST behind the id `after`, and panics if a walk that goes on from it could
/// go back or stand still. Number of leases, if it is one.
pub fn list(answer: &[u8], after: u64) -> Option<usize> {
    let (ids, next) = crate::leases::parse_list(answer, after)?;
    assert!(ids.is_sorted_by(|a, b| a < b));
    assert!(ids.iter().all(|id| *id > after));
    if let Some(next) = next {
        assert!(ids.last().is_some_and(|last| next >= *last));
    }
    Some(ids.len())
}
