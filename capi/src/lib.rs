//! The C interface of the library `barlease`; `include/barlease-lib.h` says what functions do.
//!
//! - this file: the functions, each of which turns arguments into values and calls the library;
//! - [`raw`]: pointers and descriptors of C, the only place that dereferences them;
//! - [`error`]: errnos, and the text of the last error;
//! - [`types`], [`mapping`]: structures and mappings.
//!
//! A panic in here ends the process: it does not go through frames of C.

mod error;
mod mapping;
mod raw;
mod types;

// A test in a guest has this file as a module.
#[cfg(all(test, not(barlease_guest)))]
mod tests;

/// The functions themselves. The header has what C promises to each: handles that were made by
/// this library and not freed, places for outputs, and arrays and texts of the length that is said,
/// valid for the duration of the call and unchanged by others.
///
/// Tests compare their signatures with the header by this source: one function's head, up to its
/// body, has only the types that they know.
#[allow(unsafe_code, reason = "arguments that C promises something about")]
#[allow(clippy::missing_safety_doc, reason = "the promises are in the header")]
#[allow(missing_docs, reason = "the documentation is the header")]
#[allow(unreachable_pub, reason = "for C")]
mod functions {
    use std::ffi::{c_char, c_int, c_void};
    use std::os::fd::{AsFd, AsRawFd, IntoRawFd};
    use std::time::Duration;

    use barlease::{BarRange, Bdf, Device, EventFd, Lease, LeaseId, Receiver, Revoked};

    use super::error::{self, EINPROGRESS, EINVAL, Failure, answer};
    use super::mapping::Any;
    use super::raw::{self, Output};
    use super::types::{self, CRange, CRecord, CStatus, check_flags};

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_last_error() -> *const c_char {
        error::last()
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_last_done() -> usize {
        error::last_done()
    }

    // ---- Owners: devices ------

    fn bdf(text: &str) -> Result<Bdf, Failure> {
        text.parse()
            .map_err(|error: barlease::ParseBdfError| Failure::new(EINVAL, error.to_string()))
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_device_open(
        bdf: *const c_char,
        device: *mut *mut Device,
    ) -> c_int {
        answer((|| {
            // SAFETY: C promises a text.
            let text = unsafe { raw::text(bdf, "bdf") }?;
            // SAFETY: C promises a place.
            let place = unsafe { Output::new(device, "device") }?;
            place.put_handle(Device::open(self::bdf(text)?)?);
            Ok(0)
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_device_adopt(
        fd: c_int,
        bdf: *const c_char,
        device: *mut *mut Device,
    ) -> c_int {
        answer((|| {
            // SAFETY: C promises a place.
            let place = unsafe { Output::new(device, "device") }?;
            let adopted = if bdf.is_null() {
                Device::from_fd(raw::duplicate(fd, "fd")?)?
            } else {
                // SAFETY: C promises a text.
                let text = unsafe { raw::text(bdf, "bdf") }?;
                let bdf = self::bdf(text)?;
                Device::from_fd_of(raw::duplicate(fd, "fd")?, bdf)?
            };
            place.put_handle(adopted);
            Ok(0)
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_device_fd(device: *const Device) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let device = unsafe { raw::borrow(device, "device") }?;
            Ok(device.as_fd().as_raw_fd())
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_device_close(device: *mut Device) {
        // SAFETY: C promises a handle that nobody uses any more.
        unsafe { raw::free(device) };
    }

    // ---- Owners: leases ------

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_export(
        device: *const Device,
        bar: u32,
        ranges: *const CRange,
        count: usize,
        flags: u32,
        lease: *mut *mut Lease,
    ) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let device = unsafe { raw::borrow(device, "device") }?;
            // SAFETY: C promises `count` of them.
            let ranges = unsafe { raw::slice(ranges, count, "ranges") }?;
            // SAFETY: C promises a place.
            let place = unsafe { Output::new(lease, "lease") }?;
            check_flags(flags, types::EXPORT_READ_ONLY)?;
            let ranges = ranges.iter().map(|range| BarRange {
                offset: range.offset,
                length: range.length,
            });
            let mut export = device.export(bar).ranges(ranges);
            if flags & types::EXPORT_READ_ONLY != 0 {
                export = export.read_only();
            }
            place.put_handle(export.export()?);
            Ok(0)
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_revoke(device: *const Device, lease: *const Lease) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let device = unsafe { raw::borrow(device, "device") }?;
            // SAFETY: As above.
            let lease = unsafe { raw::borrow(lease, "lease") }?;
            device.revoke(lease)?;
            Ok(0)
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_revoke_id(
        device: *const Device,
        id: u64,
        flags: u32,
    ) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let device = unsafe { raw::borrow(device, "device") }?;
            check_flags(flags, types::REVOKE_DO_NOT_WAIT)?;
            let id = LeaseId::new(id);
            if flags & types::REVOKE_DO_NOT_WAIT == 0 {
                device.leases().revoke_id(id)?;
                return Ok(0);
            }
            match device.leases().revoke_id_nowait(id)? {
                Revoked::Done => Ok(0),
                Revoked::Draining => Err(Failure::new(
                    EINPROGRESS,
                    format!("revoke: lease {id}: an importer still has access"),
                )),
            }
        })())
    }

    type Each = unsafe extern "C" fn(record: *const CRecord, context: *mut c_void) -> c_int;

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_list(
        device: *const Device,
        each: Option<Each>,
        context: *mut c_void,
    ) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let device = unsafe { raw::borrow(device, "device") }?;
            let each = each.ok_or_else(|| Failure::new(error::EFAULT, "each is NULL"))?;
            for record in device.leases().list() {
                let record = CRecord::try_from(record?)?;
                // SAFETY: C promises a function that takes a record and this context.
                let told = unsafe { each(&record, context) };
                if told != 0 {
                    return Ok(told);
                }
            }
            Ok(0)
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_events(device: *const Device) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let device = unsafe { raw::borrow(device, "device") }?;
            let events = EventFd::new()?;
            // The duplicate is close-on-exec, too.
            let fd = events.as_fd().try_clone_to_owned();
            let fd = fd.map_err(|error| Failure::from_io(&error, "duplicate: eventfd"))?;
            device.leases().set_events(Some(fd.as_fd()))?;
            Ok(fd.into_raw_fd())
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_status(
        device: *const Device,
        lease: *const Lease,
        status: *mut CStatus,
        size: usize,
    ) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let device = unsafe { raw::borrow(device, "device") }?;
            // SAFETY: As above.
            let lease = unsafe { raw::borrow(lease, "lease") }?;
            if status.is_null() {
                return Err(Failure::new(error::EFAULT, "status is NULL"));
            }
            let found = CStatus::try_from(device.status(lease)?)?.to_bytes();
            // SAFETY: C promises `size` bytes, which nobody else uses meanwhile.
            let place = unsafe { raw::bytes_mut(status.cast(), size, "status") }?;
            for (to, from) in place.iter_mut().zip(found) {
                *to = from;
            }
            Ok(0)
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_set_memory_type(
        device: *const Device,
        lease: *const Lease,
        memory_type: u32,
    ) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let device = unsafe { raw::borrow(device, "device") }?;
            // SAFETY: As above.
            let lease = unsafe { raw::borrow(lease, "lease") }?;
            device.set_memory_type(lease, types::memory_type(memory_type)?)?;
            Ok(0)
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_set_steering_tags(
        device: *const Device,
        lease: *const Lease,
        tag: c_int,
        extended_tag: c_int,
        hint: u32,
    ) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let device = unsafe { raw::borrow(device, "device") }?;
            // SAFETY: As above.
            let lease = unsafe { raw::borrow(lease, "lease") }?;
            device.set_tph(lease, types::steering_tags(tag, extended_tag, hint)?)?;
            Ok(0)
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_alias_region(
        device: *const Device,
        bar: u32,
        memory_type: u32,
        region: *mut u32,
    ) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let device = unsafe { raw::borrow(device, "device") }?;
            // SAFETY: C promises a place for it.
            let region = unsafe { Output::new(region, "region") }?;
            region.put(device.alias_region(bar, types::memory_type(memory_type)?)?);
            Ok(0)
        })())
    }

    // ---- Leases ------

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_lease_adopt(fd: c_int, lease: *mut *mut Lease) -> c_int {
        answer((|| {
            // SAFETY: C promises a place.
            let place = unsafe { Output::new(lease, "lease") }?;
            place.put_handle(Lease::from_fd(raw::duplicate(fd, "fd")?)?);
            Ok(0)
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_lease_fd(lease: *const Lease) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let lease = unsafe { raw::borrow(lease, "lease") }?;
            Ok(lease.as_fd().as_raw_fd())
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_lease_id(lease: *const Lease, id: *mut u64) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let lease = unsafe { raw::borrow(lease, "lease") }?;
            // SAFETY: C promises a place.
            let place = unsafe { Output::new(id, "id") }?;
            place.put(LeaseId::of(lease)?.get());
            Ok(0)
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_lease_size(lease: *const Lease) -> u64 {
        // SAFETY: C promises a handle.
        unsafe { raw::borrow(lease, "lease") }.map_or(0, Lease::size)
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_lease_is_writable(lease: *const Lease) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let lease = unsafe { raw::borrow(lease, "lease") }?;
            Ok(lease.is_writable().into())
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_lease_set_name(
        lease: *const Lease,
        name: *const c_char,
    ) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let lease = unsafe { raw::borrow(lease, "lease") }?;
            // SAFETY: C promises a text.
            let name = unsafe { raw::text(name, "name") }?;
            lease.set_name(name)?;
            Ok(0)
        })())
    }

    /// `None`: for as long as it takes.
    fn timeout(milliseconds: c_int) -> Result<Option<Duration>, Failure> {
        if milliseconds == -1 {
            return Ok(None);
        }
        let milliseconds = u64::try_from(milliseconds);
        let milliseconds = milliseconds
            .map_err(|_| Failure::new(EINVAL, "timeout_ms is neither -1 nor a time"))?;
        Ok(Some(Duration::from_millis(milliseconds)))
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_lease_send(
        lease: *const Lease,
        socket: c_int,
        timeout_ms: c_int,
    ) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let lease = unsafe { raw::borrow(lease, "lease") }?;
            let timeout = timeout(timeout_ms)?;
            let socket = raw::duplicate(socket, "socket")?;
            match timeout {
                None => lease.send(&socket)?,
                Some(timeout) => lease.send_within(&socket, timeout)?,
            }
            Ok(0)
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_lease_receive(
        socket: c_int,
        flags: u32,
        timeout_ms: c_int,
        lease: *mut *mut Lease,
    ) -> c_int {
        answer((|| {
            // SAFETY: C promises a place.
            let place = unsafe { Output::new(lease, "lease") }?;
            check_flags(flags, types::RECEIVE_ANY_FILE)?;
            let timeout = timeout(timeout_ms)?;
            let socket = raw::duplicate(socket, "socket")?;
            let mut receiver = Receiver::new();
            if flags & types::RECEIVE_ANY_FILE != 0 {
                receiver = receiver.any_file();
            }
            place.put_handle(match timeout {
                None => receiver.receive(&socket)?,
                Some(timeout) => receiver.receive_within(&socket, timeout)?,
            });
            Ok(0)
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_lease_close(lease: *mut Lease) {
        // SAFETY: C promises a handle that nobody uses any more.
        unsafe { raw::free(lease) };
    }

    // ---- Holders: mappings ------

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_map(
        lease: *const Lease,
        offset: u64,
        length: u64,
        flags: u32,
        mapping: *mut *mut Any,
    ) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let lease = unsafe { raw::borrow(lease, "lease") }?;
            // SAFETY: C promises a place.
            let place = unsafe { Output::new(mapping, "mapping") }?;
            place.put_handle(Any::new(lease, offset, length, flags)?);
            Ok(0)
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_mapping_length(mapping: *const Any) -> usize {
        // SAFETY: C promises a handle.
        unsafe { raw::borrow(mapping, "mapping") }.map_or(0, Any::length)
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_mapping_address(mapping: *const Any) -> *mut c_void {
        // SAFETY: C promises a handle.
        let mapping = unsafe { raw::borrow(mapping, "mapping") };
        mapping.map_or(std::ptr::null_mut(), |mapping| mapping.address().cast())
    }

    macro_rules! accesses {
        ($($read:ident $write:ident $value:ident),+) => {$(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $read(
                mapping: *const Any,
                offset: usize,
                value: *mut $value,
            ) -> c_int {
                answer((|| {
                    // SAFETY: C promises a handle.
                    let mapping = unsafe { raw::borrow(mapping, "mapping") }?;
                    // SAFETY: C promises a place.
                    let place = unsafe { Output::new(value, "value") }?;
                    place.put(mapping.read(offset)?);
                    Ok(0)
                })())
            }

            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $write(
                mapping: *const Any,
                offset: usize,
                value: $value,
            ) -> c_int {
                answer((|| {
                    // SAFETY: C promises a handle.
                    let mapping = unsafe { raw::borrow(mapping, "mapping") }?;
                    mapping.write(offset, value)?;
                    Ok(0)
                })())
            }
        )+};
    }

    accesses! {
        barlease_read8 barlease_write8 u8,
        barlease_read16 barlease_write16 u16,
        barlease_read32 barlease_write32 u32,
        barlease_read64 barlease_write64 u64
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_read_block(
        mapping: *const Any,
        offset: usize,
        target: *mut c_void,
        length: usize,
    ) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let mapping = unsafe { raw::borrow(mapping, "mapping") }?;
            if mapping.length().saturating_sub(offset) < length {
                // Before the target is touched.
                return Err(mapping.out_of_bounds(offset, length));
            }
            // SAFETY: C promises `length` bytes, outside of the mapping, that nobody else uses.
            let target = unsafe { raw::bytes_mut(target.cast(), length, "target") }?;
            mapping.read_block(offset, target)?;
            Ok(0)
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_write_block(
        mapping: *const Any,
        offset: usize,
        source: *const c_void,
        length: usize,
    ) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let mapping = unsafe { raw::borrow(mapping, "mapping") }?;
            // SAFETY: C promises `length` bytes, outside of the mapping.
            let source = unsafe { raw::slice(source.cast::<u8>(), length, "source") }?;
            mapping.write_block(offset, source)?;
            Ok(0)
        })())
    }

    type Section = unsafe extern "C" fn(address: *mut c_void, context: *mut c_void) -> c_int;

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_section(
        mapping: *const Any,
        access: Option<Section>,
        context: *mut c_void,
    ) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let mapping = unsafe { raw::borrow(mapping, "mapping") }?.scratch()?;
            let access = access.ok_or_else(|| Failure::new(error::EFAULT, "access is NULL"))?;
            // SAFETY: C promises a function that takes the address of a mapping and this context.
            Ok(mapping.section(|address| unsafe { access(address.cast(), context) })?)
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_recover(mapping: *const Any) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let mapping = unsafe { raw::borrow(mapping, "mapping") }?;
            mapping.scratch()?.recover()?;
            Ok(0)
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_is_lost(mapping: *const Any) -> c_int {
        answer((|| {
            // SAFETY: C promises a handle.
            let mapping = unsafe { raw::borrow(mapping, "mapping") }?;
            Ok(mapping.scratch()?.is_lost().into())
        })())
    }

    #[unsafe(no_mangle)]
    pub unsafe extern "C" fn barlease_unmap(mapping: *mut Any) {
        // SAFETY: C promises a handle that nobody uses any more.
        unsafe { raw::free(mapping) };
    }
}
