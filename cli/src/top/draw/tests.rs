use barlease_proto::Access;
use barlease_proto::Lifetime;
use barlease_proto::MemoryType;
use barlease_proto::Range;
use barlease_proto::Reason;
use barlease_proto::Waiter;

use super::super::data::Rates;
use super::*;

fn holder(uid: u32, pid: u32) -> Holder {
    Holder {
        uid,
        gid: uid,
        pid,
        unit: None,
        claim: None,
    }
}

fn lease(lease: u64, holder: Holder, range: (u64, u64), state: State) -> (LeaseInfo, Program) {
    let info = LeaseInfo {
        lease,
        pool: "rows".into(),
        device: "card".into(),
        bar: 2,
        ranges: vec![Range {
            offset: range.0,
            length: range.1,
        }],
        size: range.1,
        access: Access::ReadWrite,
        memory_type: MemoryType::Nc,
        lifetime: Lifetime::Connection,
        holder,
        state,
        reasons: 0,
        reason: None,
        since: 1000 * lease,
        expires: None,
        deadline: None,
        usage: None,
    };
    let program = Program {
        exe: Some("/usr/bin/render".into()),
        command: Some("render".into()),
    };
    (info, program)
}

fn view() -> View {
    let pool = |name: &str, bar, at, length, free, waiting| PoolInfo {
        name: name.to_owned(),
        bar,
        at,
        length,
        unit: 4096,
        size: length,
        free,
        waiting,
    };
    let mut revoked = lease(4, holder(1003, 77), (60 << 10, 4 << 10), State::Revoking);
    revoked.0.reason = Some(Reason::Expired);
    let mut reclaimed = lease(3, holder(1001, 70), (16 << 10, 8 << 10), State::Reclaiming);
    reclaimed.0.reason = Some(Reason::Revoked);
    reclaimed.0.deadline = Some(64_500);
    let mut of_unit = lease(2, holder(1002, 71), (8 << 10, 4 << 10), State::Granted);
    of_unit.0.holder.unit = Some("a-unit-with-a-long-name.service".into());
    View {
        devices: vec![DeviceInfo {
            name: "card".into(),
            address: Some("0000:01:00.0".into()),
            state: "open".into(),
            bars: vec![4 << 20, 0, 80 << 10, 0, 0, 0],
            pools: vec![
                pool("rows", 2, 0, 64 << 10, 40 << 10, 1),
                pool("doorbells", 0, 4096, (4 << 20) - 4096, (4 << 20) - 4096, 0),
            ],
        }],
        leases: vec![
            lease(1, holder(1001, 70), (0, 8 << 10), State::Granted),
            of_unit,
            reclaimed,
            revoked,
        ],
        waiters: vec![(
            Waiter {
                pool: "rows".into(),
                size: Some(48 << 10),
                ranges: None,
                access: Access::Read,
                holder: holder(1004, 78),
                deadline: 90_000,
            },
            Program::default(),
        )],
        rates: Rates {
            grants: 12.5,
            ends: 0.0,
            refusals: 1.0,
        },
        now: 60_000,
        trouble: None,
    }
}

fn text(picture: &Picture) -> String {
    let mut bytes = Vec::new();
    picture.print(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn the_picture_at_80_columns() {
    let picture = Ui::new(true).draw(&view(), 80, 14);
    assert_eq!(
        text(&picture),
        "\
barleased  4 leases  1 waiting  12.5 grants/s  0.0 ends/s  1.0 refusals/s
card BAR 0 4M: doorbells 0%
................................................................................
card BAR 2 80K: rows 37%, 1 waiting
AAAAAAAABBBB....AAAAAAAA....................................!!!!----------------
  LEASE POOL       SIZE   UID     PID PROGRAM OR UNIT    AGE  LEFT STATE
>     - rows        48K  1004      78 -                        30s waiting
A     1 rows         8K  1001      70 render             59s       granted
B     2 rows         4K  1002      71 a-unit-with-a-l~   58s       granted
A     3 rows         8K  1001      70 render             57s  4.5s reclaiming: r
C     4 rows         4K  1003      77 render             56s       revoking: exp


q quit  up/down 1-5 of 5  left/right sorted by lease
"
    );
    let styles = |line: usize| -> Vec<(Style, usize)> {
        let line = &picture.lines[line];
        line.iter()
            .map(|(style, text)| (*style, text.len()))
            .collect()
    };
    let (one, other) = (Style::Holder(0), Style::Holder(1));
    let expected = [
        (one, 8),
        (other, 4),
        (Style::Plain, 4),
        (one, 8),
        (Style::Plain, 36),
        (Style::Alarm, 4),
        (Style::Plain, 16),
    ];
    assert_eq!(styles(4), expected);
    let first = |line: usize| [styles(line)[0], (styles(line)[1].0, 0)];
    assert_eq!(first(7), [(one, 1), (Style::Plain, 0)]);
    assert_eq!(first(9), [(one, 1), (Style::Bold, 0)]);
    assert_eq!(styles(5), [(Style::Head, 80)]);
}

#[test]
fn any_size_of_a_terminal_has_a_picture_that_fits() {
    for width in [1, 2, 7, 40, 80, 300] {
        for height in [1, 2, 3, 4, 8, 24, 100] {
            let picture = Ui::new(true).draw(&view(), width, height);
            assert!(picture.lines.len() <= height.into(), "{width} x {height}");
            for line in &picture.lines {
                let length: usize = line.iter().map(|(_, text)| text.len()).sum();
                assert!(length <= width.into(), "{width} x {height}: {line:?}");
            }
        }
    }
    let nothing = Ui::new(true).draw(&View::default(), 80, 24);
    assert!(text(&nothing).starts_with("barleased  0 leases"));
}

#[test]
fn keys_sort_and_scroll_within_what_there_is() {
    let mut ui = Ui::new(true);
    let numbers = |picture: &Picture| -> Vec<String> {
        let text = text(picture);
        let rows = text.lines().skip_while(|line| !line.contains("LEASE"));
        let cell = |line: &str| line.split_whitespace().nth(1).map(str::to_owned);
        rows.skip(1).filter_map(cell).take(3).collect()
    };
    ui.press(Key::Right);
    assert_eq!(numbers(&ui.draw(&view(), 80, 24)), ["-", "1", "3"]);
    ui.press(Key::Left);
    ui.press(Key::Left);
    assert_eq!(numbers(&ui.draw(&view(), 80, 24)), ["-", "1", "3"]);
    for _ in 0..100 {
        ui.press(Key::Down);
    }
    let picture = ui.draw(&view(), 80, 9);
    assert!(text(&picture).contains("of 5"), "{}", text(&picture));
    assert_eq!(numbers(&picture), ["3", "2", "4"]);
    ui.press(Key::PageUp);
    ui.press(Key::PageUp);
    assert_eq!(numbers(&ui.draw(&view(), 80, 9))[0], "-");
}

#[test]
fn holders_keep_their_letters_and_names_move_no_cursor() {
    let mut ui = Ui::new(true);
    let mut view = view();
    ui.draw(&view, 80, 24);
    view.leases.remove(0);
    view.leases.remove(1);
    view.leases[0].0.holder.unit = Some("\u{1b}[2J\u{4e2d}".into());
    view.leases
        .push(lease(9, holder(7, 7), (0, 4096), State::Granted));
    let picture = text(&ui.draw(&view, 80, 24));
    assert!(
        picture.contains("\nB     2 rows         4K  1002      71 ?[2J?  "),
        "{picture}"
    );
    assert!(
        picture.contains("\nA     9 "),
        "the letter is free: {picture}"
    );
    view.trouble = Some("connect: gone".into());
    let picture = text(&ui.draw(&view, 80, 24));
    assert!(picture.starts_with("old: connect: gone\n"), "{picture}");
}

#[test]
fn bytes_have_a_unit() {
    for (number, text) in [
        (0, "0"),
        (1023, "1023"),
        (4096, "4K"),
        (1536 << 10, "1.5M"),
        (63 << 30, "63G"),
        (u64::MAX, "16777215T"),
    ] {
        assert_eq!(bytes(number), text);
    }
}
