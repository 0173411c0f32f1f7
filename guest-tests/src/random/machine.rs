//! Makes a step on the real kernel.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    os::fd::{AsRawFd, OwnedFd},
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use barlease::InterruptKind;
use barlease_abi::{
    ALIAS_WC, BUFFER_DRAINING, BUFFER_INTERNAL, DmaBufRecord, DmaBufStatus, DmaBufTph,
    REVOKE_NOWAIT, STATE_DEAD, STATE_OK,
};
use barlease_oracle::{
    LowPower, MAIN, NoBuffer, Op, Oracle, Outcome, Record, Seen, Severity, Shot, Spec, Spoil,
    State, Step, TRANSFER, Target, WrongMap, page_size,
};
use fastrand::Rng;

use super::{
    fire,
    holder::{self, Holder, ask, protection},
};
use crate::{
    aer,
    buffers::{Events, id_of},
    errno::{Answer, EINPROGRESS},
    importer::{Attachment, DYNAMIC, Importer, KernelLog, abi},
    lease::{self, Request},
    map::{How, READ, READ_WRITE, Sigbus, shared_words},
    observe,
    pci::{BARLEASE, Function},
    process::{self, Child},
    slot::{Slot, Unproved},
    vfio::{
        COMMAND, COMMAND_MASTER, COMMAND_MEMORY, CONFIG_REGION, Device, Group, LOW_POWER_ENTRY,
        LOW_POWER_ENTRY_WITH_WAKEUP, LOW_POWER_EXIT, SET,
    },
    wait::{self, LONG},
};

/// How long who waits for an importer is looked at.
const TOO_EARLY: Duration = Duration::from_millis(30);

/// A device of the machine.
#[derive(Debug)]
pub struct Real {
    /// Its properties.
    pub spec: Spec,
    /// The first physical address of the BAR.
    pub start: u64,
    /// Eventfds of low power until wake-up that have not been looked at for the last time.
    pub events: Vec<OwnedFd>,
    /// Their counts.
    pub wake_ups: u64,
    /// Signalled when something of it is another than before, if it was given to it.
    pub changes: Option<Events>,
    /// Signalled when the device has reported an error, or is wanted back.
    pub told: OwnedFd,
    function: Function,
    device: Option<Device>,
    alias: Option<u32>,
}

impl Real {
    /// The open device.
    ///
    /// # Panics
    ///
    /// When it is not open.
    #[must_use]
    pub fn open(&self) -> &Device {
        self.device.as_ref().expect("an open device")
    }

    /// How often its user was told something since the last time.
    fn count_told(&self) -> u64 {
        let mut bytes = [0; 8];
        match File::from(self.told.try_clone().expect("an fd")).read_exact(&mut bytes) {
            Ok(()) => u64::from_ne_bytes(bytes),
            Err(_) => 0,
        }
    }

    /// The region of the BAR, or of its alias.
    fn region(&self, alias: bool) -> u32 {
        if alias {
            self.alias.expect("an alias")
        } else {
            self.spec.bar
        }
    }
}

/// The machine, and what was made in it.
#[derive(Debug)]
pub struct Machine {
    /// The devices.
    pub devices: Vec<Real>,
    /// The leases and mappings of this process.
    pub main: Holder,
    /// Attachments, and whether they ever had a mapping.
    pub attachments: BTreeMap<usize, (Attachment, bool)>,
    /// For looks after a step.
    pub rng: Rng,
    /// The ids of buffers that were made, and their numbers.
    ids: BTreeMap<usize, u64>,
    numbers: BTreeMap<u64, usize>,
    groups: BTreeMap<String, Arc<Group>>,
    children: BTreeMap<usize, Child>,
    importer: Importer,
    phase: &'static AtomicU32,
    slot: Slot,
    can_sleep: bool,
}

/// The results of a step that are kept.
enum Made {
    Nothing,
    Buffer(OwnedFd),
    Device(Box<Device>),
    Attachment(Attachment),
    Event(OwnedFd),
    Changes(Option<Events>),
    Alias(u32),
}

type Acted = (Outcome, Made);

fn done<T>(answer: Answer<T>) -> Acted {
    (outcome(answer), Made::Nothing)
}

fn outcome<T>(answer: Answer<T>) -> Outcome {
    match answer {
        Ok(_) => Outcome::Done,
        Err(errno) => Outcome::Refused(errno.0),
    }
}

impl Machine {
    /// The devices of that name, bound and not open.
    ///
    /// # Panics
    ///
    /// When they cannot be had.
    #[must_use]
    pub fn new(specs: Vec<Spec>, seed: u64) -> Self {
        let devices = specs.into_iter().map(|spec| {
            let function = Function::named(spec.name);
            function.bind(BARLEASE);
            Real {
                start: function.bar(spec.bar).0,
                spec,
                events: Vec::new(),
                wake_ups: 0,
                changes: None,
                told: process::eventfd(),
                function,
                device: None,
                alias: None,
            }
        });
        Self {
            devices: devices.collect(),
            main: Holder::default(),
            attachments: BTreeMap::new(),
            rng: Rng::with_seed(!seed),
            ids: BTreeMap::new(),
            numbers: BTreeMap::new(),
            groups: BTreeMap::new(),
            children: BTreeMap::new(),
            importer: Importer::open(),
            phase: &shared_words(1)[0],
            slot: Slot::new(),
            can_sleep: fs::write("/sys/power/pm_test", "none").is_ok(),
        }
    }

    /// Whether the system can pretend to sleep.
    #[must_use]
    pub fn can_sleep(&self) -> bool {
        self.can_sleep
    }

    /// Makes a step.
    ///
    /// # Panics
    ///
    /// When something that is touched, or waited for, while it is made is not as it must be.
    pub fn make(&mut self, step: &Step, oracle: &Oracle) -> Outcome {
        for events in self.devices.iter().filter_map(|real| real.changes.as_ref()) {
            let _ = events.taken();
        }
        if let Op::Pull { device } | Op::PullInStorm { device, .. } = step.op {
            // Without an open device the file would keep what is to go.
            let group = self.devices[device].function.group();
            self.groups.remove(&group);
        }
        if oracle.let_go_by(&step.op).is_empty() {
            return self.make_step(step, oracle);
        }
        let _unproved = Unproved::new();
        let outcome = self.make_step(step, oracle);
        self.slot.wait_until_empty();
        outcome
    }

    fn make_step(&mut self, step: &Step, oracle: &Oracle) -> Outcome {
        let op = &step.op;
        if let Some(outcome) = self.change(op, oracle) {
            return outcome;
        }
        let mut rng = self.rng.clone();
        let mut pick = |below| rng.u64(..below);
        let is_storm = matches!(op, Op::Storm { .. } | Op::PullInStorm { .. });
        let shots = if step.under_fire || is_storm {
            oracle.shots(op, &mut pick)
        } else {
            Vec::new()
        };
        self.rng = rng;
        let closing = match *op {
            Op::Close { device } => self.devices[device].device.take(),
            _ => None,
        };
        let this = &*self;
        let act = || this.act(op, closing, oracle, &shots);
        let waited = oracle.waited_for(op);
        let (outcome, made) = if step.under_fire {
            this.under_fire(oracle, &shots, || this.waiting(oracle, op, &waited, act))
        } else {
            this.waiting(oracle, op, &waited, act)
        };
        self.keep(op, made, oracle);
        outcome
    }

    /// Makes a step while all processes touch their mappings.
    fn under_fire<R>(&self, oracle: &Oracle, shots: &[Shot], act: impl FnOnce() -> R) -> R {
        let of = |process: usize| -> Vec<Shot> {
            let all = shots.iter().copied();
            all.filter(|shot| oracle.mappings[&shot.mapping].process == process)
                .collect()
        };
        self.phase.store(fire::DURING, Ordering::SeqCst);
        let mut shooting = Vec::new();
        for (&process, child) in &self.children {
            let shots = of(process);
            if !shots.is_empty() {
                holder::send(&child.link, &holder::fire_request(&shots));
                shooting.push(child);
            }
        }
        let ours = of(MAIN);
        thread::scope(|scope| {
            let _off = Off(self.phase);
            let own = [&ours, &ours].map(|shots| {
                let maps = &self.main.maps;
                (!shots.is_empty())
                    .then(|| scope.spawn(move || fire::shoot(maps, shots, self.phase)))
            });
            let result = act();
            self.phase.store(fire::AFTER, Ordering::SeqCst);
            for shooter in own.into_iter().flatten() {
                if let Err(panic) = shooter.join() {
                    panic::resume_unwind(panic);
                }
            }
            for child in shooting {
                let _touches = holder::receive(&child.link);
            }
            result
        })
    }

    /// Makes a step that must wait for these importers.
    fn waiting<R: Send>(
        &self,
        oracle: &Oracle,
        op: &Op,
        waited: &[usize],
        act: impl FnOnce() -> R + Send,
    ) -> R {
        if waited.is_empty() {
            return act();
        }
        let before: Vec<_> = waited
            .iter()
            .map(|number| self.attachments[number].0.status().interruptions)
            .collect();
        thread::scope(|scope| {
            let acting = scope.spawn(act);
            let told = |number: &usize| {
                let at = waited.iter().position(|other| other == number);
                let before = at.and_then(|at| before.get(at)).copied();
                Some(self.attachments[number].0.status().interruptions) > before
            };
            let look = || {
                // The kernel prepares the functions of a set for their reset one after the other.
                let mut devices: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
                for &number in waited {
                    let buffer = oracle.attachments[&number].buffer;
                    let device = oracle.buffers[&buffer].device;
                    devices.entry(device).or_default().push(number);
                }
                let is_mapped = |number: &usize| oracle.attachments[number].mapped;
                let is_over = || acting.is_finished();
                // An importer that has a fence and no mapping is told nothing.
                devices.retain(|&device, of| {
                    let is_told = of.iter().any(is_mapped);
                    if !is_told {
                        self.look_and_release(oracle, op, device, of, is_over);
                    }
                    is_told
                });
                while !devices.is_empty() {
                    let mut next = None;
                    wait::until("an invalidation", || {
                        let mut devices = devices.iter();
                        let found = devices.find(|(_, of)| {
                            let mut mapped = of.iter().filter(|number| is_mapped(number));
                            mapped.all(&told)
                        });
                        next = found.map(|(&device, _)| device);
                        next.is_some()
                    });
                    let device = next.expect("a device");
                    let of = devices.remove(&device).expect("its importers");
                    self.look_and_release(oracle, op, device, &of, is_over);
                }
            };
            if let Err(panic) = panic::catch_unwind(AssertUnwindSafe(look)) {
                // No thread may wait for ever.
                for number in waited {
                    let attachment = &self.attachments[number].0;
                    attachment.hold(false);
                    let _ = attachment.unmap();
                    let _ = attachment.signal();
                }
                panic::resume_unwind(panic);
            }
            match acting.join() {
                Ok(result) => result,
                Err(panic) => panic::resume_unwind(panic),
            }
        })
    }

    /// Checks that `op` waits for these importers of a device, with nothing of it left to
    /// processes, and ends the wait.
    fn look_and_release(
        &self,
        oracle: &Oracle,
        op: &Op,
        device: usize,
        of: &[usize],
        is_over: impl Fn() -> bool,
    ) {
        let held = |number: &usize| {
            let attachment = &oracle.attachments[number];
            attachment.mapped && attachment.hold
        };
        // All were told: before that, everything was taken out of page tables.
        if of.iter().any(held) {
            self.everything_is_gone(oracle, op, device);
        }
        // Time to come back too early.
        thread::sleep(TOO_EARLY);
        for number in of {
            assert!(!is_over(), "{op:?} did not wait for {number}");
            let attachment = &self.attachments[number].0;
            if oracle.attachments[number].fence {
                attachment.signal().expect("a fence");
            }
            if held(number) {
                attachment.unmap().expect("a mapping that is held");
            }
        }
    }

    /// Checks that this process has nothing any more of what `op`, which waits, takes away of a
    /// device.
    fn everything_is_gone(&self, oracle: &Oracle, op: &Op, device: usize) {
        let taken = oracle.taken_by(op);
        for (&number, mapping) in &oracle.mappings {
            let Target::Buffer(buffer) = mapping.target else {
                continue;
            };
            let is_taken = oracle.buffers[&buffer].device == device && taken.contains(&buffer);
            let mut pages = mapping.pages.iter();
            let first = pages.position(|page| {
                page.is_some_and(|page| page != barlease_oracle::Protection::None)
            });
            if let (MAIN, true, Some(page)) = (mapping.process, is_taken, first) {
                let touch = self.main.maps[&(number as u64)].read(page as u64 * page_size());
                assert_eq!(touch, Err(Sigbus), "mapping {number} while {op:?} waits");
            }
        }
    }

    /// A request to a process.
    fn ask(&mut self, process: usize, request: &[u64]) -> Vec<u64> {
        if process == MAIN {
            return self.main.answer(request, self.phase);
        }
        let link = &self.children[&process].link;
        holder::send(link, request);
        holder::receive(link)
    }

    /// A request whose reply is an errno.
    fn ask_errno(&mut self, process: usize, request: &[u64]) -> Outcome {
        match self.ask(process, request)[..] {
            [0] => Outcome::Done,
            [errno] => Outcome::Refused(errno as i32),
            _ => panic!("no errno"),
        }
    }

    /// Loads a word.
    pub fn read(&mut self, process: usize, mapping: usize, at: u64) -> Outcome {
        match self.ask(process, &[ask::READ, mapping as u64, at])[..] {
            [0, _] => Outcome::Sigbus,
            [_, word] => Outcome::Words(vec![word as u32]),
            _ => panic!("no word"),
        }
    }

    /// Makes a step that changes what processes hold; `None` if it is another one.
    fn change(&mut self, op: &Op, oracle: &Oracle) -> Option<Outcome> {
        let process_of = |mapping: usize| oracle.mappings[&mapping].process;
        Some(match *op {
            Op::Rebind { device } => {
                self.rebind(device);
                Outcome::Done
            }
            Op::Plug { device } => {
                let _unproved = Unproved::new();
                self.plug(device);
                Outcome::Done
            }
            Op::CloseBuffer { buffer, process } => {
                self.ask(process, &[ask::CLOSE, buffer as u64]);
                Outcome::Done
            }
            Op::Send { buffer, process } => {
                let fd = &self.main.fds[&(buffer as u64)];
                let link = &self.children[&process].link;
                holder::send(link, &[ask::TAKE, buffer as u64]);
                link.send_fd(fd);
                assert!(holder::receive(link).is_empty());
                Outcome::Done
            }
            Op::Map {
                buffer,
                process,
                offset,
                length,
                protection: prot,
                large,
            } => {
                let request = [
                    ask::MAP,
                    buffer as u64,
                    oracle.next as u64,
                    offset,
                    length,
                    protection(prot) as u64,
                    large.into(),
                ];
                self.ask_errno(process, &request)
            }
            Op::MapBar {
                device,
                alias,
                offset,
                length,
            } => {
                let this = &self.devices[device];
                let at = u64::from(this.region(alias)) << 40 | offset;
                match How::shared().map(this.open(), at, length) {
                    Ok(map) => {
                        self.main.maps.insert(oracle.next as u64, map);
                        Outcome::Done
                    }
                    Err(errno) => Outcome::Refused(errno.0),
                }
            }
            Op::Unmap { mapping } => {
                self.ask(process_of(mapping), &[ask::UNMAP, mapping as u64]);
                Outcome::Done
            }
            Op::UnmapPart {
                mapping,
                first,
                pages,
            } => {
                let request = [
                    ask::UNMAP_PART,
                    mapping as u64,
                    first * page_size(),
                    pages * page_size(),
                ];
                self.ask(process_of(mapping), &request);
                Outcome::Done
            }
            Op::Protect {
                mapping,
                first,
                pages,
                protection: prot,
            } => {
                let request = [
                    ask::PROTECT,
                    mapping as u64,
                    first * page_size(),
                    pages * page_size(),
                    protection(prot) as u64,
                ];
                self.ask_errno(process_of(mapping), &request)
            }
            Op::Move { mapping } => {
                self.ask_errno(process_of(mapping), &[ask::MOVE, mapping as u64])
            }
            Op::Fork { ref touches } => {
                let mut request = vec![ask::FORK];
                for &(mapping, at) in touches {
                    let works = oracle.is_accessible(mapping);
                    request.extend([mapping as u64, at, works.into()]);
                }
                match self.ask(MAIN, &request)[..] {
                    [1] => Outcome::Done,
                    _ => Outcome::Sigbus,
                }
            }
            Op::Spawn => {
                self.spawn(oracle);
                Outcome::Done
            }
            Op::Kill { process } => {
                let child = self.children.remove(&process).expect("a process");
                if self.rng.bool() {
                    holder::send(&child.link, &[ask::END]);
                    child.join();
                } else {
                    drop(child);
                }
                Outcome::Done
            }
            Op::Read { mapping, at } => self.read(process_of(mapping), mapping, at),
            Op::Write { mapping, at, value } => {
                let request = [ask::WRITE, mapping as u64, at, value.into()];
                match self.ask(process_of(mapping), &request)[..] {
                    [1] => Outcome::Done,
                    _ => Outcome::Sigbus,
                }
            }
            Op::Detach { attachment } => {
                let (attachment, _) = self.attachments.remove(&attachment).expect("attached");
                outcome(attachment.detach())
            }
            _ => return None,
        })
    }

    /// Unbinds and binds the functions of a group, none of which is open.
    fn rebind(&mut self, device: usize) {
        let set = self.devices[device].spec.set.clone();
        self.groups.remove(&self.devices[device].function.group());
        for &member in &set {
            self.devices[member].function.unbind();
        }
        for &member in &set {
            self.devices[member].function.bind(BARLEASE);
        }
    }

    /// Puts another device into the empty slot.
    fn plug(&mut self, device: usize) {
        self.slot.plug();
        let this = &mut self.devices[device];
        this.start = this.function.bar(this.spec.bar).0;
    }

    /// A process with copies of all our mappings.
    fn spawn(&mut self, oracle: &Oracle) {
        let copies = oracle.copies_from(oracle.next + 1);
        let maps = &mut self.main.maps;
        let phase = self.phase;
        let child = Child::start(&[], |link| {
            // Of the copy of this process's memory; that of this process stays as it is.
            let mut all = std::mem::take(maps);
            let maps = copies.iter().map(|(number, of)| {
                let map = all.remove(&(*of as u64)).expect("a mapping to copy");
                (*number as u64, map)
            });
            let holder = Holder {
                fds: BTreeMap::new(),
                maps: maps.collect(),
            };
            holder.serve(link, phase);
        });
        self.children.insert(oracle.next, child);
    }

    /// Makes a step that leaves what processes hold as it is.
    #[expect(clippy::too_many_lines, reason = "one arm an operation")]
    fn act(&self, op: &Op, closing: Option<Device>, oracle: &Oracle, shots: &[Shot]) -> Acted {
        let device = |number: usize| self.devices[number].open();
        let fd = |number: usize| &self.main.fds[&(number as u64)];
        let attachment = |number: usize| &self.attachments[&number].0;
        match *op {
            Op::Open { device } => self.open(device),
            Op::Close { .. } => {
                drop(closing);
                (Outcome::Done, Made::Nothing)
            }
            Op::Export {
                device: number,
                ref ranges,
                writable,
            } => {
                let bar = self.devices[number].spec.bar;
                let access = if writable {
                    libc::O_RDWR
                } else {
                    libc::O_RDONLY
                };
                let request = Request::new(bar, ranges).open_flags(access | libc::O_CLOEXEC);
                match device(number).request(&request) {
                    Ok(fd) => (Outcome::Done, Made::Buffer(fd)),
                    Err(errno) => (Outcome::Refused(errno.0), Made::Nothing),
                }
            }
            Op::ExportSpoilt {
                device: number,
                spoil,
            } => done(export_spoilt(
                device(number),
                &self.devices[number].spec,
                spoil,
            )),
            Op::Revoke {
                device: number,
                buffer,
            } => done(device(number).revoke(fd(buffer))),
            Op::RevokeNothing {
                device: number,
                what,
            } => done(match what {
                NoBuffer::Closed => device(number).revoke_number(lease::no_such_fd()),
                NoBuffer::Other => device(number).revoke(process::eventfd()),
            }),
            Op::RevokeId {
                device,
                buffer,
                nowait,
            } => done(self.revoke_id(op, device, buffer, nowait, oracle)),
            Op::List { device, at_a_time } => (self.list(device, at_a_time, oracle), Made::Nothing),
            Op::Events {
                device: number,
                armed,
            } => {
                let events = armed.then(|| device(number).events());
                let answer = match events {
                    Some(_) => Ok(()),
                    None => device(number).events_number(-1, 0),
                };
                (outcome(answer), Made::Changes(events))
            }
            Op::Status { device, buffer } => (self.status(device, buffer), Made::Nothing),
            Op::MemoryType {
                device: number,
                buffer,
                value,
            } => done(device(number).memattr(fd(buffer), value)),
            Op::SteeringTags {
                device: number,
                buffer,
                flags,
                tag,
                extended,
                hint,
            } => done(device(number).tph_raw(DmaBufTph {
                dmabuf_fd: fd(buffer).as_raw_fd(),
                flags,
                steering_tag_ext: extended,
                steering_tag: tag,
                ph: hint,
            })),
            Op::ReadTag { buffer, extended } => {
                let seen = match self.importer.steering_tag(fd(buffer), extended) {
                    Ok((tag, hint)) => Outcome::Tag(tag as u16, hint as u8),
                    Err(errno) => Outcome::Refused(errno.0),
                };
                (seen, Made::Nothing)
            }
            Op::MapSpoilt { buffer, how } => {
                let size = oracle.buffers[&buffer].size();
                let fd = fd(buffer);
                let read = How::shared().protection(READ);
                done(match how {
                    WrongMap::Private => read.private().map(fd, 0, page_size()),
                    WrongMap::PastEnd => read.map(fd, size - page_size(), 2 * page_size()),
                    WrongMap::Writable => {
                        How::shared().protection(READ_WRITE).map(fd, 0, page_size())
                    }
                })
            }
            Op::Alias { device: number } => {
                match device(number).alias(self.devices[number].spec.bar, ALIAS_WC) {
                    Ok(index) => (Outcome::Done, Made::Alias(index)),
                    Err(errno) => (Outcome::Refused(errno.0), Made::Nothing),
                }
            }
            Op::AliasSpoilt {
                device: number,
                of_alias,
            } => {
                let region = if of_alias {
                    self.devices[number].region(true)
                } else {
                    CONFIG_REGION
                };
                done(device(number).alias(region, ALIAS_WC))
            }
            Op::ReadFd {
                device: number,
                alias,
                at,
            } => {
                let mut bytes = [0; 4];
                let region = self.devices[number].region(alias);
                let seen = match device(number).read(region, at, &mut bytes) {
                    Ok(4) => Outcome::Words(vec![u32::from_ne_bytes(bytes)]),
                    Ok(short) => panic!("read {short} bytes"),
                    Err(errno) => Outcome::Refused(errno.0),
                };
                (seen, Made::Nothing)
            }
            Op::WriteFd {
                device: number,
                alias,
                at,
                value,
            } => {
                let region = self.devices[number].region(alias);
                done(device(number).write(region, at, &value.to_ne_bytes()))
            }
            Op::Attach { buffer } => match self.importer.attach(fd(buffer)) {
                Ok(attachment) => (Outcome::Done, Made::Attachment(attachment)),
                Err(errno) => (Outcome::Refused(errno.0), Made::Nothing),
            },
            Op::AttachSpoilt {
                buffer,
                peer_to_peer,
            } => {
                let able = if peer_to_peer {
                    abi::ATTACH_P2P
                } else {
                    abi::ATTACH_INVALIDATE
                };
                assert_ne!(able, DYNAMIC);
                done(self.importer.attach_as(fd(buffer), able))
            }
            Op::MapDma { attachment: number } => done(attachment(number).map()),
            Op::UnmapDma { attachment: number } => done(attachment(number).unmap()),
            Op::Hold {
                attachment: number,
                hold,
            } => {
                attachment(number).hold(hold);
                (Outcome::Done, Made::Nothing)
            }
            Op::Fence { attachment: number } => done(attachment(number).fence()),
            Op::Signal { attachment: number } => done(attachment(number).signal()),
            Op::ReadDma {
                attachment: number,
                at,
            } => {
                let seen = match attachment(number).read(at, TRANSFER as usize) {
                    Ok(bytes) => Outcome::Words(
                        bytes
                            .chunks_exact(4)
                            .map(|word| u32::from_le_bytes(word.try_into().expect("four")))
                            .collect(),
                    ),
                    Err(errno) => Outcome::Refused(errno.0),
                };
                (seen, Made::Nothing)
            }
            Op::WriteDma {
                attachment: number,
                at,
                value,
            } => {
                let words = (0..TRANSFER as u32 / 4).map(|word| value.wrapping_add(word));
                let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
                done(attachment(number).write(at, &bytes))
            }
            Op::Memory {
                device: number,
                on,
                long,
            } => {
                set_memory(device(number), on, long);
                (Outcome::Done, Made::Nothing)
            }
            Op::Master { device: number, on } => {
                let command = device(number).command() & !COMMAND_MASTER;
                let master = if on { COMMAND_MASTER } else { 0 };
                device(number).set_command(command | master);
                (Outcome::Done, Made::Nothing)
            }
            Op::Power {
                device: number,
                state,
            } => {
                device(number).set_power_state(state.into());
                (Outcome::Done, Made::Nothing)
            }
            Op::EnterLowPower { device, wake_up } => self.enter_low_power(device, wake_up),
            Op::LeaveLowPower { device: number } => {
                done(device(number).feature(SET | LOW_POWER_EXIT, &mut []))
            }
            Op::Access { device: number } => done(device(number).info()),
            Op::Reset { device: number } => done(device(number).reset()),
            Op::SysfsReset { device: number } => {
                let answer = device(number).function().reset();
                self.access_if_woken(number, oracle);
                done(answer)
            }
            Op::FunctionReset { device: number } => {
                function_reset(device(number));
                (Outcome::Done, Made::Nothing)
            }
            Op::HotReset { device: number } => {
                let answer = device(number).hot_reset(&[device(number).group()]);
                self.access_set_if_woken(number, oracle);
                done(answer)
            }
            Op::BusReset { device: number } => {
                let answer = device(number).function().port().reset_subordinate();
                self.access_set_if_woken(number, oracle);
                done(answer)
            }
            Op::Error {
                device: number,
                severity,
            } => {
                self.report(number, severity, oracle);
                (Outcome::Done, Made::Nothing)
            }
            Op::Pull { device: number } => {
                if oracle.devices[number].open {
                    self.pull(number);
                } else {
                    self.slot.pull();
                    self.slot.wait_until_empty();
                }
                (Outcome::Done, Made::Nothing)
            }
            Op::PullInStorm { device, rounds } => {
                let ours = of_main(oracle, shots);
                self.pull_in_storm(device, rounds, oracle, &ours);
                (Outcome::Done, Made::Nothing)
            }
            Op::Sleep => {
                assert!(observe::pretend_to_sleep());
                (Outcome::Done, Made::Nothing)
            }
            Op::Storm { device, rounds } => {
                self.storm(device, rounds, oracle, &of_main(oracle, shots));
                (Outcome::Done, Made::Nothing)
            }
            _ => panic!("{op:?} changes what processes hold"),
        }
    }

    /// Has a device report an error, and waits until everybody has been told and the kernel is done
    /// with it.
    fn report(&self, number: usize, severity: Severity, oracle: &Oracle) {
        if severity == Severity::Corrected {
            return aer::report_corrected();
        }
        let set = &self.devices[number].spec.set;
        for &member in set {
            self.devices[member].count_told();
        }
        let asleep = |&member: &usize| {
            let member = &oracle.devices[member];
            !member.open || member.low != LowPower::No
        };
        let unproved = set.iter().any(asleep).then(Unproved::new);
        let mut log = KernelLog::from_now();
        aer::inject(aer::NON_FATAL);
        aer::wait_for_recovery(&mut log);
        drop(unproved);
        for &member in set {
            let Real { spec, .. } = &self.devices[member];
            let told = self.devices[member].count_told();
            let open = oracle.devices[member].open;
            assert_eq!(
                told,
                u64::from(open),
                "how often who has {} was told",
                spec.name
            );
        }
        self.access_set_if_woken(number, oracle);
    }

    /// Pulls an open device out, and waits until its user is asked to close it.
    pub(super) fn pull(&self, device: usize) {
        self.devices[device].count_told();
        self.slot.pull();
        let wanted = &self.devices[device].told;
        assert!(
            process::is_signalled_within(wanted, LONG),
            "not wanted back"
        );
    }

    /// The module learns that somebody else woke a device when it is accessed next. Nothing else is
    /// left to that access.
    fn access_if_woken(&self, number: usize, oracle: &Oracle) {
        if oracle.devices[number].low == LowPower::UntilWakeUp {
            let device = self.devices[number].open();
            device.info().expect("the device's info");
        }
    }

    fn access_set_if_woken(&self, device: usize, oracle: &Oracle) {
        for &member in &self.devices[device].spec.set {
            self.access_if_woken(member, oracle);
        }
    }

    fn open(&self, device: usize) -> Acted {
        let Real {
            function,
            spec,
            told,
            ..
        } = &self.devices[device];
        let group = match self.groups.get(&function.group()) {
            Some(group) => Arc::clone(group),
            None => Group::open(function),
        };
        match group.device(function) {
            Ok(device) => {
                let memory = device.command() & COMMAND_MEMORY != 0;
                if spec.registers {
                    let kind = if spec.slot {
                        InterruptKind::Request
                    } else {
                        InterruptKind::Error
                    };
                    device.trigger(kind, told).expect("a trigger");
                }
                (Outcome::Opened(memory), Made::Device(Box::new(device)))
            }
            Err(errno) => (Outcome::Refused(errno.0), Made::Nothing),
        }
    }

    fn enter_low_power(&self, number: usize, wake_up: bool) -> Acted {
        let device = self.devices[number].open();
        let event = process::eventfd();
        let answer = if wake_up {
            let mut payload = [0; 8];
            payload[..4].copy_from_slice(&event.as_raw_fd().to_ne_bytes());
            device.feature(SET | LOW_POWER_ENTRY_WITH_WAKEUP, &mut payload)
        } else {
            device.feature(SET | LOW_POWER_ENTRY, &mut [])
        };
        match answer {
            Ok(_) => {
                // It is put to sleep a little after the call; an access before that would not wake
                // it.
                wait::until("a device to sleep", || {
                    device.function().runtime_status() == "suspended"
                });
                (Outcome::Done, Made::Event(event))
            }
            Err(errno) => (Outcome::Refused(errno.0), Made::Nothing),
        }
    }

    /// STATUS.
    #[must_use]
    pub fn status(&self, device: usize, buffer: usize) -> Outcome {
        let device = self.devices[device].open();
        match device.status(&self.main.fds[&(buffer as u64)]) {
            Ok(status) => Outcome::Status(seen(&status)),
            Err(errno) => Outcome::Refused(errno.0),
        }
    }

    /// REVOKE by id. The test looks at what it leaves to importers, and then they end it.
    fn revoke_id(
        &self,
        op: &Op,
        number: usize,
        buffer: usize,
        nowait: bool,
        oracle: &Oracle,
    ) -> Answer<()> {
        let (device, id) = (self.devices[number].open(), self.ids[&buffer]);
        let flags = if nowait { REVOKE_NOWAIT } else { 0 };
        let answer = device.revoke_id_raw(id, flags, 0);
        if answer != Err(EINPROGRESS) {
            return answer;
        }
        let left = oracle.told_late_by(op);
        let is_held = |number: &&usize| {
            let attachment = &oracle.attachments[*number];
            attachment.mapped && attachment.hold
        };
        let record = device.find_record(id).expect("a record");
        assert_eq!((record.state, record.flags), (STATE_DEAD, BUFFER_DRAINING));
        assert_eq!(
            record.nr_mappings as usize,
            left.iter().filter(is_held).count()
        );
        self.everything_is_gone(oracle, op, number);
        let changes = self.devices[number].changes.as_ref();
        let changes = changes.filter(|_| oracle.devices[number].armed);
        if let Some(events) = changes {
            events.expect("a dead buffer");
        }
        for number in &left {
            let attachment = &self.attachments[number].0;
            if oracle.attachments[number].fence {
                attachment.signal().expect("a fence");
            }
            if is_held(&number) {
                attachment.unmap().expect("a mapping that is held");
            }
        }
        let is_over = || device.find_record(id).expect("a record").flags == 0;
        match changes {
            Some(events) => {
                events.until("the end of draining", is_over);
                // That both came is known; who looks for the first one finds it.
                events.add();
            }
            None => wait::until("the end of draining", is_over),
        }
        answer
    }

    /// LIST, so many records a call, once what has no user any more has gone.
    #[must_use]
    pub fn list(&self, number: usize, at_a_time: u32, oracle: &Oracle) -> Outcome {
        let device = self.devices[number].open();
        let mut records = Vec::new();
        wait::until("buffers to go", || {
            let all = device.records_by(at_a_time).into_iter();
            records = all.map(|record| self.record(&record)).collect();
            let is_there = |record: &Record| match record.buffer {
                Some(buffer) => oracle.buffers.contains_key(&buffer),
                None => !oracle.bar_mappings(number).is_empty(),
            };
            records.iter().all(is_there)
        });
        Outcome::Listed(records)
    }

    fn record(&self, record: &DmaBufRecord) -> Record {
        let is_internal = record.flags & BUFFER_INTERNAL != 0;
        let known = self.numbers.get(&record.id).copied();
        assert_eq!(record.reserved, 0);
        Record {
            buffer: (!is_internal).then(|| known.unwrap_or(usize::MAX)),
            seen: seen(&DmaBufStatus {
                dmabuf_fd: 0,
                reserved: 0,
                state: record.state,
                reasons: record.reasons,
                memattr: record.memattr,
                region_index: record.region_index,
                size: record.size,
                nr_ranges: record.nr_ranges,
                nr_attachments: record.nr_attachments,
            }),
            draining: record.flags & BUFFER_DRAINING != 0,
            mappings: record.nr_mappings,
            vmas: record.nr_vmas,
            combining: record.nr_wc_vmas,
            writable: record.access == libc::O_RDWR as u32,
        }
    }

    /// Looks whether the eventfds of these devices were signalled by a step.
    ///
    /// # Panics
    ///
    /// When one was not.
    pub fn check_signals(&self, devices: &[usize], op: &Op) {
        for &number in devices {
            let this = &self.devices[number];
            let events = this.changes.as_ref().expect("an eventfd");
            events.expect(&format!("{op:?}, {}", this.spec.name));
        }
    }

    /// Keeps what a step made.
    fn keep(&mut self, op: &Op, made: Made, oracle: &Oracle) {
        let number = oracle.next;
        match (made, op) {
            (Made::Buffer(fd), _) => {
                let id = id_of(&fd);
                self.ids.insert(number, id);
                assert_eq!(self.numbers.insert(id, number), None, "an id came again");
                self.main.fds.insert(number as u64, fd);
            }
            (Made::Changes(events), &Op::Events { device, .. }) => {
                self.devices[device].changes = events;
            }
            (Made::Attachment(attachment), _) => {
                self.attachments.insert(number, (attachment, false));
            }
            (Made::Device(device), &Op::Open { device: number }) => {
                let group = device.group();
                let name = device.function().group();
                self.groups.insert(name, Arc::clone(group));
                self.devices[number].device = Some(*device);
            }
            (Made::Event(event), &Op::EnterLowPower { device, wake_up }) if wake_up => {
                self.devices[device].events.push(event);
            }
            (Made::Alias(index), &Op::Alias { device }) => {
                self.devices[device].alias = Some(index);
            }
            (Made::Nothing, &Op::MapDma { attachment }) => {
                let (attachment, was_mapped) =
                    self.attachments.get_mut(&attachment).expect("attached");
                *was_mapped |= attachment.is_mapped();
            }
            _ => {}
        }
    }

    /// Gives everything up, and looks whether it is gone.
    ///
    /// # Panics
    ///
    /// When it is not.
    pub fn finish(&mut self, oracle: &Oracle) {
        observe::mark("random test: the end");
        for number in oracle.attachments.keys() {
            // An importer that held would be waited for.
            drop(self.attachments.remove(number));
        }
        for (_, child) in std::mem::take(&mut self.children) {
            holder::send(&child.link, &[ask::END]);
            child.join();
        }
        let gone: Vec<_> = (0..self.devices.len())
            .filter(|&device| oracle.devices[device].gone)
            .collect();
        let unproved = Unproved::new();
        self.main = Holder::default();
        for device in &mut self.devices {
            device.device = None;
        }
        self.groups.clear();
        for device in gone {
            self.slot.wait_until_empty();
            self.plug(device);
        }
        drop(unproved);
        for device in &self.devices {
            wait::until("buffers to go", || {
                observe::buffers(&device.function).is_empty()
            });
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if thread::panicking() {
            // Otherwise what is dropped first may wait for what is dropped later.
            for (attachment, _) in self.attachments.values() {
                attachment.hold(false);
            }
            self.attachments.clear();
        }
    }
}

/// The shots of this process.
fn of_main(oracle: &Oracle, shots: &[Shot]) -> Vec<Shot> {
    let all = shots.iter().copied();
    all.filter(|shot| oracle.mappings[&shot.mapping].process == MAIN)
        .collect()
}

/// Says that it is over when a step panics.
struct Off<'a>(&'a AtomicU32);

impl Drop for Off<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.store(fire::OFF, Ordering::SeqCst);
        }
    }
}

fn seen(status: &DmaBufStatus) -> Seen {
    Seen {
        state: match status.state {
            STATE_OK => {
                assert_eq!(status.reasons, 0);
                State::Ok
            }
            STATE_DEAD => {
                assert_eq!(status.reasons, 0);
                State::Dead
            }
            _ => State::Revoked(status.reasons),
        },
        memattr: status.memattr,
        region: status.region_index,
        size: status.size,
        ranges: status.nr_ranges,
        attachments: status.nr_attachments,
    }
}

/// Writes COMMAND, alone or within the first 64 bytes of config space.
fn set_memory(device: &Device, on: bool, long: bool) {
    if !long {
        return device.set_memory(on);
    }
    let mut bytes: [u8; 64] = device.config(0);
    let low = &mut bytes[COMMAND as usize];
    *low &= !(COMMAND_MEMORY as u8);
    if on {
        *low |= COMMAND_MEMORY as u8;
    }
    device.set_config(0, &bytes);
}

/// Bit 15 of Device Control.
pub(super) fn function_reset(device: &Device) {
    let control = device.capability(0x10).expect("PCI Express") + 8;
    let [low, high]: [u8; 2] = device.config(control);
    device.set_config(control, &[low, high | 0x80]);
}

fn export_spoilt(device: &Device, spec: &Spec, spoil: Spoil) -> Answer<OwnedFd> {
    let good = |ranges: &[(u64, u64)]| Request::new(spec.bar, ranges);
    let page = good(&[(0, page_size())]);
    device.request(&match spoil {
        Spoil::Flags => page.flags(1),
        Spoil::OpenFlags => page.open_flags(libc::O_RDWR | libc::O_NONBLOCK),
        Spoil::NoRanges => page.nr_ranges(0),
        Spoil::TooManyRanges => page.nr_ranges(65_537),
        Spoil::EmptyRange => good(&[(0, page_size()), (page_size(), 0)]),
        Spoil::UnalignedOffset => good(&[(8, page_size())]),
        Spoil::UnalignedLength => good(&[(0, page_size() + 8)]),
        Spoil::PastEnd => {
            let (_, length) = device.function().bar(spec.bar);
            good(&[(length - page_size(), 2 * page_size())])
        }
        Spoil::ConfigRegion => Request::new(CONFIG_REGION, &[(0, page_size())]),
        Spoil::NoRegion => Request::new(77, &[(0, page_size())]),
        Spoil::ShortArgument => page.nr_ranges(2),
        Spoil::Msix => {
            let (region, offset) = spec.msix.expect("an MSI-X table");
            Request::new(region, &[(offset, page_size())])
        }
    })
}
