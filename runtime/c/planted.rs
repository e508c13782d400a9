//! A panic planted in every function comes back as a status.

use crate::status::PLANT;
use crate::*;
use std::ffi::CStr;
use std::ptr::{null, null_mut};

type Call = (&'static str, Box<dyn Fn() -> mansard_status>);

/// Every function that gives a status, called with nothing.
#[allow(unsafe_code)]
fn calls() -> Vec<Call> {
    macro_rules! calls {
        ($($name:ident($($argument:expr),*);)*) => {
            vec![$((
                stringify!($name),
                #[allow(unused_unsafe)]
                // SAFETY: null is allowed everywhere, and refused.
                Box::new(|| unsafe { $name($($argument),*) }),
            )),*]
        };
    }
    calls! {
        mansard_cancel(null_mut());
        mansard_chat_prompt(null(), null(), 0, null_mut(), 0, null_mut());
        mansard_decode(null(), null(), 0, null_mut(), 0, null_mut());
        mansard_embed(null_mut(), null(), null(), 0, null_mut(), 0, null_mut());
        mansard_encode(null(), null(), 0, null_mut(), 0, null_mut());
        mansard_engine_free(null_mut());
        mansard_engine_new(null(), null(), null_mut());
        mansard_generate(null_mut(), null(), 0, null(), None, null_mut());
        mansard_logits(null_mut(), null(), 0, 0, null_mut(), 0, null_mut());
        mansard_model_facts(null(), null_mut());
        mansard_model_free(null_mut());
        mansard_model_open(MANSARD_ABI_VERSION, null(), 0, null_mut());
        mansard_model_open_memory(MANSARD_ABI_VERSION, null(), null(), 0, 0, null_mut());
        mansard_next(null_mut(), 0, null_mut());
        mansard_options_default(null_mut());
        mansard_request_free(null_mut());
        mansard_service_drain(null_mut(), 0);
        mansard_service_free(null_mut());
        mansard_service_start(null(), null(), null_mut());
        mansard_submit(null_mut(), null(), 0, null(), null_mut());
        mansard_submit_to(null_mut(), null(), 0, null(), None, null_mut(), null_mut());
    }
}

#[allow(unsafe_code)]
fn message() -> String {
    // SAFETY: text that stays until the next failure of this thread.
    unsafe { CStr::from_ptr(mansard_error()) }.to_string_lossy().into_owned()
}

#[test]
fn panics_stay_inside() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    PLANT.set(true);
    let found: Vec<_> = calls().iter().map(|(name, call)| (*name, call(), message())).collect();
    PLANT.set(false);
    std::panic::set_hook(hook);
    for (name, status, message) in found {
        assert_eq!((status, &message[..]), (mansard_status::MANSARD_INTERNAL, "a panic: planted"), "{name}");
    }
}

#[test]
fn null_is_refused_or_nothing() {
    for (name, call) in calls() {
        let expected = if name.ends_with("_free") { mansard_status::MANSARD_OK } else { mansard_status::MANSARD_USAGE };
        assert_eq!(call(), expected, "{name}");
    }
}

#[test]
fn every_function_is_here() {
    let header = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/mansard.h")).unwrap();
    let declared: Vec<&str> =
        header.lines().filter_map(|line| line.strip_prefix("mansard_status ")?.split('(').next()).collect();
    let mut called: Vec<&str> = calls().iter().map(|(name, _)| *name).collect();
    called.sort_unstable();
    let mut sorted = declared.clone();
    sorted.sort_unstable();
    assert_eq!(called, sorted);
}
