//! What is written, and what is left behind when writing fails.

use super::*;
use crate::harness::{float_weight, quantized_weight};
use mansard_ir::layout::packed_bytes;
use mansard_ir::model::{TokenizerInfo, Weight};
use mansard_ir::plan::{Pack, Program, WeightSpec};
use mansard_ir::{Attrs, DType, Dim, Type, ValueId};

struct Parts {
    plan: Plan,
    info: ModelInfo,
    weights: WeightTable,
    images: Vec<(Target, Image)>,
    provenance: Provenance,
}

impl Parts {
    fn new() -> Parts {
        let mut parts = Parts {
            plan: Plan { kernels: vec![], packs: vec![], program: Program::default() },
            info: ModelInfo::default(),
            weights: WeightTable::default(),
            images: vec![(
                crate::target("x86-64-v3").unwrap(),
                Image { bytes: vec![0xc3; 128], entries: vec![], tiles: vec![] },
            )],
            provenance: Provenance::default(),
        };
        parts.info.tokenizer = Some(TokenizerInfo { json: "{\"a\": \"é\"}".into(), ..TokenizerInfo::default() });
        parts.add("w", quantized_weight(DType::Q6_K, &[40, 512], 1));
        parts.add("g", float_weight(DType::F32, &[512], 2));
        parts.add("f", float_weight(DType::F32, &[17, 512], 3));
        let recipe = &mut parts.plan.packs[2].recipe;
        let g = recipe.weight("g", Type::f32([Dim::N(512)]));
        let scaled = recipe.push("scale_columns", &[ValueId(0), g], Attrs::none()).unwrap();
        recipe.results[0].1 = scaled;
        parts
    }

    fn add(&mut self, name: &str, weight: Weight) {
        let (dtype, shape) = weight.dtype_shape();
        let (ty, bytes) = (weight.ty.to_string(), packed_bytes(dtype, &shape));
        self.plan.program.weights.push(WeightSpec { name: name.into(), ty, bytes, recipe: None });
        self.plan.packs.push(Pack::entry(name, weight.ty.clone()));
        self.weights.insert(name, weight);
    }

    fn write(&self, path: &Path, threads: usize) -> Result<Written> {
        let Parts { plan, info, weights, images, provenance } = self;
        write(
            path,
            &Contents { plan, info, weights, images, ptx: &[], synthetic: None, provenance },
            threads,
            &mut |done, all| assert!(done <= all),
        )
    }
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_file_is_what_the_header_says() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.mansard");
    let written = Parts::new().write(&path, 2).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!((bytes.len(), names(directory.path())), (written.bytes, vec!["m.mansard".to_owned()]));
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let (header, data) = bytes[8..].split_at(length);
    assert_eq!((8 + length) % DATA_ALIGN, 0);
    let header: Value = serde_json::from_slice(header).unwrap();
    let manifest = Manifest::from_json(header["__metadata__"][METADATA_KEY].as_str().unwrap()).unwrap();
    assert_eq!(manifest, written.manifest);
    let mut end = 0;
    for (name, entry) in header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__") {
        let range =
            entry["data_offsets"][0].as_u64().unwrap() as usize..entry["data_offsets"][1].as_u64().unwrap() as usize;
        assert_eq!((range.start, range.len() % SECTION_ALIGN), (end, 0), "{name} has no gap before it");
        end = range.end;
        assert_eq!(blake3::hash(&data[range.clone()]).to_hex().as_str(), manifest.hashes[name], "{name}");
        assert!(name != TOKENIZER_SECTION || data[range].starts_with("{\"a\": \"é\"}  ".as_bytes()));
    }
    assert_eq!((end, manifest.hashes.len()), (data.len(), 5));
}

#[test]
fn same_inputs_same_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let (a, b) = (directory.path().join("a"), directory.path().join("b"));
    Parts::new().write(&a, 1).unwrap();
    Parts::new().write(&b, 3).unwrap();
    assert!(std::fs::read(a).unwrap() == std::fs::read(b).unwrap());
}

#[test]
fn a_failure_leaves_what_was_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.mansard");
    std::fs::write(&path, "before").unwrap();
    let mut parts = Parts::new();
    parts.plan.packs[1] = Pack::entry("gone", Type::f32([Dim::N(512)]));
    let error = parts.write(&path, 2).unwrap_err().to_string();
    assert!(error.contains("section `weights/g`: gone: the model has no weight `gone`"), "{error}");
    parts = Parts::new();
    parts.plan.program.weights[0].bytes += 64;
    assert!(parts.write(&path, 2).unwrap_err().to_string().contains("expected"));
    parts = Parts::new();
    parts.plan.program.weights[0].name = "g".into();
    assert!(parts.write(&path, 2).unwrap_err().to_string().contains("two sections are called `weights/g`"));
    assert_eq!((std::fs::read(&path).unwrap(), names(directory.path()).len()), (b"before".to_vec(), 1));
}

#[test]
fn places_that_cannot_hold_a_file_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let error = Parts::new().write(directory.path(), 1).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    let error = Parts::new().write(&directory.path().join("none/m.mansard"), 1).unwrap_err();
    assert_eq!(error.exit_code(), 5, "{error}");
    assert!(error.to_string().contains("none/m.mansard"), "{error}");
}
