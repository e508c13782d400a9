//! Codes of weights as bf16, for products with activations of bf16.

use super::super::weights::{self, Figures};
use crate::emit::{BF16, Emitter, F32, I32, Val};
use mansard_ir::formats::{IntFormat, Zero};

/// Two codes of a row that lie at bit `from` of a word, as a pair of bf16: `(code - zero) * scale`, with a minimum
/// `code * scale + min`.
pub(super) fn bf16_pair(e: &mut Emitter, int: IntFormat, (codes, from): (Val, i64), of: &Figures, row: usize) -> Val {
    // 2^23 has its lowest digit at 1: a byte there is an integer added to it, without a conversion.
    const UNIT: i64 = 0x4b00_0000;
    if int.zero == Zero::E4M3 {
        let codes = e.shr(codes, from);
        let [low, high, ..] = weights::reals_of_codes(e, int, codes).map(|code| e.mul(code, of.scales[row]));
        return rounded(e, [low, high]);
    }
    let (signed, zero) = weights::offset(int);
    let (codes, zero) = if signed {
        let flip = e.int(I32, 0x8080_8080_u32.cast_signed().into());
        (e.xor(codes, flip), 128.0)
    } else {
        (codes, f32::from(zero))
    };
    let [low, high] = [from, from + 8].map(|by| {
        let (byte, unit, low) = (e.shr(codes, by), e.int(I32, UNIT), e.int(I32, 255));
        let byte = e.and(byte, low);
        let real = e.or(byte, unit);
        let (real, offset) = (e.convert("bitcast", real, F32), e.float(F32, 8_388_608.0 + zero));
        let code = e.sub(real, offset);
        match &of.mins {
            Some(mins) => e.fma(code, of.scales[row], mins[row]),
            None => e.mul(code, of.scales[row]),
        }
    });
    rounded(e, [low, high])
}

/// Two reals as a pair of bf16.
fn rounded(e: &mut Emitter, [low, high]: [Val; 2]) -> Val {
    let both = e.intrinsic("llvm.nvvm.ff2bf16x2.rn", &[high, low], BF16.x(2));
    let word = e.bitcast(both, I32.x(1));
    e.extract(word, 0)
}
