//! Debian packages, by `dpkg-deb`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use barlease_lab::cache;
use barlease_lab::report::Step;

use super::command::gzip;
use super::stage::Stage;
use super::{Maker, date, fill, output};
use crate::checkout;

/// The maintainer when nobody says otherwise.
const NOBODY: &str = "The Barlease authors <barlease@localhost>";

/// The maker of the packages, as Debian's tools have it: `DEBFULLNAME` and `DEBEMAIL`.
pub(super) fn maintainer() -> String {
    let Ok(email) = std::env::var("DEBEMAIL") else {
        return NOBODY.to_owned();
    };
    let name = std::env::var("DEBFULLNAME").unwrap_or_else(|_| "The Barlease authors".to_owned());
    format!("{name} <{email}>")
}

/// A package: its templates in `dist/debian/`, and how the file is called.
pub(super) struct Deb<'a> {
    /// The name of the template of its control file.
    pub(super) template: &'a str,
    /// That of the templates of its maintainer scripts, if it has any.
    pub(super) scripts: &'a str,
    pub(super) name: &'a str,
    pub(super) version: &'a str,
    pub(super) arch: &'a str,
    /// The word that `dpkg-deb -Z` takes.
    pub(super) compression: &'a str,
}

impl<'a> Deb<'a> {
    /// One for this architecture, with templates of its own name.
    pub(super) fn new(name: &'a str, version: &'a str) -> Self {
        Self {
            template: name,
            scripts: name,
            name,
            version,
            arch: "amd64",
            compression: "xz",
        }
    }

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
            &[
                ("SIZE", size.as_str()),
                ("MAINTAINER", &maintainer),
                ("PACKAGE", self.name),
                ("VERSION", self.version),
            ],
        ]
        .concat();
        let control = fill(&template(self.template, "control"), &words)?;
        stage.write("DEBIAN/control", control)?;
        for script in ["postinst", "prerm", "postrm"] {
            let template = template(self.scripts, script);
            if checkout::top().join("dist").join(&template).exists() {
                stage.program(format!("DEBIAN/{script}"), fill(&template, &words)?)?;
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
        let place = format!("usr/share/doc/{}/changelog", self.name);
        stage.write(&place, changelog(maker, self.template, self.version)?)?;
        let mut overrides = String::new();
        if maintainer == NOBODY {
            overrides += &fill(Path::new("debian/lintian-overrides"), &[])?;
        }
        let own = template(self.template, "lintian-overrides");
        if checkout::top().join("dist").join(&own).exists() {
            overrides += &fill(&own, &[])?;
        }
        if !overrides.is_empty() {
            let place = format!("usr/share/lintian/overrides/{}", self.name);
            stage.write(place, overrides)?;
        }
        let path = stage.root().join(&place);
        let content = gzip(&path)?;
        stage.write(format!("{place}.gz"), content)?;
        cache::remove(&path)
    }
}

/// A changelog that names the version.
pub(super) fn changelog(maker: &Maker, source: &str, version: &str) -> Result<String> {
    let words = [
        ("SOURCE", source),
        ("FULL_VERSION", version),
        ("MAINTAINER", &maintainer()),
        ("DATE", &date(maker.epoch, "--rfc-email")?),
    ];
    fill(Path::new("debian/changelog"), &words)
}

fn template(name: &str, kind: &str) -> PathBuf {
    Path::new("debian").join(format!("{name}.{kind}"))
}
