//! The same kernels as GPUs run them, emulated: every schedule is another run, with a grid of its own.

use super::{Given, Memory, StepArrays, run_with};
use crate::cuda::{self, emulator};
use mansard_ir::eval::{Step, Value};
use mansard_ir::plan::Kernel;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

thread_local! {
    /// Host code of kernels that this thread has emulated, by their text.
    static KNOWN: RefCell<BTreeMap<String, Rc<emulator::Code>>> = const { RefCell::new(BTreeMap::new()) };
}

/// Runs a kernel and hands what it computed to `compare`, with words about where.
pub fn check(kernel: &Kernel, inputs: &[Given], step: &Step, compare: &dyn Fn(&[Value], &str)) {
    let source = cuda::emit(kernel).unwrap_or_else(|e| panic!("{e}"));
    let known = KNOWN.with_borrow(|known| known.get(&source.text).cloned());
    let code = known.unwrap_or_else(|| {
        let code = Rc::new(emulator::Code::new(&source));
        KNOWN.with_borrow_mut(|known| known.insert(source.text.clone(), Rc::clone(&code)));
        code
    });
    let blocks = [3, 1, 2, 5];
    let call = |runs: &mut [(Vec<Memory>, usize)], arrays: &mut StepArrays| {
        let args = arrays.args();
        for ((memories, blocks), schedule) in runs.iter_mut().zip(emulator::SCHEDULES) {
            let mut slots: Vec<u64> = memories.iter_mut().map(|m| m.address() as u64).collect();
            slots.push(std::ptr::from_ref(&args) as u64);
            // SAFETY: the arguments are those of the calling convention, the step last, and outlive the launch.
            let launched = unsafe { code.launch(&slots, *blocks as u32, schedule) };
            launched.unwrap_or_else(|fault| panic!("`{}`: {fault}", kernel.name));
        }
    };
    for ((blocks, schedule), found) in
        blocks.iter().zip(emulator::SCHEDULES).zip(run_with(kernel, inputs, step, &blocks, call))
    {
        compare(&found, &format!("emulated, {blocks} blocks, {schedule:?}"));
    }
}
