//! The same kernels as GPUs run them, emulated: every schedule is another run, with a grid of its own.

use super::{Given, Memory, StepArrays, run_with};
use crate::cuda::Source;
use crate::cuda::emulator::{Code, SCHEDULES, Schedule};
use mansard_ir::eval::{Step, Value};
use mansard_ir::plan::Kernel;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Blocks of the grid, a launch each.
const BLOCKS: [usize; SCHEDULES.len()] = [3, 1, 2, 5];

/// Launches of a kernel that was tried on another step before.
const AGAIN: usize = 2;

thread_local! {
    /// Host code of kernels that this thread has emulated, by their text.
    static KNOWN: RefCell<BTreeMap<String, Rc<Code>>> = const { RefCell::new(BTreeMap::new()) };
}

/// Launches a kernel on the addresses of its arguments, the step last.
///
/// # Errors
/// What threads do wrong.
pub fn launch(code: &Code, slots: &[u64], blocks: u32, schedule: Schedule) -> Result<(), String> {
    // SAFETY: tests lay out the arguments as the calling convention says, and keep them while the launch runs.
    unsafe { code.launch(slots, blocks, schedule) }
}

/// Launches a kernel as it stands in `source`; its code is kept for the next time.
///
/// # Errors
/// What threads do wrong.
pub fn launch_source(source: &Source, slots: &[u64], blocks: u32, schedule: Schedule) -> Result<(), String> {
    launch(&known(source).0, slots, blocks, schedule)
}

/// The host code of a kernel, and whether it was there already.
fn known(source: &Source) -> (Rc<Code>, bool) {
    if let Some(code) = KNOWN.with_borrow(|known| known.get(&source.text).cloned()) {
        return (code, true);
    }
    let code = Rc::new(Code::new(source));
    KNOWN.with_borrow_mut(|known| known.insert(source.text.clone(), Rc::clone(&code)));
    (code, false)
}

/// Runs a kernel as it stands in `source` and hands what it computed to `compare`.
///
/// # Errors
/// What threads do wrong, or what `compare` says.
pub fn run(
    kernel: &Kernel,
    source: &Source,
    inputs: &[Given],
    step: &Step,
    compare: &dyn Fn(&[Value]) -> Result<(), String>,
) -> Result<(), String> {
    let (code, is_known) = known(source);
    let launches = if is_known { AGAIN } else { SCHEDULES.len() };
    let mut launched = Ok(());
    let call = |runs: &mut [(Vec<Memory>, usize)], arrays: &mut StepArrays| {
        let args = arrays.args();
        launched = runs.iter_mut().zip(SCHEDULES).try_for_each(|((memories, blocks), schedule)| {
            let mut slots: Vec<u64> = memories.iter_mut().map(|m| m.address() as u64).collect();
            slots.push(std::ptr::from_ref(&args) as u64);
            launch(&code, &slots, *blocks as u32, schedule)
        });
    };
    let found = run_with(kernel, inputs, step, &BLOCKS[..launches], call);
    launched?;
    BLOCKS.iter().zip(SCHEDULES).zip(found).try_for_each(|((blocks, schedule), found)| {
        compare(&found).map_err(|difference| format!("{blocks} blocks, {schedule:?}: {difference}"))
    })
}
