//! The caller's memory, read and written: the one place that goes by its pointers. Each is checked for null, and text for
//! UTF-8; that the rest of what `mansard.h` says of it is true is the caller's part.
#![allow(unsafe_code)]

use crate::status::{Failure, Result, mansard_status};
use std::ffi::{CStr, c_char};

/// Text that ends with a zero byte.
///
/// # Safety
/// `text` is null, or such text that stays as it is for as long as the result is used.
pub unsafe fn text<'a>(name: &str, text: *const c_char) -> Result<&'a str> {
    check(name, text)?;
    // SAFETY: not null, and the caller's word for the rest.
    let bytes = unsafe { CStr::from_ptr(text) };
    bytes.to_str().map_err(|e| {
        Failure::new(mansard_status::MANSARD_INPUT, format!("{name}: expected UTF-8, found another byte: {e}"))
    })
}

/// `count` values; of none, the pointer does not matter.
///
/// # Safety
/// `values` is null, or so many values that stay as they are for as long as the result is used.
pub unsafe fn list<'a, T>(name: &str, values: *const T, count: usize) -> Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    check(name, values)?;
    if count.checked_mul(size_of::<T>()).is_none_or(|bytes| bytes > isize::MAX as usize) {
        return Err(Failure::usage(format!("{name}: {count} are more than memory holds")));
    }
    // SAFETY: aligned, not null, no larger than an object can be, and the caller's word for the rest.
    Ok(unsafe { std::slice::from_raw_parts(values, count) })
}

/// A structure, or nothing.
///
/// # Safety
/// `value` is null, or one that stays as it is for as long as the result is used.
pub unsafe fn maybe<'a, T>(name: &str, value: *const T) -> Result<Option<&'a T>> {
    if value.is_null() {
        return Ok(None);
    }
    check(name, value)?;
    // SAFETY: aligned, not null, and the caller's word for the rest.
    Ok(Some(unsafe { &*value }))
}

/// A place for one result.
pub struct Place<T>(*mut T);

impl<T> Place<T> {
    /// The place at `at`.
    ///
    /// # Safety
    /// `at` is null, or memory for a `T` that nothing else uses during the call.
    pub unsafe fn new(name: &str, at: *mut T) -> Result<Place<T>> {
        check(name, at)?;
        Ok(Place(at))
    }

    /// Writes the result.
    pub fn put(&self, value: T) {
        // SAFETY: not null and aligned, as `new` has checked; memory for a `T`, as its caller says.
        unsafe { self.0.write(value) };
    }
}

/// A place for several values, and one for how many there are.
pub struct Room<T> {
    values: *mut T,
    capacity: usize,
    count: Place<usize>,
}

impl<T: Copy> Room<T> {
    /// Room for `capacity` values; with none, only their number is asked for.
    ///
    /// # Safety
    /// `values` is null, or memory for so many that nothing else uses during the call; `count` is as for [`Place::new`].
    pub unsafe fn new(name: &str, values: *mut T, capacity: usize, count: *mut usize) -> Result<Room<T>> {
        if capacity > 0 {
            check(name, values)?;
        }
        // SAFETY: as the caller says.
        let count = unsafe { Place::new("the place for their number", count) }?;
        Ok(Room { values, capacity, count })
    }

    /// Refuses, and says how much is needed, where there is no room for so many values.
    pub fn check(&self, needed: usize) -> Result<()> {
        if needed <= self.capacity {
            return Ok(());
        }
        self.count.put(needed);
        let message = format!("expected room for {needed}, found room for {}", self.capacity);
        Err(Failure::new(mansard_status::MANSARD_TOO_SMALL, message))
    }

    /// Writes all of them, and how many there are.
    pub fn put(&self, values: &[T]) -> Result<()> {
        self.check(values.len())?;
        if !values.is_empty() {
            // SAFETY: there is room for so many, which is not null and aligned; the values are not in it, as nothing else
            // uses it.
            unsafe { self.values.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        }
        self.count.put(values.len());
        Ok(())
    }
}

impl Room<u8> {
    /// Writes text and a zero byte after it, which is not counted.
    pub fn put_text(&self, text: &str) -> Result<()> {
        self.put(&[text.as_bytes(), &[0]].concat())?;
        self.count.put(text.len());
        Ok(())
    }
}

fn check<T>(name: &str, pointer: *const T) -> Result<()> {
    if pointer.is_null() {
        return Err(Failure::usage(format!("{name}: expected a pointer, found null")));
    }
    if !pointer.is_aligned() {
        return Err(Failure::usage(format!("{name}: expected a multiple of {}, found {pointer:p}", align_of::<T>())));
    }
    Ok(())
}
