//! What every function gives back: a status, and for the calling thread a message.
#![allow(unsafe_code)]

use mansard_ir::{Error, Kind};
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The version of this interface: the major one times 65536, which changes when something is removed or means something else,
/// or a structure has more fields, and the minor one, which changes when something else is added.
pub const MANSARD_ABI_VERSION: u32 = 0x0002_0000;

/// What became of a call. Whatever is not MANSARD_OK leaves a message, see mansard_error.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum mansard_status {
    /// Done.
    MANSARD_OK = 0,
    /// A call that makes no sense: a null pointer, a freed handle, an option out of range, an empty or too long prompt.
    MANSARD_USAGE = 2,
    /// Outside bytes that are damaged or inconsistent: an artifact, a tokenizer, text that is no UTF-8.
    MANSARD_INPUT = 3,
    /// Well-formed, but nothing for this version or this machine.
    MANSARD_UNSUPPORTED = 4,
    /// The operating system refused: a missing file, no memory.
    MANSARD_IO = 5,
    /// Too many requests wait; the message says after which time to try again.
    MANSARD_BUSY = 6,
    /// The service takes no more requests.
    MANSARD_CLOSED = 7,
    /// The buffer is too small; what is needed has been written to the place for the size.
    MANSARD_TOO_SMALL = 8,
    /// A broken invariant of Mansard itself; please report it.
    MANSARD_INTERNAL = 70,
}

/// Why a call has failed.
pub struct Failure {
    /// What it gives back.
    pub status: mansard_status,
    message: String,
    help: Option<String>,
}

impl Failure {
    /// A failure saying `message`.
    pub fn new(status: mansard_status, message: impl Into<String>) -> Failure {
        Failure { status, message: message.into(), help: None }
    }

    /// A call that makes no sense.
    pub fn usage(message: impl Into<String>) -> Failure {
        Failure::new(mansard_status::MANSARD_USAGE, message)
    }

    /// The sentence.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let status = match error.kind() {
            Kind::Usage => mansard_status::MANSARD_USAGE,
            Kind::Input => mansard_status::MANSARD_INPUT,
            Kind::Unsupported => mansard_status::MANSARD_UNSUPPORTED,
            Kind::Io => mansard_status::MANSARD_IO,
            Kind::Differs | Kind::Internal => mansard_status::MANSARD_INTERNAL,
        };
        Failure { status, message: error.to_string(), help: error.advice().map(String::from) }
    }
}

/// Of the functions here.
pub type Result<T> = std::result::Result<T, Failure>;

thread_local! {
    /// What the last failure on this thread said, and what to try.
    static LAST: RefCell<(CString, CString)> = RefCell::default();
}

/// Runs a function's body: its failure, or its panic, becomes a status and this thread's message.
pub fn guard(body: impl FnOnce() -> Result<()>) -> mansard_status {
    let body = || {
        planted();
        body()
    };
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        let message = format!("a panic: {}", said.unwrap_or("without a message"));
        // What a panic carries may panic when it goes.
        std::mem::forget(panic);
        Err(Failure::new(mansard_status::MANSARD_INTERNAL, message))
    });
    let Err(failure) = result else { return mansard_status::MANSARD_OK };
    let last = (c_string(&failure.message), c_string(failure.help.as_deref().unwrap_or_default()));
    LAST.replace(last);
    failure.status
}

fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', "\u{fffd}")).unwrap_or_default()
}

#[cfg(not(test))]
fn planted() {}

#[cfg(test)]
thread_local! {
    /// Every function of this thread panics.
    pub static PLANT: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

#[cfg(test)]
fn planted() {
    assert!(!PLANT.get(), "planted");
}

/// The version of the library: MANSARD_ABI_VERSION of the header that it belongs to. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn mansard_abi_version() -> u32 {
    MANSARD_ABI_VERSION
}

/// The version of Mansard, as text. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn mansard_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

/// What the last call that failed on the calling thread says: one sentence with its places, in UTF-8. Empty where none has
/// failed. It stays until another call fails on the same thread.
#[unsafe(no_mangle)]
pub extern "C" fn mansard_error() -> *const c_char {
    LAST.with_borrow(|(message, _)| message.as_ptr())
}

/// What to try after the last call that failed on the calling thread; empty where nothing is known. It stays as long as the
/// message.
#[unsafe(no_mangle)]
pub extern "C" fn mansard_help() -> *const c_char {
    LAST.with_borrow(|(_, help)| help.as_ptr())
}

/// Compares the version that a program was compiled with.
pub fn check_abi(theirs: u32) -> Result<()> {
    let ours = MANSARD_ABI_VERSION;
    if theirs >> 16 == ours >> 16 && theirs & 0xffff <= ours & 0xffff {
        return Ok(());
    }
    let [(a, b), (c, d)] = [ours, theirs].map(|version| (version >> 16, version & 0xffff));
    let message =
        format!("expected a program compiled with mansard.h {a}.{b} or earlier of {a}, found one with {c}.{d}");
    Err(Failure::new(mansard_status::MANSARD_UNSUPPORTED, message))
}
