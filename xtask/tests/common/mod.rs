//! The drawing of a crate's imports, as its files have them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// The segments of a path, as `["guests", "run", "Run"]`.
pub(crate) type Segments = Vec<String>;

/// The rooms that each room uses.
pub(crate) type Drawing = BTreeMap<String, BTreeSet<String>>;

/// The paths of a crate's own that a file has, from the top of the crate. Comments have none.
pub(crate) struct Reader {
    found: BTreeSet<Segments>,
}

impl Reader {
    pub(crate) fn read(text: &str, module: &[String]) -> BTreeSet<Segments> {
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

    /// The part after `::`: a name, a list, or all.
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

/// The top folder of the checkout.
pub(crate) fn top() -> PathBuf {
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
pub(crate) fn drawing(files: &BTreeMap<Segments, String>, folder: &[String]) -> Drawing {
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

/// The files of a package, by their modules.
pub(crate) fn source(package: &str) -> BTreeMap<Segments, String> {
    let mut found = BTreeMap::new();
    files(&top().join(package).join("src"), &[], &mut found);
    found
}
