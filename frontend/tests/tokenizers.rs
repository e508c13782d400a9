//! Tokenizers as imported, read by the `tokenizers` crate, against token ids of independent engines.

mod common;

use common::{ids, import, json, published, shared, words};
use mansard_ir::Model;
use std::path::Path;
use tokenizers::Tokenizer;

fn tokenizer(model: &Model) -> Tokenizer {
    model.info.tokenizer.as_ref().unwrap().json.parse().unwrap()
}

fn encode(model: &Model, tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let encoded = tokenizer.encode(text, true).unwrap();
    let begin = model.info.tokenizer.as_ref().unwrap().begin;
    begin.into_iter().chain(encoded.get_ids().iter().copied()).collect()
}

fn check(path: &Path, name: &str) -> (Model, Tokenizer) {
    let model = import(path);
    let tokenizer = tokenizer(&model);
    let reference = json(&shared().join(format!("reference/{name}.json")));
    for prompt in reference["prompts"].as_array().unwrap() {
        let text = prompt["prompt"].as_str().unwrap();
        let got = encode(&model, &tokenizer, text);
        assert_eq!(got, ids(&prompt["prompt_ids"]), "{text:?}");
        let begin = usize::from(model.info.tokenizer.as_ref().unwrap().begin.is_some());
        assert_eq!(tokenizer.decode(&got[begin..], true).unwrap(), text);
    }
    let text = std::fs::read_to_string(shared().join("reference/text.txt")).unwrap();
    let want = words(&shared().join(format!("reference/{name}-distributions.safetensors")), "ids");
    let want: Vec<u32> = want.into_iter().map(u32::from_le_bytes).collect();
    assert_eq!(encode(&model, &tokenizer, &text)[..want.len()], want);
    (model, tokenizer)
}

#[test]
fn smollm2_cuts_digits_and_merges_bytes() {
    let Some(path) = published("smollm2.gguf") else { return };
    let (model, tokenizer) = check(&path, "smollm2");
    let info = model.info.tokenizer.as_ref().unwrap();
    assert_eq!((info.begin, info.end_text.as_str()), (None, "<|im_end|>"));
    assert!(info.chat_template.as_ref().unwrap().contains("<|im_start|>"));
    assert_eq!(model.info.end_tokens, [0, 2]);
    assert_eq!(encode(&model, &tokenizer, "<|im_start|>12"), [1, 33, 34]);
}

#[test]
fn gemma3_merges_by_score() {
    let Some(path) = published("gemma3-270m.gguf") else { return };
    let (model, tokenizer) = check(&path, "gemma3-270m");
    let info = model.info.tokenizer.as_ref().unwrap();
    assert_eq!((info.begin, info.begin_text.as_str()), (Some(2), "<bos>"));
    assert_eq!(model.info.end_tokens, [1, 106]);
    let text = "tab\tthree   spaces\n\nand a 𓀀 outside the vocabulary";
    let got = encode(&model, &tokenizer, text);
    assert_eq!(tokenizer.decode(&got[1..], true).unwrap(), text, "byte fallback: {got:?}");
}

#[test]
fn minilm_puts_text_between_its_tokens() {
    let Some(path) = published("minilm") else { return };
    let model = import(&path);
    assert!(model.info.encoder && model.info.end_tokens.is_empty());
    let tokenizer = tokenizer(&model);
    for sentence in json(&shared().join("reference/minilm.json"))["sentences"].as_array().unwrap() {
        let text = sentence["text"].as_str().unwrap();
        assert_eq!(encode(&model, &tokenizer, text), ids(&sentence["ids"]), "{text:?}");
    }
}

#[test]
fn an_absent_tokenizer_is_no_error() {
    let model = import(&shared().join("goldens/llama"));
    assert!(model.info.tokenizer.is_none());
    assert_eq!(model.info.end_tokens, [2]);
}
