//! The documentation: each link in it leads somewhere, the files that it names exist, and the book
//! has every page.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

/// Folders without documentation of ours.
const ELSEWHERE: &[&str] = &["target", ".git", "corpus", "artifacts"];

fn top() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap().to_owned()
}

/// A page: its links, and the anchors of its headings.
#[derive(Debug, Default)]
struct Page {
    links: Vec<String>,
    anchors: BTreeSet<String>,
    /// The texts in backquotes.
    code: Vec<String>,
}

impl Page {
    fn of(text: &str) -> Self {
        let mut page = Self::default();
        let mut heading = None;
        let mut seen = BTreeMap::<String, usize>::new();
        for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
            if let Event::Code(part) = &event {
                page.code.push(part.to_string());
            }
            match event {
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    page.links.push(dest_url.into_string());
                }
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::End(TagEnd::Heading(_)) => {
                    let anchor = anchor(&heading.take().unwrap_or_default());
                    let before = seen.entry(anchor.clone()).or_default();
                    page.anchors.insert(match *before {
                        0 => anchor,
                        times => format!("{anchor}-{times}"),
                    });
                    *before += 1;
                }
                Event::Text(part) | Event::Code(part) => {
                    if let Some(heading) = &mut heading {
                        heading.push_str(&part);
                    }
                }
                _ => {}
            }
        }
        page
    }
}

/// The anchor of a heading, by the rule of GitHub, which mdBook has too.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().chars().filter_map(|c| match c {
        ' ' => Some('-'),
        '-' | '_' => Some(c),
        c if c.is_alphanumeric() => Some(c),
        _ => None,
    });
    kept.flat_map(char::to_lowercase).collect()
}

/// The Markdown files below `folder`.
fn pages(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if entry.file_type().unwrap().is_dir() {
            if !ELSEWHERE.contains(&name.as_str()) {
                pages(&entry.path(), found);
            }
        } else if Path::new(&name).extension().is_some_and(|end| end == "md") {
            found.push(entry.path());
        }
    }
}

/// `path` without `.` and `..`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                plain.pop();
            }
            part => plain.push(part),
        }
    }
    plain
}

/// Why a link of the page at `from` leads nowhere, if it does not lead somewhere.
fn fault(from: &Path, link: &str, pages: &BTreeMap<PathBuf, Page>) -> Option<String> {
    if link.contains("://") || link.starts_with("mailto:") {
        return None;
    }
    let (file, anchor) = match link.split_once('#') {
        None => (link, None),
        Some((file, anchor)) => (file, Some(anchor)),
    };
    let target = match file {
        "" => from.to_owned(),
        file => plain(&from.parent()?.join(file)),
    };
    if !target.exists() {
        return Some(format!("there is no {}", target.display()));
    }
    match (anchor, pages.get(&target)) {
        (Some(anchor), Some(page)) if !page.anchors.contains(anchor) => {
            Some(format!("{} has no heading #{anchor}", target.display()))
        }
        _ => None,
    }
}

fn all() -> BTreeMap<PathBuf, Page> {
    let mut found = Vec::new();
    pages(&top(), &mut found);
    let read = |path: PathBuf| {
        let page = Page::of(&fs::read_to_string(&path).unwrap());
        (path, page)
    };
    found.into_iter().map(read).collect()
}

#[test]
fn every_link_leads_somewhere() {
    let pages = all();
    let links: usize = pages.values().map(|page| page.links.len()).sum();
    assert!(links > 100, "{links} links in {} pages", pages.len());
    let mut faults = Vec::new();
    for (path, page) in &pages {
        for link in &page.links {
            if let Some(fault) = fault(path, link, &pages) {
                faults.push(format!("{}: {link}: {fault}", path.display()));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// Whether it is the name of a file or folder of the checkout, from its top. Words in capitals
/// stand for something else, and a `*` for any file.
fn is_file(word: &str, folders: &BTreeSet<String>) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    let is_place_holder =
        |part: &str| part.len() > 2 && part.chars().all(|c| c.is_ascii_uppercase());
    let Some((folder, _)) = word.split_once('/') else {
        return false;
    };
    folders.contains(folder)
        && word.chars().all(is_plain)
        && !word.split(['/', '.']).any(is_place_holder)
}

/// The folders at the top of the checkout.
fn folders() -> BTreeSet<String> {
    let entries = fs::read_dir(top()).unwrap().map(|entry| entry.unwrap());
    let folders = entries.filter(|entry| entry.file_type().unwrap().is_dir());
    let names = folders.map(|entry| entry.file_name().into_string().unwrap());
    // Builds make it.
    names.filter(|name| name != "target").collect()
}

#[test]
fn every_file_that_a_page_names_exists() {
    let folders = folders();
    let (mut named, mut absent) = (0, Vec::new());
    for (path, page) in all() {
        // The changelog of an earlier version stays as it was.
        if path.ends_with("CHANGELOG.md") {
            continue;
        }
        for word in page.code.iter().filter(|word| is_file(word, &folders)) {
            named += 1;
            let beside = path.parent().unwrap().join(word);
            if !top().join(word).exists() && !beside.exists() {
                absent.push(format!("{}: {word}", path.display()));
            }
        }
    }
    assert!(named > 100, "{named} names");
    assert!(absent.is_empty(), "{}", absent.join("\n"));
}

#[test]
fn every_page_is_in_the_book() {
    let docs = top().join("docs");
    let summary = docs.join("SUMMARY.md");
    let pages = all();
    let links = pages[&summary].links.iter();
    let named: BTreeSet<_> = links.map(|link| docs.join(link)).collect();
    let there = pages.keys().filter(|path| path.starts_with(&docs));
    let there: BTreeSet<_> = there.filter(|path| **path != summary).cloned().collect();
    assert_eq!(named, there);
}

#[test]
fn links_that_lead_nowhere_are_found() {
    let here = top().join("docs/here.md");
    let text = "# One `two`, three\n\n# One\n\n# One\n\n[a](#one-two-three) [b](#one-1) [c](#four)\n\
                [d](nowhere.md) [e](../Cargo.toml) [f](https://example.org/#x)\n";
    let readme = top().join("README.md");
    let pages = BTreeMap::from([(readme.clone(), Page::of(text))]);
    let links = pages[&readme].links.iter();
    let faults: Vec<_> = links
        .filter(|link| fault(&readme, link, &pages).is_some())
        .collect();
    assert_eq!(faults, ["#four", "nowhere.md", "../Cargo.toml"]);
    assert_eq!(fault(&here, "../Cargo.toml", &pages), None);
}
