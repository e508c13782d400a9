//! How caches store keys and values: elements of a cache block <-> lanes of f32.

use crate::emit::{Emitter, F16, F32, I1, I8, I16, I32, Val};
use mansard_ir::{DType, Result, bail};

/// Largest int8 code.
const MOST: f32 = 127.0;

/// How an element is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    F32,
    F16,
    Bf16,
    /// A code, with a scale for each head of a position: see [`mansard_ir::layout::cache_scales`].
    Code,
}

impl Stored {
    /// # Errors
    /// Where no cache is stored so.
    pub(super) fn of(dtype: DType) -> Result<Stored> {
        match dtype {
            DType::F32 => Ok(Stored::F32),
            DType::F16 => Ok(Stored::F16),
            DType::BF16 => Ok(Stored::Bf16),
            DType::I8 => Ok(Stored::Code),
            other => bail!(Unsupported, "a cache of {other}: f32, f16, bf16 or i8 is needed"),
        }
    }

    pub(super) fn bytes(self) -> usize {
        match self {
            Stored::F32 => 4,
            Stored::F16 | Stored::Bf16 => 2,
            Stored::Code => 1,
        }
    }

    /// Neighbouring elements as f32; codes without their scales.
    pub(super) fn load(self, e: &mut Emitter, at: Val, lanes: usize, align: usize) -> Val {
        match self {
            Stored::F32 => e.load(at, F32.x(lanes), align),
            Stored::F16 => {
                let narrow = e.load(at, F16.x(lanes), align);
                e.convert("extf", narrow, F32)
            }
            Stored::Bf16 => {
                let narrow = e.load(at, I16.x(lanes), align);
                let bits = e.convert("extui", narrow, I32);
                let bits = e.shl(bits, 16);
                e.convert("bitcast", bits, F32)
            }
            Stored::Code => {
                let codes = e.load(at, I8.x(lanes), align);
                let codes = e.convert("extsi", codes, I32);
                e.convert("sitofp", codes, F32)
            }
        }
    }

    /// f32 as elements, ties to even; codes of a scale.
    pub(super) fn narrow(self, e: &mut Emitter, x: Val, scale: Option<Val>) -> Val {
        match (self, scale) {
            (Stored::F32, _) => x,
            (Stored::F16, _) => e.convert("truncf", x, F16),
            (Stored::Bf16, _) => {
                let bits = e.convert("bitcast", x, I32);
                let (last, half, one) = (e.shr(bits, 16), e.int(bits.ty, 0x7fff), e.int(bits.ty, 1));
                let odd = e.and(last, one);
                let up = e.add(half, odd);
                let bits = e.add(bits, up);
                let bits = e.shr(bits, 16);
                e.convert("trunci", bits, I16)
            }
            (Stored::Code, scale) => {
                let scale = scale.unwrap_or_else(|| e.float(F32, 1.0));
                let scale = e.broadcast(scale, x.ty.lanes);
                let q = e.div(x, scale);
                let q = e.math("roundeven", q);
                // Scales too small for f32's full precision can put a quotient beyond the last code.
                let (low, high, zero) = (e.float(q.ty, -MOST), e.float(q.ty, MOST), e.float(q.ty, 0.0));
                let q = e.max(q, low);
                let q = e.min(q, high);
                let some = e.op(I1.x(q.ty.lanes), format_args!("arith.cmpf ogt, {scale}, {zero} : {}", q.ty));
                let q = e.select(some, q, zero);
                let codes = e.convert("fptosi", q, I32);
                e.convert("trunci", codes, I8)
            }
        }
    }

    /// The scale of a head whose largest magnitude is `most`.
    pub(super) fn scale(e: &mut Emitter, most: Val) -> Val {
        let by = e.float(most.ty, MOST);
        e.div(most, by)
    }
}
