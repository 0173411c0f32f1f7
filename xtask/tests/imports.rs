//! The imports of the lab and of xtask: each file knows only those before it.
//!
//! A file and the folder of its name are one room. In each folder the rooms make no circle, and
//! none of them knows the top, which only says what there is and calls it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// The segments of a path, as `["guests", "run", "Run"]`.
type Segments = Vec<String>;

/// What each room uses.
type Drawing = BTreeMap<String, BTreeSet<String>>;

/// The paths of a crate's own that a file has, from the top of the crate. Comments have none.
struct Reader {
    found: BTreeSet<Segments>,
}

impl Reader {
    fn read(text: &str, module: &[String]) -> BTreeSet<Segments> {
        let mut reader = Self {
            found: BTreeSet::new(),
        };
        reader.tokens(text.parse().unwrap(), module);
        reader.found
    }

    fn tokens(&mut self, tokens: TokenStream, module: &[String]) {
        let tokens: Vec<_> = tokens.into_iter().collect();
        for (at, token) in tokens.iter().enumerate() {
            match token {
                TokenTree::Group(group) => {
                    let named = match tokens[..at] {
                        [.., TokenTree::Ident(ref word), TokenTree::Ident(ref name)]
                            if word == "mod" =>
                        {
                            Some(name.to_string())
                        }
                        _ => None,
                    };
                    let inside: Segments = module.iter().cloned().chain(named).collect();
                    self.tokens(group.stream(), &inside);
                }
                // Not the `self` of a list, nor the `crate` of `pub(crate)`.
                TokenTree::Ident(word) if is_path(&tokens[at + 1..]) => {
                    let start = match word.to_string().as_str() {
                        "crate" => Vec::new(),
                        "self" => module.to_owned(),
                        "super" if !is_after_path(&tokens[..at]) => {
                            module[..module.len() - 1].to_owned()
                        }
                        _ => continue,
                    };
                    self.tree(&tokens[at + 3..], start);
                }
                _ => {}
            }
        }
    }

    /// What comes after `::`: a name, a list, or all.
    fn tree(&mut self, tokens: &[TokenTree], mut before: Segments) {
        match tokens.first() {
            Some(TokenTree::Ident(word)) => {
                match word.to_string().as_str() {
                    "super" => drop(before.pop()),
                    "self" => {}
                    name => before.push(name.to_owned()),
                }
                if is_path(&tokens[1..]) {
                    self.tree(&tokens[3..], before);
                } else {
                    self.found.insert(before);
                }
            }
            Some(TokenTree::Group(list)) if list.delimiter() == Delimiter::Brace => {
                let list: Vec<_> = list.stream().into_iter().collect();
                let is_comma =
                    |it: &TokenTree| matches!(it, TokenTree::Punct(p) if p.as_char() == ',');
                for item in list.split(is_comma).filter(|item| !item.is_empty()) {
                    self.tree(item, before.clone());
                }
            }
            _ => drop(self.found.insert(before)),
        }
    }
}

fn is_colon(token: &TokenTree) -> bool {
    matches!(token, TokenTree::Punct(p) if p.as_char() == ':')
}

/// Whether `::` comes next.
fn is_path(tokens: &[TokenTree]) -> bool {
    tokens.len() > 2 && tokens[..2].iter().all(is_colon)
}

fn is_after_path(tokens: &[TokenTree]) -> bool {
    tokens.last().is_some_and(is_colon)
}

fn top() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap().to_owned()
}

/// The files below a folder, by their modules; that of the top is empty.
fn files(folder: &Path, module: &[String], found: &mut BTreeMap<Segments, String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let mut inside = module.to_owned();
        if !["lib", "main"].contains(&name.as_str()) {
            inside.push(name);
        }
        if path.is_dir() {
            files(&path, &inside, found);
        } else if path.extension().is_some_and(|end| end == "rs") {
            found.insert(inside, fs::read_to_string(&path).unwrap());
        }
    }
}

/// The rooms of a folder, and which of them each uses. The top of the crate is called so.
fn drawing(files: &BTreeMap<Segments, String>, folder: &[String]) -> Drawing {
    let mut drawing = Drawing::new();
    for (module, text) in files {
        let Some([room, ..]) = module.strip_prefix(folder) else {
            continue;
        };
        let uses = drawing.entry(room.clone()).or_default();
        for path in Reader::read(text, module) {
            let is_top = path
                .first()
                .is_none_or(|first| !files.contains_key(std::slice::from_ref(first)));
            if is_top {
                uses.insert("the top".to_owned());
            } else if let Some([used, ..]) = path.strip_prefix(folder) {
                let is_room = files.contains_key(&[folder, std::slice::from_ref(used)].concat());
                if is_room && used != room {
                    uses.insert(used.clone());
                }
            }
        }
    }
    drawing
}

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

fn source(package: &str) -> BTreeMap<Segments, String> {
    let mut found = BTreeMap::new();
    files(&top().join(package).join("src"), &[], &mut found);
    found
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
