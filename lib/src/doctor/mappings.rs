//! Which memory types the mappings of a device have.

use std::fs;

use super::Check;
use super::Doctor;
use super::ok;
use super::skip;
use super::warn;
use crate::Bdf;

impl Doctor {
    /// The memory types of the mappings that there are of a device's leases and BARs. A lease
    /// itself says the type of its next mapping.
    pub(super) fn mappings(&self, bdf: Bdf) -> Check {
        const NAME: &str = "mappings";
        let path = self
            .sysfs
            .join(format!("kernel/debug/barlease/{bdf}/buffers"));
        let Ok(text) = fs::read_to_string(&path) else {
            return skip(NAME, format!("{} cannot be read", path.display()));
        };
        let Some(mappings) = Mappings::count(&text) else {
            return skip(NAME, "the loaded module does not tell their memory type");
        };
        let found = format!(
            "{} uncached, {} write-combining",
            mappings.uncached, mappings.combining
        );
        if mappings.left_behind == 0 {
            return ok(NAME, found);
        }
        warn(
            NAME,
            format!(
                "{found}; {} of the uncached ones are of leases that are write-combining now",
                mappings.left_behind
            ),
            "map these leases again: a mapping keeps the type that it was made with",
        )
    }
}

/// Mappings by memory type.
#[derive(Debug, Default, PartialEq, Eq)]
struct Mappings {
    uncached: u64,
    combining: u64,
    /// Uncached ones, made before their lease became write-combining.
    left_behind: u64,
}

impl Mappings {
    /// Adds up the lines of a `buffers` file. `None` when it lacks a column.
    fn count(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let header: Vec<&str> = lines.next()?.split_whitespace().collect();
        let column = |name| header.iter().position(|column| *column == name);
        let (memattr, all, combining) = (column("memattr")?, column("mmaps")?, column("wc_mmaps")?);
        let mut sum = Self::default();
        for line in lines {
            let cells: Vec<&str> = line.split_whitespace().collect();
            let number = |at: usize| cells.get(at)?.parse::<u64>().ok();
            let (all, combining) = (number(all)?, number(combining)?);
            let uncached = all.saturating_sub(combining);
            sum.uncached += uncached;
            sum.combining += combining;
            if cells.get(memattr) == Some(&"WC") {
                sum.left_behind += uncached;
            }
        }
        Some(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn mappings_are_counted_by_the_type_that_they_have() {
        let root = tempfile::tempdir().unwrap();
        let bdf = "00:05.0".parse().unwrap();
        let check = || Doctor::at(root.path()).mappings(bdf);
        assert_eq!(check().verdict, Verdict::Skip);
        let folder = root.path().join("sys/kernel/debug/barlease/0000:00:05.0");
        fs::create_dir_all(&folder).unwrap();
        let write = |text: &str| fs::write(folder.join("buffers"), text).unwrap();
        write("name memattr mmaps\na NC 1\n");
        assert_eq!(check().verdict, Verdict::Skip);
        write("name memattr mmaps wc_mmaps\na NC 3 1\nb WC 2 2\n");
        let found = check();
        assert_eq!(
            (found.verdict, found.found.as_str()),
            (Verdict::Ok, "2 uncached, 3 write-combining")
        );
        write("name memattr mmaps wc_mmaps\na NC 3 1\nb WC 2 1\n");
        let found = check();
        assert_eq!(found.verdict, Verdict::Warn);
        assert!(found.found.contains("; 1 of the uncached"), "{found:?}");
    }
}
