//! Every figure of a manifest against every other, and against the file.
//!
//! After this the engine may index with what the manifest says: no index is out of bounds, no buffer outside the arena,
//! no sum overflows, and no figure makes the runtime ask for an absurd amount of memory.

use crate::artifact::Artifact;
use mansard_ir::artifact::{Code, WEIGHTS_PREFIX};
use mansard_ir::layout::{ALIGN, aligned};
use mansard_ir::plan::{Arg, Buffer, Launch, Limits, Output, Program};
use mansard_ir::{Place, Result, bail, synthetic};

/// The most a limit may say; far above any use, far below an overflow.
const MAX_TOKENS: usize = 1 << 20;
const MAX_SEQUENCES: usize = 1 << 16;
const MAX_CONTEXT: usize = 1 << 28;
const MAX_BYTES: usize = 1 << 46;
const MAX_CACHE_BLOCK_BYTES: usize = 1 << 30;
const MAX_SCRATCH_BYTES: usize = 1 << 26;
const MAX_ARGS: usize = 1 << 10;

/// Checks an artifact whose hashes hold.
pub fn validate(artifact: &Artifact) -> Result<()> {
    let manifest = artifact.manifest();
    let program = &manifest.program;
    limits(&program.limits).at(|| "limits".into())?;
    if !(1..=i32::MAX as usize).contains(&manifest.model.vocab) {
        bail!(Input, "expected a vocabulary of 1 to {} tokens, found {}", i32::MAX, manifest.model.vocab);
    }
    if program.arena_bytes > MAX_BYTES {
        bail!(Input, "expected an arena of at most {MAX_BYTES} bytes, found {}", program.arena_bytes);
    }
    let scratch = program.scratch_bytes;
    if scratch > MAX_SCRATCH_BYTES || !scratch.is_multiple_of(ALIGN) {
        bail!(Input, "expected scratch of a multiple of {ALIGN} bytes up to {MAX_SCRATCH_BYTES}, found {scratch}");
    }
    for (i, b) in program.buffers.iter().enumerate() {
        buffer(b, program).at(|| format!("buf{i} `{}`", b.name))?;
    }
    weights(artifact)?;
    let groups = program.groups.len();
    if groups > program.caches.len().max(1) {
        bail!(Input, "expected at most one cache group for each of {} caches, found {groups}", program.caches.len());
    }
    for cache in &program.caches {
        if cache.group >= groups {
            bail!(Input, "cache `{}`: expected one of {groups} cache groups, found number {}", cache.name, cache.group);
        }
        let bytes = cache.block_bytes;
        if bytes == 0 || !bytes.is_multiple_of(ALIGN) || bytes > MAX_CACHE_BLOCK_BYTES {
            bail!(Input, "cache `{}`: expected cache blocks of a multiple of {ALIGN} bytes, found {bytes}", cache.name);
        }
    }
    for image in &manifest.code {
        code(image, artifact).at(|| format!("code `{}`", image.target))?;
    }
    for ptx in &manifest.ptx {
        let (expected, found) = (program.kernels.len(), ptx.shared_bytes.len());
        if artifact.section(&ptx.section).is_none_or(|text| std::str::from_utf8(text).is_err()) {
            bail!(Input, "PTX for {}: expected text in section `{}`", ptx.chip, ptx.section);
        }
        if found != expected {
            bail!(Input, "PTX for {}: expected {expected} kernels, found {found}", ptx.chip);
        }
        if let Some(cubin) = &ptx.cubin
            && artifact.section(&cubin.section).is_none_or(|code| !code.starts_with(b"\x7fELF"))
        {
            bail!(Input, "machine code for {}: expected an ELF file in section `{}`", ptx.chip, cubin.section);
        }
    }
    variants(program)?;
    if program.outputs.is_empty() {
        bail!(Input, "expected at least one output, found none");
    }
    for o in &program.outputs {
        output(o, program).at(|| format!("output `{}`", o.name))?;
    }
    Ok(())
}

fn limits(l: &Limits) -> Result<()> {
    let figures = [
        ("tokens", l.tokens, MAX_TOKENS),
        ("rows", l.rows, MAX_TOKENS),
        ("sequences", l.sequences, MAX_SEQUENCES),
        ("context", l.context, MAX_CONTEXT),
        ("tile", l.tile, MAX_TOKENS),
    ];
    for (name, found, most) in figures {
        if found == 0 || found > most {
            bail!(Input, "expected {name} of 1 to {most}, found {found}");
        }
    }
    Ok(())
}

fn buffer(b: &Buffer, program: &Program) -> Result<()> {
    let bytes = b.row_bytes.checked_mul(b.rows.most(&program.limits));
    let end = bytes.and_then(|bytes| bytes.checked_add(b.offset));
    if !b.offset.is_multiple_of(ALIGN) {
        bail!(Input, "expected an offset that is a multiple of {ALIGN}, found {}", b.offset);
    }
    if end.is_none_or(|end| end > program.arena_bytes) {
        let (rows, arena) = (b.rows.most(&program.limits), program.arena_bytes);
        bail!(Input, "expected {rows} rows of {} bytes at {} inside an arena of {arena}", b.row_bytes, b.offset);
    }
    Ok(())
}

fn weights(artifact: &Artifact) -> Result<()> {
    let weights = &artifact.manifest().program.weights;
    if let Some(made_up) = &artifact.manifest().synthetic {
        if artifact.section(&made_up.section).is_none_or(|text| std::str::from_utf8(text).is_err()) {
            bail!(Input, "expected PTX in section `{}`", made_up.section);
        }
        return weights.iter().enumerate().try_for_each(|(index, weight)| {
            if weight.bytes > MAX_BYTES || !weight.bytes.is_multiple_of(ALIGN) {
                bail!(Input, "weight `{}`: {} bytes", weight.name, weight.bytes);
            }
            synthetic::fills(weight, index, made_up.seed).map(|_| ()).at(|| format!("weight `{}`", weight.name))
        });
    }
    for (weight, section) in weights.iter().zip(artifact.weights()?) {
        if weight.bytes > MAX_BYTES || aligned(weight.bytes) != section.len() {
            let (name, found) = (&weight.name, section.len());
            bail!(Input, "section `{WEIGHTS_PREFIX}{name}`: expected {} packed bytes, found {found}", weight.bytes);
        }
    }
    Ok(())
}

fn code(image: &Code, artifact: &Artifact) -> Result<()> {
    let kernels = artifact.manifest().program.kernels.len();
    let Some(bytes) = artifact.section(&image.section) else {
        bail!(Input, "expected section `{}`, found none of that name", image.section);
    };
    if image.entries.len() != kernels {
        bail!(Input, "expected {kernels} entries, one for each kernel, found {}", image.entries.len());
    }
    if let Some(entry) = image.entries.iter().find(|e| **e >= bytes.len()) {
        bail!(Input, "expected entries below {}, found {entry}", bytes.len());
    }
    Ok(())
}

/// Ranges cover `1..=limits.tokens`, each number of tokens once; launches refer to what there is.
fn variants(program: &Program) -> Result<()> {
    let mut ranges: Vec<_> = program.variants.iter().map(|v| (v.tokens.min, v.tokens.max)).collect();
    ranges.sort_unstable();
    let mut next = 1;
    for (min, max) in ranges {
        if min != next || max < min || max > program.limits.tokens {
            let most = program.limits.tokens;
            bail!(Input, "expected a variant for {next} tokens and on, at most {most}, found one for {min} to {max}");
        }
        next = max + 1;
    }
    if next != program.limits.tokens + 1 {
        bail!(Input, "expected variants for up to {} tokens, found none for {next}", program.limits.tokens);
    }
    let mut arities = vec![None; program.kernels.len()];
    for variant in &program.variants {
        for (i, l) in variant.launches.iter().enumerate() {
            launch(l, program, &mut arities)
                .at(|| format!("launch {i} for {} to {} tokens", variant.tokens.min, variant.tokens.max))?;
        }
    }
    Ok(())
}

fn launch(launch: &Launch, program: &Program, arities: &mut [Option<usize>]) -> Result<()> {
    let Some(arity) = arities.get_mut(launch.kernel.0 as usize) else {
        bail!(Input, "expected one of {} kernels, found {}", program.kernels.len(), launch.kernel);
    };
    let found = launch.args.len();
    if found > MAX_ARGS {
        bail!(Input, "expected at most {MAX_ARGS} arguments, found {found}");
    }
    let expected = *arity.get_or_insert(found);
    if found != expected {
        bail!(Input, "expected {expected} arguments as in an earlier launch of {}, found {found}", launch.kernel);
    }
    for arg in &launch.args {
        let (noun, count, index) = match *arg {
            Arg::Buffer(b) => ("buffers", program.buffers.len(), b.0),
            Arg::Weight(w) => ("weights", program.weights.len(), w.0),
            Arg::Cache(c) => ("caches", program.caches.len(), c.0),
            Arg::Tokens | Arg::Positions | Arg::Rows => continue,
        };
        if index as usize >= count {
            bail!(Input, "expected one of {count} {noun}, found number {index}");
        }
    }
    Ok(())
}

fn output(output: &Output, program: &Program) -> Result<()> {
    let Some(buffer) = program.buffers.get(output.buffer.0 as usize) else {
        bail!(Input, "expected one of {} buffers, found {}", program.buffers.len(), output.buffer);
    };
    let fits = output.width.checked_mul(4).is_some_and(|bytes| bytes <= buffer.row_bytes);
    if output.width == 0 || !fits || !buffer.row_bytes.is_multiple_of(4) {
        bail!(
            Input,
            "expected rows of {} floats, those of {} have {} bytes",
            output.width,
            output.buffer,
            buffer.row_bytes
        );
    }
    Ok(())
}
