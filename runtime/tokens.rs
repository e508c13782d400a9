//! Text <-> token ids, by the artifact's tokenizer.
//!
//! [`Tokens::encode`] puts the begin-of-sequence token first where the model wants one. A [`Decoder`] turns tokens into
//! text as they come: what it gives is always whole characters, and together it is what decoding all tokens at once gives.

use crate::template::{Message, Template};
use mansard_ir::model::TokenizerInfo;
use mansard_ir::{Error, Kind, Result};
use serde::Deserialize;
use std::collections::HashMap;
use std::sync::Arc;
use tokenizers::models::bpe::BPE;
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer};

/// A loaded tokenizer.
#[derive(Debug)]
pub struct Tokens {
    tokenizer: Tokenizer,
    info: TokenizerInfo,
}

impl Tokens {
    /// Loads `json` (the text of a `tokenizer.json`).
    ///
    /// # Errors
    /// Where it does not load.
    pub fn new(json: &str, info: &TokenizerInfo) -> Result<Tokens> {
        let mut tokenizer = read(json).map_err(|e| failed(Kind::Input, "tokenizer.json", e))?;
        // Whole texts are wanted, whatever a training script left in the file.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| failed(Kind::Input, "tokenizer.json", e))?;
        Ok(Tokens { tokenizer, info: info.clone() })
    }

    /// Ids of `text`. With `special`, the tokens that the model wants around a text are added; without, the text already
    /// has them, as one from a chat template.
    ///
    /// # Errors
    /// Where the tokenizer has no way to write some character.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, special).map_err(|e| failed(Kind::Input, "the text", e))?;
        let mut ids = encoding.get_ids().to_vec();
        if let Some(begin) = self.info.begin.filter(|begin| special && ids.first() != Some(begin)) {
            ids.insert(0, begin);
        }
        Ok(ids)
    }

    /// Text of tokens, without special ones.
    ///
    /// # Errors
    /// Where the tokenizer's decoder fails.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.tokenizer.decode(tokens, true).map_err(|e| failed(Kind::Input, "the tokens", e))
    }

    /// A decoder of a stream of tokens.
    pub fn decoder(self: &Arc<Self>) -> Decoder {
        Decoder { tokens: self.clone(), window: vec![], emitted: 0 }
    }

    /// The prompt that the model's chat template makes of a conversation, up to where the answer begins.
    ///
    /// # Errors
    /// Where the model has no template or it refuses the conversation.
    pub fn chat_prompt(&self, messages: &[Message]) -> Result<String> {
        let Some(template) = &self.info.chat_template else {
            let error = Error::new(Kind::Usage, "the model has no chat template");
            return Err(error.help("continue plain text instead (`--raw`)"));
        };
        Template { source: template, begin: &self.info.begin_text, end: &self.info.end_text }.render(messages)
    }

    /// Whether the model has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.info.chat_template.is_some()
    }

    /// The bytes that each of `vocab` tokens writes, as grammars need them; none for special ones.
    ///
    /// # Errors
    /// Where tokens are no bytes of a text: only byte-level and SentencePiece vocabularies are.
    pub fn bytes(&self, vocab: usize) -> Result<Vec<Vec<u8>>> {
        let decoder = serde_json::to_string(&self.tokenizer.get_decoder()).unwrap_or_default();
        let (levels, falls_back) = (decoder.contains("\"ByteLevel\""), decoder.contains("\"ByteFallback\""));
        if !levels && !falls_back {
            let message =
                "a grammar needs a vocabulary of bytes (byte-level or SentencePiece), which this model has not";
            return Err(Error::new(Kind::Unsupported, message));
        }
        let special = self.tokenizer.get_added_tokens_decoder();
        let of = |id: u32| {
            let name = match special.get(&id) {
                Some(added) if !added.special => return added.content.clone().into_bytes(),
                Some(_) => return vec![],
                None => self.name(id).unwrap_or_default(),
            };
            if levels { from_levels(&name) } else { from_pieces(&name) }
        };
        Ok((0..vocab as u32).map(of).collect())
    }

    /// Every token's text and id.
    pub fn vocabulary(&self) -> HashMap<String, u32> {
        self.tokenizer.get_vocab(true).into_iter().collect()
    }

    /// Text of one token as the vocabulary has it.
    pub fn name(&self, token: u32) -> Option<String> {
        self.tokenizer.id_to_token(token)
    }
}

/// A `tokenizer.json` whose model is of byte pairs, which is nearly all of it. The crate's own reading copies it twice to learn
/// its type, and takes most of the time to a first token; read as what it is, it takes a third.
#[derive(Deserialize)]
struct BytePairs {
    version: String,
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    model: BPE,
    post_processor: Option<PostProcessorWrapper>,
    decoder: Option<DecoderWrapper>,
}

/// Reads a `tokenizer.json`: what is no [`BytePairs`] in the crate's own way, which also says what is wrong with it.
fn read(json: &str) -> Result<Tokenizer, tokenizers::Error> {
    let parts = serde_json::from_str::<BytePairs>(json).ok().filter(|parts| parts.version == "1.0");
    let Some(parts) = parts else { return json.parse() };
    let mut tokenizer = Tokenizer::new(parts.model);
    tokenizer.with_normalizer(parts.normalizer).with_pre_tokenizer(parts.pre_tokenizer);
    tokenizer.with_post_processor(parts.post_processor).with_decoder(parts.decoder);
    tokenizer.add_tokens(&parts.added_tokens);
    Ok(tokenizer)
}

/// Turns tokens into text as they come.
#[derive(Debug)]
pub struct Decoder {
    tokens: Arc<Tokens>,
    /// The last tokens that gave text, then those that have given none yet. The former give the latter their context: a
    /// leading space depends on it.
    window: Vec<u32>,
    /// How many of them have given text.
    emitted: usize,
}

impl Decoder {
    /// The text that `token` completes; empty while a character is unfinished.
    ///
    /// # Errors
    /// Where the tokenizer's decoder fails.
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.window.push(token);
        let text = self.pending()?;
        // An unfinished character decodes to the replacement character.
        if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.window.drain(..self.emitted);
        self.emitted = self.window.len();
        Ok(text)
    }

    /// What is left at the end: characters that were never finished, as replacement characters.
    ///
    /// # Errors
    /// Where the tokenizer's decoder fails.
    pub fn finish(mut self) -> Result<String> {
        let text = self.pending()?;
        self.window.clear();
        Ok(text)
    }

    /// Text of the tokens that have given none yet.
    fn pending(&mut self) -> Result<String> {
        let before = self.tokens.decode(&self.window[..self.emitted])?;
        let mut all = self.tokens.decode(&self.window)?;
        // Decoders that look ahead may change the last character; what was given cannot be taken back.
        let common = all.char_indices().zip(before.chars()).take_while(|((_, a), b)| a == b).last();
        let keep = common.map_or(0, |((at, c), _)| at + c.len_utf8());
        Ok(all.split_off(keep))
    }
}

/// Bytes of a byte-level token, in which bytes that cannot be printed are letters from U+0100 on (GPT-2's table).
fn from_levels(name: &str) -> Vec<u8> {
    let printed = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let moved: Vec<u8> = (0..=255).filter(|b| !printed(*b)).collect();
    let byte = |c: char| match u32::from(c) {
        code @ 0..=255 => code as u8,
        code => moved.get(code as usize - 256).copied().unwrap_or(b'?'),
    };
    name.chars().map(byte).collect()
}

/// Bytes of a SentencePiece token: `▁` is a space, `<0x0A>` a byte.
fn from_pieces(name: &str) -> Vec<u8> {
    let byte = name.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    match byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => vec![byte],
        None => name.replace('\u{2581}', " ").into_bytes(),
    }
}

fn failed(kind: Kind, what: &str, error: tokenizers::Error) -> Error {
    Error::new(kind, format!("{what}: {error}")).caused_by(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Byte-level, so that characters are cut into tokens.
    fn bytes() -> Arc<Tokens> {
        let info = TokenizerInfo { begin: Some(256), ..TokenizerInfo::default() };
        Arc::new(Tokens::new(&byte_level(), &info).unwrap())
    }

    fn byte_level() -> String {
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let mut alphabet: Vec<char> = alphabet.into_iter().collect();
        alphabet.sort_unstable();
        let vocab: serde_json::Map<String, serde_json::Value> =
            alphabet.iter().enumerate().map(|(i, c)| (c.to_string(), i.into())).collect();
        let json = serde_json::json!({
            "version": "1.0", "added_tokens": [{"id": 256, "content": "<s>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        json.to_string()
    }

    #[test]
    fn reading_is_the_crate_s() {
        let bytes = byte_level();
        let [merged, word_level, later] = [
            ("\"merges\":[]", "\"merges\":[\"! !\",\"a b\"],\"unk_token\":\"?\""),
            ("\"type\":\"BPE\"", "\"type\":\"WordLevel\",\"unk_token\":\"?\""),
            ("\"version\":\"1.0\"", "\"version\":\"2.0\""),
        ]
        .map(|(from, to)| bytes.replace(from, to));
        let merged = merged.replace("\"!\":", "\"!!\":300,\"ab\":301,\"!\":");
        for json in [&bytes, &merged, &word_level] {
            let theirs: Tokenizer = json.parse().unwrap();
            assert_eq!(read(json).unwrap().to_string(false).unwrap(), theirs.to_string(false).unwrap());
        }
        assert!(serde_json::from_str::<BytePairs>(&merged).is_ok(), "the short way is taken");
        assert!(read(&later).is_err() && later.parse::<Tokenizer>().is_err());
    }

    #[test]
    fn streams_give_whole_characters() {
        let tokens = bytes();
        let text = "Grüße, 世界! 👩‍🚀 ok";
        let ids = tokens.encode(text, false).unwrap();
        assert_eq!(ids.len(), text.len());
        let mut decoder = tokens.decoder();
        let pieces: Vec<String> = ids.iter().map(|id| decoder.push(*id).unwrap()).collect();
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|p| !p.contains(char::REPLACEMENT_CHARACTER)));
        assert_eq!(decoder.finish().unwrap(), "");
    }

    #[test]
    fn an_unfinished_character_comes_at_the_end() {
        let tokens = bytes();
        let ids = tokens.encode("a世", false).unwrap();
        let mut decoder = tokens.decoder();
        let text: String = ids[..3].iter().map(|id| decoder.push(*id).unwrap()).collect();
        assert_eq!(text + &decoder.finish().unwrap(), "a\u{fffd}");
    }

    #[test]
    fn tokens_are_bytes() {
        let (tokens, text) = (bytes(), "\n a\u{ad}世 ");
        let all = tokens.bytes(258).unwrap();
        let ids = tokens.encode(text, false).unwrap();
        let found: Vec<u8> = ids.iter().flat_map(|id| all[*id as usize].clone()).collect();
        assert_eq!(found, text.as_bytes());
        assert!(all[256].is_empty() && all[257].is_empty(), "special, and unknown");
        assert_eq!((from_pieces("\u{2581}a\u{2581}"), from_pieces("<0x0A>")), (b" a ".to_vec(), vec![10]));
    }

    #[test]
    fn the_begin_token_comes_once() {
        let tokens = bytes();
        assert_eq!(tokens.encode("a", true).unwrap().len(), 2);
        assert_eq!(tokens.encode("<s>a", true).unwrap(), tokens.encode("a", true).unwrap());
        assert_eq!(tokens.encode("a", false).unwrap().len(), 1);
        assert_eq!(tokens.decode(&tokens.encode("a", true).unwrap()).unwrap(), "a");
    }

    #[test]
    fn damaged_tokenizers_are_errors() {
        assert_eq!(Tokens::new("{}", &TokenizerInfo::default()).unwrap_err().exit_code(), 3);
    }
}
