//! Open files that a service manager passes to a service: systemd's protocol, `sd_listen_fds(3)`.

use std::os::fd::OwnedFd;
use std::os::fd::RawFd;

use crate::Error;
use crate::Result;
use crate::error::Object;
use crate::sys::inherited;

/// The first descriptor that is passed.
const FIRST: RawFd = 3;
const PROCESS: &str = "LISTEN_PID";
const COUNT: &str = "LISTEN_FDS";
const NAMES: &str = "LISTEN_FDNAMES";

/// An open file that a service manager passed: see [`take_listen_fds`].
#[derive(Debug)]
#[non_exhaustive]
pub struct ListenFd {
    /// As the service manager calls it: the name in `OpenFile=`, `FileDescriptorName=` or the
    /// file-descriptor store; `unknown` if it gave no names.
    pub name: String,
    /// The descriptor, close-on-exec.
    pub fd: OwnedFd,
}

/// Takes over the open files that systemd passed to this process, in their order: devices for
/// [`Device::from_cdev`](crate::Device::from_cdev), leases for
/// [`Lease::from_fd`](crate::Lease::from_fd), sockets. Empty if none were passed, or if they were
/// passed to another process, such as our parent.
///
/// All of them are made close-on-exec, so that no child holds a device open. The variables of the
/// protocol are removed if `remove_variables` says so; then a second call finds nothing. They are
/// left alone, as the files are, when the answer is an error.
///
/// Errors: [`Error::Invalid`]: a variable has no number, or there is not one name for each file;
/// [`Error::Io`] (`EBADF`): fewer files are open than were announced.
///
/// # Safety
///
/// - Nothing else in the process owns one of these descriptors: it is called once, before other
///   code takes them.
/// - If `remove_variables` is set: no other thread reads or changes the environment meanwhile.
///
/// # Examples
///
/// With `OpenFile=/dev/vfio/devices/vfio0:accelerator` in the unit of the service:
///
/// ```no_run
/// # fn example(iommu: &barlease::Iommu) -> barlease::Result<()> {
/// // SAFETY: `main` begins with it: there is no other thread, and nothing has taken the files.
/// for file in unsafe { barlease::take_listen_fds(true) }? {
///     if file.name == "accelerator" {
///         let device = barlease::Device::from_cdev(file.fd, iommu)?;
///     }
/// }
/// # Ok(())
/// # }
/// ```
#[allow(
    unsafe_code,
    reason = "takes over descriptors that are known by number only"
)]
pub unsafe fn take_listen_fds(remove_variables: bool) -> Result<Vec<ListenFd>> {
    let variable = |name| std::env::var(name).ok();
    let names = passed(
        std::process::id(),
        variable(PROCESS).as_deref(),
        variable(COUNT).as_deref(),
        variable(NAMES).as_deref(),
    )?;
    let files: Vec<(RawFd, String)> = (FIRST..).zip(names).collect();
    // Of all, before one is taken.
    for (fd, _) in &files {
        inherited::close_on_exec(*fd).map_err(|errno| {
            Error::from_errno("inherit", Object::file(format!("/dev/fd/{fd}")), errno)
        })?;
    }
    if remove_variables {
        // SAFETY: the caller says that no other thread uses the environment.
        unsafe { inherited::remove_variables(&[PROCESS, COUNT, NAMES]) };
    }
    let taken = files.into_iter().map(|(fd, name)| ListenFd {
        name,
        // SAFETY: it is open, as was seen above, and the caller says that nothing else owns it.
        fd: unsafe { inherited::take(fd) },
    });
    Ok(taken.collect())
}

/// The names of the files that the variables announce to process `own`.
fn passed(
    own: u32,
    process: Option<&str>,
    count: Option<&str>,
    names: Option<&str>,
) -> Result<Vec<String>> {
    let invalid =
        |variable: &str, why| Error::invalid("inherit", Object::Variable(variable.into()), why);
    let (Some(process), Some(count)) = (process, count) else {
        return Ok(Vec::new());
    };
    let process: u32 = process
        .parse()
        .map_err(|_| invalid(PROCESS, "not the number of a process"))?;
    if process != own {
        return Ok(Vec::new());
    }
    // More cannot be open: `fs.nr_open` is a 32-bit number, and its default is a million.
    let count = count
        .parse()
        .ok()
        .filter(|count| *count <= 1 << 20)
        .ok_or_else(|| invalid(COUNT, "not a number of files"))?;
    let Some(names) = names else {
        return Ok(vec!["unknown".to_owned(); count]);
    };
    let names: Vec<String> = names.split(':').map(str::to_owned).collect();
    // No name and one empty name look the same.
    match names.len() == count || (count == 0 && names == [""]) {
        true => Ok(names.into_iter().take(count).collect()),
        false => Err(invalid(NAMES, "not one name for each file")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::process::Command;

    #[test]
    fn what_the_variables_say() {
        let ok = |process, count, names| passed(7, process, count, names).unwrap();
        assert_eq!(ok(Some("7"), Some("2"), Some("a:b")), ["a", "b"]);
        assert_eq!(ok(Some("7"), Some("2"), Some("a:")), ["a", ""]);
        assert_eq!(ok(Some("7"), Some("1"), None), ["unknown"]);
        let none: [&str; 0] = [];
        assert_eq!(ok(Some("7"), Some("0"), Some("")), none);
        assert_eq!(ok(Some("8"), Some("2"), Some("a:b")), none);
        assert_eq!(ok(None, Some("2"), None), none);
        for (process, count, names, variable) in [
            ("x", "1", None, PROCESS),
            ("7", "-1", None, COUNT),
            ("7", "4294967295", None, COUNT),
            ("7", "2", Some("a"), NAMES),
            ("7", "0", Some("a"), NAMES),
        ] {
            let error = passed(7, Some(process), Some(count), names).unwrap_err();
            assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
            assert!(error.to_string().contains(variable), "{error}");
        }
    }

    /// In a process of its own, with `count` announced and two files open.
    fn child(count: &str) {
        let status = Command::new("sh")
            .args([
                "-c",
                "LISTEN_PID=$$ exec \"$0\" --exact listen::tests::as_a_service --nocapture \
                 3</dev/null 4</dev/zero",
            ])
            .arg(std::env::current_exe().unwrap())
            .env("LISTEN_FDS", count)
            .env(
                "LISTEN_FDNAMES",
                vec!["file"; count.parse().unwrap()].join(":"),
            )
            .env("BARLEASE_TEST_SERVICE", count)
            .status()
            .unwrap();
        assert!(status.success(), "{status}");
    }

    #[test]
    fn files_are_taken_once_and_closed_on_exec() {
        child("2");
    }

    #[test]
    fn nothing_is_taken_when_a_file_is_missing() {
        child("60");
    }

    #[test]
    #[allow(unsafe_code, reason = "takes over descriptors")]
    fn as_a_service() {
        let Ok(count) = std::env::var("BARLEASE_TEST_SERVICE") else {
            return;
        };
        // SAFETY: this is the only test that runs, and nothing else has taken the files.
        let taken = unsafe { take_listen_fds(true) };
        if count != "2" {
            assert_eq!(taken.unwrap_err().errno(), Some(libc_ebadf()));
            assert!(std::env::var(COUNT).is_ok());
            assert!(std::fs::read_link("/proc/self/fd/4").is_ok());
            return;
        }
        let taken = taken.unwrap();
        let numbers: Vec<RawFd> = taken.iter().map(|file| file.fd.as_raw_fd()).collect();
        assert_eq!(numbers, [3, 4]);
        for file in &taken {
            let flags = rustix::io::fcntl_getfd(&file.fd).unwrap();
            assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
            assert_eq!(file.name, "file");
        }
        // SAFETY: as above; the variables are gone.
        assert!(unsafe { take_listen_fds(true) }.unwrap().is_empty());
        drop(taken);
        let link = std::fs::read_link("/proc/self/fd/4").unwrap_or_default();
        assert_ne!(link.as_os_str(), "/dev/zero");
    }

    fn libc_ebadf() -> i32 {
        rustix::io::Errno::BADF.raw_os_error()
    }
}
