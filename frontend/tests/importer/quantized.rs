//! Checkpoints quantized elsewhere against the logits that their writer computed (`tests/goldens/quantized/make.py`): as
//! reals, and as they are kept.

use crate::{evaluate, ids, json as parsed, read_npy, shared};
use mansard_frontend::{Options, open};
use mansard_ir::{DType, Error, Model};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn folder(name: &str) -> PathBuf {
    shared().join("goldens/quantized").join(name)
}

fn reals(path: &Path) -> Model {
    open(path, &Options { float_weights: true, ..Options::default() }).unwrap_or_else(|e| panic!("{e}"))
}

/// The model's logits are the writer's.
fn agrees(name: &str, model: &Model, most: f32) {
    let got = evaluate(model, &ids(&parsed(&folder(name).join("tokens.json"))), "logits");
    let want = read_npy(&folder(name).join("logits.npy"));
    let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
    let worst = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / largest;
    assert!(got.len() == want.len() && worst <= most, "{name}: off by {worst:e} of the largest");
}

/// Logits both ways; and every matrix is of the expected format and has, bit for bit, the reals that the file states.
fn check(name: &str, formats: &[(&str, DType)]) {
    let floats = reals(&folder(name));
    agrees(name, &floats, 3e-6);
    let kept = crate::import(&folder(name));
    // Scales that are stored as f32 are rounded to f16: by a 4096th at most.
    agrees(name, &kept, if formats.iter().all(|(_, dtype)| dtype.is_integer()) { 2e-4 } else { 1e-3 });
    for (module, dtype) in formats {
        let of = |model: &Model| model.weights.get(&format!("model.layers.0.{module}.weight")).unwrap().clone();
        let weight = of(&kept);
        assert_eq!(weight.dtype_shape().0, *dtype, "{name}: {module}");
        let (found, stated) = (weight.read_all().unwrap(), of(&floats).read_all().unwrap());
        // Scales of nvfp4 are products, those of 8-bit floats are stored as f32: both are rounded to f16.
        let off = if *dtype == DType::NVFP4 || !dtype.is_integer() { 1.0 / 2048.0 } else { 0.0 };
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= off * b.abs();
        assert!(found.iter().zip(&stated).all(near), "{name}: {module}");
    }
    assert_eq!(kept.weights.get("lm_head.weight").unwrap().dtype_shape().0, DType::F16);
}

const MODULES: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

fn all(dtype: DType) -> [(&'static str, DType); 7] {
    MODULES.map(|module| (module, dtype))
}

#[test]
fn gptq() {
    check("gptq", &all(DType::INT4_G64));
    check("gptq_v2", &all(DType::UINT4_G32));
}

#[test]
fn awq() {
    check("awq", &all(DType::UINT4_G32));
}

#[test]
fn compressed_tensors() {
    let formats =
        [DType::Q4_0, DType::UINT4_G64, DType::Q8_0, DType::UINT4_G32, DType::INT8_G64, DType::NVFP4, DType::MXFP4];
    check("compressed", &MODULES.into_iter().zip(formats).collect::<Vec<_>>());
}

#[test]
fn floats_of_8_bits() {
    for name in ["compressed_fp8", "fp8", "fp8_whole"] {
        check(name, &all(DType::E4M3_G32));
    }
}

#[test]
fn what_no_format_holds_is_read_as_reals() {
    for (name, reason) in [("gptq_act_order", "an order of their own"), ("fp8_narrow", "8-bit floats in groups of 16")]
    {
        agrees(name, &reals(&folder(name)), 3e-6);
        let error = open(&folder(name), &Options::default()).unwrap_err();
        assert!(error.exit_code() == 4 && error.to_string().contains(reason), "{error}");
        assert!(error.to_string().contains("_proj.weight"), "{error}");
    }
}

/// A copy of a checkpoint with changed settings and a changed header; data stays.
fn changed(name: &str, settings: impl Fn(&mut Value), header: impl Fn(&mut Value)) -> Error {
    let copy = tempfile::tempdir().unwrap();
    let mut config = parsed(&folder(name).join("config.json"));
    settings(&mut config["quantization_config"]);
    std::fs::write(copy.path().join("config.json"), config.to_string()).unwrap();
    let bytes = std::fs::read(folder(name).join("model.safetensors")).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut entries: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    header(&mut entries);
    let text = entries.to_string();
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.bytes());
    out.extend(&bytes[8 + length..]);
    std::fs::write(copy.path().join("model.safetensors"), out).unwrap();
    match open(copy.path(), &Options::default()) {
        Ok(model) => {
            let read = model.weights.iter().find_map(|(_, weight)| weight.read_all().err());
            read.unwrap_or_else(|| panic!("{name}: nothing was wrong"))
        }
        Err(error) => error,
    }
}

#[test]
fn damaged_and_unknown() {
    let q = "model.layers.0.self_attn.q_proj";
    let rename = |last: &'static str| {
        move |header: &mut Value| {
            let entry = header.as_object_mut().unwrap().remove(&format!("{q}.{last}")).unwrap();
            header[format!("{q}.other")] = entry;
        }
    };
    let shape = |last: &'static str, shape: [usize; 2]| {
        move |header: &mut Value| header[format!("{q}.{last}")]["shape"] = shape.into_iter().collect::<Value>()
    };
    let set = |key: &'static str, value: Value| move |settings: &mut Value| settings[key] = value.clone();
    let inputs = |value: Value| set("config_groups", json!({ "group_0": { "input_activations": value } }));
    let named = |name: String| {
        move |header: &mut Value| {
            let entry = header.as_object_mut().unwrap().remove("model.norm.weight").unwrap();
            header[&name] = entry;
        }
    };
    let same = |_: &mut Value| ();
    let cases = [
        (changed("gptq", same, rename("scales")), 3, "q_proj.scales` is missing"),
        (changed("gptq", same, rename("qzeros")), 3, "q_proj.qzeros` is missing"),
        (changed("awq", same, rename("scales")), 3, "q_proj.scales` is missing"),
        (changed("compressed", same, rename("weight_scale")), 3, "q_proj.weight_scale` is missing"),
        (changed("compressed", same, rename("weight_shape")), 3, "q_proj.weight_shape` is missing"),
        (changed("fp8", same, rename("weight_scale_inv")), 3, "q_proj.weight_scale_inv` is missing"),
        (changed("gptq", same, shape("scales", [2, 32])), 3, "expected shape [1, 64], found [2, 32]"),
        (changed("gptq", same, shape("qweight", [16, 32])), 3, "q_proj"),
        (changed("awq", same, shape("qzeros", [1, 16])), 3, "expected shape [2, 8], found [1, 16]"),
        (changed("compressed", same, shape("weight_packed", [32, 16])), 3, "q_proj"),
        (changed("gptq", set("quant_method", "squeezed".into()), same), 4, "quantization method `squeezed`"),
        (changed("gptq", set("bits", 3.into()), same), 4, "`bits` is 3; supported: 4, 8"),
        (changed("gptq", set("group_size", 0.into()), same), 3, "expected a positive number or -1, found 0"),
        (changed("gptq", set("group_size", 48.into()), same), 3, "groups of 48"),
        (changed("gptq", set("checkpoint_format", "marlin".into()), same), 4, "marlin"),
        (changed("gptq", set("checkpoint_format", "gptq_v2".into()), same), 3, "zero point"),
        (changed("awq", set("version", "gemv".into()), same), 4, "gemv"),
        (changed("compressed", set("format", "marlin-24".into()), same), 4, "marlin-24"),
        // What would change values without being seen.
        (changed("compressed", set("kv_cache_scheme", json!({ "num_bits": 8 })), same), 4, "`kv_cache_scheme`"),
        (changed("compressed", set("transform_config", json!({ "R1": {} })), same), 4, "`transform_config`"),
        (changed("compressed", set("quantization_status", "frozen".into()), same), 4, "`quantization_config.quantiz"),
        (changed("compressed", inputs(json!({ "num_bits": 8, "dynamic": false })), same), 4, "dynamic` is false"),
        (changed("compressed", inputs(json!({ "num_bits": 4, "dynamic": "local" })), same), 4, "dynamic` is \"local\""),
        (changed("compressed", inputs(json!({ "num_bits": 8 })), same), 4, "dynamic` is false"),
        (changed("fp8", set("activation_scheme", "static".into()), same), 4, "activation_scheme"),
        (changed("gptq", set("dynamic", json!({ "+:down": { "bits": 8 } })), same), 4, "`dynamic`"),
        (changed("gptq", same, named(format!("{q}.input_scale"))), 4, "q_proj.input_scale`"),
        (changed("compressed", same, named("model.layers.0.self_attn.k_scale".to_owned())), 4, "self_attn.k_scale`"),
        // Excluded, and quantized all the same.
        (changed("compressed", set("ignore", json!([q])), same), 3, "holds codes"),
        (changed("awq", set("modules_to_not_convert", json!(["self_attn"])), same), 3, "holds codes"),
        (changed("fp8", set("modules_to_not_convert", json!([q])), same), 3, "holds codes"),
    ];
    for (error, code, text) in cases {
        assert!(error.exit_code() == code && error.to_string().contains(text), "expected {text} ({code}): {error}");
    }
}
