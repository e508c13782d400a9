//! Experts: each token's row times the matrices of the experts it was routed to.

use super::{Contraction, Place, internal};
use crate::cpu::dot::{self, Rows};
use crate::cpu::{StepField, step_field};
use crate::emit::{Emitter, Val};
use mansard_ir::layout::{A8, STRIP, StripLayout, row_bytes};
use mansard_ir::{Result, Type, bail};
use std::collections::BTreeMap;

impl Contraction<'_> {
    /// Experts: every chosen pair (token, j) against its expert's strips, one row at a time.
    pub(super) fn emit_experts(&self, e: &mut Emitter) -> Result<()> {
        let component = self.component;
        if !component.n.is_multiple_of(STRIP) {
            bail!(Unsupported, "experts with {} output rows: a multiple of {STRIP} is needed", component.n);
        }
        let strips = e.i64((component.n / STRIP) as i64);
        let (low, high) = e.share(self.k, strips);
        let routing = component.dots[0].routing.ok_or_else(|| internal(self.body))?;
        let Type::Routing { top, .. } = *self.body.ty(routing) else { return Err(internal(self.body)) };
        let tokens = step_field(e, self.k, StepField::T);
        let ids = self.pointer(routing)?;
        let stride = row_bytes(self.body.ty(routing)).ok_or_else(|| internal(self.body))?;
        let zero = e.i64(0);
        let mut result = Ok(());
        e.repeat(low, high, 1, |e, strip| {
            e.repeat(zero, tokens, 1, |e, token| {
                for j in 0..top {
                    let at = e.row(ids, token, stride);
                    let at = e.gep_const(at, 4 * j);
                    let expert = e.load(at, crate::emit::I32, 4);
                    let expert = e.op(crate::emit::I64, format_args!("arith.extui {expert} : i32 to i64"));
                    if result.is_ok() {
                        result = self.expert_row(e, (token, j), expert, strip);
                    }
                }
            });
        });
        result
    }

    fn expert_row(&self, e: &mut Emitter, (token, j): (Val, usize), expert: Val, strip: Val) -> Result<()> {
        let n = self.component.n;
        let mut products = BTreeMap::new();
        for dot in &self.component.dots {
            let bytes = StripLayout::new(dot.dtype, dot.k).bytes;
            let weight = self.pointer(dot.weight)?;
            let weight = e.row(weight, expert, n / STRIP * bytes);
            let strip = e.row(weight, strip, bytes);
            let ty = self.body.ty(dot.x);
            let stride = row_bytes(ty).ok_or_else(|| internal(self.body))?;
            let x = self.pointer(dot.x)?;
            let x = e.row(x, token, stride);
            // Rows [t, top, k] hold the j-th expert's activations one after another.
            let own = ty.as_tensor().is_some_and(|(_, shape)| shape.len() == 3);
            let planes = ty.as_tensor().and_then(|(d, _)| d.planes());
            let width = planes.map_or(dot.k * 4, |planes| dot.k / A8::GROUP * A8::LINE * planes);
            let first = e.gep_const(x, if own { j * width } else { 0 });
            let rows = Rows { first, stride, count: 1, planes: dot.planes };
            products.insert(dot.value, dot::tile(e, self.target, dot.dtype, dot.k, &[strip], rows)[0]);
        }
        let (offset, column) = (e.scaled(strip, STRIP * 4, j * n * 4), e.scaled(strip, STRIP * 4, 0));
        self.epilogue(e, products, Place { first: token, row: 0, offset, column })
    }
}
