//! Tokenizers as imported, read by the `tokenizers` crate, against token ids of independent engines.

use crate::files::{Meta, Tensors, converted};
use crate::{ids, import, json, published, shared, words};
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

/// The tokenizer of a GGUF file with this metadata.
fn from_metadata(family: &str, metadata: Vec<(&str, Meta)>) -> (Model, Tokenizer) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, converted(family, metadata, Tensors::new())).unwrap();
    let model = import(&path);
    let tokenizer = tokenizer(&model);
    (model, tokenizer)
}

fn strings(texts: &[&str]) -> Meta {
    Meta::Texts(texts.iter().map(|t| (*t).to_owned()).collect())
}

#[test]
fn sentence_piece_puts_a_space_first_and_falls_back_to_bytes() {
    let tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁a", "ba", "<0xC3>", "<0xA9>"];
    let metadata = vec![
        ("tokenizer.ggml.model", Meta::Text("llama")),
        ("tokenizer.ggml.tokens", strings(&tokens)),
        ("tokenizer.ggml.scores", Meta::Reals(vec![0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -3.0, -2.0, -1.0, 0.0, 0.0])),
        ("tokenizer.ggml.token_type", Meta::Ints(vec![2, 3, 3, 1, 1, 1, 1, 1, 1, 6, 6])),
        ("tokenizer.ggml.bos_token_id", Meta::Size(1)),
        ("tokenizer.ggml.eos_token_id", Meta::Size(2)),
    ];
    let (model, tokenizer) = from_metadata("llama", metadata);
    // `ba` has the best score, then a word's first letter, then `ab`.
    let got = encode(&model, &tokenizer, "aba abé</s>");
    assert_eq!(got, [1, 7, 8, 7, 5, 9, 10, 2]);
    assert_eq!(tokenizer.decode(&got, true).unwrap(), "aba abé");
    assert_eq!(model.info.end_tokens, [2]);
}

#[test]
fn word_pieces_are_spelled_back() {
    let tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁wind", "ow", "▁a", "▁."];
    let metadata = vec![
        ("tokenizer.ggml.model", Meta::Text("bert")),
        ("tokenizer.ggml.tokens", strings(&tokens)),
        ("tokenizer.ggml.token_type", Meta::Ints(vec![3, 2, 3, 3, 1, 1, 1, 1])),
        ("tokenizer.ggml.cls_token_id", Meta::Size(2)),
        ("tokenizer.ggml.seperator_token_id", Meta::Size(3)),
    ];
    let (model, tokenizer) = from_metadata("bert", metadata);
    assert_eq!(encode(&model, &tokenizer, "A Window. 一"), [2, 6, 4, 5, 7, 1, 3]);
}

#[test]
fn unigram_takes_the_likeliest_pieces() {
    let tokens = ["<unk>", "</s>", "▁a", "b", "▁ab", "c", "bc"];
    let metadata = vec![
        ("tokenizer.ggml.model", Meta::Text("t5")),
        ("tokenizer.ggml.tokens", strings(&tokens)),
        ("tokenizer.ggml.scores", Meta::Reals(vec![-10.0, 0.0, -1.0, -3.0, -2.5, -3.0, -1.0])),
        ("tokenizer.ggml.token_type", Meta::Ints(vec![2, 3, 1, 1, 1, 1, 1])),
        ("tokenizer.ggml.eos_token_id", Meta::Size(1)),
        ("tokenizer.ggml.remove_extra_whitespaces", Meta::Flag(true)),
    ];
    let (model, tokenizer) = from_metadata("bert", metadata);
    assert_eq!(encode(&model, &tokenizer, " abc   ab "), [2, 6, 4, 1]);
}

#[test]
fn text_is_cut_as_the_file_says() {
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};
    let pieces = |pre: &'static str, text: &str| -> Vec<String> {
        let metadata = vec![
            ("tokenizer.ggml.model", Meta::Text("gpt2")),
            ("tokenizer.ggml.pre", Meta::Text(pre)),
            ("tokenizer.ggml.tokens", strings(&["a", "b", "ab"])),
            ("tokenizer.ggml.merges", strings(&["a b"])),
        ];
        let (_, tokenizer) = from_metadata("llama", metadata);
        let mut cut = PreTokenizedString::from(text);
        tokenizer.get_pre_tokenizer().unwrap().pre_tokenize(&mut cut).unwrap();
        let splits = cut.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.iter().map(|(_, (from, to), _)| text[*from..*to].to_owned()).collect()
    };
    let text = "I'LL pay 1234€\n  now!";
    assert_eq!(pieces("gpt-2", text), ["I", "'", "LL", " pay", " 1234", "€", "\n ", " now", "!"]);
    assert_eq!(pieces("smollm", "in 1234"), ["in", " ", "1", "2", "3", "4"]);
    assert_eq!(pieces("llama-bpe", text), ["I", "'LL", " pay", " ", "123", "4", "€\n", " ", " now", "!"]);
    assert_eq!(pieces("qwen2", "v 12"), ["v", " ", "1", "2"]);
    assert_eq!(pieces("tekken", "camelCase 12"), ["camel", "Case", " ", "1", "2"]);
    assert_eq!(pieces("default", "a+b 1234"), ["a", "+", "b", " ", "123", "4"]);
}

#[test]
fn a_template_that_only_begins_text_becomes_the_begin_token() {
    let folder = tempfile::tempdir().unwrap();
    let golden = shared().join("goldens/llama");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden.join(name), folder.path().join(name)).unwrap();
    }
    let special = |id: u32, text: &str| {
        serde_json::json!({ "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true })
    };
    let template = serde_json::json!({ "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
        "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } } });
    let document = serde_json::json!({ "version": "1.0", "truncation": null, "normalizer": null, "pre_tokenizer": null,
        "padding": { "strategy": { "Fixed": 8 }, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<unk>" },
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(3, "<|im_end|>")],
        "post_processor": { "type": "Sequence", "processors": [template] }, "decoder": null,
        "model": { "type": "BPE", "vocab": { "<unk>": 0, "<s>": 1, "a": 2, "<|im_end|>": 3 }, "merges": [] } });
    std::fs::write(folder.path().join("tokenizer.json"), document.to_string()).unwrap();
    let settings = serde_json::json!({ "bos_token": { "content": "<s>" }, "eos_token": "<|im_end|>",
        "chat_template": [{ "name": "tools", "template": "t" }, { "name": "default", "template": "d" }] });
    std::fs::write(folder.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
    std::fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [2, 5]}"#).unwrap();
    let model = import(folder.path());
    let info = model.info.tokenizer.as_ref().unwrap();
    assert_eq!((info.begin, info.begin_text.as_str(), info.chat_template.as_deref()), (Some(1), "<s>", Some("d")));
    assert_eq!(encode(&model, &tokenizer(&model), "aa"), [1, 2, 2]);
    assert_eq!(model.info.end_tokens, [2, 3, 5]);
}
