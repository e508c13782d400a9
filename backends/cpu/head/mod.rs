//! The vocabulary projection in two planes: estimates from the first, then the second where it can matter.
//!
//! ```text
//! estimate   streams the first plane: e = x w1, stored, and for every 16 rows a bound that is hardly exceeded
//! rescore    step.candidates = k:  the k largest e are made exact, the least is the threshold; rows that may reach it: e += x w2
//!            step.candidates = 0:  both planes, 16 rows at a time, joined on the stack to the strip of q8_0 they came from
//! ```
//!
//! Layouts are those of [`mansard_ir::planes`].

pub mod estimate;
mod join;
pub mod rescore;
mod row;
#[cfg(test)]
mod tests;

use crate::emit::{Cmp, Emitter, F32, I1, I8, I32, Val};
use mansard_ir::layout::{A8, STRIP, row_bytes};
use mansard_ir::plan::Kernel;
use mansard_ir::planes::PlanesLayout;
use mansard_ir::{DType, Dim, Error, Kind, Result, Type, ValueId};

/// Rows of activations that are multiplied together.
const PANEL: usize = 8;

/// Planes of the activations.
pub(crate) const PLANES: usize = 2;

/// The matrix and the rows of a kernel.
#[derive(Clone, Copy)]
pub(crate) struct Projection {
    /// Address of the packed matrix.
    pub(crate) w: Val,
    /// Address of the activations.
    pub(crate) x: Val,
    /// Bytes from row to row of the activations.
    pub(crate) x_bytes: usize,
    /// Rows of the matrix.
    pub(crate) n: usize,
    /// Its columns.
    pub(crate) k: usize,
    pub(crate) layout: PlanesLayout,
}

impl Projection {
    pub(crate) fn new(kernel: &Kernel, memory: &[Option<Val>], x: ValueId, w: ValueId) -> Result<Projection> {
        let body = &kernel.body;
        let parts = (memory[x.0 as usize], memory[w.0 as usize], row_bytes(body.ty(x)), body.ty(w).as_tensor());
        match parts {
            (Some(x), Some(w), Some(x_bytes), Some((DType::Q8_PLANES, [Dim::N(n), Dim::N(k)]))) => {
                Ok(Projection { w, x, x_bytes, n: *n, k: *k, layout: PlanesLayout::new(*k) })
            }
            _ => Err(broken(kernel)),
        }
    }

    pub(crate) fn strips(&self) -> usize {
        self.n.div_ceil(STRIP)
    }

    pub(crate) fn groups(&self) -> usize {
        self.k / A8::GROUP
    }

    /// Address of row `row` of the activations.
    pub(crate) fn row(&self, e: &mut Emitter, row: Val) -> Val {
        e.row(self.x, row, self.x_bytes)
    }

    /// Address of strip `strip` of the first plane.
    pub(crate) fn strip(&self, e: &mut Emitter, strip: Val) -> Val {
        e.row(self.w, strip, self.layout.strip_bytes)
    }

    /// Address of row `row` of the second plane.
    pub(crate) fn lower_row(&self, e: &mut Emitter, row: Val) -> Val {
        let lower = e.gep_const(self.w, self.layout.upper_bytes(self.n));
        e.row(lower, row, self.layout.row_bytes)
    }
}

pub(crate) fn broken(kernel: &Kernel) -> Error {
    Error::new(Kind::Internal, format!("`{}` is no projection over a matrix in two planes", kernel.name))
}

/// Bytes from row to row of a kernel's f32 value.
fn stride(ty: &Type) -> usize {
    row_bytes(ty).unwrap_or(0)
}

/// Calls `visit` for all `rows` rows: [`PANEL`] at a time, then the smallest power of two that covers the rest. Never more
/// than `most`.
pub(crate) fn panels(e: &mut Emitter, rows: Val, most: usize, mut visit: impl FnMut(&mut Emitter, Val, usize)) {
    let sizes = [PANEL, 4, 2, 1].into_iter().filter(|size| *size < 2 * most.max(1));
    let (zero, panel) = (e.i64(0), e.i64(PANEL as i64));
    let rest = e.rem(rows, panel);
    let full = e.sub(rows, rest);
    if most >= PANEL {
        e.repeat(zero, full, PANEL as i64, |e, first| visit(e, first, PANEL));
    }
    for size in sizes {
        let (above, upto) = (e.i64(size as i64 / 2), e.i64(size as i64));
        let (fits, small) = (e.cmp(Cmp::Gt, rest, above), e.cmp(Cmp::Le, rest, upto));
        let here = e.and(fits, small);
        e.when(here, |e| visit(e, full, size));
    }
}

/// `a >= b` of floats.
fn at_least(e: &mut Emitter, a: Val, b: Val) -> Val {
    e.op(I1.x(a.ty.lanes), format_args!("arith.cmpf oge, {a}, {b} : {}", a.ty))
}

/// `a > b` of floats.
fn above(e: &mut Emitter, a: Val, b: Val) -> Val {
    e.op(I1.x(a.ty.lanes), format_args!("arith.cmpf ogt, {a}, {b} : {}", a.ty))
}

/// Sixteen int8 codes as f32.
fn reals(e: &mut Emitter, at: Val) -> Val {
    let codes = e.load(at, I8.x(STRIP), 16);
    let codes = e.convert("extsi", codes, I32);
    e.convert("sitofp", codes, F32)
}

/// The f32 at `x + offset` in so many lanes.
fn splat(e: &mut Emitter, x: Val, offset: usize, lanes: usize) -> Val {
    let at = e.gep_const(x, offset);
    let value = e.load(at, F32, 4);
    e.broadcast(value, lanes)
}
