//! Pooling: the mean over each sequence's tokens, then row programs on it. Workers share the sequences.
//!
//! ```text
//! for sequence: sum = 0; for token: sum += x[token]; sum *= 1 / tokens; then e.g. l2_normalize as a row program
//! ```

use super::rows::{emit_row, walk};
use super::{StepField, step_field};
use crate::emit::{Cmp, Emitter, F32, Val};
use mansard_ir::layout::row_bytes;
use mansard_ir::ops::Class;
use mansard_ir::plan::Kernel;
use mansard_ir::{Error, Graph, Kind, Result, Target, ValueId};

/// Emits a `pool` kernel.
///
/// # Errors
/// Where the body does not begin with a pooling, or a node after it has no code.
pub fn emit(kernel: &Kernel, target: &Target) -> Result<String> {
    let body = &kernel.body;
    let (mut e, k) = Emitter::kernel(kernel, target);
    let memory = super::memory(&mut e, k, body);
    let Parts { pooled, x, bytes, nodes } = parts(body)?;
    let rows = Pooling { x: memory[x.0 as usize].ok_or_else(|| broken(body))?, bytes };
    let scratch = e.stack(rows.bytes);
    let count = step_field(&mut e, k, StepField::S);
    let (low, high) = e.share(k, count);
    let sequences = step_field(&mut e, k, StepField::Sequences);
    let mut result = Ok(());
    e.repeat(low, high, 1, |e, sequence| {
        let to = match memory[pooled.0 as usize] {
            Some(buffer) => e.row(buffer, sequence, rows.bytes),
            None => scratch,
        };
        rows.mean(e, sequences, sequence, to);
        result = emit_row(e, k, body, &nodes, &memory, &[(pooled, to)], sequence);
    });
    result?;
    Ok(e.finish())
}

/// What a kernel of pooling is made of.
pub(crate) struct Parts {
    pub(crate) pooled: ValueId,
    /// What is pooled, and bytes from row to row of it.
    pub(crate) x: ValueId,
    pub(crate) bytes: usize,
    /// What follows.
    pub(crate) nodes: Vec<ValueId>,
}

/// The parts of a kernel's body.
pub(crate) fn parts(body: &Graph) -> Result<Parts> {
    let pools = |v: &ValueId| body.node(*v).is_some_and(|n| n.op.class() == Class::Pool);
    let (pooled, nodes): (Vec<ValueId>, Vec<ValueId>) = body.computed().into_iter().partition(pools);
    let Some((pooled, node)) = pooled.last().and_then(|v| Some((*v, body.node(*v)?))) else { return Err(broken(body)) };
    let x = node.operands[0];
    Ok(Parts { pooled, x, bytes: row_bytes(body.ty(x)).ok_or_else(|| broken(body))?, nodes })
}

fn broken(body: &Graph) -> Error {
    Error::new(Kind::Internal, format!("`{}` is no pooling of rows in memory", body.name))
}

/// Rows to take the mean of.
struct Pooling {
    x: Val,
    /// Bytes from row to row.
    bytes: usize,
}

impl Pooling {
    /// The mean over a sequence's tokens, to the row at `to`.
    fn mean(&self, e: &mut Emitter, sequences: Val, sequence: Val, to: Val) {
        let record = e.row(sequences, sequence, 8);
        let (zero, one) = (e.i64(0), e.i64(1));
        let (first, count) = (walk::load_index(e, record, zero), walk::load_index(e, record, one));
        let end = e.add(first, count);
        let width = self.bytes / 4;
        walk::visit(e, width, &mut |e, chunk| {
            let nothing = e.float(F32.x(chunk.lanes), 0.0);
            chunk.store(e, nothing, to, 64);
        });
        e.repeat(first, end, 1, |e, token| {
            let x = e.row(self.x, token, self.bytes);
            walk::visit(e, width, &mut |e, chunk| {
                let (sum, x) = (chunk.load(e, to, 64), chunk.load(e, x, 64));
                let sum = e.add(sum, x);
                chunk.store(e, sum, to, 64);
            });
        });
        let some = e.cmp(Cmp::Gt, count, one);
        let divisor = e.select(some, count, one);
        let divisor = e.convert("sitofp", divisor, F32);
        walk::visit(e, width, &mut |e, chunk| {
            let sum = chunk.load(e, to, 64);
            let divisor = e.broadcast(divisor, chunk.lanes);
            let mean = e.div(sum, divisor);
            chunk.store(e, mean, to, 64);
        });
    }
}

#[cfg(test)]
mod tests {
    use crate::harness;

    #[test]
    fn means_of_sequences() {
        let step = [(0, 5), (0, 1), (0, 40), (0, 17)];
        for width in [20, 64, 384, 1040] {
            let text = format!(
                "graph @pool(%x: f32[t, {width}], %step: step[s]) stage planned when t = 1..512 {{ %m = mean_pool %x, %step \
                 %n = l2_normalize %m {{eps = 1e-12}} return n = %n }}"
            );
            harness::case(&text, &step, 2e-6);
            let text = format!(
                "graph @pool(%x: f32[t, {width}], %step: step[s]) stage planned when t = 1..512 {{ %m = mean_pool %x, %step \
                 %n = rms_normalize %m {{eps = 1e-6}} return n = %n, m = %m }}"
            );
            harness::case(&text, &step, 2e-6);
        }
        let text = "graph @pool(%x: f32[t, 64], %step: step[s]) stage planned when t = 1..512 { %m = mean_pool %x, %step \
                    return m = %m }";
        harness::case(text, &step, 2e-6);
    }
}
