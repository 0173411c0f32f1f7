//! Debian packages, by `dpkg-deb`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use barlease_lab::cache;
use barlease_lab::report::Step;

use super::command::gzip;
use super::stage::Stage;
use super::{Maker, date, fill, output};

/// A package: the name of its templates in `dist/debian/`, and how the file is called.
pub(super) struct Deb<'a> {
    pub(super) template: &'a str,
    pub(super) name: &'a str,
    pub(super) version: &'a str,
    pub(super) arch: &'a str,
    /// What `dpkg-deb -Z` takes.
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
        self.changelog(maker, stage)?;
        let size = stage.kib()?.to_string();
        let words = [words, &[("SIZE", size.as_str())]].concat();
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

    /// What Debian's tools read; the changes themselves are in `CHANGELOG.md`.
    fn changelog(&self, maker: &Maker, stage: &Stage) -> Result<()> {
        let words = [
            ("SOURCE", self.template),
            ("FULL_VERSION", self.version),
            ("DATE", &date(maker.epoch, "--rfc-email")?),
        ];
        let text = fill(Path::new("debian/changelog"), &words)?;
        let place = format!("usr/share/doc/{}/changelog", self.name);
        stage.write(&place, text)?;
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
