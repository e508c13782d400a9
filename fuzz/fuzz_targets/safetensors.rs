//! Any bytes as the weights of a tiny llama: a model whose weights can be read, or an error.
#![no_main]

use mansard_frontend::{Options, open};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), include_str!("../corpus/config.json")).unwrap();
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    if let Ok(model) = open(folder.path(), &Options::default()) {
        mansard_ir::verify::verify_model(&model).unwrap();
        for (_, weight) in model.weights.iter() {
            weight.read_all().unwrap();
        }
    }
});
