//! The device: its memory, its registers, its resets.

use std::fs::File;
use std::io;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::time::{ClockId, clock_gettime};

use crate::config::Config;
use crate::log::{Log, Op, State, What};
use crate::{Options, VECTORS, registers};

/// Index of BAR0 among the regions.
pub(crate) const MEMORY_REGION: u32 = 0;
/// Index of BAR2 among the regions.
pub(crate) const REGISTER_REGION: u32 = 2;
/// Index of config space among the regions.
pub(crate) const CONFIG_REGION: u32 = 7;

/// The device.
#[derive(Debug)]
pub(crate) struct Device {
    config: Config,
    /// BAR0.
    memory: File,
    mark: u32,
    vectors: Vec<Option<File>>,
    pub(crate) log: Log,
    /// How long a reset takes.
    pub(crate) reset_time: Duration,
    /// Resets do not end.
    pub(crate) reset_fails: bool,
    /// All reads give ones, and writes do nothing.
    pub(crate) dead: bool,
    in_reset: Option<Reset>,
}

/// A reset that has begun.
#[derive(Clone, Copy, Debug)]
enum Reset {
    /// Ends at that time.
    Until(u64),
    /// Does not end by itself.
    Forever,
}

impl Device {
    pub(crate) fn new(options: &Options, log: Option<&Path>) -> Result<Self> {
        let memory =
            memfd_create("barlease-device", MemfdFlags::CLOEXEC).context("make a memfd")?;
        let memory = File::from(memory);
        memory
            .set_len(u64::from(options.memory_mib) << 20)
            .context("give the device its memory")?;
        Ok(Self {
            config: Config::new(options),
            memory,
            mark: 0,
            vectors: (0..VECTORS).map(|_| None).collect(),
            log: Log::new(log)?,
            reset_time: Duration::from_millis(options.reset_ms),
            reset_fails: false,
            dead: false,
            in_reset: None,
        })
    }

    /// The fd of BAR0's memory, valid for as long as the device lives.
    pub(crate) fn memory_fd(&self) -> RawFd {
        self.memory.as_raw_fd()
    }

    /// The state now.
    pub(crate) fn state(&mut self) -> State {
        self.notice_end_of_reset();
        State {
            memory: self.config.decodes_memory(),
            power: self.config.power_state(),
            reset: self.in_reset.is_some(),
            dead: self.dead,
        }
    }

    pub(crate) fn mark(&mut self, text: &str) -> u64 {
        let state = self.state();
        let text = text.to_owned();
        self.log.add(now(), What::Mark { text }, state)
    }

    pub(crate) fn set_completer(&mut self, completer: u8) {
        self.config.set_completer(completer);
    }

    /// Ends a reset that would not end.
    pub(crate) fn mend(&mut self) {
        self.reset_fails = false;
        if matches!(self.in_reset, Some(Reset::Forever)) {
            self.in_reset = Some(Reset::Until(now()));
        }
    }

    pub(crate) fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let state = self.state();
        if state.answers(region) {
            self.fetch(region, offset, data)?;
        } else {
            data.fill(0xff);
        }
        self.note(region, offset, data, Op::Read, state);
        Ok(())
    }

    pub(crate) fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let state = self.state();
        self.note(region, offset, data, Op::Write, state);
        if state.answers(region) {
            self.store(region, offset, data)
        } else {
            Ok(())
        }
    }

    fn fetch(&self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match region {
            MEMORY_REGION => self.memory.read_exact_at(data, offset)?,
            CONFIG_REGION => self.config.read(offset, data),
            REGISTER_REGION => {
                let value = match offset {
                    registers::ID => registers::ID_VALUE,
                    registers::MARK => self.mark,
                    _ => 0,
                };
                let value = value.to_le_bytes();
                data.fill(0);
                let length = data.len().min(value.len());
                data[..length].copy_from_slice(&value[..length]);
            }
            _ => data.fill(0xff),
        }
        Ok(())
    }

    fn store(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        match (region, offset) {
            (MEMORY_REGION, _) => self.memory.write_all_at(data, offset)?,
            (CONFIG_REGION, _) => {
                let effect = self.config.write(offset, data);
                if effect.reset {
                    self.begin_reset("function");
                }
            }
            (REGISTER_REGION, registers::MARK) => self.mark = first_bytes(data) as u32,
            (REGISTER_REGION, registers::SIGNAL) => self.signal(first_bytes(data))?,
            _ => {}
        }
        Ok(())
    }

    fn note(&mut self, region: u32, offset: u64, data: &[u8], op: Op, state: State) {
        let what = What::Access {
            region,
            offset,
            size: data.len(),
            op,
            value: first_bytes(data),
        };
        self.log.add(now(), what, state);
    }

    pub(crate) fn begin_reset(&mut self, by: &'static str) {
        let state = self.state();
        let now = now();
        self.log.add(now, What::ResetBegin { by }, state);
        self.config.reset();
        self.mark = 0;
        self.in_reset = Some(if self.reset_fails {
            Reset::Forever
        } else {
            Reset::Until(now + self.reset_time.as_nanos() as u64)
        });
        self.notice_end_of_reset();
    }

    fn notice_end_of_reset(&mut self) {
        match self.in_reset {
            Some(Reset::Until(end)) if end <= now() => {
                self.in_reset = None;
                let state = self.state();
                self.log.add(end, What::ResetEnd, state);
            }
            _ => {}
        }
    }

    fn signal(&mut self, vector: u64) -> io::Result<()> {
        let vector = usize::try_from(vector)
            .ok()
            .and_then(|vector| self.vectors.get_mut(vector));
        match vector {
            Some(Some(eventfd)) => eventfd.write_all(&1_u64.to_ne_bytes()),
            _ => Ok(()),
        }
    }

    /// Sets what signals the vectors from `start` on; what is in excess of `eventfds` is signalled
    /// no more.
    pub(crate) fn set_vectors(&mut self, start: u32, count: u32, eventfds: Vec<File>) {
        let mut eventfds = eventfds.into_iter();
        if count == 0 {
            self.vectors.fill_with(|| None);
            return;
        }
        for vector in self
            .vectors
            .iter_mut()
            .skip(start as usize)
            .take(count as usize)
        {
            *vector = eventfds.next();
        }
    }
}

impl State {
    /// Whether the device answers an access to that region.
    fn answers(self, region: u32) -> bool {
        let there = !self.reset && !self.dead;
        there && (region == CONFIG_REGION || self.memory && self.power == 0)
    }
}

fn first_bytes(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    let length = data.len().min(bytes.len());
    bytes[..length].copy_from_slice(&data[..length]);
    u64::from_le_bytes(bytes)
}

fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::Query;

    fn device(options: &Options) -> Device {
        let mut device = Device::new(options, None).unwrap();
        device.write(CONFIG_REGION, 4, &[2]).unwrap();
        device
    }

    fn read32(device: &mut Device, region: u32, offset: u64) -> u32 {
        let mut data = [0; 4];
        device.read(region, offset, &mut data).unwrap();
        u32::from_le_bytes(data)
    }

    #[test]
    fn memory_keeps_what_is_written() {
        let mut device = device(&Options::default());
        device.write(0, 0x00ff_fffc, &[1, 2, 3, 4]).unwrap();
        assert_eq!(read32(&mut device, 0, 0x00ff_fffc), 0x0403_0201);
        assert!(device.write(0, 0x0100_0000, &[]).is_ok());
        let mut data = [0; 4];
        assert!(device.read(0, 0x0100_0000, &mut data).is_err());
    }

    #[test]
    fn nothing_is_written_while_decoding_is_off_or_in_d3hot() {
        let mut device = device(&Options::default());
        device.write(0, 0, &[7]).unwrap();
        for (at, off, on) in [(4, 0, 2), (0x44, 3, 0)] {
            device.write(CONFIG_REGION, at, &[off]).unwrap();
            device.write(0, 0, &[9]).unwrap();
            assert_eq!(read32(&mut device, 0, 0), u32::MAX);
            assert_eq!(read32(&mut device, CONFIG_REGION, 0), 0xba5e_1234);
            device.write(CONFIG_REGION, at, &[on]).unwrap();
            assert_eq!(read32(&mut device, 0, 0), 7);
        }
    }

    #[test]
    fn what_does_not_take_is_in_the_log_all_the_same() {
        let mut device = device(&Options::default());
        device.write(CONFIG_REGION, 0x44, &[3]).unwrap();
        device.write(0, 8, &[9, 0, 0, 0]).unwrap();
        let query = Query {
            region: Some(0),
            power: Some(3),
            ..Query::default()
        };
        let (count, entries) = device.log.query(&query);
        assert_eq!(count, 1);
        assert!(entries[0].state.memory);
    }

    #[test]
    fn a_reset_takes_its_time() {
        let mut device = device(&Options {
            reset_ms: 40,
            ..Options::default()
        });
        device.write(0, 0, &[5]).unwrap();
        device
            .write(CONFIG_REGION, 0x58, &0x8000_u16.to_le_bytes())
            .unwrap();
        assert!(device.state().reset);
        assert_eq!(read32(&mut device, CONFIG_REGION, 0), u32::MAX);
        device.write(CONFIG_REGION, 4, &[2]).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert!(!device.state().reset);
        // A write during the reset is lost.
        assert!(!device.state().memory);
        device.write(CONFIG_REGION, 4, &[2]).unwrap();
        assert_eq!(read32(&mut device, 0, 0), 5);
        let ends = |kind: &str| {
            let query = Query {
                kind: Some(kind.to_owned()),
                ..Query::default()
            };
            device.log.query(&query).1[0].clone()
        };
        let (begin, end) = (ends("reset_begin"), ends("reset_end"));
        assert_eq!(begin.what, What::ResetBegin { by: "function" });
        assert_eq!(end.ns - begin.ns, 40_000_000);
    }

    #[test]
    fn a_failing_reset_ends_when_it_is_mended() {
        let mut device = device(&Options::default());
        device.reset_fails = true;
        device.begin_reset("bus");
        assert!(device.state().reset);
        device.mend();
        assert!(!device.state().reset);
        device.begin_reset("bus");
        assert!(!device.state().reset);
    }

    #[test]
    fn a_dead_device_answers_ones() {
        let mut device = device(&Options::default());
        device.dead = true;
        for region in [0, 2, CONFIG_REGION] {
            assert_eq!(read32(&mut device, region, 0), u32::MAX);
        }
        device.write(CONFIG_REGION, 4, &[0]).unwrap();
        device.dead = false;
        assert!(device.state().memory);
    }

    #[test]
    fn registers_identify_and_mark() {
        let mut device = device(&Options::default());
        assert_eq!(read32(&mut device, 2, registers::ID), registers::ID_VALUE);
        device
            .write(2, registers::MARK, &17_u32.to_le_bytes())
            .unwrap();
        assert_eq!(read32(&mut device, 2, registers::MARK), 17);
        // Nobody listens: no error.
        device
            .write(2, registers::SIGNAL, &1_u32.to_le_bytes())
            .unwrap();
        device
            .write(2, registers::SIGNAL, &99_u32.to_le_bytes())
            .unwrap();
    }
}
