//! Claims: a directory for each, with a socket that speaks for it.
//!
//! The directory is mounted into a container, so that a socket that a restarted daemon
//! makes there is the one that the container sees. The directories are what is known of claims:
//! they are in `/run`, and end with the boot, as leases do.

use std::collections::BTreeMap;
use std::fs;
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

/// Most bytes of a claim's name, such that the path of a socket is not too long.
const MAX_NAME: usize = 64;
/// The name of the socket in its directory.
const SOCKET: &str = "sock";

/// The claims of a daemon.
#[derive(Debug)]
pub(crate) struct Claims {
    directory: PathBuf,
    open: BTreeMap<Arc<str>, UnixListener>,
}

/// Whether it can be the name of a claim: of a directory, of a device for containers (CDI), and
/// nothing that a pattern of the policy would take for something else.
pub(crate) fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let ends = |c: char| c.is_ascii_alphanumeric();
    let is_whole = name.starts_with(ends) && name.ends_with(ends);
    is_whole && name.len() <= MAX_NAME && name.chars().all(fits)
}

impl Claims {
    /// Those of the daemon that serves in a directory, with the claims that an earlier one had.
    pub(crate) fn in_directory(directory: &Path) -> io::Result<Self> {
        let directory = directory.join("claims");
        let said = |error: io::Error| {
            io::Error::new(error.kind(), format!("{}: {error}", directory.display()))
        };
        fs::create_dir_all(&directory).map_err(said)?;
        // A process that reaches a socket has the claim: those that it is mounted for, and nobody
        // else.
        fs::set_permissions(&directory, Permissions::from_mode(0o700)).map_err(said)?;
        let mut claims = Self {
            directory: directory.clone(),
            open: BTreeMap::new(),
        };
        for entry in fs::read_dir(&directory).map_err(said)? {
            let name = entry.map_err(said)?.file_name();
            // The leavings of a container in the folder of one claim keep no other from its own.
            if let Some(name) = name.to_str().filter(|name| is_name(name))
                && let Err(error) = claims.open(name)
            {
                eprintln!("barleased: the claim {name} is not served: {error}");
            }
        }
        Ok(claims)
    }

    pub(crate) fn directory_of(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// All, by name.
    pub(crate) fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.open.keys()
    }

    pub(crate) fn listeners(&self) -> impl Iterator<Item = &UnixListener> {
        self.open.values()
    }

    pub(crate) fn listener(&self, name: &str) -> Option<&UnixListener> {
        self.open.get(name)
    }

    /// Makes a claim's directory and socket, unless they are there; says whether they are new.
    pub(crate) fn open(&mut self, name: &str) -> io::Result<bool> {
        if self.open.contains_key(name) {
            return Ok(false);
        }
        let directory = self.directory_of(name);
        let said = |error: io::Error| {
            io::Error::new(error.kind(), format!("{}: {error}", directory.display()))
        };
        fs::create_dir_all(&directory).map_err(said)?;
        fs::set_permissions(&directory, Permissions::from_mode(0o755)).map_err(said)?;
        // Beside the folder, not in it: a container may write there.
        let new = self.directory.join(format!(".{name}.new"));
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(said(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&new).map_err(said)?;
        listener.set_nonblocking(true)?;
        // Users of a container are not those of the host.
        fs::set_permissions(&new, Permissions::from_mode(0o666)).map_err(said)?;
        // In one step: a client finds the old socket or the new one.
        fs::rename(&new, directory.join(SOCKET)).map_err(said)?;
        self.open.insert(name.into(), listener);
        Ok(true)
    }

    /// Removes a claim: nobody can connect any more. The listener, if there was such a claim.
    pub(crate) fn end(&mut self, name: &str) -> Option<UnixListener> {
        let listener = self.open.remove(name)?;
        let directory = self.directory_of(name);
        // By another name first, which no daemon takes for a claim: a container may have put
        // something into it that we cannot remove, and what it has mounted is this folder.
        let number = fs::metadata(&directory).map_or(0, |folder| folder.ino());
        let ended = self.directory.join(format!(".ended-{name}-{number}"));
        let removed = fs::rename(&directory, &ended).and_then(|()| fs::remove_dir_all(&ended));
        if let Err(error) = removed {
            eprintln!("barleased: remove {}: {error}", directory.display());
        }
        Some(listener)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn names_are_those_of_one_directory() {
        for good in ["a", "pod-7f.rows_1", &"x".repeat(64)] {
            assert!(is_name(good), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            ".a",
            "a/b",
            "a*",
            "ä",
            "a b",
            &"x".repeat(65),
        ] {
            assert!(!is_name(bad), "{bad}");
        }
    }

    /// A container may write to the folder of its claim.
    #[test]
    fn what_a_container_puts_into_its_folder_harms_nobody_else() {
        let place = tempfile::tempdir().unwrap();
        let mut claims = Claims::in_directory(place.path()).unwrap();
        for name in ["link", "folder", "good"] {
            assert!(claims.open(name).unwrap());
        }
        let victim = place.path().join("victim");
        fs::write(&victim, "as it was").unwrap();
        fs::set_permissions(&victim, Permissions::from_mode(0o600)).unwrap();
        let link = claims.directory_of("link").join(SOCKET);
        fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(&victim, &link).unwrap();
        let folder = claims.directory_of("folder").join(SOCKET);
        fs::remove_file(&folder).unwrap();
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("full"), "").unwrap();
        drop(claims);
        let mut next = Claims::in_directory(place.path()).unwrap();
        // The link is replaced, and what it leads to is not touched.
        UnixStream::connect(&link).unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "as it was");
        let mode = fs::metadata(&victim).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // One has no socket any more; the others have theirs.
        assert!(next.listener("folder").is_none() && next.listener("good").is_some());
        assert!(next.open("folder").is_err());
        assert!(next.end("link").is_some());
        assert!(victim.exists());
    }

    /// A container that has the folder mounted still sees it, and may put the socket's name there
    /// again.
    #[test]
    fn a_claim_that_has_ended_does_not_come_back() {
        let place = tempfile::tempdir().unwrap();
        let mut claims = Claims::in_directory(place.path()).unwrap();
        claims.open("one").unwrap();
        let folder = claims.directory_of("one");
        let mounted = fs::File::open(&folder).unwrap();
        let inside = std::path::PathBuf::from(format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&mounted)
        ));
        claims.end("one").unwrap();
        // In a folder that is removed nothing can be made.
        assert!(UnixListener::bind(inside.join(SOCKET)).is_err());
        // One that could not be removed has a name that no daemon takes for a claim.
        claims.open("two").unwrap();
        let kept = place.path().join("claims").join(".ended-two-7");
        fs::rename(claims.directory_of("two"), &kept).unwrap();
        drop(claims);
        let next = Claims::in_directory(place.path()).unwrap();
        assert_eq!(next.names().count(), 0);
    }

    #[test]
    fn a_claim_is_there_for_the_next_daemon_until_it_ends() {
        let place = tempfile::tempdir().unwrap();
        let mut claims = Claims::in_directory(place.path()).unwrap();
        assert!(claims.open("one").unwrap());
        assert!(!claims.open("one").unwrap());
        let directory = claims.directory_of("one");
        let inside = fs::File::open(&directory).unwrap();
        drop(claims);
        let socket = directory.join(SOCKET);
        assert!(UnixStream::connect(&socket).is_err());
        let mut next = Claims::in_directory(place.path()).unwrap();
        // The mounted directory is the same, with a socket that answers.
        UnixStream::connect(&socket).unwrap();
        let same = rustix::fs::fstat(&inside).unwrap().st_ino;
        assert_eq!(rustix::fs::stat(&directory).unwrap().st_ino, same);
        assert!(next.end("one").is_some());
        assert!(next.end("one").is_none());
        assert!(!directory.exists());
        let mode = fs::metadata(place.path().join("claims"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o700);
    }
}
