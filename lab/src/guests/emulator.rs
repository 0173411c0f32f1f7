//! Which acceleration works here: tried once per boot of the host, by booting a guest.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::kernels::debug::Watch;
use crate::kernels::prepare::Prepared;
use crate::packages::cache;

/// How a guest's processors are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// By the host's own, through `/dev/kvm`.
    Kvm,
    /// In software.
    Tcg,
    /// In software, one processor at a time. A processor that waits in a loop (`pause`) lets the
    /// other one go on.
    Turns,
    /// In software, one processor at a time, with a clock that counts instructions: each takes a
    /// nanosecond. The guest's measurements do not depend on what else the host does.
    Counting,
}

impl Accel {
    /// QEMU's name for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
            Self::Turns => "turns",
            Self::Counting => "counting",
        }
    }

    pub(crate) fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm"],
            Self::Tcg => &["-accel", "tcg,thread=multi"],
            Self::Turns => &["-accel", "tcg,thread=single"],
            // While all processors are idle the clock jumps to the next event.
            Self::Counting => &[
                "-accel",
                "tcg,thread=single",
                "-icount",
                "shift=0,align=off,sleep=off",
            ],
        }
    }
}

/// With KVM a guest is up in a second or two. Where KVM is broken it often stands still without a
/// word.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Serialize, Deserialize)]
struct Probe {
    boot: String,
    accel: Accel,
}

/// The acceleration to use: `BARLEASE_ACCEL`, or what was found out by trying. `boots` says whether
/// a guest with that acceleration comes up and ends well within that time.
///
/// # Errors
///
/// When `BARLEASE_ACCEL` is none of the names of [`Accel`].
pub(crate) fn accel(prepared: &Prepared, boots: impl Fn(Accel, Duration) -> bool) -> Result<Accel> {
    let is_native = prepared.kernel.arch().is_native();
    if let Some(accel) = asked_for(std::env::var("BARLEASE_ACCEL").ok().as_deref())? {
        if accel == Accel::Kvm && !is_native {
            bail!("BARLEASE_ACCEL is `kvm`, but guests of another architecture are emulated");
        }
        return Ok(accel);
    }
    if !is_native {
        return Ok(Accel::Tcg);
    }
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let path = prepared.cache.path("accel.json");
    let known = cache::read_json::<Probe>(&path).filter(|probe| probe.boot == boot);
    let accel = if let Some(probe) = known {
        probe.accel
    } else {
        let accel = if kvm_works(boots) {
            Accel::Kvm
        } else {
            Accel::Tcg
        };
        cache::write_json(&path, &Probe { boot, accel })?;
        accel
    };
    Ok(fit(accel, prepared.kernel.watches()))
}

/// The options that suit a kernel that watches this. KCSAN sees a race when one processor makes an
/// access while another waits in the middle of one, for microseconds: emulated side by side on a
/// busy machine they seldom run at the same time.
fn fit(accel: Accel, watch: Option<Watch>) -> Accel {
    match (accel, watch) {
        (Accel::Tcg, Some(Watch::Races)) => Accel::Turns,
        _ => accel,
    }
}

fn asked_for(variable: Option<&str>) -> Result<Option<Accel>> {
    match variable {
        None | Some("") => Ok(None),
        Some("kvm") => Ok(Some(Accel::Kvm)),
        Some("tcg") => Ok(Some(Accel::Tcg)),
        Some("turns") => Ok(Some(Accel::Turns)),
        Some("counting") => Ok(Some(Accel::Counting)),
        Some(other) => {
            bail!(
                "BARLEASE_ACCEL is `{other}`, but can only be `kvm`, `tcg`, `turns` or `counting`"
            )
        }
    }
}

fn kvm_works(boots: impl Fn(Accel, Duration) -> bool) -> bool {
    if fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        return false;
    }
    let works = boots(Accel::Kvm, PATIENCE);
    if !works {
        eprintln!("/dev/kvm is there, but no guest boots with it: guests are emulated in software");
    }
    works
}

/// QEMU takes a doubled comma for one that separates nothing.
pub(crate) fn comma_safe(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_decides_when_it_is_set() {
        assert_eq!(asked_for(None).unwrap(), None);
        assert_eq!(asked_for(Some("")).unwrap(), None);
        assert_eq!(asked_for(Some("tcg")).unwrap(), Some(Accel::Tcg));
        assert_eq!(asked_for(Some("turns")).unwrap(), Some(Accel::Turns));
        assert_eq!(asked_for(Some("counting")).unwrap(), Some(Accel::Counting));
        assert_eq!(asked_for(Some("kvm")).unwrap(), Some(Accel::Kvm));
        assert!(asked_for(Some("xen")).is_err());
    }

    #[test]
    fn processors_take_turns_where_races_are_looked_for() {
        assert_eq!(fit(Accel::Tcg, None), Accel::Tcg);
        assert_eq!(fit(Accel::Tcg, Some(Watch::Memory)), Accel::Tcg);
        assert_eq!(fit(Accel::Tcg, Some(Watch::Races)), Accel::Turns);
        assert_eq!(fit(Accel::Kvm, Some(Watch::Races)), Accel::Kvm);
    }
}
