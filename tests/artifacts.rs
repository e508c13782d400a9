//! Stored artifacts keep opening and saying what they said; damaged bytes keep being refused.
//!
//! `artifacts/format-N.mansard` was written by the first version with that format, for any x86-64 machine with AVX2, and
//! `format-N.json` holds the logits it gave. Such a file is never changed again. `fuzz/corpus/artifact` and
//! `fuzz/corpus/text_ir` are the seeds of the fuzz targets; here they go through the same entry points.
//!
//! `cargo test -p mansard-tests --test artifacts -- --ignored` writes what is missing after a new format.

use mansard::driver::CompileOptions;
use mansard_ir::artifact::{FORMAT_VERSION, METADATA_KEY, Manifest};
use mansard_ir::model::TokenizerInfo;
use mansard_ir::{Kind, sample, text, verify};
use mansard_passes::LimitsRequest;
use mansard_runtime::{Artifact, Engine, EngineOptions, Model as Opened, OpenOptions, Rows, Work};
use mansard_tests::{here, oracle};
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
"pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null, "model": {"type": "WordLevel",
"vocab": {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}, "unk_token": "zero"}}"#;

/// Compiles a text with made-up weights for small steps.
fn compile(name: &str, text: &str, path: &Path) {
    let mut model = text::parse(name, text).unwrap_or_else(|e| panic!("{e}"));
    sample::fill_weights(&mut model, 1).unwrap();
    let chat_template = Some("{% for m in messages %}{{ m.content }} {% endfor %}".into());
    model.info.tokenizer = Some(TokenizerInfo { json: TOKENIZER.into(), chat_template, ..TokenizerInfo::default() });
    let limits = LimitsRequest { tokens: 8, rows: 8, sequences: 2, ..LimitsRequest::default() };
    let options = CompileOptions { limits, ..CompileOptions::default() };
    oracle::assemble(model, mansard_backends::target("x86-64-v3").unwrap(), &options, path).unwrap();
}

/// Logits of a prompt beside a short one, then of a token for each.
fn logits(path: &Path) -> Vec<Vec<f32>> {
    let opened = Opened::open(path).unwrap_or_else(|e| panic!("{e}"));
    let prompt = opened.tokens().unwrap().encode("one two three", false).unwrap();
    assert_eq!(prompt, [1, 2, 3]);
    let mut engine = opened.engine(&EngineOptions { threads: Some(2), ..EngineOptions::default() }).unwrap();
    let (a, b) = (engine.new_sequence(), engine.new_sequence());
    let mut rows = vec![];
    for tokens in [[&prompt[..], &[7]], [&[4], &[5]]] {
        let work: Vec<Work<'_>> = [a, b]
            .into_iter()
            .zip(tokens)
            .map(|(sequence, tokens)| Work { sequence, tokens, rows: Rows::All })
            .collect();
        let out = engine.step(&work).unwrap();
        rows.extend(out.rows("logits").unwrap().iter().map(<[f32]>::to_vec));
    }
    rows
}

fn stored() -> Vec<PathBuf> {
    let files = fs::read_dir(here().join("artifacts")).unwrap().map(|f| f.unwrap().path());
    files.filter(|p| p.extension().is_some_and(|e| e == "mansard")).collect()
}

fn corpus(target: &str) -> PathBuf {
    here().join("../fuzz/corpus").join(target)
}

#[test]
fn every_format_is_stored() {
    for format in 1..=FORMAT_VERSION {
        let path = here().join(format!("artifacts/format-{format}.mansard"));
        let artifact = Artifact::open(&path, &OpenOptions::default()).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(artifact.manifest().format_version, format);
    }
}

#[test]
fn stored_artifacts_say_what_they_said() {
    if std::env::consts::ARCH != "x86_64" {
        let _ = std::io::stderr().write_all(b"skipped: the stored artifacts are for x86-64\n");
        return;
    }
    for path in stored() {
        let said: Value = serde_json::from_slice(&fs::read(path.with_extension("json")).unwrap()).unwrap();
        let rows = logits(&path);
        assert_eq!(said.as_array().unwrap().len(), rows.len());
        for (row, said) in rows.iter().zip(said.as_array().unwrap()) {
            for (found, said) in row.iter().zip(said.as_array().unwrap()) {
                let said = said.as_f64().unwrap() as f32;
                assert!((found - said).abs() < 1e-5, "{}: it said {said}, now {found}", path.display());
            }
        }
    }
}

#[test]
fn the_artifact_corpus_is_answered() {
    let mut seen = 0;
    for file in fs::read_dir(corpus("artifact")).unwrap().map(|f| f.unwrap().path()) {
        seen += 1;
        let good = file.file_name().unwrap().to_string_lossy().starts_with("ok-");
        match Artifact::open(&file, &OpenOptions::default()) {
            Ok(artifact) if good => {
                let engine = Engine::new(artifact.into(), &EngineOptions::default());
                engine.unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            }
            Err(e) if !good => {
                assert!(matches!(e.kind(), Kind::Input | Kind::Unsupported), "{e}");
                assert!(e.to_string().contains(&*file.file_name().unwrap().to_string_lossy()), "no place: {e}");
            }
            Ok(_) => panic!("{} opens", file.display()),
            Err(e) => panic!("{e}"),
        }
    }
    assert!(seen >= 8, "only {seen} files in the corpus");
}

/// What the fuzz target does: an error, or a model that prints and parses to itself.
fn answer(source: &str) -> bool {
    let Ok(model) = text::parse("input", source) else { return false };
    let printed = text::print_model(&model);
    let again = text::parse("printed", &printed).unwrap_or_else(|e| panic!("{e}\n{printed}"));
    assert_eq!(printed, text::print_model(&again));
    verify::verify_model(&model).is_ok()
}

#[test]
fn the_text_corpus_is_answered() {
    let mut seen = 0;
    for file in fs::read_dir(corpus("text_ir")).unwrap().map(|f| f.unwrap().path()) {
        seen += 1;
        let bytes = fs::read(&file).unwrap();
        let good = file.file_name().unwrap().to_string_lossy().starts_with("ok-");
        assert_eq!(answer(&String::from_utf8_lossy(&bytes)), good, "{}", file.display());
        // And damaged at a few hundred places.
        for at in (0..bytes.len()).step_by(bytes.len() / 300 + 1) {
            answer(&String::from_utf8_lossy(&bytes[..at]));
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            answer(&String::from_utf8_lossy(&flipped));
        }
    }
    assert!(seen >= 6, "only {seen} files in the corpus");
}

/// A header with another manifest, hashed anew, so that only the manifest's own figures are wrong.
fn with_manifest(file: &[u8], change: impl FnOnce(&mut Manifest)) -> Vec<u8> {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
    let mut manifest = Manifest::from_json(header["__metadata__"][METADATA_KEY].as_str().unwrap()).unwrap();
    change(&mut manifest);
    header["__metadata__"][METADATA_KEY] = json!(manifest.to_json_with_hash().unwrap());
    with_header(file, &header)
}

fn with_header(file: &[u8], header: &Value) -> Vec<u8> {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut text = header.to_string().into_bytes();
    text.resize(text.len().next_multiple_of(4096).max(length + 8) - 8, b' ');
    [&(text.len() as u64).to_le_bytes(), &text[..], &file[8 + length..]].concat()
}

/// Writes the artifact of this format, unless it is there, and the damaged ones.
#[test]
#[ignore = "writes files of the repository"]
fn write_missing_artifacts() {
    let folder = here().join("artifacts");
    let current = folder.join(format!("format-{FORMAT_VERSION}.mansard"));
    if !current.exists() {
        compile("tiny.mir", &fs::read_to_string(folder.join("tiny.mir")).unwrap(), &current);
        fs::write(current.with_extension("json"), serde_json::to_string(&logits(&current)).unwrap()).unwrap();
    }
    let table = "graph @all(%tokens: i32[t], %rows: i32[r]) stage imported { %w = weight \"table\" : f32[8, 16]
        %x = embed %tokens, %w %logits = select_rows %x, %rows return logits = %logits }
        model @table { info {architecture = \"table\", context = 64, vocab = 8, hidden = 16, encoder = false}
        call @all output logits }";
    let path = corpus("artifact").join("ok-table");
    compile("table", table, &path);
    let good = fs::read(&path).unwrap();
    let length = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let flipped = |at: usize| [&good[..at], &[good[at] ^ 0x10], &good[at + 1..]].concat();
    let mut sections: Value = serde_json::from_slice(&good[8..8 + length]).unwrap();
    sections["weights/table"]["data_offsets"] = json!([0u64, 1u64 << 60]);
    let files: [(&str, Vec<u8>); 12] = [
        ("empty", vec![]),
        ("half", good[..good.len() / 2].to_vec()),
        ("header-only", good[..8 + length].to_vec()),
        ("last-byte-missing", good[..good.len() - 1].to_vec()),
        ("length", [&(1u64 << 60).to_le_bytes(), &good[8..]].concat()),
        ("flipped-length", flipped(1)),
        ("flipped-manifest", flipped(300)),
        ("flipped-code", flipped(8 + length + 5)),
        ("flipped-weight", flipped(good.len() - 60)),
        ("offsets", with_header(&good, &sections)),
        ("arena", with_manifest(&good, |m| m.program.buffers[0].offset = 1 << 60)),
        ("entry", with_manifest(&good, |m| m.code[0].entries[0] = 1 << 40)),
    ];
    for (name, bytes) in files {
        fs::write(corpus("artifact").join(format!("bad-{name}")), bytes).unwrap();
    }
}
