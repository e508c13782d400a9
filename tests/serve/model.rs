//! A tiny artifact for tests of what uses one.

use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;

/// A tiny model with a vocabulary of bytes and a chat template.
pub fn model(folder: &Path, family: &str) -> String {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/goldens").join(family);
    for name in ["config.json", "model.safetensors"] {
        fs::copy(goldens.join(name), folder.join(name)).unwrap();
    }
    let config = fs::read_to_string(folder.join("config.json")).unwrap();
    fs::write(folder.join("config.json"), config.replace("\"eos_token_id\": 2", "\"eos_token_id\": 255")).unwrap();
    // GPT-2's letters for bytes; the last is the end of a text.
    let printed = |b: &u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let hidden = (0..256).filter(|b| !printed(b)).zip(256..).map(|(b, c)| (b, char::from_u32(c).unwrap()));
    let letters = (0..255u32).map(|b| hidden.clone().find(|h| h.0 == b).map_or(char::from_u32(b).unwrap(), |h| h.1));
    let vocab: serde_json::Map<String, Value> = letters.zip(0..).map(|(c, b)| (c.to_string(), json!(b))).collect();
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let end = json!({"id": 255, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
                     "normalized": false, "special": true});
    let tokenizer = json!({"version": "1.0", "added_tokens": [end], "pre_tokenizer": level, "decoder": level,
                           "model": {"type": "BPE", "vocab": vocab, "merges": []}});
    let template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:";
    let config = json!({"chat_template": template, "eos_token": "<end>"});
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
    let artifact = folder.join("tiny.mansard").display().to_string();
    run(&["compile", folder.to_str().unwrap(), "-o", &artifact]);
    artifact
}

pub fn run(arguments: &[&str]) {
    let out = Command::new(env!("CARGO_BIN_EXE_mansard")).args(arguments).output().unwrap();
    assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
}
