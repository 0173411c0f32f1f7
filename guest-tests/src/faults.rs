//! Allocations that fail on request: `/proc/PID/task/TID/fail-nth`
//! (`Documentation/fault-injection/fault-injection.rst` of the kernel), and what must be as it was
//! after that.
//!
//! Only kernels with `CONFIG_FAULT_INJECTION` have it: the debug kernel. Of those, one that was
//! started with `slab_debug=U` says who has allocated what; the machine of these tests is.

use std::{
    collections::BTreeMap,
    env,
    fmt::{self, Debug, Display},
    fs::{self, File},
    io::{self, Write},
    mem,
    os::{fd::AsRawFd, unix::fs::FileExt},
    path::Path,
    ptr, thread,
    time::{Duration, Instant},
};

use crate::{
    errno::{Answer, ENOMEM, Errno, answer},
    importer, observe,
    pci::Function,
};

const DEBUGFS: &str = "/sys/kernel/debug";

/// More points than any operation has.
const FAR: u32 = 100_000;

/// How long to wait for what the kernel does a little later, such as freeing after a grace period
/// of RCU.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often the kernel is asked for a list that it could not make.
const TRIES: u32 = 200;

/// Says something although the test passes: libtest keeps back what is printed.
pub fn say(text: impl Display) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// How the kernel is to treat an allocation that fails.
#[derive(Debug)]
pub struct Faults {
    fail_nth: File,
}

impl Faults {
    /// Makes allocations of this thread ready to fail. `None`, said on stderr, where the kernel
    /// cannot do that.
    ///
    /// # Panics
    ///
    /// When a kernel that could does not.
    #[must_use]
    pub fn prepare() -> Option<Self> {
        observe::mark_test();
        stay_on_this_cpu();
        let open = File::options()
            .read(true)
            .write(true)
            .open("/proc/thread-self/fail-nth");
        let fail_nth = match open {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                assert!(!built_to_fail(), "fault injection without fail-nth");
                say("skipped: this kernel was built without fault injection");
                return None;
            }
            Err(error) => panic!("fail-nth: {error}"),
        };
        // A line a failure would fill the log; traces help to find out which failure did harm.
        let verbose = env::var("BARLEASE_TEST_FAULTS_VERBOSE").unwrap_or_else(|_| "0".to_owned());
        for (what, settings) in [
            ("failslab", &[("ignore-gfp-wait", "N")][..]),
            (
                "fail_page_alloc",
                &[
                    ("ignore-gfp-wait", "N"),
                    ("ignore-gfp-highmem", "N"),
                    ("min-order", "0"),
                ],
            ),
        ] {
            for (name, value) in settings.iter().chain(&[("verbose", verbose.as_str())]) {
                let path = format!("{DEBUGFS}/{what}/{name}");
                fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}"));
            }
        }
        Some(Self { fail_nth })
    }

    fn arm(&self, nth: u32) {
        // No formatting: nothing but the operation is to come between the numbers.
        let mut digits = [b'0'; 6];
        let mut rest = nth;
        for digit in digits.iter_mut().rev() {
            *digit += (rest % 10) as u8;
            rest /= 10;
        }
        // A zero at the beginning would make it octal.
        let first = digits.iter().position(|digit| *digit != b'0').unwrap_or(5);
        let digits = &digits[first..];
        self.fail_nth.write_at(digits, 0).expect("set fail-nth");
    }

    /// The rest of the number; 0 when an allocation has failed.
    fn left(&self) -> u32 {
        let mut digits = [0; 16];
        let length = self.fail_nth.read_at(&mut digits, 0).expect("fail-nth");
        let digits = digits[..length].iter().filter(|byte| byte.is_ascii_digit());
        digits.fold(0, |number, digit| number * 10 + u32::from(digit - b'0'))
    }

    /// Runs `operation`, whose `nth` allocation, from 1 on, fails. Also whether there were so many.
    ///
    /// `operation` should be one system call and what it needs, made ready before: what the C
    /// library or a page fault of this program allocates counts, too.
    pub fn with<R>(&self, nth: u32, operation: impl FnOnce() -> R) -> (R, bool) {
        self.arm(nth);
        let result = operation();
        let failed = self.left() == 0;
        self.arm(0);
        (result, failed)
    }

    /// How many allocations `operation` makes.
    pub fn count<R>(&self, operation: impl FnOnce() -> R) -> (R, u32) {
        self.arm(FAR);
        let result = operation();
        let left = self.left();
        self.arm(0);
        (result, FAR - left)
    }
}

/// Keeps this thread where it is: what the kernel keeps for the next time, such as I/O virtual
/// addresses, it keeps for each processor.
///
/// # Panics
///
/// When the kernel refuses.
pub fn stay_on_this_cpu() {
    // SAFETY: All zeroes is an empty set.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    // SAFETY: Has no argument.
    let cpu = unsafe { libc::sched_getcpu() };
    let cpu = usize::try_from(cpu).expect("the number of a processor");
    // SAFETY: The kernel has fewer processors than the set.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: The set is valid; 0 is this thread.
    let result = unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) };
    answer(result).expect("stay on a processor");
}

/// Whether the kernel's configuration has fault injection.
fn built_to_fail() -> bool {
    Path::new(DEBUGFS).join("failslab").exists()
}

/// How an operation that is tried with one allocation after the other failing may end.
#[derive(Clone, Copy, Debug)]
pub struct Trial<'a> {
    faults: &'a Faults,
    ledger: &'a Ledger,
    name: &'a str,
    errors: &'a [Errno],
    first: u32,
}

/// How often what happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Points {
    /// Allocations that were made to fail.
    pub all: u32,
    /// Of these, those that made the operation fail.
    pub refused: u32,
}

impl Display for Points {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} allocations, {} needed", self.all, self.refused)
    }
}

impl<'a> Trial<'a> {
    /// An operation that may end with ENOMEM, and that leaves behind nothing that `ledger` has.
    #[must_use]
    pub fn new(name: &'a str, faults: &'a Faults, ledger: &'a Ledger) -> Self {
        Self {
            faults,
            ledger,
            name,
            errors: &[ENOMEM],
            first: 1,
        }
    }

    /// It may end with these.
    #[must_use]
    pub fn errors(mut self, errors: &'a [Errno]) -> Self {
        self.errors = errors;
        self
    }

    /// It must not fail, whatever allocation does.
    #[must_use]
    pub fn never_fails(self) -> Self {
        self.errors(&[])
    }

    /// Leaves out the allocations before the `first`.
    #[must_use]
    pub fn from(mut self, first: u32) -> Self {
        self.first = first;
        self
    }

    /// Lets one allocation after the other fail, until there are no more. When `operation` fails it
    /// must work right after that, and at the end what there was before must be there.
    ///
    /// The result of `operation` is dropped to undo it.
    ///
    /// # Panics
    ///
    /// When something of this is not so.
    pub fn run<T>(self, mut operation: impl FnMut() -> Answer<T>) -> Points {
        self.run_on(|| (), |()| operation(), |(), result| drop(result))
    }

    /// The same on what `prepare` makes, anew for each allocation; `check` looks at it when the
    /// operation has worked. It is dropped after what `operation` returned.
    ///
    /// # Panics
    ///
    /// As `run`, or as `check` does.
    pub fn run_on<P, T>(
        self,
        mut prepare: impl FnMut() -> P,
        mut operation: impl FnMut(&mut P) -> Answer<T>,
        mut check: impl FnMut(&mut P, T),
    ) -> Points {
        let name = self.name;
        // The kernel and this program have made by now what they allocate once and keep.
        for _ in 0..2 {
            let mut object = prepare();
            match operation(&mut object) {
                Ok(result) => check(&mut object, result),
                Err(errno) => panic!("{name}, with no allocation failing: {errno:?}"),
            }
        }
        let before = self.ledger.now();
        let mut points = Points::default();
        for nth in self.first.. {
            assert!(nth < FAR, "{name}: no end of allocations");
            let mut object = prepare();
            let (answer, failed) = self.faults.with(nth, || operation(&mut object));
            let result = match answer {
                Ok(result) => result,
                Err(errno) if failed && self.errors.contains(&errno) => {
                    points.refused += 1;
                    match operation(&mut object) {
                        Ok(result) => result,
                        Err(errno) => panic!("{name}, after allocation {nth} failed: {errno:?}"),
                    }
                }
                Err(errno) => panic!("{name}, allocation {nth} (failed: {failed}): {errno:?}"),
            };
            check(&mut object, result);
            drop(object);
            let when = format!("{name}, allocation {nth}");
            self.ledger.wait_for(&before, &when);
            if !failed {
                break;
            }
            points.all += 1;
        }
        say(format!("{name}: {points}"));
        points
    }
}

/// The counts that tell whether something has been left behind.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    functions: Vec<Function>,
}

/// Numbers by what they count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts(BTreeMap<String, i64>);

impl Ledger {
    /// Of dma-bufs, DMA mappings and module references, and of the buffers of these functions.
    #[must_use]
    pub fn of(functions: &[&Function]) -> Self {
        Self {
            functions: functions.iter().map(|&function| function.clone()).collect(),
        }
    }

    /// The numbers now.
    ///
    /// # Panics
    ///
    /// When they cannot be had.
    #[must_use]
    pub fn now(&self) -> Counts {
        let mut counts = BTreeMap::new();
        for function in &self.functions {
            let lines = observe::buffers(function);
            let sum = |column| {
                let numbers = lines.iter().map(|line| line.get(column).parse::<i64>());
                numbers.sum::<Result<i64, _>>().expect("numbers")
            };
            let bdf = &function.bdf;
            counts.insert(format!("buffers of {bdf}"), lines.len() as i64);
            counts.insert(format!("importers of {bdf}"), sum("attachments"));
            counts.insert(format!("mappings of {bdf}"), sum("mmaps"));
        }
        counts.insert("dma-bufs".to_owned(), dma_bufs());
        // When one of its own allocations fails, the kernel no longer watches DMA mappings.
        if fs::read_to_string(format!("{DEBUGFS}/dma-api/disabled")).is_ok_and(|text| text == "N\n")
        {
            let free = number(&format!("{DEBUGFS}/dma-api/num_free_entries"));
            counts.insert("DMA mappings that can be watched".to_owned(), free);
        }
        for module in [barlease_abi::MODULE_NAME, importer::abi::DRIVER] {
            let path = format!("/sys/module/{module}/refcnt");
            if Path::new(&path).exists() {
                counts.insert(format!("references to {module}"), number(&path));
            }
        }
        Counts(counts)
    }

    /// Waits until the numbers are `wanted`: some references are dropped a little after the call
    /// that gave them up.
    fn wait_for(&self, wanted: &Counts, when: &str) {
        wait_until(
            || self.now(),
            |counts| {
                let other = |(what, count): (&String, &i64)| counts.0.get(what) != Some(count);
                let wrong = wanted
                    .0
                    .iter()
                    .filter(|(what, _)| counts.0.contains_key(*what));
                let wrong = wrong.into_iter().any(other);
                wrong.then(|| format!("{when}: {counts:?}, before: {wanted:?}"))
            },
        );
    }
}

fn wait_until<T>(mut look: impl FnMut() -> T, wrong: impl Fn(&T) -> Option<String>) {
    let end = Instant::now() + PATIENCE;
    while let Some(what) = wrong(&look()) {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn number(path: &str) -> i64 {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let number = text.trim().parse();
    number.unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// All dma-bufs that exist.
fn dma_bufs() -> i64 {
    let text = fs::read_to_string(format!("{DEBUGFS}/dma_buf/bufinfo")).expect("bufinfo");
    // Total 2 objects, 8192 bytes
    let total = text.lines().find_map(|line| line.strip_prefix("Total "));
    let number = total.and_then(|total| total.split(' ').next()?.parse().ok());
    number.expect("the total of bufinfo")
}

/// Caches whose objects belong to nobody: nodes of trees that others have their entries in, too,
/// and addresses of the kernel, which are given back some time after their use. (What they are used
/// for is in other caches.)
const SHARED: &[&str] = &["radix_tree_node", "vmap_area"];

/// Functions that keep what they allocate for the next time: the cache of I/O virtual addresses,
/// which has those of a few pages, as the stock helper maps them to find out how an importer
/// reaches the device.
const KEPT: &[&str] = &["free_iova_fast", "dma_buf_phys_vec_to_sgt"];

/// The objects that our modules have allocated, or had allocated, by cache and call trace: inodes,
/// files and page tables of dma-bufs included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory(BTreeMap<String, i64>);

impl Memory {
    /// The objects that are allocated now.
    ///
    /// # Panics
    ///
    /// When the kernel does not say: it was not started with `slab_debug=U`.
    #[must_use]
    pub fn now() -> Self {
        let mut found = BTreeMap::new();
        let caches = fs::read_dir(format!("{DEBUGFS}/slab")).expect("traces of allocations");
        for cache in caches {
            let cache = cache.expect("a cache");
            let name = cache.file_name().to_string_lossy().into_owned();
            if SHARED.contains(&name.as_str()) {
                continue;
            }
            for trace in traces(&name).split("\n\n") {
                if let Some((trace, count)) = ours(trace) {
                    *found.entry(format!("{name}: {trace}")).or_default() += count;
                }
            }
        }
        Self(found)
    }

    /// Waits until no more than this is allocated.
    ///
    /// # Panics
    ///
    /// When that does not come about.
    pub fn wait_for(&self) {
        wait_until(Self::now, |now| {
            let more: Vec<_> = now
                .0
                .iter()
                .filter(|(trace, count)| *count > self.0.get(*trace).unwrap_or(&0))
                .map(|(trace, count)| format!("{count} of {trace}"))
                .collect();
            (!more.is_empty()).then(|| format!("left behind:\n{}", more.join("\n")))
        });
    }

    /// Objects.
    #[must_use]
    pub fn objects(&self) -> i64 {
        self.0.values().sum()
    }
}

/// The call traces that have allocated the objects of a cache.
///
/// The kernel makes the list in memory that it asks for without waiting, and says nothing when it
/// has had to leave out the rest: then there are fewer in it than there are objects.
fn traces(cache: &str) -> String {
    let folder = Path::new("/sys/kernel/slab").join(cache);
    let mut shrunk = false;
    for _ in 0..TRIES {
        let objects = fs::read_to_string(folder.join("objects")).expect("the size of a cache");
        let objects = objects.split_whitespace().next();
        let objects: i64 = objects.and_then(|text| text.parse().ok()).expect("objects");
        let traces = fs::read_to_string(format!("{DEBUGFS}/slab/{cache}/alloc_traces"));
        let traces = traces.expect("traces");
        if traces.split("\n\n").filter_map(count).sum::<i64>() < objects {
            let _ = fs::write("/proc/sys/vm/drop_caches", "3");
            let _ = fs::write("/proc/sys/vm/compact_memory", "1");
        } else if shrunk || !traces.split("\n\n").any(|trace| ours(trace).is_some()) {
            return traces;
        } else {
            // KASAN keeps what was freed for a while, for which it is not free.
            fs::write(folder.join("shrink"), "1").expect("shrink a cache");
            shrunk = true;
        }
    }
    panic!("the kernel does not list all objects of {cache}");
}

/// How many objects a trace is of.
fn count(trace: &str) -> Option<i64> {
    trace.split_whitespace().next()?.parse().ok()
}

/// The functions of a trace up to the last one that is in one of our modules, and how many objects
/// were allocated by it.
///
/// Their caller may have been in memory that is something else's now, such as the beginning of a
/// module.
fn ours(trace: &str) -> Option<(String, i64)> {
    let modules = [barlease_abi::MODULE_NAME, importer::abi::DRIVER];
    let modules = modules.map(|module| format!("[{module}]"));
    let functions: Vec<_> = trace.trim_start().lines().skip(1).map(str::trim).collect();
    let is_ours = |function: &str| modules.iter().any(|module| function.ends_with(module));
    let last = functions.iter().rposition(|function| is_ours(function))?;
    let is_kept = |function: &str| KEPT.iter().any(|kept| function.starts_with(kept));
    if functions.iter().any(|function| is_kept(function)) {
        return None;
    }
    Some((functions[..=last].join(" < "), count(trace)?))
}

/// Loads a module from its file.
///
/// # Errors
///
/// That of `finit_module`.
pub fn load(module: &File) -> Answer<()> {
    // SAFETY: The parameters are a C string; what the kernel does with the module is its own.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, module.as_raw_fd(), c"".as_ptr(), 0) };
    answer(result).map(drop)
}

/// Makes a child that ends at once, and waits for it.
///
/// # Errors
///
/// That of `fork`.
pub fn fork() -> Answer<()> {
    // SAFETY: The child does nothing but end.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: Ends the process.
        unsafe { libc::_exit(0) };
    }
    let child = answer(child)?;
    // SAFETY: A null pointer stands for no status.
    let waited = unsafe { libc::waitpid(child, ptr::null_mut(), 0) };
    assert_eq!(waited, child, "wait for a child");
    Ok(())
}
