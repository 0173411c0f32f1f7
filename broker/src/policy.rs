//! The policy's files.

use std::fs;
use std::path::Path;

use barlease_ledger::policy::Names;
use barlease_ledger::policy::Policy;
use nix::unistd::Group;
use nix::unistd::User;

/// Users and groups of the host.
struct Host;

impl Names for Host {
    fn user(&self, name: &str) -> Option<u32> {
        Some(User::from_name(name).ok()??.uid.as_raw())
    }

    fn group(&self, name: &str) -> Option<u32> {
        Some(Group::from_name(name).ok()??.gid.as_raw())
    }
}

/// Reads all `*.toml` of a directory, by name, as one policy.
///
/// # Errors
///
/// All that is wrong, each with its file, and its line where there is one.
pub fn read(directory: &Path) -> Result<Policy, Vec<String>> {
    let failed = |path: &Path, error: std::io::Error| vec![format!("{}: {error}", path.display())];
    let entries = fs::read_dir(directory).map_err(|error| failed(directory, error))?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| failed(directory, error))?.path();
        if path.extension().is_some_and(|end| end == "toml") {
            let text = fs::read_to_string(&path).map_err(|error| failed(&path, error))?;
            files.push((path.display().to_string(), text));
        }
    }
    files.sort();
    let texts: Vec<_> = files
        .iter()
        .map(|(name, text)| (name.as_str(), text.as_str()))
        .collect();
    Policy::parse(&texts, &Host).map_err(|errors| errors.iter().map(ToString::to_string).collect())
}
