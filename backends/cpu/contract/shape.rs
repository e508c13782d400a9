//! Tiles of a contraction: how many tokens and strips are multiplied at once, and how many strips stay in the cache.
//!
//! ```text
//! formula       8 tokens x 1 strip, 256 kB      what the registers of the target hold, as far as a step has tokens
//! alternatives  4 x 2, 6 x 2, 12 x 1, ...       what they hold as well: to be timed
//! shapes        8 7 6 5 4 3 2 1                 the tile of the choice, and smaller ones for the tokens that are left
//! ```

use super::Dot;
use mansard_ir::kernel::PROLOGUE_TOKENS;
use mansard_ir::layout::StripLayout;
use mansard_ir::{Choice, Target};

/// Bytes of weights that a cache tile of strips may hold.
const CACHE_TILE_BYTES: usize = 256 << 10;

/// How far ahead of use integer weights are asked for. Left to itself, hardware falls behind once several tokens' dot
/// products stand between one line of weights and the next; but then fewer lines are as much time.
pub const AHEAD: usize = 8 << 10;

/// Tokens that a register tile may have. None is more than twice the next, so that any number of tokens that a tile does not
/// hold is the sum of smaller ones, each once at most.
const TOKENS: [usize; 11] = [24, 16, 12, 8, 7, 6, 5, 4, 3, 2, 1];

/// Tokens and strips of a register tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Activation rows.
    pub tokens: usize,
    /// Strips of 16 output rows.
    pub strips: usize,
}

/// What can be chosen apart from the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Respect {
    /// Tokens and strips of a register tile.
    RegisterTile,
    /// Bytes of a cache tile.
    CacheTile,
    /// How far ahead weights are asked for.
    Ahead,
}

impl Respect {
    /// In the order in which they are best decided.
    pub const ALL: [Respect; 3] = [Respect::RegisterTile, Respect::CacheTile, Respect::Ahead];

    /// In reports.
    pub fn name(self) -> &'static str {
        match self {
            Respect::RegisterTile => "register tiles",
            Respect::CacheTile => "cache tiles",
            Respect::Ahead => "prefetching",
        }
    }
}

/// The choice for contractions that share an epilogue, in steps of at most `most` tokens.
///
/// A lone token reads four streams of float weights at once, which hides the page walks of file mappings; an integer matrix
/// is read fastest as the one stream it is. With 32 registers, floats get 24 accumulators, over as many contractions as
/// share the tile (12 tokens x 2 strips, or 12 x 1 of gate and up); integers 8 x 1, since every accumulator has an integer
/// one beside it.
pub fn formula(target: &Target, dots: &[Dot], most: usize) -> Choice {
    let wide = target.wide_registers() >= 32;
    let (joined, shared) = (dots.len(), joined(dots) == dots.len());
    let main = match (wide, integer(dots)) {
        (true, true) => Shape { tokens: 8, strips: 1 },
        (true, false) if shared => Shape { tokens: 24 / joined.clamp(2, 6), strips: if joined == 1 { 2 } else { 1 } },
        (true, false) => Shape { tokens: 12, strips: 2 },
        (false, true) => Shape { tokens: 2, strips: 1 },
        (false, false) if shared => Shape { tokens: (4 / joined).max(1), strips: 1 },
        (false, false) => Shape { tokens: 4, strips: 1 },
    };
    let Shape { tokens, strips } = if most == 1 || main.tokens == 1 { lone(dots) } else { main };
    Choice { tokens, strips, cache_bytes: CACHE_TILE_BYTES, ahead: if most == 1 { AHEAD } else { AHEAD / 2 } }
}

fn lone(dots: &[Dot]) -> Shape {
    Shape { tokens: 1, strips: if integer(dots) { 1 } else { (4 / dots.len()).max(1) } }
}

fn integer(dots: &[Dot]) -> bool {
    dots.iter().any(|d| d.dtype.int().is_some())
}

/// Contractions whose accumulators stand side by side.
fn joined(dots: &[Dot]) -> usize {
    let Some(first) = dots.first() else { return 1 };
    if dots.iter().all(|d| first.shares_tile(d)) { dots.len() } else { 1 }
}

/// Vectors that a register tile keeps in registers: accumulators (of integers one for each plane beside the float one),
/// weights, a broadcast activation or what scales a sum.
fn registers(dots: &[Dot], shape: Shape) -> usize {
    let Shape { tokens, strips } = shape;
    if integer(dots) {
        let planes = dots.iter().map(|d| d.planes).max().unwrap_or(1);
        return tokens * strips * (1 + planes) + 2 * strips + 2;
    }
    (tokens + 1) * strips * joined(dots) + 1
}

/// A choice has code: its registers suffice, or as nearly as those of the formula, and it is one of those that are tried.
pub fn fits(target: &Target, dots: &[Dot], most: usize, choice: Choice) -> bool {
    let own = formula(target, dots, most);
    let need = |c: Choice| registers(dots, Shape { tokens: c.tokens, strips: c.strips });
    let tile = (choice.tokens, choice.strips) == (own.tokens, own.strips)
        || TOKENS.contains(&choice.tokens)
            && [1, 2, 4].contains(&choice.strips)
            && choice.tokens <= most.next_power_of_two()
            && need(choice) <= target.wide_registers().max(need(own));
    tile && (1..=CACHE_TILE_BYTES * 16).contains(&choice.cache_bytes) && choice.ahead <= 8 * AHEAD
}

/// What may be tried instead of `from`, differing in one respect; tiles that leave half the registers idle are not.
pub fn alternatives(target: &Target, dots: &[Dot], most: usize, from: Choice, respect: Respect) -> Vec<Choice> {
    let tiles = TOKENS.iter().flat_map(|tokens| [1, 2, 4].map(|strips| Choice { tokens: *tokens, strips, ..from }));
    let used = |c: &Choice| c.tokens * c.strips;
    let all: Vec<Choice> = match respect {
        Respect::RegisterTile if most == 1 => tiles.filter(|c| c.tokens == 1).collect(),
        Respect::RegisterTile => {
            tiles.filter(|c| 2 * used(c) > used(&from) && ![1, 5, 7].contains(&c.tokens)).collect()
        }
        Respect::CacheTile if most == 1 => vec![], // every weight is read once
        Respect::CacheTile => [1, 2, 4, 8].map(|n| Choice { cache_bytes: n * CACHE_TILE_BYTES / 2, ..from }).to_vec(),
        Respect::Ahead if !integer(dots) => vec![],
        Respect::Ahead => [0, AHEAD / 4, AHEAD / 2, AHEAD, 2 * AHEAD].map(|ahead| Choice { ahead, ..from }).to_vec(),
    };
    all.into_iter().filter(|c| *c != from && fits(target, dots, most, *c)).collect()
}

/// Register tiles in order of use: the first for full tiles, the others for what is left.
pub fn shapes(dots: &[Dot], most: usize, choice: Choice) -> Vec<Shape> {
    let main = Shape { tokens: choice.tokens, strips: choice.strips };
    if main.tokens == 1 {
        return vec![main];
    }
    // Five and seven tokens are a tile only where two would cost most: in steps that are no longer than a tile.
    let own = |tokens: usize| most <= PROLOGUE_TOKENS || ![5, 7].contains(&tokens);
    let smaller = TOKENS.iter().filter(|tokens| **tokens < main.tokens && own(**tokens));
    let mut shapes: Vec<Shape> = std::iter::once(main)
        .chain(smaller.map(|tokens| match tokens {
            1 => lone(dots),
            tokens => Shape { tokens: *tokens, strips: main.strips.min(2) },
        }))
        .collect();
    // Steps that never fill a tile need no more than the first that holds them.
    while shapes.get(1).is_some_and(|next| next.tokens >= most) {
        shapes.remove(0);
    }
    shapes
}

/// Strips of a cache tile: their weights stay in the second-level cache while all tokens pass.
///
/// The next tile of floats comes in meanwhile, so each takes half the room; but since every tile reads all activations
/// again, rather four strips, up to half as much more.
pub fn cache_tile(dots: &[Dot], choice: Choice) -> usize {
    let bytes: usize = dots.iter().map(|d| StripLayout::new(d.dtype, d.k).bytes).sum();
    let fitting = |room: usize| room / bytes.max(1);
    if integer(dots) {
        return fitting(choice.cache_bytes).max(1);
    }
    fitting(choice.cache_bytes / 2).max(fitting(choice.cache_bytes * 3 / 2).min(4)).max(1)
}
