//! Reals -> 4-bit floats (e2m1), whose scales have few bits themselves.
//!
//! ```text
//! mxfp4   scale = 2^e, per 32                                      amax 5 --> 2^0: 5 -> 4 or 6;  2^1: 5 -> 2 * 2 or 2 * 3
//! nvfp4   scale = e4m3 * outer, per 16; outer = amax / (6 * 448)    outer is one f32 for the reals given together: a row
//! ```
//!
//! The two scales that put a group's largest value just below and just above the largest code are tried; the one of less
//! squared error is taken. Scales are stored halved, since codes are read as twice their value ([`E2M1`]).
//! Sources: OCP Microscaling Formats (MX) Specification 1.0, section 6.3; NVIDIA, "Pretraining Large Language Models with
//! NVFP4", appendix B.

use super::Reals;
use crate::formats::{E2M1, E4M3_TOP, IntFormat, e4m3, to_e4m3};

/// Largest value of e2m1.
const TOP: f32 = 6.0;

/// What e4m3 scales are multiples of, such that the largest is right for the largest of `reals`.
pub fn outer_scale(reals: &[f32]) -> f32 {
    largest(reals) / (TOP * E4M3_TOP)
}

/// Halved scales of the first and last group of a block (the same, where it has one group).
pub fn scales(block: Reals<'_>, int: IntFormat) -> (f32, f32) {
    let of = |reals: Reals<'_>| 0.5 * if int.group == 32 { power_of_two(reals) } else { multiple_of(reals) };
    let mut scales = block.groups(int.group).map(of);
    let first = scales.next().unwrap_or(0.0);
    (first, scales.last().unwrap_or(first))
}

/// The code of twice a value: ties go to the code with an even mantissa.
pub fn nearest(twice: f32) -> u8 {
    let magnitude = twice.abs();
    // Midway between neighbours; odd codes lose a tie on either side.
    let upto = [0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0];
    let above = |(code, bound): (usize, &f32)| if code % 2 == 0 { magnitude > *bound } else { magnitude >= *bound };
    let code = upto.iter().enumerate().filter(|at| above(*at)).count() as u8;
    if twice < 0.0 && code > 0 { code | 8 } else { code }
}

fn power_of_two(reals: Reals<'_>) -> f32 {
    let most = largest(reals.values);
    if most == 0.0 {
        return 0.0;
    }
    let scale = (most.log2().floor() - 2.0).exp2();
    better(reals, scale, 2.0 * scale)
}

fn multiple_of(reals: Reals<'_>) -> f32 {
    let (most, outer) = (largest(reals.values), reals.outer);
    if most == 0.0 || outer == 0.0 {
        return 0.0;
    }
    let near = |top: f32| nearest_e4m3(most / top / outer) * outer;
    better(reals, near(TOP), near(4.0))
}

/// The nearest value of e4m3.
fn nearest_e4m3(x: f32) -> f32 {
    e4m3(to_e4m3(x))
}

fn largest(reals: &[f32]) -> f32 {
    reals.iter().fold(0.0, |most, x| most.max(x.abs()))
}

/// Of two scales the one of less squared error.
fn better(reals: Reals<'_>, a: f32, b: f32) -> f32 {
    let error = |scale: f32| -> f32 {
        let half = 0.5 * scale;
        let off = |x: &f32| (x - half * f32::from(E2M1[usize::from(nearest(x / half))])).powi(2);
        reals.values.iter().zip(reals.importance).map(|(x, weight)| weight * off(x)).sum()
    };
    if a > 0.0 && error(a) <= error(b) { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_values() {
        for (code, twice) in E2M1.iter().enumerate().filter(|(code, _)| *code != 8) {
            assert_eq!(usize::from(nearest(f32::from(*twice))), code);
        }
        // Beyond the largest; ties: 5 / 2 lies between codes 4 (2.0) and 5 (3.0).
        assert_eq!([nearest(99.0), nearest(-99.0), nearest(5.0), nearest(-0.4), nearest(0.5)], [7, 15, 4, 0, 0]);
        assert_eq!([449.0, 1.0, 17.0, 19.0, 0.003].map(nearest_e4m3), [448.0, 1.0, 16.0, 20.0, 0.00390625]);
    }
}
