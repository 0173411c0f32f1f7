//! The imports of the lab and of xtask: each file knows only those before it.
//!
//! A file and the folder of its name are one room. In each folder the rooms make no circle, and
//! none of them knows the top, which only says what there is and calls it.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Drawing, Reader, Segments, drawing, source};

/// The rooms that are left when those are taken away, again and again, that use no other.
fn circles(mut drawing: Drawing) -> Drawing {
    loop {
        let last: BTreeSet<_> = drawing
            .iter()
            .filter(|(_, uses)| uses.is_empty())
            .map(|(room, _)| room.clone())
            .collect();
        if last.is_empty() {
            return drawing;
        }
        drawing.retain(|room, _| !last.contains(room));
        for uses in drawing.values_mut() {
            uses.retain(|used| !last.contains(used));
        }
    }
}

#[test]
fn nothing_imports_in_a_circle() {
    for package in ["lab", "xtask"] {
        let files = source(package);
        let mut folders: BTreeSet<_> = files.keys().filter_map(|it| it.split_last()).collect();
        folders.retain(|(_, folder)| folder.is_empty() || files.contains_key(*folder));
        let folders: BTreeSet<_> = folders.into_iter().map(|(_, folder)| folder).collect();
        assert!(folders.len() > 3, "{package}: {folders:?}");
        for folder in folders {
            let left = circles(drawing(&files, folder));
            assert!(left.is_empty(), "{package}, folder {folder:?}: {left:#?}");
        }
    }
}

#[test]
fn a_room_of_the_lab_knows_only_those_before_it() {
    let drawing = drawing(&source("lab"), &[]);
    let expected = [
        ("packages", &[][..]),
        ("kernels", &["packages"]),
        ("guests", &["kernels", "packages"]),
    ];
    let expected = expected.map(|(room, uses)| {
        let uses = uses.iter().map(|&used| used.to_owned()).collect();
        (room.to_owned(), uses)
    });
    assert_eq!(drawing, Drawing::from(expected));
}

#[test]
fn every_form_of_a_path_is_read_and_comments_are_not() {
    let text = r#"
        //! [`x`](crate::comment)
        use std::crate_of_others;
        use crate::one::{self, Two, three::{Four, five::*}};
        use super::sibling as other;
        pub(crate) fn f() { format!("{}", crate::six::seven()); self::inner::g(); }
        mod tests { use super::*; use super::super::uncle; use crate::eight; }
    "#;
    let module = ["room", "file"].map(str::to_owned);
    let found: Vec<_> = Reader::read(text, &module)
        .iter()
        .map(|path| path.join("::"))
        .collect();
    assert_eq!(
        found,
        [
            "eight",
            "one",
            "one::Two",
            "one::three::Four",
            "one::three::five",
            "room::file",
            "room::file::inner::g",
            "room::sibling",
            "room::uncle",
            "six::seven",
        ]
    );
}

#[test]
fn a_circle_is_found() {
    let file = |module: &str, text: &str| {
        let module: Segments = module.split("::").map(str::to_owned).collect();
        (module, text.to_owned())
    };
    let files = BTreeMap::from([
        file("room", "mod a; mod b; mod c;"),
        file("room::a", "use super::b::B; use crate::other::C;"),
        file("room::b", "fn f() { crate::room::a::g() }"),
        file("room::c", "use super::a;"),
        file("other", "use crate::Top;"),
    ]);
    let inside = circles(drawing(&files, &["room".to_owned()]));
    assert!(inside.keys().eq(["a", "b", "c"]), "{inside:?}");
    let all = circles(drawing(&files, &[]));
    assert_eq!(all["other"], BTreeSet::from(["the top".to_owned()]));
}
