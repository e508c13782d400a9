//! The C interface: a thin skin over `mansard-runtime`, from which cbindgen writes `mansard.h`.
//!
//! ```text
//!  handle --table--> Arc of the runtime's object --call--> status, and a message for the calling thread
//! ```
//!
//! - A handle is a number in a pointer's clothes (`handles.rs`): one that was freed, or is of another kind, is an error.
//! - Every function is behind [`status::guard`]: what panics comes back as `MANSARD_INTERNAL`.
//! - What the caller's pointers point to is read and written in `memory.rs` alone, after it was checked for null.
//!
//! The version of the interface is [`MANSARD_ABI_VERSION`]; whoever opens a model says which one it was compiled with.
#![allow(non_camel_case_types)]
// What callers must see to is part of each function's description, which mansard.h has word by word.
#![allow(clippy::missing_safety_doc)]

mod engine;
mod event;
mod handles;
mod memory;
mod model;
mod options;
#[cfg(test)]
mod planted;
mod request;
mod service;
mod status;

pub use engine::*;
pub use event::*;
pub use model::*;
pub use options::*;
pub use request::*;
pub use service::*;
pub use status::{
    MANSARD_ABI_VERSION, mansard_abi_version, mansard_error, mansard_help, mansard_status, mansard_version,
};
