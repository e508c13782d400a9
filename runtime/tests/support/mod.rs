// Artifacts made by hand, with a few instructions for machine code: what the runtime's tests and examples open.

use mansard_ir::artifact::{Code, DATA_ALIGN, FORMAT_VERSION, METADATA_KEY, Manifest, Provenance, SECTION_ALIGN};
use mansard_ir::graph::TokenRange;
use mansard_ir::model::{ModelInfo, TokenizerInfo};
use mansard_ir::plan::*;
use std::io::Write;

// Kernels for x86-64: `fn(args: rdi, step: rsi, thread: rdx, threads: rcx)`; all but TALLY are worker 0's.
// For each row r asked for: `logits[r][0..8]` is 0 but for 64 at `(tokens[rows[r]] + 1) % 8`. Args: logits.
const COUNT: &str = "\
    48 85 d2 75 40 4c 8b 07 4c 8b 4e 28 4c 8b 56 38 4c 8b 5e 10 31 c9 4c 39 \
    d9 7d 2a 49 63 04 8a 41 8b 04 81 ff c0 83 e0 07 0f 57 c0 41 0f 11 00 41 \
    0f 11 40 10 41 c7 04 80 00 00 80 42 49 83 c0 40 48 ff c1 eb d1 c3";
// Every worker adds the first word of a weight to a counter. Args: counter, weight.
const TALLY: &str = "\
    48 8b 47 08 8b 00 48 8b 0f f0 01 01 c3";
// `pool[slots[i]] = tokens[i]`, a cache of i32. Args: pool, tokens.
const REMEMBER: &str = "\
    48 85 d2 75 26 4c 8b 07 4c 8b 4f 08 4c 8b 56 40 4c 8b 1e 31 c9 4c 39 d9 \
    7d 11 49 63 04 8a 41 8b 14 89 41 89 14 80 48 ff c1 eb ea c3";
// For each tile: `sums[sequence][0]` is the sum of the cache over the sequence, by its table. Args: pool, sums.
const RECALL: &str = "\
    48 85 d2 75 78 53 55 4c 8b 07 4c 8b 4f 08 4c 8b 56 30 31 c9 48 3b 4e 18 \
    7d 61 48 89 c8 48 c1 e0 04 48 03 46 48 4c 63 58 08 4c 63 50 0c 48 8b 5e \
    20 49 0f af db 48 c1 e3 02 48 03 5e 50 31 ed 31 d2 4c 39 d2 7d 22 48 89 \
    d0 48 c1 e8 06 48 63 04 83 48 c1 e0 06 48 89 d7 48 83 e7 3f 48 01 f8 41 \
    03 2c 80 48 ff c2 eb d9 f3 0f 2a c5 49 c1 e3 06 f3 43 0f 11 04 19 48 ff \
    c1 eb 99 5d 5b c3";

pub const TOKENIZER: &str = r#"{"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
"model": {"type": "WordLevel", "unk_token": "zero", "vocab":
{"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}}}"#;

/// An artifact before it is written.
pub struct Parts {
    pub manifest: Manifest,
    pub sections: Vec<(String, Vec<u8>)>,
}

/// A model that counts: after token n comes n + 1, modulo 8. Beside its logits it returns `sum`, the sum of each
/// sequence's tokens read back from its cache, and `tally`, 5 for each of two launches and each worker.
pub fn counting_parts() -> Parts {
    let mut code = vec![];
    let mut entries = vec![];
    for kernel in [COUNT, TALLY, REMEMBER, RECALL] {
        entries.push(code.len());
        code.extend(kernel.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()));
        code.resize(code.len().next_multiple_of(SECTION_ALIGN), 0xcc);
    }
    let mut weight = vec![0; 64];
    weight[0] = 5;
    let mut tokenizer = TOKENIZER.as_bytes().to_vec();
    tokenizer.resize(tokenizer.len().next_multiple_of(SECTION_ALIGN), b' ');
    let info = TokenizerInfo { begin_text: "<s>".into(), chat_template: Some(CHAT.into()), ..TokenizerInfo::default() };
    let manifest = Manifest {
        format_version: FORMAT_VERSION,
        model: ModelInfo {
            architecture: "counter".into(),
            context: 256,
            vocab: 8,
            hidden: 1,
            end_tokens: vec![0],
            tokenizer: Some(info),
            ..ModelInfo::default()
        },
        program: counting_program(),
        code: vec![Code {
            section: "code/native".into(),
            arch: "x86_64".into(),
            target: "native".into(),
            features: vec!["sse2".into()],
            entries,
            tiles: vec![],
        }],
        ptx: vec![],
        synthetic: None,
        hashes: Default::default(),
        manifest_hash: String::new(),
        provenance: Provenance::default(),
    };
    let sections = [("code/native", code), ("tokenizer.json", tokenizer), ("weights/five", weight)];
    Parts { manifest, sections: sections.map(|(name, bytes)| (name.to_string(), bytes)).to_vec() }
}

pub const CHAT: &str = "{% for m in messages %}{{ m.content }} {% endfor %}";

fn counting_program() -> Program {
    let limits = Limits { tokens: 16, rows: 8, sequences: 4, context: 256, tile: 4 };
    let buffer =
        |name: &str, offset, rows| Buffer { name: name.into(), ty: "f32[r, 8]".into(), offset, row_bytes: 64, rows };
    let kernel =
        |name: &str| KernelSpec { name: name.into(), text: String::new(), flops_per_token: 1.0, weight_bytes: 64 };
    let launch = |kernel, args: &[Arg], barrier| Launch { kernel: KernelId(kernel), args: args.to_vec(), barrier };
    let launches = vec![
        launch(0, &[Arg::Buffer(BufferId(0))], false),
        launch(1, &[Arg::Buffer(BufferId(2)), Arg::Weight(WeightId(0))], false),
        launch(2, &[Arg::Cache(CacheId(0)), Arg::Tokens], false),
        launch(3, &[Arg::Cache(CacheId(0)), Arg::Buffer(BufferId(1))], true),
        launch(1, &[Arg::Buffer(BufferId(2)), Arg::Weight(WeightId(0))], true),
    ];
    let variant = |min, max| Variant { tokens: TokenRange { min, max }, launches: launches.clone() };
    let output = |name: &str, buffer, width| Output { name: name.into(), buffer: BufferId(buffer), width };
    Program {
        limits,
        arena_bytes: 4096,
        scratch_bytes: 0,
        buffers: vec![
            buffer("logits", 0, RowCount::Rows),
            buffer("sums", 1024, RowCount::Sequences),
            buffer("tally", 2048, RowCount::Sequences),
        ],
        weights: vec![WeightSpec { name: "five".into(), ty: "f32[1]".into(), bytes: 64, recipe: None }],
        caches: vec![CacheSpec { name: "tokens".into(), ty: "keys<f32>[c, 1, 1]".into(), block_bytes: 256, group: 0 }],
        groups: CacheGroup::all(),
        kernels: ["count", "tally", "remember", "recall"].map(kernel).to_vec(),
        variants: vec![variant(1, 1), variant(2, 16)],
        outputs: vec![output("logits", 0, 8), output("sum", 1, 1), output("tally", 2, 1)],
    }
}

impl Parts {
    /// The file, its hashes right.
    pub fn bytes(&mut self) -> Vec<u8> {
        let hash = |bytes: &Vec<u8>| blake3::hash(bytes).to_hex().to_string();
        self.manifest.hashes = self.sections.iter().map(|(name, bytes)| (name.clone(), hash(bytes))).collect();
        self.encode()
    }

    /// The file with the sections' hashes as they are.
    pub fn encode(&mut self) -> Vec<u8> {
        let json = self.manifest.to_json_with_hash().unwrap();
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), serde_json::json!({METADATA_KEY: json}));
        let mut data = vec![];
        for (name, bytes) in &self.sections {
            let offsets = [data.len(), data.len() + bytes.len()];
            let entry = serde_json::json!({"dtype": "U8", "shape": [bytes.len()], "data_offsets": offsets});
            header.insert(name.clone(), entry);
            data.extend(bytes);
        }
        file(&serde_json::to_string(&header).unwrap(), &data)
    }

    /// The file, written.
    pub fn write(&mut self) -> tempfile::NamedTempFile {
        write(&self.bytes())
    }
}

/// A header padded with spaces, and data.
pub fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let end = (8 + header.len()).next_multiple_of(DATA_ALIGN);
    let mut bytes = ((end - 8) as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(end, b' ');
    bytes.extend(data);
    bytes
}

pub fn write(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(".mansard").tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}
