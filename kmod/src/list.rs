// SPDX-License-Identifier: GPL-2.0

//! `BARLEASE_FEATURE_DMA_BUF_LIST`: tells the owner of the device of its buffers.

use crate::{
    abi,
    bound::Barlease,
    buffer::Buffer,
    features::check_feature,
    leases::BATCH,
    sys::{
        payload::{PayloadWriter, UserPayload},
        vfio_pci::{Device, FEATURE_GET},
    },
};
use core::mem::size_of;
use kernel::{prelude::*, sync::Arc};

const RECORD: usize = size_of::<abi::DmaBufRecord>();

/// Copies records of the buffers of this open with an id greater than the one asked for.
///
/// Buffers are looked up a few at a time, and nothing is locked while a record of them is made and
/// copied.
pub(crate) fn list(device: &Device<'_, Barlease>, flags: u32, payload: UserPayload) -> Result<i32> {
    if !check_feature(flags, &payload, FEATURE_GET, size_of::<abi::DmaBufList>())? {
        return Ok(0);
    }
    let request: abi::DmaBufList = payload.reader().read()?;
    let stride = request.record_size as usize;
    let room = payload.len() - size_of::<abi::DmaBufList>();
    let asked = u64::from(request.nr_records) * u64::from(request.record_size);
    if stride < RECORD || (room as u64) < asked {
        return Err(EINVAL);
    }

    let leases = device.driver().leases();
    let latest = leases.latest_epoch();
    let mut wanted = |buffer: &Buffer| buffer.is_of_epoch(latest);
    let mut records = payload.writer_from(size_of::<abi::DmaBufList>());
    let most = request.nr_records.min(abi::MAX_RECORDS);
    let mut copied = 0;
    let mut after = request.after;
    let mut next = after.checked_add(1);
    let more = 'walk: loop {
        let Some(from) = next else { break false };
        let mut batch = [const { None::<Arc<Buffer>> }; BATCH];
        next = leases.look_up(from, &mut wanted, &mut batch);
        for place in &mut batch {
            let Some(buffer) = place.take() else { break };
            if copied == most {
                break 'walk true;
            }
            write(&mut records, &buffer.record(), stride)?;
            copied += 1;
            after = buffer.id();
        }
    };
    payload.write(&abi::DmaBufList {
        // An id is never 0, so this is not the end, even where nothing was copied.
        after: if more { after.max(1) } else { 0 },
        nr_records: copied,
        record_size: RECORD as u32,
    })?;
    Ok(0)
}

/// A record, filled up with zeroes to `stride` bytes.
fn write(records: &mut PayloadWriter, record: &abi::DmaBufRecord, stride: usize) -> Result {
    records.write(record)?;
    records.fill(stride - RECORD)
}
