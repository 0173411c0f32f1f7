// SPDX-License-Identifier: GPL-2.0

//! The state of a function from its bind to its unbind.

use crate::{
    buffer::Buffer,
    debugfs::BuffersFile,
    leases::Leases,
    model::{alias::Aliases, config, tph::Completer},
    msix::{self, Protected},
    sys::{
        delayed::Delayed,
        flag::{Flag, peek},
        p2p::Providers,
        params,
        vfio_pci::{Device, Function},
    },
};
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        Arc, Mutex,
        atomic::{Atomic, Relaxed},
    },
};

/// A bound function.
#[pin_data]
pub(crate) struct Barlease {
    leases: Arc<Leases<Buffer>>,
    completer: Completer,
    #[pin]
    aliases: Mutex<Aliases>,
    /// These four hold since the device was opened: the protected parts of its BARs, whether the
    /// kernel's own exporter answers feature 11, and whether somebody has asked about aliases.
    #[pin]
    protected: Mutex<Protected>,
    /// [`Protected::bars`]: an export of another one does without the lock.
    protected_bars: Atomic<u32>,
    stock_dma_buf: Flag,
    knows_aliases: Flag,
    /// Likewise: which writes to config space are looked at closer ([`config::nearby`]), all of them
    /// and those that may cover a power state.
    sensitive: Atomic<u64>,
    power_states: Atomic<u64>,
    /// Warns of what drains with nobody waiting for it.
    #[pin]
    left_draining: Delayed<Leases<Buffer>>,
    _buffers_file: Pin<KBox<BuffersFile>>,
}

impl Barlease {
    /// A function that is being bound, and is not open.
    pub(crate) fn new(function: &Function<'_>, providers: Arc<Providers>) -> Result<Arc<Self>> {
        let leases = Leases::new(function.name(), providers)?;
        let buffers_file = BuffersFile::new(&leases)?;
        Arc::pin_init(
            try_pin_init!(Self {
                left_draining <- Delayed::new(leases.clone()),
                leases,
                completer: Completer::from_device_capabilities2(function.device_capabilities2()),
                aliases <- new_mutex!(Aliases::default(), "barlease::aliases"),
                protected <- new_mutex!(Protected::nothing(), "barlease::protected"),
                protected_bars: Atomic::new(u32::MAX),
                stock_dma_buf: Flag::new(),
                knows_aliases: Flag::new(),
                sensitive: Atomic::new(u64::MAX),
                power_states: Atomic::new(u64::MAX),
                _buffers_file: buffers_file,
            }),
            GFP_KERNEL,
        )
    }

    /// It was opened: what holds for this open is found out, but for the state of its memory.
    pub(crate) fn opened(&self, device: &Device<'_, Self>) {
        self.aliases.lock().clear();
        let protected = Protected::of(&device.function());
        self.protected_bars.store(protected.bars(), Relaxed);
        *self.protected.lock() = protected;
        let map = device.config_map();
        let power_states = config::nearby(|pos, len| config::covers_power_state(map, pos, len));
        let command = config::nearby(config::covers_command);
        self.power_states.store(power_states, Relaxed);
        self.sensitive.store(power_states | command, Relaxed);
        self.stock_dma_buf.set(params::stock_dma_buf());
        self.knows_aliases.set(false);
    }

    /// Its leases.
    pub(crate) fn leases(&self) -> &Arc<Leases<Buffer>> {
        &self.leases
    }

    /// Further region indexes of its BARs.
    pub(crate) fn aliases(&self) -> &Mutex<Aliases> {
        &self.aliases
    }

    /// The parts of `bar` that it does not lease, as read when it was opened; `None` where there are
    /// none.
    #[inline]
    pub(crate) fn protected(&self, bar: u32) -> Option<Protected> {
        if peek(&self.protected_bars) & msix::bit(bar) == 0 {
            return None;
        }
        self.refused()
    }

    #[cold]
    fn refused(&self) -> Option<Protected> {
        Some(*self.protected.lock()).filter(Protected::is_refused)
    }

    /// Whether somebody has asked about aliases since it was opened. The word is set by the first
    /// question.
    pub(crate) fn knows_aliases(&self) -> &Flag {
        &self.knows_aliases
    }

    /// Whether a write to config space has to be looked at closer.
    #[inline]
    pub(crate) fn may_take_away(&self, pos: u64, len: u64) -> bool {
        config::may_cover(peek(&self.sensitive), pos, len)
    }

    /// Whether a write to config space has to be looked at for power states.
    #[inline]
    pub(crate) fn may_set_power(&self, pos: u64, len: u64) -> bool {
        config::may_cover(peek(&self.power_states), pos, len)
    }

    /// Whether the kernel's own exporter answers feature 11, since it was opened.
    pub(crate) fn stock_dma_buf(&self) -> bool {
        self.stock_dma_buf.get()
    }

    /// The steering tags that it says it takes.
    pub(crate) fn completer(&self) -> Completer {
        self.completer
    }

    /// The work that warns of buffers that drain with nobody waiting for it.
    pub(crate) fn left_draining(&self) -> &Delayed<Leases<Buffer>> {
        &self.left_draining
    }
}
