//! Runs GPU kernels on the host, with no GPU (tests only): the LLVM IR that PTX is made of, retargeted.
//!
//! ```text
//! kernel text --mlir--> LLVM IR --retarget--> host code in which every NVVM intrinsic, load and store calls this module
//! launch: blocks one after the other; each thread a coroutine, which is left where it waits for others
//! ```
//!
//! An asynchronous copy is done at once, or as late as a wait allows; nobody may touch what it writes before that wait.
//! Schedules are greedy: a warp runs as far as it can before another gets its turn, since taking turns hides missing barriers.
//! What threads of a block do to shared memory between two barriers is recorded, byte by byte: two that touch the same
//! byte, one of them writing, are a race. Threads that wait for ever are a deadlock. Both are errors, as are accesses
//! beyond the shared memory that the kernel asked for.
#![allow(unsafe_code)]

mod machine;
mod retarget;
mod shadow;
#[cfg(test)]
mod tests;
mod units;
#[cfg(test)]
mod units_tests;

pub use machine::{Copies, Order, Schedule};
pub use retarget::Code;

/// Schedules that find missing barriers and waits: one warp after the other from either end, and at random; copies early and
/// late.
pub const SCHEDULES: [Schedule; 4] = [
    Schedule { order: Order::Ascending, copies: Copies::Early },
    Schedule { order: Order::Descending, copies: Copies::Late },
    Schedule { order: Order::Random(1), copies: Copies::Late },
    Schedule { order: Order::Random(2), copies: Copies::Early },
];
