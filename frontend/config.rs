//! A typed view on a model's settings, in the spelling of Hugging Face's `config.json`.
//!
//! GGUF metadata is translated to the same spelling (see [`crate::names`]), so builders read one vocabulary. Every key
//! that is read is remembered; [`Config::finish`] then refuses settings nobody read, unless they are off or known to
//! leave inference unchanged. A published model whose math differs is refused by name rather than run wrongly.

use mansard_ir::{Error, Kind, Result, bail};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;

/// Where a model comes from; some conventions differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// `config.json` with safetensors.
    HuggingFace,
    /// A GGUF file.
    Gguf,
}

/// Settings by key, and which of them were read.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// Where the settings come from.
    pub origin: Origin,
    /// Path of this section for messages: empty, or `rope_scaling.`.
    section: String,
    map: Map<String, Value>,
    read: RefCell<BTreeSet<String>>,
}

/// No extent in a config is larger; products of two stay far from overflow.
const LARGEST: u64 = 1 << 24;

/// No model has more layers; a larger number is damage.
const MOST_LAYERS: usize = 10_000;

/// Settings of training, serving and bookkeeping.
const HARMLESS: &[&str] = &[
    "architectures",
    "base_model",
    "bos_token",
    "directionality",
    "eos_token",
    "is_llama_config",
    "language",
    "max_sequence_length",
    "model_max_length",
    "n_ctx",
    "output_past",
    "pad_token",
    "predict_special_tokens",
    "auto_map",
    "attn_implementation",
    "cache_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "torch_dtype",
    "finetuned",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "label2id",
    "layer_norm_training",
    "model_type",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "output_scores",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "reorder_and_upcast_attn",
    "return_dict",
    "return_dict_in_generate",
    "router_aux_loss_coef",
    "task_specific_params",
    "tf_legacy_loss",
    "tokenizer_class",
    "torchscript",
    "transformers_version",
    "transformers.js_config",
    "type_vocab_size",
    "use_bfloat16",
    "use_cache",
    "use_flash_attention_2",
    "use_flash_attn",
    "unsloth_fixed",
    "unsloth_version",
    // Options of `generate` that old configs carry.
    "bad_words_ids",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "remove_invalid_values",
    "repetition_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
];

/// Ends and beginnings of such keys.
const HARMLESS_PATTERNS: &[&str] =
    &["dropout", "_pdrop", "token_id", "initializer", "summary_", "jitter", "pooler_", "z_loss", "keys_to_ignore"];

impl Config {
    /// A view on `map`.
    pub fn new(origin: Origin, map: Map<String, Value>) -> Config {
        Config { origin, section: String::new(), map, read: RefCell::default() }
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// Where it is no JSON object.
    pub fn parse(text: &[u8]) -> Result<Config> {
        match serde_json::from_slice(text) {
            Ok(Value::Object(map)) => Ok(Config::new(Origin::HuggingFace, map)),
            Ok(_) => bail!(Input, "expected a JSON object of settings"),
            Err(e) => bail!(Input, "not JSON: {e}"),
        }
    }

    /// The value of a key that is there and not null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.read.borrow_mut().insert(key.to_owned());
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// The key is there, be it null.
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// All settings.
    pub fn settings(&self) -> &Map<String, Value> {
        &self.map
    }

    /// An extent.
    ///
    /// # Errors
    /// Where it is missing or no positive integer of a sane size.
    pub fn size(&self, key: &str) -> Result<usize> {
        self.opt_size(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    /// An extent with a default.
    ///
    /// # Errors
    /// Where it is no positive integer of a sane size.
    pub fn size_or(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.opt_size(key)?.unwrap_or(default))
    }

    /// An extent that may be absent.
    ///
    /// # Errors
    /// Where it is no positive integer of a sane size.
    pub fn opt_size(&self, key: &str) -> Result<Option<usize>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(n) if (1..=LARGEST).contains(&n) => Ok(Some(n as usize)),
                _ => Err(self.error(key, format!("expected an integer of 1 to {LARGEST}, found {value}"))),
            },
        }
    }

    /// The number of layers, under its own name or the common one.
    ///
    /// # Errors
    /// Where it is missing, or no model has as many.
    pub fn layers(&self, own: &str) -> Result<usize> {
        match self.opt_size(own)?.map_or_else(|| self.size("num_hidden_layers"), Ok)? {
            n if n <= MOST_LAYERS => Ok(n),
            n => Err(self.error(own, format!("expected at most {MOST_LAYERS} layers, found {n}"))),
        }
    }

    /// A real number with a default.
    ///
    /// # Errors
    /// Where it is no finite number.
    pub fn float_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.opt_float(key)?.unwrap_or(default))
    }

    /// A real number that may be absent.
    ///
    /// # Errors
    /// Where it is no finite number.
    pub fn opt_float(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(x) if x.is_finite() && x.abs() < 1e30 => Ok(Some(x)),
                _ => Err(self.error(key, format!("expected a number, found {value}"))),
            },
        }
    }

    /// A positive number with a default.
    ///
    /// # Errors
    /// Where it is no positive number.
    pub fn positive_or(&self, key: &str, default: f64) -> Result<f64> {
        match self.float_or(key, default)? {
            x if x > 0.0 => Ok(x),
            x => Err(self.error(key, format!("expected a positive number, found {x}"))),
        }
    }

    /// A boolean with a default.
    ///
    /// # Errors
    /// Where it is something else.
    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(value) => Err(self.error(key, format!("expected true or false, found {value}"))),
        }
    }

    /// A string that may be absent.
    ///
    /// # Errors
    /// Where it is something else.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(self.error(key, format!("expected a string, found {value}"))),
        }
    }

    /// A list of strings, or of integers, that may be absent.
    ///
    /// # Errors
    /// Where it is no list.
    pub fn list(&self, key: &str) -> Result<Option<&[Value]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(value) => Err(self.error(key, format!("expected a list, found {value}"))),
        }
    }

    /// Settings inside a setting.
    ///
    /// # Errors
    /// Where it is no object.
    pub fn section(&self, key: &str) -> Result<Option<Config>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => {
                let section = format!("{}{key}.", self.section);
                Ok(Some(Config { section, ..Config::new(self.origin, map.clone()) }))
            }
            Some(value) => Err(self.error(key, format!("expected an object, found {value}"))),
        }
    }

    /// Notes keys as understood though their values do not matter here.
    pub fn accept(&self, keys: &[&str]) {
        self.read.borrow_mut().extend(keys.iter().map(|k| (*k).to_owned()));
    }

    /// The one value that is supported; absence is that value.
    ///
    /// # Errors
    /// Where the setting has another.
    pub fn only(&self, key: &str, supported: impl Into<Value>) -> Result<()> {
        let supported = supported.into();
        match self.get(key) {
            Some(found) if *found != supported => Err(Error::new(
                Kind::Unsupported,
                format!("setting `{}{key}` is {found}; supported: {supported}", self.section),
            )),
            _ => Ok(()),
        }
    }

    /// Refuses settings that nobody read.
    ///
    /// # Errors
    /// Naming them all.
    pub fn finish(&self) -> Result<()> {
        let read = self.read.borrow();
        let unread = self.map.iter().filter(|(key, value)| !(read.contains(*key) || harmless(key) || off(value)));
        let unread: Vec<String> = unread.map(|(k, v)| format!("`{}{k}` = {v}", self.section)).collect();
        if unread.is_empty() {
            return Ok(());
        }
        let message = format!("settings this version does not know and so cannot honour: {}", unread.join(", "));
        Err(Error::new(Kind::Unsupported, message).help("remove a setting that has no effect on inference"))
    }

    fn error(&self, key: &str, message: impl std::fmt::Display) -> Error {
        Error::new(Kind::Input, format!("setting `{}{key}`: {message}", self.section))
    }
}

fn harmless(key: &str) -> bool {
    key.starts_with('_') || HARMLESS.contains(&key) || HARMLESS_PATTERNS.iter().any(|p| key.contains(p))
}

/// A feature that is absent or switched off.
fn off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}
