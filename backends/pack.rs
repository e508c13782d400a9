//! Weights -> packed bytes, in the order that kernels read them ([`mansard_ir::layout`]).
//!
//! ```text
//!  rows of the model file --16 at a time--> one strip: chunks of scales | minima | upper bits | codes   (quantized formats)
//!                                                      k lines of 16 values                   (f32, f16)
//!                                                      k / 2 lines of 16 pairs                (bf16)
//! ```
//!
//! Quantized rows keep their codes; scales and minima (or zero points) become f16. A weight may be stored otherwise than its type says: its
//! reals are rounded or quantized on the way. Invariants: never more than a few
//! megabytes of a weight are in memory, the bytes do not depend on the number of threads, and rows beyond the last are zero.

mod planes;

use half::{bf16, f16};
use mansard_ir::formats::{IntFormat, Split};
use mansard_ir::layout::{ALIGN, STRIP, StripLayout, aligned, code_bytes, high_bytes};
use mansard_ir::model::Weight;
use mansard_ir::quantize::can_quantize;
use mansard_ir::{DType, Place, Result, bail};

/// Bytes that are packed before they are handed on.
const CHUNK: usize = 4 << 20;

/// Takes packed bytes, in order.
pub type Sink<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

/// Packs a weight.
///
/// # Errors
/// Where rows cannot be read, hold what their packed form cannot, or the sink fails.
pub fn pack(weight: &Weight, threads: usize, sink: &mut Sink<'_>) -> Result<()> {
    let (dtype, shape) = weight.dtype_shape();
    let [outer @ .., n, k] = shape.as_slice() else {
        return pack_vector(weight, sink);
    };
    let (matrices, n, k) = (outer.iter().product::<usize>(), *n, *k);
    let packer = Packer::new(weight, dtype, n, k)?;
    if dtype == DType::Q8_PLANES {
        return planes::pack(weight, n, threads, sink);
    }
    let fill = |first: usize, out: &mut [u8]| packer.strips(first, out);
    stream(matrices * n.div_ceil(STRIP), packer.layout.bytes, threads, sink, &fill)
}

/// Fills `strips` strips of so many bytes each, some megabytes at a time, and hands them on.
fn stream(
    strips: usize,
    bytes: usize,
    threads: usize,
    sink: &mut Sink<'_>,
    fill: &(dyn Fn(usize, &mut [u8]) -> Result<()> + Sync),
) -> Result<()> {
    if strips == 0 || bytes == 0 {
        return Ok(());
    }
    let per_chunk = (CHUNK / bytes).max(threads).min(strips);
    let (mut ready, mut filling) = (vec![], vec![0u8; per_chunk * bytes]);
    for first in (0..strips).step_by(per_chunk) {
        let count = per_chunk.min(strips - first);
        filling.resize(count * bytes, 0);
        let packed = std::thread::scope(|scope| {
            let share = count.div_ceil(threads.max(1));
            let mut workers = vec![];
            for (worker, part) in filling.chunks_mut(share * bytes).enumerate() {
                workers.push(scope.spawn(move || fill(first + worker * share, part)));
            }
            // The sink takes the last chunk while workers pack this one.
            let sunk = if ready.is_empty() { Ok(()) } else { sink(&ready) };
            let join = |w: std::thread::ScopedJoinHandle<'_, Result<()>>| w.join().unwrap_or_else(resume);
            sunk.and_then(|()| workers.into_iter().try_for_each(join))
        });
        packed?;
        std::mem::swap(&mut ready, &mut filling);
    }
    sink(&ready)
}

/// A worker's panic goes on in the thread that waits for it.
fn resume(panic: Box<dyn std::any::Any + Send>) -> Result<()> {
    std::panic::resume_unwind(panic)
}

/// `[n]`: f32, padded to 16.
fn pack_vector(weight: &Weight, sink: &mut Sink<'_>) -> Result<()> {
    let mut bytes: Vec<u8> = weight.read_all()?.iter().flat_map(|x| x.to_le_bytes()).collect();
    bytes.resize(aligned(bytes.len()), 0);
    sink(&bytes)
}

/// Packs strips of one weight.
struct Packer<'a> {
    weight: &'a Weight,
    dtype: DType,
    /// Rows of each matrix.
    n: usize,
    k: usize,
    layout: StripLayout,
}

impl<'a> Packer<'a> {
    fn new(weight: &'a Weight, dtype: DType, n: usize, k: usize) -> Result<Packer<'a>> {
        if !k.is_multiple_of(dtype.format().block) {
            bail!(Input, "rows of {k} do not fill whole quant blocks of {dtype}");
        }
        match dtype.in_file().int() {
            Some(_) if !weight.stored_as(dtype.in_file()) && !can_quantize(dtype.in_file()) => {
                bail!(Unsupported, "{} is not stored as {dtype}, and nothing is quantized to that", weight.ty)
            }
            None if !dtype.is_float() => bail!(Internal, "{dtype} is no format of weights"),
            _ => {}
        }
        Ok(Packer { weight, dtype, n, k, layout: StripLayout::new(dtype, k) })
    }

    /// Fills `out`, whole strips, from strip `first` on.
    fn strips(&self, first: usize, out: &mut [u8]) -> Result<()> {
        let per_matrix = self.n.div_ceil(STRIP);
        let mut rows = match self.dtype.int() {
            Some(int) => Rows::Codes(Codes::new(self.dtype, int, self.k)),
            None => Rows::Reals(vec![0.0; STRIP * self.k]),
        };
        for (strip, out) in (first..).zip(out.chunks_exact_mut(self.layout.bytes)) {
            let (matrix, first) = (strip / per_matrix, strip % per_matrix * STRIP);
            let (row, count) = (matrix * self.n + first, STRIP.min(self.n - first));
            out.fill(0);
            match &mut rows {
                Rows::Codes(codes) => self.quantized(codes, row, count, out)?,
                Rows::Reals(reals) => self.floats(reals, row, count, out)?,
            }
        }
        Ok(())
    }

    fn quantized(&self, codes: &mut Codes, first: usize, count: usize, out: &mut [u8]) -> Result<()> {
        codes.quads.fill(0);
        for r in 0..count {
            codes.read(r, &self.weight.quantized_row(first + r)?).at(|| format!("row {}", first + r))?;
            codes.put_scales(r, &self.layout, out).at(|| format!("row {}", first + r))?;
        }
        codes.put_codes(&self.layout, out);
        Ok(())
    }

    fn floats(&self, reals: &mut [f32], first: usize, count: usize, out: &mut [u8]) -> Result<()> {
        reals[count * self.k..].fill(0.0);
        for (r, row) in reals.chunks_exact_mut(self.k).take(count).enumerate() {
            self.weight.read_row(first + r, row).at(|| format!("row {}", first + r))?;
        }
        match self.dtype {
            DType::F16 => interleave(reals, self.k, out, |x| f16::from_f32(x).to_le_bytes()),
            DType::BF16 => interleave_pairs(reals, self.k, out),
            _ => interleave(reals, self.k, out, f32::to_le_bytes),
        }
        Ok(())
    }
}

/// What one strip is made from.
enum Rows {
    Codes(Codes),
    /// `[16][k]`
    Reals(Vec<f32>),
}

/// `[16][k]` reals -> `[k][16]` values.
fn interleave<const N: usize>(reals: &[f32], k: usize, out: &mut [u8], convert: impl Fn(f32) -> [u8; N]) {
    for (i, line) in out.chunks_exact_mut(STRIP * N).take(k).enumerate() {
        for (r, out) in line.as_chunks_mut::<N>().0.iter_mut().enumerate() {
            *out = convert(reals[r * k + i]);
        }
    }
}

/// `[16][k]` reals -> `[k / 2][16][2]` bf16, a zero after an odd last column.
fn interleave_pairs(reals: &[f32], k: usize, out: &mut [u8]) {
    for (i, line) in out.chunks_exact_mut(2 * STRIP * 2).take(k.div_ceil(2)).enumerate() {
        for (r, out) in line.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let row = &reals[r * k..][..k];
            let bits = |i: usize| row.get(i).map_or(0, |x| u32::from(bf16::from_f32(*x).to_bits()));
            *out = (bits(2 * i) | bits(2 * i + 1) << 16).to_le_bytes();
        }
    }
}

/// Sixteen rows of codes and the scales of one.
struct Codes {
    dtype: DType,
    int: IntFormat,
    /// `[k / 4][16]`: four consecutive codes of a row, the first in the lowest byte.
    quads: Vec<u32>,
    row: Vec<u8>,
    scales: Vec<f32>,
    mins: Vec<f32>,
}

impl Codes {
    fn new(dtype: DType, int: IntFormat, k: usize) -> Codes {
        let groups = k / int.group;
        let quads = vec![0; k / 4 * STRIP];
        Codes { dtype, int, quads, row: vec![0; k], scales: vec![0.0; groups], mins: vec![0.0; groups] }
    }

    /// Takes the stored bytes of row `r` apart.
    fn read(&mut self, r: usize, bytes: &[u8]) -> Result<()> {
        let format = self.dtype.format();
        if self.dtype.bytes(self.row.len()) != Some(bytes.len()) {
            bail!(Input, "expected {} elements of {}, found {} bytes", self.row.len(), self.dtype, bytes.len());
        }
        let groups = format.block / self.int.group;
        let parts = self.row.chunks_exact_mut(format.block);
        let parts = parts.zip(self.scales.chunks_exact_mut(groups)).zip(self.mins.chunks_exact_mut(groups));
        for (bytes, ((codes, scales), mins)) in bytes.chunks_exact(format.block_bytes).zip(parts) {
            (format.split)(bytes, Split { codes, scales, mins });
        }
        put_quads_of_row(&mut self.quads, r, &self.row);
        Ok(())
    }

    /// Stores the scales and minima of the row last read.
    fn put_scales(&self, r: usize, layout: &StripLayout, out: &mut [u8]) -> Result<()> {
        let at = |offset, group| layout.figures_at(offset, self.int, group) + 2 * r;
        put_halves(&self.scales, out, |group| at(layout.scales, group))?;
        if self.int.zero.has_mins() {
            put_halves(&self.mins, out, |group| at(layout.mins, group))?;
        }
        Ok(())
    }

    /// Stores the codes of all rows.
    fn put_codes(&self, layout: &StripLayout, out: &mut [u8]) {
        let int = self.int;
        let units = self.quads.chunks_exact(STRIP * int.unit() / 4); // [unit / 4][16] of each unit
        for (unit, quads) in units.enumerate() {
            let codes = &mut out[layout.codes_at(int, unit)..][..code_bytes(int)];
            if int.bits == 8 {
                put_quads(codes, quads.iter().copied());
            } else {
                let (low, high) = quads.split_at(quads.len() / 2);
                let nibbles = |(a, b): (&u32, &u32)| a & 0x0f0f_0f0f | (b & 0x0f0f_0f0f) << 4;
                put_quads(codes, low.iter().zip(high).map(nibbles));
            }
            let high = &mut out[layout.high_at(int, unit)..][..high_bytes(int)];
            match int.bits {
                5 => put_fifth_bits(quads, high),
                6 => put_bits_4_and_5(quads, high),
                _ => {}
            }
        }
    }
}

/// Row `r` of `[k / 4][16]` quads from its codes.
fn put_quads_of_row(quads: &mut [u32], r: usize, row: &[u8]) {
    for (quads, codes) in quads.chunks_exact_mut(STRIP).zip(row.as_chunks::<4>().0) {
        quads[r] = u32::from_le_bytes(*codes);
    }
}

fn put_quads(out: &mut [u8], quads: impl Iterator<Item = u32>) {
    for (out, quad) in out.as_chunks_mut::<4>().0.iter_mut().zip(quads) {
        *out = quad.to_le_bytes();
    }
}

/// One 64-bit word a quad: bit `row * 4 + i`.
fn put_fifth_bits(quads: &[u32], out: &mut [u8]) {
    for (quad, out) in quads.chunks_exact(STRIP).zip(out.as_chunks_mut::<8>().0) {
        // The product gathers bits 0, 8, 16 and 24 in bits 24 to 27.
        let four = |codes: u32| u64::from((codes >> 4 & 0x0101_0101).wrapping_mul(0x0102_0408) >> 24 & 15);
        let word = quad.iter().enumerate().fold(0, |word, (r, codes)| word | four(*codes) << (4 * r));
        *out = word.to_le_bytes();
    }
}

/// One line for four quads: quad `c` at bits `2 c` of byte `row * 4 + i`.
fn put_bits_4_and_5(quads: &[u32], out: &mut [u8]) {
    for (quads, line) in quads.chunks_exact(4 * STRIP).zip(out.chunks_exact_mut(4 * STRIP)) {
        let bits = |r: usize| (0..4).fold(0, |bits, c| bits | (quads[c * STRIP + r] >> 4 & 0x0303_0303) << (2 * c));
        put_quads(line, (0..STRIP).map(bits));
    }
}

/// The value of each group as f16, at the byte that `at` gives for it.
fn put_halves(values: &[f32], out: &mut [u8], at: impl Fn(usize) -> usize) -> Result<()> {
    for (group, x) in values.iter().enumerate() {
        let half = f16::from_f32(*x);
        if !half.is_finite() {
            bail!(Input, "a group's scale or minimum of {x} does not fit f16");
        }
        out[at(group)..][..2].copy_from_slice(&half.to_le_bytes());
    }
    Ok(())
}

const _: () = assert!(ALIGN == 4 * STRIP, "a line holds one quad of every row of a strip");

#[cfg(test)]
#[path = "pack_tests.rs"]
mod tests;
