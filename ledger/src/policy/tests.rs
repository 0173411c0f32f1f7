use std::fmt::Write;

use proptest::prelude::*;

use super::*;
use crate::types::Peer;

struct Host;

impl Names for Host {
    fn user(&self, name: &str) -> Option<u32> {
        match name {
            "root" => Some(0),
            "alice" => Some(1001),
            _ => None,
        }
    }

    fn group(&self, name: &str) -> Option<u32> {
        (name == "video").then_some(44)
    }
}

const BASE: &str = r#"
[device.card]
match = "0000:01:00.0"

[pool.rows]
device = "card"
bar = 2
length = "64M"
unit = "4K"
contents = "memory"
scrub = "zero"

[pool.doorbells]
device = "card"
bar = 0
length = "16K"
unit = "4K"
"#;

fn parse(rules: &str) -> Result<Policy, Vec<PolicyError>> {
    Policy::parse(&[("10-base.toml", BASE), ("20-rules.toml", rules)], &Host)
}

fn errors(file: &str) -> String {
    let errors = Policy::parse(&[("p.toml", file)], &Host).unwrap_err();
    errors.iter().map(|error| format!("{error}\n")).collect()
}

fn peer(uid: u32) -> Peer {
    Peer {
        uid,
        gid: uid,
        groups: [].into(),
        pid: 1,
        process: None,
        cgroup: None,
        cgroup_path: "".into(),
        unit: "".into(),
        claim: None,
    }
}

fn question<'a>(policy: &Policy, peer: &'a Peer, pool: &str) -> Question<'a> {
    Question {
        peer,
        pool: policy.pool_named(pool).unwrap(),
        access: Access::ReadWrite,
        lifetime: Lifetime::Connection,
        steering_tags: false,
    }
}

#[test]
fn nothing_is_allowed_without_a_rule() {
    let policy = parse("").unwrap();
    assert_eq!(policy.decide(&question(&policy, &peer(0), "rows")), None);
}

#[test]
fn a_rule_allows_what_it_says_and_no_more() {
    let policy = parse(
        r#"
        [[allow]]
        pools = ["rows"]
        who = { user = "alice" }
        access = "read"
        lifetime = ["process"]
        "#,
    )
    .unwrap();
    let alice = peer(1001);
    let right = Question {
        access: Access::Read,
        lifetime: Lifetime::Process,
        ..question(&policy, &alice, "rows")
    };
    let doorbells = policy.pool_named("doorbells").unwrap();
    assert!(policy.decide(&right).is_some());
    for (wrong, outcome) in [
        (
            Question {
                access: Access::ReadWrite,
                ..right
            },
            Outcome::Access,
        ),
        (
            Question {
                lifetime: Lifetime::Claim,
                ..right
            },
            Outcome::Lifetime,
        ),
        (
            Question {
                steering_tags: true,
                ..right
            },
            Outcome::SteeringTags,
        ),
        (
            Question {
                peer: &peer(1002),
                ..right
            },
            Outcome::Others("user"),
        ),
    ] {
        assert_eq!(policy.decide(&wrong), None, "{wrong:?}");
        let explained = policy.explain(&wrong);
        assert_eq!(explained.len(), 1);
        assert_eq!(explained[0].1, outcome);
        assert_eq!(explained[0].0.to_string(), "20-rules.toml:4");
    }
    let other_pool = Question {
        pool: doorbells,
        ..right
    };
    assert_eq!(policy.decide(&other_pool), None);
    assert_eq!(policy.explain(&other_pool), []);
}

#[test]
fn each_unit_of_time_is_one_for_every_key() {
    for (written, millis) in [
        ("250ms", 250),
        ("30s", 30_000),
        ("2m", 120_000),
        ("2min", 120_000),
        ("1h", 3_600_000),
        ("1d", 86_400_000),
    ] {
        let rule = format!(
            "[[allow]]\npools = [\"rows\"]\nwho = {{ user = \"*\" }}\naccess = \"read-write\"\n\
             max-ttl = \"{written}\"\ngrace = \"{written}\"\nqueue = \"{written}\"\n"
        );
        let policy = parse(&rule).unwrap();
        let terms = policy.decide(&question(&policy, &peer(1), "rows")).unwrap();
        let all = (terms.max_ttl.unwrap(), terms.grace, terms.wait);
        assert_eq!(all, (Millis(millis), Millis(millis), Millis(millis)));
    }
    let wrong =
        "[[allow]]\npools = [\"rows\"]\nwho = { user = 1 }\naccess = \"read\"\nqueue = \"1M\"\n";
    let said = parse(wrong).unwrap_err()[0].to_string();
    assert!(said.contains("queue") && said.contains("30s"), "{said}");
}

#[test]
fn the_smallest_limit_of_the_rules_that_match_counts_for_each_kind_of_subject() {
    let policy = parse(
        r#"
        [[allow]]
        pools = ["*"]
        who = { user = "*" }
        access = "read-write"
        max-leases = 9
        max-ttl = "1h"
        grace = "5s"
        queue = "30s"
        [[allow]]
        pools = ["rows"]
        who = { user = "alice" }
        access = "read-write"
        max-leases = 4
        max-bytes = "1M"
        grace = "2s"
        queue = "1min"
        [[allow]]
        pools = ["rows"]
        who = { unit = "db@*.service" }
        access = "read-write"
        max-leases = 2
        [[allow]]
        pools = ["rows"]
        who = { user = "alice" }
        access = "read"
        max-leases = 1
        "#,
    )
    .unwrap();
    let alice = Peer {
        unit: "db@7.service".into(),
        ..peer(1001)
    };
    let terms = policy.decide(&question(&policy, &alice, "rows")).unwrap();
    assert_eq!(terms.rule, 0);
    assert_eq!(
        terms.user,
        Limits {
            leases: Some((4, 1)),
            bytes: Some((1 << 20, 1))
        }
    );
    assert_eq!(
        terms.unit,
        Limits {
            leases: Some((2, 2)),
            bytes: None
        }
    );
    assert_eq!(terms.claim, Limits::default());
    assert_eq!(terms.max_ttl, Some(Millis(3_600_000)));
    assert_eq!((terms.grace, terms.wait), (Millis(5000), Millis(60_000)));
}

#[test]
fn all_keys_of_who_must_fit_and_one_of_each_list() {
    let policy = parse(
        r#"
        [[allow]]
        pools = ["rows"]
        who = { group = ["video", 7], cgroup = "/kubepods.slice/**", claim = "a-*" }
        access = "read-write"
        "#,
    )
    .unwrap();
    let right = Peer {
        groups: [3, 7].into(),
        cgroup_path: "/kubepods.slice/pod1/c".into(),
        claim: Some("a-1".into()),
        ..peer(5)
    };
    let decide = |peer: &Peer| policy.decide(&question(&policy, peer, "rows")).is_some();
    assert!(decide(&right));
    assert!(decide(&Peer {
        gid: 44,
        groups: [].into(),
        ..right.clone()
    }));
    assert!(!decide(&Peer {
        groups: [].into(),
        ..right.clone()
    }));
    assert!(!decide(&Peer {
        cgroup_path: "/user.slice".into(),
        ..right.clone()
    }));
    assert!(!decide(&Peer {
        claim: None,
        ..right.clone()
    }));
    assert!(!decide(&Peer {
        claim: Some("b".into()),
        ..right
    }));
}

/// A container chooses its users and groups.
#[test]
fn a_claim_is_no_user_of_the_host() {
    let policy = parse(
        r#"
        [[allow]]
        pools = ["rows"]
        who = { user = 5 }
        access = "read-write"
        max-leases = 1

        [[allow]]
        pools = ["rows"]
        who = { group = 7 }
        access = "read-write"
        "#,
    )
    .unwrap();
    let decide = |peer: &Peer| policy.decide(&question(&policy, peer, "rows")).is_some();
    let user = Peer { gid: 7, ..peer(5) };
    assert!(decide(&user));
    let claim = Peer {
        claim: Some("pod".into()),
        ..user
    };
    assert!(!decide(&claim));
    assert!(claim.subjects().eq([Subject::Claim("pod".into())]));
}

#[test]
fn an_error_names_file_line_and_key() {
    for (file, expected) in [
        (
            "[device.x]\nmatch = \"0000:01:00.0\"\ncolour = 1\n",
            "p.toml:3: device.x.colour: unknown field `colour`",
        ),
        (
            "[device.x]\n\nmatch = \"nonsense\"\n",
            "p.toml:3: device.x.match: not an address",
        ),
        ("[device.x\n", "p.toml:1: device.x: "),
        ("whatever = 1\n", "p.toml:1: whatever: unknown field"),
        (
            "[pool.p]\ndevice = \"y\"\nbar = 0\nunit = 4096\n",
            "p.toml:2: pool.p.device: there is no device y",
        ),
        (
            "\n[[allow]]\npools = [\n  \"rows\",\n]\nwho = { user = 1 }\naccess = \"read\"\n",
            "p.toml:4: allow: there is no pool rows",
        ),
        (
            "[[allow]]\npools = []\nwho = { user = \"bob\" }\naccess = \"read\"\n",
            "p.toml:3: allow.who: there is no user \"bob\"",
        ),
        (
            "[[allow]]\npools = []\nwho = { }\naccess = \"read\"\n",
            "p.toml:3: allow.who: whom?",
        ),
        (
            "[[allow]]\npools = []\nwho = { user = 1 }\naccess = \"read\"\nmax-ttl = 5\n",
            "p.toml:5: allow.max-ttl: invalid value: integer `5`, expected a time with its unit",
        ),
        (
            "[[allow]]\npools = []\nwho = { user = 1 }\naccess = \"read\"\nmax-bytes = \"5X\"\n",
            "p.toml:5: allow.max-bytes: ",
        ),
        (
            "[[allow]]\npools = []\nwho = { user = 1 }\naccess = \"read\"\nmax-leases = 0\n",
            "p.toml:5: allow.max-leases: ",
        ),
        (
            "[[allow]]\npools = []\naccess = \"read\"\n",
            "p.toml:1: allow: missing field `who`",
        ),
    ] {
        let text = errors(file);
        assert!(text.starts_with(expected), "{file}\n{text}");
    }
}

#[test]
fn all_that_is_wrong_is_said_at_once() {
    let text = errors("[device.x]\nmatch=\"a\"\n[device.y]\nmatch=\"b\"\n");
    assert_eq!(text.lines().count(), 2, "{text}");
}

#[test]
fn pools_that_cannot_be_right_are_refused() {
    let pool = |lines: &str| {
        format!("[device.card]\nmatch = \"1af4:1110\"\n[pool.p]\ndevice = \"card\"\n{lines}")
    };
    for (lines, expected) in [
        (
            "bar = 6\nunit = 4096",
            "p.toml:5: pool.p.bar: a BAR is 0 to 5",
        ),
        ("bar = 0\nunit = 0", "p.toml:6: pool.p.unit: "),
        ("bar = 0\nunit = 1000", "p.toml:6: pool.p.unit: "),
        ("bar = 0\nunit = 4096\nat = 12", "p.toml:7: pool.p.at: "),
        (
            "bar = 0\nunit = \"8K\"\nlength = \"12K\"",
            "p.toml:7: pool.p.length: ",
        ),
        (
            "bar = 0\nunit = 4096\nlength = \"1T\"",
            "p.toml:7: pool.p.length: more than",
        ),
        (
            "bar = 0\nunit = 4096\nscrub = \"zero\"",
            "p.toml:7: pool.p.scrub: registers are never",
        ),
        (
            "bar = 0\nunit = 4096\ncontents = \"memory\"\noverlap = \"shared\"\nscrub = 7",
            "p.toml:9: pool.p.scrub: what others",
        ),
        (
            "bar = 0\nunit = 4096\n[pool.q]\ndevice = \"card\"\nbar = 0\nat = \"1G\"\nunit = 4096",
            "p.toml:8: pool.q.device: overlaps the pool p (p.toml:4)",
        ),
    ] {
        let text = errors(&pool(lines));
        assert!(text.starts_with(expected), "{lines}\n{text}");
    }
}

#[test]
fn a_name_that_comes_twice_is_refused() {
    let files = [
        ("a.toml", BASE),
        ("b.toml", "[device.card]\nmatch = \"slot:7\"\n"),
    ];
    let errors = Policy::parse(&files, &Host).unwrap_err();
    let text = errors[0].to_string();
    assert_eq!(
        text,
        "b.toml:2: device.card.match: the device card is in a.toml:3, too"
    );
}

#[test]
fn defaults_are_the_careful_ones() {
    let policy = parse("").unwrap();
    let doorbells = &policy.pools()[policy.pool_named("doorbells").unwrap()];
    assert!(doorbells.contiguous);
    assert_eq!(doorbells.scrub, Scrub::None);
    assert_eq!(doorbells.overlap, Overlap::Exclusive);
    assert_eq!(doorbells.memory_types, [MemoryType::Uncached]);
    let rows = &policy.pools()[policy.pool_named("rows").unwrap()];
    assert!(!rows.contiguous);
    assert_eq!(rows.scrub, Scrub::Pattern(0));
    assert!(!policy.devices()[0].bus_master);
    assert!(!policy.revokes());
}

#[test]
fn a_device_is_found_by_what_is_written() {
    for (text, expected) in [
        (
            "0000:01:00.0",
            Some(Match::Address("0000:01:00.0".to_owned())),
        ),
        (
            "10000:E1:1f.7",
            Some(Match::Address("10000:e1:1f.7".to_owned())),
        ),
        ("1af4:1110", Some(Match::Ids(0x1af4, 0x1110))),
        ("slot:3-1", Some(Match::Slot("3-1".to_owned()))),
        (
            "serial:52-54-00-ff-ff-12-34-5A",
            Some(Match::Serial(Serial(0x5254_00ff_ff12_345a))),
        ),
        (
            "serial:525400ffff12345a",
            Some(Match::Serial(Serial(0x5254_00ff_ff12_345a))),
        ),
        ("serial:7", None),
        ("serial:5254-00ff-ff12-345a", None),
        ("serial:52-54-00-ff-ff-12-34-5a-00", None),
        ("serial:52-54-00-ff-ff-12-34-é", None),
        ("serial:", None),
        ("01:00.0", None),
        ("0000:01:20.0", None),
        ("0000:01:00.8", None),
        ("+000:01:00.0", None),
        ("", None),
    ] {
        assert_eq!(parse_match(text), expected, "{text}");
    }
}

#[cfg(feature = "schema")]
#[test]
fn the_schema_has_every_key_and_takes_no_other() {
    let schema = serde_json::to_string(&schema()).unwrap();
    for key in [
        "revoke-what-is-no-longer-allowed",
        "max-leases",
        "steering-tags",
        "contents",
    ] {
        assert!(schema.contains(&format!("\"{key}\"")), "{key}");
    }
    assert!(schema.contains("\"additionalProperties\":false"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The index leaves out no rule: the terms are those of all rules, one after the other.
    #[test]
    fn the_index_finds_every_rule_that_allows(
        rules in prop::collection::vec((0u8..6, 0u32..4, any::<bool>(), 1u32..9), 0..30),
        uid in 0u32..4,
        group in 0u32..4,
        unit in "[ab]{0,3}",
        claim in prop::option::of("[ab]{1,3}"),
    ) {
        let mut text = String::new();
        for (kind, number, star, leases) in rules {
            let literal = ["a", "ab", "b", ""][number as usize];
            let pattern = match (star, leases % 2) {
                (true, 0) => format!("{literal}*"),
                (true, _) => format!("*{literal}"),
                (false, _) => literal.to_owned(),
            };
            let who = match kind {
                0 => format!("user = {number}"),
                1 => format!("group = [{number}, 9]"),
                2 => format!("unit = [\"{pattern}\", \"b\"]"),
                3 => format!("claim = \"{pattern}\""),
                4 => format!("cgroup = \"/{pattern}\""),
                _ => "user = \"*\"".to_owned(),
            };
            writeln!(
                text,
                "[[allow]]\npools=[\"rows\"]\nwho={{{who}}}\naccess=\"read-write\"\n\
                 max-leases={leases}"
            )
            .unwrap();
        }
        let policy = parse(&text).unwrap();
        let peer = Peer {
            gid: 7,
            groups: [group].into(),
            cgroup_path: format!("/{unit}").into(),
            unit: unit.into(),
            claim: claim.map(Into::into),
            ..peer(uid)
        };
        let question = question(&policy, &peer, "rows");
        let mut expected = None;
        for (number, rule) in (0..).zip(&policy.rules) {
            if rule.answer(&question) == Outcome::Allows {
                rule.add_to(&mut expected, number);
            }
        }
        let decided = policy.decide(&question);
        let values = |terms: &Option<Terms>| terms.as_ref().map(|terms| {
            let value = |limits: &Limits| limits.leases.map(|(leases, _)| leases);
            (terms.rule, value(&terms.user), value(&terms.unit), value(&terms.claim))
        });
        prop_assert_eq!(values(&decided), values(&expected));
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in "(?s).{0,200}") {
        let _ = Policy::parse(&[("x", &text)], &Host);
    }
}
