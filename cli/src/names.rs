//! Names of users and groups, and how long something lasts.
//!
//! The command is linked statically, so it has no name service of its own: it reads the files, and
//! asks `getent` for what is not in them.

use std::fs;
use std::process::Command;
use std::time::Duration;

/// Number of a user that is given by name or number.
pub(crate) fn user(text: &str) -> Result<u32, String> {
    number_of(text, "passwd").ok_or_else(|| format!("there is no user {text:?}"))
}

/// Number of a group that is given by name or number.
pub(crate) fn group(text: &str) -> Result<u32, String> {
    number_of(text, "group").ok_or_else(|| format!("there is no group {text:?}"))
}

fn number_of(text: &str, database: &str) -> Option<u32> {
    if let Ok(number) = text.parse() {
        return Some(number);
    }
    lines(database, text)
        .lines()
        .find_map(|line| entry(line).filter(|(name, _)| *name == text))
        .map(|(_, number)| number)
}

/// Name of a driver, which becomes a part of paths and of rules.
pub(crate) fn driver(text: &str) -> Result<String, String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if text.is_empty() || text.starts_with('.') || !text.chars().all(is_plain) {
        return Err(format!("{text:?} is no name of a driver"));
    }
    Ok(text.to_owned())
}

/// Name and number of a line of either file.
fn entry(line: &str) -> Option<(&str, u32)> {
    let mut fields = line.split(':');
    let name = fields.next()?;
    Some((name, fields.nth(1)?.parse().ok()?))
}

/// The lines about `name`: of the file, and those that `getent` adds.
fn lines(database: &str, name: &str) -> String {
    let text = fs::read_to_string(format!("/etc/{database}")).unwrap_or_default();
    if text
        .lines()
        .any(|line| line.split(':').next() == Some(name))
    {
        return text;
    }
    let answer = Command::new("getent").args([database, "--", name]).output();
    answer.map_or(String::new(), |answer| {
        String::from_utf8_lossy(&answer.stdout).into_owned()
    })
}

/// Whether a user is in a group, be it as one of its members only.
pub(crate) fn is_member(uid: u32, primary: u32, wanted: u32) -> bool {
    if primary == wanted {
        return true;
    }
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    listed(&users, &groups, uid, wanted)
}

fn listed(users: &str, groups: &str, uid: u32, wanted: u32) -> bool {
    let names: Vec<&str> = users
        .lines()
        .filter_map(entry)
        .filter_map(|(name, number)| (number == uid).then_some(name))
        .collect();
    groups
        .lines()
        .filter(|line| entry(line).is_some_and(|(_, number)| number == wanted))
        .filter_map(|line| line.split(':').nth(3))
        .flat_map(|members| members.split(','))
        .any(|member| names.contains(&member))
}

/// The groups of a user, the primary one first; none of a user that is not known.
pub(crate) fn groups_of(uid: u32) -> (u32, Vec<u32>) {
    let answer = Command::new("id")
        .args(["-G", "--", &format!("+{uid}")])
        .output();
    let text = answer.map_or(String::new(), |answer| {
        String::from_utf8_lossy(&answer.stdout).into_owned()
    });
    let groups: Vec<u32> = text
        .split_whitespace()
        .filter_map(|group| group.parse().ok())
        .collect();
    (groups.first().copied().unwrap_or(u32::MAX), groups)
}

/// A time: a number with s, m, h or d behind it.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time such as 90s, 10m, 2h or 1d");
    let (number, seconds) = [('s', 1), ('m', 60), ('h', 3600), ('d', 86400)]
        .iter()
        .find_map(|(unit, seconds)| Some((text.strip_suffix(*unit)?, *seconds)))
        .ok_or_else(wrong)?;
    let number: u64 = number.parse().map_err(|_| wrong())?;
    // A clock of the kernel's must be able to tell it.
    let total = number.checked_mul(seconds).filter(|total| *total < 1 << 32);
    match total {
        Some(total) if total > 0 => Ok(Duration::from_secs(total)),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_and_groups_are_numbers_or_names() {
        assert_eq!(user("1001"), Ok(1001));
        assert_eq!(user("root"), Ok(0));
        assert_eq!(group("root"), Ok(0));
        assert!(user("no-such-user-here").unwrap_err().contains("no user"));
        assert!(group("-1").is_err());
        assert_eq!(groups_of(0).0, 0);
        assert_eq!(groups_of(4_000_000), (u32::MAX, vec![]));
    }

    #[test]
    fn members_are_found_by_the_name_of_the_user() {
        let users = "root:x:0:0::/:/bin/sh\nalice:x:1001:1001::/:/bin/sh\n";
        let groups = "video:x:44:bob,alice\nrender:x:45:bob\n";
        assert!(listed(users, groups, 1001, 44));
        assert!(!listed(users, groups, 1001, 45));
        assert!(!listed(users, groups, 0, 44));
        assert!(is_member(7, 9, 9));
    }

    #[test]
    fn a_driver_is_no_path_and_no_rule() {
        assert_eq!(driver("vfio-pci"), Ok("vfio-pci".to_owned()));
        for wrong in ["", "..", "a/b", "a\" b", "a%k", "a\nb"] {
            assert!(driver(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_have_a_unit() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("2h"), Ok(Duration::from_secs(7200)));
        for wrong in ["", "5", "0s", "-1s", "h", "1w", "99999999999999999999d"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
