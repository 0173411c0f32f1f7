//! Debian package versions: order and file names.
//!
//! The order is that of Debian policy, chapter 5.6.12: epoch, upstream version, revision; digits
//! compare as numbers, letters before other characters, and `~` before everything, even the end.

use std::cmp::Ordering;

/// Compares two version strings.
#[must_use]
pub fn compare(a: &str, b: &str) -> Ordering {
    let (a, b) = (split(a), split(b));
    a.0.cmp(&b.0)
        .then_with(|| part(a.1, b.1))
        .then_with(|| part(a.2, b.2))
}

fn split(version: &str) -> (u64, &str, &str) {
    let (epoch, rest) = match version.split_once(':') {
        Some((epoch, rest)) => (epoch.parse().unwrap_or(0), rest),
        None => (0, version),
    };
    let (upstream, revision) = rest.rsplit_once('-').unwrap_or((rest, ""));
    (epoch, upstream, revision)
}

fn part(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    while !a.is_empty() || !b.is_empty() {
        let order = words(&mut a, &mut b).then_with(|| numbers(&mut a, &mut b));
        if order.is_ne() {
            return order;
        }
    }
    Ordering::Equal
}

/// Takes the leading characters that are no digits off both, and compares them.
fn words(a: &mut &[u8], b: &mut &[u8]) -> Ordering {
    loop {
        let (x, y) = (letter(a), letter(b));
        if x.is_none() && y.is_none() {
            return Ordering::Equal;
        }
        let order = weight(x).cmp(&weight(y));
        if order.is_ne() {
            return order;
        }
        *a = &a[1..];
        *b = &b[1..];
    }
}

fn letter(text: &[u8]) -> Option<u8> {
    text.first().copied().filter(|c| !c.is_ascii_digit())
}

fn weight(c: Option<u8>) -> i32 {
    match c {
        Some(b'~') => -1,
        None => 0,
        Some(c) if c.is_ascii_alphabetic() => i32::from(c),
        Some(c) => i32::from(c) + 256,
    }
}

fn numbers(a: &mut &[u8], b: &mut &[u8]) -> Ordering {
    let (x, y) = (number(a), number(b));
    x.len().cmp(&y.len()).then_with(|| x.cmp(y))
}

/// Takes a number off the front, without its leading zeros.
fn number<'a>(text: &mut &'a [u8]) -> &'a [u8] {
    let end = text
        .iter()
        .position(|c| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    *text = rest;
    let zeros = digits.iter().take_while(|c| **c == b'0').count();
    &digits[zeros..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_in_the_order_of_debian_policy() {
        let ascending = [
            "0.9",
            "1.0~rc1-1",
            "1.0-1",
            "1.0-1+b1",
            "1.0-2",
            "1.0a-1",
            "1.0+dfsg-1",
            "1.09-1",
            "1.10-1",
            "7.2.13-1",
            "7.3~rc7-1~exp1",
            "7.3~rc7-1",
            "7.3-1~exp1",
            "7.3-1",
            "1:0.1",
        ];
        for (i, a) in ascending.iter().enumerate() {
            for (j, b) in ascending.iter().enumerate() {
                assert_eq!(compare(a, b), i.cmp(&j), "{a} against {b}");
            }
        }
    }

    #[test]
    fn leading_zeros_do_not_count() {
        assert_eq!(compare("1.007", "1.7"), Ordering::Equal);
    }
}
