//! Services: requests that run together, on a thread of the library's.
#![allow(unsafe_code)]

use crate::handles::{Handle, Table, get, insert, remove};
use crate::memory::{Place, maybe};
use crate::model::mansard_model;
use crate::options::mansard_service_options;
use crate::request::not_in_a_callback;
use crate::status::{Failure, Result, guard, mansard_status};
use mansard_grammar::{Format, Grammars};
use mansard_runtime::{Batcher, Constraint, Model, Refused, Request, Service, Sink};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;

/// A model that many requests share, from any thread.
pub struct mansard_service {
    _private: (),
}

/// A service and the model that it runs.
pub struct Running {
    service: RwLock<Service>,
    model: Arc<Model>,
    /// Made when first asked for.
    grammars: OnceLock<Grammars>,
}

impl Handle for mansard_service {
    type Object = Running;
    const NAME: &'static str = "service";
    fn table() -> &'static Table<Running> {
        static SERVICES: Table<Running> = Table::new(3);
        &SERVICES
    }
}

/// Contexts that a service's caches hold where nothing else is said.
const CONTEXTS: usize = 16;

/// Starts a service for a model that generates text. `options` may be null. Any thread.
///
/// `options` is null or one; `service` is null or a place.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mansard_service_start(
    model: *const mansard_model,
    options: *const mansard_service_options,
    service: *mut *mut mansard_service,
) -> mansard_status {
    guard(|| {
        // SAFETY: the caller's word.
        let (options, place) = unsafe { (maybe("options", options)?, Place::new("service", service)?) };
        let (model, options) = (get(model)?, options.copied().unwrap_or_default());
        let tokens = model.info().tokenizer.is_some().then(|| model.tokens().cloned()).transpose()?;
        let positions = CONTEXTS.saturating_mul(model.artifact().manifest().program.limits.context);
        let engine = model.engine(&options.engine.options(positions))?;
        let options = options.options();
        let service = Service::start(Batcher::new(engine, tokens, &options.batch)?, &options)?;
        place.put(insert(Running { service: RwLock::new(service), model, grammars: OnceLock::new() })?);
        Ok(())
    })
}

/// Takes no more requests, and returns when those on their way are done; after `milliseconds` those that are not fail. Any
/// thread, but not from a function that hears of events.
#[unsafe(no_mangle)]
pub extern "C" fn mansard_service_drain(service: *mut mansard_service, milliseconds: u32) -> mansard_status {
    guard(|| {
        not_in_a_callback()?;
        let running = get(service)?;
        running
            .service
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .drain(Duration::from_millis(milliseconds.into()));
        Ok(())
    })
}

/// Ends a service and frees it; null is none. Requests on their way fail, and are to be freed nonetheless. Any thread, but not
/// from a function that hears of events.
#[unsafe(no_mangle)]
pub extern "C" fn mansard_service_free(service: *mut mansard_service) -> mansard_status {
    guard(|| {
        not_in_a_callback()?;
        remove(service).map(drop)
    })
}

/// What keeps an answer of a service to a format.
pub fn constraint(service: *mut mansard_service, format: &Format) -> Result<Box<dyn Constraint>> {
    let running = get(service)?;
    Ok(Grammars::kept(&running.grammars, &running.model)?.constraint(format)?)
}

/// Takes a request in.
pub fn submit(service: *mut mansard_service, request: Request, sink: Sink) -> Result<mansard_runtime::Handle> {
    let closed = || Failure::new(mansard_status::MANSARD_CLOSED, "the service takes no more requests");
    let running = get(service)?;
    // While it is being drained, it takes none: waiting for that could be for this very thread.
    let service = running.service.try_read().map_err(|_| closed())?;
    service.submit(request, sink).map_err(|refused| match refused {
        Refused::Busy(wait) => {
            let message = format!("too many requests wait: try again in {} s", wait.as_secs().max(1));
            Failure::new(mansard_status::MANSARD_BUSY, message)
        }
        Refused::Closed => closed(),
    })
}
