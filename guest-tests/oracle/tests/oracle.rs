//! The oracle itself: what it says of short courses, what it objects to, and that the generator
//! reaches everything.

use barlease_abi::{MEMATTR_WC, REASON_LOW_POWER, REASON_MEMORY_OFF, TPH_ST, TPH_ST_EXT};
use barlease_oracle::{
    Coverage, During, Generator, Kind, LowPower, MAIN, Op, Oracle, Outcome, PAGE, Protection,
    Record, Severity, Spec, Spoil, State, Step,
};

const MIB: u64 = 1 << 20;

fn specs() -> Vec<Spec> {
    let all = Spec {
        name: "all",
        bar: 0,
        registers: false,
        size: 16 * MIB,
        resets: true,
        function_reset: true,
        d3hot: true,
        d1_d2: true,
        tags: true,
        msix: Some((2, 0)),
        set: vec![0],
        bus_reset: true,
        reports: false,
        slot: false,
    };
    let pair = Spec {
        name: "pair",
        resets: false,
        function_reset: false,
        d3hot: false,
        d1_d2: false,
        tags: false,
        msix: None,
        set: vec![1, 2],
        reports: true,
        ..all.clone()
    };
    let registers = Spec {
        name: "registers",
        registers: true,
        size: 4 * PAGE,
        set: vec![3],
        reports: false,
        slot: true,
        ..pair.clone()
    };
    vec![all, pair.clone(), pair, registers]
}

/// The steps of a course; each must have the outcome beside it.
struct Course(Oracle);

impl Course {
    /// With all devices open.
    fn new() -> Self {
        let mut course = Self(Oracle::new(specs()));
        for device in 0..4 {
            course.is(Op::Open { device }, Outcome::Opened(true));
        }
        course
    }

    fn is(&mut self, op: Op, outcome: Outcome) -> &mut Self {
        if let Err(objection) = self.0.step(&op, &outcome) {
            panic!("{op:?}: {objection}");
        }
        self
    }

    fn done(&mut self, op: Op) -> &mut Self {
        self.is(op, Outcome::Done)
    }

    /// The number of what `op` makes.
    fn made(&mut self, op: Op) -> usize {
        let number = self.0.next;
        self.done(op);
        number
    }

    fn export(&mut self, device: usize, ranges: &[(u64, u64)]) -> usize {
        self.made(Op::Export {
            device,
            ranges: ranges.to_vec(),
            writable: true,
        })
    }

    fn map(&mut self, buffer: usize) -> usize {
        let length = self.0.buffers[&buffer].size();
        self.made(Op::Map {
            buffer,
            process: MAIN,
            offset: 0,
            length,
            protection: Protection::ReadWrite,
            large: false,
        })
    }

    /// A lease of a page that is mapped by a process and by an importer.
    fn leased(&mut self, device: usize) -> (usize, usize, usize) {
        let buffer = self.export(device, &[(0, PAGE)]);
        let mapping = self.map(buffer);
        let attachment = self.made(Op::Attach { buffer });
        self.done(Op::MapDma { attachment });
        (buffer, mapping, attachment)
    }

    fn memory(&mut self, device: usize, on: bool) -> &mut Self {
        self.done(Op::Memory {
            device,
            on,
            long: false,
        })
    }
}

fn refused(errno: i32) -> Outcome {
    Outcome::Refused(errno)
}

#[test]
fn words_are_those_of_the_bar_wherever_they_are_written() {
    let mut course = Course::new();
    // The second page of the buffer is the first of the BAR, and the first and third are the same.
    let buffer = course.export(0, &[(4 * PAGE, PAGE), (0, PAGE), (4 * PAGE, PAGE)]);
    let mapping = course.map(buffer);
    course.done(Op::Write {
        mapping,
        at: 8,
        value: 5,
    });
    let read = |at| Op::Read { mapping, at };
    course.is(read(2 * PAGE + 8), Outcome::Words(vec![5]));
    let there = Op::ReadFd {
        device: 0,
        alias: false,
        at: 4 * PAGE + 8,
    };
    course.is(there, Outcome::Words(vec![5]));
    // The oracle learns what it did not know.
    course.is(read(PAGE), Outcome::Words(vec![77]));
    assert!(
        course
            .0
            .step(&read(PAGE), &Outcome::Words(vec![78]))
            .is_err()
    );
    assert!(course.0.step(&read(8), &Outcome::Words(vec![0])).is_err());
    assert!(course.0.step(&read(8), &Outcome::Sigbus).is_err());
}

#[test]
fn memory_off_takes_from_everybody_and_memory_on_gives_back() {
    let mut course = Course::new();
    let (buffer, mapping, attachment) = course.leased(0);
    let (_, other, _) = course.leased(1);
    course.memory(0, false);
    assert_eq!(course.0.state(buffer), State::Revoked(REASON_MEMORY_OFF));
    let read = Op::Read { mapping, at: 0 };
    course.is(read.clone(), Outcome::Sigbus);
    assert!(course.0.step(&read, &Outcome::Words(vec![0])).is_err());
    assert!(!course.0.attachments[&attachment].mapped);
    course.is(Op::MapDma { attachment }, refused(libc::ENODEV));
    course.is(Op::Attach { buffer }, refused(libc::ENODEV));
    assert!(course.0.is_accessible(other));
    course.memory(0, true);
    course.is(read, Outcome::Words(vec![3]));
    course.done(Op::MapDma { attachment });
    course.is(Op::MapDma { attachment }, refused(libc::EBUSY));
}

#[test]
fn more_than_twice_a_bar_is_not_mapped_for_an_importer() {
    let mut course = Course::new();
    let size = course.0.devices[0].spec.size;
    let map = |course: &mut Course, ranges: &[_]| {
        let buffer = course.export(0, ranges);
        course.map(buffer);
        let attachment = course.made(Op::Attach { buffer });
        Op::MapDma { attachment }
    };
    let twice = map(&mut course, &[(0, size), (0, size)]);
    course.done(twice);
    let more = map(&mut course, &[(0, size), (PAGE, PAGE), (0, size)]);
    course.is(more.clone(), refused(libc::EINVAL));
    course.memory(0, false);
    course.is(more, refused(libc::ENODEV));
}

#[test]
fn revoke_is_for_good_and_for_one() {
    let mut course = Course::new();
    let (buffer, mapping, attachment) = course.leased(0);
    let same = course.export(0, &[(0, PAGE)]);
    let revoke = |device| Op::Revoke { device, buffer };
    course.is(revoke(1), refused(libc::ENODEV));
    course.done(revoke(0));
    course.is(revoke(0), refused(libc::EBADFD));
    course.is(Op::Read { mapping, at: 0 }, Outcome::Sigbus);
    course.memory(0, false).memory(0, true);
    course.is(Op::Read { mapping, at: 0 }, Outcome::Sigbus);
    course.is(Op::MapDma { attachment }, refused(libc::ENODEV));
    assert_eq!(course.0.state(same), State::Ok);
}

#[test]
fn a_close_ends_what_the_open_made_unless_a_mapping_keeps_it_open() {
    let mut course = Course::new();
    let (buffer, mapping, _) = course.leased(0);
    let bar = course.made(Op::MapBar {
        device: 0,
        alias: false,
        offset: 0,
        length: PAGE,
    });
    course.done(Op::Close { device: 0 });
    assert_eq!(course.0.state(buffer), State::Ok);
    course.done(Op::Unmap { mapping: bar });
    assert_eq!(course.0.state(buffer), State::Dead);
    course.is(Op::Read { mapping, at: 0 }, Outcome::Sigbus);
    course.is(Op::Open { device: 0 }, Outcome::Opened(true));
    let status = Op::Status { device: 0, buffer };
    course.is(status, refused(libc::ENODEV));
    assert_eq!(course.0.state(buffer), State::Dead);
}

#[test]
fn low_power_lasts_until_it_is_left_or_until_the_next_access() {
    let mut course = Course::new();
    let (buffer, _, _) = course.leased(0);
    let enter = |wake_up| Op::EnterLowPower { device: 0, wake_up };
    course.done(enter(false));
    course.done(Op::Access { device: 0 });
    course.is(enter(true), refused(libc::EINVAL));
    assert_eq!(course.0.state(buffer), State::Revoked(REASON_LOW_POWER));
    course.done(Op::LeaveLowPower { device: 0 });
    assert_eq!(course.0.state(buffer), State::Ok);
    course.done(enter(true));
    assert_eq!(course.0.devices[0].low, LowPower::UntilWakeUp);
    course.done(Op::Access { device: 0 });
    assert_eq!(course.0.state(buffer), State::Ok);
    assert_eq!(course.0.devices[0].wake_ups, 1);
}

#[test]
fn resets_leave_memory_off_and_end_d3hot() {
    for reset in [
        Op::Reset { device: 0 },
        Op::SysfsReset { device: 0 },
        Op::FunctionReset { device: 0 },
        Op::HotReset { device: 0 },
        Op::BusReset { device: 0 },
    ] {
        let mut course = Course::new();
        let (buffer, _, attachment) = course.leased(0);
        course.done(reset.clone());
        assert_eq!(course.0.state(buffer), State::Ok);
        assert!(!course.0.attachments[&attachment].mapped);
        course.memory(0, false);
        course.done(Op::Power {
            device: 0,
            state: 3,
        });
        let both = REASON_MEMORY_OFF | REASON_LOW_POWER;
        assert_eq!(course.0.state(buffer), State::Revoked(both));
        course.done(reset);
        assert_eq!(course.0.state(buffer), State::Revoked(REASON_MEMORY_OFF));
    }
    let mut course = Course::new();
    course.is(Op::Reset { device: 1 }, refused(libc::EINVAL));
}

#[test]
fn a_hot_reset_takes_from_the_whole_set() {
    let mut course = Course::new();
    let leases = [course.leased(1), course.leased(2), course.leased(0)];
    course.done(Op::HotReset { device: 1 });
    let mapped = leases.map(|(_, _, attachment)| course.0.attachments[&attachment].mapped);
    assert_eq!(mapped, [false, false, true]);
}

#[test]
fn an_error_takes_from_the_whole_set_and_recovery_gives_back() {
    let mut course = Course::new();
    let error = |severity| Op::Error {
        device: 1,
        severity,
    };
    let leases = [course.leased(1), course.leased(2), course.leased(0)];
    let mapped =
        |course: &Course| leases.map(|(_, _, attachment)| course.0.attachments[&attachment].mapped);
    let taken = |course: &Course, severity| course.0.mappings_taken_by(&error(severity));
    assert_eq!(taken(&course, Severity::Corrected), []);
    let both = leases.map(|(_, mapping, _)| mapping)[..2].to_vec();
    assert_eq!(taken(&course, Severity::NonFatal), both);
    course.done(error(Severity::Corrected));
    assert_eq!(mapped(&course), [true; 3]);
    course.done(error(Severity::NonFatal));
    assert_eq!(mapped(&course), [false, false, true]);
    // REVOKE tells the importer that does not let go, and does not wait for it.
    let (_, _, slow) = leases[0];
    course.done(Op::MapDma { attachment: slow });
    course.done(Op::Hold {
        attachment: slow,
        hold: true,
    });
    assert_eq!(course.0.waited_for(&error(Severity::NonFatal)), []);
    course.done(error(Severity::NonFatal));
    assert_eq!(mapped(&course), [true, false, true]);
    let off = Op::Memory {
        device: 1,
        on: false,
        long: false,
    };
    assert_eq!(course.0.waited_for(&off), [slow]);
    course.done(Op::UnmapDma { attachment: slow });
    assert!(
        leases
            .iter()
            .all(|(buffer, ..)| course.0.state(*buffer) == State::Ok)
    );
    course.memory(1, false);
    course.done(error(Severity::NonFatal));
    assert_eq!(
        course.0.state(leases[0].0),
        State::Revoked(REASON_MEMORY_OFF)
    );
    // Recovery wakes a device.
    course.done(Op::EnterLowPower {
        device: 2,
        wake_up: true,
    });
    course.done(error(Severity::NonFatal));
    assert_eq!(course.0.state(leases[1].0), State::Ok);
    assert_eq!(course.0.devices[2].wake_ups, 1);
}

#[test]
fn what_was_pulled_out_is_dead_and_lets_go_when_nobody_uses_it() {
    let mut course = Course::new();
    let (buffer, mapping, attachment) = course.leased(0);
    let (_, other, _) = course.leased(1);
    let map_bar = Op::MapBar {
        device: 0,
        alias: false,
        offset: 0,
        length: PAGE,
    };
    let bar = course.made(map_bar.clone());
    let pull = Op::Pull { device: 0 };
    assert_eq!(course.0.let_go_by(&pull), []);
    // All ones may be read until the kernel notices.
    let word = Op::Write {
        mapping,
        at: 0,
        value: 5,
    };
    course.done(word);
    let shots = course.0.shots(&pull, |_| 0);
    let of_mapping = |mapping| shots.iter().find(|shot| shot.mapping == mapping);
    let shot = of_mapping(mapping).expect("a shot");
    assert_eq!(
        (shot.during, shot.after, shot.word),
        (During::Either, false, None)
    );
    let shot = of_mapping(other).expect("a shot");
    assert_eq!((shot.during, shot.after), (During::Works, true));
    course.done(pull);
    assert_eq!(course.0.state(buffer), State::Dead);
    assert!(!course.0.attachments[&attachment].mapped);
    for mapping in [mapping, bar] {
        course.is(Op::Read { mapping, at: 0 }, Outcome::Sigbus);
    }
    course.is(map_bar, refused(libc::ENODEV));
    let export = Op::Export {
        device: 0,
        ranges: vec![(0, PAGE)],
        writable: true,
    };
    course.is(export.clone(), refused(libc::ENODEV));
    // It can be revoked all the same, once.
    let revoke = Op::Revoke { device: 0, buffer };
    course.done(revoke.clone());
    course.is(revoke, refused(libc::EBADFD));
    let close = Op::Close { device: 0 };
    assert_eq!(course.0.let_go_by(&close), []);
    course.done(close);
    let unmap = Op::Unmap { mapping: bar };
    assert_eq!(course.0.let_go_by(&unmap), [0]);
    course.done(unmap);
    course.done(Op::Plug { device: 0 });
    course.is(Op::Open { device: 0 }, Outcome::Opened(true));
    course.done(export);
    assert_eq!(course.0.state(buffer), State::Dead);
    // One that nobody uses is let go at once.
    course.done(Op::Close { device: 0 });
    assert_eq!(course.0.let_go_by(&Op::Pull { device: 0 }), [0]);
}

#[test]
fn nothing_is_stored_to_registers() {
    let (course, ..) = course_of(21, 4000);
    let is_store = |step: &&Step| matches!(step.op, Op::WriteFd { device: 3, .. });
    assert_eq!(course.iter().filter(is_store).count(), 0);
    let (_, _, oracle) = course_of(21, 4000);
    assert!(oracle.devices[3].words.values().all(|&word| word == 0));
}

#[test]
fn who_holds_is_waited_for_where_something_is_taken() {
    let mut course = Course::new();
    let (buffer, _, attachment) = course.leased(0);
    let off = Op::Memory {
        device: 0,
        on: false,
        long: false,
    };
    assert!(course.0.waited_for(&off).is_empty());
    course.done(Op::Hold {
        attachment,
        hold: true,
    });
    let revoke = |device| Op::Revoke { device, buffer };
    for op in [&off, &Op::Reset { device: 0 }, &revoke(0), &Op::Sleep] {
        assert_eq!(course.0.waited_for(op), [attachment], "{op:?}");
    }
    for op in [
        &Op::HotReset { device: 1 },
        &revoke(1),
        &Op::Access { device: 0 },
    ] {
        assert!(course.0.waited_for(op).is_empty(), "{op:?}");
    }
    course.done(off.clone());
    assert!(course.0.waited_for(&revoke(0)).is_empty(), "a second wait");
}

#[test]
fn tags_and_memory_types_are_those_that_were_set() {
    let mut course = Course::new();
    let buffer = course.export(0, &[(0, PAGE)]);
    let tags = |flags, tag, extended, hint| Op::SteeringTags {
        device: 0,
        buffer,
        flags,
        tag,
        extended,
        hint,
    };
    let get = |extended| Op::ReadTag { buffer, extended };
    course.is(get(false), refused(libc::EOPNOTSUPP));
    course.done(tags(TPH_ST, 0, 0, 2));
    course.is(get(false), Outcome::Tag(0, 2));
    course.is(get(true), refused(libc::EOPNOTSUPP));
    course.done(tags(TPH_ST_EXT, 0, 0x1234, 1));
    course.is(get(true), Outcome::Tag(0x1234, 1));
    course.is(get(false), refused(libc::EOPNOTSUPP));
    for wrong in [tags(4, 0, 0, 0), tags(1, 0, 9, 0), tags(0, 0, 0, 4)] {
        course.is(wrong, refused(libc::EINVAL));
    }
    let set = |device, value| Op::MemoryType {
        device,
        buffer,
        value,
    };
    let before = course.map(buffer);
    course.is(set(0, 2), refused(libc::ENOENT));
    course.is(set(1, MEMATTR_WC), refused(libc::ENODEV));
    course.done(set(0, MEMATTR_WC));
    let after = course.map(buffer);
    let combining = [before, after].map(|mapping| course.0.mappings[&mapping].combining);
    assert_eq!(combining, [false, true]);
}

#[test]
fn a_process_made_by_a_fork_has_mappings_of_its_own() {
    let mut course = Course::new();
    let buffer = course.export(0, &[(0, PAGE)]);
    let mapping = course.map(buffer);
    let process = course.made(Op::Spawn);
    let copy = process + 1;
    course.done(Op::Unmap { mapping });
    course.done(Op::CloseBuffer {
        buffer,
        process: MAIN,
    });
    assert_eq!(course.0.mappings[&copy].process, process);
    assert!(course.0.is_accessible(copy));
    course.done(Op::Kill { process });
    assert!(course.0.buffers.is_empty(), "nobody refers to it");
}

#[test]
fn refusals_are_those_of_the_contract() {
    let mut course = Course::new();
    for (spoil, errno) in [
        (Spoil::TooManyRanges, libc::E2BIG),
        (Spoil::NoRegion, libc::ENODEV),
        (Spoil::Msix, libc::EPERM),
        (Spoil::EmptyRange, libc::EINVAL),
    ] {
        course.is(Op::ExportSpoilt { device: 0, spoil }, refused(errno));
    }
    let buffer = course.made(Op::Export {
        device: 0,
        ranges: vec![(0, PAGE)],
        writable: false,
    });
    let mapping = course.made(Op::Map {
        buffer,
        process: MAIN,
        offset: 0,
        length: PAGE,
        protection: Protection::Read,
        large: false,
    });
    let protect = Op::Protect {
        mapping,
        first: 0,
        pages: 1,
        protection: Protection::ReadWrite,
    };
    course.is(protect, refused(libc::EACCES));
}

#[test]
fn shots_say_what_must_be_while_a_step_is_made() {
    let mut course = Course::new();
    let (buffer, mapping, _) = course.leased(0);
    let (_, other, _) = course.leased(1);
    let of = |course: &Course, op: &Op| {
        let mut shots = course.0.shots(op, |_| 0);
        shots.sort_by_key(|shot| shot.mapping);
        let [one, two] = shots[..] else {
            panic!("{shots:?}")
        };
        assert_eq!([one.mapping, two.mapping], [mapping, other]);
        [(one.during, one.after), (two.during, two.after)]
    };
    let off = Op::Memory {
        device: 0,
        on: false,
        long: true,
    };
    let undisturbed = (During::Works, true);
    assert_eq!(of(&course, &off), [(During::Either, false), undisturbed]);
    let revoke = Op::Revoke { device: 0, buffer };
    assert_eq!(of(&course, &revoke), [(During::Either, false), undisturbed]);
    assert_eq!(
        of(&course, &Op::Access { device: 0 }),
        [undisturbed, undisturbed]
    );
    course.done(revoke);
    assert_eq!(
        of(&course, &Op::Access { device: 0 }),
        [(During::Sigbus, false), undisturbed]
    );
}

/// Draws steps and lets come of each what must.
fn course_of(seed: u64, steps: u64) -> (Vec<Step>, Coverage, Oracle) {
    let mut oracle = Oracle::new(specs());
    let mut generator = Generator::new(seed, true);
    let mut coverage = Coverage::default();
    let mut course = Vec::new();
    for _ in 0..steps {
        let step = generator.draw(&oracle);
        let outcome = oracle.predict(&step.op);
        let waited = !oracle.waited_for(&step.op).is_empty();
        coverage.add(&step, waited, &outcome);
        if let Err(objection) = oracle.step(&step.op, &outcome) {
            panic!("{step:?}: {objection}");
        }
        course.push(step);
    }
    (course, coverage, oracle)
}

#[test]
fn the_same_seed_gives_the_same_steps_and_another_one_others() {
    let [one, again, other] = [7, 7, 8].map(|seed| course_of(seed, 300).0);
    assert_eq!(one, again);
    assert_ne!(one, other);
}

#[test]
fn a_list_has_the_buffers_of_this_open_and_nothing_else() {
    let mut course = Course::new();
    let (buffer, mapping, attachment) = course.leased(0);
    let list = Op::List {
        device: 0,
        at_a_time: 4,
    };
    let Outcome::Listed(right) = course.0.predict(&list) else {
        panic!("no list");
    };
    let [record] = &right[..] else {
        panic!("{right:?}");
    };
    assert_eq!(record.buffer, Some(buffer));
    assert_eq!((record.vmas, record.mappings), (1, 1));
    course.is(list.clone(), Outcome::Listed(right.clone()));
    let mut objects = |change: &dyn Fn(&mut Record)| {
        let mut wrong = right.clone();
        change(&mut wrong[0]);
        assert!(course.0.step(&list, &Outcome::Listed(wrong)).is_err());
    };
    objects(&|record| record.draining = true);
    objects(&|record| record.mappings = 0);
    objects(&|record| record.vmas = 2);
    objects(&|record| record.combining = 1);
    objects(&|record| record.writable = false);
    objects(&|record| record.buffer = None);
    objects(&|record| record.seen.state = State::Dead);
    assert!(course.0.step(&list, &Outcome::Listed(Vec::new())).is_err());
    let twice = [&right[..], &right[..]].concat();
    assert!(course.0.step(&list, &Outcome::Listed(twice)).is_err());
    course.done(Op::Unmap { mapping });
    course.done(Op::Detach { attachment });
    course.done(Op::CloseBuffer {
        buffer,
        process: MAIN,
    });
    course.is(list, Outcome::Listed(Vec::new()));
}

#[test]
fn what_changes_signals_to_who_has_an_eventfd() {
    let mut course = Course::new();
    let (buffer, mapping, attachment) = course.leased(0);
    let signalled = |course: &mut Course, op: Op| {
        let before = course.0.clone();
        course.done(op.clone());
        before.signalled_by(&op, &course.0)
    };
    let memory = |on| Op::Memory {
        device: 0,
        on,
        long: false,
    };
    assert_eq!(signalled(&mut course, memory(false)), []);
    assert_eq!(signalled(&mut course, memory(true)), []);
    let events = |armed| Op::Events { device: 0, armed };
    assert_eq!(signalled(&mut course, events(true)), []);
    assert_eq!(signalled(&mut course, memory(false)), [0]);
    assert_eq!(signalled(&mut course, memory(false)), []);
    assert_eq!(signalled(&mut course, Op::Reset { device: 0 }), []);
    assert_eq!(signalled(&mut course, memory(true)), [0]);
    assert_eq!(signalled(&mut course, Op::Reset { device: 0 }), [0]);
    assert_eq!(signalled(&mut course, Op::Unmap { mapping }), []);
    let revoke = Op::RevokeId {
        device: 0,
        buffer,
        nowait: false,
    };
    assert_eq!(signalled(&mut course, revoke), [0]);
    assert_eq!(signalled(&mut course, Op::Detach { attachment }), []);
    let close = Op::CloseBuffer {
        buffer,
        process: MAIN,
    };
    assert_eq!(signalled(&mut course, close), [0]);
    assert_eq!(signalled(&mut course, events(false)), []);
    assert_eq!(signalled(&mut course, memory(false)), []);
    course.done(events(true));
    course.done(Op::Close { device: 0 });
    course.is(Op::Open { device: 0 }, Outcome::Opened(true));
    assert_eq!(signalled(&mut course, memory(false)), []);
}

#[test]
fn a_long_course_has_every_operation_and_each_outcome_that_matters() {
    for seed in 0..3 {
        let (_, coverage, _) = course_of(seed, 3000);
        assert_eq!(coverage.missing(), [], "seed {seed}");
        assert!(coverage.waited() > 10, "seed {seed}: {coverage}");
    }
    for seed in 3..5 {
        let (_, coverage, _) = course_of(seed, 6000);
        assert_eq!(coverage.missing(), [], "seed {seed}");
        let text = coverage.to_string();
        let line = |kind: Kind| {
            let name = format!("{kind:?} ");
            let line = text.lines().find(|line| line.starts_with(&name));
            line.expect("a line an operation").to_owned()
        };
        for (kind, outcomes) in [
            (
                Kind::Revoke,
                &["done", "EBADFD", "ENODEV", "under fire"][..],
            ),
            (
                Kind::RevokeId,
                &["done", "EBADFD", "ENOENT", "EINPROGRESS", "under fire"],
            ),
            (Kind::List, &["done", "under fire"]),
            (Kind::Events, &["done", "under fire"]),
            (Kind::Read, &["done", "SIGBUS"]),
            (Kind::Write, &["done", "SIGBUS"]),
            (Kind::Map, &["done", "ENODEV"]),
            (Kind::MapDma, &["done", "ENODEV", "EBUSY"]),
            (Kind::WriteDma, &["done", "ENXIO"]),
            (Kind::Status, &["OK", "REVOKED", "DEAD", "ENODEV"]),
            (Kind::EnterLowPower, &["done", "EINVAL"]),
            (Kind::Error, &["done", "under fire"]),
            (Kind::Pull, &["done", "under fire"]),
            (Kind::Export, &["done", "ENODEV"]),
            (Kind::MapBar, &["done", "ENODEV"]),
            (Kind::SteeringTags, &["done", "EINVAL", "EOPNOTSUPP"]),
            (Kind::ReadTag, &["done", "EOPNOTSUPP"]),
        ] {
            for outcome in outcomes {
                assert!(line(kind).contains(outcome), "seed {seed}: {}", line(kind));
            }
        }
    }
}

#[test]
fn whatever_else_comes_of_a_step_is_objected_to() {
    let (course, _, _) = course_of(11, 1500);
    let mut oracle = Oracle::new(specs());
    for step in course {
        let right = oracle.predict(&step.op);
        for wrong in [Outcome::Done, Outcome::Sigbus, refused(libc::ENODEV)] {
            let answer = oracle.clone().step(&step.op, &wrong);
            assert_eq!(answer.is_ok(), wrong == right, "{step:?}: {wrong:?}");
        }
        oracle.step(&step.op, &right).expect("what must come");
    }
}
