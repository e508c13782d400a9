//! Reals -> figures of k-quants, whose groups' scales and minima are small integers times two f16 of the block.
//!
//! ```text
//! q4_k, q5_k   d, dmin | eight 6-bit scales, eight 6-bit minima       real = d * scale * code - dmin * min
//! q6_k         sixteen 8-bit scales | d                               real = d * scale * (code - 32)
//! ```
//!
//! Each group's own best figures come first; the block's `d` puts the largest of them on the largest integer. Minima must not
//! lie above zero: where they would, the group is fitted without one. Source of the layouts: the `ggml` quantization reference.

use super::{Reals, round, scales, top};
use crate::formats::{IntFormat, Zero};
use half::f16;

/// Largest 6-bit integer.
const SIX: f32 = 63.0;

/// Of `q4_k` and `q5_k`: scales and minima.
pub fn pairs(reals: Reals<'_>, int: IntFormat, out: &mut [u8]) {
    let (mut wanted, mut most) = ([(0f32, 0f32); 8], (0f32, 0f32));
    for (wanted, group) in wanted.iter_mut().zip(reals.groups(int.group)) {
        let (mut scale, min) = scales::with_minimum(group, int);
        if min > 0.0 || scale == 0.0 {
            // Without a minimum, or all alike: the largest on the largest code; all alike and below zero: the minimum alone.
            scale = group.values.iter().fold(0f32, |most, x| most.max(*x)) / top(int);
        }
        *wanted = (scale, (-min).max(0.0));
        most = (most.0.max(wanted.0), most.1.max(wanted.1));
    }
    let (d, dmin) = (f16::from_f32(most.0 / SIX), f16::from_f32(most.1 / SIX));
    out[..2].copy_from_slice(&d.to_le_bytes());
    out[2..4].copy_from_slice(&dmin.to_le_bytes());
    let packed = &mut out[4..16];
    packed.fill(0);
    for (g, (scale, min)) in wanted.into_iter().enumerate() {
        let (scale, min) = (six(scale, d), six(min, dmin));
        if g < 4 {
            packed[g] |= scale;
            packed[g + 4] |= min;
        } else {
            packed[g + 4] |= scale & 15 | min << 4;
            packed[g - 4] |= scale >> 4 << 6;
            packed[g] |= min >> 4 << 6;
        }
    }
}

/// The nearest 6-bit multiple of `unit`.
fn six(x: f32, unit: f16) -> u8 {
    let unit = unit.to_f32();
    if unit > 0.0 { round((x / unit).clamp(0.0, SIX)) as u8 } else { 0 }
}

/// Of `q6_k`: scales, which may be negative.
pub fn singles(reals: Reals<'_>, int: IntFormat, out: &mut [u8]) {
    let mut wanted = [0f32; 16];
    for (wanted, group) in wanted.iter_mut().zip(reals.groups(int.group)) {
        *wanted = scales::of_group(group, IntFormat { zero: Zero::Fixed(32), ..int }).0;
    }
    let most = wanted.iter().fold(0f32, |most, x| if x.abs() > most.abs() { *x } else { most });
    // The side with one integer more takes the largest scale.
    let d = f16::from_f32(most / -128.0);
    let inverse = if d.to_f32() == 0.0 { 0.0 } else { 1.0 / d.to_f32() };
    for (byte, scale) in out[192..208].iter_mut().zip(wanted) {
        *byte = round((scale * inverse).clamp(-128.0, 127.0)) as i8 as u8;
    }
    out[208..210].copy_from_slice(&d.to_le_bytes());
}
