//! Engines: what a model says of tokens, as numbers.
#![allow(unsafe_code)]

use crate::handles::{Handle, Table, get, insert, remove};
use crate::memory::{Place, Room, list, maybe};
use crate::model::mansard_model;
use crate::options::mansard_engine_options;
use crate::status::{Failure, Result, guard, mansard_status};
use mansard_runtime::{Engine, SequenceId, embed, embedded_positions};
use std::sync::{Arc, Mutex, MutexGuard};

/// A model with memory and workers of its own, for one thing at a time.
pub struct mansard_engine {
    _private: (),
}

impl Handle for mansard_engine {
    type Object = Mutex<Engine>;
    const NAME: &'static str = "engine";
    fn table() -> &'static Table<Mutex<Engine>> {
        static ENGINES: Table<Mutex<Engine>> = Table::new(2);
        &ENGINES
    }
}

/// For mansard_logits: the row of the last token.
pub const MANSARD_LAST_ROW: u32 = 0;
/// For mansard_logits: a row for each token.
pub const MANSARD_ALL_ROWS: u32 = 1;

/// Makes an engine. `options` may be null. Any thread.
///
/// `options` is null or one; `engine` is null or a place.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mansard_engine_new(
    model: *const mansard_model,
    options: *const mansard_engine_options,
    engine: *mut *mut mansard_engine,
) -> mansard_status {
    guard(|| {
        // SAFETY: the caller's word.
        let (options, place) = unsafe { (maybe("options", options)?, Place::new("engine", engine)?) };
        let model = get(model)?;
        let limits = &model.artifact().manifest().program.limits;
        let positions = if model.info().encoder { embedded_positions(limits) } else { limits.context };
        let engine = model.engine(&options.copied().unwrap_or_default().options(positions))?;
        place.put(insert(Mutex::new(engine))?);
        Ok(())
    })
}

/// Frees an engine; null is none. Any thread.
#[unsafe(no_mangle)]
pub extern "C" fn mansard_engine_free(engine: *mut mansard_engine) -> mansard_status {
    guard(|| remove(engine).map(drop))
}

/// Writes what the model says of tokens at the beginning of a context: f32 [rows, mansard_facts.row], row by row, and how many
/// floats that are. `rows` is MANSARD_LAST_ROW or MANSARD_ALL_ROWS; an encoder's rows are its last hidden state, of all tokens.
/// With too little room only the number is written, and MANSARD_TOO_SMALL comes back, before anything is computed. Any
/// thread; calls with one engine wait for one another.
///
/// `tokens` are `count`; `output` has room for `capacity`; `written` is null or a place.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mansard_logits(
    engine: *mut mansard_engine,
    tokens: *const u32,
    count: usize,
    rows: u32,
    output: *mut f32,
    capacity: usize,
    written: *mut usize,
) -> mansard_status {
    guard(|| {
        // SAFETY: the caller's word.
        let (tokens, room) =
            unsafe { (list("tokens", tokens, count)?, Room::new("output", output, capacity, written)?) };
        if rows > MANSARD_ALL_ROWS {
            return Err(Failure::usage(format!("rows: expected MANSARD_LAST_ROW or MANSARD_ALL_ROWS, found {rows}")));
        }
        let engine = get(engine)?;
        let mut engine = locked(&engine)?;
        let encoder = engine.artifact().manifest().model.encoder;
        let name = if encoder { "hidden" } else { "logits" };
        let wanted = if rows == MANSARD_ALL_ROWS || encoder { tokens.len() } else { tokens.len().min(1) };
        room.check(wanted.saturating_mul(width(&engine, name)?))?;
        let sequence = engine.new_sequence();
        let values = values(&mut engine, sequence, tokens, name, wanted);
        engine.release(sequence)?;
        room.put(&values?)
    })
}

/// The last `wanted` rows.
fn values(engine: &mut Engine, sequence: SequenceId, tokens: &[u32], name: &str, wanted: usize) -> Result<Vec<f32>> {
    if wanted < tokens.len() {
        return Ok(engine.prefill(sequence, tokens)?.logits(0)?.to_vec());
    }
    let mut values = vec![];
    engine.each_row(sequence, tokens, name, |_, row| {
        values.extend_from_slice(row);
        Ok(())
    })?;
    Ok(values)
}

/// Embeds texts with an encoder: f32 [texts, mansard_facts.embedding], mean-pooled and normalized, and how many floats that
/// are. `tokens` are those of all texts, one after another, and `counts` how many each has. As many texts as a step has room
/// for run at once. With too little room it does as mansard_logits. Any thread; calls with one engine wait for one another.
///
/// `counts` are `texts`, and `tokens` their sum; `output` has room for `capacity`; `written` is null or a place.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mansard_embed(
    engine: *mut mansard_engine,
    tokens: *const u32,
    counts: *const usize,
    texts: usize,
    output: *mut f32,
    capacity: usize,
    written: *mut usize,
) -> mansard_status {
    guard(|| {
        // SAFETY: the caller's word.
        let (counts, room) =
            unsafe { (list("counts", counts, texts)?, Room::new("output", output, capacity, written)?) };
        let total = counts.iter().try_fold(0usize, |sum, count| sum.checked_add(*count));
        let total = total.ok_or_else(|| Failure::usage("counts: their sum is more than memory holds"))?;
        // SAFETY: the caller's word.
        let mut rest = unsafe { list("tokens", tokens, total) }?;
        let engine = get(engine)?;
        let mut engine = locked(&engine)?;
        room.check(texts.saturating_mul(width(&engine, "embedding")?))?;
        let mut next = |count: &usize| {
            let (text, others) = rest.split_at(*count);
            rest = others;
            text.to_vec()
        };
        let texts: Vec<Vec<u32>> = counts.iter().map(&mut next).collect();
        room.put(&embed(&mut engine, &texts)?.concat())
    })
}

fn locked(engine: &Arc<Mutex<Engine>>) -> Result<MutexGuard<'_, Engine>> {
    engine.lock().map_err(|_| {
        Failure::new(mansard_status::MANSARD_INTERNAL, "the engine broke in an earlier call: free it and make another")
    })
}

fn width(engine: &Engine, output: &str) -> Result<usize> {
    let manifest = engine.artifact().manifest();
    let found = manifest.program.outputs.iter().find(|o| o.name == output);
    found.map(|o| o.width).ok_or_else(|| {
        let architecture = &manifest.model.architecture;
        Failure::usage(format!("expected a model with {output}, found a {architecture} model, which has none"))
    })
}
