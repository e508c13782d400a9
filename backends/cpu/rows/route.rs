//! Routing: softmax over the experts' scores and the top largest of them, the lower index first among equals.
//!
//! Scores are copied to the stack, padded with minus infinity. Each choice is one pass that keeps, lane by lane, the largest
//! score and where it stood; the chosen score then becomes minus infinity.

use super::Rows;
use super::schedule::width;
use super::walk::{self, LANES};
use crate::emit::{Cmp, Emitter, F32, I32, I64, Val};
use crate::math;
use mansard_ir::{Node, Result, Type, ValueId, bail};

impl Rows<'_> {
    /// Emits `route` for this row.
    pub(super) fn route(&self, e: &mut Emitter, v: ValueId, node: &Node) -> Result<()> {
        let Some(to) = self.destination(v) else { return Ok(()) };
        let from = self.row_of(node.operands[0])?;
        let experts = width(self.graph, node.operands[0])?;
        let Type::Routing { top, .. } = *self.graph.ty(v) else { bail!(Internal, "{v} is no routing") };
        let scores = copy_of(e, from, experts);
        let mut chosen = vec![];
        for j in 0..top {
            let (score, expert) = largest(e, scores, experts);
            let at = e.gep_const(to, 4 * j);
            let narrow = e.convert("trunci", expert, I32);
            e.store(narrow, at, 4);
            let at = e.row(scores, expert, 4);
            let gone = e.float(F32, f32::NEG_INFINITY);
            e.store(gone, at, 4);
            chosen.push(score);
        }
        let most = chosen[0];
        let exps: Vec<Val> = chosen
            .iter()
            .map(|score| {
                let below = e.sub(*score, most);
                math::exp(e, below)
            })
            .collect();
        let total = if node.attrs.bool("normalize") {
            exps.iter().copied().reduce(|a, b| e.add(a, b)).unwrap_or(most)
        } else {
            walk::sum(e, experts, &mut |e, chunk| {
                let x = chunk.load(e, from, 64);
                let most = e.broadcast(most, chunk.lanes);
                let below = e.sub(x, most);
                math::exp(e, below)
            })
        };
        for (j, exp) in exps.into_iter().enumerate() {
            let weight = e.div(exp, total);
            let at = e.gep_const(to, 4 * (top + j));
            e.store(weight, at, 4);
        }
        Ok(())
    }
}

fn copy_of(e: &mut Emitter, from: Val, experts: usize) -> Val {
    let padded = experts.next_multiple_of(LANES);
    let copy = e.stack(padded * 4);
    let last = e.gep_const(copy, (padded - LANES) * 4);
    let gone = e.float(F32.x(LANES), f32::NEG_INFINITY);
    e.store(gone, last, 64);
    walk::visit(e, experts, &mut |e, chunk| {
        let x = chunk.load(e, from, 64);
        chunk.store(e, x, copy, 64);
    });
    copy
}

/// The largest score and its index, an `i64` below `experts` whatever the scores are.
fn largest(e: &mut Emitter, scores: Val, experts: usize) -> (Val, Val) {
    let gone = e.float(F32.x(LANES), f32::NEG_INFINITY);
    let nowhere = e.int(I32.x(LANES), i32::MAX as i64);
    let lanes = e.sequence(I32.x(LANES));
    let best = walk::walk(e, experts.next_multiple_of(LANES), &[gone, nowhere], &mut |e, chunk, best| {
        let x = chunk.load(e, scores, 64);
        let first = chunk.index(e);
        let first = e.convert("trunci", first, I32);
        let first = e.broadcast(first, LANES);
        let index = e.add(first, lanes);
        let better = e.op(crate::emit::I1.x(LANES), format_args!("arith.cmpf ogt, {x}, {} : {}", best[0], x.ty));
        vec![e.select(better, x, best[0]), e.select(better, index, best[1])]
    });
    let most = e.reduce_max(best[0]);
    let all = e.broadcast(most, LANES);
    let equal = e.op(crate::emit::I1.x(LANES), format_args!("arith.cmpf oeq, {all}, {} : {}", best[0], all.ty));
    let index = e.select(equal, best[1], nowhere);
    let index = e.op(I32, format_args!("vector.reduction <minsi>, {index} : {} into i32", index.ty));
    let last = e.int(I32, experts as i64 - 1);
    let out = e.cmp(Cmp::Gt, index, last);
    let index = e.select(out, last, index);
    (most, e.convert("extsi", index, I64))
}
