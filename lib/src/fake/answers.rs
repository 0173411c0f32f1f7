//! The answers of a fake device: its state, and what each ioctl does with it.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

use barlease_abi as abi;
use rustix::fs::OFlags;
use rustix::io::Errno;
use vfio_bindings::bindings::vfio;

use super::ALIASES;
use super::Answer;
use super::Argument;
use super::CONFIG;
use super::CONFIG_SIZE;
use super::SHIFT;
use super::duplicate;
use super::key;
use super::lock;
use super::memfd;
use crate::BarRange;
use crate::Bdf;
use crate::Result;

#[derive(Debug)]
pub(super) struct Fake {
    pub(super) bdf: Bdf,
    pub(super) bars: [u64; 6],
    /// By interrupt index.
    pub(super) vectors: [u32; 5],
    pub(super) memory: OwnedFd,
    pub(super) state: Mutex<State>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// By interrupt index and vector.
    pub(super) events: BTreeMap<(u32, u32), OwnedFd>,
    /// By id.
    pub(super) buffers: BTreeMap<u64, Buffer>,
    pub(super) changes: Option<OwnedFd>,
    pub(super) reasons: u32,
    /// BARs that have an alias, and whether somebody has asked about aliases.
    pub(super) aliases: [bool; 6],
    pub(super) asked: bool,
    /// Page tables that it is attached to, by address space; `None` is that of the device.
    pub(super) page_tables: BTreeMap<Option<u32>, u32>,
    pub(super) resets: u32,
    pub(super) ioctls: u32,
    pub(super) repeat: bool,
}

impl State {
    /// Signals the eventfd for changes.
    pub(super) fn tell(&self) {
        if let Some(event) = &self.changes {
            let _ = crate::event::signal(event.as_fd());
        }
    }
}

#[derive(Debug)]
pub(super) struct Buffer {
    pub(super) fd: OwnedFd,
    pub(super) bar: u32,
    pub(super) ranges: u32,
    pub(super) places: Vec<BarRange>,
    pub(super) size: u64,
    pub(super) access: u32,
    pub(super) memattr: u32,
    pub(super) dead: bool,
    pub(super) importers: u32,
    /// Its bytes, while its memory is taken.
    pub(super) saved: Option<Vec<u8>>,
}

impl Buffer {
    pub(super) fn take(&mut self) {
        if self.saved.is_some() {
            return;
        }
        let mut bytes = vec![0; usize::try_from(self.size).unwrap_or(0)];
        let _ = rustix::io::pread(&self.fd, &mut bytes, 0);
        let _ = rustix::fs::ftruncate(&self.fd, 0);
        self.saved = Some(bytes);
    }

    pub(super) fn give(&mut self) {
        if let Some(bytes) = self.saved.take() {
            let _ = rustix::fs::ftruncate(&self.fd, self.size);
            let _ = rustix::io::pwrite(&self.fd, &bytes, 0);
        }
    }

    pub(super) fn revoke(&mut self) -> Result<(), Errno> {
        if self.dead {
            return Err(Errno::BADFD);
        }
        self.take();
        self.dead = true;
        Ok(())
    }

    fn state(&self) -> u32 {
        match (self.dead, &self.saved) {
            (true, _) => abi::STATE_DEAD,
            (false, Some(_)) => abi::STATE_REVOKED,
            (false, None) => abi::STATE_OK,
        }
    }
}

impl Fake {
    /// As an iommufd would number it.
    pub(super) fn iommufd_id(&self) -> u32 {
        0x100 + u32::from(self.bdf.device())
    }

    pub(super) fn ioctl(&self, number: u8, bytes: &mut [u8]) -> Result<Answer, Errno> {
        let mut state = lock(&self.state);
        state.ioctls += 1;
        let mut argument = Argument(bytes);
        // Numbers of linux/vfio.h, less 100.
        let number = match number.wrapping_sub(vfio::VFIO_BASE as u8) {
            7 => self.info(&mut argument),
            8 => self.region(&state, &mut argument),
            9 => self.irq_info(&mut argument),
            10 => self.set_irqs(&mut state, &argument),
            11 => {
                state.resets += 1;
                Ok(0)
            }
            17 => return self.feature(&mut state, &mut argument),
            // Of a character device.
            18 => {
                let at = offset_of!(vfio::vfio_device_bind_iommufd, out_devid);
                argument.put_u32(at, self.iommufd_id());
                Ok(0)
            }
            19 => attach(&mut state, &argument),
            20 => detach(&mut state, &argument),
            _ => Err(Errno::NOTTY),
        };
        number.map(Answer::Number)
    }

    fn info(&self, argument: &mut Argument<'_>) -> Result<i32, Errno> {
        let flags = vfio::VFIO_DEVICE_FLAGS_PCI | vfio::VFIO_DEVICE_FLAGS_RESET;
        argument.put_u32(offset_of!(vfio::vfio_device_info, flags), flags);
        argument.put_u32(
            offset_of!(vfio::vfio_device_info, num_regions),
            vfio::VFIO_PCI_NUM_REGIONS,
        );
        argument.put_u32(
            offset_of!(vfio::vfio_device_info, num_irqs),
            vfio::VFIO_PCI_NUM_IRQS,
        );
        Ok(0)
    }

    /// Size of a region, and the BAR that it is an alias of.
    fn size_of(&self, state: &State, index: u32) -> Option<(u64, Option<u32>)> {
        let bar = |index: u32| self.bars.get(index as usize).copied();
        match index {
            CONFIG => Some((CONFIG_SIZE, None)),
            0..ALIASES => Some((bar(index).unwrap_or(0), None)),
            _ => {
                let of = index - ALIASES;
                let there = state.aliases.get(of as usize).copied().unwrap_or(false);
                there.then(|| (bar(of).unwrap_or(0), Some(of)))
            }
        }
    }

    fn region(&self, state: &State, argument: &mut Argument<'_>) -> Result<i32, Errno> {
        type Info = vfio::vfio_region_info;
        const CAPABILITY: usize = 8 + size_of::<abi::RegionCapAlias>();
        let index = argument.u32(offset_of!(Info, index));
        let (size, alias_of) = self.size_of(state, index).ok_or(Errno::INVAL)?;
        let mut flags = vfio::VFIO_REGION_INFO_FLAG_READ | vfio::VFIO_REGION_INFO_FLAG_WRITE;
        let is_bar = size > 0 && index != CONFIG;
        if is_bar {
            flags |= vfio::VFIO_REGION_INFO_FLAG_MMAP;
        }
        let capability = match alias_of {
            Some(bar) => Some((abi::REGION_CAP_ALIAS, bar, abi::ALIAS_WC)),
            None if is_bar && state.asked => Some((abi::REGION_CAP_ALIASABLE, abi::ALIAS_WC, 0)),
            None => None,
        };
        argument.put_u64(offset_of!(Info, size), size);
        argument.put_u64(offset_of!(Info, offset), u64::from(index) << SHIFT);
        let begin = size_of::<Info>();
        if let Some((id, first, second)) = capability {
            flags |= vfio::VFIO_REGION_INFO_FLAG_CAPS;
            let room = argument.u32(0) as usize >= begin + CAPABILITY;
            argument.put_u32(0, (begin + CAPABILITY) as u32);
            let at = if room { begin } else { 0 };
            argument.put_u32(offset_of!(Info, cap_offset), at as u32);
            if room {
                argument.put(at, &id.to_ne_bytes());
                argument.put(at + 2, &abi::REGION_CAP_VERSION.to_ne_bytes());
                argument.put_u32(at + 4, 0);
                argument.put_u32(at + 8, first);
                argument.put_u32(at + 12, second);
            }
        }
        argument.put_u32(offset_of!(Info, flags), flags);
        Ok(0)
    }

    fn irq_info(&self, argument: &mut Argument<'_>) -> Result<i32, Errno> {
        type Info = vfio::vfio_irq_info;
        let index = argument.u32(offset_of!(Info, index));
        let count = self.vectors.get(index as usize).ok_or(Errno::INVAL)?;
        let flags = match index {
            vfio::VFIO_PCI_INTX_IRQ_INDEX => {
                vfio::VFIO_IRQ_INFO_MASKABLE | vfio::VFIO_IRQ_INFO_AUTOMASKED
            }
            vfio::VFIO_PCI_MSIX_IRQ_INDEX => 0,
            _ => vfio::VFIO_IRQ_INFO_NORESIZE,
        };
        argument.put_u32(offset_of!(Info, flags), flags | vfio::VFIO_IRQ_INFO_EVENTFD);
        argument.put_u32(offset_of!(Info, count), *count);
        Ok(0)
    }

    fn set_irqs(&self, state: &mut State, argument: &Argument<'_>) -> Result<i32, Errno> {
        type Set = vfio::vfio_irq_set;
        let flags = argument.u32(offset_of!(Set, flags));
        let index = argument.u32(offset_of!(Set, index));
        let start = argument.u32(offset_of!(Set, start));
        let count = argument.u32(offset_of!(Set, count));
        let has = *self.vectors.get(index as usize).ok_or(Errno::INVAL)?;
        let end = start.checked_add(count).filter(|end| *end <= has);
        let end = end.ok_or(Errno::INVAL)?;
        let trigger = flags & vfio::VFIO_IRQ_SET_ACTION_TRIGGER != 0;
        if !trigger && index != vfio::VFIO_PCI_INTX_IRQ_INDEX {
            return Err(Errno::NOTTY);
        }
        let data = flags & vfio::VFIO_IRQ_SET_DATA_EVENTFD != 0;
        if !trigger {
            // Masks and resamplers of an interrupt that nothing here raises by itself.
            return match state.events.contains_key(&(index, start)) {
                true => Ok(0),
                false => Err(Errno::INVAL),
            };
        }
        if !data && count == 0 {
            state.events.retain(|(its, _), _| *its != index);
            return Ok(0);
        }
        for vector in start..end {
            let key = (index, vector);
            if !data {
                let event = state.events.get(&key).ok_or(Errno::INVAL)?;
                crate::event::signal(event.as_fd())?;
                continue;
            }
            let at = offset_of!(Set, data) + (vector - start) as usize * 4;
            match argument.i32(at) {
                -1 => drop(state.events.remove(&key)),
                fd => drop(state.events.insert(key, duplicate(fd)?)),
            }
        }
        Ok(0)
    }

    fn feature(&self, state: &mut State, argument: &mut Argument<'_>) -> Result<Answer, Errno> {
        let flags = argument.u32(4);
        let index = (flags & vfio::VFIO_DEVICE_FEATURE_MASK) as u16;
        let operation = match index {
            abi::FEATURE_DMA_BUF
            | abi::FEATURE_DMA_BUF_STOCK
            | abi::FEATURE_ALIAS_REGION
            | abi::FEATURE_DMA_BUF_STATUS
            | abi::FEATURE_DMA_BUF_LIST => vfio::VFIO_DEVICE_FEATURE_GET,
            abi::FEATURE_DMA_BUF_REVOKE
            | abi::FEATURE_DMA_BUF_MEMATTR
            | abi::FEATURE_DMA_BUF_TPH
            | abi::FEATURE_DMA_BUF_REVOKE_ID
            | abi::FEATURE_EVENTS => vfio::VFIO_DEVICE_FEATURE_SET,
            _ => return Err(Errno::NOTTY),
        };
        if index == abi::FEATURE_ALIAS_REGION {
            state.asked = true;
        }
        if flags & operation == 0 {
            return Err(Errno::INVAL);
        }
        if flags & vfio::VFIO_DEVICE_FEATURE_PROBE != 0 {
            return Ok(Answer::Number(0));
        }
        // Behind the header.
        let mut payload = Argument(argument.0.get_mut(8..).unwrap_or(&mut []));
        let number = match index {
            abi::FEATURE_DMA_BUF | abi::FEATURE_DMA_BUF_STOCK => {
                return self.export(state, &payload).map(Answer::File);
            }
            abi::FEATURE_ALIAS_REGION => self.alias(state, &mut payload),
            abi::FEATURE_DMA_BUF_STATUS => {
                let reasons = state.reasons;
                let buffer = named(state, &payload)?;
                status(buffer, reasons, &mut payload);
                Ok(0)
            }
            abi::FEATURE_DMA_BUF_LIST => list(state, &mut payload),
            abi::FEATURE_DMA_BUF_REVOKE => {
                named(state, &payload)?.revoke()?;
                state.tell();
                Ok(0)
            }
            abi::FEATURE_DMA_BUF_REVOKE_ID => revoke_id(state, &payload),
            abi::FEATURE_DMA_BUF_MEMATTR => {
                let memattr = payload.u32(offset_of!(abi::DmaBufMemattr, memattr));
                if memattr > abi::MEMATTR_WC {
                    return Err(Errno::NOENT);
                }
                let buffer = named(state, &payload)?;
                if buffer.dead {
                    return Err(Errno::NODEV);
                }
                buffer.memattr = memattr;
                Ok(0)
            }
            abi::FEATURE_DMA_BUF_TPH => {
                if payload.0.get(11).is_some_and(|hint| *hint > 3) {
                    return Err(Errno::INVAL);
                }
                named(state, &payload).map(|_| 0)
            }
            _ => set_changes(state, &payload),
        };
        number.map(Answer::Number)
    }

    fn export(&self, state: &mut State, payload: &Argument<'_>) -> Result<OwnedFd, Errno> {
        type Get = abi::DmaBufGet;
        let bar = payload.u32(offset_of!(Get, region_index));
        let flags = payload.u32(offset_of!(Get, open_flags));
        let count = payload.u32(offset_of!(Get, nr_ranges));
        let size = match self.bars.get(bar as usize) {
            Some(size) if *size >= 4096 => *size,
            _ => return Err(Errno::NODEV),
        };
        if count > abi::MAX_RANGES {
            return Err(Errno::TOOBIG);
        }
        let mut contents = Vec::new();
        let mut places = Vec::new();
        for n in 0..count as usize {
            let at = size_of::<Get>() + n * size_of::<abi::DmaRange>();
            let offset = payload.u64(at + offset_of!(abi::DmaRange, offset));
            let length = payload.u64(at + offset_of!(abi::DmaRange, length));
            let end = offset.checked_add(length).filter(|end| *end <= size);
            if length == 0 || (offset | length) % 4096 != 0 || end.is_none() {
                return Err(Errno::INVAL);
            }
            let mut bytes = vec![0; usize::try_from(length).map_err(|_| Errno::NOMEM)?];
            rustix::io::pread(&self.memory, &mut bytes, (u64::from(bar) << SHIFT) + offset)?;
            contents.extend(bytes);
            places.push(BarRange { offset, length });
        }
        if contents.is_empty() {
            return Err(Errno::INVAL);
        }
        let length = contents.len() as u64;
        let fd = memfd("barlease-fake-lease", length)?;
        rustix::io::pwrite(&fd, &contents, 0)?;
        let access = flags & OFlags::RWMODE.bits();
        let given = if access == OFlags::RDONLY.bits() {
            // Another open file of the same inode.
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
            rustix::fs::open(
                path,
                OFlags::RDONLY | OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            )?
        } else {
            rustix::io::fcntl_dupfd_cloexec(&fd, 3)?
        };
        let (_, id) = key(fd.as_fd()).ok_or(Errno::BADF)?;
        let mut buffer = Buffer {
            fd,
            bar,
            ranges: count,
            places,
            size: length,
            access,
            memattr: abi::MEMATTR_NC,
            dead: false,
            importers: 0,
            saved: None,
        };
        if state.reasons != 0 {
            buffer.take();
        }
        state.buffers.insert(id, buffer);
        Ok(given)
    }

    fn alias(&self, state: &mut State, payload: &mut Argument<'_>) -> Result<i32, Errno> {
        type Alias = abi::AliasRegion;
        let bar = payload.u32(offset_of!(Alias, region_index));
        if bar >= ALIASES || payload.u32(offset_of!(Alias, mapping_flags)) != abi::ALIAS_WC {
            return Err(Errno::INVAL);
        }
        let size = self.bars.get(bar as usize).copied().unwrap_or(0);
        let alias = state.aliases.get_mut(bar as usize);
        match alias {
            Some(alias) if size >= 4096 => *alias = true,
            _ => return Err(Errno::NODEV),
        }
        payload.put_u32(offset_of!(Alias, alias_index), ALIASES + bar);
        Ok(0)
    }
}

/// The address space that an argument is about.
fn pasid(flags: u32, number: u32) -> Option<u32> {
    (flags & vfio::VFIO_DEVICE_ATTACH_PASID != 0).then_some(number)
}

fn attach(state: &mut State, argument: &Argument<'_>) -> Result<i32, Errno> {
    type Attach = vfio::vfio_device_attach_iommufd_pt;
    let page_table = argument.u32(offset_of!(Attach, pt_id));
    if page_table == 0 {
        return Err(Errno::NOENT);
    }
    let flags = argument.u32(offset_of!(Attach, flags));
    let space = pasid(flags, argument.u32(offset_of!(Attach, pasid)));
    state.page_tables.insert(space, page_table);
    Ok(0)
}

fn detach(state: &mut State, argument: &Argument<'_>) -> Result<i32, Errno> {
    type Detach = vfio::vfio_device_detach_iommufd_pt;
    let flags = argument.u32(offset_of!(Detach, flags));
    let space = pasid(flags, argument.u32(offset_of!(Detach, pasid)));
    state
        .page_tables
        .remove(&space)
        .map(|_| 0)
        .ok_or(Errno::INVAL)
}

/// The buffer that a payload names by its descriptor, which is in its first field.
fn named<'a>(state: &'a mut State, payload: &Argument<'_>) -> Result<&'a mut Buffer, Errno> {
    let fd = duplicate(payload.i32(0))?;
    let (_, id) = key(fd.as_fd()).ok_or(Errno::BADF)?;
    state.buffers.get_mut(&id).ok_or(Errno::INVAL)
}

fn status(buffer: &Buffer, reasons: u32, payload: &mut Argument<'_>) {
    type Status = abi::DmaBufStatus;
    let mut put = |at, value| payload.put_u32(at, value);
    put(offset_of!(Status, state), buffer.state());
    put(
        offset_of!(Status, reasons),
        if buffer.dead { 0 } else { reasons },
    );
    put(offset_of!(Status, memattr), buffer.memattr);
    put(offset_of!(Status, region_index), buffer.bar);
    put(offset_of!(Status, nr_ranges), buffer.ranges);
    put(offset_of!(Status, nr_attachments), buffer.importers);
    payload.put_u64(offset_of!(Status, size), buffer.size);
}

fn list(state: &State, payload: &mut Argument<'_>) -> Result<i32, Errno> {
    type List = abi::DmaBufList;
    type Record = abi::DmaBufRecord;
    let after = payload.u64(offset_of!(List, after));
    let room = payload
        .u32(offset_of!(List, nr_records))
        .min(abi::MAX_RECORDS) as usize;
    let step = payload.u32(offset_of!(List, record_size)) as usize;
    if step < size_of::<Record>() || payload.0.len() < size_of::<List>() + room * step {
        return Err(Errno::INVAL);
    }
    let after = if state.repeat { 0 } else { after };
    let mut rest = state.buffers.range(after.saturating_add(1)..);
    let mut last = after;
    let mut count = 0;
    for (id, buffer) in rest.by_ref().take(room) {
        let at = size_of::<List>() + count * step;
        payload.put(at, &vec![0; step]);
        let flags = match buffer.dead && buffer.importers > 0 {
            true => abi::BUFFER_DRAINING,
            false => 0,
        };
        let mut put = |field, value| payload.put_u32(at + field, value);
        put(offset_of!(Record, region_index), buffer.bar);
        put(offset_of!(Record, nr_ranges), buffer.ranges);
        put(offset_of!(Record, memattr), buffer.memattr);
        put(offset_of!(Record, state), buffer.state());
        put(
            offset_of!(Record, reasons),
            if buffer.dead { 0 } else { state.reasons },
        );
        put(offset_of!(Record, flags), flags);
        put(offset_of!(Record, nr_attachments), buffer.importers);
        put(offset_of!(Record, nr_mappings), buffer.importers);
        put(offset_of!(Record, access), buffer.access);
        payload.put_u64(at + offset_of!(Record, id), *id);
        payload.put_u64(at + offset_of!(Record, size), buffer.size);
        last = *id;
        count += 1;
    }
    let more = rest.next().is_some() || state.repeat;
    payload.put_u64(offset_of!(List, after), if more { last } else { 0 });
    payload.put_u32(offset_of!(List, nr_records), count as u32);
    payload.put_u32(offset_of!(List, record_size), size_of::<Record>() as u32);
    Ok(0)
}

fn revoke_id(state: &mut State, payload: &Argument<'_>) -> Result<i32, Errno> {
    let id = payload.u64(offset_of!(abi::DmaBufRevokeId, id));
    let flags = payload.u32(offset_of!(abi::DmaBufRevokeId, flags));
    if flags & !abi::REVOKE_NOWAIT != 0 {
        return Err(Errno::INVAL);
    }
    let buffer = state.buffers.get_mut(&id).ok_or(Errno::NOENT)?;
    buffer.revoke()?;
    let draining = buffer.importers > 0 && flags & abi::REVOKE_NOWAIT != 0;
    state.tell();
    if draining {
        return Err(Errno::INPROGRESS);
    }
    Ok(0)
}

fn set_changes(state: &mut State, payload: &Argument<'_>) -> Result<i32, Errno> {
    state.changes = match payload.i32(offset_of!(abi::Events, eventfd)) {
        -1 => None,
        fd => {
            let fd = duplicate(fd)?;
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
            let target = rustix::fs::readlink(path, Vec::new())?;
            if target.as_bytes() != b"anon_inode:[eventfd]" {
                return Err(Errno::INVAL);
            }
            Some(fd)
        }
    };
    Ok(0)
}
