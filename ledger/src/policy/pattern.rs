//! Patterns for names of units, control groups, claims and pools.

/// `?` is one character and `*` any number of them, but for `/`; `**` is any number of any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pattern(Box<str>);

impl Pattern {
    pub(super) fn new(text: &str) -> Self {
        Self(text.into())
    }

    pub(super) fn text(&self) -> &str {
        &self.0
    }

    /// The beginning of every name that matches.
    pub(super) fn prefix(&self) -> &str {
        let end = self.0.find(['*', '?']).unwrap_or(self.0.len());
        &self.0[..end]
    }

    /// The end of every name that matches.
    pub(super) fn suffix(&self) -> &str {
        let begin = self.0.rfind(['*', '?']).map_or(0, |at| at + 1);
        &self.0[begin..]
    }

    /// Whether the name matches. Takes time in proportion to the lengths' product at most, whatever
    /// the pattern: of each kind of star only the last one met is tried again.
    pub(super) fn matches(&self, name: &str) -> bool {
        let pattern = self.0.as_bytes();
        let name = name.as_bytes();
        let (mut p, mut n) = (0, 0);
        // Where to go on in the pattern, and the first byte of the name that the star has not
        // eaten.
        let mut star = None;
        let mut double = None;
        loop {
            let literal = pattern.get(p);
            if literal == Some(&b'*') {
                if pattern.get(p + 1) == Some(&b'*') {
                    p += 2;
                    double = Some((p, n));
                    star = None;
                } else {
                    p += 1;
                    star = Some((p, n));
                }
                continue;
            }
            match (literal, name.get(n)) {
                (None, None) => return true,
                (Some(b'?'), Some(&byte)) if byte != b'/' => {
                    // One character, which may be several bytes.
                    n += 1;
                    while name.get(n).is_some_and(|byte| byte & 0xc0 == 0x80) {
                        n += 1;
                    }
                    p += 1;
                    continue;
                }
                (Some(wanted), Some(byte)) if wanted == byte && *wanted != b'?' => {
                    p += 1;
                    n += 1;
                    continue;
                }
                _ => {}
            }
            match (&mut star, &mut double) {
                (Some((back, eaten)), _) if name.get(*eaten).is_some_and(|byte| *byte != b'/') => {
                    *eaten += 1;
                    (p, n) = (*back, *eaten);
                }
                (_, Some((back, eaten))) if *eaten < name.len() => {
                    *eaten += 1;
                    (p, n) = (*back, *eaten);
                    star = None;
                }
                _ => return false,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::Pattern;

    /// The definition, as it is read.
    fn slow(pattern: &[char], name: &[char]) -> bool {
        match (pattern, name) {
            ([], []) => true,
            (['*', '*', rest @ ..], _) => (0..=name.len()).any(|eaten| slow(rest, &name[eaten..])),
            (['*', rest @ ..], _) => {
                let most = name.iter().take_while(|c| **c != '/').count();
                (0..=most).any(|eaten| slow(rest, &name[eaten..]))
            }
            (['?', rest @ ..], [c, tail @ ..]) => *c != '/' && slow(rest, tail),
            ([p, rest @ ..], [c, tail @ ..]) => p == c && slow(rest, tail),
            _ => false,
        }
    }

    #[test]
    fn a_star_stays_in_its_component_and_two_do_not() {
        let matches = |pattern, name| Pattern::new(pattern).matches(name);
        assert!(matches("db@*.service", "db@7.service"));
        assert!(!matches("db@*.service", "db@7.service/sub"));
        assert!(!matches("/a/*", "/a/b/c"));
        assert!(matches("/a/**", "/a/b/c"));
        assert!(!matches("db?", "db"));
        assert!(matches("db?", "dbü"));
        assert!(!matches("", "x"));
    }

    #[test]
    fn a_hostile_pattern_takes_no_time_to_speak_of() {
        let pattern = Pattern::new(&("*a".repeat(500) + "b"));
        assert!(!pattern.matches(&"a".repeat(5000)));
    }

    proptest! {
        #[test]
        fn the_quick_way_and_the_definition_agree(pattern in "[a/*?ü]{0,8}", name in "[ab/ü]{0,9}") {
            let chars = |text: &str| text.chars().collect::<Vec<_>>();
            prop_assert_eq!(
                Pattern::new(&pattern).matches(&name),
                slow(&chars(&pattern), &chars(&name)),
            );
        }

        #[test]
        fn what_matches_begins_and_ends_as_the_pattern_does(pattern in "[ab/*?]{0,6}", name in "[ab/]{0,6}") {
            let pattern = Pattern::new(&pattern);
            let fits = name.starts_with(pattern.prefix()) && name.ends_with(pattern.suffix());
            prop_assert!(!pattern.matches(&name) || fits);
        }
    }
}
