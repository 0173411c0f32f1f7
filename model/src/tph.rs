// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 OR MIT

//! TLP processing hints: what a device completes, and what a buffer asks its importers to send.

/// The kinds of request that a function completes (PCIe Base 6.2, 7.5.3.15: Device Capabilities 2,
/// bits 13:12).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completer {
    /// No TPH; the reserved value counts as that.
    None,
    /// TPH with 8-bit steering tags.
    Tph,
    /// TPH with 8-bit and with extended, 16-bit tags.
    Extended,
}

impl Completer {
    /// Reads it from the register.
    pub fn from_device_capabilities2(register: u32) -> Self {
        match (register >> 12) & 0b11 {
            0b01 => Self::Tph,
            0b11 => Self::Extended,
            _ => Self::None,
        }
    }
}

/// The steering tag is valid.
const ST: u32 = 1 << 0;
/// The extended steering tag is valid.
const ST_EXT: u32 = 1 << 1;
/// Largest processing hint.
const PH_MAX: u8 = 3;

/// The setting that user space asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Which tags are valid.
    pub flags: u32,
    /// 8-bit steering tag.
    pub tag: u8,
    /// 16-bit steering tag.
    pub extended_tag: u16,
    /// Processing hint.
    pub hint: u8,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TphError {
    /// The device does not complete it.
    Unsupported,
    /// Undefined flag, hint over 3, or a tag whose flag is clear.
    Invalid,
}

/// The tags of one buffer. The two namespaces are separate; 0 is a valid tag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tph {
    tag: Option<u8>,
    extended_tag: Option<u16>,
    hint: u8,
}

impl Tph {
    /// No tags.
    pub const NONE: Self = Self {
        tag: None,
        extended_tag: None,
        hint: 0,
    };

    /// The state that `request` asks for, which replaces any other.
    pub fn new(request: Request, completer: Completer) -> Result<Self, TphError> {
        if completer == Completer::None {
            return Err(TphError::Unsupported);
        }
        if request.flags & ST_EXT != 0 && completer != Completer::Extended {
            return Err(TphError::Unsupported);
        }
        let tag = (request.flags & ST != 0).then_some(request.tag);
        let extended_tag = (request.flags & ST_EXT != 0).then_some(request.extended_tag);
        if request.flags & !(ST | ST_EXT) != 0
            || request.hint > PH_MAX
            || (tag.is_none() && request.tag != 0)
            || (extended_tag.is_none() && request.extended_tag != 0)
        {
            return Err(TphError::Invalid);
        }
        Ok(Self {
            tag,
            extended_tag,
            hint: request.hint,
        })
    }

    /// Tag and hint of one namespace; `None` when its tag is not set.
    pub fn get(&self, extended: bool) -> Option<(u16, u8)> {
        let tag = if extended {
            self.extended_tag
        } else {
            self.tag.map(u16::from)
        };
        tag.map(|tag| (tag, self.hint))
    }
}
