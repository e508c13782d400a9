//! Byte-pair encoding from GGUF metadata: over bytes (`gpt2`), or over characters with byte fallback (`llama`, which is
//! SentencePiece's BPE).
//!
//! SentencePiece merges the adjacent pair whose union has the best score. That is ordinary BPE once every way to cut a
//! token in two known tokens is a merge, ranked by the score of the whole; tests hold it against published token ids.

use super::{Document, NORMAL, TokenMap, Vocabulary};
use crate::gguf::Gguf;
use mansard_ir::{Error, Kind, Result, bail};
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::HashMap;

#[derive(Serialize)]
struct Bpe<'a> {
    r#type: &'static str,
    dropout: (),
    unk_token: Option<&'a str>,
    continuing_subword_prefix: (),
    end_of_word_suffix: (),
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    vocab: TokenMap<'a>,
    merges: Vec<(&'a str, &'a str)>,
}

/// How text is cut before merging: regexes applied one after the other, and whether a piece that is a token is not
/// merged.
struct Cut {
    /// Values of `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    /// In order.
    patterns: &'static [&'static str],
    /// Digits stand alone first.
    digits: bool,
    /// A piece that is itself a token is taken whole.
    whole: bool,
    /// Text is composed (NFC) first.
    compose: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const PLAIN: Cut = Cut { names: &[], patterns: &[], digits: false, whole: false, compose: false };

const CUTS: &[Cut] = &[
    Cut { names: &["default"], patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"], ..PLAIN },
    Cut { names: &["gpt-2", "gpt2", "olmo", "phi-2", "jina-es", "jina-de"], patterns: &[GPT2], ..PLAIN },
    Cut {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell"],
        patterns: &[GPT2],
        digits: true,
        ..PLAIN
    },
    Cut { names: &["llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"], patterns: &[LLAMA3], whole: true, ..PLAIN },
    Cut { names: &["qwen2", "deepseek-r1-qwen"], patterns: &[QWEN2], compose: true, ..PLAIN },
    Cut { names: &["tekken"], patterns: &[TEKKEN], whole: true, ..PLAIN },
];

/// `tokenizer.ggml.model = gpt2`.
pub(super) fn byte_level(gguf: &Gguf, vocabulary: &Vocabulary<'_>) -> Result<String> {
    let Some(merges) = gguf.texts("tokenizer.ggml.merges")? else {
        bail!(Input, "metadata `tokenizer.ggml.merges` is missing");
    };
    let split = |merge: &&'_ str| match merge.char_indices().skip(1).find(|(_, c)| *c == ' ') {
        Some((at, _)) => Ok((at, merge.len())),
        None => bail!(Input, "tokenizer: expected two tokens in a merge, found `{merge}`"),
    };
    let known: std::collections::HashSet<&str> = vocabulary.tokens.iter().copied().collect();
    let mut pairs = Vec::with_capacity(merges.len());
    for merge in &merges {
        let (at, _) = split(merge)?;
        let (left, right) = (&merge[..at], &merge[at + 1..]);
        if !(known.contains(left) && known.contains(right) && known.contains(format!("{left}{right}").as_str())) {
            bail!(Input, "tokenizer: the merge `{merge}` is not over tokens of the vocabulary");
        }
        pairs.push((left, right));
    }
    let name = gguf.text("tokenizer.ggml.pre").unwrap_or("default");
    let Some(cut) = CUTS.iter().find(|c| c.names.contains(&name)) else {
        let known: Vec<&str> = CUTS.iter().flat_map(|c| c.names).copied().collect();
        let message = format!("tokenizer: unknown way to cut text, `tokenizer.ggml.pre` = `{name}`");
        return Err(Error::new(Kind::Unsupported, message).help(format!("supported: {}", known.join(", "))));
    };
    let model = Bpe { ignore_merges: cut.whole, ..bpe(vocabulary, pairs) };
    let mut document = Document::new(vocabulary, model);
    if cut.compose {
        document.normalizer = json!({ "type": "NFC" });
    }
    document.pre_tokenizer = pre_tokenizer(cut);
    document.decoder = byte_level_step();
    document.text()
}

fn bpe<'a>(vocabulary: &'a Vocabulary<'a>, merges: Vec<(&'a str, &'a str)>) -> Bpe<'a> {
    Bpe {
        r#type: "BPE",
        dropout: (),
        unk_token: None,
        continuing_subword_prefix: (),
        end_of_word_suffix: (),
        fuse_unk: false,
        byte_fallback: false,
        ignore_merges: false,
        vocab: TokenMap(&vocabulary.tokens),
        merges,
    }
}

fn byte_level_step() -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false })
}

fn pre_tokenizer(cut: &Cut) -> Value {
    let mut steps = vec![];
    if cut.digits {
        steps.push(json!({ "type": "Digits", "individual_digits": true }));
    }
    for pattern in cut.patterns {
        steps
            .push(json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false }));
    }
    steps.push(byte_level_step());
    json!({ "type": "Sequence", "pretokenizers": steps })
}

/// `tokenizer.ggml.model = llama`.
pub(super) fn sentence_piece(gguf: &Gguf, vocabulary: &Vocabulary<'_>) -> Result<String> {
    let Some(scores) = &vocabulary.scores else { bail!(Input, "metadata `tokenizer.ggml.scores` is missing") };
    let merges = merges_by_score(vocabulary, scores);
    let model = Bpe {
        unk_token: vocabulary.unknown().map(|id| vocabulary.tokens[id]),
        fuse_unk: true,
        byte_fallback: true,
        ..bpe(vocabulary, merges)
    };
    let prefixed = gguf.flag("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let spaces = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    let mut document = Document::new(vocabulary, model);
    document.normalizer = spaces;
    if prefixed {
        let prepend = json!({ "type": "Prepend", "prepend": "▁" });
        document.normalizer = json!({ "type": "Sequence", "normalizers": [prepend, document.normalizer] });
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    document.decoder = json!({ "type": "Sequence", "decoders": decoders });
    document.text()
}

/// Every cut of a token in two known tokens, best score of the whole first.
fn merges_by_score<'a>(vocabulary: &'a Vocabulary<'a>, scores: &[f64]) -> Vec<(&'a str, &'a str)> {
    let normal = || vocabulary.tokens.iter().enumerate().filter(|(id, _)| vocabulary.kinds[*id] == NORMAL);
    let ids: HashMap<&str, usize> = normal().map(|(id, token)| (*token, id)).collect();
    let mut merges = vec![];
    for (id, token) in normal() {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if ids.contains_key(left) && ids.contains_key(right) {
                merges.push((scores[id], id, left, right));
            }
        }
    }
    // Stable, so that cuts of one token stay in order; a better score is a smaller rank.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    merges.into_iter().map(|(_, _, left, right)| (left, right)).collect()
}
