//! Tokenizers: whatever a model file has becomes the text of a `tokenizer.json`, which the `tokenizers` crate reads.
//!
//! ```text
//! Hugging Face directory: tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json
//! GGUF metadata:          tokenizer.ggml.model = gpt2 | llama | bert | t5, with tokens, types, merges or scores
//! ```
//!
//! Two things are settled here for good: a decoder's begin token is named by [`TokenizerInfo::begin`] and never added
//! by the tokenizer itself; padding and truncation, which are a matter of serving, are taken out.

mod bpe;
mod unigram;

use crate::config::Config;
use crate::gguf::Gguf;
use mansard_ir::model::TokenizerInfo;
use mansard_ir::{Error, Kind, Place, Result, bail};
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// A tokenizer, and the tokens that end a generation.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// The tokenizer, where there is one.
    pub info: Option<TokenizerInfo>,
    /// Ascending, each once.
    pub end_tokens: Vec<u32>,
}

/// Tokens that end a turn, whatever the settings say of the end of a sequence.
const ENDS_OF_TURN: &[&str] =
    &["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"];

/// GGUF's types of tokens.
const UNKNOWN: u8 = 2;
const CONTROL: u8 = 3;
const USER_DEFINED: u8 = 4;
const NORMAL: u8 = 1;

/// Text, type and (where the kind of tokenizer has them) score of each token.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<u8>,
    scores: Option<Vec<f64>>,
}

/// A `tokenizer.json`; `model` is one of the kinds.
#[derive(Serialize)]
struct Document<M> {
    version: &'static str,
    truncation: (),
    padding: (),
    added_tokens: Vec<Value>,
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    decoder: Value,
    model: M,
}

/// A map of tokens to their ids, in order of id; a text that occurs twice keeps its first id.
struct TokenMap<'a>(&'a [&'a str]);

impl Serialize for TokenMap<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut seen = std::collections::HashSet::with_capacity(self.0.len());
        let unique = self.0.iter().enumerate().filter(|(_, t)| seen.insert(**t));
        serializer.collect_map(unique.map(|(id, token)| (token, id)))
    }
}

impl<M: Serialize> Document<M> {
    fn new(vocabulary: &Vocabulary<'_>, model: M) -> Document<M> {
        Document {
            version: "1.0",
            truncation: (),
            padding: (),
            added_tokens: vocabulary.added(),
            normalizer: Value::Null,
            pre_tokenizer: Value::Null,
            post_processor: Value::Null,
            decoder: Value::Null,
            model,
        }
    }

    fn text(&self) -> Result<String> {
        serde_json::to_string(self).map_err(|e| Error::new(Kind::Internal, format!("writing a tokenizer: {e}")))
    }
}

impl<'a> Vocabulary<'a> {
    fn read(gguf: &'a Gguf, tokens: Vec<&'a str>) -> Result<Vocabulary<'a>> {
        let types = gguf.numbers("tokenizer.ggml.token_type")?;
        let kinds: Vec<u8> = match types {
            Some(types) => types.into_iter().map(|t| t as u8).collect(),
            None => vec![NORMAL; tokens.len()],
        };
        let scores = gguf.numbers("tokenizer.ggml.scores")?;
        let lengths = (tokens.len(), kinds.len(), scores.as_ref().map_or(tokens.len(), Vec::len));
        if lengths.0 != lengths.1 || lengths.0 != lengths.2 {
            bail!(Input, "{} tokens, {} types, {} scores; expected as many of each", lengths.0, lengths.1, lengths.2);
        }
        Ok(Vocabulary { tokens, kinds, scores })
    }

    /// Tokens found in raw text before anything else: control tokens, and those a model's makers defined.
    fn added(&self) -> Vec<Value> {
        let of_kind = self.kinds.iter().enumerate().filter(|(_, k)| matches!(**k, UNKNOWN | CONTROL | USER_DEFINED));
        let named = of_kind.map(|(id, kind)| (id, kind, self.tokens[id])).filter(|(_, _, text)| !text.is_empty());
        let entry = |(id, kind, text): (usize, &u8, &str)| {
            json!({ "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": *kind != USER_DEFINED })
        };
        named.map(entry).collect()
    }

    fn unknown(&self) -> Option<usize> {
        self.kinds.iter().position(|k| *k == UNKNOWN)
    }

    fn special(&self, text: &str) -> Option<u32> {
        let at = |id: &usize| matches!(self.kinds[*id], CONTROL | USER_DEFINED) && self.tokens[*id] == text;
        (0..self.tokens.len()).find(at).map(|id| id as u32)
    }
}

/// The tokenizer of a GGUF file.
///
/// # Errors
/// Where the metadata is inconsistent, or of a kind that is not supported.
pub(crate) fn from_gguf(gguf: &Gguf, encoder: bool) -> Result<Found> {
    let Some(model) = gguf.text("tokenizer.ggml.model").filter(|m| *m != "none" && *m != "no_vocab") else {
        return Ok(Found::default());
    };
    let Some(tokens) = gguf.texts("tokenizer.ggml.tokens")? else {
        bail!(Input, "metadata `tokenizer.ggml.tokens` is missing");
    };
    let vocabulary = Vocabulary::read(gguf, tokens).at(|| "tokenizer".into())?;
    let id = |name: &str| -> Result<Option<u32>> {
        match gguf.size(&format!("tokenizer.ggml.{name}_token_id"))? {
            Some(id) if id < vocabulary.tokens.len() => Ok(Some(id as u32)),
            // Converters write 2^32 - 1 for none.
            Some(id) if id == u32::MAX as usize => Ok(None),
            Some(id) => bail!(Input, "tokenizer: {name} token {id} of {} tokens", vocabulary.tokens.len()),
            None => Ok(None),
        }
    };
    let json = match model {
        "gpt2" => bpe::byte_level(gguf, &vocabulary)?,
        "llama" => bpe::sentence_piece(gguf, &vocabulary)?,
        "bert" => unigram::word_piece(&vocabulary, id("cls")?.or(id("bos")?), id("seperator")?.or(id("eos")?))?,
        "t5" => unigram::unigram(gguf, &vocabulary, encoder.then_some((id("bos")?, id("eos")?)))?,
        other => {
            let message = format!("a tokenizer of kind `{other}`");
            return Err(Error::new(Kind::Unsupported, message).help("supported: gpt2, llama, bert, t5"));
        }
    };
    let usual = model == "llama" || gguf.text("tokenizer.ggml.pre") == Some("llama-bpe");
    let begins = !encoder && gguf.flag("tokenizer.ggml.add_bos_token").unwrap_or(usual);
    let (begin, end) = (id("bos")?, id("eos")?);
    let text = |id: Option<u32>| id.map_or(String::new(), |id| vocabulary.tokens[id as usize].to_owned());
    let info = TokenizerInfo {
        json,
        begin: begin.filter(|_| begins),
        begin_text: text(begin),
        end_text: text(end),
        chat_template: gguf.text("tokenizer.chat_template").map(str::to_owned),
    };
    let mut end_tokens: Vec<u32> = [end, id("eot")?, id("eom")?].into_iter().flatten().collect();
    end_tokens.extend(ENDS_OF_TURN.iter().filter_map(|t| vocabulary.special(t)));
    Ok(Found { info: Some(info), end_tokens: finish(end_tokens, encoder) })
}

fn finish(mut end_tokens: Vec<u32>, encoder: bool) -> Vec<u32> {
    end_tokens.sort();
    end_tokens.dedup();
    if encoder { vec![] } else { end_tokens }
}

/// A token that `tokenizer.json` adds to its model's vocabulary.
#[derive(serde::Deserialize)]
struct Added {
    id: u32,
    content: String,
}

/// The tokenizer beside a `config.json`.
///
/// # Errors
/// Where one of its files is damaged.
pub(crate) fn from_directory(directory: &Path, config: &Config, encoder: bool) -> Result<Found> {
    let generation = read(&directory.join("generation_config.json"))?;
    let mut end_tokens = vec![];
    for value in
        [generation.as_ref().and_then(|g| g.get("eos_token_id")), config.get("eos_token_id")].into_iter().flatten()
    {
        let ids = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        end_tokens.extend(ids.iter().filter_map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())));
    }
    let path = directory.join("tokenizer.json");
    if !path.exists() {
        return Ok(Found { info: None, end_tokens: finish(end_tokens, encoder) });
    }
    let place = || path.display().to_string();
    let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
    let damaged = |e| Error::new(Kind::Input, format!("no tokenizer: {e}"));
    let mut document: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(&bytes).map_err(damaged).at(place)?;
    let added: Vec<Added> = match document.get("added_tokens") {
        Some(raw) => serde_json::from_str(raw.get()).map_err(damaged).at(place)?,
        None => vec![],
    };
    let id_of = |text: &str| added.iter().find(|a| a.content == text).map(|a| a.id);
    end_tokens.extend(ENDS_OF_TURN.iter().filter_map(|t| id_of(t)));
    let settings = read(&directory.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
    let text = |key: &str| {
        let value = settings.get(key);
        value.and_then(|v| v.as_str().or_else(|| v.get("content")?.as_str())).unwrap_or_default().to_owned()
    };
    let (begin_text, end_text) = (text("bos_token"), text("eos_token"));
    end_tokens.extend(id_of(&end_text));
    for key in ["truncation", "padding"] {
        document.insert(key.into(), raw(&Value::Null).at(place)?);
    }
    let begin = match encoder {
        true => None,
        false => {
            let processor = document.get("post_processor").map_or(Ok(Value::Null), |r| serde_json::from_str(r.get()));
            let (processor, begin) = without_begin(processor.map_err(damaged).at(place)?);
            document.insert("post_processor".into(), raw(&processor).at(place)?);
            let wanted = settings.get("add_bos_token") == Some(&Value::Bool(true));
            begin.or(id_of(&begin_text).filter(|_| wanted))
        }
    };
    let json = serde_json::to_string(&document).map_err(damaged).at(place)?;
    let chat_template = chat_template(directory, &settings)?;
    let info = TokenizerInfo { json, begin, begin_text, end_text, chat_template };
    Ok(Found { info: Some(info), end_tokens: finish(end_tokens, encoder) })
}

fn raw(value: &Value) -> Result<Box<RawValue>> {
    serde_json::value::to_raw_value(value).map_err(|e| Error::new(Kind::Internal, format!("writing a tokenizer: {e}")))
}

/// A JSON file that may be absent.
fn read(path: &Path) -> Result<Option<Value>> {
    if !path.exists() {
        return Ok(None);
    }
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let parsed = serde_json::from_slice(&bytes).map_err(|e| Error::new(Kind::Input, format!("not JSON: {e}")));
    parsed.map(Some).at(|| path.display().to_string())
}

fn chat_template(directory: &Path, settings: &Value) -> Result<Option<String>> {
    let path = directory.join("chat_template.jinja");
    if path.exists() {
        return std::fs::read_to_string(&path).map(Some).map_err(|e| Error::io(&path, e));
    }
    let template = match settings.get("chat_template") {
        // Several by name.
        Some(Value::Array(named)) => {
            let default = named.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default"));
            default.or(named.first()).and_then(|t| t.get("template"))
        }
        one => one,
    };
    Ok(template.and_then(Value::as_str).map(str::to_owned))
}

/// Takes a template of the form `begin, text` out of a post-processor and returns the id of `begin`. Other templates
/// stay.
fn without_begin(processor: Value) -> (Value, Option<u32>) {
    match processor.get("type").and_then(Value::as_str) {
        Some("TemplateProcessing") => match begin_of(&processor) {
            Some(id) => (Value::Null, Some(id)),
            None => (processor, None),
        },
        Some("Sequence") => {
            let Some(parts) = processor.get("processors").and_then(Value::as_array) else { return (processor, None) };
            let (mut kept, mut begin) = (vec![], None);
            for part in parts {
                let (part, id) = without_begin(part.clone());
                begin = begin.or(id);
                kept.extend(Some(part).filter(|p| !p.is_null()));
            }
            let kept = if kept.is_empty() { Value::Null } else { json!({ "type": "Sequence", "processors": kept }) };
            (kept, begin)
        }
        _ => (processor, None),
    }
}

fn begin_of(template: &Value) -> Option<u32> {
    let [first, text] = template.get("single")?.as_array()?.as_slice() else { return None };
    text.get("Sequence")?;
    let name = first.get("SpecialToken")?.get("id")?.as_str()?;
    let ids = template.get("special_tokens")?.get(name)?.get("ids")?.as_array()?;
    u32::try_from(ids.first()?.as_u64()?).ok()
}
