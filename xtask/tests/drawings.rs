//! The drawings of `docs/overview.md`, compared with the code. Those of crates and rooms are
//! written by these tests when `BARLEASE_DRAW` is set.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;
use std::sync::Mutex;

use common::{Drawing, drawing, source, top};

const PAGE: &str = "docs/overview.md";

/// The uses of each that no other of its uses has, directly or not.
fn reduced(all: &Drawing) -> Drawing {
    let reaches = |from: &str, to: &str| {
        let mut open = vec![from.to_owned()];
        let mut seen = BTreeSet::new();
        while let Some(next) = open.pop() {
            if next == to {
                return true;
            }
            if seen.insert(next.clone()) {
                open.extend(all.get(&next).into_iter().flatten().cloned());
            }
        }
        false
    };
    all.iter()
        .map(|(name, uses)| {
            let direct = uses.iter().filter(|used| {
                let mut others = uses.iter().filter(|other| other != used);
                !others.any(|other| reaches(other, used))
            });
            (name.clone(), direct.cloned().collect())
        })
        .collect()
}

/// A line for each, below the lines of all that it uses.
fn lines(all: &Drawing) -> Vec<String> {
    let direct = reduced(all);
    let mut left = all.clone();
    let mut rows = Vec::new();
    while !left.is_empty() {
        let next: Vec<_> = left
            .iter()
            .filter(|(_, uses)| !uses.iter().any(|used| left.contains_key(used)))
            .map(|(name, _)| name.clone())
            .collect();
        assert!(!next.is_empty(), "a circle: {left:?}");
        for name in next {
            left.remove(&name);
            let uses: Vec<_> = direct[&name].iter().map(String::as_str).collect();
            rows.push((name, uses.join(", ")));
        }
    }
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter()
        .map(|(name, uses)| match uses.as_str() {
            "" => name.clone(),
            uses => format!("{name:width$} → {uses}"),
        })
        .collect()
}

/// Compares the block after `mark`, or writes it.
fn compare(mark: &str, lines: &[String]) {
    // Tests run side by side, and both drawings are in one page.
    static PAGE_IS_WRITTEN: Mutex<()> = Mutex::new(());
    let _turn = PAGE_IS_WRITTEN.lock();
    let path = top().join(PAGE);
    let page = fs::read_to_string(&path).unwrap();
    let begin = format!("<!-- {mark} -->\n```text\n");
    let at = page.find(&begin).expect(mark) + begin.len();
    let end = at + page[at..].find("```").unwrap();
    let drawn: String = lines.iter().map(|line| format!("{line}\n")).collect();
    if std::env::var_os("BARLEASE_DRAW").is_some() {
        let page = [&page[..at], &drawn, &page[end..]].concat();
        fs::write(&path, page).unwrap();
        return;
    }
    assert!(
        page[at..end] == drawn,
        "{PAGE} draws the {mark} otherwise than they are. \
         `BARLEASE_DRAW=1 cargo test -p xtask --test drawings` writes them:\n{drawn}"
    );
}

/// The folders of the workspace's crates, and which each uses, but for its tests.
fn crates() -> Drawing {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let said = Command::new(cargo)
        .current_dir(top())
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
        ])
        .output()
        .unwrap();
    assert!(said.status.success(), "{said:?}");
    let said: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
    let packages = said["packages"].as_array().unwrap();
    let top = said["workspace_root"].as_str().unwrap();
    let folders: BTreeMap<_, _> = packages
        .iter()
        .map(|package| {
            let path = package["manifest_path"].as_str().unwrap();
            let folder = path.strip_prefix(top).unwrap().trim_start_matches('/');
            let folder = folder.strip_suffix("/Cargo.toml").unwrap();
            (package["name"].as_str().unwrap(), folder.to_owned())
        })
        .collect();
    let uses = |package: &serde_json::Value| {
        let all = package["dependencies"].as_array().unwrap();
        let uses = all.iter().filter(|it| it["kind"].is_null());
        uses.filter_map(|it| folders.get(it["name"].as_str()?).cloned())
            .collect()
    };
    packages
        .iter()
        .map(|it| (folders[it["name"].as_str().unwrap()].clone(), uses(it)))
        .collect()
}

#[test]
fn the_crates_are_drawn_as_cargo_has_them() {
    let mut all = crates();
    assert!(all.len() > 10, "{all:?}");
    // Kbuild's, which cargo does not know.
    let main = fs::read_to_string(top().join("kmod/src/barlease.rs")).unwrap();
    let compiled = ["abi", "model"].map(str::to_owned);
    for part in &compiled {
        assert!(main.contains(&format!("../../{part}/src/lib.rs")), "{part}");
    }
    all.insert("kmod".to_owned(), BTreeSet::from(compiled));
    compare("crates", &lines(&all));
}

#[test]
fn the_rooms_are_drawn_as_their_files_import() {
    let mut all = Vec::new();
    for (package, folder) in [
        ("lab", ""),
        ("lab", "packages"),
        ("lab", "kernels"),
        ("lab", "guests"),
        ("xtask", ""),
        ("xtask", "guest_tests"),
    ] {
        let inside: Vec<_> = folder.split('/').filter(|it| !it.is_empty()).collect();
        let inside: Vec<_> = inside.into_iter().map(str::to_owned).collect();
        if !all.is_empty() {
            all.push(String::new());
        }
        all.push(format!("{package}/src/{folder}"));
        let drawn = lines(&drawing(&source(package), &inside));
        all.extend(drawn.iter().map(|line| format!("  {line}")));
    }
    compare("rooms", &all);
}

/// The fields of a struct whose type is a lock of ours.
fn locks(text: &str, name: &str) -> BTreeSet<String> {
    let begins = [format!("struct {name} {{"), format!("struct {name}<")];
    let at = begins.iter().find_map(|begin| text.find(begin));
    let at = at.unwrap_or_else(|| panic!("no struct {name}"));
    let body = text[at..].split("\n}").next().unwrap();
    let is_lock = |kind: &str| {
        ["Mutex<", "RwSem<", "Live<"]
            .iter()
            .any(|it| kind.starts_with(it))
    };
    let fields = body.lines().filter_map(|line| line.trim().split_once(": "));
    fields
        .filter(|(_, kind)| is_lock(kind))
        .map(|(field, _)| field.rsplit(' ').next().unwrap().to_owned())
        .collect()
}

#[test]
fn kernel_objects_are_drawn_with_all_their_locks() {
    let page = fs::read_to_string(top().join(PAGE)).unwrap();
    let section = page.split("## Kernel objects").nth(1).unwrap();
    let drawn = section.split("```").nth(1).unwrap();
    let mut objects = BTreeSet::new();
    for line in drawn.lines() {
        let Some((name, rest)) = line.split_once(" (kmod/") else {
            continue;
        };
        let name = name.rsplit(' ').next().unwrap();
        let (file, named) = rest.split_once(')').unwrap();
        let text = fs::read_to_string(top().join("kmod").join(file)).expect(file);
        let named: BTreeSet<_> = named
            .split(',')
            .map(|lock| lock.trim().to_owned())
            .filter(|lock| !lock.is_empty())
            .collect();
        assert_eq!(named, locks(&text, name), "{name}");
        objects.insert(name);
    }
    assert!(objects.len() >= 5, "{objects:?}");
    // No lock is in a struct that is not drawn.
    for entry in fs::read_dir(top().join("kmod/src")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|end| end != "rs") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let names = text.lines().filter_map(|line| {
            let line = line.strip_prefix("pub(crate) ").unwrap_or(line);
            let name = line.strip_prefix("struct ")?.strip_suffix(" {")?;
            name.split('<').next()
        });
        for name in names.filter(|name| !objects.contains(name)) {
            let found = locks(&text, name);
            assert!(found.is_empty(), "{}: {name}: {found:?}", path.display());
        }
    }
}

/// The words in backquotes at the beginning of the items of a numbered list, or of a table's rows.
fn first_words(text: &str, is_item: impl Fn(&str) -> bool) -> Vec<String> {
    let word = |line: &str| {
        let name = line.split('`').nth(1)?;
        let name = name.trim_matches(['[', ']']);
        Some(name.rsplit("::").next()?.to_owned())
    };
    text.lines()
        .filter(|line| is_item(line))
        .filter_map(word)
        .collect()
}

#[test]
fn the_order_of_locks_is_that_of_the_code() {
    let code = fs::read_to_string(top().join("kmod/src/leases.rs")).unwrap();
    let code = code.split("//! # Lock order").nth(1).unwrap();
    let code = code.split("//! # ").next().unwrap();
    let is_number = |line: &str| {
        let line = line.trim_start_matches("//! ");
        line.split_once(". ")
            .is_some_and(|(number, _)| number.parse::<u32>().is_ok())
    };
    let ordered = first_words(code, is_number);
    let page = fs::read_to_string(top().join("docs/locking.md")).unwrap();
    let rows = first_words(&page, |line| line.starts_with("| `"));
    // Those of the kernel have other names in the page's table, or none of their own in the code.
    let both: Vec<_> = rows.iter().filter(|lock| ordered.contains(lock)).collect();
    assert!(both.len() >= 4, "{both:?}");
    assert!(
        ordered.iter().eq(both),
        "{ordered:?}, and in the page {rows:?}"
    );
}
