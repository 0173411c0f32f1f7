//! Makes everything that a module build and a guest need, once.
//!
//! Packages → sysroot (tool chain, emulator) → kernel (image, modules, headers) → Rust overlay; for
//! a debug kernel, sysroot → clang → kernel built from source. Each step has a stamp of what it was
//! made from; a run begins at the first step whose stamp does not fit. When all fit, nothing is
//! done and no network is touched.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::kernels::debug::{self, Debug, Watch};
use crate::kernels::flavour::{Flavour, Found};
use crate::kernels::foreign::Foreign;
use crate::kernels::kernel::Kernel;
use crate::kernels::overlay;
use crate::packages::apt::{Apt, Package, Record};
use crate::packages::arch::Arch;
use crate::packages::cache::{self, Cache, Lock, Stamp, fingerprint, unfinished};
use crate::packages::command;
use crate::packages::plan::{self, KernelPlan, Plan};
use crate::packages::sysroot::Sysroot;

/// The request.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The beginning of a kernel release, or the name of a [flavour](Flavour::name), `debug` or
    /// `kcsan`, or such as `debug-` and such a beginning; `BARLEASE_KERNEL`, and then the newest of
    /// Debian's, when absent.
    pub kernel: Option<String>,
    /// Whether to look again at what the mirror has.
    pub update: bool,
}

/// Everything that is needed to build modules for a kernel and to boot it.
#[derive(Debug)]
pub struct Prepared {
    /// The cache that it is in.
    pub cache: Cache,
    /// Tool chain and emulator.
    pub sysroot: Sysroot,
    /// The kernel.
    pub kernel: Kernel,
    /// The tarball that gives Debian's headers of this kernel what Rust modules need; for a debug
    /// kernel or one of another architecture its build tree, which has all of that.
    pub overlay: PathBuf,
    /// The file that says what kernel and overlay were made from.
    pub(crate) stamp: PathBuf,
    /// The name that the tool chain's compiler gives itself.
    pub rustc: String,
    _in_use: Lock,
}

/// Makes what is missing, telling the user what and why.
///
/// # Errors
///
/// When a download, an unpacking or a build fails, or no kernel fits; what was done before is kept.
pub fn prepare(request: &Request) -> Result<Prepared> {
    let cache = Cache::open()?;
    let wanted = Wanted::of(request.kernel.clone().or_else(|| {
        std::env::var("BARLEASE_KERNEL")
            .ok()
            .filter(|k| !k.is_empty())
    }));
    if !request.update {
        let in_use = cache.in_use()?;
        if let Some(ready) = ready(&cache, &wanted) {
            return Ok(ready.with(cache, in_use));
        }
    }
    let turn = cache.lock("prepare", "preparing tool chain and kernel")?;
    let maker = Maker {
        cache: cache.clone(),
        wanted,
    };
    maker.make(request.update)?;
    drop(turn);
    let in_use = cache.in_use()?;
    let ready = ready(&cache, &maker.wanted)
        .context("what was just prepared does not fit its own stamps")?;
    Ok(ready.with(cache, in_use))
}

/// The contents of the cache, for listing.
#[must_use]
pub fn plan(cache: &Cache) -> Option<Plan> {
    cache::read_json(&cache.path("plan.json")).filter(|plan: &Plan| plan.asked == plan::asked())
}

/// The same with the kernels of a flavour.
#[must_use]
pub fn plan_of(cache: &Cache, flavour: Flavour) -> Option<Plan> {
    let plan = plan(cache)?;
    if flavour == Flavour::Plain {
        return Some(plan);
    }
    let found = cache::read_json(&found_file(cache, flavour));
    let found = found.filter(|found: &Found| found.rustc == plan.rustc)?;
    Some(Plan {
        kernels: found.kernels,
        ..plan
    })
}

fn found_file(cache: &Cache, flavour: Flavour) -> PathBuf {
    cache.path(format!("kernels-{}.json", flavour.name()))
}

/// Whether image, modules, headers and overlay of a kernel are there.
#[must_use]
pub fn is_ready(cache: &Cache, plan: &Plan, kernel: &KernelPlan) -> bool {
    kernel.refusal.is_none() && Folders::of(cache, plan, kernel).complete(plan, kernel)
}

/// Whether the debug kernel from the source of a kernel that watches this is there.
#[must_use]
pub fn is_debug_ready(cache: &Cache, plan: &Plan, kernel: &KernelPlan, watch: Watch) -> bool {
    let sysroot = Sysroot::at(sysroot_path(cache, &plan.tools));
    let debug = Debug {
        cache,
        plan,
        kernel,
        sysroot: &sysroot,
        watch,
    };
    kernel.refusal.is_none() && debug.ready().is_some()
}

/// Which kernel is wanted.
struct Wanted {
    /// None for a kernel of Debian's.
    watch: Option<Watch>,
    flavour: Flavour,
    /// The beginning of the release of a kernel of Debian's: of itself, or of that whose source is
    /// built.
    release: Option<String>,
}

impl Wanted {
    fn of(kernel: Option<String>) -> Self {
        match kernel.as_deref().and_then(debug::asked_for) {
            Some((watch, release)) => Self {
                watch: Some(watch),
                flavour: match watch.arch() {
                    Arch::Amd64 => Flavour::Plain,
                    // Its source and its programs are those of Debian's kernel.
                    Arch::Arm64 => Flavour::Arm64,
                },
                release: release.map(str::to_owned),
            },
            None => {
                let asked = kernel.as_deref().map(Flavour::asked_for);
                let (flavour, release) = asked.unwrap_or_default();
                Self {
                    watch: None,
                    flavour,
                    release: release.map(str::to_owned),
                }
            }
        }
    }
}

struct Ready {
    rustc: String,
    sysroot: Sysroot,
    kernel: Kernel,
    overlay: PathBuf,
    stamp: PathBuf,
}

impl Ready {
    fn with(self, cache: Cache, in_use: Lock) -> Prepared {
        Prepared {
            cache,
            sysroot: self.sysroot,
            kernel: self.kernel,
            overlay: self.overlay,
            stamp: self.stamp,
            rustc: self.rustc,
            _in_use: in_use,
        }
    }
}

fn ready(cache: &Cache, wanted: &Wanted) -> Option<Ready> {
    let plan = plan_of(cache, wanted.flavour)?;
    let kernel = plan.kernel(wanted.release.as_deref()).ok()?;
    let folders = Folders::of(cache, &plan, kernel);
    let sysroot = Sysroot::at(folders.sysroot.clone());
    let arch = wanted.flavour.arch();
    let foreign = Foreign {
        cache,
        plan: &plan,
        kernel,
        sysroot: &sysroot,
        arch,
    };
    if !arch.is_native() && wanted.watch.is_none() {
        return Some(Ready {
            kernel: Kernel::foreign(foreign.ready()?, &kernel.release, foreign.arch),
            overlay: foreign.tree(),
            stamp: foreign.stamp_file(),
            rustc: plan.rustc.clone(),
            sysroot,
        });
    }
    if !arch.is_native() && !foreign.has_tools() {
        return None;
    }
    if let Some(watch) = wanted.watch {
        let debug = Debug {
            cache,
            plan: &plan,
            kernel,
            sysroot: &sysroot,
            watch,
        };
        return Some(Ready {
            kernel: Kernel::debug(debug.folder(), &debug.name(), &debug.ready()?, watch),
            overlay: debug.tree(),
            stamp: debug.stamp_file(),
            rustc: plan.rustc.clone(),
            sysroot,
        });
    }
    folders.complete(&plan, kernel).then(|| Ready {
        kernel: Kernel::at(folders.kernel.clone(), &kernel.release),
        overlay: overlay::tarball(cache, kernel),
        stamp: folders.overlay_stamp.clone(),
        rustc: plan.rustc.clone(),
        sysroot,
    })
}

/// The folders and stamps of a plan and one of its kernels.
struct Folders {
    sysroot: PathBuf,
    kernel: PathBuf,
    overlay_stamp: PathBuf,
}

impl Folders {
    fn of(cache: &Cache, plan: &Plan, kernel: &KernelPlan) -> Self {
        Self {
            sysroot: sysroot_path(cache, &plan.tools),
            kernel: cache.path("kernels").join(&kernel.release),
            overlay_stamp: cache.path(format!("rust-overlay-{}.json", kernel.release)),
        }
    }

    fn laid_stamp(&self, kernel: &KernelPlan) -> PathBuf {
        self.sysroot
            .join(format!("headers-{}.json", kernel.release))
    }

    fn kernel_stamp(&self) -> PathBuf {
        self.kernel.join("stamp.json")
    }

    fn complete(&self, plan: &Plan, kernel: &KernelPlan) -> bool {
        self.sysroot.is_dir()
            && image_stamp(kernel).fits(&self.kernel_stamp())
            && overlay_stamp(plan, kernel).fits(&self.overlay_stamp)
            && overlay_stamp(plan, kernel).fits(&self.laid_stamp(kernel))
    }
}

fn sysroot_path(cache: &Cache, tools: &[Package]) -> PathBuf {
    let files = tools.iter().map(Package::file_name);
    cache.path(format!("sysroot-{}", fingerprint(files)))
}

fn image_stamp(kernel: &KernelPlan) -> Stamp {
    Stamp::of(kernel.image.iter().map(Package::file_name))
}

fn overlay_stamp(plan: &Plan, kernel: &KernelPlan) -> Stamp {
    let packages = kernel
        .headers
        .iter()
        .chain([&kernel.source])
        .map(Package::file_name);
    Stamp::of(packages.chain([plan.rustc.clone()]))
}

/// The kernels of a flavour that the mirror has, and what it says of their packages; `apt` has
/// those of its architecture.
fn kernels(apt: &Apt, flavour: Flavour) -> Result<(Vec<KernelPlan>, Vec<Record>)> {
    let releases = plan::releases(&apt.names("linux-headers-")?, flavour.suffix());
    let names: Vec<_> = releases
        .iter()
        .flat_map(|release| plan::kernel_packages(release))
        .collect();
    let records = apt.show(&names)?;
    Ok((plan::kernels(&releases, &records), records))
}

struct Maker {
    cache: Cache,
    wanted: Wanted,
}

impl Maker {
    fn make(&self, update: bool) -> Result<()> {
        let old = if update { None } else { plan(&self.cache) };
        let (apt, mut plan) = match old {
            Some(plan) => (Apt::set_up(&self.cache, Arch::Amd64)?.0, plan),
            None => self.resolve()?,
        };
        let sysroot = self.tools(&apt, &plan)?;
        if plan.rustc.is_empty() {
            let text = command::output(
                sysroot.program("usr/bin/rustc").arg("--version"),
                "ask rustc for its version",
            )?;
            plan.rustc = text.trim().to_owned();
            self.judge(&apt, &mut plan)?;
            cache::write_json(&self.cache.path("plan.json"), &plan)?;
        }
        let arch = self.wanted.flavour.arch();
        let theirs = if arch.is_native() {
            apt.clone()
        } else {
            Apt::set_up(&self.cache, arch)?.0
        };
        if self.wanted.flavour != Flavour::Plain {
            plan = self.flavoured(&theirs, plan, update)?;
        }
        let kernel = plan.kernel(self.wanted.release.as_deref())?.clone();
        let foreign = Foreign {
            cache: &self.cache,
            plan: &plan,
            kernel: &kernel,
            sysroot: &sysroot,
            arch,
        };
        if let Some(watch) = self.wanted.watch {
            if !arch.is_native() {
                foreign.add_tools(&apt, &theirs)?;
            }
            let debug = Debug {
                cache: &self.cache,
                plan: &plan,
                kernel: &kernel,
                sysroot: &sysroot,
                watch,
            };
            debug.make(&apt, &theirs)?;
        } else if !arch.is_native() {
            foreign.make(&apt, &theirs)?;
        } else {
            self.kernel(&apt, &plan, &sysroot, &kernel)?;
        }
        self.forget_old(&plan)
    }

    /// Asks the mirror what there is.
    fn resolve(&self) -> Result<(Apt, Plan)> {
        let (apt, mirror) = Apt::set_up(&self.cache, Arch::Amd64)?;
        eprintln!(
            "Barlease's lab needs a Debian tool chain, an emulator and a kernel with its source: about 700 MB to \
             download where nothing is there yet, 3 GB on disk while it works.\n  from  {mirror}\n  into  {}  (BARLEASE_CACHE chooses another place)\n\
             Nothing is installed on this host.",
            self.cache.path("").display()
        );
        apt.update()?;
        let (kernels, records) = kernels(&apt, Flavour::Plain)?;
        let tools = apt.closure(&plan::tools(&records))?;
        Ok((
            apt,
            Plan {
                mirror,
                asked: plan::asked(),
                tools,
                rustc: String::new(),
                kernels,
            },
        ))
    }

    fn tools(&self, apt: &Apt, plan: &Plan) -> Result<Sysroot> {
        let path = sysroot_path(&self.cache, &plan.tools);
        if path.is_dir() {
            return Ok(Sysroot::at(path));
        }
        apt.download(&plan.tools, "to build modules and to emulate a machine")?;
        let new = unfinished(&path);
        cache::remove(&new)?;
        let sysroot = Sysroot::at(new.clone());
        let files: Vec<_> = plan.tools.iter().map(|package| apt.file(package)).collect();
        sysroot.unpack(&files, "tool chain and emulator")?;
        sysroot.finish()?;
        fs::rename(&new, &path).with_context(|| format!("keep {}", path.display()))?;
        apt.forget(&plan.tools)?;
        Ok(Sysroot::at(path))
    }

    /// The plan with the kernels of the flavour that is wanted, which are looked for once.
    fn flavoured(&self, apt: &Apt, plan: Plan, update: bool) -> Result<Plan> {
        let flavour = self.wanted.flavour;
        if let Some(known) = plan_of(&self.cache, flavour).filter(|_| !update) {
            return Ok(known);
        }
        let is_foreign = !flavour.arch().is_native();
        if is_foreign && (update || !apt.has_lists()) {
            apt.update()?;
        }
        let (mut kernels, _) = kernels(apt, flavour)?;
        if is_foreign {
            let records = apt.show(&plan::userland_packages())?;
            let userland = plan::userland(&records, &plan.tools)?;
            for kernel in &mut kernels {
                kernel.userland.clone_from(&userland);
            }
        }
        let mut plan = Plan { kernels, ..plan };
        self.judge(apt, &mut plan)?;
        let found = Found {
            rustc: plan.rustc.clone(),
            kernels: plan.kernels.clone(),
        };
        cache::write_json(&found_file(&self.cache, flavour), &found)?;
        Ok(plan)
    }

    /// Compares each kernel with the compiler.
    fn judge(&self, apt: &Apt, plan: &mut Plan) -> Result<()> {
        let possible = plan
            .kernels
            .iter()
            .filter(|kernel| kernel.refusal.is_none());
        let headers: Vec<_> = possible
            .filter_map(|kernel| kernel.headers.first().cloned())
            .collect();
        apt.download(
            &headers,
            "to compare the configurations of kernels with the compiler",
        )?;
        for kernel in plan
            .kernels
            .iter_mut()
            .filter(|kernel| kernel.refusal.is_none())
        {
            let folder = self.cache.path("build").join("judge");
            cache::remove(&folder)?;
            Sysroot::at(folder.clone())
                .unpack(&[apt.file(&kernel.headers[0])], &kernel.headers[0].name)?;
            let path = folder.join(format!("usr/src/linux-headers-{}/.config", kernel.release));
            let config =
                fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            kernel.refusal = plan::judge(&config, &plan.rustc);
            cache::remove(&folder)?;
        }
        eprintln!(
            "compiler: {}\nkernels of the mirror, newest first:",
            plan.rustc
        );
        for kernel in &plan.kernels {
            eprintln!("{}", kernel.verdict());
        }
        Ok(())
    }

    fn kernel(&self, apt: &Apt, plan: &Plan, sysroot: &Sysroot, kernel: &KernelPlan) -> Result<()> {
        let folders = Folders::of(&self.cache, plan, kernel);
        if folders.complete(plan, kernel) {
            return Ok(());
        }
        eprintln!("chosen: kernel {} ({})", kernel.release, kernel.version);
        let with_image = !image_stamp(kernel).fits(&folders.kernel_stamp());
        let with_overlay = !overlay_stamp(plan, kernel).fits(&folders.overlay_stamp)
            || !overlay::tarball(&self.cache, kernel).exists();
        let with_headers =
            with_overlay || !overlay_stamp(plan, kernel).fits(&folders.laid_stamp(kernel));
        let mut packages = Vec::new();
        packages.extend(kernel.image.iter().filter(|_| with_image).cloned());
        packages.extend(kernel.headers.iter().filter(|_| with_headers).cloned());
        packages.extend(with_overlay.then(|| kernel.source.clone()));
        apt.download(&packages, &format!("for kernel {}", kernel.release))?;

        if with_image {
            cache::remove(&folders.kernel)?;
            let new = unfinished(&folders.kernel);
            cache::remove(&new)?;
            let files: Vec<_> = kernel
                .image
                .iter()
                .map(|package| apt.file(package))
                .collect();
            Sysroot::at(new.clone()).unpack(&files, "image and modules")?;
            cache::write_json(&new.join("stamp.json"), &image_stamp(kernel))?;
            fs::rename(&new, &folders.kernel)
                .with_context(|| format!("keep {}", folders.kernel.display()))?;
        }
        if with_headers {
            let files: Vec<_> = kernel
                .headers
                .iter()
                .map(|package| apt.file(package))
                .collect();
            sysroot.unpack(&files, "kernel headers")?;
        }
        if with_overlay {
            overlay::build(&self.cache, sysroot, kernel, &apt.file(&kernel.source))?;
            cache::write_json(&folders.overlay_stamp, &overlay_stamp(plan, kernel))?;
        }
        overlay::lay(&self.cache, sysroot, kernel)?;
        cache::write_json(&folders.laid_stamp(kernel), &overlay_stamp(plan, kernel))?;
        apt.forget(&packages)
    }

    /// Removes sysroots of earlier plans, when nobody uses them.
    fn forget_old(&self, plan: &Plan) -> Result<()> {
        let current = sysroot_path(&self.cache, &plan.tools);
        let is_old = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            *path != current && name.starts_with("sysroot-")
        };
        let entries =
            fs::read_dir(self.cache.path(""))?.filter_map(|entry| Some(entry.ok()?.path()));
        let old: Vec<_> = entries.filter(is_old).collect();
        if old.is_empty() {
            return Ok(());
        }
        let _alone = self.cache.exclusively()?;
        old.iter().try_for_each(|path| cache::remove(path))
    }
}
