//! Vocabularies without merges, from GGUF metadata: WordPiece (`bert`) and Unigram (`t5`).

use super::{Document, TokenMap, Vocabulary};
use crate::gguf::Gguf;
use mansard_ir::{Result, bail};
use serde::Serialize;
use serde_json::{Value, json};

#[derive(Serialize)]
struct WordPiece<'a> {
    r#type: &'static str,
    unk_token: &'a str,
    continuing_subword_prefix: &'static str,
    max_input_chars_per_word: usize,
    vocab: TokenMap<'a>,
}

#[derive(Serialize)]
struct Unigram<'a> {
    r#type: &'static str,
    unk_id: Option<usize>,
    vocab: Vec<(&'a str, f64)>,
    byte_fallback: bool,
}

/// `tokenizer.ggml.model = bert`: the file marks the beginnings of words (`▁word`), WordPiece their continuations
/// (`##word`).
pub(super) fn word_piece(vocabulary: &Vocabulary<'_>, first: Option<u32>, last: Option<u32>) -> Result<String> {
    let spell = |token: &&str| match token.strip_prefix('▁') {
        Some(word) => word.to_owned(),
        None if token.starts_with('[') && token.ends_with(']') => (*token).to_owned(),
        None => format!("##{token}"),
    };
    let spelled: Vec<String> = vocabulary.tokens.iter().map(spell).collect();
    let tokens: Vec<&str> = spelled.iter().map(String::as_str).collect();
    let Some(unknown) = tokens.iter().find(|t| **t == "[UNK]") else {
        bail!(Input, "tokenizer: there is no token `[UNK]`")
    };
    let model = WordPiece {
        r#type: "WordPiece",
        unk_token: unknown,
        continuing_subword_prefix: "##",
        max_input_chars_per_word: 100,
        vocab: TokenMap(&tokens),
    };
    let mut document = Document::new(vocabulary, model);
    document.normalizer = json!({ "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
        "strip_accents": null, "lowercase": true });
    document.pre_tokenizer = json!({ "type": "BertPreTokenizer" });
    document.decoder = json!({ "type": "WordPiece", "prefix": "##", "cleanup": true });
    document.post_processor = between(&tokens, first, last);
    document.text()
}

/// `tokenizer.ggml.model = t5`. `ends` are the tokens put around an encoder's text.
pub(super) fn unigram(
    gguf: &Gguf,
    vocabulary: &Vocabulary<'_>,
    ends: Option<(Option<u32>, Option<u32>)>,
) -> Result<String> {
    let Some(scores) = &vocabulary.scores else { bail!(Input, "metadata `tokenizer.ggml.scores` is missing") };
    let vocab = vocabulary.tokens.iter().copied().zip(scores.iter().copied()).collect();
    let model = Unigram { r#type: "Unigram", unk_id: vocabulary.unknown(), vocab, byte_fallback: false };
    let mut document = Document::new(vocabulary, model);
    let mut normalizers = vec![];
    if let Some(map) = gguf.raw("tokenizer.ggml.precompiled_charsmap") {
        normalizers.push(json!({ "type": "Precompiled", "precompiled_charsmap": base64(map) }));
    }
    if gguf.flag("tokenizer.ggml.remove_extra_whitespaces").unwrap_or(false) {
        normalizers.push(json!({ "type": "Strip", "strip_left": true, "strip_right": true }));
        normalizers.push(json!({ "type": "Replace", "pattern": { "Regex": " {2,}" }, "content": " " }));
    }
    document.normalizer = json!({ "type": "Sequence", "normalizers": normalizers });
    let prefixed = gguf.flag("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let scheme = if prefixed { "always" } else { "never" };
    let spaces = json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true });
    document.pre_tokenizer = spaces.clone();
    document.decoder = spaces;
    if let Some((first, last)) = ends {
        let add = |key: &str| gguf.flag(&format!("tokenizer.ggml.add_{key}_token")).unwrap_or(true);
        document.post_processor =
            between(&vocabulary.tokens, first.filter(|_| add("bos")), last.filter(|_| add("eos")));
    }
    document.text()
}

/// A template that puts text between two tokens.
fn between(tokens: &[&str], first: Option<u32>, last: Option<u32>) -> Value {
    let mut special = serde_json::Map::new();
    let mut piece = |id: u32| {
        let text = tokens[id as usize];
        special.insert(text.into(), json!({ "id": text, "ids": [id], "tokens": [text] }));
        json!({ "SpecialToken": { "id": text, "type_id": 0 } })
    };
    let text = |name: &str| json!({ "Sequence": { "id": name, "type_id": 0 } });
    let first: Vec<Value> = first.map(&mut piece).into_iter().collect();
    let last: Vec<Value> = last.map(&mut piece).into_iter().collect();
    let single: Vec<Value> = first.iter().cloned().chain([text("A")]).chain(last.iter().cloned()).collect();
    let pair: Vec<Value> = single.iter().cloned().chain([text("B")]).chain(last).collect();
    json!({ "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special })
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            let value = (word >> (18 - 6 * digit)) & 63;
            text.push(if digit <= chunk.len() { char::from(DIGITS[value as usize]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn base64_pads() {
        let encoded = ["", "f", "fo", "foo", "foobar"].map(|t| super::base64(t.as_bytes()));
        assert_eq!(encoded, ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYmFy"]);
    }
}
