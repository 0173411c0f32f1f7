//! The policy's files, and the policy that was in force last.
//!
//! A daemon that starts while the files are wrong goes on with the policy that was in force before,
//! which the manager keeps for it: leases live on, and new ones are granted as before. Where none
//! is kept, or it cannot be read, but devices are, leases live on and nothing new is allowed. Only
//! a daemon that nothing was left to does not start.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::fs::File;
use std::io;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use barlease_ledger::core::Event;
use barlease_ledger::policy::Names;
use barlease_ledger::policy::Policy;
use barlease_ledger::types::Time;
use nix::unistd::Group;
use nix::unistd::User;
use rustix::fs::MemfdFlags;
use serde::Deserialize;
use serde::Serialize;

use crate::find;
use crate::manager;
use crate::records;
use crate::recovery::Left;
use crate::server::Server;
use crate::service::now;

/// Names by which a policy is kept, in turns: the next one is stored before the last one goes.
pub(crate) const NAMES: [&str; 2] = ["policy-0", "policy-1"];
/// Most bytes of one that is kept.
const LONGEST: u64 = 16 << 20;

/// Users and groups of the host, and all that were asked for.
#[derive(Default)]
struct Host {
    users: RefCell<BTreeMap<String, u32>>,
    groups: RefCell<BTreeMap<String, u32>>,
}

impl Names for Host {
    fn user(&self, name: &str) -> Option<u32> {
        let uid = User::from_name(name).ok()??.uid.as_raw();
        self.users.borrow_mut().insert(name.to_owned(), uid);
        Some(uid)
    }

    fn group(&self, name: &str) -> Option<u32> {
        let gid = Group::from_name(name).ok()??.gid.as_raw();
        self.groups.borrow_mut().insert(name.to_owned(), gid);
        Some(gid)
    }
}

/// The files of a policy that was read, with the users and groups that they meant: one that the
/// host has no more is no fault of a policy that is in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Texts {
    files: Vec<(String, String)>,
    users: BTreeMap<String, u32>,
    groups: BTreeMap<String, u32>,
}

impl Names for Texts {
    fn user(&self, name: &str) -> Option<u32> {
        self.users.get(name).copied()
    }

    fn group(&self, name: &str) -> Option<u32> {
        self.groups.get(name).copied()
    }
}

impl Texts {
    fn parse(&self, names: &dyn Names) -> Result<Policy, Vec<String>> {
        let files = self.files.iter();
        let files: Vec<_> = files.map(|(name, text)| (&**name, &**text)).collect();
        let said = |errors: Vec<_>| errors.iter().map(ToString::to_string).collect();
        Policy::parse(&files, names).map_err(said)
    }
}

/// Reads all `*.toml` of a directory, by name, as one policy.
///
/// # Errors
///
/// All that is wrong, each with its file, and its line where there is one.
fn read(directory: &Path) -> Result<(Policy, Texts), Vec<String>> {
    let failed = |path: &Path, error: io::Error| vec![format!("{}: {error}", path.display())];
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
    let host = Host::default();
    let texts = Texts {
        files,
        ..Texts::default()
    };
    let policy = texts.parse(&host)?;
    let (users, groups) = (host.users.into_inner(), host.groups.into_inner());
    let texts = Texts {
        users,
        groups,
        ..texts
    };
    Ok((policy, texts))
}

/// A policy that the manager keeps.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Its place in [`NAMES`].
    pub(crate) place: usize,
    /// When it came into force.
    pub(crate) time: Time,
    texts: Texts,
}

/// The place of a name in [`NAMES`].
pub(crate) fn place(name: &str) -> Option<usize> {
    NAMES.iter().position(|known| *known == name)
}

impl Kept {
    /// Reads the text of a file.
    pub(crate) fn read(place: usize, file: OwnedFd) -> io::Result<Self> {
        let file = File::from(file);
        let length = file.metadata()?.len().min(LONGEST);
        let mut bytes = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        file.read_exact_at(&mut bytes, 0)?;
        let (time, texts) = serde_json::from_slice(&bytes)?;
        Ok(Self { place, time, texts })
    }

    fn write(texts: &Texts) -> io::Result<File> {
        let fd = rustix::fs::memfd_create("barleased-policy", MemfdFlags::CLOEXEC)?;
        let mut file = File::from(fd);
        file.write_all(&serde_json::to_vec(&(now(), texts))?)?;
        Ok(file)
    }
}

/// Where the policy is written, and what is wrong with that.
#[derive(Debug, Default)]
pub(crate) struct Written {
    directory: PathBuf,
    /// All that is wrong with the files, if an older policy is in force.
    pub(crate) errors: Vec<String>,
    /// The texts that are to be kept, if the files were read.
    texts: Option<Texts>,
    /// Place of the policy that the manager keeps.
    kept: Option<usize>,
}

/// The policy to begin with.
///
/// # Errors
///
/// The files are wrong, and nothing was left that would be lost.
pub(crate) fn begin(directory: PathBuf, left: &mut Left) -> io::Result<(Policy, Written)> {
    let kept = left.policy.take();
    let mut written = Written {
        kept: kept.as_ref().map(|kept| kept.place),
        ..Written::default()
    };
    let read = read(&directory);
    written.directory = directory;
    let errors = match read {
        Ok((policy, texts)) => {
            written.texts = Some(texts);
            return Ok((policy, written));
        }
        Err(errors) => errors,
    };
    let before = kept.map(|kept| kept.texts.parse(&kept.texts));
    let policy = match before {
        Some(Ok(policy)) => policy,
        None if left.devices.is_empty() => {
            let text = format!("the policy: {}", errors.join("\n"));
            return Err(io::Error::other(text));
        }
        // An older daemon has left none, or one with words that this one does not know.
        _ => Policy::default(),
    };
    written.errors = errors;
    Ok((policy, written))
}

impl Server<'_> {
    /// Tells of the policy that it has begun with, and has it kept.
    pub(crate) fn begin_policy(&mut self) -> io::Result<()> {
        if let Some(texts) = self.written.texts.take() {
            self.keep_policy(&texts);
        } else {
            let record = records::policy_refused(&self.written.errors);
            eprintln!("barleased: {}", record.message);
            self.record(record)?;
        }
        self.look_at_matches();
        Ok(())
    }

    /// Reads the policy again; what is wrong with it leaves the old one in force.
    pub(crate) fn reload(&mut self) -> io::Result<Result<(), Vec<String>>> {
        self.manager.tell(&manager::reloading());
        let read = match read(&self.written.directory) {
            Ok((policy, texts)) => {
                self.written.errors.clear();
                self.record(records::policy_loaded(&policy))?;
                self.service.give(Event::PolicyReplaced(Arc::new(policy)))?;
                self.open_devices()?;
                // Devices first, if the manager has not room for all.
                self.keep_policy(&texts);
                self.look_at_matches();
                Ok(())
            }
            Err(errors) => {
                self.record(records::policy_refused(&errors))?;
                self.written.errors.clone_from(&errors);
                self.tell_status();
                Err(errors)
            }
        };
        self.manager.tell("READY=1");
        Ok(read)
    }

    /// Leaves the policy in force with the manager.
    fn keep_policy(&mut self, texts: &Texts) {
        if !self.manager.stores() {
            return;
        }
        let place = self.written.kept.map_or(0, |place| 1 - place);
        let name = NAMES[place];
        let stored = Kept::write(texts)
            .map_err(|error| error.to_string())
            .and_then(|file| self.manager.store(name, file));
        if let Err(error) = stored {
            eprintln!("barleased: the policy is not kept for a restart: {error}");
            return;
        }
        if let Some(before) = self.written.kept.replace(place) {
            self.manager.remove(NAMES[before]);
        }
    }

    /// Says which devices stay open though the policy means others by their names.
    fn look_at_matches(&self) {
        let pci = barlease::pci::Pci::system();
        for wanted in self.service.core().policy().devices() {
            if let Some(device) = self.service.device(&wanted.name)
                && let Err(why) = find::is(&pci, wanted, device)
            {
                let name = &wanted.name;
                eprintln!("barleased: {name} stays open, but {why}: drain it, then reload");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_that_is_kept_knows_the_users_that_it_meant() {
        let place = tempfile::tempdir().unwrap();
        let text = "[device.card]\nmatch = \"0000:01:00.0\"\n[pool.rows]\ndevice = \"card\"\n\
                    bar = 2\nunit = \"4K\"\n[[allow]]\npools = [\"rows\"]\naccess = \"read\"\n\
                    who = { user = [\"root\", 7], group = \"root\" }\n";
        fs::write(place.path().join("a.toml"), text).unwrap();
        let (policy, texts) = read(place.path()).unwrap();
        assert_eq!(texts.users, BTreeMap::from([("root".to_owned(), 0)]));
        let kept = Kept::read(1, Kept::write(&texts).unwrap().into()).unwrap();
        assert_eq!((kept.place, &kept.texts), (1, &texts));
        assert_eq!(kept.texts.parse(&kept.texts).unwrap(), policy);
        // The host's users do not matter.
        let gone = Texts {
            users: BTreeMap::new(),
            ..texts
        };
        assert!(gone.parse(&gone).is_err());
    }

    #[test]
    fn what_is_no_policy_is_not_taken_for_one() {
        let fd = rustix::fs::memfd_create("other", MemfdFlags::CLOEXEC).unwrap();
        assert!(Kept::read(0, fd).is_err());
    }
}
