//! Mappings, and touching them without dying of it.

use std::{
    arch::global_asm,
    io, mem,
    os::fd::{AsFd, AsRawFd},
    ptr,
    sync::{Once, atomic::AtomicU32},
};

use crate::{
    errno::{Answer, Errno},
    huge_size, page_size,
};

/// Read-only.
pub const READ: i32 = libc::PROT_READ;
/// Read and write.
pub const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// A touch ended in SIGBUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sigbus;

/// Memory of this process that is a mapping; unmapped when dropped, unless it was moved or unmapped
/// before.
#[derive(Debug)]
pub struct Map {
    address: usize,
    len: usize,
    /// The address and length of the rest.
    parts: Vec<(usize, usize)>,
}

/// How to map.
#[derive(Clone, Copy, Debug)]
pub struct How {
    protection: i32,
    flags: i32,
    align: u64,
    skew: u64,
}

impl How {
    /// Shared, to read and write, anywhere.
    #[must_use]
    pub fn shared() -> Self {
        Self {
            protection: READ_WRITE,
            flags: libc::MAP_SHARED,
            align: page_size(),
            skew: 0,
        }
    }

    /// `MAP_PRIVATE`.
    #[must_use]
    pub fn private(mut self) -> Self {
        self.flags = libc::MAP_PRIVATE;
        self
    }

    /// With this protection.
    #[must_use]
    pub fn protection(mut self, protection: i32) -> Self {
        self.protection = protection;
        self
    }

    /// At a multiple of `align`, which is a power of two.
    #[must_use]
    pub fn align(mut self, align: u64) -> Self {
        self.align = align;
        self
    }

    /// So many bytes behind a multiple of the alignment.
    #[must_use]
    pub fn skew(mut self, skew: u64) -> Self {
        self.skew = skew;
        self
    }

    /// Maps `len` bytes from `offset` of a file on.
    ///
    /// # Errors
    ///
    /// That of mmap.
    pub fn map(self, fd: impl AsFd, offset: u64, len: u64) -> Answer<Map> {
        install();
        let anywhere = self.align == page_size() && self.skew == 0;
        let place = if anywhere {
            0
        } else {
            reserve(len, self.align, self.skew)
        };
        let fixed = if anywhere { 0 } else { libc::MAP_FIXED };
        // SAFETY: The new mapping replaces nothing, or what was reserved for it.
        let address = unsafe {
            libc::mmap(
                ptr::without_provenance_mut(place),
                len as usize,
                self.protection,
                self.flags | fixed,
                fd.as_fd().as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if address == libc::MAP_FAILED {
            // The reservation stays, and is in nobody's way.
            return Err(Errno::last());
        }
        Ok(Map::at(address.addr(), len as usize))
    }
}

impl How {
    /// Maps `len` bytes from `offset` of a file on over a part of other memory, from `at` on. That
    /// is memory no more.
    ///
    /// # Errors
    ///
    /// That of mmap.
    pub fn map_over(
        self,
        memory: &mut Map,
        at: u64,
        fd: impl AsFd,
        offset: u64,
        len: u64,
    ) -> Answer<Map> {
        assert!(at + len <= memory.len());
        let place = memory.address + at as usize;
        memory.forget(place, len as usize);
        // SAFETY: Replaces memory that was ours and that no reference leads to.
        let address = unsafe {
            libc::mmap(
                ptr::with_exposed_provenance_mut(place),
                len as usize,
                self.protection,
                self.flags | libc::MAP_FIXED,
                fd.as_fd().as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Map::at(address.addr(), len as usize))
    }
}

/// Reserves `len` bytes of address space, `skew` bytes behind a multiple of `align`: to be
/// replaced, so that no other thread gets in between.
fn reserve(len: u64, align: u64, skew: u64) -> usize {
    // A whole multiple, so that a mapping has the last unit of alignment to itself.
    let all = (len.next_multiple_of(align) + align + skew) as usize;
    // SAFETY: A new mapping replaces nothing.
    let address = unsafe {
        libc::mmap(
            ptr::null_mut(),
            all,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    assert_ne!(address, libc::MAP_FAILED, "{}", io::Error::last_os_error());
    let start = address.addr();
    let place = start.next_multiple_of(align as usize) + skew as usize;
    let end = place + len.next_multiple_of(page_size()) as usize;
    for (from, to) in [(start, place), (end, start + all)] {
        if from < to {
            // SAFETY: Parts of what was just mapped, known to nobody.
            unsafe { libc::munmap(ptr::without_provenance_mut(from), to - from) };
        }
    }
    place
}

impl Map {
    fn at(address: usize, len: usize) -> Self {
        Self {
            address,
            len,
            parts: vec![(address, len)],
        }
    }

    /// Maps a whole buffer, shared, to read and write.
    ///
    /// # Errors
    ///
    /// That of mmap.
    pub fn new(fd: impl AsFd, len: u64) -> Answer<Self> {
        How::shared().map(fd, 0, len)
    }

    /// The same at an address where the largest entries of a page table fit.
    ///
    /// # Errors
    ///
    /// That of mmap.
    pub fn aligned(fd: impl AsFd, len: u64) -> Answer<Self> {
        How::shared().align(huge_size()).map(fd, 0, len)
    }

    /// Anonymous memory, to compare with.
    ///
    /// # Panics
    ///
    /// When there is none.
    #[must_use]
    pub fn anonymous(len: u64) -> Self {
        install();
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: A new mapping replaces nothing.
        let address =
            unsafe { libc::mmap(ptr::null_mut(), len as usize, READ_WRITE, flags, -1, 0) };
        assert_ne!(address, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Self::at(address.addr(), len as usize)
    }

    /// Its first address.
    #[must_use]
    pub fn address(&self) -> usize {
        self.address
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Whether it has no bytes; never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn byte(&self, offset: u64) -> usize {
        assert!(offset + 4 <= self.len as u64 && offset % 4 == 0);
        self.address + offset as usize
    }

    /// Loads four bytes.
    ///
    /// # Errors
    ///
    /// When that gives SIGBUS.
    pub fn read(&self, offset: u64) -> Result<u32, Sigbus> {
        let mut value = 0;
        // SAFETY: Four bytes of a mapping of this process, in device memory; a SIGBUS is caught.
        let code = unsafe { barlease_touch_read(self.byte(offset), &mut value) };
        caught(code).map(|()| value)
    }

    /// Stores four bytes.
    ///
    /// # Errors
    ///
    /// When that gives SIGBUS.
    pub fn write(&self, offset: u64, value: u32) -> Result<(), Sigbus> {
        // SAFETY: Four bytes of a mapping of this process that no reference leads to; a SIGBUS is
        // caught.
        caught(unsafe { barlease_touch_write(self.byte(offset), value) })
    }

    /// Loads four bytes of each page.
    ///
    /// # Errors
    ///
    /// When one of them gives SIGBUS.
    pub fn touch_all(&self) -> Result<(), Sigbus> {
        self.touch(0, self.len as u64)
    }

    /// Loads four bytes of each page of a part.
    ///
    /// # Errors
    ///
    /// When one of them gives SIGBUS.
    pub fn touch(&self, offset: u64, len: u64) -> Result<(), Sigbus> {
        for at in (offset..offset + len).step_by(page_size() as usize) {
            self.read(at)?;
        }
        Ok(())
    }

    /// Loads four bytes and dies of SIGBUS if they cannot be had: for children.
    #[must_use]
    pub fn read_unprotected(&self, offset: u64) -> u32 {
        read_unprotected_at(self.byte(offset))
    }

    /// Lets the kernel store four zero bytes at its beginning.
    ///
    /// # Errors
    ///
    /// That of the system call: no signal comes of it.
    ///
    /// # Panics
    ///
    /// When there is no `/dev/zero`.
    pub fn receive_zeros(&self) -> Answer<isize> {
        self.receive_from(std::fs::File::open("/dev/zero").expect("/dev/zero"))
    }

    /// Lets the kernel store four bytes at its beginning that it reads from a file.
    ///
    /// # Errors
    ///
    /// That of the system call: no signal comes of it.
    pub fn receive_from(&self, file: impl AsFd) -> Answer<isize> {
        let place = ptr::with_exposed_provenance_mut(self.byte(0));
        let fd = file.as_fd().as_raw_fd();
        // SAFETY: Four bytes of a mapping of this process that no reference leads to.
        crate::errno::answer(unsafe { libc::read(fd, place, 4) })
    }

    /// Lets the kernel store four zero bytes at each of these offsets, at most 1,024, by one system
    /// call.
    ///
    /// # Errors
    ///
    /// That of the system call: no signal comes of it.
    pub fn receive_zeros_at(
        &self,
        zeros: impl AsFd,
        offsets: impl IntoIterator<Item = u64>,
    ) -> Answer<isize> {
        let part = |offset| libc::iovec {
            iov_base: ptr::with_exposed_provenance_mut(self.byte(offset)),
            iov_len: 4,
        };
        let parts: Vec<_> = offsets.into_iter().map(part).collect();
        let (fd, count) = (zeros.as_fd().as_raw_fd(), parts.len() as i32);
        // SAFETY: Each part is four bytes of a mapping of this process that no reference leads to.
        crate::errno::answer(unsafe { libc::readv(fd, parts.as_ptr(), count) })
    }

    /// Has the kernel copy four bytes of it as a debugger does: pages that can be pinned only.
    ///
    /// # Errors
    ///
    /// That of the system call.
    pub fn copied_by_pinning(&self) -> Answer<isize> {
        let mut target = 0u32;
        let local = libc::iovec {
            iov_base: (&raw mut target).cast(),
            iov_len: 4,
        };
        let remote = libc::iovec {
            iov_base: ptr::with_exposed_provenance_mut(self.byte(0)),
            iov_len: 4,
        };
        // SAFETY: Has no argument.
        let this = unsafe { libc::getpid() };
        // SAFETY: The kernel writes four bytes to `target`.
        crate::errno::answer(unsafe { libc::process_vm_readv(this, &local, 1, &remote, 1, 0) })
    }

    /// Unmaps a part.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub fn unmap(&mut self, offset: u64, len: u64) {
        self.try_unmap(offset, len).expect("munmap");
    }

    /// Unmaps a part, which takes memory when it is not at an end.
    ///
    /// # Errors
    ///
    /// That of munmap.
    pub fn try_unmap(&mut self, offset: u64, len: u64) -> Answer<()> {
        let from = self.address + offset as usize;
        // SAFETY: A part of our mapping, which no reference leads to.
        let result = unsafe { libc::munmap(ptr::with_exposed_provenance_mut(from), len as usize) };
        crate::errno::answer(result)?;
        self.forget(from, len as usize);
        Ok(())
    }

    /// Takes a part out, as unmapping it does, while other threads touch the rest: its addresses
    /// stay reserved until this is dropped.
    ///
    /// # Panics
    ///
    /// When the kernel refuses.
    pub fn bury(&self, offset: u64, len: u64) {
        assert!(offset + len <= self.len as u64);
        // SAFETY: Replaces a part of our mapping, which no reference leads to.
        let address = unsafe {
            libc::mmap(
                ptr::with_exposed_provenance_mut(self.address + offset as usize),
                len as usize,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED, "{}", io::Error::last_os_error());
    }

    /// Leaves a part to others when this is dropped.
    fn forget(&mut self, from: usize, len: usize) {
        let to = from + len;
        let left = self.parts.iter().flat_map(|&(start, len)| {
            let end = start + len;
            [(start, end.min(from)), (start.max(to), end)]
        });
        self.parts = left
            .filter(|(start, end)| start < end)
            .map(|(start, end)| (start, end - start))
            .collect();
    }

    /// Changes the protection of a part.
    ///
    /// # Errors
    ///
    /// That of mprotect.
    pub fn protect(&self, offset: u64, len: u64, protection: i32) -> Answer<()> {
        let address = ptr::with_exposed_provenance_mut(self.address + offset as usize);
        // SAFETY: A part of our mapping; nothing but touches reads or writes it.
        let result = unsafe { libc::mprotect(address, len as usize, protection) };
        crate::errno::answer(result).map(drop)
    }

    /// Moves it elsewhere.
    ///
    /// # Errors
    ///
    /// That of mremap; it is where it was then.
    pub fn moved(self) -> Result<Self, (Self, Errno)> {
        let place = self.place();
        self.moved_to(&place)
    }

    /// Addresses to move it to.
    #[must_use]
    pub fn place(&self) -> Place {
        self.place_at(page_size(), 0)
    }

    /// The same, so many bytes behind a multiple of `align`, which is a power of two.
    #[must_use]
    pub fn place_at(&self, align: u64, skew: u64) -> Place {
        Place(reserve(self.len as u64, align, skew))
    }

    /// Moves a part of it to a place that nothing has been moved to.
    ///
    /// # Errors
    ///
    /// That of mremap; it is where it was then.
    pub fn part_moved_to(&mut self, offset: u64, len: u64, place: &Place) -> Answer<Self> {
        assert!(offset + len <= self.len as u64);
        let from = self.address + offset as usize;
        let len = len as usize;
        // SAFETY: A part of our mapping, moved over what was reserved for all of it.
        let address = unsafe {
            libc::mremap(
                ptr::with_exposed_provenance_mut(from),
                len,
                len,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                ptr::without_provenance_mut::<u8>(place.0),
            )
        };
        if address == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        self.forget(from, len);
        Ok(Self::at(address.addr(), len))
    }

    /// Moves it to a place that nothing has been moved to.
    ///
    /// # Errors
    ///
    /// That of mremap; it is where it was then.
    pub fn moved_to(mut self, place: &Place) -> Result<Self, (Self, Errno)> {
        let wanted = place.0;
        // SAFETY: Our mapping, moved over what was reserved for it.
        let address = unsafe {
            libc::mremap(
                ptr::with_exposed_provenance_mut(self.address),
                self.len,
                self.len,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                ptr::without_provenance_mut::<u8>(wanted),
            )
        };
        if address == libc::MAP_FAILED {
            let error = Errno::last();
            return Err((self, error));
        }
        self.parts.clear();
        Ok(Self::at(address.addr(), self.len))
    }

    /// Makes it longer, in place or elsewhere.
    ///
    /// # Errors
    ///
    /// That of mremap; it is as it was then.
    pub fn grow(&self, len: u64) -> Answer<()> {
        let address = ptr::with_exposed_provenance_mut(self.address);
        // SAFETY: Our mapping; where it worked, a test has failed and what is behind is lost.
        let address =
            unsafe { libc::mremap(address, self.len, len as usize, libc::MREMAP_MAYMOVE) };
        if address == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(())
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        for &(address, len) in &self.parts {
            // SAFETY: Ours, and no reference leads to it.
            unsafe { libc::munmap(ptr::with_exposed_provenance_mut(address), len) };
        }
    }
}

/// Loads four bytes of what was a mapping, and dies of SIGSEGV if it is none: for children.
#[must_use]
pub fn read_unprotected_at(address: usize) -> u32 {
    let address = ptr::with_exposed_provenance::<u32>(address);
    // SAFETY: Four aligned bytes of a mapping of this process, or of none.
    unsafe { address.read_volatile() }
}

/// Words that this process and those that it forks from now on have in common. Never unmapped.
///
/// # Panics
///
/// When there is no memory left, or `number` is more than a page has.
#[must_use]
pub fn shared_words(number: usize) -> &'static [AtomicU32] {
    assert!(number * size_of::<AtomicU32>() <= page_size() as usize);
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    // SAFETY: A new mapping replaces nothing.
    let address = unsafe {
        libc::mmap(
            ptr::null_mut(),
            page_size() as usize,
            READ_WRITE,
            flags,
            -1,
            0,
        )
    };
    assert_ne!(address, libc::MAP_FAILED, "{}", io::Error::last_os_error());
    // SAFETY: A page of zeroes that nobody unmaps, and that is used as atomic words only.
    unsafe { std::slice::from_raw_parts(address.cast::<AtomicU32>(), number) }
}

/// Addresses that are reserved for a mapping. They stay so when they are not used, and are in
/// nobody's way.
#[derive(Debug)]
pub struct Place(usize);

/// A page with none behind it.
pub(crate) struct Edge(Map);

impl Edge {
    pub(crate) fn new() -> Self {
        let mut map = Map::anonymous(2 * page_size());
        map.unmap(page_size(), page_size());
        Self(map)
    }

    pub(crate) fn make_read_only(&self) {
        self.0
            .protect(0, page_size(), READ)
            .expect("protect a page");
    }

    /// Puts bytes so that the page ends with them; says where.
    pub(crate) fn put(&self, bytes: &[u8]) -> *mut u8 {
        assert!(bytes.len() as u64 <= page_size());
        let address = self.0.address + page_size() as usize - bytes.len();
        let place = ptr::with_exposed_provenance_mut::<u8>(address);
        // SAFETY: The page is ours, and the bytes fit.
        unsafe { place.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        place
    }
}

// One load or store each, at a known address, so that the handler can tell them from any other
// instruction and go on behind them.
#[cfg(target_arch = "x86_64")]
global_asm!(
    ".text",
    ".p2align 4",
    ".globl barlease_touch_read",
    "barlease_touch_read:",
    "mov eax, dword ptr [rdi]",
    "mov dword ptr [rsi], eax",
    "xor eax, eax",
    "ret",
    ".p2align 4",
    ".globl barlease_touch_write",
    "barlease_touch_write:",
    "mov dword ptr [rdi], esi",
    "xor eax, eax",
    "ret",
    ".p2align 4",
    ".globl barlease_touch_fault",
    "barlease_touch_fault:",
    "ret",
);
#[cfg(target_arch = "aarch64")]
global_asm!(
    ".text",
    ".p2align 4",
    ".globl barlease_touch_read",
    "barlease_touch_read:",
    "ldr w2, [x0]",
    "str w2, [x1]",
    "mov w0, wzr",
    "ret",
    ".p2align 4",
    ".globl barlease_touch_write",
    "barlease_touch_write:",
    "str w1, [x0]",
    "mov w0, wzr",
    "ret",
    ".p2align 4",
    ".globl barlease_touch_fault",
    "barlease_touch_fault:",
    "ret",
);

unsafe extern "C" {
    /// Loads from `address` into `value`: 0, or the code of the SIGBUS.
    fn barlease_touch_read(address: usize, value: &mut u32) -> i32;
    /// Stores `value` to `address`: 0, or the code of the SIGBUS.
    fn barlease_touch_write(address: usize, value: u32) -> i32;
    /// Where the handler goes on, with the code as the result.
    fn barlease_touch_fault();
}

fn caught(code: i32) -> Result<(), Sigbus> {
    match code {
        0 => Ok(()),
        code => {
            assert_eq!(code, libc::BUS_ADRERR, "the code of the SIGBUS");
            Err(Sigbus)
        }
    }
}

static INSTALLED: Once = Once::new();
static mut PREVIOUS: mem::MaybeUninit<libc::sigaction> = mem::MaybeUninit::uninit();

/// Installs the handler. It passes all but our touches to the handler that was there before.
fn install() {
    INSTALLED.call_once(|| {
        // SAFETY: All zeroes is a valid action.
        let mut action: libc::sigaction = unsafe { mem::zeroed() };
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        let previous = (&raw mut PREVIOUS).cast();
        // SAFETY: The handler follows the rules of signal handlers; `PREVIOUS` is written once.
        let result = unsafe { libc::sigaction(libc::SIGBUS, &action, previous) };
        assert_eq!(result, 0);
    });
}

/// The instruction that a thread was stopped at.
#[cfg(target_arch = "x86_64")]
fn place_of(registers: &libc::mcontext_t) -> usize {
    registers.gregs[libc::REG_RIP as usize] as usize
}

/// Has it go on at a place where a function returns `result`.
#[cfg(target_arch = "x86_64")]
fn go_on(registers: &mut libc::mcontext_t, place: usize, result: i32) {
    registers.gregs[libc::REG_RAX as usize] = i64::from(result);
    registers.gregs[libc::REG_RIP as usize] = place as i64;
}

/// The instruction that a thread was stopped at.
#[cfg(target_arch = "aarch64")]
fn place_of(registers: &libc::mcontext_t) -> usize {
    registers.pc as usize
}

/// Has it go on at a place where a function returns `result`.
#[cfg(target_arch = "aarch64")]
fn go_on(registers: &mut libc::mcontext_t, place: usize, result: i32) {
    registers.regs[0] = result as u64;
    registers.pc = place as u64;
}

extern "C" fn on_sigbus(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let thread = context.cast::<libc::ucontext_t>();
    // SAFETY: The kernel passes a context, valid during the handler.
    let registers = unsafe { &mut (*thread).uc_mcontext };
    let touches: [usize; 2] = [
        barlease_touch_read as *const () as usize,
        barlease_touch_write as *const () as usize,
    ];
    if touches.contains(&place_of(registers)) {
        // SAFETY: The kernel passes the information, valid during the handler.
        let code = unsafe { (*info).si_code };
        go_on(registers, barlease_touch_fault as *const () as usize, code);
        return;
    }
    let previous = (&raw const PREVIOUS).cast::<libc::sigaction>();
    // SAFETY: Written when this handler was installed.
    let previous = unsafe { previous.read() };
    if previous.sa_sigaction == libc::SIG_DFL || previous.sa_sigaction == libc::SIG_IGN {
        // SAFETY: The default action; the instruction is repeated, and the process ends.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);
    // SAFETY: A handler that was installed; std installs its own with three arguments.
    let handler: Handler = unsafe { mem::transmute(previous.sa_sigaction) };
    handler(signal, info, context);
}
