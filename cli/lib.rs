//! Types the arrows in order: what the command line does, as a library for tests and build scripts.
//!
//! ```text
//! model file --open--> Model --passes--> Plan --code, packing--> artifact
//! ```
#![forbid(unsafe_code)]

pub mod budget;
mod calibration;
pub mod check;
pub mod driver;
pub mod machine;
mod quantize;
pub mod sass;
mod tune;
