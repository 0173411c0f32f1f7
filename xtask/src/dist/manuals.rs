//! Manual pages, in section 8: one for each command, from the definition of the command line and
//! what the command adds to it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use barlease_cli::manual::{ENVIRONMENT, EXAMPLES, EXIT_STATUS, FILES};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use super::VERSION;

pub(super) const SECTION: &str = "8";

/// Writes a page for the command and for each of its commands.
pub(super) fn write(mut command: clap::Command, folder: &Path) -> Result<()> {
    // Gives each command its full name.
    command.build();
    write_one(&command, "", folder)
}

/// `path`: the words after `barlease`.
fn write_one(command: &clap::Command, path: &str, folder: &Path) -> Result<()> {
    for inner in command.get_subcommands().filter(|it| !it.is_hide_set()) {
        let path = format!("{path} {}", inner.get_name());
        write_one(inner, path.trim_start(), folder)?;
    }
    let man = Man::new(command.clone())
        .section(SECTION)
        .source(format!("barlease {VERSION}"))
        .manual("Barlease");
    let name = man.get_filename();
    let page = render(&man, command, path).with_context(|| format!("render {name}"))?;
    fs::write(folder.join(&name), page).with_context(|| format!("write {name}"))
}

fn render(man: &Man, command: &clap::Command, path: &str) -> std::io::Result<Vec<u8>> {
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let mut more = Roff::new();
    table(&mut more, "EXIT STATUS", EXIT_STATUS);
    table(&mut more, "ENVIRONMENT", ENVIRONMENT);
    table(&mut more, "FILES", FILES);
    more.control("SH", ["EXAMPLES"]);
    // Of a group of commands: those of all of them.
    let its = EXAMPLES
        .iter()
        .filter(|(name, _)| path.is_empty() || format!("{name} ").starts_with(&format!("{path} ")));
    for (line, about) in its.flat_map(|(_, examples)| *examples) {
        entry(&mut more, line, about);
    }
    if !path.is_empty() {
        more.control("SH", ["SEE ALSO"]);
        more.text([bold("barlease"), roman(format!("({SECTION})"))]);
    }
    more.to_writer(&mut page)?;
    Ok(page)
}

fn table(page: &mut Roff, heading: &str, rows: &[(&str, &str)]) {
    page.control("SH", [heading]);
    for (name, about) in rows {
        entry(page, name, about);
    }
}

fn entry(page: &mut Roff, name: &str, about: &str) {
    page.control("TP", []);
    page.text([bold(name)]);
    page.text([roman(about)]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(command: &clap::Command, path: &str, all: &mut Vec<String>) {
        all.push(format!("{path}.{SECTION}"));
        for inner in command.get_subcommands() {
            names(inner, &format!("{path}-{}", inner.get_name()), all);
        }
    }

    #[test]
    fn every_command_has_a_page_with_all_sections() {
        let folder = tempfile::tempdir().unwrap();
        let command = || barlease_cli::command().disable_help_subcommand(true);
        write(command(), folder.path()).unwrap();
        let mut wanted = Vec::new();
        names(&command(), "barlease", &mut wanted);
        wanted.sort();
        let entries = fs::read_dir(folder.path()).unwrap();
        let mut made: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        made.sort();
        assert_eq!(made, wanted);
        for name in &made {
            let page = fs::read_to_string(folder.path().join(name)).unwrap();
            // groff reads more only as told, and not every `man` tells it.
            assert!(page.is_ascii(), "{name}");
            for heading in [
                "NAME",
                "SYNOPSIS",
                "OPTIONS",
                "\"EXIT STATUS\"",
                "ENVIRONMENT",
                "FILES",
                "EXAMPLES",
            ] {
                assert!(
                    page.contains(&format!(".SH {heading}\n")),
                    "{name}: {heading}"
                );
            }
            let (_, examples) = page.split_once(".SH EXAMPLES\n").unwrap();
            assert!(examples.contains(".TP"), "{name}: no example");
            let title = page.lines().find(|line| line.starts_with(".TH")).unwrap();
            assert!(title.contains(&format!(" {SECTION} ")), "{title}");
        }
    }
}
