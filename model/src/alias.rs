// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! Further region indexes of BARs.

/// Most aliases of one open device.
pub const MAX_ALIASES: usize = 16;

/// The description of an alias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alias {
    /// The BAR that it maps.
    pub bar: u32,
    /// How: mapping flags of the uAPI, not 0.
    pub flags: u32,
}

/// The aliases of one open device. An alias stays until the device is closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Aliases {
    slots: [Option<Alias>; MAX_ALIASES],
}

impl Aliases {
    /// The number of `alias`, the same for the same request; `None` when all are taken.
    pub fn add(&mut self, alias: Alias) -> Option<u32> {
        let known = self.slots.iter().position(|slot| *slot == Some(alias));
        let number = known.or_else(|| self.slots.iter().position(Option::is_none))?;
        *self.slots.get_mut(number)? = Some(alias);
        u32::try_from(number).ok()
    }

    /// The alias with this number.
    pub fn get(&self, number: u32) -> Option<Alias> {
        let number = usize::try_from(number).ok()?;
        self.slots.get(number).copied().flatten()
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.slots = [None; MAX_ALIASES];
    }
}
