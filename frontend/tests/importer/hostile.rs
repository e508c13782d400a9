//! Damaged and hostile files: an error, never a panic, and no allocation that the file does not justify.

use crate::files::{Meta, Tensor, Tensors, gguf, safetensors};
use crate::shared;
use mansard_frontend::{Options, open};
use mansard_ir::{Error, Model};
use std::path::{Path, PathBuf};

fn corpus(target: &str) -> PathBuf {
    shared().join("../fuzz/corpus").join(target)
}

/// A llama of two layers, 8 wide, with a vocabulary of 12.
fn tiny() -> Tensors {
    let mut tensors = Tensors::new();
    let mut add = |name: String, shape: &[usize]| {
        let data = (0..shape.iter().product()).map(|i: usize| (i % 7) as f32 * 0.125 - 0.375).collect();
        tensors.insert(name, Tensor { shape: shape.to_vec(), data });
    };
    add("model.embed_tokens.weight".into(), &[12, 8]);
    add("model.norm.weight".into(), &[8]);
    for layer in 0..2 {
        let mut of = |name: &str, shape: &[usize]| add(format!("model.layers.{layer}.{name}.weight"), shape);
        of("input_layernorm", &[8]);
        of("post_attention_layernorm", &[8]);
        of("self_attn.q_proj", &[8, 8]);
        of("self_attn.k_proj", &[4, 8]);
        of("self_attn.v_proj", &[4, 8]);
        of("self_attn.o_proj", &[8, 8]);
        of("mlp.gate_proj", &[16, 8]);
        of("mlp.up_proj", &[16, 8]);
        of("mlp.down_proj", &[8, 16]);
    }
    tensors
}

const CONFIG: &str = include_str!("../../../fuzz/corpus/config.json");

fn tiny_gguf(architecture: &'static str) -> Vec<u8> {
    let sizes = [
        ("context_length", 16),
        ("embedding_length", 8),
        ("block_count", 2),
        ("feed_forward_length", 16),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
    ];
    let mut metadata = vec![("general.architecture".to_owned(), Meta::Text(architecture))];
    metadata.extend(sizes.map(|(key, n)| (format!("{architecture}.{key}"), Meta::Size(n))));
    metadata.push((format!("{architecture}.attention.layer_norm_rms_epsilon"), Meta::Real(1e-5)));
    let tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab", "▁a", "▁ab", "c", "<0x0A>", "d"];
    let mut add = |key: &str, value| metadata.push((format!("tokenizer.ggml.{key}"), value));
    add("model", Meta::Text("llama"));
    add("tokens", Meta::Texts(tokens.map(str::to_owned).to_vec()));
    add("scores", Meta::Reals((0..12).map(|i| -(i as f32)).collect()));
    add("token_type", Meta::Ints(vec![2, 3, 3, 1, 1, 1, 1, 1, 1, 1, 6, 1]));
    add("eos_token_id", Meta::Size(2));
    add("add_bos_token", Meta::Flag(false));
    let names = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ];
    let renamed =
        tiny().into_iter().map(|(n, t)| (names.iter().fold(n, |n, (ours, theirs)| n.replace(ours, theirs)), t));
    gguf(&metadata, &renamed.collect())
}

/// A folder in which files are put and opened; `safetensors` find a config beside them.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), CONFIG).unwrap();
        Bench(folder)
    }

    /// Opens the bytes; a model that opens must also be legal and readable.
    fn open(&self, name: &str, bytes: &[u8]) -> Result<Model, Error> {
        let path = self.0.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let model = open(&path, &Options::default())?;
        mansard_ir::verify::verify_model(&model).unwrap_or_else(|e| panic!("{e}"));
        for (name, weight) in model.weights.iter() {
            weight.read_all().unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        Ok(model)
    }
}

fn damage(name: &str, bytes: &[u8], header: usize) {
    let bench = Bench::new();
    bench.open(name, bytes).unwrap_or_else(|e| panic!("{e}"));
    for length in (0..bytes.len()).step_by((bytes.len() / 1500).max(1)).chain(bytes.len() - 8..bytes.len()) {
        let error = bench.open(name, &bytes[..length]).err();
        assert!(error.is_some(), "{name} of {length} bytes opens");
    }
    let mut bytes = bytes.to_vec();
    for bit in (0..header * 8).step_by((header / 400).max(1) | 1) {
        bytes[bit / 8] ^= 1 << (bit % 8);
        let _either = bench.open(name, &bytes);
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
}

fn header_length(safetensors: &[u8]) -> usize {
    8 + u64::from_le_bytes(safetensors[..8].try_into().unwrap()) as usize
}

#[test]
fn damaged_gguf() {
    let bytes = tiny_gguf("llama");
    let header = bytes.len() - 4 * tiny().values().map(|t| t.data.len()).sum::<usize>();
    damage("model.gguf", &bytes, header);
}

#[test]
fn damaged_safetensors() {
    let bytes = safetensors(&tiny());
    damage("model.safetensors", &bytes, header_length(&bytes));
}

#[test]
fn damaged_golden() {
    let bench = Bench::new();
    let golden = shared().join("goldens/llama");
    std::fs::copy(golden.join("config.json"), bench.0.path().join("config.json")).unwrap();
    let bytes = std::fs::read(golden.join("model.safetensors")).unwrap();
    for length in (0..bytes.len()).step_by(bytes.len() / 40) {
        assert!(bench.open("model.safetensors", &bytes[..length]).is_err());
    }
    let (mut bytes, header) = (bytes.clone(), header_length(&bytes));
    for bit in (0..header * 8).step_by(331) {
        bytes[bit / 8] ^= 1 << (bit % 8);
        let _either = bench.open("model.safetensors", &bytes);
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
}

/// Every file of the fuzzers' corpora: those called `ok-` open, those called `bad-` do not, the rest may do either.
#[test]
fn corpora() {
    for (target, name) in [("gguf", "model.gguf"), ("safetensors", "model.safetensors")] {
        let mut files: Vec<PathBuf> = std::fs::read_dir(corpus(target)).unwrap().map(|f| f.unwrap().path()).collect();
        files.sort();
        assert!(!files.is_empty());
        for file in files {
            let stem = file.file_name().unwrap().to_string_lossy().into_owned();
            let opened = Bench::new().open(name, &std::fs::read(&file).unwrap());
            assert!(!stem.starts_with("ok-") || opened.is_ok(), "{target}/{stem}: {}", opened.unwrap_err());
            assert!(!stem.starts_with("bad-") || opened.is_err(), "{target}/{stem} opens");
        }
    }
}

fn refused(name: &str, bytes: &[u8], message: &str) -> u8 {
    let error = Bench::new().open(name, bytes).unwrap_err();
    let advice = error.advice().unwrap_or_default();
    assert!(format!("{error}; {advice}").contains(message), "{error}; {advice}");
    error.exit_code()
}

/// `bytes` with the first `from` replaced by as many bytes.
fn patched(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let at = bytes.windows(from.len()).position(|w| w == from).unwrap();
    [&bytes[..at], to, &bytes[at + from.len()..]].concat()
}

#[test]
fn errors_say_what_was_found_and_what_is_supported() {
    let file = tiny_gguf("llama");
    assert_eq!(refused("model.gguf", &tiny_gguf("mamba"), "`mamba`; supported: llama, qwen2"), 4);
    let gguf = |message, from: &[u8], to: &[u8]| refused("model.gguf", &patched(&file, from, to), message);
    assert_eq!(gguf("tensor `model.layers.1.mlp.up_proj.weight` is missing", b"blk.1.ffn_up", b"blk.1.ffn_xx"), 3);
    assert_eq!(gguf("the count 1152921504606846976", &[20, 0, 0, 0, 0, 0, 0, 0], &(1u64 << 60).to_le_bytes()), 3);
    assert_eq!(gguf("supported: 2 and 3", b"GGUF\x03", b"GGUF\x01"), 4);
    // The first entry of the table: one shape, an unknown type.
    let entry = b"blk.0.attn_k.weight\x02\0\0\0\x08\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\0\0\0\0";
    let mut other = entry.to_vec();
    other[entry.len() - 4] = 16;
    assert_eq!(gguf("type IQ2_XXS; supported: F32, F16, BF16, Q4_0", entry, &other), 4);
    other[entry.len() - 4] = 0;
    other[entry.len() - 12] = 3;
    assert_eq!(gguf("`model.layers.0.self_attn.k_proj.weight`: expected shape [4, 8], found [3, 8]", entry, &other), 3);
    other[entry.len() - 8..entry.len() - 4].fill(255);
    assert_eq!(gguf("too large", entry, &other), 3);

    let file = safetensors(&tiny());
    let st = |message, from: &[u8], to: &[u8]| refused("model.safetensors", &patched(&file, from, to), message);
    assert_eq!(st("is missing", b"model.norm.weight", b"model.morn.weight"), 3);
    assert_eq!(st("does not add up", b"[12,8]", b"[99,8]"), 3);
    assert_eq!(st("does not add up", b"\"F32\"", b"\"F16\""), 3);
    assert_eq!(st("there are two tensors", b"layers.1.input_layernorm", b"layers.0.input_layernorm"), 3);
    let claimed = [&(1u64 << 60).to_le_bytes()[..], &file[8..]].concat();
    assert_eq!(refused("model.safetensors", &claimed, "the header claims 1152921504606846976 bytes"), 3);
    assert_eq!(refused("model.bin", b"neither", "supported: GGUF; a directory"), 4);
    assert_eq!(refused("empty", b"", "no model file"), 3);
    assert_eq!(open(Path::new("/nonexistent"), &Options::default()).unwrap_err().exit_code(), 5);
}

#[test]
fn shards_are_found_by_their_index() {
    let bench = Bench::new();
    let path = |name: &str| bench.0.path().join(name);
    let (first, second): (Tensors, Tensors) = tiny().into_iter().partition(|(name, _)| name.contains("layers.0"));
    let mut map = serde_json::Map::new();
    for (shard, tensors) in [("one.safetensors", &first), ("two.safetensors", &second)] {
        std::fs::write(path(shard), safetensors(tensors)).unwrap();
        map.extend(tensors.keys().map(|name| (name.clone(), shard.into())));
    }
    let index = "model.safetensors.index.json";
    let write = |map: &serde_json::Map<_, _>| {
        std::fs::write(path(index), serde_json::json!({ "metadata": {}, "weight_map": map }).to_string()).unwrap();
    };
    write(&map);
    assert_eq!(open(bench.0.path(), &Options::default()).unwrap().calls.len(), 4);
    assert_eq!(open(&path(index), &Options::default()).unwrap().calls.len(), 4);
    map.insert("model.norm.weight".into(), "../two.safetensors".into());
    write(&map);
    assert!(open(bench.0.path(), &Options::default()).unwrap_err().message().contains("no plain file name"));
    map.insert("model.norm.weight".into(), "one.safetensors".into());
    map.insert("another".into(), "one.safetensors".into());
    write(&map);
    assert!(open(bench.0.path(), &Options::default()).unwrap_err().message().contains("`another` is in no shard"));
}

/// Writes the seeds of the corpora: `cargo test -p mansard-frontend -- --ignored write_corpora`.
#[test]
#[ignore = "writes to the repository"]
fn write_corpora() {
    let write = |target: &str, name: &str, bytes: &[u8]| {
        std::fs::create_dir_all(corpus(target)).unwrap();
        std::fs::write(corpus(target).join(name), bytes).unwrap();
    };
    for (target, file) in [("gguf", tiny_gguf("llama")), ("safetensors", safetensors(&tiny()))] {
        write(target, "ok-llama", &file);
        write(target, "bad-empty", b"");
        write(target, "bad-header-only", &file[..8]);
        write(target, "bad-half", &file[..file.len() / 2]);
        write(target, "bad-last-byte-missing", &file[..file.len() - 1]);
    }
    let model = Bench::new().open("model.gguf", &tiny_gguf("llama")).unwrap();
    write("text_ir", "ok-llama", mansard_ir::text::print_model(&model).as_bytes());
    let file = tiny_gguf("llama");
    write("gguf", "bad-architecture", &tiny_gguf("mamba"));
    write("gguf", "bad-count", &patched(&file, &[20, 0, 0, 0, 0, 0, 0, 0], &(1u64 << 60).to_le_bytes()));
    let eos = b"\x1b\0\0\0\0\0\0\0tokenizer.ggml.eos_token_id\x04\0\0\0\x02";
    let alignment = b"\x11\0\0\0\0\0\0\0general.alignment\x04\0\0\0\x03";
    write("gguf", "bad-alignment", &patched(&file, eos, alignment));
    write("gguf", "bad-missing", &patched(&file, b"blk.1.ffn_up", b"blk.1.ffn_xx"));
    write("gguf", "bad-token-id", &patched(&file, b"eos_token_id\x04\0\0\0\x02", b"eos_token_id\x04\0\0\0\x77"));
    let file = safetensors(&tiny());
    write("safetensors", "bad-missing", &patched(&file, b"model.norm.weight", b"model.morn.weight"));
    write("safetensors", "bad-shape", &patched(&file, b"[12,8]", b"[99,8]"));
    write("safetensors", "bad-twice", &patched(&file, b"layers.1.input_layernorm", b"layers.0.input_layernorm"));
    let claimed = [&(1u64 << 60).to_le_bytes()[..], &file[8..]].concat();
    write("safetensors", "bad-length", &claimed);
    write("safetensors", "bad-nesting", &[&2000u64.to_le_bytes()[..], &[b'['; 2000]].concat());
}
