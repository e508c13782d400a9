//! Reference evaluation of ops over caches.
//!
//! Sequence `i` of a step had `past` positions and brings `len` tokens, which get positions `past..past + len`. `append`
//! writes their rows; `attend` after it sees them.

use super::contract::dot;
use crate::graph::Attrs;
use crate::layout::CACHE_BLOCK;
use crate::value::{Cache, Sequence, Step, Tensor, Value};
use crate::{Result, bail};
use std::ops::Range;
use std::sync::Arc;

pub fn append(o: &[&Value], _: &Attrs) -> Result<Value> {
    let (cache, x, step) = (o[0].cache()?, o[1].tensor()?, o[2].step()?); // x: [t, heads, dim]
    let mut sequences = vec![];
    for (s, sequence) in step.sequences.iter().enumerate() {
        if cache.positions(s) != sequence.past {
            bail!(
                Input,
                "sequence {s}: the cache has {} positions, the step says {}",
                cache.positions(s),
                sequence.past
            );
        }
        let mut grown = cache.sequences[s].to_vec();
        for token in sequence.start..sequence.start + sequence.len {
            grown.extend(x.outer(token).chunks(cache.dim).flat_map(|head| Cache::stored(cache.dtype, head)));
        }
        sequences.push(Arc::new(grown));
    }
    Ok(Value::Cache(Cache { sequences, ..cache.clone() }))
}

/// The cache has whole cache blocks only, before and after.
pub fn append_blocks(o: &[&Value], _: &Attrs) -> Result<Value> {
    let (cache, recent, step) = (o[0].cache()?, o[1].cache()?, o[2].step()?);
    let block = CACHE_BLOCK * cache.heads * cache.dim;
    let mut sequences = vec![];
    for (s, sequence) in step.sequences.iter().enumerate() {
        let (had, has) = (cache.positions(s), recent.positions(s));
        if had != sequence.past / CACHE_BLOCK * CACHE_BLOCK || has < sequence.past {
            bail!(Input, "sequence {s}: the caches have {had} and {has} positions, the step says {}", sequence.past);
        }
        let mut grown = cache.sequences[s].to_vec();
        let completed = recent.sequences[s].chunks_exact(block).skip(had / CACHE_BLOCK);
        grown.extend(completed.flat_map(Cache::stored_block));
        sequences.push(Arc::new(grown));
    }
    Ok(Value::Cache(Cache { sequences, ..cache.clone() }))
}

pub fn attend(o: &[&Value], attrs: &Attrs) -> Result<Value> {
    let caches = [o[1].cache()?, o[2].cache()?];
    over(o[0].tensor()?, o[3].step()?, attrs, &|_, _| caches)
}

/// What a token sees depends on its position alone, and not on how a prompt was divided into steps.
pub fn attend_mixed(o: &[&Value], attrs: &Attrs) -> Result<Value> {
    let (caches, recent) = ([o[1].cache()?, o[2].cache()?], [o[3].cache()?, o[4].cache()?]);
    let of = |own: usize, p: usize| if own / CACHE_BLOCK == p / CACHE_BLOCK { recent } else { caches };
    over(o[0].tensor()?, o[5].step()?, attrs, &of)
}

/// Attention of queries `[t, heads, dim]`; `caches` says which keys and values a token sees, by its position and theirs.
fn over<'a>(q: &Tensor, step: &Step, attrs: &Attrs, caches: &dyn Fn(usize, usize) -> [&'a Cache; 2]) -> Result<Value> {
    let (heads, dim) = (q.shape[1], q.shape[2]);
    let (scale, cap) = (attrs.float("scale"), attrs.float("softcap"));
    let score = |q: &[f32], k: &[f32]| {
        let score = scale * dot(q, k);
        if cap > 0.0 { cap * (score / cap).tanh() } else { score }
    };
    let mut y = vec![0.0; q.data.len()];
    for (s, sequence) in step.sequences.iter().enumerate() {
        for i in 0..sequence.len {
            let own = sequence.past + i;
            let [keys, values] = caches(own, own);
            let seen = visible(keys.positions(s).min(values.positions(s)), sequence, i, attrs);
            if seen.is_empty() {
                bail!(Input, "sequence {s}: position {own} sees nothing of the cache");
            }
            if let Some(p) = seen.clone().find(|p| caches(own, *p).iter().any(|cache| cache.positions(s) <= *p)) {
                bail!(Input, "sequence {s}: position {own} sees position {p}, which its cache does not have");
            }
            for head in 0..heads {
                let (row, kv_head) = ((sequence.start + i) * heads + head, head * keys.heads / heads);
                let q = &q.data[row * dim..][..dim];
                let scores: Vec<f64> = seen.clone().map(|p| score(q, caches(own, p)[0].at(s, p, kv_head))).collect();
                let out = &mut y[row * dim..][..dim];
                weighted_sum(&scores, seen.clone().map(|p| caches(own, p)[1].at(s, p, kv_head)), out);
            }
        }
    }
    Ok(Value::Tensor(Tensor::new(q.shape.clone(), y)))
}

/// Positions that token `i` of a sequence with `positions` positions sees.
fn visible(positions: usize, sequence: &Sequence, i: usize, attrs: &Attrs) -> Range<usize> {
    let (own, window) = (sequence.past + i, attrs.size("window"));
    let end = if attrs.bool("causal") { positions.min(own + 1) } else { positions };
    let start = if window > 0 { (own + 1).saturating_sub(window) } else { 0 };
    start..end
}

/// `out = softmax(scores) rows`.
fn weighted_sum<'a>(scores: &[f64], rows: impl Iterator<Item = &'a [f32]>, out: &mut [f32]) {
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
    let mut sums = vec![0f64; out.len()];
    for (score, row) in scores.iter().zip(rows) {
        let weight = (score - most).exp() / total;
        for (sum, x) in sums.iter_mut().zip(row) {
            *sum += weight * *x as f64;
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = sum as f32;
    }
}
