//! Arguments from C, as values of Rust. All dereferencing of C's pointers is here.

#![allow(unsafe_code, reason = "pointers and descriptors of C")]

use std::ffi::{CStr, c_char};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use super::error::{EBADF, EFAULT, EINVAL, Failure};

/// The value behind a handle or a pointer.
///
/// # Safety
///
/// `pointer` is null, or points to a `T` that is initialized, and that nobody changes or frees
/// during `'a`.
pub(super) unsafe fn borrow<'a, T>(
    pointer: *const T,
    what: &'static str,
) -> Result<&'a T, Failure> {
    // SAFETY: By the caller.
    unsafe { pointer.as_ref() }.ok_or_else(|| null(what))
}

/// Where an output goes. Checked before the work is done, written after it.
#[derive(Debug)]
pub(super) struct Output<T>(*mut T);

impl<T> Output<T> {
    /// Checks that there is a place.
    ///
    /// # Safety
    ///
    /// `place` is null, or valid for a write of a `T` until this is gone.
    pub(super) unsafe fn new(place: *mut T, what: &'static str) -> Result<Self, Failure> {
        if place.is_null() {
            return Err(null(what));
        }
        Ok(Self(place))
    }

    /// Writes the output. The value of before is not dropped.
    pub(super) fn put(self, value: T) {
        // SAFETY: `new` was promised a place for it.
        unsafe { self.0.write(value) };
    }
}

impl<T> Output<*mut T> {
    /// Writes a new handle.
    pub(super) fn put_handle(self, value: T) {
        self.put(Box::into_raw(Box::new(value)));
    }
}

/// Frees a handle. Null is none.
///
/// # Safety
///
/// `handle` is null, or was written by [`Output::put_handle`] and not freed; nobody uses it any
/// more.
pub(super) unsafe fn free<T>(handle: *mut T) {
    if handle.is_null() {
        return;
    }
    // SAFETY: By the caller it came from `Box::into_raw`, and is freed once.
    drop(unsafe { Box::from_raw(handle) });
}

/// The elements of an array. `array` may be null if there are none.
///
/// # Safety
///
/// `array` is null, or points to `count` values that are initialized, and that nobody changes
/// during `'a`.
pub(super) unsafe fn slice<'a, T>(
    array: *const T,
    count: usize,
    what: &'static str,
) -> Result<&'a [T], Failure> {
    if count == 0 {
        return Ok(&[]);
    }
    if array.is_null() {
        return Err(null(what));
    }
    check_size::<T>(count, what)?;
    // SAFETY: It is not null and not too long for the address space; the rest is by the caller.
    Ok(unsafe { std::slice::from_raw_parts(array, count) })
}

/// Memory that is to be written, zeroed first. `memory` may be null if it has no bytes.
///
/// # Safety
///
/// `memory` is null, or valid for writes of `length` bytes, which nobody else touches during `'a`.
pub(super) unsafe fn bytes_mut<'a>(
    memory: *mut u8,
    length: usize,
    what: &'static str,
) -> Result<&'a mut [u8], Failure> {
    if length == 0 {
        return Ok(&mut []);
    }
    if memory.is_null() {
        return Err(null(what));
    }
    check_size::<u8>(length, what)?;
    // SAFETY: By the caller it can be written.
    unsafe { memory.write_bytes(0, length) };
    // SAFETY: As above, and it is initialized now.
    Ok(unsafe { std::slice::from_raw_parts_mut(memory, length) })
}

/// A text.
///
/// # Safety
///
/// `text` is null, or points to bytes that end with a NUL and that nobody changes during `'a`.
pub(super) unsafe fn text<'a>(text: *const c_char, what: &'static str) -> Result<&'a str, Failure> {
    if text.is_null() {
        return Err(null(what));
    }
    // SAFETY: It is not null; the rest is by the caller.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str()
        .map_err(|_| Failure::new(EINVAL, format!("{what} is not UTF-8")))
}

/// A duplicate of a descriptor. Any number may be asked for.
pub(super) fn duplicate(fd: RawFd, what: &'static str) -> Result<OwnedFd, Failure> {
    if fd < 0 {
        return Err(Failure::new(EBADF, format!("{what} is {fd}")));
    }
    // SAFETY: It is not -1, and nothing is done with it but to ask the kernel for a duplicate. The
    // kernel refuses a number that is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed
        .try_clone_to_owned()
        .map_err(|error| Failure::from_io(&error, format!("duplicate {what} {fd}")))
}

fn null(what: &'static str) -> Failure {
    Failure::new(EFAULT, format!("{what} is NULL"))
}

/// No object is larger than the half of the address space.
fn check_size<T>(count: usize, what: &'static str) -> Result<(), Failure> {
    let bytes = count.checked_mul(size_of::<T>());
    match bytes {
        Some(bytes) if isize::try_from(bytes).is_ok() => Ok(()),
        _ => Err(Failure::new(EINVAL, format!("{what} is too long"))),
    }
}
