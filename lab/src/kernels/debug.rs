//! Kernels of the lab's own making: debug kernels, with everything on that watches a kernel, and
//! kernels [without something](super::without) that all of Debian's have.
//!
//! They are built from the same `linux-source` as Debian's newest kernel that can be used, in the
//! same tool chain; clang and LLD are added, because KASAN and Rust, and KCSAN and Rust, go
//! together with them only. The configuration is `allnoconfig` and the options in
//! `lab/debug/*.config`, and each of them must have been taken.
//!
//! The result has the shape of Debian's packages, and a build tree for modules beside it:
//!
//! | path | what |
//! |---|---|
//! | `usr/lib/modules/<release>/` | image, modules, the list of what is built in |
//! | `vmlinux` | the image, uncompressed, that emulators enter directly |
//! | `build/` | headers, scripts and Rust metadata: what modules are built against |
//! | `config`, `release`, `stamp.json` | its configuration, its name, what it was made from |

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::kernels::foreign;
use crate::kernels::source::SourceBuild;
use crate::kernels::without::Without;
use crate::packages::apt::{Apt, Package};
use crate::packages::arch::Arch;
use crate::packages::cache::{self, Cache, Stamp, fingerprint, unfinished};
use crate::packages::extra::Extra;
use crate::packages::plan::{KernelPlan, Plan};
use crate::packages::report::{Step, seconds};
use crate::packages::sysroot::{Sysroot, logged, reason};

/// The packages that debug kernels need besides the tool chain.
const TOOLS: &[&str] = &["clang", "lld", "llvm"];

/// The checkers in a kernel of the lab's own making. KASAN and KCSAN exclude each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Memory and locks, with KASAN and lockdep; it can also let allocations fail.
    Memory,
    /// Data races, with KCSAN.
    Races,
    /// Nothing: it is built for what it lacks.
    Nothing(Without),
}

impl Watch {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Memory,
        Self::Races,
        Self::Nothing(Without::PeerToPeer),
        Self::Nothing(Without::PowerManagement),
        Self::Nothing(Without::Sleep),
        Self::Nothing(Without::All),
        Self::Nothing(Without::SmallPages),
    ];

    /// The architecture of its kernel.
    #[must_use]
    pub fn arch(self) -> Arch {
        match self {
            Self::Memory | Self::Races => Arch::Amd64,
            Self::Nothing(without) => without.arch(),
        }
    }

    /// The name of kernels that watch this.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "debug",
            Self::Races => "kcsan",
            Self::Nothing(without) => without.name(),
        }
    }

    /// The name of the kernel that is built from the source of one of Debian's, such as
    /// `debug-7.3`.
    #[must_use]
    pub fn kernel_name(self, of: &KernelPlan) -> String {
        of.source.name.replacen("linux-source", self.name(), 1)
    }

    /// How it watches, or what it lacks.
    #[must_use]
    pub fn means(self) -> &'static str {
        match self {
            Self::Memory => "with KASAN and lockdep",
            Self::Races => "with KCSAN",
            Self::Nothing(without) => without.means(),
        }
    }

    /// The arguments that `make` is given, for the kernel and for modules.
    pub(crate) fn make_arguments(self) -> &'static [&'static str] {
        match self.arch() {
            Arch::Amd64 => &["LLVM=1"],
            Arch::Arm64 => &["LLVM=1", "ARCH=arm64"],
        }
    }

    /// The options, in the order in which they are given to `make allnoconfig`.
    fn options(self) -> [String; 2] {
        let base = include_str!("../../debug/base.config");
        let (base, more) = match self {
            Self::Nothing(without) => return without.options(base),
            Self::Memory => (base.to_owned(), include_str!("../../debug/checks.config")),
            Self::Races => (
                base.replace("\"-debug\"", "\"-kcsan\""),
                include_str!("../../debug/kcsan.config"),
            ),
        };
        [base, more.to_owned()]
    }

    /// Changes the source; empty where nothing is to be changed. It may run again on what it has
    /// changed.
    fn patch(self) -> &'static str {
        match self {
            Self::Memory | Self::Nothing(_) => "",
            Self::Races => INSTRUMENT_RUST,
        }
    }
}

/// Linux 7.3-rc7 has KCSAN instrument C only. What its runtime offers is what LLVM calls for a
/// thread sanitizer, whatever the language, so Rust gets the flags that C files get
/// (`scripts/Makefile.kcsan`), and a target that says that it can have one. All of Rust gets them:
/// `rustc` links no crates of which only some have a sanitizer.
const INSTRUMENT_RUST: &str = r#"
set -eu
cd /work/src
for file in scripts/generate_rust_target.rs scripts/Makefile.kcsan; do
    before=/work/before/$(basename "$file")
    if [ ! -e "$before" ]; then
        mkdir -p /work/before
        cp -p "$file" "$before"
    fi
    cp -p "$before" "$file"
done
sed -i 's/\["kcfi", "kernel-address"\]/["kcfi", "kernel-address", "thread"]/' scripts/generate_rust_target.rs
grep -q '"kernel-address", "thread"' scripts/generate_rust_target.rs
cat >>scripts/Makefile.kcsan <<'END'

KBUILD_RUSTFLAGS += -Zsanitizer=thread \
	-Cllvm-args=-tsan-compound-read-before-write=1 \
	-Cllvm-args=-tsan-distinguish-volatile=1 \
	-Cllvm-args=-tsan-instrument-func-entry-exit=0
END
"#;

/// Machines whose code is left in the archive.
const OTHER_MACHINES: &[&str] = &[
    "alpha",
    "arc",
    "arm",
    "arm64",
    "csky",
    "hexagon",
    "loongarch",
    "m68k",
    "microblaze",
    "mips",
    "nios2",
    "openrisc",
    "parisc",
    "powerpc",
    "riscv",
    "s390",
    "sh",
    "sparc",
    "xtensa",
];

/// The rest: drivers, sound and documentation. Together that is half of the source.
const LEFT_OUT: &[&str] = &[
    "drivers/gpu/drm/*.[ch]",
    "drivers/infiniband/*.[ch]",
    "drivers/media/*.[ch]",
    "drivers/net/ethernet/*.[ch]",
    "drivers/net/wireless/*.[ch]",
    "drivers/scsi/*.[ch]",
    "drivers/staging/*.[ch]",
    "Documentation/*.rst",
    "Documentation/*.yaml",
    "sound/*.[ch]",
    "arch/*.dts*",
];

/// The arguments are what make is told.
const CONFIGURE: &str = r#"
set -eu
cd /work/src
make "$@" KCONFIG_ALLCONFIG=/work/options allnoconfig
"#;

/// `$1` the image, then what make is told.
const COMPILE: &str = r#"
exec 2>&1
set -eu
image=$1; shift
cd /work/src
make -j"$(nproc)" "$@" "$image" modules
"#;

/// Keeps what boots and what modules are built against. Prints the release.
const TRIM: &str = r#"
set -eu
cd /work/src
release=$(cat include/config/kernel.release)
out=/work/out
modules=$out/usr/lib/modules/$release
rm -rf "$out"
mkdir -p "$modules/kernel" "$out/build"
cp arch/x86/boot/bzImage "$modules/vmlinuz"
cp modules.builtin "$modules/"
find . -name '*.ko' -exec cp -t "$modules/kernel" {} +
if grep -qx CONFIG_PVH=y .config; then
    llvm-objcopy --strip-all vmlinux "$out/vmlinux"
fi
cp .config "$out/config"
echo "$release" >"$out/release"
{
    printf '%s\n' .config Kbuild Makefile Module.symvers include arch/x86/include tools/objtool/objtool
    find arch/x86 -maxdepth 1 -name 'Makefile*'
    find . -maxdepth 1 -name '.clippy.toml'
    find scripts \( -name dtc -o -name kconfig -o -name package -o -name coccinelle \) -prune -o ! -type d -print
    find rust \( -name '*.rmeta' -o -name '*.so' -o -name 'generated_*.rs' -o -name Makefile -o -name bindgen_parameters \) -print
} | tar --create --exclude='*.o' --exclude='.*.cmd' --files-from - | tar --extract --directory "$out/build"
"#;

/// The same for an architecture.
fn trim(arch: Arch) -> String {
    match arch {
        Arch::Amd64 => TRIM.to_owned(),
        Arch::Arm64 => TRIM
            .replace("arch/x86/boot/bzImage", "arch/arm64/boot/Image")
            .replace("arch/x86", "arch/arm64")
            .replace(" tools/objtool/objtool", ""),
    }
}

/// How long nothing is said by a build that is not watched on a terminal.
const SILENCE: Duration = Duration::from_secs(120);

/// The meaning of `debug` or `kcsan`, and the release whose source is (the newest, or that of
/// `debug-7.3`); `None` for a kernel of Debian's.
pub(crate) fn asked_for(kernel: &str) -> Option<(Watch, Option<&str>)> {
    Watch::ALL.into_iter().find_map(|watch| {
        let release = match kernel.strip_prefix(watch.name())? {
            "" => None,
            rest => Some(rest.strip_prefix('-')?),
        };
        Some((watch, release))
    })
}

/// A debug kernel that belongs to one of Debian's.
pub(crate) struct Debug<'a> {
    pub(crate) cache: &'a Cache,
    pub(crate) plan: &'a Plan,
    pub(crate) kernel: &'a KernelPlan,
    pub(crate) sysroot: &'a Sysroot,
    pub(crate) watch: Watch,
}

impl Debug<'_> {
    /// Its name, such as `debug-7.3`.
    pub(crate) fn name(&self) -> String {
        self.watch.kernel_name(self.kernel)
    }

    pub(crate) fn folder(&self) -> PathBuf {
        self.cache.path("kernels").join(self.name())
    }

    /// The file that says what it was made from.
    pub(crate) fn stamp_file(&self) -> PathBuf {
        self.folder().join("stamp.json")
    }

    /// The tree that modules are built against.
    pub(crate) fn tree(&self) -> PathBuf {
        self.folder().join("build")
    }

    /// The release of the kernel, when it is complete.
    pub(crate) fn ready(&self) -> Option<String> {
        let added = self.tools().added()?;
        if !self.stamp(&added).fits(&self.stamp_file()) {
            return None;
        }
        let release = fs::read_to_string(self.folder().join("release")).ok()?;
        Some(release.trim().to_owned())
    }

    /// Makes what is missing; `theirs` has the packages of the kernel's architecture.
    pub(crate) fn make(&self, apt: &Apt, theirs: &Apt) -> Result<()> {
        let added = self.tools().add(apt)?;
        if self.stamp(&added).fits(&self.stamp_file()) {
            return Ok(());
        }
        eprintln!(
            "chosen: kernel {}, built here from {} {}. This takes 10 to 30 minutes and 3 GB of disk, once; a build that \
             is interrupted goes on where it was.",
            self.name(),
            self.kernel.source.name,
            self.kernel.source.version
        );
        let source = std::slice::from_ref(&self.kernel.source);
        let work = Work {
            build: SourceBuild {
                folder: self.cache.path("build").join(self.name()),
                log: self.cache.path(format!("kernel-{}.log", self.name())),
                sysroot: self.sysroot,
                name: &self.name(),
                left_out: &left_out(self.watch.arch()),
            },
            watch: self.watch,
        };
        if !work.build.is_unpacked(&self.kernel.source.file_name()) {
            apt.download(source, "to build a kernel for debugging")?;
            work.build.unpack(&apt.file(&self.kernel.source))?;
            apt.forget(source)?;
        }
        work.configure()?;
        work.compile()?;
        let new = work.trim()?;
        if !self.watch.arch().is_native() {
            foreign::add_busybox(self.kernel, theirs, &new)?;
        }
        cache::write_json(&new.join("stamp.json"), &self.stamp(&added))?;
        cache::remove(&self.folder())?;
        fs::create_dir_all(self.cache.path("kernels"))?;
        fs::rename(&new, self.folder())
            .with_context(|| format!("keep {}", self.folder().display()))?;
        cache::remove(&work.build.folder)
    }

    fn tools(&self) -> Extra<'_> {
        Extra {
            plan: self.plan,
            sysroot: self.sysroot,
            names: TOOLS,
            note: "debug-tools.json",
            what: "clang and LLD",
            purpose: "to build a kernel for debugging",
        }
    }

    fn stamp(&self, added: &[Package]) -> Stamp {
        let packages = added.iter().map(Package::file_name);
        Stamp::of(packages.chain([
            self.kernel.source.file_name(),
            self.plan.rustc.clone(),
            fingerprint([
                self.watch.options().concat() + self.watch.patch(),
                trim(self.watch.arch()),
            ]),
        ]))
    }
}

/// The files that may be left in the archive.
fn left_out(arch: Arch) -> Vec<String> {
    let machines = OTHER_MACHINES.iter();
    machines
        .filter(|&&machine| machine != arch.source_folder())
        .map(|machine| format!("arch/{machine}/*.[chS]"))
        .chain(LEFT_OUT.iter().map(|&pattern| pattern.to_owned()))
        .collect()
}

/// A build in progress.
struct Work<'a> {
    build: SourceBuild<'a>,
    watch: Watch,
}

impl Work<'_> {
    fn configure(&self) -> Result<()> {
        let step = Step::start(format!("configuring {}", self.build.name));
        if !self.watch.patch().is_empty() {
            self.run(self.watch.patch(), "have Rust instrumented")?;
        }
        let options = self.watch.options();
        cache::write(&self.build.folder.join("options"), options.concat())?;
        let what = format!("configure {}", self.build.name);
        let mut configure = self.build.command(CONFIGURE)?;
        configure.args(self.watch.make_arguments());
        logged(&mut configure, &self.build.log, &what)?;
        let path = self.build.folder.join("src/.config");
        let config =
            fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        for options in &options {
            check(options, &config)?;
        }
        step.done();
        Ok(())
    }

    fn compile(&self) -> Result<()> {
        let step = Step::start(format!(
            "building {} (10 to 30 minutes, once)",
            self.build.name
        ));
        let mut compile = self.build.command(COMPILE)?;
        compile.arg(match self.watch.arch() {
            Arch::Amd64 => "bzImage",
            Arch::Arm64 => "Image",
        });
        compile.args(self.watch.make_arguments());
        self.follow(&mut compile, &step)?;
        step.done();
        Ok(())
    }

    /// Runs make, keeps its log, and says from time to time how far it is.
    fn follow(&self, make: &mut Command, step: &Step) -> Result<()> {
        let mut log = fs::File::create(&self.build.log)
            .with_context(|| format!("make the log {}", self.build.log.display()))?;
        let mut child = make
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start make")?;
        let (started, mut said, mut files) = (Instant::now(), Instant::now(), 0);
        if let Some(output) = child.stdout.take() {
            let mut lines = BufReader::new(output);
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line)? > 0 {
                log.write_all(&line)?;
                files += usize::from(line.starts_with(b"  "));
                step.doing(String::from_utf8_lossy(&line).trim());
                if said.elapsed() > SILENCE {
                    said = Instant::now();
                    step.say(&format!(
                        "{files} files after {}",
                        seconds(started.elapsed())
                    ));
                }
                line.clear();
            }
        }
        let status = child.wait().context("wait for make")?;
        if !status.success() {
            let text = fs::read(&self.build.log).unwrap_or_default();
            bail!(
                "build {}: ended with {status}; from {}:\n{}",
                self.build.name,
                self.build.log.display(),
                reason(&String::from_utf8_lossy(&text))
            );
        }
        Ok(())
    }

    /// Returns the folder with what is kept.
    fn trim(&self) -> Result<PathBuf> {
        let step = Step::start(format!("keeping what is needed of {}", self.build.name));
        let script = trim(self.watch.arch());
        self.run(&script, &format!("trim {}", self.build.name))?;
        let new = unfinished(&self.build.folder);
        cache::remove(&new)?;
        fs::rename(self.build.folder.join("out"), &new)
            .with_context(|| format!("keep {}", new.display()))?;
        step.done();
        Ok(new)
    }

    fn run(&self, script: &str, what: &str) -> Result<()> {
        logged(&mut self.build.command(script)?, &self.build.log, what)
    }
}

/// Refuses a configuration that lacks an option that was asked for: it would watch less than
/// everybody believes.
fn check(options: &str, config: &str) -> Result<()> {
    let lost = not_taken(options, config);
    if lost.is_empty() {
        return Ok(());
    }
    bail!(
        "the kernel's configuration has not taken {} of the options in lab/debug: {}. \
         Either this version of the kernel no longer has them, or what they depend on is off.",
        lost.len(),
        lost.join(", ")
    )
}

/// The lines `CONFIG_X=value` and `# CONFIG_X is not set` of a list that do not hold in a
/// configuration.
fn not_taken<'a>(options: &'a str, config: &str) -> Vec<&'a str> {
    let off = |line: &'a str| line.strip_prefix("# CONFIG_")?.strip_suffix(" is not set");
    let holds = |line: &&'a str| match off(line) {
        Some(name) => !config
            .lines()
            .any(|have| have.starts_with(&format!("CONFIG_{name}="))),
        None => config.lines().any(|have| have == *line),
    };
    options
        .lines()
        .filter(|line| line.starts_with("CONFIG_") || off(line).is_some())
        .filter(|line| !holds(line))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_kernels_are_asked_for_by_name() {
        assert_eq!(asked_for("debug"), Some((Watch::Memory, None)));
        assert_eq!(asked_for("debug-7.3"), Some((Watch::Memory, Some("7.3"))));
        assert_eq!(asked_for("kcsan"), Some((Watch::Races, None)));
        assert_eq!(asked_for("kcsan-7.3"), Some((Watch::Races, Some("7.3"))));
        let without = Watch::Nothing(Without::PeerToPeer);
        assert_eq!(asked_for("no-p2pdma-7.3"), Some((without, Some("7.3"))));
        let without = Watch::Nothing(Without::SmallPages);
        assert_eq!(asked_for("arm64-64k"), Some((without, None)));
        assert_eq!(asked_for("arm64"), None);
        assert_eq!(asked_for("7.3"), None);
        assert_eq!(asked_for("debugger"), None);
    }

    #[test]
    fn options_that_were_not_taken_are_named() {
        let options = "# A comment\nCONFIG_A=y\nCONFIG_B=2048\n# CONFIG_C is not set\n# CONFIG_D is not set\n";
        let config = "CONFIG_A=y\nCONFIG_B=2048\n# CONFIG_C is not set\n";
        assert!(not_taken(options, config).is_empty());
        let config = "CONFIG_A=m\nCONFIG_B=20480\nCONFIG_C=y\nCONFIG_DD=y\n";
        assert_eq!(
            not_taken(options, config),
            ["CONFIG_A=y", "CONFIG_B=2048", "# CONFIG_C is not set"]
        );
        let text = check(options, config).unwrap_err().to_string();
        assert!(
            text.contains("3 of") && text.contains("CONFIG_A=y"),
            "{text}"
        );
    }

    #[test]
    fn no_option_is_given_twice() {
        for (watch, means) in [
            (Watch::Memory, ["CONFIG_KASAN", "CONFIG_PROVE_LOCKING"]),
            (Watch::Races, ["CONFIG_KCSAN", "CONFIG_KCSAN_EARLY_ENABLE"]),
            (
                Watch::Nothing(Without::All),
                ["CONFIG_PM", "CONFIG_PCI_P2PDMA"],
            ),
            (
                Watch::Nothing(Without::SmallPages),
                ["CONFIG_PM", "CONFIG_ARM64_64K_PAGES"],
            ),
        ] {
            let options = watch.options().concat();
            let mut seen = std::collections::BTreeSet::new();
            for line in options.lines() {
                let name = line
                    .trim_start_matches("# ")
                    .split(['=', ' '])
                    .next()
                    .unwrap_or_default();
                if name.starts_with("CONFIG_") {
                    assert!(seen.insert(name), "{name}");
                }
            }
            assert!(means.iter().all(|name| seen.contains(name)), "{watch:?}");
            let name = format!("CONFIG_LOCALVERSION=\"-{}\"", watch.name());
            assert!(options.lines().any(|line| line == name), "{name}");
        }
    }
}
