//! Artifacts as they should be, damaged, and hostile: each of the latter is one error that names the place.

mod support;

use mansard_ir::Error;
use mansard_ir::artifact::{Manifest, PtxCode, TOKENIZER_SECTION};
use mansard_ir::file::MappedFile;
use mansard_ir::plan::{Arg, BufferId, KernelId, WeightId};
use mansard_runtime::{Artifact, OpenOptions};
use support::{counting_parts, file, write};

fn ptx(section: &str, kernels: usize) -> PtxCode {
    let [section, chip, version] = [section, "sm_80", "9.0"].map(String::from);
    PtxCode { section, chip, version, threads: 256, shared_bytes: vec![0; kernels], cubin: None }
}

fn open(bytes: &[u8]) -> Result<Artifact, Error> {
    Artifact::open(write(bytes).path(), &OpenOptions::default())
}

fn refusal(bytes: &[u8]) -> String {
    let error = open(bytes).expect_err("a refusal");
    assert!(matches!(error.exit_code(), 3 | 4), "{error}");
    assert!(error.to_string().contains(".mansard"), "names the file: {error}");
    error.to_string()
}

#[test]
fn a_sound_artifact_opens() {
    let mut parts = counting_parts();
    let artifact = Artifact::open(parts.write().path(), &OpenOptions::default()).unwrap();
    assert_eq!(artifact.manifest(), &parts.manifest);
    let names: Vec<&str> = artifact.sections().iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["code/native", "tokenizer.json", "weights/five"]);
    assert_eq!(artifact.tokenizer_json().unwrap(), Some(support::TOKENIZER));
    assert_eq!(artifact.weights().unwrap(), [&parts.sections[2].1[..]]);
}

#[test]
fn flipped_bytes_are_found_everywhere() {
    let bytes = counting_parts().bytes();
    let file = write(&bytes);
    for at in (0..8).chain((8..bytes.len()).step_by(5)) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1;
        std::fs::write(file.path(), &damaged).unwrap();
        let error = Artifact::open(file.path(), &OpenOptions::default()).expect_err(&format!("byte {at}"));
        assert!(matches!(error.exit_code(), 3 | 4), "byte {at}: {error}");
    }
}

#[test]
fn damage_is_placed() {
    let mut bytes = counting_parts().bytes();
    let last = bytes.len() - 1;
    bytes[last] ^= 0x80;
    let error = refusal(&bytes);
    assert!(error.contains("section `weights/five`: expected bytes that hash to `"), "{error}");
    let trusting = OpenOptions { verify_weights: false };
    assert!(Artifact::open(write(&bytes).path(), &trusting).is_ok());
    bytes[last - 64] ^= 0x80;
    assert!(Artifact::open(write(&bytes).path(), &trusting).is_err(), "the tokenizer is always checked");
}

#[test]
fn truncations_and_additions_are_found() {
    let bytes = counting_parts().bytes();
    for length in (0..bytes.len()).step_by(37).chain([bytes.len() - 1]) {
        refusal(&bytes[..length]);
    }
    refusal(&[&bytes[..], &[0]].concat());
    refusal(&[&bytes[..], &[0; 4096]].concat());
}

#[test]
fn a_part_of_a_file_opens_where_it_lies() {
    let bytes = counting_parts().bytes();
    let (start, end) = (8192, 8192 + bytes.len());
    let file = write(&[&[7; 8192][..], &bytes, &[9; 100]].concat());
    let of = |range| Artifact::of(MappedFile::open(file.path())?.part(range)?, &OpenOptions::default());
    let inside = of(start..end).unwrap();
    assert_eq!((inside.file_bytes(), inside.weights().unwrap()[0][0]), (bytes.len(), 5));
    for range in [0..end, start..end - 1, start..end + 1, start..start, start + 64..end, end..end + 100] {
        assert_eq!(of(range.clone()).expect_err("a refusal").exit_code(), 3, "{range:?}");
    }
    for range in [start..end + 101, end + 200..end + 201, usize::MAX..usize::MAX, 0..usize::MAX] {
        assert!(of(range).expect_err("a refusal").to_string().contains("expected a part"));
    }
}

#[test]
fn other_files_are_no_artifacts() {
    refusal(b"GGUF and so on, for quite a few bytes");
    assert!(refusal(&file("{}", &[])).contains("no artifact of mansard"));
    let missing = Artifact::open("/nonexistent/model.mansard", &OpenOptions::default()).unwrap_err();
    assert_eq!(missing.exit_code(), 5);
    assert!(Artifact::open("/", &OpenOptions::default()).is_err());
}

#[test]
fn hostile_headers_are_refused() {
    for length in [1u64 << 60, u64::MAX, 1 << 31, 1 << 63] {
        let mut bytes = counting_parts().bytes();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        assert!(refusal(&bytes).contains("its length at byte 0 says"), "{length}");
    }
    refusal(&file(&"[".repeat(200_000), &[]));
    refusal(&file(&format!("{{\"__metadata__\": {}", "{\"a\":".repeat(100_000)), &[]));
    let data = [0; 256];
    let tensor = |a: u64, b: u64| {
        format!("{{\"dtype\": \"U8\", \"shape\": [{}], \"data_offsets\": [{a}, {b}]}}", b.wrapping_sub(a))
    };
    for entries in [
        format!("\"a\": {}, \"b\": {}", tensor(0, 128), tensor(64, 256)), // overlapping
        format!("\"a\": {}, \"b\": {}", tensor(0, 64), tensor(128, 256)), // a gap
        format!("\"a\": {}", tensor(0, 1 << 60)),                         // beyond the file
        format!("\"a\": {}", tensor(0, 128)),                             // bytes left over
        format!("\"a\": {}, \"b\": {}", tensor(0, 256), tensor(256, 128)), // backwards
        format!("\"a\": {}, \"a\": {}", tensor(0, 128), tensor(128, 256)), // twice
        format!("\"a\": {}, \"b\": {}", tensor(0, 100), tensor(100, 256)), // unaligned
        "\"a\": {\"dtype\": \"F32\", \"shape\": [64], \"data_offsets\": [0, 256]}".into(),
        "\"a\": {\"dtype\": \"U8\", \"shape\": [-1], \"data_offsets\": [0, 256]}".into(),
        "\"a\": {\"dtype\": \"U8\", \"shape\": [1e300], \"data_offsets\": [0, 256]}".into(),
        "\"a\": 7".into(),
    ] {
        refusal(&file(&format!("{{{entries}}}"), &data));
    }
}

#[test]
fn figures_that_do_not_fit_are_refused() {
    type Change = fn(&mut Manifest);
    let changes: &[(&str, Change)] = &[
        ("format version 3", |m| m.format_version = 3),
        ("limits: expected tokens of 1 to", |m| m.program.limits.tokens = usize::MAX),
        ("limits: expected rows of 1 to", |m| m.program.limits.rows = 0),
        ("limits: expected sequences", |m| m.program.limits.sequences = 1 << 40),
        ("limits: expected context", |m| m.program.limits.context = 1 << 60),
        ("limits: expected tile", |m| m.program.limits.tile = 0),
        ("expected a vocabulary", |m| m.model.vocab = 1 << 33),
        ("expected an arena", |m| m.program.arena_bytes = 1 << 60),
        ("expected scratch", |m| m.program.scratch_bytes = 1 << 40),
        ("expected scratch", |m| m.program.scratch_bytes = 65),
        ("inside an arena of 4096", |m| m.program.buffers[1].offset = 4096),
        ("inside an arena", |m| m.program.buffers[1].offset = usize::MAX - 63),
        ("inside an arena", |m| m.program.buffers[1].row_bytes = usize::MAX),
        ("multiple of 64, found 8", |m| m.program.buffers[0].offset = 8),
        ("expected 128 packed bytes, found 64", |m| m.program.weights[0].bytes = 128),
        ("packed bytes", |m| m.program.weights[0].bytes = usize::MAX),
        ("`weights/six`", |m| m.program.weights[0].name = "six".into()),
        ("cache `tokens`", |m| m.program.caches[0].block_bytes = 0),
        ("cache `tokens`: expected one of 1 cache groups", |m| m.program.caches[0].group = 1),
        ("at most one cache group", |m| m.program.groups = vec![m.program.groups[0]; 2]),
        ("cache `tokens`", |m| m.program.caches[0].block_bytes = usize::MAX - 63),
        ("expected 4 entries", |m| m.code[0].entries.truncate(3)),
        ("expected entries below", |m| m.code[0].entries[2] = 1 << 60),
        ("PTX for sm_80: expected text in section `code/none`", |m| m.ptx = vec![ptx("code/none", 4)]),
        ("PTX for sm_80: expected 4 kernels, found 3", |m| m.ptx = vec![ptx(TOKENIZER_SECTION, 3)]),
        ("expected section `code/none`", |m| m.code[0].section = "code/none".into()),
        ("expected a variant for 2 tokens", |m| m.program.variants[1].tokens.min = 3),
        ("found none for 16", |m| m.program.variants[1].tokens.max = 15),
        ("at most 16, found one for 2 to 18446744073709551615", |m| m.program.variants[1].tokens.max = usize::MAX),
        ("found none for 1", |m| m.program.variants.clear()),
        ("expected one of 4 kernels, found k4", |m| m.program.variants[0].launches[0].kernel = KernelId(4)),
        ("one of 3 buffers, found number 3", |m| m.program.variants[1].launches[0].args[0] = Arg::Buffer(BufferId(3))),
        ("one of 1 weights", |m| m.program.variants[1].launches[0].args[0] = Arg::Weight(WeightId(u32::MAX))),
        ("expected 1 arguments", |m| m.program.variants[1].launches[0].args.push(Arg::Tokens)),
        ("at most 1024 arguments", |m| m.program.variants[0].launches[0].args = vec![Arg::Rows; 5000]),
        ("at least one output", |m| m.program.outputs.clear()),
        ("output `logits`", |m| m.program.outputs[0].buffer = BufferId(9)),
        ("expected rows of 17 floats", |m| m.program.outputs[0].width = 17),
        ("expected rows of", |m| m.program.outputs[0].width = usize::MAX / 2),
    ];
    for (expected, change) in changes {
        let mut parts = counting_parts();
        change(&mut parts.manifest);
        let error = refusal(&parts.bytes());
        assert!(error.contains(expected), "expected {expected:?} in {error:?}");
    }
}

#[test]
fn sections_and_hashes_agree() {
    let extra = || ("weights/extra".to_string(), vec![1; 64]);
    let mut parts = counting_parts();
    parts.sections.push(extra());
    open(&parts.bytes()).expect("a section that nothing uses does no harm");
    let mut parts = counting_parts();
    parts.bytes();
    parts.sections.push(extra());
    assert!(refusal(&parts.encode()).contains("`weights/extra`: expected its hash"));
    parts.bytes();
    parts.sections.pop();
    assert!(refusal(&parts.encode()).contains("expected section `weights/extra`"));
}
