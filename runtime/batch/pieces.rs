//! A prompt -> the pieces that steps run, cut where only the prompt's own length decides.
//!
//! ```text
//!  300 tokens, pieces of at most 128     [128][128][44]
//!  200 tokens                            [128][64][8]
//! ```
//!
//! How a step's tokens are divided changes the last bits of what attention computes (sums are taken in another order), and
//! steps of many tokens may have other activations. So a prompt is always cut alike, whatever else a step holds, and pieces
//! that fill cache blocks can be shared (`prefix.rs`): after 128 tokens of a system's words come 64 of a question's.

use mansard_ir::layout::CACHE_BLOCK;

/// The longest piece of at most `most` tokens: a cache block, doubled as often as fits; where none fits, as many as do.
pub(super) fn longest(most: usize) -> usize {
    match most / CACHE_BLOCK {
        0 => most.max(1),
        blocks => CACHE_BLOCK << blocks.ilog2(),
    }
}

/// Tokens of the piece that follows the first `done` of a prompt's `length`. `longest` is one of [`longest`]'s.
pub(super) fn next(done: usize, length: usize, longest: usize) -> usize {
    let rest = length - done;
    match rest {
        _ if rest >= longest => longest,
        _ if rest >= CACHE_BLOCK => self::longest(rest),
        _ => rest,
    }
}

/// Pieces of whole cache blocks can be shared.
pub(super) fn is_whole(tokens: usize) -> bool {
    tokens > 0 && tokens.is_multiple_of(CACHE_BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(length: usize, most: usize) -> Vec<usize> {
        let (mut done, mut pieces) = (0, vec![]);
        while done < length {
            pieces.push(next(done, length, longest(most)));
            done += pieces[pieces.len() - 1];
        }
        pieces
    }

    #[test]
    fn the_picture_of_the_front_door() {
        assert_eq!(cut(300, 128), [128, 128, 44]);
        assert_eq!(cut(200, 130), [128, 64, 8]);
        assert_eq!(cut(1000, 512), [512, 256, 128, 64, 40]);
        assert_eq!(cut(40, 16), [16, 16, 8]);
        assert_eq!(cut(64, 128), [64]);
    }

    #[test]
    fn longer_prompts_share_all_but_the_end() {
        for length in 1..600 {
            let (one, other) = (cut(length, 128), cut(length + 100, 128));
            let common: usize = one.iter().zip(&other).take_while(|(a, b)| a == b).map(|(a, _)| a).sum();
            assert!(length < 128 || common >= length / 128 * 128 - 64, "{length}: {one:?} {other:?}");
        }
    }
}
