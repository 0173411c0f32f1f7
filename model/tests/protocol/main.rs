// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! The protocol of faults, drains and re-arming, in every order of its steps.
//!
//! [`machine`] has threads, locks, and what must hold; [`module`] what the module does, step by
//! step. Checked is each combination of so many threads: 3, or `BARLEASE_MODEL_THREADS`. Every
//! planted [`Bug`] must be found.
//!
//! Why `stateright`: the protocol is locks and waits, not memory order, and its states are few once
//! those that differ in history only are one. An explicit-state checker sees each once, where
//! checkers that run real threads (loom, shuttle) try the ways to them, which are too many from
//! three threads with two dozen steps on; and it has no trouble with a lock that a waiting writer
//! keeps readers from, as the kernel's.

mod machine;
mod module;

use std::num::NonZeroUsize;

use machine::{
    ENDS, INACCESSIBLE, NO_DEADLOCK, NOT_ASKED, NOT_DANGLING, NOT_STUCK, NOT_TIED, Program,
    Protocol, World,
};
use module::{Bug, Kind, Next, Outcome, Setting};
use stateright::{Checker, Model, Path};

macro_rules! threads {
    ($($name:ident)+) => {
        /// A thread of a combination.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        enum Who {
            $($name,)+
        }

        use Who::{$($name,)+};

        const ALL: &[Who] = &[$($name,)+];
    };
}

threads! {
    Toucher OtherToucher Exporter
    QuickImporter SlowImporter FencedImporter
    Revoker HastyRevoker Killer Fencer
    SysfsReset BusReset VfioReset HotReset
    MemoryOff MemoryOn D3hot D0
    LowPower LowPowerForGood LowPowerUntilWakeUp Access HostWakeUp
    Sleep Error FatalError FailedError
    Undecoded Lender OtherLender
    Close CloseAndOpen NextOwner PulledOut Unbound
    Release Reader
}

/// Those after which run-time power management may put the device to sleep.
const LOW_POWER: [Who; 3] = [LowPower, LowPowerForGood, LowPowerUntilWakeUp];

/// Those that open the device.
const OPENERS: [Who; 2] = [CloseAndOpen, NextOwner];
/// Those that take the device lock, which a hot reset is refused without.
const DEVICE_LOCKERS: [Who; 8] = [
    SysfsReset,
    BusReset,
    VfioReset,
    Error,
    FatalError,
    FailedError,
    PulledOut,
    Unbound,
];
/// Importers.
const IMPORTING: [Who; 3] = [QuickImporter, SlowImporter, FencedImporter];

/// These threads at once. Buffer 0 is exported at first; buffer 1 is the exporter's.
fn protocol(who: &[Who], bug: Option<Bug>) -> Protocol {
    let mut start = World::new();
    start.export(0);
    let mut importers = 0;
    let sleeps = who.iter().any(|this| LOW_POWER.contains(this));
    let setting = Setting { bug, sleeps };
    let mut programs = Vec::new();
    for &this in who {
        let import = |start: &mut World, kind: Kind, number: &mut usize| {
            let importer = &mut start.importers[*number];
            importer.quick = kind != Kind::Slow;
            *number += 1;
            start.buffers[0].users += 1;
            module::importer(setting, *number - 1, 0, kind)
        };
        let program: Program = match this {
            Toucher | OtherToucher => {
                start.buffers[0].users += 1;
                module::toucher(setting, 0, usize::from(this == OtherToucher))
            }
            Exporter => {
                start.buffers[1].users += 1;
                module::exporter(setting, 1, 0)
            }
            QuickImporter => import(&mut start, Kind::Quick, &mut importers),
            SlowImporter => import(&mut start, Kind::Slow, &mut importers),
            FencedImporter => import(&mut start, Kind::Fenced, &mut importers),
            Revoker => {
                start.buffers[0].users += 1;
                module::revoker(setting, 0)
            }
            HastyRevoker => {
                start.buffers[0].users += 1;
                module::hasty_revoker(setting, 0)
            }
            Killer => module::killer(setting),
            Fencer => {
                start.buffers[0].users += 1;
                module::fencer(setting, 0)
            }
            // Nobody: how the device is at first.
            Undecoded => {
                start.undecoded();
                continue;
            }
            Lender | OtherLender => module::lender(setting),
            SysfsReset => module::sysfs_reset(setting),
            BusReset => module::bus_reset(setting),
            VfioReset => module::vfio_reset(setting),
            HotReset => module::hot_reset(setting),
            MemoryOff => module::command(setting, false),
            MemoryOn => module::command(setting, true),
            D3hot => module::power(setting, true),
            D0 => module::power(setting, false),
            LowPower => module::low_power(setting, false, true),
            LowPowerForGood => module::low_power(setting, false, false),
            LowPowerUntilWakeUp => module::low_power(setting, true, false),
            Access => module::access(setting),
            HostWakeUp => module::host_wake_up(setting),
            Sleep => module::sleep(setting),
            Error => module::error(setting, Outcome::Recovered),
            FatalError => module::error(setting, Outcome::LinkReset),
            FailedError => module::error(setting, Outcome::Failed),
            Close => module::close(setting, Next::Nothing),
            CloseAndOpen => module::close(setting, Next::Open),
            NextOwner => {
                start.buffers[1].users += 1;
                module::close(setting, Next::OpenAndExport { buffer: 1, vma: 0 })
            }
            PulledOut => module::removal(setting, true),
            Unbound => module::removal(setting, false),
            Release => module::releaser(setting, 0),
            Reader => module::reader(setting),
        };
        programs.push(program);
    }
    Protocol { programs, start }
}

/// Whether a combination makes sense: at most two importers, one owner of each VMA, one close, one
/// release.
fn fits(who: &[Who]) -> bool {
    let number = |of: &[Who]| who.iter().filter(|this| of.contains(this)).count();
    number(&IMPORTING) <= machine::IMPORTERS
        && [Toucher, OtherToucher, Release, Killer, Fencer, Undecoded, Lender, OtherLender]
            .iter()
            .all(|&one| number(&[one]) <= 1)
        // A port handles its errors one after the other.
        && number(&[Error, FatalError, FailedError]) <= 1
        // It is the other's copy.
        && (number(&[OtherLender]) == 0 || number(&[Lender]) == 1)
        // The others are as this one, but for what comes of it.
        && (number(&[Error]) == 0 || number(&OPENERS) + number(&IMPORTING) != 0)
        && (number(&[FailedError]) == 0 || number(&OPENERS) + number(&[Toucher]) != 0)
        // As another one, but that nobody asks afterwards.
        && (number(&[HotReset]) == 0 || number(&LOW_POWER) + number(&[Lender, D3hot]) != 0)
        // One that is refused leaves the device awake, and nobody asks (docs/lifecycle.md).
        && (number(&[HotReset]) == 0 || number(&DEVICE_LOCKERS) == 0)
        && (number(&[Fencer]) == 0 || number(&IMPORTING) != 0)
        // Else there is nothing to lend; and nobody to be killed; and nothing to wait for.
        && (number(&[Lender]) == 0 || number(&[Undecoded, FatalError, D3hot, SysfsReset]) != 0)
        && (number(&[Killer]) == 0 || number(&[Revoker]) != 0)
        // It has the same buffer.
        && number(&[Exporter, NextOwner]) <= 1
        && number(&[Close, CloseAndOpen, NextOwner]) <= 1
        && number(&[HotReset]) <= 1
        && number(&[PulledOut, Unbound]) <= 1
        // It is the other's copy.
        && (number(&[OtherToucher]) == 0 || number(&[Toucher]) == 1)
        // The core refuses the second.
        && number(&LOW_POWER) <= 1
        // Else there is nothing to wake.
        && (number(&[HostWakeUp]) == 0 || number(&LOW_POWER) == 1)
        && (number(&[Access]) == 0 || number(&LOW_POWER) + number(&[Undecoded]) != 0)
}

/// All multisets of `size` of these that make sense.
fn combinations(of: &[Who], size: usize) -> Vec<Vec<Who>> {
    fn grow(of: &[Who], size: usize, so_far: &mut Vec<Who>, all: &mut Vec<Vec<Who>>) {
        if size == 0 {
            if fits(so_far) {
                all.push(so_far.clone());
            }
            return;
        }
        for (index, &next) in of.iter().enumerate() {
            so_far.push(next);
            grow(&of[index..], size - 1, so_far, all);
            so_far.pop();
        }
    }
    let mut all = Vec::new();
    grow(of, size, &mut Vec::new(), &mut all);
    all
}

/// Checks a combination: how many states it has.
fn check(who: &[Who]) -> usize {
    let checker = protocol(who, None)
        .checker()
        .threads(threads())
        .spawn_bfs()
        .join();
    for property in [
        INACCESSIBLE,
        NOT_STUCK,
        NO_DEADLOCK,
        NOT_DANGLING,
        NOT_ASKED,
        NOT_TIED,
        ENDS,
    ] {
        if let Some(path) = checker.discovery(property) {
            let steps = listing(checker.model(), path);
            panic!("{who:?}: not \"{property}\":\n{steps}");
        }
    }
    checker.unique_state_count()
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get)
}

fn listing(protocol: &Protocol, path: Path<World, usize>) -> String {
    let steps = path.into_vec().into_iter();
    let lines = steps.filter_map(|(world, thread)| {
        let step = protocol.describe(&world, thread?);
        Some(format!("  {step}\n"))
    });
    lines.collect()
}

fn size() -> usize {
    match std::env::var("BARLEASE_MODEL_THREADS") {
        Ok(size) => size.parse().expect("BARLEASE_MODEL_THREADS is a number"),
        Err(_) => 3,
    }
}

#[test]
fn nothing_is_reached_that_must_not_be_and_nothing_is_stuck() {
    let combinations = combinations(ALL, size());
    let number = combinations.len();
    let mut states = 0;
    for who in combinations {
        states += check(&who);
    }
    println!(
        "{number} combinations of {} threads: {states} states",
        size()
    );
}

/// Some of four and five threads, picked for what has gone wrong elsewhere.
#[test]
fn larger_ones_hold_too() {
    for who in [
        &[Toucher, SlowImporter, Revoker, MemoryOff][..],
        &[Toucher, FencedImporter, SysfsReset, Close],
        &[Toucher, OtherToucher, MemoryOff, MemoryOn],
        &[Reader, Toucher, MemoryOff, SysfsReset],
        &[Toucher, LowPower, HostWakeUp, BusReset],
        &[Toucher, NextOwner, PulledOut, MemoryOn],
        &[Toucher, Lender, OtherLender, Undecoded, SysfsReset],
        &[SlowImporter, Fencer, HastyRevoker, MemoryOff],
        &[FencedImporter, Revoker, Killer, Error],
    ] {
        let states = check(who);
        println!("{who:?}: {states} states");
    }
}

#[test]
fn the_model_is_not_empty() {
    let checker = protocol(&[Toucher, QuickImporter, MemoryOff], None)
        .checker()
        .threads(threads())
        .spawn_bfs()
        .join();
    checker.assert_properties();
}

/// Plants a bug, and expects that these threads find it as this.
fn finds(bug: Bug, who: &[Who], property: &'static str) {
    check(who);
    let checker = protocol(who, Some(bug))
        .checker()
        .threads(threads())
        .spawn_bfs()
        .join();
    let path = checker.discovery(property);
    let steps = path.unwrap_or_else(|| panic!("{bug:?} is not found by {who:?}"));
    println!("{bug:?}:\n{}", listing(checker.model(), steps));
}

macro_rules! planted {
    ($($name:ident: $bug:ident, $who:expr, $property:ident;)+) => {
        $(#[test]
        fn $name() {
            finds(Bug::$bug, &$who, $property);
        })+
    };
}

planted! {
    a_fault_that_inserts_without_the_lock_is_found:
        FaultInsertsWithoutTheLock, [Toucher, Revoker], INACCESSIBLE;
    an_event_that_zaps_before_it_shuts_the_door_is_found:
        ZapBeforeBegin, [Toucher, MemoryOff], INACCESSIBLE;
    a_revocation_that_zaps_before_it_marks_is_found:
        ZapBeforeMark, [Toucher, Revoker], INACCESSIBLE;
    a_zap_of_one_of_two_mappings_is_found:
        ZapOfOneVma, [Toucher, OtherToucher, MemoryOff], INACCESSIBLE;
    a_dma_mapping_made_after_an_early_look_is_found:
        MapLooksBeforeTheLock, [SlowImporter, SysfsReset], INACCESSIBLE;
    a_dma_mapping_made_without_a_look_is_found:
        MapDoesNotLook, [QuickImporter, MemoryOff], INACCESSIBLE;
    a_drain_that_does_not_wait_is_found:
        NoWait, [SlowImporter, VfioReset], INACCESSIBLE;
    a_drain_that_does_not_wait_for_fences_is_found:
        NoWaitForFences, [FencedImporter, Revoker], INACCESSIBLE;
    a_revocation_that_leaves_the_wait_to_an_event_is_found:
        RevokeTrustsTheEvent, [SlowImporter, Revoker, Sleep], INACCESSIBLE;
    an_end_that_ends_other_events_is_found:
        EndOfAll, [Toucher, SysfsReset, MemoryOn], INACCESSIBLE;
    events_that_do_not_nest_are_found:
        NoNesting, [Toucher, MemoryOff, MemoryOn], INACCESSIBLE;
    a_sample_that_is_set_too_late_is_found:
        SampleBeforeTheLock, [MemoryOff, MemoryOn], NOT_STUCK;
    an_open_that_sets_its_sample_too_late_is_found:
        OpenSamplesBeforeTheLock, [NextOwner, FatalError], INACCESSIBLE;
    a_wake_up_that_nobody_notices_is_found:
        NoNotice, [LowPower], NOT_STUCK;
    a_word_on_sleep_that_is_written_too_late_is_found:
        AsleepStoredLate, [D3hot, SysfsReset, VfioReset], NOT_STUCK;
    a_drain_that_locks_access_is_found:
        DrainLocksAccess, [QuickImporter, MemoryOff], NO_DEADLOCK;
    a_zap_that_does_not_wait_for_faults_is_found:
        ZapPassesNoGate, [Toucher, MemoryOff], INACCESSIBLE;
    a_revocation_that_does_not_wait_for_faults_is_found:
        ZapPassesNoGate, [Toucher, Revoker], INACCESSIBLE;
    a_fault_that_is_counted_after_its_look_is_found:
        FaultEntersAfterItsLook, [Toucher, MemoryOff], INACCESSIBLE;
    a_word_on_access_that_is_written_too_late_is_found:
        PublishedLate, [Toucher, MemoryOff, MemoryOn], INACCESSIBLE;
    a_door_that_is_shut_after_the_drain_is_found:
        PublishedAfterTheDrain, [Toucher, SysfsReset], INACCESSIBLE;
    fences_that_are_nothing_to_wait_for_are_found:
        FencesAreNothingToWaitFor, [FencedImporter, Revoker], INACCESSIBLE;
    a_fault_that_takes_the_memory_lock_is_found:
        FaultTakesMemoryLock, [Toucher, Reader, MemoryOff], NO_DEADLOCK;
    a_close_that_drains_late_is_found:
        CloseDrainsLate, [Toucher, Close], INACCESSIBLE;
    a_reset_that_leaves_the_function_asleep_on_record_is_found:
        ResetForgetsPower, [D3hot, SysfsReset], NOT_STUCK;
    a_release_that_does_not_wait_for_who_looks_is_found:
        ReleaseDoesNotLock, [Toucher, QuickImporter, MemoryOff, Release], NOT_DANGLING;
    a_reset_that_does_not_wait_for_the_drain_is_found:
        ResetBeforeDrain, [Toucher, SysfsReset], INACCESSIBLE;
    a_wake_up_that_nobody_hears_is_found:
        WakeUpUnheard, [LowPowerUntilWakeUp, HostWakeUp], NOT_STUCK;
    a_wake_up_that_gives_back_without_asking_is_found:
        WakeUpDoesNotAsk, [Toucher, LowPowerForGood, HostWakeUp], INACCESSIBLE;
    a_device_that_is_half_awake_and_taken_for_awake_is_found:
        HalfAwakeIsAwake, [Toucher, D3hot, VfioReset, Error], INACCESSIBLE;
    a_device_that_was_half_awake_and_is_not_asked_again_is_found:
        HalfAwakeIsForgotten, [D3hot, VfioReset, Error], NOT_STUCK;
    a_device_that_falls_asleep_in_a_reset_is_found:
        ResetDoesNotHold, [LowPower, BusReset], NOT_STUCK;
    a_device_that_began_to_fall_asleep_before_a_reset_is_found:
        HoldDoesNotWait, [LowPower, BusReset], NOT_STUCK;
    a_device_that_was_pulled_out_and_is_left_to_its_owner_is_found:
        UnbindingLeavesIt, [Toucher, PulledOut], INACCESSIBLE;
    a_device_that_was_pulled_out_and_is_given_back_is_found:
        UnbindingSaysMemoryOff, [Toucher, MemoryOn, PulledOut], INACCESSIBLE;
    a_device_that_is_opened_after_it_was_pulled_out_is_found:
        OpenedDoesNotLook, [NextOwner, PulledOut], INACCESSIBLE;
    a_bit_that_is_lent_and_believed_at_the_end_of_a_reset_is_found:
        LentIsBelieved, [Toucher, Undecoded, Lender, SysfsReset], INACCESSIBLE;
    a_bit_that_is_lent_and_believed_at_the_end_of_an_error_is_found:
        LentIsBelieved, [Toucher, Lender, FatalError], INACCESSIBLE;
    a_bit_that_is_lent_and_believed_after_an_access_is_found:
        AskDoesNotLock, [Toucher, Undecoded, Lender, Access], INACCESSIBLE;
    a_bit_that_is_lent_and_believed_by_another_lender_is_found:
        AskDoesNotLock, [Undecoded, Lender, OtherLender], NOT_STUCK;
    a_bit_that_is_lent_and_believed_at_the_end_of_a_bracket_is_found:
        BracketDoesNotLock, [Toucher, Undecoded, Lender, D0], INACCESSIBLE;
    a_lender_that_does_not_ask_is_found:
        LenderDoesNotAsk, [Lender, SysfsReset], NOT_STUCK;
    an_end_of_low_power_that_does_not_wait_for_the_lock_is_found:
        ExitTriesTheLock, [LowPower, HotReset], NOT_STUCK;
    a_function_that_is_asked_in_a_reset_is_found:
        AsksInReset, [Undecoded, SysfsReset, Access], NOT_ASKED;
    a_function_that_is_asked_while_its_link_is_reset_is_found:
        AsksInReset, [FatalError, MemoryOn], NOT_ASKED;
    an_open_that_ends_an_error_is_found:
        OpenEndsErrors, [NextOwner, Error], INACCESSIBLE;
    a_failed_recovery_that_is_forgotten_is_found:
        FailureIsForgotten, [Toucher, FailedError], INACCESSIBLE;
    a_failed_recovery_that_outlasts_the_open_is_found:
        FailureIsForGood, [NextOwner, FailedError], NOT_STUCK;
    an_error_that_waits_for_importers_is_found:
        ErrorWaits, [SlowImporter, Error], NOT_TIED;
    a_system_that_wakes_up_and_does_not_ask_is_found:
        SystemWakeUpDoesNotAsk, [D3hot, Sleep], NOT_STUCK;
    a_wait_for_fences_without_end_is_found:
        FencesAreWaitedForInALoop, [SlowImporter, Revoker, Fencer], ENDS;
    an_event_that_waits_for_fences_without_end_is_found:
        FencesAreWaitedForInALoop, [SlowImporter, SysfsReset, Fencer], ENDS;
    a_fault_that_allocates_in_the_gate_is_found:
        FaultAllocatesInTheGate, [Toucher], NOT_TIED;
    an_event_that_passes_over_what_is_revoked_and_still_drains_is_found:
        DrainSkipsTheDead, [SlowImporter, HastyRevoker, SysfsReset], INACCESSIBLE;
    an_event_that_passes_over_what_was_killed_while_it_drained_is_found:
        DrainSkipsTheDead, [SlowImporter, Revoker, Killer, SysfsReset], INACCESSIBLE;
    an_event_that_passes_over_what_is_about_to_be_mapped_is_found:
        DrainTrustsTheCount, [SlowImporter, HastyRevoker, SysfsReset], INACCESSIBLE;
    a_revocation_that_does_not_wait_and_does_not_zap_is_found:
        NoWaitZapsNothing, [Toucher, SlowImporter, HastyRevoker], INACCESSIBLE;
}
