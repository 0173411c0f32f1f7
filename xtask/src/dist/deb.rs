//! Debian packages, by `dpkg-deb`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use barlease_lab::cache;
use barlease_lab::report::Step;

use super::command::gzip;
use super::stage::Stage;
use super::{Maker, date, fill, output};

/// The maintainer when nobody says otherwise.
const NOBODY: &str = "The Barlease authors <barlease@localhost>";

/// The maker of the packages, as Debian's tools have it: `DEBFULLNAME` and `DEBEMAIL`.
fn maintainer() -> String {
    let Ok(email) = std::env::var("DEBEMAIL") else {
        return NOBODY.to_owned();
    };
    let name = std::env::var("DEBFULLNAME").unwrap_or_else(|_| "The Barlease authors".to_owned());
    format!("{name} <{email}>")
}

/// A package: the name of its templates in `dist/debian/`, and how the file is called.
pub(super) struct Deb<'a> {
    pub(super) template: &'a str,
    pub(super) name: &'a str,
    pub(super) version: &'a str,
    pub(super) arch: &'a str,
    /// The word that `dpkg-deb -Z` takes.
    pub(super) compression: &'a str,
}

impl Deb<'_> {
    /// Adds control file and maintainer scripts to a stage and packs it.
    pub(super) fn pack(
        &self,
        maker: &Maker,
        stage: &Stage,
        words: &[(&str, &str)],
    ) -> Result<PathBuf> {
        let file = maker
            .out
            .join(format!("{}_{}_{}.deb", self.name, self.version, self.arch));
        let step = Step::start(format!("packing {}", self.name));
        let maintainer = maintainer();
        self.changelog(maker, stage, &maintainer)?;
        let size = stage.kib()?.to_string();
        let words = [
            words,
            &[("SIZE", size.as_str()), ("MAINTAINER", &maintainer)],
        ]
        .concat();
        stage.write("DEBIAN/control", self.fill("control", &words)?)?;
        for script in ["postinst", "prerm"] {
            if self.has(script) {
                stage.program(format!("DEBIAN/{script}"), self.fill(script, &words)?)?;
            }
        }
        let new = cache::unfinished(&file);
        let mut build = Command::new("dpkg-deb");
        // Sorts by itself; sets newer times back to the epoch, and everything here is newer.
        build
            .env("SOURCE_DATE_EPOCH", maker.epoch.to_string())
            .args(["--root-owner-group", "--build"])
            .arg(format!("-Z{}", self.compression))
            .arg(stage.root())
            .arg(&new);
        output(&mut build, &format!("pack {}", self.name))?;
        std::fs::rename(&new, &file)?;
        cache::remove(stage.root())?;
        step.done();
        Ok(file)
    }

    /// The changelog for Debian's tools; the changes themselves are in `CHANGELOG.md`.
    fn changelog(&self, maker: &Maker, stage: &Stage, maintainer: &str) -> Result<()> {
        let words = [
            ("SOURCE", self.template),
            ("FULL_VERSION", self.version),
            ("MAINTAINER", maintainer),
            ("DATE", &date(maker.epoch, "--rfc-email")?),
        ];
        let text = fill(Path::new("debian/changelog"), &words)?;
        let place = format!("usr/share/doc/{}/changelog", self.name);
        stage.write(&place, text)?;
        if maintainer == NOBODY {
            let place = format!("usr/share/lintian/overrides/{}", self.name);
            stage.write(place, fill(Path::new("debian/lintian-overrides"), &[])?)?;
        }
        let path = stage.root().join(&place);
        let content = gzip(&path)?;
        stage.write(format!("{place}.gz"), content)?;
        cache::remove(&path)
    }

    fn template(&self, kind: &str) -> PathBuf {
        Path::new("debian").join(format!("{}.{kind}", self.template))
    }

    fn has(&self, kind: &str) -> bool {
        let path = crate::checkout::top()
            .join("dist")
            .join(self.template(kind));
        path.exists()
    }

    fn fill(&self, kind: &str, words: &[(&str, &str)]) -> Result<String> {
        fill(&self.template(kind), words)
    }
}
