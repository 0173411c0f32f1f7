//! The picture: lines of text with a style, for a terminal of any size, in ASCII.

use std::collections::BTreeMap;
use std::io;
use std::io::Write;

use barlease_proto::DeviceInfo;
use barlease_proto::Holder;
use barlease_proto::LeaseInfo;
use barlease_proto::PoolInfo;
use barlease_proto::State;

use super::data::View;
use super::screen::Key;
use super::strip;
use super::strip::Cell;
use crate::service::holder::Program;
use crate::service::span;
use crate::service::word;

/// How a text looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    Plain,
    Bold,
    Head,
    Alarm,
    /// The colour of the holder with this number.
    Holder(usize),
}

type Line = Vec<(Style, String)>;

/// Lines from the top.
#[derive(Debug)]
pub(super) struct Picture {
    pub(super) lines: Vec<Line>,
    pub(super) colour: bool,
}

impl Picture {
    /// As text alone.
    pub(super) fn print(&self, out: &mut impl Write) -> io::Result<()> {
        for line in &self.lines {
            let text: String = line.iter().map(|(_, text)| text.as_str()).collect();
            writeln!(out, "{}", text.trim_end())?;
        }
        Ok(())
    }
}

/// The order of leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    Lease,
    Size,
    Age,
    Holder,
}

const SORTS: [(Sort, &str); 4] = [
    (Sort::Lease, "lease"),
    (Sort::Size, "size"),
    (Sort::Age, "age"),
    (Sort::Holder, "holder"),
];

/// The user's choices, and the numbers that holders have kept.
pub(super) struct Ui {
    colour: bool,
    sort: usize,
    scroll: usize,
    page: usize,
    /// By process.
    holders: BTreeMap<(u32, u32, Option<String>), usize>,
}

impl Ui {
    pub(super) fn new(colour: bool) -> Self {
        Self {
            colour,
            sort: 0,
            scroll: 0,
            page: 1,
            holders: BTreeMap::new(),
        }
    }

    pub(super) fn press(&mut self, key: Key) {
        match key {
            Key::Quit => {}
            Key::Up => self.scroll = self.scroll.saturating_sub(1),
            // Where it ends is known when it is drawn.
            Key::Down => self.scroll += 1,
            Key::PageUp => self.scroll = self.scroll.saturating_sub(self.page),
            Key::PageDown => self.scroll += self.page,
            Key::Left => self.sort = (self.sort + SORTS.len() - 1) % SORTS.len(),
            Key::Right => self.sort = (self.sort + 1) % SORTS.len(),
        }
    }

    fn number(&self, holder: &Holder) -> usize {
        let key = (holder.uid, holder.pid, holder.claim.clone());
        self.holders.get(&key).copied().unwrap_or(0)
    }

    /// Holders keep their number for as long as they have something.
    fn count(&mut self, view: &View) {
        let key = |holder: &Holder| (holder.uid, holder.pid, holder.claim.clone());
        let mut before = std::mem::take(&mut self.holders);
        let mut fresh = Vec::new();
        for (lease, _) in &view.leases {
            let key = key(&lease.holder);
            match before.remove(&key) {
                Some(number) => {
                    self.holders.insert(key, number);
                }
                None if self.holders.contains_key(&key) || fresh.contains(&key) => {}
                None => fresh.push(key),
            }
        }
        let taken: std::collections::BTreeSet<usize> = self.holders.values().copied().collect();
        let free = (0..).filter(|number| !taken.contains(number));
        self.holders.extend(fresh.into_iter().zip(free));
    }

    pub(super) fn draw(&mut self, view: &View, width: u16, height: u16) -> Picture {
        self.count(view);
        let (width, height) = (usize::from(width.max(1)), usize::from(height.max(1)));
        let mut lines = vec![head(view)];
        // At least half of the lines are for leases.
        let bars = self.bars(view, width);
        let shown = bars.len().min(height.saturating_sub(4) / 4);
        let hidden = bars.len() - shown;
        lines.extend(bars.into_iter().take(shown).flatten());
        if hidden != 0 {
            lines.push(plain(format!("and {hidden} BARs more")));
        }
        lines.push(vec![(Style::Head, pad(&titles(), width))]);
        let rows = self.rows(view);
        let foot = usize::from(height != usize::from(u16::MAX));
        let room = height.saturating_sub(lines.len() + foot).max(1);
        self.page = room;
        self.scroll = self.scroll.min(rows.len().saturating_sub(room));
        let last = (self.scroll + room).min(rows.len());
        let of = format!("{}-{last} of {}", (self.scroll + 1).min(last), rows.len());
        lines.extend(rows.into_iter().skip(self.scroll).take(room));
        if foot != 0 {
            lines.resize(height.saturating_sub(1).max(1), Vec::new());
            let (_, sort) = SORTS[self.sort];
            let keys = format!("q quit  up/down {of}  left/right sorted by {sort}");
            lines.push(vec![(Style::Bold, keys)]);
        }
        lines.truncate(height);
        for line in &mut lines {
            cut(line, width);
        }
        Picture {
            lines,
            colour: self.colour,
        }
    }

    /// Two lines for each BAR that has a pool.
    fn bars(&self, view: &View, width: usize) -> Vec<[Line; 2]> {
        let mut bars = Vec::new();
        for device in &view.devices {
            for (bar, size) in (0_u8..).zip(&device.bars) {
                let pools = device.pools.iter().filter(|pool| pool.bar == bar);
                let pools: Vec<&PoolInfo> = pools.collect();
                if pools.is_empty() {
                    continue;
                }
                let leases = view.leases.iter().map(|(lease, _)| lease);
                let ours: Vec<&LeaseInfo> = leases
                    .filter(|lease| lease.device == device.name && lease.bar == bar)
                    .collect();
                bars.push([
                    title(device, bar, *size, &pools),
                    self.strip(*size, width, &pools, &ours),
                ]);
            }
        }
        bars
    }

    fn strip(&self, size: u64, width: usize, pools: &[&PoolInfo], leases: &[&LeaseInfo]) -> Line {
        let owner = |lease: &LeaseInfo| match lease.state {
            State::Revoking => None,
            _ => Some(self.number(&lease.holder)),
        };
        let ranges = leases
            .iter()
            .flat_map(|lease| lease.ranges.iter().map(|range| (owner(lease), range)));
        let ranges: Vec<_> = ranges.collect();
        let mut line: Line = Vec::new();
        for cell in strip::cells(size, width, pools, &ranges) {
            let (style, letter) = match cell {
                Cell::Outside => (Style::Plain, '-'),
                Cell::Free => (Style::Plain, '.'),
                Cell::Revoked => (Style::Alarm, '!'),
                Cell::Held { holder, few } => (Style::Holder(holder), letter(holder, few)),
            };
            match line.last_mut() {
                Some((last, text)) if *last == style => text.push(letter),
                _ => line.push((style, letter.to_string())),
            }
        }
        line
    }

    /// Waiters, then leases in their order.
    fn rows(&self, view: &View) -> Vec<Line> {
        let mut leases: Vec<&(LeaseInfo, Program)> = view.leases.iter().collect();
        match SORTS[self.sort].0 {
            Sort::Lease => {}
            Sort::Size => leases.sort_by_key(|(lease, _)| std::cmp::Reverse(lease.size)),
            Sort::Age => leases.sort_by_key(|(lease, _)| lease.since),
            Sort::Holder => leases.sort_by_key(|(lease, _)| self.number(&lease.holder)),
        }
        let waiters = view.waiters.iter().map(|(waiter, program)| {
            let left = waiter.deadline.saturating_sub(view.now);
            let cells = Cells {
                lease: "-".to_owned(),
                pool: &waiter.pool,
                size: waiter.size.map_or_else(|| "-".to_owned(), bytes),
                holder: &waiter.holder,
                program,
                age: String::new(),
                ttl: span(left),
                state: "waiting".to_owned(),
            };
            vec![(Style::Bold, format!("> {}", cells.text()))]
        });
        let leases = leases.into_iter().map(|(lease, program)| {
            let number = self.number(&lease.holder);
            let reason = lease.reason.as_ref().map(word);
            let until = lease.deadline.or(lease.expires);
            let cells = Cells {
                lease: lease.lease.to_string(),
                pool: &lease.pool,
                size: bytes(lease.size),
                holder: &lease.holder,
                program,
                age: span(view.now.saturating_sub(lease.since)),
                ttl: until.map_or_else(String::new, |at| span(at.saturating_sub(view.now))),
                state: match reason {
                    Some(reason) => format!("{}: {reason}", word(&lease.state)),
                    None => word(&lease.state),
                },
            };
            let style = match lease.state {
                State::Granted | State::Preparing => Style::Plain,
                State::Revoking => Style::Alarm,
                _ => Style::Bold,
            };
            vec![
                (Style::Holder(number), letter(number, false).to_string()),
                (style, format!(" {}", cells.text())),
            ]
        });
        waiters.chain(leases).collect()
    }
}

/// A row of the table.
struct Cells<'a> {
    lease: String,
    pool: &'a str,
    size: String,
    holder: &'a Holder,
    program: &'a Program,
    age: String,
    ttl: String,
    state: String,
}

fn titles() -> String {
    format!(
        "  {:>5} {:<9} {:>5} {:>5} {:>7} {:<16} {:>5} {:>5} {}",
        "LEASE", "POOL", "SIZE", "UID", "PID", "PROGRAM OR UNIT", "AGE", "LEFT", "STATE"
    )
}

impl Cells<'_> {
    fn text(&self) -> String {
        let holder = self.holder;
        let whose = match (&holder.claim, &holder.unit) {
            (Some(claim), _) => format!("claim {claim}"),
            (None, Some(unit)) => unit.clone(),
            // The name says more than the folder.
            (None, None) => match &self.program.exe {
                Some(exe) => exe.rsplit('/').next().unwrap_or_default().to_owned(),
                None => self.program.shown(),
            },
        };
        format!(
            "{:>5} {:<9} {:>5} {:>5} {:>7} {:<16} {:>5} {:>5} {}",
            self.lease,
            short(self.pool, 9),
            self.size,
            holder.uid,
            holder.pid,
            short(&whose, 16),
            self.age,
            self.ttl,
            self.state
        )
    }
}

fn head(view: &View) -> Line {
    if let Some(trouble) = &view.trouble {
        return vec![(Style::Alarm, format!("old: {}", printable(trouble)))];
    }
    let rates = view.rates;
    let text = format!(
        "{} leases  {} waiting  {:.1} grants/s  {:.1} ends/s  {:.1} refusals/s",
        view.leases.len(),
        view.waiters.len(),
        rates.grants,
        rates.ends,
        rates.refusals
    );
    vec![
        (Style::Bold, "barleased  ".to_owned()),
        (Style::Plain, text),
    ]
}

fn title(device: &DeviceInfo, bar: u8, size: u64, pools: &[&PoolInfo]) -> Line {
    let pool = |pool: &&PoolInfo| {
        let used = pool.size.saturating_sub(pool.free);
        let percent = (u128::from(used) * 100)
            .checked_div(pool.size.into())
            .unwrap_or(0);
        let waits = match pool.waiting {
            0 => String::new(),
            waiting => format!(", {waiting} waiting"),
        };
        format!("{} {percent}%{waits}", pool.name)
    };
    let pools: Vec<String> = pools.iter().map(pool).collect();
    let state = match device.state.as_str() {
        "open" => String::new(),
        state => format!(" ({state})"),
    };
    let text = format!(" BAR {bar} {}{state}: {}", bytes(size), pools.join("; "));
    vec![
        (Style::Bold, printable(&device.name)),
        (Style::Plain, printable(&text)),
    ]
}

fn plain(text: String) -> Line {
    vec![(Style::Plain, text)]
}

fn letter(holder: usize, few: bool) -> char {
    let first = if few { b'a' } else { b'A' };
    char::from(first + u8::try_from(holder % 26).unwrap_or(0))
}

/// Bytes with a unit, in four digits at most.
fn bytes(number: u64) -> String {
    let units = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];
    let unit = units.iter().find(|(_, shift)| number >> shift != 0);
    match unit {
        None => number.to_string(),
        Some((unit, shift)) => {
            let whole = number >> shift;
            let tenths = (number >> (shift - 10)) % 1024 * 10 / 1024;
            match (whole, tenths) {
                (0..10, 1..) => format!("{whole}.{tenths}{unit}"),
                _ => format!("{whole}{unit}"),
            }
        }
    }
}

/// Names come from others: characters that move the cursor, or may be wider than a column, are not
/// shown.
fn printable(text: &str) -> String {
    let shown = |letter: char| match letter {
        ' '..='~' => letter,
        _ => '?',
    };
    text.chars().map(shown).collect()
}

fn short(text: &str, most: usize) -> String {
    let text = printable(text);
    match text.get(..most) {
        Some(begin) if text.len() > most => {
            format!("{}~", begin.get(..most - 1).unwrap_or_default())
        }
        _ => text,
    }
}

fn pad(text: &str, width: usize) -> String {
    format!("{text:<width$}")
}

/// Cuts a line, which is ASCII, to a width.
fn cut(line: &mut Line, width: usize) {
    let mut left = width;
    for (_, text) in line.iter_mut() {
        text.truncate(left);
        left -= text.len();
    }
    line.retain(|(_, text)| !text.is_empty());
}

#[cfg(test)]
mod tests;
