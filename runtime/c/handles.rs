//! Handles -> objects. A handle is a number in a pointer's clothes, never an address:
//!
//! ```text
//!  generation (32 bits) | place in the table (28 bits) | kind (4 bits, not 0)
//! ```
//!
//! A place that was freed gets another generation, so a handle is found out when it is used after that, freed twice, of another
//! kind, or made up. An object in use by a call of another thread goes when that call ends.

use crate::status::{Failure, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A type that callers have pointers to, and what those stand for.
pub trait Handle: Sized + 'static {
    /// What a handle stands for.
    type Object: Send + Sync;
    /// Its name in messages.
    const NAME: &'static str;
    /// Where the objects are.
    fn table() -> &'static Table<Self::Object>;
}

/// Objects of one kind.
pub struct Table<T> {
    kind: usize,
    slots: Mutex<Slots<T>>,
}

/// A place's generation, and what is there.
type Entry<T> = (u32, Option<Arc<T>>);

struct Slots<T> {
    entries: Vec<Entry<T>>,
    free: Vec<usize>,
}

const KIND_BITS: u32 = 4;
const INDEX_BITS: u32 = 28;

impl<T> Table<T> {
    /// An empty one. `kind` is its own, 1 to 15.
    pub const fn new(kind: usize) -> Table<T> {
        Table { kind, slots: Mutex::new(Slots { entries: vec![], free: vec![] }) }
    }

    fn slots(&self) -> MutexGuard<'_, Slots<T>> {
        // Nothing in here stops half-way.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn number(&self, index: usize, generation: u32) -> usize {
        (generation as usize) << (INDEX_BITS + KIND_BITS) | index << KIND_BITS | self.kind
    }

    /// The place that a handle names.
    fn find<'a>(&self, slots: &'a mut Slots<T>, number: usize) -> Option<(usize, &'a mut Entry<T>)> {
        let index = number >> KIND_BITS & ((1 << INDEX_BITS) - 1);
        let entry = slots.entries.get_mut(index).filter(|entry| entry.1.is_some())?;
        (self.number(index, entry.0) == number).then_some((index, entry))
    }
}

/// A handle of a new object.
pub fn insert<H: Handle>(object: H::Object) -> Result<*mut H> {
    let table = H::table();
    let mut slots = table.slots();
    let index = slots.free.pop().unwrap_or(slots.entries.len());
    if index >> INDEX_BITS != 0 {
        return Err(Failure::usage(format!("too many {}s: free those that are not needed", H::NAME)));
    }
    if index == slots.entries.len() {
        slots.entries.push((1, None));
    }
    slots.entries[index].1 = Some(Arc::new(object));
    Ok(std::ptr::without_provenance_mut(table.number(index, slots.entries[index].0)))
}

/// What a handle stands for.
pub fn get<H: Handle>(handle: *const H) -> Result<Arc<H::Object>> {
    let table = H::table();
    let mut slots = table.slots();
    let found = table.find(&mut slots, handle.addr()).and_then(|(_, entry)| entry.1.clone());
    found.ok_or_else(|| unknown::<H>(handle.is_null()))
}

/// Frees a handle; null is none.
pub fn remove<H: Handle>(handle: *mut H) -> Result<Option<Arc<H::Object>>> {
    if handle.is_null() {
        return Ok(None);
    }
    let table = H::table();
    let mut slots = table.slots();
    let Some((index, entry)) = table.find(&mut slots, handle.addr()) else { return Err(unknown::<H>(false)) };
    let object = entry.1.take();
    entry.0 = entry.0.wrapping_add(1);
    // A place whose generations are used up stays empty.
    if entry.0 != 0 {
        slots.free.push(index);
    }
    Ok(object)
}

fn unknown<H: Handle>(null: bool) -> Failure {
    let found = if null { "null" } else { "one that was freed, or is no such handle" };
    Failure::usage(format!("expected the handle of a {}, found {found}", H::NAME))
}
