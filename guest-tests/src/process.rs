//! Child processes that run a function, and the link to them.

use std::{
    fs::File,
    io::{self, Read, Write},
    mem,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    panic::{self, AssertUnwindSafe},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

/// A child process. Killed when dropped before it was joined.
#[derive(Debug)]
pub struct Child {
    pid: libc::pid_t,
    /// The way to it.
    pub link: Link,
    report: File,
    reaped: bool,
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Child {
    /// A child that runs `body` and ends. It has the memory of this process and, of its fds, those
    /// in `keep` only.
    ///
    /// # Panics
    ///
    /// When the system has no process left.
    pub fn start(keep: &[BorrowedFd<'_>], body: impl FnOnce(&Link)) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let (report, reporter) = pipe();
        // SAFETY: The child runs `body` only, and never returns from here. Nothing of this process
        // is locked by another thread: the tests start threads after their children.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "fork: {}", io::Error::last_os_error());
        if pid == 0 {
            let link = Link(theirs);
            run_child(link, reporter, keep, body);
        }
        Self {
            pid,
            link: Link(ours),
            report,
            reaped: false,
        }
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> i32 {
        self.pid
    }

    /// Sends it a signal.
    ///
    /// # Panics
    ///
    /// When it was waited for before.
    pub fn signal(&self, signal: i32) {
        assert!(!self.reaped);
        // SAFETY: It was not waited for, so the id is still its own.
        let sent = unsafe { libc::kill(self.pid, signal) };
        assert_eq!(sent, 0, "kill: {}", io::Error::last_os_error());
    }

    /// Waits for its end.
    ///
    /// # Panics
    ///
    /// When it panicked, or was ended by a signal.
    pub fn join(mut self) {
        let end = self.wait();
        let mut text = String::new();
        // A child of its own that lives on has the other end, too.
        if end != End::Code(0) {
            let _ = self.report.read_to_string(&mut text);
        }
        assert_eq!(end, End::Code(0), "a child process failed: {text}");
    }

    /// Waits for its end, whatever it is.
    ///
    /// # Panics
    ///
    /// When it was waited for before.
    pub fn wait(&mut self) -> End {
        assert!(!self.reaped);
        let mut status = 0;
        // SAFETY: `status` is valid for writes.
        let pid = unsafe { libc::waitpid(self.pid, &mut status, 0) };
        assert_eq!(pid, self.pid);
        self.reaped = true;
        if libc::WIFSIGNALED(status) {
            End::Signal(libc::WTERMSIG(status))
        } else {
            End::Code(libc::WEXITSTATUS(status))
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.reaped {
            // SAFETY: It was not waited for, so the id is still its own.
            unsafe { libc::kill(self.pid, libc::SIGKILL) };
            let end = self.wait();
            let mut text = String::new();
            let _ = self.report.read_to_string(&mut text);
            if !text.is_empty() || end != End::Signal(libc::SIGKILL) {
                eprintln!("a child process failed ({end:?}): {text}");
            }
        }
    }
}

/// Ends this process by SIGALRM after so many seconds: for one that may run for ever.
pub fn end_after(seconds: u32) {
    // SAFETY: Sets a timer of the process; nobody handles its signal.
    unsafe { libc::alarm(seconds) };
}

/// Turns off huge pages for this process (`PR_SET_THP_DISABLE`).
///
/// # Panics
///
/// When the kernel refuses.
pub fn turn_off_huge_pages() {
    allow_huge_pages(false);
}

/// Turns them off or on again.
///
/// # Panics
///
/// When the kernel refuses.
pub fn allow_huge_pages(on: bool) {
    let off = libc::c_ulong::from(!on);
    // SAFETY: The arguments are numbers.
    let result = unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, off, 0, 0, 0) };
    assert_eq!(result, 0, "prctl: {}", io::Error::last_os_error());
}

/// Gives up the privileges of root in this process, for good.
///
/// # Panics
///
/// When that does not work.
pub fn become_user(uid: u32) {
    // SAFETY: Has no argument that is memory.
    let groups = unsafe { libc::setgroups(0, std::ptr::null()) };
    // SAFETY: As above.
    let group = unsafe { libc::setresgid(uid, uid, uid) };
    // SAFETY: As above.
    let user = unsafe { libc::setresuid(uid, uid, uid) };
    assert_eq!([groups, group, user], [0; 3]);
}

/// The link and the file that this process, a child, reads and writes by default from here on.
///
/// # Panics
///
/// When that does not work.
pub fn become_command(link: &Link, output: impl AsFd) {
    for (fd, number) in [(link.0.as_fd(), 0), (output.as_fd(), 1)] {
        // SAFETY: Standard input and output belong to the whole process, and this is its only
        // thread.
        let answer = unsafe { libc::dup2(fd.as_raw_fd(), number) };
        assert_eq!(answer, number, "dup2: {}", io::Error::last_os_error());
    }
}

/// Gives an open file this number in this process, a child.
///
/// # Panics
///
/// When that does not work.
pub fn inherit(file: impl AsFd, number: RawFd) {
    // SAFETY: Nobody in this process, a child with one thread, uses the number.
    let answer = unsafe { libc::dup2(file.as_fd().as_raw_fd(), number) };
    assert_eq!(answer, number, "dup2: {}", io::Error::last_os_error());
}

/// Where this process, a child, says its errors from here on.
///
/// # Panics
///
/// When that does not work.
pub fn say_errors_to(output: impl AsFd) {
    // SAFETY: Standard error belongs to the whole process, and this is its only thread.
    let answer = unsafe { libc::dup2(output.as_fd().as_raw_fd(), 2) };
    assert_eq!(answer, 2, "dup2: {}", io::Error::last_os_error());
}

/// Runs `body` in a forked process, from whatever thread, and says whether it returned true.
///
/// `body` must not allocate or lock: another thread may hold the lock of what it needs.
///
/// # Panics
///
/// When the system has no process left.
pub fn in_fork(body: impl FnOnce() -> bool) -> bool {
    // SAFETY: The child runs `body`, which needs nothing of other threads, and ends.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork: {}", io::Error::last_os_error());
    if pid == 0 {
        let code = i32::from(!body());
        // SAFETY: Ends the process; nothing of the parent's is flushed or dropped.
        unsafe { libc::_exit(code) }
    }
    let mut status = 0;
    // SAFETY: `status` is valid for writes.
    let ended = unsafe { libc::waitpid(pid, &mut status, 0) };
    assert_eq!(ended, pid);
    assert!(
        libc::WIFEXITED(status),
        "a forked process died: {status:#x}"
    );
    libc::WEXITSTATUS(status) == 0
}

fn run_child(link: Link, reporter: File, keep: &[BorrowedFd<'_>], body: impl FnOnce(&Link)) -> ! {
    // SAFETY: Only asks for a signal when the parent is gone.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let mut kept: Vec<RawFd> = keep.iter().map(AsRawFd::as_raw_fd).collect();
    kept.extend([0, 1, 2, link.0.as_raw_fd(), reporter.as_raw_fd()]);
    close_all_but(kept);
    // The hook of a child that has a child owns a file that is closed here.
    mem::forget(panic::take_hook());
    // Of any thread.
    panic::set_hook(Box::new(move |panic| {
        let _ = writeln!(&reporter, "{panic}");
    }));
    let ended = panic::catch_unwind(AssertUnwindSafe(|| body(&link)));
    let code = if ended.is_ok() { 0 } else { 101 };
    // SAFETY: Ends the process; nothing of the parent's is flushed or dropped.
    unsafe { libc::_exit(code) }
}

/// Closes what the parent's variables own: they are never dropped here.
fn close_all_but(mut kept: Vec<RawFd>) {
    kept.sort_unstable();
    let mut first = 0;
    for fd in kept.into_iter().chain([RawFd::MAX]) {
        if fd > first {
            // SAFETY: Nobody in this process uses these fds; see above.
            unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = fd.saturating_add(1);
    }
}

static HANDLED: AtomicU32 = AtomicU32::new(0);

/// From now on, a signal is counted by a handler, and interrupted system calls are not begun again.
///
/// # Panics
///
/// When that does not work.
pub fn handle(signal: i32) {
    extern "C" fn count(_signal: i32) {
        HANDLED.fetch_add(1, Ordering::SeqCst);
    }
    // SAFETY: All zeroes is a valid action.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = count as *const () as usize;
    // SAFETY: The handler follows the rules of signal handlers.
    let answer = unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
    assert_eq!(answer, 0, "sigaction: {}", io::Error::last_os_error());
}

/// How many signals were [handled](handle).
#[must_use]
pub fn handled() -> u32 {
    HANDLED.load(Ordering::SeqCst)
}

/// An eventfd that does not block.
///
/// # Panics
///
/// When there is no fd left.
#[must_use]
pub fn eventfd() -> OwnedFd {
    // SAFETY: Makes a new fd.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    assert!(fd >= 0, "eventfd: {}", io::Error::last_os_error());
    // SAFETY: The fd is new and nobody else's.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Has reads and writes of a file block, or not.
///
/// # Panics
///
/// When that does not work.
pub fn set_blocking(fd: impl AsFd, blocking: bool) {
    let fd = fd.as_fd().as_raw_fd();
    let flags = if blocking { 0 } else { libc::O_NONBLOCK };
    // SAFETY: Has no argument that is memory.
    let answer = unsafe { libc::fcntl(fd, libc::F_SETFL, flags) };
    assert_eq!(answer, 0, "fcntl: {}", io::Error::last_os_error());
}

/// Whether an eventfd was signalled within that time. Does not take the event away.
#[must_use]
pub fn is_signalled_within(event: impl AsFd, time: Duration) -> bool {
    let mut poll = libc::pollfd {
        fd: event.as_fd().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let milliseconds = i32::try_from(time.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: `poll` is valid for reads and writes of one entry.
    let result = unsafe { libc::poll(&mut poll, 1, milliseconds) };
    assert!(result >= 0, "poll: {}", io::Error::last_os_error());
    result == 1
}

fn pipe() -> (File, File) {
    let mut fds = [0; 2];
    // SAFETY: `fds` is valid for writes of two fds.
    let result = unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) };
    assert_eq!(result, 0, "pipe: {}", io::Error::last_os_error());
    // SAFETY: The fds are new and nobody else's.
    let ends = fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let [read, write] = ends.map(File::from);
    (read, write)
}

/// One end of the link between a child and its parent: numbers and fds, in order.
#[derive(Debug)]
pub struct Link(UnixStream);

impl Link {
    /// Sends a number.
    ///
    /// # Panics
    ///
    /// When the other side is gone.
    pub fn send(&self, value: u64) {
        (&self.0)
            .write_all(&value.to_ne_bytes())
            .expect("the other side listens");
    }

    /// Sends a line of text.
    ///
    /// # Panics
    ///
    /// When the other side is gone.
    pub fn send_line(&self, text: &str) {
        writeln!(&self.0, "{text}").expect("the other side listens");
    }

    /// Waits for a number.
    ///
    /// # Panics
    ///
    /// When the other side is gone.
    #[must_use]
    pub fn receive(&self) -> u64 {
        let mut bytes = [0; 8];
        (&self.0)
            .read_exact(&mut bytes)
            .expect("the other side says something");
        u64::from_ne_bytes(bytes)
    }

    /// Waits for this number.
    ///
    /// # Panics
    ///
    /// When it is another one.
    pub fn expect(&self, value: u64) {
        assert_eq!(self.receive(), value);
    }

    /// Passes an fd (`SCM_RIGHTS`).
    ///
    /// # Panics
    ///
    /// When the other side is gone.
    pub fn send_fd(&self, fd: impl AsFd) {
        let fd = fd.as_fd().as_raw_fd();
        let mut message = Message::new();
        // SAFETY: The header is valid and its buffer has room for one fd.
        let header = unsafe { libc::CMSG_FIRSTHDR(&message.header()) };
        // SAFETY: As above.
        let header = unsafe { &mut *header };
        header.cmsg_level = libc::SOL_SOCKET;
        header.cmsg_type = libc::SCM_RIGHTS;
        header.cmsg_len = Message::LEN;
        // SAFETY: The header is valid.
        let data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
        // SAFETY: The data of the header has room for one fd.
        unsafe { data.write_unaligned(fd) };
        // SAFETY: The header is valid and leads to valid memory.
        let sent = unsafe { libc::sendmsg(self.0.as_raw_fd(), &message.header(), 0) };
        assert_eq!(sent, 1, "sendmsg: {}", io::Error::last_os_error());
    }

    /// Waits for an fd.
    ///
    /// # Panics
    ///
    /// When the other side is gone, or sends something else.
    #[must_use]
    pub fn receive_fd(&self) -> OwnedFd {
        let mut message = Message::new();
        let mut header = message.header();
        // SAFETY: The header is valid and leads to valid memory.
        let received =
            unsafe { libc::recvmsg(self.0.as_raw_fd(), &mut header, libc::MSG_CMSG_CLOEXEC) };
        assert_eq!(received, 1, "recvmsg: {}", io::Error::last_os_error());
        // SAFETY: `recvmsg` filled the header in.
        let control = unsafe { libc::CMSG_FIRSTHDR(&header) };
        assert!(!control.is_null(), "no fd came");
        // SAFETY: It is not null, so it is valid.
        let data = unsafe { libc::CMSG_DATA(control) }.cast::<RawFd>();
        // SAFETY: It holds one fd.
        let fd = unsafe { data.read_unaligned() };
        // SAFETY: The fd is new and nobody else's.
        unsafe { OwnedFd::from_raw_fd(fd) }
    }
}

/// A message of one byte and one fd.
struct Message {
    byte: u8,
    part: libc::iovec,
    control: [u64; 4],
}

impl Message {
    // SAFETY: Computes a number.
    const LEN: usize = unsafe { libc::CMSG_LEN(size_of::<RawFd>() as u32) } as usize;
    // SAFETY: Computes a number.
    const SPACE: usize = unsafe { libc::CMSG_SPACE(size_of::<RawFd>() as u32) } as usize;

    fn new() -> Box<Self> {
        // SAFETY: All zeroes is valid for an iovec.
        let part = unsafe { mem::zeroed() };
        Box::new(Self {
            byte: 0,
            part,
            control: [0; 4],
        })
    }

    fn header(&mut self) -> libc::msghdr {
        const { assert!(Self::SPACE <= size_of::<[u64; 4]>()) };
        self.part = libc::iovec {
            iov_base: (&raw mut self.byte).cast(),
            iov_len: 1,
        };
        // SAFETY: All zeroes is valid for a message header.
        let mut header: libc::msghdr = unsafe { mem::zeroed() };
        header.msg_iov = &raw mut self.part;
        header.msg_iovlen = 1;
        header.msg_control = self.control.as_mut_ptr().cast();
        header.msg_controllen = Self::SPACE;
        header
    }
}
