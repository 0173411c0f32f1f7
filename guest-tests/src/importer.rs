//! The importer: edu, driven by the module `barlease_importer` (`kmod/importer`).

use std::{
    fs::{self, File, OpenOptions},
    io::Read,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::Path,
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};

use crate::{
    errno::{Answer, Errno, answer},
    lease::{self, Request},
    map::{How, Map},
    observe, page_size,
    pci::{self, Function},
    vfio::{Device, GET},
    wait,
};

#[path = "../../kmod/importer/abi.rs"]
pub mod abi;

use abi::{Entry, Status};

/// The abilities of an importer.
pub const DYNAMIC: u32 = abi::ATTACH_P2P | abi::ATTACH_INVALIDATE;

/// The name of the device in the lab's machines.
pub const EDU: &str = "edu";
/// Another edu, of the machine that has two: behind a port with ACS.
pub const ISOLATED: &str = "isolated";

/// Whether the importer's module is loaded.
#[must_use]
pub fn is_loaded() -> bool {
    Path::new("/sys/module").join(abi::DRIVER).exists()
}

/// Loads the importer's module if it is not, and binds edu to it.
///
/// # Panics
///
/// When that does not work.
pub fn load() {
    insert();
    Function::named(EDU).bind(abi::DRIVER);
}

/// Loads the importer's module if it is not, and has the kernel know the machine's host bridge.
fn insert() {
    if !host_is_known() {
        know_host(true);
    }
    if !is_loaded() {
        let file = format!("/lib/modules/{}.ko", abi::DRIVER);
        let status = Command::new("insmod").arg(file).status();
        assert!(status.expect("insmod").success());
    }
}

const KNOWN_HOST: &str = "barlease_known_host";

/// Whether peer-to-peer DMA through the machine's host bridge is on the kernel's list: it is where
/// the processor is AMD's, and where [`know_host`] was called.
#[must_use]
pub fn host_is_known() -> bool {
    cfg!(target_arch = "x86_64") || Path::new("/sys/module").join(KNOWN_HOST).exists()
}

/// Has the kernel know the host bridge of this machine as one that passes peer-to-peer DMA on
/// (`kmod/probe`), or forget it. An [`Importer`] that is opened makes it known.
///
/// # Panics
///
/// When that does not work.
pub fn know_host(known: bool) {
    let file = format!("/lib/modules/{KNOWN_HOST}.ko");
    let [program, argument] = if known {
        ["insmod", &file]
    } else {
        ["rmmod", KNOWN_HOST]
    };
    let status = Command::new(program).arg(argument).status();
    assert!(status.expect(program).success());
}

/// Unloads the importer's module.
///
/// # Errors
///
/// That of `delete_module`.
pub fn unload() -> Answer<()> {
    let name = std::ffi::CString::new(abi::DRIVER).expect("a name");
    // SAFETY: The name is a C string; what the kernel does with the module is its own.
    let result = unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) };
    answer(result).map(drop)
}

/// How often a module is referred to.
///
/// # Panics
///
/// When it is not loaded.
#[must_use]
pub fn references(module: &str) -> i32 {
    let path = format!("/sys/module/{module}/refcnt");
    let text = fs::read_to_string(path).expect("a module");
    text.trim().parse().expect("a number")
}

/// An open file of the importer. Its attachments end when the last clone of it is
/// dropped.
#[derive(Clone, Debug)]
pub struct Importer(Arc<File>);

impl Importer {
    /// Loads the module and binds edu if need be, and opens its device.
    ///
    /// # Panics
    ///
    /// When that does not work.
    #[must_use]
    pub fn open() -> Self {
        observe::mark_test();
        load();
        Self::opened()
    }

    /// The same with [`ISOLATED`], until that is unbound: the module drives one device at a time.
    ///
    /// # Panics
    ///
    /// When that does not work.
    #[must_use]
    pub fn open_isolated() -> Self {
        observe::mark_test();
        insert();
        let edu = Function::named(EDU);
        if edu.driver().as_deref() == Some(abi::DRIVER) {
            edu.unbind();
        }
        Function::named(ISOLATED).bind(abi::DRIVER);
        Self::opened()
    }

    fn opened() -> Self {
        let file = OpenOptions::new().read(true).write(true).open(abi::DEVICE);
        Self(Arc::new(file.expect("open the importer")))
    }

    fn request<T>(&self, number: u32, argument: &mut T) -> Answer<()> {
        // SAFETY: The kernel reads and writes a `T`, and what addresses in it lead to, which are
        // those of slices as long as it says.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), u64::from(number), argument) };
        answer(result).map(drop)
    }

    /// Attaches as an importer that can do all that is needed.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn attach(&self, fd: impl AsFd) -> Answer<Attachment> {
        self.attach_as(fd, DYNAMIC)
    }

    /// Attaches with these `abi::ATTACH_*`.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn attach_as(&self, fd: impl AsFd, flags: u32) -> Answer<Attachment> {
        let mut attach = abi::Attach {
            fd: fd.as_fd().as_raw_fd(),
            flags,
            id: 0,
        };
        self.request(abi::ATTACH, &mut attach)?;
        Ok(Attachment {
            importer: self.clone(),
            id: attach.id,
        })
    }

    /// Steering tag and processing hint of a namespace.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn steering_tag(&self, fd: impl AsFd, extended: bool) -> Answer<(u32, u32)> {
        let mut tph = abi::Tph {
            fd: fd.as_fd().as_raw_fd(),
            extended: extended.into(),
            ..abi::Tph::default()
        };
        self.request(abi::TPH, &mut tph)?;
        Ok((tph.steering_tag, tph.ph))
    }

    /// Sets edu's DMA mask until the result is dropped: 32 bits then.
    ///
    /// # Panics
    ///
    /// When that does not work.
    #[must_use]
    pub fn mask(&self, bits: u32) -> Mask {
        self.set_mask(bits).expect("set the DMA mask");
        Mask(self.clone())
    }

    fn set_mask(&self, bits: u32) -> Answer<()> {
        let mut target = abi::Target { id: 0, value: bits };
        self.request(abi::MASK, &mut target)
    }
}

/// A DMA mask other than the usual one.
#[derive(Debug)]
pub struct Mask(Importer);

impl Drop for Mask {
    fn drop(&mut self) {
        // Not there any more if edu was unbound, and set anew when it is bound.
        let _ = self.0.set_mask(32);
    }
}

/// edu, attached to a dma-buf. Detached when dropped.
#[derive(Debug)]
pub struct Attachment {
    importer: Importer,
    id: u32,
}

impl Attachment {
    fn target(&self, number: u32, value: u32) -> Answer<()> {
        let mut target = abi::Target { id: self.id, value };
        self.importer.request(number, &mut target)
    }

    /// Maps, to read and write.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn map(&self) -> Answer<()> {
        self.map_for(abi::BIDIRECTIONAL)
    }

    /// Maps the dma-buf into this process, through the file of the importer.
    ///
    /// # Errors
    ///
    /// That of mmap.
    pub fn mmap(&self, how: How, length: u64) -> Answer<Map> {
        how.map(&*self.importer.0, u64::from(self.id) * page_size(), length)
    }

    /// Maps in a direction of the uAPI.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn map_for(&self, direction: u32) -> Answer<()> {
        self.target(abi::MAP, direction)
    }

    /// Undoes the mapping.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn unmap(&self) -> Answer<()> {
        self.target(abi::UNMAP, 0)
    }

    /// Pins.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn pin(&self) -> Answer<()> {
        self.target(abi::PIN, 0)
    }

    /// Unpins.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn unpin(&self) -> Answer<()> {
        self.target(abi::UNPIN, 0)
    }

    /// Lets invalidations undo the mapping (at first), or leaves that to `unmap`.
    ///
    /// # Panics
    ///
    /// When that does not work.
    pub fn hold(&self, hold: bool) {
        self.target(abi::HOLD, hold.into()).expect("hold");
    }

    /// Adds a fence.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn fence(&self) -> Answer<()> {
        self.target(abi::FENCE, 0)
    }

    /// Signals the fence.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn signal(&self) -> Answer<()> {
        self.target(abi::SIGNAL, 0)
    }

    /// Adds a further fence, with these `abi::FENCE_*`: its number. It signals after `time`, or, if
    /// that is nothing, by [`Self::signal_number`] or with the end of the attachment.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn add_fence(&self, flags: u32, time: Duration) -> Answer<u32> {
        let mut fence = abi::AddFence {
            id: self.id,
            flags,
            milliseconds: time.as_millis() as u32,
            number: 0,
        };
        self.importer.request(abi::ADD_FENCE, &mut fence)?;
        Ok(fence.number)
    }

    /// Signals a further fence.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn signal_number(&self, number: u32) -> Answer<()> {
        self.target(abi::SIGNAL, number)
    }

    /// A fence that signals after `time`, or never by itself, as a sync file.
    ///
    /// # Panics
    ///
    /// When there is none: the buffer must have no other fence that shows.
    #[must_use]
    pub fn sync_file(&self, fd: impl AsFd, flags: u32, time: Duration) -> OwnedFd {
        let fence = self.add_fence(flags | abi::FENCE_SHOWS, time);
        fence.expect("a fence");
        lease::export_sync_file(fd).expect("a sync file")
    }

    /// Has the importer keep the reservation lock of the dma-buf while `body` runs.
    ///
    /// # Panics
    ///
    /// When that does not work.
    pub fn occupied<R>(&self, body: impl FnOnce() -> R) -> R {
        thread::scope(|scope| {
            scope.spawn(|| self.target(abi::OCCUPY, 0).expect("the reservation lock"));
            wait::until("the reservation lock", || {
                self.target(abi::OCCUPIED, 0).is_ok()
            });
            let result = catch_unwind(AssertUnwindSafe(body));
            // Also after a panic: a scope waits for its threads.
            self.target(abi::VACATE, 0).expect("the reservation lock");
            match result {
                Ok(result) => result,
                Err(panic) => resume_unwind(panic),
            }
        })
    }

    /// Detaches.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn detach(self) -> Answer<()> {
        self.target(abi::DETACH, 0)
    }

    /// How it is.
    ///
    /// # Panics
    ///
    /// When it is not attached any more.
    #[must_use]
    pub fn status(&self) -> Status {
        let mut status = Status {
            id: self.id,
            ..Status::default()
        };
        let answer = self.importer.request(abi::STATUS, &mut status);
        answer.expect("a status");
        status
    }

    /// Whether it is mapped.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        self.status().mapped == 1
    }

    /// Waits until an invalidation has come while it was mapped.
    ///
    /// # Panics
    ///
    /// When none comes for [long](crate::wait::LONG).
    pub fn wait_for_interruption(&self) {
        wait::until("an invalidation", || self.status().interruptions > 0);
    }

    /// The entries of the last mapping's scatter table.
    ///
    /// # Panics
    ///
    /// When it is not attached any more.
    #[must_use]
    pub fn entries(&self) -> Vec<Entry> {
        let mut list = vec![Entry::default(); 0x1_0000];
        let mut entries = abi::Entries {
            id: self.id,
            count: list.len() as u32,
            entries: list.as_mut_ptr().expose_provenance() as u64,
        };
        let answer = self.importer.request(abi::ENTRIES, &mut entries);
        answer.expect("entries");
        list.truncate(entries.count as usize);
        list
    }

    fn transfer(&self, flags: u32, offset: u64, address: usize, length: usize) -> Answer<()> {
        let mut transfer = abi::Transfer {
            id: self.id,
            flags,
            offset,
            bytes: address as u64,
            length: length as u64,
        };
        self.importer.request(abi::TRANSFER, &mut transfer)
    }

    /// Lets edu read from the dma-buf.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn read(&self, offset: u64, length: usize) -> Answer<Vec<u8>> {
        self.read_with(0, offset, length)
    }

    /// Lets edu read where the dma-buf was when it was last mapped.
    ///
    /// # Panics
    ///
    /// When that does not work. A read that the IOMMU blocks works, and reads nothing of it.
    #[must_use]
    pub fn read_stale(&self, offset: u64, length: usize) -> Vec<u8> {
        let bytes = self.read_with(abi::TRANSFER_STALE, offset, length);
        bytes.expect("a transfer")
    }

    fn read_with(&self, flags: u32, offset: u64, length: usize) -> Answer<Vec<u8>> {
        let mut bytes = vec![0; length];
        let address = bytes.as_mut_ptr().expose_provenance();
        self.transfer(flags, offset, address, length)?;
        Ok(bytes)
    }

    /// Lets edu write to the dma-buf.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Answer<()> {
        let address = bytes.as_ptr().expose_provenance();
        self.transfer(abi::TRANSFER_WRITE, offset, address, bytes.len())
    }

    /// Lets edu write where the dma-buf was when it was last mapped.
    ///
    /// # Panics
    ///
    /// When that does not work. A write that the IOMMU blocks works, and lands nowhere.
    pub fn write_stale(&self, offset: u64, bytes: &[u8]) {
        let flags = abi::TRANSFER_WRITE | abi::TRANSFER_STALE;
        let address = bytes.as_ptr().expose_provenance();
        let answer = self.transfer(flags, offset, address, bytes.len());
        answer.expect("a transfer");
    }

    /// Lets edu copy within the dma-buf. No memory of the machine is used for it.
    ///
    /// # Errors
    ///
    /// That of the ioctl.
    pub fn copy(&self, from: u64, to: u64, length: u64) -> Answer<()> {
        let mut copy = abi::Move {
            id: self.id,
            from,
            to,
            length,
            ..abi::Move::default()
        };
        self.importer.request(abi::COPY, &mut copy)
    }

    /// Where the IOMMU leads an offset of the last mapping; `None` when it blocks it.
    ///
    /// # Panics
    ///
    /// When there is no such offset.
    #[must_use]
    pub fn translate(&self, offset: u64) -> Option<u64> {
        let mut translate = abi::Translate {
            id: self.id,
            offset,
            ..abi::Translate::default()
        };
        let answer = self.importer.request(abi::TRANSLATE, &mut translate);
        answer.expect("a translation");
        (translate.physical != 0).then_some(translate.physical)
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        // An attachment that was detached already is not there any more.
        let _ = self.target(abi::DETACH, 0);
    }
}

/// Another way for the IOMMU to treat edu, until it is dropped: `identity` does not translate,
/// `DMA-FQ` forgets translations lazily, as is usual on hardware, `DMA` is how the lab's machines
/// begin.
#[derive(Debug)]
pub struct Domain(Function);

impl Domain {
    /// Sets it. Attachments of edu end.
    ///
    /// # Panics
    ///
    /// When that does not work.
    #[must_use]
    pub fn set(kind: &str) -> Self {
        load();
        let domain = Self(Function::named(EDU));
        domain.change(kind);
        domain
    }

    fn change(&self, kind: &str) {
        // It can be changed while nobody drives the device.
        self.0.unbind();
        let path = format!("/sys/kernel/iommu_groups/{}/type", self.0.group());
        pci::write(Path::new(&path), kind).expect("change the domain");
        let now = fs::read_to_string(path).expect("the domain");
        assert_eq!(now.trim(), kind);
        load();
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        self.change("DMA");
    }
}

/// An export by the kernel's own exporter (`BARLEASE_FEATURE_DMA_BUF_STOCK`).
///
/// # Errors
///
/// That of the ioctl.
pub fn stock(device: &Device, request: &Request) -> Answer<OwnedFd> {
    let feature = GET | u32::from(barlease_abi::FEATURE_DMA_BUF_STOCK);
    let fd = device.feature(feature, &mut request.bytes())?;
    // SAFETY: The fd is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The kernel's log from some moment on.
#[derive(Debug)]
pub struct KernelLog(File);

impl KernelLog {
    /// All that is left of it.
    ///
    /// # Panics
    ///
    /// When it cannot be read.
    #[must_use]
    pub fn whole() -> Self {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        Self(options.open("/dev/kmsg").expect("the kernel's log"))
    }

    /// From now on.
    ///
    /// # Panics
    ///
    /// When it cannot be read.
    #[must_use]
    pub fn from_now() -> Self {
        let mut log = Self::whole();
        let _ = log.lines();
        log
    }

    /// The interrupts that have come since the last call.
    ///
    /// # Panics
    ///
    /// When it cannot be read.
    #[must_use]
    pub fn lines(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(length) => {
                    let text = String::from_utf8_lossy(&record[..length]).into_owned();
                    let (_, message) = text.split_once(';').expect("a record");
                    lines.push(message.lines().next().unwrap_or_default().to_owned());
                }
                Err(error) => match Errno::of(&error) {
                    crate::errno::EAGAIN => return lines,
                    // Older records were overwritten.
                    Errno(libc::EPIPE) => {}
                    other => panic!("the kernel's log: {other:?}"),
                },
            }
        }
    }
}

/// Checks that nothing is left of what the tests before did, unloads both modules, and loads ours
/// again.
///
/// # Panics
///
/// When something is left.
pub fn check_that_nothing_is_left(functions: &[&str]) {
    observe::mark_test();
    for name in functions {
        let function = Function::named(name);
        if function.driver().as_deref() == Some(pci::BARLEASE) {
            observe::wait_for_buffers(&function, 0);
        }
    }
    if is_loaded() {
        assert_eq!(references(abi::DRIVER), 0);
        assert_eq!(unload(), Ok(()));
    }
    assert_eq!(references(barlease_abi::MODULE_NAME), 0);
    assert_eq!(pci::unload_module(), Ok(()));
    pci::load_module("");
}
