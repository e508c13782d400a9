//! Register tiles: how many tokens and strips are multiplied at once.

use super::{CACHE_TILE_BYTES, Dot};
use mansard_ir::Target;
use mansard_ir::layout::StripLayout;

/// Tokens and strips of a register tile.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Activation rows.
    pub tokens: usize,
    /// Strips of 16 output rows.
    pub strips: usize,
}

/// Register tiles in order of use: the first for full tiles, the others for what is left.
///
/// A lone token reads four streams of float weights at once, which hides the page walks of file mappings; an integer matrix
/// is read fastest as the one stream it is. With 32 registers, floats get 24 accumulators, over as many contractions as
/// share the tile (12 tokens x 2 strips, or 12 x 1 of gate and up); integers 8 x 1, since every accumulator has an integer
/// one beside it.
pub fn shapes(target: &Target, dots: &[Dot], most: usize) -> Vec<Shape> {
    let wide = target.wide_registers() >= 32;
    let integer = dots.iter().any(|d| d.dtype.int().is_some());
    let joined = dots.len();
    let shared = dots.first().is_some_and(|first| dots.iter().all(|d| first.shares_tile(d)));
    let main = match (wide, integer) {
        (true, true) => Shape { tokens: 8, strips: 1 },
        (true, false) if shared => Shape { tokens: 24 / joined.clamp(2, 6), strips: if joined == 1 { 2 } else { 1 } },
        (true, false) => Shape { tokens: 12, strips: 2 },
        (false, true) => Shape { tokens: 2, strips: 1 },
        (false, false) if shared => Shape { tokens: (4 / joined).max(1), strips: 1 },
        (false, false) => Shape { tokens: 4, strips: 1 },
    };
    let lone = Shape { tokens: 1, strips: if integer { 1 } else { (4 / joined).max(1) } };
    if most == 1 || main.tokens == 1 {
        return vec![lone];
    }
    let mut shapes = vec![main];
    let mut tokens = main.tokens.next_power_of_two() / 2;
    while tokens > 1 {
        if tokens < main.tokens && (most > tokens / 2) {
            shapes.push(Shape { tokens, strips: if integer { 1 } else { 2.min(main.strips) } });
        }
        tokens /= 2;
    }
    shapes.push(lone);
    shapes.retain(|s| s.tokens <= most.next_power_of_two());
    shapes
}

/// Strips of a cache tile: their weights stay in the second-level cache while all tokens pass.
///
/// The next tile of floats comes in meanwhile, so each takes half the room; but since every tile reads all activations
/// again, rather four strips, up to half as much more.
pub fn cache_tile(dots: &[Dot]) -> usize {
    let bytes: usize = dots.iter().map(|d| StripLayout::new(d.dtype, d.k).bytes).sum();
    let fitting = |room: usize| room / bytes.max(1);
    if dots.iter().any(|d| d.dtype.int().is_some()) {
        return fitting(CACHE_TILE_BYTES).max(1);
    }
    fitting(CACHE_TILE_BYTES / 2).max(fitting(CACHE_TILE_BYTES * 3 / 2).min(4)).max(1)
}
