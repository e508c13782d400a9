//! Texts -> vectors, several in one ragged step.

use crate::engine::{Engine, Work};
use crate::step::Rows;
use mansard_ir::layout::CACHE_BLOCK;
use mansard_ir::plan::Limits;
use mansard_ir::{Place, Result, bail};

/// Positions that an engine needs room for so that [`embed`] can fill a step: every text has cache blocks of its own, the last of
/// them in part.
pub fn embedded_positions(limits: &Limits) -> usize {
    limits.tokens + limits.sequences * (CACHE_BLOCK - 1)
}

/// Embeds texts with an encoder, as many at a time as fit into a step: mean-pooled, normalized vectors, in order.
///
/// # Errors
/// Where the model is no encoder, or a text is empty or too long for a step.
pub fn embed(engine: &mut Engine, texts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
    let limits = *engine.limits();
    let most = limits.context.min(limits.tokens);
    if let Some((i, text)) = texts.iter().enumerate().find(|(_, text)| !(1..=most).contains(&text.len())) {
        bail!(Usage, "text {}: expected 1 to {most} tokens, found {}", i + 1, text.len());
    }
    let mut vectors = vec![];
    let mut rest = texts;
    while !rest.is_empty() {
        let mut total = 0;
        let fits = |text: &&Vec<u32>| {
            total += text.len();
            total <= limits.tokens
        };
        let (batch, others) = rest.split_at(rest.iter().take(limits.sequences).take_while(fits).count().max(1));
        rest = others;
        let sequences: Vec<_> = batch.iter().map(|_| engine.new_sequence()).collect();
        let work: Vec<Work<'_>> = batch
            .iter()
            .zip(&sequences)
            .map(|(tokens, sequence)| Work { sequence: *sequence, tokens, rows: Rows::None })
            .collect();
        let first = vectors.len();
        let output = engine.step(&work).at(|| format!("texts {} to {}", first + 1, first + batch.len()));
        let rows =
            output.and_then(|output| Ok(output.rows("embedding")?.iter().map(<[f32]>::to_vec).collect::<Vec<_>>()));
        sequences.into_iter().try_for_each(|sequence| engine.release(sequence))?;
        vectors.extend(rows?);
    }
    Ok(vectors)
}
