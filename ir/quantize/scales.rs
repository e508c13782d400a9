//! One group of reals -> the scale (and minimum, or zero point) of least squared error, each real weighing as its importance.
//!
//! A group's largest value need not be met: a few scales around that one are tried, up to some that clip it, each is replaced
//! by the least-squares scale for the codes it gives, and the best of them is taken. Sums are taken in 16 lanes, in one
//! order: the same reals give the same bytes everywhere.

use super::{Reals, round, top};
use crate::formats::{E4M3_TOP, E4M3_UNIT, IntFormat, Zero, e4m3, to_e4m3};

/// Lanes that sums are taken in.
const LANES: usize = 16;

/// Scale, and minimum or zero point (0 where the zero point is fixed).
pub fn of_group(reals: Reals<'_>, int: IntFormat) -> (f32, f32) {
    match int.zero {
        Zero::Fixed(zero) => (symmetric(reals, int, zero), 0.0),
        Zero::Point => with_zero_point(reals, int),
        Zero::E4M3 => (of_floats(reals), 0.0),
        Zero::Min | Zero::E2M1 => with_minimum(reals, int),
    }
}

/// How far beyond the codes the largest value may lie, in steps; smaller steps matter less where there are many codes.
fn candidates(int: IntFormat) -> impl Iterator<Item = f32> {
    let (first, step, count) = if int.bits <= 5 { (-1.0, 0.5, 9) } else { (-0.5, 0.5, 4) };
    (0..count).map(move |i| first + step * i as f32)
}

/// `real = scale * q / 256` with 8-bit floats `q`: the largest value becomes one of the last few of these, since only where
/// values lie between two powers of two is left to choose.
fn of_floats(reals: Reals<'_>) -> f32 {
    const TOPS: [f32; 4] = [E4M3_TOP, 384.0, 320.0, 256.0];
    let largest = reals.values.iter().fold(0f32, |most, x| most.max(x.abs()));
    let error = |scale: f32| -> f32 {
        let off = |(x, weight): (&f32, &f32)| weight * (x - scale * e4m3(to_e4m3(x / scale))).powi(2);
        reals.values.iter().zip(reals.importance).map(off).sum()
    };
    let scales = TOPS.map(|top| largest / top).into_iter().filter(|scale| scale.is_normal());
    let best = scales.map(|scale| (error(scale), scale)).min_by(|a, b| a.0.total_cmp(&b.0));
    best.map_or(0.0, |(_, scale)| scale * E4M3_UNIT)
}

/// `real = scale * q` with `q` in `-zero ..= top - zero`.
fn symmetric(reals: Reals<'_>, int: IntFormat, zero: u8) -> f32 {
    // The side with one code more takes the largest value: the scale's sign is free.
    let largest = reals.values.iter().fold(0f32, |most, x| if x.abs() > most.abs() { *x } else { most });
    if largest == 0.0 {
        return 0.0;
    }
    let (low, high) = (-(zero as f32), top(int) - zero as f32);
    let (mut best, mut scale) = (0.0, 0.0);
    for beyond in candidates(int) {
        let inverse = (low - beyond) / largest;
        let (mut xq, mut qq) = ([0f32; LANES], [0f32; LANES]);
        for (x, weight) in reals.lines() {
            for i in 0..LANES {
                let q = round((x[i] * inverse).clamp(low, high));
                xq[i] += weight[i] * x[i] * q;
                qq[i] += weight[i] * q * q;
            }
        }
        let (xq, qq) = (sum(xq), sum(qq));
        // Squared error: sum of x^2 - xq^2 / qq.
        if xq * xq > best * qq {
            (best, scale) = (xq * xq / qq, xq / qq);
        }
    }
    scale
}

/// `real = scale * q + min` with `q` in `0 ..= top`.
pub fn with_minimum(reals: Reals<'_>, int: IntFormat) -> (f32, f32) {
    let (low, high) = reals.values.iter().fold((f32::MAX, f32::MIN), |(low, high), x| (low.min(*x), high.max(*x)));
    if low == high {
        return (0.0, low);
    }
    let mut best = (f32::MAX, ((high - low) / top(int), low));
    for beyond in candidates(int) {
        let steps = top(int) + beyond;
        let inverse = steps / (high - low);
        // What is clipped is clipped at both ends.
        let from = low + beyond.max(0.0) / 2.0 / inverse;
        let [mut n, mut sq, mut qq, mut sx, mut xq, mut xx] = [[0f32; LANES]; 6];
        for (x, weight) in reals.lines() {
            for i in 0..LANES {
                let q = round(((x[i] - from) * inverse).clamp(0.0, top(int)));
                let (x, w) = (x[i] - low, weight[i]); // differences of like figures below
                (n[i], sq[i], qq[i]) = (n[i] + w, sq[i] + w * q, qq[i] + w * q * q);
                (sx[i], xq[i], xx[i]) = (sx[i] + w * x, xq[i] + w * x * q, xx[i] + w * x * x);
            }
        }
        let [n, sq, qq, sx, xq, xx] = [n, sq, qq, sx, xq, xx].map(sum);
        let determinant = n * qq - sq * sq;
        if determinant > 0.0 {
            let scale = (n * xq - sx * sq) / determinant;
            let min = (sx - scale * sq) / n;
            let error = xx - scale * xq - min * sx;
            if error < best.0 {
                best = (error, (scale, min + low));
            }
        }
    }
    best.1
}

/// `real = scale * (q - zero)`, an integer `zero` in `0 ..= top`: near [`with_minimum`] where that lies near zero.
fn with_zero_point(reals: Reals<'_>, int: IntFormat) -> (f32, f32) {
    let (scale, min) = with_minimum(reals, int);
    if (-scale * top(int)..=0.0).contains(&min) && scale > 0.0 {
        return (scale, round(-min / scale));
    }
    let (low, high) = reals.values.iter().fold((0f32, 0f32), |(low, high), x| (low.min(*x), high.max(*x)));
    let scale = (high - low) / top(int);
    (scale, if scale > 0.0 { round(-low / scale) } else { 0.0 })
}

impl<'a> Reals<'a> {
    /// Reals and their importance, lane by lane.
    fn lines(self) -> impl Iterator<Item = (&'a [f32; LANES], &'a [f32; LANES])> {
        self.values.as_chunks().0.iter().zip(self.importance.as_chunks().0)
    }
}

/// By halves: the same order everywhere.
fn sum(lanes: [f32; LANES]) -> f32 {
    let mut lanes = lanes;
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}
