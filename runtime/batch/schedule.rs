//! What sequences want next -> the parts of one step.
//!
//! ```text
//!  tokens to decode  a b c        pieces of prompts  d 128  e 24       many = 33
//!  step 1            a b c, e 24          steps of fewer than 33 tokens
//!  step 2            d 128                and steps of 33 and more in turn
//! ```
//!
//! Decoding comes first; beside it prompts advance within a budget, in order of arrival. Where an artifact computes long
//! steps otherwise (bf16 beside int8 activations on matrix units), what is short by itself only goes into short steps, so that
//! no token depends on who else was there; short and long steps take turns.

use mansard_ir::plan::{Limits, MANY, Program};

/// What a sequence wants of a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wish {
    /// New tokens.
    pub tokens: usize,
    /// Rows that leave the step.
    pub rows: usize,
    /// A piece of a prompt; else a token to decode, or a few that were guessed.
    pub prompt: bool,
}

/// Bounds of a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// The engine's.
    pub limits: Limits,
    /// Tokens of prompts beside tokens that are decoded. One piece always fits.
    pub beside: usize,
    /// Tokens from which on steps compute otherwise.
    pub many: usize,
}

/// The least number of tokens for which a program has code of its own that may compute otherwise; see [`MANY`].
pub(super) fn many(program: &Program) -> usize {
    program.variants.iter().map(|variant| variant.tokens.min).filter(|min| *min >= MANY).min().unwrap_or(usize::MAX)
}

/// Indices of the wishes that make up a step, in order. Wishes are in order of preference, with those to decode first;
/// `prompts_first` says whose turn it is.
pub(super) fn choose(wishes: &[Wish], bounds: &Bounds, prompts_first: bool) -> Vec<usize> {
    let decoding = (0..wishes.len()).filter(|i| !wishes[*i].prompt);
    let prompts = (0..wishes.len()).filter(|i| wishes[*i].prompt);
    let order: Vec<usize> = match prompts_first {
        true => prompts.chain(decoding).collect(),
        false => decoding.chain(prompts).collect(),
    };
    let Some(first) = order.first() else { return vec![] };
    let limits = &bounds.limits;
    let long = |wish: &Wish| wish.tokens >= bounds.many;
    let most = if long(&wishes[*first]) { limits.tokens } else { limits.tokens.min(bounds.many - 1) };
    let beside = if wishes.iter().any(|wish| !wish.prompt) { bounds.beside } else { limits.tokens };
    let (mut chosen, mut tokens, mut rows, mut prompt) = (vec![], 0, 0, 0);
    for index in order.iter().copied() {
        let wish = wishes[index];
        let fits = long(&wish) == long(&wishes[*first])
            && chosen.len() < limits.sequences
            && tokens + wish.tokens <= most
            && rows + wish.rows <= limits.rows
            && (!wish.prompt || prompt == 0 || prompt + wish.tokens <= beside);
        if fits {
            chosen.push(index);
            tokens += wish.tokens;
            rows += wish.rows;
            prompt += if wish.prompt { wish.tokens } else { 0 };
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { tokens: 512, rows: 128, sequences: 64, context: 2048, tile: 512 };

    fn decode(tokens: usize) -> Wish {
        Wish { tokens, rows: tokens, prompt: false }
    }

    fn piece(tokens: usize) -> Wish {
        Wish { tokens, rows: 1, prompt: true }
    }

    #[test]
    fn decoding_comes_first_and_prompts_within_the_budget() {
        let bounds = Bounds { limits: LIMITS, beside: 128, many: usize::MAX };
        let wishes = [decode(1), decode(4), piece(128), piece(44), piece(9)];
        assert_eq!(choose(&wishes, &bounds, false), [0, 1, 2]);
        assert_eq!(choose(&wishes[2..], &bounds, false), [0, 1, 2], "with nothing to decode all fit");
        assert_eq!(choose(&[decode(1), piece(512)], &bounds, true), [1]);
        assert!(choose(&[], &bounds, true).is_empty());
        let tight = Bounds { limits: Limits { sequences: 2, rows: 3, ..LIMITS }, ..bounds };
        assert_eq!(choose(&[decode(2), decode(2), decode(1), decode(1)], &tight, false), [0, 2]);
    }

    #[test]
    fn short_and_long_parts_take_turns() {
        let bounds = Bounds { limits: LIMITS, beside: 128, many: 65 };
        let wishes = [decode(1), decode(1), piece(128), piece(44), piece(128)];
        assert_eq!(choose(&wishes, &bounds, false), [0, 1, 3]);
        assert_eq!(choose(&wishes, &bounds, true), [2]);
        assert_eq!(choose(&wishes[2..], &bounds, true), [0, 2], "long parts share a long step");
        let many: Vec<Wish> = (0..64).map(|_| decode(1)).chain([piece(44)]).collect();
        assert_eq!(choose(&many, &bounds, false).len(), 64);
        let turn = choose(&many, &bounds, true);
        assert_eq!((turn[0], turn.len()), (64, 21), "a short piece has its turn too");
    }

    /// Random wishes: a step is legal, and nobody waits for ever.
    #[test]
    fn everybody_has_a_turn() {
        for many in [65, usize::MAX] {
            let bounds = Bounds { limits: LIMITS, beside: 128, many };
            let mut state = 7u64;
            let mut random = move |below: u64| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                ((state >> 33) % below) as usize
            };
            for _ in 0..200 {
                let (decoding, prompts) = (random(80), random(10));
                let mut wishes: Vec<Wish> = (0..decoding).map(|_| decode(1 + random(4))).collect();
                wishes.extend((0..prompts).map(|_| piece(1 + random(256))));
                for turn in [false, true] {
                    let chosen = choose(&wishes, &bounds, turn);
                    let total: usize = chosen.iter().map(|i| wishes[*i].tokens).sum();
                    assert!(chosen.iter().all(|i| (wishes[*i].tokens >= many) == (total >= many)), "{wishes:?}");
                    assert!(total <= 512 && chosen.len() <= 64);
                    let first = if turn && prompts > 0 { decoding } else { 0 };
                    assert!(wishes.is_empty() || chosen.contains(&first.min(wishes.len() - 1)));
                }
            }
        }
    }
}
