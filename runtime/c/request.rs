//! Requests: what was asked, and its events, waited for or told.
//!
//! ```text
//!  service's thread --channel--> mansard_next                     the caller takes them when it likes
//!                   --gate-----> the caller's function            on the service's thread, until the gate is closed
//! ```
#![allow(unsafe_code)]

use crate::event::{Kept, Shown, mansard_event, mansard_kind};
use crate::handles::{Handle, Table, get, insert, remove};
use crate::memory::{Place, list, maybe};
use crate::options::mansard_options;
use crate::service::{constraint, mansard_service, submit};
use crate::status::{Failure, Result, guard, mansard_status};
use mansard_runtime::{Event, Request, Sink};
use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Answers on their way.
pub struct mansard_request {
    _private: (),
}

/// A caller's request.
pub struct Asked {
    /// Ends the request when dropped.
    handle: Mutex<Option<mansard_runtime::Handle>>,
    events: Events,
}

/// Who gets its events.
enum Events {
    /// Whoever calls mansard_next.
    Waited(Mutex<Waited>),
    /// A function of the caller's, as long as its gate is open.
    Told(Arc<Gate>),
}

struct Waited {
    receiver: Receiver<Event>,
    /// What the last event points to.
    kept: Kept,
}

#[derive(Default)]
struct Gate {
    closed: AtomicBool,
    /// Held while the function runs.
    running: Mutex<()>,
}

impl Handle for mansard_request {
    type Object = Asked;
    const NAME: &'static str = "request";
    fn table() -> &'static Table<Asked> {
        static REQUESTS: Table<Asked> = Table::new(4);
        &REQUESTS
    }
}

/// A function of the caller's that hears of events. It gives 0 to end the request, and must not throw.
pub type mansard_sink = Option<unsafe extern "C" fn(event: *const mansard_event, user: *mut c_void) -> c_int>;

/// For mansard_next: wait as long as it takes.
pub const MANSARD_FOREVER: u32 = 0xffff_ffff;

thread_local! {
    /// This thread is in a function of the caller's.
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
}

/// Refuses what waits for the very thread that it would be called on.
pub fn not_in_a_callback() -> Result<()> {
    if IN_CALLBACK.get() {
        return Err(Failure::usage("a function that hears of events cannot wait: it is the service's thread"));
    }
    Ok(())
}

/// A caller's function and its argument.
#[derive(Clone, Copy)]
struct Told {
    function: unsafe extern "C" fn(*const mansard_event, *mut c_void) -> c_int,
    user: *mut c_void,
}

// SAFETY: mansard.h says that the function is called on another thread, with this argument.
unsafe impl Send for Told {}

impl Told {
    fn new(function: mansard_sink, user: *mut c_void) -> Result<Told> {
        let function = function.ok_or_else(|| Failure::usage("sink: expected a function, found null"))?;
        Ok(Told { function, user })
    }

    /// Calls it; gives what it says.
    fn tell(&self, shown: &Shown) -> bool {
        let event = shown.event();
        // SAFETY: a function of this type, as the caller says; the event and what it points to live until it returns.
        unsafe { (self.function)(&event, self.user) != 0 }
    }
}

/// Asks for answers to a prompt, and comes back at once; mansard_next waits for their events. `options` may be null. Any thread.
///
/// `tokens` are `count`; `options` is null or one; `request` is null or a place.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mansard_submit(
    service: *mut mansard_service,
    tokens: *const u32,
    count: usize,
    options: *const mansard_options,
    request: *mut *mut mansard_request,
) -> mansard_status {
    guard(|| {
        // SAFETY: the caller's word.
        let (asked, place) = unsafe { (ask(service, tokens, count, options)?, Place::new("request", request)?) };
        place.put(insert(waited(service, asked)?)?);
        Ok(())
    })
}

/// Asks for answers to a prompt, and comes back at once; `sink` hears of their events, on the service's thread, which goes on
/// when it returns: it must not block. It is not called any more once mansard_request_free has returned. Any thread.
///
/// `tokens` are `count`; `options` is null or one; `sink` may be called from another thread, with `user`; `request` is null or
/// a place.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mansard_submit_to(
    service: *mut mansard_service,
    tokens: *const u32,
    count: usize,
    options: *const mansard_options,
    sink: mansard_sink,
    user: *mut c_void,
    request: *mut *mut mansard_request,
) -> mansard_status {
    guard(|| {
        // SAFETY: the caller's word.
        let (asked, place) = unsafe { (ask(service, tokens, count, options)?, Place::new("request", request)?) };
        let (told, gate) = (Told::new(sink, user)?, Arc::new(Gate::default()));
        let choices = asked.choices;
        let handle = submit(service, asked, teller(told, gate.clone(), choices))?;
        place.put(insert(Asked { handle: Mutex::new(Some(handle)), events: Events::Told(gate) })?);
        Ok(())
    })
}

/// Asks for answers to a prompt, and gives their events to `sink` as they come, on the calling thread; comes back when all is
/// done, or `sink` gave 0. What fails comes back as a status. `options` may be null. Any thread, but not from a function that
/// hears of events.
///
/// `tokens` are `count`; `options` is null or one; `sink` may be called with `user`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mansard_generate(
    service: *mut mansard_service,
    tokens: *const u32,
    count: usize,
    options: *const mansard_options,
    sink: mansard_sink,
    user: *mut c_void,
) -> mansard_status {
    guard(|| {
        not_in_a_callback()?;
        // SAFETY: the caller's word.
        let asked = unsafe { ask(service, tokens, count, options) }?;
        let told = Told::new(sink, user)?;
        let Asked { handle: _handle, events: Events::Waited(events) } = waited(service, asked)? else { return Ok(()) };
        let events = events.into_inner().unwrap_or_else(PoisonError::into_inner);
        for event in events.receiver {
            if !told.tell(&event.try_into()?) {
                return Ok(());
            }
        }
        told.tell(&Shown::of(mansard_kind::MANSARD_END));
        Ok(())
    })
}

/// Waits for a request's next event, at most so many milliseconds; MANSARD_FOREVER for as long as it takes. Where none came, it
/// is MANSARD_NOTHING; after the last, MANSARD_END, again and again. What fails comes back as a status. Any thread, but not
/// from a function that hears of events; calls with one request wait for one another.
///
/// `event` is null or a place.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mansard_next(
    request: *mut mansard_request,
    milliseconds: u32,
    event: *mut mansard_event,
) -> mansard_status {
    guard(|| {
        not_in_a_callback()?;
        // SAFETY: the caller's word.
        let place = unsafe { Place::new("event", event) }?;
        let request = get(request)?;
        let Events::Waited(events) = &request.events else {
            return Err(Failure::usage("the events of this request go to its function"));
        };
        let mut events = locked(events);
        let came = match milliseconds {
            MANSARD_FOREVER => events.receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
            _ => events.receiver.recv_timeout(Duration::from_millis(milliseconds.into())),
        };
        let shown: Shown = match came {
            Ok(event) => event.try_into()?,
            Err(RecvTimeoutError::Timeout) => Shown::of(mansard_kind::MANSARD_NOTHING),
            Err(RecvTimeoutError::Disconnected) => Shown::of(mansard_kind::MANSARD_END),
        };
        place.put(shown.event());
        events.kept = shown.kept;
        Ok(())
    })
}

/// Ends a request; whoever waits for its events gets MANSARD_END soon. It is to be freed nonetheless. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn mansard_cancel(request: *mut mansard_request) -> mansard_status {
    guard(|| {
        get(request)?.cancel();
        Ok(())
    })
}

/// Ends a request and frees it; null is none. Its function is not called any more once this has returned, but for the call that
/// this comes from. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn mansard_request_free(request: *mut mansard_request) -> mansard_status {
    guard(|| {
        let Some(asked) = remove(request)? else { return Ok(()) };
        asked.cancel();
        if let (Events::Told(gate), false) = (&asked.events, IN_CALLBACK.get()) {
            drop(locked(&gate.running));
        }
        Ok(())
    })
}

impl Asked {
    fn cancel(&self) {
        if let Events::Told(gate) = &self.events {
            gate.closed.store(true, Ordering::SeqCst);
        }
        drop(locked(&self.handle).take());
    }
}

/// # Safety
/// As mansard_submit's.
unsafe fn ask(
    service: *mut mansard_service,
    tokens: *const u32,
    count: usize,
    options: *const mansard_options,
) -> Result<Request> {
    // SAFETY: the caller's word.
    let (prompt, options) = unsafe { (list("tokens", tokens, count)?, maybe("options", options)?) };
    // SAFETY: the caller's word.
    unsafe { options.copied().unwrap_or_default().request(prompt, |format| constraint(service, format)) }
}

/// A request whose events are waited for.
fn waited(service: *mut mansard_service, request: Request) -> Result<Asked> {
    let (sender, receiver) = channel();
    let handle = submit(service, request, Box::new(move |event| sender.send(event).is_ok()))?;
    let events = Mutex::new(Waited { receiver, kept: Kept::default() });
    Ok(Asked { handle: Mutex::new(Some(handle)), events: Events::Waited(events) })
}

/// Gives events to a caller's function, as long as its gate is open.
fn teller(told: Told, gate: Arc<Gate>, choices: usize) -> Sink {
    let mut left = choices;
    Box::new(move |event| {
        let _running = locked(&gate.running);
        let tell = |shown: &Shown| {
            if gate.closed.load(Ordering::SeqCst) {
                return false;
            }
            IN_CALLBACK.set(true);
            let more = told.tell(shown);
            IN_CALLBACK.set(false);
            more
        };
        left -= usize::from(matches!(event, Event::Done { .. }));
        match event.try_into() {
            Ok(shown) => tell(&shown) && (left > 0 || tell(&Shown::of(mansard_kind::MANSARD_END))),
            Err(failure) => tell(&Shown::failure(&failure)),
        }
    })
}

/// Nothing behind these locks is ever half-done.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
