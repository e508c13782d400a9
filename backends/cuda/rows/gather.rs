//! Rows found by index: of packed tables, of other values, and of angles.

use super::{Rows, put_real, real_at, weights};
use crate::cpu::rows::schedule::width;
use crate::emit::{Emitter, F32, Val};
use crate::math;
use mansard_ir::{DType, Dim, Node, Result, ValueId};

impl Rows<'_> {
    /// `embed`: row `tokens[t]` of a packed table, an element a thread.
    pub(super) fn embed(&self, e: &mut Emitter, v: ValueId, node: &Node) -> Result<()> {
        let Some(to) = self.destination(v) else { return Ok(()) };
        let (table, dtype) = (self.memory(node.operands[1])?, self.dtype(node.operands[1])?);
        let (k, token) = (width(self.graph, v)?, self.index(e, node.operands[0])?);
        let planes = match self.graph.ty(node.operands[1]).as_tensor() {
            Some((DType::Q8_PLANES, [Dim::N(n), _])) => Some(*n),
            _ => None,
        };
        let mut result = Ok(());
        e.strided(k, |e, column| {
            let element = match planes {
                Some(n) => Ok(weights::of_planes(e, table, (n, k), token, column)),
                None => weights::element(e, table, (dtype, k), token, column),
            };
            result = element.map(|x| put_real(e, x, to, column));
        });
        result
    }

    /// `rope_table`: cosines, then sines, of position times frequency.
    pub(super) fn angles(&self, e: &mut Emitter, v: ValueId, node: &Node) -> Result<()> {
        let Some(to) = self.destination(v) else { return Ok(()) };
        let (frequencies, half) = (self.memory(node.operands[1])?, width(self.graph, v)? / 2);
        let sines = e.gep_const(to, 4 * half);
        let position = self.index(e, node.operands[0])?;
        let position = e.convert("sitofp", position, F32);
        let scale = e.float(F32, node.attrs.float("scale") as f32);
        e.strided(half, |e, i| {
            let frequency = real_at(e, frequencies, i);
            let (cos, sin) = math::cos_sin_of_product(e, position, frequency);
            for (value, to) in [(cos, to), (sin, sines)] {
                let value: Val = e.mul(value, scale);
                put_real(e, value, to, i);
            }
        });
        Ok(())
    }
}
