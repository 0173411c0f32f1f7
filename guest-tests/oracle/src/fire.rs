//! The results that touches may have while a step is being made.

use crate::{Op, Oracle, PAGE, Protection, Severity, Target};

/// A touch that is tried again and again while a step is being made, and for a while after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shot {
    /// The mapping.
    pub mapping: usize,
    /// Offset of the word in it.
    pub at: u64,
    /// While the step is being made.
    pub during: During,
    /// Whether it works from the moment on at which the step is done.
    pub after: bool,
    /// The value that must be read if it works, if that is known.
    pub word: Option<u32>,
}

/// The results that a touch may have while a step is being made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum During {
    /// It works, or gives SIGBUS.
    Either,
    /// It works.
    Works,
    /// It gives SIGBUS.
    Sigbus,
}

/// Most shots of a step.
const MOST: usize = 16;

impl Oracle {
    /// Touches of all processes' mappings for `op`, which must leave what is mapped where, and
    /// words, as they are. `pick` gives a number below its argument.
    pub fn shots(&self, op: &Op, mut pick: impl FnMut(u64) -> u64) -> Vec<Shot> {
        let mut after = self.clone();
        // Its outcome is of no interest here.
        let _ = after.step(op, &self.predict(op));
        let mut mappings: Vec<_> = self.mappings.keys().copied().collect();
        let mut shots = Vec::new();
        while !mappings.is_empty() && shots.len() < MOST {
            let mapping = mappings.swap_remove(pick(mappings.len() as u64) as usize);
            let pages = self.mappings[&mapping].pages.iter().enumerate();
            let can_load = |page: &Option<Protection>| {
                matches!(page, Some(Protection::Read | Protection::ReadWrite))
            };
            let pages: Vec<_> = pages.filter(|(_, page)| can_load(page)).collect();
            if pages.is_empty() {
                continue;
            }
            let (page, _) = pages[pick(pages.len() as u64) as usize];
            let at = page as u64 * PAGE;
            let works = after.is_accessible(mapping);
            let during = match (self.is_accessible(mapping), works) {
                _ if self.is_disturbed(mapping, op) => During::Either,
                (true, true) => During::Works,
                (false, false) => During::Sigbus,
                _ => During::Either,
            };
            let word = match *op {
                // Until the kernel notices that it is not there, all ones are read.
                Op::Pull { device } | Op::PullInStorm { device, .. }
                    if device == self.device_of(mapping) =>
                {
                    None
                }
                _ => self.word(mapping, at),
            };
            shots.push(Shot {
                mapping,
                at,
                during,
                after: works,
                word,
            });
        }
        shots
    }

    /// Whether `op` may take a mapping away or give it back for a moment.
    fn is_disturbed(&self, mapping: usize, op: &Op) -> bool {
        if let Op::Revoke { buffer, .. } | Op::RevokeId { buffer, .. } = *op {
            return self.mappings[&mapping].target == Target::Buffer(buffer);
        }
        let device = self.device_of(mapping);
        match *op {
            Op::Memory { device: of, .. }
            | Op::Master { device: of, .. }
            | Op::Power { device: of, .. }
            | Op::EnterLowPower { device: of, .. }
            | Op::Reset { device: of }
            | Op::SysfsReset { device: of }
            | Op::FunctionReset { device: of }
            | Op::Pull { device: of }
            | Op::PullInStorm { device: of, .. }
            | Op::Close { device: of } => of == device,
            Op::HotReset { device: of }
            | Op::BusReset { device: of }
            | Op::Error {
                device: of,
                severity: Severity::NonFatal,
            } => self.devices[of].spec.set.contains(&device),
            Op::Sleep | Op::Storm { .. } => true,
            _ => false,
        }
    }
}
