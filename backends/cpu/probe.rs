//! Loops that are as fast as a machine can be, for `mansard probe` and the roofline of `mansard bench`.
//!
//! ```text
//! read       acc ^= buffer[..]                     lines of several streams, asked for ahead of use: the fastest form counts
//! f32 ...    acc[strip][row] += w[k][strip] * x[row][k]    a register tile as contractions have it, from the first-level cache
//!            C += A . B                                    on matrix units, where there are any: four tiles of sums
//! ```
//!
//! A loop is a kernel of the usual calling convention. Its first argument is a buffer of `t` times [`PROBE_UNIT`] bytes,
//! divided among the workers; the second has 64 bytes for each worker to leave a result in; `r` is how often to do it all.
//! Products take what they multiply from the first [`PANEL_UNITS`] of a worker's share.

use super::dot::amx::{self, Operands};
use super::dot::isa::dot4;
use super::{StepField, step_field};
use crate::emit::{BF16, Emitter, F32, I8, I32, KernelArgs, Val};
use crate::link::Image;
use crate::machine::Peak;
use mansard_ir::layout::STRIP;
use mansard_ir::target::PROBE_UNIT;
use mansard_ir::{Result, Target};

/// Units of its share that a worker's products read: 8 kB of weights, and activations.
pub const PANEL_UNITS: usize = 10;

/// Lines of weights in a panel, for each strip.
const STEPS: usize = 32;

/// Most bytes of weights in a panel.
const WEIGHT_BYTES: usize = 8 << 10;

/// Lines that a round of a read takes, over all streams.
const LINES: usize = 16;

/// What a loop does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loop {
    /// Reads the buffer in so many streams a worker, each line asked for so many bytes ahead.
    Read {
        /// 1, 2, 4...: a share is a multiple of as many units.
        streams: usize,
        /// 0: hardware alone looks ahead.
        ahead: usize,
    },
    /// Products of f32, bf16 or int8.
    Products(Peak),
}

/// Loops as machine code, in the order of the image's entries.
#[derive(Clone, Debug)]
pub struct Loops {
    /// What each does.
    pub loops: Vec<Loop>,
    /// Their code.
    pub image: Image,
    target: Target,
}

impl Loops {
    /// Every loop that `target` can run.
    ///
    /// # Errors
    /// None that is expected.
    pub fn new(target: &Target) -> Result<Loops> {
        let loops = loops(target);
        let names: Vec<String> = (0..loops.len()).map(|i| format!("loop_{i}")).collect();
        let text: String = names.iter().zip(&loops).map(|(name, l)| l.emit(name, target)).collect();
        let mut image = crate::assemble("probe", &text, target)?;
        image.entries.sort_by_key(|(name, _)| names.iter().position(|n| n == name));
        Ok(Loops { loops, image, target: target.clone() })
    }

    /// Operations of one worker in a round of products; a multiply-add is two.
    pub fn operations(&self, peak: Peak) -> f64 {
        let products = match units(&self.target, peak) {
            Some(operands) => operands.products(),
            None => {
                let (strips, rows) = tile(&self.target);
                STRIP * depth(peak) * strips * rows
            }
        };
        (2 * products * STEPS) as f64
    }
}

/// Loops that `target` has instructions for.
pub fn loops(target: &Target) -> Vec<Loop> {
    let reads = [(1, 0), (4, 0), (1, 4 << 10), (2, 4 << 10), (4, 2 << 10), (4, 8 << 10)];
    let mut loops: Vec<Loop> = reads.into_iter().map(|(streams, ahead)| Loop::Read { streams, ahead }).collect();
    loops.extend([Peak::F32, Peak::I8].map(Loop::Products));
    if target.computes_bf16() {
        loops.push(Loop::Products(Peak::Bf16));
    }
    loops
}

/// Strips and rows of the register tile: accumulators enough to hide latency, and room for weights and an activation.
fn tile(target: &Target) -> (usize, usize) {
    if target.wide_registers() >= 32 { (4, 6) } else { (1, 5) }
}

/// What matrix units multiply at that precision, where there are any.
fn units(target: &Target, peak: Peak) -> Option<Operands> {
    match peak {
        Peak::Bf16 => target.has("amx-bf16").then_some(Operands::Pairs),
        Peak::I8 => target.has("amx-int8").then_some(Operands::Codes(64)),
        _ => None,
    }
}

/// Products that one lane adds up at once.
fn depth(peak: Peak) -> usize {
    match peak {
        Peak::I8 => 4,
        Peak::Bf16 => 2,
        _ => 1,
    }
}

impl Loop {
    /// The loop as an MLIR function.
    pub fn emit(self, name: &str, target: &Target) -> String {
        let (mut e, k) = Emitter::function(name, target);
        let rounds = step_field(&mut e, k, StepField::R);
        let units = step_field(&mut e, k, StepField::T);
        let (begin, end) = e.share(k, units);
        let buffer = e.arg(k, 0);
        let buffer = e.row(buffer, begin, PROBE_UNIT);
        let units = e.sub(end, begin);
        let results = match self {
            Loop::Read { streams, ahead } => read(&mut e, buffer, units, rounds, (streams, ahead)),
            Loop::Products(peak) => products(&mut e, target, buffer, rounds, peak),
        };
        leave(&mut e, k, &results);
        e.finish()
    }
}

/// Reads `units` units from `buffer`, so many rounds.
fn read(e: &mut Emitter, buffer: Val, units: Val, rounds: Val, (streams, ahead): (usize, usize)) -> Vec<Val> {
    let count = e.i64(streams as i64);
    let each = e.div(units, count);
    let bytes = e.scaled(each, PROBE_UNIT, 0);
    let mut starts = vec![buffer];
    for s in 1..streams {
        starts.push(e.gep(starts[s - 1], bytes));
    }
    let (zero, one, step) = (e.i64(0), e.i64(1), e.i64((64 * LINES / streams) as i64));
    let (ahead_by, sums) = (e.i64(ahead as i64), vec![e.int(I32.x(STRIP), 0); 4]);
    e.for_loop((zero, rounds, one), &sums, |e, _, sums| {
        e.for_loop((zero, bytes, step), sums, |e, at, sums| {
            let mut sums = sums.to_vec();
            let starts: Vec<Val> = starts.iter().map(|start| e.gep(*start, at)).collect();
            for i in 0..LINES {
                let line = e.gep_const(starts[i % streams], 64 * (i / streams));
                if ahead > 0 {
                    e.prefetch(line, ahead_by, 1);
                }
                let line = e.load(line, I32.x(STRIP), 64);
                sums[i % 4] = e.xor(sums[i % 4], line);
            }
            sums
        })
    })
}

/// A register tile of weights of a panel's strips times its rows, so many rounds.
fn products(e: &mut Emitter, target: &Target, panel: Val, rounds: Val, peak: Peak) -> Vec<Val> {
    if let Some(operands) = units(target, peak) {
        return vec![amx::peak(e, operands, panel, rounds, STEPS)];
    }
    let (strips, rows) = tile(target);
    let sum = if peak == Peak::I8 { e.int(I32.x(STRIP), 0) } else { e.float(F32.x(STRIP), 0.0) };
    let (zero, one, steps) = (e.i64(0), e.i64(1), e.i64(STEPS as i64));
    let activations = e.gep_const(panel, WEIGHT_BYTES);
    e.for_loop((zero, rounds, one), &vec![sum; strips * rows], |e, _, sums| {
        e.for_loop((zero, steps, one), sums, |e, k, sums| {
            let mut sums = sums.to_vec();
            let weights = e.row(panel, k, 64 * strips);
            let weights: Vec<Val> = (0..strips).map(|s| line(e, weights, 64 * s, peak)).collect();
            let x = e.row(activations, k, 4);
            for r in 0..rows {
                let x = e.gep_const(x, 4 * STEPS * r);
                let x = spread(e, x, peak);
                for (s, w) in weights.iter().enumerate() {
                    let sum = &mut sums[s * rows + r];
                    *sum = match peak {
                        Peak::I8 => dot4(e, target, 4, *sum, *w, x),
                        Peak::Bf16 => e.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", &[*sum, *w, x], sum.ty),
                        _ => e.fma(*w, x, *sum),
                    };
                }
            }
            sums
        })
    })
}

/// 64 bytes of weights.
fn line(e: &mut Emitter, weights: Val, offset: usize, peak: Peak) -> Val {
    let at = e.gep_const(weights, offset);
    let ty = match peak {
        Peak::I8 => I8.x(4 * STRIP),
        Peak::Bf16 => BF16.x(2 * STRIP),
        _ => F32.x(STRIP),
    };
    e.load(at, ty, 64)
}

/// The 32 bits of activations at `x` in every lane.
fn spread(e: &mut Emitter, x: Val, peak: Peak) -> Val {
    let value = e.load(x, if peak == Peak::F32 { F32 } else { I32 }, 4);
    let value = e.broadcast(value, STRIP);
    match peak {
        Peak::I8 => e.bitcast(value, I8.x(4 * STRIP)),
        Peak::Bf16 => e.bitcast(value, BF16.x(2 * STRIP)),
        _ => value,
    }
}

/// Leaves something of every result, so that all of them are computed.
fn leave(e: &mut Emitter, k: KernelArgs, results: &[Val]) {
    let mut all = results[0];
    for result in &results[1..] {
        all = e.add(all, *result);
    }
    let out = e.arg(k, 1);
    let out = e.row(out, k.thread, 64);
    e.store(all, out, 64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_loops() {
        for target in crate::targets(&crate::target::names()).unwrap() {
            let loops = Loops::new(&target).unwrap();
            assert_eq!(loops.image.entries.len(), loops.loops.len(), "{}", target.name);
            assert!(loops.loops.contains(&Loop::Products(Peak::I8)), "{}", target.name);
        }
    }

    #[test]
    fn a_panel_holds_what_products_read() {
        let (strips, rows) = tile(&crate::target("x86-64-v4").unwrap());
        assert!(64 * strips * STEPS <= WEIGHT_BYTES);
        assert!(WEIGHT_BYTES + 4 * STEPS * rows <= PANEL_UNITS * PROBE_UNIT);
        const { assert!(Operands::PEAK_BYTES <= PANEL_UNITS * PROBE_UNIT) };
    }
}
