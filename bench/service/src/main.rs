//! The service on a fake device, in processes of their own, on the host.
//!
//! Says on standard output what it is doing, and in the last line, as JSON, what came out.

mod clients;
mod daemon;
mod decision;

use std::process::ExitCode;
use std::time::Instant;

use barlease_bench::report::Measure;
use barlease_bench::report::Report;
use barlease_bench::report::System;

/// Measures of a kind; whether they are to be quick.
type Set = fn(bool) -> Vec<Measure>;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let word = |word: &str| words.iter().any(|one| one == word);
    if word("daemon") {
        return daemon::run();
    }
    let quick = word("--quick");
    // As the other programs take it: sets whose name has one of these in it.
    let only = words.windows(2).filter(|pair| pair[0] == "--only");
    let only: Vec<&String> = only.map(|pair| &pair[1]).collect();
    let sets: [(&str, Set); 2] = [
        ("service", clients::take),
        ("service-decision", decision::take),
    ];
    let mut measures = Vec::new();
    for (name, take) in sets {
        if !only.is_empty() && !only.iter().any(|wanted| name.contains(wanted.as_str())) {
            continue;
        }
        let start = Instant::now();
        measures.extend(take(quick));
        println!("{:>6.1} s  {name}", start.elapsed().as_secs_f64());
    }
    let report = Report {
        system: System {
            quick,
            ..System::default()
        },
        measures,
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
