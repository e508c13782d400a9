//! Pooling on a GPU: a block takes the mean over a sequence's tokens, a column a thread, then row programs follow.

use super::Device;
use super::rows::{emit_row, put_real, real_at};
use crate::cpu::pool::{Parts, parts};
use crate::cpu::rows::walk::load_index;
use crate::cpu::{StepField, step_field};
use crate::emit::{Cmp, Emitter, F32};
use mansard_ir::Result;

/// Emits a `pool` kernel.
pub(super) fn emit(e: &mut Emitter, d: Device<'_>) -> Result<()> {
    let body = &d.kernel.body;
    let Parts { pooled, x, bytes, nodes } = parts(body)?;
    let base = d.pointer(x)?;
    let own = e.shared(bytes);
    let count = step_field(e, d.k, StepField::S);
    let sequences = step_field(e, d.k, StepField::Sequences);
    let mut result = Ok(());
    e.for_loop((d.k.thread, count, d.k.threads), &[], |e, sequence, _| {
        let to = match d.memory[pooled.0 as usize] {
            Some(buffer) => e.row(buffer, sequence, bytes),
            None => own,
        };
        let record = e.row(sequences, sequence, 8);
        let (zero, one) = (e.i64(0), e.i64(1));
        let (first, count) = (load_index(e, record, zero), load_index(e, record, one));
        let end = e.add(first, count);
        let some = e.cmp(Cmp::Gt, count, one);
        let divisor = e.select(some, count, one);
        let divisor = e.convert("sitofp", divisor, F32);
        let width = body.ty(x).row_width().unwrap_or(0);
        e.strided(width, |e, column| {
            let nothing = e.float(F32, 0.0);
            let sum = e.for_loop((first, end, one), &[nothing], |e, token, sum| {
                let row = e.row(base, token, bytes);
                let x = real_at(e, row, column);
                vec![e.add(sum[0], x)]
            })[0];
            let mean = e.div(sum, divisor);
            put_real(e, mean, to, column);
        });
        e.barrier();
        result = emit_row(e, d.k, body, &nodes, &d.memory, &[(pooled, to)], sequence);
        // Others may still read what the next sequence replaces.
        e.barrier();
        vec![]
    });
    result
}
