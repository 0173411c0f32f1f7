//! Packages that are added to the tool chain by what needs them first.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::packages::apt::{Apt, Package};
use crate::packages::cache;
use crate::packages::plan::Plan;
use crate::packages::sysroot::Sysroot;

/// Some packages, with what they depend on.
pub(crate) struct Extra<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) sysroot: &'a Sysroot,
    pub(crate) names: &'static [&'static str],
    /// The file in the sysroot that says that they are there.
    pub(crate) note: &'static str,
    /// Their description, and their purpose.
    pub(crate) what: &'static str,
    pub(crate) purpose: &'static str,
}

/// The packages that were added to a sysroot.
#[derive(Debug, Serialize, Deserialize)]
struct Added {
    asked: Vec<String>,
    packages: Vec<Package>,
}

impl Extra<'_> {
    /// The packages that were added, if these would be added now.
    pub(crate) fn added(&self) -> Option<Vec<Package>> {
        let added = cache::read_json(&self.sysroot.path(self.note));
        added
            .filter(|added: &Added| added.asked == self.names)
            .map(|added| added.packages)
    }

    /// Adds them unless they are there.
    pub(crate) fn add(&self, apt: &Apt) -> Result<Vec<Package>> {
        if let Some(packages) = self.added() {
            return Ok(packages);
        }
        // At the versions that are there: nothing of it may change.
        let mut wanted: Vec<_> = self
            .plan
            .tools
            .iter()
            .map(|package| format!("{}={}", package.name, package.version))
            .collect();
        wanted.extend(self.names.iter().map(|name| (*name).to_owned()));
        let mut packages = apt.closure(&wanted)?;
        packages.retain(|package| !self.plan.tools.contains(package));
        apt.download(&packages, self.purpose)?;
        let files: Vec<_> = packages.iter().map(|package| apt.file(package)).collect();
        self.sysroot.unpack(&files, self.what)?;
        apt.forget(&packages)?;
        let added = Added {
            asked: self.names.iter().map(|name| (*name).to_owned()).collect(),
            packages: packages.clone(),
        };
        cache::write_json(&self.sysroot.path(self.note), &added)?;
        Ok(packages)
    }
}
