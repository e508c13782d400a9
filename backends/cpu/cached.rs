//! How caches store keys and values: elements of a cache block <-> lanes of f32.
//!
//! ```text
//! f32, f16, bf16, fp8   as they are
//! i8                    codes, and a scale for each head of a position
//! i4                    the same, of keys a scale and a middle for each dim of a cache block; a byte holds dims d (low four
//!                       bits) and d + 16 of 32 neighbours
//! ```

use crate::emit::{Emitter, F16, F32, I1, I8, I16, I32, Val};
use mansard_ir::{DType, Result, bail};

/// How an element is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    F32,
    F16,
    Bf16,
    Fp8,
    /// An int8 code, with a scale for each head of a position: see [`mansard_ir::layout::cache_scales`].
    Code,
    /// An int4 code, likewise; of keys with a scale and a middle for each dim of a cache block.
    Nibble,
}

/// Where neighbouring elements are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At {
    /// The first one's byte.
    pub(crate) byte: Val,
    /// Its first bit there.
    pub(crate) bit: i64,
}

impl Stored {
    /// # Errors
    /// Where no cache is stored so.
    pub(crate) fn of(dtype: DType) -> Result<Stored> {
        match dtype {
            DType::F32 => Ok(Stored::F32),
            DType::F16 => Ok(Stored::F16),
            DType::BF16 => Ok(Stored::Bf16),
            DType::FP8 => Ok(Stored::Fp8),
            DType::I8 => Ok(Stored::Code),
            DType::I4 => Ok(Stored::Nibble),
            other => bail!(Unsupported, "a cache of {other}"),
        }
    }

    /// Bytes that no element shares with its neighbours.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Stored::F32 => 4,
            Stored::F16 | Stored::Bf16 => 2,
            Stored::Fp8 | Stored::Code | Stored::Nibble => 1,
        }
    }

    /// Elements that share those.
    pub(crate) fn sharing(self) -> usize {
        if self == Stored::Nibble { 2 } else { 1 }
    }

    pub(crate) fn has_scales(self) -> bool {
        matches!(self, Stored::Code | Stored::Nibble)
    }

    /// Neighbouring elements as f32; codes without their scales.
    pub(crate) fn load(self, e: &mut Emitter, At { byte, bit }: At, lanes: usize, align: usize) -> Val {
        match self {
            Stored::F32 => e.load(byte, F32.x(lanes), align),
            Stored::F16 => load_halves(e, byte, lanes, align),
            Stored::Bf16 => {
                let narrow = e.load(byte, I16.x(lanes), align);
                let bits = e.convert("extui", narrow, I32);
                let bits = e.shl(bits, 16);
                e.convert("bitcast", bits, F32)
            }
            Stored::Fp8 => {
                // An f16 of the same mantissa, whose exponent counts from 2^-8 below; its denormals are e4m3's.
                let narrow = e.load(byte, I8.x(lanes), align);
                let bits = e.convert("extsi", narrow, I16);
                let (bits, sign_and_rest) = (e.shl(bits, 7), e.int(I16.x(lanes), 0xbfff_u16 as i16 as i64));
                let bits = e.and(bits, sign_and_rest);
                let half = e.convert("bitcast", bits, F16);
                let (wide, scale) = (e.convert("extf", half, F32), e.float(F32.x(lanes), 256.0));
                e.mul(wide, scale)
            }
            Stored::Code | Stored::Nibble => {
                let codes = e.load(byte, I8.x(lanes), align);
                let mut codes = e.convert("extsi", codes, I32);
                if self == Stored::Nibble {
                    codes = if bit == 0 { e.shl(codes, 28) } else { codes };
                    codes = e.sar(codes, if bit == 0 { 28 } else { 4 });
                }
                e.convert("sitofp", codes, F32)
            }
        }
    }

    /// Scales of neighbouring positions.
    pub(crate) fn load_scales(self, e: &mut Emitter, scales: Val, first: usize, lanes: usize) -> Val {
        let at = e.gep_const(scales, first * self.scale_bytes());
        match self {
            Stored::Nibble => load_halves(e, at, lanes, lanes.max(1) * 2),
            _ => e.load(at, F32.x(lanes), lanes.max(1) * 4),
        }
    }

    pub(crate) fn scale_bytes(self) -> usize {
        if self == Stored::Nibble { 2 } else { 4 }
    }

    /// f32 as elements, ties to even; codes of a scale, int4 ones in the lower bits of a byte each.
    pub(crate) fn narrow(self, e: &mut Emitter, x: Val, scale: Option<Val>) -> Val {
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
            (Stored::Fp8, _) => to_e4m3(e, x),
            (Stored::Code | Stored::Nibble, scale) => {
                let scale = scale.unwrap_or_else(|| e.float(F32, 1.0));
                let scale = e.broadcast(scale, x.ty.lanes);
                let q = e.div(x, scale);
                let q = e.math("roundeven", q);
                // Scales too small for full precision can put a quotient beyond the last code.
                let (low, high) = if self == Stored::Code { (-127.0, 127.0) } else { (-8.0, 7.0) };
                let (low, high, zero) = (e.float(q.ty, low), e.float(q.ty, high), e.float(q.ty, 0.0));
                let q = e.max(q, low);
                let q = e.min(q, high);
                let some = e.op(I1.x(q.ty.lanes), format_args!("arith.cmpf une, {scale}, {zero} : {}", q.ty));
                let q = e.select(some, q, zero);
                let codes = e.convert("fptosi", q, I32);
                e.convert("trunci", codes, I8)
            }
        }
    }

    /// The scale of a head whose values lie between `least` and `most`, as an f32.
    pub(crate) fn scale(self, e: &mut Emitter, least: Val, most: Val) -> Val {
        let below = e.neg(least);
        if self == Stored::Code {
            let (most, by) = (e.max(below, most), e.float(F32, 127.0));
            return e.div(most, by);
        }
        let above = e.op(I1, format_args!("arith.cmpf oge, {most}, {below} : {}", most.ty));
        let (furthest, by) = (e.select(above, most, least), e.float(F32, -8.0));
        let scale = e.div(furthest, by);
        let half = e.convert("truncf", scale, F16);
        e.convert("extf", half, F32)
    }

    /// Stores a scale.
    pub(crate) fn store_scale(self, e: &mut Emitter, scale: Val, to: Val) {
        let scale = if self == Stored::Nibble { e.convert("truncf", scale, F16) } else { scale };
        e.store(scale, to, self.scale_bytes());
    }
}

/// Scale and middle of the int4 codes of a line of keys that lies between `least` and `most`, f16 values as f32.
pub(crate) fn channel(e: &mut Emitter, least: Val, most: Val) -> (Val, Val) {
    let round = |e: &mut Emitter, x: Val| {
        let half = e.convert("truncf", x, F16);
        e.convert("extf", half, F32)
    };
    let (spread, by, eight) = (e.sub(most, least), e.float(F32, 15.0), e.float(F32, 8.0));
    let scale = e.div(spread, by);
    let scale = round(e, scale);
    let middle = e.fma(scale, eight, least);
    (scale, round(e, middle))
}

/// Scales and middles, `middles` bytes further on, of neighbouring dims of int4 keys.
pub(crate) fn load_channels(e: &mut Emitter, scales: Val, middles: usize, lanes: usize, align: usize) -> [Val; 2] {
    [0, middles].map(|offset| {
        let at = e.gep_const(scales, offset);
        load_halves(e, at, lanes, align)
    })
}

fn load_halves(e: &mut Emitter, at: Val, lanes: usize, align: usize) -> Val {
    let narrow = e.load(at, F16.x(lanes), align);
    e.convert("extf", narrow, F32)
}

/// As [`mansard_ir::formats::to_e4m3`]: adding 2^20 times the exponent's power leaves the mantissa, rounded, in the last bits.
fn to_e4m3(e: &mut Emitter, x: Val) -> Val {
    let lanes = x.ty.lanes;
    let (magnitude, most) = (e.math("absf", x), e.float(x.ty, 448.0));
    let magnitude = e.min(magnitude, most);
    let bits = e.convert("bitcast", magnitude, I32);
    let exponent = e.shr(bits, 23);
    let least = e.int(I32.x(lanes), 127 - 6);
    let exponent = e.max(exponent, least);
    let up = e.int(I32.x(lanes), 20);
    let anchor = e.add(exponent, up);
    let anchor = e.shl(anchor, 23);
    let large = e.convert("bitcast", anchor, F32);
    let sum = e.add(magnitude, large);
    let sum = e.convert("bitcast", sum, I32);
    let steps = e.sub(sum, anchor);
    let exponent = e.sub(exponent, least);
    let exponent = e.shl(exponent, 3);
    let code = e.add(exponent, steps);
    let sign = e.convert("bitcast", x, I32);
    let (sign, only) = (e.shr(sign, 24), e.int(I32.x(lanes), 128));
    let sign = e.and(sign, only);
    let code = e.or(code, sign);
    e.convert("trunci", code, I8)
}
