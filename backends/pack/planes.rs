//! A matrix in two planes -> packed bytes ([`mansard_ir::planes`]): strips of upper codes, then rows of lower ones.

use super::{Codes, Sink, put_halves, put_quads_of_row, stream};
use mansard_ir::formats::DType;
use mansard_ir::layout::STRIP;
use mansard_ir::model::Weight;
use mansard_ir::planes::{GROUP, PlanesLayout, SplitRow};
use mansard_ir::{Error, Kind, Place, Result};

/// Packs a matrix of `n` rows.
pub(super) fn pack(weight: &Weight, n: usize, threads: usize, sink: &mut Sink<'_>) -> Result<()> {
    let (_, k) = weight.rows_columns();
    let layout = PlanesLayout::new(k);
    let planes = TwoPlanes { weight, n, k, layout };
    let strips = n.div_ceil(STRIP);
    stream(strips, layout.strip_bytes, threads, sink, &|first, out| planes.upper(first, out))?;
    stream(strips, STRIP * layout.row_bytes, threads, sink, &|first, out| planes.lower(first, out))?;
    sink(&vec![0; layout.lower_bytes(n) - strips * STRIP * layout.row_bytes])
}

struct TwoPlanes<'a> {
    weight: &'a Weight,
    n: usize,
    k: usize,
    layout: PlanesLayout,
}

impl TwoPlanes<'_> {
    /// Rows `first..`, of which there may be fewer than memory for them.
    fn rows(&self, first: usize, most: usize, mut take: impl FnMut(usize, SplitRow) -> Result<()>) -> Result<()> {
        for row in first..self.n.min(first + most) {
            let place = || format!("row {row}");
            take(row - first, SplitRow::of(self.weight, row).at(place)?).at(place)?;
        }
        Ok(())
    }

    /// Strips of the first plane from strip `first` on.
    fn upper(&self, first: usize, out: &mut [u8]) -> Result<()> {
        let int = DType::Q4_0.int().ok_or_else(|| Error::new(Kind::Internal, "q4_0 has no integer view"))?;
        let mut codes = Codes::new(DType::Q4_0, int, self.k);
        for (strip, out) in (first..).zip(out.chunks_exact_mut(self.layout.strip_bytes)) {
            out.fill(0);
            codes.quads.fill(0);
            self.rows(strip * STRIP, STRIP, |r, split| {
                codes.row.iter_mut().zip(&split.codes).for_each(|(to, code)| *to = code >> 4);
                codes.scales.copy_from_slice(&split.scales);
                put_quads_of_row(&mut codes.quads, r, &codes.row);
                out[self.layout.spreads() + 4 * r..][..4].copy_from_slice(&split.spread.to_le_bytes());
                codes.put_scales(r, &self.layout.strip, out)
            })?;
            codes.put_codes(&self.layout.strip, out);
        }
        Ok(())
    }

    /// Rows of the second plane, 16 at a time, from the rows of strip `first` on.
    fn lower(&self, first: usize, out: &mut [u8]) -> Result<()> {
        out.fill(0);
        let bytes = self.layout.row_bytes;
        self.rows(first * STRIP, out.len() / bytes, |r, split| {
            let out = &mut out[r * bytes..][..bytes];
            put_halves(&split.scales, out, |group| 2 * group)?;
            for (group, out) in
                split.codes.chunks_exact(GROUP).zip(out[self.layout.codes..].chunks_exact_mut(GROUP / 2))
            {
                let (low, high) = group.split_at(GROUP / 2);
                out.iter_mut().zip(low.iter().zip(high)).for_each(|(out, (l, h))| *out = l & 15 | h << 4);
            }
            Ok(())
        })
    }
}
