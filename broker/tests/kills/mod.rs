//! Kills of the daemon at random, judged by an oracle that has the kernel's LIST.
//!
//! `BARLEASED_TEST_KILLS` says how many; without it they are some. The daemon dies before
//! an action that it draws itself, of the grant, revocation or recovery that it is at, or is killed
//! from outside at any time. Clients come and go meanwhile, and the world has to agree after each:
//!
//! - whoever has a lease keeps it, and nobody has what another has;
//! - the kernel has no more than the policy allows, and nothing that the daemon does not know;
//! - what nobody has is free.

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::time::Duration;

use barlease::LeaseId;
use barlease::State;
use barlease_proto as proto;
use barlease_proto::Client;
use barlease_proto::Error;
use barlease_proto::Lifetime;
use rustix::process::Signal;

use super::A_WHILE;
use super::COME_BACK;
use super::DIE;
use super::PAGE;
use super::PAUSE;
use super::World;
use super::rows;
use super::until;

/// How many kills, and between how many of them everything is given back.
const KILLS: &str = "BARLEASED_TEST_KILLS";
const FEW: u64 = 150;
const ROUND: u64 = 10;
/// Of the policy.
const MOST_LEASES: usize = 6;
/// The daemon draws where it dies.
pub(crate) const RANDOM: &str = "random";

/// The daemon calls this before each action: it dies there, if that is wanted.
pub(crate) fn before_action(directory: &Path) -> Box<dyn Fn()> {
    let Ok(wanted) = std::env::var(DIE) else {
        return Box::new(|| {});
    };
    let count = Cell::new(0);
    if wanted == RANDOM {
        let dies = directory.join("dies");
        // Recovery has some ten actions, each grant six.
        let at = Random::new(std::process::id().into()).below(60);
        return Box::new(move || {
            if count.replace(count.get() + 1) >= at && dies.exists() {
                die();
            }
        });
    }
    let died = directory.join("died");
    let once: u64 = wanted.parse().unwrap();
    Box::new(move || {
        if count.replace(count.get() + 1) == once && !died.exists() {
            fs::write(&died, "").unwrap();
            die();
        }
    })
}

fn die() -> ! {
    let own = rustix::process::getpid();
    rustix::process::kill_process(own, Signal::KILL).unwrap();
    unreachable!("killed");
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (value ^ (value >> 31)) % limit
    }
}

/// A lease that somebody has, and was told of.
struct Had {
    lease: u64,
    id: LeaseId,
    ranges: Vec<proto::Range>,
    lifetime: Lifetime,
}

/// A client with one connection at a time.
#[derive(Default)]
struct Tenant {
    client: Option<Client>,
    /// Secrets of the connections that its leases are of.
    tokens: Vec<String>,
    has: Vec<Had>,
}

impl Tenant {
    /// Does something; an error is a daemon that is gone.
    fn act(&mut self, world: &World, random: &mut Random) -> Result<(), Error> {
        if self.client.is_none() {
            self.connect(world)?;
        }
        let Some(client) = &mut self.client else {
            return Ok(());
        };
        match random.below(6) {
            0..=2 => {
                let lifetime = match random.below(2) {
                    0 => Lifetime::Connection,
                    _ => Lifetime::Process,
                };
                let (acquired, fd) = match client.acquire(&rows(1 + random.below(2), lifetime)) {
                    Err(Error::Refused(_)) => return Ok(()),
                    result => result?,
                };
                let lease = barlease::Lease::from_fd(fd).unwrap();
                self.has.push(Had {
                    lease: acquired.lease,
                    id: LeaseId::of(&lease).unwrap(),
                    ranges: acquired.ranges,
                    lifetime,
                });
            }
            3 | 4 if !self.has.is_empty() => {
                let place = random.below(self.has.len() as u64) as usize;
                // Without an answer it is not known whether it has ended.
                let had = self.has.remove(place);
                client.release(had.lease)?;
            }
            5 => {
                self.client = None;
                self.has.retain(|had| had.lifetime != Lifetime::Connection);
                self.tokens.clear();
            }
            _ => {}
        }
        Ok(())
    }

    /// Comes back, unless it did. A connection that lives is not given up: its leases would end.
    fn is_there(&mut self, world: &World) -> bool {
        let lives = |client: &mut Client| client.call(&proto::Devices {}).is_ok();
        if !self.client.as_mut().is_some_and(lives) {
            self.client = None;
        }
        self.client.is_some() || self.connect(world).is_ok()
    }

    /// Comes back with all its secrets.
    fn connect(&mut self, world: &World) -> Result<(), Error> {
        let mut client = Client::connect(world.path("socket/leases.sock"))?;
        client.set_timeout(Some(A_WHILE))?;
        let token = client.token()?;
        for token in &self.tokens {
            match client.resume(token.as_str()) {
                Ok(_) | Err(Error::Refused(_)) => {}
                Err(error) => return Err(error),
            }
        }
        self.tokens.push(token);
        self.client = Some(client);
        Ok(())
    }
}

/// Checks that hold whenever the daemon has done all that it has to.
fn judge(world: &World, tenants: &[Tenant], kill: u64) {
    let listed = world.client().list(None).unwrap();
    let records: Vec<_> = world.card.leases().list().map(Result::unwrap).collect();
    let alive = |id: LeaseId| {
        let mut records = records.iter();
        records.any(|record| record.id == id && record.state == State::Ok)
    };
    let living: Vec<_> = records.iter().filter(|record| alive(record.id)).collect();
    let known = |lease: &&proto::LeaseInfo| {
        matches!(lease.state, proto::State::Granted | proto::State::Orphaned)
    };
    let known = listed.iter().filter(known).count();
    assert_eq!(known, living.len(), "{kill}: {listed:?} {living:?}");
    let sum: u64 = living.iter().map(|record| record.size).sum();
    assert!(
        living.len() <= MOST_LEASES && sum <= 6 * PAGE,
        "{kill}: {living:?}"
    );
    let mut places: Vec<_> = living
        .iter()
        .flat_map(|record| world.card.ranges_of(record.id))
        .map(|range| (range.offset, range.offset + range.length))
        .collect();
    places.sort_unstable();
    let apart = places.windows(2).all(|pair| pair[0].1 <= pair[1].0);
    assert!(apart, "{kill}: one range is in two leases: {places:?}");
    for had in tenants.iter().flat_map(|tenant| &tenant.has) {
        let lease = had.lease;
        assert!(
            alive(had.id),
            "{kill}: lease {lease} of {:?} was taken from who has it: {listed:?} {records:?}",
            had.lifetime
        );
        let ranges = world.card.ranges_of(had.id);
        let same = ranges.iter().zip(&had.ranges);
        assert!(
            same.into_iter()
                .all(|(one, other)| one.offset == other.offset)
        );
    }
}

/// Everybody gives back what they have: then all is free, and the kernel has nothing.
fn give_back(world: &World, tenants: &mut [Tenant], kill: u64) {
    for tenant in tenants.iter_mut() {
        *tenant = Tenant::default();
    }
    let empty = || -> Result<bool, Error> {
        let mut client = world.try_client()?;
        let left = client.list(None)?;
        // Leases that live by this process, and those that were granted to nobody.
        for lease in &left {
            match client.release(lease.lease) {
                Ok(()) | Err(Error::Refused(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let pool = client.call(&proto::Devices {})?.devices[0].pools[0].clone();
        Ok(left.is_empty() && pool.free == pool.size)
    };
    until("all of it is free", || empty().is_ok_and(|empty| empty));
    assert_eq!(world.alive(), 0, "{kill}: the kernel has what nobody knows");
    world.card.forget_dead();
}

#[test]
fn kills_at_random_lose_nothing_and_leave_nothing() {
    let kills = std::env::var(KILLS).map_or(FEW, |kills| kills.parse().unwrap());
    let seed = std::env::var("BARLEASED_TEST_SEED").map_or_else(
        |_| std::process::id().into(),
        |seed| seed.parse::<u64>().unwrap(),
    );
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let world = World::start_with(&[(DIE, RANDOM), (PAUSE, "1"), (COME_BACK, "600000")]);
    let dies = world.path("dies");
    let mut tenants: Vec<Tenant> = (0..3).map(|_| Tenant::default()).collect();
    let mut done = 0;
    while done < kills {
        let before = world.daemon();
        if random.below(3) == 0 {
            let after = Duration::from_micros(random.below(4000));
            std::thread::spawn(move || {
                std::thread::sleep(after);
                // It may be gone by then.
                let _ = rustix::process::kill_process(before, Signal::KILL);
            });
        } else {
            fs::write(&dies, "").unwrap();
        }
        while world.daemon() == before {
            let place = random.below(tenants.len() as u64) as usize;
            if tenants[place].act(&world, &mut random).is_err() {
                tenants[place].client = None;
            }
        }
        done += 1;
        // Some are killed again while they recover.
        if random.below(4) == 0 {
            continue;
        }
        let _ = fs::remove_file(&dies);
        for tenant in &mut tenants {
            until("it comes back", || tenant.is_there(&world));
        }
        judge(&world, &tenants, done);
        if done % ROUND == 0 {
            give_back(&world, &mut tenants, done);
        }
    }
    let _ = fs::remove_file(&dies);
    give_back(&world, &mut tenants, done);
    println!("{done} kills");
}
