// SPDX-License-Identifier: GPL-2.0

//! `/sys/kernel/debug/barlease/<BDF>/buffers`: a header line, then a line a buffer.
//!
//! Columns are separated by white space and named by the header. White space and control characters
//! in a name, which a user can set, are shown as `\xNN`. The name of an internal buffer, a mapping
//! of a BAR through the device fd, ends with `[mmap]`; brackets in a name are escaped, too.
//! `(busy)` is a name that is being looked at by somebody else. `memattr` is what the next mapping
//! gets; of the `mmaps` that there are, `wc_mmaps` are write-combining and the others uncached.

use crate::{abi, buffer::Buffer, leases::Leases, sys::debugfs_root};
use kernel::{
    debugfs::{Dir, File, Writer},
    fmt,
    prelude::*,
    sync::Arc,
};

/// The file of one bound function; removed when dropped.
#[pin_data]
pub(crate) struct BuffersFile {
    #[pin]
    _file: File<Lines>,
    _dir: Dir,
}

impl BuffersFile {
    /// Makes the directory of the function and the file in it. Without debugfs it is not there, and
    /// that is no error.
    pub(crate) fn new(leases: &Arc<Leases<Buffer>>) -> Result<Pin<KBox<Self>>> {
        let dir = debugfs_root::subdir(leases.bdf()).ok_or(ENODEV)?;
        let lines = Lines(leases.clone());
        KBox::pin_init(
            try_pin_init!(Self {
                _file <- dir.read_only_file(c"buffers", lines),
                _dir: dir.clone(),
            }),
            GFP_KERNEL,
        )
    }
}

struct Lines(Arc<Leases<Buffer>>);

impl Writer for Lines {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "name bar ranges size memattr state reasons attachments mmaps wc_mmaps"
        )?;
        let mut result = Ok(());
        let all = |_: &Buffer| true;
        self.0.for_each(all, |buffer| {
            if result.is_ok() {
                result = line(buffer, f);
            }
        });
        result
    }
}

fn line(buffer: &Buffer, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let status = buffer.status();
    write_name(buffer, f)?;
    let state = match status.state {
        abi::STATE_OK => "OK",
        abi::STATE_REVOKED => "REVOKED",
        _ => "DEAD",
    };
    let memattr = match status.memattr {
        abi::MEMATTR_WC => "WC",
        _ => "NC",
    };
    writeln!(
        f,
        " {} {} {:#x} {memattr} {state} {:#x} {} {} {}",
        status.region_index,
        status.nr_ranges,
        status.size,
        status.reasons,
        status.nr_attachments,
        buffer.vmas(),
        buffer.wc_vmas()
    )
}

fn write_name(buffer: &Buffer, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let Some(name) = buffer.name() else {
        return f.write_str("(busy)");
    };
    let mut shown = false;
    for &byte in name.iter().take_while(|&&byte| byte != 0) {
        if byte.is_ascii_graphic() && !matches!(byte, b'[' | b']' | b'\\') {
            write!(f, "{}", byte as char)?;
        } else {
            write!(f, "\\x{byte:02x}")?;
        }
        shown = true;
    }
    if !shown {
        f.write_str("-")?;
    }
    if buffer.is_internal() {
        f.write_str("[mmap]")?;
    }
    Ok(())
}
