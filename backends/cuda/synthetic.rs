//! The kernel that makes weights up ([`mansard_ir::synthetic`]), as MLIR like every other.

use super::{PREAMBLE, Source, THREADS, ptx};
use crate::Layer;
use crate::emit::{Emitter, I32, I64};
use mansard_ir::plan::Kernel;
use mansard_ir::synthetic::KERNEL;
use mansard_ir::{Graph, Result, TokenRange};

/// Its function: word after word, a thread every so many.
pub fn emit() -> Source {
    let kernel =
        Kernel { name: KERNEL.into(), body: Graph::new(KERNEL), range: TokenRange { min: 1, max: 1 }, groups: vec![] };
    let (mut e, k, pointers) = Emitter::device(&kernel, 2, (THREADS, false));
    let (out, pattern, figures) = (pointers[0], pointers[1], k.step);
    let [words, period, seed] = [0, 8, 16].map(|at| {
        let at = e.gep_const(figures, at);
        e.load(at, I64, 8)
    });
    let (threads, thread) = (e.i64(THREADS as i64), e.thread());
    let (before, step) = (e.mul(k.thread, threads), e.mul(k.threads, threads));
    let first = e.add(before, thread);
    e.for_loop((first, words, step), &[], |e, index, _| {
        let mut z = e.add(seed, index);
        let factor = e.i64(0x9e37_79b9_7f4a_7c15_u64.cast_signed());
        z = e.mul(z, factor);
        for (bits, factor) in [(30, 0xbf58_476d_1ce4_e5b9_u64), (27, 0x94d0_49bb_1331_11eb)] {
            let (shifted, factor) = (e.shr(z, bits), e.i64(factor.cast_signed()));
            z = e.xor(z, shifted);
            z = e.mul(z, factor);
        }
        let shifted = e.shr(z, 31);
        z = e.xor(z, shifted);
        let upper = e.shr(z, 32);
        let random = e.convert("trunci", upper, I32);
        let entry = e.rem(index, period);
        let entry = e.row(pattern, entry, 8);
        let mask = e.load(entry, I32, 4);
        let value = e.gep_const(entry, 4);
        let value = e.load(value, I32, 4);
        let masked = e.and(random, mask);
        let word = e.or(masked, value);
        let at = e.row(out, index, 4);
        e.store(word, at, 4);
        vec![]
    });
    let shared_bytes = e.shared_bytes();
    Source { text: e.finish(), shared_bytes }
}

/// Its PTX, which every GPU takes that other code is made for.
///
/// # Errors
/// None that is expected.
pub fn text() -> Result<String> {
    let text = format!("{PREAMBLE}{}", emit().text);
    Ok(String::from_utf8_lossy(&ptx::lower(&text, ptx::CHIPS[0], Layer::Asm)?).trim_end_matches('\0').to_owned())
}
