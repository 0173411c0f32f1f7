//! The program that `cargo xtask bench` runs in a guest, as root; with `system`, in one with
//! systemd; and, with `native`, on the host.
//!
//! Says on standard output what it is doing, and in the last line, as JSON, what came out.

use std::process::ExitCode;
use std::time::Instant;

use barlease_bench::measures::{self, Context};
use barlease_bench::profile;
use barlease_bench::report::{Measure, Report, System};

/// Where it runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Guest,
    System,
    Host,
}

struct Options {
    place: Place,
    quick: bool,
    profile: bool,
    /// Sets whose name has one of these in it; none is all.
    only: Vec<String>,
}

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args_os().skip(1).collect();
    if words.first().is_some_and(|word| word == measures::DAEMON) {
        return barleased::run(words, &barleased::device::open);
    }
    let Some(options) = options(std::env::args().skip(1)) else {
        eprintln!("usage: barlease-bench [system|native] [--quick] [--profile] [--only NAME]...");
        return ExitCode::from(2);
    };
    if options.profile {
        if let Err(error) = profile::activate() {
            eprintln!("bench: the kernel does not let itself be profiled: {error}");
            return ExitCode::FAILURE;
        }
    }
    let report = Report {
        system: system(&options),
        measures: take(&options),
    };
    match serde_json::to_string(&report) {
        Ok(text) => println!("{text}"),
        Err(error) => {
            eprintln!("bench: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn options(mut words: impl Iterator<Item = String>) -> Option<Options> {
    let mut options = Options {
        place: Place::Guest,
        quick: false,
        profile: false,
        only: Vec::new(),
    };
    while let Some(word) = words.next() {
        match word.as_str() {
            "native" => options.place = Place::Host,
            "system" => options.place = Place::System,
            "--quick" => options.quick = true,
            "--profile" => options.profile = true,
            "--only" => options.only.push(words.next()?),
            _ => return None,
        }
    }
    Some(options)
}

fn take(options: &Options) -> Vec<Measure> {
    let context = Context {
        quick: options.quick,
    };
    let sets = match options.place {
        Place::Guest => measures::ALL,
        Place::System => measures::SYSTEM,
        Place::Host => measures::NATIVE,
    };
    if options.place == Place::Guest {
        // A process that waits for another on its own processor need not wake an idle one.
        measures::pin(0);
    }
    let mut all = Vec::new();
    for set in sets {
        let mut wanted = options.only.iter();
        if !options.only.is_empty() && !wanted.any(|wanted| set.name.contains(wanted)) {
            continue;
        }
        let start = Instant::now();
        all.extend((set.take)(&context));
        println!("{:>6.1} s  {}", start.elapsed().as_secs_f64(), set.name);
    }
    all
}

fn system(options: &Options) -> System {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let module = format!("/sys/module/{}/version", barlease_abi::MODULE_NAME);
    System {
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        module: read(&module).trim().to_owned(),
        processors: std::thread::available_parallelism().map_or(1, Into::into),
        quick: options.quick,
        ..System::default()
    }
}
