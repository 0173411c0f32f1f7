//! Files of a policy.

use std::fs;
use std::path::Path;
use std::path::PathBuf;

use barlease_ledger::policy::Names;
use barlease_ledger::policy::Policy;
use barlease_ledger::policy::PolicyError;

use crate::failure::Failure;
use crate::names;

/// Users and groups of this host.
struct Host;

impl Names for Host {
    fn user(&self, name: &str) -> Option<u32> {
        names::user(name).ok()
    }

    fn group(&self, name: &str) -> Option<u32> {
        names::group(name).ok()
    }
}

/// Texts by the names of their files.
pub(super) struct Files(Vec<(String, String)>);

impl Files {
    /// Reads files, and the `*.toml` of directories, as the service does.
    pub(super) fn read(paths: &[PathBuf]) -> Result<Self, Failure> {
        let failed = |path: &Path, error| Failure::file("read", path, &error);
        let mut files = Vec::new();
        for path in paths {
            if !path.is_dir() {
                files.push(path.clone());
                continue;
            }
            let mut found = Vec::new();
            for entry in fs::read_dir(path).map_err(|error| failed(path, error))? {
                let file = entry.map_err(|error| failed(path, error))?.path();
                if file.extension().is_some_and(|end| end == "toml") {
                    found.push(file);
                }
            }
            found.sort();
            files.extend(found);
        }
        let text = |path: PathBuf| {
            let text = fs::read_to_string(&path).map_err(|error| failed(&path, error))?;
            Ok((path.display().to_string(), text))
        };
        files
            .into_iter()
            .map(text)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// As one policy.
    pub(super) fn parse(&self) -> Result<Policy, Vec<PolicyError>> {
        let texts = self.0.iter();
        let texts: Vec<_> = texts
            .map(|(name, text)| (name.as_str(), text.as_str()))
            .collect();
        Policy::parse(&texts, &Host)
    }
}
