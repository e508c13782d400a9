//! Register tiles: how many tokens and strips are multiplied at once.

use super::Dot;
use mansard_ir::Target;

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
/// is read fastest as the one stream it is. With 32 registers, float
/// weights get 12 x 2 accumulators; integer ones 8 x 1, since every accumulator has an integer one beside it.
pub fn shapes(target: &Target, dots: &[Dot], most: usize) -> Vec<Shape> {
    let wide = target.wide_registers() >= 32;
    let integer = dots.iter().any(|d| d.dtype.int().is_some());
    let joined = dots.len();
    let main = match (wide, integer) {
        (true, true) => Shape { tokens: 8, strips: 1 },
        (true, false) => Shape { tokens: 12, strips: 2 },
        (false, true) => Shape { tokens: 2, strips: 1 },
        (false, false) => Shape { tokens: 4, strips: 1 },
    };
    let lone = Shape { tokens: 1, strips: if integer { 1 } else { (4 / joined).max(1) } };
    if most == 1 {
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
