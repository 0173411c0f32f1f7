//! `barlease policy explain`.

use std::io;
use std::io::Write;
use std::sync::Arc;

use barlease_ledger::policy::Outcome;
use barlease_ledger::policy::Policy;
use barlease_ledger::policy::Pool;
use barlease_ledger::policy::Question;
use barlease_ledger::policy::Terms;
use barlease_ledger::types::Access;
use barlease_ledger::types::Lifetime;
use barlease_ledger::types::Peer;
use barlease_proto as proto;
use serde::Serialize;

use super::ExplainArgs;
use super::files::Files;
use crate::failure::Failure;
use crate::names;
use crate::output::Output;
use crate::output::or_dash;
use crate::output::print;
use crate::output::table;
use crate::service;
use crate::service::args::Lifetime as Wanted;

/// The answer of one rule.
#[derive(Serialize)]
struct Rule {
    file: String,
    line: u32,
    allows: bool,
    why: Option<String>,
}

/// The answer that a request would get.
#[derive(Serialize)]
struct Explained {
    granted: bool,
    why: Option<String>,
    pool: Option<String>,
    rules: Vec<Rule>,
    /// Those who have it; of the service only.
    held_by: Option<Vec<proto::HeldBy>>,
    /// Those who wait for it; of the service only.
    waiting: Option<u64>,
}

impl Explained {
    fn tell(&self, output: Output) -> Result<bool, Failure> {
        if output.is_json() {
            output.document(self)?;
            return Ok(self.granted);
        }
        let mut out = io::stdout();
        match (self.granted, &self.why) {
            (true, _) => writeln!(out, "granted")?,
            (false, why) => writeln!(out, "refused: {}", or_dash(why.as_ref()))?,
        }
        if !self.rules.is_empty() {
            writeln!(out, "rules for {}:", or_dash(self.pool.as_ref()))?;
            let mut table = table(["PLACE", "ALLOWS", "WHY"]);
            for rule in &self.rules {
                let allows = if rule.allows { "yes" } else { "no" };
                let place = format!("{}:{}", rule.file, rule.line);
                table.add_row([place, allows.to_owned(), or_dash(rule.why.as_ref())]);
            }
            print(&table)?;
        }
        if let Some(waiting) = self.waiting.filter(|waiting| *waiting != 0) {
            writeln!(out, "{waiting} wait in line")?;
        }
        Ok(self.granted)
    }
}

/// By the service, which knows what is leased.
pub(super) fn ask(args: &ExplainArgs, output: Output) -> Result<bool, Failure> {
    let acquire = args.what.request();
    let explain = proto::Explain {
        pool: acquire.pool,
        size: acquire.size,
        device: acquire.device,
        bar: acquire.bar,
        ranges: acquire.ranges,
        access: acquire.access,
        memory_type: acquire.memory_type,
        steering_tag: acquire.steering_tag,
        lifetime: acquire.lifetime,
        as_uid: args.as_uid,
        as_unit: args.unit.clone(),
        as_cgroup: args.cgroup.clone(),
        as_claim: args.claim.clone(),
    };
    let told = service::connect(&args.socket)?
        .call(&explain)
        .map_err(|error| service::failed("explain", args.what.object(), error))?;
    let rule = |rule: proto::Rule| Rule {
        file: rule.file,
        line: rule.line,
        allows: rule.allows,
        why: rule.why,
    };
    let explained = Explained {
        granted: told.granted,
        why: told.why,
        pool: told.pool,
        rules: told.rules.into_iter().map(rule).collect(),
        held_by: Some(told.held_by),
        waiting: Some(told.waiting),
    };
    explained.tell(output)
}

/// By files: rules and limits only, without the leases of the moment.
pub(super) fn read(args: &ExplainArgs, output: Output) -> Result<bool, Failure> {
    let policy = Files::read(&args.policy)?.parse().map_err(|errors| {
        let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();
        Failure::new(format!("explain: policy: {}", errors.join("\n")))
    })?;
    let what = &args.what;
    let place = match &what.pool {
        Some(pool) => policy.pool_named(pool),
        None => policy.pools().iter().position(|pool| has(pool, args)),
    };
    let Some((place, pool)) = place.and_then(|at| Some((at, policy.pools().get(at)?))) else {
        let why = match &what.pool {
            Some(pool) => format!("there is no pool {pool}"),
            None => "no pool has all of the ranges".to_owned(),
        };
        return explained(None, Some(why), Vec::new()).tell(output);
    };
    let peer = peer(args);
    let question = Question {
        peer: &peer,
        pool: place,
        access: if what.read_only {
            Access::Read
        } else {
            Access::ReadWrite
        },
        lifetime: match what.lifetime {
            Wanted::Connection => Lifetime::Connection,
            Wanted::Process => Lifetime::Process,
            Wanted::Cgroup => Lifetime::Cgroup,
            Wanted::Claim => Lifetime::Claim,
            Wanted::Holders => Lifetime::Holders,
        },
        steering_tags: false,
    };
    let rules = policy
        .explain(&question)
        .into_iter()
        .map(|(place, outcome)| {
            let allows = outcome == Outcome::Allows;
            Rule {
                file: place.file.to_string(),
                line: place.line,
                allows,
                why: (!allows).then(|| outcome.to_string()),
            }
        });
    let rules = rules.collect();
    let why = refusal(&policy, pool, policy.decide(&question).as_ref(), args);
    explained(Some(pool.name.to_string()), why, rules).tell(output)
}

fn explained(pool: Option<String>, why: Option<String>, rules: Vec<Rule>) -> Explained {
    Explained {
        granted: why.is_none(),
        why,
        pool,
        rules,
        held_by: None,
        waiting: None,
    }
}

/// Bytes that are asked for; `None`: all of a pool.
fn bytes(args: &ExplainArgs, pool: &Pool) -> Option<u64> {
    let ranges = args.what.range.iter();
    let all = ranges.fold(0_u64, |sum, range| sum.saturating_add(range.length));
    match args.what.pool {
        Some(_) => args.what.size.or(pool.length),
        None => Some(all),
    }
}

/// Why it would be refused, if nobody had anything.
fn refusal(
    policy: &Policy,
    pool: &Pool,
    terms: Option<&Terms>,
    args: &ExplainArgs,
) -> Option<String> {
    let Some(terms) = terms else {
        return Some(format!("no rule allows it: pool {}", pool.name));
    };
    if !args.what.read_only && !pool.writable {
        return Some(format!("pool {}: it is not leased for writing", pool.name));
    }
    let bytes = bytes(args, pool)?;
    if bytes == 0 || bytes % pool.unit != 0 {
        return Some(format!(
            "sizes in {} are multiples of {:#x} bytes",
            pool.name, pool.unit
        ));
    }
    if pool.length.is_some_and(|length| bytes > length) {
        return Some(format!("{} has no {bytes:#x} bytes", pool.name));
    }
    let limits = [&terms.user, &terms.unit, &terms.claim];
    let limits = limits.into_iter().filter_map(|limits| limits.bytes);
    let (limit, rule) = limits.filter(|(limit, _)| bytes > *limit).min()?;
    let place = policy.place_of(rule).map(ToString::to_string);
    Some(format!("the limit of {}: {limit:#x} bytes", or_dash(place)))
}

/// Whether the ranges that are asked for are in a pool.
fn has(pool: &Pool, args: &ExplainArgs) -> bool {
    let what = &args.what;
    let end = pool
        .length
        .map_or(u64::MAX, |length| pool.at.saturating_add(length));
    what.device.as_deref() == Some(&*pool.device)
        && what.bar == Some(pool.bar)
        && what
            .range
            .iter()
            .all(|range| range.offset >= pool.at && range.offset + range.length <= end)
}

/// The peer that asks.
fn peer(args: &ExplainArgs) -> Peer {
    let uid = args.as_uid.unwrap_or(rustix::process::geteuid().as_raw());
    let (gid, groups) = names::groups_of(uid);
    let text = |text: &Option<String>| Arc::from(text.as_deref().unwrap_or_default());
    Peer {
        uid,
        gid,
        groups: groups.into(),
        pid: 0,
        process: None,
        cgroup: None,
        cgroup_path: text(&args.cgroup),
        unit: text(&args.unit),
        claim: args.claim.as_deref().map(Arc::from),
    }
}
